"""Proves what a search promises: no kill loses, repeats or strands a trial or changes what is found, and equal
configurations have no winner.

    python -m tests.faults.search_proof kills [--trials 64] [--workers 4] [--kills 20]
    python -m tests.faults.search_proof simulate [--studies 200]

Exit status 1 where a promise is broken.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch

from lavin.runtime.console import format_table, summary
from lavin.runtime.errors import one_line_errors
from lavin.runtime.files import read_json, read_json_lines
from lavin.runtime.flags import command_line
from lavin.weights.adapters import read_adapters
from tests.faults import machine
from tests.faults.cases import BASE, write_base
from tests.simulated_studies import World
from tools.make_mini_scienceqa import write_mini_scienceqa
from util.comparison.statistics import mcnemar, tango
from util.runs import last_checkpoint
from util.search.confirm import Confirmation, verdict
from util.search.folder import accuracy, read_records, read_settings
from util.search.settings import SPACE

SIZES = {"train": 64, "val": 200, "test": 6}
TRAIN = (*BASE, "--batch_size", "4", "--accum_iter", "8", "--epochs", "9", "--max_seq_len", "500",
         "--save_every_minutes", "0.002",
         "--warmup_epochs", "0.5")  # a longer one would leave no early scores, at which trials are ended
EPOCHS, MOST_STEPS = 9, 0.4  # of an unpruned study

Checks = list[tuple[str, bool, str]]  # what, whether it holds, the figure


# --- Kills ---

def start(root: Path, program: str, *flags: str, log: Path) -> subprocess.Popen:
    with open(log, "ab") as output:
        return machine.start(root, f"{machine.ROOT}/{program}", *flags, stdout=output, stderr=output,
                             start_new_session=True)


def kill(worker: subprocess.Popen, rng: Random) -> str:
    """The worker alone, whose command then ends by itself; or both, as the machine's death would."""
    if rng.random() < 0.5:
        worker.kill()
        how = "worker"
    else:
        os.killpg(worker.pid, signal.SIGKILL)
        how = "worker and command"
    worker.wait()
    return how


def run_study(root: Path, study: str, args, n_kills: int) -> tuple[list[str], float]:
    """Returns how each kill was made, and the seconds. Killed workers are started again."""
    rng, begin, kills = Random(args.seed), time.monotonic(), []
    search = ("--study", study, "--trials", str(args.trials), "--questions", str(SIZES["val"]), "--confirm", "0", "--",
              *TRAIN)
    workers = [start(root, "search.py", *search, log=root / "workers.log") for _ in range(args.workers)]
    # over the whole study: the next one after so many trials have ended
    due = sorted(rng.uniform(0, args.trials - args.workers) for _ in range(n_kills))
    while any(worker.poll() is None for worker in workers):
        ended = sum(record["state"] != "RUNNING" for record in read_records(root / study).values())
        if len(kills) < len(due) and ended >= due[len(kills)]:
            time.sleep(rng.uniform(0, 4))
            i = rng.randrange(args.workers)
            if workers[i].poll() is None:
                kills.append(kill(workers[i], rng))
                print(f"kill {len(kills)} of {n_kills} ({kills[-1]}), after {ended} trials", flush=True)
                workers[i] = start(root, "search.py", *search, log=root / "workers.log")
        time.sleep(0.3)
    assert all(worker.returncode == 0 for worker in workers), (root / "workers.log").read_text()[-2000:]
    return kills, time.monotonic() - begin


def stored_states(study: Path) -> Counter:
    from util.search.storage import open_optuna
    trials = open_optuna(study, read_settings(study)["name"], None, False, None).get_trials(deepcopy=False)
    return Counter((trial.number, trial.state.name) for trial in trials)


