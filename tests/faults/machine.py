"""Faults of the machine under a run: kills, stop signals, full disks, read-only folders, frozen processes.

A run that was interrupted is started again by the same command, and must end with the same bytes as an unbroken one.
Both work in folders of the same names under other parents, with relative paths, since checkpoints name their folder.
"""

import io
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.faults.cases import BASE, LLAMA, VIT, write_base
from tools.make_mini_scienceqa import write_mini_scienceqa
from util.runs import checkpoints

ROOT = Path(__file__).parents[2]
HEADER = ["fault", "cases", "as it should", "same bytes", "longest s", "remark"]
TORCHRUN = ("-m", "util.launch", "--standalone", "--nproc_per_node", "2")
# a line of metrics.jsonl for every step tells how many steps are repeated
EVERY_STEP = ("import runpy, sys; from util.training import metrics; metrics.STEPS_PER_LINE = 1; "
              "sys.argv[0] = {path!r}; runpy.run_path({path!r}, run_name='__main__')")
SIZES = {"train": 96, "val": 2, "test": 6}
STEPS_PER_EPOCH = SIZES["train"] // 4
GPU_LLAMA = {**LLAMA, "dim": 256, "n_layers": 4, "n_kv_heads": 4}  # heads of 64, for the kernels
GPU_VIT: dict[str, Any] = {**VIT, "img_size": 32, "embed_dim": 128}


@dataclass
class Machine:
    """Folders that share data and base."""

    root: Path
    device: str = "cpu"
    epochs: int = 12
    rng: Random = field(default_factory=lambda: Random(0))

    def folder(self, name: str) -> Path:
        """A new folder in which commands start."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for shared in ("data", "weights", "vit"):
            (folder / shared).symlink_to(self.root / shared)
        return folder

    @property
    def train(self) -> tuple[str, ...]:
        return (f"{ROOT}/train.py", *BASE, "--device", self.device, "--batch_size", "4", "--epochs", str(self.epochs),
                "--warmup_epochs", "1", "--lr", "1e-2", "--max_seq_len", "500", "--save_every_minutes", "0.002",
                "--output_dir", "run")


def build(root: Path, device: str = "cpu") -> Machine:
    with redirect_stderr(io.StringIO()):  # a progress bar
        write_mini_scienceqa(root / "data", SIZES, 0)
    write_base(root, root / "data", *((LLAMA, VIT) if device == "cpu" else (GPU_LLAMA, GPU_VIT)))
    return Machine(root, device)


# --- Processes ---

@dataclass
class Ending:
    status: int
    out: str
    errors: str
    seconds: float = 0.0

    @property
    def lines(self) -> list[str]:
        """Ours on stderr."""
        return re.findall(r"^\w+\.py: .*", self.errors.replace("\r", "\n"), re.MULTILINE)

    def in_one_line(self, words: str = "") -> bool:
        return (len(self.lines) == 1 and words in self.lines[0] and self.status != 0
                and "Traceback (most recent call last)" not in self.errors)


def start(folder: Path, *command: str, environment: dict | None = None, **popen: Any) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], cwd=folder, text=True, **{
        "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(environment or {}),
             "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))})


def wait_for_training(process: subprocess.Popen, run: Path) -> None:
    """Waits until the process has saved a checkpoint, which is in the first epoch that it trains, or has ended."""
    begin = time.time()
    while process.poll() is None and not any(modified(path) > begin for path in run.glob("*.pth")):
        time.sleep(0.01)


def modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0  # it may be replaced at any time


def finish(process: subprocess.Popen, timeout: float = 400) -> Ending:
    begin = time.monotonic()
    out, errors = process.communicate(timeout=timeout)
    return Ending(process.returncode, out or "", errors, time.monotonic() - begin)


def run(folder: Path, *command: str, **popen: Any) -> Ending:
    return finish(start(folder, *command, **popen))


def difference(reference: list[bytes], found: list[bytes]) -> str:
    """Says which results differ; empty where none does."""
    if reference == found:
        return ""
    values = [[json.dumps(torch.load(io.BytesIO(content), weights_only=True), default=torch.Tensor.tolist)
               if content[:2] == b"PK" else content for content in contents] for contents in (reference, found)]
    return "other bytes, of the same values" if values[0] == values[1] else "other values"


def results(folder: Path, names: tuple[str, ...]) -> list[bytes]:
    """Reads results by the names of their files; the result of `run` is its last checkpoint."""
    paths = [checkpoints(folder / name)[max(checkpoints(folder / name))] if name == "run" else folder / name
             for name in names]
    return [path.read_bytes() for path in paths]


# --- Interrupting a run again and again ---

@dataclass
class Interrupted:
    """The results of interruptions. endings: the endings of the interrupted processes. repeated: the number of steps
    that were made twice after each. differences: how each finished run's result differs from the reference's."""

    endings: list[Ending] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def steps_done(run: Path) -> tuple[int, int]:
    """Epoch and step of the last whole line of metrics.jsonl."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
    found = re.findall(r'"epoch": (\d+), "step": (\d+),.*\}\n', text)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def repeated_steps(out: str, done: tuple[int, int]) -> int:
    """Counts the steps that a run repeated, by its output `out`; it repeats none where it was finished."""
    found = re.search(r"goes on from .*: epoch (\d+), step (\d+) of", out)
    return max(0, (done[0] - int(found[1])) * STEPS_PER_EPOCH + done[1] - int(found[2])) if found else 0


