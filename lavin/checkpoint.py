"""The frozen base put together, and adapters in and out under the names of the published checkpoints.

The model is first only described, on the meta device; then its frozen weights are placed one at a time, each read,
converted to the compute type and sent to the device before the next. What is written stands beside its place before it
is renamed.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lavin import parallel
from lavin.base_weights import base_folder, find_tokenizer, open_base, require_base  # noqa: F401, for train.py
from lavin.errors import UserError, first_line
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.tensor_files import read_torch
from lavin.tokenizer import Tokenizer
from lavin.vision_weights import open_vit
from lavin.whole_files import whole_file

# (ours, published), prefixes of parameter names
RENAMED = (("llama.layers.", "layers."),
           ("vision.vit.blocks.", "backbone.visual.transformer.resblocks."))
NORM_ADAPTERS = {"norm1.adapter": "adapter_attn", "norm2.adapter": "adapter_mlp"}


def load_base(llama_model_path: str, llm_model: str, vision_model: str, adapter: AdapterConfig, device, dtype,
              drop_path: float = 0.0, tokenizer_path: str | None = None, use_vicuna: bool = False, bits: str = "16bit"
              ) -> tuple[LaVIN, Tokenizer]:
    """The frozen base with fresh adapters, on `device`, frozen parameters in `dtype`; LLaMA's matrices in `bits`.

    Raises UserError for files that are missing, broken, or of another model.
    """
    tokenizer = Tokenizer(tokenizer_path or find_tokenizer(llama_model_path, llm_model))
    base = open_base(base_folder(llama_model_path, llm_model), tokenizer.n_words, use_vicuna)
    vit, vit_tensors = open_vit(vision_model)
    try:
        with torch.device("meta"):  # described, not allocated
            model = LaVIN(base.config, vit, adapter, drop_path)
    except ValueError as error:
        raise UserError(str(error)) from error
    # Here, between description and weights, parts of the model may be swapped (see place_tensor).
    tensors = base.tensors
    if parallel.model_size > 1:
        from lavin.tensor_parallel import OwnParts, divide  # here, since few runs need fairscale
        divide(model)
        tensors = OwnParts(tensors)
    llama_places, vit_places = frozen_places(model.llama), frozen_places(model.vision.vit)
    if bits in ("4bit", "8bit"):
        quantize(model, bits)
    place_weights(model.llama, llama_places, tensors, base.where, device, dtype)
    place_weights(model.vision.vit, vit_places, vit_tensors, f"--vision_model {vision_model}", device, dtype)
    if tokenizer.n_words > base.config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.n_words} pieces and {base.where} {base.config.vocab_size}: "
                        "it belongs to another model")
    return model.to(device), tokenizer


def quantize(model: LaVIN, bits: str) -> None:
    try:
        from lavin.quantization import quantize_linears  # here, since not everyone has bitsandbytes
    except ImportError as error:
        raise UserError(f"--bits {bits} needs bitsandbytes ({first_line(error)}): "
                        "pip install -r requirements-lite.txt, or leave it at 16bit") from error
    quantize_linears(model, bits)


def frozen_places(module: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    """Name in the files of a frozen parameter -> its name here, inside adapted norms too, and its shape."""
    return {re.sub(r"\.(norm[12])\.norm\.", r".\1.", name): (name, p.shape)
            for name, p in module.named_parameters() if "adapter" not in name}


def place_weights(module: nn.Module, places: dict, tensors: Mapping[str, torch.Tensor], where: str, device, dtype
                  ) -> None:
    """Fills all places; a tensor is read when its turn comes. Raises UserError for tensors of another model."""
    check_names(places.keys(), tensors.keys(), where)
    for name, (place, shape) in places.items():
        tensor = tensors[name]
        check_shape(name, shape, tensor, where)
        owner, _, parameter = place.rpartition(".")
        place_tensor(module.get_submodule(owner), parameter, tensor, device, dtype)


def place_tensor(owner: nn.Module, name: str, tensor: torch.Tensor, device, dtype) -> None:
    """Gives one frozen weight, whole, to the module it belongs to: a copy, so that the file may go.

    A module that keeps weights in a form of its own takes it by its method `load` (lavin/quantization.py).
    """
    if hasattr(owner, "load"):
        owner.load(tensor, device, dtype)
    else:
        setattr(owner, name, nn.Parameter(tensor.to(device).to(dtype, copy=True), requires_grad=False))


def check_names(expected: set, found: set, where: str) -> None:
    """Raises UserError that names tensors which are missing or unknown."""
    for kind, names in (("lacks", expected - found), ("holds unknown", found - expected)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{where} {kind} {len(names)} tensors ({some}): it belongs to another model")


def check_shape(name: str, expected: torch.Size, tensor: torch.Tensor, where: str) -> None:
    if expected != tensor.shape:
        raise UserError(f"{where}: {name} is {list(tensor.shape)} and the model has {list(expected)}: "
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
    with whole_file(path) as beside:
        torch.save({"model": tensors, "adapter_config": dataclasses.asdict(model.adapter), **extra}, beside)


def read_adapters(path: Path) -> dict:
    """A checkpoint: ours, or a published one (no `adapter_config`, names perhaps behind `module.`)."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint.get("model"), dict):
        raise UserError(f"{path} is no adapter checkpoint (it has no entry 'model'): name a checkpoint-*.pth of a run")
    checkpoint["model"] = {name.removeprefix("module."): tensor for name, tensor in checkpoint["model"].items()}
    # what else the published code keeps is of its own optimizer and flags
    return checkpoint if "adapter_config" in checkpoint else {"model": checkpoint["model"]}


def load_adapters(model: LaVIN, tensors: dict, where: str) -> None:
    """Copies the tensors of a checkpoint's `model` entry into the model."""
    own = adapter_parameters(model)
    check_names(own.keys(), tensors.keys(), where)
    with torch.no_grad():
        for name, parameter in own.items():
            check_shape(name, parameter.shape, tensors[name], where)
            parameter.copy_(tensors[name])
