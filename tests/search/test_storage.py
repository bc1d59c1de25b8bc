"""A study whose files were torn, by a full disk or a power failure: it goes on, or one line says what to do."""

import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("optuna")
from user_errors import error_message
from util.search import study as study_module
from util.search.folder import LOG, RECORD, STUDY, add_rung, begin_record, load_record, read_records
from util.search.locks import claim
from util.search.space import Space
from util.search.storage import JOURNAL, Journal, last_line
from util.search.study import Study, run_trial

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:The reported value")
SPACE = Space({"blr": {"kind": "float", "low": 0.0, "high": 1.0, "default": 0.5},
               "dropout_prob": {"kind": "float", "low": 0.0, "high": 0.9, "default": 0.1}},
              [{}, {"blr": 0.25}], "space.json")
SETTINGS = {"trials": 6, "pruner": "asha", "questions": 100, "confirm": 1, "seeds": 2, "steps_per_epoch": 10,
            "space": {"parameters": SPACE.parameters, "enqueue": SPACE.enqueue}, "flags": {"epochs": 9, "seed": 0}}


def open_study(folder: Path) -> Study:
    return Study(folder, SPACE, SETTINGS, None)


def reach(trial, epochs: int) -> float:
    """Trains nothing, but keeps what train.py would refuse to change: the flags of the first time."""
    path = trial.folder / "trained_with.json"
    if path.is_file():
        assert json.loads(path.read_text()) == trial.values
    path.write_text(json.dumps(trial.values))
    correct = round(90 - 80 * abs(trial.values["blr"] - 0.25))
    return add_rung(trial.folder, epochs, {"correct": {"Avg": correct}, "counts": {"Avg": 100}})


def work(folder: Path, n: int = 99) -> Study:
    study = open_study(folder)
    for _ in range(n):
        trial = study.take()
        if trial is None:
            break
        run_trial(study, trial, reach)
    return study


def check(study: Study) -> None:
    """All trials have ended, in the folder as in the storage."""
    records = read_records(study.folder)
    assert list(records) == [f"{i:03d}" for i in range(6)]
    assert {trial.number: trial.state.name for trial in study.trials()} == {
        int(name): record["state"] for name, record in records.items()}
    assert Counter(record["state"] for record in records.values())["RUNNING"] == 0


@pytest.fixture
def begun(tmp_path):
    """A study of six trials, of which three have ended."""
    work(tmp_path / "S", 3)
    return tmp_path / "S"


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - n_bytes)


def append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


# --- The journal ---

@pytest.mark.parametrize("damage", [
    lambda path: cut(path, 30), lambda path: cut(path, 1), lambda path: append(path, bytes(100_000)),
    lambda path: append(path, b'{"op_code":4,"wor'), lambda path: append(path, b'{"op_code":4,\0\0\0\0\n'),
    lambda path: append(path, b"\n")], ids=["30 bytes", "1 byte", "NULs", "half a record", "NULs inside", "empty line"])
def test_a_torn_last_record_is_left_out_and_the_study_goes_on(begun, damage, capsys):
    damage(begun / JOURNAL)
    study = work(begun)
    said = capsys.readouterr().out
    assert said == (f"{begun / JOURNAL}: the last record is torn, as by a full disk or a power failure, and is left "
                    "out\n")
    check(study)
    open_study(begun)
    assert capsys.readouterr().out == ""


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_journal_that_is_cut_anywhere_within_its_last_records_loses_no_trial(tmp_path_factory, data):
    """Trials that are taken up again are trained with the flags that they had."""
    folder = tmp_path_factory.mktemp("S")
    work(folder, 3)
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    tail = sum(map(len, lines[-12:]))  # of the last trial or two
    cut(folder / JOURNAL, data.draw(st.integers(1, tail)))
    check(work(folder))


