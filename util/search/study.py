"""Any number of workers take, resume and end the trials of a study, which are in Optuna's storage and in its folder.

folder.py has the files of a study, and identity.py decides whether a command may go on with the study in a folder.
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
from util.search.folder import (
    RECORD,
    STUDY,
    TRIALS,
    begin_record,
    change_record,
    load_record,
    lock_path,
    read_settings,
    trial_folder,
)
from util.search.identity import check_settings, runs_of_something_else
from util.search.locks import claim, waiting_for
from util.search.pruning import longest_warmup, make_pruner, parameters_of_schedule, rungs
from util.search.space import Space, Values
from util.search.storage import open_optuna

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)
warnings.filterwarnings("ignore", "The reported value is ignored")  # a trial that is resumed reports its rungs again

TIE = 1e-6  # times a trial's number, it is less than one question's share of any data set in percent
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


@dataclass
class Trial:
    """A trial that this worker holds. `values` are those of the searched flags, and `lock` is its lock's descriptor."""

    number: int
    folder: Path
    values: Values
    lock: int
    optuna: optuna.trial.Trial
    resumed: bool

    def report(self, accuracy: float, epoch: int) -> bool:
        """Tells Optuna an accuracy in percent, and returns whether to prune the trial. Accuracies are often equal, and
        a pruner lets all that equal a good one pass. So of equal trials, the earlier one counts as better."""
        self.optuna.report(accuracy - TIE * self.number, epoch)
        return self.optuna.should_prune()


class Study:
    """Opens the study in `folder`, or begins it there. `settings` are the content of study.json, `storage_url` is the
    address of a database (None: a journal in the folder), and `gpus` is the number of GPUs of a trial of this worker.

    Raises UserError if the folder's study has other settings or another identity.
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
        """The precision of all trials, which is what --precision meant on the machine of the first worker."""
        return read_json(self.folder / STUDY)["precision"]

    @property
    def left_out(self) -> dict[str, str]:
        """The names of the trials that cannot be compared to the others, with what differs. An earlier version let them
        in, or their worker ended since its data had changed, so that they will be scored again."""
        return runs_of_something_else(self.folder, read_settings(self.folder), TRIALS)

    def take(self) -> Trial | None:
        """Returns a trial that a killed worker has left or, if there is none, a new one. Returns None if other workers
        hold all trials that are left."""
        with waiting_for(self.folder / ".lock"):
            for left in self.trials(TrialState.RUNNING):
                lock = self.claim(left.number)
                if lock is None:
                    continue
                if self.is_running(left.number):
                    return self.hold(optuna.trial.Trial(self.optuna, left._trial_id), lock, resumed=True)
                os.close(lock)  # its worker has ended it meanwhile
            if len(self.trials()) >= self.n_trials and not self.trials(TrialState.WAITING):
                return None
            trial = self.optuna.ask()
            lock = self.claim(trial.number)
            assert lock is not None  # nobody else takes a trial meanwhile
            return self.hold(trial, lock, resumed=False)

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Returns a sampler that is seeded by the trial's number, so that no two workers draw the same and a study of
        one worker can be repeated. The sets that are tried first have much in common, so some random ones follow."""
        n_first = len(self.space.first_sets()) + min(10, self.n_trials // 4)
        return optuna.samplers.TPESampler(n_startup_trials=n_first, multivariate=True, group=True, constant_liar=True,
                                          seed=number)

    def hold(self, trial: optuna.trial.Trial, lock: int, resumed: bool) -> Trial:
        """Draws the values of a trial, or draws them again, and writes them to its trial.json."""
        self.optuna.sampler = self.sampler(trial.number)
        folder = trial_folder(self.folder, trial.number)
        trial = self.with_known_params(trial, folder)
        values = self.space.suggest(trial)
        begin_record(folder, self.gpus, values=values, params={
            name: {"value": value, "distribution": distribution_to_json(trial.distributions[name])}
            for name, value in trial.params.items()})
        return Trial(trial.number, folder, values, lock, trial, resumed)

    def with_known_params(self, trial: optuna.trial.Trial, folder: Path) -> optuna.trial.Trial:
        """Returns the trial with the parameters that its trial.json has, even if the journal has lost them."""
        known = load_record(folder).get("params", {}) if (folder / RECORD).is_file() else {}
        if known.keys() <= trial.params.keys():
            return trial
        self.optuna._storage.set_trial_system_attr(trial._trial_id, "fixed_params", {
            name: stored["value"] for name, stored in known.items()})
        return optuna.trial.Trial(self.optuna, trial._trial_id)

    def end(self, trial: Trial, state: TrialState, accuracy: float | None = None, **message: str) -> None:
        """Ends a trial, first in its folder and then in the storage. If the worker is killed in between, the next
        worker does both again."""
        change_record(trial.folder, state=state.name, **message)
        self.optuna.tell(trial.number, accuracy, state)

    def all_ended(self) -> bool:
        return len(self.trials(COMPLETE, PRUNED, FAIL)) >= self.n_trials

    def trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False, states=states or None)

    def is_running(self, number: int) -> bool:
        return any(trial.number == number for trial in self.trials(TrialState.RUNNING))

    def claim(self, number: int) -> int | None:
        """Returns a descriptor that holds the lock on a trial, or None if another worker holds it."""
        return claim(lock_path(self.folder, trial_folder(self.folder, number).name))


def run_trial(study: Study, trial: Trial, reach: Callable[[Trial, int], float]) -> tuple[TrialState, str]:
    """Trains and scores a trial from rung to rung, up to the last epoch or until it is pruned. Returns its state, and
    the message of its failure or "".

    `reach` trains a trial up to a number of epochs, unless it has them, and returns the accuracy in percent. If it
    raises UserError, the trial has failed. A WorkerError, or any other error, leaves the trial to be resumed.
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
