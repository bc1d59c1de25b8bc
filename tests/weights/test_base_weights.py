"""LLaMA weights from Meta's shards, Hugging Face folders and Vicuna's delta; names and shapes of real models."""

import json
import shutil
import sys

import pytest
import torch

from lavin.llama import Llama, LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import pack
from lavin.tokenizer import Example, Tokenizer
from lavin.weights import base as base_module
from lavin.weights.base import BaseWeights, apply_delta, open_base, require_base
from lavin.weights.hugging_face import HuggingFaceLlama, llama_config
from lavin.weights.load import frozen_parameters, load_base
from tiny_tokenizers import qwen, write_json
from tiny_weights import HF_VARIANTS, LLAMA_3, write_hugging_face, write_shards
from user_errors import error_message
from util.fingerprint import fingerprints, frozen_files
from util.flags import BaseSettings

CPU = torch.device("cpu")


def load(weights, name, vision, **changes):
    return load_base(str(weights), str(name), str(vision), AdapterConfig(), CPU, torch.float32, **changes)[0].eval()


def test_the_base_in_llama_model_path_comes_before_a_folder_here(base, tmp_path, monkeypatch):
    """--llm_model names a path only where --llama_model_path has no such base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    require_base(str(base.weights), "tiny")  # the folder here is empty
    assert load(base.weights, "tiny", base.vision).llama.config.dim == 32
    shutil.copytree(base.weights / "tiny", tmp_path / "elsewhere")
    assert load(base.weights, tmp_path / "elsewhere", base.vision).llama.config.dim == 32
    assert load(base.weights, "elsewhere", base.vision).llama.config.dim == 32


def test_a_tokenizer_that_is_named_is_taken_in_place_of_the_bases_own(base, tmp_path):
    """Wherever the base has one: beside it, or in its folder."""
    named = tmp_path / "named.model"
    shutil.copy(base.weights / "tokenizer.model", named)
    shutil.copytree(base.weights, tmp_path / "weights")
    (tmp_path / "weights" / "tiny" / "tokenizer.model").write_text("broken")
    (tmp_path / "weights" / "tokenizer.model").write_text("broken")
    assert load(tmp_path / "weights", "tiny", base.vision, tokenizer_path=str(named)).llama.config.dim == 32
    assert "tokenizer.model" in error_message(load, tmp_path / "weights", "tiny", base.vision)


def test_every_file_of_the_frozen_models_is_in_their_fingerprints(base, tmp_path):
    """The vision model's config.json too, which says how pixels are normalised."""
    shutil.copytree(base.weights, tmp_path / "weights")
    shutil.copytree(base.vision, tmp_path / "vit")
    settings = BaseSettings(llm_model="tiny", llama_model_path=str(tmp_path / "weights"),
                            vision_model=str(tmp_path / "vit"))
    before = fingerprints(settings)
    assert before == fingerprints(BaseSettings(llm_model="tiny", llama_model_path=str(base.weights),
                                               vision_model=str(base.vision)))
    for path, changed in {"vit/config.json": "vision", "vit/model.safetensors": "vision",
                          "weights/tiny/params.json": "base", "weights/tokenizer.model": "base",
                          "weights/tiny/consolidated.00.pth": "base"}.items():
        content = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(content + b" ")
        assert {name for name, digest in fingerprints(settings).items() if digest != before[name]} == {
            changed, f"{changed}_sha256"}, path
        (tmp_path / path).write_bytes(content)


def test_the_files_that_say_bos_and_eos_are_in_the_bases_checksum(base, tmp_path):
    """Not in the one that earlier versions have recorded."""
    settings = BaseSettings(llm_model="tiny", llama_model_path=str(base.weights), vision_model=str(base.vision))
    path = write_json(tmp_path / "tokenizer", qwen())
    names = ("config.json", "tokenizer_config.json")
    for name in names:
        (path.parent / name).write_text('{"bos_token": null, "eos_token": "</s>", "eos_token_id": 2}')
    Tokenizer(path)
    before, seen = fingerprints(settings, str(path)), set()
    assert {*frozen_files(settings, str(path))} >= {path, *map(path.with_name, names)}
    for name in names:
        path.with_name(name).write_text('{"eos_token": "<s>", "eos_token_id": 1}')
        found = fingerprints(settings, str(path))
        assert {entry for entry in found if found[entry] != before[entry]} == {"base_sha256"}
        seen.add(found["base_sha256"])
    assert len(seen) == 2


