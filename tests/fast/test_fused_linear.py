"""Fused linear layers with frozen weights, in float32 and fp8, and the kernels' PyTorch versions, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavin.fast.fused_linear import FrozenLinear
from lavin.fast.speed_up import fuse
from lavin.kernels import fp8, fused_ops
from lavin.kernels.fp8 import check_fp8
from lavin.kernels.single_row import gemv_nf4
from lavin.llama import apply_rotary, rotary_angles, rotary_frequencies
from lavin.loss import answer_loss
from lavin.model import pack
from lavin.runtime.errors import UserError
from tiny import mixed_examples, tiny_config, tiny_model
from tiny_quantized import NF4, random_nf4


def gradients(outputs, inputs, grad_outputs):
    return torch.autograd.grad(outputs, inputs, grad_outputs)


def test_swiglu_and_its_gradient():
    gate_up = torch.randn(7, 12, requires_grad=True)
    gate, up = gate_up.chunk(2, 1)
    expected, grad_output = F.silu(gate) * up, torch.randn(7, 6)
    torch.testing.assert_close(fused_ops.swiglu(gate_up.detach(), False)[0], expected)
    grad_gate_up, = gradients(expected, gate_up, grad_output)
    torch.testing.assert_close(fused_ops.swiglu_backward(gate_up.detach(), grad_output, False)[0], grad_gate_up)


def test_gradient_of_rope():
    cos, sin = rotary_angles(torch.tensor([0, 1, 5, 2, 9]), rotary_frequencies(tiny_config(dim=32, n_heads=4)))
    qkv = torch.randn(5, 6 + 3 + 3, 8, requires_grad=True)
    query, key, value = qkv.split((6, 3, 3), 1)
    outputs = apply_rotary(query, (cos, sin)), apply_rotary(key, (cos, sin)), value
    grad_outputs = [torch.randn_like(x) for x in outputs]
    grad_qkv, = gradients(outputs, qkv, grad_outputs)
    torch.testing.assert_close(fused_ops.qkv_rope_backward(*grad_outputs, cos, sin, False)[0], grad_qkv.flatten(1))


@given(st.integers(0, 10**6), st.floats(1e-8, 1e8))
def test_error_of_quantized_rows(seed, scale_of_x):
    """e4m3 has 3 mantissa bits, so a relative error of at most 1/16; for subnormals, 2^-10 of a row's maximum / 448."""
    x = scale_of_x * torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    values, scale = fp8.quantize_rows(x)
    error = (values.float() * scale - x).abs()
    row_max = x.abs().amax(1, keepdim=True)
    assert (error <= 1.001 * torch.maximum(x.abs() / 16, row_max * 2**-10 / 448)).all()
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (5, 1)


@pytest.mark.parametrize("kernel", [lambda x, q: fused_ops.swiglu(x, q),
                                    lambda x, q: fused_ops.swiglu_backward(x, x[:, :6].contiguous(), q)])
def test_kernels_with_quantized_output(kernel):
    x = torch.randn(7, 12)
    (values, scale), (expected, expected_scale) = kernel(x, True), fp8.quantize_rows(kernel(x, False)[0])
    assert torch.equal(values.float(), expected.float()) and torch.equal(scale, expected_scale)


def test_fp8_linear_and_its_gradient():
    """Both operands have relative errors of up to 1/16; in dot products of 256 terms they average out to about 4%."""
    torch.manual_seed(0)
    weight, x = torch.randn(128, 256) / 16, torch.randn(33, 256, requires_grad=True)
    linear, grad_output = FrozenLinear(weight, fp8=True), torch.randn(33, 128)
    out = linear(x)
    grad_x, = gradients(out, x, grad_output)
    for actual, exact in ((out, x @ weight.t()), (grad_x, grad_output @ weight)):
        error = (actual - exact).norm() / exact.norm()
        assert 0.005 < error < 0.05
    assert all(tensor.dtype in (torch.float8_e4m3fn, torch.float32) for tensor in linear.weights)


