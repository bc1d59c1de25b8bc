"""Loading base weights, saving and loading adapters: names, dtypes, and one-line errors for faulty files."""

import argparse
import json
import os
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.timm_compat import timm
from lavin.weights.adapters import adapter_parameters, load_adapters, read_adapters
from lavin.weights.base import require_base
from lavin.weights.load import frozen_parameters, load_base, load_frozen
from lavin.weights.tensor_files import read_torch
from tiny import VARIANTS, save_adapters, tiny_model
from user_errors import error_message

CPU = torch.device("cpu")


def load(base, adapter=None, dtype=torch.float32):
    return load_base(str(base.weights), "tiny", str(base.vision), adapter or AdapterConfig(), CPU, dtype)


@pytest.fixture
def base_copy(base, tmp_path):
    """A copy of the base, for tests that change its files."""
    shutil.copytree(base.weights, tmp_path / "weights")
    shutil.copytree(base.vision, tmp_path / "vit")
    return type(base)(tmp_path / "weights", tmp_path / "vit")


def test_base_is_loaded_exactly(base, tokenizer):
    model, loaded_tokenizer = load(base)
    saved = torch.load(base.weights / "tiny" / "consolidated.00.pth", weights_only=True)
    frozen = {name: p for name, p in model.llama.named_parameters() if "adapter" not in name}
    assert frozen.keys() == saved.keys() - {"rope.freqs"}
    assert all(torch.equal(p, saved[name]) for name, p in frozen.items())
    from safetensors.torch import load_file
    saved_vit = load_file(base.vision / "model.safetensors")
    vit = {name.replace("norm1.norm", "norm1"): p for name, p in model.vision.vit.named_parameters()
           if "adapter" not in name}
    assert vit.keys() == saved_vit.keys()
    assert all(torch.equal(p, saved_vit[name]) for name, p in vit.items())
    assert loaded_tokenizer.n_words == tokenizer.n_words == model.llama.config.vocab_size
    assert (loaded_tokenizer.bos_id, loaded_tokenizer.eos_id) == (1, 2)


def test_frozen_parameters_have_the_compute_dtype_and_trained_ones_float32(base):
    model, _ = load(base, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "adapter" in name else torch.bfloat16), name
        assert p.requires_grad == ("adapter" in name)


class LazyTensors(Mapping):
    """Random tensors, created when read; asserts at each read that all tensors but the last have been freed."""

    def __init__(self, shapes: dict):
        self.shapes, self.storages = shapes, []

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, name):
        assert not any(storage() is not None for storage in self.storages[:-1])  # the caller may still hold the last
        tensor = torch.randn(self.shapes[name])
        self.storages.append(weakref.ref(tensor.untyped_storage()))
        return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_and_loaded_one_at_a_time(dtype):
    with torch.device("meta"):
        llama = tiny_model().llama
    parameters = frozen_parameters(llama)
    tensors = LazyTensors({name: shape for name, (_, shape) in parameters.items()})
    load_frozen(llama, parameters, tensors, "it", CPU, dtype)
    assert len(tensors.storages) == len(parameters)
    assert all(p.device == CPU and p.dtype == dtype for name, p in llama.named_parameters() if "adapter" not in name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_weight_files_are_memory_mapped(tmp_path):
    def anonymous_memory_mib() -> float:  # excludes memory-mapped files
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    torch.save({"w": torch.ones(2**26, dtype=torch.uint8)}, tmp_path / "consolidated.00.pth")  # 64 MiB
    before = anonymous_memory_mib()
    weights = read_torch(tmp_path / "consolidated.00.pth")["w"]
    assert weights[::4096].all() and anonymous_memory_mib() - before < 16


def test_fresh_adapters_depend_on_the_seed(base):
    def fresh(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in adapter_parameters(load(base)[0]).values()])
    assert torch.equal(fresh(1), fresh(1)) and not torch.equal(fresh(1), fresh(2))


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_adapter_parameters_have_the_published_names(adapter_type, visual_type):
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type)
    plain = {"conv_A.weight", "conv_A.bias", "conv_B.weight", "conv_B.bias"}
    routed = plain | {"conv_D.weight", "conv_D.bias", "expert_weights.weight", "expert_weights.bias"}
    adapters = {"attn": ["adapter_attn"], "block": ["adapter_attn", "adapter_mlp"]}[adapter_type]
    expected = {f"layers.{i}.{adapter}.{name}" for i in range(3) for adapter in adapters for name in routed}
    adapters = ["adapter_attn", "adapter_mlp"] if visual_type == "router_block" else ["adapter_attn"]
    expected |= {f"backbone.visual.transformer.resblocks.{i}.{adapter}.{name}" for i in range(6)
                 for adapter in adapters for name in (plain if visual_type == "normal" else routed)}
    expected |= {f"adapter_proj.{name}" for name in plain} | {"adapter_modality_embedding.weight"}
    parameters = adapter_parameters(model)
    assert set(parameters) == expected
    assert parameters["layers.2.adapter_attn.conv_A.weight"] is model.llama.layers[2].adapter_attn.conv_A.weight
    assert parameters["backbone.visual.transformer.resblocks.5.adapter_attn.conv_B.bias"] is \
        model.vision.vit.blocks[5].norm1.adapter.conv_B.bias


