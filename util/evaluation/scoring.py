"""Accuracy in percent by columns, with the counts it is computed from, and with what guessing would reach.

ScienceQA's nine columns (Lu et al. 2022) go by the subject, the context and the grade of a question. A data set without
subjects and grades has columns of its own categories in their place.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any
from unicodedata import category as kind_of_character

from util.data.datasets import has_grades_and_subjects
from util.evaluation.answers import Answer

Belongs = Callable[[Any], bool]  # whether a problem belongs to a column
COLUMNS: dict[str, Belongs] = {
    "NAT": lambda p: p["subject"] == "natural science",
    "SOC": lambda p: p["subject"] == "social science",
    "LAN": lambda p: p["subject"] == "language science",
    "TXT": lambda p: bool(p["hint"]),
    "IMG": lambda p: bool(p["image"]),
    "NO": lambda p: not p["hint"] and not p["image"],
    "G1-6": lambda p: grade(p) <= 6,
    "G7-12": lambda p: grade(p) > 6,
    "Avg": lambda p: True,
}
CONTEXTS = ("TXT", "IMG", "NO")
MAX_CATEGORIES, MAX_NAME = 8, 11  # columns of categories, and characters of their names
PUNCTUATION = " -+.:/&#%"  # that tables, figures and trackers can show


def grade(problem: dict) -> int:
    """`grade7` -> 7."""
    return int(problem["grade"].removeprefix("grade"))


# --- Columns ---

def columns_of(problems: Sequence[Any]) -> dict[str, Belongs]:
    """The columns of a data set: ScienceQA's nine, where all problems have a grade and a subject. Otherwise the most
    frequent categories (topics, where no problem has a category), the contexts that have questions, and Avg."""
    if has_grades_and_subjects(problems):
        return COLUMNS
    contexts = {name: COLUMNS[name] for name in CONTEXTS if any(map(COLUMNS[name], problems))}
    return {**columns_of_categories(problems), **contexts, "Avg": COLUMNS["Avg"]}


def columns_of_categories(problems: Sequence[Any]) -> dict[str, Belongs]:
    entry = "category" if any(entry_of(problem, "category") for problem in problems) else "topic"
    sizes = Counter(filter(None, (entry_of(problem, entry) for problem in problems)))
    frequent = sorted(sizes, key=lambda name: (-sizes[name], name))[:MAX_CATEGORIES]
    return dict(zip(short_names(frequent), (holds(entry, name) for name in frequent), strict=True))


def entry_of(problem: Any, entry: str) -> str:
    """An optional text of a problem. It says the same with a capital, and with other spaces."""
    return capitalized(" ".join(problem.get(entry, "").split()))


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def holds(entry: str, value: str) -> Belongs:
    return lambda problem: entry_of(problem, entry) == value


def short_names(texts: Iterable[str]) -> list[str]:
    """A name of at most MAX_NAME characters for each text. The names differ from each other and from COLUMNS, whatever
    their capitals, and need no escape in a figure or a page."""
    names: list[str] = []
    for text in texts:
        taken = {name.casefold() for name in (*COLUMNS, *names)}
        numbered = (shortened(text, f" {i}" if i > 1 else "") for i in count(1))
        names.append(next(name for name in numbered if name.casefold() not in taken))
    return names


def shortened(text: str, end: str) -> str:
    """The text without characters that mean something to Markdown or a terminal, cut to MAX_NAME characters with its
    end. Its capital tells it from the other entries of scores.json."""
    shown = "".join(char if kind_of_character(char)[0] in "LMN" or char in PUNCTUATION else " " for char in text)
    name, room = capitalized(" ".join(shown.split()).lstrip(PUNCTUATION)) or "Category", MAX_NAME - len(end)
    return (name if len(name) <= room else f"{name[:room - 1].rstrip()}.") + end


# --- Scores ---

def score(problems: dict[str, dict], answers: Iterable[Answer]) -> dict:
    """Percent correct of the answered problems by column (None for an empty column), with `counts` and `correct`, and
    `chance`: the percentages that are expected of guessing among each question's options."""
    answers = list(answers)
    columns = columns_of([problems[answer.qid] for answer in answers])
    by_column = {column: [answer for answer in answers if belongs(problems[answer.qid])]
                 for column, belongs in columns.items()}
    counts = {column: len(found) for column, found in by_column.items()}
    correct = {column: sum(answer.correct for answer in found) for column, found in by_column.items()}
    guessed = {column: math.fsum(1 / len(problems[answer.qid]["choices"]) for answer in found)
               for column, found in by_column.items()}
    return {**percentages(correct, counts), "counts": counts, "correct": correct,
            "chance": percentages(guessed, counts)}


def percentages(correct: Mapping[str, float], counts: dict[str, int]) -> dict[str, float | None]:
    return {column: 100 * correct[column] / n if n else None for column, n in counts.items()}
