"""A study whose trials are not trained: their accuracy is computed from their flags, or drawn."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from util.search.confirm import FreshRun, finish, plan, run_all
from util.search.folder import add_rung, add_seconds, begin_record, change_record
from util.search.pruning import make_pruner, parameters_of_schedule
from util.search.settings import SPACE
from util.search.space import read_space
from util.search.study import Study, run_trial

N_QUESTIONS = 1000


def quality(values: dict) -> float:
    """The accuracy in a made-up world, where the rate matters most, and then the schedule."""
    rate = -0.04 * (math.log10(values["blr"]) + 1.8) ** 2
    return 0.80 + rate - 0.02 * (values["lr_schedule"] == "step") + 0.01 * (values.get("adapter_type") == "block")


def scores(n_correct: int, n: int) -> dict:
    return {"correct": {"Avg": n_correct}, "counts": {"Avg": n}}


def search_study(folder: Path, trials: int, true_quality: Callable[[dict], float] = quality, seed: int = 0,
                 **settings) -> Study:
    """All trials of the default space, pruned as usual, on N_QUESTIONS questions."""
    rng, space = random.Random(seed), read_space(SPACE)
    content = {"trials": trials, "pruner": "asha", "questions": N_QUESTIONS, "confirm": 3, "seeds": 3,
               "steps_per_epoch": 397, "flags": {"epochs": 20, "seed": 0},
               "space": {"parameters": space.parameters, "enqueue": space.enqueue}, **settings}
    study = Study(folder, space, content, None)
    study.rungs = [2, 6, 20]  # those of a space without a warm-up, where there is more to be pruned
    study.optuna.pruner = make_pruner(content["pruner"], 2, parameters_of_schedule(content))

    def reach(trial, epochs: int) -> float:
        add_seconds(trial.folder, 60.0 * (epochs - {2: 0, 6: 2, 20: 6}[epochs]))
        p = true_quality(trial.values) - 0.25 / (epochs + 0.5)
        n_correct = sum(rng.random() < p for _ in range(N_QUESTIONS))
        return add_rung(trial.folder, epochs, scores(n_correct, N_QUESTIONS))

    while (trial := study.take()) is not None:
        run_trial(study, trial, reach)
    return study


class NoRunner:
    """Scores nothing: for `finish`."""

    def score(self, *_) -> None:
        return


def confirm_study(folder: Path, true_quality: Callable[[dict], float] = quality, k: int = 3, seeds: int = 3,
                  n: int = 2000, spread: float = 0.004, seed: int = 0) -> dict:
    """The runs with fresh seeds. spread: standard deviation between seeds. Returns the verdict."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=n)  # the same for all runs

    def execute(run: FreshRun, lock: int) -> None:
        begin_record(run.folder, 1, values=run.values, configuration=run.configuration, seed=run.seed)
        p = true_quality(run.values) + spread * rng.normal()
        right = difficulty + rng.normal(size=n) < 1.4142 * np.quantile(rng.normal(size=20_000), p)
        (run.folder / "val").mkdir()
        (run.folder / "val" / "generations.jsonl").write_text("".join(json.dumps(
            {"qid": str(i), "prediction": int(r), "answer": 1}) + "\n" for i, r in enumerate(right)))
        add_seconds(run.folder, 1200.0)
        add_rung(run.folder, 20, scores(int(right.sum()), n))
        change_record(run.folder, state="COMPLETE")

    runs = plan(folder, k, seeds, 1)
    run_all(folder, runs, execute)
    return finish(folder, NoRunner(), runs, 20)
