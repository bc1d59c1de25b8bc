"""Reads weight files memory-mapped: a tensor is read from disk when it is first used, so no file fills memory.

Notable:
- Nothing here runs code from a file: torch files are read with `weights_only=True`.
- Files that are cut short are told by both formats. safetensors has no checksums. torch's files have, and those up to
  CHECKED_BYTES are compared; larger ones are not, since each process would read them a second time, and whole. There,
  changed bits are found where they give numbers that are not finite (load.py).
"""

import argparse
import re
import zipfile
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from typing_extensions import TypedDict

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.files import unreadable
from lavin.runtime.schema import PlainName, declared, read_validated, shown, validate

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or `NAME.index.json`, the index of a sharded checkpoint
# suffixes of buffers that some checkpoints store; this code computes them from the configuration
COMPUTED_BUFFERS = ("rope.freqs", "rotary_emb.inv_freq")
INTEGER_BUFFERS = ("position_ids",)  # the same, of CLIP
CHECKED_BYTES = 2**30
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # those of 8 bits need scales
WRAPPERS = ("state_dict", "model")  # entries in which training programs store the weights


def is_weight(value: Any) -> Any:
    """Returns the value. Raises ValueError where it is no dense tensor of floating-point numbers."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"is no tensor but {shown(value)}")
    if value.dtype not in FLOATS or value.layout != torch.strided:
        raise ValueError(f"is a tensor of {value.dtype}, {value.layout}, not of dense floating-point numbers")
    if value.nbytes > value.untyped_storage().nbytes():  # the same numbers again and again, as torch.expand makes them
        raise ValueError(f"is a tensor of {counted(value.numel(), 'number')}, of which the file holds fewer")
    return value


Weights = dict[str, Annotated[Any, AfterValidator(is_weight)]]


@declared
class Index(TypedDict):
    """NAME.index.json: the file that holds each tensor."""

    weight_map: Annotated[dict[str, PlainName], Field(min_length=1)]


def read_torch(path: Path) -> dict:
    """Reads a torch file, memory-mapped. Raises UserError if it is missing, broken, or holds more than tensors."""
    if not path.is_file():
        raise UserError(f"no file {path}: put it there, or correct the path")
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_records(path)
    try:
        # The published code stores its flags in checkpoints as an argparse.Namespace, which holds plain values only.
        # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch.load raises many types of exception
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise UserError(f"{path} holds more than tensors ({forbidden[1]}), which could run code, so it is not "
                            "read: save only its tensors") from error
        raise unreadable(path, error) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not named weights: fetch or copy it again")
    return content


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file, memory-mapped. Raises UserError if it is missing or broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def damaged_record(path: Path, max_bytes: float = float("inf")) -> str | None:
    """The record of a torch file that does not match its checksum, up to this size of the file. Torch writes 0 for all
    where it was told to compute none.

    Raises ValueError where the records are larger than the file: torch compresses none, and a few bytes may stand for
    more than a disk holds.
    """
    with zipfile.ZipFile(path) as archive:
        records, size = archive.infolist(), path.stat().st_size
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records are larger than the file")
        return archive.testzip() if size <= max_bytes and any(record.CRC for record in records) else None


def check_records(path: Path) -> None:
    """Raises UserError where a record of a torch file is larger than the file, or does not match its checksum."""
    try:
        damaged = damaged_record(path, CHECKED_BYTES)
    except Exception as error:  # damaged headers raise many types of exception
        raise unreadable(path, error) from error
    if damaged:
        raise UserError(f"{path} was changed after it was written ({damaged} does not match its checksum): fetch or "
                        "copy it again")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of floating-point numbers by name; buffers of integers are left out."""
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    for wrapper in WRAPPERS:
        content = content[wrapper] if isinstance(content.get(wrapper), dict) else content
    return validate({name: tensor for name, tensor in content.items() if not str(name).endswith(INTEGER_BUFFERS)},
                    Weights, str(path))


def hf_weight_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face folder: one, or all that its index lists. Raises UserError if one is missing."""
    for name in HF_WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return indexed_files(index)
    raise UserError(f"missing {folder / HF_WEIGHTS[0]} (or pytorch_model.bin, or the index of either): copy it there")


def indexed_files(index: Path) -> list[Path]:
    weight_map = read_validated(index, Index)["weight_map"]
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"missing {file}, which {index.name} lists: fetch or copy it there")
    return files


def read_hf_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the weights of a Hugging Face folder. Raises UserError if a file is missing or broken."""
    tensors = {}
    for path in hf_weight_files(folder):
        tensors.update(read_tensors(path))
    return tensors


def check_names(expected: Set[str], actual: Set[str], source: str) -> None:
    """Raises UserError listing missing or unexpected tensors. source: the name of the files in the message."""
    for problem, names in (("lacks", expected - actual), ("holds unknown", actual - expected)):
        if names:
            examples = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{source} {problem} {counted(len(names), 'tensor')} ({examples}): it belongs to another "
                            "model")


def check_shape(name: str, expected: torch.Size, tensor: torch.Tensor, source: str) -> None:
    """Raises UserError for a tensor of another shape. source: the name of its file in the message."""
    if expected != tensor.shape:
        raise UserError(f"{source}: {name} is {list(tensor.shape)} and the model has {list(expected)}: "
                        "it belongs to another model")
