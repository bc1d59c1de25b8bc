"""Steps that are not finite: which of them end training, and what fp16's loss scale does to gradients and resumes."""

import math

import pytest
import torch

import train
from lavin.model import LaVIN
from lavin.runtime import signals
from tiny_runs import load_checkpoint, read_log, run_flags
from user_errors import error_message
from util.runs import LAST
from util.training.optimizer import optimizer_step

EPOCHS = 3  # of twelve steps of one sample


def run(base, scienceqa, folder, *flags) -> None:
    train.main(train.get_args_parser().parse_args(run_flags(
        base, scienceqa, folder, "--batch_size", "1", "--epochs", str(EPOCHS), *map(str, flags))))


def break_steps(monkeypatch, broken: set[int], stop_at: int | None = None) -> None:
    """The losses of these steps, counted from 1 since the process began, are NaN; a stop signal comes in `stop_at`."""
    made, forward = [], LaVIN.forward

    def nan_at_times(model, batch):
        made.append(1)
        if len(made) == stop_at:
            monkeypatch.setattr(signals, "requested", "SIGTERM")
        return forward(model, batch) * (math.nan if len(made) in broken else 1)
    monkeypatch.setattr(LaVIN, "forward", nan_at_times)


def test_a_good_step_ends_a_row_of_skipped_ones(base, scienceqa, tmp_path, monkeypatch):
    """Nine, one good step, nine: in different epochs, too."""
    break_steps(monkeypatch, {*range(1, 10), *range(11, 20), *range(21, 30)})
    run(base, scienceqa, tmp_path)
    assert [entry["skipped_steps"] for entry in read_log(tmp_path)] == [11, 11, 5]


@pytest.mark.parametrize("stop_at", [4, 12])
def test_a_row_of_skipped_steps_goes_on_after_a_resume(base, scienceqa, tmp_path, monkeypatch, stop_at):
    """Stopped in the middle of an epoch, and at its end: the row is ten steps long, whoever made its steps."""
    first = stop_at - 2  # all processes learn of a stop a step later, so four broken steps come before it
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        break_steps(patched, set(range(first, first + 9)), stop_at)
        run(base, scienceqa, tmp_path, "--lr", "1e-3")
    done = len(read_log(tmp_path)) * 12 if (tmp_path / "log.txt").exists() else 0
    if (tmp_path / LAST).exists():
        record = load_checkpoint(tmp_path / LAST)["record"]
        done = record["epoch"] * 12 + len(record["steps"])
    in_a_row = done - first + 1
    assert 3 <= in_a_row <= 5
    with monkeypatch.context() as patched:
        break_steps(patched, set(range(1, 11)))
        message = error_message(run, base, scienceqa, tmp_path, "--lr", "1e-3")
    assert "10 steps in a row" in message
    epoch, step = divmod(first + 9 - 1, 12)
    assert f"epoch {epoch}, step {step + 1} " in message  # the tenth of the row, not of this process


# --- fp16 ---

@pytest.mark.parametrize("clip_grad, expected", [(None, 5.0), (0.5, 0.5)])
def test_gradients_are_clipped_after_the_loss_scale_is_taken_out(clip_grad, expected):
    """A gradient of norm 5, whatever the scale: its norm is reported, and clipped, without the scale."""
    for scale in (1.0, 1024.0):
        p = torch.nn.Parameter(torch.zeros(2))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
        _, stepped, norm, _ = optimizer_step(torch.optim.SGD([p], lr=1.0), scaler, [p], torch.tensor(1.0), clip_grad)
        assert stepped and norm.item() == pytest.approx(5)
        assert p.norm().item() == pytest.approx(expected, rel=1e-5)


def fp16_run(base, scienceqa, folder, *flags) -> dict:
    run(base, scienceqa, folder, "--precision", "fp16", "--lr", "1e-3", *flags)
    return load_checkpoint(folder / f"checkpoint-{EPOCHS - 1}.pth")


def test_the_loss_scale_goes_on_after_a_stop(base, scienceqa, tmp_path, monkeypatch):
    """An overflow halves it, and steps without one are counted until it doubles: as in a run that was not stopped."""
    with monkeypatch.context() as patched:
        break_steps(patched, {2})
        unbroken = fp16_run(base, scienceqa, tmp_path / "unbroken")
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        break_steps(patched, {2}, stop_at=15)
        fp16_run(base, scienceqa, tmp_path / "stopped")
    assert (tmp_path / "stopped" / LAST).exists()
    stopped = fp16_run(base, scienceqa, tmp_path / "stopped")
    assert stopped["scaler"] == unbroken["scaler"]
    assert (stopped["scaler"]["scale"], stopped["scaler"]["_growth_tracker"]) == (512.0, 34)  # of 36 steps
    assert all(torch.equal(tensor, stopped["model"][name]) for name, tensor in unbroken["model"].items())
