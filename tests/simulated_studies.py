"""Simulated studies: how often the comparison's claims are false, its intervals hold the truth, and its tests find a
difference. `python -m tests.simulated_studies` prints the table of docs/statistics.md, in minutes.

The second table is of a main effect in a study that crosses two schedules with four dropouts.

A question is answered correctly where the sum of five normal variables lies below a threshold: the lecture's, the
question's, the method's on the question, the seed's on the question, and the seed's own. The first four have variances
that add up to 1, so that the threshold decides the accuracy.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from util.comparison.statistics import block_variance, contrast, holm, seed_variance

N_QUESTIONS, N_LECTURES, ACCURACY = 4241, 260, 0.88
SHARED, OF_METHOD = 0.6, 0.15  # variances: of question and lecture together, and of a method's questions


@dataclass(frozen=True)
class World:
    """The settings of simulated studies. deviation: between seeds, in points. lectures: whether questions of a lecture
    have 15 % of their difficulty, and of what methods make of it, in common: an intraclass correlation of 0.05."""

    seeds: int
    deviation: float
    lectures: bool
    methods: int = 2
    n: int = N_QUESTIONS

    def clusters(self, rng) -> np.ndarray:
        """The lectures [n], of unequal sizes, each with one question at least."""
        shares = rng.dirichlet(np.full(N_LECTURES, 0.6))
        n_lectures = min(N_LECTURES, self.n // 2)
        drawn = np.append(np.arange(n_lectures), rng.choice(N_LECTURES, self.n - n_lectures, p=shares) % n_lectures)
        return np.unique(drawn, return_inverse=True)[1]

    def study(self, rng, differences: np.ndarray, of_seeds: np.ndarray | None = None
              ) -> tuple[list[np.ndarray], np.ndarray]:
        """Outcomes [seeds, n] of methods whose accuracies differ from the base's by `differences` points; clusters.

        of_seeds: what the seeds add to each method's accuracy, in points [methods, seeds]; by default each run's is
        independent."""
        if of_seeds is None:
            of_seeds = self.deviation * rng.standard_normal((len(differences), self.seeds))
        clusters = self.clusters(rng)
        share = 0.15 if self.lectures else 0.0  # an intraclass correlation of outcomes of 0.05

        def difficulty(*shape) -> np.ndarray:
            of_lectures = rng.standard_normal((*shape, clusters.max() + 1))[..., clusters]
            return np.sqrt(share) * of_lectures + np.sqrt(1 - share) * rng.standard_normal((*shape, self.n))

        shared = np.sqrt(SHARED) * difficulty()
        slope = norm.pdf(norm.ppf(ACCURACY))  # accuracy by threshold
        outcomes = []
        for difference, of_runs in zip(differences, of_seeds, strict=True):
            threshold = norm.ppf(ACCURACY + difference / 100) + of_runs[:, None] / 100 / slope
            own = np.sqrt(OF_METHOD) * difficulty()
            noise = np.sqrt(1 - SHARED - OF_METHOD) * rng.standard_normal((self.seeds, self.n))
            outcomes.append((shared + own + noise < threshold).astype(int))
        return outcomes, clusters


def simulate(world: World, difference: float, studies: int, seed: int = 0) -> tuple[float, float]:
    """How often the first of the compared methods differs from the base by its p-value (below 5 %), and how often its
    interval holds the true difference."""
    rng = np.random.default_rng(seed)
    found = covered = 0
    for _ in range(studies):
        truth = np.zeros(world.methods)
        truth[1] = difference
        outcomes, clusters = world.study(rng, truth)
        between = seed_variance(outcomes, clusters)
        assert between is not None
        estimate = contrast(outcomes[:2], (-1, 1), clusters, between)
        low, high = estimate.interval()
        found += estimate.p < 0.05
        covered += low <= difference / 100 <= high
    return found / studies, covered / studies


def simulate_table(world: World, studies: int, seed: int = 0) -> float:
    """How often a table of equal methods says that one of them differs, by p (Holm) below 5 %."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(studies):
        outcomes, clusters = world.study(rng, np.zeros(world.methods))
        between = seed_variance(outcomes, clusters)
        assert between is not None
        p_values = [contrast([outcomes[0], rows], (-1, 1), clusters, between).p for rows in outcomes[1:]]
        found += min(holm(p_values)) < 0.05
    return found / studies


SCHEDULES, DROPOUTS = 2, 4


def simulate_effect(world: World, share: float, blocks: bool, studies: int, seed: int = 0) -> tuple[float, float]:
    """How often a schedule's main effect is found that is not there, and how often its interval holds the truth.

    share: the part of the variance between seeds that the runs of a seed and a schedule have in common. blocks: whether
    seeds are blocks, as in tables of effects; otherwise all runs are taken as independent.
    """
    rng = np.random.default_rng(seed)
    weights = np.repeat([-1.0, 1.0], DROPOUTS) / DROPOUTS
    found = covered = 0
    for _ in range(studies):
        common = np.repeat(rng.standard_normal((SCHEDULES, world.seeds)), DROPOUTS, axis=0)
        own = rng.standard_normal((SCHEDULES * DROPOUTS, world.seeds))
        of_seeds = world.deviation * (np.sqrt(share) * common + np.sqrt(1 - share) * own)
        outcomes, clusters = world.study(rng, np.zeros(SCHEDULES * DROPOUTS), of_seeds)
        between = block_variance(outcomes, clusters, weights[None]) if blocks else seed_variance(outcomes, clusters)
        assert between is not None
        estimate = contrast(outcomes, list(weights), clusters, between)
        low, high = estimate.interval()
        found += estimate.p < 0.05
        covered += low <= 0 <= high
    return found / studies, covered / studies


def print_effects(studies: int) -> None:
    print("seeds  sd    share of the schedule  size and coverage: seeds as blocks, runs as independent")
    for seeds in (2, 3, 5):
        for share in (0.0, 0.5, 1.0):
            world = World(seeds, 1.0, lectures=True)
            results = [f"{number:.3f}" for blocks in (True, False)
                       for number in simulate_effect(world, share, blocks, studies)]
            print(f"{seeds:5d}  1.0   {share:.1f}  {'  '.join(results)}", flush=True)


def main(args) -> None:
    print("seeds  sd    lectures  size   coverage  power at +1.5 points")
    for seeds in (2, 3, 5):
        for deviation in (0.0, 0.5, 1.0):
            for lectures in (False, True):
                world = World(seeds, deviation, lectures)
                size, coverage = simulate(world, 0.0, args.studies)
                power, _ = simulate(world, 1.5, args.studies // 4)
                print(f"{seeds:5d}  {deviation:.1f}   {lectures!s:8}  {size:.3f}  {coverage:.3f}     {power:.2f}",
                      flush=True)
    print_effects(args.studies // 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000, help="studies a line (1000)")
    main(parser.parse_args())
