"""Variable-length causal flash attention as a custom operator with a backward pass (Dao 2023, arXiv 2307.08691).

It runs on GPUs only; the kernels are in flash_attention_triton.py and made for many short documents. The reference
implementation is lavin.attention.reference_attention.
"""

import math

import torch

from lavin.runtime.arithmetic import ceil_div


@torch.library.custom_op("lavin::flash_attention", mutates_args=())
def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor,
                    max_seqlen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output [N, H, d] and lse [H, N] float32 of query [N, H, d], key and value [N, H_kv, d], all contiguous.

    `cu_seqlens` [documents + 1] int32 says where each document begins in the packed row. `lse` is log2-sum-exp2 of each
    query's scores, kept for the backward pass.
    """
    from lavin.kernels.flash_attention_triton import flash_fwd
    out, lse = empty_output(query, key, value, cu_seqlens, max_seqlen)
    launch(flash_fwd, query, key, cu_seqlens, max_seqlen, query.shape[1], (query, key, value, cu_seqlens, out, lse),
           BLOCK=64, STEP=32, num_stages=3)
    return out, lse


@flash_attention.register_fake
def empty_output(query, key, value, cu_seqlens, max_seqlen):
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("lavin::flash_attention_backward", mutates_args=())
def flash_attention_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor,
                             max_seqlen: int, out: torch.Tensor, lse: torch.Tensor, grad_output: torch.Tensor
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value, by two kernels, so that no sum depends on the order of atomic
    additions."""
    from lavin.kernels.flash_attention_triton import flash_bwd_dkv, flash_bwd_dq
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    delta = torch.empty_like(lse)
    launch(flash_bwd_dq, query, key, cu_seqlens, max_seqlen, query.shape[1],
           (query, key, value, cu_seqlens, out, lse, grad_output, dq, delta), BLOCK=64, STEP=32, num_stages=2)
    launch(flash_bwd_dkv, query, key, cu_seqlens, max_seqlen, key.shape[1],
           (query, key, value, cu_seqlens, lse, grad_output, delta, dk, dv), BLOCK=64, STEP=32, num_stages=1)
    return dq, dk, dv


@flash_attention_backward.register_fake
def _(query, key, value, cu_seqlens, max_seqlen, out, lse, grad_output):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def launch(kernel, query, key, cu_seqlens, max_seqlen, heads, tensors, BLOCK, **constants):
    """Launches a kernel for blocks of the longest document x heads x documents; programs beyond a document's end return
    at once."""
    N, H, D = query.shape
    scale = D ** -0.5 * math.log2(math.e)  # softmax in powers of two
    grid = (ceil_div(max_seqlen, BLOCK), heads, len(cu_seqlens) - 1)
    kernel[grid](*tensors, scale, N, H, key.shape[1], D=D, BLOCK=BLOCK, **constants)


def setup_context(ctx, inputs, output):
    *tensors, ctx.max_seqlen = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, grad_output, _grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    return *flash_attention_backward(*inputs, ctx.max_seqlen, out, lse, grad_output.contiguous()), None, None


flash_attention.register_autograd(backward, setup_context=setup_context)
