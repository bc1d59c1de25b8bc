"""ScienceQA accuracy (Lu et al. 2022): nine columns in percent, with the counts they are computed from."""

from collections.abc import Iterable

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
    """Percent correct of the answered problems by column (None for an empty column), with `counts` and `correct`."""
    counts = dict.fromkeys(COLUMNS, 0)
    correct = dict.fromkeys(COLUMNS, 0)
    for answer in answers:
        for column, belongs in COLUMNS.items():
            if belongs(problems[answer.qid]):
                counts[column] += 1
                correct[column] += answer.correct
    percent = {column: 100 * correct[column] / n if n else None for column, n in counts.items()}
    return {**percent, "counts": counts, "correct": correct}
