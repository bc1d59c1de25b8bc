"""Weights in and out: names, shards, types, and the one line that each faulty file ends in."""

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
from lavin.runtime.errors import UserError
from lavin.timm_compat import timm
from lavin.weights.adapters import adapter_parameters, load_adapters, read_adapters, save_adapters
from lavin.weights.base import require_base
from lavin.weights.load import frozen_parameters, load_base, load_frozen
from lavin.weights.tensor_files import read_torch
from tiny import VARIANTS, tiny_model

CPU = torch.device("cpu")


def load(base, adapter=AdapterConfig(), dtype=torch.float32, **changes):
    return load_base(str(base.weights), "tiny", changes.pop("vision", str(base.vision)), adapter, CPU, dtype, **changes)


def error(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def own_base(base, tmp_path):
    """A copy to spoil."""
    shutil.copytree(base.weights, tmp_path / "weights")
    shutil.copytree(base.vision, tmp_path / "vit")
    return type(base)(tmp_path / "weights", tmp_path / "vit")


def test_base_is_loaded_exactly(base, tokenizer):
    model, own_tokenizer = load(base)
    saved = torch.load(base.weights / "tiny" / "consolidated.00.pth", weights_only=True)
    frozen = {name: p for name, p in model.llama.named_parameters() if "adapter" not in name}
    assert frozen.keys() == saved.keys() - {"rope.freqs"}
    assert all(torch.equal(p, saved[name]) for name, p in frozen.items())
    from safetensors.torch import load_file
    vit = {name.replace("norm1.norm", "norm1"): p for name, p in model.vision.vit.named_parameters()
           if "adapter" not in name}
    assert all(torch.equal(p, tensor) for p, tensor in zip(vit.values(), map(load_file(
        base.vision / "model.safetensors").__getitem__, vit)))
    assert own_tokenizer.n_words == tokenizer.n_words == model.llama.config.vocab_size
    assert (own_tokenizer.bos_id, own_tokenizer.eos_id) == (1, 2)


def test_frozen_parameters_take_the_compute_type_and_trained_ones_do_not(base):
    model, _ = load(base, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "adapter" in name else torch.bfloat16), name
        assert p.requires_grad == ("adapter" in name)


class Watched(Mapping):
    """Weights that are made when asked for; while one is read, none read before it may still be held."""

    def __init__(self, shapes: dict):
        self.shapes, self.read = shapes, []

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, name):
        assert not any(reference() is not None for reference in self.read[:-1])  # the last may await its replacement
        tensor = torch.randn(self.shapes[name])
        self.read.append(weakref.ref(tensor.untyped_storage()))
        return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_and_placed_one_at_a_time(dtype):
    with torch.device("meta"):
        llama = tiny_model().llama
    places = frozen_parameters(llama)
    tensors = Watched({name: shape for name, (_, shape) in places.items()})
    load_frozen(llama, places, tensors, "it", CPU, dtype)
    assert len(tensors.read) == len(places)
    assert all(p.device == CPU and p.dtype == dtype for name, p in llama.named_parameters() if "adapter" not in name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_weight_file_is_mapped_and_not_read_into_memory(tmp_path):
    def own_mib() -> float:  # files that are mapped are not counted
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    torch.save({"w": torch.ones(2**26, dtype=torch.uint8)}, tmp_path / "consolidated.00.pth")  # 64 MiB
    before = own_mib()
    weights = read_torch(tmp_path / "consolidated.00.pth")["w"]
    assert weights[::4096].all() and own_mib() - before < 16


def test_seed_decides_the_fresh_adapters(base):
    def fresh(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in adapter_parameters(load(base)[0]).values()])
    assert torch.equal(fresh(1), fresh(1)) and not torch.equal(fresh(1), fresh(2))


