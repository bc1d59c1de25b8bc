"""The record of a run: metrics.jsonl, log.txt and TensorBoard tell what happened once, whatever stopped the run."""

import json
import os
import re
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_run_folder import in_folder, refused, run

import eval as evaluation
import eval_mme
from killed import Killed, stop_after
from lavin.runtime import signals
from tiny_runs import read_log, run_flags
from user_errors import error_message
from util.data.batches import epoch_batches
from util.runs import locked
from util.training import metrics, trainer
from util.training.command import load_examples
from util.training.epoch_record import EpochRecord
from util.training.throughput import peak_memory_gib
from util.training.trainer import Trainer

OFTEN = ("--save_every_minutes", "1e-9")  # a checkpoint after each step
NOT_FINITE = {(0, 2), (0, 5), (0, 11), (1, 3)}  # epochs and steps, counted from 1
TIMES = ("samples_per_s", "tokens_per_s", "peak_memory_gib")  # which differ from run to run


@pytest.fixture(scope="module")
def flags(base, scienceqa):
    """The flags of a run of two epochs of twelve steps: lines of metrics.jsonl are due after the tenth and the
    twelfth."""
    return run_flags(base, scienceqa, "unused", "--batch_size", "1", "--epochs", "2")


@pytest.fixture
def not_finite(monkeypatch):
    """The gradients of the steps NOT_FINITE are NaN, whichever process makes them."""
    made, train_step, optimizer_step = [], Trainer.train_step, trainer.optimizer_step

    def noted(self, record, step, *args):
        made.append((record.epoch, step + 1))
        train_step(self, record, step, *args)

    def broken(optimizer, scaler, parameters, *args, **kwargs):
        if made[-1] in NOT_FINITE:
            parameters[0].grad.fill_(float("nan"))
        return optimizer_step(optimizer, scaler, parameters, *args, **kwargs)
    monkeypatch.setattr(Trainer, "train_step", noted)
    monkeypatch.setattr(trainer, "optimizer_step", broken)


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """The record of a run that nothing stopped, with its steps that are not finite. Read-only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        not_finite.__wrapped__(patch)
        run(*in_folder(flags, folder))
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in (*TIMES, "seconds")} for entry in entries]


def end_at(monkeypatch, steps: int, error: type[BaseException] | None, *command) -> None:
    """Runs the command until it is asked to stop, or dies of `error`, in its step number `steps`."""
    with monkeypatch.context() as patched, pytest.raises(error or signals.Stopped):
        stop_after(patched, steps, error)
        run(*command)


def test_the_lines_of_a_run_count_each_step_that_is_not_finite_once(unbroken):
    assert [(line["epoch"], line["step"], line["skipped_steps"]) for line in lines(unbroken)] == [
        (0, 10, 2), (0, 12, 1), (1, 10, 1), (1, 12, 0)]
    assert [entry["skipped_steps"] for entry in read_log(unbroken)] == [3, 1]


def test_losses_are_means_over_the_steps_that_were_made(unbroken):
    """Eight of the first ten steps of the first epoch were made, and one of its last two."""
    first, last, *_ = lines(unbroken)
    assert (8 * first["loss"] + last["loss"]) / 9 == pytest.approx(read_log(unbroken)[0]["train_closs"], rel=1e-9)
    assert abs(first["loss"] - last["loss"]) > 1e-4


# --- Steps without an answer token ---

def cut_answers(monkeypatch, numbers: list[int]) -> None:
    """The examples with these numbers are cut before their answers."""
    def load(*args):
        examples = load_examples(*args)
        for i, (qid, example) in enumerate(examples.items()):
            if i in numbers:
                examples[qid] = replace(example, ids=example.ids[:example.answer_start])
        return examples
    monkeypatch.setattr("util.training.command.load_examples", load)


def order_of(epoch: int) -> list[int]:
    """The numbers of the twelve examples in the order of an epoch, with --seed 0."""
    return [i for batch, _ in epoch_batches([1.0] * 12, 1, 0, 1, 0, epoch) for i in batch]


@pytest.mark.parametrize("loss_norm", ["batch", "microbatch"])
def test_a_step_without_an_answer_has_no_loss_and_does_not_count_in_means(flags, tmp_path, monkeypatch, loss_norm):
    """Nor does a line of such steps, the last two of the first epoch; its other numbers are there."""
    cut_answers(monkeypatch, order_of(0)[-2:])
    command = in_folder(flags, tmp_path / "run", "--loss_norm", loss_norm)
    run(*command)
    by_line = lines(tmp_path / "run")
    assert [line["loss"] is None for line in by_line] == [False, True, False, False]
    assert all(line["lr"] > 0 and line["grad_norm"] == 0 for line in by_line if line["loss"] is None)
    with monkeypatch.context() as patched:
        patched.setattr(metrics, "STEPS_PER_LINE", 1)
        run(*in_folder(command, tmp_path / "by_step"))
    for epoch, entry in enumerate(read_log(tmp_path / "run")):
        losses = [line["loss"] for line in lines(tmp_path / "by_step") if line["epoch"] == epoch]
        without = [step for step, i in enumerate(order_of(epoch)) if i in order_of(0)[-2:]]
        assert [step for step, loss in enumerate(losses) if loss is None] == without and len(without) == 2
        assert entry["train_closs"] == pytest.approx(sum(filter(None, losses)) / 10, rel=1e-12)


def test_an_epoch_without_an_answer_has_no_loss(flags, tmp_path, monkeypatch, capsys):
    """It makes one step of eight samples; the second one takes others, too. It does not count as diverged, and
    TensorBoard has what there is."""
    monkeypatch.setattr(Events, "on_disk", {}, raising=False)
    monkeypatch.setattr("util.training.command.require_trackers", lambda names: None)
    monkeypatch.setattr("util.trackers.summary_writer", lambda: Events)
    cut_answers(monkeypatch, order_of(0)[:8])
    command = in_folder(flags, tmp_path / "run", "--batch_size", "8", "--log_dir", tmp_path / "events")
    run(*command)
    assert [entry["train_closs"] is None for entry in read_log(tmp_path / "run")] == [True, False]
    assert [line["loss"] is None for line in lines(tmp_path / "run")] == [True, False]
    assert [step for name, step in Events.on_disk if name == "loss"] == [2]
    assert [step for name, step in Events.on_disk if name == "lr"] == [1, 2]
    printed = capsys.readouterr().out
    assert "epoch 0: no answers, " in printed and "epoch 1: loss " in printed


def test_a_step_without_a_loss_goes_on_from_a_checkpoint(flags, tmp_path, monkeypatch):
    cut_answers(monkeypatch, order_of(0)[:2])
    unbroken, stopped = (in_folder(flags, tmp_path / name) for name in ("unbroken", "stopped"))
    run(*unbroken)
    end_at(monkeypatch, 3, None, *stopped)
    run(*stopped)
    assert without_times(lines(tmp_path / "stopped")) == without_times(lines(tmp_path / "unbroken"))
    assert without_times(read_log(tmp_path / "stopped")) == without_times(read_log(tmp_path / "unbroken"))


def test_lines_of_epochs_that_are_made_anew_are_replaced(flags, unbroken, tmp_path):
    """No line is left of an epoch that is not made yet."""
    folder = Path(shutil.copytree(unbroken, tmp_path / "run"))
    for path in folder.glob("*.pth"):
        path.unlink()
    run(*in_folder(flags, folder, "--stop_after_epoch", "1"))
    assert [entry["epoch"] for entry in read_log(folder)] == [0]
    assert [(line["epoch"], line["step"]) for line in lines(folder)] == [(0, 10), (0, 12)]


@pytest.mark.parametrize("ends", [
    [(11, Killed)],  # without a checkpoint
    [(4, None), (7, Killed)],  # a line after the checkpoint
    [(9, None), (2, Killed)],  # a checkpoint at the very step of a line
    [(14, None), (9, Killed)],  # in the second epoch
    [(2, None), (2, None), (3, None), (5, None)]], ids=str)
def test_a_run_that_was_stopped_and_killed_has_the_lines_of_one_that_was_not(
        flags, unbroken, not_finite, tmp_path, monkeypatch, ends):
    """No line is there twice or lost, all are in order, and each is of the same steps."""
    command = in_folder(flags, tmp_path / "run")
    for steps, error in ends:
        end_at(monkeypatch, steps, error, *command)
    run(*command)
    assert without_times(lines(tmp_path / "run")) == without_times(lines(unbroken))
    assert without_times(read_log(tmp_path / "run")) == without_times(read_log(unbroken))


@pytest.mark.parametrize("steps", [6, 11, 13])
def test_a_line_is_there_before_the_checkpoint_that_goes_on_after_it(
        flags, unbroken, not_finite, tmp_path, monkeypatch, steps):
    """The run saves a checkpoint after each step, and is killed in step number `steps`."""
    end_at(monkeypatch, steps, Killed, *in_folder(flags, tmp_path / "run", *OFTEN))
    run(*in_folder(flags, tmp_path / "run"))
    assert without_times(lines(tmp_path / "run")) == without_times(lines(unbroken))
    assert without_times(read_log(tmp_path / "run")) == without_times(read_log(unbroken))


@pytest.mark.parametrize("torn", ['{"epoch": 1, "st', '{"epoch": 1, "step": 10}', "[]\n"])
def test_a_torn_last_line_is_dropped(flags, unbroken, not_finite, tmp_path, monkeypatch, torn):
    command = in_folder(flags, tmp_path / "run")
    end_at(monkeypatch, 14, None, *command)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(torn)
    run(*command)
    assert without_times(lines(tmp_path / "run")) == without_times(lines(unbroken))


def test_steps_in_a_row_that_are_not_finite_are_counted_across_processes(flags, not_finite, tmp_path, monkeypatch):
    """Six at the end of an epoch, and four at the start of the next, which another process makes."""
    steps = {(0, step) for step in range(7, 13)} | {(1, step) for step in range(1, 9)}
    monkeypatch.setitem(globals(), "NOT_FINITE", steps)
    run(*in_folder(flags, tmp_path / "run", "--stop_after_epoch", "1"))
    assert "10 steps in a row are not finite, up to epoch 1, step 4" in refused(*in_folder(flags, tmp_path / "run"))


def test_every_resumption_is_recorded_beside_the_flags_that_the_run_began_with(flags, tmp_path, monkeypatch):
    command = in_folder(flags, tmp_path / "run")
    end_at(monkeypatch, 2, None, *command)
    end_at(monkeypatch, 2, None, *command, "--num_workers", "3")
    run(*command, "--stop_after_epoch", "1")
    config, recipe = (json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "recipe.json"))
    assert [(place["epoch"], place["step"]) for place in config["resumed"]] == [(0, 3), (0, 6)]
    assert config["flags"] == recipe["flags"] and config["flags"]["num_workers"] != 3
    assert [place["flags"] for place in config["resumed"]] == [{"num_workers": 3}, {"stop_after_epoch": 1}]


# --- TensorBoard ---

class Events:
    """Stands for TensorBoard's writer: what is not flushed is lost with the process, and a reader drops all scalars of
    an earlier writer from `purge_step` on."""

    on_disk: dict[tuple, float]

    def __init__(self, folder: str, purge_step: int):
        for name, step in [scalar for scalar in self.on_disk if scalar[1] >= purge_step]:
            del self.on_disk[name, step]
        self.pending: list[tuple] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.pending.append(((name, step), value))

    def flush(self) -> None:
        for scalar, value in self.pending:
            assert scalar not in self.on_disk
            self.on_disk[scalar] = value
        self.pending.clear()

    close = flush


@pytest.mark.parametrize("ends", [
    [(4, None), (7, Killed)], [(9, None), (4, Killed)], [(12, None)]], ids=str)
def test_tensorboard_has_the_lines_of_the_file_whatever_stopped_the_run(flags, tmp_path, monkeypatch, ends):
    """Each once, whether the process could say goodbye or not, and under the step since the run's start."""
    monkeypatch.setattr(Events, "on_disk", {}, raising=False)
    monkeypatch.setattr("util.training.command.require_trackers", lambda names: None)
    monkeypatch.setattr("util.trackers.summary_writer", lambda: Events)
    command = in_folder(flags, tmp_path / "run", "--log_dir", tmp_path / "events")
    for steps, error in ends:
        end_at(monkeypatch, steps, error, *command)
    run(*command)
    expected = {(name, 12 * line["epoch"] + line["step"]): value for line in lines(tmp_path / "run")
                for name, value in line.items() if name not in ("epoch", "step") and value is not None}
    assert Events.on_disk == expected and {step for _, step in expected} == {10, 12, 22, 24}


