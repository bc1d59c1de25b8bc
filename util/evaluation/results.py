"""Results of an evaluation: the folder they belong to, what they are of (their identity), and answers as they come.

Every answer is appended to a file of its process as soon as it is there, NAME.RANK.partial.jsonl, whose first line is
the identity: an evaluation that was killed goes on where it was. The files are removed when the scores are written.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lavin.runtime import distributed
from lavin.runtime.console import print_rank0
from lavin.runtime.device import precision_name
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, read_whole_lines, sha256, write_json_lines
from util.fingerprint import fingerprints
from util.flags import BaseSettings
from util.runs import PARTIAL_SUFFIX, checkpoints, user_error_if_malformed
from util.trained_model import Trained

# --- The folder ---

def config_file(folder: Path) -> Path | None:
    """The file with the flags of the run that the folder belongs to, if it is a run's."""
    return next((path for path in (folder / "config.json", folder / "recipe.json") if path.is_file()), None)


def final_checkpoint(folder: Path) -> Path | None:
    """The checkpoint after a run's last epoch; None: unfinished. Of a folder that does not say how many epochs there
    are to be, the latest one."""
    path, by_epoch = config_file(folder), checkpoints(folder)
    epochs = 0
    if path:
        with user_error_if_malformed(path):
            epochs = int(read_json(path)["flags"].get("epochs", 0))
    last = max(by_epoch, default=-1)
    return by_epoch[last] if by_epoch and last + 1 >= epochs else None


def results_folder(output_dir: str | None, checkpoint: Path | None) -> Path:
    """--output_dir, or the checkpoint's folder, which is the run's; for a run's early checkpoint, a folder of its own
    inside. Raises UserError where results of something else would go among a run's, or nothing says where to."""
    if output_dir:
        folder = Path(output_dir)
        if config_file(folder) and (checkpoint is None or checkpoint.resolve().parent != folder.resolve()):
            raise UserError(f"--output_dir {output_dir} is the folder of a run, and {checkpoint or 'the untuned base'} "
                            "is not of that run: name another folder")
        return folder
    if checkpoint is None:
        raise UserError("without --adapter_path the untuned base is scored: name a folder for its results with "
                        "--output_dir")
    folder = checkpoint.parent
    is_of_run = config_file(folder) or checkpoint in checkpoints(folder).values()
    return folder / checkpoint.stem if is_of_run and checkpoint != final_checkpoint(folder) else folder


# --- What is scored ---

def model_identity(base: BaseSettings, trained: Trained, tokenizer_path: str | None) -> dict:
    """Identifies the model that answers; all of it is known before the model is loaded."""
    return {"checkpoint": trained.path and trained.path.name,
            "checkpoint_sha256": trained.path and sha256(trained.path),
            "precision": precision_name(trained.dtype), "bits": base.bits,
            **fingerprints(base, tokenizer_path), "adapter": asdict(trained.adapter)}


# --- Scores that are there ---

EARLIER_NAMES = {"skipped": "bad_pictures"}  # of entries of scores.json, by which earlier versions wrote them


def read_scores(path: Path) -> dict[str, Any]:
    """The entries of a file of scores, by their names in this version."""
    return {EARLIER_NAMES.get(name, name): value for name, value in read_json(path).items()}


def scored_before(path: Path, identity: dict, rescore: Callable[[dict], dict]) -> dict | None:
    """The scores in a file, if they have this identity and are those of the answers beside them; says what will be
    replaced if not.

    rescore(scores): the scores by the answers, which may have been changed or lost since.
    """
    if not path.is_file():
        return None
    try:
        scores = read_scores(path)
    except UserError:
        scores = {}
    other = [name.removesuffix("_sha256") for name, value in identity.items() if scores.get(name) != value]
    if not other and are_of_answers(scores, identity, rescore):
        return scores
    print_rank0(f"{path} holds scores of another {', '.join(other) or 'evaluation'}: they will be replaced")
    return None


def are_of_answers(scores: dict, identity: dict, rescore: Callable[[dict], dict]) -> bool:
    try:
        return {**rescore(scores), **identity} == scores
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return False


# --- Answers as they come ---

def answer_all(folder: Path, name: str, identity: dict, keys: list[str],
               answer: Callable[[list[str]], Iterable[dict[str, Any]]]) -> dict[str, Any]:
    """The answers by key, in the order of keys: those that earlier processes wrote, and the rest, which this and the
    other processes share.

    answer(keys): yields {key: answer, ...} for a batch of keys at a time.
    """
    answers = distributed.from_rank_0(lambda: recover(folder, name, identity))
    if answers:
        print_rank0(f"{len(answers):,} of {len(keys):,} are answered: the rest follows")
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
    return {key: answers[key] for key in keys}


def append(file, *values) -> None:
    file.write("".join(json.dumps(value) + "\n" for value in values))
    file.flush()


def partial_path(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}{PARTIAL_SUFFIX}"


def recover(folder: Path, name: str, identity: dict) -> dict[str, Any]:
    """The answers in the files of all processes, whose number may have been another. They are put into one file;
    answers of another identity are dropped."""
    answers: dict[str, Any] = {}
    paths, whole = set(folder.glob(f"{name}.*{PARTIAL_SUFFIX}")), partial_path(folder, name, 0)
    for path in paths:
        with suppress(UserError, TypeError, ValueError):  # what was changed by others is answered again
            first, *rest = read_whole_lines(path) or [None]
            if first == identity:
                answers.update(rest)
    if answers:
        write_json_lines(whole, [identity, *answers.items()])
    for path in paths - {whole} if answers else paths:
        path.unlink()
    return answers


def drop_partial(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}.*{PARTIAL_SUFFIX}"):
        path.unlink()
