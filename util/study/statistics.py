"""Confidence intervals of accuracies and of their differences, and significance tests, in NumPy alone.

An accuracy is `correct` out of `n` questions. Intervals are (low, high) fractions at the 95 % confidence level.
Outcomes are arrays [seeds, n] of 0 (wrong) and 1 (correct), with the questions in the same order.
"""

import math

import numpy as np

Z = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
Z_POWER = 0.8416212335729143  # 80 % quantile
DRAWS = 10_000  # bootstrap samples: the Monte Carlo error of an interval's ends is about 0.02 of its width


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927). `correct` may be a mean over seeds."""
    p, z2 = correct / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half_width = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def newcombe(correct: float, n: int, base_correct: float, base_n: int) -> tuple[float, float]:
    """Interval of an unpaired difference of proportions, from their Wilson intervals (Newcombe 1998, method 10)."""
    p, q = correct / n, base_correct / base_n
    (p_low, p_high), (q_low, q_high) = wilson(correct, n), wilson(base_correct, base_n)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def unpaired_standard_error(correct: float, n: int, base_correct: float, base_n: int) -> float:
    """Standard error of an unpaired difference of proportions."""
    p, q = correct / n, base_correct / base_n
    return math.sqrt(p * (1 - p) / n + q * (1 - q) / base_n)


def paired_standard_error(method: np.ndarray, base: np.ndarray) -> float:
    """Standard error of the mean over the questions of their differences, for these seeds."""
    differences = method.mean(0) - base.mean(0)
    return float(differences.std() / math.sqrt(len(differences)))


def minimum_detectable_difference(standard_error: float) -> float:
    """The smallest true difference that a two-sided test at 5 % finds 4 times of 5 (power 0.8; Cohen 1988)."""
    return (Z + Z_POWER) * standard_error


def mcnemar(method: np.ndarray, base: np.ndarray) -> float:
    """Exact two-sided p-value; null hypothesis: both answer the same questions equally well (McNemar 1947).

    One seed each: the binomial test on the questions that only one of them answers correctly. Several seeds: its
    extension to the difference of mean outcomes of each question, whose sign is random under the null hypothesis
    (Fisher's randomization test, 1935).
    """
    differences = len(base) * method.sum(0, dtype=int) - len(method) * base.sum(0, dtype=int)  # scaled to integers
    sizes, counts = np.unique(abs(differences[differences != 0]), return_counts=True)
    pmf = np.ones(1)  # of the sum of the positive differences, under random signs
    for size, count in zip(sizes, counts.tolist(), strict=True):
        binomial = np.zeros(size * count + 1)
        binomial[::size] = [math.comb(count, k) / 2**count for k in range(count + 1)]
        pmf = np.convolve(pmf, binomial)
    signed_sums = 2 * np.arange(len(pmf)) - (len(pmf) - 1)
    return min(1.0, float(pmf[abs(signed_sums) >= abs(differences.sum())].sum()))


def paired_bootstrap(method: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the paired difference (Efron & Tibshirani 1993): both get the same resampled questions.

    Seeds are resampled too, independently for each method; this makes the interval conservative (Owen 2007).
    Questions with identical outcomes in all runs form one cell of a multinomial distribution, for speed.
    """
    rng = np.random.default_rng(0)  # fixed, so that the same runs give the same table
    n = method.shape[1]
    patterns, counts = np.unique(np.concatenate([method, base]), axis=1, return_counts=True)
    accuracies = rng.multinomial(n, counts / n, DRAWS) @ patterns.T / n  # [DRAWS, seeds of both]
    means = []
    for by_seed in np.split(accuracies, [len(method)], axis=1):
        seeds = rng.integers(by_seed.shape[1], size=by_seed.shape)
        means.append(np.take_along_axis(by_seed, seeds, 1).mean(1))
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for multiple comparisons, in the given order (Holm 1979)."""
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running_max
    return adjusted
