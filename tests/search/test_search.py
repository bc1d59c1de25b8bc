"""search.py with train.py and eval.py: trials in rungs, failures, stops, the budget, and the study's report."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("optuna")
import eval as evaluation
import plot_results
import search
import train
from forked import Child
from lavin.kernels import fp8
from lavin.runtime import device, signals
from lavin.runtime.console import counted
from lavin.runtime.errors import UserError, describe, one_line_errors
from lavin.runtime.files import read_json, write_json
from tiny import ROOT
from user_errors import error_message
from util.data import checksums
from util.runs import checkpoints
from util.search import command as search_command
from util.search import confirm, locks, machine, runner
from util.search import folder as folder_module
from util.search.errors import CommandFailed, WorkerError
from util.search.folder import (
    LOG,
    RECORD,
    VERDICT,
    all_records,
    begin_record,
    change_record,
    gpu_seconds,
    read_records,
)
from util.search.locks import claim, waiting_for
from util.search.processes import starting
from util.search.runner import HoursSpent, Runner, run_command

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SPACE = {"parameters": {"lr": {"kind": "float", "low": 1e-3, "high": 3e-2, "log": True, "default": 1e-2},
                        "lr_schedule": {"kind": "categorical", "choices": ["cosine", "step"], "default": "cosine"}},
         "enqueue": [{}, {"lr_schedule": "step"}]}


@pytest.fixture
def flags(base, data, tmp_path) -> list[str]:
    (tmp_path / "space.json").write_text(json.dumps(SPACE))
    return ["--study", str(tmp_path / "S"), "--space", str(tmp_path / "space.json"), "--trials", "3", "--seeds", "2",
            "--confirm", "1", "--", *base.flags, "--data_root", str(data), "--device", "cpu", "--batch_size", "4",
            "--epochs", "2", "--warmup_epochs", "0.5", "--max_seq_len", "160"]


WITHOUT_CONFIRMATION = ("--confirm", "0")


def run_search(flags, *own: str) -> None:
    i = flags.index("--")
    search.main(search.get_args_parser().parse_args([*flags[:i], *own, *flags[i:]]))


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """train.py and eval.py run in this process; their commands."""
    known = []

    def run_here(start, words: list[str], log: Path, lock: int, seconds: float) -> None:
        known.append(words)
        module = {"train.py": train, "eval.py": evaluation}[words[0]]
        module.main(module.get_args_parser().parse_args(words[1:]))
    monkeypatch.setattr(runner, "run_command", run_here)
    return known


def programs(commands) -> list[str]:
    return [Path(command[0]).stem for command in commands]


# --- A study from beginning to end ---

def test_a_study_from_its_first_trial_to_its_report(flags, commands, tmp_path, capsys):
    run_search(flags)
    said = capsys.readouterr().out
    study, records = tmp_path / "S", read_records(tmp_path / "S")
    assert "3 trials of at most 2 epochs x 2 steps, scored after epochs 1 and 2" in said
    assert "then 4 runs with fresh seeds (the best 1 and the base, 2 each): 16 steps" in said
    assert "3 of 3 trials:" in said and list(records) == ["000", "001", "002"]
    assert records["001"]["values"]["lr_schedule"] == "step"
    for name, record in records.items():
        trial = study / "trials" / name
        n_epochs = 2 if record["state"] == "COMPLETE" else 1
        assert list(checkpoints(trial)) == [n_epochs - 1] and [rung["epoch"] for rung in record["rungs"]] == [1, 2][
            :n_epochs]
        scores = json.loads((trial / "rungs" / "1" / "scores.json").read_text())
        assert (scores["split"], scores["decode"], scores["questions"]) == ("val", "score", 3)
        assert not (trial / "scores.json").exists()  # the run's own scores are of its last checkpoint, on test
        written = json.loads((trial / "recipe.json").read_text())["recipe"]
        assert written["epochs"] == 2 and written["lr"] == float(record["values"]["lr"])
    # test is scored by the winner's and the base's runs with fresh seeds alone, and only when all have run
    tested = [command for command in commands if "test" in command]
    assert len(tested) == 4 and commands[-4:] == tested
    seeds = {json.loads((run / "config.json").read_text())["flags"]["seed"] for run in (study / "confirm").iterdir()}
    assert seeds == {1, 2}
    verdict = json.loads((study / VERDICT).read_text())
    assert confirm.sentence(verdict) in said

    before = len(commands)
    run_search(flags)  # a late worker finds all done
    assert len(commands) == before
    plot_results.main(plot_results.get_args_parser().parse_args([str(study), "--out", str(tmp_path / "report")]))
    report = (tmp_path / "report" / "report.md").read_text()
    assert confirm.sentence(verdict) in report and "on the test split" in report
    assert f"- {sum(r['rungs'][-1]['epoch'] for r in records.values()) * 2} steps" in report


def test_parameters_that_the_command_gives_are_said_not_to_be_searched(flags, commands, capsys):
    run_search([*flags, "--lr", "0.01"], "--trials", "1", *WITHOUT_CONFIRMATION)
    assert "not searched, since the command gives them: --lr\n" in capsys.readouterr().out


def test_a_trial_goes_on_where_its_worker_was_killed(flags, commands, tmp_path, monkeypatch):
    """The worker was killed after the first rung's training, no step of which is made again."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Runner, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        run_search(flags, *WITHOUT_CONFIRMATION)
    commands.clear()
    study = tmp_path / "S"
    assert read_records(study)["000"]["state"] == "RUNNING" and list(checkpoints(study / "trials" / "000")) == [0]
    run_search(flags, *WITHOUT_CONFIRMATION)
    assert programs(commands)[:3] == ["eval", "train", "eval"]
    assert {record["state"] for record in read_records(study).values()} <= {"COMPLETE", "PRUNED"}


