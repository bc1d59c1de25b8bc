"""Matrices in 4 bits that have the same input, multiplied by one row at once: q/k/v, and w1 and w3 with SwiGLU.

Each of them stays quantized as it was, and multiplies several rows by itself.
"""

import torch
from torch import nn

from lavin.fast.fused_linear import frozen, split_heads, uses_gemv
from lavin.kernels.single_row import gemv_nf4, gemv_nf4_swiglu
from lavin.llama import Attention, FeedForward, add_bias

ALIGNMENT = 256 * 64 // 2  # the bytes of the codes that share an entry of absmax2, which must be one matrix's


def can_join(linears: list[nn.Module]) -> bool:
    """Says whether our kernel can multiply these layers (Linear4bit) at once."""
    return all(linear.weight.numel() % ALIGNMENT == 0 and linear.state.shape[1] % 64 == 0 for linear in linears)


class JoinedNF4(nn.Module):
    """Computes x W^T + b for the weights of several layers (Linear4bit) and x [1, K].

    Their weights and scales are in one piece of memory, of which the layers keep parts. All of them have a bias, or
    none has.
    """

    def __init__(self, linears: list[nn.Module]):
        super().__init__()
        states = [linear.state for linear in linears]
        self.weight, weights = join([linear.weight for linear in linears])
        self.absmax, absmax = join([state.absmax for state in states])
        self.absmax2, absmax2 = join([state.state2.absmax for state in states])
        for i, (linear, state) in enumerate(zip(linears, states, strict=True)):
            linear.weight, state.absmax, state.state2.absmax = weights[i], absmax[i], absmax2[i]
        self.offset = torch.cat([linear.offset for linear in linears])
        self.code2, self.table = states[0].state2.code, linears[0].table  # the same for all
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = frozen(torch.cat(biases)) if biases else None

    @property
    def weights(self) -> tuple:
        return self.weight, self.absmax, self.absmax2, self.code2, self.offset, self.table

    def forward(self, x):
        return add_bias(gemv_nf4(x, *self.weights), self.bias)

    def swiglu(self, x):
        """Returns silu(w1 x) * w3 x for layers [w1, w3]."""
        return gemv_nf4_swiglu(x, *self.weights, self.bias)


def join(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Returns the tensors joined, and its parts in their place."""
    whole = torch.cat(tensors)
    return whole, whole.split([len(tensor) for tensor in tensors])


class JoinedAttention(Attention):
    @classmethod
    def convert(cls, attention: Attention) -> None:
        """Converts an attention layer in place, if its matrices can be joined."""
        linears = [attention.wq, attention.wk, attention.wv]
        if can_join(linears):
            attention.heads, attention.kv_heads = (len(linear.offset) // attention.head_dim for linear in linears[:2])
            attention.wqkv = JoinedNF4(linears)
            attention.__class__ = cls

    def project(self, x):
        if uses_gemv(x) and not x.requires_grad:
            return split_heads(self.wqkv(x), self.heads, self.kv_heads)
        return super().project(x)


class JoinedFeedForward(FeedForward):
    @classmethod
    def convert(cls, feed_forward: FeedForward) -> None:
        """Converts a feed-forward layer in place, if its matrices can be joined."""
        linears = [feed_forward.w1, feed_forward.w3]
        if can_join(linears):
            feed_forward.w13 = JoinedNF4(linears)
            feed_forward.__class__ = cls

    def forward(self, x):
        if uses_gemv(x) and not x.requires_grad:
            return self.w2(self.w13.swiglu(x))
        return super().forward(x)
