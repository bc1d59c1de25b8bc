"""A search tells its cost and its progress, which are computed from the files in its folder."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lavin.runtime.console import counted, duration, listed
from util.search.folder import STATES, accuracy, gpu_seconds, read_records


def unit_of_hours(on_cpu: bool) -> str:
    return "hours on a CPU" if on_cpu else "GPU-hours"


def cost_lines(study: Path, settings: Any, rungs: list[int], on_cpu: bool) -> list[str]:
    """Returns the lines that tell, when a search begins or goes on, what it will cost at most."""
    trials, epochs, per_epoch = settings["trials"], settings["flags"]["epochs"], settings["steps_per_epoch"]
    n_fresh = settings["seeds"] * (settings["confirm"] + 1) if settings["confirm"] else 0
    pruned = f", scored after epochs {listed(rungs)}, where {settings['pruner']} ends the worse ones" \
        if len(rungs) > 1 else ""
    lines = [f"{study}: {counted(trials, 'trial')} of at most {counted(epochs, 'epoch')} x "
             f"{counted(per_epoch, 'step')}{pruned}: {counted(trials * epochs * per_epoch, 'step')} at most"]
    if n_fresh:
        lines.append(f"then {counted(n_fresh, 'run')} with fresh seeds (the best {settings['confirm']} and the base, "
                     f"{settings['seeds']} each): {counted(n_fresh * epochs * per_epoch, 'step')}")
    seconds = seconds_per_epoch(study)
    hours = "unknown until the first trial is scored" if seconds is None else \
        f"at most {(trials + n_fresh) * epochs * seconds / 3600:.2f}, by the trials so far ({seconds:.1f} s an epoch)"
    return [*lines, f"{unit_of_hours(on_cpu)}: {hours}"]


def seconds_per_epoch(study: Path) -> float | None:
    """Returns the mean GPU-seconds of an epoch, with loading and scoring, of all trials that have a score. Returns None
    if no trial has one."""
    scored = [record for record in read_records(study).values() if record["rungs"]]
    n_epochs = sum(record["rungs"][-1]["epoch"] for record in scored)
    return gpu_seconds(scored) / n_epochs if scored else None


def progress_line(study: Path, n_trials: int, left_out: Collection[str] = ()) -> str:
    """Returns a line such as `13 of 64 trials: 5 finished, 7 pruned, 1 failed; best 84.20 (trial 007); about 2 h 05 min
    left`.

    `left_out` has the names of trials that cannot be compared to the others, so that none of them can be the best.
    """
    records = read_records(study)
    ended = [record for record in records.values() if record["state"] != "RUNNING"]
    n_of_state = Counter(record["state"] for record in records.values())
    states = ", ".join(f"{n_of_state[state]} {word}" for state, word in STATES.items() if state != "RUNNING")
    finished = {name: accuracy(record["rungs"][-1]) for name, record in records.items()
                if record["state"] == "COMPLETE" and name not in left_out}
    best = max(finished, key=lambda name: finished[name], default=None)
    parts = [f"{len(ended)} of {counted(n_trials, 'trial')}: {states}"]
    parts += [f"best {finished[best]:.2f} (trial {best})"] if best else []
    if 0 < len(ended) < n_trials:
        workers = max(1, n_of_state["RUNNING"])
        seconds = sum(record["seconds"] for record in ended) / len(ended) * (n_trials - len(ended)) / workers
        parts.append(f"about {duration(seconds)} left")
    return "; ".join(parts)
