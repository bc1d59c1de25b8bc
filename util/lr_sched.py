"""Learning-rate schedules as functions of the fractional epoch, and the flags that choose one.

A schedule is one entry of SCHEDULES: the choices of --lr_schedule, the checks, the names in tables and figures, and the
flags that a search varies with it follow from the entry.

cosine: Loshchilov & Hutter 2017, arXiv 1608.03983; cyclical: triangular2 of Smith 2017, arXiv 1506.01186.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from lavin.runtime.flags import FlagGroup, Flags, Role, flag
from lavin.runtime.schema import Count, NonNegative, Positive

STEP_FACTOR, STEP_EPOCHS = 0.65, 2
EXPONENTIAL_END = 1e-5  # learning rate at the last epoch
CYCLE_FRACTION = 1 / 5  # length of half a cycle, as a fraction of all epochs
WARMUP_FRACTION = 1 / 10  # published: 2 of 20 epochs


# --- Formulas: epoch counts from the end of the warm-up, epochs is the number of epochs after it ---

def cosine(epoch: float, epochs: float, lr: float, min_lr: float) -> float:
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (epoch / epochs))) / 2


def cyclical(epoch: float, epochs: float, lr: float, min_lr: float) -> float:
    half = epochs * CYCLE_FRACTION
    cycle = math.floor(1 + epoch / (2 * half))
    x = abs(epoch / half - 2 * cycle + 1)
    return min_lr + (lr - min_lr) * max(0.0, 1 - x) / 2 ** (cycle - 1)


def step(epoch: float, epochs: float, lr: float, min_lr: float) -> float:
    return lr * STEP_FACTOR ** math.floor(epoch / STEP_EPOCHS)


def exponential(epoch: float, epochs: float, lr: float, min_lr: float) -> float:
    return lr * (EXPONENTIAL_END / lr) ** (epoch / epochs)


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule.

    - formula: returns the rate at an epoch.
    - display_name: the name in names of methods; None for the schedule of the base method.
    - uses: the flags beside the rate and the epochs that change something; with warmup_epochs, a linear warm-up comes
      first.
    - lowest_lr: the peak rate below which the formula makes no sense.
    """

    formula: Callable[[float, float, float, float], float]
    display_name: str | None
    uses: tuple[str, ...] = ("warmup_epochs",)
    lowest_lr: float = 0.0

    @property
    def warms_up(self) -> bool:
        return "warmup_epochs" in self.uses


# the first one is the base method's
SCHEDULES = {
    "cosine": Schedule(cosine, None, uses=("warmup_epochs", "min_lr")),
    "cyclical": Schedule(cyclical, "Cyclical LR", uses=("min_lr",)),
    "step": Schedule(step, "Step Decay"),
    "exponential": Schedule(exponential, "Exp. Decay", lowest_lr=EXPONENTIAL_END),
}


def schedule_of(name: str) -> Schedule:
    """Returns a schedule by its name. Raises ValueError, with the flag, where there is no such schedule."""
    if name not in SCHEDULES:
        raise ValueError(f"--lr_schedule {name}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def schedules_with(flag: str) -> list[str]:
    """Returns the names of the schedules that use a flag."""
    return [name for name, schedule in SCHEDULES.items() if flag in schedule.uses]


@dataclass(frozen=True)
class LearningRate(FlagGroup):
    """The schedule of a run, and the numbers that its formula takes."""

    title: ClassVar[str] = "learning rate"
    lr_schedule: str = flag(next(iter(SCHEDULES)), "how the learning rate falls", Role.RECIPE, choices=tuple(SCHEDULES),
                            named=False)
    epochs: Count = flag(20, "epochs of the whole schedule", Role.RECIPE)
    warmup_epochs: NonNegative = flag(
        2.0, "linear warm-up; a tenth of --epochs where these are fewer; none with --lr_schedule "
             + ", ".join(name for name, schedule in SCHEDULES.items() if not schedule.warms_up), Role.RECIPE)
    blr: Positive = flag(9e-3, "base learning rate: lr = blr * effective batch / 256", Role.RECIPE, stated_as="lr",
                         named=False)
    lr: Positive | None = flag(None, "learning rate, instead of --blr", Role.RECIPE)
    min_lr: NonNegative = flag(
        0.0, f"lowest learning rate with --lr_schedule {', '.join(schedules_with('min_lr'))}", Role.RECIPE, named=False)


def derive_learning_rate(args: Flags, effective_batch: int) -> None:
    """Sets --lr by --blr, and the warm-up of few epochs, where the command line left them out."""
    if args.lr is None:
        args.lr = args.blr * effective_batch / 256
    if (schedule_of(args.lr_schedule).warms_up and "warmup_epochs" not in args.given
            and args.warmup_epochs >= args.epochs):
        args.warmup_epochs = args.epochs * WARMUP_FRACTION


def check_schedule(args: Any) -> None:
    """Raises ValueError, with the flag, for values that make no schedule. `args` is a LearningRate, or the parsed
    flags.
    """
    schedule = schedule_of(args.lr_schedule)
    if not args.epochs > 0:
        raise ValueError(f"--epochs {args.epochs} must be positive")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr {args.lr} (or --blr) must be positive and finite")
    if not 0 <= args.min_lr <= args.lr:
        raise ValueError(f"--min_lr {args.min_lr} must lie between 0 and the learning rate {args.lr:g}")
    if args.lr < schedule.lowest_lr:
        raise ValueError(f"--lr {args.lr:g} (or --blr) lies below {schedule.lowest_lr:g}, to which the "
                         f"{args.lr_schedule} schedule would rise")
    if schedule.warms_up and not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs} must lie at or above 0, and below --epochs "
                         f"{args.epochs}: leave it out, or give {args.epochs * WARMUP_FRACTION:g}")


def learning_rate(epoch: float, args: Any) -> float:
    """Returns the learning rate at a fractional epoch.

    `args` is a LearningRate, or the parsed flags, checked by `check_schedule`.
    """
    schedule = schedule_of(args.lr_schedule)
    warmup = args.warmup_epochs if schedule.warms_up else 0
    if epoch < warmup:
        return args.lr * epoch / warmup
    return schedule.formula(epoch - warmup, args.epochs - warmup, args.lr, args.min_lr)


def adjust_learning_rate(optimizer, epoch: float, args: Any) -> float:
    """Sets the optimizer's learning rate for a fractional epoch, and returns it. `args` is what `learning_rate` takes.
    """
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
