"""Files: written atomically (complete or absent), read with errors that name the file, and identified by checksums."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavin.runtime.errors import UserError

PART = ".part"  # suffix of files that are being written
SAMPLE_BYTES = 2**20


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, renamed to `path` on success: readers never see half a file.

    The name is this process's own, and the content is on the disk before the file is renamed, so that neither another
    process nor a machine that loses power can leave half a file under `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PART}")
    try:
        yield tmp_path
        sync(tmp_path)
        os.replace(tmp_path, path)
        sync(path.parent)
    finally:
        tmp_path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str | Path, hint: str = "put it there, or correct the path") -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing (the message ends in `hint`) or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {hint}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch or write it again")
    return value


def read_json_lines(path: str | Path) -> list:
    """One JSON value a line. Raises UserError where the file is missing or a line is broken."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): put it there, or correct the path") from error
    except ValueError as error:
        raise UserError(f"{path} is no text file ({error}): write it again") from error
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a line that is not valid JSON ({error}): write it again") from error


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: str | Path, values) -> None:
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


# --- Checksums ---

def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sampled_sha256(paths: list[Path]) -> str:
    """Identifies large files cheaply: by their number, sizes, and first, middle and last MiB."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for start in sorted({0, max(0, (size - SAMPLE_BYTES) // 2), max(0, size - SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def json_sha256(value) -> str:
    """Of a value that JSON can hold; dicts in any order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
