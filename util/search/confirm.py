"""The end of a study: its best configurations and its base run again with fresh seeds, which name the winner.

The best of many trials is lucky, so its own score is worth little. Runs with fresh seeds on the whole validation split
name the winner; the test split is scored once, for the winner and the base. All workers share the runs.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.files import PUT_IT_THERE, load_json, write_json
from util.comparison.comparison import clusters_of
from util.comparison.statistics import LEVEL, Estimate, contrast, seed_variance, tango
from util.comparison.tables import points
from util.evaluation.answers import read_answers
from util.runs import GENERATIONS
from util.search.errors import CommandFailed
from util.search.folder import (
    BASE,
    RECORD,
    accuracy,
    add_rung,
    base_values,
    begin_record,
    change_record,
    load_record,
    read_records,
)
from util.search.locks import WAIT_SECONDS, claim, waiting_for
from util.search.runner import Runner
from util.search.space import Values

VERDICT = "verdict.json"


@dataclass(frozen=True)
class FreshRun:
    """A run of a configuration with a fresh seed. configuration: the number of the trial that had it first."""

    folder: Path
    configuration: str
    values: Values
    seed: int


def plan(study: Path, k: int, seeds: int, first_seed: int, left_out: Collection[str] = ()) -> list[FreshRun]:
    """The runs of the k best trials beside the base, and of the base. All trials must have ended. Where fewer than k
    have finished the schedule, the best of those that came farthest follow. left_out: names of trials that cannot be
    compared to the others."""
    records = read_records(study)
    reached = {name: (record["rungs"][-1]["epoch"], accuracy(record["rungs"][-1]))
               for name, record in records.items()
               if record["rungs"] and record["state"] != "FAIL" and name not in (BASE, *left_out)}
    best = sorted(reached, key=lambda name: reached[name], reverse=True)[:k]
    values = {BASE: base_values(study, records), **{name: records[name]["values"] for name in best}}
    return [FreshRun(study / "confirm" / f"{name}-seed{seed}", name, flags, seed)
            for seed in range(first_seed, first_seed + seeds) for name, flags in values.items() if best]


def is_done(run: FreshRun) -> bool:
    return (run.folder / RECORD).is_file() and load_record(run.folder)["state"] == "COMPLETE"


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
        scores = runner.score(run.folder, epochs, run.folder / "val", "val", lock)
    except CommandFailed as error:
        raise UserError(f"{run.folder}: {error}") from error
    add_rung(run.folder, epochs, scores)
    change_record(run.folder, state="COMPLETE")


# --- The verdict ---

@dataclass(frozen=True)
class Verdict:
    """The best configuration by its mean over fresh seeds, and how it compares to the base, in points on validation.

    low, high: the interval, adjusted for the number of configurations. p: the one-sided p-value that the winner is
    better, times the number of configurations (Bonferroni); None where no winner can be named: with one seed, or on
    questions that chose the configurations. found: p lies below 5 %.
    """

    winner: str
    n_configurations: int
    seeds: int
    questions: int
    difference: float
    low: float
    high: float
    p: float | None
    found: bool


@dataclass(frozen=True)
class Confirmation:
    """The outcomes [seeds, questions] of each configuration on the same validation questions (1: correct), the base
    among them.

    clusters: the questions' clusters, where they are known. fresh: whether trials were scored on other questions.
    """

    outcomes: dict[str, np.ndarray]
    clusters: np.ndarray | None = None
    fresh: bool = True

    @property
    def base(self) -> np.ndarray:
        return self.outcomes[BASE]

    @property
    def n_configurations(self) -> int:
        """The number of configurations beside the base."""
        return len(self.outcomes) - 1

    def estimate(self, name: str) -> Estimate | None:
        """The difference of a configuration to the base; None with one seed."""
        between = seed_variance(list(self.outcomes.values()), self.clusters)
        if between is None:
            return None
        return contrast([self.base, self.outcomes[name]], (-1, 1), self.clusters, between)

    def interval(self, name: str) -> tuple[float, float]:
        """The interval of the difference to the base, so that all configurations' hold theirs together at 95 %; with
        one seed, the interval of the difference between the two runs."""
        estimate = self.estimate(name)
        if estimate is None:
            return tango(self.outcomes[name][0], self.base[0], self.clusters)
        return estimate.interval(self.n_configurations)


def verdict(found: Confirmation, winner: str | None = None) -> Verdict:
    """The verdict on the best configuration, or on `winner`, which an earlier verdict named, where its runs still
    count.
    """
    if winner not in found.outcomes:
        winner = max((name for name in found.outcomes if name != BASE), key=lambda name: found.outcomes[name].mean())
    difference = 100 * float(found.outcomes[winner].mean() - found.base.mean())
    (low, high), estimate = found.interval(winner), found.estimate(winner)
    p = min(1.0, found.n_configurations * estimate.p_greater) if estimate and found.fresh else None
    seeds, questions = found.base.shape
    return Verdict(winner, found.n_configurations, seeds, questions, difference, 100 * low, 100 * high, p,
                   p is not None and p < LEVEL)


def questions_of_trials(study: Path) -> set[str]:
    """The validation questions that trials were scored on, by their answers: versions have drawn different ones."""
    return {answer.qid for path in study.glob(f"trials/*/rungs/*/{GENERATIONS}") for answer in read_answers(path)}


def fresh_questions(clusters: Mapping[str, str | None], searched: Collection[str]) -> set[str]:
    """The questions of clusters of which none is in `searched`. Where the clusters say nothing, each question is alone.

    clusters: each question's cluster. searched: the questions that chose the configurations, which are therefore lucky
    on them and on what is like them; where they are not known, no question is fresh.
    """
    known = clusters if clusters_of(list(clusters.values())) is not None else {qid: qid for qid in clusters}
    seen = {known[qid] for qid in searched if qid in known}
    return {qid for qid, cluster in known.items() if cluster not in seen} if searched else set()


def read_confirmation(runs: list[tuple[str, Path]], searched: Collection[str]) -> Confirmation:
    """The outcomes on the validation questions that are fresh; where there is none, those on all questions, and no
    winner is named.

    runs: the configuration and the folder of each run. searched: the questions of the trials.
    """
    rows: dict[str, list] = {}
    names: list[str | None] = []
    for configuration, folder in runs:
        answers = sorted(read_answers(folder / "val" / GENERATIONS), key=lambda answer: answer.qid)
        fresh = fresh_questions({answer.qid: answer.cluster for answer in answers}, searched)
        counted = [answer for answer in answers if answer.qid in fresh] or answers
        rows.setdefault(configuration, []).append([answer.correct for answer in counted])
        names = [answer.cluster for answer in counted]
    return Confirmation({name: np.array(row, int) for name, row in rows.items()}, clusters_of(names), bool(fresh))


def finish(study: Path, runner: Runner, runs: list[FreshRun], epochs: int) -> None:
    """Names the winner, and scores the test split for it and for the base: once, by one worker, for which the others
    wait."""
    with waiting_for(study / ".locks" / "verdict") as lock:
        if not ((study / VERDICT).is_file() and is_current(read_verdict(study))):
            for run in runs:  # scores of something else, which an earlier version did not notice, are replaced
                runner.score(run.folder, epochs, run.folder / "val", "val", lock)
            found = read_confirmation([(run.configuration, run.folder) for run in runs], questions_of_trials(study))
            known = read_verdict(study) if (study / VERDICT).is_file() else None
            write_json(study / VERDICT, retested(known, found) if known else asdict(verdict(found)))
        winner = read_verdict(study)["winner"]
        for run in runs:
            if run.configuration in (BASE, winner):
                runner.score(run.folder, epochs, run.folder, "test", lock)


def read_verdict(study: Path) -> Any:
    return load_json(study / VERDICT, PUT_IT_THERE, "remove it, and search.py finds the winner again")


def is_current(verdict: Any) -> bool:
    """Whether verdict.json has the results of this version's test; earlier versions made others."""
    return "p" in verdict


