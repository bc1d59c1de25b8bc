"""The benchmarks at a tiny size; and their baseline, the published recipe, gives the same results as this code."""

import argparse
from importlib.util import find_spec

import pytest
import torch

from benchmarks import chat_latency, eval_throughput, peers, scaling, train_throughput
from benchmarks.published_recipe import published_answers, published_loss
from benchmarks.transformers_llama import generate, transformers_llama
from lavin.generation.generate import decode
from lavin.model import pack
from tiny import VARIANTS, greedy, mixed_examples, tiny_model
from util.training.throughput import frozen_weights, step_flops


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_published_recipe_gives_the_same_loss(adapter_type, visual_type):
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type, llama={"n_kv_heads": None})
    batch = pack(mixed_examples())
    torch.testing.assert_close(published_loss(model, mixed_examples(), 24), model(batch) / len(batch.targets),
                               atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter_type, visual_type", VARIANTS)
def test_published_generation_gives_the_same_answers(adapter_type, visual_type):
    model = tiny_model(adapter_type=adapter_type, visual_adapter_type=visual_type, llama={"n_kv_heads": None})
    examples = mixed_examples(answer=0)
    published = published_answers(model, examples, 5)
    answers = torch.stack(list(decode(model, examples, 5, greedy)), 1)
    for row, example, answer in zip(published, examples, answers, strict=True):
        start = 1 + len(example.ids)
        assert row[start:start + 5].tolist() == answer.tolist()


def printed_table(benchmark, capsys, **flags) -> dict[str, list[str]]:
    """Run a benchmark; returns the rows of the last table that it prints, by their first column."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark.main(argparse.Namespace(size="tiny", device="cpu", **flags))
    torch.use_deterministic_algorithms(deterministic)
    lines = capsys.readouterr().out.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("what"))
    return {line.split("  ")[0]: line.split("  ")[1:] for line in lines[start + 2:]}


def test_train_throughput(capsys):
    rows = printed_table(train_throughput, capsys, samples=3, steps=1, warm_up=1, profile=False)
    assert list(rows) == ["published recipe, fp16", "ours, plain, fp16", "ours, fp16",
                          "ours, bf16, 512 tokens each", "", "ours, bf16", "ours, fp8"]
    assert rows["published recipe, fp16"][-1].strip() == "1"


def test_peers_says_what_is_not_installed_and_compares_the_rest(capsys, monkeypatch):
    """Ratios are to the fastest of theirs with the same precision."""
    monkeypatch.setitem(peers.ROWS, "  of a package that is not there", ("bf16", ("no_such_package",), None))
    measured = {"transformers, peft: padded, 8 x 4": 50.0, "  packed": 80.0, "ours, bf16, text only": 100.0}
    in_process = peers.in_process
    monkeypatch.setattr(peers, "in_process", lambda args, name: {"samples/s": measured[name]} if name in measured
                        else in_process(args, name))
    rows = printed_table(peers, capsys, only=None, samples=2, steps=1, warm_up=1, rows=["packed", "padded", "package",
                                                                                         "bf16, text"])
    assert [row[-1].strip() for row in rows.values()] == ["0.625", "1", "1.25"]


@pytest.mark.parametrize("name", ["ours, bf16, text only", "ours, fp8, with pictures"])
def test_peers_measures_our_rows(name):
    args = argparse.Namespace(size="tiny", device=torch.device("cpu"), dtype=torch.float32, samples=2, steps=1,
                              warm_up=1)
    numbers = peers.measure(args, name)
    assert numbers["samples/s"] == pytest.approx(2000 / numbers["ms a step"])


def test_eval_throughput(capsys):
    rows = printed_table(eval_throughput, capsys, profile=True, batch=4, questions=8)
    assert list(rows) == ["published, fp16, batch 4, 64 tokens", "transformers, static cache, bf16, 5 tokens",
                          *(f"ours, {bits}, --decode {decode}"
                          for bits in ("bf16", "fp8") for decode in ("generate", "score"))]


def test_chat_latency(capsys):
    rows = printed_table(chat_latency, capsys, profile=True, tokens=20, repeats=1)
    bits = ["bf16", "fp8", *["4bit"] * bool(find_spec("bitsandbytes"))]
    assert list(rows) == ["published, fp16", "transformers, static cache, bf16", *(f"ours, {name}" for name in bits)]


def test_generate_of_transformers_answers_padded_prompts_as_it_answers_each_alone():
    torch.manual_seed(0)
    model = transformers_llama("tiny", torch.device("cpu"), torch.float32)
    torch.nn.init.normal_(model.lm_head.weight)  # so that answers differ
    examples = mixed_examples(answer=0)
    alone = [generate(model, [example], 6)[0].tolist() for example in examples]
    assert generate(model, examples, 6).tolist() == alone
    assert len(set(map(tuple, alone))) == len(examples)


def test_the_times_of_an_answer_are_those_of_its_new_tokens(monkeypatch):
    def times_of_answer(times):
        assert len(times) == 1 + 5 and times == sorted(times)  # of the start and of each token
    with monkeypatch.context() as patched:
        patched.setattr(chat_latency, "first_and_rate", times_of_answer)
        model = transformers_llama("tiny", torch.device("cpu"), torch.float32)
        chat_latency.transformers_answer(model, mixed_examples()[0], 5)
    skipped = chat_latency.SKIPPED_TOKENS
    times = [10.0, *(10.5 + 0.1 * i for i in range(skipped)), *(20.0 + 0.25 * (1 + i) for i in range(8))]
    times[skipped] = 20.0  # the last of the tokens that are not counted
    assert chat_latency.first_and_rate(times) == (0.5, 4.0)


def test_scaling(capsys, monkeypatch, tmp_path):
    """Every row is measured in this process, without torchrun."""
    flags = {"size": "tiny", "device": "cpu", "steps": 2, "repeats": 1, "warm_up": 1, "questions": 8}

    def measure(args, processes, shared):
        scaling.work(argparse.Namespace(**flags, out=str(tmp_path / "out.pt"), shared=1))
        return torch.load(tmp_path / "out.pt")
    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "EFFECTIVE_BATCH", 3)
    scaling.main(argparse.Namespace(**flags, processes=[1, 2]))
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["1, a model each", "2, a model each", "one model on 2"]
    assert all([float(cell) for cell in row if cell.strip()][-3:] == [0, 0, 0] for row in (row[1:] for row in rows))


def test_samples_depend_only_on_their_seed():
    """Other random numbers, such as dropout masks, must not matter: all processes must see the same samples."""
    model = train_throughput.random_lavin("tiny", "cpu", torch.float32)
    draws = []
    for _ in range(2):
        examples = train_throughput.random_examples(model, 6, 1)
        draws.append([*examples, *eval_throughput.questions(model, 6, 1)[1].values()])
        draws[-1] += train_throughput.redrawn(model, draws[-1][:6], 2)
        torch.rand(1)
    for a, b in zip(*draws, strict=True):
        a, b = (x if isinstance(x, torch.Tensor) else x.image for x in (a, b))
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert sum(isinstance(x, torch.Tensor) or x.image is not None for x in draws[0]) > 4


def test_flops_of_the_frozen_layers():
    """4 x frozen parameters x tokens, by hand for the tiny size: 2 LLaMA layers of width 64, hidden 192."""
    model = train_throughput.random_lavin("tiny", "cpu", torch.float32)
    weights = frozen_weights(model)
    assert weights.layers == 2 * (4 * 64 * 64 + 3 * 64 * 192) and weights.head == 64 * 320
    examples = train_throughput.random_examples(model, 1, 0, full=True)
    batch = pack(examples)
    num_tokens, num_targets = len(batch.ids), len(batch.targets)
    assert step_flops(weights, examples) == 4 * (
        weights.layers * num_tokens + weights.head * num_targets + weights.vit * weights.positions)
