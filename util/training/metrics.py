"""Numbers by step: metrics.jsonl, a line every few steps, and the same for experiment trackers."""

import json
import math
import time
from pathlib import Path
from typing import Any

from lavin.runtime.files import read_whole_lines, write_json_lines
from lavin.tokenizer import Example
from util.runs import METRICS
from util.trackers import Trackers
from util.training.epoch_record import EpochRecord
from util.training.throughput import FrozenWeights, step_flops

STEPS_PER_LINE = 10


class Metrics:
    """Adds up the steps' work, and writes lines on rank 0.

    frozen: the model's weights that are not trained. peak_flops: the peak of the run's GPUs together; None where it is
    not known.
    """

    def __init__(self, trackers: Trackers, frozen: FrozenWeights, peak_flops: float | None):
        self.trackers, self.frozen, self.peak_flops = trackers, frozen, peak_flops
        self.restart(0)

    def restart(self, step: int) -> None:
        """This process makes the epoch's steps from this one on. The next line begins where the last one ended, which
        an earlier process may have written."""
        self.first_step, self.first_made = step - step % STEPS_PER_LINE, step
        self.work, self.time = [], time.perf_counter()

    def add(self, samples: list[Example]) -> None:
        """Counts the work of a step that was launched."""
        self.work.append((len(samples), sum(len(sample.ids) for sample in samples), step_flops(self.frozen, samples)))

    def is_due(self, n_steps: int, steps_per_epoch: int) -> bool:
        return n_steps > self.first_step and (n_steps % STEPS_PER_LINE == 0 or n_steps == steps_per_epoch)

    def write(self, folder: Path, record: EpochRecord, memory_gib: float, steps_per_epoch: int) -> None:
        """Writes a line on the steps that have been read since the last one. Its speed is of this process's steps."""
        n, now, first = len(record.steps), time.perf_counter(), self.first_step
        n_made = n - self.first_made
        done, self.work = self.work[:n_made], self.work[n_made:]
        samples, tokens, flops = (sum(column) / (now - self.time) for column in zip(*done, strict=True))
        norm = record.steps[-1][2]
        line = {"epoch": record.epoch, "step": n, "loss": record.mean_loss(first), "lr": record.rates[n - 1],
                "grad_norm": norm if math.isfinite(norm) else None, "samples_per_s": samples, "tokens_per_s": tokens,
                "mfu": flops / self.peak_flops if self.peak_flops else None, "peak_memory_gib": memory_gib,
                "skipped_steps": record.skipped_steps(first)}
        with open(folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if name not in ("epoch", "step")}
        self.trackers.log(numbers, record.epoch * steps_per_epoch + n)
        self.first_step, self.first_made, self.time = n, n, now


def drop_metrics(folder: Path, epoch: int, step: int) -> None:
    """Removes the lines after this step, which an interrupted run left, and a line that it had not finished."""
    path = folder / METRICS
    if not path.exists():
        return
    write_json_lines(path, [line for line in read_whole_lines(path) if is_made_by(line, epoch, step)])


def is_made_by(line: Any, epoch: int, step: int) -> bool:
    try:
        return (line["epoch"], line["step"]) <= (epoch, step)
    except (KeyError, TypeError):  # written by something else
        return False
