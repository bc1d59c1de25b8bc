"""The methods that have a name: scripts/methods.json is the one place where they are listed.

- The first method is the base; the others follow in the order of tables and figures.
- The file holds the flags in which a method differs from the base, which has the defaults of train.py, and those that
  the base does not use. All flags are in the method's script, scripts/finetuning_sqa_7b_KEY.sh, where users edit them.
- A method that changes nothing but the schedule needs no name: it has the schedule's (`util/lr_sched.py`).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.schema import NonBlankText, PlainName, read_validated, strictly_declared
from util.lr_sched import SCHEDULES
from util.training.recipe import TRAIN_FLAGS

METHODS = Path(__file__).parents[2] / "scripts" / "methods.json"
FIX = "correct it, or fetch it again"
# the flags that tables put into words; a method has their defaults where it does not list them
WORDED = ("lr_schedule", "min_lr", "dropout_prob", "dropout_var", "dropout_lim")


@strictly_declared
class Entry(TypedDict):
    flags: dict[NonBlankText, str | int | float]
    name: NotRequired[NonBlankText]


@dataclass(frozen=True)
class NamedMethod:
    """A method of the file. key: as in the name of its script. name: in tables and figures."""

    key: str
    name: str
    flags: dict[str, Any]

    def fits(self, flags: dict[str, Any]) -> bool:
        """Whether a run with these flags is one of this method."""
        defaults = {flag: TRAIN_FLAGS[flag].default for flag in WORDED}
        return all(flags.get(flag, defaults.get(flag)) == value for flag, value in {**defaults, **self.flags}.items())


@cache
def named_methods() -> tuple[NamedMethod, ...]:
    return read_methods(METHODS)


def method_names() -> list[str]:
    """The names of all methods, in the order of tables and figures."""
    return [method.name for method in named_methods()]


def find_method(flags: dict[str, Any]) -> NamedMethod | None:
    """The method of a run; of two that fit, the one that says more."""
    fitting = [method for method in named_methods() if method.fits(flags)]
    return max(fitting, key=lambda method: len(method.flags), default=None)


def usual_min_lr(schedule: str) -> float:
    """The --min_lr of the first method with this schedule."""
    return next((method.flags["min_lr"] for method in named_methods()
                 if method.flags.get("lr_schedule") == schedule and "min_lr" in method.flags),
                TRAIN_FLAGS["min_lr"].default)


def read_methods(path: Path) -> tuple[NamedMethod, ...]:
    """Raises UserError, naming the file and the method, for one that train.py would refuse or that has no own name."""
    content: Any = read_validated(path, dict[PlainName, Entry], FIX, FIX)
    if not content or next(iter(content.values()))["flags"]:
        raise UserError(f"{path}: the first method is the base, and has no flags: {FIX}")
    methods: list[NamedMethod] = []
    for key, entry in content.items():
        check_flags(entry["flags"], f"{path}: {key}")
        name = entry.get("name") or schedule_name(entry["flags"])
        if name is None:
            raise UserError(f"{path}: {key} is not named, and does more than choose a schedule that is: give it a name")
        if name in [method.name for method in methods]:
            raise UserError(f"{path}: {key} has the name of another method, {name!r}: {FIX}")
        methods.append(NamedMethod(key, name, entry["flags"]))
    return tuple(methods)


def schedule_name(flags: dict[str, Any]) -> str | None:
    """The name of the schedule that these flags choose; None where they change anything else."""
    if "lr_schedule" in flags and flags.keys() <= {"lr_schedule", "min_lr"}:
        return SCHEDULES[flags["lr_schedule"]].display_name
    return None


def check_flags(flags: dict[str, Any], source: str) -> None:
    for flag, value in flags.items():
        if flag not in TRAIN_FLAGS:
            raise UserError(f"{source}: --{flag} is no flag of train.py: {FIX}")
        if not TRAIN_FLAGS[flag].accepts(value):
            raise UserError(f"{source}: --{flag} cannot be {value!r}: {FIX}")
