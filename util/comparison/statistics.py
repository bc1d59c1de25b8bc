"""Confidence intervals of accuracies and of their differences, and significance tests.

Several seeds a method: `contrast` is the one estimator of a difference between methods, whose interval, p-value and
detectable difference agree with one another. One seed a method: `tango` and `mcnemar` compare two runs, and say nothing
about their methods. Counts without answers: `wilson` and `newcombe`.

Intervals are (low, high) fractions at the 95 % confidence level. Outcomes are arrays [seeds, n] (a run's: [n]) of 0
(wrong) and 1 (correct), with the questions in the same order. Clusters are an array [n] of each question's cluster, 0
to G - 1, for questions whose outcomes are correlated within G clusters; None: each question is a cluster of its own, so
that all questions are independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.stats import bartlett, norm
from scipy.stats import t as student_t

LEVEL = 0.05  # of adjusted p-values, below which methods are said to differ; an interval misses so often
TAIL = LEVEL / 2  # of the distribution, beyond either end of an interval
Z = float(norm.ppf(1 - TAIL))
POWER = 0.8  # the probability with which a detectable difference is found (Cohen 1988)


# --- Clusters ---

def sums_by_cluster(values: np.ndarray, clusters: np.ndarray | None) -> np.ndarray:
    """Adds up values [..., n] within the clusters: [..., G]."""
    if clusters is None:
        return values
    sums = np.zeros((*values.shape[:-1], clusters.max() + 1), values.dtype)
    np.add.at(sums.T, clusters, values.T)
    return sums


def standard_error(values: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The standard error of the mean of values [n], whatever their correlation within clusters (Liang & Zeger 1986; for
    evaluations, Miller 2024, arXiv 2411.00640). The variance has the usual factor G / (G - 1) (Cameron & Miller 2015).
    """
    residuals = sums_by_cluster(values - values.mean(), clusters)
    return math.sqrt((residuals**2).sum() * len(residuals) / max(1, len(residuals) - 1)) / len(values)


def design_effect(values: np.ndarray, clusters: np.ndarray | None) -> float:
    """The variance of the mean of values [n], divided by that of a mean of independent values (Kish 1965). It is 1
    where all values are equal."""
    independent = standard_error(values)
    return (standard_error(values, clusters) / independent) ** 2 if independent else 1.0


def expected_design_effect(n: int, same_cluster: float, intraclass_correlation: float) -> float:
    """The design effect of n equally correlated questions, two of which share a cluster with the given probability
    (Kish 1965)."""
    return 1 + (n - 1) * same_cluster * intraclass_correlation


# --- Several seeds a method ---

@dataclass(frozen=True)
class SeedVariance:
    """The variance between the seeds of a method, pooled over methods.

    accuracies: the variance of the seeds' accuracies. answers: the part of it that stems from single answers, which
    vary with the seed, and so from the number of questions. freedom: the degrees of freedom.
    """

    accuracies: float
    answers: float
    freedom: int


def seed_variance(outcomes: Sequence[np.ndarray], clusters: np.ndarray | None = None) -> SeedVariance | None:
    """The variance between seeds, pooled over the methods' outcomes, whose runs are taken as independent; None where no
    method has several seeds."""
    return pooled([rows - rows.mean(0) for rows in outcomes], clusters, sum(len(rows) - 1 for rows in outcomes))


def block_variance(outcomes: Sequence[np.ndarray], clusters: np.ndarray | None, family: np.ndarray) -> SeedVariance:
    """The variance between seeds for a family of contrasts between methods that have the same seeds, two or more.

    A seed that suits a schedule may suit it with every dropout, so that the runs over which a main effect is averaged
    are not independent. So seeds are blocks: only what they do to these contrasts counts, as in the error term of a
    split-plot design (Yates 1935). By chance few seeds may show too little of it, so it is no less than the variance
    of runs that are taken as independent. family: the contrasts' weights [contrasts, methods].
    """
    projection = np.linalg.pinv(family) @ family  # [methods, methods], on the span of the contrasts
    deviations = np.einsum("ij,jsn->isn", projection, np.stack([rows - rows.mean(0) for rows in outcomes]))
    of_family = pooled(list(deviations), clusters, int(np.linalg.matrix_rank(family)) * (len(outcomes[0]) - 1))
    of_runs = seed_variance(outcomes, clusters)
    assert of_family is not None and of_runs is not None
    return replace(max(of_family, of_runs, key=lambda found: found.accuracies), freedom=of_family.freedom)