def test_a_suggestion_that_train_refuses_is_not_run(flags, commands, tmp_path, monkeypatch):
    check = search_command.check_trial
    monkeypatch.setattr(search_command, "check_trial", lambda words, gpus, values: check(
        [*words, *(["--dropout_lim", "0.05", "--dropout_var", "2"] if values["lr"] != 1e-2 and not commands == [] else
                   [])], gpus, values))
    run_search(flags, *WITHOUT_CONFIRMATION)
    record = read_records(tmp_path / "S")["002"]
    assert record["state"] == "FAIL" and record["message"].startswith("--dropout_lim 0.05 must lie at or above")
    assert not any("trials/002" in word for command in commands for word in command)


@pytest.mark.parametrize("trials, failures_of_others", [(5, 0), (5, 2), (2, 0), (1, 0)])
def test_a_search_whose_first_trials_fail_ends(flags, monkeypatch, tmp_path, trials, failures_of_others):
    """Three failures end it, whichever workers had them, or those of all trials where there are fewer."""
    left = [failures_of_others]

    def fails(*_):
        left[0] -= 1
        raise KeyboardInterrupt if left[0] == -1 and failures_of_others else CommandFailed("no space left")
    monkeypatch.setattr(runner, "run_command", fails)
    if failures_of_others:
        with pytest.raises(KeyboardInterrupt):
            run_search(flags, "--trials", str(trials))
    message = error_message(run_search, flags, "--trials", str(trials))
    assert message == f"{counted(min(3, trials), 'trial')} failed and none succeeded; the last one: no space left"
    assert [record["state"] for record in read_records(tmp_path / "S").values()] == ["FAIL"] * min(3, trials)


def test_a_format_whose_solution_comes_first_is_refused(flags, commands):
    """Its trials could not be scored."""
    assert "with --prompt_format QCM-EA the solution comes first" in error_message(
        run_search, [*flags, "--prompt_format", "QCM-EA"])
    assert commands == []


def test_a_confirming_run_that_fails_is_named(flags, commands, monkeypatch, tmp_path):
    run_here = runner.run_command

    def fails(start, words, *rest):
        if "--seed" in words:
            raise CommandFailed("training diverged")
        run_here(start, words, *rest)
    monkeypatch.setattr(runner, "run_command", fails)
    assert error_message(run_search, flags, "--trials", "2", "--pruner", "none").endswith(
        "S/confirm/000-seed1: training diverged")


