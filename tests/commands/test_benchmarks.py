"""The benchmarks at a tiny size; and their baseline, the published recipe, gives the same results as this code."""

import argparse
import io
import json
import os
import signal
from functools import partial
from importlib.util import find_spec

import pytest
import torch

import answer_first
import chat_latency
import concurrent_runs
import data_loading
import eval_throughput
import fault_cases
import faults
import scaling
import startup
import train_throughput
from lavin.generation.generate import decode
from lavin.model import pack
from published_recipe import published_answers, published_loss
from tiny import VARIANTS, greedy, mixed_examples, tiny_model
from util.data import images
from util.search.folder import add_rung, begin_record, change_record
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


def test_eval_throughput(capsys):
    rows = printed_table(eval_throughput, capsys, profile=True, batch=4, questions=8)
    assert list(rows) == ["published, fp16, batch 4, 64 tokens", *(f"ours, {bits}, --decode {decode}"
                          for bits in ("bf16", "fp8") for decode in ("generate", "score"))]


def test_chat_latency(capsys):
    rows = printed_table(chat_latency, capsys, profile=True, tokens=20, repeats=1)
    bits = ["bf16", "fp8", *["4bit"] * bool(find_spec("bitsandbytes"))]
    assert list(rows) == ["published, fp16", *(f"ours, {name}" for name in bits)]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lite_memory(capsys, bits):
    """It runs, and the number of bytes counted on the meta device is the number of bytes allocated."""
    pytest.importorskip("bitsandbytes")
    import lite_memory
    printed_table(lite_memory, capsys, bits=bits, precision="auto", steps=1)
    counted, allocated, unquantized = (
        lite_memory.weight_bytes(lite_memory.random_lavin("tiny", device, torch.float32, bits=model_bits))
        for model_bits, device in ((bits, "meta"), (bits, "cpu"), ("16bit", "meta")))
    assert counted == allocated < 0.75 * unquantized


def test_scaling(capsys, monkeypatch, tmp_path):
    """Every row is measured in this process, without torchrun."""
    flags = {"size": "tiny", "device": "cpu", "steps": 2, "repeats": 1, "warm_up": 1, "questions": 8}

    def measure(args, processes, shared):
        scaling.work(argparse.Namespace(**flags, out=str(tmp_path / "out.pt"), shared=1))
        return torch.load(tmp_path / "out.pt")
    monkeypatch.setattr(scaling, "measure", measure)
    scaling.main(argparse.Namespace(**flags, processes=[1, 2]))
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["1, a model each", "2, a model each", "one model on 2"]
    assert all([float(cell) for cell in row if cell.strip()][-3:] == [0, 0, 0] for row in (row[1:] for row in rows))


def test_concurrent_runs_compares_wall_seconds(capsys, monkeypatch):
    """Of the same runs, after one that is not measured."""
    calls = []
    monkeypatch.setattr(concurrent_runs, "write_world", lambda *_: None)
    monkeypatch.setattr(concurrent_runs, "run_all", lambda root, args, out, jobs, runs: (
        calls.append((out, jobs, runs)), (60.0 / jobs, 10.0 * jobs))[1])
    for gpus, runs, words in ((4, None, "at once, on 1 each"), (4, 2, "at once, on 2 each"), (1, None, "at once")):
        calls.clear()
        concurrent_runs.main(argparse.Namespace(size="tiny", device="cpu", gpus=gpus, runs=runs))
        n = runs or max(2, gpus)
        assert calls == [("warm", 1, 1), ("jobs1", 1, n), (f"jobs{n}", n, n)]
        *_, row = capsys.readouterr().out.splitlines()
        assert row.split("  ")[0] == f"{n} runs {words}" and row.split()[-3:] == [f"{60 / n:.1f}", f"{n:.2f}",
                                                                                 f"{10 * n:.1f}"]


