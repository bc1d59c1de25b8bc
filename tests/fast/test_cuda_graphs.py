"""Recorded passes and sessions against plain ones. Without a GPU nothing is recorded, and all else is the same code."""

import gc
import math
from weakref import WeakMethod, ref

import pytest
import torch

from lavin.fast import cuda_graphs, training_graphs
from lavin.fast.cuda_graphs import pad_to_bucket
from lavin.fast.training_graphs import CapturedLlamaPass, capture_training
from lavin.generation.generate import decode, warmup
from lavin.model import pack
from tiny import BATCHES, VARIANTS, loss_and_gradients, mixed_examples, tiny_example, tiny_model
from util.training.accumulation import accumulate_with_oom_retry


@pytest.mark.parametrize("kind, visual", VARIANTS)
def test_training_passes(kind, visual):
    plain, ours = (tiny_model(adapter_type=kind, visual_adapter_type=visual, dropout_prob=0.0).train() for _ in range(2))
    capture_training(ours)
    for examples in BATCHES:
        torch.testing.assert_close(loss_and_gradients(ours, examples), loss_and_gradients(plain, examples),
                                   rtol=1e-4, atol=1e-5)
    llama, vision = ours.llama.forward, ours.vision.forward
    assert llama.num_passes == 5 and len(llama.graphs) == 3 and vision.num_passes == 4 and len(vision.graphs) == 2
    assert all(rows > sum(len(e.ids) for e in BATCHES[1]) or rows < 200 for rows, *_ in llama.graphs)  # filled up


