"""Weights: LLaMA's files and the ViT in; adapters in and out, under the names of the published checkpoints.

Every file is read with `weights_only=True`, memory-mapped, and written beside its place before it is renamed.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import torch

from lavin.errors import UserError
from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.tokenizer import Tokenizer
from lavin.vision import timm

# dimension on which the shards of Meta's files join; the norms are copies
SHARD_DIMS = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
IGNORED = ("rope.freqs",)  # in Meta's files, computed here

# (ours, published), prefixes of parameter names
RENAMED = (("llama.layers.", "layers."),
           ("vision.vit.blocks.", "backbone.visual.transformer.resblocks."))
NORM_ADAPTERS = {"norm1.adapter": "adapter_attn", "norm2.adapter": "adapter_mlp"}


def find_tokenizer(llama_model_path: str, llm_model: str) -> Path:
    """tokenizer.model beside the weights, where a model brings its own, or above them."""
    own = Path(llama_model_path, llm_model, "tokenizer.model")
    return own if own.is_file() else Path(llama_model_path, "tokenizer.model")


def read_torch(path: Path) -> dict:
    """A torch file, memory-mapped. Raises UserError where it is missing, broken, or holds more than tensors."""
    if not path.is_file():
        raise UserError(f"no file {path}: put it there, or correct the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds here
        raise UserError(f"{path} cannot be read as weights ({str(error).splitlines()[0]}): fetch or copy it again"
                        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not named weights: fetch or copy it again")
    return content


def read_params(llama_model_path: str, llm_model: str, vocab_size: int) -> LlamaConfig:
    path = Path(llama_model_path, llm_model, "params.json")
    try:
        return LlamaConfig.from_params(json.loads(path.read_text()), vocab_size)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe a LLaMA ({error}): fetch or copy it again") from error


def require_base(llama_model_path: str, llm_model: str, tokenizer_path: str | None = None) -> None:
    """Raises UserError that names the first missing file of a base model, before anything slow begins."""
    folder = Path(llama_model_path, llm_model)
    tokenizer = Path(tokenizer_path or find_tokenizer(llama_model_path, llm_model))
    for path in (folder / "params.json", folder / "consolidated.00.pth", tokenizer):
        if not path.is_file():
            raise UserError(f"missing {path}: put LLaMA's {path.name} there, "
                            "or name another place with --llama_model_path and --llm_model")


def read_llama(llama_model_path: str, llm_model: str) -> dict:
    """Meta's shards, joined: name -> tensor."""
    paths = sorted(Path(llama_model_path, llm_model).glob("consolidated.*.pth"))
    shards = [read_torch(path) for path in paths]
    weights = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        dim = next((SHARD_DIMS[part] for part in name.split(".") if part in SHARD_DIMS), None)
        weights[name] = parts[0] if len(parts) == 1 or dim is None else torch.cat(parts, dim)
    return {name: tensor for name, tensor in weights.items() if name not in IGNORED}


def load_vit(vision_model: str) -> torch.nn.Module:
    """A timm ViT: a folder that timm wrote (config.json, model.safetensors), or a name on timm's hub."""
    local = Path(vision_model, "config.json").is_file()
    if not local and ("/" in vision_model or os.path.exists(vision_model)):
        raise UserError(f"--vision_model {vision_model}: no config.json there; name a folder that timm wrote, "
                        "or one of timm's models")
    try:
        vit = timm.create_model(f"local-dir:{vision_model}" if local else vision_model, pretrained=True, num_classes=0)
    except Exception as error:  # no network, no such model, broken file: timm and its hub raise many kinds
        raise UserError(f"--vision_model {vision_model} does not load ({str(error).splitlines()[0]}): where there is no "
                        "network, copy the model's config.json and model.safetensors and name their folder") from error
    return vit


def load_base(llama_model_path: str, llm_model: str, vision_model: str, adapter: AdapterConfig, device, dtype,
              drop_path: float = 0.0, tokenizer_path: str | None = None) -> tuple[LaVIN, Tokenizer]:
    """The frozen base with fresh adapters, on `device`, frozen parameters in `dtype`.

    Raises UserError for files that are missing, broken, or of another model.
    """
    tokenizer = Tokenizer(tokenizer_path or find_tokenizer(llama_model_path, llm_model))
    config = read_params(llama_model_path, llm_model, tokenizer.n_words)
    vit = load_vit(vision_model)
    try:
        with torch.device("meta"):  # described, not allocated: the weights come from the file
            model = LaVIN(config, vit, adapter, drop_path)
    except ValueError as error:
        raise UserError(str(error)) from error
    weights = {f"llama.{name}": tensor for name, tensor in read_llama(llama_model_path, llm_model).items()}
    expected = {name: p for name, p in model.named_parameters() if name.startswith("llama.") and "adapter" not in name}
    check_tensors(expected, weights, f"{Path(llama_model_path, llm_model)}/consolidated.*.pth")
    model.load_state_dict(weights, strict=False, assign=True)
    return model.freeze_in(device, dtype), tokenizer


def check_tensors(expected: dict, found: dict, where: str) -> None:
    """Raises UserError that names tensors which are missing, unknown, or of another shape."""
    for kind, names in (("lacks", expected.keys() - found.keys()), ("holds unknown", found.keys() - expected.keys())):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{where} {kind} {len(names)} tensors ({some}): it belongs to another model")
    for name, tensor in found.items():
        if expected[name].shape != tensor.shape:
            raise UserError(f"{where}: {name} is {list(tensor.shape)} and the model has {list(expected[name].shape)}: "
                            "it belongs to another model")


def published_name(name: str) -> str:
    """Our name of a trained parameter -> its name in the published checkpoints."""
    for ours, theirs in RENAMED:
        name = re.sub(f"^{re.escape(ours)}", theirs, name)
    for ours, theirs in NORM_ADAPTERS.items():
        name = name.replace(ours, theirs)
    return name


def adapter_parameters(model: LaVIN) -> dict[str, torch.nn.Parameter]:
    """The trained parameters under their published names."""
    return {published_name(name): p for name, p in model.named_parameters() if "adapter" in name}


def save_adapters(model: LaVIN, path: Path, **extra) -> None:
    """Writes `{"model": ..., "adapter_config": ..., **extra}`; extra: plain values and tensors."""
    tensors = {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}
    beside = path.with_name(path.name + ".part")
    torch.save({"model": tensors, "adapter_config": dataclasses.asdict(model.adapter), **extra}, beside)
    os.replace(beside, path)


def read_adapters(path: Path) -> dict:
    """A checkpoint: ours, or a published one (no `adapter_config`, names perhaps behind `module.`)."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{path} is no adapter checkpoint (it has no entry 'model'): name a checkpoint-*.pth of a run")
    checkpoint["model"] = {name.removeprefix("module."): tensor for name, tensor in checkpoint["model"].items()}
    return checkpoint


def load_adapters(model: LaVIN, tensors: dict, where: str) -> None:
    """Copies the tensors of a checkpoint's `model` entry into the model."""
    own = adapter_parameters(model)
    check_tensors(own, tensors, where)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
