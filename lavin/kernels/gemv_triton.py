"""Triton kernel of gemv.py: each program sums a few rows of the weight, in float32."""

import triton
import triton.language as tl


@triton.jit
def gemv_fwd(x, weight, scale, out, n_rows, K, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr):
    """x [K], weight [O, K] -> out [O]; scale [O], where SCALED."""
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = tl.arange(0, BLOCK_K)
    row_mask = rows < n_rows
    start = weight + rows.to(tl.int64)[:, None] * K + cols[None, :]
    products = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=3):
        mask = k + cols < K
        w = tl.load(start + k, row_mask[:, None] & mask[None, :], 0.0, eviction_policy="evict_first").to(tl.float32)
        products += w * tl.load(x + k + cols, mask, 0.0).to(tl.float32)[None, :]
    y = tl.sum(products, 1)
    if SCALED:
        y *= tl.load(scale + rows, row_mask, 0.0)
    tl.store(out + rows, y.to(out.dtype.element_ty), row_mask)
