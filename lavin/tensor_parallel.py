"""LLaMA divided among the processes of a group, by fairscale's layers: each holds some heads and hidden units of every
layer, and its part of both embeddings.

Notable:
- A swap on a model that is only described; weights are then read as each process needs them (`OwnParts`).
- Between layers the activations are whole and alike in all processes of a group, and so are the adapters, the ViT and
  what both compute, dropout included. A ColumnParallelLinear sums its input's gradient over the group, so the adapters'
  gradients are whole and alike too: nothing is left to sum within a group (lavin/parallel.py).

Shoeybi et al. 2019, arXiv 1909.08053.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region
from torch import nn

from lavin import parallel
from lavin.base_weights import MetaShards, shard_dim
from lavin.errors import UserError
from lavin.model import LaVIN


def become(module: nn.Module, kind: type, dim: int, **how) -> None:
    """Makes a described linear or embedding one of fairscale's, its weight divided along `dim`.

    In place, since their constructors would allocate and fill both the whole weight and the part.
    """
    shape = list(module.weight.shape)
    shape[dim] //= parallel.model_size
    module.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    module.__class__ = kind
    vars(module).update(how)


def divide(model: LaVIN) -> None:
    """In place, on a model that is only described. Raises UserError where it cannot be divided."""
    size, config = parallel.model_size, model.llama.config
    for what, number in {"heads": config.n_heads, "key and value heads": config.kv_heads, "pieces": config.vocab_size,
                         "hidden units": config.hidden_dim, "dimensions": config.dim}.items():
        if number % size:
            raise UserError(f"--model_parallel_size {size} does not divide this model's {number} {what}: "
                            "choose another")
    for block in model.llama.layers:
        attention, feed_forward = block.attention, block.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, feed_forward.w1, feed_forward.w3):
            become(linear, ColumnParallelLinear, 0, gather_output=False)
        for linear in (attention.wo, feed_forward.w2):
            become(linear, RowParallelLinear, 1, input_is_parallel=True)
    become(model.llama.tok_embeddings, ParallelEmbedding, 1)
    become(model.llama.output, ColumnParallelLinear, 0, gather_output=True)
    model.llama.config = replace(config, n_heads=config.n_heads // size, n_kv_heads=config.kv_heads // size,
                                 d_head=config.head_dim)  # of this process, whose cache it shapes
    model.answer_loss = answer_loss


def answer_loss(hidden, weight, target, factor):
    """lavin.loss.answer_loss, for a part of the output matrix [V / size, D]."""
    logits = F.linear(copy_to_model_parallel_region(hidden), weight).float()
    return (vocab_parallel_cross_entropy(logits, target) * factor).sum()


class OwnParts(Mapping):
    """This process's parts of a base model's tensors. Where its files are shards, one a process, it reads its own."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors, self.rank, self.size = tensors, get_model_parallel_rank(), parallel.model_size
        self.matching = isinstance(tensors, MetaShards) and len(tensors.shards) == self.size

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, name):
        dim = shard_dim(name)
        if self.matching and self.tensors.joined_on(name) == dim:
            return self.tensors.shards[self.rank][name]
        tensor = self.tensors[name]
        return tensor if dim is None else tensor.tensor_split(self.size, dim)[self.rank]
