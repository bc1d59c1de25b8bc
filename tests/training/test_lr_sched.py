"""The four learning-rate schedules: their formulas and edge cases."""

import argparse
import math

import pytest
import torch

import train
from util.lr_sched import SCHEDULES, adjust_learning_rate, check_schedule, derive_learning_rate, learning_rate


def flags(schedule, **changes):
    return argparse.Namespace(**{"lr_schedule": schedule, "lr": 0.1, "min_lr": 0.01, "epochs": 20, "warmup_epochs": 2.0,
                                 **changes})


@pytest.mark.parametrize("schedule", ["cosine", "step", "exponential"])
def test_warmup_rises_from_zero(schedule):
    for epoch, expected in [(0, 0), (0.5, 0.025), (1, 0.05), (1.999, 0.09995), (2, 0.1)]:
        assert learning_rate(epoch, flags(schedule)) == pytest.approx(expected)
    assert learning_rate(0, flags(schedule, warmup_epochs=0)) == pytest.approx(0.1)


def test_cosine():
    for epoch, expected in [(11, 0.055), (20, 0.01), (6.5, 0.01 + 0.09 * (1 + math.sqrt(0.5)) / 2)]:
        assert learning_rate(epoch, flags("cosine")) == pytest.approx(expected)


def test_step():
    """Multiplied by 0.65 every two epochs after the warmup; ignores min_lr."""
    for epoch, expected in [(3.99, 0.1), (4, 0.065), (5.99, 0.065), (6, 0.04225), (19.99, 0.1 * 0.65**8),
                            (20, 0.1 * 0.65**9)]:
        assert learning_rate(epoch, flags("step")) == pytest.approx(expected)


def test_exponential():
    """Decays exponentially from lr to 1e-5."""
    for epoch, expected in [(11, math.sqrt(0.1 * 1e-5)), (20, 1e-5), (6.5, 0.1 * 1e-4**0.25)]:
        assert learning_rate(epoch, flags("exponential")) == pytest.approx(expected)


def test_cyclical():
    """triangular2 without warmup: half cycles of E/5 = 4 epochs, peaks at 4, 12 and 20, each half the previous one."""
    for epoch, expected in [(0, 0.01), (1, 0.01 + 0.09 / 4), (4, 0.1), (6, 0.055), (8, 0.01), (12, 0.055), (10, 0.0325),
                            (16, 0.01), (20, 0.01 + 0.09 / 4), (18, 0.01 + 0.09 / 8)]:
        assert learning_rate(epoch, flags("cyclical")) == pytest.approx(expected)


def test_adjust_learning_rate_sets_every_group_and_returns_the_rate():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}], lr=9.0)
    assert adjust_learning_rate(optimizer, 11, flags("cosine")) == pytest.approx(0.055)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.055, 0.055])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("flag, value", [
    ("epochs", 0), ("epochs", -1), ("lr", 0.0), ("lr", -0.1), ("lr", math.inf), ("lr", math.nan), ("min_lr", -1e-3),
    ("min_lr", 0.2), ("min_lr", math.nan)])
def test_invalid_schedules(schedule, flag, value):
    with pytest.raises(ValueError, match=f"--{flag}"):
        check_schedule(flags(schedule, **{flag: value}))


@pytest.mark.parametrize("command, warmup", [
    ("--epochs 1", 0.1), ("--epochs 2", 0.2), ("--epochs 3", 2), ("--epochs 20", 2), ("", 2),
    ("--epochs 5 --warmup_epochs 1", 1), ("--epochs 2 --warmup_epochs 0", 0), ("--epochs 1 --lr_schedule cyclical", 2)])
def test_a_warmup_that_was_left_out_fits_the_epochs(command, warmup):
    """A tenth, as of the published 20, where the default would leave no epoch behind it."""
    args = train.get_args_parser().parse_args(["--lr", "0.1", *command.split()])
    derive_learning_rate(args, 32)
    check_schedule(args)
    assert args.warmup_epochs == warmup
    if args.lr_schedule == "cosine" and warmup:
        assert learning_rate(warmup, args) == pytest.approx(0.1) and learning_rate(args.epochs, args) < 1e-9


def test_a_warmup_that_was_given_and_does_not_fit_is_refused_with_one_that_does():
    args = train.get_args_parser().parse_args(["--lr", "0.1", "--epochs", "1", "--warmup_epochs", "2"])
    derive_learning_rate(args, 32)
    with pytest.raises(ValueError, match=r"--warmup_epochs 2.0 .* --epochs 1: leave it out, or give 0.1"):
        check_schedule(args)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [-1.0, 20.0, 21.0, math.nan])
def test_invalid_warmup(schedule, warmup):
    if schedule == "cyclical":  # has no warmup
        check_schedule(flags(schedule, warmup_epochs=warmup))
    else:
        with pytest.raises(ValueError, match="--warmup_epochs"):
            check_schedule(flags(schedule, warmup_epochs=warmup))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_exponential_schedule_that_would_rise_is_refused(schedule):
    check_schedule(flags(schedule, lr=1e-5, min_lr=0))
    if schedule == "exponential":
        with pytest.raises(ValueError, match="--lr 5e-06"):
            check_schedule(flags(schedule, lr=5e-6, min_lr=0))
    else:
        check_schedule(flags(schedule, lr=5e-6, min_lr=0))


def test_unknown_schedule():
    for function in (check_schedule, lambda args: learning_rate(5, args)):
        with pytest.raises(ValueError, match="--lr_schedule"):
            function(flags("linear"))


def test_learning_rate_of_the_published_runs():
    """The defaults of the 7B command: lr = blr * effective batch size / 256."""
    args = train.get_args_parser().parse_args([])
    assert (args.blr, args.epochs, args.warmup_epochs, args.min_lr, args.lr_schedule) == (9e-3, 20, 2, 0, "cosine")
    args.lr = args.blr * 32 / 256
    check_schedule(args)
    rate = learning_rate(3 + 400 / 1591, args)
    assert rate == pytest.approx(1.125e-3 * (1 + math.cos(math.pi * (1 + 400 / 1591) / 18)) / 2)
