"""The schemas of configurations, weight files, tokenizers and checkpoints: every fault is one line with its field."""

import argparse
import dataclasses
import json
import shutil

import pytest
import torch
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file

import lavin.weights.load
from lavin.mm_adapter import AdapterConfig
from lavin.runtime.schema import validate
from lavin.timm_compat import timm
from lavin.tokenizer import Tokenizer
from lavin.weights.adapters import AdapterSettings, adapter_parameters, read_adapters
from lavin.weights.base import open_base
from lavin.weights.hugging_face import Config
from lavin.weights.load import load_base
from lavin.weights.vision import open_vit
from tiny import IMAGE_SIZE, save_adapters, tiny_model, tiny_vit
from tiny_weights import LLAMA_3, write_hugging_face
from user_errors import change_json, error_message


def faults(fields: dict[str, tuple]) -> list[tuple]:
    return [(field, value) for field, values in fields.items() for value in values]


# --- Meta ---

@pytest.mark.parametrize("field, value", faults({
    "dim": ("128", None, -4, 0, 10**9, 32.0, True), "n_layers": (None, "2", 0, 10**9), "n_heads": (0, None, "4", -1),
    "multiple_of": (0, -16, 10**30), "norm_eps": (None, -1, 0, 1, "x"), "rope_theta": ("x", -1, 0, 10**400),
    "vocab_size": (None, "x", -2, 10**10), "n_kv_heads": (0, "2", 1.5), "ffn_dim_multiplier": (0, "x", 1e9),
    "use_scaled_rope": ("yes", 1), "rope_scaling_factor": (0, None)}))
def test_error_names_the_entry_of_params_json(base, tmp_path, field, value):
    shutil.copytree(base.weights / "tiny", tmp_path / "tiny")
    change_json(tmp_path / "tiny" / "params.json", {field: value})
    message = error_message(open_base, tmp_path / "tiny", 480)
    assert message.startswith(f"{tmp_path / 'tiny' / 'params.json'}: {field}: ")


def test_a_number_that_is_too_large_for_a_float(base, tmp_path):
    shutil.copytree(base.weights / "tiny", tmp_path / "tiny")
    path = tmp_path / "tiny" / "params.json"
    path.write_text(path.read_text().replace("1e-06", "1e-06, \"rope_theta\": 1e400"))
    assert "rope_theta: should be a finite number" in error_message(open_base, tmp_path / "tiny", 480)


@pytest.mark.parametrize("changes, words", [
    ({"n_heads": 5}, "5 heads do not divide its width 32"), ({"n_kv_heads": 3}, "3 key and value heads do not divide"),
    ({"n_heads": 32, "n_kv_heads": 32}, "width 1 of its heads is odd")])
def test_sizes_in_params_json_that_contradict_each_other(base, tmp_path, changes, words):
    shutil.copytree(base.weights / "tiny", tmp_path / "tiny")
    change_json(tmp_path / "tiny" / "params.json", changes)
    message = error_message(open_base, tmp_path / "tiny", 480)
    assert str(tmp_path / "tiny" / "params.json") in message and words in message


TENSOR = torch.zeros(2, 2)


@pytest.mark.parametrize("content, words", [
    ([TENSOR], "holds a list"), ({5: TENSOR}, "not 5"),
    ({"norm.weight": [0.0]}, "norm.weight: is no tensor but a list"),
    ({"norm.weight": None}, "norm.weight: is no tensor but None"),
    ({"norm.weight": TENSOR.int()}, "norm.weight: is a tensor of torch.int32"),
    ({"a": TENSOR, "b": TENSOR.bool(), "c": TENSOR.bool()}, "b: is a tensor of torch.bool, torch.strided, not of dense "
                                                            "floating-point numbers (and 1 more)"),
    ({"norm.weight": TENSOR.to(torch.float8_e4m3fn)}, "norm.weight: is a tensor of torch.float8_e4m3fn"),
    ({"norm.weight": TENSOR.to(torch.complex64)}, "norm.weight: is a tensor of torch.complex64"),
    ({"norm.weight": TENSOR.to_sparse()}, "norm.weight: is a tensor of torch.float32, torch.sparse_coo")])
def test_error_names_the_tensor(base, tmp_path, content, words):
    shutil.copytree(base.weights / "tiny", tmp_path / "tiny")
    path = tmp_path / "tiny" / "consolidated.00.pth"
    torch.save(content, path)
    message = error_message(open_base, tmp_path / "tiny", 480)
    assert str(path) in message and words in message


