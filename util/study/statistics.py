"""Confidence intervals of accuracies and of their differences, and significance tests.

An accuracy is `correct` out of `n` questions. Intervals are (low, high) fractions at the 95 % confidence level.
Outcomes are arrays [seeds, n] of 0 (wrong) and 1 (correct), with the questions in the same order. Clusters are an array
[n] of each question's cluster, 0 to G - 1, for questions whose outcomes are correlated within G clusters; None: each
question is a cluster of its own, so that all questions are independent.
"""

import math

import numpy as np
from scipy.stats import t as student_t

Z = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
Z_POWER = 0.8416212335729143  # 80 % quantile
DRAWS = 10_000  # bootstrap samples: the Monte Carlo error of an interval's ends is about 0.02 of its width


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


def paired_standard_error(method: np.ndarray, base: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The standard error of the mean over the questions of their differences, for these seeds."""
    return standard_error(method.mean(0) - base.mean(0), clusters)


def design_effect(values: np.ndarray, clusters: np.ndarray) -> float:
    """The variance of the mean of values [n], divided by that of a mean of independent values (Kish 1965). It is 1
    where all values are equal."""
    independent = standard_error(values)
    return (standard_error(values, clusters) / independent) ** 2 if independent else 1.0


def expected_design_effect(n: int, same_cluster: float, intraclass_correlation: float) -> float:
    """The design effect of n equally correlated questions, two of which share a cluster with the given probability
    (Kish 1965)."""
    return 1 + (n - 1) * same_cluster * intraclass_correlation


def effective_size(values: np.ndarray, clusters: np.ndarray) -> float:
    """The number of independent questions that determine the mean of values [n] as well (Korn & Graubard 1998).

    There are at least two clusters; the quantile of t accounts for few of them. Clusters that seem to add information
    are taken not to (at most n).
    """
    t = student_t.ppf(0.975, clusters.max())
    return float(len(values) / max(1.0, design_effect(values, clusters)) * (Z / t) ** 2)


def wilson(correct: float, n: float) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927). `correct` may be a mean over seeds; n an effective size (Franco
    et al. 2019), with `correct` in proportion."""
    p, z2 = correct / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half_width = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # rounding would leave 0 of 3 outside its own interval, and matplotlib refuses negative error bars
    return max(0.0, min(p, centre - half_width)), min(1.0, max(p, centre + half_width))


def newcombe(correct: float, n: int, base_correct: float, base_n: int) -> tuple[float, float]:
    """The interval of an unpaired difference of proportions, from their Wilson intervals (Newcombe 1998, method 10)."""
    p, q = correct / n, base_correct / base_n
    (p_low, p_high), (q_low, q_high) = wilson(correct, n), wilson(base_correct, base_n)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def unpaired_standard_error(correct: float, n: int, base_correct: float, base_n: int) -> float:
    """The standard error of an unpaired difference of proportions."""
    p, q = correct / n, base_correct / base_n
    return math.sqrt(p * (1 - p) / n + q * (1 - q) / base_n)


def minimum_detectable_difference(standard_error: float) -> float:
    """The smallest true difference that a two-sided test at 5 % finds 4 times of 5 (power 0.8; Cohen 1988)."""
    return (Z + Z_POWER) * standard_error


def mcnemar(method: np.ndarray, base: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The exact two-sided p-value of the null hypothesis that both answer the questions equally well (McNemar 1947).

    One seed each: the binomial test on the questions that only one of them answers correctly. Several seeds: its
    extension to the difference of mean outcomes of each question, whose sign is random under the null hypothesis
    (Fisher's randomization test, 1935). Clusters: one sign for the sum of each (Canay, Romano & Shaikh 2017).
    """
    differences = len(base) * method.sum(0, dtype=int) - len(method) * base.sum(0, dtype=int)  # scaled to integers
    differences = sums_by_cluster(differences, clusters)
    sizes, counts = np.unique(abs(differences[differences != 0]), return_counts=True)
    pmf = np.ones(1)  # of the sum of the positive differences, under random signs
    for size, count in zip(sizes, counts.tolist(), strict=True):
        binomial = np.zeros(size * count + 1)
        binomial[::size] = [math.comb(count, k) / 2**count for k in range(count + 1)]
        pmf = np.convolve(pmf, binomial)
    signed_sums = 2 * np.arange(len(pmf)) - (len(pmf) - 1)
    return min(1.0, float(pmf[abs(signed_sums) >= abs(differences.sum())].sum()))


def paired_bootstrap(method: np.ndarray, base: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """The percentile interval of the paired difference (Efron & Tibshirani 1993). Both get the same resampled
    questions, or whole clusters of them (Field & Welsh 2007).

    Seeds are resampled too, independently for each method; this makes the interval conservative (Owen 2007).
    Clusters with identical outcomes in all runs form one cell of a multinomial distribution, for speed.
    """
    rng = np.random.default_rng(0)  # fixed, so that the same runs give the same table
    sums = sums_by_cluster(np.concatenate([method, base, np.ones_like(base[:1])]), clusters)  # last row: sizes
    patterns, counts = np.unique(sums, axis=1, return_counts=True)
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), DRAWS) @ patterns.T
    accuracies = drawn[:, :-1] / drawn[:, -1:]  # [DRAWS, seeds of both]
    means = []
    for by_seed in np.split(accuracies, [len(method)], axis=1):
        seeds = rng.integers(by_seed.shape[1], size=by_seed.shape)
        means.append(np.take_along_axis(by_seed, seeds, 1).mean(1))
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """The p-values adjusted for multiple comparisons, in the given order (Holm 1979)."""
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running_max
    return adjusted


def probability_of_superiority(method: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """The probability that a new run of the method scores above a new run of the base (equal scores: half), and its
    interval. Both arguments are accuracies [seeds].

    The Mann-Whitney statistic, by which Bouthillier et al. (2021, arXiv 2103.03098) compare algorithms over seeds, with
    Newcombe's score interval (2006, Statistics in Medicine 25: 559, method 5), which is also made for few seeds and a
    statistic of 0 or 1. It is read off a grid.
    """
    above, equal = np.greater.outer(method, base), np.equal.outer(method, base)
    estimate = float((above + equal / 2).mean())
    theta = np.linspace(0, 1, 20_001)
    per_pair = 1 + ((len(method) + len(base)) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    inside = theta[(theta - estimate) ** 2 <= Z * Z * theta * (1 - theta) * per_pair / above.size]
    return estimate, min(estimate, float(inside[0])), max(estimate, float(inside[-1]))
