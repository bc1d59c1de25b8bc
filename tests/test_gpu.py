"""The fast paths that only a GPU runs, against their plain twins."""

import pytest
import torch
import torch.nn.functional as F

from lavin import attention, kernels
from lavin.fast import speed_up
from lavin.frozen import scaled_product
from lavin.generation import decode
from lavin.llama import PackedPlan
from lavin.model import pack
from tiny import freeze_in, mixed_examples, tiny_model

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
    for kernel, inputs in ((kernels.swiglu, [rows]), (kernels.swiglu_backward, [rows, slope]),
                           (kernels.rotary_backward, [query, key, value, cos, sin])):
        ours = kernel(*(x.cuda() for x in inputs), quantized)
        theirs = kernel(*inputs, quantized)
        assert ours[0].dtype == theirs[0].dtype and ours[1].shape == theirs[1].shape
        assert close(dequantized(*ours), dequantized(*theirs), 0.01 if quantized else 1e-5), kernel


@HOPPER
def test_scaled_product_equals_its_twin():
    torch.manual_seed(0)
    a, b = kernels.quantize(torch.randn(37, 64)), kernels.quantize(torch.randn(48, 64))
    theirs = scaled_product(*a, *b, torch.float32)
    assert close(scaled_product(*(x.cuda() for x in (*a, *b)), torch.bfloat16), theirs, 5e-3)


def test_flash_attention_over_the_row_equals_one_by_one():
    torch.manual_seed(0)
    plan = PackedPlan([1, 1, 5, 9, 3], "cuda")
    q, k, v = (torch.randn(19, h, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    results = []
    for way in (attention.variable_length, attention.one_by_one):
        out = way(q, k, v, plan)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert attention.packed_attention(q.device, q.dtype) is attention.variable_length
    assert all(close(ours, theirs, 0.02) for ours, theirs in zip(*results))


@pytest.mark.parametrize("bits", ["16bit", pytest.param("fp8", marks=HOPPER)])
def test_fast_model_is_the_plain_one(bits):
    """Loss, trained gradients and greedy tokens; long answers, whose steps are one CUDA graph."""
    torch.compiler.reset()
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    plain = tiny_model(llama=shape)
    fast = speed_up(freeze_in(tiny_model(llama=shape), "cuda", torch.bfloat16), bits)
    results = []
    for model in (plain, fast):
        loss = model(pack(mixed_examples()).to(model.device))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.03)
    assert F.cosine_similarity(results[0][1], results[1][1], 0) > (0.98 if bits == "16bit" else 0.9)

    def written(model, steps, graph_after):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lavin.generation.STEPS_BEFORE_GRAPH", graph_after)
            return torch.stack(list(decode(model.eval(), mixed_examples(0), steps, lambda x: x.argmax(-1)))).tolist()
    assert written(fast, 24, 4) == written(fast, 24, 99)