def test_shards_of_different_shapes(base, tmp_path):
    shutil.copytree(base.weights / "tiny", tmp_path / "tiny")
    tensors = torch.load(tmp_path / "tiny" / "consolidated.00.pth", weights_only=True)
    torch.save({**tensors, "norm.weight": torch.zeros(3)}, tmp_path / "tiny" / "consolidated.01.pth")
    assert "consolidated.01.pth does not hold the same" in error_message(open_base, tmp_path / "tiny", 480)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.attention.wo.weight", "norm.weight"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_with_other_dimensions(base, tmp_path, name, shape, shards):
    shutil.copytree(base.weights, tmp_path / "weights")
    folder = tmp_path / "weights" / "tiny"
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for i in range(shards):
        torch.save({**tensors, name: torch.zeros(shape)}, folder / f"consolidated.0{i}.pth")
    assert "consolidated" in error_message(load, tmp_path / "weights", "tiny", base.vision)


def load(weights, name, vision):
    return load_base(str(weights), str(name), str(vision), AdapterConfig(), torch.device("cpu"), torch.float32)


def test_the_tokenizer_is_checked_before_weights_are_loaded(base, tmp_path, monkeypatch):
    shutil.copytree(base.weights, tmp_path / "weights")
    change_json(tmp_path / "weights" / "tiny" / "params.json", {"vocab_size": 470})
    for function in ("open_vit", "load_frozen"):
        monkeypatch.setattr(lavin.weights.load, function, None)
    assert "480 pieces" in error_message(load, tmp_path / "weights", "tiny", base.vision)


# --- Hugging Face ---

@pytest.fixture(scope="module")
def hugging_face(tokenizer_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_hugging_face(folder, tokenizer_file, max_shard_size="50KB")
    return folder


@pytest.mark.parametrize("field, value", faults({
    "hidden_size": ("32", None, 0, 32.0, 10**9), "num_hidden_layers": (None, -1, 10**9), "head_dim": (0, "8"),
    "num_attention_heads": (0, "4"), "num_key_value_heads": (0, "2"), "vocab_size": (None, 0, "x"),
    "intermediate_size": (None, 56.0), "rms_norm_eps": (None, 0, -1, "x", 1), "rope_theta": (0, "x", None),
    "model_type": (7, None), "rope_parameters": ([], 7), "rope_scaling": ("yarn",), "tie_word_embeddings": ("no", 1),
    "attention_bias": ("x", 1), "mlp_bias": ("x",), "sliding_window": (0, "x"), "no_rope_layers": ("x", 1),
    "use_sliding_window": ("x", None), "max_position_embeddings": (0, None)}))
def test_error_names_the_entry_of_config_json(hugging_face, tmp_path, field, value):
    shutil.copy(hugging_face / "config.json", tmp_path)
    change_json(tmp_path / "config.json", {field: value})
    assert error_message(open_base, tmp_path, 480).startswith(f"{tmp_path / 'config.json'}: {field}: ")


@pytest.mark.parametrize("changes, words", [
    ({"rope_theta": "x"}, "rope_parameters.rope_theta: "), ({"factor": None}, "rope_parameters.factor: "),
    ({"low_freq_factor": 4.0}, "low_freq_factor must lie below"), ({"rope_type": 7}, "rope_parameters.rope_type: "),
    ({"original_max_position_embeddings": 0}, "original_max_position_embeddings: ")])
def test_error_names_the_entry_of_rope_parameters(hugging_face, tmp_path, changes, words):
    shutil.copy(hugging_face / "config.json", tmp_path)
    change_json(tmp_path / "config.json", {"rope_parameters": {**LLAMA_3, **changes}})
    assert words in error_message(open_base, tmp_path, 480)


def test_a_missing_entry_of_rope_parameters(hugging_face, tmp_path):
    shutil.copy(hugging_face / "config.json", tmp_path)
    change_json(tmp_path / "config.json", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}})
    assert "no entry 'low_freq_factor'" in error_message(open_base, tmp_path, 480)


JSON_VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats()
    | strategies.sampled_from(["llama", "silu", "default", "x"]),
    lambda children: strategies.lists(children, max_size=3) | strategies.dictionaries(
        strategies.sampled_from(["rope_type", "factor", "rope_theta"]), children, max_size=3))


