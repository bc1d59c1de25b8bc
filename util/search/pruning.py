"""Pruning: which trials are ended early, and when: in rungs behind the warm-up, each trial among those of its schedule.

Within the epochs, accuracies say little across schedules: after two of 20 epochs, an exponential rate may be at a third
of its peak, another one still near it, and a cyclical one on its way up. So a trial is compared to trials of its own
schedule, and not before the longest warm-up that is searched has ended.
"""

from collections.abc import Mapping
from typing import Any

import optuna

REDUCTION = 3  # of asha: about one trial of three goes on past a rung
SCHEDULE = "lr_schedule"


def rungs(epochs: int, pruner: str, longest_warmup: float = 0) -> list[int]:
    """Numbers of epochs after which a trial is scored; the last is the whole schedule."""
    first = max(1, epochs // REDUCTION**2)
    inner = [rung for rung in (first, REDUCTION * first) if longest_warmup < rung < epochs]
    return [*(inner if pruner != "none" else []), epochs]


def longest_warmup(settings: Mapping[str, Any]) -> float:
    """The most --warmup_epochs of any trial, by the content of study.json."""
    found = [bound for name, parameter in settings["space"]["parameters"].items()
             if parameter.get("flag", name) == "warmup_epochs"
             for bound in parameter.get("choices", [parameter.get("high")]) if isinstance(bound, int | float)]
    return max(found, default=settings["flags"].get("warmup_epochs", 0))


def make_pruner(name: str, first_rung: int) -> optuna.pruners.BasePruner:
    if name == "asha":
        return AmongAlike(optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=REDUCTION))
    return AmongAlike(optuna.pruners.MedianPruner()) if name == "median" else optuna.pruners.NopPruner()


class AmongAlike(optuna.pruners.BasePruner):
    """Another pruner, which sees the trials of a trial's schedule alone."""

    def __init__(self, pruner: optuna.pruners.BasePruner):
        self.pruner = pruner

    def prune(self, study: Any, trial: Any) -> bool:
        alike: Any = StudyOfAlike(study, trial.params.get(SCHEDULE))
        return self.pruner.prune(alike, trial)


class StudyOfAlike:
    """A study of Optuna with the trials of one schedule."""

    def __init__(self, study: optuna.Study, schedule: Any):
        self.study, self.schedule = study, schedule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [trial for trial in self.study.get_trials(*args, **kwargs)
                if trial.params.get(SCHEDULE) == self.schedule]