def repeated_runs(root: Path, records: dict) -> tuple[int, int]:
    """How many of the finished trials have the adapters of an unbroken run of the same flags, and their number."""
    finished = [name for name, record in records.items() if record["state"] == "COMPLETE"]
    same = 0
    for name in finished:
        flags = command_line(records[name]["values"])
        unbroken = start(root, "train.py", *TRAIN, *flags, "--output_dir", "unbroken", log=root / "unbroken.log")
        assert unbroken.wait() == 0, (root / "unbroken.log").read_text()[-2000:]
        models = [read_adapters(last_checkpoint(str(root / folder)))["model"] for folder in (f"S/trials/{name}",
                                                                                           "unbroken")]
        same += all(torch.equal(models[0][key], models[1][key]) for key in models[1])
        shutil.rmtree(root / "unbroken")
    return same, len(finished)


def best_trial(study: Path) -> tuple[float, np.ndarray]:
    """The accuracy in percent of the best finished trial, and which answers were right: [questions]."""
    scores = {name: accuracy(record["rungs"][-1]) for name, record in read_records(study).items()
              if record["state"] == "COMPLETE"}
    best = max(scores, key=lambda name: scores[name])
    answers = {answer["qid"]: answer["prediction"] == answer["answer"] for answer in
               read_json_lines(study / "trials" / best / "rungs" / str(EPOCHS) / "generations.jsonl")}
    return scores[best], np.array([answers[qid] for qid in sorted(answers)], int)


def same_best(killed: Path, unkilled: Path) -> tuple[str, bool, str]:
    """Noise: what the questions alone allow. (The studies differ by more: by which worker asked for a trial first.)"""
    (score, right), (other_score, other_right) = best_trial(killed), best_trial(unkilled)
    low, high = (100 * bound for bound in tango(right, other_right))
    p = mcnemar(right, other_right)
    return ("the same best as without kills, within noise", p >= 0.05,
            f"{score:.1f} and {other_score:.1f} % of {len(right)} questions: {score - other_score:+.1f} points "
            f"[{low:+.1f}, {high:+.1f}], McNemar's p {p:.2f}")


def prove_kills(args) -> Checks:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_mini_scienceqa(root / "data", SIZES, 0)
        write_base(root, root / "data")
        kills, seconds = run_study(root, "S", args, args.kills)
        resumed = (root / "workers.log").read_text().count(" goes on: ")
        _, seconds_without = run_study(root, "unkilled", args, 0)
        best = same_best(root / "S", root / "unkilled")
        records, stored = read_records(root / "S"), stored_states(root / "S")
        per_epoch = read_settings(root / "S")["steps_per_epoch"]
        same, n_finished = repeated_runs(root, records)
    states = Counter(record["state"] for record in records.values())
    steps = per_epoch * sum(record["rungs"][-1]["epoch"] for record in records.values())
    share = steps / (args.trials * EPOCHS * per_epoch)
    in_storage = Counter((int(name), record["state"]) for name, record in records.items())
    return [("killed", len(kills) == args.kills, f"{len(kills)} ({kills.count('worker')} the worker alone), {resumed} "
             f"trials resumed, {seconds:.0f} s; without kills {seconds_without:.0f} s"),
            ("finished or pruned", states["COMPLETE"] + states["PRUNED"] == args.trials, json.dumps(states)),
            ("none lost or twice", sorted(map(int, records)) == list(range(args.trials)), f"{len(records)} folders"),
            ("storage agrees", stored == in_storage, f"{len(stored)} trials"),
            ("same adapters as an unbroken run", same == n_finished, f"{same} of {n_finished} finished trials"),
            best,
            (f"at most {MOST_STEPS:.0%} of the steps without pruning", share <= MOST_STEPS, f"{share:.1%}")]


# --- Equal configurations ---

N_SEARCH = 1000  # of the validation questions, on which trials are scored
TRIALS, BEST, SEEDS = 64, 3, 3
WORLD = World(SEEDS, deviation=0.5, lectures=False)


