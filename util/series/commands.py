"""One process makes several runs. Each of their commands does and says what it would in a process of its own.

A file describes a run: its first line is `# ` and the run's title, and each other line is a command as in a shell, such
as `train.py FLAG...` or `eval.py FLAG...`. The file is removed when the run is done.

- A run's files, scores and answers are the same as those of single commands, bit for bit on a CPU: each command sets
  the random state before it draws, gets fresh adapters, and finds the process as the first one did
  (`process_of_its_own`).
- A command that fails or is stopped ends the process with its exit status, and later runs do not begin. The first
  remaining file is that of the run that failed. Whoever started the process decides what happens to the others.
- A stop signal to one of several processes is meant for all of them: a run does not begin a command if a file `stopped`
  lies beside the run's file.
"""

import gc
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lavin.runtime import distributed, signals
from lavin.runtime.console import is_main_process, print_rank0
from lavin.runtime.device import set_determinism
from lavin.runtime.flags import Flags, Parser
from util.data import cache
from util.evaluation import scienceqa
from util.evaluation.settings import scienceqa_parser
from util.shared_base import SharedBase
from util.training import command as training
from util.training.settings import get_args_parser as train_parser
from util.training.throughput import restart_peak_memory

STOPPED = "stopped"  # the name of the file that keeps further runs from beginning
PROGRAMS: dict[str, tuple[Callable[[], Parser], Callable[[Flags, SharedBase], None]]] = {
    "train.py": (train_parser, training.run),
    "eval.py": (scienceqa_parser, scienceqa.run),
}


def make_runs(paths: list[Path]) -> None:
    """Makes the runs that these files describe, and removes the file of each run that is done."""
    shared, runs = SharedBase(), [read_run(path) for path in paths]  # read at once, since rank 0 removes the files
    for path, (title, commands) in zip(paths, runs, strict=True):
        require_not_stopped(path)
        print_rank0(f"== {title}")
        for words in commands:
            require_not_stopped(path)
            run_command(words, shared)
        if is_main_process():
            path.unlink()
    distributed.close()


def read_run(path: Path) -> tuple[str, list[list[str]]]:
    """Returns the title of a run, and the words of each of its commands."""
    title, *lines = os.fsdecode(path.read_bytes()).strip("\n").split("\n")  # as Python decodes a command line
    return title.removeprefix("# "), [shlex.split(line) for line in lines]


def require_not_stopped(path: Path) -> None:
    """Raises Stopped on all ranks if one of them got a stop signal in the last step of its command, or if another run
    was stopped.

    The ranks wait for one another here, since the next command reads what rank 0 writes at the end of the last one.
    """
    found = distributed.all_gather_object((signals.requested, path.with_name(STOPPED).exists()))
    if requested := next((name for name, _ in found if name), None):
        raise signals.Stopped(f"stopped by {requested}: the same command goes on")
    if any(exists for _, exists in found):
        raise signals.Stopped("stopped, since another of the runs was: the same command goes on")


def run_command(words: list[str], shared: SharedBase) -> None:
    program, *flags = words
    parser, run = PROGRAMS[program]
    with process_of_its_own(program):
        run(parser().parse_args(flags), shared)


@contextmanager
def process_of_its_own(program: str) -> Iterator[None]:
    """Lets a command run as in a process of its own, and puts back what it has changed in this process if it ends well.
    `program` is the command's name in messages."""
    sys.argv[0] = program
    threads = torch.get_num_threads()
    restart_peak_memory()
    for once in (cache.report_no_cache, cache.report_distrust):
        once.cache_clear()
    with warnings.catch_warnings():  # also makes Python show again what it has shown once
        yield
    torch.set_num_threads(threads)
    set_determinism(False)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