def interrupt(machine: Machine, n: int, number: signal.Signals, command: tuple[str, ...], reference: list[bytes],
              most_seconds: float) -> Interrupted:
    """Sends n signals at random moments after training began, and lets the runs go on to their end."""
    result, folder, left, done = Interrupted(), machine.folder("interrupted"), n, None
    while left or done:
        process, before = start(folder, *command), done
        wait_for_training(process, folder / "run")
        if left:
            time.sleep(machine.rng.uniform(0, most_seconds))
            process.send_signal(number)
        ending, done = finish(process), steps_done(folder / "run")
        if before:
            result.repeated.append(repeated_steps(ending.out, before))
        if ending.status:
            result.endings.append(ending)
            left -= 1
            print(f"{number.name}: {n - left} of {n}", file=sys.stderr, flush=True)
            if left < 0:
                raise RuntimeError(f"the same command fails: {ending.errors[-2000:]}")
        else:
            result.differences.append(difference(reference, results(folder, ("run",))))
            folder, done = machine.folder("interrupted"), None
    return result


def unbroken(machine: Machine, *launcher: str) -> tuple[list[bytes], float]:
    """The reference's bytes, and the seconds from its first checkpoint to its end."""
    folder = machine.folder("unbroken")
    process = start(folder, *launcher, *machine.train)
    wait_for_training(process, folder / "run")
    ending = finish(process)
    if ending.status:
        raise RuntimeError(f"the unbroken run fails: {ending.errors[-2000:]}")
    return results(folder, ("run",)), ending.seconds


def bench_kills(device: str, n: int, jobs: int) -> tuple[list[list], list[str]]:
    """Kills runs n times. jobs: the number of runs that are killed side by side, n / jobs times each."""
    with tempfile.TemporaryDirectory() as root:
        machine = build(Path(root), device)
        reference, seconds = unbroken(machine)
        path = machine.train[0]
        command = ("-c", EVERY_STEP.format(path=path), *machine.train[1:])

        def kill(job: int) -> Interrupted:
            twin = replace(machine, root=machine.folder(f"job{job}"), rng=Random(job))
            return interrupt(twin, len(range(job, n, jobs)), signal.SIGKILL, command, reference, 0.6 * seconds)
        with ThreadPoolExecutor(jobs) as pool:
            parts = list(pool.map(kill, range(jobs)))
        result = Interrupted([ending for part in parts for ending in part.endings],
                             [steps for part in parts for steps in part.repeated],
                             [words for part in parts for words in part.differences])
    differing = list(filter(None, result.differences))
    remark = (f"{statistics.median(result.repeated):g} steps of {STEPS_PER_EPOCH * machine.epochs} repeated in "
              f"median, {max(result.repeated)} at most; all identical: {'no' if differing else 'yes'}")
    n_runs = len(result.differences)
    failed = [ending for ending in result.endings if ending.status != -signal.SIGKILL]
    rows = [[f"SIGKILL, {device}", n, n - len(failed), f"{n_runs - len(differing)} of {n_runs}", "", remark]]
    return rows, [*(f"kills: a run ends in {words}" for words in differing),
                  *(f"kills: ended before it was killed: {shown(ending)}" for ending in failed)]


# --- Faults of the machine ---

@dataclass
class Check:
    """The end of a fault. right: whether the fault was answered as it should be. difference: how the result of the same
    command afterwards differs from the reference."""

    right: bool
    difference: str
    ending: Ending
    source: str = ""

    @property
    def wrong(self) -> bool:
        return bool(not self.right or self.difference)

    def __str__(self) -> str:
        return f"{self.source}: {self.difference or 'the same bytes'} afterwards; {shown(self.ending)}"


