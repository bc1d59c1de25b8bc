"""Output of the tools: folders that can be written, ScienceQA's files, and safetensors files."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lavin.runtime.console import progress_bar
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import atomic_write
from util.data.datasets import DISJOINT_SPLITS

MINI_FRACTION = 0.1  # of a split's problems that are in its mini split


def make_folder(path: Path) -> None:
    """Makes the folder --out before the work begins. Raises UserError where nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {path} ({error.strerror}): name another folder") from error


def split_ids(problems: dict[str, dict]) -> dict[str, list[str]]:
    """The content of pid_splits.json: the ids of every split, of trainval, and of the mini splits."""
    splits: dict[str, list[str]] = {name: [] for name in DISJOINT_SPLITS}
    for qid, problem in problems.items():
        splits.setdefault(problem["split"], []).append(qid)
    minis = {f"mini{name}": splits[name][:max(1, round(MINI_FRACTION * len(splits[name])))]
             for name in DISJOINT_SPLITS}
    return {**splits, "trainval": splits["train"] + splits["val"], **minis}


def write_scienceqa(out: Path, problems: dict[str, dict], captions: dict[str, str],
                    write_picture: Callable[[str, Path], object]) -> None:
    """Writes the pictures first and problems.json last: a folder with problems.json is complete, and not one whose
    older files are being replaced.

    problems: the problems by id, with all 14 fields. captions: the captions of those that have a picture, by id.
    write_picture(id, path): writes the picture of a problem as a PNG file.
    """
    (out / "problems.json").unlink(missing_ok=True)
    for qid in progress_bar(captions, f"{out}, pictures", unit="picture"):
        with atomic_write(out / "images" / problems[qid]["split"] / qid / "image.png") as path:
            write_picture(qid, path)
    files = {"captions.json": {"captions": captions}, "pid_splits.json": split_ids(problems),
             "problems.json": problems}
    for name, content in files.items():
        with atomic_write(out / name) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises UserError where the disk is full."""
    try:
        with atomic_write(path) as tmp_path:
            save_file(tensors, tmp_path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"cannot write {path} ({first_line(error)}): make room, or name another --out") from error