def test_a_trial_that_the_journal_has_lost_keeps_the_flags_of_its_folder(begun):
    """Two workers had taken a trial each. The journal is cut before the second one's parameters, or before the whole
    trial, and the first one ends before the second is taken up, so that the sampler would draw others."""
    for kept in (0, 1, 2):
        study = open_study(begun)
        first, before = study.take(), (begun / JOURNAL).stat().st_size
        second = study.take()
        records = (begun / JOURNAL).read_bytes()[before:].splitlines(keepends=True)
        for trial in (first, second):
            (trial.folder / "trained_with.json").write_text(json.dumps(trial.values))
            os.close(trial.lock)  # its worker was killed
        os.truncate(begun / JOURNAL, before + sum(map(len, records[:kept])) + 9)
        study = open_study(begun)
        run_trial(study, study.take(), lambda trial, epochs: 99.0)  # the best so far
        again = study.take()
        assert (again.number, again.values, again.optuna.params) == (second.number, second.values, second.optuna.params)
        os.close(again.lock)
        if kept < 2:
            shutil.rmtree(begun)
            work(begun, 3)
    check(work(begun))


def test_a_record_that_tears_while_workers_run_is_left_out_before_the_next_one(begun):
    """A worker that is open appends after another one, which had no space left."""
    study = open_study(begun)
    append(begun / JOURNAL, b'{"op_code":5,"worker_id":"gone"')
    trial = study.take()
    run_trial(study, trial, reach)
    assert all(json.loads(line)["op_code"] >= 0 for line in (begun / JOURNAL).read_text().splitlines())
    check(work(begun))


def test_workers_that_repair_a_journal_at_once_lose_no_record(tmp_path):
    path = tmp_path / JOURNAL
    journals, barrier = [Journal(tmp_path) for _ in range(6)], threading.Barrier(6)
    journals[0].append_logs([{"op_code": 0, "worker": -1}])
    append(path, b'{"op_code": 5')

    def write(number: int) -> None:
        barrier.wait()
        for i in range(5):
            journals[number].append_logs([{"op_code": i, "worker": number}, {"op_code": i, "worker": number}])

    workers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = Counter((record["worker"], record["op_code"]) for record in Journal(tmp_path).read_logs(0))
    assert found == Counter({(number, i): 2 for number in range(6) for i in range(5)}) + Counter([(-1, 0)])


@pytest.mark.parametrize("line", [b'{"op_code":5,"wor{"op_code":4}\n', bytes(40) + b"\n", b"3\n", b"{}\n", b"\xff\n",
                                  b"[" * 100_000 + b"\n"], ids=["glued", "NULs", "3", "{}", "no UTF-8", "deep"])
def test_a_damaged_record_in_the_middle_is_one_line(begun, line):
    lines = (begun / JOURNAL).read_bytes().splitlines(keepends=True)
    study = open_study(begun)
    (begun / JOURNAL).write_bytes(b"".join([*lines[:7], line, *lines[8:]]))
    message = error_message(open_study, begun)
    assert message.startswith(f"{begun / JOURNAL} is damaged after record 7 (")
    assert message.endswith("): put back a copy of it, or search in another folder with --study")
    append(begun / JOURNAL, line + lines[-1])
    assert f"{begun / JOURNAL} is damaged after record" in error_message(study.take)  # also in the midst of a study


@pytest.mark.parametrize("old, new", [
    (b'"op_code":0', b'"op_code":99'), (b'"op_code":4', b'"op_code":"x"'), (b'"study_name"', b'"stud|_name"'),
    (b'\\"step\\"', b'\\"s|ep\\"')])
def test_records_that_make_no_sense_are_one_line(begun, old, new):
    """A flipped bit, for instance, makes such records."""
    content = (begun / JOURNAL).read_bytes()
    assert old in content
    (begun / JOURNAL).write_bytes(content.replace(old, new, 1))
    message = error_message(open_study, begun)
    assert message.startswith(f"{begun / JOURNAL} is damaged (") and message.endswith("folder with --study")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_journal_is_not_opened(begun, make):
    (begun / JOURNAL).unlink()
    make(begun / JOURNAL)
    assert error_message(open_study, begun).startswith(f"{begun / JOURNAL} is no file: ")


