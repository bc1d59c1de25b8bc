"""ScienceQA accuracy (Lu et al. 2022): nine columns in percent, with the counts they are computed from, and with what
guessing would reach."""

import math
from collections.abc import Iterable, Mapping

from util.evaluation.answers import Answer

COLUMNS = {
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


def grade(problem: dict) -> int:
    """`grade7` -> 7."""
    return int(problem["grade"].removeprefix("grade"))


def score(problems: dict[str, dict], answers: Iterable[Answer]) -> dict:
    """Percent correct of the answered problems by column (None for an empty column), with `counts` and `correct`, and
    `chance`: the percentages that are expected of guessing among each question's options."""
    by_column: dict[str, list[Answer]] = {column: [] for column in COLUMNS}
    for answer in answers:
        for column, belongs in COLUMNS.items():
            if belongs(problems[answer.qid]):
                by_column[column].append(answer)
    counts = {column: len(found) for column, found in by_column.items()}
    correct = {column: sum(answer.correct for answer in found) for column, found in by_column.items()}
    guessed = {column: math.fsum(1 / len(problems[answer.qid]["choices"]) for answer in found)
               for column, found in by_column.items()}
    return {**percentages(correct, counts), "counts": counts, "correct": correct,
            "chance": percentages(guessed, counts)}


def percentages(correct: Mapping[str, float], counts: dict[str, int]) -> dict[str, float | None]:
    return {column: 100 * correct[column] / n if n else None for column, n in counts.items()}
