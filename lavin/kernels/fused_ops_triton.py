"""Triton kernels of fused_ops.py: one program per row, which reads and writes memory once, where torch.compile would
make two passes (one for the row's maximum, one to scale)."""

import triton
import triton.language as tl

from lavin.kernels import fp8

FP8_MAX = tl.constexpr(fp8.FP8_MAX)


@triton.jit
def row_scale(abs_max):
    return tl.maximum(abs_max, 1e-12) / FP8_MAX


@triton.jit
def swiglu_fwd(gate_up, out, scale, H, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr):
    """Writes out [N, H] and scale [N, 1] of gate_up [N, 2H]."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    gate = tl.load(gate_up + row * 2 * H + cols, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * H + H + cols, mask, 0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    if QUANTIZE:
        s = row_scale(tl.max(tl.abs(y), 0))
        tl.store(scale + row, s)
        y = y / s
    tl.store(out + row * H + cols, y.to(out.dtype.element_ty), mask)


@triton.jit
def swiglu_bwd(gate_up, grad_output, out, scale, H, BLOCK: tl.constexpr, QUANTIZE: tl.constexpr):
    """Writes out [N, 2H] and scale [N, 1] of gate_up [N, 2H] and grad_output [N, H]."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    gate = tl.load(gate_up + row * 2 * H + cols, mask, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * H + H + cols, mask, 0.0).to(tl.float32)
    dy = tl.load(grad_output + row * H + cols, mask, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_up = dy * gate * sigmoid
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    if QUANTIZE:
        s = row_scale(tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), 0))  # one scale for the row's 2H entries
        tl.store(scale + row, s)
        d_gate, d_up = d_gate / s, d_up / s
    tl.store(out + row * 2 * H + cols, d_gate.to(out.dtype.element_ty), mask)
    tl.store(out + row * 2 * H + H + cols, d_up.to(out.dtype.element_ty), mask)


@triton.jit
def rope_inverse(grad, cos, sin, row, cols, mask, W, D: tl.constexpr):
    """Returns one row [W] of a gradient, of all heads, rotated back; `cols ^ 1` is the other entry of an adjacent
    pair."""
    own = tl.load(grad + row * W + cols, mask, 0.0).to(tl.float32)
    pair = tl.load(grad + row * W + (cols ^ 1), mask, 0.0).to(tl.float32)
    angle = row * D + cols % D  # all heads share the angles [N, D]
    return own * tl.load(cos + angle) + pair * tl.load(sin + (angle ^ 1))


@triton.jit
def qkv_rope_bwd(grad_query, grad_key, grad_value, cos, sin, out, scale, Q, K, D: tl.constexpr, BLOCK_Q: tl.constexpr,
                 BLOCK_K: tl.constexpr, QUANTIZE: tl.constexpr):
    """Writes out [N, Q + 2K] and scale [N, 1] of grad_query [N, Q], grad_key and grad_value [N, K]; Q and K are heads
    times D."""
    row = tl.program_id(0).to(tl.int64)
    q_cols, kv_cols = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    q_mask, kv_mask = q_cols < Q, kv_cols < K
    dq = rope_inverse(grad_query, cos, sin, row, q_cols, q_mask, Q, D)
    dk = rope_inverse(grad_key, cos, sin, row, kv_cols, kv_mask, K, D)
    dv = tl.load(grad_value + row * K + kv_cols, kv_mask, 0.0).to(tl.float32)
    if QUANTIZE:
        kv_abs = tl.maximum(tl.abs(dk), tl.abs(dv))
        s = row_scale(tl.maximum(tl.max(tl.abs(dq), 0), tl.max(kv_abs, 0)))
        tl.store(scale + row, s)
        dq, dk, dv = dq / s, dk / s, dv / s
    start = out + row * (Q + 2 * K)
    tl.store(start + q_cols, dq.to(out.dtype.element_ty), q_mask)
    tl.store(start + Q + kv_cols, dk.to(out.dtype.element_ty), kv_mask)
    tl.store(start + Q + K + kv_cols, dv.to(out.dtype.element_ty), kv_mask)
