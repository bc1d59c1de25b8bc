"""The states of a folder at every moment, and so after every death of the process that writes to it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.link", "os.truncate")
State = dict[str, bytes]  # content by path
_watched: list[tuple[Path, list[State]]] = []


def look(event: str, arguments: tuple) -> None:
    """Python calls it before every change of a file, and before every file is opened."""
    if not _watched or not (event in CHANGES or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    (folder, states), _watched[:] = _watched[-1], []  # reading files opens them
    try:
        state = contents(folder)
        if not states or states[-1] != state:
            states.append(state)
    finally:
        _watched.append((folder, states))


sys.addaudithook(look)


def contents(folder: Path) -> State:
    """The content of every file but those of locks, and those that are being written."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name[0] != "."}


@contextmanager
def watched(folder: Path) -> Iterator[list[State]]:
    """Collects the states of the folder while files are written; the last is the one at the end."""
    states: list[State] = []
    _watched.append((folder, states))
    try:
        yield states
    finally:
        _watched.pop()
        states.append(contents(folder))
