"""A study and its trials in Optuna's storage: any number of workers take, resume and end them.

folder.py has the files of a study, and identity.py decides whether a folder's study is the one that a command means.
"""

import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, write_json
from util.search.errors import WorkerError
from util.search.folder import RECORD, STUDY, begin_record, change_record, load_record, read_settings, trial_folder
from util.search.identity import check_settings, runs_of_something_else
from util.search.locks import claim, waiting_for
from util.search.pruning import longest_warmup, make_pruner, parameters_of_schedule, rungs
from util.search.space import Space, Values
from util.search.storage import open_optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)
warnings.filterwarnings("ignore", "The reported value is ignored")  # a trial that is resumed reports its rungs again

TIE = 1e-6  # less than a question of any data set, for any number of trials
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


@dataclass
class Trial:
    """A trial that this worker holds. values: the values of the flags that are searched."""

    number: int
    folder: Path
    values: Values
    lock: int
    optuna: optuna.trial.Trial
    resumed: bool

    def report(self, accuracy: float, epoch: int) -> bool:
        """Whether to stop here. Accuracies are often equal, and a pruner lets all that are equal to a good one pass: of
        these, the earlier trial counts as better."""
        self.optuna.report(accuracy - TIE * self.number, epoch)
        return self.optuna.should_prune()


class Study:
    """Opens the study in `folder`, or begins it. settings: the content of study.json. gpus: the GPUs of a trial of this
    worker.

    Raises UserError where the folder holds a study of other settings, or of something else.
    """

    def __init__(self, folder: Path, space: Space, settings: dict[str, Any], storage_url: str | None, gpus: int = 1):
        self.folder, self.space, self.n_trials, self.gpus = folder, space, settings["trials"], gpus
        epochs, pruner = settings["flags"]["epochs"], settings["pruner"]
        with waiting_for(folder / ".lock"):
            is_new = not (folder / STUDY).is_file()
            self.rungs = rungs(epochs, pruner, longest_warmup(settings)) if is_new else \
                read_settings(folder).get("rungs", rungs(epochs, pruner))  # which earlier versions did not write
            name = f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}" if is_new else \
                check_settings(folder, settings, storage_url)
            self.optuna = open_optuna(folder, name, storage_url, is_new,
                                      make_pruner(pruner, self.rungs[0], parameters_of_schedule(settings)))
            if is_new:
                for values in space.first_sets()[:self.n_trials]:
                    self.optuna.enqueue_trial(space.encode(values))
                write_json(folder / STUDY, {"name": name, "in_database": storage_url is not None, "rungs": self.rungs,
                                            **settings})

    @property
    def precision(self) -> str:
        """The precision of all trials: the one that --precision meant on the machine of the first worker."""
        return read_json(self.folder / STUDY)["precision"]

    @property
    def left_out(self) -> dict[str, str]:
        """The trials that cannot be compared to the others, with what differs, by name: an earlier version let them in,
        or their worker ended when its data had changed, and they will be scored again."""
        return runs_of_something_else(self.folder, read_settings(self.folder), "trials")

    def take(self) -> Trial | None:
        """A trial that a killed worker left, else the next one; None: other workers hold all that are left."""
        with waiting_for(self.folder / ".lock"):
            for left in self.trials(TrialState.RUNNING):
                lock = claim(self.lock_path(left.number))
                if lock is None:
                    continue
                if self.is_running(left.number):
                    return self.hold(optuna.trial.Trial(self.optuna, left._trial_id), lock, resumed=True)
                os.close(lock)  # its worker has ended it meanwhile
            if len(self.trials()) >= self.n_trials and not self.trials(TrialState.WAITING):
                return None
            trial = self.optuna.ask()
            lock = claim(self.lock_path(trial.number))
            assert lock is not None  # nobody else takes a trial meanwhile
            return self.hold(trial, lock, resumed=False)

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """A sampler seeded by the trial's number: no two workers draw the same, and a study of one worker can be
        repeated. After the sets that are tried first, which have much in common, some are drawn at random."""
        n_first = len(self.space.first_sets()) + min(10, self.n_trials // 4)
        return optuna.samplers.TPESampler(n_startup_trials=n_first, multivariate=True, group=True, constant_liar=True,
                                          seed=number)

    def hold(self, trial: optuna.trial.Trial, lock: int, resumed: bool) -> Trial:
        self.optuna.sampler = self.sampler(trial.number)
        folder = trial_folder(self.folder, trial.number)
        trial = self.with_known_params(trial, folder)
        values = self.space.suggest(trial)
        begin_record(folder, self.gpus, values=values, params={
            name: {"value": value, "distribution": distribution_to_json(trial.distributions[name])}
            for name, value in trial.params.items()})
        return Trial(trial.number, folder, values, lock, trial, resumed)

    def with_known_params(self, trial: optuna.trial.Trial, folder: Path) -> optuna.trial.Trial:
        """The trial, which is given the parameters of its folder again, should the journal have lost them."""
        known = load_record(folder).get("params", {}) if (folder / RECORD).is_file() else {}
        if known.keys() <= trial.params.keys():
            return trial
        self.optuna._storage.set_trial_system_attr(trial._trial_id, "fixed_params", {
            name: stored["value"] for name, stored in known.items()})
        return optuna.trial.Trial(self.optuna, trial._trial_id)

    def end(self, trial: Trial, state: TrialState, accuracy: float | None = None, **message: str) -> None:
        """Ends a trial, first in its folder and then in the storage: a worker that is killed in between does it
        again."""
        change_record(trial.folder, state=state.name, **message)
        self.optuna.tell(trial.number, accuracy, state)

    def all_ended(self) -> bool:
        return len(self.trials(COMPLETE, PRUNED, FAIL)) >= self.n_trials

    def trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def is_running(self, number: int) -> bool:
        return any(trial.number == number for trial in self.trials(TrialState.RUNNING))

    def lock_path(self, number: int) -> Path:
        return self.folder / ".locks" / f"{number:03d}"


def run_trial(study: Study, trial: Trial, reach: Callable[[Trial, int], float]) -> tuple[TrialState, str]:
    """Takes a trial from rung to rung, up to the last epoch or until the pruner ends it. Returns its state, and why it
    failed.

    reach(trial, epochs): trains up to there, unless it is there already, and returns the accuracy in percent. Where it
    raises UserError, the trial has failed; WorkerError, and anything else, leaves the trial to be resumed.
    """
    try:
        for epochs in study.rungs:
            accuracy = reach(trial, epochs)
            if trial.report(accuracy, epochs) and epochs < study.rungs[-1]:
                study.end(trial, PRUNED)
                return PRUNED, ""
        study.end(trial, COMPLETE, accuracy)
        return COMPLETE, ""
    except WorkerError:
        raise
    except UserError as error:
        study.end(trial, FAIL, message=str(error))
        return FAIL, str(error)
    finally:
        os.close(trial.lock)
