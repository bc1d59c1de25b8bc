"""SwiGLU and the backward pass of rotary embeddings as single sweeps over rows, quantized to fp8 on the way if asked.

On GPUs they are Triton kernels (triton_kernels.py); elsewhere their plain twins. torch's compiler takes them as they are.
Each returns the rows and their scales [N, 1]; without `quantized` the scales are empty.
"""

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [N, K] as e4m3, and their scales [N, 1], float32: x is about the product of both."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(FP8), scale


def empty_rows(like: torch.Tensor, width: int, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    N = like.shape[0]  # len() would make the compiler take N for a constant
    rows = like.new_empty(N, width, dtype=FP8 if quantized else like.dtype)
    return rows, like.new_empty(N if quantized else 0, 1, dtype=torch.float32)


def finished(x: torch.Tensor, dtype: torch.dtype, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(x) if quantized else (x.to(dtype), x.new_empty(0, 1, dtype=torch.float32))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@torch.library.custom_op("lavin::swiglu", mutates_args=())
def swiglu(gate_value: torch.Tensor, quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * value, for gate and value [N, 2H] behind one another -> [N, H]."""
    H = gate_value.shape[1] // 2
    if not gate_value.is_cuda:
        gate, value = gate_value.float().split(H, 1)
        return finished(F.silu(gate) * value, gate_value.dtype, quantized)
    from lavin.triton_kernels import swiglu_forward
    out, scale = empty_rows(gate_value, H, quantized)
    swiglu_forward[(len(out),)](gate_value, out, scale, H, BLOCK=power_of_two(H), QUANTIZE=quantized, num_warps=32)
    return out, scale


@swiglu.register_fake
def _(gate_value, quantized):
    return empty_rows(gate_value, gate_value.shape[1] // 2, quantized)


@torch.library.custom_op("lavin::swiglu_backward", mutates_args=())
def swiglu_backward(gate_value: torch.Tensor, gradient: torch.Tensor, quantized: bool
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of gate and value [N, 2H], from that of their product [N, H]."""
    H = gradient.shape[1]
    if not gate_value.is_cuda:
        gate, value = gate_value.float().split(H, 1)
        gradient, sigmoid = gradient.float(), gate.sigmoid()
        of_gate = gradient * value * sigmoid * (1 + gate * (1 - sigmoid))
        return finished(torch.cat((of_gate, gradient * gate * sigmoid), 1), gate_value.dtype, quantized)
    from lavin import triton_kernels
    out, scale = empty_rows(gate_value, 2 * H, quantized)
    triton_kernels.swiglu_backward[(len(out),)](gate_value, gradient.contiguous(), out, scale, H,
                                                BLOCK=power_of_two(H), QUANTIZE=quantized, num_warps=32)
    return out, scale


@swiglu_backward.register_fake
def _(gate_value, gradient, quantized):
    return empty_rows(gate_value, gate_value.shape[1], quantized)


@torch.library.custom_op("lavin::rotary_backward", mutates_args=())
def rotary_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                    quantized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the rows that rotary embeddings turned, from those of query [N, H, d], key and value [N, H_kv, d]."""
    (N, _, D), Q, K = query.shape, query.shape[1] * query.shape[2], key.shape[1] * key.shape[2]
    if not query.is_cuda:
        turned = [x.float() * cos + (x.float() * sin).unflatten(-1, (-1, 2)).flip(-1).flatten(-2) for x in (query, key)]
        return finished(torch.cat([x.flatten(1) for x in (*turned, value.float())], 1), query.dtype, quantized)
    from lavin import triton_kernels
    out, scale = empty_rows(query, Q + 2 * K, quantized)
    triton_kernels.rotary_backward[(N,)](query.contiguous(), key.contiguous(), value.contiguous(), cos.contiguous(),
                                         sin.contiguous(), out, scale, Q, K, D=D, BLOCK_Q=power_of_two(Q),
                                         BLOCK_K=power_of_two(K), QUANTIZE=quantized, num_warps=4)
    return out, scale


@rotary_backward.register_fake
def _(query, key, value, cos, sin, quantized):
    return empty_rows(query, query.shape[1] * query.shape[2] + 2 * key.shape[1] * key.shape[2], quantized)
