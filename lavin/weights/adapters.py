"""Adapter checkpoints, saved and loaded under the parameter names of the published checkpoints."""

import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.runtime.errors import UserError
from lavin.runtime.files import value_sha256
from lavin.runtime.flags import flags_of
from lavin.runtime.schema import declared, read_validated, strictly_declared, validate
from lavin.weights.tensor_files import check_names, check_shape, is_weight, read_safetensors, read_torch

# our part of a parameter's name -> the published one
PUBLISHED_PREFIXES = {"llama.layers.": "layers.", "vision.vit.blocks.": "backbone.visual.transformer.resblocks."}
PUBLISHED_NORM_ADAPTERS = {"norm1.adapter": "adapter_attn", "norm2.adapter": "adapter_mlp"}
HINT = "name another checkpoint, or train again"
# the files of adapters that are shared with others (tools/publish.py): the tensors, and the other entries of Checkpoint
SHARED_TENSORS, SHARED_SETTINGS = "lavin_adapters.safetensors", "lavin_adapters.json"


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor. Raises ValueError where one of its numbers is not finite."""
    if not tensor.float().isfinite().all():
        raise ValueError("holds numbers that are not finite, so its training diverged")
    return tensor


AdapterTensors = dict[str, Annotated[Any, AfterValidator(is_weight), AfterValidator(is_finite)]]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]
# AdapterConfig's fields, with the types of its flags; a checkpoint from before a field existed leaves it out
AdapterSettings: Any = strictly_declared(TypedDict(  # type: ignore[operator]  # made from the fields
    "AdapterSettings", {name: known.kind for name, known in flags_of(AdapterConfig).items()}, total=False))


@declared
class OptimizerState(TypedDict):
    state: dict[int, Any]
    param_groups: list[dict[str, Any]]


@declared
class Checkpoint(TypedDict):
    """The content of a checkpoint of train.py."""

    model: AdapterTensors
    adapter_config: AdapterSettings
    epoch: NotRequired[Annotated[int, Field(ge=0)]]
    flags: NotRequired[dict[str, Any]]
    optimizer: NotRequired[OptimizerState]
    scaler: NotRequired[dict[str, Any]]
    base: NotRequired[str]  # checksums of the base model's files, as in recipe.json
    vision: NotRequired[str]
    tokenization: NotRequired[str]  # lavin.tokenizer.TOKENIZATION
    base_sha256: NotRequired[str]
    vision_sha256: NotRequired[str | None]
    data: NotRequired[str]  # checksums of what it was trained on, as in recipe.json
    pictures: NotRequired[str]
    image_mean: NotRequired[Channels]  # by which pixels were normalised
    image_std: NotRequired[Channels]


@declared
class PublishedCheckpoint(TypedDict):
    model: AdapterTensors


def published_name(name: str) -> str:
    """Returns the name in the published checkpoints of a trained parameter with our name."""
    for prefix, published in PUBLISHED_PREFIXES.items():
        name = re.sub(f"^{re.escape(prefix)}", published, name)
    for part, published in PUBLISHED_NORM_ADAPTERS.items():
        name = name.replace(part, published)
    return name


def adapter_parameters(model: LaVIN) -> dict[str, torch.nn.Parameter]:
    """Returns the trained parameters under their published names."""
    return {published_name(name): p for name, p in model.named_parameters() if "adapter" in name}


def pack_adapters(model: LaVIN, **extra) -> bytes:
    """Returns the content of a checkpoint file: `{"model": ..., "adapter_config": ..., **extra}`. Equal states give
    equal bytes.

    `extra` holds plain values and tensors. Raises UserError where adapters are not finite: they are of no use.
    """
    tensors = {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}
    not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        raise UserError(f"training diverged: {not_finite[0]} is not finite, so nothing is saved: take a lower learning "
                        "rate or --clip_grad")
    content = unshared({"model": tensors, "adapter_config": dataclasses.asdict(model.adapter), **extra})
    buffer = io.BytesIO()  # torch would write the name of a file into it
    torch.save({**content, "sha256": value_sha256(content)}, buffer)
    return buffer.getvalue()


def unshared(value):
    """Returns an equal plain value in which no container occurs twice and equal strings are one object.

    pickle writes an object that it has written as a reference to it, so that equal values would not give equal bytes.
    """
    if isinstance(value, dict):
        return {unshared(key): unshared(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(unshared, value))
    return sys.intern(value) if type(value) is str else value


def read_adapters(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of ours, also in the form in which it is shared, or a published one, which has no
    `adapter_config` and may prefix names with `module.`.
    """
    content = read_shared(path) if path.name == SHARED_TENSORS else read_torch(path)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is no adapter checkpoint (it has no entry 'model'): name a checkpoint-*.pth of a run")
    if "sha256" in content:
        check_sha256(content, path)
    if "adapter_config" in content:
        checkpoint: Any = validate(content, Checkpoint, str(path), HINT)
    else:  # the other entries of a published checkpoint, optimizer state and flags, are of no use here
        checkpoint = validate({"model": content["model"]}, PublishedCheckpoint, str(path), HINT)
    checkpoint["model"] = {name.removeprefix("module."): tensor for name, tensor in checkpoint["model"].items()}
    return checkpoint


def read_shared(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that tools/publish.py has written. path: the file of its tensors."""
    settings = read_validated(path.with_name(SHARED_SETTINGS), dict[str, Any], "copy it beside the tensors")
    return {**settings, "model": read_safetensors(path)}


def check_sha256(content: dict, path: Path) -> None:
    """Raises UserError where an entry differs from what `pack_adapters` wrote."""
    try:
        found = value_sha256({name: value for name, value in content.items() if name != "sha256"})
    except (RuntimeError, TypeError):  # no value of ours
        found = None
    if found != content["sha256"]:
        raise UserError(f"{path} was changed after it was written (its checksum is another): copy it again, or name "
                        "another checkpoint")


def load_adapters(model: LaVIN, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copies the tensors of a checkpoint's `model` entry into the model. `source` names the file in error messages."""
    parameters = adapter_parameters(model)
    check_names(parameters.keys(), tensors.keys(), source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            check_shape(name, parameter.shape, tensors[name], source)
            parameter.copy_(tensors[name])