def simulate_study(rng, world: World, gain: float) -> tuple[bool, bool]:
    """A study in which one configuration is better by `gain` points and all others equal the base: whether it says that
    it found something, and whether the best trial looks significantly better in its own score, without confirmation.

    What a configuration makes of a question, and of a lecture's questions, is the same in its trial and in its runs
    with fresh seeds.
    """
    gains = np.array([0.0] * (TRIALS - 1) + [gain])
    # the first seed is the trial's own
    outcomes, clusters = replace(world, seeds=1 + world.seeds).study(rng, gains)
    place = rng.permutation(clusters.max() + 1)[clusters]  # whole lectures, as util.data.datasets.sample_ids draws them
    searched = np.argsort(place, kind="stable")[:N_SEARCH]
    trials = np.array([rows[0, searched] for rows in outcomes])
    best = np.argsort(-trials[1:].mean(1))[:BEST] + 1
    naive = trials[best[0]].mean() > trials[0].mean() and mcnemar(trials[best[0]], trials[0]) < 0.05
    fresh = np.flatnonzero(place > place[searched].max())
    rows = {f"{i:03d}": outcomes[i][1:, fresh] for i in (0, *best)}
    return verdict(Confirmation(rows, np.unique(clusters[fresh], return_inverse=True)[1])).found, bool(naive)


LAG, GAIN, NOISE = 2.0, 1.5, 0.5  # points: of a schedule at the first rung, of its best trial, of a score


def late_riser_is_among_the_best(rng: np.random.Generator) -> bool:
    """A study in which all cyclical trials lag by LAG points at the first rung, and one of them is better than all
    others by GAIN: whether it is among the best three that finish."""
    import optuna

    from util.search.pruning import longest_warmup, make_pruner, rungs
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first, *_ = rungs(20, "asha", longest_warmup({"space": read_json(SPACE), "flags": {}}))
    study = optuna.create_study(direction="maximize", pruner=make_pruner("asha", first, ("lr_schedule",)),
                                sampler=optuna.samplers.RandomSampler(int(rng.integers(2**31))))
    best, finished = int(rng.integers(TRIALS)), {}
    for number in range(TRIALS):
        if number == best:
            study.enqueue_trial({"lr_schedule": "cyclical"})
        trial = study.ask()
        schedule = trial.suggest_categorical("lr_schedule", ["cosine", "cyclical", "step", "exponential"])
        score = 85 + GAIN * (number == best) + NOISE * rng.standard_normal()
        trial.report(score - LAG * (schedule == "cyclical"), first)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            finished[number] = 85 + GAIN * (number == best) + NOISE * rng.standard_normal()
            study.tell(trial, finished[number])
    return best in sorted(finished, key=lambda number: -finished[number])[:BEST]


def prove_simulation(args) -> Checks:
    rng, checks = np.random.default_rng(args.seed), []
    for world, where in ((WORLD, ""), (replace(WORLD, lectures=True), ", lectures")):
        for gain in (0.0, 2.0):
            found, naive = np.mean([simulate_study(rng, world, gain) for _ in range(args.studies)], 0)
            if gain:
                checks.append((f"found where one of {TRIALS} is better by {gain:g} points{where}", True,
                               f"{found:.1%}"))
            else:
                checks += [(f"a false winner among equal configurations{where}", found <= 0.06,
                            f"{found:.1%} of {args.studies}"),
                           (f"the best trial's own score, significant by chance{where}", True, f"{naive:.1%}")]
    kept = np.mean([late_riser_is_among_the_best(rng) for _ in range(args.studies)])
    return [*checks, (f"a schedule {LAG:g} points behind at the first rung, whose best trial wins by {GAIN:g}, is "
                      "confirmed", bool(kept >= 0.9), f"{kept:.1%}")]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("what", choices=["kills", "simulate"])
    parser.add_argument("--trials", default=64, type=int)
    parser.add_argument("--workers", default=4, type=int)
    parser.add_argument("--kills", default=20, type=int)
    parser.add_argument("--studies", default=200, type=int)
    parser.add_argument("--seed", default=0, type=int)
    return parser


def main(args) -> bool:
    """Returns whether all promises hold."""
    checks = prove_kills(args) if args.what == "kills" else prove_simulation(args)
    print("\n" + format_table([args.what, "holds", ""], [[what, "yes" if holds else "NO", figure]
                                                         for what, holds, figure in checks]))
    return all(holds for _, holds, _ in checks)


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(not main(get_args_parser().parse_args()))
