"""Whenever a process or its machine dies, the disk holds whole files, and nothing goes before its successor is there.

The folder is looked at before each change of a file, as a process that is killed there would leave it.
"""

import io
import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

import eval as evaluation
import eval_mme
import train
from forked import in_child
from killed import stop_after
from lavin.runtime import signals
from lavin.runtime.files import atomic_write, write_json, write_json_lines, write_text
from states import State, watched
from tiny_runs import run_flags, write_run
from tools import export_hf
from util.search.confirm import FreshRun, train_and_score
from util.training.trainer import Trainer

# --- One file ---

@pytest.fixture
def calls(monkeypatch):
    """The list of what the process asks of the disk: (fsync, inode, size then) and (replace, inode)."""
    done, fsync = [], os.fsync

    def synced(descriptor):
        status = os.fstat(descriptor)
        done.append(("fsync", status.st_ino, status.st_size))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", synced)
    for move in (os.replace, os.rename):
        def moved(source, target, *args, move=move, **kwargs):
            done.append(("replace", os.stat(source).st_ino))
            move(source, target, *args, **kwargs)
        monkeypatch.setattr(os, move.__name__, moved)
    return done


def write_bytes(path: Path) -> None:
    with atomic_write(path) as tmp_path:
        tmp_path.write_bytes(b"x" * 100_000)


@pytest.mark.parametrize("write", [
    write_bytes, lambda path: write_text(path, "new"), lambda path: write_json(path, [1]),
    lambda path: write_json_lines(path, [1, 2])])
def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, calls, write):
    """A machine that loses power leaves the old file or the new one; after the write it is the new one."""
    path = tmp_path / "file"
    path.write_text("old")
    write(path)
    new = path.stat()
    assert [call[:2] for call in calls] == [("fsync", new.st_ino), ("replace", new.st_ino),
                                            ("fsync", tmp_path.stat().st_ino)]
    assert calls[0][2] == new.st_size > 0


def test_a_file_in_a_new_folder_is_written_as_safely(tmp_path, calls):
    write_json(tmp_path / "a" / "b" / "file", 1)
    assert [call[0] for call in calls] == ["fsync", "replace", "fsync"]
    assert calls[-1][1] == (tmp_path / "a" / "b").stat().st_ino


def test_processes_that_write_one_file_at_once_do_not_meet(tmp_path, monkeypatch):
    """Another process of this machine, and one of another machine that has the same process id."""
    path = tmp_path / "file"
    with atomic_write(path) as tmp_path_of_this:
        tmp_path_of_this.write_text("this")
        assert in_child(lambda: write_text(path, "another")).status == 0 and path.read_text() == "another"
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
            write_text(path, "elsewhere")
        assert path.read_text() == "elsewhere"
    assert path.read_text() == "this" and list(tmp_path.iterdir()) == [path]


# --- Training ---

def saved(state: State) -> list[tuple[int, int]]:
    """Epochs and steps that the checkpoints go on from. Raises an error where one is not whole."""
    return sorted(place(content) for name, content in state.items() if name.endswith(".pth"))


@cache
def place(checkpoint: bytes) -> tuple[int, int]:
    content = torch.load(io.BytesIO(checkpoint), weights_only=True)
    record = content["record"]
    return (record["epoch"], len(record["steps"])) if record else (content["epoch"] + 1, 0)


def entries(state: State, name: str) -> list[dict]:
    return [json.loads(line) for line in state.get(name, b"").decode().splitlines()]


@pytest.fixture(scope="module")
def training(base, scienceqa, tmp_path_factory) -> list[State]:
    """The states of a run of three epochs of twelve steps, of which one checkpoint is kept: with checkpoints in the
    middle of epochs, and stopped in the second."""
    folder = tmp_path_factory.mktemp("training") / "run"
    flags = run_flags(base, scienceqa, folder, "--batch_size", "1", "--keep_last", "1")
    often = train.get_args_parser().parse_args([*flags, "--save_every_minutes", "1e-9"])
    with watched(folder) as states:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped):
            stop_after(patch, 15)
            train.main(often)
        train.main(train.get_args_parser().parse_args(flags))
    assert list(states[-1]) == ["checkpoint-2.pth", "config.json", "log.txt", "metrics.jsonl", "recipe.json"]
    return states


