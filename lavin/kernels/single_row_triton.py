"""Triton kernels of single_row.py.

A program of `gemv_fwd` or `gemv_nf4_fwd` sums a few rows of the weight, in float32. Every program of `norm_adapter_fwd`
normalises the whole row and projects it down, and then adds its own block of the up-projection: all read the row and
the small matrices from the GPU's cache.
"""

from typing import Any

import triton
import triton.language as tl

from lavin.kernels import nf4

NF4_BLOCK, SCALES_BLOCK = tl.constexpr(nf4.NF4_BLOCK), tl.constexpr(nf4.SCALES_BLOCK)

# Triton's names; missing in older versions, where USE_PDL is never set (pdl_options, lavin/runtime/device.py)
cuda = getattr(tl.extra, "cuda", None)
gdc_wait: Any = getattr(cuda, "gdc_wait", None)
gdc_launch_dependents: Any = getattr(cuda, "gdc_launch_dependents", None)


@triton.jit
def wait_and_launch_dependents(USE_PDL: tl.constexpr):
    """Waits until the kernel before has ended, and all that it wrote can be read; then the next one may be launched."""
    if USE_PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def split_in_four(tile, A: tl.constexpr, B: tl.constexpr):
    """Returns the four parts [A, B] of a tile [A, B, 4]."""
    even, odd = tl.split(tl.reshape(tile, (A, B, 2, 2)))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def split_in_eight(tile, A: tl.constexpr):
    """Returns the eight columns [A, 1] of a tile [A, 8]."""
    t04, t15, t26, t37 = split_in_four(tl.reshape(tile, (A, 2, 4)), A, 2)
    t0, t4 = tl.split(t04)
    t1, t5 = tl.split(t15)
    t2, t6 = tl.split(t26)
    t3, t7 = tl.split(t37)
    return t0[:, None], t1[:, None], t2[:, None], t3[:, None], t4[:, None], t5[:, None], t6[:, None], t7[:, None]


@triton.jit
def add_eight_products(sums, w0, w1, w2, w3, w4, w5, w6, w7, x, mask, CHUNKS: tl.constexpr):
    """Adds to sums [CHUNKS, ROWS] the products of eight weights, each [CHUNKS, ROWS], and the eight values behind each
    of the pointers x [CHUNKS, 1]."""
    x0, x1, x2, x3, x4, x5, x6, x7 = split_in_eight(
        tl.load(x + tl.arange(0, 8)[None, :], mask, 0.0).to(tl.float32), CHUNKS)
    sums += w0 * x0
    sums += w1 * x1
    sums += w2 * x2
    sums += w3 * x3
    sums += w4 * x4
    sums += w5 * x5
    sums += w6 * x6
    sums += w7 * x7
    return sums


@triton.jit
def fp8_values(words):
    """Returns the four values of each word, in float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 l, h, a, b, c, d;
        .reg .b32 p, q;
        mov.b32 {l, h}, $4; cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h;
        mov.b32 {a, b}, p; mov.b32 {c, d}, q;
        cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d;
        }""",
        "=f,=f,=f,=f,r", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def add_fp8_products(sums, w0, w1, x, mask, CHUNKS: tl.constexpr):
    """Adds the products of two words [CHUNKS, ROWS] and the eight values behind each of the pointers x [CHUNKS, 1]."""
    v0, v1, v2, v3 = fp8_values(w0)
    v4, v5, v6, v7 = fp8_values(w1)
    return add_eight_products(sums, v0, v1, v2, v3, v4, v5, v6, v7, x, mask, CHUNKS)


