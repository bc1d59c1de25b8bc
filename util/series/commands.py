"""The commands of several runs in one process: each does and says what it would in a process of its own.

A run is a file: its title behind `# `, then its commands, a line each, as in a shell: `train.py FLAG...`, `eval.py
FLAG...`. The file is removed when the run is done.

- Files, scores and answers are the same, bit for bit on a CPU: every command sets the random state before it draws,
  gets fresh adapters, and finds what it may change in the process as it was (`process_of_its_own`).
- A command that fails or is stopped ends the process, as it would end its own, whatever state that is then in. The
  first file that is left is its run's; whoever started the process decides on the others.
- A signal to one process is meant for all: where a file `stopped` lies beside that of a run, none of its commands
  begins.
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
    shared, runs = SharedBase(), [read_run(path) for path in paths]  # at once: rank 0 removes them one by one
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
    """The title of a run, and the words of each of its commands."""
    title, *lines = os.fsdecode(path.read_bytes()).strip("\n").split("\n")  # as Python decodes a command line
    return title.removeprefix("# "), [shlex.split(line) for line in lines]


def require_not_stopped(path: Path) -> None:
    """Raises Stopped, on all ranks, where one was asked to stop while it did its last step, or another of the runs was.

    The ranks wait for one another here: the next command reads what rank 0 writes at the end of the one before it.
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
    """Puts back, when a command has ended well, all that it has changed in its process. program: the command's name in
    messages."""
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