def pooled(deviations: Sequence[np.ndarray], clusters: np.ndarray | None, freedom: int) -> SeedVariance | None:
    """The variance of runs whose outcomes deviate so much from those of other seeds."""
    rows = [row for of_method in deviations for row in of_method]
    return SeedVariance(sum(float(row.mean()) ** 2 for row in rows) / freedom,
                        sum(standard_error(row, clusters) ** 2 for row in rows) / freedom, freedom) if freedom else None


def equal_variances(accuracies: Sequence[np.ndarray]) -> float | None:
    """The p-value of the null hypothesis that accuracies of the methods vary equally between the seeds (Bartlett 1937),
    as `seed_variance` assumes. None where fewer than two methods have three seeds that are not all equal."""
    groups = [values for values in accuracies if len(values) >= 3 and np.ptp(values) > 0]
    return float(bartlett(*groups).pvalue) if len(groups) > 1 else None


@dataclass(frozen=True)
class Estimate:
    """An estimate whose error follows Student's t distribution with these degrees of freedom.

    centre: the middle of the interval, a little nearer to 0 than the observed value where questions are few. largest:
    the largest absolute value that is possible.
    """

    centre: float
    variance: float
    freedom: float
    largest: float = 1.0

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    def interval(self, tests: int = 1) -> tuple[float, float]:
        """The interval; for several tests, all of them hold their values at 95 % together (Bonferroni)."""
        half_width = student_t.ppf(1 - TAIL / tests, self.freedom) * self.standard_error
        return max(-self.largest, self.centre - half_width), min(self.largest, self.centre + half_width)

    @property
    def p(self) -> float:
        """The two-sided p-value of the null hypothesis that the true value is 0."""
        return float(2 * student_t.sf(abs(self.centre) / self.standard_error, self.freedom))

    @property
    def p_greater(self) -> float:
        """The one-sided p-value: small where the true value lies above 0."""
        return float(student_t.sf(self.centre / self.standard_error, self.freedom))

    def detectable(self, tests: int = 1) -> float:
        """The smallest true value that is found with a power of 80 %, at 5 % over several tests (Bonferroni); infinite
        where no possible one is."""
        quantiles = student_t.ppf([1 - TAIL / tests, POWER], self.freedom)
        found = float(quantiles.sum()) * self.standard_error
        return found if found <= self.largest else math.inf


def two_way(questions: float, questions_freedom: float, seeds: float, answers: float, seeds_freedom: float
            ) -> tuple[float, float]:
    """The variance of a difference between methods, and its degrees of freedom (Satterthwaite 1946).

    questions, seeds: its variance over the sample of questions, and over that of seeds. answers: the variance that both
    of them count. Two-way clustering (Cameron, Gelbach & Miller 2011), no less than either of the two.
    """
    variance = max(questions + seeds - answers, questions, seeds)
    return variance, variance**2 / (questions**2 / questions_freedom + seeds**2 / seeds_freedom)


def contrast(outcomes: Sequence[np.ndarray], weights: Sequence[float], clusters: np.ndarray | None,
             between: SeedVariance) -> Estimate:
    """The sum of methods' accuracies times weights that add up to 0: (-1, 1) for the difference of two methods.

    The interval counts questions, their clusters and seeds as samples. Two imaginary questions, answered in favour of
    either side, keep it honest where nearly all answers agree (Bonett & Price 2012, for one seed). between: the result
    of `seed_variance` for these methods or more.
    """
    differences = sum(weight * rows.mean(0) for weight, rows in zip(weights, outcomes, strict=True))
    largest = sum(weight for weight in weights if weight > 0)
    values = np.append(differences, [largest, -largest])
    if clusters is not None:
        clusters = np.append(clusters, clusters.max() + np.array([1, 2]))
    n_clusters = len(values) if clusters is None else clusters.max() + 1
    per_run = sum(weight**2 / len(rows) for weight, rows in zip(weights, outcomes, strict=True))
    variance, freedom = two_way(standard_error(values, clusters) ** 2, n_clusters - 1,
                                per_run * between.accuracies, per_run * between.answers, between.freedom)
    return Estimate(float(values.mean()), variance, freedom, largest)