def test_the_hours_are_kept(flags, commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner.time, "monotonic", iter(range(0, 10**6, 100)).__next__)  # each look takes 100 s
    run_search(flags, "--gpu_hours", "0.1", *WITHOUT_CONFIRMATION)
    printed = capsys.readouterr().out
    assert "stopped: the hours on a CPU of --gpu_hours 0.1 are spent; the same command with more goes on" in printed
    assert "\nhours on a CPU: unknown until the first trial is scored\n" in printed
    assert 3 <= len(commands) <= 4
    monkeypatch.setenv("LAVIN_WORKER", "1")  # the second one of a node: the first tells the cost
    run_search(flags, "--gpu_hours", "9", *WITHOUT_CONFIRMATION)
    assert "hours on a CPU" not in capsys.readouterr().out
    assert {record["state"] for record in read_records(tmp_path / "S").values()} <= {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize("chosen, sees_gpu, unit", [
    (None, True, "GPU-hours"), ("cuda", True, "GPU-hours"), ("cpu", True, "hours on a CPU"),
    (None, False, "hours on a CPU")])
def test_hours_are_those_of_the_device(monkeypatch, tmp_path, chosen, sees_gpu, unit):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_gpu)
    assert search_command.hours_spent(tmp_path, 2.0, machine.is_cpu(chosen)) == f"the {unit} of --gpu_hours 2 are spent"


# --- The machine ---

def use_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    """Lets the worker see a GPU of this compute capability; its commands run on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "choose_device", lambda *_, **__: torch.device("cuda"))
    for module in (device, fp8):
        monkeypatch.setattr(module, "compute_capability", lambda _: capability)


def precisions(study: Path) -> set[str]:
    """The precisions in the recipes of all trials."""
    return {read_json(path)["recipe"]["precision"] for path in study.glob("trials/*/recipe.json")}


def test_a_trial_moves_between_gpus_in_one_precision(flags, commands, tmp_path, monkeypatch):
    """It begins on an H100; a V100 leaves it alone; an A100, whose flags are the same, goes on with it."""
    study = tmp_path / "S"
    use_gpu(monkeypatch, (9, 0))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Runner, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        run_search(flags, *WITHOUT_CONFIRMATION)
    use_gpu(monkeypatch, (7, 0))
    before = read_records(study)
    assert error_message(run_search, flags, *WITHOUT_CONFIRMATION) == (
        f"{study} is a study in bf16, which this machine cannot do: start this worker on another one, or name another "
        "folder with --study")
    assert read_records(study) == before and before["000"]["state"] == "RUNNING"
    use_gpu(monkeypatch, (8, 0))
    run_search(flags, *WITHOUT_CONFIRMATION)
    assert {record["state"] for record in read_records(study).values()} <= {"COMPLETE", "PRUNED"}
    assert precisions(study) == {"bf16"} and {read_json(path)["precision"] for path in study.glob(
        "trials/*/rungs/*/scores.json")} == {"bf16"}
    assert f"{study} is a study in bf16: leave --precision fp32 out" in error_message(
        run_search, [*flags, "--precision", "fp32"], *WITHOUT_CONFIRMATION)


def test_a_newer_gpu_joins_a_study_in_fp16(flags, commands, tmp_path, monkeypatch):
    use_gpu(monkeypatch, (7, 0))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Runner, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        run_search(flags, *WITHOUT_CONFIRMATION)
    use_gpu(monkeypatch, (9, 0))
    run_search(flags, *WITHOUT_CONFIRMATION)
    assert precisions(tmp_path / "S") == {"fp16"}


def test_a_worker_that_cannot_train_fails_no_trial(flags, commands, tmp_path, monkeypatch):
    use_gpu(monkeypatch, (8, 0))
    assert error_message(run_search, [*flags, "--bits", "fp8"]).startswith("--bits fp8 needs")
    message = error_message(run_search, flags, "--gpus", "2")
    assert message == "--gpus 2 is more than the 1 GPU that can be seen here: give at most that many"
    assert not (tmp_path / "S" / "study.json").exists() and not commands


def test_the_worker_itself_stays_off_the_gpu(monkeypatch):
    """Another process asks for the precision, and that one sees that there is no GPU here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert error_message(machine.resolve_precision, "auto", "cuda", "16bit").startswith(
        "--device cuda: no GPU is visible here")


# --- What is refused ---