# --- Units ---

@pytest.fixture
def seconds_per_step(monkeypatch):
    """A clock that stands still but for a step, which takes two seconds; the third step of a process takes twenty. What
    is prepared before the first step takes a hundred, and does not count."""
    now, made, train, train_step = [1000.0], [], Trainer.train, Trainer.train_step

    def timed(self, *args):
        made.append(1)
        train_step(self, *args)
        now[0] += 20 if len(made) == 3 else 2
    monkeypatch.setattr(Trainer, "train_step", timed)
    monkeypatch.setattr(Trainer, "train", lambda *args: now.__setitem__(0, now[0] + 100) or train(*args))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return made


def test_seconds_and_speeds_are_those_of_the_steps_that_were_made(
        flags, unbroken, tmp_path, monkeypatch, seconds_per_step):
    """Samples are counted per second of training, in log.txt with the time before a stop, in a line of metrics.jsonl
    without the steps of an earlier process. A line is written when the step after its last one has been launched."""
    command = in_folder(flags, tmp_path / "run")
    end_at(monkeypatch, 3, None, *command)  # saves after the fourth step
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    seconds_per_step.clear()
    run(*command)
    entries, by_step = read_log(tmp_path / "run"), lines(tmp_path / "run")
    assert [entry["seconds"] for entry in entries] == [26 + 34, 24]
    assert [entry["samples_per_s"] for entry in entries] == [12 / 60, 12 / 24]
    assert [line["samples_per_s"] for line in by_step] == [6 / 32, 2 / 2, 10 / 22, 2 / 2]
    assert all(10 < line["tokens_per_s"] / line["samples_per_s"] < 160 for line in by_step)