# --- Meta ---

@pytest.mark.parametrize("embedding_dim", [1, 0])  # LLaMA 1 and 2; Llama 3
def test_meta_shards_are_joined(base, tmp_path, embedding_dim):
    tensors = torch.load(base.weights / "tiny" / "consolidated.00.pth", weights_only=True)
    folder = tmp_path / "two"
    folder.mkdir()
    shutil.copy(base.weights / "tiny" / "params.json", folder)
    write_shards(tensors, folder, 2, embedding_dim)
    joined = open_base(folder, 480).tensors
    assert joined.keys() == tensors.keys() - {"rope.freqs"} and len(joined) == len(tensors) - 1
    assert all(torch.equal(joined[name], tensors[name]) for name in joined)


def test_error_names_a_shard_of_another_model(base, tmp_path):
    shutil.copytree(base.weights / "tiny", tmp_path / "two")
    torch.save({"norm.weight": torch.zeros(1)}, tmp_path / "two" / "consolidated.01.pth")
    assert "two/consolidated.01.pth does not hold" in error_message(open_base, tmp_path / "two", 480)


# params.json and number of parameters of the published models
META = {
    "7B": ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1},
           6_738_415_616),
    "13B": ({"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6, "vocab_size": -1},
            13_015_864_320),
    "Llama 2 70B": ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                     "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}, 68_976_648_192),
    "Llama 3 8B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
                    "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0},
                   8_030_261_248),
    "Llama 3.2 1B": ({"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
                      "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 500000.0,
                      "use_scaled_rope": True}, 1_235_814_400 + 128256 * 2048),  # Meta's files hold tied weights twice
}


@pytest.mark.parametrize("name", META)
def test_params_json_gives_the_published_number_of_parameters(name):
    params, count = META[name]
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_params(params, 32000))
    assert sum(p.numel() for p in llama.parameters()) == count


# --- Hugging Face ---

@torch.no_grad()
def assert_same_logits(ours, theirs, lengths=(70, 3, 20), atol=1e-4):
    ids = [torch.randint(480, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    batch = pack([Example(row.tolist(), len(row)) for row in ids])
    packed_logits = ours.llama.output(ours.hidden_states(batch)).split(list(lengths))
    for row, logits in zip(ids, packed_logits, strict=True):
        expected = theirs(row[None]).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("variant", HF_VARIANTS)
def test_logits_equal_transformers(base, tokenizer_file, tmp_path, variant):
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file, **HF_VARIANTS[variant])
    require_base("nowhere", str(tmp_path / "hf"))
    assert_same_logits(load("nowhere", tmp_path / "hf", base.vision), theirs)


def test_configs_from_before_transformers_5(base, tokenizer_file, tmp_path):
    """Separate rope_theta and rope_scaling, "type" instead of rope_type, no head_dim."""
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file, rope_scaling={**LLAMA_3, "rope_theta": 500.0})
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config.pop("head_dim", None)
    scaling = {"type": "llama3", **{name: rope[name] for name in LLAMA_3 if name != "rope_type"}}
    path.write_text(json.dumps({**config, "rope_theta": 500.0, "rope_scaling": scaling}))
    assert_same_logits(load("nowhere", tmp_path / "hf", base.vision), theirs)


