"""How a program ends: one line that names the file or the flag and says what to do, and an exit status.

This page describes all that ends a program, or passes its end on. Exit statuses:
    0   all is done.
    1   an error that a user can fix (UserError), or a bug, which keeps its traceback.
    2   a mistake on the command line (UsageError).
    75  UNFINISHED: the process was stopped, and the same command goes on.

Of several processes, one speaks. All that meet the same error, or the same signal, would say the same line:
- rank 0 says it and ends at once; torchrun then ends the others.
- the others wait SECONDS_FOR_RANK_0 before they say an error, so that they speak only where rank 0 has not met it;
  where they were stopped, they end in silence.
- a process whose main thread cannot end (it waits for the GPU, or for a dead process) is ended by a thread: after a
  stop signal by that of signals.py, where rank 0 speaks; where another process is frozen by that of heartbeat.py, where
  the first of the processes that still answer speaks.
- torchrun quotes the message of the process that failed first in its last lines (report_to_torchrun); util/launch.py
  makes one line of these, and leaves it out where all were only stopped.

Whoever starts programs tells 75 from the others, and passes a request to stop on as SIGTERM:
- util/launch.py, torchrun for a run on several GPUs: its status is 75 where the process that ended first had 75, or
  where torchrun itself was asked to stop. Under srun it gets SIGUSR1 in place of SIGTERM.
- util/series, several runs in one process: it ends as the first of their commands that fails or is stopped.
- util/search/runner.py, a search's trials: where one ends with 75, or by a signal, the search ends with 75, too.
- scripts/signals.sh, sourced by the scripts: they start nothing more after a signal, and end with 75.
- slurm/run.sh, sourced by the jobs: it requeues a job that Slurm has warned of its time limit, unless all was done.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from lavin.runtime import console, signals
from lavin.runtime.console import by_program, is_main_process
from lavin.runtime.signals import UNFINISHED, Stopped

# words of torch's RuntimeErrors when the host's memory, or a disk or pipe that it writes to, has no space left
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory")

NO_SPACE = ": free some space, and the same command goes on"
FIXES = {errno.ENOSPC: NO_SPACE, errno.EDQUOT: NO_SPACE, errno.EFBIG: ": raise the limit of file sizes (ulimit -f)"}

SECONDS_FOR_RANK_0 = 10  # time for it to speak for all processes, and for the launcher to stop the others


class UserError(Exception):
    """A mistake in files or flags. The message is all that the user sees."""

    exit_status = 1


class UsageError(UserError):
    """A mistake on the command line."""

    exit_status = 2


def first_line(error: Exception) -> str:
    """The first line of another library's error message, to be quoted inside one of ours."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe(error: BaseException) -> str | None:
    """The line for an error that a user, a full disk, memory or the network can cause; None for a bug."""
    if isinstance(error, torch.OutOfMemoryError):
        return (f"not enough GPU memory ({str(error).split('. ')[0]}): train with --gradient_checkpointing or fewer "
                "--bits, answer with a lower --max_batch_size")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError)
                                          and any(words in str(error) for words in OUT_OF_MEMORY)):
        return "not enough memory on this machine: take a smaller batch or model, or free some"
    if isinstance(error, BrokenPipeError):
        return "the program that read the output has ended"
    if isinstance(error, OSError):
        reason = (error.strerror or first_line(error)) + FIXES.get(error.errno or 0, "")
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return str(error) if isinstance(error, UserError) else None


@contextmanager
def one_line_errors(numbers: tuple[signal.Signals, ...] = signals.STOP_SIGNALS) -> Iterator[None]:
    """Turns errors that a user can fix, and stop signals, into one line on stderr and an exit status.

    numbers: the signals that stop the program; a chat leaves SIGINT out, since Ctrl-C stops an answer there.
    """
    console.setup()
    signals.install(numbers)
    try:
        yield
        sys.stdout.flush()  # fails here, and not after the program's end, where the disk is full or the pipe closed
        signals.finish(signal.SIG_IGN)  # all is done: a signal while Python ends must not make it a failure
        return
    except (Stopped, KeyboardInterrupt) as stopped:
        end(str(stopped) or "stopped by SIGINT", UNFINISHED)
    except Exception as error:
        message = describe(error)
        if message is None:
            raise
        end(f"error: {message}", getattr(error, "exit_status", 1))


def end(message: str, status: int) -> None:
    """Ends the process with its line. The other processes of rank 0 end later, so that torchrun stops them first."""
    signals.finish(signal.SIG_IGN if is_main_process() else signal.SIG_DFL)
    message = by_program(message)
    report_to_torchrun(message)
    if not is_main_process():
        if status == UNFINISHED:
            os._exit(status)
        time.sleep(SECONDS_FOR_RANK_0)
    silence_broken_stdout()
    tqdm.write(message, file=sys.stderr)  # clears progress bars first
    if "RANK" in os.environ:
        os._exit(status)  # at once, so that the launcher stops the others before they say the same
    sys.exit(status)


def report_to_torchrun(message: str) -> None:
    """torchrun's summary, the last lines of a failed job's log, quotes the message of the process that failed first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": content}, file)


def silence_broken_stdout() -> None:
    """Python writes what is left in stdout's buffer at its end, and would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
