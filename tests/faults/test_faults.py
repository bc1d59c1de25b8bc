"""The fault bench notices wrong answers to faults, and the search proof notices broken promises."""

import argparse
import json
import os
import signal
import sys
from functools import partial

import pytest

from tests.faults import cases, file_cases, inputs, machine
from util.search.folder import add_rung, begin_record, change_record


def fail(error: BaseException):
    raise error


def wait_for_a_writer() -> None:
    os.mkfifo("pipe")
    open("pipe")


ALPACA = "data/alpaca_data.json"
FAULT_CASES: dict[str, list] = {
    inputs.LINE: [partial(cases.instead, ALPACA, os.mkdir), partial(cases.cut, ALPACA, 0.5)],
    inputs.SAME: [partial(cases.write, "data/other.json", b"x")],
    inputs.CHANGED: [partial(cases.set_json, ALPACA, (1, "output"), "South.")],
    inputs.TRACEBACK: [partial(fail, error) for error in (KeyError("x"), SystemExit(1), OSError(2, "two\nlines"))],
    inputs.CRASH: [lambda: os.kill(os.getpid(), signal.SIGKILL), wait_for_a_writer,
                   partial(fail, MemoryError())]}


@pytest.fixture
def run(tmp_path):
    """Runs cases of the command that needs the smallest world."""
    (tmp_path / "world" / "data").mkdir(parents=True)
    (tmp_path / "world" / ALPACA).write_text(json.dumps([{"instruction": f"Name {i}.", "output": "North."}
                                                         for i in range(3)]))
    return partial(inputs.run_all, tmp_path / "world", tmp_path)


def test_faults_are_classified(run, monkeypatch):
    """Real cases of a command, and deliberate bugs."""
    monkeypatch.setattr(inputs, "LIMIT_SECONDS", 1)
    bad = [cases.Case(kind, str(i), "prepare", change)
           for kind, changes in FAULT_CASES.items() for i, change in enumerate(changes)]
    (_, whole), = run([cases.Case("reference", "", "prepare")], {}, 1)
    for case, outcome in run(bad, {"prepare": whole.words}, 2):
        assert outcome.kind == case.kind, outcome
        assert outcome.wrong == (case.kind not in (inputs.LINE, inputs.SAME))
    assert inputs.row("x", [whole, outcome])[:2] == ["x", 2]


OTHER_TEXT = file_cases.in_json(1, "output")


@pytest.mark.parametrize("expected, words, change, options", [
    (inputs.ANEW, "", partial(file_cases.exchange, ALPACA, OTHER_TEXT), {"anew": "prepare"}),
    (inputs.ANEW, "", partial(file_cases.exchange, ALPACA, OTHER_TEXT), {"anew": "prepare", "told": "records"}),
    (inputs.LINE, "", partial(file_cases.exchange, ALPACA, lambda old: bytes(len(old))), {"anew": "prepare"}),
    (inputs.CHANGED, "goes on", partial(file_cases.exchange, ALPACA, OTHER_TEXT), {"anew": cases.REFUSED}),
    (inputs.CHANGED, "without a word", partial(file_cases.exchange, ALPACA, OTHER_TEXT),
     {"anew": "prepare", "told": "another file"}),
    (inputs.CHANGED, "", lambda: None, {"anew": "prepare"}),
    (inputs.CHANGED, "a user's file", lambda: os.truncate(file_cases.USERS_FILE, 0), {}),
    (inputs.CHANGED, "a user's file", lambda: os.unlink(file_cases.USERS_FILE), {"anew": "prepare"})])
def test_an_exchanged_file_must_be_told_or_read(run, monkeypatch, expected, words, change, options):
    """A user's file must stay, too."""
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # as in a process that pytest does not watch
    (_, whole), = run([cases.Case("reference", "", "prepare")], {}, 1)
    (_, outcome), = run([cases.Case("x", "x", "prepare", change, **options)], {"prepare": whole.words}, 1)
    assert outcome.kind == expected and words in outcome.words


def test_every_exchange_keeps_size_and_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, (7, 7))
    file_cases.exchange(str(path), lambda old: b"xyz")
    assert path.read_bytes() == b"xyz" and path.stat().st_mtime == 7
    for make in (lambda old: old, lambda old: old + b"x"):
        with pytest.raises(AssertionError):
            file_cases.exchange(str(path), make)
    with pytest.raises(AssertionError):  # a part of it by which it is known
        file_cases.exchange(str(path), lambda old: b"abc", keeps_samples=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_runs_take_signals_that_a_shell_or_nohup_lets_the_bench_ignore(tmp_path, monkeypatch, number):
    """A bench in the background would else wait for ever for a run to be stopped."""
    def fault(_):
        ending = machine.run(tmp_path, "-c",
                             f"import signal; print(signal.getsignal({int(number)}) == signal.SIG_IGN)")
        yield machine.Check(ending.out == "False\n", "", ending)

    monkeypatch.setattr(machine, "build", lambda *_: None)
    monkeypatch.setattr(machine, "FAULTS", {"x": fault})
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert machine.bench_machine()[0][0][1:3] == [1, 1]
    finally:
        signal.signal(number, before)


def test_search_proof_counts_what_was_found(monkeypatch):
    """The promise is broken with a verdict that always finds something."""
    pytest.importorskip("optuna")
    from tests.faults import search_proof
    flags = argparse.Namespace(studies=2, seed=0)
    for found, expected in ((False, (True, "0.0% of 2")), (True, (False, "100.0% of 2"))):
        monkeypatch.setattr(search_proof, "verdict", lambda rows, found=found: argparse.Namespace(found=found))
        assert search_proof.prove_simulation(flags)[0][1:] == expected


def write_finished_trial(study, number: int, right: int) -> None:
    """The trial answers the first `right` of 100 questions rightly."""
    folder = study / "trials" / f"{number:03d}"
    begin_record(folder, 1, values={})
    add_rung(folder, 9, {"correct": {"Avg": right}, "counts": {"Avg": 100}})
    change_record(folder, state="COMPLETE")
    (folder / "rungs" / "9").mkdir(parents=True)
    (folder / "rungs" / "9" / "generations.jsonl").write_text("".join(json.dumps(
        {"qid": str(i), "prediction": int(i < right), "answer": 1}) + "\n" for i in range(100)))


def test_search_proof_compares_the_best_of_both_studies(tmp_path):
    pytest.importorskip("optuna")
    from tests.faults import search_proof
    for study, scores in {"killed": (50, 60), "similar": (62, 40), "better": (50, 80)}.items():
        for number, right in enumerate(scores):
            write_finished_trial(tmp_path / study, number, right)
    _, same, words = search_proof.same_best(tmp_path / "killed", tmp_path / "similar")
    assert same and words.startswith("60.0 and 62.0 % of 100 questions: -2.0 points")
    assert not search_proof.same_best(tmp_path / "killed", tmp_path / "better")[1]
