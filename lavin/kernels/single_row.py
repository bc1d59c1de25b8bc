"""Operators on one row, for a decoding step of a single sequence, which does little but read the weights.

On GPUs these are Triton kernels (single_row_triton.py). The reference implementations of products are here; that of
`norm_adapter`, which spares a step eight small kernels, is AdaptedBlock.norm_and_adapter (lavin/mm_adapter.py).
"""

import torch

from lavin.kernels.fused_ops import swiglu
from lavin.runtime.arithmetic import ceil_div, next_power_of_2
from lavin.runtime.device import pdl_options

# rows of the weight a program, entries of each that it reads at once, and warps: the fastest for a layer of 7B on an
# H200, with one shape for its matrices of any width (w2 alone would be 7 to 9% faster with another number of warps)
GEMV_SHAPE, SWIGLU_SHAPE, FP8_SHAPE = (4, 2048, 8), (2, 2048, 4), (4, 4096, 4)


def launch_gemv(x, weight, scale, bias, n_out: int, shape: tuple[int, int, int], paired: bool) -> torch.Tensor:
    """Returns what `gemv_fwd` writes: [1, n_out]. `shape` is one of the above."""
    from lavin.kernels.single_row_triton import gemv_fwd
    out, (BLOCK_O, BLOCK_K, num_warps) = x.new_empty(1, n_out), shape
    gemv_fwd[(ceil_div(len(weight), BLOCK_O),)](
        x, weight, out if scale is None else scale, out if bias is None else bias, out, n_out, x.shape[1],
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
    return launch_gemv(x, weight, scale, None, len(weight), GEMV_SHAPE if scale is None else FP8_SHAPE, False)


@gemv.register_fake
def _(x, weight, scale):
    return x.new_empty(1, weight.shape[0])


@torch.library.custom_op("lavin::gemv_swiglu", mutates_args=())
def gemv_swiglu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
                ) -> torch.Tensor:
    """Returns silu(gate) * up [1, H] for [gate | up] = x W^T + bias, weight [2H, K] and bias [2H]. All else is as in
    `gemv`."""
    if not x.is_cuda:
        gate_up = gemv(x, weight, scale)
        return swiglu(gate_up if bias is None else gate_up + bias, False)[0]
    return launch_gemv(x, weight, scale, bias, len(weight) // 2, SWIGLU_SHAPE if scale is None else FP8_SHAPE, True)


@gemv_swiglu.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(1, weight.shape[0] // 2)


NF4_SHAPE = (16, 128, 4)  # rows of the weight a program, chunks of 32 that it reads at once, and warps


def nf4_table(code: torch.Tensor) -> torch.Tensor:
    """Returns what `gemv_nf4` looks a byte up in: [256] int32. `code` [16] float32 has NF4's values, for bitsandbytes'
    codes.

    An entry is read in two ways. As a float32, it is the value of the code in the byte's upper half. Its lower 16 bits
    as a bf16 are the value of the other code. Both are as precise as in bf16.
    """
    second = code.bfloat16().view(torch.int16).int().repeat(16) & 0xFFFF
    first = code.repeat_interleave(16)
    upper = first.view(torch.int32) >> 16 & 0xFFFF
    candidates = torch.stack(((upper - 1).clamp(min=0), upper, upper + 1)) << 16 | second  # one of them is the nearest
    return candidates.gather(0, (candidates.view(torch.float32) - first).abs().argmin(0, keepdim=True))[0]


def dequantized_nf4(weight, absmax, absmax2, code2, offset, table) -> torch.Tensor:
    """Returns a weight as float32 [O, K]. The arguments are those of `gemv_nf4`."""
    entries = table[weight.flatten().int()]
    values = torch.stack((entries, entries << 16), 1).view(torch.float32).view(-1, 64)
    scales = code2[absmax.int()] * absmax2.repeat_interleave(256)[:len(absmax)]
    return (values * (scales + offset.repeat_interleave(len(scales) // len(offset)))[:, None]).view(len(offset), -1)


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
    """Returns x W^T [1, O] for x [1, K] and a weight in NF4 with double quantization. K is a multiple of 64.

    All but x and `nf4_table` are as bitsandbytes quantizes W: two codes a byte of the weight [O K / 2, 1] uint8, a
    scale `code2[absmax] * absmax2 + offset` for 64 of them, and an entry of absmax2 for 256 scales. But there is an
    offset [O] for each row.
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
        gate_up = gemv_nf4(x, weight, absmax, absmax2, code2, offset, table)
        return swiglu(gate_up if bias is None else gate_up + bias, False)[0]
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