def test_adapters_are_saved_and_loaded(tmp_path):
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    save_adapters(model, tmp_path / "checkpoint-0.pth", epoch=0)
    checkpoint = read_adapters(tmp_path / "checkpoint-0.pth")
    assert AdapterConfig(**checkpoint["adapter_config"]) == model.adapter and checkpoint["epoch"] == 0
    load_adapters(other, checkpoint["model"], "it")
    a, b = adapter_parameters(model), adapter_parameters(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert os.listdir(tmp_path) == ["checkpoint-0.pth"]


def test_published_checkpoints_load(tmp_path):
    """They hold {"model": {...}} alone, in float16, with the `module.` prefix of DistributedDataParallel."""
    model = tiny_model(seed=1)
    tensors = {f"module.{name}": p.detach().half() for name, p in adapter_parameters(model).items()}
    torch.save({"model": tensors}, tmp_path / "published.pth")
    checkpoint = read_adapters(tmp_path / "published.pth")
    assert "adapter_config" not in checkpoint
    other = tiny_model(seed=2)
    load_adapters(other, checkpoint["model"], "it")
    for name, p in adapter_parameters(other).items():
        assert p.dtype == torch.float32 and torch.equal(p, tensors[f"module.{name}"].float())


def test_checkpoints_of_the_published_code_load(tmp_path):
    """They also hold the optimizer and the flags (an argparse.Namespace), which are ignored."""
    model = tiny_model(seed=1)
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 19, "scaler": {},
                "args": argparse.Namespace(batch_size=4, output_dir="./LaVIN-7B/")}, tmp_path / "checkpoint-19.pth")
    assert read_adapters(tmp_path / "checkpoint-19.pth").keys() == {"model"}


def test_saved_checkpoint_has_the_published_names_and_shapes_at_7b(tmp_path):
    """Names and shapes are those of the public 7B checkpoint; the saved tensors equal the model's."""
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
        model = LaVIN(LlamaConfig(4096, 32, 32, 32000), vit, AdapterConfig())
    routed = {"conv_A.weight": (8, "D", 1), "conv_A.bias": (8,), "conv_B.weight": ("D", 4, 1), "conv_B.bias": ("D",),
              "conv_D.weight": ("D", 4, 1), "conv_D.bias": ("D",), "expert_weights.weight": (2, "D"),
              "expert_weights.bias": (2,)}
    adapters = [(f"layers.{i}.adapter_attn", 4096) for i in range(32)]
    adapters += [(f"backbone.visual.transformer.resblocks.{i}.adapter_attn", 1024) for i in range(24)]
    expected = {f"{adapter}.{name}": tuple(width if n == "D" else n for n in shape)
                for adapter, width in adapters for name, shape in routed.items()}
    expected |= {"adapter_modality_embedding.weight": (2, 4096),
                 "adapter_proj.conv_A.weight": (128, 1024), "adapter_proj.conv_A.bias": (128,),
                 "adapter_proj.conv_B.weight": (4096, 128), "adapter_proj.conv_B.bias": (4096,)}
    save_adapters(model, tmp_path / "checkpoint-0.pth", epoch=0)
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)["model"]
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert sum(tensor.numel() for tensor in saved.values()) == 3_781_296
    parameters = adapter_parameters(model)
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in saved.items())
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_checkpoint_with_other_shapes_or_names(tmp_path):
    save_adapters(tiny_model(adapter_dim=6), tmp_path / "six.pth")
    tensors = read_adapters(tmp_path / "six.pth")["model"]
    message = error_message(load_adapters, tiny_model(adapter_dim=4), tensors, "six.pth")
    assert "six.pth" in message and "[6, " in message and "[4, " in message
    too_few = dict(list(tensors.items())[1:])
    assert "lacks 1 tensor " in error_message(load_adapters, tiny_model(adapter_dim=6), too_few, "six.pth")
    too_many = {**tensors, "layers.9.adapter_attn.conv_A.bias": torch.zeros(6)}
    assert "unknown 1 tensor (layers.9.adapter_attn.conv_A.bias)" in error_message(
        load_adapters, tiny_model(adapter_dim=6), too_many, "six.pth")