def test_the_sizes_longest_unused_are_forgotten(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    plain, ours = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_training(ours)
    sizes = []
    for rows in (60, 60, 120, 60, 180, 120, 180):  # the first is not recorded
        examples = [tiny_example(rows + i, rows // 4, rows // 4) for i in range(2)]
        torch.testing.assert_close(loss_and_gradients(ours, examples), loss_and_gradients(plain, examples),
                                   rtol=1e-4, atol=1e-5)
        sizes.append([rows for rows, *_ in ours.llama.forward.graphs])
    a, b, c = sorted({rows for seen in sizes for rows in seen})
    assert sizes == [[], [a], [a, b], [b, a], [a, c], [c, b], [b, c]]


def test_a_forgotten_size_is_freed_at_once(monkeypatch):
    """Even behind gc.freeze: its graph's memory must not wait for a collector."""
    def capture(run, device, pool=None):  # holds the pass no more than a graph does
        run = WeakMethod(run)
        return lambda: run()()
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    model = tiny_model(dropout_prob=0.0).train()
    capture_training(model)
    for _ in range(3):
        loss_and_gradients(model, mixed_examples())
    passes = [ref(size) for stack in (model.llama.forward, model.vision.forward) for size in stack.graphs.values()]
    gc.disable()
    try:
        assert len(passes) == 2 and all(size() for size in passes)
        training_graphs.free_graphs(model)
        assert not any(size() for size in passes)
    finally:
        gc.enable()
    loss_and_gradients(model, mixed_examples())
    assert len(model.llama.forward.graphs) == 1
    training_graphs.free_graphs(tiny_model())  # has nothing to forget


def test_a_program_that_ran_out_of_memory_counts_as_not_compiled():
    model = tiny_model(dropout_prob=0.0).train()
    capture_training(model)
    captured, uncaptured = model.llama.forward, model.llama.forward.uncaptured

    def fails(*inputs):
        raise torch.OutOfMemoryError
    captured.uncaptured = fails
    with pytest.raises(torch.OutOfMemoryError):
        model(pack(mixed_examples()))
    captured.uncaptured = uncaptured
    loss_and_gradients(model, mixed_examples())
    assert not captured.graphs and captured.compiled


def test_gradients_of_passes_add_up_and_turns_are_kept():
    ours, plain = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_training(ours)
    for model in (ours, plain):
        for examples in BATCHES[:3]:
            model(pack(examples)).backward()
    for p, q in zip(ours.parameters(), plain.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    first, second = (ours(pack(examples)) for examples in BATCHES[:2])
    with pytest.raises(RuntimeError, match="must be backpropagated"):
        first.backward()
    second.backward()


def test_what_is_no_training_pass_stays_plain():
    model = tiny_model(dropout_prob=0.0)
    capture_training(model)
    with torch.no_grad():
        model.train()(pack(mixed_examples()))
    model.eval()(pack(mixed_examples())).backward()
    model.train().set_gradient_checkpointing(True)
    model(pack(mixed_examples())).backward()
    assert model.llama.forward.num_passes == model.vision.forward.num_passes == 0


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 2047, 2048, 2049, 9446])
def test_roomy(n):
    assert n <= pad_to_bucket(n) <= max(n + 15, n * 33 / 32)
    assert len({pad_to_bucket(i) for i in range(n, 2 * n)}) <= 66


def test_sessions():
    """Questions of all lengths, one at a time and in batches, on one model; each as a fresh model answers it."""
    ours = tiny_model(adapter_type="block")
    ours.use_cuda_graphs = True
    asked = [[tiny_example(i, length, 0, image=i % 3 == 0)] for i, length in enumerate((5, 60, 3, 20, 90, 480, 33, 7))]
    asked[4:4] = [mixed_examples(0), mixed_examples(0)[::-1], asked[0]]
    sessions = []
    for examples in asked:
        logits = []
        for model in (ours, tiny_model(adapter_type="block")):
            logits.append([])
            list(decode(model, examples, 12, lambda seen: logits[-1].append(seen) or seen.argmax(-1)))
        torch.testing.assert_close(torch.stack(logits[0]), torch.stack(logits[1]), rtol=1e-4, atol=1e-5)
        sessions.append(ours.session)
    alike = [a is b for a, b in zip(sessions, sessions[1:])]
    assert alike == [True] * 3 + [False, True, False, True, True] + [True] * 2
    assert [bool(p.replay) for p in sessions[-1].prefills.values()] == [True, False, False, False]  # none the first time
    assert sessions[0].replay_step and sorted(sessions[0].prefills) == [(64, False), (64, True)]
    assert sorted(sessions[-1].prefills) == [(64, False), (64, True), (128, False), (512, False)]


@pytest.mark.parametrize("longest", [199, 511, 1100])
def test_after_a_rehearsal_nothing_is_recorded_any_more(longest):
    ours = tiny_model(dropout_prob=0.0)
    ours.use_cuda_graphs = True
    warmup(ours, longest)
    session, lengths = ours.session, [(rows, kind) for rows in range(64, min(longest, 1024) + 64, 64) for kind in (0, 1)]
    assert sorted(session.prefills) == lengths and session.replay_step
    assert all(prefill.replay for prefill in session.prefills.values())
    for n in (1, 63, 150):
        for image in (False, True):
            answers = [list(decode(model, [tiny_example(n, n, 0, image=image)], 3, lambda seen: seen.argmax(-1)))
                       for model in (ours, tiny_model(dropout_prob=0.0))]
            assert answers[0] == answers[1]
    list(decode(ours, [tiny_example(0, 5, 0)], longest - len(tiny_example(0, 5, 0).ids), lambda seen: seen.argmax(-1)))
    assert ours.session is session and sorted(session.prefills) == lengths


def test_without_recording_a_rehearsal_is_short():
    model = tiny_model()
    warmup(model, 511)
    assert model.session.num_steps == 2 * 2 * 9 and not model.session.prefills and not model.session.replay_step


def randomise_in_place(model):
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parameter.data.normal_()


def test_a_session_belongs_to_one_answer_and_to_its_adapters():
    model = tiny_model()
    first, second = (decode(model, [tiny_example(i, 5, 0)], 4, lambda seen: seen.argmax(-1)) for i in (1, 2))
    alone = [list(decode(tiny_model(), [tiny_example(i, 5, 0)], 4, lambda seen: seen.argmax(-1))) for i in (1, 2)]
    assert [[a, b] for a, b in zip(first, second)] == [[a, b] for a, b in zip(*alone)]  # in turns
    before = model.session
    abandoned, newer = (decode(model, [tiny_example(i, 5, 0)], 4, lambda seen: seen.argmax(-1)) for i in (1, 2))
    next(abandoned), next(newer)
    abandoned.close(), newer.close()
    assert model.session is before
    for changed in (model, fresh := tiny_model()):  # other adapters, as the chatbot loads them
        torch.manual_seed(1)
        randomise_in_place(changed)
    answers = [list(decode(m, [tiny_example(1, 5, 0)], 4, lambda seen: seen.argmax(-1))) for m in (model, fresh)]
    assert answers[0] == answers[1] != alone[0] and model.session is before
    model.adapter = tiny_model(dropout_prob=0.3, dropout_var=0.9).adapter  # of training alone
    list(decode(model, [tiny_example(1, 5, 0)], 4, lambda seen: seen.argmax(-1)))
    assert model.session is before
    model.adapter = tiny_model(adapter_scale=0.5).adapter
    list(decode(model, [tiny_example(1, 5, 0)], 4, lambda seen: seen.argmax(-1)))
    assert model.session is not before


def test_a_pass_too_large_to_record_is_halved(monkeypatch):
    plain, ours = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_training(ours)
    loss_and_gradients(ours, mixed_examples())
    make = CapturedLlamaPass.__init__

    def scarce(self, stack, size, dtype):
        if size[0] > 40:
            raise torch.OutOfMemoryError("none left")
        make(self, stack, size, dtype)
    monkeypatch.setattr(CapturedLlamaPass, "__init__", scarce)
    pairs, scaler = [(example, 0.5) for example in 2 * mixed_examples()], torch.amp.GradScaler("cpu", enabled=False)
    ours.vision.forward.graphs["of before"] = None
    found = []
    for model in (plain, ours):
        model.zero_grad()
        loss, most = accumulate_with_oom_retry(model, pairs, math.inf, scaler)
        found.append(torch.cat([loss[None], *[p.grad.flatten() for p in model.parameters() if p.grad is not None]]))
    assert most < 40 and "of before" not in ours.vision.forward.graphs  # all memory was given back
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
