"""Checks the sizes that a GGUF file declares against its own, before the package gguf makes room for them: a file of
some bytes may declare 2**60.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of plain values, by their type
MIN_STRING, MIN_ENTRY, MIN_TENSOR = 8, 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes: a length; name, type, value; name, sizes, ...
MAX_ELEMENTS, MAX_DIMENSIONS = 2**22, 4  # of an array, which becomes Python objects; a vocabulary has fewer


class Header:
    """Reads on from `position`. Raises ValueError where something is declared that the file cannot hold."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, len(MAGIC)

    def skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > len(self.data) - self.position:
            raise ValueError(f"{what} of {n_bytes:,} bytes goes beyond its end")
        self.position += n_bytes

    def number(self, code: str) -> int:
        start = self.position
        self.skip(struct.calcsize(code), "a number")
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def count(self, min_bytes: int, what: str) -> int:
        n = self.number("Q")
        if n * min_bytes > len(self.data) - self.position:
            raise ValueError(f"it cannot hold the {n:,} {what} that it declares")
        return n

    def skip_string(self) -> None:
        self.skip(self.number("Q"), "a text")

    def skip_value(self, kind: int) -> None:
        if kind == STRING:
            self.skip_string()
        elif kind == ARRAY:
            self.skip_array(self.number("I"))
        elif kind in BYTES:
            self.skip(BYTES[kind], "a number")
        else:
            raise ValueError(f"its metadata have a value of the unknown type {kind}")

    def skip_array(self, kind: int) -> None:
        n = self.count(MIN_STRING if kind == STRING else BYTES.get(kind, 1), "elements of an array")
        if n > MAX_ELEMENTS or kind == ARRAY:  # llama.cpp has no arrays of arrays
            raise ValueError(f"its metadata have an array of {'arrays' if kind == ARRAY else counted(n, 'element')}")
        if kind in BYTES:
            self.skip(n * BYTES[kind], "an array")
        else:
            for _ in range(n):
                self.skip_value(kind)

    def skip_tensor(self) -> None:
        self.skip_string()
        dimensions = self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"it has a tensor of {counted(dimensions, 'dimension')}")
        self.skip(8 * dimensions + 4 + 8, "a tensor's entry")


def check_header(path: Path) -> None:
    """Raises ValueError for a header whose sizes are not the file's, and UserError for one in another byte order."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = Header(data)
        if data[:len(MAGIC)] != MAGIC:
            raise ValueError("it is no GGUF file")
        if header.number("I") & 0xFFFF == 0:  # the version, a small number
            raise UserError(f"{path} has the byte order of another machine: fetch the usual file of this model")
        tensors, entries = header.count(MIN_TENSOR, "tensors"), header.count(MIN_ENTRY, "entries")
        for _ in range(entries):
            header.skip_string()
            header.skip_value(header.number("I"))
        for _ in range(tensors):
            header.skip_tensor()
