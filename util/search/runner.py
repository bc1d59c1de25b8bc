"""Runs train.py and eval.py for a trial, as commands of their own, and keeps account of it in trial.json.

The commands inherit the worker's lock on the trial. They are stopped as a user would stop them: they save, and go on
later.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavin.runtime import signals
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from util.runs import checkpoint_path, checkpoints
from util.search.folder import LOG, add_seconds, change_record, sign_of_life
from util.search.space import Values, command_line

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.5
ENDED_BY_SIGNAL = (signals.UNFINISHED, *(-number for number in signals.STOP_SIGNALS))  # before or after saving


class CommandFailed(UserError):
    """The command's own line."""


class HoursSpent(Exception):
    """--gpu_hours are used up."""


@dataclass(frozen=True)
class Runner:
    """flags: train.py's. machine: those of them that eval.py does not read from the run. gpus: of one trial.
    seconds_left: until the study's GPU-hours are used up, for one trial."""

    flags: list[str]
    machine: list[str]
    gpus: int
    seconds_left: Callable[[], float]

    def train(self, folder: Path, values: Values, epochs: int, lock: int, *more: str) -> None:
        """Trains up to this number of epochs, unless they are there."""
        if max(checkpoints(folder), default=-1) + 1 < epochs:
            self.run(folder, lock, "train.py", "--keep_last", "1", *self.flags, *command_line(values), *more,
                     "--output_dir", str(folder))

    def score(self, folder: Path, epochs: int, out: Path, lock: int, *more: str) -> dict[str, Any]:
        """The scores of the checkpoint after this number of epochs, in the folder `out`."""
        if not (out / "scores.json").is_file():
            self.run(folder, lock, "eval.py", *self.machine, "--adapter_path", str(checkpoint_path(folder, epochs - 1)),
                     "--output_dir", str(out), *more)
        return read_json(out / "scores.json")

    def run(self, folder: Path, lock: int, program: str, *arguments: str) -> None:
        launcher = ["-m", "util.launch", "--standalone", "--nproc_per_node", str(self.gpus)] if self.gpus > 1 else []
        start = time.monotonic()
        change_record(folder, since=sign_of_life(folder / LOG))  # should this worker be killed
        try:
            run_command([sys.executable, *launcher, str(ROOT / program), *arguments], folder / LOG, lock,
                        self.seconds_left())
        finally:
            add_seconds(folder, time.monotonic() - start)


def run_command(command: list[str], log: Path, lock: int, seconds: float) -> None:
    """Raises CommandFailed where the command fails, HoursSpent after `seconds`, and Stopped at a signal to either."""
    end = time.monotonic() + seconds
    if seconds <= 0:
        raise HoursSpent
    with open(log, "ab") as output, signals.deferred():
        begin = output.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   pass_fds=[lock])
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
        raise CommandFailed(what_it_said(log, begin, status))


def what_it_said(log: Path, begin: int, status: int) -> str:
    """The error's own line, or else the last one."""
    with open(log, "rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in re.split(r"[\r\n]+", file.read().decode(errors="replace")) if line.strip()]
    errors = [match[1] for line in lines if (match := re.match(r"\w+\.py: error: (.*)", line))]
    return (errors or lines or [f"exit status {status}"])[-1][:500]
