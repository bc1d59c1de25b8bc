"""Causal attention inside each document of a packed row, three ways that agree; `packed_attention` chooses.

All take query [N, H, d], key and value [N, H_kv, d] and the plan of the pass (lavin.llama.PackedPlan), and return
[N, H, d].
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F

FLASH = find_spec("torch.nn.attention.varlen") is not None  # from torch 2.10 on


def causal(query, key, value):
    """Batched: query [B, H, T, d], key and value [B, H_kv, T, d] -> [B, H, T, d]."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def one_by_one(query, key, value, plan):
    """The plain way, document by document: what the others are tested against."""
    parts = zip(*(x.split(plan.lengths) for x in (query, key, value)))
    return torch.cat([v.repeat_interleave(q.shape[1] // v.shape[1], 1) if len(q) == 1 else  # a softmax over one key
                      causal(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1) for q, k, v in parts])


def padded(query, key, value, plan):
    """Documents side by side, the short ones padded at their ends, where a causal mask hides the padding."""
    side = [x.new_zeros(plan.count, plan.longest, *x.shape[1:]).index_put((plan.documents, plan.places), x)
            for x in (query, key, value)]
    return causal(*(x.transpose(1, 2) for x in side)).transpose(1, 2)[plan.documents, plan.places]


def variable_length(query, key, value, plan):
    """Flash attention over the packed row itself (Dao 2023, arXiv 2307.08691)."""
    from torch.nn.attention.varlen import varlen_attn  # here, since it brings torch's compiler, which takes seconds
    heads = query.shape[1] // key.shape[1]
    key, value = (x if heads == 1 else x.repeat_interleave(heads, 1) for x in (key, value))
    return varlen_attn(query, key, value, plan.offsets, plan.offsets, plan.longest, plan.longest, window_size=(-1, 0))


def packed_attention(device: torch.device, dtype: torch.dtype):
    """The fastest way that the hardware has: flash kernels need Ampere (8.0) or newer and 16 bits."""
    flash = FLASH and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return variable_length if flash and dtype != torch.float32 else padded
