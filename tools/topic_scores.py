"""Accuracy by topic of the problems: a table with a column for each results folder of eval.py.

    python -m tools.topic_scores --data_root data/easy_vqa runs/smollm2/untuned ...
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lavin.runtime.console import text_width
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import read_json
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from util.data.datasets import find_problems_file
from util.document import LEAST_NAME, Bullets, Part, Table, to_text
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


def cell(outcomes: list[bool], n_questions: int) -> str:
    """The percentage, with the number of questions where it is of fewer than others."""
    number = f" ({len(outcomes)})" if len(outcomes) < n_questions else ""
    return f"{100 * sum(outcomes) / len(outcomes):.1f}{number}" if outcomes else "-"


def topic_report(folders: list[Path], problems: dict, width: int) -> str:
    """Lines of at most `width` characters, 80 or more: what the columns are, and a row for each topic. Columns that
    find no room have a table of their own below."""
    results = [correct_by_topic(folder, problems) for folder in folders]
    topics = sorted(set().union(*results))
    n_questions = {topic: max(len(by_topic[topic]) for by_topic in results) for topic in topics}
    columns = [[cell(by_topic[topic], n_questions[topic]) for topic in topics] for by_topic in results]
    left = width - min(LEAST_NAME, max(map(len, ("topic", *topics)))) - len("  questions")
    per_table = max(1, left // (2 + max(len(text) for column in columns for text in column)))
    parts: list[Part] = ["Accuracy in % by topic. The columns are:",
                         Bullets([f"{i}: {folder}" for i, folder in enumerate(folders, 1)])]
    for start in range(0, len(folders), per_table):
        shown = columns[start:start + per_table]
        rows = [[topic, str(n_questions[topic]), *(column[i] for column in shown)] for i, topic in enumerate(topics)]
        parts.append(Table(["topic", "questions", *(str(start + i) for i in range(1, len(shown) + 1))], rows))
    return to_text(parts, width, GENERATIONS)


def main(args: Flags) -> None:
    print(topic_report(args.folders, read_json(find_problems_file(args.data_root)), text_width()))


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
