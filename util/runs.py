"""Run folders: the names of their files, their checkpoints, and the lock that keeps others out.

train.py writes recipe.json, config.json, log.txt, metrics.jsonl, checkpoint-{epoch}.pth, and in the middle of an epoch
last.pth; eval.py adds the results.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from lavin.runtime.console import is_main_process, print_rank0
from lavin.runtime.errors import UserError
from lavin.runtime.files import PART_SUFFIX, read_json, write_json
from lavin.weights.adapters import SHARED_TENSORS
from lavin.weights.hub import model_path

RECIPE, CONFIG, LOG, METRICS = "recipe.json", "config.json", "log.txt", "metrics.jsonl"  # of train.py
GENERATIONS, PREDICTIONS, SCORES = "generations.jsonl", "preds.json", "scores.json"  # of eval.py
MME_ANSWERS, MME_SCORES = "mme_answers.jsonl", "mme_scores.json"  # of eval_mme.py
TRACKERS = "trackers.json"  # tracker -> what it needs to find the run again
RUN_FILES = (CONFIG, LOG, SCORES, PREDICTIONS)  # a folder with any of them is a run
# what is scored from a checkpoint; a run that is trained on must not keep it
RESULTS = (PREDICTIONS, GENERATIONS, SCORES, MME_ANSWERS, MME_SCORES)
PARTIAL_SUFFIX = ".partial.jsonl"  # of files of answers as they come
LOCK, OWNER = ".lock", ".owner.json"  # OWNER: which process has locked the folder
LAST = "last.pth"  # the checkpoint in the middle of an epoch


def checkpoint_path(folder: Path, epoch: int) -> Path:
    return folder / f"checkpoint-{epoch}.pth"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Returns the checkpoints of whole epochs by epoch, in order."""
    by_epoch = {int(match[1]): path for path in folder.glob("checkpoint-*.pth")
                if (match := re.fullmatch(r"checkpoint-([0-9]+)\.pth", path.name))}
    return dict(sorted(by_epoch.items()))


def last_checkpoint(path: str) -> Path:
    """Returns `path` itself if it is a file, else the latest checkpoint of a run folder, or the adapters in a folder
    that tools/publish.py has written, which may lie on the hub. Raises UserError if there is none.
    """
    given = model_path(path, "--adapter_path")
    if (given / SHARED_TENSORS).is_file():
        return given / SHARED_TENSORS
    if not given.is_dir():
        if not given.is_file():
            raise UserError(f"no checkpoint {path}: name a checkpoint-*.pth or a run's folder")
        return given
    by_epoch = checkpoints(given)
    if not by_epoch:
        raise UserError(f"no checkpoint-*.pth in {path}: train first, or name another folder")
    return by_epoch[max(by_epoch)]


@contextmanager
def user_error_if_malformed(path: Path) -> Iterator[None]:
    """Turns errors from unexpected content of a file of train.py or eval.py into a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is broken ({type(error).__name__}: {error}): train or evaluate again") from error


# --- Folders ---

def run_folders(paths: list[str]) -> list[Path]:
    """Returns the given run folders, and the runs directly inside given folders that are no runs, without repeats."""
    folders = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"no folder {path}: name a run's --output_dir, or a folder of runs")
        runs = [path] if is_run(path) else [child for child in sorted(path.iterdir()) if is_run(child)]
        if not runs:
            raise UserError(f"{path} holds no run: name a run's --output_dir, or a folder of runs")
        folders |= {folder.resolve(): folder for folder in runs}
    return list(folders.values())


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes out of a folder that results are written to, and fails early where it cannot be written.

    Raises UserError, which names the process that holds the folder. The operating system ends the lock of a process
    that is killed. On rank 0 only.
    """
    if not is_main_process():
        yield
        return
    folder = Path(folder)
    try:
        is_new = not folder.exists()
        lock = lock_folder(folder)
        remove_parts(folder)
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {folder} ({error.strerror}): name another folder") from error
    try:
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()
        if is_new and {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Locks a folder, and notes the owner in it. Raises UserError where another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        owner = read_owner(folder)
        raise UserError(f"{folder} is in use by process {owner.get('process_id', '?')} on {owner.get('host', '?')}: "
                        "wait for it, or name another --output_dir") from error
    except NotImplementedError:
        print_rank0(f"{folder} is on a file system without locks: start nothing else in it")
    write_json(folder / OWNER, {"host": socket.gethostname(), "process_id": os.getpid()})
    return lock


def read_owner(folder: Path) -> dict:
    """The process that has locked the folder; empty where its file is not there or broken."""
    try:
        return read_json(folder / OWNER)
    except UserError:
        return {}


def remove_parts(folder: Path) -> None:
    """Removes the files that processes had begun to write when they were killed."""
    for path in folder.glob(f".*{PART_SUFFIX}"):
        path.unlink(missing_ok=True)
