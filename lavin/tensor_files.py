"""Files of tensors, memory-mapped: a tensor is read when it is first used, so a file is never held in memory whole.

Nothing here runs code from a file: torch files are read with `weights_only=True`.
"""

import argparse
import json
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lavin.errors import UserError, first_line

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or `NAME.index.json`, which names several files


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError where the file is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): put it there, or correct the path") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch or copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch or copy it again")
    return value


def read_torch(path: Path) -> dict:
    """A torch file, memory-mapped. Raises UserError where it is missing, broken, or holds more than tensors."""
    if not path.is_file():
        raise UserError(f"no file {path}: put it there, or correct the path")
    try:
        # checkpoints of the published code hold their flags, an argparse.Namespace, which is plain values only;
        # files from before torch 1.6 are no zip archives, and cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds here
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise UserError(f"{path} holds more than tensors ({foreign[1]}), which could run code, and is not read: "
                            "save its tensors alone") from error
        raise UserError(f"{path} cannot be read as weights ({first_line(error)}): fetch or copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not named weights: fetch or copy it again")
    return content


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights ({first_line(error)}): fetch or copy it again") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def hf_weight_files(folder: Path) -> list[Path]:
    """The weights of a Hugging Face folder: one file, or all in its index. Raises UserError where one is missing."""
    for name in HF_WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict):
                raise UserError(f"{index} has no entry 'weight_map': fetch or copy it again")
            files = [folder / file for file in sorted(set(named.values()))]
            for file in files:
                if not file.is_file():
                    raise UserError(f"missing {file}, which {index.name} names: fetch or copy it there")
            return files
    raise UserError(f"missing {folder / HF_WEIGHTS[0]} (or pytorch_model.bin, or either's index): copy it there")


def read_hf_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in hf_weight_files(folder):
        tensors.update(read_tensors(path))
    return tensors
