"""Optuna keeps the trials of a study in a journal in the study's folder, or in a database."""

import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from lavin.runtime.console import print_rank0
from lavin.runtime.errors import UserError, first_line
from util.search.errors import WorkerError
from util.search.folder import FIX
from util.search.locks import waiting_for

JOURNAL, JOURNAL_LOCK = "journal.log", ".journal.lock"
BLOCK_BYTES = 4096


class Journal(JournalFileBackend):
    """Optuna's journal, which has a line for each record, under a lock of the operating system. Optuna's own locks stay
    for half a minute if their owner is killed.

    The last record may be torn, if a disk was full or the power failed. It is cut off before another one is written,
    since the two would become one broken line.
    """

    def __init__(self, folder: Path):
        self.path, self.lock_path = folder / JOURNAL, folder / JOURNAL_LOCK
        super().__init__(str(self.path))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        records = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with waiting_for(self.lock_path):
            self.drop_torn_record()
            with open(self.path, "ab") as file:
                file.write(records.encode())
                file.flush()
                os.fsync(file.fileno())

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        number = log_number_from
        try:
            for record in super().read_logs(log_number_from):
                if not is_record(record):
                    raise ValueError("it is no record of Optuna")
                number += 1
                yield record
        except (ValueError, RecursionError) as error:
            raise WorkerError(f"{self.path} is damaged after record {number} ({first_line(error)}): {FIX}") from error

    def drop_torn_record(self) -> None:
        """Cuts the last line off if it is not whole. The journal must be locked."""
        with open(self.path, "rb+") as file:
            start, line = last_line(file)
            if line and not is_whole(line):
                file.truncate(start)
                os.fsync(file.fileno())
                print_rank0(f"{self.path}: the last record is torn, as by a full disk or a power failure, and is left "
                            "out")


def is_record(value: Any) -> bool:
    return isinstance(value, dict) and "op_code" in value


def is_whole(line: bytes) -> bool:
    """Returns whether a line of the journal is a record that was written to its end."""
    try:
        return line.endswith(b"\n") and is_record(json.loads(line))
    except (ValueError, RecursionError):
        return False


def last_line(file) -> tuple[int, bytes]:
    """Returns the offset at which the last line of a binary file begins, and the line."""
    end, size = file.seek(0, os.SEEK_END), BLOCK_BYTES
    while True:
        start = max(0, end - size)
        file.seek(start)
        block = file.read(end - start)
        begin = block.rfind(b"\n", 0, -1) + 1  # after the line feed of the line before
        if begin or not start:
            return start + begin, block[begin:]
        size *= 2


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    if url is not None:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    path = folder / JOURNAL
    if path.exists() and not path.is_file():  # reading a named pipe would never end
        raise UserError(f"{path} is no file: {FIX}")
    try:
        return JournalStorage(Journal(folder))
    except (UserError, OSError):
        raise
    except Exception as error:  # Optuna raises many types for records that are whole and make no sense
        raise UserError(f"{path} is damaged ({first_line(error)}): {FIX}") from error


def open_optuna(folder: Path, name: str, url: str | None, is_new: bool, pruner) -> optuna.Study:
    try:
        storage = open_storage(folder, url)
        if is_new:
            return optuna.create_study(storage=storage, study_name=name, direction="maximize", pruner=pruner)
        return optuna.load_study(storage=storage, study_name=name, pruner=pruner)
    except KeyError as error:
        raise UserError(f"{folder / JOURNAL} does not hold the study of its folder: {FIX}" if url is None else
                        f"--storage does not know the study of {folder}: name the one it was begun with") from error
    except (OptunaError, SQLAlchemyError, ImportError, ValueError) as error:
        raise UserError(f"--storage cannot be used ({first_line(error)}): give a database's address such as "
                        "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, and install its driver") from error


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns the errors of a database that is lost in the middle of a study into a UserError."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise UserError(f"--storage no longer answers ({first_line(error)}): once it does, the same command goes on"
                        ) from error
