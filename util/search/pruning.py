"""Pruning ends trials early, after the number of epochs of a rung, if trials of the same schedule are better.

In the middle of training, accuracies cannot be compared across schedules: after two of 20 epochs, an exponential rate
may be at a third of its peak, another one still near its peak, and a cyclical one on its way up. So a trial is compared
to trials of its own schedule, and not before the longest warm-up that is searched has ended.
"""

from collections.abc import Mapping
from typing import Any

import optuna

from util.search.space import flag_of

REDUCTION = 3  # asha lets about one trial of three go on past a rung


def rungs(epochs: int, pruner: str, longest_warmup: float = 0) -> list[int]:
    """Returns the numbers of epochs after which a trial is scored. The last one is the whole schedule."""
    first = max(1, epochs // REDUCTION**2)
    inner = [rung for rung in (first, REDUCTION * first) if longest_warmup < rung < epochs]
    return [*(inner if pruner != "none" else []), epochs]


def longest_warmup(settings: Mapping[str, Any]) -> float:
    """Returns the largest --warmup_epochs that a trial can have, by the content of study.json."""
    found = [bound for name, parameter in settings["space"]["parameters"].items()
             if flag_of(name, parameter) == "warmup_epochs"
             for bound in parameter.get("choices", [parameter.get("high")]) if isinstance(bound, int | float)]
    return max(found, default=settings["flags"].get("warmup_epochs", 0))


def parameters_of_schedule(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the parameters that set --lr_schedule, by the content of study.json."""
    return tuple(name for name, parameter in settings["space"]["parameters"].items()
                 if flag_of(name, parameter) == "lr_schedule")


def make_pruner(name: str, first_rung: int, schedule: tuple[str, ...]) -> optuna.pruners.BasePruner:
    """Returns the pruner of this name. `schedule` has the names of the parameters that set --lr_schedule."""
    if name == "none":
        return optuna.pruners.NopPruner()
    return AmongAlike(optuna.pruners.MedianPruner() if name == "median" else optuna.pruners.SuccessiveHalvingPruner(
        min_resource=first_rung, reduction_factor=REDUCTION), schedule)


class AmongAlike(optuna.pruners.BasePruner):
    """A pruner that lets another one decide, which sees only the trials of the same schedule."""

    def __init__(self, pruner: optuna.pruners.BasePruner, schedule: tuple[str, ...]):
        self.pruner, self.schedule = pruner, schedule

    def prune(self, study: Any, trial: Any) -> bool:
        alike: Any = StudyOfAlike(study, trial, self.schedule)
        return self.pruner.prune(alike, trial)


class StudyOfAlike:
    """A study of Optuna that has only the trials of the schedule of `trial`."""

    def __init__(self, study: optuna.Study, trial: Any, schedule: tuple[str, ...]):
        self.study, self.trial, self.names = study, trial, schedule

    def schedule(self, trial: Any) -> Any:
        return next((trial.params[name] for name in self.names if name in trial.params), None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [trial for trial in self.study.get_trials(*args, **kwargs)
                if self.schedule(trial) == self.schedule(self.trial)]
