"""A worker runs train.py and eval.py for a trial in other processes (processes.py), and notes their time in trial.json.

Like the worker, the commands hold the lock on the trial. They are stopped as a user would stop them, so that they save
and can go on later.
"""

import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavin.runtime import signals
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, sha256
from lavin.runtime.flags import command_line
from util.evaluation.results import read_scores
from util.runs import SCORES, checkpoint_path, checkpoints
from util.search.errors import CommandFailed, WorkerError, is_of_machine
from util.search.folder import LOG, add_seconds, change_record, sign_of_life
from util.search.identity import FILES, SCORING, Identity, checksums, differences, require_same
from util.search.processes import Start
from util.search.space import Values

POLL_SECONDS = 0.5
# the exit status of a command that was stopped: the first one after it has saved, the others before
ENDED_BY_SIGNAL = (signals.UNFINISHED, *(-number for number in signals.STOP_SIGNALS))
KILLED_PROCESS = "Signal 9 (SIGKILL) received"  # torchrun says so of one of its processes
PROBE_BYTES = 2**20


class HoursSpent(Exception):
    """The hours of --gpu_hours are used up."""


@dataclass(frozen=True)
class Runner:
    """Runs a trial's commands one after another.

    `flags` are the flags of train.py for all trials, as words, and `machine` those of them that eval.py does not read
    from the run. `gpus` is the number of GPUs of one trial. `seconds_left` returns how many seconds one trial has until
    the study's GPU-hours are used up. `start` starts a command. `identity` is that of the study.
    """

    flags: list[str]
    machine: list[str]
    gpus: int
    seconds_left: Callable[[], float]
    start: Start
    identity: Identity = field(default_factory=dict)

    def train(self, folder: Path, values: Values, epochs: int, lock: int, *more: str) -> None:
        """Trains a run up to so many epochs, unless it has them. Raises WorkerError if the run has another identity
        than the study."""
        self.check_recipe(folder)
        if max(checkpoints(folder), default=-1) + 1 < epochs:
            self.run(folder, lock, "train.py", "--keep_last", "1", *self.flags, *command_line(values), *more,
                     "--output_dir", str(folder))
            self.check_recipe(folder)

    def check_recipe(self, folder: Path) -> None:
        """Raises WorkerError if the run's recipe is broken, or tells another identity than the study's."""
        path, fix = folder / FILES["train"], f"put back what it began with, and remove {folder} to begin the run anew"
        if path.is_file():
            try:
                recipe = read_json(path)["recipe"]
            except (UserError, KeyError) as error:
                raise WorkerError(f"{path} is broken: remove {folder} to begin the run anew") from error
            require_same(path, {"train": checksums(recipe)}, self.identity, fix)

    def score(self, folder: Path, epochs: int, out: Path, part: str, lock: int, *more: str) -> dict[str, Any]:
        """Returns the scores of the checkpoint after so many epochs, which lie in the folder `out`. `part` is the part
        of the study's identity to which they belong.

        Scores of another checkpoint or of another identity are replaced. Raises WorkerError if the new scores have
        another identity, too.
        """
        path, checkpoint = out / SCORES, checkpoint_path(folder, epochs - 1)
        if not self.is_scored(path, part, checkpoint):
            self.run(folder, lock, "eval.py", *self.machine, "--adapter_path", str(checkpoint), "--output_dir",
                     str(out), *command_line(SCORING[part]), *more)
        scores = read_scores(path)
        require_same(path, {part: scores}, self.identity)
        return scores

    def is_scored(self, path: Path, part: str, checkpoint: Path) -> bool:
        """Returns whether the file at `path` has scores of this checkpoint. If the trial has gone on, the checkpoint is
        no longer there, and its scores count."""
        try:
            scores = read_scores(path)
        except UserError:  # the file is not there, or broken
            return False
        is_other = checkpoint.is_file() and scores.get("checkpoint_sha256") not in (None, sha256(checkpoint))
        return ({"correct", "counts"} <= scores.keys() and not is_other
                and not differences({part: scores}, self.identity))

    def run(self, folder: Path, lock: int, program: str, *arguments: str) -> None:
        begin = time.monotonic()
        change_record(folder, since=sign_of_life(folder / LOG))  # for a worker that finds this one killed
        try:
            run_command(self.start, [program, *arguments], folder / LOG, lock, self.seconds_left())
        finally:
            add_seconds(folder, time.monotonic() - begin)


def run_command(start: Start, words: list[str], log: Path, lock: int, seconds: float) -> None:
    """Runs a command, whose output goes to `log` in the folder of a trial.

    Raises CommandFailed if the command fails, WorkerError or OSError if it fails since its machine lacks memory or disk
    space, HoursSpent after `seconds`, and Stopped if this process or the command got a stop signal.
    """
    end = time.monotonic() + seconds
    if seconds <= 0:
        raise HoursSpent
    with open(log, "ab") as output, signals.deferred():
        begin = output.tell()
        process = start(words, output, lock)
        status = None
        while status is None:
            try:
                status = process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                sign_of_life(log)
                if signals.requested or time.monotonic() > end:
                    process.terminate()  # once: torchrun would take a second signal for impatience
                    status = process.wait()
    if signals.requested:
        raise signals.Stopped(f"stopped by {signals.requested}: the same command goes on")
    if status and time.monotonic() > end:
        raise HoursSpent
    if status in ENDED_BY_SIGNAL:
        raise signals.Stopped(f"{log.parent} was stopped by a signal: the same command goes on")
    if status:
        said = read_from(log, begin)
        if status == -signal.SIGKILL or KILLED_PROCESS in said:
            raise WorkerError(f"{log.parent}: its command was killed (SIGKILL), as the system does where memory is "
                              "short: free some, and the same command goes on")
        message = error_line(said) or f"exit status {status}"
        if is_of_machine(message):
            raise WorkerError(f"{log.parent}: {message}")
        write_probe(log.parent)
        raise CommandFailed(message)


def write_probe(folder: Path) -> None:
    """Raises OSError if the disk is full. A command cannot say so if its log is on the same disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def read_from(log: Path, begin: int) -> str:
    with open(log, "rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def error_line(said: str) -> str:
    """Returns the error line of train.py or eval.py among what a command said or, if there is none, the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    errors = [match[1] for line in lines if (match := re.match(r"\w+\.py: error: (.*)", line))]
    return (errors or lines or [""])[-1][:500]
