"""At the end of a study, its best configurations and its base are trained again with fresh seeds.

The best of many trials is partly lucky, so its own score says little. The winner is named by the runs with fresh seeds,
on validation questions that are unlike those of the trials. Then the test split is scored once, for the winner and the
base. All workers share these runs.
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
    CONFIRM,
    RECORD,
    RUNGS,
    TRIALS,
    VALIDATION,
    VERDICT,
    accuracy,
    add_rung,
    base_values,
    begin_record,
    change_record,
    load_record,
    lock_path,
    read_records,
)
from util.search.locks import WAIT_SECONDS, claim, waiting_for
from util.search.runner import Runner
from util.search.space import Values


@dataclass(frozen=True)
class FreshRun:
    """A run with a fresh seed. `configuration` is the name of the trial whose values it has, such as `007`."""

    folder: Path
    configuration: str
    values: Values
    seed: int


def plan(study: Path, k: int, seeds: int, first_seed: int, left_out: Collection[str] = ()) -> list[FreshRun]:
    """Returns the runs that repeat the base and the k best other trials, with `seeds` seeds each. All trials must have
    ended.

    The best trials are those that came farthest in the schedule and, of these, those with the best last score. Trials
    that failed do not count, nor do those of `left_out`, the names of trials that cannot be compared to the others.
    """
    records = read_records(study)
    reached = {name: (record["rungs"][-1]["epoch"], accuracy(record["rungs"][-1]))
               for name, record in records.items()
               if record["rungs"] and record["state"] != "FAIL" and name not in (BASE, *left_out)}
    best = sorted(reached, key=lambda name: reached[name], reverse=True)[:k]
    values = {BASE: base_values(study, records), **{name: records[name]["values"] for name in best}}
    return [FreshRun(study / CONFIRM / f"{name}-seed{seed}", name, flags, seed)
            for seed in range(first_seed, first_seed + seeds) for name, flags in values.items() if best]


def is_done(run: FreshRun) -> bool:
    return (run.folder / RECORD).is_file() and load_record(run.folder)["state"] == "COMPLETE"


def run_all(study: Path, runs: list[FreshRun], execute: Callable[[FreshRun, int], None]) -> None:
    """Works on the runs until all are done, including those of other workers. `execute` gets a run and the descriptor
    of its lock, and makes the run or goes on with it."""
    while left := [run for run in runs if not is_done(run)]:
        for run in left:
            lock = claim(lock_path(study, run.folder.name))
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
    """Trains a run over the full schedule, and scores it on all of the validation split. Raises UserError if a command
    fails; the message names the run."""
    begin_record(run.folder, runner.gpus, values=run.values, configuration=run.configuration, seed=run.seed)
    try:
        runner.train(run.folder, run.values, epochs, lock, "--seed", str(run.seed))
        scores = score_on_validation(runner, epochs, run, lock)
    except CommandFailed as error:
        raise UserError(f"{run.folder}: {error}") from error
    add_rung(run.folder, epochs, scores)
    change_record(run.folder, state="COMPLETE")


def score_on_validation(runner: Runner, epochs: int, run: FreshRun, lock: int) -> dict[str, Any]:
    return runner.score(run.folder, epochs, run.folder / VALIDATION, "val", lock)


# --- The verdict ---

@dataclass(frozen=True)
class Verdict:
    """The configuration with the best mean over fresh seeds, and its difference to the base in points on validation.

    `low` and `high` are the ends of the difference's interval, adjusted for the number of configurations. `p` is the
    one-sided p-value of a gain, times the number of configurations (Bonferroni). It is None if no winner can be named,
    since there is one seed, or since the same questions chose the configurations. `found` says whether p lies below
    5 %.
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
    """The outcomes of the base and of each other configuration that ran with fresh seeds, all on the same questions.

    `outcomes` has arrays [seeds, questions], in which 1 is a correct answer. `clusters` [questions] says which
    questions share a lecture, and is None if lectures tell nothing. `fresh` says whether the trials were scored on
    other questions than these.
    """

    outcomes: dict[str, np.ndarray]
    clusters: np.ndarray | None = None
    fresh: bool = True

    @property
    def base(self) -> np.ndarray:
        return self.outcomes[BASE]

    @property
    def n_configurations(self) -> int:
        """The number of configurations, without the base."""
        return len(self.outcomes) - 1

    def estimate(self, name: str) -> Estimate | None:
        """Returns the difference of a configuration to the base, or None if there is only one seed."""
        between = seed_variance(list(self.outcomes.values()), self.clusters)
        if between is None:
            return None
        return contrast([self.base, self.outcomes[name]], (-1, 1), self.clusters, between)

    def interval(self, name: str) -> tuple[float, float]:
        """Returns the interval of a configuration's difference to the base. The intervals of all configurations hold
        together at 95 %. With one seed, the interval is that of the difference between the two runs."""
        estimate = self.estimate(name)
        if estimate is None:
            return tango(self.outcomes[name][0], self.base[0], self.clusters)
        return estimate.interval(self.n_configurations)