def test_sharded_folder(base, tokenizer_file, tmp_path):
    theirs = write_hugging_face(tmp_path / "weights" / "hf", tokenizer_file, max_shard_size="50KB")
    assert len(list((tmp_path / "weights" / "hf").glob("model-*.safetensors"))) > 2
    assert_same_logits(load(tmp_path / "weights", "hf", base.vision), theirs)
    shard = sorted((tmp_path / "weights" / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"missing {shard}" in error_message(require_base, str(tmp_path / "weights"), "hf")
    assert f"missing {shard}" in error_message(load, tmp_path / "weights", "hf", base.vision)


@pytest.mark.parametrize("zipped", [True, False])  # PyTorch's file format since 1.6, and the one before
@pytest.mark.parametrize("files", [1, 2])
def test_pytorch_bin(base, tokenizer_file, tmp_path, files, zipped):
    """The file also has inv_freq, which older versions of transformers saved."""
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file)
    (tmp_path / "hf" / "model.safetensors").unlink()
    tensors = {**theirs.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    names = [f"pytorch_model-{i}.bin" for i in range(files)] if files > 1 else ["pytorch_model.bin"]
    for i, name in enumerate(names):
        shard = dict(list(tensors.items())[i::files])
        torch.save(shard, tmp_path / "hf" / name, _use_new_zipfile_serialization=zipped)
    if files > 1:
        weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_logits(load("nowhere", tmp_path / "hf", base.vision), theirs)


@pytest.mark.parametrize("changes, words", [
    ({"attention_bias": True}, "lacks 8 tensors"), ({"mlp_bias": True}, "lacks 6 tensors"),
    ({"hidden_act": "gelu"}, "'gelu'"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_hidden_layers": 3}, "lacks 9 tensors"), ({"num_hidden_layers": 1}, "unknown 9 tensors"),
    ({"intermediate_size": 48}, "w1.weight is [56, 32]"), ({"num_key_value_heads": 2}, "wk.weight is [32, 32]"),
    ({"vocab_size": 481}, "[480, 32]"), ({"hidden_size": None}, "hidden_size: ")])
def test_unsupported_configurations_and_mismatched_tensors(base, tokenizer_file, tmp_path, changes, words):
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = error_message(load, "nowhere", tmp_path / "hf", base.vision)
    assert words in message and str(tmp_path / "hf") in message


@pytest.mark.parametrize("file, content", [
    ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"model_type": "llama"}'),
    ("model.safetensors", "nothing")])
def test_error_names_the_broken_file(base, tokenizer_file, tmp_path, file, content):
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    (tmp_path / "hf" / file).write_text(content)
    assert str(tmp_path / "hf" / file) in error_message(load, "nowhere", tmp_path / "hf", base.vision)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(base, tokenizer_file, tmp_path, file):
    """A clone without git-lfs leaves such pointers in the place of large files."""
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476939\n")
    assert "git lfs pull" in error_message(load, "nowhere", tmp_path / "hf", base.vision)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("part", [0.2, 0.6, 0.999])
def test_a_truncated_file(base, tokenizer_file, tmp_path, file, part):
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file)
    if file.endswith(".bin"):
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "hf" / file)
    path = tmp_path / "hf" / file
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    assert str(path) in error_message(load, "nowhere", tmp_path / "hf", base.vision)


def test_mistral_folders_with_files_of_two_formats(base, tokenizer_file, tmp_path):
    """Mistral publishes its own params.json and consolidated.safetensors next to Hugging Face's files."""
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file)
    (tmp_path / "hf" / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "head_dim": 8}))
    (tmp_path / "hf" / "consolidated.safetensors").write_bytes(b"unused")
    require_base("nowhere", str(tmp_path / "hf"))
    assert_same_logits(load("nowhere", tmp_path / "hf", base.vision), theirs)


def test_a_folder_of_lora_adapters_is_no_base(tokenizer_file, tmp_path):
    (tmp_path / "lora").mkdir()
    shutil.copy(tokenizer_file, tmp_path / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "lora" / name).write_text("{}")
    assert "params.json" in error_message(require_base, "nowhere", str(tmp_path / "lora"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "language_model.", "base_model.model."])
def test_names_of_wrapped_models_are_not_taken_for_others(base, tokenizer_file, tmp_path, prefix):
    from safetensors.torch import load_file, save_file
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    assert "tensors (" in error_message(load, "nowhere", tmp_path / "hf", base.vision)


