"""Goes on from a checkpoint: with the run's flags (`--resume RUN`), weights, optimizer, and place in the epoch."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.schema import declared, read_validated
from lavin.weights.adapters import load_adapters, read_adapters
from util.flags import Parser
from util.training.epoch_record import EpochRecord
from util.training.recipe import EXECUTION_FLAGS, RESTATED_FLAGS


@declared
class Recipe(TypedDict):
    effective_batch: Annotated[int, Field(ge=1, le=2**40)]


class RecipeFile(TypedDict):
    """recipe.json. The flags are checked by train.py's parser."""

    recipe: Recipe
    flags: dict[str, Any]


def take_flags_of_run(args, parser: Parser) -> int:
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
    content: Any = read_validated(path, RecipeFile, fix="name another run")
    flags = {**parser.check(content["flags"], str(path)), "resume": args.resume, "overwrite": args.overwrite,
             "stop_after_epoch": args.stop_after_epoch}
    if "output_dir" in args.given and Path(args.output_dir).resolve() != folder.resolve():
        raise UserError(f"--output_dir {args.output_dir} contradicts --resume {named}: leave it out")
    flags["output_dir"] = str(folder)
    for name, value in flags.items():
        if name not in args.given:
            setattr(args, name, value)
        elif getattr(args, name) != value and name not in EXECUTION_FLAGS | RESTATED_FLAGS - {"blr"}:
            raise UserError(f"--{name} {getattr(args, name)} contradicts --resume {named}, trained with --{name} "
                            f"{value}: leave it out, or train another run")
    return content["recipe"]["effective_batch"]


def restore(model, optimizer, scaler, path: Path, examples_sha256: str) -> EpochRecord:
    """Loads a checkpoint; returns the record of the epoch to go on with. Raises UserError if it does not fit."""
    checkpoint = read_adapters(path)
    source = f"checkpoint {path}"
    if not {"sha256", "optimizer", "examples"} <= checkpoint.keys():
        raise UserError(f"{source} is not as train.py writes it: name another")
    if checkpoint.get("examples") != examples_sha256:
        raise UserError(f"{source} was trained on other examples: the tokenizer, or the pictures that --skip_bad "
                        "leaves out, have changed since")
    load_adapters(model, checkpoint["model"], source)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    if checkpoint["record"]:
        return EpochRecord(**checkpoint["record"])
    return EpochRecord(checkpoint["epoch"] + 1, checkpoint["skipped"])
