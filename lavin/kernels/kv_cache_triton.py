"""Triton kernels of kv_cache.py. Notation as in flash_attention_triton.py."""

import triton
import triton.language as tl

from lavin.kernels.single_row_triton import wait_and_launch_dependents


@triton.jit(do_not_specialize=["T"])
def fill(keys, values, key, value, sequence_ids, positions, H_KV, T, D: tl.constexpr, BLOCK: tl.constexpr):
    """Copies one row of key and value [N, H_KV, D] to its place in the cache [B, H_KV, T, D]."""
    row = tl.program_id(0).to(tl.int64)
    sequence, position = tl.load(sequence_ids + row), tl.load(positions + row)
    offs = tl.arange(0, BLOCK)
    mask = offs < H_KV * D
    source, target = row * H_KV * D + offs, ((sequence * H_KV + offs // D) * T + position) * D + offs % D
    tl.store(keys + target, tl.load(key + source, mask), mask)
    tl.store(values + target, tl.load(value + source, mask), mask)


@triton.jit(do_not_specialize=["T"])
def decode_fwd(query, key, value, keys, values, positions, partial_out, lse, scale, T, H, H_KV, D: tl.constexpr,
               BLOCK: tl.constexpr, USE_PDL: tl.constexpr):
    """Attends from one head of one sequence to a block of its positions; the new token belongs to the first block. The
    grid is (blocks, heads, sequences); partial_out [B, H, blocks, D] and lse [B, H, blocks] are float32."""
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head, cols = head // (H // H_KV), tl.arange(0, D)
    wait_and_launch_dependents(USE_PDL)
    position = tl.load(positions + sequence)
    part = (sequence * H + head) * tl.num_programs(0) + block
    rows = block * BLOCK + tl.arange(0, BLOCK)
    mask = rows < position
    m_new = float("-inf")
    if block == 0 or block * BLOCK < position:
        q = tl.load(query + (sequence * H + head) * D + cols).to(tl.float32) * scale
        cache = (sequence * H_KV + kv_head) * T * D
        offs = cache + rows[:, None] * D + cols[None, :]
        k_tile = tl.load(keys + offs, mask[:, None], 0.0).to(tl.float32)
        v_tile = tl.load(values + offs, mask[:, None], 0.0).to(tl.float32)
        qk = tl.where(mask, tl.sum(k_tile * q[None, :], 1), float("-inf"))
        new = (sequence * H_KV + kv_head) * D + cols
        k, v = tl.load(key + new), tl.load(value + new)  # in the cache, they may not be stored yet
        qk_new = tl.where(block == 0, tl.sum(q * k.to(tl.float32), 0), float("-inf"))
        m_i = tl.maximum(tl.max(qk, 0), qk_new)
        p, p_new = tl.exp2(qk - m_i), tl.exp2(qk_new - m_i)
        l_i = tl.sum(p, 0) + p_new
        out = tl.sum(p[:, None] * v_tile, 0) + p_new * v.to(tl.float32)
        tl.store(partial_out + part * D + cols, out / l_i)
        m_new = m_i + tl.log2(l_i)
        if (block == 0) & (head % (H // H_KV) == 0):  # one program stores them
            tl.store(keys + cache + position * D + cols, k)
            tl.store(values + cache + position * D + cols, v)
    tl.store(lse + part, m_new)


@triton.jit
def combine(partial_out, lse, out, blocks, D: tl.constexpr, BLOCKS: tl.constexpr, USE_PDL: tl.constexpr):
    """Adds up the blocks of one head of one sequence, weighted by their sums of exponentials. BLOCKS is rounded up to a
    power of two."""
    head, parts, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS), tl.arange(0, D)
    wait_and_launch_dependents(USE_PDL)
    scores = tl.load(lse + head * blocks + parts, parts < blocks, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 0))
    # blocks behind the last position hold no values
    offs, mask = (head * blocks + parts[:, None]) * D + cols[None, :], (scores > float("-inf"))[:, None]
    total = tl.sum(weights[:, None] * tl.load(partial_out + offs, mask, 0.0), 0)
    tl.store(out + head * D + cols, (total / tl.sum(weights, 0)).to(out.dtype.element_ty))