@pytest.mark.parametrize("shape, words", [((0,), "tok_embeddings.weight is [0]"), ((1,), "is [1] and the model has")])
def test_matrices_that_a_sharded_training_left_empty(base, tokenizer_file, tmp_path, shape, words):
    """DeepSpeed's ZeRO-3 leaves them empty where nothing gathers them first."""
    from safetensors.torch import load_file, save_file
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "model.safetensors"
    save_file({name: torch.zeros(shape) if t.ndim == 2 else t for name, t in load_file(path).items()}, path)
    assert words in error_message(load, "nowhere", tmp_path / "hf", base.vision)


@pytest.mark.parametrize("name, dtype", [("qweight", torch.int32), ("weight", torch.uint32), ("weight", torch.int8),
                                         ("weight", torch.float8_e4m3fn)])
def test_quantized_weights_without_a_word_in_the_configuration(base, tokenizer_file, tmp_path, name, dtype):
    """GPTQ with its own quantize_config.json writes such weights, and so do MLX and others."""
    from safetensors.torch import load_file, save_file
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "model.safetensors"
    save_file({key.replace("weight", name) if "proj" in key else key: t.abs().to(dtype) if "proj" in key else t
               for key, t in load_file(path).items()}, path)
    assert f"is a tensor of {dtype}" in error_message(load, "nowhere", tmp_path / "hf", base.vision)


NORM, OTHER_NORM = "model.norm.weight", "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("change, words", [
    (lambda header: header[:-1] + f', "{NORM}": {json.dumps(json.loads(header)[OTHER_NORM])}}}', "cannot be read"),
    (lambda header: edited(header, data_offsets=json.loads(header)[OTHER_NORM]["data_offsets"]), "cannot be read"),
    (lambda header: edited(header, shape=[31]), "cannot be read"), (lambda header: header + " " * 9, None),
    (lambda header: edited(header, dtype="I32"), f"{NORM}: is a tensor of torch.int32"),
    (lambda header: edited(header, dtype="Q4"), "cannot be read"), (lambda header: header[1:], "cannot be read"),
    (lambda header: json.dumps({**json.loads(header), "__metadata__": {"format": "tf", "note": "é" * 999}}), None)])
def test_headers_of_safetensors(base, tokenizer_file, tmp_path, change, words):
    """One name twice, two names for the same bytes, a shape or type that is not the bytes'; and harmless ones."""
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end].decode().rstrip()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    if words:
        assert words in error_message(load, "nowhere", tmp_path / "hf", base.vision)
    else:
        assert_same_logits(load("nowhere", tmp_path / "hf", base.vision), theirs)


def edited(header: str, **changes) -> str:
    content = json.loads(header)
    return json.dumps({**content, NORM: {**content[NORM], **changes}})


@pytest.mark.parametrize("change", [lambda content: content + b"more", lambda content: b"GGUF" + content,
                                    lambda content: b"\xff" * 8 + content[8:]])
def test_what_is_no_safetensors(base, tokenizer_file, tmp_path, change):
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert f"{path} cannot be read as weights" in error_message(load, "nowhere", tmp_path / "hf", base.vision)


def test_safetensors_are_taken_before_a_bin_beside_them(base, tokenizer_file, tmp_path):
    theirs = write_hugging_face(tmp_path / "hf", tokenizer_file)
    torch.save({name: tensor + 1 for name, tensor in theirs.state_dict().items()}, tmp_path / "hf/pytorch_model.bin")
    assert_same_logits(load("nowhere", tmp_path / "hf", base.vision), theirs)


@pytest.mark.parametrize("target", ["../../blobs/4d7a", "model.safetensors"])
def test_a_link_to_a_file_that_is_not_there(base, tokenizer_file, tmp_path, target):
    """The hub's cache holds such links after its blobs were removed; another one leads to itself."""
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "model.safetensors"
    path.unlink()
    path.symlink_to(target)
    assert f"missing {path}" in error_message(load, "nowhere", tmp_path / "hf", base.vision)


