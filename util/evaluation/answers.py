"""Answers to questions of ScienceQA: the option that a text names, and the lines of generations.jsonl, from which all
scores are computed.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json_lines, write_json_lines
from lavin.runtime.schema import declared, validate
from util.data.prompts import ANSWER_WORDS, OPTIONS

NAMED_OPTION = re.compile(rf"{ANSWER_WORDS} ([A-Z])\.")


# --- The option that a text names ---

def is_answered(text: str) -> bool:
    """Whether a text names an option, so that generation may stop."""
    return parse_answer(text, len(OPTIONS)) is not None


def given_reason(text: str) -> str:
    """The part of a text before it names an option, which is the reason in QCM-EA; empty where it names none."""
    match = NAMED_OPTION.search(text)
    return text[:match.start()] if match else ""


def parse_answer(text: str, n_choices: int) -> int | None:
    """Index of the option that the text names, or None where it names none of the n_choices options."""
    match = NAMED_OPTION.search(text)
    index = OPTIONS.find(match.group(1)) if match else -1
    return index if 0 <= index < n_choices else None


# --- generations.jsonl ---

@declared
class Line(TypedDict):
    """A line of generations.jsonl. Earlier versions did not save the cluster."""

    qid: str
    prediction: int
    answer: int
    text: NotRequired[str]
    parsed: NotRequired[bool]
    cluster: NotRequired[str]
    cut: NotRequired[bool]


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    prediction: the index of the option that the model chose. answer: the index of the right one. text: the words of the
    model. parsed: whether the text names an option; if not, the prediction is the most likely one. cluster: names the
    questions that depend on the same knowledge; None where an earlier version did not save it. cut: whether words in
    the middle of the prompt were left out.
    """

    qid: str
    prediction: int
    answer: int
    text: str = ""
    parsed: bool = True
    cluster: str | None = None
    cut: bool = False

    @property
    def correct(self) -> bool:
        return self.prediction == self.answer

    def to_json(self) -> dict[str, Any]:
        line = {"qid": self.qid, "text": self.text, "prediction": self.prediction, "parsed": self.parsed,
                "answer": self.answer, "cluster": self.cluster}
        return {**line, "cut": True} if self.cut else line


def from_json(line: Any) -> Answer:
    """The answer in a line that is checked. Raises TypeError or KeyError for one that is not."""
    return Answer(**{name: line[name] for name in Answer.__dataclass_fields__ if name in line})


def read_answers(path: Path, fix: str = "evaluate again") -> list[Answer]:
    """The answers of generations.jsonl, in its order. Raises UserError where the file is missing or broken."""
    answers = [from_json(validate(line, Line, f"{path}, line {i}", fix))
               for i, line in enumerate(read_json_lines(path), 1)]
    repeated = [qid for qid, n in Counter(answer.qid for answer in answers).items() if n > 1]
    if repeated:
        raise UserError(f"{path} answers question {repeated[0]} twice: {fix}")
    return answers


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    write_json_lines(path, (answer.to_json() for answer in answers))


def predictions_of(answers: Iterable[Answer]) -> dict[str, int]:
    """The content of preds.json: the chosen option by question."""
    return {answer.qid: answer.prediction for answer in answers}
