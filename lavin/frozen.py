"""Products with frozen matrices, in 16 bits or fp8, joined with what stands around them in a decoder layer.

A frozen matrix needs no gradient, so a layer can be handed its gradients in whatever form the next product takes, and
keeps nothing for the backward pass but gate and value.

fp8 is e4m3 (Micikevicius et al. 2022, arXiv 2209.05433). Every row of what moves (a token's activations, or its
gradient) and every row of a weight has its own scale; weights are quantized once, in both orders, since each product
sums over another dimension.
"""

import torch
from torch import nn

from lavin.errors import UserError
from lavin.kernels import quantize, rotary_backward, swiglu, swiglu_backward
from lavin.llama import Attention, FeedForward, apply_rotary


class FrozenLinear(nn.Module):
    """weights: (W [O, K],), or for fp8 (rows, their scales, columns, their scales)."""

    def __init__(self, weight: torch.Tensor, fp8: bool):
        super().__init__()
        parts = [weight.detach()]
        if fp8:
            parts = [part.contiguous() for side in (parts[0], parts[0].t()) for part in quantize(side)]
        self.parts = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)

    @property
    def weights(self) -> tuple:
        return tuple(self.parts)

    def forward(self, x):
        """[N, K] -> [N, O]."""
        return frozen_product(x, *self.weights)


def scaled_product(a, a_scale, b, b_scale, dtype):
    """a b^T of quantized rows -> [N, O]; on the matrix units of Ada (8.9), Hopper and newer, or written out."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=True)
    return ((a.float() * a_scale) @ (b.float() * b_scale).t()).to(dtype)


def quantized_or_not(x, weights: tuple):
    """Rows as the product with these weights takes them, and their scales."""
    return quantize(x) if len(weights) > 1 else (x, None)


def product(x, scale, weights: tuple, dtype):
    """x W^T."""
    return scaled_product(x, scale, *weights[:2], dtype) if len(weights) > 1 else x @ weights[0].t()


def product_backward(gradient, scale, weights: tuple, dtype):
    """gradient W."""
    return scaled_product(gradient, scale, *weights[2:], dtype) if len(weights) > 1 else gradient @ weights[0]


class FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(*weights)
        return product(*quantized_or_not(x, weights), weights, x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        weights = ctx.saved_tensors
        return product_backward(*quantized_or_not(gradient, weights), weights, gradient.dtype), *[None] * len(weights)


class SwiGLUProducts(torch.autograd.Function):
    """w2 (silu(w1 x) * w3 x); weights: of w1 and w3 as one, then of w2."""

    @staticmethod
    def forward(ctx, x, *weights):
        half = len(weights) // 2
        gate_value = product(*quantized_or_not(x, weights[:half]), weights[:half], x.dtype)
        ctx.save_for_backward(gate_value, *weights)
        return product(*swiglu(gate_value, half > 1), weights[half:], x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        gate_value, *weights = ctx.saved_tensors
        half, dtype = len(weights) // 2, gradient.dtype
        gradient = product_backward(*quantized_or_not(gradient, weights[half:]), weights[half:], dtype)
        rows = swiglu_backward(gate_value, gradient, half > 1)
        return product_backward(*rows, weights[:half], dtype), *[None] * len(weights)


class TurnedProduct(torch.autograd.Function):
    """Query, key and value from one product, the first two turned by their rotary angles."""

    @staticmethod
    def forward(ctx, x, cos, sin, heads, kv_heads, *weights):
        ctx.save_for_backward(cos, sin, *weights)
        rows = product(*quantized_or_not(x, weights), weights, x.dtype).unflatten(-1, (heads + 2 * kv_heads, -1))
        query, key, value = rows.split((heads, kv_heads, kv_heads), 1)
        return apply_rotary(query, (cos, sin)), apply_rotary(key, (cos, sin)), value.clone()

    @staticmethod
    def backward(ctx, query, key, value):
        cos, sin, *weights = ctx.saved_tensors
        rows = rotary_backward(query, key, value, cos, sin, len(weights) > 1)
        return product_backward(*rows, weights, query.dtype), *[None] * (4 + len(weights))


def frozen_product(*inputs):
    return FrozenProduct.apply(*inputs)


def swiglu_products(*inputs):
    return SwiGLUProducts.apply(*inputs)


def turned_product(*inputs):
    return TurnedProduct.apply(*inputs)


class FusedAttention(Attention):
    @classmethod
    def replace(cls, attention: Attention, fp8: bool) -> None:
        """In place: query, key and value become one product."""
        attention.heads, attention.kv_heads = (w.out_features // attention.head_dim for w in (attention.wq, attention.wk))
        joined = torch.cat([attention.wq.weight, attention.wk.weight, attention.wv.weight])
        del attention.wq, attention.wk, attention.wv
        attention.wqkv = FrozenLinear(joined, fp8)
        attention.wo = FrozenLinear(attention.wo.weight, fp8)
        attention.__class__ = cls

    def forward(self, x, rotary, plan):
        query, key, value = turned_product(x, *rotary, self.heads, self.kv_heads, *self.wqkv.weights)
        return self.wo(plan.attend(query, key, value).flatten(1))


class FusedFeedForward(FeedForward):
    @classmethod
    def replace(cls, feed_forward: FeedForward, fp8: bool) -> None:
        """In place: gate and value become one product."""
        joined = torch.cat([feed_forward.w1.weight, feed_forward.w3.weight])
        del feed_forward.w1, feed_forward.w3
        feed_forward.w13 = FrozenLinear(joined, fp8)
        feed_forward.w2 = FrozenLinear(feed_forward.w2.weight, fp8)
        feed_forward.__class__ = cls

    def forward(self, x):
        return swiglu_products(x, *self.w13.weights, *self.w2.weights)


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where the hardware has no fp8 products."""
    if device.type == "cuda" and (torch.cuda.get_device_capability(device) < (8, 9) or dtype != torch.bfloat16):
        raise UserError("--bits fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer and --precision bf16: "
                        "leave it at 16bit")
