"""Goes on from a checkpoint: with the run's flags (`--resume RUN`), weights, optimizer, and place in the epoch."""

from pathlib import Path

import torch

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from lavin.weights.adapters import load_adapters, read_adapters
from util.runs import user_error_if_malformed
from util.training.epoch_record import EpochRecord
from util.training.recipe import EXECUTION_FLAGS, RESTATED_FLAGS


def take_flags_of_run(args) -> int:
    """Sets the flags that were not given to those of the run that --resume names, folder included. Returns the run's
    effective batch.

    Raises UserError where a given flag contradicts the run. Flags of where and how it is executed may differ.
    """
    named = Path(args.resume)
    if not named.exists():
        raise UserError(f"--resume: no checkpoint {named}: name a run's folder, or a checkpoint in it")
    folder = named if named.is_dir() else named.parent
    path = folder / "recipe.json"
    if not path.is_file():
        raise UserError(f"--resume {named}: {folder} has no recipe.json, so it is no run that train.py can go on with")
    with user_error_if_malformed(path):
        content = read_json(path)
        flags = {**content["flags"], "resume": args.resume, "overwrite": args.overwrite}
        effective_batch = int(content["recipe"]["effective_batch"])
    if "output_dir" in args.given and Path(args.output_dir).resolve() != folder.resolve():
        raise UserError(f"--output_dir {args.output_dir} contradicts --resume {named}: leave it out")
    flags["output_dir"] = str(folder)
    for name, value in flags.items():
        if name not in args.given:
            setattr(args, name, value)
        elif getattr(args, name) != value and name not in EXECUTION_FLAGS | RESTATED_FLAGS - {"blr"}:
            raise UserError(f"--{name} {getattr(args, name)} contradicts --resume {named}, trained with --{name} "
                            f"{value}: leave it out, or train another run")
    return effective_batch


def restore(model, optimizer, scaler, path: Path, examples_sha256: str) -> EpochRecord:
    """Loads a checkpoint; returns the record of the epoch to go on with. Raises UserError if it does not fit."""
    checkpoint = read_adapters(path)
    source = f"checkpoint {path}"
    if "optimizer" not in checkpoint:
        raise UserError(f"{source} holds adapters only: name one that train.py wrote")
    if checkpoint.get("examples") != examples_sha256:
        raise UserError(f"{source} was trained on other examples: the tokenizer, or the pictures that --skip_bad "
                        "leaves out, have changed since")
    load_adapters(model, checkpoint["model"], source)
    check_optimizer_state(checkpoint["optimizer"], optimizer, source)
    with user_error_if_malformed(path):
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if checkpoint["record"]:
            return EpochRecord(**checkpoint["record"])
        return EpochRecord(checkpoint["epoch"] + 1, checkpoint["skipped"])


def check_optimizer_state(state: dict, optimizer: torch.optim.Optimizer, source: str) -> None:
    """Raises UserError where it is not of this optimizer's parameters. The fused optimizer itself would read beyond
    tensors that are too small."""
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    try:
        groups = [len(group["params"]) for group in state["param_groups"]]
        moments = [[state["state"][i][name] for name in ("exp_avg", "exp_avg_sq")] for i in range(len(shapes))]
        fits = groups == [len(group["params"]) for group in optimizer.param_groups] and all(
            moment.shape == shape and moment.dtype == torch.float32
            for pair, shape in zip(moments, shapes, strict=True) for moment in pair)
    except (KeyError, TypeError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise UserError(f"{source} holds the state of another optimizer: name another checkpoint, or train afresh")
