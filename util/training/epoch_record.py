"""The record of an epoch's steps. A step's numbers are read while the GPU works on the next, so that no step waits."""

import time
from collections.abc import Callable

import torch

from lavin.runtime.device import copy_to_host

MAX_SKIPPED = 10  # steps in a row that are not finite, at which training ends


class EpochRecord:
    """The numbers of an epoch's steps.

    steps: [loss, 1 if the step was made or 0 if it was skipped, gradient norm] of each step. rates: their learning
    rates. skipped: the number of steps up to now, of this epoch and the ones before, that were skipped in a row.
    """

    def __init__(self, epoch: int, skipped: int = 0, steps: list | None = None, rates: list | None = None,
                 seconds: float = 0.0):
        self.epoch, self.skipped, self.steps, self.rates = epoch, skipped, steps or [], rates or []
        self.start, self.seconds_before = time.perf_counter(), seconds
        self.stop = False  # whether some process was asked to stop; the same on all
        self._in_flight: Callable[[], torch.Tensor] | None = None

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def start_clock(self) -> None:
        """Begins to count the epoch's seconds: with the first step, after loading and compiling."""
        self.start = time.perf_counter()

    def add(self, numbers: torch.Tensor, rate: float) -> None:
        """Takes the numbers of the step just launched, from `optimizer_step`, and reads those of the step before."""
        self.rates.append(rate)
        previous, self._in_flight = self._in_flight, copy_to_host(numbers)
        self._read(previous)

    def read_all(self) -> None:
        previous, self._in_flight = self._in_flight, None
        self._read(previous)

    def _read(self, numbers: Callable[[], torch.Tensor] | None) -> None:
        if numbers is None:
            return
        loss, stepped, norm, n_stop = numbers().tolist()
        self.steps.append([loss, stepped, norm])
        self.skipped = 0 if stepped else self.skipped + 1
        self.stop |= n_stop > 0

    def state_dict(self) -> dict:
        self.read_all()
        return {"epoch": self.epoch, "skipped": self.skipped, "steps": self.steps, "rates": self.rates,
                "seconds": self.seconds}

    def losses(self, start: int = 0) -> list[float]:
        """The losses of the steps from `start` that were made."""
        return [loss for loss, stepped, _ in self.steps[start:] if stepped]

    def mean_loss(self, start: int = 0) -> float | None:
        losses = self.losses(start)
        return sum(losses) / len(losses) if losses else None

    def skipped_steps(self, start: int = 0) -> int:
        """The number of steps from `start` that were skipped, since their gradients were not finite."""
        return sum(not stepped for _, stepped, _ in self.steps[start:])