@triton.jit
def fp8_row_products(x, weight, scale, rows, row_mask, K: tl.constexpr, CHUNKS: tl.constexpr, USE_PDL: tl.constexpr):
    """Returns `row_products` of a weight in fp8. K is a multiple of 16.

    A thread reads 16 weights of a row, a chunk, as four words, since Triton would keep a single one in a register of
    its own. It has the same chunks of each of the program's rows.
    """
    tl.static_assert(K % 16 == 0)
    n_chunks: tl.constexpr = K // 16
    chunks = tl.arange(0, CHUNKS)
    start = rows.to(tl.int64)[None, :] * n_chunks + chunks[:, None]
    start = weight.to(tl.pointer_type(tl.int32), bitcast=True) + start[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    words = tl.load(start, ((chunks < n_chunks)[:, None] & row_mask[None, :])[:, :, None], 0,
                    eviction_policy="evict_first")
    scale = tl.load(scale + rows, row_mask, 0.0)
    wait_and_launch_dependents(USE_PDL)
    sums = tl.zeros([CHUNKS, rows.shape[0]], tl.float32)
    for i in tl.range(0, n_chunks, CHUNKS, num_stages=1):
        ahead = i + CHUNKS + chunks < n_chunks
        next_words = tl.load(start + (i + CHUNKS) * 4, (ahead[:, None] & row_mask[None, :])[:, :, None], 0,
                             eviction_policy="evict_first")
        x_start, mask = x + (i + chunks)[:, None] * 16, (i + chunks < n_chunks)[:, None]
        w0, w1, w2, w3 = split_in_four(words, CHUNKS, rows.shape[0])
        sums = add_fp8_products(sums, w0, w1, x_start, mask, CHUNKS)
        sums = add_fp8_products(sums, w2, w3, x_start + 8, mask, CHUNKS)
        words = next_words
    return tl.sum(sums, 0) * scale


@triton.jit
def row_products(x, weight, scale, rows, row_mask, K: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr,
                 USE_PDL: tl.constexpr):
    """Returns weight[rows] x in float32.

    The first part of the weight is read before x is there, and each further one while the one before it is multiplied.
    """
    if SCALED:
        return fp8_row_products(x, weight, scale, rows, row_mask, K, BLOCK_K // 16, USE_PDL)
    cols = tl.arange(0, BLOCK_K)
    start = weight + rows.to(tl.int64)[:, None] * K + cols[None, :]
    w = tl.load(start, row_mask[:, None] & (cols < K)[None, :], 0.0, eviction_policy="evict_first")
    wait_and_launch_dependents(USE_PDL)
    products = tl.zeros([rows.shape[0], BLOCK_K], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=1):
        ahead = k + BLOCK_K + cols < K
        next_w = tl.load(start + k + BLOCK_K, row_mask[:, None] & ahead[None, :], 0.0, eviction_policy="evict_first")
        products += w.to(tl.float32) * tl.load(x + k + cols, k + cols < K, 0.0).to(tl.float32)[None, :]
        w = next_w
    return tl.sum(products, 1)


@triton.jit
def program_rows(n_out, ROWS: tl.constexpr, PAIRED: tl.constexpr):
    """Returns a program's rows [ROWS] of the weight, and whether there are such. Where PAIRED, they are pairs of a row
    of the gate and one of up, n_out rows behind it."""
    i = tl.arange(0, ROWS)
    if PAIRED:
        rows = tl.program_id(0) * (ROWS // 2) + i // 2
        return rows + i % 2 * n_out, rows < n_out
    rows = tl.program_id(0) * ROWS + i
    return rows, rows < n_out


@triton.jit
def store_rows(y, bias, out, rows, row_mask, n_out, PAIRED: tl.constexpr, BIASED: tl.constexpr):
    """Stores a program's part of out [n_out] for the products y of its rows, in float32: y, or silu(gate) * up where
    PAIRED. It rounds where PyTorch's operators would."""
    dtype = out.dtype.element_ty
    y = y.to(dtype)
    if BIASED:
        y = (y.to(tl.float32) + tl.load(bias + rows, row_mask, 0.0).to(tl.float32)).to(dtype)
    if PAIRED:
        half: tl.constexpr = rows.shape[0] // 2
        gate, up = tl.split(tl.reshape(y.to(tl.float32), (half, 2)))
        y = (gate * tl.sigmoid(gate) * up).to(dtype)
        rows = tl.program_id(0) * half + tl.arange(0, half)
        row_mask = rows < n_out
    tl.store(out + rows, y, row_mask)


@triton.jit
def gemv_fwd(x, weight, scale, bias, out, n_out, K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
             SCALED: tl.constexpr, PAIRED: tl.constexpr, BIASED: tl.constexpr, USE_PDL: tl.constexpr):
    """Writes out [n_out], the product of weight [n_out, K] and x [K], or, where PAIRED, silu(gate) * up of the products
    with weight [2 n_out, K] and bias [2 n_out]. The weight has a scale for each row where SCALED."""
    rows, row_mask = program_rows(n_out, BLOCK_O, PAIRED)
    y = row_products(x, weight, scale, rows, row_mask, K, BLOCK_K, SCALED, USE_PDL)
    store_rows(y, bias, out, rows, row_mask, n_out, PAIRED, BIASED)


def fill_table_asm() -> str:
    """Returns PTX that copies 256 words to shared memory, each for all 32 banks, and returns where they lie there.

    A thread writes an entry's 128 bytes in turns of 16, and begins at another place than its neighbours, so that they
    write to different banks.
    """
    write = "and.b32 c, c, 112; add.u32 a, e, c; st.shared.v4.b32 [a], {w, w, w, w}; add.u32 c, c, 16;\n"
    return f"""{{
        .shared .align 128 .b32 entries[8192];
        .reg .b32 i, n, e, c, a, w; .reg .b64 p; .reg .pred more;
        mov.u32 i, %tid.x; mov.u32 n, %ntid.x;
        fill: mul.wide.u32 p, i, 4; add.u64 p, p, $1; ld.global.b32 w, [p];
        mov.u32 e, entries; mad.lo.u32 e, i, 128, e; shl.b32 c, i, 4;
        {8 * write}
        add.u32 i, i, n; setp.lt.u32 more, i, 256; @more bra fill;
        bar.sync 0; mov.u32 $0, entries;
        }}"""


def look_up_asm() -> str:
    """Returns PTX that turns the four bytes of word $8 into eight values, by the table at $9.

    Every thread reads from the bank that has its lane's number. An entry is the first value but for its lowest bits,
    which are the second one (`nf4_table`).
    """
    bank, values = "mov.u32 l, %laneid; shl.b32 l, l, 2;", ""
    for byte in range(4):
        values += f"""{f"shr.u32 a, $8, {8 * byte - 7}" if byte else "shl.b32 a, $8, 7"};
        and.b32 a, a, 0x7f80; or.b32 a, a, l; add.u32 a, a, $9; ld.shared.b32 w, [a];
        mov.b32 ${2 * byte}, w; shl.b32 w, w, 16; mov.b32 ${2 * byte + 1}, w;
        """
    return f"{{ .reg .b32 l, a, w; {bank} {values} }}"


FILL_TABLE, LOOK_UP = tl.constexpr(fill_table_asm()), tl.constexpr(look_up_asm())


@triton.jit
def to_shared_memory(table):
    """Copies the table of `gemv_nf4` to shared memory, and returns where it lies there."""
    return tl.inline_asm_elementwise(FILL_TABLE, "=r,l", [table.to(tl.int64, bitcast=True)], dtype=tl.int32,
                                     is_pure=False, pack=1)


@triton.jit
def nf4_values(words, table):
    """Returns the values of the eight codes in each word, in float32. `table` is that of `to_shared_memory`."""
    return tl.inline_asm_elementwise(
        LOOK_UP, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r", [words, table],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True, pack=1)


@triton.jit
def add_nf4_products(sums, words, table, x, mask, CHUNKS: tl.constexpr):
    """Adds the products of the codes in words [CHUNKS, ROWS] and the eight values behind each of the pointers x
    [CHUNKS, 1]."""
    v0, v1, v2, v3, v4, v5, v6, v7 = nf4_values(words, table)
    return add_eight_products(sums, v0, v1, v2, v3, v4, v5, v6, v7, x, mask, CHUNKS)


@triton.jit
def load_nf4_chunks(weight, absmax, absmax2, chunk, mask):
    """Loads chunks of 32 codes: their words [CHUNKS, ROWS, 4], scales in 8 bits and the scales' scales."""
    words = tl.load(weight + chunk[:, :, None] * 4 + tl.arange(0, 4)[None, None, :], mask[:, :, None], 0,
                    eviction_policy="evict_first")
    scale = tl.load(absmax + chunk // (NF4_BLOCK // 32), mask, 0)
    return words, scale, tl.load(absmax2 + chunk // (NF4_BLOCK * SCALES_BLOCK // 32), mask, 0.0)


@triton.jit
def gemv_nf4_fwd(x, weight, absmax, absmax2, code2, offset, table, bias, out, n_out, K: tl.constexpr,
                 ROWS: tl.constexpr, CHUNKS: tl.constexpr, PAIRED: tl.constexpr, BIASED: tl.constexpr,
                 USE_PDL: tl.constexpr):
    """Writes what `gemv_fwd` does, for a weight in NF4. Arguments are those of `gemv_nf4_swiglu`.

    A thread has chunks of 32 codes, 16 bytes, which have one scale, and the same ones of each of the program's rows.
    The first are read before x is there, while the table is written.
    """
    tl.static_assert(K % NF4_BLOCK == 0)
    n_chunks: tl.constexpr = K // 32
    rows, row_mask = program_rows(n_out, ROWS, PAIRED)
    chunks = tl.arange(0, CHUNKS)
    first = rows[None, :] * n_chunks + chunks[:, None]
    mask = (chunks < n_chunks)[:, None] & row_mask[None, :]
    words, scale, scale2 = load_nf4_chunks(weight, absmax, absmax2, first, mask)
    offset = tl.load(offset + rows, row_mask, 0.0)[None, :]
    table = to_shared_memory(table)
    wait_and_launch_dependents(USE_PDL)
    sums = tl.zeros([CHUNKS, ROWS], tl.float32)
    for i in tl.range(0, n_chunks, CHUNKS, num_stages=1):
        x_start, x_mask = x + (i + chunks)[:, None] * 32, (i + chunks < n_chunks)[:, None]
        w0, w1, w2, w3 = split_in_four(words, CHUNKS, ROWS)
        products = tl.zeros([CHUNKS, ROWS], tl.float32)
        products = add_nf4_products(products, w0, table, x_start, x_mask, CHUNKS)
        products = add_nf4_products(products, w1, table, x_start + 8, x_mask, CHUNKS)
        products = add_nf4_products(products, w2, table, x_start + 16, x_mask, CHUNKS)
        products = add_nf4_products(products, w3, table, x_start + 24, x_mask, CHUNKS)
        sums += products * (tl.load(code2 + scale.to(tl.int32)) * scale2 + offset)
        mask = (i + CHUNKS + chunks < n_chunks)[:, None] & row_mask[None, :]
        words, scale, scale2 = load_nf4_chunks(weight, absmax, absmax2, first + i + CHUNKS, mask)
    store_rows(tl.sum(sums, 0), bias, out, rows, row_mask, n_out, PAIRED, BIASED)


@triton.jit
def normalise(x, norm_weight, cols, mask, rms):
    """Returns a block of the normalised row, rounded as RMSNorm rounds it, in float32."""
    dtype = x.dtype.element_ty
    y = (tl.load(x + cols, mask, 0.0).to(tl.float32) * rms).to(dtype)
    return (y.to(tl.float32) * tl.load(norm_weight + cols, mask, 0.0).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def norm_adapter_fwd(x, norm_weight, one_hot, mixtures, down, down_bias, up, out, eps, D, R, U, BLOCK: tl.constexpr,
                     STEP: tl.constexpr, ROWS: tl.constexpr, USE_PDL: tl.constexpr):
    """Writes out [D] for x [D], down [R, D] and up [D, U] with U >= 2 R + 2. ROWS is R, rounded up to a power of
    two."""
    dtype = x.dtype.element_ty
    steps, rows = tl.arange(0, STEP), tl.arange(0, ROWS)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, row_mask = cols < D, rows < R
    # what does not depend on the row is loaded first: the sums below wait for each other
    tile, tile_mask = up + cols[:, None] * U + rows[None, :], mask[:, None] & row_mask[None, :]
    u0, u1 = tl.load(tile, tile_mask, 0.0).to(tl.float32), tl.load(tile + R, tile_mask, 0.0).to(tl.float32)
    b0, b1 = tl.load(up + cols * U + 2 * R, mask, 0.0), tl.load(up + cols * U + 2 * R + 1, mask, 0.0)
    bias = tl.load(down_bias + rows, row_mask, 0.0).to(tl.float32)
    wait_and_launch_dependents(USE_PDL)
    text, image = tl.load(one_hot), tl.load(one_hot + 1)
    w0 = (text * tl.load(mixtures) + image * tl.load(mixtures + 2)).to(dtype).to(tl.float32)
    w1 = (text * tl.load(mixtures + 1) + image * tl.load(mixtures + 3)).to(dtype).to(tl.float32)

    squares = tl.zeros([STEP], tl.float32)
    for start in range(0, D, STEP):
        block = tl.load(x + start + steps, start + steps < D, 0.0).to(tl.float32)
        squares += block * block
    rms = tl.rsqrt(tl.sum(squares, 0) / D + eps)

    products = tl.zeros([ROWS, STEP], tl.float32)
    for start in range(0, D, STEP):
        step_mask = start + steps < D
        a = tl.load(down + rows[:, None] * D + start + steps[None, :], row_mask[:, None] & step_mask[None, :], 0.0)
        products += a.to(tl.float32) * normalise(x, norm_weight, start + steps, step_mask, rms)[None, :]
    z = (tl.sum(products, 1) + bias).to(dtype).to(tl.float32)

    delta = tl.sum(u0 * (z * w0)[None, :] + u1 * (z * w1)[None, :], 1) + w0 * b0.to(tl.float32) + w1 * b1.to(tl.float32)
    tl.store(out + cols, (normalise(x, norm_weight, cols, mask, rms) + delta).to(dtype), mask)
