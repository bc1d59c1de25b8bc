"""Operators on one row, for a decoding step of a single sequence, which does little but read the weights.

On GPUs these are Triton kernels (single_row_triton.py). The reference implementations of products are here; that of
`norm_adapter`, which spares a step eight small kernels, is AdaptedBlock.norm_and_adapter (lavin/mm_adapter.py).
"""

import torch

from lavin.kernels.fused_ops import swiglu
from lavin.kernels.nf4 import dequantized_nf4
from lavin.runtime.arithmetic import ceil_div, next_power_of_2
from lavin.runtime.device import pdl_options


def uses_gemv(x) -> bool:
    """Says whether x is one row on a GPU. torch.compile makes a program of its own for these anyway."""
    return x.shape[0] == 1 and x.is_cuda


def is_decoded(x) -> bool:
    """Says whether x is one row on a GPU, and needs no gradient, as in a chat's decoding steps. The kernels here have
    no backward pass."""
    return uses_gemv(x) and not x.requires_grad


def biased_swiglu(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns silu(gate) * up [1, H] for [gate | up] = gate_up + bias [1, 2H], for the reference implementations."""
    return swiglu(gate_up if bias is None else gate_up + bias, False)[0]


def gemv_shape(K: int, fp8: bool, paired: bool) -> tuple[int, int, int]:
    """Returns how many of the weight's rows of K entries a program of `gemv_fwd` has, how many entries of each it reads
    at once, and its warps: the fastest for the matrices of a layer of 7B on an H200 (docs/engineering-log.md)."""
    is_long = K > 4096
    if fp8:
        return 4, 4096, 8 if is_long else 4
    return (2, 2048, 4) if paired else (4, 2048, 4 if is_long else 8)


def launch_gemv(x, weight, scale, bias, n_out: int, paired: bool) -> torch.Tensor:
    """Returns what `gemv_fwd` writes: [1, n_out]."""
    from lavin.kernels.single_row_triton import gemv_fwd
    out, K = x.new_empty(1, n_out), x.shape[1]
    BLOCK_O, BLOCK_K, num_warps = gemv_shape(K, scale is not None, paired)
    gemv_fwd[(ceil_div(len(weight), BLOCK_O),)](
        x, weight, out if scale is None else scale, out if bias is None else bias, out, n_out, K,
        BLOCK_O=BLOCK_O, BLOCK_K=BLOCK_K, SCALED=scale is not None, PAIRED=paired, BIASED=bias is not None,
        num_warps=num_warps, **pdl_options(x.device))
    return out


@torch.library.custom_op("lavin::gemv", mutates_args=())
def gemv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Returns x W^T [1, O] for x [1, K], weight [O, K] and, where the weight is in fp8, its scale [O, 1] float32.

    fp8 weights are read as they are, and x stays in 16 bits; K is then a multiple of 16, as for products of more rows.
    """
    if not x.is_cuda:
        out = x.float() @ weight.float().t()
        return (out if scale is None else out * scale.t()).to(x.dtype)
    return launch_gemv(x, weight, scale, None, len(weight), False)


@gemv.register_fake
def _(x, weight, scale):
    return x.new_empty(1, weight.shape[0])


@torch.library.custom_op("lavin::gemv_swiglu", mutates_args=())
def gemv_swiglu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
                ) -> torch.Tensor:
    """Returns silu(gate) * up [1, H] for [gate | up] = x W^T + bias, weight [2H, K] and bias [2H]. All else is as in
    `gemv`."""
    if not x.is_cuda:
        return biased_swiglu(gemv(x, weight, scale), bias)
    return launch_gemv(x, weight, scale, bias, len(weight) // 2, True)


@gemv_swiglu.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(1, weight.shape[0] // 2)


NF4_SHAPE = (16, 128, 4)  # rows of the weight a program, chunks of 32 codes that it reads at once, and warps


def launch_gemv_nf4(x, weight, absmax, absmax2, code2, offset, table, bias, n_out: int, paired: bool) -> torch.Tensor:
    """Returns what `gemv_nf4_fwd` writes: [1, n_out]."""
    from lavin.kernels.single_row_triton import gemv_nf4_fwd
    out, (ROWS, CHUNKS, num_warps) = x.new_empty(1, n_out), NF4_SHAPE
    gemv_nf4_fwd[(ceil_div(len(offset), ROWS),)](
        x, weight.flatten().view(torch.int32), absmax, absmax2, code2, offset, table, out if bias is None else bias,
        out, n_out, x.shape[1], ROWS=ROWS, CHUNKS=CHUNKS, PAIRED=paired, BIASED=bias is not None, num_warps=num_warps,
        **pdl_options(x.device))
    return out


@torch.library.custom_op("lavin::gemv_nf4", mutates_args=())
def gemv_nf4(x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor, absmax2: torch.Tensor, code2: torch.Tensor,
             offset: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Returns x W^T [1, O] for x [1, K] and a weight in NF4 with double quantization. K is a multiple of NF4_BLOCK.

    The weight is as bitsandbytes quantizes it: [O K / 2, 1] uint8, with two codes a byte. Each block of codes has the
    scale `code2[absmax] * absmax2 + offset`, and each block of scales an entry of absmax2. The offset [O], one number
    in bitsandbytes, is given for each row. `table` is that of `nf4_table`.
    """
    if not x.is_cuda:
        return (x.float() @ dequantized_nf4(weight, absmax, absmax2, code2, offset, table).t()).to(x.dtype)
    return launch_gemv_nf4(x, weight, absmax, absmax2, code2, offset, table, None, len(offset), False)


@gemv_nf4.register_fake
def _(x, weight, absmax, absmax2, code2, offset, table):
    return x.new_empty(1, offset.shape[0])


@torch.library.custom_op("lavin::gemv_nf4_swiglu", mutates_args=())
def gemv_nf4_swiglu(x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor, absmax2: torch.Tensor,
                    code2: torch.Tensor, offset: torch.Tensor, table: torch.Tensor, bias: torch.Tensor | None
                    ) -> torch.Tensor:
    """Returns silu(gate) * up [1, H] for [gate | up] = x W^T + bias, with the weight [2H, K] of `gemv_nf4`."""
    if not x.is_cuda:
        return biased_swiglu(gemv_nf4(x, weight, absmax, absmax2, code2, offset, table), bias)
    return launch_gemv_nf4(x, weight, absmax, absmax2, code2, offset, table, bias, len(offset) // 2, True)


@gemv_nf4_swiglu.register_fake
def _(x, weight, absmax, absmax2, code2, offset, table, bias):
    return x.new_empty(1, offset.shape[0] // 2)


@torch.library.custom_op("lavin::norm_adapter", mutates_args=())
def norm_adapter(x: torch.Tensor, norm_weight: torch.Tensor, eps: float, one_hot: torch.Tensor, mixtures: torch.Tensor,
                 down: torch.Tensor, down_bias: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Normalises and adapts x [1, D]; returns [1, D]. norm_weight is [D]; one_hot [1, 2] and mixtures [2, 2] float32
    are those of Routing; down A [r, D], its bias a [r] and up s U [D, .] are RepAdapter.projections."""
    from lavin.kernels.single_row_triton import norm_adapter_fwd
    out, (R, D), BLOCK = torch.empty_like(x), down.shape, 64  # and STEP: the fastest for 7B on an H100
    norm_adapter_fwd[(ceil_div(D, BLOCK),)](x, norm_weight, one_hot, mixtures, down, down_bias, up, out, eps, D, R,
                                            up.shape[1], BLOCK=BLOCK, STEP=2048, ROWS=next_power_of_2(R), num_warps=8,
                                            **pdl_options(x.device))
    return out


@norm_adapter.register_fake
def _(x, norm_weight, eps, one_hot, mixtures, down, down_bias, up):
    return torch.empty_like(x)
