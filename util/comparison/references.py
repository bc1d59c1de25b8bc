"""References: the untuned base and chance, which methods are held against and which are no methods themselves."""

from dataclasses import dataclass, replace

import numpy as np

from util.comparison.comparability import why_incomparable
from util.comparison.finished_runs import ASKED_WITH, Run
from util.comparison.statistics import accuracy_interval, wilson
from util.fingerprint import FROZEN, FROZEN_SHA256, both_tell
from util.training.recipe import other_inputs

UNTUNED, CHANCE = "untuned base", "chance"


@dataclass(frozen=True)
class Reference:
    """Accuracies in percent, by column; None where a column has no questions.

    interval: the 95 % interval of Avg; None: the accuracy is exact. note: a description in words. parse_failures: the
    percentage of answers that named no option, where it is known.
    """

    name: str
    accuracies: dict[str, float | None]
    interval: tuple[float, float] | None
    note: str
    parse_failures: float | None = None

    @property
    def overall(self) -> float:
        accuracy = self.accuracies["Avg"]
        assert accuracy is not None  # every run has questions
        return accuracy


def find_references(untuned: list[Run], runs: list[Run], reference: Run, clusters: np.ndarray | None
                    ) -> tuple[list[Reference], list[str]]:
    """The untuned base and chance, where they are known, and the reasons why an untuned base is left out.

    untuned: scores of untuned bases. reference: the run that tells which base, and which questions, are meant.
    """
    right_options = next((run.right_options for run in runs if run.answers), {})
    reasons = {run.folder: why_another(run, reference, right_options) for run in untuned}
    fitting = [run.with_right_options(right_options) for run in untuned if not reasons[run.folder]]
    for run in fitting[1:]:
        reasons[run.folder] = f"the untuned base is in {fitting[0].folder} already"
    chance = next((run.chance for run in [*runs, *fitting] if run.chance), None)
    found = [of_untuned(run, clusters) for run in fitting[:1]]
    return (found + ([Reference(CHANCE, chance, None, "guessing among the options of each question")] if chance
                     else []), [f"{folder}: {reason}" for folder, reason in reasons.items() if reason])


def why_another(run: Run, reference: Run, right_options: dict[str, int]) -> str | None:
    """The reason why the untuned base is not the one that the reference was trained from, asked in the same way; None
    where it is."""
    if "base" not in run.trained_on or "base" not in reference.trained_on:
        return f"whether this is the untuned base of {reference.folder} cannot be told: it needs a recipe.json"
    others = other_inputs(run.trained_on, reference.trained_on, (*FROZEN, *FROZEN_SHA256))
    if others:
        return f"the untuned base has {', '.join(others)} than {reference.folder}"
    for flag in ASKED_WITH:
        if both_tell(flag, run.flags, reference.flags) and run.flags[flag] != reference.flags[flag]:
            return (f"the untuned base was scored with --{flag} {run.flags[flag]}, and not {reference.flags[flag]}: "
                    "run eval.py as for the runs")
    return why_incomparable(replace(run, flags=reference.flags), reference, right_options)


def of_untuned(run: Run, clusters: np.ndarray | None) -> Reference:
    outcomes = np.array([[answer.correct for answer in run.answers]], int)
    low, high = accuracy_interval(outcomes, clusters, None) if run.answers else \
        wilson(run.correct["Avg"], run.counts["Avg"])
    accuracies = {column: 100 * run.correct[column] / n if n else None for column, n in run.counts.items()}
    unparsed = None if run.parse_failures is None else 100 * run.parse_failures / run.counts["Avg"]
    return Reference(UNTUNED, accuracies, (100 * low, 100 * high), f"without adapters, in {run.folder}", unparsed)
