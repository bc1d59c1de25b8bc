"""Methods and their names: which runs are one method, and scripts/methods.json, which lists the methods with a name.

Runs are of one method where their flags give them the same name (`method_name`). It tells the schedule and the dropout
in words, and every other flag that is declared as `named` (lavin/runtime/flags.py), but neither the seed nor where data
and weights lie. Runs that were trained on other data are still of one method, and get a note (`comparison.py`).

- The first method is the base; the others follow in the order of tables and figures.
- The file holds the flags in which a method differs from the base, which has the defaults of train.py, and those that
  the base does not use. All flags are in the method's script, scripts/finetuning_sqa_7b_KEY.sh, where users edit them.
- A method that changes nothing but the schedule needs no name: it has the schedule's (`util/lr_sched.py`).
"""

import re
from dataclasses import dataclass
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from lavin.runtime.console import listed
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from lavin.runtime.flags import shown
from lavin.runtime.schema import NonBlankText, PlainName, read_validated, strictly_declared
from util.comparison.finished_runs import Run
from util.lr_sched import SCHEDULES, Schedule
from util.training.recipe import TRAIN_FLAGS

METHODS = Path(__file__).parents[2] / "scripts" / "methods.json"
FIX = "correct it, or fetch it again"
PUBLISHED = Path(__file__).parents[2] / "assets" / "published.json"
MEND = "it belongs to this code: fetch it again"
FOLDER_OF_BASE = re.compile(r"LaVIN-.+-base(-seed\d+)?")  # of the base's script, alone or by run_all_variants.sh
# the flags that tables put into words; a method has their defaults where it does not list them
WORDED = ("lr_schedule", "min_lr", "dropout_prob", "dropout_var", "dropout_lim")
# of the base's flags, those that a run must have to be taken for the base
BASE_FLAGS = {flag: TRAIN_FLAGS[flag].default for flag in ("lr_schedule", "dropout_var")}
BASE_IN_WORDS = ", ".join(f"--{flag} {shown(value)}" for flag, value in BASE_FLAGS.items())


@strictly_declared
class Entry(TypedDict):
    flags: dict[NonBlankText, str | int | float]
    name: NotRequired[NonBlankText]


@dataclass(frozen=True)
class NamedMethod:
    """A method of the file. `key` is part of its script's name, and `name` stands in tables and figures."""

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


def may_be_base(flags: dict[str, Any]) -> bool:
    return all(flags[flag] == value for flag, value in BASE_FLAGS.items())


def usual_min_lr(schedule: str) -> float:
    """The --min_lr of the first method with this schedule."""
    return next((method.flags["min_lr"] for method in named_methods()
                 if method.flags.get("lr_schedule") == schedule and "min_lr" in method.flags),
                TRAIN_FLAGS["min_lr"].default)


def method_name(flags: dict, reference: dict) -> str:
    """The name of a run's method, such as `Inc. Drop. Prob V2 + lr 0.002`: runs with one name are seeds of one method.

    It begins with the method of the file whose flags the run has or, where there is none, with its schedule and its
    dropout in words. All other flags follow in which the run differs from the reference, the flags of the base.
    """
    unknown = Schedule(formula=lambda *_: 0.0, display_name=flags["lr_schedule"])  # of a later version
    schedule = SCHEDULES.get(flags["lr_schedule"], unknown)
    named = find_method(flags)
    parts = [named.name] if named else words_for(flags, schedule)
    stated = {*named.flags} if named else set()
    if not schedule.warms_up:
        stated.add("warmup_epochs")  # the flag changes nothing
    parts += [f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}" for flag, value in flags.items()
              if is_named(flag) and flag not in stated and value != reference.get(flag, value)]
    return " + ".join(parts)


def words_for(flags: dict, schedule: Schedule) -> list[str]:
    """The schedule, the dropout and the lowest rate, as far as they are not the base's."""
    parts = list(filter(None, [schedule.display_name, dropout_name(flags)])) or [method_names()[0]]
    if "min_lr" in schedule.uses and flags["min_lr"] != usual_min_lr(flags["lr_schedule"]):
        parts.append(f"min_lr {flags['min_lr']:g}")
    return parts


