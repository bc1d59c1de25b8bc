"""What a process that is killed leaves on the disk."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest


class Killed(BaseException):
    """Of `killed_after`."""


@contextmanager
def killed_after(n_files: int):
    """Ends what writes files by `atomic_write` when n_files of them are whole, and no other."""
    replace, whole = os.replace, iter(range(n_files))

    def replace_or_end(source, target):
        if next(whole, None) is None:
            raise Killed
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("lavin.runtime.files.os.replace", replace_or_end)
        yield


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
