"""How many seeds and questions a comparison needs to find a difference of given size.

The plan asks what `util.comparison.statistics.contrast` would find, with more seeds or questions than the runs at hand
have (Miller 2024, arXiv 2411.00640, on power analysis, with a term for seeds). The variances are measured on these
runs; what they cannot show is assumed, which the plan says.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import chi2

from lavin.runtime.console import counted, format_table
from lavin.runtime.errors import UserError
from util.comparison.comparison import Comparison
from util.comparison.factorial import Grid, Weights, find_grid
from util.comparison.statistics import TAIL, Estimate, seed_variance, standard_error, two_way
from util.comparison.tables import NONE, half_width

SEEDS = (2, 3, 5, 10, 20, 50)  # the plan's rows
MANY = 1000  # seeds: more than anybody trains
MOST_QUESTIONS = 10**9
ASSUMED_DEVIATION = 0.5  # points, between seeds of one method


@dataclass(frozen=True)
class Variances:
    """The parts of the variance of a difference between two methods, in squared points.

    - seeds: the variance between a method's seeds, of their accuracies on endless questions.
    - questions: the variance between questions, of the difference that stays whatever the seed.
    - noise: the variance of a single answer of one seed.
    - methods: their number, of which one is the base.
    - directions: in how many independent ways the seeds vary: the degrees of freedom of two seeds. By default as many
      as there are methods.
    - cluster_size: the number of questions in a cluster, on average.
    - notes: the source of these numbers.
    """

    seeds: float
    questions: float
    noise: float
    methods: int = 2
    directions: int | None = None
    cluster_size: float = 1.0
    notes: tuple[str, ...] = ()


# --- Variances of the runs at hand ---

def measure(comparison: Comparison) -> Variances:
    """The variances of the runs at hand. Raises UserError where there is nothing to compare."""
    if len(comparison.methods) < 2:
        raise UserError("--plan needs runs of two methods at least: name more runs, or none for the published ones")
    seeds, noise, seeds_note = between_seeds(comparison)
    questions, questions_note = between_questions(comparison, noise)
    n = comparison.counts["Avg"]
    cluster_size = 1.0 if comparison.clusters is None else n / (comparison.clusters.max() + 1)
    return Variances(seeds, questions, noise, len(comparison.methods), cluster_size=cluster_size,
                     notes=(seeds_note, questions_note))


def measure_family(variances: Variances, comparison: Comparison, grid: Grid, effects: dict[str, Weights]) -> Variances:
    """The variances of the effects of a family, of which seeds are blocks. Where they cannot be measured, they are
    those of differences to the base.

    The variance over questions is that of a difference between two methods, as in Variances; so that of an effect is
    divided by half the sum of its squared weights.
    """
    if not grid.has_effects:
        return variances
    found = grid.seed_variance(effects, comparison.clusters)
    noise, outcomes, questions = 1e4 * found.answers * comparison.counts["Avg"], grid.outcomes(), []
    for weights in effects.values():
        values = sum(weight * outcomes[levels].mean(0) for levels, weight in weights.items())
        squares = sum(weight**2 for weight in weights.values())
        of_effect = per_question(np.asarray(values), comparison.clusters)
        questions.append(of_effect * 2 / squares - 2 * noise / len(grid.seeds))
    return replace(variances, seeds=1e4 * max(0.0, found.accuracies - found.answers), noise=noise,
                   questions=max(0.0, float(np.mean(questions))), directions=found.freedom // (len(grid.seeds) - 1))


def between_seeds(comparison: Comparison) -> tuple[float, float, str]:
    """The variance between seeds, the variance of noise, and their source."""
    repeated = [method for method in comparison.methods if len(method.runs) > 1]
    if not repeated:
        return ASSUMED_DEVIATION**2, 0.0, (
            f"Assumed: a standard deviation of {ASSUMED_DEVIATION:g} points between a method's seeds, and that more "
            "seeds average out nothing else. Runs of several seeds would measure both.")
    freedom = sum(len(method.runs) - 1 for method in repeated)
    of_accuracies = sum((len(method.runs) - 1) * method.accuracies("Avg").var(ddof=1) for method in repeated) / freedom
    found = seed_variance([method.outcomes for method in repeated], comparison.clusters) if (
        repeated[0].has_answers) else None
    noise = 1e4 * found.answers if found else 0.0
    low, high = np.sqrt(freedom * of_accuracies / chi2.ppf([1 - TAIL, TAIL], freedom))
    return max(0.0, of_accuracies - noise), noise * comparison.counts["Avg"], (
        f"Measured, on {counted(freedom + len(repeated), 'run')} of {counted(len(repeated), 'method')}: accuracies "
        f"of a method's seeds have a standard deviation of {math.sqrt(of_accuracies):.2f} points (95 % interval "
        f"{low:.2f} to {high:.2f}); the plan takes it as known.")


def per_question(values: np.ndarray, clusters: np.ndarray | None) -> float:
    """The variance, in squared points, that n independent questions with the same standard error would have.

    values [n]: fractions.
    """
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
        f"Measured, on {counted(comparison.counts['Avg'], 'question')}: the variance between questions of the "
        f"difference to {base.name}{clustered}.")


# --- What they allow ---

def detectable(variances: Variances, seeds: int, n: int, weights: Collection[float] = (-1, 1),
               tests: int | None = None) -> float:
    """The smallest true difference, in points, between a method and the base that is found with a power of 80 %.

    All methods have as many seeds and the same n questions; 5 % hold for all differences to the base together, as by p
    (Holm). It is infinite for one seed, which may be a lucky one, and where no possible difference is found. weights:
    those of the methods' accuracies, as `contrast` takes them, whose two imaginary questions count here, too. tests:
    how many effects 5 % hold for together.
    """
    freedom, n_clusters = (variances.directions or variances.methods) * (seeds - 1), n / variances.cluster_size
    if freedom == 0 or n_clusters < 2:
        return math.inf
    squares, largest = sum(weight**2 for weight in weights), sum(weight for weight in weights if weight > 0)
    noise = squares * variances.noise / (seeds * n)  # counted by questions and by seeds
    of_answers = (squares / 2 * variances.questions * n + noise * n**2) * (n_clusters - 1) / n_clusters
    questions = (of_answers + 2 * (100 * largest) ** 2) / (n + 2) ** 2 * (n_clusters + 2) / (n_clusters + 1)
    found = two_way(questions, n_clusters + 1, squares * variances.seeds / seeds + noise, noise, freedom)
    return Estimate(0.0, *found, largest=100 * largest).detectable(tests or variances.methods - 1)


def questions_needed(variances: Variances, seeds: int, points: float) -> int | None:
    """The smallest n for which the difference is detectable; None where these seeds do not find it on any number."""
    if detectable(variances, seeds, MOST_QUESTIONS) > points:
        return None
    too_few, enough = 1, MOST_QUESTIONS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if detectable(variances, seeds, middle) <= points else (middle, enough)
    return enough


def seeds_needed(variances: Variances, n: int, points: float) -> int | None:
    """The smallest number of seeds for which the difference is detectable with n questions; None where it is none."""
    return next((seeds for seeds in range(2, MANY) if detectable(variances, seeds, n) <= points), None)


# --- In words ---

def plan(comparison: Comparison, points: float) -> str:
    """The plan as text: a table by number of seeds, what it says of these questions, and where its numbers are from."""
    variances, n = measure(comparison), comparison.counts["Avg"]
    grid = find_grid(comparison)
    families = {name: (measure_family(variances, comparison, grid, effects), effects)
                for name, effects in grid.families().items()} if grid else {}
    header = ["seeds a method", f"detectable with {counted(n, 'question')}", f"questions for {in_points(points)}",
              *(f"{family} effect" for family in families)]
    rows = []
    for seeds in SEEDS:
        found, needed = detectable(variances, seeds, n), questions_needed(variances, seeds, points)
        rows.append([seeds, half_width(found), f"{needed:,}" if needed else NONE])
        for of_family, effects in families.values():
            weights = next(iter(effects.values())).values()
            rows[-1].append(half_width(detectable(of_family, seeds, n, weights, len(effects))))
    k = variances.methods - 1
    return "\n".join([format_table(header, rows), "", verdict(variances, n, points), *variances.notes, (
        f"detectable: found with a power of 80 % between the base and one of {counted(k, 'other method')} with as "
        "many seeds each, on the same questions, by p (Holm) below 0.05. –: no difference is found, or on no number of "
        "questions. One seed tells nothing about a method, since it may just be a lucky one.")])


def verdict(variances: Variances, n: int, points: float) -> str:
    """The sentence on what a difference of this size needs."""
    enough = seeds_needed(variances, n, points)
    if enough:
        return (f"A difference of {in_points(points)} needs {counted(enough, 'seed')} a method with "
                f"{counted(n, 'question')}.")
    return (f"No number of seeds finds a difference of {in_points(points)} with {counted(n, 'question')}: it needs "
            "more of these.")


def in_points(number: float) -> str:
    return f"{number:g} point{'s' * (number != 1)}"
