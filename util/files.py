"""Files that are either whole or not there, and JSON whose faults are named."""

import json
from pathlib import Path

from lavin.errors import UserError
from lavin.whole_files import whole_file


def read_json(path: Path, mend: str = "put it there, or correct the path") -> dict:
    """Raises UserError, ending in `mend`, where the file is missing, and one that names the place where it is broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {mend}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch or write it again")
    return value


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, values) -> None:
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def read_json_lines(path: Path) -> list:
    """Raises UserError as `read_json` does."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): put it there, or correct the path") from error
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} has a line that is not valid JSON ({error}): write it again") from error
