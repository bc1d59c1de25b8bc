"""Swaps on an unchanged model that make it fast, chosen here by hardware: fused projections, compiled blocks."""

import torch
import torch.nn.functional as F
from torch import nn

from lavin.llama import Attention, FeedForward
from lavin.model import LaVIN


def fuse(linears: list[nn.Linear]) -> nn.Linear:
    """Frozen matrices that read the same input, as one."""
    weight = torch.cat([linear.weight for linear in linears])
    fused = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    fused.weight = nn.Parameter(weight, requires_grad=False)
    return fused


class FusedAttention(Attention):
    def project(self, x):
        return self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, 1)


class FusedFeedForward(FeedForward):
    def forward(self, x):
        gate, value = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * value)


def fuse_projections(model: LaVIN) -> None:
    for block in model.llama.layers:
        attention, feed_forward = block.attention, block.feed_forward
        attention.heads = [w.out_features // attention.head_dim for w in (attention.wq, attention.wk, attention.wv)]
        attention.wqkv = fuse([attention.wq, attention.wk, attention.wv])
        feed_forward.w13 = fuse([feed_forward.w1, feed_forward.w3])
        del attention.wq, attention.wk, attention.wv, feed_forward.w1, feed_forward.w3
        attention.__class__, feed_forward.__class__ = FusedAttention, FusedFeedForward


def speed_up(model: LaVIN) -> LaVIN:
    """In place. On a CPU the plain model is kept."""
    if model.device.type != "cuda":
        return model
    fuse_projections(model)
    for block in (*model.llama.layers, *model.vision.vit.blocks):
        block.compile(dynamic=True)
    return model
