"""The one place that chooses, by hardware, which parts of a model are replaced by faster ones."""

import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from lavin import attention
from lavin.fast import fused_linear, joined_nf4
from lavin.fast.captured_models import capture_passes
from lavin.fast.fused_adapter import FusedAdaptedBlock
from lavin.kernels.fp8 import check_fp8
from lavin.kernels.fused_ops import swiglu
from lavin.loss import answer_loss, cross_entropy
from lavin.model import LaVIN
from lavin.runtime.console import print_rank0
from lavin.runtime.device import compute_capability
from lavin.runtime.errors import UserError, first_line


def fuse(model: LaVIN, fp8: bool = False) -> None:
    """Fuses the matrices of LLaMA's layers, and norms with adapters. It changes the model in place.

    Matrices in 4 bits are fused for products of one row alone. The output matrix and the ViT stay as they are.
    """
    for block in model.llama.layers:
        if isinstance(block.attention.wq, nn.Linear):
            fused_linear.FusedAttention.convert(block.attention, fp8)
            fused_linear.FusedFeedForward.convert(block.feed_forward, fp8)
        elif has_nf4_kernel(model.device):
            joined_nf4.convert(block)
        FusedAdaptedBlock.convert(block)


def has_nf4_kernel(device: torch.device) -> bool:
    """Says whether our kernel for one row in 4 bits, which has NVIDIA's assembly in it, is right for a device. GPUs
    before Ampere (8.0), on which it has not been measured, keep bitsandbytes' kernel."""
    return device.type != "cuda" or (not torch.version.hip and compute_capability(device) >= (8, 0))


def allow_in_cache(functions: Iterable[Callable]) -> None:
    """Lets programs with these functions be loaded from torch.compile's cache on disk while this project's code is the
    same.

    torch cannot see whether it is, and would trace and partition them anew in every process.
    """
    from torch._inductor import config  # late: the compiler takes as long to import as torch
    if hasattr(config, "unsafe_marked_cacheable_functions"):  # from torch 2.7 on
        sources = sorted(Path(__file__).parents[1].rglob("*.py"))
        code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        config.unsafe_marked_cacheable_functions |= {f"{f.__module__}.{f.__name__}": code for f in functions}


def compile_model(model: LaVIN) -> None:
    """Compiles a model in place: the layers of LLaMA and the ViT, and the loss, with dynamic shapes."""
    # torch 2.11 cannot trace into these autograd functions with dynamic shapes; AOTAutograd can handle what they call
    functions = fused_linear.frozen_linear, fused_linear.swiglu_mlp, fused_linear.qkv_rope
    for function in functions:
        torch.compiler.allow_in_graph(function)
    allow_in_cache(functions)
    # else Inductor decides by the first pass's rows whether to pad a matmul, and compiles again for other numbers
    torch._inductor.config.shape_padding = False
    # the backward pass of a norm and an adapter computes the normalised rows again, from what the norm keeps anyway
    torch._functorch.config.ban_recompute_materialized_backward = False
    if hasattr(torch._inductor.config, "online_softmax"):  # of newer versions; it slows the loss
        torch._inductor.config.online_softmax = False
    torch._dynamo.config.specialize_float = True  # else the numbers of a layer are traced as inputs first, then again
    torch.fx.experimental._config.use_duck_shape = False  # two sizes that are equal at first may differ later
    torch._dynamo.config.cache_size_limit = 32  # one graph each for training, prefill, decoding, a single sequence
    for module in (model.llama, model.vision):
        module.run_block = torch.compile(module.run_block, dynamic=True)
    model.answer_loss = partial(answer_loss, cross_entropy=torch.compile(cross_entropy, dynamic=True))


def forget_programs() -> None:
    """Drops what was compiled for other modules: torch keeps a limited number of programs for each function."""
    if "torch._dynamo" in sys.modules:  # the compiler takes as long to import as torch
        torch.compiler.reset()


