"""Frozen matrices, in 16 bits or fp8, fused with what surrounds them: q/k/v with rotary embeddings, the SwiGLU MLP.

A frozen matrix needs no weight gradient. So the backward passes here compute input gradients alone, and save no
activations but the SwiGLU's gate and up.

With fp8, every row of an activation or gradient (a token) and every row of a weight has its own scale (kernels/fp8.py).
Weights are quantized once, in both orientations, since the forward and the backward product sum over different
dimensions.

`weights`: (W [O, K],) in 16 bits; in fp8 (rows of W, their scales, rows of W^T, their scales), see `is_fp8`. They are
passed as single tensors, since autograd and torch.compile look into no other objects. `bias`: [O], or None; it changes
no input gradient.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lavin.kernels.fp8 import quantize_rows, scaled_matmul
from lavin.kernels.fused_ops import qkv_rope_backward, swiglu, swiglu_backward
from lavin.kernels.single_row import gemv, gemv_swiglu, is_decoded, uses_gemv
from lavin.llama import Attention, FeedForward, add_bias, apply_rotary


def frozen(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)


class FrozenLinear(nn.Module):
    """Computes x W^T + b for a frozen W [O, K] and b [O]."""

    def __init__(self, weight: torch.Tensor, fp8: bool, bias: torch.Tensor | None = None):
        super().__init__()
        self.bias = frozen(bias)
        # one attribute for each tensor: Dynamo of torch 2.7 loses the entries of a ParameterList
        self.weight, self.scale, self.weight_t, self.scale_t = frozen(weight), None, None, None
        if fp8:
            self.weight, self.scale, self.weight_t, self.scale_t = (
                frozen(part.contiguous()) for w in (weight, weight.t()) for part in quantize_rows(w.detach()))

    @classmethod
    def join(cls, linears: list[nn.Linear], fp8: bool) -> "FrozenLinear":
        """Joins layers with the same input to one matrix. All of them have a bias, or none has."""
        return cls(torch.cat([linear.weight for linear in linears]), fp8, joined_bias(linears))

    @property
    def weights(self) -> tuple:
        return (self.weight,) if self.scale is None else (self.weight, self.scale, self.weight_t, self.scale_t)

    def forward(self, x):
        """Returns x W^T + b [N, O] for x [N, K]."""
        return add_bias(frozen_linear(x, *self.weights), self.bias)


def joined_bias(linears: Sequence) -> torch.Tensor | None:
    """Returns the biases of layers as one tensor, or None where they have none."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def is_fp8(weights: Sequence[torch.Tensor]) -> bool:
    """Says whether a matrix is stored in fp8, as four tensors, or in 16 bits, as one."""
    return len(weights) == 4


def maybe_quantize(x, weights: tuple) -> tuple:
    """Returns the factor x of a product with these weights: (values, scales) in fp8, else (x, None)."""
    return quantize_rows(x) if is_fp8(weights) else (x, None)


def matmul(scaled_x: tuple, weights: tuple, dtype):
    """Returns x W^T [N, O] for x [N, K]. `scaled_x` is x as `maybe_quantize` returns it."""
    x, scale = scaled_x
    return scaled_matmul(x, scale, weights[0], weights[1], dtype) if is_fp8(weights) else x @ weights[0].t()


def linear(x, weights: tuple):
    """Returns x W^T [N, O] for x [N, K], in the dtype of x."""
    if uses_gemv(x):
        return gemv(x, weights[0], weights[1] if is_fp8(weights) else None)
    return matmul(maybe_quantize(x, weights), weights, x.dtype)


def matmul_backward(scaled_grad: tuple, weights: tuple, dtype):
    """Returns the gradient of x, grad_output W: [N, K] for [N, O]. `scaled_grad` is grad_output as `maybe_quantize`
    returns it.
    """
    grad, scale = scaled_grad
    return scaled_matmul(grad, scale, weights[2], weights[3], dtype) if is_fp8(weights) else grad @ weights[0]


