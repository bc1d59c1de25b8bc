"""Files: written atomically (complete or absent), and JSON read with errors that name the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavin.runtime.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, renamed to `path` on success: readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(path.name + ".part")
    yield tmp_path
    os.replace(tmp_path, path)


def read_json(path: str | Path, hint: str = "put it there, or correct the path") -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing (the message ends in `hint`) or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {hint}") from error
    except ValueError as error:
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
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} has a line that is not valid JSON ({error}): write it again") from error


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: str | Path, values) -> None:
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))
