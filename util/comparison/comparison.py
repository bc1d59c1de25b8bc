"""Compares methods, each of which has a run per seed (methods.py), and computes their differences to the base.

Runs that cannot be compared are excluded, with the reason. Differences between methods with several seeds come from
one estimate, which counts questions and seeds as samples; those between single runs are of these runs alone.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lavin.runtime.console import counted, listed
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from util.comparison.comparability import same_questions, with_note_on_inputs
from util.comparison.finished_runs import Run, is_untuned, read_run, read_untuned
from util.comparison.methods import MEND, PUBLISHED, find_base, group_by_method, method_names, named_methods
from util.comparison.references import Reference, find_references
from util.comparison.statistics import (
    accuracy_interval,
    contrast,
    expected_design_effect,
    holm,
    mcnemar,
    newcombe,
    seed_variance,
    tango,
    wilson,
)
from util.provenance import DIRTY, short_commit
from util.runs import run_folders

ASSUMED_ICC = (0.01, 0.05, 0.1)  # intraclass correlations of outcomes


@dataclass(frozen=True)
class Method:
    """The runs of one method, one per seed. Accuracies are percentages, averaged over the seeds.

    average_interval: the interval of Avg by what is known of all compared runs; None where only counts are known.
    """

    name: str
    runs: list[Run]
    published: bool = False
    average_interval: tuple[float, float] | None = None

    @property
    def counts(self) -> dict[str, int]:
        return self.runs[0].counts

    @property
    def flags(self) -> dict:
        return self.runs[0].flags

    def correct(self, column: str) -> float:
        return sum(run.correct[column] for run in self.runs) / len(self.runs)

    @property
    def overall(self) -> float:
        """Accuracy over all questions, of which every run has some."""
        return 100 * self.correct("Avg") / self.counts["Avg"]

    def accuracies(self, column: str) -> np.ndarray:
        """The accuracy of each seed: [seeds]."""
        return np.array([100 * run.correct[column] / self.counts[column] for run in self.runs])

    def accuracy(self, column: str) -> float | None:
        """The mean accuracy; None where the column has no questions."""
        return 100 * self.correct(column) / self.counts[column] if self.counts[column] else None

    def deviation(self, column: str) -> float | None:
        """The sample standard deviation over the seeds; None for a single seed."""
        return float(self.accuracies(column).std(ddof=1)) if len(self.runs) > 1 and self.counts[column] else None

    def interval(self, column: str) -> tuple[float, float]:
        """The confidence interval of the mean over the seeds; Wilson's, from the number of questions alone, for all
        columns but Avg."""
        if column == "Avg" and self.average_interval:
            return self.average_interval
        low, high = wilson(self.correct(column), self.counts[column])
        return 100 * low, 100 * high

    @property
    def parse_failures(self) -> float | None:
        """The percentage of answers that named no option, so that the most likely one counts; None where it is not
        known of all seeds."""
        found = [run.parse_failures for run in self.runs if run.parse_failures is not None]
        return 100 * sum(found) / (len(found) * self.counts["Avg"]) if len(found) == len(self.runs) else None

    @property
    def has_answers(self) -> bool:
        """Whether it is known which questions were answered correctly, and not only how many."""
        return bool(self.runs[0].answers)

    @property
    def outcomes(self) -> np.ndarray:
        """1 where the answer is correct, else 0: [seeds, questions]."""
        return np.array([[answer.correct for answer in run.answers] for run in self.runs], int)


@dataclass(frozen=True)
class Difference:
    """The difference to the base in percentage points, with its 95 % interval.

    low, high: None where the method or the base has one seed and others have several, so that nothing can be said about
    the difference. p, holm (p adjusted for the other differences): None there, and where it is not known which answers
    are correct. detectable: the smallest true difference that is found with a power of 80 %, after the adjustment; None
    where this is a difference between single runs, which says nothing about their methods.
    """

    points: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    holm: float | None = None
    detectable: float | None = None

    @property
    def is_of_methods(self) -> bool:
        return self.detectable is not None

    @property
    def largest(self) -> float:
        """The largest absolute difference that the interval contains."""
        assert self.low is not None and self.high is not None
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """Methods evaluated on the same questions; the base, if there is one, comes first.

    references: the untuned base and chance, where they are known. They are no methods: nothing is tested of them.
    """

    methods: list[Method]
    differences: dict[str, Difference]  # by method name
    excluded: list[str]  # "RUN: reason"
    notes: list[str] = field(default_factory=list)  # "RUN, ...: what to know of it"
    clusters: np.ndarray | None = None  # of the questions, in the order of outcomes
    references: list[Reference] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """The number of questions by column, in the order of columns."""
        return self.methods[0].counts

    @property
    def own(self) -> list[Method]:
        """The methods of the user's runs; the others were published."""
        return [method for method in self.methods if not method.published]


