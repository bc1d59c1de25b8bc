"""This file summarizes a study's folder: its trials, the epoch at which they can be compared, and which parameters
matter.

The report (report.py) and its pictures (figures.py) are made from it. Neither needs the storage, and only the
importance of parameters needs Optuna.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from util.comparison.statistics import wilson
from util.provenance import commits_of
from util.runs import CONFIG
from util.search.folder import (
    BASE,
    CONFIRM,
    RUN_FOLDERS,
    accuracy,
    base_values,
    read_records,
    read_settings,
    trial_folder,
)
from util.search.identity import runs_of_something_else

MIN_TRIALS = 10  # the importance of parameters is not computed from fewer trials
SHUFFLES = 100  # the accuracies are shuffled so often, to see which importance chance alone gives


@dataclass(frozen=True)
class Trial:
    """A trial that has a score. `curve` has a pair of epoch and accuracy in percent for each rung."""

    name: str
    state: str
    values: dict[str, Any]
    curve: list[tuple[int, float]]
    questions: int
    record: Any

    @property
    def is_finished(self) -> bool:
        """Whether the trial has come to the end of the schedule: it was not pruned, has not failed and does not run."""
        return self.state == "COMPLETE"

    @property
    def last(self) -> tuple[int, float]:
        return self.curve[-1]

    def interval(self, percent: float) -> tuple[float, float]:
        """Returns Wilson's 95 % interval of an accuracy on the trial's questions, in percent like the accuracy."""
        low, high = wilson(percent * self.questions / 100, self.questions)
        return 100 * low, 100 * high


class StudyReport:
    """The content of a study's folder. Raises UserError if the folder holds no study with a scored trial.

    `records` has the records of all trials, and `confirmed` those of all runs with fresh seeds. `left_out` and
    `left_out_of_confirmed` say which of them cannot be compared to the others, and why. `trials` are those that have a
    score and can be compared.
    """

    def __init__(self, folder: Path):
        self.folder, self.settings, self.records = folder, read_settings(folder), read_records(folder)
        self.confirmed = read_records(folder, CONFIRM)
        self.left_out, self.left_out_of_confirmed = (runs_of_something_else(folder, self.settings, name)
                                                     for name in RUN_FOLDERS)
        self.trials = [Trial(name, record["state"], record["values"],
                             [(rung["epoch"], accuracy(rung)) for rung in record["rungs"]],
                             record["rungs"][-1]["questions"], record)
                       for name, record in self.records.items() if record["rungs"] and name not in self.left_out]
        if not self.trials:
            raise UserError(f"{folder} has no scored trial yet: start search.py, and draw it later")
        self.base = base_values(folder, self.records)

    @property
    def base_trial(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.name == BASE), None)

    @property
    def epochs(self) -> int:
        return self.settings["flags"]["epochs"]

    @cached_property
    def ranked(self) -> list[Trial]:
        """The trials, in an order in which those that came farthest are first, and of these the best."""
        return sorted(self.trials, key=lambda trial: trial.last, reverse=True)

    @cached_property
    def shared_epoch(self) -> int:
        """The last epoch after which three quarters of the trials were scored, and at which they are compared."""
        n_scored = Counter(epoch for trial in self.trials for epoch, _ in trial.curve)
        return max(epoch for epoch, n in n_scored.items() if 4 * n >= 3 * len(self.trials))

    @cached_property
    def comparable(self) -> list[tuple[Trial, float]]:
        """The trials that were scored after `shared_epoch`, with their accuracy there."""
        return [(trial, dict(trial.curve)[self.shared_epoch]) for trial in self.trials
                if self.shared_epoch in dict(trial.curve)]

    @property
    def flags_with_one_value(self) -> list[str]:
        """The searched flags that have the same value in all comparable trials that use them."""
        values = {flag: {trial.values[flag] for trial, _ in self.comparable if flag in trial.values}
                  for flag in dict.fromkeys(flag for trial, _ in self.comparable for flag in trial.values)}
        return [flag for flag, different in values.items() if len(different) == 1]

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """The content of config.json of the base's trial. It is empty if training has not begun."""
        path = trial_folder(self.folder, int(BASE)) / CONFIG
        return read_json(path) if path.is_file() else {}

    @cached_property
    def commits(self) -> list[str]:
        """The commits of the code that trained the runs."""
        paths = [self.folder / kind / name / CONFIG
                 for kind, records in zip(RUN_FOLDERS, (self.records, self.confirmed), strict=True) for name in records]
        return list(dict.fromkeys(commit for path in paths if path.is_file() for commit in commits_of(read_json(path))))

    @property
    def on_cpu(self) -> bool:
        """Whether the trials are trained on a CPU, so that their hours are no GPU-hours."""
        return str(self.base_config.get("device", "")).startswith("cpu")

    def changes(self, values: dict[str, Any]) -> str:
        """Returns the values that differ from the base's, as words of a command line."""
        changed = [f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
                   for flag, value in values.items() if value != self.base.get(flag)]
        return " ".join(changed) or "the base"

    def steps(self, records: dict[str, Any]) -> int:
        """Returns the number of optimizer steps that all runs of these records have made."""
        return self.settings["steps_per_epoch"] * sum(record["rungs"][-1]["epoch"] for record in records.values()
                                                      if record["rungs"])


# --- Importance ---

def importance(report: StudyReport) -> dict[str, tuple[float, float]]:
    """Returns two numbers for each parameter, by its name, the most important one first.

    The first is the parameter's share in reaching the better half of the trials (PED-ANOVA; Watanabe et al. 2023, arXiv
    2304.10255). The second is a share that chance alone rarely gives: 95 % of shuffles of the accuracies stay below it.

    The result is empty if Optuna is not installed, or if there are too few trials.
    """
    if len(report.comparable) < MIN_TRIALS:
        return {}
    try:
        import optuna
    except ModuleNotFoundError:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    for trial, _ in report.comparable:
        params, distributions = {}, {}
        for name, stored in trial.record["params"].items():
            params[name] = stored["value"]
            distributions[name] = optuna.distributions.json_to_distribution(stored["distribution"])
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=0.0))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)

    def shares(values) -> dict[str, float]:
        with warnings.catch_warnings():  # Optuna warns of parameters that few trials have
            warnings.simplefilter("ignore")
            return optuna.importance.get_param_importances(study, evaluator=evaluator,
                                                           target=lambda trial: -values[trial.number])

    values, rng = [value for _, value in report.comparable], np.random.default_rng(0)
    shuffled = [shares(rng.permutation(values)) for _ in range(SHUFFLES)]
    return {name: (share, float(np.quantile([other[name] for other in shuffled], 0.95)))
            for name, share in shares(values).items()}
