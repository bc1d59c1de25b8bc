"""Learning-rate schedules as functions of the fractional epoch.

cosine: Loshchilov & Hutter 2017, arXiv 1608.03983; cyclical: triangular2 of Smith 2017, arXiv 1506.01186.
"""

import math

SCHEDULES = ("cosine", "cyclical", "step", "exponential")
STEP_FACTOR, STEP_EPOCHS = 0.65, 2
EXPONENTIAL_END = 1e-5  # learning rate at the last epoch
CYCLE_FRACTION = 1 / 5  # length of half a cycle, as a fraction of all epochs
WARMUP_FRACTION = 1 / 10  # published: 2 of 20 epochs


def fit_warmup(args) -> None:
    """Shortens the default warm-up where it would take all epochs. args: also given, the flags of the command line."""
    if args.lr_schedule != "cyclical" and "warmup_epochs" not in args.given and args.warmup_epochs >= args.epochs:
        args.warmup_epochs = args.epochs * WARMUP_FRACTION


def check_schedule(args) -> None:
    """Raises ValueError, naming the flag, for invalid values."""
    if args.lr_schedule not in SCHEDULES:
        raise ValueError(f"--lr_schedule {args.lr_schedule}: choose one of {', '.join(SCHEDULES)}")
    if not args.epochs > 0:
        raise ValueError(f"--epochs {args.epochs} must be positive")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise ValueError(f"--lr {args.lr} (or --blr) must be positive and finite")
    if not 0 <= args.min_lr <= args.lr:
        raise ValueError(f"--min_lr {args.min_lr} must lie between 0 and the learning rate {args.lr:g}")
    if args.lr_schedule == "exponential" and args.lr < EXPONENTIAL_END:
        raise ValueError(f"--lr {args.lr:g} (or --blr) lies below {EXPONENTIAL_END:g}, to which the exponential "
                         "schedule would rise")
    if args.lr_schedule != "cyclical" and not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs} must lie at or above 0, and below --epochs "
                         f"{args.epochs}: leave it out, or give {args.epochs * WARMUP_FRACTION:g}")


def learning_rate(epoch: float, args) -> float:
    """The learning rate at fractional `epoch`. args: lr, min_lr, epochs, warmup_epochs, lr_schedule."""
    if args.lr_schedule == "cyclical":
        half = args.epochs * CYCLE_FRACTION
        cycle = math.floor(1 + epoch / (2 * half))
        x = abs(epoch / half - 2 * cycle + 1)
        return args.min_lr + (args.lr - args.min_lr) * max(0.0, 1 - x) / 2 ** (cycle - 1)
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    decay_epoch = epoch - args.warmup_epochs
    progress = decay_epoch / (args.epochs - args.warmup_epochs)
    if args.lr_schedule == "cosine":
        return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    if args.lr_schedule == "step":
        return args.lr * STEP_FACTOR ** math.floor(decay_epoch / STEP_EPOCHS)
    if args.lr_schedule == "exponential":
        return args.lr * (EXPONENTIAL_END / args.lr) ** progress
    raise ValueError(f"--lr_schedule {args.lr_schedule}: choose one of {', '.join(SCHEDULES)}")


def adjust_learning_rate(optimizer, epoch: float, args) -> float:
    """Sets the optimizer's learning rate for fractional `epoch`, and returns it."""
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
