"""Compiled layers: the plain model's numbers, and one program for passes of any size."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lavin.fast.speed_up import compile_model, fuse
from lavin.fast.training_graphs import capture_training
from lavin.generation.generate import decode
from lavin.model import pack
from tiny import mixed_examples, tiny_example, tiny_model

SIZES = {"n_layers": 4, "n_kv_heads": 4}


def batches(answer: int) -> list[list]:
    """Three sizes of everything that can differ: samples, pictures, lengths."""
    more = [tiny_example(seed, 3 * seed, answer, image=seed % 2 == 0) for seed in range(5, 10)]
    return [mixed_examples(answer) + more[:n] for n in (1, 3, 5)]


def loss_and_gradients(model, examples):
    model.zero_grad()
    loss = model(pack(examples))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def compiled(monkeypatch):
    """A fused, compiled model, its plain twin, and the counter of programs; the compiler stops before it writes code."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    plain, model = (tiny_model(llama=SIZES, dropout_prob=0.0) for _ in range(2))
    fuse(model)
    compile_model(model)
    yield plain, model, counter
    torch.compiler.reset()


@pytest.mark.parametrize("recorded", [False, True])
def test_training_compiles_once(compiled, recorded):
    """The first pass, that is, since a recorded one cannot."""
    plain, model, counter = compiled
    plain.train(), model.train()
    if recorded:
        capture_training(model)
    programs = []
    for examples in batches(3):
        expected, ours = loss_and_gradients(plain, examples), loss_and_gradients(model, examples)
        assert ours[0] == pytest.approx(expected[0], rel=1e-5)
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-3, atol=1e-4)
        programs.append(counter.frame_count)
    assert programs[0] == programs[-1] > 0
    assert not recorded or len(model.llama.forward.graphs) == 2


def test_answering_compiles_once(compiled):
    plain, model, counter = compiled
    model.use_cuda_graphs = True  # short prompts are filled up
    programs = []
    alone = [[tiny_example(seed, 9 + 30 * seed, 0, image=seed % 2 > 0)] for seed in range(4)]
    for examples in batches(0) + alone:
        logits = []
        for m in (plain, model):
            list(decode(m, examples, 10, lambda seen: logits.append(seen) or seen.argmax(-1)))
        torch.testing.assert_close(torch.stack(logits[10:]), torch.stack(logits[:10]), rtol=1e-4, atol=1e-4)
        programs.append(counter.frame_count)
    assert programs[0] == programs[2] > 0
    assert programs[4] == programs[-1]  # one sequence has its own, with and without a picture
