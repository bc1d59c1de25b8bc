"""Builds the model with its frozen base weights.

The model is constructed on the meta device, without memory. Its frozen weights are then loaded one tensor at a time:
each is read, converted to the compute dtype and moved to the device before the next, so that peak memory stays low.
Whether all are finite is known at the end, since each answer from a GPU would stop the host.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lavin.llama import LlamaConfig
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.runtime import distributed
from lavin.runtime.console import BAR_SECONDS, counted, progress_bar
from lavin.runtime.errors import UserError, first_line
from lavin.tokenizer import Tokenizer
from lavin.weights.base import base_path, find_tokenizer, open_base
from lavin.weights.tensor_files import check_names, check_shape
from lavin.weights.vision import open_vit


def load_base(llama_model_path: str, llm_model: str, vision_model: str, adapter: AdapterConfig, device, dtype,
              drop_path: float = 0.0, tokenizer_path: str | None = None, use_vicuna: bool = False, bits: str = "16bit",
              max_seq_len: int | None = None) -> tuple[LaVIN, Tokenizer]:
    """The frozen base with freshly initialised adapters, on `device`.

    dtype: the type of the frozen parameters. bits: the precision of the linear layers in LLaMA's blocks (`--bits`).
    max_seq_len: the most tokens that it will be given. Raises UserError for files that are missing, broken, or of
    another model, and for flags that the base does not support.
    """
    tokenizer = Tokenizer(tokenizer_path or find_tokenizer(llama_model_path, llm_model))
    base = open_base(base_path(llama_model_path, llm_model), tokenizer.n_words, use_vicuna)
    if not base.config.vocab_size / 2 <= tokenizer.n_words <= base.config.vocab_size:  # models pad their vocabulary
        raise UserError(f"the tokenizer has {counted(tokenizer.n_words, 'piece')}, and {base.source} "
                        f"{base.config.vocab_size:,}: it belongs to another model: put the model's own into its folder")
    check_length(base.config, max_seq_len)
    with torch.random.fork_rng(devices=[]):  # timm draws the weights that it then fetches, and adapters must not differ
        vit, vit_tensors = open_vit(vision_model)
    with user_error_if_unfit(), torch.device("meta"):
        model = LaVIN(base.config, vit, adapter, drop_path)
    # Modules are replaced now, while they hold no memory. Shapes are taken after sharding, which changes them, and
    # before quantization, which removes the parameters.
    tensors = base.tensors
    if distributed.model_parallel_size > 1:
        from lavin.weights.tensor_parallel import ShardedTensors, shard_model  # here, since few runs need fairscale
        shard_model(model)
        tensors = ShardedTensors(tensors)
    llama_parameters, vit_parameters = frozen_parameters(model.llama), frozen_parameters(model.vision.vit)
    if bits in ("4bit", "8bit"):
        quantize_model(model, bits)
    load_frozen(model.llama, llama_parameters, tensors, base.source, device, dtype)
    load_frozen(model.vision.vit, vit_parameters, vit_tensors, f"--vision_model {vision_model}", device, dtype)
    return model.to(device), tokenizer


def exchange_adapters(model: LaVIN, adapter: AdapterConfig, drop_path: float, max_seq_len: int | None) -> None:
    """Gives a loaded model the freshly initialised adapters, and checks, as `load_base` does."""
    check_length(model.llama.config, max_seq_len)
    device = model.device
    with user_error_if_unfit():
        model.attach(adapter, drop_path)
    model.to(device)


@contextmanager
def user_error_if_unfit() -> Iterator[None]:
    """Turns the error of adapters that do not fit a model into one that names the flag."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def check_length(config: LlamaConfig, max_seq_len: int | None) -> None:
    """Raises UserError for more tokens than a base supports here."""
    if max_seq_len and config.max_context and max_seq_len > config.max_context:
        raise UserError(f"--max_seq_len {max_seq_len}: beyond {counted(config.max_context, 'token')} this base model "
                        "needs a sliding window or dynamic rope scaling, which are not supported: lower it")


def quantize_model(model: LaVIN, bits: str) -> None:
    """Converts a model without weights in place. Raises UserError if bitsandbytes is not installed."""
    try:
        from lavin.weights.quantization import quantize_linears  # here, since bitsandbytes is optional
    except ImportError as error:
        raise UserError(f"--bits {bits} needs bitsandbytes ({first_line(error)}): "
                        "pip install -r requirements/lite.txt, or leave it at 16bit") from error
    quantize_linears(model, bits)


def frozen_parameters(module: nn.Module) -> dict[str, tuple[str, torch.Size]]:
    """Name of each frozen parameter in weight files -> its name in `module` and its shape.

    The names differ in norms with an adapter, which wrap the original norm: norm1.norm.weight is norm1.weight in files.
    """
    return {re.sub(r"\.(norm[12])\.norm\.", r".\1.", name): (name, p.shape)
            for name, p in module.named_parameters() if "adapter" not in name}


def load_frozen(module: nn.Module, parameters: dict[str, tuple[str, torch.Size]], tensors: Mapping[str, torch.Tensor],
                source: str, device, dtype) -> None:
    """Loads all frozen parameters, one tensor at a time. Raises UserError for tensors of another model, and for numbers
    that are not finite.

    parameters: the result of `frozen_parameters`. source: the name of the files in error messages.
    """
    check_names(parameters.keys(), tensors.keys(), source)
    extremes = []
    for file_name, (name, shape) in progress_bar(parameters.items(), f"weights of {source}", unit="tensor",
                                                 delay=BAR_SECONDS):
        tensor = tensors[file_name]
        check_shape(file_name, shape, tensor, source)
        parent, _, parameter = name.rpartition(".")
        extremes.append(load_frozen_tensor(module.get_submodule(parent), parameter, tensor, device, dtype))
    check_finite(list(parameters), extremes, source, dtype)


def load_frozen_tensor(module: nn.Module, name: str, tensor: torch.Tensor, device, dtype) -> torch.Tensor:
    """Sets one frozen parameter to a copy, so that the mapped file can be closed. Returns its extremes [2].

    A module that stores its weight in another form converts it by its method `load` (lavin/weights/quantization.py).
    """
    tensor = tensor.to(device)
    if name == "weight" and hasattr(module, "load"):
        module.load(tensor, device, dtype)
    else:
        tensor = tensor.to(dtype, copy=True)
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return torch.stack(tensor.aminmax()).float()  # NaN where one of the numbers is


def check_finite(names: list[str], extremes: list[torch.Tensor], source: str, dtype: torch.dtype) -> None:
    """Raises UserError for the first tensor with a number that is not finite. extremes: the least and the greatest
    number [2] of each tensor, on the device."""
    finite = torch.stack(extremes).isfinite().all(1).tolist()  # the only time that the host waits
    if not all(finite):
        raise UserError(f"{source}: {names[finite.index(False)]} holds numbers that are not finite in {dtype}: fetch "
                        "or copy it again, or take another --precision")
