"""Runs one after another in one process: each is what it is alone, and a run that fails or is stopped ends them."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch

import eval as evaluation
import forked
import train
from forked import Ended, in_child, in_processes
from killed import contents
from lavin.mm_adapter import AdapterConfig
from lavin.runtime.errors import one_line_errors
from tiny import ROOT
from tiny_base import write_base
from tiny_runs import load_checkpoint, run_flags
from util import shared_base
from util.data import cache
from util.evaluation.scienceqa import ScienceQATask
from util.flags import BaseSettings, Execution
from util.series.commands import make_runs, process_of_its_own, read_run
from util.training.command import run
from util.training.run_folder import RunFolder
from util.training.throughput import peak_memory_gib
from util.training.trainer import Trainer

TIMES = ("seconds", "samples_per_s", "tokens_per_s", "peak_memory_gib")
RUNS = {  # one after another: with adapters of the same and of other shapes, another base, and the first base again
    "base": (), "seed": ("--seed", "1"),
    "other-adapters": ("--adapter_type", "block", "--visual_adapter_type", "router_block", "--adapter_dim", "4",
                       "--n_prompt", "2", "--dropout_prob", "0.3", "--dropout_lim", "0.3"),
    "recomputed": ("--gradient_checkpointing", "--drop_path", "0.5", "--visual_adapter_type", "normal"),
    "other-base": ("--seed", "1", "--adapter_scale", "0.5"), "base-again": ("--lr_schedule", "step")}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(forked, "SECONDS", 300)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("other")
    other = write_base(folder, tokenizer_file)
    path = other.weights / "tiny" / "consolidated.00.pth"
    torch.save({name: 1.1 * tensor for name, tensor in torch.load(path).items()}, path)
    return other


def commands(base, scienceqa, name: str, *more: str) -> list[list[str]]:
    """Trains into the folder `name`, and scores with answers that are drawn at random."""
    flags = run_flags(base, scienceqa, name, "--epochs", "2", "--num_workers", "1", *RUNS.get(name, ()), *more)
    return [["train.py", *flags], ["eval.py", "--device", "cpu", "--generation_temperature", "1", "--trained_with",
                                   *flags]]


def write_files(folder: Path, runs: dict[str, list[list[str]]]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"0-{i:04d}" for i in range(len(runs))]
    for path, (name, lines) in zip(paths, runs.items(), strict=True):
        path.write_text("".join(f"{line}\n" for line in (f"# {name}", *map(shlex.join, lines))))
    return paths


def together(folder: Path, runs: dict[str, list[list[str]]], before=lambda: None) -> tuple[Ended, list[str]]:
    """Makes the runs in the folder, in one process, and returns the names of those whose files are left. before: is
    called in that process."""
    paths = write_files(folder / "files", runs)

    def make():
        os.chdir(folder)
        before()
        with one_line_errors():
            make_runs(paths)

    ended = in_child(make)
    return ended, [name for name, path in zip(runs, paths, strict=True) if path.exists()]


def alone(folder: Path, words_of_run: list[list[str]]) -> str:
    """Makes a run in the folder, each command in a process of its own; returns what they said."""
    folder.mkdir(parents=True, exist_ok=True)
    said = ""
    for program, *words in words_of_run:
        def command(main={"train.py": train, "eval.py": evaluation}[program], words=words):
            os.chdir(folder)
            with one_line_errors():
                main.main(main.get_args_parser().parse_args(words))
        ended = in_child(command)
        assert ended.status == 0, ended.errors
        said += ended.out
    return said


def untimed(said: str) -> list[str]:
    return re.sub(r"[\d.]+ samples/s", "samples/s", said).splitlines()


def assert_same_run(folder: Path, other: Path, goes_on: bool = False) -> None:
    """Byte for byte, but for times. goes_on: config.json of the first run also says that it has gone on."""
    def untimed_lines(text: bytes) -> list[dict]:
        return [{name: value for name, value in json.loads(line).items() if name not in TIMES}
                for line in text.splitlines()]
    a, b = contents(folder), contents(other)
    assert a.keys() == b.keys() >= {Path(name) for name in ("checkpoint-1.pth", "scores.json", "generations.jsonl")}
    for name in a:
        if name.name in ("log.txt", "metrics.jsonl"):
            assert untimed_lines(a[name]) == untimed_lines(b[name])
        elif goes_on and name.name == "config.json":
            found = json.loads(a[name])
            assert found.pop("resumed") and found == json.loads(b[name])
        else:
            assert a[name] == b[name], name


def test_each_run_is_what_it_is_alone(base, other_base, scienceqa, tmp_path):
    runs = {name: commands(other_base if name == "other-base" else base, scienceqa, name) for name in RUNS}
    ended, left = together(tmp_path / "together", runs)
    assert ended.status == 0 and left == [], ended.errors
    said = dict(part.split("\n", 1) for part in ended.out.split("== ")[1:])
    assert list(said) == list(RUNS)
    for name in RUNS:
        assert untimed(said[name]) == untimed(alone(tmp_path / "alone", runs[name]))
        assert_same_run(tmp_path / "together" / name, tmp_path / "alone" / name)
    first, second = (load_checkpoint(tmp_path / "alone" / name / "checkpoint-1.pth")["model"]
                     for name in ("base", "base-again"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_fails_ends_the_process_and_the_next_one_makes_the_rest(base, scienceqa, tmp_path):
    runs = {name: commands(base, scienceqa, name) for name in ("base", "seed", "base-again")}
    runs["seed"] = commands(base, scienceqa, "seed", "--lr", "1e30")
    ended, left = together(tmp_path, runs)
    assert ended.status == 1 and left == ["seed", "base-again"]
    assert ended.errors.splitlines()[-1].startswith("train.py: error: training diverged")
    assert (tmp_path / "base" / "scores.json").exists() and not (tmp_path / "base-again").exists()
    assert not (tmp_path / "seed" / "scores.json").exists() and not (tmp_path / "seed" / ".owner.json").exists()
    ended, left = together(tmp_path, {name: runs[name] for name in ("base", "base-again")})
    assert ended.status == 0 and left == [] and "base, which is finished" in ended.out
    assert "scored before" in ended.out and (tmp_path / "base-again" / "scores.json").exists()


def signal_at_step(number: int, which: signal.Signals = signal.SIGTERM):
    """A signal comes in this step of a process."""
    train_step, steps = Trainer.train_step, []

    def counted(self, *args):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), which)
        train_step(self, *args)

    Trainer.train_step = counted


@pytest.fixture(scope="module")
def seed_alone(base, scienceqa, tmp_path_factory) -> Path:
    """The folder of the run `seed`, made by itself with the flags of `often_saved`."""
    folder = tmp_path_factory.mktemp("alone")
    alone(folder, often_saved(base, scienceqa, "seed")["seed"])
    return folder / "seed"


def often_saved(base, scienceqa, *names: str) -> dict[str, list[list[str]]]:
    return {name: commands(base, scienceqa, name, "--save_every_minutes", "1e-9") for name in names}


WORDS = [["train.py", "--output_dir", "données/it's a\\b $x `y`", "--caption_file", ""], ["eval.py", "--split", "test"]]


@pytest.mark.parametrize("encoding", ["C", "C.UTF-8"])
def test_the_words_of_a_command_are_those_that_a_script_gave(tmp_path, encoding):
    path = tmp_path / "0-0000"
    path.write_text("# base, seed 0\n")
    lines = ["source scripts/common.sh", *(f"launch {shlex.join(words)}" for words in WORDS)]
    subprocess.run(["bash", "-c", "\n".join(lines)], cwd=ROOT, check=True, timeout=60,
                   env={**os.environ, "LC_ALL": encoding, "LISTED": str(path), "GPUS": "1"})
    assert read_run(path) == ("base, seed 0", WORDS)


@pytest.mark.parametrize("step, said", [(8, "and saved, in epoch 0 after step"), (12, "the same command goes on")])
def test_a_run_that_is_stopped_is_saved_and_no_other_begins(base, scienceqa, tmp_path, seed_alone, step, said):
    """The signal may come in the last step of a run, which is then done. A run has 6 steps."""
    runs = {name: commands(base, scienceqa, name) for name in ("base", "seed", "base-again")}
    ended, left = together(tmp_path / "together", runs, before=lambda: signal_at_step(step))
    assert ended.status == 75 and not (tmp_path / "together" / "base-again").exists()
    line = ended.errors.splitlines()[-1]
    assert line.startswith("train.py: stopped by SIGTERM") and said in line
    assert (tmp_path / "together" / "base" / "scores.json").exists()
    assert not (tmp_path / "together" / "seed" / "scores.json").exists()
    ended, left = together(tmp_path / "together", {name: runs[name] for name in left})
    assert ended.status == 0 and left == []
    assert what_it_came_to(tmp_path / "together" / "seed") == what_it_came_to(seed_alone)


def kill_at_step(number: int):
    signal_at_step(number, signal.SIGKILL)


def kill_at_answers(number: int):
    """SIGKILL comes when a process has these many times asked all questions, and has not written the scores yet."""
    write_answers, evaluations = ScienceQATask.write_answers, []

    def counted(self, *args):
        evaluations.append(1)
        if len(evaluations) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        write_answers(self, *args)

    ScienceQATask.write_answers = counted


@pytest.mark.parametrize("kill, number", [(kill_at_step, 8), (kill_at_step, 11), (kill_at_answers, 2)])
def test_the_same_runs_go_on_after_a_kill_and_end_as_they_would_have(base, scienceqa, tmp_path, seed_alone, kill,
                                                                     number):
    """The second run is killed: in its first epoch, in its last one (a run has 6 steps), and before it has scores."""
    runs = often_saved(base, scienceqa, "base", "seed")
    ended, left = together(tmp_path / "together", runs, before=lambda: kill(number))
    assert ended.status == -signal.SIGKILL and left == ["seed"]
    ended, left = together(tmp_path / "together", runs)
    assert ended.status == 0 and left == [] and ended.out.count(", which is finished") == 1 + (kill is kill_at_answers)
    assert_same_run(tmp_path / "together" / "seed", seed_alone, goes_on=kill is kill_at_step)


def what_it_came_to(run: Path) -> tuple[str, str]:
    """The last checkpoint, but for the flags, and the answers."""
    checkpoint = {**load_checkpoint(run / "checkpoint-1.pth"), "flags": None, "sha256": None}
    return json.dumps(checkpoint, default=torch.Tensor.tolist), (run / "generations.jsonl").read_text()


def test_no_run_begins_after_another_process_was_stopped(base, scienceqa, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "stopped").touch()
    ended, left = together(tmp_path, {"base": commands(base, scienceqa, "base")})
    assert ended.status == 75 and left == ["base"] and not (tmp_path / "base").exists()
    assert "stopped, since another of the runs was" in ended.errors


def test_the_base_is_read_once_and_again_where_it_has_changed(base, other_base, scienceqa, tmp_path, monkeypatch):
    read = []
    load_base = shared_base.load_base
    monkeypatch.setattr(shared_base, "load_base", lambda *args: read.append(args[2]) or load_base(*args))
    shared = shared_base.SharedBase()
    monkeypatch.chdir(tmp_path)
    for name, changes in (("a", ()), ("b", ("--adapter_dim", "4")), ("c", ("--precision", "bf16"))):
        (program, *words), _ = commands(base, scienceqa, name, "--stop_after_epoch", "1", *changes)
        shared_base_run(words, shared)
        assert len(read) == {"a": 1, "b": 1, "c": 2}[name]
    path = next(base.vision.glob("*.safetensors"))
    os.utime(path)
    shared_base_run(commands(base, scienceqa, "d", "--stop_after_epoch", "1", "--precision", "bf16")[0][1:], shared)
    assert len(read) == 3


def test_a_base_that_changes_while_it_is_read_is_read_again(base, tmp_path, monkeypatch):
    read, load_base = [], shared_base.load_base

    def changed_meanwhile(*args):
        read.append(1)
        loaded = load_base(*args)
        if len(read) == 1:
            os.utime(next(base.vision.glob("*.safetensors")))
        return loaded

    monkeypatch.setattr(shared_base, "load_base", changed_meanwhile)
    shared = shared_base.SharedBase()
    for n_read in (1, 2, 2):
        shared.lend(BaseSettings(llm_model="tiny", llama_model_path=str(base.weights), vision_model=str(base.vision)),
                    Execution(), AdapterConfig(), torch.device("cpu"), torch.float32, 64)
        assert len(read) == n_read


def shared_base_run(words: list[str], shared) -> None:
    run(train.get_args_parser().parse_args(words), shared)


def test_adapters_that_do_not_fit_are_refused_as_ever(base, scienceqa, tmp_path):
    runs = {"base": commands(base, scienceqa, "base"),
            "unfit": commands(base, scienceqa, "unfit", "--n_prompt", "4")}
    ended, left = together(tmp_path, runs)
    assert ended.status == 1 and left == ["unfit"]
    assert ended.errors.splitlines()[-1] == "train.py: error: --n_prompt 4 must divide the ViT's 6 blocks"


def test_a_command_leaves_its_process_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["series"])
    threads = torch.get_num_threads()
    for _ in range(2):
        with process_of_its_own("train.py"):
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False
            torch.set_num_threads(threads + 1)
            cache.report_no_cache(tmp_path, "full")
            with warnings.catch_warnings(record=True) as shown:
                warnings.simplefilter("default")
                warnings.warn("once", stacklevel=1)
            assert len(shown) == 1
        assert not torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == threads
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert capsys.readouterr().out.count("no cache of pictures") == 2


def test_memory_is_counted_from_the_beginning_of_a_run():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell")
    before = peak_memory_gib(torch.device("cpu"))
    large = bytearray(2**29)
    large[::4096] = bytes([1]) * len(large[::4096])
    assert peak_memory_gib(torch.device("cpu")) > before + 0.3
    del large
    with process_of_its_own("train.py"):
        assert peak_memory_gib(torch.device("cpu")) < before + 0.2


def test_processes_that_train_together_share_their_bases(base, scienceqa, tmp_path):
    """One run splits the model among them, and the next one does not; its evaluation never does."""
    def runs(*names):
        return {name: commands(base, scienceqa, name, "--batch_size", "2", *(["--model_parallel_size", "2"] *
                                                                            (name == "base"))) for name in names}

    def launch(folder: str, **chosen):
        (tmp_path / folder).mkdir()
        files = write_files(tmp_path / folder / "files", chosen)

        def make():
            save = RunFolder.save  # of rank 0, for which the other must wait before it reads what is saved
            RunFolder.save = lambda *args: (time.sleep(0.3), save(*args))[1]
            os.chdir(tmp_path / folder)
            make_runs(files)
        in_processes(make, 2)
        assert not any(path.exists() for path in files)

    launch("together", **runs("base", "seed"))
    launch("alone", **runs("seed"))
    assert_same_run(tmp_path / "together" / "seed", tmp_path / "alone" / "seed")
    assert (tmp_path / "together" / "base" / "scores.json").exists()
