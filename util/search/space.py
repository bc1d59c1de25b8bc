"""The space of a search is a JSON file with flags of train.py, their ranges, and the flag sets that are tried first.

- A parameter may depend on others: `when` names the values of earlier flags with which it is searched at all, and a
  bound may be the value of an earlier flag. A parameter with such a bound is sampled by its place between its bounds,
  from 0 to 1, so that its distribution is always the same and no suggestion breaks the bound.
- `"when": {"lr_schedule": "uses it"}` names the schedules that use the flag, as `util/lr_sched.py` says.
- `flag` is the parameter's name unless it is given: two parameters may set one flag under different conditions.
- A categorical parameter without `choices` has all those of its flag.
- A set of `enqueue` names the flags that differ from the parameters' defaults; a method's key in scripts/methods.json
  stands for the method's flags. The first set is the base, which the winner is compared to. In place of a list,
  "methods" stands for all methods of that file that lie in the space.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WrapValidator
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.flags import CHANGES_RESULTS
from lavin.runtime.schema import NonBlankText, read_validated, strictly_declared
from util.comparison.methods import METHODS, named_methods
from util.lr_sched import schedules_with
from util.training.recipe import TRAIN_FLAGS

DIGITS = 4  # a sampled number has so many significant digits
FIX = "correct it, or leave --space out"
USES_IT, ALL_METHODS = "uses it", "methods"  # these words stand for lists in a file

Value = str | int | float
Values = dict[str, Any]  # by flag


def schedules(value: Any, check: Callable[[Any], Any]) -> Any:
    """Checks the values of a condition, but lets the words for a list of schedules pass."""
    return value if value == USES_IT else check(value)


def flag_sets(value: Any, check: Callable[[Any], Any]) -> Any:
    """Checks the sets that are tried first, with the flags of methods in place of their keys."""
    if value == ALL_METHODS:
        return value
    methods = {method.key: method.flags for method in named_methods()}
    keys = [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []
    unknown = [key for key in keys if key not in methods]
    if unknown:
        raise ValueError(f"{unknown[0]} is no method of scripts/{METHODS.name}")
    return check([methods[entry] if isinstance(entry, str) else entry for entry in value] if keys else value)


@strictly_declared
class Parameter(TypedDict):
    """An entry of a space file. `low` and `high` are numbers, or the name of an earlier flag."""

    kind: Literal["float", "int", "categorical"]
    default: Value
    flag: NotRequired[NonBlankText]
    low: NotRequired[float | int | str]
    high: NotRequired[float | int | str]
    log: NotRequired[bool]
    choices: NotRequired[Annotated[list[Value], Field(min_length=1)]]
    when: NotRequired[dict[str, Annotated[list[Value], Field(min_length=1), WrapValidator(schedules)]]]


@strictly_declared
class SpaceFile(TypedDict):
    """The content of a space file."""

    parameters: Annotated[dict[NonBlankText, Parameter], Field(min_length=1)]
    enqueue: Annotated[list[dict[str, Value]], Field(min_length=1), WrapValidator(flag_sets)]


@dataclass(frozen=True)
class Space:
    """The parameters that are searched, by their names, and the flag sets that are tried first.

    `fixed` has the values of flags that are not searched, on which conditions and bounds may depend. `source` is the
    name of the file in messages.
    """

    parameters: dict[str, Any]  # of type Parameter, by name
    enqueue: list[Values]
    source: str
    fixed: Values = field(default_factory=dict)

    def fix(self, values: Values) -> "Space":
        """Returns the space without the parameters of these flags, and without the sets that need other values of these
        flags. Raises UserError if nothing is left to search."""
        kept = {name: p for name, p in self.parameters.items() if flag_of(name, p) not in values}
        if not kept:
            raise UserError(f"{self.source}: all of its flags are given after --, so nothing is left to search")
        fixed = replace(self, parameters=kept, fixed=values)
        sets = [changes for changes in self.enqueue if all(values.get(flag, v) == v for flag, v in changes.items())
                and fixed.is_possible(changes)]
        return replace(fixed, enqueue=sets or [{}])

    def is_possible(self, changes: Values) -> bool:
        """Returns whether a set with these changes of the defaults lies in the space."""
        try:
            self.complete(changes)
            return True
        except UserError:
            return False

    def walk(self, choose: Callable[[str, Any, Values], Any]) -> Values:
        """Returns a value for each flag whose parameter is active. `choose` gives it; its arguments are the parameter's
        name, the parameter, and the values of earlier flags."""
        values = dict(self.fixed)
        for name, parameter in self.parameters.items():
            if all(values.get(flag) in allowed for flag, allowed in parameter.get("when", {}).items()):
                values[flag_of(name, parameter)] = choose(name, parameter, values)
        return {flag: value for flag, value in values.items() if flag not in self.fixed}

    def suggest(self, trial) -> Values:
        """Returns the flags of an Optuna trial. They are the same each time."""
        return self.walk(lambda name, parameter, values: suggest(trial, name, parameter, values))

    def complete(self, changes: Values) -> Values:
        """Returns the defaults with the changes of some flags. Raises UserError if a change is not in the space."""
        def choose(name, parameter, values):
            flag = flag_of(name, parameter)
            if flag in changes and not contains(parameter, changes[flag], values):
                raise UserError(f"{self.source}: {flag} {changes[flag]} is not in the space: {FIX}")
            return changes[flag] if flag in changes else clip(parameter["default"], parameter, values)

        values = self.walk(choose)
        unused = [flag for flag in changes if flag not in values and flag not in self.fixed]
        if unused:
            raise UserError(f"{self.source}: {unused[0]} is set where it is not searched: {FIX}")
        return values

    def first_sets(self) -> list[Values]:
        """Returns the sets that are tried first, complete and without repeats."""
        sets = []
        for values in map(self.complete, self.enqueue):
            if values not in sets:
                sets.append(values)
        return sets

    def encode(self, values: Values) -> Values:
        """Returns values by flag as parameters by name, in the form in which Optuna stores them."""
        params = {}

        def choose(name, parameter, earlier):
            value = values[flag_of(name, parameter)]
            params[name] = place(value, parameter, earlier) if is_relative(parameter) else value
            return value

        self.walk(choose)
        return params

    def extremes(self) -> Iterator[tuple[str, Values]]:
        """Yields each parameter's name with flags that take one of its choices, or an end of its range, and that are
        the defaults otherwise."""
        for name, parameter in self.parameters.items():
            conditions = {flag: allowed[0] for flag, allowed in parameter.get("when", {}).items()}
            for end in parameter.get("choices", (0, 1)):
                def choose(other, p, values, name=name, conditions=conditions, end=end):
                    if other == name:
                        return end if p["kind"] == "categorical" else bounds(p, values)[end]
                    return conditions.get(flag_of(other, p), clip(p["default"], p, values))
                yield name, self.walk(choose)

    def check(self, check_flags: Callable[[Values], object]) -> None:
        """Raises UserError if train.py refuses an end of a range, or a choice. `check_flags` raises it for flags."""
        for name, values in self.extremes():
            try:
                check_flags(values)
            except UserError as error:
                value = values.get(flag_of(name, self.parameters[name]))
                raise UserError(f"{self.source}: {name} {value}: {error}") from error


def read_space(path: str | Path) -> Space:
    """Returns the space that a file declares. Raises UserError if the file is missing or broken."""
    content: Any = read_validated(path, SpaceFile, "name it with --space", FIX)
    parameters = {name: fill_in(name, parameter, str(path)) for name, parameter in content["parameters"].items()}
    for name, parameter in parameters.items():
        check_parameter(parameter, f"{path}: {name}")
    space = Space(parameters, [{}], str(path))
    check_references(space)
    space = replace(space, enqueue=sets_to_try(content["enqueue"], space))
    space.first_sets()
    return space


def sets_to_try(enqueue: Any, space: Space) -> list[Values]:
    """Returns the sets of `enqueue`, or all methods that lie in the space. Raises UserError if a flag is none of
    train.py."""
    if enqueue == ALL_METHODS:
        return [method.flags for method in named_methods() if space.is_possible(method.flags)]
    unknown = {flag for values in enqueue for flag in values} - TRAIN_FLAGS.keys()
    if unknown:
        raise UserError(f"{space.source}: enqueue: --{min(unknown)} is no flag of train.py: {FIX}")
    return enqueue


def fill_in(name: str, parameter: Any, source: str) -> Any:
    """Returns the parameter, to which the choices of its flag and the schedules that use the flag are added."""
    flag = flag_of(name, parameter)
    filled = dict(parameter)
    if parameter["kind"] == "categorical" and flag in TRAIN_FLAGS and TRAIN_FLAGS[flag].choices:
        filled.setdefault("choices", list(TRAIN_FLAGS[flag].choices or ()))
    if "when" in parameter:
        filled["when"] = {other: schedules_with(flag) if (other, allowed) == ("lr_schedule", USES_IT) else allowed
                          for other, allowed in parameter["when"].items()}
        if not all(isinstance(allowed, list) and allowed for allowed in filled["when"].values()):
            raise UserError(f'{source}: {name} has a "{USES_IT}" that no schedule fulfils: {FIX}')
    return filled


# --- One parameter ---

def flag_of(name: str, parameter: Any) -> str:
    return parameter.get("flag", name)


def is_relative(parameter: Any) -> bool:
    """Returns whether a bound is another flag's value."""
    return any(isinstance(parameter.get(bound), str) for bound in ("low", "high"))


