"""GPU-only code paths against their reference implementations."""

import itertools
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from test_flat_parameters import flat_adamw, plain_adamw, take_steps, trained
from torch import nn

from lavin import attention
from lavin.attention import VarlenMetadata
from lavin.fast.joined_nf4 import JoinedAttention
from lavin.fast.speed_up import speed_up
from lavin.generation.generate import decode
from lavin.generation.kv_cache import DecodeMetadata, KVCache, PrefillMetadata
from lavin.kernels import fp8, fused_ops
from lavin.kernels.fp8 import scaled_matmul
from lavin.kernels.single_row import gemv, gemv_nf4, gemv_nf4_swiglu, gemv_swiglu, norm_adapter
from lavin.llama import LlamaConfig, RMSNorm, add_bias
from lavin.mm_adapter import AdapterConfig, RepAdapterRouter
from lavin.model import pack
from lavin.runtime.device import stack_on_device, to_device
from tiny import BATCHES, cast_frozen, greedy, greedy_logits, loss_and_gradients, mixed_examples, tiny_model
from tiny_quantized import quantized_and_dequantized_model, random_nf4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
                                reason="no GPU of compute capability 8.0 or newer")
NEEDS_FP8 = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
                               reason="no fp8 matmul on this GPU")
NEEDS_BITSANDBYTES = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="no bitsandbytes")


def close(actual, expected, tolerance: float) -> bool:
    """Asserts that the norm of the relative error stays within the tolerance."""
    actual, expected = actual.float().cpu(), expected.float().cpu()
    return ((actual - expected).norm() / expected.norm()).item() < tolerance


def test_copies_to_the_gpu():
    """They are no views, for which torch.compile would make other programs; copies in flight are not overwritten."""
    for n in (1, 3, 300):
        tensors = [[torch.arange(n) + i, torch.empty(0), torch.rand(n, 2), torch.tensor(i), torch.arange(n).int() - i]
                   for i in range(3)]
        on_device = [to_device(some, "cuda") for some in tensors]
        for moved, tensor in zip(itertools.chain(*on_device), itertools.chain(*tensors), strict=True):
            assert torch.equal(moved.cpu(), tensor) and moved.dtype == tensor.dtype and not moved._is_view()
        images = [torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8) for _ in range(n)]
        stacked = [stack_on_device(images, "cuda"), stack_on_device(images[::-1], "cuda")][0]
        assert torch.equal(stacked.cpu(), torch.stack(images))


def dequantized(rows, scale):
    return rows.float() * scale if len(scale) else rows.float()


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=NEEDS_FP8)])
def test_triton_kernels_equal_pytorch(quantized):
    torch.manual_seed(0)
    gate_up, grad_output = torch.randn(9, 2 * 1000), torch.randn(9, 1000)
    query, key, value = torch.randn(9, 8, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    cos, sin = torch.randn(9, 1, 16), torch.randn(9, 1, 16)
    for kernel, inputs in ((fused_ops.swiglu, [gate_up]), (fused_ops.swiglu_backward, [gate_up, grad_output]),
                           (fused_ops.qkv_rope_backward, [query, key, value, cos, sin])):
        actual = kernel(*(x.cuda() for x in inputs), quantized)
        expected = kernel(*inputs, quantized)
        assert actual[0].dtype == expected[0].dtype and actual[1].shape == expected[1].shape
        assert close(dequantized(*actual), dequantized(*expected), 0.01 if quantized else 1e-5), kernel


@pytest.mark.parametrize("width", [1008, 5008])  # neither is a multiple of a block; programs have other shapes
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=NEEDS_FP8)])
def test_gemv_equals_pytorch(quantized, width):
    torch.manual_seed(0)
    x, weight = torch.randn(1, width), torch.randn(37, width)
    weight, scale = fp8.quantize_rows(weight) if quantized else (weight, None)
    actual = gemv(x.cuda(), weight.cuda(), None if scale is None else scale.cuda())
    assert close(actual, gemv(x, weight, scale), 1e-5)


def gemv_then_swiglu(x, weight, scale, bias):
    return fused_ops.swiglu(add_bias(gemv(x, weight, scale), bias), False)[0]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=NEEDS_FP8)])
def test_gemv_with_swiglu_equals_pytorch(quantized, biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 5008), torch.randn(2 * 37, 5008), torch.randn(2 * 37) if biased else None
    weight, scale = fp8.quantize_rows(weight) if quantized else (weight, None)
    x, weight, scale, bias = (None if t is None else t.cuda() for t in (x, weight, scale, bias))
    actual, expected = (f(x, weight, scale, bias) for f in (gemv_swiglu, gemv_then_swiglu))
    assert close(actual, expected, 1e-5)
    x, bias = x.bfloat16(), None if bias is None else bias.bfloat16()
    weight = weight if quantized else weight.bfloat16()
    actual, expected = (f(x, weight, scale, bias) for f in (gemv_swiglu, gemv_then_swiglu))
    assert close(actual, expected, 1e-3)  # they round at the same places


