"""Triton kernels of flash_attention.py: causal attention inside each document of a packed row, and its gradients.

Grid: (blocks of tokens, heads, documents). Documents of a few hundred tokens have few blocks, so programs are many and
short. Every output element is accumulated by one program in a fixed order, so results are deterministic.

Notation as in Dao 2023 (arXiv 2307.08691): m_i running maximum, l_i running denominator, acc unnormalised output,
lse = m_i + log2(l_i), delta = rowsum(grad_output * output). Softmax is computed with exp2; `scale` includes log2(e).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(x, rows, mask, head, HEADS, D: tl.constexpr):
    """Loads rows of one head of x [N, HEADS, D] as [len(rows), D], with zeros where they are masked."""
    cols = tl.arange(0, D)
    return tl.load(x + (rows.to(tl.int64) * HEADS + head)[:, None] * D + cols[None, :], mask[:, None], 0.0)


@triton.jit
def store_tile(x, tile, rows, mask, head, HEADS, D: tl.constexpr):
    cols = tl.arange(0, D)
    pointers = x + (rows.to(tl.int64) * HEADS + head)[:, None] * D + cols[None, :]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask[:, None])


@triton.jit(do_not_specialize=["N"])
def flash_fwd(query, key, value, cu_seqlens, out, lse, scale, N, H, H_KV, D: tl.constexpr, BLOCK: tl.constexpr,
              STEP: tl.constexpr):
    """Computes the output of one block of queries of one head of one document, over its keys in steps of STEP."""
    begin, end = tl.load(cu_seqlens + tl.program_id(2)), tl.load(cu_seqlens + tl.program_id(2) + 1)
    start_m, head = begin + tl.program_id(0) * BLOCK, tl.program_id(1)
    if start_m >= end:
        return
    kv_head = head // (H // H_KV)
    offs_m = start_m + tl.arange(0, BLOCK)
    mask_m = offs_m < end
    q = load_tile(query, offs_m, mask_m, head, H, D)  # [BLOCK, D]
    m_i = tl.full([BLOCK], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start_n in range(begin, tl.minimum(start_m + BLOCK, end), STEP):
        offs_n = start_n + tl.arange(0, STEP)
        k = load_tile(key, offs_n, offs_n < end, kv_head, H_KV, D)  # [STEP, D]
        qk = tl.where(offs_n[None, :] <= offs_m[:, None], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        p, alpha = tl.exp2(qk - m_new[:, None]), tl.exp2(m_i - m_new)  # alpha rescales what was summed so far
        m_i, l_i = m_new, l_i * alpha + tl.sum(p, 1)
        v = load_tile(value, offs_n, offs_n < end, kv_head, H_KV, D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    store_tile(out, acc / l_i[:, None], offs_m, mask_m, head, H, D)
    tl.store(lse + head * N + offs_m, m_i + tl.log2(l_i), mask_m)


@triton.jit(do_not_specialize=["N"])
def flash_bwd_dq(query, key, value, cu_seqlens, out, lse, grad_output, grad_query, delta, scale, N, H, H_KV,
                 D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Computes the gradient of one block of queries, and writes delta [H, N], which flash_bwd_dkv reads."""
    begin, end = tl.load(cu_seqlens + tl.program_id(2)), tl.load(cu_seqlens + tl.program_id(2) + 1)
    start_m, head = begin + tl.program_id(0) * BLOCK, tl.program_id(1)
    if start_m >= end:
        return
    kv_head = head // (H // H_KV)
    offs_m = start_m + tl.arange(0, BLOCK)
    mask_m = offs_m < end
    q = load_tile(query, offs_m, mask_m, head, H, D)
    do = load_tile(grad_output, offs_m, mask_m, head, H, D)
    o = load_tile(out, offs_m, mask_m, head, H, D)
    delta_i = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + head * N + offs_m, delta_i, mask_m)
    lse_i = tl.load(lse + head * N + offs_m, mask_m, 0.0)
    dq = tl.zeros([BLOCK, D], tl.float32)
    for start_n in range(begin, tl.minimum(start_m + BLOCK, end), STEP):
        offs_n = start_n + tl.arange(0, STEP)
        k = load_tile(key, offs_n, offs_n < end, kv_head, H_KV, D)
        v = load_tile(value, offs_n, offs_n < end, kv_head, H_KV, D)
        qk = tl.where(offs_n[None, :] <= offs_m[:, None], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        ds = tl.exp2(qk - lse_i[:, None]) * (tl.dot(do, tl.trans(v)) - delta_i[:, None])  # gradient of the scores
        dq = tl.dot(ds.to(k.dtype), k, dq)
    store_tile(grad_query, dq * (scale * LN2), offs_m, mask_m, head, H, D)


@triton.jit(do_not_specialize=["N"])
def flash_bwd_dkv(query, key, value, cu_seqlens, lse, grad_output, delta, grad_key, grad_value, scale, N, H, H_KV,
                  D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Computes the gradients of one block of keys and values of one head, over the queries behind it of all heads that
    share this one."""
    begin, end = tl.load(cu_seqlens + tl.program_id(2)), tl.load(cu_seqlens + tl.program_id(2) + 1)
    start_n, kv_head = begin + tl.program_id(0) * BLOCK, tl.program_id(1)
    if start_n >= end:
        return
    offs_n = start_n + tl.arange(0, BLOCK)
    mask_n = offs_n < end
    k = load_tile(key, offs_n, mask_n, kv_head, H_KV, D)
    v = load_tile(value, offs_n, mask_n, kv_head, H_KV, D)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    group = H // H_KV
    for head in range(kv_head * group, (kv_head + 1) * group):
        for start_m in range(start_n, end, STEP):
            offs_m = start_m + tl.arange(0, STEP)
            q = load_tile(query, offs_m, offs_m < end, head, H, D)
            do = load_tile(grad_output, offs_m, offs_m < end, head, H, D)
            lse_i = tl.load(lse + head * N + offs_m, offs_m < end, 0.0)
            delta_i = tl.load(delta + head * N + offs_m, offs_m < end, 0.0)
            # transposed scores [BLOCK keys, STEP queries]
            qk = tl.where(offs_n[:, None] <= offs_m[None, :], tl.dot(k, tl.trans(q)) * scale, float("-inf"))
            p = tl.exp2(qk - lse_i[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv)
            ds = p * (tl.dot(v, tl.trans(do)) - delta_i[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
    store_tile(grad_key, dk * (scale * LN2), offs_n, mask_n, kv_head, H_KV, D)
    store_tile(grad_value, dv, offs_n, mask_n, kv_head, H_KV, D)