def bounds(parameter: Any, values: Values) -> tuple[Any, Any]:
    low, high = (values[bound] if isinstance(bound, str) else bound for bound in (parameter["low"], parameter["high"]))
    return low, high


def clip(value: Any, parameter: Any, values: Values) -> Any:
    if parameter["kind"] == "categorical":
        return value
    low, high = bounds(parameter, values)
    return min(max(value, low), high)


def contains(parameter: Any, value: Any, values: Values) -> bool:
    if parameter["kind"] == "categorical":
        return value in parameter["choices"]
    low, high = bounds(parameter, values)
    return not isinstance(value, str) and low <= value <= high


def place(value: float, parameter: Any, values: Values) -> float:
    """Returns the place of a value between its bounds, from 0 to 1."""
    low, high = bounds(parameter, values)
    return (value - low) / (high - low) if high > low else 0.0


def suggest(trial, name: str, parameter: Any, values: Values) -> Any:
    if parameter["kind"] == "categorical":
        return trial.suggest_categorical(name, parameter["choices"])
    low, high = bounds(parameter, values)
    if parameter["kind"] == "int":
        return trial.suggest_int(name, low, high, log=parameter.get("log", False))
    if is_relative(parameter):
        number = low + trial.suggest_float(name, 0.0, 1.0) * (high - low)
    else:
        number = trial.suggest_float(name, low, high, log=parameter.get("log", False))
    return clip(float(f"{number:.{DIGITS}g}"), parameter, values)


