"""Captured training passes and decoding sessions against eager ones.

Without a GPU, `capture` returns the function itself; buckets, padding, static buffers and eviction are the same code.
"""

import gc
import itertools
import math
from dataclasses import replace
from weakref import WeakMethod, ref

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from lavin.attention import VarlenMetadata
from lavin.fast import captured_models, cuda_graphs
from lavin.fast.captured_models import CapturedLlama, CapturedLlamaPass, bind_graphs, capture_passes
from lavin.fast.cuda_graphs import pad_to_bucket
from lavin.generation.generate import decode, warmup
from lavin.generation.option_scoring import score_options
from lavin.model import pack
from lavin.routing_cache import RoutingCache
from tiny import (
    BATCHES,
    VARIANTS,
    greedy,
    greedy_logits,
    loss_and_gradients,
    mixed_examples,
    randomise_adapters,
    tiny_example,
    tiny_model,
)
from util.training.accumulation import accumulate_with_oom_retry


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_captured_training_equals_eager(adapter_type, visual_type):
    eager, captured = (tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type, dropout_prob=0.0).train()
                       for _ in range(2))
    capture_passes(captured)
    for examples in BATCHES:
        torch.testing.assert_close(loss_and_gradients(captured, examples), loss_and_gradients(eager, examples),
                                   rtol=1e-4, atol=1e-5)
    llama, vision = captured.llama.forward, captured.vision.forward
    assert llama.num_passes == 5 and len(llama.graphs) == 3 and vision.num_passes == 4 and len(vision.graphs) == 2
    tokens_of_graphs = [tokens for _, (tokens, *_) in llama.graphs]
    assert all(tokens > sum(len(e.ids) for e in BATCHES[1]) or tokens < 200 for tokens in tokens_of_graphs)  # padded


def test_captured_passes_are_bound_to_adapters_that_were_attached_later():
    eager, captured = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_passes(captured)
    for rank in (4, 4, 2):
        for model in (eager, captured):
            torch.manual_seed(rank)
            model.attach(replace(model.adapter, adapter_dim=rank))
            randomise_adapters(model)
        bind_graphs(captured)
        bind_graphs(eager)  # nothing is captured there
        for examples in BATCHES:
            torch.testing.assert_close(loss_and_gradients(captured, examples), loss_and_gradients(eager, examples),
                                       rtol=1e-4, atol=1e-5)
        assert len(captured.llama.forward.graphs) == 3  # the first pass runs uncaptured, as in a new process


def test_captured_scoring_equals_eager():
    """Between training passes, which share its buffers; only the first batch is not captured."""
    eager, captured = (tiny_model(dropout_prob=0.0) for _ in range(2))
    capture_passes(captured)
    batches = [[(tiny_example(seed, n, 0, image=seed % 2 > 0), [3, 7, 11]) for seed, n in enumerate(lengths)]
               for lengths in ((9, 14, 30), (9, 14, 30), (40, 30, 4), (8, 8, 8, 8), (11, 13, 29),
                               [7] * 7, [6] * 12)]
    for batch in batches:
        torch.testing.assert_close(list(score_options(captured, [batch])), list(score_options(eager, [batch])),
                                   rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss_and_gradients(captured.train(), BATCHES[0]),
                                   loss_and_gradients(eager.train(), BATCHES[0]), rtol=1e-4, atol=1e-5)
    assert sum(not training for training, _ in captured.llama.forward.graphs) == 5
    images = [shape[0] for training, shape in captured.vision.forward.graphs if not training]
    assert images == [2, 8]  # of 1 or 2, and of 3 and 6


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
@example([100] * 10 + [256])  # with its padding, the last one is longer than 256
def test_a_bucket_holds_its_documents(lengths):
    """Padding continues the last one. No document is longer than all rows: memory-efficient attention requires it."""
    llama = CapturedLlama(nn.Module(), torch.device("cpu"))
    metadata, n = VarlenMetadata(lengths, "cpu"), sum(lengths)
    rows, num_docs, max_seqlen, _ = llama.bucket(torch.empty(n, 1), metadata, None)
    assert rows >= n and num_docs >= len(lengths)
    assert max(*lengths, lengths[-1] + rows - n) <= max_seqlen <= rows


