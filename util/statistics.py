"""What a difference between two accuracies is worth: intervals and tests, in numpy alone.

An accuracy is `correct` of `n` questions; intervals are (low, high) at 95 %, as fractions.
Right and wrong answers come as arrays [seeds, n] of 0 and 1, the questions in the same order.
"""

import math

import numpy as np

Z = 1.959963984540054  # two-sided 95 % of the normal distribution
DRAWS = 10_000  # bootstrap samples: an interval's ends repeat to about 0.02 of its width


def wilson(correct: float, n: int) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927). `correct` may be a mean over seeds."""
    p, z2 = correct / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def newcombe(correct: float, n: int, base_correct: float, base_n: int) -> tuple[float, float]:
    """Interval of an unpaired difference of two proportions, from their Wilson intervals (Newcombe 1998, method 10)."""
    p, q = correct / n, base_correct / base_n
    (p_low, p_high), (q_low, q_high) = wilson(correct, n), wilson(base_correct, base_n)
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def mcnemar(method: np.ndarray, base: np.ndarray) -> float:
    """Exact two-sided p that the two answer the same questions equally well (McNemar 1947).

    One seed each: the binomial test on the questions that only one of them answers. Several: its extension to each
    question's difference of means, whose sign is as likely either way (Fisher's randomization test, 1935).
    """
    differences = len(base) * method.sum(0, dtype=int) - len(method) * base.sum(0, dtype=int)
    sizes, counts = np.unique(abs(differences[differences != 0]), return_counts=True)
    chance = np.ones(1)  # of each sum that the positive differences may have
    for size, count in zip(sizes, counts.tolist()):
        binomial = np.zeros(size * count + 1)
        binomial[::size] = [math.comb(count, k) / 2**count for k in range(count + 1)]
        chance = np.convolve(chance, binomial)
    sums = 2 * np.arange(len(chance)) - (len(chance) - 1)
    return min(1.0, float(chance[abs(sums) >= abs(differences.sum())].sum()))


def paired_bootstrap(method: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the difference (Efron & Tibshirani 1993), the questions drawn once for both.

    Seeds are drawn too, each method's for itself, which makes the interval rather too wide than too narrow (Owen 2007).
    Questions with the same outcome everywhere are drawn as one kind.
    """
    rng = np.random.default_rng(0)  # the same table from the same runs
    n = method.shape[1]
    kinds, counts = np.unique(np.concatenate([method, base]), axis=1, return_counts=True)
    accuracies = rng.multinomial(n, counts / n, DRAWS) @ kinds.T / n  # [DRAWS, seeds of both]
    means = []
    for share in np.split(accuracies, [len(method)], axis=1):
        seeds = rng.integers(share.shape[1], size=share.shape)
        means.append(np.take_along_axis(share, seeds, 1).mean(1))
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number, in the given order (Holm 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
