"""Causal attention inside each document of a packed row, three ways that agree; `packed_attention` chooses.

All take query [N, H, d], key and value [N, H_kv, d] and the plan of the pass (lavin.llama.PackedPlan), and return
[N, H, d].
"""

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F

TRITON = find_spec("triton") is not None  # comes with torch for GPUs


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


def flash(query, key, value, plan):
    """Flash attention over the packed row itself (Dao 2023, arXiv 2307.08691), by kernels made for short documents."""
    return flash_attention(query.contiguous(), key.contiguous(), value.contiguous(), plan.offsets, plan.longest)[0]


def packed_attention(device: torch.device, dtype: torch.dtype, head_dim: int):
    """The fastest way that the hardware has: flash kernels need Ampere (8.0) or newer and 16 bits."""
    new = TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return flash if new and dtype != torch.float32 and head_dim in (16, 32, 64, 128) else padded


@torch.library.custom_op("lavin::flash_attention", mutates_args=())
def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """offsets [documents + 1] int32: where they begin. Returns [N, H, d], and for the gradients [H, N] float32."""
    from lavin.triton_attention import attend
    out, level = empty_like_flash(query, key, value, offsets, longest)
    over_blocks(attend, query, key, offsets, longest, query.shape[1], (query, key, value, offsets, out, level),
                BLOCK=64, STEP=32, num_stages=3)
    return out, level


@flash_attention.register_fake
def empty_like_flash(query, key, value, offsets, longest):
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("lavin::flash_attention_backward", mutates_args=())
def flash_attention_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor,
                             longest: int, out: torch.Tensor, level: torch.Tensor, gradient: torch.Tensor
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from lavin.triton_attention import attend_backward_key_value, attend_backward_query
    of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
    mean = torch.empty_like(level)
    over_blocks(attend_backward_query, query, key, offsets, longest, query.shape[1],
                (query, key, value, offsets, out, level, gradient, of_query, mean), BLOCK=64, STEP=32, num_stages=2)
    over_blocks(attend_backward_key_value, query, key, offsets, longest, key.shape[1],
                (query, key, value, offsets, level, gradient, mean, of_key, of_value), BLOCK=64, STEP=32, num_stages=1)
    return of_query, of_key, of_value


@flash_attention_backward.register_fake
def _(query, key, value, offsets, longest, out, level, gradient):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def over_blocks(kernel, query, key, offsets, longest, heads, tensors, BLOCK, **constants):
    """A program for every block of tokens, head and document."""
    N, H, D = query.shape
    scale = D ** -0.5 * math.log2(math.e)
    kernel[(-(-longest // BLOCK), heads, len(offsets) - 1)](*tensors, scale, N, H, key.shape[1], D=D, BLOCK=BLOCK,
                                                            **constants)


def keep(ctx, inputs, output):
    *tensors, ctx.longest = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, gradient, _):
    *inputs, out, level = ctx.saved_tensors
    return *flash_attention_backward(*inputs, ctx.longest, out, level, gradient.contiguous()), None, None


flash_attention.register_autograd(backward, setup_context=keep)
