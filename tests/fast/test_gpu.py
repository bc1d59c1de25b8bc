"""The fast paths that only a GPU runs, against their plain twins."""

import pytest
import torch
import torch.nn.functional as F

from lavin import attention
from lavin.attention import VarlenMetadata
from lavin.fast.speed_up import speed_up
from lavin.generation.generate import decode
from lavin.kernels import fp8, fused_ops
from lavin.kernels.fp8 import scaled_matmul
from lavin.model import pack
from tiny import BATCHES, freeze_in, loss_and_gradients, mixed_examples, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
                                reason="no GPU of compute capability 8.0 or newer")
HOPPER = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
                            reason="no fp8 products on this GPU")


def close(ours, theirs, tolerance: float) -> bool:
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item() < tolerance


def dequantized(rows, scale):
    return rows.float() * scale if len(scale) else rows.float()


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=HOPPER)])
def test_kernels_equal_their_twins(quantized):
    torch.manual_seed(0)
    rows, slope = torch.randn(9, 2 * 1000), torch.randn(9, 1000)
    query, key, value = torch.randn(9, 8, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    cos, sin = torch.randn(9, 1, 16), torch.randn(9, 1, 16)
    for kernel, inputs in ((fused_ops.swiglu, [rows]), (fused_ops.swiglu_backward, [rows, slope]),
                           (fused_ops.qkv_rope_backward, [query, key, value, cos, sin])):
        ours = kernel(*(x.cuda() for x in inputs), quantized)
        theirs = kernel(*inputs, quantized)
        assert ours[0].dtype == theirs[0].dtype and ours[1].shape == theirs[1].shape
        assert close(dequantized(*ours), dequantized(*theirs), 0.01 if quantized else 1e-5), kernel


@HOPPER
def test_scaled_product_equals_its_twin():
    torch.manual_seed(0)
    a, b = fp8.quantize_rows(torch.randn(37, 64)), fp8.quantize_rows(torch.randn(48, 64))
    theirs = scaled_matmul(*a, *b, torch.float32)
    assert close(scaled_matmul(*(x.cuda() for x in (*a, *b)), torch.bfloat16), theirs, 5e-3)


def test_flash_attention_over_the_row_equals_one_by_one():
    torch.manual_seed(0)
    attn_metadata = VarlenMetadata([1, 1, 5, 9, 3], "cuda")
    q, k, v = (torch.randn(19, h, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    results = []
    for way in (attention.flash_varlen_attention, attention.reference_attention):
        out = way(q, k, v, attn_metadata)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert attention.select_attention(q.device, q.dtype, 16) is attention.flash_varlen_attention
    assert all(close(ours, theirs, 0.02) for ours, theirs in zip(*results))


@pytest.fixture(scope="module", params=["16bit", pytest.param("fp8", marks=HOPPER)])
def pair(request):
    """A plain model on the CPU, and the same one with all that makes it fast."""
    torch.compiler.reset()
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    plain, fast = (tiny_model(llama=shape, dropout_prob=0.0).train() for _ in range(2))
    return plain, speed_up(freeze_in(fast, "cuda", torch.bfloat16), request.param), request.param


def test_training_passes(pair):
    """Recorded from the second on, in all sizes; the losses before them are still held."""
    plain, fast, bits = pair
    losses = []
    for examples in BATCHES:
        theirs, ours = (loss_and_gradients(model, examples).cpu() for model in (plain, fast))
        losses.append(fast(pack(examples).to("cuda")))
        losses[-1].backward()
        assert ours[0] == pytest.approx(theirs[0], rel=0.03)
        assert F.cosine_similarity(theirs[1:], ours[1:], 0) > (0.98 if bits == "16bit" else 0.9)
    assert len(fast.llama.forward.graphs) == 3


def test_dropout_of_recorded_passes(pair):
    """Drawn afresh by every launch, and again by the seed."""
    _, fast, _ = pair
    adapter = fast.llama.layers[0].adapter_attn
    adapter.dropout.fill_(0.5)
    found = []
    for seed in (0, 0, None):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(loss_and_gradients(fast, BATCHES[1]))
    adapter.dropout.fill_(0.0)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_answers(pair):
    """Greedy tokens, in long answers whose steps are recorded, alone and together; twice, and unrecorded."""
    _, fast, _ = pair
    fast.eval()

    def written(graph_after):
        fast.session = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lavin.generation.session.WARMUP_STEPS", graph_after)
            return [torch.stack(list(decode(fast, examples, 24, lambda x: x.argmax(-1)))).tolist()
                    for examples in [mixed_examples(0), *([e] for e in 2 * mixed_examples(0))]]
    assert written(4) == written(4) == written(999)
