"""Scores a run on ScienceQA: what is asked, which files hold the results, and the table that a user sees."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavin.runtime import distributed
from lavin.runtime.console import counted, print_rank0, text_width
from lavin.runtime.errors import UserError
from lavin.runtime.files import load_json, write_json
from lavin.runtime.flags import Flags
from util.data.datasets import ScienceQA, load_scienceqa
from util.data.images import load_images
from util.data.settings import DataSettings
from util.document import Table, to_text
from util.evaluation import evaluate
from util.evaluation.answering import answer_questions, answers_first
from util.evaluation.answers import Answer, from_json, predictions_of, read_answers, write_answers
from util.evaluation.results import model_identity
from util.evaluation.scoring import score
from util.evaluation.settings import Answering, take_run
from util.flags import BaseSettings, Execution
from util.runs import GENERATIONS, PREDICTIONS, SCORES
from util.shared_base import SharedBase
from util.trained_model import Trained, read_trained


@dataclass
class ScienceQATask:
    """A split of ScienceQA, asked as the settings say. Answers are the plain values of `Answer`."""

    problems: ScienceQA
    split: str
    trained: Trained
    base: BaseSettings
    data: DataSettings
    answering: Answering
    tokenizer_path: str | None
    threads: int  # that decode pictures
    images: dict = field(default_factory=dict)

    partial_prefix = "answers"
    scores_file = SCORES

    def pictures(self) -> list[Path]:
        return list(self.problems.picture_paths.values())

    def identity(self) -> dict[str, Any]:
        """The identity of the evaluation: all that determines the scores."""
        return {**model_identity(self.base, self.trained, self.tokenizer_path),
                "prompt_format": self.data.prompt_format, "max_seq_len": self.data.max_seq_len,
                **self.answering.identity(), "split": self.split,
                "data": self.problems.fingerprint, "pictures": self.problems.pictures_sha256}

    def prepare(self, model) -> list[str]:
        self.images = load_images(self.problems, model.vision.image_size, self.threads, self.data.skip_bad)
        return list(self.problems.problems)

    def answer(self, model, tokenizer, keys: list[str]) -> Iterator[dict[str, Any]]:
        for batch in answer_questions(model, tokenizer, self.problems, self.images, keys, self.data, self.answering):
            yield {answer.qid: answer.to_json() for answer in batch}

    def write_answers(self, folder: Path, answers: list[Any]) -> None:
        write_answers(folder / GENERATIONS, map(from_json, answers))
        write_json(folder / PREDICTIONS, predictions_of(map(from_json, answers)))

    def scores(self, answers: list[Any]) -> dict[str, Any]:
        return summarize([from_json(answer) for answer in answers], self.problems, len(self.problems.bad_pictures))

    def rescore(self, folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
        answers = read_answers(folder / GENERATIONS)
        restore_predictions(folder / PREDICTIONS, answers)
        return summarize(answers, self.problems, scores["bad_pictures"])

    def report(self, scores: dict[str, Any]) -> list[str]:
        lines = [score_table(scores, text_width()), f"{counted(scores['parse_failures'], 'answer')} named no option, "
                 f"{counted(scores['bad_pictures'], 'problem')} dropped for a bad picture"]
        if scores["prompts_cut"]:
            lines.append(f"words in the middle of {counted(scores['prompts_cut'], 'prompt')} are left out, since "
                         f"--max_seq_len is {scores['max_seq_len']}")
        return lines


def summarize(answers: list[Answer], problems: ScienceQA, bad_pictures: int) -> dict[str, Any]:
    """The content of scores.json, without the identity. bad_pictures: the number of problems dropped for theirs."""
    return {**score(problems.problems, answers), "questions": len(answers),
            "parse_failures": sum(not answer.parsed for answer in answers), "bad_pictures": bad_pictures,
            "prompts_cut": sum(answer.cut for answer in answers)}


def restore_predictions(path: Path, answers: list[Answer]) -> None:
    """Writes preds.json again where it does not hold these answers: it is made for readers, and nothing goes by it."""
    try:
        found = load_json(path, "", "")
    except UserError:
        found = None
    if found != predictions_of(answers):
        print_rank0(f"{path} does not hold the answers of {GENERATIONS}: they will be replaced")
        write_json(path, predictions_of(answers))


def score_table(scores: dict, width: int) -> str:
    """Lines of at most `width` characters, 80 or more. Of the columns, Avg has room first."""
    counts = scores["counts"]
    percent = ["-" if scores[column] is None else f"{scores[column]:.2f}" for column in counts]
    rows = [["accuracy %", *percent], ["questions", *map(str, counts.values())]]
    return to_text([Table(["", *counts], rows, sorted(counts, key=lambda column: column != "Avg"))], width, SCORES)


def main(args: Flags) -> None:
    """The command eval.py."""
    run(args, SharedBase())
    distributed.close()


def run(args: Flags, shared: SharedBase) -> None:
    """The command among others of its process, which share the base. shared: the object that lends it."""
    take_run(args)
    trained = read_trained(args)
    data, answering = DataSettings.of(args), Answering.of(args)
    if answering.decode == "score" and not answers_first(data.prompt_format):
        raise UserError(f"--decode score compares answers, but in --prompt_format {data.prompt_format} the solution "
                        "comes first: leave --decode out")
    problems = distributed.from_rank_0(lambda: load_scienceqa(data.data_root, args.split, data.captions))
    problems = problems.sample(args.questions) if args.questions else problems
    task = ScienceQATask(problems, args.split, trained, BaseSettings.of(args), data, answering, args.tokenizer_path,
                         Execution.of(args).num_workers)
    evaluate.run(task, args, trained, shared)
