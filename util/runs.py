"""A run's folder: config.json, log.txt, checkpoint-{epoch}.pth, and what eval.py adds to them."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from lavin.errors import UserError
from util.files import read_json_lines, write_json, write_json_lines

RESULTS = ("log.txt", "preds.json", "generations.jsonl", "scores.json")
PACKAGES = ("torch", "timm", "sentencepiece", "numpy", "pillow")


def checkpoint_path(folder: Path, epoch: int) -> Path:
    return folder / f"checkpoint-{epoch}.pth"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints by epoch, first to last."""
    found = {int(path.stem.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*.pth")
             if path.stem.removeprefix("checkpoint-").isdigit()}
    return dict(sorted(found.items()))


def last_checkpoint(path: str) -> Path:
    """The file itself, or a run folder's latest checkpoint. Raises UserError where there is none."""
    given = Path(path)
    if not given.is_dir():
        if not given.is_file():
            raise UserError(f"no checkpoint {path}: name a checkpoint-*.pth or a run's folder")
        return given
    found = checkpoints(given)
    if not found:
        raise UserError(f"no checkpoint-*.pth in {path}: train first, or name another folder")
    return found[max(found)]


def git_commit() -> str | None:
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip() or None


def write_config(folder: Path, flags: dict, device: torch.device, world: int, n_layers: int) -> None:
    """config.json; n_layers: of LLaMA, over which the dropout schedule runs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    write_json(folder / "config.json", {"flags": flags, "versions": versions, "git_commit": git_commit(),
                                        "device": f"{device.type}: {name}", "world_size": world,
                                        "n_layers": n_layers})


def start_afresh(folder: Path) -> bool:
    """Removes an earlier run's results, which would not be this run's. Returns whether there were any."""
    old = [path for path in (*map(folder.joinpath, RESULTS), *checkpoints(folder).values()) if path.exists()]
    for path in old:
        path.unlink()
    return bool(old)


def append_log(folder: Path, entry: dict) -> None:
    """Adds an epoch's line to log.txt; one that is there for this or a later epoch was of a run cut short."""
    path = folder / "log.txt"
    earlier = [line for line in read_json_lines(path) if line["epoch"] < entry["epoch"]] if path.is_file() else []
    write_json_lines(path, [*earlier, entry])