@pytest.mark.parametrize("kind, visual", VARIANTS)
def test_published_names(kind, visual):
    model = tiny_model(adapter_type=kind, visual_adapter_type=visual)
    plain = {"conv_A.weight", "conv_A.bias", "conv_B.weight", "conv_B.bias"}
    routed = plain | {"conv_D.weight", "conv_D.bias", "expert_weights.weight", "expert_weights.bias"}
    places = {"attn": ["adapter_attn"], "block": ["adapter_attn", "adapter_mlp"]}[kind]
    expected = {f"layers.{i}.{place}.{name}" for i in range(3) for place in places for name in routed}
    places = ["adapter_attn", "adapter_mlp"] if visual == "router_block" else ["adapter_attn"]
    expected |= {f"backbone.visual.transformer.resblocks.{i}.{place}.{name}" for i in range(6) for place in places
                 for name in (plain if visual == "normal" else routed)}
    expected |= {f"adapter_proj.{name}" for name in plain} | {"adapter_modality_embedding.weight"}
    named = adapter_parameters(model)
    assert set(named) == expected
    assert named["layers.2.adapter_attn.conv_A.weight"] is model.llama.layers[2].adapter_attn.conv_A.weight
    assert named["backbone.visual.transformer.resblocks.5.adapter_attn.conv_B.bias"] is \
        model.vision.vit.blocks[5].norm1.adapter.conv_B.bias


def test_adapters_come_back(tmp_path):
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    save_adapters(model, tmp_path / "checkpoint-0.pth", epoch=0)
    checkpoint = read_adapters(tmp_path / "checkpoint-0.pth")
    assert AdapterConfig(**checkpoint["adapter_config"]) == model.adapter and checkpoint["epoch"] == 0
    load_adapters(other, checkpoint["model"], "it")
    a, b = adapter_parameters(model), adapter_parameters(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert os.listdir(tmp_path) == ["checkpoint-0.pth"]


def test_published_checkpoints_load(tmp_path):
    """`{"model": {...}}` alone, from distributed training, in half precision."""
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
    """They hold the optimizer and the flags, an argparse.Namespace, too, which are not ours to go on with."""
    model = tiny_model(seed=1)
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 19, "scaler": {},
                "args": argparse.Namespace(batch_size=4, output_dir="./LaVIN-7B/")}, tmp_path / "checkpoint-19.pth")
    assert read_adapters(tmp_path / "checkpoint-19.pth").keys() == {"model"}


def test_our_checkpoints_are_published_ones_at_the_real_shapes(tmp_path):
    """Names and shapes as the public 7B checkpoint has them; what is written there is what was in the model."""
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_clip_quickgelu_224", num_classes=0)
        model = LaVIN(LlamaConfig(4096, 32, 32, 32000), vit, AdapterConfig())
    routed = {"conv_A.weight": (8, "D", 1), "conv_A.bias": (8,), "conv_B.weight": ("D", 4, 1), "conv_B.bias": ("D",),
              "conv_D.weight": ("D", 4, 1), "conv_D.bias": ("D",), "expert_weights.weight": (2, "D"),
              "expert_weights.bias": (2,)}
    places = [(f"layers.{i}.adapter_attn", 4096) for i in range(32)]
    places += [(f"backbone.visual.transformer.resblocks.{i}.adapter_attn", 1024) for i in range(24)]
    expected = {f"{place}.{name}": tuple(width if n == "D" else n for n in shape)
                for place, width in places for name, shape in routed.items()}
    expected |= {"adapter_modality_embedding.weight": (2, 4096),
                 "adapter_proj.conv_A.weight": (128, 1024), "adapter_proj.conv_A.bias": (128,),
                 "adapter_proj.conv_B.weight": (4096, 128), "adapter_proj.conv_B.bias": (4096,)}
    save_adapters(model, tmp_path / "checkpoint-0.pth", epoch=0)
    saved = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)["model"]
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected
    assert sum(tensor.numel() for tensor in saved.values()) == 3_781_296
    own = adapter_parameters(model)
    assert all(torch.equal(tensor, own[name]) and tensor.dtype == torch.float32 for name, tensor in saved.items())


