"""Accuracy by topic of the problems: a table with a row for each results folder of eval.py.

    python -m tools.topic_scores --data_root data/easy_vqa runs/smollm2/untuned ...
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lavin.runtime.console import format_table
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import read_json
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from util.data.datasets import find_problems_file
from util.evaluation.answers import read_answers
from util.runs import GENERATIONS


@dataclass(frozen=True)
class Results(FlagGroup):
    """The results that are compared, and the problems that they answer."""

    title: ClassVar[str] = "results"
    folders: list[Path] | None = flag(None, "results of eval.py", Role.DISPLAY, positional=True, nargs="+", type=Path,
                                      metavar="FOLDER")
    data_root: Path | None = flag(None, "folder of problems.json", Role.DATA, required=True, metavar="FOLDER")


def get_args_parser() -> Parser:
    return Parser("-m tools.topic_scores", __doc__, Results)


def correct_by_topic(folder: Path, problems: dict) -> dict[str, list[bool]]:
    """Whether each answer is correct, by topic. Raises UserError where there are none, or of other problems."""
    if not (folder / GENERATIONS).is_file():
        raise UserError(f"{folder} has no {GENERATIONS}: score it with eval.py first")
    by_topic = defaultdict(list)
    for answer in read_answers(folder / GENERATIONS):
        if answer.qid not in problems:
            raise UserError(f"{folder} answers problem {answer.qid}, which --data_root lacks: name its data set")
        by_topic[problems[answer.qid].get("topic", "")].append(answer.correct)
    return by_topic


def topic_table(folders: list[Path], problems: dict) -> str:
    results = [correct_by_topic(folder, problems) for folder in folders]
    topics = sorted(set().union(*results))
    rows = [[folder.name, *(f"{100 * sum(of[topic]) / len(of[topic]):.1f} ({len(of[topic])})" if of[topic] else "-"
                            for topic in topics)] for folder, of in zip(folders, results, strict=True)]
    return format_table(["accuracy % (questions)", *topics], rows)


def main(args: Flags) -> None:
    print(topic_table(args.folders, read_json(find_problems_file(args.data_root))))


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