@pytest.mark.parametrize("name", ["a b", "été 水", "a#1?b=%20", "[ac]*", "-a", "~a", "$HOME", "a\\b", "'\""])
def test_folders_of_any_name(base, tmp_path, name):
    shutil.copytree(base.weights, tmp_path / name / "weights")
    shutil.copytree(base.vision, tmp_path / name / "vit")
    ours, theirs = (load(folder.weights, "tiny", folder.vision) for folder in (
        type(base)(tmp_path / name / "weights", tmp_path / name / "vit"), base))
    assert all(torch.equal(p, theirs.get_parameter(key)) for key, p in ours.named_parameters() if "adapter" not in key)


def test_error_names_the_missing_file(tokenizer_file, tmp_path):
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    (tmp_path / "hf" / "tokenizer.model").unlink()
    assert "tokenizer.model" in error_message(require_base, str(tmp_path), "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert f"missing {tmp_path / 'hf' / 'model.safetensors'}" in error_message(require_base, str(tmp_path), "hf")


@pytest.mark.parametrize("vocab_size, fits", [(470, False), (480, True), (960, True), (970, False)])
def test_a_tokenizer_of_another_vocabulary_is_refused(base, tokenizer_file, tmp_path, vocab_size, fits):
    """It has 480 pieces; a model may pad its vocabulary, but Llama 3's is four times LLaMA's."""
    write_hugging_face(tmp_path / "hf", tokenizer_file, vocab_size=vocab_size)
    if fits:
        load("nowhere", tmp_path / "hf", base.vision)
    else:
        assert f"480 pieces, and {tmp_path / 'hf'} {vocab_size}: it belongs" in error_message(
            load, "nowhere", tmp_path / "hf", base.vision)


def test_an_output_matrix_that_contradicts_tied_embeddings_is_refused(base, tokenizer_file, tmp_path):
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    message = error_message(load, "nowhere", tmp_path / "hf", base.vision)
    assert message.startswith(f"{path} says tie_word_embeddings, and lm_head.weight is not")


# config.json and number of parameters of the published models; tied weights count once
HUGGING_FACE = {
    "7B": ({"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "rms_norm_eps": 1e-6}, 6_738_415_616),
    "13B": ({"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
             "num_attention_heads": 40, "rms_norm_eps": 1e-6}, 13_015_864_320),
    "Llama 3.2 1B": ({"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
                      "tie_word_embeddings": True, "rope_scaling": {**LLAMA_3, "original_max_position_embeddings": 8192,
                                                                    "rope_theta": 500000.0}}, 1_235_814_400),
    "TinyLlama": ({"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                   "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}, 1_100_048_384),
    "SmolLM2 135M": ({"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                      "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
                      "tie_word_embeddings": True, "rope_theta": 100000.0}, 134_515_008),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_names_and_shapes_of_real_models(name):
    """All tensors are on the meta device."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    content, count = HUGGING_FACE[name]
    with torch.device("meta"):
        theirs = LlamaForCausalLM(HFConfig(**content))
        config = llama_config(theirs.config.to_dict())
        ours = Llama(config)
    tied = content.get("tie_word_embeddings", False)
    tensors = HuggingFaceLlama(dict(theirs.named_parameters()), config, tied)
    parameters = frozen_parameters(ours)
    assert parameters.keys() == tensors.keys()
    assert {name: shape for name, (_, shape) in parameters.items()} == {name: t.shape for name, t in tensors.items()}
    shared = ours.output.weight.numel() if tied else 0
    assert sum(p.numel() for p in ours.parameters()) - shared == sum(p.numel() for p in theirs.parameters()) == count


# --- Vicuna v0 ---

@pytest.fixture
def vicuna(base, tokenizer_file, tmp_path):
    """Writes LLaMA, Vicuna, and the delta, which has one more embedding ([PAD]); returns Vicuna."""
    llama = write_hugging_face(tmp_path / "7B", tokenizer_file, seed=1)
    vicuna = write_hugging_face(tmp_path / "full", tokenizer_file, seed=2)
    delta = write_hugging_face(tmp_path / "vicuna_7B", tokenizer_file, vocab_size=481)
    with torch.no_grad():
        for name, p in delta.named_parameters():
            tuned, original = vicuna.get_parameter(name), llama.get_parameter(name)
            p[:len(tuned)] = tuned - original
    delta.save_pretrained(tmp_path / "vicuna_7B")
    return vicuna


def test_vicuna_delta_is_added(base, vicuna, tmp_path):
    require_base(str(tmp_path), "7B", use_vicuna=True)
    assert_same_logits(load(tmp_path, "7B", base.vision, use_vicuna=True), vicuna)
    with pytest.raises(AssertionError):
        assert_same_logits(load(tmp_path, "7B", base.vision), vicuna)


def test_a_delta_is_added_with_more_digits_than_its_files_have():
    base, delta = ({"norm.weight": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 2.0**-12))
    config = LlamaConfig(dim=1, n_layers=1, n_heads=1, vocab_size=1)
    merged = apply_delta(BaseWeights(config, base, "base"), BaseWeights(config, delta, "delta"))
    assert merged.tensors["norm.weight"].tolist() == [1 + 2.0**-12]


def test_the_delta_is_in_the_fingerprint_of_its_base(base, vicuna, tmp_path):
    settings = BaseSettings(llm_model="7B", llama_model_path=str(tmp_path), vision_model=str(base.vision),
                            use_vicuna=True)
    before = fingerprints(settings)
    with open(tmp_path / "vicuna_7B" / "model.safetensors", "ab") as file:
        file.write(b" ")
    assert {name for name, digest in fingerprints(settings).items() if digest != before[name]} == {
        "base", "base_sha256"}


def test_vicuna_delta_on_meta_shards(base, vicuna, tmp_path):
    """The same LLaMA, converted to Meta's format by reading the Hugging Face folder with open_base."""
    llama = open_base(tmp_path / "7B", 480)
    (tmp_path / "7B").rename(tmp_path / "hf")
    (tmp_path / "7B").mkdir()
    shutil.copy(tmp_path / "hf" / "tokenizer.model", tmp_path)
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 56, "ffn_dim_multiplier": 0.1, "norm_eps": 1e-5,
              "vocab_size": -1}
    (tmp_path / "7B" / "params.json").write_text(json.dumps(params))
    write_shards(dict(llama.tensors.items()), tmp_path / "7B", 2, 1)
    assert_same_logits(load(tmp_path, "7B", base.vision, use_vicuna=True), vicuna)
    shutil.rmtree(tmp_path / "vicuna_7B")
    assert "vicuna_7B" in error_message(require_base, str(tmp_path), "7B", use_vicuna=True)


def test_full_vicuna_weights_need_no_delta(base, vicuna, tmp_path):
    require_base(str(tmp_path), "full", use_vicuna=True)
    assert_same_logits(load(tmp_path, "full", base.vision, use_vicuna=True), vicuna)


@pytest.mark.parametrize("changes, words", [({"num_hidden_layers": 1}, "same tensors"),
                                            ({"intermediate_size": 48}, "is [48, 32]")])
def test_delta_of_another_model(base, vicuna, tokenizer_file, tmp_path, changes, words):
    shutil.rmtree(tmp_path / "vicuna_7B")
    delta = write_hugging_face(tmp_path / "vicuna_7B", tokenizer_file, **changes)
    delta.model.norm.weight.data.zero_()
    delta.save_pretrained(tmp_path / "vicuna_7B")
    message = error_message(load, tmp_path, "7B", base.vision, use_vicuna=True)
    assert words in message and "vicuna_7B" in message


def test_a_delta_in_the_place_of_full_weights(base, vicuna, tmp_path):
    for use_vicuna in (False, True):
        message = error_message(load, tmp_path, "vicuna_7B", base.vision, use_vicuna=use_vicuna)
        assert str(tmp_path / "vicuna_7B") in message and ("holds a delta, not full weights" in message or use_vicuna)


def test_a_delta_without_the_last_norm(base, vicuna, tmp_path):
    from safetensors.torch import load_file, save_file
    for folder in ("7B", "vicuna_7B"):
        path = tmp_path / folder / "model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if name != "model.norm.weight"}, path)
    assert "lacks 1 tensor (norm.weight)" in error_message(load, tmp_path, "7B", base.vision, use_vicuna=True)


def test_full_weights_in_the_folder_of_the_delta(base, vicuna, tmp_path):
    shutil.rmtree(tmp_path / "vicuna_7B")
    (tmp_path / "full").rename(tmp_path / "vicuna_7B")
    assert "vicuna_7B holds full weights" in error_message(load, tmp_path, "7B", base.vision, use_vicuna=True)
    assert_same_logits(load(tmp_path, "vicuna_7B", base.vision), vicuna)


# --- tokenizer.json ---

@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    """A byte-level BPE tokenizer like Llama 3's, saved by transformers."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("bpe")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["Question: Which pond is deeper?\nContext: N/A", "The answer is B. BECAUSE: it is."] * 9,
                            vocab_size=320, special_tokens=["<pad>", "<begin>", "<end>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<begin>", eos_token="<end>"
                            ).save_pretrained(folder)
    return folder


def test_tokenizer_json_equals_transformers(bpe_folder):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(bpe_folder)
    ours = Tokenizer(bpe_folder / "tokenizer.json")
    assert (ours.bos_id, ours.eos_id, ours.n_words) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in ("The answer is A.", " Ünïcode 水\n\nResponse: (A) 12", ""):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids and ours.decode(ids) == text
        assert ours.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert ours.decode([1, *ids, 2]) == text  # special tokens are skipped
    example = ours.example("Which pond?", "The answer is A.")
    assert ours.decode(example.ids) == "Image: N/AWhich pond?The answer is A."


@pytest.mark.parametrize("ids, expected", [((0, 2), (0, 2)), ((1, [2, 0]), (1, 2))])  # Llama 3 has several EOS tokens
def test_special_token_ids_from_config_json(bpe_folder, tmp_path, ids, expected):
    shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
    assert "names a BOS token" in error_message(Tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps(dict(zip(("bos_token_id", "eos_token_id"), ids, strict=True))))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


def test_folder_with_tokenizer_json(base, tokenizer_file, bpe_folder, tmp_path):
    write_hugging_face(tmp_path / "hf", tokenizer_file)
    (tmp_path / "hf" / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bpe_folder / name, tmp_path / "hf")
    require_base("nowhere", str(tmp_path / "hf"))
    _, tokenizer = load_base("nowhere", str(tmp_path / "hf"), str(base.vision), AdapterConfig(), CPU, torch.float32)
    assert tokenizer.encode("pond", bos=True)[0] == 1


def test_tokenizer_json_without_the_package(bpe_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in error_message(Tokenizer, bpe_folder / "tokenizer.json")


def test_broken_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert str(tmp_path / "tokenizer.json") in error_message(Tokenizer, tmp_path / "tokenizer.json")


def test_a_format_is_one_entry(tmp_path, monkeypatch):
    """Whoever finds, checks, fingerprints or opens a base model asks FORMATS."""
    folder = tmp_path / "new"
    folder.mkdir()
    opened = (base_module.LlamaConfig(32, 1, 4, 480), {"norm.weight": torch.ones(32)}, "the new format")
    new = base_module.Format(matches=lambda path: path.name == "new", files=lambda path: [path / "weights.new"],
                             tokenizers=lambda path: [path / "tokenizer.new"], open=lambda path, vocab_size: opened)
    monkeypatch.setattr(base_module, "FORMATS", (new, *base_module.FORMATS))
    assert f"missing {folder / 'weights.new'}" in error_message(require_base, str(tmp_path), "new")
    (folder / "weights.new").touch()
    assert f"missing {tmp_path / 'tokenizer.model'}" in error_message(require_base, str(tmp_path), "new")
    (folder / "tokenizer.new").touch()
    require_base(str(tmp_path), "new")
    assert base_module.base_files(str(tmp_path), "new") == [folder / "tokenizer.new", folder / "weights.new"]
    assert open_base(folder, 480) == base_module.BaseWeights(*opened)
