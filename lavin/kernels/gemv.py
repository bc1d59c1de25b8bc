"""Matrix times one row, for a decoding step of a single sequence, which does little but read the weights.

In 16 bits, or with weights in fp8 (one scale per row, kernels/fp8.py), which are read as they are while x stays in 16
bits. On GPUs a Triton kernel (gemv_triton.py), elsewhere its plain twin.
"""

import torch

BLOCK_O, BLOCK_K = 4, 1024  # rows of the weight a program, and entries of each that it reads at once


@torch.library.custom_op("lavin::gemv", mutates_args=())
def gemv(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """x W^T for x [1, K], weight [O, K], scale [O, 1] float32 of fp8 weights -> [1, O]."""
    if not x.is_cuda:
        out = x.float() @ weight.float().t()
        return (out if scale is None else out * scale.t()).to(x.dtype)
    from lavin.kernels.gemv_triton import gemv_fwd
    n_rows, K = weight.shape
    out = x.new_empty(1, n_rows)
    grid = (-(-n_rows // BLOCK_O),)
    gemv_fwd[grid](x, weight, out if scale is None else scale, out, n_rows, K, BLOCK_O=BLOCK_O, BLOCK_K=BLOCK_K,
                   SCALED=scale is not None, num_warps=4)
    return out


@gemv.register_fake
def _(x, weight, scale):
    return x.new_empty(1, weight.shape[0])