@settings(max_examples=300, deadline=None)
@given(field=strategies.sampled_from(sorted(Config.__annotations__)), value=JSON_VALUES)
def test_any_value_in_config_json_is_taken_or_refused_in_one_line(hugging_face, tmp_path_factory, field, value):
    folder = tmp_path_factory.getbasetemp() / "any value"
    folder.mkdir(exist_ok=True)
    shutil.copy(hugging_face / "config.json", folder)
    change_json(folder / "config.json", {field: value})
    assert str(folder) in error_message(open_base, folder, 480)  # there are no weights


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_projection_with_other_dimensions(hugging_face, base, tmp_path, shape):
    shutil.copytree(hugging_face, tmp_path / "hf")
    name = "model.layers.0.self_attn.q_proj.weight"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    path = tmp_path / "hf" / index["weight_map"][name]
    save_file({**load_file(path), name: torch.zeros(shape)}, path)
    message = error_message(load, "nowhere", tmp_path / "hf", base.vision)
    assert f"layers.0.attention.wq.weight is {list(shape)} and the model has [32, 32]" in message


@pytest.mark.parametrize("content, words", [
    ({}, "weight_map: is missing"), ({"weight_map": []}, "weight_map: should be a valid dictionary"),
    ({"weight_map": {}}, "weight_map: should have at least 1 item"), ({"weight_map": {"a": 7}}, "weight_map.a: "),
    ({"weight_map": {"a": "../model.safetensors"}}, "weight_map.a: is no plain name"), ([], "a valid dictionary")])
def test_error_names_the_entry_of_the_index(hugging_face, tmp_path, content, words):
    shutil.copytree(hugging_face, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    message = error_message(open_base, tmp_path / "hf", 480)
    assert str(path) in message and words in message


# --- ViT ---

def write_vit(folder, vit=None, architecture="vit_tiny_patch16_224", **model_args):
    size = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({
        "architecture": architecture, "model_args": {**size, **model_args},
        "pretrained_cfg": {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "num_classes": 0}}))
    save_file((vit or tiny_vit()).state_dict(), folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("changes, words", [
    ({"architecture": None}, "architecture: "), ({"architecture": 7}, "architecture: "),
    ({"architecture": ""}, "is empty"), ({"model_args": []}, "model_args: "), ({"pretrained_cfg": None}, "_cfg: "),
    *[({"model_args": {field: value}}, f"model_args.{field}: ") for field, value in faults({
        "depth": (10**9, 0, None), "embed_dim": (10**9, "24"), "num_heads": (0, 1.5), "patch_size": (0, None)})],
    ({"model_args": {"img_size": "x"}}, "cannot make a timm model of"),
    ({"model_args": {"no_such": 1}}, "cannot make a timm model of")])
def test_error_names_the_entry_of_a_timm_config(tmp_path, changes, words):
    vit = write_vit(tmp_path / "vit")
    change_json(tmp_path / "vit" / "config.json", changes)
    message = error_message(open_vit, vit)
    assert str(tmp_path / "vit" / "config.json") in message and words in message


def test_a_config_of_another_network(tmp_path):
    write_vit(tmp_path / "vit")
    change_json(tmp_path / "vit" / "config.json", {"architecture": "resnet18", "model_args": {}})
    assert "no ViT with a class token" in error_message(open_vit, str(tmp_path / "vit"))


@pytest.mark.parametrize("changes, words", [
    ({"img_size": 32}, "pos_embed of [1, 17, 24], and the weights were trained with [1, 5, 24]"),
    ({"patch_size": 4, "img_size": 8}, "patch_embed.proj.weight of [24, 3, 4, 4], and"),
    ({"img_size": [16, 24]}, "of size (16, 24)"), ({"in_chans": 1}, "1 channel, not")])
def test_weights_are_not_resampled_to_another_size_in_silence(tmp_path, changes, words):
    assert words in error_message(open_vit, write_vit(tmp_path / "vit", **changes))


def test_weights_in_an_entry_of_a_training_checkpoint(tmp_path):
    """timm's train.py saves them so."""
    vit = tiny_vit()
    write_vit(tmp_path, vit)
    torch.save({"state_dict": vit.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "a.pth")
    _, tensors = open_vit(str(tmp_path / "a.pth"))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in vit.state_dict().items())
    torch.save({"state_dict": {"cls_token": 7}}, tmp_path / "b.pth")
    assert "b.pth: cls_token: is no tensor but 7" in error_message(open_vit, str(tmp_path / "b.pth"))


def test_tensors_with_other_names_or_shapes_than_a_clip(tmp_path):
    clip = timm.create_model("vit_base_patch16_clip_quickgelu_224", img_size=IMAGE_SIZE, patch_size=8, embed_dim=128,
                             depth=6, num_heads=2, num_classes=0).state_dict()
    path = tmp_path / "clip.safetensors"
    for name, tensor in (("pos_embed", None), ("pos_embed", torch.zeros(5, 128)), ("pos_embed", torch.zeros(1, 6, 128)),
                         ("patch_embed.proj.weight", torch.zeros(128)), ("blocks.0.mlp.fc1.weight", torch.zeros(()))):
        tensors = {**clip, name: tensor}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        assert f"--vision_model {path}: its " in error_message(open_vit, str(path))


def write_clip(folder, **changes):
    import transformers
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=128, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=8))
    model.save_pretrained(folder)
    change_json(folder / "config.json", changes)
    return str(folder)


