"""The KV cache, and the attention metadata of prefill and decoding, which read and write it.

The modality token is not cached: no other token attends to it, and its effect on the routers is in the routing cache.
"""

from dataclasses import dataclass

import torch

from lavin.attention import VarlenMetadata, grouped_sdpa
from lavin.llama import LlamaConfig
from lavin.model import MODALITIES


class KVCache:
    """Keys and values [L, B, H_kv, T, d] of B sequences; lengths [B]: how many of the T positions are filled."""

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, device, dtype):
        shape = (config.n_layers, batch_size, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)


class PrefillMetadata(VarlenMetadata):
    """The packed row of training, whose keys and values are also written to the cache."""

    def __init__(self, cache: KVCache, lengths: list[int], device, position_offsets: list[int] | None = None):
        super().__init__(lengths, device, position_offsets)
        self.cache = cache
        # [N]: where each token behind the two modality tokens goes in the cache
        self.sequence_ids = self.document_ids[MODALITIES:] - MODALITIES
        self.cache_positions = self.doc_positions[MODALITIES:]

    def for_layer(self, layer: int):
        return PrefillLayer(self, self.cache.keys[layer], self.cache.values[layer])


@dataclass
class PrefillLayer:
    """keys, values: this layer's part of the cache [B, H_kv, T, d]."""

    attn_metadata: PrefillMetadata
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, query, key, value):
        index = self.attn_metadata.sequence_ids, slice(None), self.attn_metadata.cache_positions
        self.keys[index] = key[MODALITIES:]
        self.values[index] = value[MODALITIES:]
        return self.attn_metadata.attend(query, key, value)


class DecodeMetadata:
    """One new token for every sequence of the cache, B rows in all."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.cache_positions = cache.lengths.clone()  # [B]: where the new tokens go
        self.position_ids = self.cache_positions + 1  # the modality token has rotary position 0
        self.document_ids = torch.arange(len(cache.lengths), device=cache.lengths.device)
        all_positions = torch.arange(cache.keys.shape[3], device=cache.lengths.device)
        self.mask = (all_positions <= self.cache_positions[:, None])[:, None, None]  # [B, 1, 1, T]
        cache.lengths += 1

    def for_layer(self, layer: int):
        return DecodeLayer(self, self.cache.keys[layer], self.cache.values[layer])


@dataclass
class DecodeLayer:
    """keys, values: this layer's part of the cache [B, H_kv, T, d]."""

    attn_metadata: DecodeMetadata
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, query, key, value):
        """query [B, H, d], key and value [B, H_kv, d] -> [B, H, d]."""
        index = self.attn_metadata.document_ids, slice(None), self.attn_metadata.cache_positions
        self.keys[index] = key
        self.values[index] = value
        out = grouped_sdpa(query[:, :, None], self.keys, self.values, attn_mask=self.attn_metadata.mask)
        return out[:, :, 0]