def retested(known: Any, found: Confirmation) -> Any:
    """A verdict that was read; where an earlier version gave it, its winner with the results of this version's test."""
    return known if is_current(known) else asdict(verdict(found, known["winner"]))


def sentence(verdict: Any) -> str:
    """The verdict in words."""
    seeds = counted(verdict["seeds"], "fresh seed")
    n = verdict["n_configurations"]
    adjusted = f", adjusted for {counted(n, 'configuration')}" if n > 1 else ""
    test = "" if verdict["p"] is None else f"; one-sided p = {verdict['p']:.3f}"
    numbers = (f"{points(verdict['difference'])} points on {counted(verdict['questions'], 'validation question')} "
               f"with {seeds} (95 % interval {points(verdict['low'])} to {points(verdict['high'])}{test}{adjusted})")
    if verdict["found"]:
        return f"Trial {verdict['winner']} is better than the base: {numbers}."
    if verdict["p"] is None:
        reason = ("one fresh seed each tells nothing about configurations: give --seeds 3" if verdict["seeds"] == 1 else
                  "trials were scored on questions of all lectures: give at most half of them with --questions")
        return (f"No winner is named, since {reason}. The best, trial {verdict['winner']}, differs from the base by "
                f"{numbers}.")
    return (f"Nothing better than the base was found. The best of the others, trial {verdict['winner']}, differs by "
            f"{numbers}.")
