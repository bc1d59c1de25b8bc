"""Resuming a training run from its checkpoint."""

from pathlib import Path

from lavin.runtime.console import print_rank0
from lavin.runtime.errors import UserError
from lavin.weights.adapters import load_adapters, read_adapters


def resume_training(model, optimizer, scaler, path: Path, args) -> int:
    """Loads adapters, optimizer and gradient scaler from a checkpoint; returns the next epoch."""
    checkpoint = read_adapters(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"--resume {path}: it holds adapters only; name a checkpoint-*.pth that train.py wrote")
    for name, value in checkpoint["adapter_config"].items():
        if getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)} contradicts --resume {path}, trained with --{name} "
                            f"{value}: give that, or start afresh")
    load_adapters(model, checkpoint["model"], f"--resume {path}")
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    if checkpoint["epoch"] + 1 >= args.epochs:
        print_rank0(f"{path} is of epoch {checkpoint['epoch']}, the last of --epochs {args.epochs}: "
                    "nothing is left to do")
    return checkpoint["epoch"] + 1
