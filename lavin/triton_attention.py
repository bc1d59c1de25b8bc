"""Causal attention over a packed row of short documents, and its gradients, as GPU kernels (lavin/attention.py).

One program a block of tokens, head and document: documents of some hundred tokens have few blocks, so that programs are
many and short. Nothing is summed in an order that chance decides.

Flash attention: Dao 2023, arXiv 2307.08691. Softmax is taken in powers of two; `scale` includes log2(e).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile(x, rows, inside, head, HEADS, D: tl.constexpr):
    """Rows of one head, [len(rows), D], zeros outside."""
    columns = tl.arange(0, D)
    return tl.load(x + (rows.to(tl.int64) * HEADS + head)[:, None] * D + columns[None, :], inside[:, None], 0.0)


@triton.jit
def store_tile(x, values, rows, inside, head, HEADS, D: tl.constexpr):
    columns = tl.arange(0, D)
    places = x + (rows.to(tl.int64) * HEADS + head)[:, None] * D + columns[None, :]
    tl.store(places, values.to(x.dtype.element_ty), inside[:, None])


@triton.jit(do_not_specialize=["N"])
def attend(query, key, value, offsets, out, level, scale, N, H, H_KV, D: tl.constexpr, BLOCK: tl.constexpr,
           STEP: tl.constexpr):
    """level [H, N]: log2 of each softmax's denominator."""
    begin, end = tl.load(offsets + tl.program_id(2)), tl.load(offsets + tl.program_id(2) + 1)
    first, head = begin + tl.program_id(0) * BLOCK, tl.program_id(1)
    if first >= end:
        return
    kv_head = head // (H // H_KV)
    rows = first + tl.arange(0, BLOCK)
    inside = rows < end
    q = tile(query, rows, inside, head, H, D)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, D], tl.float32)
    for start in range(begin, tl.minimum(first + BLOCK, end), STEP):
        keys = start + tl.arange(0, STEP)
        k = tile(key, keys, keys < end, kv_head, H_KV, D)
        scores = tl.where(keys[None, :] <= rows[:, None], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        p, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
        most, total = higher, total * shrink + tl.sum(p, 1)
        v = tile(value, keys, keys < end, kv_head, H_KV, D)
        sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None])
    store_tile(out, sums / total[:, None], rows, inside, head, H, D)
    tl.store(level + head * N + rows, most + tl.log2(total), inside)


@triton.jit(do_not_specialize=["N"])
def attend_backward_query(query, key, value, offsets, out, level, gradient, of_query, mean, scale, N, H, H_KV,
                          D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """mean [H, N], for the other kernel: the gradient's mean under each softmax."""
    begin, end = tl.load(offsets + tl.program_id(2)), tl.load(offsets + tl.program_id(2) + 1)
    first, head = begin + tl.program_id(0) * BLOCK, tl.program_id(1)
    if first >= end:
        return
    kv_head = head // (H // H_KV)
    rows = first + tl.arange(0, BLOCK)
    inside = rows < end
    q = tile(query, rows, inside, head, H, D)
    g = tile(gradient, rows, inside, head, H, D)
    o = tile(out, rows, inside, head, H, D)
    means = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(mean + head * N + rows, means, inside)
    levels = tl.load(level + head * N + rows, inside, 0.0)
    sums = tl.zeros([BLOCK, D], tl.float32)
    for start in range(begin, tl.minimum(first + BLOCK, end), STEP):
        keys = start + tl.arange(0, STEP)
        k = tile(key, keys, keys < end, kv_head, H_KV, D)
        v = tile(value, keys, keys < end, kv_head, H_KV, D)
        scores = tl.where(keys[None, :] <= rows[:, None], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        slopes = tl.exp2(scores - levels[:, None]) * (tl.dot(g, tl.trans(v)) - means[:, None])
        sums = tl.dot(slopes.to(k.dtype), k, sums)
    store_tile(of_query, sums * (scale * LN2), rows, inside, head, H, D)


@triton.jit(do_not_specialize=["N"])
def attend_backward_key_value(query, key, value, offsets, level, gradient, mean, of_key, of_value, scale, N, H, H_KV,
                              D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    begin, end = tl.load(offsets + tl.program_id(2)), tl.load(offsets + tl.program_id(2) + 1)
    first, kv_head = begin + tl.program_id(0) * BLOCK, tl.program_id(1)
    if first >= end:
        return
    keys = first + tl.arange(0, BLOCK)
    inside = keys < end
    k = tile(key, keys, inside, kv_head, H_KV, D)
    v = tile(value, keys, inside, kv_head, H_KV, D)
    k_sums = tl.zeros([BLOCK, D], tl.float32)
    v_sums = tl.zeros([BLOCK, D], tl.float32)
    group = H // H_KV
    for head in range(kv_head * group, (kv_head + 1) * group):
        for start in range(first, end, STEP):
            rows = start + tl.arange(0, STEP)
            q = tile(query, rows, rows < end, head, H, D)
            g = tile(gradient, rows, rows < end, head, H, D)
            levels = tl.load(level + head * N + rows, rows < end, 0.0)
            means = tl.load(mean + head * N + rows, rows < end, 0.0)
            scores = tl.where(keys[:, None] <= rows[None, :], tl.dot(k, tl.trans(q)) * scale, float("-inf"))
            p = tl.exp2(scores - levels[None, :])
            v_sums = tl.dot(p.to(g.dtype), g, v_sums)
            slopes = p * (tl.dot(v, tl.trans(g)) - means[None, :])
            k_sums = tl.dot(slopes.to(q.dtype), q, k_sums)
    store_tile(of_key, k_sums * (scale * LN2), keys, inside, kv_head, H_KV, D)
    store_tile(of_value, v_sums, keys, inside, kv_head, H_KV, D)