def test_many_questions_are_about_no_picture_of_validation_and_test(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(answer_first, "MOST", 30)
    answer_first.write_many(tmp_path / "many")
    problems = json.loads((tmp_path / "many" / "problems.json").read_text())
    by_split = {split: {qid for qid in problems if problems[qid]["split"] == split}
                for split in ("train", "val", "test")}
    assert {split: len(qids) for split, qids in by_split.items()} == {"train": 90, "val": 200, "test": 400}
    train, val, test = ({(tmp_path / "many" / "images" / split / qid / "image.png").read_bytes() for qid in qids}
                        for split, qids in by_split.items())
    assert not train & (val | test) and len({problems[qid]["topic"] for qid in by_split["train"]}) == 3


def test_startup():
    deterministic = torch.are_deterministic_algorithms_enabled()
    *parts, whole = startup.measure(argparse.Namespace(size="tiny", device="cpu", bits="16bit", steps=1)).values()
    torch.use_deterministic_algorithms(deterministic)
    assert len(parts) == 4 and min(parts) > 0 and sum(parts) == pytest.approx(whole)


def test_data_loading(capsys, monkeypatch):
    """Every row is measured in this process. Pictures are decoded without a cache, and in the first run with it."""
    decoded, load_image = [], images.load_image
    monkeypatch.setattr(images, "load_image", lambda *args: decoded.append(args) or load_image(*args))

    def measure(what, root, cache, n, load):
        decoded.clear()
        monkeypatch.setenv("LAVIN_CACHE", cache)
        monkeypatch.setattr("sys.stdin", io.StringIO())
        data_loading.work(load, root)
        seconds, cpu_seconds, gib = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert seconds > 0 and cpu_seconds > 0 and gib > 0.01
        return {"what": what, "decoded": str(len(decoded))}
    monkeypatch.setattr(data_loading, "measure", measure)
    data_loading.main(argparse.Namespace(size="small", processes=2, folder=None))
    numbers = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-9:]]
    assert numbers == ["10", "10", "0", "10", "10", "0", "4", "4", "0"]


def test_search_proof_counts_what_was_found(monkeypatch):
    """With a verdict that always finds something, the promise is broken."""
    pytest.importorskip("optuna")
    import search_proof
    flags = argparse.Namespace(studies=2, seed=0)
    (_, holds, share), *_, (_, _, found) = search_proof.prove_simulation(flags)
    assert holds and share == "100.0% of 2"
    monkeypatch.setattr(search_proof, "verdict", lambda rows: argparse.Namespace(found=True))
    assert search_proof.prove_simulation(flags)[0][1:] == (False, "0.0% of 2")


def write_finished_trial(study, number: int, right: int) -> None:
    """That answers the first `right` of 100 questions."""
    folder = study / "trials" / f"{number:03d}"
    begin_record(folder, 1, values={})
    add_rung(folder, 9, {"correct": {"Avg": right}, "counts": {"Avg": 100}})
    change_record(folder, state="COMPLETE")
    (folder / "rungs" / "9").mkdir(parents=True)
    (folder / "rungs" / "9" / "generations.jsonl").write_text("".join(json.dumps(
        {"qid": str(i), "prediction": int(i < right), "answer": 1}) + "\n" for i in range(100)))


def test_search_proof_compares_the_best_of_both_studies(tmp_path):
    pytest.importorskip("optuna")
    import search_proof
    for study, scores in {"killed": (50, 60), "similar": (62, 40), "better": (50, 80)}.items():
        for number, right in enumerate(scores):
            write_finished_trial(tmp_path / study, number, right)
    _, same, words = search_proof.same_best(tmp_path / "killed", tmp_path / "similar")
    assert same and words.startswith("60.0 and 62.0 % of 100 questions: -2.0 points")
    assert not search_proof.same_best(tmp_path / "killed", tmp_path / "better")[1]


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


def fail(error: BaseException):
    raise error


ALPACA = "data/alpaca_data.json"
FAULT_CASES = {
    faults.LINE: [partial(fault_cases.instead, ALPACA, os.mkdir), partial(fault_cases.cut, ALPACA, 0.5)],
    faults.SAME: [partial(fault_cases.write, "data/other.json", b"x")],
    faults.CHANGED: [partial(fault_cases.set_json, ALPACA, (1, "output"), "South.")],
    faults.TRACEBACK: [partial(fail, error) for error in (KeyError("x"), SystemExit(1), OSError(2, "two\nlines"))],
    faults.CRASH: [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: open(os.mkfifo("pipe") or "pipe"),
                   partial(fail, MemoryError())]}


def test_faults_are_classified(tmp_path, monkeypatch):
    """Real cases of a command, and deliberate bugs."""
    monkeypatch.setattr(faults, "LIMIT_SECONDS", 1)
    (tmp_path / "world" / "data").mkdir(parents=True)
    (tmp_path / "world" / ALPACA).write_text(json.dumps([{"instruction": f"Name {i}.", "output": "North."}
                                                         for i in range(3)]))
    cases = [faults.Case(kind, str(i), "prepare", change)
             for kind, changes in FAULT_CASES.items() for i, change in enumerate(changes)]
    run = partial(faults.run_all, tmp_path / "world", tmp_path)
    (_, whole), = run([faults.Case("reference", "", "prepare")], {}, 1)
    for case, outcome in run(cases, {"prepare": whole.words}, 2):
        assert outcome.kind == case.kind, outcome
        assert outcome.wrong == (case.kind not in (faults.LINE, faults.SAME))
    assert faults.row("x", [whole, outcome])[:2] == ["x", 2]
