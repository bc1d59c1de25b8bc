"""The course of every evaluation: results that are there are kept, no answer is lost, scores come last."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lavin.runtime import distributed
from lavin.runtime.console import is_main_process, print_rank0, working_on
from lavin.runtime.files import write_json
from lavin.runtime.flags import Flags
from util.data.checksums import file_states, require_unchanged
from util.evaluation.partial_answers import answer_all, drop_partial
from util.evaluation.results import differing_words, note_on_code, results_folder, scored_before
from util.fingerprint import equal_on_all_nodes, with_fetched
from util.flags import BaseSettings
from util.provenance import COMMIT
from util.runs import locked
from util.shared_base import SharedBase
from util.trackers import add_scores
from util.trained_model import Trained, load_model


class Task(Protocol):
    """A set of questions, and the way that their answers are kept and scored.

    partial_prefix: the beginning of the names of the files of answers as they come. scores_file: the file of the
    scores. Answers are values that JSON can hold, by a key of their own.
    """

    partial_prefix: str
    scores_file: str

    base: BaseSettings

    def pictures(self) -> list[Path]:
        """The files of the pictures."""

    def identity(self) -> dict[str, Any]:
        """The identity of the evaluation: all that determines the scores."""

    def prepare(self, model) -> list[str]:
        """Loads what the questions need; returns their keys, in order."""

    def answer(self, model, tokenizer, keys: list[str]) -> Iterator[dict[str, Any]]:
        """Yields the answers to the questions `keys` by key, batch by batch."""

    def write_answers(self, folder: Path, answers: list[Any]) -> None:
        """Writes the result files beside the scores."""

    def scores(self, answers: list[Any]) -> dict[str, Any]:
        """The scores of answers, without the identity."""

    def rescore(self, folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
        """The scores by the answers that lie in the folder. Raises UserError where there are none.

        scores: the content of the folder's file of scores.
        """

    def report(self, scores: dict[str, Any]) -> list[str]:
        """The lines that a user sees."""


def run(task: Task, args: Flags, trained: Trained, shared: SharedBase) -> None:
    """Evaluates into the folder that --output_dir names, or that of the run, and prints the scores. shared: the object
    that lends the base."""
    folder = distributed.from_rank_0(lambda: results_folder(args.output_dir, trained.path))
    with locked(folder), working_on(folder.name):
        evaluate(task, args, trained, folder, shared)


def evaluate(task: Task, args: Flags, trained: Trained, folder: Path, shared: SharedBase) -> None:
    pictures = file_states(task.pictures())
    identity = equal_on_all_nodes(task.identity, differing_words)
    scores = distributed.from_rank_0(lambda: scored_before(folder / task.scores_file, identity,
                                                           partial(task.rescore, folder)))
    if scores:
        print_rank0(f"scored before, with the same settings{note_on_code(scores, folder / task.scores_file)}:")
        report(task, folder, scores, trained)
        return
    model, tokenizer, _ = load_model(args, trained, shared)
    keys = task.prepare(model)
    require_unchanged(pictures)
    identity = with_fetched(identity, task.base.vision_model)
    answers, identity = answer_all(folder, task.partial_prefix, identity, keys,
                                   partial(task.answer, model, tokenizer))
    if is_main_process():
        found = task.scores(list(answers.values()))
        scores = {**found, **identity, "git_commit": COMMIT}
        (folder / task.scores_file).unlink(missing_ok=True)
        task.write_answers(folder, list(answers.values()))
        write_json(folder / task.scores_file, scores)  # last: where it is, all files are there, and of one evaluation
        drop_partial(folder, task.partial_prefix)
        add_scores(folder, {name: value for name, value in found.items() if isinstance(value, int | float)})
        report(task, folder, scores, trained)


def report(task: Task, folder: Path, scores: dict[str, Any], trained: Trained) -> None:
    path = trained.path
    note = (f" ({path.name} is not the run's last checkpoint, so the run's own scores stay)"
            if path and folder == path.parent / path.stem else "")
    # at once, so that the lines of jobs side by side do not mix
    print_rank0("\n".join([*task.report(scores), f"scores: {folder / task.scores_file}{note}"]))