Fault = Callable[[Machine], Iterator[Check]]


def stop_signal(number: signal.Signals, n: int, launcher: tuple[str, ...], machine: Machine) -> Iterator[Check]:
    reference, seconds = unbroken(machine, *launcher)
    result = interrupt(machine, n, number, (*launcher, *machine.train), reference, 0.6 * seconds)
    for ending in result.endings:
        right = ending.in_one_line(f"stopped by {number.name}, and saved") and ending.seconds < 10
        yield Check(right, "; ".join(filter(None, set(result.differences))), ending)


def shown(ending: Ending) -> str:
    return f"status {ending.status}: {' '.join((' '.join(ending.lines) or ending.errors[-300:]).split())[:300]}"


def again(folder: Path, reference: list[bytes], command: tuple[str, ...], names: tuple[str, ...] = ("run",)) -> str:
    """The difference of what the same command, without a fault, gives."""
    ending = run(folder, *command)
    return f"an error ({shown(ending)})" if ending.status else difference(reference, results(folder, names))


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Callable[[str], Any]]:
    """A file system of its own. Yields a function that changes its options."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield lambda new: subprocess.run(["mount", "-o", f"remount,{new}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@dataclass
class Writer:
    """A command that writes to a folder. names: the files of its results. work: the folder in which it starts, with a
    run `trained` that is finished and scored. reference: its results without a fault, in files of `size` bytes
    together."""

    name: str
    command: tuple[str, ...]
    written: str
    names: tuple[str, ...]
    work: Path = Path()
    reference: list[bytes] = field(default_factory=list)
    size: int = 0

    def again(self) -> str:
        return again(self.work, self.reference, self.command, self.names)


WRITERS = (
    Writer("eval", (f"{ROOT}/eval.py", "--adapter_path", "trained", "--device", "cpu", "--output_dir", "scored"),
           "scored", ("scored/preds.json", "scored/scores.json", "scored/generations.jsonl")),
    Writer("plot", (f"{ROOT}/plot_results.py", "trained", "--out", "plots"), "plots",
           ("plots/table.csv", "plots/table.md")),
    Writer("export", ("-m", "tools.export_hf", "--adapter_path", "trained", "--out", "exported"), "exported",
           ("exported/model.safetensors", "exported/config.json")))


def writers(machine: Machine) -> Iterator[Writer]:
    folder = machine.folder("trained")
    run(folder, *machine.train)
    run(folder, f"{ROOT}/eval.py", "--adapter_path", "run", "--device", "cpu")
    for writer in (Writer("train", machine.train, "run", ("run",)), *WRITERS):
        work = machine.folder("work")
        shutil.copytree(folder / "run", work / "trained")
        ending = run(work, *writer.command)
        if ending.status:
            raise RuntimeError(f"{writer.name} fails without a fault: {shown(ending)}")
        size = sum(path.stat().st_size for path in (work / writer.written).rglob("*") if path.is_file())
        yield replace(writer, work=work, reference=results(work, writer.names), size=size)


FRACTIONS = (0.0, 0.1, 0.3, 0.6, 0.9)  # of what a command writes


def full_disk(machine: Machine) -> Iterator[Check]:
    for writer in writers(machine):
        for fraction in FRACTIONS:
            shutil.rmtree(writer.work / writer.written)
            size = 4096 * max(1, int(fraction * writer.size / 4096))
            with small_disk(writer.work / writer.written, f"size={size}") as remount:
                ending = run(writer.work, *writer.command)
                remount("size=256m")
                difference = writer.again()
            right = ending.status == 0 or ending.in_one_line()
            yield Check(right, difference, ending, f"{writer.name} with {size} bytes")


def read_only(machine: Machine) -> Iterator[Check]:
    for writer in writers(machine):
        shutil.rmtree(writer.work / writer.written)
        with small_disk(writer.work / writer.written, "size=256m,ro") as remount:
            ending = run(writer.work, *writer.command)
            remount("rw")
            difference = writer.again()
        yield Check(ending.in_one_line(), difference, ending, writer.name)


def file_size_limit(machine: Machine) -> Iterator[Check]:
    for writer in writers(machine):
        largest = max(map(len, writer.reference))
        for size in (0, 200, 2000, largest // 2, largest - 1):
            shutil.rmtree(writer.work / writer.written)
            limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
            ending = run(writer.work, *writer.command, preexec_fn=limit)
            right = ending.status == 0 or ending.in_one_line()
            yield Check(right, writer.again(), ending, f"{writer.name} at {size} bytes")


def full_output(machine: Machine) -> Iterator[Check]:
    for writer in writers(machine):
        shutil.rmtree(writer.work / writer.written)
        with open("/dev/full", "w") as full:
            ending = run(writer.work, *writer.command, stdout=full)
        yield Check(ending.in_one_line(), writer.again() if writer.name != "export" else "", ending, writer.name)


def two_at_once(machine: Machine) -> Iterator[Check]:
    (reference, _), folder = unbroken(machine), machine.folder("work")
    first = start(folder, *machine.train)
    wait_for_training(first, folder / "run")
    second = run(folder, *machine.train)
    finish(first)
    right = second.in_one_line(f"in use by process {first.pid} on {os.uname().nodename}")
    yield Check(right, again(folder, reference, machine.train), second)


def child(process: subprocess.Popen, rank: int) -> int:
    """The process id of one of torchrun's."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{process.pid}\n" in (path / "status").read_text()
            if is_child and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue
    raise RuntimeError(f"torchrun {process.pid} has no process {rank}")