def verdict(found: Confirmation, winner: str | None = None) -> Verdict:
    """Returns the verdict on the best configuration or, if `winner` names one that has outcomes, on that one."""
    if winner not in found.outcomes:
        winner = max((name for name in found.outcomes if name != BASE), key=lambda name: found.outcomes[name].mean())
    difference = 100 * float(found.outcomes[winner].mean() - found.base.mean())
    (low, high), estimate = found.interval(winner), found.estimate(winner)
    p = min(1.0, found.n_configurations * estimate.p_greater) if estimate and found.fresh else None
    seeds, questions = found.base.shape
    return Verdict(winner, found.n_configurations, seeds, questions, difference, 100 * low, 100 * high, p,
                   p is not None and p < LEVEL)


def questions_of_trials(study: Path) -> set[str]:
    """Returns the validation questions that trials were scored on. They are read from the answers, since versions of
    this project have drawn different questions."""
    return {answer.qid for path in study.glob(f"{TRIALS}/*/{RUNGS}/*/{GENERATIONS}") for answer in read_answers(path)}


def fresh_questions(clusters: Mapping[str, str | None], searched: Collection[str]) -> set[str]:
    """Returns the questions that share a cluster with none of `searched`, the questions that the trials were scored on.

    The best trials were chosen by their luck on these questions, and may be as lucky on questions that are like them.
    `clusters` has each question's cluster; if these tell nothing (`clusters_of`), each question stands alone. If
    `searched` is empty, nobody knows what the trials were scored on, and no question is fresh.
    """
    known = clusters if clusters_of(list(clusters.values())) is not None else {qid: qid for qid in clusters}
    seen = {known[qid] for qid in searched if qid in known}
    return {qid for qid, cluster in known.items() if cluster not in seen} if searched else set()


def read_confirmation(runs: list[tuple[str, Path]], searched: Collection[str]) -> Confirmation:
    """Reads the outcomes on the fresh validation questions or, if there are none, on all questions; then no winner can
    be named.

    `runs` has the configuration and the folder of each run, and `searched` the questions of the trials.
    """
    rows: dict[str, list] = {}
    names: list[str | None] = []
    for configuration, folder in runs:
        answers = sorted(read_answers(folder / VALIDATION / GENERATIONS), key=lambda answer: answer.qid)
        fresh = fresh_questions({answer.qid: answer.cluster for answer in answers}, searched)
        counted = [answer for answer in answers if answer.qid in fresh] or answers
        rows.setdefault(configuration, []).append([answer.correct for answer in counted])
        names = [answer.cluster for answer in counted]
    return Confirmation({name: np.array(row, int) for name, row in rows.items()}, clusters_of(names), bool(fresh))


def finish(study: Path, runner: Runner, runs: list[FreshRun], epochs: int) -> Any:
    """Names the winner, and scores the winner and the base on the test split. One worker does this once, while the
    others wait for it. Returns the content of verdict.json."""
    with waiting_for(lock_path(study, "verdict")) as lock:
        known = read_verdict(study)
        if known is None or not is_current(known):
            for run in runs:  # scores of something else, which an earlier version did not notice, are replaced
                score_on_validation(runner, epochs, run, lock)
            found = read_confirmation([(run.configuration, run.folder) for run in runs], questions_of_trials(study))
            known = retested(known, found) if known else asdict(verdict(found))
            write_json(study / VERDICT, known)
        for run in runs:
            if run.configuration in (BASE, known["winner"]):
                runner.score(run.folder, epochs, run.folder, "test", lock)
    return known


def read_verdict(study: Path) -> Any:
    """Returns the content of verdict.json, or None if no worker has written it yet."""
    path = study / VERDICT
    return load_json(path, PUT_IT_THERE, "remove it, and search.py finds the winner again") if path.is_file() else None


def is_current(verdict: Any) -> bool:
    """Returns whether a verdict has the results of this version's test, which earlier versions did not make."""
    return "p" in verdict


def retested(known: Any, found: Confirmation) -> Any:
    """Returns a verdict as it was read or, if an earlier version wrote it, the verdict of this version's test on the
    same winner."""
    return known if is_current(known) else asdict(verdict(found, known["winner"]))


def sentence(verdict: Any) -> str:
    """Returns the verdict in words."""
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
