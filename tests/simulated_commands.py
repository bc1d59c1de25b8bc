"""train.py and eval.py as a search starts them, without a model: they keep a clock, checkpoints and answers.

A search cannot tell the difference: it is the commands' flags, exit statuses and files that it goes by.
"""

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import eval as evaluation
import train
from lavin.runtime.errors import describe
from lavin.runtime.files import read_json, write_json, write_json_lines
from lavin.runtime.signals import UNFINISHED
from util.data.datasets import load_scienceqa
from util.evaluation.scoring import COLUMNS
from util.fingerprint import fingerprints
from util.flags import BaseSettings
from util.runs import checkpoint_path, checkpoints
from util.search.processes import SharedProcess

EPOCH_SECONDS, SCORE_SECONDS, STOP_SECONDS = 10.0, 4.0, 2.0  # STOP_SECONDS: from the signal to the end, while it saves
QUESTIONS = {"val": 200, "test": 300}


def checksums(flags, split: str, questions: int | None = None) -> dict[str, str]:
    """The checksums of the files that lie there now, as recipe.json and scores.json hold them."""
    data = load_scienceqa(flags.data_root, split)
    return {"data": (data.sample(questions) if questions else data).fingerprint, **fingerprints(BaseSettings.of(flags))}


class Machine:
    """Runs one command at a time, on a clock that nothing else moves.

    quality(flags of train.py, epochs): the share of questions that a checkpoint answers. fails(flags): whether training
    ends with an error. stops: times at which the command that runs is stopped by a signal to itself.
    kills: times at which it is killed, and saves nothing. full: whether training ends since the disk is full. commands:
    the program, the parsed flags and the GPUs of each that was started. gpu_seconds: the sum over all.
    """

    def __init__(self, quality: Callable, fails: Callable = lambda flags: False, stops=(), kills=()):
        self.quality, self.fails, self.full = quality, fails, False
        self.stops, self.kills = sorted(stops), sorted(kills)
        self.now, self.gpu_seconds, self.commands = 0.0, 0.0, []
        self.epochs_made: dict[str, list[int]] = {}  # by the name of the run's folder

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(SharedProcess, "start", lambda _, words, log, lock: Process(self, words, log))
        monkeypatch.setattr(subprocess, "Popen", lambda words, stdout, **_: Process(self, words, stdout))  # torchrun
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine crashes here, and most of the time goes there

    def flags_of(self, program: str) -> list[SimpleNamespace]:
        """The flags of each command of this program, in order."""
        return [flags for name, flags, _ in self.commands if name == program]


class Process:
    """Stands for a util.search.processes.Process."""

    def __init__(self, machine: Machine, words: list[str], log):
        place = next(i for i, word in enumerate(words) if word.endswith(("train.py", "eval.py")))
        self.machine, self.log, self.program = machine, log, Path(words[place]).stem
        parser = {"train": train, "eval": evaluation}[self.program].get_args_parser()
        self.flags = parser.parse_args(words[place + 1:])
        self.gpus = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 1
        machine.commands.append((self.program, self.flags, self.gpus))
        log.write(f"{self.program} begins\n".encode())
        self.left, self.finish = self.train() if self.program == "train" else (SCORE_SECONDS, self.score)

    # --- As the search sees it ---

    def wait(self, timeout: float = 1e9) -> int:
        stop, kill = (next((at for at in times if at > self.machine.now), 1e18) - self.machine.now
                      for times in (self.machine.stops, self.machine.kills))
        seconds = min(timeout, self.left, stop, kill)
        self.pass_time(seconds)
        self.left -= seconds
        if self.left <= 0:
            return self.finish()
        if seconds == stop:
            return self.save()
        if seconds == kill:
            return -signal.SIGKILL
        raise subprocess.TimeoutExpired(self.program, timeout)

    def terminate(self) -> None:
        self.pass_time(STOP_SECONDS)
        status = self.save()
        self.left, self.finish = 0.0, lambda: status

    # --- What it does ---

    def pass_time(self, seconds: float) -> None:
        self.machine.now += seconds
        self.machine.gpu_seconds += seconds * self.gpus

    @property
    def folder(self) -> Path:
        return Path(self.flags.output_dir)

    def train(self) -> tuple[float, Callable]:
        """Trains on from what an earlier command has left in the middle of an epoch, or from the last checkpoint."""
        self.begun, goal = max(checkpoints(self.folder), default=-1) + 1, self.flags.stop_after_epoch
        self.goal = self.flags.epochs if goal is None else goal
        partial = self.folder / "last.pth"
        self.before = read_json(partial)["seconds"] if partial.is_file() else 0.0
        if self.machine.full:
            return EPOCH_SECONDS, self.run_out_of_space
        if self.machine.fails(self.flags):
            return EPOCH_SECONDS, self.fail
        self.needed = (self.goal - self.begun) * EPOCH_SECONDS - self.before
        return self.needed, self.trained

    def fail(self) -> int:
        self.log.write(b"train.py: error: the loss is not finite\n")
        return 1

    def run_out_of_space(self) -> int:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "checkpoint-0.pth"))
        self.log.write(f"train.py: error: {describe(error)}\n".encode())
        return 1

    def reach(self, epochs: int) -> None:
        for epoch in range(self.begun, epochs):
            self.machine.epochs_made.setdefault(self.folder.name, []).append(epoch)
        if epochs > self.begun:
            for path in checkpoints(self.folder).values():
                path.unlink()
            flags = vars(self.flags).copy() | {"given": sorted(self.flags.given)}
            write_json(self.folder / "recipe.json", {"recipe": checksums(self.flags, "train")})
            write_json(self.folder / "config.json", {"flags": flags, "world_size": self.gpus})
            write_json_lines(self.folder / "log.txt", [{"epoch": epoch, "train_closs": 1.0} for epoch in range(epochs)])
            write_json(checkpoint_path(self.folder, epochs - 1), {"epochs": epochs, "flags": flags})
            (self.folder / "last.pth").unlink(missing_ok=True)

    def trained(self) -> int:
        self.reach(self.goal)
        return 0

    def save(self) -> int:
        if self.program == "train":
            seconds = self.before + self.needed - self.left
            self.reach(self.begun + int(seconds // EPOCH_SECONDS))
            write_json(self.folder / "last.pth", {"seconds": seconds % EPOCH_SECONDS})
        return UNFINISHED

    def score(self) -> int:
        """Questions that are easy enough for the checkpoint are answered, so that it does not matter who asks."""
        checkpoint, n_all = read_json(Path(self.flags.adapter_path)), QUESTIONS[self.flags.split]
        n = min(self.flags.questions or n_all, n_all)
        right = self.machine.quality(SimpleNamespace(**checkpoint["flags"]), checkpoint["epochs"])
        answers = [{"qid": str(1000 + i), "prediction": int((i * 37 % n + 0.5) / n < right), "answer": 1}
                   for i in range(n)]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "generations.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        n_right = sum(answer["prediction"] for answer in answers)
        none = dict.fromkeys(COLUMNS, 0)
        write_json(self.folder / "scores.json", {  # as if all wrong ones were of one subject
            "split": self.flags.split, "decode": self.flags.decode, "questions": n,
            **dict.fromkeys(COLUMNS), "NAT": 100 * bool(n_right) or None, "SOC": 0 if n_right < n else None,
            "Avg": 100 * n_right / n, "counts": {**none, "NAT": n_right, "SOC": n - n_right, "Avg": n},
            "correct": {**none, "NAT": n_right, "Avg": n_right},
            **checksums(SimpleNamespace(**checkpoint["flags"]), self.flags.split, self.flags.questions)})
        return 0