@pytest.mark.parametrize("changes, words", [
    ({"num_attention_heads": 0}, "num_attention_heads: "), ({"num_attention_heads": "4"}, "num_attention_heads: "),
    ({"num_attention_heads": 7}, "cannot make a timm model of its weights"), ({"hidden_act": 7}, "hidden_act: "),
    ({"image_size": 32}, "image_size 32, but the weights have 16"), ({"vision_config": []}, "a valid dictionary"),
    ({"num_hidden_layers": 5}, "num_hidden_layers 5, but the weights have 6"),
    ({"image_size": None}, "image_size: ")])
def test_error_names_the_entry_of_a_clip_config(tmp_path, changes, words):
    assert words in error_message(open_vit, write_clip(tmp_path / "clip", **changes))


def test_projections_of_different_widths(base, tmp_path):
    write_clip(tmp_path / "clip")
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.0.self_attn.k_proj.weight"))
    save_file({**tensors, name: torch.zeros(3, 2)}, tmp_path / "clip" / "model.safetensors")
    assert "lacks 1 tensor (blocks.0.attn.qkv.weight)" in error_message(load, base.weights, "tiny", tmp_path / "clip")


# --- Tokenizers ---

@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    from tokenizers import ByteLevelBPETokenizer
    folder = tmp_path_factory.mktemp("bpe")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["The answer is B."], vocab_size=270, special_tokens=["<begin>", "<end>"])
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("file, content, words", [
    ("tokenizer_config.json", {"bos_token": 7}, "bos_token: should be a valid string, not 7"),
    ("tokenizer_config.json", {"bos_token": {"content": 7}}, "bos_token: should be a valid string, not 7"),
    ("tokenizer_config.json", [], "should be a valid dictionary"),
    ("config.json", {"bos_token_id": "1"}, "bos_token_id: should be a valid integer, not '1'"),
    ("config.json", {"bos_token_id": []}, "bos_token_id: should be a valid integer"),
    ("config.json", {"bos_token_id": [1.5]}, "bos_token_id: should be a valid integer, not 1.5"),
    ("config.json", {"bos_token_id": -1}, "bos_token_id: tokenizer.json has no token -1"),
    ("config.json", {"bos_token_id": 10**6}, "bos_token_id: tokenizer.json has no token 1000000"),
    ("tokenizer_config.json", {"bos_token": "<s>"}, "bos_token: tokenizer.json has no token '<s>'"),
    ("tokenizer_config.json", {"bos_token": ""}, "bos_token: tokenizer.json has no token ''"),
    ("config.json", {"bos_token_id": 0, "eos_token_id": True}, "eos_token_id: should be a valid integer, not True")])
def test_error_names_the_special_token(bpe_folder, tmp_path, file, content, words):
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')  # which a wrong name must not hide
    (tmp_path / file).write_text(json.dumps(content))
    message = error_message(Tokenizer, tmp_path / "tokenizer.json")
    assert message.startswith(f"{tmp_path / file}: ") and words in message


@pytest.mark.parametrize("missing", [{"bos_id": -1}, {"eos_id": -1}, {"bos_id": -1, "eos_id": -1}])
def test_a_sentencepiece_model_without_bos_or_eos_is_refused(tmp_path, missing):
    """Its id would be -1, which marks image slots."""
    import sentencepiece
    (tmp_path / "lines.txt").write_text("The pond is old.\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="char", vocab_size=13,
        minloglevel=2, hard_vocab_limit=False, **missing)
    assert "tokenizer.model has no BOS" in error_message(Tokenizer, tmp_path / "tokenizer.model")


# --- Checkpoints ---

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny_model(seed=1)
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    path = tmp_path_factory.mktemp("run") / "checkpoint-0.pth"
    save_adapters(model, path, epoch=0, flags={"lr": 0.1, "seed": 0}, optimizer=optimizer.state_dict(),
                  scaler=torch.amp.GradScaler("cpu", enabled=False).state_dict())
    content = torch.load(path, weights_only=True)
    del content["sha256"]  # of these values only
    return content


