"""The end of a study: its best configurations and its base run again with fresh seeds, which name the winner.

The best of many trials is lucky, so its own score is worth little. Runs with fresh seeds on the whole validation split
name the winner; the test split is scored once, for the winner and the base. All workers share the runs.
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, write_json
from util.evaluation.answers import GENERATIONS, read_answers
from util.search.folder import RECORD, accuracy, add_rung, begin_record, change_record, read_records
from util.search.locks import claim, waiting_for
from util.search.runner import Runner
from util.search.space import Values
from util.study.statistics import mcnemar, paired_bootstrap
from util.study.tables import points

VERDICT = "verdict.json"
BASE = "000"  # the first trial
LEVEL = 0.05
WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class FreshRun:
    """A run of a configuration with a fresh seed. configuration: the number of the trial that had it first."""

    folder: Path
    configuration: str
    values: Values
    seed: int


def plan(study: Path, k: int, seeds: int, first_seed: int) -> list[FreshRun]:
    """The runs of the k best trials beside the base, and of the base. All trials must have ended. Where fewer than k
    have finished the schedule, the best of those that came farthest follow."""
    records = read_records(study)
    reached = {name: (record["rungs"][-1]["epoch"], accuracy(record["rungs"][-1]))
               for name, record in records.items() if record["rungs"] and record["state"] != "FAIL" and name != BASE}
    best = sorted(reached, key=lambda name: reached[name], reverse=True)[:k]
    return [FreshRun(study / "confirm" / f"{name}-seed{seed}", name, records[name]["values"], seed)
            for seed in range(first_seed, first_seed + seeds) for name in [BASE, *best] if best]


def is_done(run: FreshRun) -> bool:
    path = run.folder / RECORD
    return path.is_file() and read_json(path)["state"] == "COMPLETE"


def run_all(study: Path, runs: list[FreshRun], execute: Callable[[FreshRun, int], None]) -> None:
    """Works on the runs until all are done, by this worker or another. execute(run, lock): makes a run, or goes on."""
    while left := [run for run in runs if not is_done(run)]:
        for run in left:
            lock = claim(study / ".locks" / run.folder.name)
            if lock is not None:
                try:
                    if not is_done(run):
                        execute(run, lock)
                finally:
                    os.close(lock)
                break
        else:
            time.sleep(WAIT_SECONDS)


def train_and_score(runner: Runner, epochs: int, run: FreshRun, lock: int) -> None:
    """Trains a run over the full schedule, and scores it on all of the validation split. Raises UserError, which names
    the run."""
    begin_record(run.folder, runner.gpus, values=run.values, configuration=run.configuration, seed=run.seed)
    try:
        runner.train(run.folder, run.values, epochs, lock, "--seed", str(run.seed))
        scores = runner.score(run.folder, epochs, run.folder / "val", lock, "--split", "val", "--decode", "score")
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from error
    add_rung(run.folder, epochs, scores)
    change_record(run.folder, state="COMPLETE")


# --- The verdict ---

@dataclass(frozen=True)
class Verdict:
    """The best configuration by its mean over fresh seeds, and how it compares to the base, in points on validation.

    p_seeds: Dunnett's test of whether any configuration is better than the base, from the spread between the seeds;
    None with one seed. p_questions: McNemar's test of the winner, times the number of configurations. found: both lie
    below 5 %, and so the error of finding something among equal configurations does.
    """

    winner: str
    n_configurations: int
    seeds: int
    difference: float
    low: float
    high: float
    p_seeds: float | None
    p_questions: float
    found: bool


def verdict(outcomes: dict[str, np.ndarray]) -> Verdict:
    """The verdict on the outcomes [seeds, questions] of each configuration (1: correct); the base is among them."""
    base, others = outcomes[BASE], {name: rows for name, rows in outcomes.items() if name != BASE}
    winner = max(others, key=lambda name: others[name].mean())
    difference = 100 * float(others[winner].mean() - base.mean())
    low, high = paired_bootstrap(others[winner], base)
    p_seeds = dunnett(np.array([rows.mean(1) for rows in (base, *others.values())])) if len(base) > 1 else None
    p_questions = min(1.0, len(others) * mcnemar(others[winner], base))
    found = difference > 0 and p_questions < LEVEL and (p_seeds is None or p_seeds < LEVEL)
    return Verdict(winner, len(others), len(base), difference, 100 * low, 100 * high, p_seeds, p_questions, found)


def dunnett(values: np.ndarray) -> float:
    """The one-sided p-value of the largest difference to the first row, over all others (Dunnett 1955): is any better?

    values: [1 + k, n], normal with one variance.
    """
    base, *others = values
    if not np.ptp(values, axis=1).any():  # the test divides by the spread between seeds
        return float(max(row[0] for row in others) <= base[0])
    with warnings.catch_warnings():  # scipy warns of a configuration that scores the same with all seeds
        warnings.simplefilter("ignore", RuntimeWarning)
        found = scipy.stats.dunnett(*others, control=base, alternative="greater",
                                    random_state=0)  # fixed, so that the same runs give the same verdict
    return float(found.pvalue.min().clip(0, 1))  # its integrals are numerical


def read_outcomes(runs: list[tuple[str, Path]]) -> dict[str, np.ndarray]:
    """The outcomes on the validation split by configuration: [seeds, questions], 1 where the answer is correct.

    runs: the configuration and the folder of each run.
    """
    rows: dict[str, list] = {}
    for configuration, folder in runs:
        answers = sorted(read_answers(folder / "val" / GENERATIONS), key=lambda answer: answer.qid)
        rows.setdefault(configuration, []).append([answer.correct for answer in answers])
    return {name: np.array(row, int) for name, row in rows.items()}


def finish(study: Path, runner: Runner, runs: list[FreshRun], epochs: int) -> None:
    """Names the winner, and scores the test split for it and for the base: once, by one worker, for which the others
    wait."""
    with waiting_for(study / ".locks" / "verdict") as lock:
        if not (study / VERDICT).is_file():
            outcomes = read_outcomes([(run.configuration, run.folder) for run in runs])
            write_json(study / VERDICT, asdict(verdict(outcomes)))
        winner: Any = read_json(study / VERDICT)["winner"]
        for run in runs:
            if run.configuration in (BASE, winner):
                runner.score(run.folder, epochs, run.folder, lock, "--split", "test")


def sentence(verdict: Any) -> str:
    """The verdict in words."""
    seeds = f"{verdict['seeds']} fresh seed{'s' * (verdict['seeds'] > 1)}"
    tests = " and ".join(f"p = {p:.3f} over {what}" for p, what in ((verdict["p_seeds"], "seeds"),
                                                                  (verdict["p_questions"], "questions"))
                         if p is not None)
    interval = f"95 % interval {points(verdict['low'])} to {points(verdict['high'])}"
    n = verdict["n_configurations"]
    adjusted = f", adjusted for {n} configurations" if n > 1 else ""
    numbers = f"{points(verdict['difference'])} points on validation with {seeds} ({interval}; {tests}{adjusted})"
    if verdict["found"]:
        return f"Trial {verdict['winner']} is better than the base: {numbers}."
    return (f"Nothing better than the base was found. The best of the others, trial {verdict['winner']}, differs by "
            f"{numbers}.")