def test_the_recipe_is_the_first_file_of_a_run_and_stays(training):
    first = next(state for state in training if state)
    assert list(first) == ["recipe.json"]
    assert {state["recipe.json"] for state in training if state} == {first["recipe.json"]}


def test_what_was_trained_is_in_a_whole_checkpoint_from_then_on(training):
    """No checkpoint goes before a later one is whole."""
    places = [max(saved(state), default=(0, 0)) for state in training]
    assert places == sorted(places) and places[-1] == (3, 0)
    assert {(0, step) for step in range(1, 12)} | {(1, 0), (2, 0)} <= set(places)


def test_a_checkpoint_comes_after_its_configuration_and_its_records(training):
    """A process that goes on from it writes neither the epoch's line of log.txt again nor the lines of its steps."""
    for state in training:
        for epoch, step in saved(state):
            assert "config.json" in state
            assert [line["epoch"] for line in entries(state, "log.txt")][:epoch] == [*range(epoch)]
            lines = [(line["epoch"], line["step"]) for line in entries(state, "metrics.jsonl")]
            due = [(e, s) for e in range(3) for s in (10, 12) if (e, s) <= (epoch, step)]
            assert lines[:len(due)] == due


def test_a_line_of_the_log_is_written_with_its_checkpoint(training):
    """No more than one line is there before its checkpoint."""
    for state in training:
        assert len(entries(state, "log.txt")) <= max(saved(state), default=(0, 0))[0] + 1


def test_of_two_checkpoints_the_later_one_counts(training, base, scienceqa, tmp_path, capsys):
    """A process was killed before it removed last.pth, which lies beside the checkpoint of the whole epoch."""
    state = next(state for state in training if {"checkpoint-0.pth", "last.pth"} <= state.keys())
    assert saved(state) == [(0, 11), (1, 0)]
    for name, content in state.items():
        (tmp_path / name).write_bytes(content)
    train.main(train.get_args_parser().parse_args(
        [*run_flags(base, scienceqa, tmp_path, "--batch_size", "1"), "--stop_after_epoch", "1"]))
    assert "goes on from checkpoint-0.pth: epoch 1, step 0 of 12" in capsys.readouterr().out


def test_no_more_work_is_lost_than_the_minutes_between_checkpoints(base, scienceqa, tmp_path, monkeypatch):
    """A step takes a minute, and three are allowed; the end of an epoch counts as a checkpoint."""
    now, train_step = [0.0], Trainer.train_step
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(Trainer, "train_step", lambda *args: now.__setitem__(0, now[0] + 60) or train_step(*args))
    flags = run_flags(base, scienceqa, tmp_path / "run", "--batch_size", "1", "--epochs", "2")
    with watched(tmp_path / "run") as states:
        train.main(train.get_args_parser().parse_args([*flags, "--save_every_minutes", "3"]))
    places = sorted({12 * epoch + step for state in states for epoch, step in saved(state)})
    assert places == [4, 8, 12, 16, 20, 24]


# --- Scores ---

ANSWERS = {evaluation: ("generations.jsonl", "preds.json"), eval_mme: ("mme_answers.jsonl",)}
SCORES = {evaluation: "scores.json", eval_mme: "mme_scores.json"}
PARTIAL = {evaluation: "answers", eval_mme: "mme_answers"}


