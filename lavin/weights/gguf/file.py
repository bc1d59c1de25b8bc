"""Opens GGUF files memory-mapped, with llama.cpp's own package gguf (requirements/gguf.txt), imported when needed.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lavin.runtime.errors import UserError
from lavin.runtime.files import unreadable
from lavin.weights.gguf.header import check_header


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file. tensors: llama.cpp's name -> the package's ReaderTensor, still quantized."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def entries(self, prefix: str) -> dict[str, Any]:
        """The metadata whose keys begin with `prefix`, which is left out."""
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def open_file(path: Path) -> GGUFFile:
    """Raises UserError where the file is missing, broken or one part of several, and where the package is missing."""
    if not path.is_file():
        raise UserError(f"no file {path}: put it there, or correct --llm_model")
    status = path.stat()
    return read_file(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def read_file(path: Path, size: int, mtime_ns: int) -> GGUFFile:
    """The result is kept, since tokenizer and weights need it, and reading 100,000 tokens takes seconds. size,
    mtime_ns: a file that has changed has others, and is read again."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path} is read by the package gguf: pip install -r requirements/gguf.txt") from error
    try:
        check_header(path)
        reader = gguf.GGUFReader(path, "c")  # torch takes no array that cannot be written to; c: not to the file
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except UserError:
        raise
    except Exception as error:  # damaged headers raise many types of exception
        raise unreadable(path, error) from error
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise UserError(f"{path} is one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge")
    return GGUFFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
