"""What the tools write: folders that can be written, and safetensors files."""

import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import atomic_write


def make_folder(path: Path) -> None:
    """Makes the folder --out before the work begins. Raises UserError where nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to --out {path} ({error.strerror}): name another folder") from error


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises UserError where the disk is full."""
    try:
        with atomic_write(path) as tmp_path:
            save_file(tensors, tmp_path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"cannot write {path} ({first_line(error)}): make room, or name another --out") from error
