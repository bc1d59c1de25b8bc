"""The record of an epoch's steps, from which its line of log.txt is made.

A step's numbers are read while the GPU works on the next one, so that no step waits.
"""

import time
from collections.abc import Callable

import torch

from lavin.runtime.device import copy_to_host

MAX_SKIPPED = 10  # steps in a row that are not finite, at which training ends


class EpochRecord:
    """The numbers of an epoch's steps.

    steps: [loss, 1 if the step was made or 0 if it was skipped, gradient norm] of each step; the loss is None where the
    step's samples have no answer token. rates: the learning rate of each step. skipped: the number of steps up to now,
    of this epoch and the ones before, that were skipped in a row.
    """

    def __init__(self, epoch: int, skipped: int = 0, steps: list | None = None, rates: list | None = None,
                 seconds: float = 0.0):
        self.epoch, self.skipped, self.steps, self.rates = epoch, skipped, steps or [], rates or []
        self.start, self.seconds_before = time.perf_counter(), seconds
        self.stop = False  # whether some process was asked to stop; the same on all
        self._in_flight: tuple[Callable[[], torch.Tensor], bool] | None = None

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def seconds_for(self, n_steps: int) -> float:
        """The seconds that so many steps take by the mean of the epoch's steps, of which there are some."""
        return self.seconds / len(self.steps) * n_steps

    def start_clock(self) -> None:
        """Begins to count the epoch's seconds: with the first step, after loading and compiling."""
        self.start = time.perf_counter()

    def add(self, numbers: torch.Tensor, rate: float, has_answers: bool) -> None:
        """Takes the numbers of the step just launched, from `optimizer_step`, and reads those of the step before.

        has_answers: whether the step's samples have an answer token, without which there is no loss.
        """
        self.rates.append(rate)
        previous, self._in_flight = self._in_flight, (copy_to_host(numbers), has_answers)
        self._read(previous)

    def read_all(self) -> None:
        previous, self._in_flight = self._in_flight, None
        self._read(previous)

    def _read(self, step: tuple[Callable[[], torch.Tensor], bool] | None) -> None:
        if step is None:
            return
        numbers, has_answers = step
        loss, stepped, norm, n_stop = numbers().tolist()
        self.steps.append([loss if has_answers else None, stepped, norm])
        self.skipped = 0 if stepped else self.skipped + 1
        self.stop |= n_stop > 0

    def state_dict(self) -> dict:
        self.read_all()
        return {"epoch": self.epoch, "skipped": self.skipped, "steps": self.steps, "rates": self.rates,
                "seconds": self.seconds}

    def mean_loss(self, start: int = 0) -> float | None:
        """The mean over the steps from `start` that were made and have a loss; None where there is none."""
        losses = [loss for loss, stepped, _ in self.steps[start:] if stepped and loss is not None]
        return sum(losses) / len(losses) if losses else None

    def skipped_steps(self, start: int = 0) -> int:
        """The number of steps from `start` that were skipped, since their gradients were not finite."""
        return sum(not stepped for _, stepped, _ in self.steps[start:])

    def log_line(self, n_samples: int, memory_gib: float) -> dict:
        """The epoch's line of log.txt. n_samples: the number of samples that its steps took."""
        seconds = self.seconds
        return {"epoch": self.epoch, "train_lr": sum(self.rates) / len(self.rates), "train_closs": self.mean_loss(),
                "skipped_steps": self.skipped_steps(), "samples_per_s": n_samples / seconds, "seconds": seconds,
                "peak_memory_gib": memory_gib}


def loss_in_words(loss: float | None) -> str:
    return "no answers" if loss is None else f"loss {loss:.4f}"
