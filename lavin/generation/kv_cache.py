"""The KV cache, and the attention metadata of prefill and decoding, which read and write it.

The modality token is not cached: no other token attends to it, and its effect on the routers is in the routing cache.
"""

from dataclasses import dataclass

import torch

from lavin.attention import HAS_TRITON, VarlenMetadata, grouped_sdpa, uses_triton
from lavin.kernels.kv_cache import decode_attention, fill_cache
from lavin.llama import LlamaConfig


class KVCache:
    """The keys and values [L, B, H_kv, T, d] of B sequences, and their lengths [B]: how many of the T positions are
    filled.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, device, dtype):
        shape = (config.n_layers, batch_size, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)


class PrefillMetadata(VarlenMetadata):
    """The metadata of a prefill: sequences are documents of a packed row, whose keys and values are also written to the
    cache.
    """

    def __init__(self, cache: KVCache, *document_boundaries, **options):
        super().__init__(*document_boundaries, **options)
        self.cache = cache

    def for_layer(self, layer: int):
        return PrefillLayer(self, self.cache.keys[layer], self.cache.values[layer])


@dataclass
class PrefillLayer:
    """One layer's part of a PrefillMetadata. `keys` and `values` are the layer's part of the cache [B, H_kv, T, d]."""

    attn_metadata: PrefillMetadata
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, query, key, value):
        # A captured pass's padding continues the last sequence. Decoding overwrites a position before it reads it, and
        # no sequence alone fills the cache, whose last position takes what does not fit.
        sequence_ids = self.attn_metadata.document_ids
        positions = self.attn_metadata.doc_positions.clamp(max=self.keys.shape[2] - 1)
        if uses_triton(key.device, key.dtype, key.shape[-1], self.attn_metadata.use_triton):
            fill_cache(self.keys, self.values, key.contiguous(), value.contiguous(), sequence_ids, positions)
        else:
            self.keys[sequence_ids, :, positions] = key
            self.values[sequence_ids, :, positions] = value
        return self.attn_metadata.attend(query, key, value)


class DecodeMetadata:
    """The metadata of a decoding step: one new token for every sequence of the cache, B rows in all.

    `use_triton` has the meaning that it has in VarlenMetadata.
    """

    def __init__(self, cache: KVCache, use_triton: bool = HAS_TRITON):
        self.cache, self.use_triton = cache, use_triton
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
    """One layer's part of a DecodeMetadata. `keys` and `values` are the layer's part of the cache [B, H_kv, T, d]."""

    attn_metadata: DecodeMetadata
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, query, key, value):
        """Attends with query [B, H, d], key and value [B, H_kv, d]; returns [B, H, d]."""
        positions = self.attn_metadata.cache_positions
        if uses_triton(key.device, key.dtype, key.shape[-1], self.attn_metadata.use_triton):
            return decode_attention(query.contiguous(), key.contiguous(), value.contiguous(), self.keys, self.values,
                                    positions)
        index = self.attn_metadata.document_ids, slice(None), positions
        self.keys[index] = key
        self.values[index] = value
        out = grouped_sdpa(query[:, :, None], self.keys, self.values, attn_mask=self.attn_metadata.mask)
        return out[:, :, 0]
