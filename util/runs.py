"""Run folders: config.json, log.txt and checkpoint-{epoch}.pth of train.py, and the results that eval.py adds."""

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json_lines, write_json, write_json_lines

RUN_FILES = ("config.json", "log.txt", "scores.json", "preds.json")  # a folder with any of them is a run
RESULTS = ("log.txt", "preds.json", "generations.jsonl", "scores.json")
PACKAGES = ("timm", "sentencepiece", "numpy", "pillow")


def checkpoint_path(folder: Path, epoch: int) -> Path:
    return folder / f"checkpoint-{epoch}.pth"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints by epoch, in order."""
    by_epoch = {int(path.stem.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*.pth")
                if path.stem.removeprefix("checkpoint-").isdigit()}
    return dict(sorted(by_epoch.items()))


def last_checkpoint(path: str) -> Path:
    """`path` itself if it is a file, or the latest checkpoint of a run folder. Raises UserError if there is none."""
    given = Path(path)
    if not given.is_dir():
        if not given.is_file():
            raise UserError(f"no checkpoint {path}: name a checkpoint-*.pth or a run's folder")
        return given
    by_epoch = checkpoints(given)
    if not by_epoch:
        raise UserError(f"no checkpoint-*.pth in {path}: train first, or name another folder")
    return by_epoch[max(by_epoch)]


def git_commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def write_config(folder: Path, flags: dict, device: torch.device, world: int, n_layers: int) -> None:
    """Writes config.json. n_layers: LLaMA's, needed to recompute the dropout schedule."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__,  # which names its CUDA version, too
                **{package: version(package) for package in PACKAGES}}
    write_json(folder / "config.json", {"flags": flags, "versions": versions, "git_commit": git_commit(),
                                        "device": f"{device.type}: {name}", "world_size": world,
                                        "n_layers": n_layers})


def clear_results(folder: Path) -> bool:
    """Removes an earlier run's results, so that they do not mix with the new run's. Returns whether there were any."""
    old = [path for path in (*map(folder.joinpath, RESULTS), *checkpoints(folder).values()) if path.exists()]
    for path in old:
        path.unlink()
    return bool(old)


def append_log(folder: Path, entry: dict) -> None:
    """Adds an epoch's line to log.txt; replaces lines of this and later epochs, which an interrupted run left."""
    path = folder / "log.txt"
    earlier = [line for line in read_json_lines(path) if line["epoch"] < entry["epoch"]] if path.is_file() else []
    write_json_lines(path, [*earlier, entry])


@contextmanager
def user_error_if_malformed(path: Path) -> Iterator[None]:
    """Turns errors from unexpected content of a file of train.py or eval.py into a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is broken ({type(error).__name__}: {error}): train or evaluate again") from error


def run_folders(paths: list[str]) -> list[Path]:
    """The given run folders, and the runs directly inside given folders that are no runs; without repeats."""
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
