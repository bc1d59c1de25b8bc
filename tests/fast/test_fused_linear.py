"""Fused products with frozen matrices, in float32 and fp8, and their kernels' plain twins, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavin.fast.fused_linear import FrozenLinear
from lavin.fast.speed_up import fuse
from lavin.kernels import fp8, fused_ops
from lavin.kernels.fp8 import check_fp8
from lavin.llama import apply_rotary, rotary_angles, rotary_frequencies
from lavin.loss import answer_loss
from lavin.model import pack
from lavin.runtime.errors import UserError
from tiny import mixed_examples, tiny_config, tiny_model


def gradients(outputs, inputs, slopes):
    return torch.autograd.grad(outputs, inputs, slopes)


def test_swiglu_and_its_gradient():
    rows = torch.randn(7, 12, requires_grad=True)
    gate, value = rows.chunk(2, 1)
    expected, slope = F.silu(gate) * value, torch.randn(7, 6)
    torch.testing.assert_close(fused_ops.swiglu(rows.detach(), False)[0], expected)
    of_rows, = gradients(expected, rows, slope)
    torch.testing.assert_close(fused_ops.swiglu_backward(rows.detach(), slope, False)[0], of_rows)


def test_gradient_of_rotary():
    cos, sin = rotary_angles(torch.tensor([0, 1, 5, 2, 9]), rotary_frequencies(tiny_config(dim=32, n_heads=4)))
    rows = torch.randn(5, 6 + 3 + 3, 8, requires_grad=True)
    query, key, value = rows.split((6, 3, 3), 1)
    outputs = apply_rotary(query, (cos, sin)), apply_rotary(key, (cos, sin)), value
    slopes = [torch.randn_like(x) for x in outputs]
    of_rows, = gradients(outputs, rows, slopes)
    torch.testing.assert_close(fused_ops.qkv_rope_backward(*slopes, cos, sin, False)[0], of_rows.flatten(1))


@given(st.integers(0, 10**6), st.floats(1e-8, 1e8))
def test_quantized_rows_are_right_to_a_sixteenth(seed, size):
    """e4m3 has 3 bits behind the point: half a step of 1/8, and below the smallest normal number 2^-10 of 448."""
    x = size * torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    values, scale = fp8.quantize_rows(x)
    error = (values.float() * scale - x).abs()
    largest = x.abs().amax(1, keepdim=True)
    assert (error <= 1.001 * torch.maximum(x.abs() / 16, largest * 2**-10 / 448)).all()
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)


@pytest.mark.parametrize("kernel", [lambda x, q: fused_ops.swiglu(x, q),
                                    lambda x, q: fused_ops.swiglu_backward(x, x[:, :6].contiguous(), q)])
def test_kernels_quantize_what_they_would_return(kernel):
    x = torch.randn(7, 12)
    (values, scale), (expected, expected_scale) = kernel(x, True), fp8.quantize_rows(kernel(x, False)[0])
    assert torch.equal(values.float(), expected.float()) and torch.equal(scale, expected_scale)


def test_fp8_linear_and_its_gradient():
    """Sums of 256 products whose factors are each right to a sixteenth at worst: about 4% of the sum's own size."""
    torch.manual_seed(0)
    weight, x = torch.randn(128, 256) / 16, torch.randn(33, 256, requires_grad=True)
    linear, slope = FrozenLinear(weight, fp8=True), torch.randn(33, 128)
    out = linear(x)
    of_x, = gradients(out, x, slope)
    for ours, exact in ((out, x @ weight.t()), (of_x, slope @ weight)):
        error = (ours - exact).norm() / exact.norm()
        assert 0.005 < error < 0.05
    assert all(part.dtype in (torch.float8_e4m3fn, torch.float32) for part in linear.weights)


def test_16_bit_linear_is_exact():
    weight, x = torch.randn(12, 16), torch.randn(5, 16, requires_grad=True)
    out, slope = FrozenLinear(weight, fp8=False)(x), torch.randn(5, 12)
    torch.testing.assert_close(out, x @ weight.t())
    torch.testing.assert_close(*gradients(out, x, slope), slope @ weight)


@pytest.mark.parametrize("heads", [None, 2])
def test_fp8_model_is_near_the_plain_one(heads):
    """Loss, and the direction of all trained gradients together."""
    model = tiny_model(llama={"n_kv_heads": heads, "dim": 64, "n_heads": 4})
    results = []
    for fp8 in (False, True):
        if fp8:
            fuse(model, fp8=True)
        model.zero_grad()
        loss = model(pack(mixed_examples()))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (exact, of_exact), (near, of_near) = results
    assert near != exact and near == pytest.approx(exact, rel=0.02)
    assert F.cosine_similarity(of_exact, of_near, 0) > 0.95
    kinds = {p.dtype for p in model.llama.layers[0].feed_forward.parameters()}
    assert kinds == {torch.float8_e4m3fn, torch.float32}


def test_answer_loss_equals_cross_entropy(monkeypatch):
    """Value and gradient, in more chunks than one."""
    monkeypatch.setattr("lavin.loss.CHUNK_TOKENS", 4)
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(20, 8)
    target, factor = torch.randint(0, 20, (11,)), torch.rand(11)
    expected = (F.cross_entropy(hidden @ weight.t(), target, reduction="none") * factor).sum()
    ours = answer_loss(hidden, weight, target, factor)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*gradients(3 * ours, hidden, None), *gradients(3 * expected, hidden, None))
    assert answer_loss(hidden[:0], weight, target[:0], factor[:0]) == 0


def test_fp8_needs_new_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="--bits fp8 needs"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    check_fp8(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="--precision bf16"):
        check_fp8(torch.device("cuda"), torch.float16)
