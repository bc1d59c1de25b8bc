"""The effects of two factors, schedule and dropout, where runs cross them: main effects and interactions.

Each factor has levels, of which the first is the base's. A schedule's main effect is its difference to the base's
schedule, averaged over all dropouts, so that all runs tell of it; a dropout's likewise. An interaction is what a
schedule and a dropout give together beyond the sum of what each gives alone.

Runs with the same seed begin with the same adapters and take the samples in the same order. So seeds are blocks of the
design, and only those count that all methods have.
"""

from dataclasses import dataclass

import numpy as np

from util.comparison.comparison import Comparison, Method
from util.comparison.methods import WORDED, is_named, method_name
from util.comparison.statistics import SeedVariance, block_variance, contrast, holm

DROPOUT = tuple(flag for flag in WORDED if flag.startswith("dropout"))
FACTORS = (*WORDED, "warmup_epochs")  # a schedule may have no warm-up

Weights = dict[tuple[str, str], float]  # of the methods' accuracies, by schedule and dropout; they add up to 0


@dataclass(frozen=True)
class Grid:
    """Methods by schedule and dropout: every schedule with every dropout, those of the base first."""

    schedules: list[str]
    dropouts: list[str]
    methods: dict[tuple[str, str], Method]

    @property
    def seeds(self) -> list[int]:
        """The seeds that all methods have."""
        return sorted(set.intersection(*(set(seeds_of(method)) for method in self.methods.values())))

    @property
    def has_effects(self) -> bool:
        """Whether the methods have two seeds in common, which a variance between seeds takes."""
        return len(self.seeds) > 1

    def outcomes(self) -> dict[tuple[str, str], np.ndarray]:
        """1 where the answer of a method is correct, else 0: [seeds, questions]."""
        return {levels: method.outcomes[list(map(seeds_of(method).index, self.seeds))]
                for levels, method in self.methods.items()}

    def seed_variance(self, effects: dict[str, Weights], clusters: np.ndarray | None) -> SeedVariance:
        """What the seeds do to a family of effects."""
        outcomes = self.outcomes()
        family = np.array([[weights.get(levels, 0.0) for levels in outcomes] for weights in effects.values()])
        return block_variance(list(outcomes.values()), clusters, family)

    def families(self) -> dict[str, dict[str, Weights]]:
        """The effects by name, in the families over which their p-values are adjusted."""
        return {"schedule": {name: self.schedule_effect(name) for name in self.schedules[1:]},
                "dropout": {name: self.dropout_effect(name) for name in self.dropouts[1:]},
                "interaction": {f"{schedule} x {dropout}": self.interaction(schedule, dropout)
                                for schedule in self.schedules[1:] for dropout in self.dropouts[1:]}}

    def schedule_effect(self, schedule: str) -> Weights:
        share = 1 / len(self.dropouts)
        return {(level, dropout): sign * share for level, sign in ((schedule, 1), (self.schedules[0], -1))
                for dropout in self.dropouts}

    def dropout_effect(self, dropout: str) -> Weights:
        share = 1 / len(self.schedules)
        return {(schedule, level): sign * share for level, sign in ((dropout, 1), (self.dropouts[0], -1))
                for schedule in self.schedules}

    def interaction(self, schedule: str, dropout: str) -> Weights:
        return {(schedule, dropout): 1.0, (schedule, self.dropouts[0]): -1.0,
                (self.schedules[0], dropout): -1.0, (self.schedules[0], self.dropouts[0]): 1.0}


def seeds_of(method: Method) -> list[int]:
    """The seed of each run."""
    return [run.flags.get("seed", 0) for run in method.runs]


@dataclass(frozen=True)
class Effect:
    """An effect in percentage points, with its 95 % interval.

    holm: p adjusted for the other effects of the family. detectable: the smallest true effect that is found with a
    power of 80 %, after the adjustment.
    """

    family: str
    name: str
    points: float
    low: float
    high: float
    p: float
    holm: float
    detectable: float


def find_grid(comparison: Comparison) -> Grid | None:
    """The schedules and dropouts that are crossed, among methods that differ from the base in nothing else; None where
    there are not two of each, or where answers are not known.

    Where some combinations are missing, it is the grid of the most methods among those that have all the dropouts that
    a schedule shares with the base's.
    """
    base = comparison.methods[0]
    if not comparison.differences or not base.has_answers:
        return None
    cells = {levels(method, base): method for method in comparison.own if differs_in_factors_alone(method, base)}
    first_schedule, first_dropout = levels(base, base)
    by_schedule = {schedule: [dropout for level, dropout in cells if level == first_schedule
                              and (schedule, dropout) in cells] for schedule, _ in cells}
    grids = []
    for schedule, dropouts in by_schedule.items():
        schedules = [other for other in by_schedule if set(dropouts) <= set(by_schedule[other])]
        if schedule != first_schedule and first_dropout in dropouts and len(dropouts) > 1:
            grids.append(Grid(schedules, dropouts, {(level, dropout): cells[level, dropout]
                                                    for level in schedules for dropout in dropouts}))
    return max(grids, key=lambda grid: len(grid.methods), default=None)


def differs_in_factors_alone(method: Method, base: Method) -> bool:
    return all(flag in FACTORS or not is_named(flag) or value == base.flags.get(flag, value)
               for flag, value in method.flags.items())


def levels(method: Method, base: Method) -> tuple[str, str]:
    """The names of a method's schedule and of its dropout: those of the methods that change one of them alone."""
    def with_dropout_of(flags: dict) -> dict:
        return {flag: flags[flag] for flag in DROPOUT}
    return (method_name({**method.flags, **with_dropout_of(base.flags)}, base.flags),
            method_name({**base.flags, **with_dropout_of(method.flags)}, base.flags))


def find_effects(comparison: Comparison) -> list[Effect]:
    """All effects, family by family; none where nothing is crossed, or where the methods do not have two seeds in
    common."""
    grid, clusters, found = find_grid(comparison), comparison.clusters, []
    if grid is None or not grid.has_effects:
        return []
    outcomes = grid.outcomes()
    for family, effects in grid.families().items():
        between = grid.seed_variance(effects, clusters)
        estimates = [contrast([outcomes[levels] for levels in weights], list(weights.values()), clusters, between)
                     for weights in effects.values()]
        adjusted = holm([estimate.p for estimate in estimates])
        for (name, weights), estimate, p in zip(effects.items(), estimates, adjusted, strict=True):
            points = 100 * sum(weight * float(outcomes[levels].mean()) for levels, weight in weights.items())
            low, high = estimate.interval()
            found.append(Effect(family, name, points, 100 * low, 100 * high, estimate.p, p,
                                100 * estimate.detectable(len(estimates))))
    return found