def lost_rank(number: signal.Signals, words: str, most_seconds: float, machine: Machine) -> Iterator[Check]:
    """One of two processes is frozen or killed; the job must end in time, with words that name the process."""
    (reference, seconds), folder = unbroken(machine, *TORCHRUN), machine.folder("work")
    process = start(folder, *TORCHRUN, *machine.train)
    wait_for_training(process, folder / "run")
    time.sleep(0.3 * seconds)
    os.kill(child(process, 1), number)
    ending = finish(process)
    right = ending.status != 0 and ending.seconds < most_seconds and words in ending.errors
    yield Check(right, again(folder, reference, (*TORCHRUN, *machine.train)), ending)


def left_over_rank(machine: Machine) -> Iterator[Check]:
    (reference, _), folder = unbroken(machine), machine.folder("work")
    for variables in ({"RANK": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}):
        ending = run(folder, *machine.train, environment=variables)
        yield Check(ending.in_one_line("unset RANK"), again(folder, reference, machine.train), ending, str(variables))


FAULTS: dict[str, Fault] = {
    "SIGTERM": partial(stop_signal, signal.SIGTERM, 10, ()),
    "SIGINT": partial(stop_signal, signal.SIGINT, 3, ()),
    "SIGUSR1": partial(stop_signal, signal.SIGUSR1, 3, ()),
    "SIGHUP": partial(stop_signal, signal.SIGHUP, 3, ()),
    "SIGTERM, torchrun": partial(stop_signal, signal.SIGTERM, 3, TORCHRUN),
    "two runs in one folder": two_at_once,
    "RANK left over": left_over_rank,
    "a dead process": partial(lost_rank, signal.SIGKILL, "", 30),
    "full disk": full_disk,
    "limit of file sizes": file_size_limit,
    "stdout is full": full_output,
    "read-only folder": read_only,
    "a frozen process": partial(lost_rank, signal.SIGSTOP, "has not answered", 300)}
NEED_MOUNT = ("full disk", "read-only folder")
NEED_TWO_GPUS = ("SIGTERM, torchrun", "a dead process", "a frozen process")  # on GPUs


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), "size=1m"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def bench_machine(device: str = "cpu", match: str = "") -> tuple[list[list], list[str]]:
    """Prints a line for each fault as it ends. device: the device of the runs."""
    rows, wrong = [], []
    # a shell's background commands ignore SIGINT and those of nohup SIGHUP, and so would the runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    skipped = dict.fromkeys(() if can_mount() else NEED_MOUNT, "mount is not permitted")
    if device == "cuda" and torch.cuda.device_count() < 2:
        skipped |= dict.fromkeys(NEED_TWO_GPUS, "it needs two GPUs")
    with tempfile.TemporaryDirectory() as root:
        machine = build(Path(root), device)
        for name, fault in FAULTS.items():
            if match not in name:
                continue
            if name in skipped:
                rows.append([name, 0, 0, "0 of 0", "", f"skipped: {skipped[name]}"])
                continue
            checks = list(fault(machine))
            wrong += [f"machine: {name}: {check}" for check in checks if check.wrong]
            rows.append([name, len(checks), sum(check.right for check in checks),
                         f"{sum(not check.difference for check in checks)} of {len(checks)}",
                         f"{max(check.ending.seconds for check in checks):.1f}", ""])
            print(*rows[-1], sep="  ", flush=True)
    return rows, wrong