def test_16_bit_linear_is_exact():
    weight, x = torch.randn(12, 16), torch.randn(5, 16, requires_grad=True)
    out, grad_output = FrozenLinear(weight, fp8=False)(x), torch.randn(5, 12)
    torch.testing.assert_close(out, x @ weight.t())
    torch.testing.assert_close(*gradients(out, x, grad_output), grad_output @ weight)


@pytest.mark.parametrize("heads", [None, 2])
def test_fp8_model_is_close_to_the_exact_one(heads):
    """The loss, and the cosine of all gradients, concatenated."""
    model = tiny_model(llama={"n_kv_heads": heads, "dim": 64, "n_heads": 4})
    results = []
    for use_fp8 in (False, True):
        if use_fp8:
            fuse(model, fp8=True)
        model.zero_grad()
        loss = model(pack(mixed_examples()))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (exact_loss, exact_gradient), (fp8_loss, fp8_gradient) = results
    assert fp8_loss != exact_loss and fp8_loss == pytest.approx(exact_loss, rel=0.02)
    assert F.cosine_similarity(exact_gradient, fp8_gradient, 0) > 0.95
    dtypes = {p.dtype for p in model.llama.layers[0].feed_forward.parameters()}
    assert dtypes == {torch.float8_e4m3fn, torch.float32}


@pytest.mark.parametrize("fp8, tolerance", [(False, 1e-6), (True, 0.05)])
def test_fused_layers_add_their_biases(fp8, tolerance):
    """The outputs for an input of zeros, of which a matrix makes zeros in any precision."""
    model = tiny_model(llama={"dim": 64, "n_heads": 4, "biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3")})
    attention, feed_forward = model.llama.layers[0].attention, model.llama.layers[0].feed_forward
    biases = {name: part.bias.data.normal_() for owner in (attention, feed_forward)
              for name, part in owner.named_children() if isinstance(part, torch.nn.Linear)}
    zeros = torch.zeros(20, 64)
    expected = feed_forward(zeros)
    fuse(model, fp8)
    assert torch.equal(attention.wo(zeros)[0], biases["wo"])
    assert torch.equal(attention.wqkv(zeros)[0], torch.cat([biases[name] for name in ("wq", "wk", "wv")]))
    for x in (zeros, zeros.clone().requires_grad_()):
        assert (feed_forward(x) - expected).norm() <= tolerance * expected.norm()
    assert (expected - biases["w2"]).norm() > 0.2 * expected.norm()  # w1's and w3's have their part in it


def test_one_row_in_nf4():
    """Two codes a byte, the first in its upper half; 64 codes have a scale, 256 scales one of their own, and a row has
    an offset. The values are as precise as in bf16."""
    torch.manual_seed(0)
    weight, absmax, absmax2, code2, offset, table = random_nf4(260, 128)
    codes = [code for byte in weight.flatten().tolist() for code in (byte >> 4, byte & 15)]
    scales = torch.stack([code2[code] * absmax2[i // 256] + offset[i // 2] for i, code in enumerate(absmax.tolist())])
    exact = (NF4[codes].view(520, 64) * scales[:, None]).view(260, 128)
    for i, x in enumerate(torch.eye(128).split(1)):
        actual = gemv_nf4(x, weight, absmax, absmax2, code2, offset, table)[0]
        assert ((actual - exact[:, i]).abs() <= 2**-8 * exact[:, i].abs() + 1e-30).all()


def test_answer_loss_equals_cross_entropy(monkeypatch):
    """Value and gradient, computed in several chunks."""
    monkeypatch.setattr("lavin.loss.CHUNK_TOKENS", 4)
    hidden, weight = torch.randn(11, 8, requires_grad=True), torch.randn(20, 8)
    targets, loss_weights = torch.randint(0, 20, (11,)), torch.rand(11)
    expected = (F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * loss_weights).sum()
    loss = answer_loss(hidden, weight, targets, loss_weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*gradients(3 * loss, hidden, None), *gradients(3 * expected, hidden, None))
    assert answer_loss(hidden[:0], weight, targets[:0], loss_weights[:0]) == 0


def test_fp8_needs_supported_hardware_and_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="--bits fp8 needs"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    check_fp8(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="--precision bf16"):
        check_fp8(torch.device("cuda"), torch.float16)