def test_static_metadata_describe_the_padded_documents():
    model = tiny_model().train()
    capture_passes(model)
    for examples in BATCHES:
        loss_and_gradients(model, examples)
        for (_, (rows, num_docs, _, _)), captured in list(model.llama.forward.graphs.items())[-1:]:
            static = captured.attn_metadata
            lengths = static.cu_seqlens.diff()
            assert static.cu_seqlens[-1] == rows and len(lengths) == num_docs
            assert torch.equal(torch.bincount(static.document_ids, minlength=num_docs), lengths)
            assert torch.equal(static.doc_positions, torch.cat([torch.arange(n) for n in lengths.tolist()]))


def test_least_recently_used_buckets_are_evicted(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    eager, captured = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_passes(captured)
    buckets = []
    for tokens in (60, 60, 120, 60, 180, 120, 180):  # the first pass compiles and is not captured
        examples = [tiny_example(tokens + i, tokens // 4, tokens // 4) for i in range(2)]
        torch.testing.assert_close(loss_and_gradients(captured, examples), loss_and_gradients(eager, examples),
                                   rtol=1e-4, atol=1e-5)
        buckets.append([bucket_tokens for _, (bucket_tokens, *_) in captured.llama.forward.graphs])
    a, b, c = sorted({bucket_tokens for held in buckets for bucket_tokens in held})
    assert buckets == [[], [a], [a, b], [b, a], [a, c], [c, b], [b, c]]


def test_freed_graphs_do_not_wait_for_the_garbage_collector(monkeypatch):
    """The collector would never free them after gc.freeze, and their GPU memory would leak."""
    def capture(run, device, pool=None):  # like a CUDA graph, keeps no reference to the pass
        run = WeakMethod(run)
        return lambda: run()()
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    model = tiny_model(dropout_prob=0.0).train()
    capture_passes(model)
    for _ in range(3):
        loss_and_gradients(model, mixed_examples())
    passes = [ref(captured_pass) for module in (model.llama.forward, model.vision.forward)
              for captured_pass in module.graphs.values()]
    gc.disable()
    try:
        assert len(passes) == 2 and all(captured_pass() for captured_pass in passes)
        captured_models.free_graphs(model.llama, model.vision)
        assert not any(captured_pass() for captured_pass in passes)
    finally:
        gc.enable()
    loss_and_gradients(model, mixed_examples())
    assert len(model.llama.forward.graphs) == 1
    captured_models.free_graphs(tiny_model().llama)  # without graphs, it does nothing


def test_a_first_pass_that_runs_out_of_memory_does_not_count_as_compiled():
    model = tiny_model(dropout_prob=0.0).train()
    capture_passes(model)
    captured, uncaptured = model.llama.forward, model.llama.forward.uncaptured

    def out_of_memory(*inputs):
        raise torch.OutOfMemoryError
    captured.uncaptured = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        model(pack(mixed_examples()))
    captured.uncaptured = uncaptured
    loss_and_gradients(model, mixed_examples())
    assert not captured.graphs and captured.compiled


def test_gradients_accumulate_and_passes_must_not_overlap():
    captured, eager = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_passes(captured)
    for model in (captured, eager):
        for examples in BATCHES[:3]:
            model(pack(examples)).backward()
            for p in model.parameters():  # another tensor than the one to which graphs add
                p.grad = None if p.grad is None else p.grad.clone()
    for p, q in zip(captured.parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    first, second = (captured(pack(examples)) for examples in BATCHES[:2])
    with pytest.raises(RuntimeError, match="must be backpropagated"):
        first.backward()
    second.backward()


def test_only_training_passes_are_captured():
    model = tiny_model(dropout_prob=0.0)
    capture_passes(model)
    with torch.no_grad():
        model.train()(pack(mixed_examples()))
    model.eval()(pack(mixed_examples())).backward()
    model.train().set_gradient_checkpointing(True)
    model(pack(mixed_examples())).backward()
    assert model.llama.forward.num_passes == model.vision.forward.num_passes == 0


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 2047, 2048, 2049, 9446])
def test_pad_to_bucket(n):
    assert n <= pad_to_bucket(n) <= max(n + 15, n * 33 / 32)
    assert len({pad_to_bucket(i) for i in range(n, 2 * n)}) <= 66


def prefill_buckets(model) -> list[tuple[int, int]]:
    """(rows, documents) of the captured prefills."""
    return sorted((rows, num_docs) for training, (rows, num_docs, *_) in model.llama.forward.graphs if not training)


def test_reused_sessions_answer_as_new_models():
    """One model answers prompts of many lengths, single and in batches; a new model answers each for comparison."""
    model = tiny_model(adapter_type="block")
    capture_passes(model)
    batches = [[tiny_example(i, length, 0, image=i % 3 == 0)]
               for i, length in enumerate((5, 60, 3, 20, 90, 480, 33, 7))]
    batches[4:4] = [mixed_examples(0), mixed_examples(0)[::-1], batches[0]]
    sessions = []
    for examples in batches:
        logits = [greedy_logits(m, examples, 12) for m in (model, tiny_model(adapter_type="block"))]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
        sessions.append(model.session)
    is_reused = [a is b for a, b in itertools.pairwise(sessions)]
    assert is_reused == [True] * 3 + [False, True, False, True, True] + [True] * 2
    assert sessions[0].replay_step and sessions[-1].replay_step
    # of the last session: a new one drops the others' captured prefills
    assert prefill_buckets(model) == [(64, 1), (128, 1), (512, 1)]


def test_a_session_serves_slightly_smaller_batches():
    """A batch of 38 gets a session of its own: two of 40 sequences would be idle, and one in 32 may be."""
    model, sessions = tiny_model(), []
    capture_passes(model)
    for n, seed in ((40, 0), (39, 100), (39, 200), (38, 300)):
        examples = [tiny_example(seed + i, 3 + i % 5, 0, image=i % 3 == 0) for i in range(n)]
        logits = [greedy_logits(m, examples, 5) for m in (model, tiny_model())]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
        sessions.append(model.session)
    assert [a is b for a, b in itertools.pairwise(sessions)] == [True, True, False]


@pytest.mark.parametrize("max_length", [199, 511, 1100])
def test_nothing_is_captured_after_warmup(max_length):
    model = tiny_model(dropout_prob=0.0)
    capture_passes(model)
    warmup(model, max_length)
    session = model.session
    buckets = [(tokens, 1) for tokens in range(64, min(max_length, 1024) + 64, 64)]
    assert prefill_buckets(model) == buckets and session.replay_step and len(model.vision.forward.graphs) == 1
    for n in (1, 63, 150):
        for image in (False, True):
            answers = [list(decode(m, [tiny_example(n, n, 0, image=image)], 3, greedy))
                       for m in (model, tiny_model(dropout_prob=0.0))]
            assert answers[0] == answers[1]
    list(decode(model, [tiny_example(0, 5, 0)], max_length - len(tiny_example(0, 5, 0).ids), greedy))
    assert model.session is session and prefill_buckets(model) == buckets


def test_warmup_without_cuda_graphs_is_short():
    model = tiny_model()
    warmup(model, 511)
    assert model.session.num_steps == 2 * 3 and not model.session.replay_step


@torch.no_grad()
def randomise_adapters_in_place(model):
    """Keeps the tensors' addresses, as loading other adapters does."""
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            parameter.normal_()


def test_padding_may_reach_beyond_the_cache():
    """Eight prompts of 61 tokens take 496 rows, the last of which would be at position 68 of a cache of 64."""
    examples = [tiny_example(i, 61 - len(tiny_example(i, 0, 0).ids), 0) for i in range(8)]
    captured = tiny_model()
    capture_passes(captured)
    for _ in range(2):  # the first prefill is not captured
        logits = greedy_logits(captured, examples, 3)
    assert prefill_buckets(captured) == [(496, 8)] and captured.session.capacity == 64
    torch.testing.assert_close(logits, greedy_logits(tiny_model(), examples, 3), rtol=1e-4, atol=1e-5)


def test_routing_is_computed_again_only_where_a_parameter_changed(monkeypatch):
    computed, compute = [], RoutingCache.compute
    monkeypatch.setattr(RoutingCache, "compute", lambda _, model: computed.append(model) or compute(model))
    model = tiny_model()
    for changes in range(3):
        for _ in range(2):
            model.routing_cache.refresh(model)
        assert len(computed) == changes + 1
        randomise_adapters_in_place(model)


def test_a_session_serves_one_answer_at_a_time_and_any_adapters():
    def start(model, seed):
        return decode(model, [tiny_example(seed, 5, 0)], 4, greedy)

    model = tiny_model()
    capture_passes(model)
    first, second = (start(model, seed) for seed in (1, 2))
    alone = [list(start(tiny_model(), seed)) for seed in (1, 2)]
    interleaved = [[a, b] for a, b in zip(first, second, strict=True)]
    assert interleaved == [[a, b] for a, b in zip(*alone, strict=True)]
    before = model.session
    abandoned, newer = (start(model, seed) for seed in (1, 2))
    next(abandoned), next(newer)
    abandoned.close(), newer.close()
    assert model.session is before
    for changed in (model, new_model := tiny_model()):  # the chatbot loads other adapters
        torch.manual_seed(1)
        randomise_adapters_in_place(changed)
    answers = [list(start(m, 1)) for m in (model, new_model)]
    assert answers[0] == answers[1] != alone[0] and model.session is before


def test_captured_prefills_and_steps_see_new_adapters():
    """They also see another scale and temperature, as the chatbot sets them."""
    def answers(model):
        return torch.stack([greedy_logits(model, [example], 5) for example in mixed_examples(0)[:2] * 2])

    model, new_model = tiny_model(), tiny_model()
    capture_passes(model)
    before = answers(model)
    graphs, session = dict(model.llama.forward.graphs), model.session
    for changed in (model, new_model):
        torch.manual_seed(1)
        randomise_adapters_in_place(changed)
        for adapter in (changed.llama.layers[0].adapter_attn, changed.vision.vit.blocks[0].norm1.adapter):
            adapter.scale.fill_(0.5), adapter.temperature.fill_(3.0)
    torch.testing.assert_close(answers(model), answers(new_model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers(model), before, rtol=1e-2)
    assert model.session is session and model.llama.forward.graphs == graphs and session.replay_step


def test_a_split_too_large_to_capture_is_halved(monkeypatch):
    eager, captured = (tiny_model(dropout_prob=0.0).train() for _ in range(2))
    capture_passes(captured)
    loss_and_gradients(captured, mixed_examples())
    init = CapturedLlamaPass.__init__

    def init_with_little_memory(self, owner, bucket, *inputs):
        if bucket[0] > 40:
            raise torch.OutOfMemoryError("none left")
        init(self, owner, bucket, *inputs)
    monkeypatch.setattr(CapturedLlamaPass, "__init__", init_with_little_memory)
    pairs, scaler = [(example, 0.5) for example in 2 * mixed_examples()], torch.amp.GradScaler("cpu", enabled=False)
    captured.vision.forward.graphs["earlier"] = None
    results = []
    for model in (eager, captured):
        model.zero_grad()
        loss, max_tokens = accumulate_with_oom_retry(model, pairs, math.inf, scaler)
        results.append(torch.cat([loss[None], *[p.grad.flatten() for p in model.parameters() if p.grad is not None]]))
    assert max_tokens < 40 and "earlier" not in captured.vision.forward.graphs  # all graphs were freed
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
