"""Runs the commands on bad inputs (cases.py): each must end in one line, or leave the result as it is without it.

Every case is a forked process that works in a fresh copy of the world, with limits of time and memory.
"""

import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

import lavin.runtime.files
from lavin.runtime.errors import UserError, describe
from tests.faults import cases, file_cases
from tests.faults.cases import COMMANDS, REFUSED, Case, call
from tests.faults.file_cases import USERS_FILE, USERS_TEXT
from util.data import checksums

LINE, SAME, ANEW, CHANGED, TRACEBACK, CRASH = OUTCOMES = (
    "one line", "same result", "made anew", "changed result", "traceback", "crash")
LIMIT_SECONDS = 60  # of a case; on a free core, the slowest takes five
MEMORY = 4 * 2**30  # bytes of address space that a case may take
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Outcome:
    """The end of a case: one of OUTCOMES, with its words or, where the command gave a result, that result."""

    kind: str
    words: str

    @property
    def wrong(self) -> bool:
        return self.kind in (CHANGED, TRACEBACK, CRASH)


def row(kind: str, outcomes: list[Outcome]) -> list:
    counts = Counter(outcome.kind for outcome in outcomes)
    return [kind, len(outcomes), *(counts[name] for name in OUTCOMES)]


# --- A case, in a process of its own ---

def classify(error: BaseException) -> Outcome:
    """The outcome of an error, as `one_line_errors` treats it."""
    message = describe(error)
    if message is None or "\n" in message.strip():
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {str(error).strip()[:120]!r} ({Path(frame.filename).name}:{frame.lineno})"
        return Outcome(TRACEBACK, words)
    if message.startswith("not enough memory"):
        return Outcome(CRASH, "asks for more memory than there is")
    return Outcome(LINE, message)


def outcome_of(run: Callable[[], Callable[[], str]], reference: str | None) -> Outcome:
    """The outcome of a case. run: does the work, and returns the function that reads the result. reference: the result
    without the fault; None: this is it."""
    try:
        read = run()
    except BaseException as error:  # SystemExit too
        return classify(error)
    try:
        result = read()
    except Exception as error:
        return Outcome(CHANGED, f"no result: {type(error).__name__}: {error}")
    return Outcome(SAME if reference in (None, result) else CHANGED, result)


def run_case(case: Case) -> Callable[[], str]:
    """Runs the command in the current folder."""
    if case.cached:
        fill_cache(case.command)
    case.change()
    return run_command(case.command, case.argv)


def run_command(command: str, more: tuple = ()) -> Callable[[], str]:
    module, argv, result = COMMANDS[command]
    call(module, [*argv, *more])
    sys.stdout.flush()
    return lambda: result(Path("stdout").read_text(errors="replace"))


def fill_cache(command: str) -> None:
    os.environ["LAVIN_CACHE"] = "cache"
    checksums.RECENT_SECONDS = 0  # else files as young as these are hashed every time
    module, argv, _ = COMMANDS[command]
    call(module, [*argv, "--output_dir", "before"])
    time.sleep(0.02)  # ctime has steps of milliseconds


def of_exchanged_file(case: Case, outcome: Outcome, reference: str | None) -> Outcome:
    """A result is right where it is that of the file which is there now, and where the words that must come with it
    are there."""
    if outcome.kind != SAME:
        return outcome
    if case.anew == REFUSED:
        return Outcome(CHANGED, "goes on with the other file")
    if case.told not in Path("stdout").read_text(errors="replace") + Path("stderr").read_text(errors="replace"):
        return Outcome(CHANGED, "goes on with the other file, without a word")
    os.environ["LAVIN_CACHE"] = ""
    shutil.rmtree("output_dir", ignore_errors=True)
    sys.stdin = open("stdin", encoding="utf-8")
    expected = outcome_of(lambda: run_command(case.anew, case.argv), None)
    if expected != outcome:
        return Outcome(CHANGED, f"without the cache and what was there, the file gives another result: {expected}")
    is_silent = outcome.words == reference and not case.told
    return Outcome(CHANGED if is_silent else ANEW, outcome.words)


def check_users_file(outcome: Outcome) -> Outcome:
    is_whole = Path(USERS_FILE).is_file() and Path(USERS_FILE).read_text() == USERS_TEXT
    return outcome if is_whole else Outcome(CHANGED, "a user's file was changed")