def is_named(flag: str) -> bool:
    """Whether a method's name mentions a flag in which it differs. Entries that are no flags here are mentioned."""
    return flag not in TRAIN_FLAGS or TRAIN_FLAGS[flag].named


def dropout_name(flags: dict) -> str | None:
    """The name of the method that changes only the dropout, or the numbers; None: the base's dropout."""
    prob, var, lim = flags["dropout_prob"], flags["dropout_var"], flags["dropout_lim"]
    if var == 1:
        return None if prob == TRAIN_FLAGS["dropout_prob"].default else f"dropout {prob:g}"
    named = find_method({"dropout_prob": prob, "dropout_var": var, "dropout_lim": lim})
    return named.name if named else f"{'Inc.' if var > 1 else 'Dec.'} Drop. Prob {prob:g} x {var:g} to {lim:g}"


# --- Runs ---

def find_base(runs: list[Run], path: str | None) -> Run | None:
    """The run at `path`; without a path, the one with the base's schedule, and its dropout over the layers.

    Where there are several, the base is of the base method, and has the published recipe where they differ; or else it
    lies where the base's script writes. What differs from it is a variant.
    """
    if path is not None:
        for run in runs:
            if Path(run.folder).resolve() == Path(path).resolve():
                return run
        raise UserError(f"--base {path} is none of the runs: name one of them")
    candidates = [run for run in runs if may_be_base(run.flags)]
    candidates = [run for run in candidates if find_method(run.flags) == named_methods()[0]] or candidates
    candidates = published_where_they_differ(candidates) or candidates
    candidates = [run for run in candidates if FOLDER_OF_BASE.fullmatch(Path(run.folder).name)] or candidates
    names = {method_name(run.flags, candidates[0].flags): run.folder for run in candidates}
    if len(names) > 1:
        raise UserError(f"the base may be {listed((f'{folder} ({name})' for name, folder in names.items()), 'or')}: "
                        "choose with --base")
    return candidates[0] if candidates else None


def published_where_they_differ(runs: list[Run]) -> list[Run]:
    """The runs that have the published value of each flag in which the runs differ."""
    differing = [flag for flag in {flag: None for run in runs for flag in run.flags} if is_named(flag)
                 and any(run.flags.get(flag) != runs[0].flags.get(flag) for run in runs)]
    return [run for run in runs if all(is_close(run.flags.get(flag), published_value(flag, run)) for flag in differing)]


def published_value(flag: str, run: Run) -> Any:
    """The value of a flag in the published recipe for the run's base model; that of train.py where it says nothing."""
    if flag == "temperature" and "13B" in str(run.flags.get("llm_model")):
        return 5
    default = TRAIN_FLAGS[flag].default if flag in TRAIN_FLAGS else None
    return read_json(PUBLISHED, MEND)["flags"].get(flag, default)


def is_close(value: Any, other: Any) -> bool:
    """Whether two values of a flag are equal, up to rounding: the rate is computed from --blr."""
    return value == other or (isinstance(value, float) and isinstance(other, float) and isclose(value, other))


def group_by_method(runs: list[Run], base: Run | None) -> tuple[dict[str, list[Run]], list[str]]:
    """The runs of each method by its name, one run per seed, and a line on each run that has another one's flags and
    seed.

    The base comes first, then the order of scripts/methods.json.
    """
    runs_by_seed: dict[str, dict] = {}  # by method name
    duplicates = []
    reference = (base or runs[0]).flags
    for run in runs:
        first = runs_by_seed.setdefault(method_name(run.flags, reference), {}).setdefault(run.flags.get("seed"), run)
        if first is not run:
            duplicates.append(f"{run.folder}: has the flags and the seed of {first.folder}")
    base_name = base and method_name(base.flags, reference)
    names = sorted(runs_by_seed, key=lambda name: (name != base_name, [*method_names(), name].index(name)))
    return {name: list(runs_by_seed[name].values()) for name in names}, duplicates


# --- scripts/methods.json ---

def read_methods(path: Path) -> tuple[NamedMethod, ...]:
    """Reads the methods. Raises UserError, with file and method, for one that train.py would refuse or that has no own
    name.
    """
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