def compare(paths: list[str], base_path: str | None = None) -> Comparison:
    """Compares the runs in the folders. Raises UserError where no run can be used or the base is ambiguous."""
    runs, untuned, unread = read_all(paths, base_path)
    base = find_base(runs, base_path)
    runs, incomparable = same_questions(runs, base)
    runs = [with_note_on_inputs(run, base or runs[0]) for run in runs]
    groups, duplicates = group_by_method(runs, base)
    methods = [Method(name, runs_of_method) for name, runs_of_method in groups.items()]
    clusters, notes_on_clusters = find_clusters(runs)
    references, unfit = find_references(untuned, runs, base or runs[0], clusters)
    return Comparison(with_intervals(methods, clusters), differences_to_first(methods, clusters) if base else {},
                      unread + incomparable + duplicates + unfit, [
                          *collect_notes(methods), *notes_on_clusters, *note_on_code(methods)], clusters, references)


def seeds_in_words(methods: list[Method]) -> str:
    """How many seeds a method has: `5 seeds`, or `1 or 5 seeds`."""
    numbers = sorted({len(method.runs) for method in methods})
    return f"{listed(numbers, 'or')} seed{'s' * (numbers != [1])}"


def read_all(paths: list[str], base_path: str | None) -> tuple[list[Run], list[Run], list[str]]:
    """The runs in the folders, the scores of untuned bases, and the reasons why others cannot be read."""
    runs, untuned, unread = [], [], []
    for folder in run_folders(paths):
        try:
            if is_untuned(folder):
                untuned.append(read_untuned(folder))
            else:
                runs.append(read_run(folder))
        except UserError as error:
            if base_path is not None and folder.resolve() == Path(base_path).resolve():
                raise UserError(f"--base: {error}") from error
            unread.append(f"{folder}: {error}")
    if not runs:
        only_untuned = [f"{run.folder}: the untuned base is no run" for run in untuned]
        raise UserError("no run can be drawn. " + "; ".join(unread + only_untuned))
    return runs, untuned, unread


def published() -> Comparison:
    """The published runs. Only percentages were published; each determines its number of correct answers."""
    facts = read_json(PUBLISHED, MEND)
    counts = facts["counts"]
    methods = []
    for named in named_methods():
        if (found := facts["methods"].get(named.key)) is not None:
            correct = {column: round(percent * counts[column] / 100) for column, percent in found["scores"].items()}
            run = Run("published", {**facts["flags"], **named.flags}, found["train_closs"], counts, correct)
            methods.append(Method(named.name, [run], published=True))
    return Comparison(methods, differences_to_first(methods), [], [published_clusters(facts)])


def published_clusters(facts: dict) -> str:
    """The note on how clusters would widen the published intervals, by how correlated outcomes may be within them."""
    def in_words(numbers: Iterable[float], form: str) -> str:
        return listed((f"{number:{form}}" for number in numbers), "or")
    effects = [expected_design_effect(facts["counts"]["Avg"], facts["same_cluster"], icc) for icc in ASSUMED_ICC]
    return ("ScienceQA's questions share lectures, but intervals of published runs take them as independent. Measured: "
            f"two questions share one with probability {facts['same_cluster']} ({facts['same_cluster_source']}). "
            f"Assumed: an intraclass correlation of {in_words(ASSUMED_ICC, 'g')}. By this, intervals of accuracies are "
            f"{in_words([effect**0.5 for effect in effects], '.1f')} times as wide (design effect "
            f"{in_words(effects, '.1f')})")


def with_published(comparison: Comparison) -> Comparison:
    """Adds the published methods, each after the method of the same name. Raises UserError if the questions differ."""
    reference = published()
    if comparison.counts != reference.counts:
        raise UserError(f"--published: its scores are of {counted(reference.counts['Avg'], 'question')} of ScienceQA, "
                        f"these runs' of {counted(comparison.counts['Avg'], 'other')}: leave it out")
    new_names = {method.name: f"{method.name} (published)" for method in reference.methods}
    methods = comparison.methods + [replace(method, name=new_names[method.name]) for method in reference.methods]
    order = [comparison.methods[0].name, *method_names(), *(method.name for method in comparison.methods)]
    methods.sort(key=lambda method: order.index(method.name.removesuffix(" (published)")))
    renamed = {new_names[name]: difference for name, difference in reference.differences.items()}
    return replace(comparison, methods=methods, differences=comparison.differences | renamed,
                   notes=comparison.notes + reference.notes)