def test_a_journal_that_was_lost_is_one_line(begun):
    (begun / JOURNAL).write_bytes(bytes(999))
    assert error_message(open_study, begun) == (f"{begun / JOURNAL} does not hold the study of its folder: put back a "
                                                "copy of it, or search in another folder with --study")


@given(lines=st.lists(st.binary(max_size=9000).map(lambda line: line.replace(b"\n", b"")), max_size=4),
       is_ended=st.booleans())
@example(lines=[b"one", bytes(10_000)], is_ended=False)
@example(lines=[bytes(10_000)], is_ended=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_last_line_of_a_file_is_found(tmp_path, lines, is_ended):
    content = b"\n".join(lines) + (b"\n" if is_ended else b"")
    (tmp_path / "file").write_bytes(content)
    expected = content.removesuffix(b"\n").split(b"\n")[-1]
    expected += b"\n" if content.endswith(b"\n") else b""
    with open(tmp_path / "file", "rb") as file:
        assert last_line(file) == (len(content) - len(expected), expected)


# --- Other files ---

DAMAGE = [b"", b'{"state": "RUN', bytes(200)]


@pytest.mark.parametrize("content", DAMAGE)
def test_a_torn_record_of_a_trial_is_named_with_what_to_do(begun, content, monkeypatch):
    study, path, locks = open_study(begun), begun / "trials" / "003" / RECORD, []
    trial = study.take()  # number 3
    os.close(trial.lock)  # its worker was killed
    path.write_bytes(content)
    monkeypatch.setattr(study_module, "claim", lambda path: locks.append(claim(path)) or locks[-1])
    message = error_message(study.take)
    os.close(locks[-1])  # as the operating system does
    assert message.startswith(f"{path} is not valid JSON")
    assert "remove it: a trial that goes on writes it again" in message
    assert error_message(read_records, begun) == message
    path.unlink()
    check(work(begun))


def test_a_torn_record_does_not_end_its_trial(begun):
    study = open_study(begun)
    trial = study.take()

    def tear(trial, epochs):
        (trial.folder / RECORD).write_bytes(b"")
        return reach(trial, epochs)

    assert "is not valid JSON" in error_message(run_trial, study, trial, tear)
    assert study.is_running(trial.number)


def test_a_base_whose_record_was_removed_is_named(begun):
    from util.search.confirm import plan
    from util.search.summary import StudyReport

    (begun / "trials" / "000" / RECORD).unlink()
    for function in (StudyReport, lambda study: plan(study, 1, 1, 1)):
        assert error_message(function, begun).startswith(f"{begun / 'trials' / '000' / RECORD} is missing")


@pytest.mark.parametrize("content", DAMAGE)
def test_a_torn_study_file_is_named_with_what_to_do(begun, content):
    (begun / STUDY).write_bytes(content)
    message = error_message(open_study, begun)
    assert message.startswith(f"{begun / STUDY} is not valid JSON")
    assert message.endswith("put back a copy of it, or search in another folder with --study")


def test_a_log_that_was_lost_stops_nothing(begun):
    folder = begun / "trials" / "009"
    begin_record(folder, 1, values={})
    (folder / LOG).write_bytes(bytes(500))
    assert read_records(begun)["009"]["seconds"] == 0
    (folder / RECORD).write_text(json.dumps({**load_record(folder), "since": 1000.0}))
    assert read_records(begun)["009"]["seconds"] > 1e9
    (folder / LOG).unlink()
    assert read_records(begun)["009"]["seconds"] == 0


# --- Locks ---

def test_a_lock_that_is_a_link_is_refused_and_its_file_stays(tmp_path):
    (tmp_path / "mine").write_text("precious")
    for target in ("mine", "nothing"):
        (tmp_path / f"{target}.lock").symlink_to(tmp_path / target)
        assert error_message(claim, tmp_path / f"{target}.lock").endswith("must be a file of its own: remove it")
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "nothing").exists()