def test_a_checkpoint_is_read_unchanged(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "checkpoint-0.pth")
    read = read_adapters(tmp_path / "checkpoint-0.pth")
    assert read.keys() == checkpoint.keys() and read["model"].keys() == checkpoint["model"].keys()
    assert all(torch.equal(read["model"][name], tensor) for name, tensor in checkpoint["model"].items())
    assert all(read[name] == checkpoint[name] for name in ("adapter_config", "epoch", "flags", "scaler"))
    assert torch.equal(read["optimizer"]["state"][3]["exp_avg"], checkpoint["optimizer"]["state"][3]["exp_avg"])
    assert read["optimizer"]["param_groups"] == checkpoint["optimizer"]["param_groups"]


ADAPTER_FAULTS = faults({
    "adapter_type": ("router", None, 7), "visual_adapter_type": ("attn",), "adapter_dim": ("8", 0, -8, 8.0, 10**9),
    "adapter_scale": ("1", None, float("inf"), float("nan")), "temperature": (0, -1.0, float("nan")),
    "hidden_proj": (0, 10**9), "n_prompt": (0, None), "dropout_prob": (1, -0.1, "x"), "dropout_var": (0, None),
    "dropout_lim": (1.0, None), "lora_rank": (8,)})


@pytest.mark.parametrize("changes, words", [
    *[({"adapter_config": {field: value}}, f"adapter_config.{field}: ") for field, value in ADAPTER_FAULTS],
    ({"adapter_config": None}, "adapter_config: should be a valid dictionary, not None"),
    *[({field: value}, f"{field}") for field, value in faults({
        "epoch": ("3", -1, None, True), "flags": (None, [1], {1: 2}), "optimizer": (None, []), "scaler": (None, [1])})],
    ({"optimizer": {}}, "optimizer.state: is missing"), ({"model": {5: TENSOR}}, "model"),
    ({"optimizer": {"state": {}, "param_groups": {}}}, "optimizer.param_groups: "),
    ({"model": {"a": None}}, "model.a: is no tensor but None"),
    ({"model": {"a.b": TENSOR.long()}}, "model.a.b: is a tensor of torch.int64"),
    ({"model": {"a": TENSOR / 0}}, "model.a: holds numbers that are not finite, so its training diverged"),
    ({"model": {"a": TENSOR.half() - float("inf")}}, "model.a: holds numbers that are not finite"),
    ({"model": {"a": torch.tensor([1.0, float("nan"), 2.0])}}, "model.a: holds numbers that are not finite")])
def test_error_names_the_entry_of_the_checkpoint(checkpoint, tmp_path, changes, words):
    path = tmp_path / "checkpoint-0.pth"
    torch.save({**checkpoint, **changes}, path)
    message = error_message(read_adapters, path)
    assert message.startswith(f"{path}: {words}") and message.endswith("name another checkpoint, or train again")


def test_published_adapters_that_are_not_finite(checkpoint, tmp_path):
    name = "module.backbone.visual.transformer.resblocks.11.adapter_attn.expert_weights.weight"
    torch.save({"model": {name: TENSOR / 0}, "args": argparse.Namespace()}, tmp_path / "a.pth")
    assert f"a.pth: model.{name}: holds" in error_message(read_adapters, tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["epoch", "flags", "optimizer", "scaler"])
def test_entries_that_only_resuming_needs_may_be_missing(checkpoint, tmp_path, name):
    torch.save({key: value for key, value in checkpoint.items() if key != name}, tmp_path / "a.pth")
    assert name not in read_adapters(tmp_path / "a.pth")


def test_integers_are_numbers_and_left_out_settings_have_defaults(checkpoint, tmp_path):
    torch.save({**checkpoint, "adapter_config": {"adapter_scale": 1, "adapter_dim": 4}}, tmp_path / "a.pth")
    config = AdapterConfig(**read_adapters(tmp_path / "a.pth")["adapter_config"])
    assert config == AdapterConfig(adapter_dim=4) and isinstance(config.adapter_scale, float)


def test_every_adapter_setting_is_declared():
    assert set(AdapterSettings.__annotations__) == {field.name for field in dataclasses.fields(AdapterConfig)}
    defaults = dataclasses.asdict(AdapterConfig())
    assert validate(defaults, AdapterSettings, "defaults") == defaults