@pytest.fixture(scope="module")
def root(base, scienceqa, tmp_path_factory):
    """The read-only folder of a run with random adapters, and of MME's pictures."""
    from PIL import Image
    root = tmp_path_factory.mktemp("scores")
    write_run(root / "run", base, 1)
    (root / "mme" / "color").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (9, 9), "red").save(root / "mme" / "color" / f"{name}.png")
        (root / "mme" / "color" / f"{name}.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    return root


@pytest.fixture
def score(root, scienceqa, tmp_path):
    """Returns a function that scores a copy of the run with a command, and gives the states of its folder."""
    folder = tmp_path / "run"
    shutil.copytree(root / "run", folder)

    def scored(command, *flags) -> list[State]:
        data = ["--mme_root", str(root / "mme")] if command is eval_mme else []
        with watched(folder) as states:
            command.main(command.get_args_parser().parse_args([
                "--adapter_path", str(folder), "--data_root", str(scienceqa), "--device", "cpu", "--max_batch_size",
                "2", *data, *flags]))
        return states
    return scored


def answered(state: State, command) -> int:
    """The number of answers that the same command would not ask for again."""
    if SCORES[command] in state:
        answers = len(entries(state, ANSWERS[command][0]))
        return answers // 2 if command is eval_mme else answers  # two of each picture
    names = [name for name in state if name.startswith(PARTIAL[command] + ".") and name.endswith(".partial.jsonl")]
    return len({line[0] for name in names for line in entries(state, name)[1:]})


@pytest.mark.parametrize("command, n, again", [
    (evaluation, 6, ["--decode", "score"]), (eval_mme, 3, ["--generation_temperature", "1", "--top_p", "0.9"])],
    ids=["eval.py", "eval_mme.py"])
def test_answers_are_kept_until_their_scores_are_there_and_scores_are_of_the_answers_beside_them(
        score, command, n, again):
    """This holds also where the answers and scores of another evaluation are replaced."""
    first, second = score(command), score(command, *again)
    for states in (first, second):
        final = states[-1]
        assert answered(final, command) == n and not [name for name in final if name.endswith(".partial.jsonl")]
        old = states is first
        for before, state in zip(states, states[1:], strict=False):
            is_new = state.get(SCORES[command]) == final[SCORES[command]]
            old = old or SCORES[command] not in state
            if old and not is_new:
                assert SCORES[command] not in state  # once they are gone, only the new ones come
                assert answered(state, command) >= (answered(before, command) if SCORES[command] not in before else n)
            if SCORES[command] in state:
                beside = final if is_new else states[0]
                assert all(state[name] == beside[name] for name in ANSWERS[command])
    assert first[-1][SCORES[command]] != second[-1][SCORES[command]]


def test_answers_of_several_processes_are_put_together_before_any_is_removed(score, tmp_path, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr("util.evaluation.scienceqa.write_answers", lambda *args: 1 / 0)
        score(evaluation)
    identity, *answers = (tmp_path / "run" / "answers.0.partial.jsonl").read_text().splitlines()
    for rank in range(3):
        (tmp_path / "run" / f"answers.{rank}.partial.jsonl").write_text(
            "".join(line + "\n" for line in (identity, *answers[2 * rank:2 * rank + 2])))
    states = score(evaluation)
    assert [answered(state, evaluation) for state in states] == [6] * len(states) and "scores.json" in states[-1]


# --- Exports and searches ---

def test_an_export_has_its_config_once_all_else_is_there(base, root, tmp_path):
    """A folder with a config.json is taken for a model."""
    with watched(tmp_path / "hf") as states:
        export_hf.main(export_hf.get_args_parser().parse_args([
            *base.flags, "--adapter_path", str(root / "run"), "--out", str(tmp_path / "hf")]))
    assert all(state == states[-1] for state in states if "config.json" in state) and len(states) > 3


class Runner:
    """Trains and scores in no time."""

    gpus = 1

    def train(self, *_) -> None:
        return

    def score(self, *_) -> dict:
        return {"correct": {"Avg": 3}, "counts": {"Avg": 4}}


def test_a_run_of_a_search_is_complete_once_its_score_is_there(tmp_path):
    """A worker that takes it up makes no complete run again."""
    with watched(tmp_path) as states:
        train_and_score(Runner(), 20, FreshRun(tmp_path / "000-seed1", "000", {}, 1), 0)
    records = [json.loads(content) for state in states for content in state.values()]
    assert [record["state"] for record in (records[0], records[-1])] == ["RUNNING", "COMPLETE"]
    assert all(record["rungs"] for record in records if record["state"] == "COMPLETE")
