"""Filling the KV cache, and attention of one new token a sequence over it, as custom operators.

They run on GPUs only; the kernels are in kv_cache_triton.py, and their reference implementations in
lavin/generation/kv_cache.py. Attention is split over the positions (flash decoding, Dao et al. 2023,
https://pytorch.org/blog/flash-decoding/).

keys, values [B, H_kv, T, d]: a layer's part of the cache.
"""

import math

import torch

from lavin.runtime.arithmetic import ceil_div, next_power_of_2
from lavin.runtime.device import pdl_options

BLOCK = 128  # positions of the cache a program of decode_attention


@torch.library.custom_op("lavin::fill_cache", mutates_args=("keys", "values"))
def fill_cache(keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               sequence_ids: torch.Tensor, positions: torch.Tensor) -> None:
    """Stores rows of key and value [N, H_kv, d] at their sequence and position, each [N] int64."""
    from lavin.kernels.kv_cache_triton import fill
    N, H_KV, D = key.shape
    fill[(N,)](keys, values, key, value, sequence_ids, positions, H_KV, keys.shape[2], D=D,
               BLOCK=next_power_of_2(H_KV * D), num_warps=8)


@torch.library.custom_op("lavin::decode_attention", mutates_args=("keys", "values"))
def decode_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor,
                     values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Stores the new tokens' key and value [B, H_kv, d] at positions [B] int64, and attends from query [B, H, d] to all
    positions up to them; returns [B, H, d]. All tensors are contiguous."""
    from lavin.kernels.kv_cache_triton import combine, decode_fwd
    (B, H, D), T, out = query.shape, keys.shape[2], torch.empty_like(query)
    blocks = ceil_div(T, BLOCK)  # programs a head: a single sequence has too few heads to keep the GPU busy
    partial_out = query.new_empty(B, H, blocks, D, dtype=torch.float32)
    lse = query.new_empty(B, H, blocks, dtype=torch.float32)
    scale = D ** -0.5 * math.log2(math.e)  # softmax in powers of two
    decode_fwd[(blocks, H, B)](query, key, value, keys, values, positions, partial_out, lse, scale, T, H, key.shape[1],
                               D=D, BLOCK=BLOCK, num_warps=8, **pdl_options(query.device))
    combine[(B * H,)](partial_out, lse, out, blocks, D=D, BLOCKS=next_power_of_2(blocks), num_warps=1,
                       **pdl_options(query.device))
    return out


@decode_attention.register_fake
def _(query, key, value, keys, values, positions):
    return torch.empty_like(query)