@pytest.mark.parametrize("own, more, words", [
    ((), ("--output_dir", "x"), "--output_dir does not go with a search"),
    ((), ("--resume", "x"), "--resume does not go with a search"),
    ((), ("--epohcs", "3"), "unrecognized arguments: --epohcs 3 (python train.py"),
    ((), ("--min_lr", "0.02"), "space.json: lr 0.001: --min_lr 0.02 must lie between 0 and the learning rate 0.001"),
    ((), ("--data_root", "none"), "cannot read none/problems.json"),
    ((), ("--llm_model", "none"), "none"),
    (("--space", "none.json"), (), "cannot read none.json"),
    (("--pruner", "hyperband"), (), "--pruner invalid choice"),
    (("--trials", "0"), (), "--trials")])
def test_mistakes_are_told_before_anything_is_begun(flags, tmp_path, own, more, words):
    assert words in error_message(run_search, [*flags, *more], *own)
    assert not (tmp_path / "S" / "study.json").exists()


def test_without_optuna_the_search_says_what_to_install(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "util.search.study", None)
    assert error_message(run_search, flags).endswith("pip install -r requirements/search.txt")


def test_machine_flags_reach_eval():
    trained = train.get_args_parser().parse_args(["--device", "cpu", "--num_workers", "2", "--cpu_load", "--lr", "1"])
    assert search_command.machine_flags(trained) == ["--device", "cpu", "--num_workers", "2", "--cpu_load"]
    assert search_command.fixed_values(trained)["lr"] == 1 and "blr" in search_command.fixed_values(trained)


# --- Commands ---

@pytest.fixture
def command(start):
    def run(tmp_path, script: str, seconds: float = 60.0) -> None:
        tmp_path.mkdir(exist_ok=True)
        lock = claim(tmp_path / "lock")
        try:
            run_command(start, ["script.py", script], tmp_path / "log", lock, seconds)
        finally:
            os.close(lock)
    return run


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_trials_of_a_study_are_one_group_of_experiment_trackers(servers, tmp_path, monkeypatch, gpus):
    def start_torchrun(words, stdout, env, **_):
        stdout.write(f"{env['WANDB_RUN_GROUP']}\n".encode())
        return SimpleNamespace(wait=lambda _: 0)

    monkeypatch.setattr(subprocess, "Popen", start_torchrun)
    script = "import os; print(os.environ['WANDB_RUN_GROUP'])"
    for group in ("my-study", "my-group"):
        with starting(tmp_path / "my-study", gpus) as start:
            run_command(start, ["script.py", script], tmp_path / "log", 0, 60)
        assert (tmp_path / "log").read_text().split()[-1] == group
        monkeypatch.setenv("WANDB_RUN_GROUP", "my-group")  # the user's own wins


@pytest.mark.parametrize("script, words", [
    ("import sys; print('a bar\\r50%\\rtrain.py: error: no data: fetch it\\nlater', file=sys.stderr); sys.exit(1)",
     "no data: fetch it"),
    ("raise RuntimeError('a bug')", "RuntimeError: a bug"), ("import sys; sys.exit(3)", "exit status 3"),
    ("import os; os.kill(os.getpid(), 11)", "exit status -11")])
def test_a_command_that_fails_is_told_by_its_line(command, tmp_path, script, words):
    (tmp_path / "log").write_text("train.py: error: of another time\n")
    with pytest.raises(CommandFailed, match=f"^{words}$"):
        command(tmp_path, script)


def lines_of(error: BaseException) -> str:
    return f"import sys; print('train.py: error: ' + {describe(error)!r}, file=sys.stderr); sys.exit(1)"


