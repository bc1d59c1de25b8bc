"""Joined matrices in 4 bits against the products of each by itself. Random codes and scales stand for quantized
weights, so that the tests need no bitsandbytes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lavin.fast.joined_nf4 import JoinedAttention, JoinedFeedForward, convert
from lavin.kernels.single_row import gemv_nf4
from lavin.llama import Block, add_bias
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

    def prepare_gemv(self) -> None:
        self.multiplies_rows = self.state.shape[1] % 64 == 0

    def forward(self, x):
        """Multiplies each row by itself."""
        state, rows = self.state, x.split(1)
        return add_bias(torch.cat([gemv_nf4(row, self.weight, state.absmax, state.state2.absmax, state.state2.code,
                                            self.offset, self.table) for row in rows]), self.bias)


def random_block(dim: int, d_ff: int, biases: tuple[str, ...] = ()) -> Block:
    """A layer of random matrices in 4 bits, and random biases."""
    torch.manual_seed(0)
    block = Block(tiny_config(dim=dim, d_ff=d_ff, biases=biases))
    for owner in (block.attention, block.feed_forward):
        for name, linear in list(owner.named_children()):
            setattr(owner, name, RandomNF4(linear))
    return block


@pytest.mark.parametrize("biases", [(), BIASES])
def test_joined_matrices_multiply_a_row_as_each_does(monkeypatch, biases):
    block, x = random_block(256, 128, biases), torch.randn(2, 256)

    def products(x):
        return [*block.attention.project(x), block.feed_forward(x)]

    expected = products(x)
    convert(block)
    monkeypatch.setattr("lavin.kernels.single_row.uses_gemv", lambda x: len(x) == 1)
    joined = [torch.cat(rows) for rows in zip(*map(products, x.split(1)), strict=True)]
    torch.testing.assert_close(joined, expected)
    torch.testing.assert_close(products(x), expected)  # the parts of the joined tensors, each by itself


@pytest.mark.parametrize("dim, d_ff, joins", [
    (256, 128, True),
    (64, 192, False),  # each matrix's last scales would share theirs with the next one's first
    (32, 512, False)])  # a scale is that of two rows
def test_only_matrices_with_scales_of_their_own_are_joined(dim, d_ff, joins):
    block = random_block(dim, d_ff)
    convert(block)
    assert isinstance(block.attention, JoinedAttention) == isinstance(block.feed_forward, JoinedFeedForward) == joins