@cache
def compiler_error(device: torch.device) -> str | None:
    """Returns why Triton or Inductor does not work on this GPU, tried on a small function, or None where both work.

    On clusters, the GPU may be too old for their kernels, and a C compiler or a place to write to may be missing.
    """
    if not attention.HAS_TRITON:
        return "Triton is not installed"
    x = torch.randn(4, 64, device=device)
    logging.disable(logging.CRITICAL)  # Inductor and Triton would print a thousand lines
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            torch.compile(lambda x: swiglu(x.square(), False)[0].sum(-1), dynamic=True)(x).tolist()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Dynamo, Inductor, Triton, ptxas, gcc or the file system
        return first_line(error)
    finally:
        logging.disable(logging.NOTSET)
    return None


@dataclass(frozen=True)
class FastPaths:
    """The faster parts that a model on a device takes.

    - fused: whether matrices are fused with Triton kernels.
    - compiled: whether layers are compiled.
    - captured: whether training passes and decoding are captured in CUDA graphs.
    - note: a line that names a part that does not work here.
    """

    fused: bool
    compiled: bool
    captured: bool
    note: str = ""


def check_fast_paths(device: torch.device, dtype: torch.dtype, bits: str, compile: str, cuda_graphs: str) -> str | None:
    """Returns why the compiler does not work on this GPU, if so. Raises UserError for what was asked for and does not
    work.

    Call it before a model is loaded, which takes longer. The flags are those of `choose_fast_paths`.
    """
    if bits == "fp8":
        check_fp8(device, dtype)
    if cuda_graphs == "on" and device.type != "cuda":
        raise UserError("--cuda_graphs on needs a GPU: leave it at auto")
    error = compiler_error(device) if device.type == "cuda" else None
    if error and (compile == "on" or bits == "fp8"):
        raise UserError(f"{'--bits fp8' if bits == 'fp8' else '--compile on'} does not work on this GPU: {error}")
    return error


def choose_fast_paths(device: torch.device, dtype: torch.dtype, bits: str = "16bit", compile: str = "auto",
                      cuda_graphs: str = "auto") -> FastPaths:
    """Chooses the fast parts by device, dtype and flags.

    `compile` and `cuda_graphs` are `auto`, `on` or `off`. Raises UserError where `check_fast_paths` does.
    """
    error, gpu = check_fast_paths(device, dtype, bits, compile, cuda_graphs), device.type == "cuda"
    note = f"the model runs without torch.compile and Triton, which do not work on this GPU: {error}" if error else ""
    works = gpu and not error
    return FastPaths(fused=works or bits == "fp8", compiled=compile == "on" or (compile == "auto" and works),
                     captured=gpu and cuda_graphs != "off", note=note)


def can_speed_up(linear: nn.Module) -> bool:
    """Says whether a model with this matrix in its layers is compiled and captured.

    It is not with a tensor-parallel matrix, nor with one in 8 bits, whose product waits for the GPU.
    """
    return isinstance(linear, nn.Linear) or getattr(linear, "capturable", False)  # lavin/weights/quantization.py


def choose_attention(model: LaVIN) -> None:
    """Sets the model's `use_triton`: attention does without our kernels on a GPU where the compiler does not work."""
    if model.device.type == "cuda":
        model.use_triton = compiler_error(model.device) is None


def speed_up(model: LaVIN, bits: str = "16bit", compile: str = "auto", cuda_graphs: str = "auto") -> LaVIN:
    """Changes the model in place and returns it.

    `bits` is `fp8` for fp8 matrices. `compile` and `cuda_graphs` are `auto`, `on` or `off`. Models in 8 bits and
    tensor-parallel ones only get another attention. Raises UserError where `choose_fast_paths` does.
    """
    choose_attention(model)
    if not can_speed_up(model.llama.layers[0].attention.wq):
        return model
    paths = choose_fast_paths(model.device, model.dtype, bits, compile, cuda_graphs)
    if paths.note:
        print_rank0(paths.note)
    if paths.fused:
        fuse(model, bits == "fp8")
    if paths.compiled:
        compile_model(model)
    if paths.captured:
        capture_passes(model)
    return model
