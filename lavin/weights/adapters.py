"""Adapter checkpoints, saved and loaded under the parameter names of the published checkpoints."""

import dataclasses
import re
from pathlib import Path

import torch

from lavin.model import LaVIN
from lavin.runtime.errors import UserError
from lavin.runtime.files import atomic_write
from lavin.weights.tensor_files import check_names, check_shape, read_torch

# our part of a parameter's name -> the published one
PUBLISHED_PREFIXES = {"llama.layers.": "layers.", "vision.vit.blocks.": "backbone.visual.transformer.resblocks."}
PUBLISHED_NORM_ADAPTERS = {"norm1.adapter": "adapter_attn", "norm2.adapter": "adapter_mlp"}


def published_name(name: str) -> str:
    """Our name of a trained parameter -> its name in the published checkpoints."""
    for prefix, published in PUBLISHED_PREFIXES.items():
        name = re.sub(f"^{re.escape(prefix)}", published, name)
    for part, published in PUBLISHED_NORM_ADAPTERS.items():
        name = name.replace(part, published)
    return name


def adapter_parameters(model: LaVIN) -> dict[str, torch.nn.Parameter]:
    """The trained parameters under their published names."""
    return {published_name(name): p for name, p in model.named_parameters() if "adapter" in name}


def save_adapters(model: LaVIN, path: Path, **extra) -> None:
    """Writes `{"model": ..., "adapter_config": ..., **extra}`. extra: plain values and tensors."""
    tensors = {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}
    with atomic_write(path) as tmp_path:
        torch.save({"model": tensors, "adapter_config": dataclasses.asdict(model.adapter), **extra}, tmp_path)


def read_adapters(path: Path) -> dict:
    """Reads a checkpoint of ours, or a published one: no `adapter_config`, names possibly prefixed with `module.`."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{path} is no adapter checkpoint (it has no entry 'model'): name a checkpoint-*.pth of a run")
    checkpoint["model"] = {name.removeprefix("module."): tensor for name, tensor in checkpoint["model"].items()}
    # the other entries of a published checkpoint are the published code's optimizer state and flags: of no use here
    return checkpoint if "adapter_config" in checkpoint else {"model": checkpoint["model"]}


def load_adapters(model: LaVIN, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copies the tensors of a checkpoint's `model` entry into the model. source: names the file in error messages."""
    parameters = adapter_parameters(model)
    check_names(parameters.keys(), tensors.keys(), source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            check_shape(name, parameter.shape, tensors[name], source)
            parameter.copy_(tensors[name])
