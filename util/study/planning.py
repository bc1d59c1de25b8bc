"""How many seeds and questions a comparison of two methods needs to find a difference of given size.

The variance of a difference between two methods' mean accuracies over S seeds each, on the same n questions, is
2 seeds / S + (questions + 2 noise / S) / n (Miller 2024, arXiv 2411.00640, on power analysis, with a term for seeds).
It is measured on the runs at hand; what they cannot show is assumed, which the plan says.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from lavin.runtime.console import format_table
from lavin.runtime.errors import UserError
from util.study.comparison import Comparison, Method
from util.study.statistics import minimum_detectable_difference, standard_error

SEEDS = (1, 2, 3, 5, 10, 20, 50)  # the plan's rows
MANY = 1000  # seeds: more than anybody trains
ASSUMED_DEVIATION = 0.5  # points, between seeds of one method
NONE = "–"
DETECTABLE = ("detectable: found 4 times of 5 by a two-sided test at 5 % between two methods with as many seeds each, "
              "on the same questions. –: on no number of questions; one seed may just be a lucky one.")


@dataclass(frozen=True)
class Variances:
    """The parts of the variance of a difference, in squared points.

    seeds: the variance between a method's seeds, of their accuracies on endless questions. questions: the one between
    questions, of the difference that stays whatever the seed. noise: the one of a single answer of one seed. notes: the
    source of these numbers.
    """

    seeds: float
    questions: float
    noise: float
    notes: tuple[str, ...]


# --- Variances of the runs at hand ---

def measure(comparison: Comparison) -> Variances:
    """The variances of the runs at hand. Raises UserError where there is nothing to compare."""
    if len(comparison.methods) < 2:
        raise UserError("--plan needs runs of two methods at least: name more runs, or none for the published ones")
    seeds, noise, seeds_note = between_seeds(comparison)
    questions, questions_note = between_questions(comparison, noise)
    return Variances(seeds, questions, noise, (seeds_note, questions_note))


def between_seeds(comparison: Comparison) -> tuple[float, float, str]:
    """The variance between seeds, the variance of noise, and their source: the two-way analysis of variance of each
    method's outcomes (seed by question), pooled over the methods with several seeds."""
    repeated = [method for method in comparison.methods if len(method.runs) > 1]
    if not repeated:
        return ASSUMED_DEVIATION**2, 0.0, (
            f"Assumed: a standard deviation of {ASSUMED_DEVIATION:g} points between a method's seeds, and that more "
            "seeds average out nothing else. Runs of several seeds would measure both.")
    freedom = np.array([len(method.runs) - 1 for method in repeated])
    noises = [noise_of(method, comparison) for method in repeated]
    of_accuracies = [method.accuracies("Avg").var(ddof=1) for method in repeated]
    noise = float(np.average(noises, weights=freedom))
    seeds = max(0.0, float(np.average(of_accuracies, weights=freedom)) - noise / comparison.counts["Avg"])
    return seeds, noise, (f"Measured, on {sum(freedom) + len(repeated)} runs of {len(repeated)} "
                          f"method{'s' * (len(repeated) > 1)}: a standard deviation of {math.sqrt(seeds):.2f} points "
                          "between seeds, beside the noise of single answers.")


def noise_of(method: Method, comparison: Comparison) -> float:
    """The variance of outcomes that neither the seed nor the question explains; 0 where outcomes are not known."""
    if not method.has_answers:
        return 0.0
    outcomes = method.outcomes
    residuals = outcomes - outcomes.mean(0)
    per_seed = [per_question(seed_residuals, comparison.clusters) for seed_residuals in residuals]
    return float(np.mean(per_seed)) * len(outcomes) / (len(outcomes) - 1)


def per_question(values: np.ndarray, clusters: np.ndarray | None) -> float:
    """The variance that n independent questions with the same standard error would have. values [n]: fractions."""
    return 1e4 * len(values) * standard_error(values, clusters) ** 2


def between_questions(comparison: Comparison, noise: float) -> tuple[float, str]:
    """The variance between questions of the difference to the first method (a mean over the others), and its source."""
    base, *others = comparison.methods
    if not base.has_answers:
        chances = [method.overall * (100 - method.overall) for method in others]
        return float(np.mean(chances)) + base.overall * (100 - base.overall), (
            "Assumed, as the predictions are not known: methods are right on questions independently of each other. If "
            "they are right on the same ones, fewer questions will do; if questions form clusters, more are needed.")
    base_mean = base.outcomes.mean(0)
    found = [per_question(method.outcomes.mean(0) - base_mean, comparison.clusters)
             - noise / len(method.runs) - noise / len(base.runs) for method in others]
    clustered = "" if comparison.clusters is None else ", clustered by lecture"
    return max(0.0, float(np.mean(found))), (
        f"Measured, on {comparison.counts['Avg']:,} questions: the variance between questions of the difference to "
        f"{base.name}{clustered}.")


# --- What they allow ---

def seeds_detectable(variances: Variances, seeds: int) -> float:
    """The smallest difference that a t-test on the accuracies of two times `seeds` runs finds 4 times of 5, if there
    are endless questions (Cohen 1988). It is infinite for one seed, if seeds differ at all."""
    if not variances.seeds:
        return 0.0
    if seeds == 1:
        return math.inf
    quantiles = student_t.ppf([0.975, 0.8], df=2 * (seeds - 1))
    return float(quantiles.sum()) * math.sqrt(2 * variances.seeds / seeds)


def questions_detectable(variances: Variances, seeds: int, n: int) -> float:
    """The same as `seeds_detectable` for n questions, if seeds do not differ but in noise."""
    return minimum_detectable_difference(math.sqrt((variances.questions + 2 * variances.noise / seeds) / n))


def detectable(variances: Variances, seeds: int, n: int) -> float:
    """The smallest difference in points that is found. Adding squares keeps each part's own quantiles, and so errs on
    the side of more (most at 2 seeds)."""
    return math.hypot(seeds_detectable(variances, seeds), questions_detectable(variances, seeds, n))


def questions_needed(variances: Variances, seeds: int, points: float) -> int | None:
    """The smallest n for which the difference is detectable; None where these seeds do not find it on any number."""
    left = points**2 - seeds_detectable(variances, seeds) ** 2
    return math.ceil(questions_detectable(variances, seeds, 1) ** 2 / left) if left > 0 else None


# --- In words ---

def plan(comparison: Comparison, points: float) -> str:
    """The plan as text: a table by number of seeds, what it says of these questions, and where its numbers are from."""
    variances, n = measure(comparison), comparison.counts["Avg"]
    header = ["seeds a method", f"detectable with {n:,} questions", f"questions for {points:g} points"]
    rows = []
    for seeds in SEEDS:
        found, needed = detectable(variances, seeds, n), questions_needed(variances, seeds, points)
        rows.append([seeds, f"±{found:.2f}" if math.isfinite(found) else NONE, f"{needed:,}" if needed else NONE])
    return "\n".join([format_table(header, rows), "", verdict(variances, n, points), *variances.notes, DETECTABLE])


def verdict(variances: Variances, n: int, points: float) -> str:
    """The sentence on what a difference of this size needs."""
    enough = 1 + bisect_left(range(1, MANY), True, key=lambda seeds: detectable(variances, seeds, n) <= points)
    if enough < MANY:
        seeds = f"{enough} seed{'s' * (enough > 1)} a method"
        return f"A difference of {points:g} points needs {seeds} with {n:,} questions."
    return f"No number of seeds finds a difference of {points:g} points with {n:,} questions: it needs more of these."