def find_clusters(runs: list[Run]) -> tuple[np.ndarray | None, list[str]]:
    """The clusters of the questions, in the order of outcomes, and a note where runs have saved different ones. None
    where no run saved them, or where all questions have the same one or one of their own.

    The fewest clusters count, whatever the order of the runs: they make intervals longer rather than shorter.
    """
    folders: dict[tuple[int, ...], list[str]] = {}
    for run in runs:
        found = clusters_of([answer.cluster for answer in run.answers])
        if found is not None:
            folders.setdefault(tuple(found.tolist()), []).append(run.folder)
    if not folders:
        return None, []
    fewest = min(folders, key=lambda clusters: (max(clusters), clusters))
    others = [folder for clusters, with_them in folders.items() if clusters != fewest for folder in with_them]
    return np.array(fewest), [f"{', '.join(others)}: the questions have other clusters than in {folders[fewest][0]}, "
                              "whose clusters, the fewest, count for all"] if others else []


def clusters_of(names: list[str | None]) -> np.ndarray | None:
    """The clusters of these names, as numbers in the order of their first questions; None where one is missing, or
    where they say nothing."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if None in numbers or len(numbers) in (0, 1, len(names)):
        return None
    return np.array([numbers[name] for name in names])


def with_intervals(methods: list[Method], clusters: np.ndarray | None) -> list[Method]:
    """The methods with the intervals of their accuracies, where their answers are known."""
    if not methods[0].has_answers:
        return methods
    between = seed_variance([method.outcomes for method in methods], clusters)
    intervals = [accuracy_interval(method.outcomes, clusters, between) for method in methods]
    return [replace(method, average_interval=(100 * low, 100 * high))
            for method, (low, high) in zip(methods, intervals, strict=True)]


def collect_notes(methods: list[Method]) -> list[str]:
    """The notes on the runs; a note on several of them takes one line."""
    folders: dict[str, list[str]] = {}
    for method in methods:
        for run in method.runs:
            for note in run.notes:
                folders.setdefault(note, []).append(run.folder)
    return [f"{', '.join(names)}: {note}" for note, names in folders.items()]


def note_on_code(methods: list[Method]) -> list[str]:
    """The note on runs that were not all made by the code of one commit, as far as their commits are known."""
    n_runs = Counter(commit for method in methods for run in method.runs for commit in run.commits)
    n_dirty = sum(commit.endswith(DIRTY) for commit in n_runs)
    if len(n_runs) < 2 and not n_dirty:
        return []
    commits = ", ".join(f"{short_commit(commit)} ({counted(n, 'run')})" for commit, n in n_runs.items())
    return [f"the runs {'do' if len(n_runs) > 1 else 'may'} not all have the same code: {commits}"
            + f"; {DIRTY} says that it was changed since the commit, maybe in another way for each run" * bool(n_dirty)]


def differences_to_first(methods: list[Method], clusters: np.ndarray | None = None) -> dict[str, Difference]:
    """The difference of each method to the first one."""
    base, *others = methods
    if not base.has_answers:
        found = [from_counts(method, base) for method in others]
    elif any(len(method.runs) > 1 for method in methods):
        found = between_methods([method.outcomes for method in methods], clusters)
    else:
        found = [between_runs(method.outcomes[0], base.outcomes[0], clusters) for method in others]
    if base.has_answers:
        adjusted = iter(holm([difference.p for difference in found if difference.p is not None]))
        found = [difference if difference.p is None else replace(difference, holm=next(adjusted))
                 for difference in found]
    return {method.name: replace(difference, points=method.overall - base.overall)
            for method, difference in zip(others, found, strict=True)}


def from_counts(method: Method, base: Method) -> Difference:
    """An unpaired difference, where it is known how many answers are correct, but not which."""
    low, high = newcombe(method.correct("Avg"), method.counts["Avg"], base.correct("Avg"), base.counts["Avg"])
    return Difference(0, 100 * low, 100 * high)


def between_runs(run: np.ndarray, base: np.ndarray, clusters: np.ndarray | None) -> Difference:
    low, high = tango(run, base, clusters)
    return Difference(0, 100 * low, 100 * high, mcnemar(run, base, clusters))


def between_methods(outcomes: list[np.ndarray], clusters: np.ndarray | None) -> list[Difference]:
    """The differences to the first method's outcomes. The variance between seeds is that of all methods. A difference
    of which one side has a single seed is not tested: this seed may be a lucky one."""
    between = seed_variance(outcomes, clusters)
    assert between is not None
    estimates = {i: contrast([outcomes[0], rows], (-1, 1), clusters, between) for i, rows in enumerate(outcomes[1:])
                 if min(len(outcomes[0]), len(rows)) > 1}
    differences = [Difference(0)] * len(outcomes[1:])
    for i, estimate in estimates.items():
        low, high = estimate.interval()
        differences[i] = Difference(0, 100 * low, 100 * high, estimate.p,
                                    detectable=100 * estimate.detectable(len(estimates)))
    return differences
