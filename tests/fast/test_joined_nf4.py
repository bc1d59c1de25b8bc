"""Joined matrices in 4 bits against the products of each by itself. Random codes and scales stand for quantized
weights, so that the tests need no bitsandbytes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lavin.fast.joined_nf4 import JoinedAttention, JoinedFeedForward
from lavin.kernels.single_row import gemv_nf4
from lavin.llama import Attention, FeedForward, add_bias
from tiny import tiny_config
from tiny_quantized import random_nf4

BIASES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
CODE2 = torch.rand(256, generator=torch.Generator().manual_seed(0))  # all layers of a model have the same


class RandomNF4(nn.Module):
    """A layer of random codes, scales and offsets with what joining takes from a Linear4bit."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias = linear.bias
        self.weight, absmax, absmax2, _, self.offset, self.table = random_nf4(*linear.weight.shape)
        self.state = SimpleNamespace(shape=linear.weight.shape, absmax=absmax,
                                     state2=SimpleNamespace(absmax=absmax2, code=CODE2))

    def forward(self, x):
        """Multiplies each row by itself."""
        state, rows = self.state, x.split(1)
        return add_bias(torch.cat([gemv_nf4(row, self.weight, state.absmax, state.state2.absmax, state.state2.code,
                                            self.offset, self.table) for row in rows]), self.bias)


def layers(dim: int, d_ff: int, biases: tuple[str, ...] = ()) -> tuple[Attention, FeedForward]:
    """An attention and a feed-forward layer of random matrices in 4 bits, and random biases."""
    torch.manual_seed(0)
    config = tiny_config(dim=dim, d_ff=d_ff, biases=biases)
    attention, feed_forward = Attention(config), FeedForward(config)
    for owner in (attention, feed_forward):
        for name, linear in list(owner.named_children()):
            setattr(owner, name, RandomNF4(linear))
    return attention, feed_forward


@pytest.mark.parametrize("biases", [(), BIASES])
def test_joined_matrices_multiply_a_row_as_each_does(monkeypatch, biases):
    attention, feed_forward = layers(256, 128, biases)
    x = torch.randn(2, 256)
    expected = [*attention.project(x), feed_forward(x)]
    JoinedAttention.convert(attention)
    JoinedFeedForward.convert(feed_forward)
    monkeypatch.setattr("lavin.fast.joined_nf4.uses_gemv", lambda x: len(x) == 1)
    joined = [torch.cat(rows) for rows in zip(*([*attention.project(row), feed_forward(row)] for row in x.split(1)),
                                              strict=True)]
    for actual, exact in zip(joined, expected, strict=True):
        torch.testing.assert_close(actual, exact)
    for actual, exact in zip([*attention.project(x), feed_forward(x)], expected, strict=True):
        torch.testing.assert_close(actual, exact)  # the parts of the joined tensors, each by itself


@pytest.mark.parametrize("dim, d_ff, joins", [
    (256, 128, True),
    (64, 192, False),  # each matrix's last scales would share theirs with the next one's first
    (32, 512, False)])  # a scale is that of two rows
def test_only_matrices_with_scales_of_their_own_are_joined(dim, d_ff, joins):
    attention, feed_forward = layers(dim, d_ff)
    JoinedAttention.convert(attention)
    JoinedFeedForward.convert(feed_forward)
    assert isinstance(attention, JoinedAttention) == isinstance(feed_forward, JoinedFeedForward) == joins
