"""LLaMA in Meta's format: params.json and one or several consolidated.*.pth."""

from collections.abc import Mapping
from pathlib import Path

import torch

from lavin.llama import LlamaConfig
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from lavin.weights.tensor_files import COMPUTED_BUFFERS, read_torch

# dimension along which Meta's files shard each tensor; norms are replicated
SHARD_DIMS = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


def shard_dim(name: str) -> int | None:
    """Dimension along which tensor parallelism shards a tensor; None if it is replicated."""
    return next((SHARD_DIMS[part] for part in name.split(".") if part in SHARD_DIMS), None)


class MetaShards(Mapping):
    """Name -> tensor, concatenated on access from the shards consolidated.*.pth. dim: the model's width."""

    def __init__(self, shards: list[dict[str, torch.Tensor]], dim: int):
        self.shards, self.dim = shards, dim

    def __iter__(self):
        return (name for name in self.shards[0] if not name.endswith(COMPUTED_BUFFERS))

    def __len__(self):
        return sum(1 for _ in self)

    def concat_dim(self, name: str) -> int | None:
        """Dimension along which these files shard a tensor; None if it is replicated."""
        if name == "tok_embeddings.weight" and self.shards[0][name].shape[1] == self.dim:
            return 0  # Llama 3 shards the vocabulary
        return shard_dim(name)

    def __getitem__(self, name):
        parts, dim = [shard[name] for shard in self.shards], self.concat_dim(name)
        return parts[0] if len(parts) == 1 or dim is None else torch.cat(parts, dim)


def open_meta(folder: Path, vocab_size: int) -> tuple[LlamaConfig, MetaShards, str]:
    """Returns configuration, tensors, and what error messages call the files.

    vocab_size: the tokenizer's, used where params.json says -1. Raises UserError for broken files.
    """
    params = folder / "params.json"
    try:
        config = LlamaConfig.from_params(read_json(params), vocab_size)
    except (ValueError, TypeError) as error:
        raise UserError(f"{params} does not describe a LLaMA ({error}): fetch or copy it again") from error
    paths = sorted(folder.glob("consolidated.*.pth"))
    shards = [read_torch(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.keys() != shards[0].keys():
            raise UserError(f"{path} does not hold the same tensors as {paths[0].name}: fetch or copy it again")
    return config, MetaShards(shards, config.dim), f"{folder}/consolidated.*.pth ({len(paths)} files)"
