"""SwiGLU, and the backward pass of q/k/v with rotary embeddings: one pass over memory each, fp8 output if asked.

On GPUs these are Triton kernels (fused_ops_triton.py), elsewhere their reference implementations in PyTorch. They are
custom operators, so torch.compile calls them without tracing into them. Each returns (output, scales): scales [N, 1]
where `quantize` is set, else empty [0, 1].
"""

import torch
import torch.nn.functional as F

from lavin.kernels.fp8 import FP8_DTYPE, quantize_rows
from lavin.runtime.arithmetic import next_power_of_2


def empty_output(like: torch.Tensor, width: int, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    N = like.shape[0]  # not len(), which torch.compile would specialize on
    out = like.new_empty(N, width, dtype=FP8_DTYPE if quantize else like.dtype)
    return out, like.new_empty(N if quantize else 0, 1, dtype=torch.float32)


def cast_output(x: torch.Tensor, dtype: torch.dtype, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a kernel writes into `empty_output`, for the reference implementations: x float32, quantized or cast
    to dtype."""
    return quantize_rows(x) if quantize else (x.to(dtype), x.new_empty(0, 1, dtype=torch.float32))


@torch.library.custom_op("lavin::swiglu", mutates_args=())
def swiglu(gate_up: torch.Tensor, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns silu(gate) * up [N, H] for gate_up = [gate | up] [N, 2H]."""
    H = gate_up.shape[1] // 2
    if not gate_up.is_cuda:
        gate, up = gate_up.float().split(H, 1)
        return cast_output(F.silu(gate) * up, gate_up.dtype, quantize)
    from lavin.kernels.fused_ops_triton import swiglu_fwd
    out, scale = empty_output(gate_up, H, quantize)
    swiglu_fwd[(len(out),)](gate_up, out, scale, H, BLOCK=next_power_of_2(H), QUANTIZE=quantize, num_warps=32)
    return out, scale


@swiglu.register_fake
def _(gate_up, quantize):
    return empty_output(gate_up, gate_up.shape[1] // 2, quantize)


@torch.library.custom_op("lavin::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: torch.Tensor, grad_output: torch.Tensor, quantize: bool
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of gate_up [N, 2H] for grad_output [N, H]."""
    H = grad_output.shape[1]
    if not gate_up.is_cuda:
        gate, up = gate_up.float().split(H, 1)
        grad_output, sigmoid = grad_output.float(), gate.sigmoid()
        grad_gate = grad_output * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_up = grad_output * gate * sigmoid
        return cast_output(torch.cat((grad_gate, grad_up), 1), gate_up.dtype, quantize)
    from lavin.kernels.fused_ops_triton import swiglu_bwd
    out, scale = empty_output(gate_up, 2 * H, quantize)
    swiglu_bwd[(len(out),)](gate_up, grad_output.contiguous(), out, scale, H, BLOCK=next_power_of_2(H),
                            QUANTIZE=quantize, num_warps=32)
    return out, scale


@swiglu_backward.register_fake
def _(gate_up, grad_output, quantize):
    return empty_output(gate_up, gate_up.shape[1], quantize)


@torch.library.custom_op("lavin::qkv_rope_backward", mutates_args=())
def qkv_rope_backward(grad_query: torch.Tensor, grad_key: torch.Tensor, grad_value: torch.Tensor, cos: torch.Tensor,
                      sin: torch.Tensor, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of the joint projection [N, (H + 2 H_kv) d], before rotary embeddings.

    `grad_query` [N, H, d], `grad_key` and `grad_value` [N, H_kv, d] are the gradients of what attention reads; cos and
    sin are [N, 1, d].
    """
    N, H, D = grad_query.shape
    Q, K = H * D, grad_key.shape[1] * D
    if not grad_query.is_cuda:
        # The inverse rotation: transposed, so `sin` is multiplied before the pair's entries are swapped.
        unrotated = [g.float() * cos + (g.float() * sin).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
                     for g in (grad_query, grad_key)]
        grad_qkv = torch.cat([g.flatten(1) for g in (*unrotated, grad_value.float())], 1)
        return cast_output(grad_qkv, grad_query.dtype, quantize)
    from lavin.kernels.fused_ops_triton import qkv_rope_bwd
    out, scale = empty_output(grad_query, Q + 2 * K, quantize)
    qkv_rope_bwd[(N,)](grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous(), cos.contiguous(),
                       sin.contiguous(), out, scale, Q, K, D=D, BLOCK_Q=next_power_of_2(Q), BLOCK_K=next_power_of_2(K),
                       QUANTIZE=quantize, num_warps=4)
    return out, scale


@qkv_rope_backward.register_fake
def _(grad_query, grad_key, grad_value, cos, sin, quantize):
    width = grad_query.shape[1] * grad_query.shape[2] + 2 * grad_key.shape[1] * grad_key.shape[2]
    return empty_output(grad_query, width, quantize)
