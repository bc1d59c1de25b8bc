"""Processes that are killed or asked to stop, and what they leave on the disk."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from lavin.runtime import signals
from util.training.trainer import Trainer


class Killed(BaseException):
    """Stands for the end of a process at once."""


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


def stop_after(monkeypatch, steps: int, error: type[BaseException] | None = None) -> None:
    """The process is asked to stop (or dies of `error`) while it makes its step number `steps`."""
    made, train_step = [], Trainer.train_step

    def counted(self, *args):
        made.append(1)
        if len(made) == steps:
            if error:
                raise error
            monkeypatch.setattr(signals, "requested", "SIGTERM")
        train_step(self, *args)
    monkeypatch.setattr(Trainer, "train_step", counted)