@pytest.mark.parametrize("K", [64, 4160])
def test_gemv_nf4_equals_pytorch(K):
    """With K = 64, a row is shorter than a block of the kernel. The 37 rows and 4,160 columns fill no whole blocks."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, K), *random_nf4(37, K)]
    assert close(gemv_nf4(*(tensor.cuda() for tensor in tensors)), gemv_nf4(*tensors), 1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_gemv_nf4_with_swiglu_equals_pytorch(biased):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4160), *random_nf4(2 * 37, 4160), torch.randn(2 * 37) if biased else None]
    actual = gemv_nf4_swiglu(*(None if tensor is None else tensor.cuda() for tensor in inputs))
    assert close(actual, gemv_nf4_swiglu(*inputs), 1e-5)


@pytest.mark.parametrize("rank", [8, 6])
def test_norm_adapter_equals_the_adapted_block(rank):
    """The mixtures are of two modalities; neither the width nor the rank is a multiple of a block."""
    torch.manual_seed(0)
    adapter = RepAdapterRouter(1500, AdapterConfig(adapter_dim=rank, adapter_scale=0.7), 0.0).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    norm, x, mixtures = RMSNorm(1500, 1e-5), torch.randn(1, 1500), torch.rand(2, 2)
    nn.init.normal_(norm.weight, 1, 0.2)
    for one_hot in torch.eye(2).split(1):
        projections = [projection.detach() for projection in adapter.projections(torch.float32)]
        expected = adapter(norm(x), one_hot @ mixtures, projections)
        inputs = (tensor.cuda() for tensor in (one_hot, mixtures, *projections))
        assert close(norm_adapter(x.cuda(), norm.weight.detach().cuda(), norm.eps, *inputs), expected, 1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_kv_cache_kernels_equal_pytorch(heads):
    """Prefill with padding behind the last sequence, then a step of sequences in one, two and three blocks."""
    config = LlamaConfig(64, 1, heads[0], 50, n_kv_heads=heads[1])
    torch.manual_seed(0)
    caches = [KVCache(config, 3, 300, "cuda", torch.bfloat16) for _ in range(2)]
    lengths = [4, 140, 261]
    q, k, v = (torch.randn(418, h, 16, device="cuda").bfloat16() for h in (heads[0], heads[1], heads[1]))
    results = []
    for cache, triton in zip(caches, (True, False), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lavin.generation.kv_cache.uses_triton", lambda *_, triton=triton: triton)
            prefill = PrefillMetadata(cache, [4, 140, 261 + 13], "cuda")
            prefill.for_layer(0).attend(q, k, v)
            cache.lengths.copy_(torch.tensor(lengths))
            results.append(DecodeMetadata(cache).for_layer(0).attend(q[:3], k[-3:], v[-3:]))
    assert close(results[0], results[1], 0.01)
    for sequence, length in enumerate(lengths):
        for name in ("keys", "values"):
            ours, plain = (getattr(cache, name)[0, sequence, :, :length + 1] for cache in caches)
            assert torch.equal(ours, plain) and ours.any(-1).all()


@NEEDS_FP8
def test_scaled_matmul_equals_the_cpu():
    torch.manual_seed(0)
    a, b = fp8.quantize_rows(torch.randn(37, 64)), fp8.quantize_rows(torch.randn(48, 64))
    expected = scaled_matmul(*a, *b, torch.float32)
    assert close(scaled_matmul(*(x.cuda() for x in (*a, *b)), torch.bfloat16), expected, 5e-3)


@pytest.mark.parametrize("implementation, dtype, tolerance", [
    (attention.flash_varlen_attention, torch.bfloat16, 0.02),
    (attention.efficient_varlen_attention, torch.float16, 0.005),
    (attention.efficient_varlen_attention, torch.float32, 1e-5)])
def test_varlen_attention_equals_the_reference(implementation, dtype, tolerance):
    torch.manual_seed(0)
    attn_metadata = VarlenMetadata([1, 1, 5, 9, 3], "cuda")
    attn_metadata.max_seqlen = 16  # a bucket's
    q, k, v = (torch.randn(19, h, 16, device="cuda", dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    results = []
    for attend in (implementation, attention.reference_attention):
        out = attend(q, k, v, attn_metadata)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert all(close(actual, expected, tolerance) for actual, expected in zip(*results, strict=True))


# --bits, the dtype, and whether the compiler works; fp16: as on a V100 or T4
KINDS = [("16bit", torch.bfloat16, True), pytest.param(("fp8", torch.bfloat16, True), marks=NEEDS_FP8),
         pytest.param(("4bit", torch.bfloat16, True), marks=NEEDS_BITSANDBYTES),
         ("16bit", torch.float16, True), ("16bit", torch.float16, False), ("16bit", torch.float32, False)]


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    """A float32 model on the CPU, the same model after speed_up on the GPU, and its --bits."""
    bits, dtype, compiler = request.param
    torch.compiler.reset()
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    if bits == "4bit":
        shape.update(dim=128, d_ff=256)  # such matrices can be joined
        fast, plain = quantized_and_dequantized_model(bits, "cuda", dtype, llama=shape, dropout_prob=0.0)
    else:
        plain, fast = (tiny_model(llama=shape, dropout_prob=0.0) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lavin.fast.cuda_graphs.CAPTURE_STANCE", "fail_on_recompile")
        if dtype == torch.float16:
            patch.setattr(attention, "compute_capability", lambda _: (7, 0))
        if not compiler:
            patch.setattr("lavin.fast.speed_up.compiler_error", lambda _: "no C compiler")
        speed_up(cast_frozen(fast.train(), "cuda", dtype), bits)
        assert isinstance(fast.llama.layers[0].attention, JoinedAttention) == (bits == "4bit")
        yield plain.train(), fast, bits


def test_captured_training(models):
    """All sizes, captured from the second pass on; earlier losses, still referenced, must not disturb later passes."""
    plain, fast, bits = models
    losses = []
    for examples in BATCHES:
        expected, actual = (loss_and_gradients(model, examples).cpu() for model in (plain, fast))
        losses.append(fast(pack(examples, device="cuda")))
        losses[-1].backward()
        assert actual[0] == pytest.approx(expected[0], rel=0.03)
        assert F.cosine_similarity(expected[1:], actual[1:], 0) > (0.9 if bits == "fp8" else 0.98)
    assert len(fast.llama.forward.graphs) == 3


@pytest.mark.parametrize("base", [{"biases": ("wq", "wk", "wv")}, {"qk_norm": True},
                                  {"biases": ("wq", "wk", "wv", "wo", "w1", "w2", "w3"), "nope_layers": (1,)}])
def test_other_bases(base):
    """Qwen2, Qwen3, and the rest of what LlamaConfig can say: captured training and decoding."""
    torch.compiler.reset()
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, **base}
    plain, fast = (tiny_model(llama=shape, dropout_prob=0.0) for _ in range(2))
    fast = speed_up(cast_frozen(fast.train(), "cuda", torch.bfloat16))
    for examples in BATCHES[:1] * 3:
        expected, actual = (loss_and_gradients(model, examples).cpu() for model in (plain, fast))
        assert actual[0] == pytest.approx(expected[0], rel=0.03)
        assert F.cosine_similarity(expected[1:], actual[1:], 0) > 0.98
    expected, actual = (greedy_logits(model.eval(), mixed_examples(0), 2)[0] for model in (plain, fast))
    assert close(actual, expected, 0.05)


@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_captured_steps_of_flat_parameters(clip_grad):
    """They repeat bit for bit, are those that are not captured, one of which is skipped, and those of a CPU."""
    torch.compiler.reset()
    shape, batches, results = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}, BATCHES[:1] * 5, []
    for captured in (True, True, False):
        model = speed_up(cast_frozen(tiny_model(llama=shape, dropout_prob=0.0).train(), "cuda", torch.float32))
        optimizer = flat_adamw(model)
        assert optimizer.captured
        optimizer.captured = captured
        numbers = take_steps(model, optimizer, batches, clip_grad, nan_at=2)
        assert len(optimizer.captured_steps) == captured and len(model.llama.forward.graphs) > 0
        results.append((numbers, torch.cat([p.detach().flatten() for p in trained(model).values()])))
    for numbers, parameters in results[1:]:
        assert str(numbers) == str(results[0][0]) and torch.equal(parameters, results[0][1])  # NaN is not NaN
    plain = tiny_model(llama=shape, dropout_prob=0.0).train()
    before = torch.cat([p.detach().flatten() for p in trained(plain).values()])
    expected = take_steps(plain, plain_adamw(plain), batches, clip_grad, nan_at=2)
    for row, expected_row in zip(results[0][0], expected, strict=True):
        assert row == pytest.approx(expected_row, rel=0.01, nan_ok=True)
    after = torch.cat([p.detach().flatten() for p in trained(plain).values()])
    assert F.cosine_similarity(results[0][1].cpu() - before, after - before, 0) > 0.99


def test_dropout_in_captured_training(models):
    """Each replay draws new masks; the seed repeats them."""
    _, fast, _ = models
    adapter = fast.llama.layers[0].adapter_attn
    adapter.dropout.fill_(0.5)
    results = []
    for seed in (None, None, 0, 0, None):  # the first pass compiles, and the second one is captured
        if seed is not None:
            torch.manual_seed(seed)
        results.append(loss_and_gradients(fast, BATCHES[1]))
    adapter.dropout.fill_(0.0)
    *_, first, repeated, other = results
    assert torch.equal(first, repeated) and not torch.equal(repeated, other)


def test_captured_decoding(models):
    """Greedy tokens of a batch, of single examples, and of a batch in the session of one more sequence: captured steps
    repeat, and equal steps that are not captured."""
    _, fast, _ = models
    fast.eval()
    many = 10 * mixed_examples(0)

    def answers(warmup_steps):
        fast.session = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lavin.generation.session.WARMUP_STEPS", warmup_steps)
            return [torch.stack(list(decode(fast, examples, 24, greedy))).tolist()
                    for examples in [mixed_examples(0), *([e] for e in 2 * mixed_examples(0)), many, many[1:]]]
    answers(4)  # the first prefill of a kind is not captured, and rounds its rows in another way
    assert answers(4) == answers(4) == answers(999)
