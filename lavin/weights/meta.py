"""LLaMA in Meta's format: params.json and one or several consolidated.*.pth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lavin.llama import LlamaConfig
from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.schema import Epsilon, Layers, Positive, Size, Width, declared, read_validated
from lavin.weights.tensor_files import COMPUTED_BUFFERS, read_tensors

# dimension along which Meta's files shard each tensor; norms are replicated
SHARD_DIMS = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


@declared
class Params(TypedDict):
    """The content of params.json."""

    dim: Width
    n_layers: Layers
    n_heads: Width
    n_kv_heads: NotRequired[Width | None]
    vocab_size: NotRequired[Annotated[int, Field(ge=-1, le=2**24)]]  # -1: the tokenizer's
    multiple_of: NotRequired[Size]
    ffn_dim_multiplier: NotRequired[Annotated[float, Field(gt=0, le=100)] | None]
    norm_eps: NotRequired[Epsilon]
    rope_theta: NotRequired[Positive]
    use_scaled_rope: NotRequired[bool]
    rope_scaling_factor: NotRequired[Positive]


def check_heads(config: LlamaConfig) -> None:
    """Raises ValueError where the heads do not divide what they share."""
    if config.d_head is None and config.dim % config.n_heads:
        raise ValueError(f"its {counted(config.n_heads, 'head')} do not divide its width {config.dim}")
    if config.head_dim % 2:
        raise ValueError(f"the width {config.head_dim} of its heads is odd; rotary embeddings need pairs")
    if config.n_heads % config.kv_heads:
        raise ValueError(f"its {config.kv_heads} key and value heads do not divide its "
                         f"{counted(config.n_heads, 'head')}")


def shard_dim(name: str) -> int | None:
    """Returns the dimension along which tensor parallelism shards a tensor, or None if it is replicated."""
    dim = next((SHARD_DIMS[part] for part in name.split(".") if part in SHARD_DIMS), None)
    return None if dim == 1 and name.endswith(".bias") else dim


class MetaShards(Mapping):
    """A mapping from names to tensors, which are concatenated on access from the shards consolidated.*.pth.

    `dim` is the width of the model.
    """

    def __init__(self, shards: list[dict[str, torch.Tensor]], dim: int):
        self.shards, self.dim = shards, dim

    def __iter__(self):
        return (name for name in self.shards[0] if not name.endswith(COMPUTED_BUFFERS))

    def __len__(self):
        return sum(1 for _ in self)

    def concat_dim(self, name: str) -> int | None:
        """Returns the dimension along which these files shard a tensor, or None if it is replicated."""
        if name == "tok_embeddings.weight" and self.shards[0][name].shape[-1:] == (self.dim,):
            return 0  # Llama 3 shards the vocabulary
        return shard_dim(name)

    def __getitem__(self, name):
        parts, dim = [shard[name] for shard in self.shards], self.concat_dim(name)
        # a tensor with too few dimensions is returned unchanged, so that the caller's check_shape reports it
        return parts[0] if len(parts) == 1 or dim is None or parts[0].ndim <= dim else torch.cat(parts, dim)


def open_meta(folder: Path, vocab_size: int) -> tuple[LlamaConfig, MetaShards, str]:
    """Returns the configuration, the tensors, and what error messages call the files.

    `vocab_size` is the tokenizer's, and is used where params.json says -1. Raises UserError for broken files.
    """
    params = folder / "params.json"
    try:
        config = LlamaConfig.from_params(dict(read_validated(params, Params)), vocab_size)
        check_heads(config)
    except ValueError as error:
        raise UserError(f"{params} does not describe a LLaMA ({error}): fetch or copy it again") from error
    paths = sorted(folder.glob("consolidated.*.pth"))
    shards = [read_tensors(path) for path in paths]
    shapes = [{name: tensor.shape for name, tensor in shard.items()} for shard in shards]
    for path, shard_shapes in zip(paths, shapes, strict=True):
        if shard_shapes != shapes[0]:
            raise UserError(f"{path} does not hold the same tensors as {paths[0].name}: fetch or copy it again")
    return config, MetaShards(shards, config.dim), f"{folder}/consolidated.*.pth ({counted(len(paths), 'file')})"