def redirect(lines: tuple) -> None:
    Path("stdin").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_RDWR | os.O_CREAT),
                                (2, "stderr", os.O_RDWR | os.O_CREAT)):
        os.dup2(os.open(name, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)


def limit() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT_SECONDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def start(world: Path, folder: Path, case: Case, reference: str | None) -> int:
    """Forks a process for a case, which works in a fresh copy of the world and leaves outcome.json. Returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        shutil.copytree(world, folder, symlinks=True)
        os.chdir(folder)
        Path(USERS_FILE).write_text(USERS_TEXT)
        redirect(case.lines)
        limit()
        outcome = outcome_of(lambda: run_case(case), None if case.anew else reference)
        if case.anew:
            outcome = of_exchanged_file(case, outcome, reference)
        outcome = check_users_file(outcome)
        (folder.parent / f"{folder.name}.json").write_text(json.dumps([outcome.kind, outcome.words]))
    finally:
        os._exit(0)


def read_outcome(folder: Path, status: int) -> Outcome:
    shutil.rmtree(folder, ignore_errors=True)
    path = folder.parent / f"{folder.name}.json"
    if path.is_file():
        outcome = Outcome(*json.loads(path.read_text()))
        path.unlink()
        return outcome
    hangs = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return Outcome(CRASH, f"hangs for {LIMIT_SECONDS} s" if hangs else f"the interpreter ended with status {status}")


def run_all(world: Path, scratch: Path, bad: Iterable[Case], references: dict[str, str], processes: int
            ) -> Iterator[tuple[Case, Outcome]]:
    """Every case with its outcome, in the order in which they end."""
    running: dict[int, tuple[Case, Path]] = {}
    for number, case in enumerate([*bad, *[None] * processes]):
        if len(running) == processes or (case is None and running):
            process, status = os.wait()
            ended, folder = running.pop(process)
            yield ended, read_outcome(folder, status)
        if case:
            folder = scratch / f"case{number}"
            running[start(world, folder, case, references.get(case.command))] = case, folder


def in_process(function: Callable[[], None], folder: Path) -> None:
    """Calls it in a process of its own, so that this one stays without threads and can be forked."""
    process = os.fork()
    if not process:
        os.chdir(folder)
        with open("log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                function()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                log.flush()
            os._exit(1)
    if os.waitpid(process, 0)[1]:
        raise UserError(f"the fault bench itself failed: {(folder / 'log').read_text()[-2000:]}")


def leave_empty(figure: object, path: Path) -> None:
    """Stands for `save_figure`: the page embeds the file, whatever it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def preload() -> None:
    """Imports here what every case would import."""
    import matplotlib.pyplot  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401

    import demo  # noqa: F401
    import eval_mme  # noqa: F401
    import plot_results  # noqa: F401
    import tools.export_hf  # noqa: F401
    import train  # noqa: F401
    import util.chat.terminal  # noqa: F401
    import util.comparison.figures
    import util.search.figures
    import util.search.study  # noqa: F401
    # drawing takes seconds, and the result is the table
    util.comparison.figures.save_figure = util.search.figures.save_figure = leave_empty
    lavin.runtime.files.SAMPLE_BYTES = cases.SAMPLE_BYTES
    gc.collect()
    gc.freeze()


def prepare(scratch: Path) -> tuple[Path, dict[str, str]]:
    """The world, and the results of all commands without a fault."""
    torch.set_num_threads(1)
    preload()
    world = scratch / "world"
    world.mkdir()
    for function in (lambda: cases.build_world(world), cases.train_runs, cases.train_mid, cases.interrupt_eval,
                     cases.search):
        in_process(function, world)
    whole = [Case("reference", command, command) for command in COMMANDS]
    outcomes = {case.command: outcome for case, outcome in run_all(world, scratch, whole, {}, 2)}
    failed = {command: outcome.words for command, outcome in outcomes.items() if outcome.kind != SAME}
    if failed:
        raise UserError(f"commands fail without any fault: {failed}")
    return world, {command: outcome.words for command, outcome in outcomes.items()}


def bench_inputs(match: str = "", processes: int = 2) -> tuple[list[list], list[str]]:
    """Prints each kind as it ends. Returns the rows, and a line for each wrong case."""
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        world, references = prepare(Path(scratch))
        os.chdir(world)
        chosen = sorted((case for kind in (*cases.KINDS, *file_cases.KINDS) for case in kind()
                         if match in f"{case.kind}: {case.name}"), key=lambda case: case.kind)
        for kind, group in groupby(chosen, key=lambda case: case.kind):
            outcomes, n_known = [], len(wrong)
            for case, outcome in run_all(world, Path(scratch), group, references, processes):
                outcomes.append(outcome)
                wrong += [f"{case.kind}: {case.name}: {outcome.kind}: {short(outcome)}"] if outcome.wrong else []
            rows.append(row(kind, outcomes))
            print("  ".join(map(str, rows[-1])), *wrong[n_known:], sep="\n", flush=True)
        os.chdir("/")
    return rows, wrong


def short(outcome: Outcome) -> str:
    return " ".join(outcome.words.split())[:200]