def check_parameter(parameter: Any, source: str) -> None:
    """Raises UserError if the entries of a parameter contradict one another."""
    numbers, choices = {"low", "high"} & parameter.keys(), "choices" in parameter
    if parameter["kind"] == "categorical":
        problem = "needs choices, and no low, high or log" if not choices or numbers or "log" in parameter else \
            "has a default that is no choice" if parameter["default"] not in parameter["choices"] else None
    elif choices or len(numbers) < 2:
        problem = f"needs low and high, and no choices, since it is {parameter['kind']}"
    elif is_relative(parameter):
        problem = "has another flag's value as a bound: make it a float without log" if \
            parameter["kind"] == "int" or "log" in parameter else None
    else:
        problem = check_range(parameter)
    if problem:
        raise UserError(f"{source} {problem}: {FIX}")


def check_range(parameter: Any) -> str | None:
    low, high, default = parameter["low"], parameter["high"], parameter["default"]
    if isinstance(default, str) or not low <= default <= high:
        return f"has the default {default}, which does not lie in [{low}, {high}]"
    if not low < high or (parameter.get("log") and low <= 0):
        return "needs low below high, and above 0 where it is log"
    if parameter["kind"] == "int" and not all(isinstance(number, int) for number in (low, high, default)):
        return "is int, so low, high and default must be whole"
    return None


def check_references(space: Space) -> None:
    """Raises UserError if a flag is none of train.py or changes no result, or if a condition or a bound names a flag
    that does not come earlier."""
    seen: set[str] = set()
    for name, parameter in space.parameters.items():
        flag, source = flag_of(name, parameter), f"{space.source}: {name}"
        changes_nothing = flag in TRAIN_FLAGS and TRAIN_FLAGS[flag].role not in CHANGES_RESULTS
        if flag not in TRAIN_FLAGS or changes_nothing:
            reason = "changes no result" if changes_nothing else "is no flag of train.py"
            raise UserError(f"{source}: --{flag} {reason}: {FIX}")
        bound_flags = [parameter[bound] for bound in ("low", "high") if isinstance(parameter.get(bound), str)]
        for other in (*parameter.get("when", {}), *bound_flags):
            if other not in seen:
                raise UserError(f"{source} depends on {other}, which comes later or is not there: {FIX}")
        seen.add(flag)
