"""Goes on from a checkpoint: with the run's flags (`--resume RUN`), weights, optimizer, and place in the epoch."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.flags import Flag, Flags, Parser, Role, check_flags
from lavin.runtime.schema import declared, read_validated
from lavin.weights.adapters import load_adapters
from util.runs import RECIPE, checkpoints
from util.training.epoch_record import EpochRecord
from util.training.run_folder import Checkpoint
from util.training.settings import get_args_parser


@declared
class Recipe(TypedDict):
    effective_batch: Annotated[int, Field(ge=1, le=2**40)]


class RecipeFile(TypedDict):
    """The content of recipe.json. The flags are checked by train.py's parser."""

    recipe: Recipe
    flags: dict[str, Any]


def may_differ(declared: Flag, flags: dict[str, Flag]) -> bool:
    """Whether a command that goes on with a run may give another value of a flag.

    It may where the flag changes no result, or where the recipe states it in another form, which is compared later.
    --blr is stated by another flag, --lr, which is taken from the run: another value would have no effect.
    """
    is_stated = declared.stated_as is not None and declared.stated_as not in flags
    return declared.role in (Role.EXECUTION, Role.RUN) or is_stated


def take_flags_of_run(args: Flags, parser: Parser) -> int:
    """Sets the flags that were not given to those of the run that --resume names, folder included. Returns the run's
    effective batch.

    Raises UserError where a given flag contradicts the run. Flags of where and how it is executed may differ.
    """
    named = Path(args.resume)
    if not named.exists():
        raise UserError(f"--resume: no checkpoint {named}: name a run's folder, or a checkpoint in it")
    folder = named if named.is_dir() else named.parent
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"--resume {named}: {folder} has no recipe.json, so it is no run that train.py can go on with")
    content: Any = read_validated(path, RecipeFile, fix="name another run")
    of_run = check_flags(content["flags"], parser.flags, str(path))
    flags = {name: value for name, value in of_run.items()
             if name in parser.flags and parser.flags[name].role is not Role.RUN}
    if "output_dir" in args.given and Path(args.output_dir).resolve() != folder.resolve():
        raise UserError(f"--output_dir {args.output_dir} contradicts --resume {named}: leave it out")
    args.output_dir = str(folder)
    for name, value in flags.items():
        if name not in args.given:
            setattr(args, name, value)
        elif getattr(args, name) != value and not may_differ(parser.flags[name], parser.flags):
            raise UserError(f"--{name} {getattr(args, name)} contradicts --resume {named}, trained with --{name} "
                            f"{value}: leave it out, or train another run")
    return content["recipe"]["effective_batch"]


def finished_run(words: list[str]) -> str:
    """The folder of the run that train.py writes with these words as its command line. Raises UserError where it is
    unfinished."""
    parser = get_args_parser()
    trained: Any = parser.parse_args(words)
    if trained.resume:
        take_flags_of_run(trained, parser)
    n_done = max(checkpoints(Path(trained.output_dir)), default=-1) + 1
    if n_done < trained.epochs:
        raise UserError(f"{trained.output_dir} is unfinished ({n_done} of {counted(trained.epochs, 'epoch')}): train "
                        "it first")
    return trained.output_dir


def restore(model, optimizer, scaler, checkpoint: Checkpoint, examples_sha256: str, any_joined: Callable[[], bool]
            ) -> EpochRecord:
    """Loads a checkpoint; returns the record of the epoch to go on with. Raises UserError if it does not fit.

    any_joined(): whether earlier versions would have joined tokens (`any_joined` of util/data/examples.py).
    """
    source, content = f"checkpoint {checkpoint.path}", checkpoint.content
    if not {"sha256", "optimizer", "examples"} <= content.keys():
        raise UserError(f"{source} is not as train.py writes it: name another")
    is_of_earlier_version = "tokenization" not in content
    if is_of_earlier_version and content.get("flags", {}).get("loss_norm") == "microbatch":
        raise UserError(f"{source} was trained by an earlier version with --loss_norm microbatch, whose micro-batches "
                        "were other samples, so it cannot go on here: train it anew with --overwrite, or into another "
                        "--output_dir")
    if content["examples"] != examples_sha256:
        if is_of_earlier_version and any_joined():
            raise UserError(f"{source} was trained by an earlier version, which tokenized prompt and answer together: "
                            "with this tokenizer its examples had other ids, so it cannot go on here: train it anew "
                            "with --overwrite, or into another --output_dir")
        raise UserError(f"{source} was trained on other examples: the tokenizer, or the pictures that --skip_bad "
                        "leaves out, have changed since")
    load_adapters(model, content["model"], source)
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    if content["record"]:
        return EpochRecord(**content["record"])
    return EpochRecord(content["epoch"] + 1, content["skipped"])