class FrozenLinearFunction(torch.autograd.Function):
    """Computes x W^T [N, O] for x [N, K] and the `weights` of a frozen W."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(*weights)
        return linear(x, weights)

    @staticmethod
    def backward(ctx, grad_output):
        weights = ctx.saved_tensors
        grad_x = matmul_backward(maybe_quantize(grad_output, weights), weights, grad_output.dtype)
        return grad_x, *[None] * len(weights)


class SwiGLUMLPFunction(torch.autograd.Function):
    """Computes w2 (silu(w1 x) * w3 x).

    `weights` are those of [w1; w3] in one matrix, then those of w2. `bias` is that of [w1; w3].
    """

    @staticmethod
    def forward(ctx, x, bias, *weights):
        half = len(weights) // 2
        w13, w2 = weights[:half], weights[half:]
        gate_up = add_bias(matmul(maybe_quantize(x, w13), w13, x.dtype), bias)  # [N, 2H]
        ctx.save_for_backward(gate_up, *weights)
        return matmul(swiglu(gate_up, is_fp8(w2)), w2, x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        gate_up, *weights = ctx.saved_tensors
        half, dtype = len(weights) // 2, grad_output.dtype
        w13, w2 = weights[:half], weights[half:]
        grad_hidden = matmul_backward(maybe_quantize(grad_output, w2), w2, dtype)  # [N, H]
        grad_gate_up = swiglu_backward(gate_up, grad_hidden, is_fp8(w13))  # already quantized for the next product
        return matmul_backward(grad_gate_up, w13, dtype), *[None] * (1 + len(weights))


class QKVRopeFunction(torch.autograd.Function):
    """Computes query, key and value by one matrix product, and applies rotary embeddings to query and key."""

    @staticmethod
    def forward(ctx, x, cos, sin, heads, kv_heads, bias, *weights):
        ctx.save_for_backward(cos, sin, *weights)
        qkv = add_bias(linear(x, weights), bias)
        query, key, value = split_heads(qkv, heads, kv_heads)
        return apply_rotary(query, (cos, sin)), apply_rotary(key, (cos, sin)), value.clone()

    @staticmethod
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin, *weights = ctx.saved_tensors
        grad_qkv = qkv_rope_backward(grad_query, grad_key, grad_value, cos, sin, is_fp8(weights))
        return matmul_backward(grad_qkv, weights, grad_query.dtype), *[None] * (5 + len(weights))


def split_heads(qkv, heads: int, kv_heads: int) -> tuple:
    """Splits [N, (H + 2 H_kv) d] into query [N, H, d], key and value [N, H_kv, d]."""
    return qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)


# Plain functions, since torch.compiler.allow_in_graph (speed_up.py) takes no autograd.Function.


def frozen_linear(x, *weights):
    return FrozenLinearFunction.apply(x, *weights)


def swiglu_mlp(x, bias, *weights):
    return SwiGLUMLPFunction.apply(x, bias, *weights)


def qkv_rope(x, cos, sin, heads, kv_heads, bias, *weights):
    return QKVRopeFunction.apply(x, cos, sin, heads, kv_heads, bias, *weights)


class FusedAttention(Attention):
    """Attention whose query, key and value are one matrix product, fused with rotary embeddings."""

    @classmethod
    def convert(cls, attention: Attention, fp8: bool) -> None:
        """Converts an attention layer in place: wq, wk and wv become one matrix, wqkv."""
        attention.heads = attention.wq.out_features // attention.head_dim
        attention.kv_heads = attention.wk.out_features // attention.head_dim
        attention.wqkv = FrozenLinear.join([attention.wq, attention.wk, attention.wv], fp8)
        del attention.wq, attention.wk, attention.wv
        attention.wo = FrozenLinear(attention.wo.weight, fp8, attention.wo.bias)
        attention.__class__ = cls

    def project(self, x):
        return split_heads(self.wqkv(x), self.heads, self.kv_heads)

    def query_key_value(self, x, rotary):
        if self.q_norm is not None:  # it lies between the matrix and the rotation, which are then not fused
            return super().query_key_value(x, rotary)
        return qkv_rope(x, *rotary, self.heads, self.kv_heads, self.wqkv.bias, *self.wqkv.weights)


class FusedFeedForward(FeedForward):
    """FeedForward whose w1 and w3 are one matrix, fused with SwiGLU."""

    @classmethod
    def convert(cls, feed_forward: FeedForward, fp8: bool) -> None:
        """Converts a feed-forward layer in place: w1 (gate) and w3 (up) become one matrix, w13."""
        feed_forward.w13 = FrozenLinear.join([feed_forward.w1, feed_forward.w3], fp8)
        del feed_forward.w1, feed_forward.w3
        feed_forward.w2 = FrozenLinear(feed_forward.w2.weight, fp8, feed_forward.w2.bias)
        feed_forward.__class__ = cls

    def forward(self, x):
        if is_decoded(x):
            return self.w2(gemv_swiglu(x, self.w13.weight, self.w13.scale, self.w13.bias))
        return add_bias(swiglu_mlp(x, self.w13.bias, *self.w13.weights, *self.w2.weights), self.w2.bias)
