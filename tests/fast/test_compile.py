"""torch.compile: same numbers as eager, and no recompilation when batch sizes change."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lavin.fast.captured_models import capture_passes
from lavin.fast.speed_up import compile_model, fuse
from lavin.model import pack
from tiny import greedy_logits, mixed_examples, tiny_example, tiny_model
from util.training.optimizer import make_optimizer

LLAMA_SHAPE = {"n_layers": 4, "n_kv_heads": 4}


def batches(answer: int) -> list[list]:
    """Three batches that differ in the numbers of examples, images and tokens."""
    more = [tiny_example(seed, 3 * seed, answer, image=seed % 2 == 0) for seed in range(5, 10)]
    return [mixed_examples(answer) + more[:n] for n in (1, 3, 5)]


def loss_and_gradients(model, examples):
    model.zero_grad()
    loss = model(pack(examples))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def capture_without_compiling(run, device, pool=None):
    """Captures as on a GPU, where what would have to be compiled while a pass is captured runs eagerly."""
    def replay():
        with torch.compiler.set_stance("fail_on_recompile"):
            run()
    return replay


@pytest.fixture
def compiled(monkeypatch):
    """An eager model, the same model fused and compiled, and the counter of compiled frames; no code is generated."""
    torch.compiler.reset()
    # which chooses, as Inductor does, what a forward pass keeps for the backward pass
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    for module in ("lavin.fast.cuda_graphs", "lavin.generation.session"):
        monkeypatch.setattr(f"{module}.capture", capture_without_compiling)
    eager, model = (tiny_model(llama=LLAMA_SHAPE, dropout_prob=0.0) for _ in range(2))
    fuse(model)
    compile_model(model)
    yield eager, model, counter
    torch.compiler.reset()


@pytest.mark.parametrize("captured", [False, True])
def test_training_compiles_once(compiled, captured):
    """The first pass alone compiles: captured ones must not."""
    eager, model, counter = compiled
    eager.train(), model.train()
    if captured:
        capture_passes(model)
    frame_counts = []
    for examples in batches(3):
        expected, actual = loss_and_gradients(eager, examples), loss_and_gradients(model, examples)
        assert actual[0] == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-3, atol=1e-4)
        frame_counts.append(counter.frame_count)
    assert frame_counts[0] == frame_counts[-1] > 0
    assert not captured or len(model.llama.forward.graphs) == 2


@pytest.mark.parametrize("flat", [False, True])
def test_captured_training_compiles_one_program_a_kind(compiled, flat):
    """One for all layers of LLaMA, one for the ViT's, whose first pass has a single image, and one for the loss. Layers
    whose parameters lie at different places in a flat one share it, too."""
    _, model, counter = compiled
    capture_passes(model.train())
    if flat:
        make_optimizer(model, 0.02)
    for n_images in (1, 3, 2):
        loss_and_gradients(model, [tiny_example(seed, 9, 3, image=seed < n_images) for seed in range(4)])
    assert counter.frame_count == 3


def test_layers_keep_no_normalised_rows(compiled):
    """A layer keeps its input and what attention was added to, of which the backward pass makes the rest that has this
    shape."""
    _, model, _ = compiled
    batch, kept = pack(mixed_examples(3)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model.train()(batch)
    rows = {x.data_ptr() for x in kept if x.shape == (2 + len(batch.ids), model.llama.config.dim)}
    assert len(rows) == 2 * len(model.llama.layers) + 1  # and the input of the last norm


def test_the_loss_is_compiled_without_the_online_softmax(compiled):
    """The online softmax slows it (docs/engineering-log.md)."""
    assert torch._inductor.config.online_softmax is False


def test_decoding_compiles_once(compiled):
    eager, model, counter = compiled
    capture_passes(model)
    frame_counts = []
    single_examples = [[tiny_example(seed, 9 + 30 * seed, 0, image=seed % 2 > 0)] for seed in range(4)]
    for examples in batches(0) + single_examples:
        expected, actual = greedy_logits(eager, examples, 10), greedy_logits(model, examples, 10)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        frame_counts.append(counter.frame_count)
    assert frame_counts[0] == frame_counts[2] > 0
    assert frame_counts[4] == frame_counts[-1]  # single examples compile once with and once without an image