def test_the_seconds_of_more_steps_are_those_of_the_epoch_before_and_after_a_stop(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    record = EpochRecord(0, steps=[[1.0, 1, 1.0]] * 4, seconds=80)
    record.start_clock()
    now[0] += 40
    record.steps.append([1.0, 1, 1.0])
    assert record.seconds_for(10) == 240


@pytest.mark.parametrize("stops", [[], [3], [12], [2, 3]], ids=str)
def test_the_time_that_is_left_of_the_whole_run_is_told(flags, tmp_path, monkeypatch, capsys, stops):
    """A step takes ten minutes, and the run has 24 of them. In its last epoch the progress of the epoch tells it."""
    monkeypatch.setattr(EpochRecord, "seconds", property(lambda record: 600.0 * len(record.steps)))
    command = in_folder(flags, tmp_path / "run")
    for steps in stops:
        end_at(monkeypatch, steps, None, *command)
    run(*command)
    printed, progress = capsys.readouterr()
    assert printed.count("about 2 h 00 min left in all\n") == printed.count(" left in all") == 1
    first, last = [line for line in progress.splitlines() if re.match("run, epoch .: 12 of 12, ", line)]
    assert first.endswith(", about 2 h 20 min left in all")  # as its loss, after the ten steps of metrics.jsonl
    assert "loss" in last and "in all" not in last


def test_the_time_that_is_left_ends_with_the_command(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(EpochRecord, "seconds", property(lambda record: 600.0 * len(record.steps)))
    run(*in_folder(flags, tmp_path / "run", "--epochs", "9", "--stop_after_epoch", "2"))
    assert re.findall("about .* left in all", capsys.readouterr().out) == ["about 2 h 00 min left in all"]


def test_peak_memory_is_in_gib(unbroken, monkeypatch):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB
    for entry in (*read_log(unbroken), *lines(unbroken)):
        assert used / 4 < entry["peak_memory_gib"] <= used
    assert used / 4 < peak_memory_gib(torch.device("cpu")) < 4 * used
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_memory_gib(torch.device("cuda")) == 3


# --- Locks ---

def files(folder: Path) -> dict[Path, tuple]:
    """The inode, the time of change and the content of every file in the folder, hidden ones included."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def scored(base, scienceqa, tmp_path_factory):
    """A finished run that can be trained, scored on ScienceQA, and scored on MME."""
    from PIL import Image
    root = tmp_path_factory.mktemp("scored")
    run(*run_flags(base, scienceqa, root / "run", "--epochs", "2"))
    (root / "mme" / "color").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(root / "mme" / "color" / "a.png")
    (root / "mme" / "color" / "a.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    return root


def train_again(root: Path, *flags) -> None:
    run("--resume", root / "run", *flags)


def evaluate(root: Path, command=evaluation, *flags) -> None:
    command.main(command.get_args_parser().parse_args(
        ["--adapter_path", str(root / "run"), "--device", "cpu", *map(str, flags)]))


@pytest.mark.parametrize("second", [
    train_again, lambda root: run("--resume", root / "run" / "checkpoint-0.pth"),
    lambda root: train_again(root, "--overwrite"), evaluate,
    lambda root: evaluate(root, eval_mme, "--mme_root", root / "mme")],
    ids=["train.py", "going back", "--overwrite", "eval.py", "eval_mme.py"])
def test_a_refused_process_changes_nothing_of_what_the_first_is_writing(scored, second):
    """The first goes back, and has a whole checkpoint. The folder stays locked, however many are refused."""
    folder = scored / "run"
    with locked(folder):
        (folder / ".checkpoint-1.pth.host.1.part").write_text("half")
        (folder / ".staging").mkdir(exist_ok=True)
        (folder / ".staging" / ".log.txt.host.1.part").write_text("half")
        shutil.copy(folder / "checkpoint-0.pth", folder / ".staging" / "last.pth")
        (folder / "answers.0.partial.jsonl").write_text("{}\n")
        before = files(folder)
        for _ in range(2):
            assert f"in use by process {os.getpid()} on" in error_message(second, scored)
            assert files(folder) == before
    assert not (folder / ".owner.json").exists()


def test_a_refused_process_leaves_the_new_folder_of_the_first(flags, tmp_path):
    with locked(tmp_path / "run"):
        before = files(tmp_path / "run")
        assert "in use by process" in refused(*in_folder(flags, tmp_path / "run"))
        assert files(tmp_path / "run") == before and len(before) == 3
    assert not (tmp_path / "run").exists()  # nothing was written to it