def test_an_interrupted_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "checkpoint-0.pth"
    save_adapters(model, path)
    before = path.read_bytes()

    def broken_save(thing, place):
        place.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken_save)
    with pytest.raises(OSError):
        save_adapters(model, path)
    assert path.read_bytes() == before


def test_checkpoint_of_another_shape(tmp_path):
    save_adapters(tiny_model(adapter_dim=6), tmp_path / "six.pth")
    tensors = read_adapters(tmp_path / "six.pth")["model"]
    message = error(load_adapters, tiny_model(adapter_dim=4), tensors, "six.pth")
    assert "six.pth" in message and "[6, " in message and "[4, " in message
    missing = dict(list(tensors.items())[1:])
    assert "lacks 1 tensors" in error(load_adapters, tiny_model(adapter_dim=6), missing, "six.pth")
    more = {**tensors, "layers.9.adapter_attn.conv_A.bias": torch.zeros(6)}
    assert "unknown 1 tensors (layers.9.adapter_attn.conv_A.bias)" in error(
        load_adapters, tiny_model(adapter_dim=6), more, "six.pth")


class Malicious:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    path = tmp_path / "checkpoint-0.pth"
    torch.save({"model": Malicious(tmp_path / "ran")}, path)
    message = error(read_adapters, path)
    assert str(path) in message and "holds more than tensors (posix.mkdir)" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut short"])
def test_broken_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "checkpoint-0.pth"
    path.write_bytes(content)
    assert str(path) in error(read_adapters, path)


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"model": torch.zeros(2)}, torch.zeros(3)])
def test_file_that_is_no_adapter_checkpoint_is_named(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    assert str(tmp_path / "other.pth") in error(read_adapters, tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["tiny/params.json", "tiny/consolidated.00.pth", "tokenizer.model"])
def test_missing_base_files_are_named(own_base, name):
    require_base(str(own_base.weights), "tiny")
    (own_base.weights / name).unlink()
    assert str(own_base.weights / name) in error(require_base, str(own_base.weights), "tiny")


@pytest.mark.parametrize("name, content", [
    ("tiny/params.json", b"{"), ("tiny/params.json", b"[]"), ("tiny/params.json", b'{"dim": 32}'),
    ("tiny/params.json", b'{"dim": 32, "n_layers": 2, "n_heads": 4, "vision_chunk_size": 448}'),
    ("tiny/consolidated.00.pth", b"nothing"), ("tokenizer.model", b"nothing"), ("tokenizer.model", b"")])
def test_broken_base_files_are_named(own_base, name, content):
    (own_base.weights / name).write_bytes(content)
    assert str(own_base.weights / name) in error(load, own_base)


@pytest.mark.parametrize("changes, words", [({"n_layers": 3}, "lacks 9 tensors"), ({"n_layers": 1}, "unknown 9 tensors"),
                                            ({"n_kv_heads": 4}, "wk.weight is [16, 32]"), ({"vocab_size": 7}, "[7, 32]")])
def test_base_of_another_shape(own_base, changes, words):
    path = own_base.weights / "tiny" / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    message = error(load, own_base)
    assert words in message and "consolidated" in message


def test_a_model_may_bring_its_own_tokenizer(own_base):
    (own_base.weights / "tokenizer.model").rename(own_base.weights / "tiny" / "tokenizer.model")
    require_base(str(own_base.weights), "tiny")
    assert load(own_base)[1].bos_id == 1


@pytest.mark.parametrize("flags, words", [({"n_prompt": 4}, "--n_prompt 4"), ({"adapter_dim": 3}, "--adapter_dim 3")])
def test_adapters_that_do_not_fit_the_base(base, flags, words):
    assert words in error(load, base, AdapterConfig(**flags))
