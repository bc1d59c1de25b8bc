"""GPU kernels that sweep a row once where torch's compiler sweeps it twice. One program a row; plain twins: kernels.py."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def row_scale(largest):
    return tl.maximum(largest, 1e-12) / LARGEST


@triton.jit
def swiglu_forward(gate_value, out, scale, H, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    gate = tl.load(gate_value + row * 2 * H + columns, inside, 0.0).to(tl.float32)
    value = tl.load(gate_value + row * 2 * H + H + columns, inside, 0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * value
    if QUANTIZE:
        s = row_scale(tl.max(tl.abs(product), 0))
        tl.store(scale + row, s)
        product = product / s
    tl.store(out + row * H + columns, product.to(out.dtype.element_ty), inside)


@triton.jit
def swiglu_backward(gate_value, gradient, out, scale, H, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    gate = tl.load(gate_value + row * 2 * H + columns, inside, 0.0).to(tl.float32)
    value = tl.load(gate_value + row * 2 * H + H + columns, inside, 0.0).to(tl.float32)
    slope = tl.load(gradient + row * H + columns, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_value = slope * gate * sigmoid
    of_gate = slope * value * sigmoid * (1 + gate * (1 - sigmoid))
    if QUANTIZE:
        s = row_scale(tl.max(tl.maximum(tl.abs(of_gate), tl.abs(of_value)), 0))
        tl.store(scale + row, s)
        of_gate, of_value = of_gate / s, of_value / s
    tl.store(out + row * 2 * H + columns, of_gate.to(out.dtype.element_ty), inside)
    tl.store(out + row * 2 * H + H + columns, of_value.to(out.dtype.element_ty), inside)


@triton.jit
def turned_back(gradient, cos, sin, row, columns, inside, W, D: tl.constexpr):
    own = tl.load(gradient + row * W + columns, inside, 0.0).to(tl.float32)
    other = tl.load(gradient + row * W + (columns ^ 1), inside, 0.0).to(tl.float32)
    place = row * D + columns % D
    return own * tl.load(cos + place) + other * tl.load(sin + (place ^ 1))


@triton.jit
def rotary_backward(query, key, value, cos, sin, out, scale, Q, K, D: tl.constexpr, BLOCK_Q: tl.constexpr,
                    BLOCK_K: tl.constexpr, QUANTIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, narrow = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    in_query, in_key = columns < Q, narrow < K
    of_query = turned_back(query, cos, sin, row, columns, in_query, Q, D)
    of_key = turned_back(key, cos, sin, row, narrow, in_key, K, D)
    of_value = tl.load(value + row * K + narrow, in_key, 0.0).to(tl.float32)
    if QUANTIZE:
        both = tl.maximum(tl.abs(of_key), tl.abs(of_value))
        s = row_scale(tl.maximum(tl.max(tl.abs(of_query), 0), tl.max(both, 0)))
        tl.store(scale + row, s)
        of_query, of_key, of_value = of_query / s, of_key / s, of_value / s
    start = out + row * (Q + 2 * K)
    tl.store(start + columns, of_query.to(out.dtype.element_ty), in_query)
    tl.store(start + Q + narrow, of_key.to(out.dtype.element_ty), in_key)
    tl.store(start + Q + K + narrow, of_value.to(out.dtype.element_ty), in_key)
