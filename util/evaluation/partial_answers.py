"""Answers while an evaluation runs: each is on the disk as soon as it is there, so that none is lost.

Every answer is appended to a file of its process, NAME.RANK.partial.jsonl, whose first line is the identity of the
evaluation: one that was killed goes on where it was. The files are removed when the scores are written.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lavin.runtime import distributed
from lavin.runtime.console import print_rank0
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_whole_lines, write_json_lines
from util.evaluation.results import differing
from util.fingerprint import report_unrecorded
from util.runs import PARTIAL_SUFFIX


def answer_all(folder: Path, name: str, identity: dict, keys: list[str],
               answer: Callable[[list[str]], Iterable[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers by key, in the order of keys: those that earlier processes wrote, and the rest, which this and the
    other processes share. The second value is the part of the identity that is known of all answers: those of an
    earlier version may tell less.

    answer(keys): yields {key: answer, ...} for a batch of keys at a time.
    """
    answers, known = distributed.from_rank_0(lambda: recover(folder, name, identity))
    if answers:
        print_rank0(f"answered before: {len(answers):,} of {len(keys):,}; the rest follows")
    rank, world, _ = distributed.init()
    new: dict[str, Any] = {}
    is_copy = distributed.launched_as()[0] % distributed.model_parallel_size  # of a rank that shares its model
    with open(os.devnull if is_copy else partial_path(folder, name, rank), "a", encoding="utf-8") as file:
        if file.tell() == 0:
            append(file, identity)
        for batch in answer([key for key in keys if key not in answers][rank::world]):
            append(file, *batch.items())
            new.update(batch)
    for part in distributed.gather_data_parallel(new):
        answers |= part
    return {key: answers[key] for key in keys}, known


def append(file, *values) -> None:
    file.write("".join(json.dumps(value) + "\n" for value in values))
    file.flush()


def partial_path(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}{PARTIAL_SUFFIX}"


def recover(folder: Path, name: str, identity: dict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers in the files of all processes, whose number may have been another, and the part of the identity that
    all of these files tell. They are put into one file; answers of another identity are dropped."""
    answers: dict[str, Any] = {}
    known = identity
    paths, whole = set(folder.glob(f"{name}.*{PARTIAL_SUFFIX}")), partial_path(folder, name, 0)
    for path in paths:
        with suppress(UserError, TypeError, ValueError, AttributeError):  # what was changed by others is answered again
            first, *rest = read_whole_lines(path) or [None]
            if first.keys() <= identity.keys() and not differing(first, identity) and rest:
                known = {name: value for name, value in known.items() if name in first}
                report_unrecorded(path, first)
                answers.update(rest)
    if answers:
        write_json_lines(whole, [known, *answers.items()])
    for path in paths - {whole} if answers else paths:
        path.unlink()
    return answers, known


def drop_partial(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}.*{PARTIAL_SUFFIX}"):
        path.unlink()