@pytest.mark.parametrize("script, words", [
    (lines_of(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.pth")), "trial: x.pth: No space left on device"),
    (lines_of(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x.pth")), "trial: x.pth: Disk quota exceeded"),
    (lines_of(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "x.pth")), "trial: x.pth: File too large"),
    (lines_of(MemoryError()), "trial: not enough memory on this machine"),
    (lines_of(RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")), "not enough memory on this"),
    (lines_of(torch.OutOfMemoryError("CUDA out of memory. Tried")), "trial: not enough GPU memory"),
    ("raise OSError(28, 'No space left on device')", "No space left on device"),
    (lines_of(UserError(error_message(checksums.require_unchanged, {Path("x.png"): (1, 2, 3, 4, 5)}))),
     "trial: x.png changes while it is read"),
    ("import os; os.kill(os.getpid(), 9)", "was killed (SIGKILL), as the system does where memory is short"),
    ("print('traceback : Signal 9 (SIGKILL) received by PID 7\\n====='); raise SystemExit(1)", "was killed (SIGKILL)")])
def test_a_machine_that_is_short_of_something_fails_no_trial(command, tmp_path, script, words):
    """The shortage is known by the words of train.py, of Python or of torchrun. Neither does a file that somebody
    changes."""
    with pytest.raises(WorkerError) as caught:
        command(tmp_path / "trial", script)
    assert words in str(caught.value) and str(tmp_path / "trial") in str(caught.value)


def test_a_disk_that_is_too_full_for_a_log_fails_no_trial(command, tmp_path, monkeypatch):
    """The command cannot say why it failed. What is written here fits, until the worker looks."""
    def full(dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(runner.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        command(tmp_path, "raise SystemExit(1)")
    assert describe(caught.value).startswith(f"{tmp_path}: No space left on device: free some space")


def test_a_command_ends_with_the_hours_or_a_signal_of_its_own(command, tmp_path):
    wait = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up'); time.sleep(60)"
    with pytest.raises(HoursSpent):
        command(tmp_path, wait, seconds=1)
    with pytest.raises(HoursSpent):
        command(tmp_path, "raise SystemExit('not started')", seconds=-1)
    for status in ("sys.exit(75)", "os.kill(os.getpid(), 15)"):
        with pytest.raises(signals.Stopped, match="was stopped by a signal: the same command goes on"):
            command(tmp_path, f"import os, sys; {status}")
    command(tmp_path, "")


def test_a_stop_signal_reaches_the_command_which_saves(start, tmp_path):
    saves = ("import signal, sys, time; from pathlib import Path; "
             f"signal.signal(15, lambda *_: (Path({str(tmp_path / 'saved')!r}).touch(), sys.exit(75))); "
             f"Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)")

    def work():
        with one_line_errors():
            run_command(start, ["script.py", saves], tmp_path / "log", claim(tmp_path / "lock"), 60)

    with open(tmp_path / "errors", "w") as errors:
        worker = Child(work, errors.fileno(), errors.fileno(), {})
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
        assert worker.poll() is None
    worker.terminate()
    assert worker.wait() == 75 and (tmp_path / "saved").exists()
    assert (tmp_path / "errors").read_text().strip().endswith("stopped by SIGTERM: the same command goes on")


SILENT = "import time; time.sleep(60)"


def start_worker(start, folder: Path, script: str) -> Child:
    """Starts a worker in a session of its own, with a command that runs the script; returns when both have shown signs
    of life."""
    def work():
        os.setsid()
        Runner([], [], 1, lambda: 60.0, start).run(folder, claim(folder / "lock"), "script.py", script)

    process = Child(work, 1, 2, {})
    while "since" not in (record := read_json(folder / RECORD)) or (folder / LOG).stat().st_mtime <= record["since"]:
        assert process.poll() is None
        time.sleep(0.05)
    return process


def seconds(study: Path) -> float:
    return read_records(study)["000"]["seconds"]


def test_the_seconds_of_a_killed_command_are_counted_once(start, tmp_path):
    """Killed with its worker. It says nothing here: what is counted are the worker's own signs of life."""
    folder = tmp_path / "trials" / "000"
    begin_record(folder, 1, values={})
    process = start_worker(start, folder, SILENT)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed = (folder / LOG).stat().st_mtime - read_json(folder / RECORD)["since"]
    assert killed > 0 and seconds(tmp_path) == pytest.approx(killed)
    begin_record(folder, 1, values={})  # by whoever goes on
    (folder / LOG).touch()
    assert seconds(tmp_path) == pytest.approx(killed)
    lock = claim(folder / "lock")
    Runner([], [], 1, lambda: 60.0, start).run(folder, lock, "script.py", "print('run: ...')")
    os.close(lock)
    assert killed < seconds(tmp_path) == read_json(folder / RECORD)["seconds"]
    before = gpu_seconds(all_records(tmp_path))
    begin_record(folder, 4, values={})
    assert gpu_seconds(all_records(tmp_path)) == pytest.approx(before)


def test_the_seconds_of_a_command_that_outlives_its_worker_are_counted(start, tmp_path):
    """They are counted up to the last line that the command writes."""
    folder = tmp_path / "trials" / "000"
    begin_record(folder, 1, values={})
    waits = f"for _ in range(600): Path({str(tmp_path / 'go')!r}).exists() or time.sleep(0.05)"
    process = start_worker(start, folder, f"import time; from pathlib import Path\n{waits}\nprint('run: ...')")
    process.kill()
    process.wait()
    first = seconds(tmp_path)
    time.sleep(0.05)
    (tmp_path / "go").touch()
    with waiting_for(folder / "lock"):  # it has ended
        assert (folder / LOG).read_text() == "run: ...\n" and seconds(tmp_path) > first


def test_scores_of_another_checkpoint_are_made_again(tmp_path):
    """A trial that has gone on has lost the checkpoint, and its scores stay."""
    runner = Runner([], [], 1, lambda: 60.0, None)
    path, checkpoint = tmp_path / "scores.json", tmp_path / "checkpoint-1.pth"
    for written, there, is_scored in ((b"a", b"a", True), (b"a", b"b", False), (b"a", None, True), (None, b"a", True)):
        entries = {"checkpoint_sha256": hashlib.sha256(written).hexdigest()} if written else {}
        write_json(path, {"correct": {}, "counts": {}, "split": "val", **entries})
        checkpoint.write_bytes(there) if there else checkpoint.unlink()
        assert runner.is_scored(path, "val", checkpoint) is is_scored


def test_records_are_read_again_where_they_have_changed(tmp_path, monkeypatch):
    """Workers that wait ask every two seconds."""
    monkeypatch.setattr(checksums, "RECENT_SECONDS", 0)  # else files as young as these are read every time
    read, validated = [], folder_module.read_validated
    monkeypatch.setattr(folder_module, "read_validated", lambda path, *more: (
        read.append(path.parent.name), validated(path, *more))[1])
    for name in ("000", "001", "002"):
        begin_record(tmp_path / "trials" / name, 1, values={})
    time.sleep(0.02)  # ctime has steps of milliseconds
    assert read_records(tmp_path) == read_records(tmp_path) and read == ["000", "001", "002"]
    change_record(tmp_path / "trials" / "001", state="PRUNED")
    time.sleep(0.02)
    states = [record["state"] for record in read_records(tmp_path).values()]
    assert states == ["RUNNING", "PRUNED", "RUNNING"] and read[3:] == ["001"]


def test_records_that_changed_a_moment_ago_are_read_again(tmp_path, monkeypatch):
    """They may change within one step of the file system's clock."""
    now = time.time_ns()
    monkeypatch.setattr(folder_module, "file_state", lambda path: (1, 2, 3, now, now))
    for i in range(2):
        begin_record(tmp_path / "trials" / "000", 1, values={"n": i})
        assert read_records(tmp_path)["000"]["values"] == {"n": i}


def test_a_lock_is_looked_at_less_and_less_often(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(locks, "claim", lambda path: 7 if sum(waited) > 60 else None)
    monkeypatch.setattr(locks.time, "sleep", waited.append)
    monkeypatch.setattr(locks.os, "close", lambda descriptor: None)
    with waiting_for(tmp_path / "lock") as descriptor:
        assert descriptor == 7
    assert waited[0] == 0.05 and waited == sorted(waited) and waited[-1] == 1 and len(waited) < 70


def test_several_gpus_are_torchruns(tmp_path, monkeypatch):
    known, folder = [], tmp_path / "S" / "trials" / "000"

    def start_torchrun(words, **_):
        known.append(words)
        return SimpleNamespace(wait=lambda _: 0)

    monkeypatch.setattr(subprocess, "Popen", start_torchrun)
    begin_record(folder, 2)
    with starting(tmp_path / "S", 2) as start:
        Runner(["--epochs", "3"], [], 2, lambda: 1.0, start).train(folder, {"blr": 0.01}, 1, 0, "--stop_after_epoch",
                                                                   "1")
    (words,) = known
    assert words[1:6] == ["-m", "util.launch", "--standalone", "--nproc_per_node", "2"]
    assert words[6:] == [str(ROOT / "train.py"), "--keep_last", "1", "--epochs", "3", "--blr", "0.01",
                         "--stop_after_epoch", "1", "--output_dir", str(folder)]
