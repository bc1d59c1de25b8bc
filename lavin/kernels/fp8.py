"""fp8 (e4m3) with one scale per row: quantization and scaled matmul.

Micikevicius et al. 2022, arXiv 2209.05433.
"""

import torch

from lavin.runtime.device import compute_capability
from lavin.runtime.errors import UserError

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max
FP8_CAPABILITY = (8, 9)  # the first GPUs with fp8 tensor cores: Ada, Hopper


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns e4m3 values [N, K] and float32 scales [N, 1] for x [N, K], with x ~ values * scales."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x / scale).to(FP8_DTYPE), scale


def scaled_matmul(a, a_scale, b, b_scale, dtype: torch.dtype):
    """Returns a b^T [N, O] for row-quantized a [N, K] and b [O, K], on fp8 tensor cores, or on a CPU in float32."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=True)
    return ((a.float() * a_scale) @ (b.float() * b_scale).t()).to(dtype)


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where the GPU has no fp8 tensor cores."""
    if device.type == "cuda" and (compute_capability(device) < FP8_CAPABILITY or dtype != torch.bfloat16):
        raise UserError("--bits fp8 needs a GPU of compute capability {}.{} (Ada, Hopper) or newer and --precision "
                        "bf16: leave it at 16bit".format(*FP8_CAPABILITY))
