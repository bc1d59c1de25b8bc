"""A run's recipe: everything that determines its result, on whatever machine and number of processes it runs.

Paths do not belong to it, but what they lead to does: checksums of the training problems, of their pictures, and of the
base's files. `refusal` in util/training/run_folder.py refuses a folder whose recipe has `differences` to the command's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from lavin.runtime.console import counted
from lavin.runtime.device import precision_name
from lavin.runtime.errors import UserError
from lavin.runtime.flags import Flags, flags_of
from lavin.runtime.schema import declared, read_validated
from util.fingerprint import FROZEN, FROZEN_SHA256, both_tell, fingerprints, is_comparable
from util.runs import RECIPE
from util.training.settings import EFFECTIVE_BATCH, GROUPS, Optimization, TrainSettings

TRAIN_FLAGS = flags_of(*GROUPS)
# entries of a recipe that are no flags, as a message calls them
INPUTS = {"data": "training data of --data_root", "pictures": "pictures of --data_root",
          **{name: f"files of {flag}" for name, flag in (FROZEN | FROZEN_SHA256).items()}}
DESCRIPTIONS = {EFFECTIVE_BATCH: "effective batch (--batch_size x --accum_iter x processes)", **INPUTS}


def make_recipe(settings: TrainSettings, dtype: torch.dtype, world: int, data) -> dict:
    """The recipe that recipe.json holds. data: the training data, with a `fingerprint` and `pictures_sha256`.

    Raises UserError, or OSError, for files that cannot be read.
    """
    recipe = {name: value for name, value in settings.flags.items() if TRAIN_FLAGS[name].belongs_to_recipe}
    return {**recipe, **settings.optimization.entries(world), "precision": precision_name(dtype),
            "data": data.fingerprint, "pictures": data.pictures_sha256,
            **fingerprints(settings.base)}


@declared
class RecipeFile(TypedDict):
    """The content of recipe.json, but for the flags of the command, which `take_flags_of_run` (resume.py) checks."""

    recipe: dict[str, Any]


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of the run in a folder. Raises UserError where recipe.json is missing or broken."""
    content: Any = read_validated(folder / RECIPE, RecipeFile, "name the folder of a run of train.py, which writes it",
                                  "put it back, or train again")
    return content["recipe"]


def differences(recipe: dict, other: dict) -> list[str]:
    """One line for each entry in which two recipes differ, which begins with the flag.

    The recipe of a version that lacked a flag has the flag's default; of files, what both recipes tell is compared.
    """
    lines = []
    defaults = {name: declared.default for name, declared in TRAIN_FLAGS.items() if declared.belongs_to_recipe}
    for name in sorted(recipe.keys() | other.keys()):
        value, other_value = ({**defaults, **entries}.get(name) for entries in (recipe, other))
        if value != other_value and is_comparable(name, recipe, other):
            lines.append(f"other {DESCRIPTIONS[name]}" if isinstance(value, str) and name in DESCRIPTIONS else
                         f"{DESCRIPTIONS.get(name, f'--{name}')} {value}, not {other_value}")
    return list(dict.fromkeys(lines))  # two checksums may tell of the same files


def other_inputs(record: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """One line for each of these entries of INPUTS that both records tell, and in which they differ."""
    known = [name for name in names if both_tell(name, record, other)]
    return differences({name: record[name] for name in known}, {name: other[name] for name in known})


def fit_effective_batch(args: Flags, effective_batch: int, world: int) -> None:
    """Sets --batch_size and --accum_iter, unless they were given, so that another number of processes makes the same
    steps.

    Raises UserError where it cannot.
    """
    sizes = [args.batch_size] if "batch_size" in args.given or args.loss_norm == "microbatch" else \
        range(args.batch_size, 0, -1)
    for size in sizes:
        if effective_batch % (size * world) == 0 and "accum_iter" not in args.given:
            args.batch_size, args.accum_iter = size, effective_batch // (size * world)
            return
    if Optimization.of(args).effective_batch(world) != effective_batch:
        raise UserError(f"--resume {args.resume}: {counted(world, 'process')} cannot make its effective batch "
                        f"{effective_batch} of --batch_size {args.batch_size}: start another number of processes")
