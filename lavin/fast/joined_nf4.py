"""LLaMA's matrices in 4 bits, multiplied by one row: q/k/v at once, and w1 and w3 at once with SwiGLU.

The layers (Linear4bit in lavin/weights/quantization.py) stay quantized as they were, and multiply several rows as
before.
"""

import torch
from torch import nn

from lavin.fast.fused_linear import frozen, joined_bias, split_heads
from lavin.kernels.nf4 import NF4_BLOCK, SCALES_BLOCK
from lavin.kernels.single_row import gemv_nf4, gemv_nf4_swiglu, is_decoded
from lavin.llama import Attention, Block, FeedForward, add_bias


def convert(block: Block) -> None:
    """Lets our kernels multiply single rows by the matrices of a layer, and joins those with the same input where they
    can be joined. It changes the layer in place."""
    attention, feed_forward = block.attention, block.feed_forward
    qkv, gate_up = [attention.wq, attention.wk, attention.wv], [feed_forward.w1, feed_forward.w3]
    for linear in (*qkv, attention.wo, *gate_up, feed_forward.w2):
        linear.prepare_gemv()
    if can_join(qkv):
        JoinedAttention.convert(attention, qkv)
    if can_join(gate_up):
        JoinedFeedForward.convert(feed_forward, gate_up)


def can_join(linears: list) -> bool:
    """Says whether our kernel can multiply these layers at once: no two of them may share an entry of absmax2."""
    return all(linear.multiplies_rows and linear.state.shape.numel() % (NF4_BLOCK * SCALES_BLOCK) == 0
               for linear in linears)


class JoinedNF4(nn.Module):
    """Computes x W^T + b for the weights of several layers and x [1, K].

    Their weights and scales are in one piece of memory, of which the layers keep parts. All of them have a bias, or
    none has.
    """

    def __init__(self, linears: list):
        super().__init__()
        states = [linear.state for linear in linears]
        self.weight, weights = join([linear.weight for linear in linears])
        self.absmax, absmax = join([state.absmax for state in states])
        self.absmax2, absmax2 = join([state.state2.absmax for state in states])
        self.offset, offsets = join([linear.offset for linear in linears])
        for i, (linear, state) in enumerate(zip(linears, states, strict=True)):
            linear.weight, linear.offset = weights[i], offsets[i]
            state.absmax, state.state2.absmax = absmax[i], absmax2[i]
        self.code2, self.table = states[0].state2.code, linears[0].table  # the same for all
        self.bias = frozen(joined_bias(linears))

    @property
    def weights(self) -> tuple:
        return self.weight, self.absmax, self.absmax2, self.code2, self.offset, self.table

    def forward(self, x):
        return add_bias(gemv_nf4(x, *self.weights), self.bias)

    def swiglu(self, x):
        """Returns silu(w1 x) * w3 x for the layers [w1, w3]."""
        return gemv_nf4_swiglu(x, *self.weights, self.bias)


def join(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Returns the tensors behind one another in a new one, and views of it that are equal to them."""
    whole = torch.cat(tensors)
    return whole, whole.split([len(tensor) for tensor in tensors])


class JoinedAttention(Attention):
    """Attention in 4 bits whose query, key and value are one matrix product for a single row."""

    @classmethod
    def convert(cls, attention: Attention, qkv: list) -> None:
        """Converts an attention layer in place."""
        attention.heads, attention.kv_heads = (linear.state.shape[0] // attention.head_dim for linear in qkv[:2])
        attention.wqkv = JoinedNF4(qkv)
        attention.__class__ = cls

    def project(self, x):
        if is_decoded(x):
            return split_heads(self.wqkv(x), self.heads, self.kv_heads)
        return super().project(x)


class JoinedFeedForward(FeedForward):
    """FeedForward in 4 bits whose w1 and w3 are one matrix for a single row."""

    @classmethod
    def convert(cls, feed_forward: FeedForward, gate_up: list) -> None:
        """Converts a feed-forward layer in place."""
        feed_forward.w13 = JoinedNF4(gate_up)
        feed_forward.__class__ = cls

    def forward(self, x):
        if is_decoded(x):
            return self.w2(self.w13.swiglu(x))
        return super().forward(x)
