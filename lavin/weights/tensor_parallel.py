"""Tensor parallelism for LLaMA by fairscale's layers: each rank holds some heads and hidden units of every layer, and a
shard of the embedding and of the output projection.

- Modules are converted while the model is on the meta device; each rank then reads only its shards (`ShardedTensors`).
- Between layers, activations are replicated on all ranks of a model-parallel group. So are the adapters and the ViT,
  and what both compute, dropout included. ColumnParallelLinear all-reduces its input's gradient over the group, so
  the adapters' gradients are replicated too, and need no all-reduce within the group (lavin/runtime/distributed.py).

Megatron-LM: Shoeybi et al. 2019, arXiv 1909.08053.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.initialize import get_model_parallel_rank
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region
from torch import nn

from lavin.model import LaVIN
from lavin.runtime import distributed
from lavin.runtime.errors import UserError
from lavin.weights.meta import MetaShards, shard_dim


def to_parallel_layer(module: nn.Module, cls: type, dim: int, **attributes) -> None:
    """Converts a linear layer or embedding on meta to fairscale's class `cls`, its weight sharded along `dim`.

    A bias is sharded with the rows; where columns are sharded, each rank adds all of it, after the sum over the ranks.

    In place, since fairscale's constructors would allocate and initialise both the full weight and the shard.
    """
    shape = list(module.weight.shape)
    shape[dim] //= distributed.model_parallel_size
    module.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    if getattr(module, "bias", None) is not None and dim == 0:
        module.bias = nn.Parameter(torch.empty(shape[0], device="meta"), requires_grad=False)
    module.__class__ = cls
    vars(module).update(attributes)


def shard_model(model: LaVIN) -> None:
    """Converts a model on meta in place. Raises UserError if its sizes are not divisible by the group size."""
    size, config = distributed.model_parallel_size, model.llama.config
    for what, number in {"heads": config.n_heads, "key and value heads": config.kv_heads, "pieces": config.vocab_size,
                         "hidden units": config.hidden_dim, "dimensions": config.dim}.items():
        if number % size:
            raise UserError(f"--model_parallel_size {size} does not divide this model's {number} {what}: "
                            "choose another")
    for block in model.llama.layers:
        attention, feed_forward = block.attention, block.feed_forward
        for linear in (attention.wq, attention.wk, attention.wv, feed_forward.w1, feed_forward.w3):
            to_parallel_layer(linear, ColumnParallelLinear, 0, gather_output=False)
        for linear in (attention.wo, feed_forward.w2):
            to_parallel_layer(linear, RowParallelLinear, 1, input_is_parallel=True)
    to_parallel_layer(model.llama.tok_embeddings, ParallelEmbedding, 1)
    to_parallel_layer(model.llama.output, ColumnParallelLinear, 0, gather_output=True)
    # this rank's numbers of heads, which size its KV cache
    model.llama.config = replace(config, n_heads=config.n_heads // size, n_kv_heads=config.kv_heads // size,
                                 d_head=config.head_dim)
    model.answer_loss = answer_loss


def answer_loss(hidden, weight, targets, loss_weights):
    """Returns lavin.loss.answer_loss for a shard of the output projection: hidden [M, D], weight [V / size, D]."""
    logits = F.linear(copy_to_model_parallel_region(hidden), weight).float()
    return (vocab_parallel_cross_entropy(logits, targets) * loss_weights).sum()


class ShardedTensors(Mapping):
    """Maps names to this rank's shards. If the base has one file per rank, only this rank's file is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors, self.rank, self.size = tensors, get_model_parallel_rank(), distributed.model_parallel_size
        one_file_per_rank = isinstance(tensors, MetaShards) and len(tensors.shards) == self.size
        self.files: MetaShards | None = cast(MetaShards, tensors) if one_file_per_rank else None

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, name):
        dim = shard_dim(name)
        if self.files is not None and self.files.concat_dim(name) == dim:
            return self.files.shards[self.rank][name]
        tensor = self.tensors[name]
        return tensor if dim is None else tensor.tensor_split(self.size, dim)[self.rank]