def accuracy_interval(outcomes: np.ndarray, clusters: np.ndarray | None, between: SeedVariance | None
                      ) -> tuple[float, float]:
    """The interval of a method's accuracy: Wilson's, with the number of independent answers that determine it as well
    (Korn & Graubard 1998; Franco et al. 2019), at most the number of questions.

    between: the result of `seed_variance`; None where methods have one seed, so that the interval is that of this run.
    """
    mean = outcomes.mean(0)
    n, p = len(mean), float(mean.mean())
    independent = p * (1 - p) / (n - 1) if n > 1 else 0.0
    if independent == 0 or (clusters is None and between is None):
        return wilson(n * p, n)
    seeds, answers, freedom = (
        (between.accuracies / len(outcomes), between.answers / len(outcomes), between.freedom) if between
        else (0.0, 0.0, math.inf))
    n_clusters = n if clusters is None else clusters.max() + 1
    questions = max(1e-30, standard_error(mean, clusters) ** 2)  # degrees of freedom divide by it
    variance, freedom = two_way(questions, n_clusters - 1, seeds, answers, freedom)
    size = n * min(1.0, independent / variance) * (Z / student_t.ppf(1 - TAIL, freedom)) ** 2
    return wilson(size * p, size)


# --- Two runs ---

def mcnemar(run: np.ndarray, base: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The exact two-sided p-value of the null hypothesis that two runs answer such questions equally well.

    The binomial test on the questions that only one of them answers correctly (McNemar 1947). With clusters, the sum of
    each has a random sign under the null hypothesis (Canay, Romano & Shaikh 2017).
    """
    differences = sums_by_cluster(run.astype(int) - base.astype(int), clusters)
    sizes, counts = np.unique(abs(differences[differences != 0]), return_counts=True)
    pmf = np.ones(1)  # of the sum of the positive differences, under random signs
    for size, count in zip(sizes, counts.tolist(), strict=True):
        binomial = np.zeros(size * count + 1)
        binomial[::size] = [math.comb(count, k) / 2**count for k in range(count + 1)]
        pmf = np.convolve(pmf, binomial)
    signed_sums = 2 * np.arange(len(pmf)) - (len(pmf) - 1)
    return min(1.0, float(pmf[abs(signed_sums) >= abs(differences.sum())].sum()))


def tango(run: np.ndarray, base: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """The score interval of the difference between two runs' accuracies on the same questions (Tango 1998).

    With clusters, all counts are divided by the design effect of the answers' differences, if it is above 1, and
    Student's quantile accounts for few clusters (Korn & Graubard 1998).
    """
    quantile = Z if clusters is None else float(student_t.ppf(1 - TAIL, clusters.max()))
    differences = run.astype(int) - base.astype(int)
    scale = 1 / max(1.0, design_effect(differences, clusters))
    n, wins, losses = scale * len(differences), scale * (differences > 0).sum(), scale * (differences < 0).sum()

    def score(difference: float) -> float:
        """The standardized distance of the observed difference from a hypothetical one. Of the shares of wins and
        losses, the latter is the larger root of Tango's quadratic equation."""
        b = -wins - losses + (2 * n - wins + losses) * difference
        q = (math.sqrt(max(0.0, b * b + 8 * n * losses * difference * (1 - difference))) - b) / (4 * n)
        variance = n * (2 * q + difference * (1 - difference))
        distance = wins - losses - n * difference
        return distance / math.sqrt(max(variance, 1e-300)) if distance else 0.0

    observed = (wins - losses) / n
    low = -1.0 if observed <= -1 else brentq(lambda d: score(d) - quantile, -1 + 1e-12, observed)
    high = 1.0 if observed >= 1 else brentq(lambda d: score(d) + quantile, observed, 1 - 1e-12)
    return float(low), float(high)


# --- Counts without answers ---

def wilson(correct: float, n: float) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927). `correct` may be a mean over seeds; n an effective size (Franco
    et al. 2019), with `correct` in proportion."""
    p, z2 = correct / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half_width = Z * math.sqrt(max(0.0, p * (1 - p)) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # rounding would leave 0 of 3 outside its own interval, and matplotlib refuses negative error bars
    return max(0.0, min(p, centre - half_width)), min(1.0, max(p, centre + half_width))


def newcombe(correct: float, n: int, base_correct: float, base_n: int) -> tuple[float, float]:
    """The interval of an unpaired difference of proportions, from their Wilson intervals (Newcombe 1998, method 10)."""
    p, q = correct / n, base_correct / base_n
    (p_low, p_high), (q_low, q_high) = wilson(correct, n), wilson(base_correct, base_n)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def holm(p_values: list[float]) -> list[float]:
    """The p-values adjusted for multiple comparisons, in the given order (Holm 1979)."""
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running_max
    return adjusted