class Malicious:
    """Creates a folder when unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickle_that_runs_code_is_refused(tmp_path):
    path = tmp_path / "checkpoint-0.pth"
    torch.save({"model": Malicious(tmp_path / "ran")}, path)
    message = error_message(read_adapters, path)
    assert str(path) in message and "holds more than tensors (posix.mkdir)" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut short"])
def test_error_names_the_broken_checkpoint(tmp_path, content):
    path = tmp_path / "checkpoint-0.pth"
    path.write_bytes(content)
    assert str(path) in error_message(read_adapters, path)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"model": torch.zeros(2)}, torch.zeros(3)])
def test_error_names_a_file_that_is_no_adapter_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert str(tmp_path / "other.pth") in error_message(read_adapters, tmp_path / "other.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.1.feed_forward.w2.weight", "norm.weight"])
def test_error_names_the_first_tensor_that_is_not_finite(base_copy, name, value):
    path = base_copy.weights / "tiny" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    for broken in (name, "output.weight"):
        tensors[broken].flatten()[-1] = value
    torch.save(tensors, path)
    message = error_message(load, base_copy)
    assert "consolidated" in message and f"{name} holds numbers that are not finite" in message


def test_numbers_beyond_the_compute_dtype(base_copy):
    path = base_copy.weights / "tiny" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    tensors["norm.weight"][3] = 1e5
    torch.save(tensors, path)
    load(base_copy, dtype=torch.bfloat16)
    message = error_message(load, base_copy, dtype=torch.float16)
    assert "norm.weight holds numbers that are not finite in torch.float16" in message and "--precision" in message


def test_a_vit_that_is_not_finite(base_copy):
    from safetensors.torch import load_file, save_file
    tensors = load_file(base_copy.vision / "model.safetensors")
    tensors["blocks.3.norm1.weight"][0] = float("nan")
    save_file(tensors, base_copy.vision / "model.safetensors")
    assert "--vision_model" in (message := error_message(load, base_copy)) and "blocks.3.norm1.weight holds" in message


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9])
def test_a_changed_byte_does_not_match_the_checksum(base_copy, place):
    path = base_copy.weights / "tiny" / "consolidated.00.pth"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert str(path) in error_message(load, base_copy)


def test_files_without_checksums(base_copy):
    """torch.serialization.set_crc32_options(False) writes zeros in their place."""
    path = base_copy.weights / "tiny" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, path)
    finally:
        torch.serialization.set_crc32_options(True)
    load(base_copy)


@pytest.mark.parametrize("name", ["tiny/params.json", "tiny/consolidated.00.pth", "tokenizer.model"])
def test_error_names_the_missing_base_file(base_copy, name):
    require_base(str(base_copy.weights), "tiny")
    (base_copy.weights / name).unlink()
    assert str(base_copy.weights / name) in error_message(require_base, str(base_copy.weights), "tiny")


@pytest.mark.parametrize("name, content", [
    ("tiny/params.json", b"{"), ("tiny/params.json", b"[]"), ("tiny/params.json", b'{"dim": 32}'),
    ("tiny/params.json", b'{"dim": 32, "n_layers": 2, "n_heads": 4, "vision_chunk_size": 448}'),
    ("tiny/consolidated.00.pth", b"nothing"), ("tokenizer.model", b"nothing"), ("tokenizer.model", b"")])
def test_error_names_the_broken_base_file(base_copy, name, content):
    (base_copy.weights / name).write_bytes(content)
    assert str(base_copy.weights / name) in error_message(load, base_copy)


@pytest.mark.parametrize("changes, words", [
    ({"n_layers": 3}, "lacks 9 tensors"), ({"n_layers": 1}, "unknown 9 tensors"),
    ({"n_kv_heads": 4}, "wk.weight is [16, 32]"), ({"vocab_size": 7}, "480 pieces")])
def test_params_json_that_does_not_match_the_tensors(base_copy, changes, words):
    path = base_copy.weights / "tiny" / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = error_message(load, base_copy)
    assert words in message and "consolidated" in message


def test_tokenizer_in_the_folder_of_the_model(base_copy):
    (base_copy.weights / "tokenizer.model").rename(base_copy.weights / "tiny" / "tokenizer.model")
    require_base(str(base_copy.weights), "tiny")
    assert load(base_copy)[1].bos_id == 1


@pytest.mark.parametrize("flags, words", [({"n_prompt": 4}, "--n_prompt 4"), ({"adapter_dim": 3}, "--adapter_dim 3")])
def test_adapter_flags_that_do_not_fit_the_base(base, flags, words):
    assert words in error_message(load, base, AdapterConfig(**flags))
