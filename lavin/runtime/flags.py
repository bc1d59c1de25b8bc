"""Flags: each is a field of a frozen dataclass, declared once with its type, default, help and role.

A command's parser is made from such classes, and the code that a flag concerns gets an object of its class. Whatever
needs a set of flags (the recipe of a run, a method's name, what an evaluation takes from its run, what a search leaves
alone) chooses them by what is declared here, never by a list of names.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import Enum
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lavin.runtime.console import summary
from lavin.runtime.errors import UsageError, UserError

T = TypeVar("T", bound="FlagGroup")
UNSET = object()
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number",
                "int_parsing_size")  # pydantic's types of errors
WIDTH = 80  # columns of --help at the most
ROOT = Path(__file__).parents[2]
IN_WORDS = " (default: "  # ends the help of a flag whose default is None


class Role(Enum):
    """The part of a run that a flag changes."""

    MODEL = "which function the model computes"
    DATA = "which examples the model sees, and in which form"
    RECIPE = "how the model is trained, or how its answers are chosen"
    EXECUTION = "where and how fast a command runs, with the same results up to rounding"
    RUN = "which folders are read and written, and up to which epoch"
    DISPLAY = "what is shown"


CHANGES_RESULTS = (Role.MODEL, Role.DATA, Role.RECIPE)


@dataclass(frozen=True)
class Flag:
    """The declaration of one flag.

    kind: the type of its values, which pydantic checks. stated_as: the entry of a recipe that states the flag's effect
    in another form, such as a checksum of the files that the flag names. named: whether a method is named by the flag
    where its value differs from the base's. reloadable: whether a model that is in memory can take the value of another
    run. aliases: other spellings of the flag. positional: whether the value is given without the flag's name.
    """

    name: str
    kind: Any
    default: Any
    help: str
    role: Role
    stated_as: str | None = None
    named: bool = False
    reloadable: bool = False
    aliases: tuple[str, ...] = ()
    positional: bool = False
    choices: tuple[Any, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of argparse, as they are

    @property
    def optional_kind(self) -> Any:
        """The type without None: what the flag holds where it is given."""
        kinds = [kind for kind in get_args(self.kind) if kind is not NoneType]
        return kinds[0] if NoneType in get_args(self.kind) else self.kind

    @property
    def belongs_to_recipe(self) -> bool:
        """Whether a recipe holds the flag itself: it changes results, and no other entry states it."""
        return self.role in CHANGES_RESULTS and self.stated_as is None

    def accepts(self, value: Any) -> bool:
        """Whether the command line could have given this value."""
        try:
            checker(self.optional_kind).validate_python(value, strict=True)
            return True
        except ValidationError:
            return False

    def add_to(self, group: Any) -> None:
        """Declares the flag to argparse. group: a parser, or one of its groups."""
        options = {**self.options, "help": self.help.replace("%", "%%")}
        if self.positional:
            group.add_argument(self.name, **options)
            return
        if self.kind is bool:
            options["action"] = "store_true"
        else:
            kind = None if self.choices or "nargs" in options else parse_as(self.optional_kind)
            options = {"type": kind, "default": self.default, "choices": self.choices, **options}
            if self.default not in (None, (), ""):
                options["help"] = options["help"].partition(IN_WORDS)[0] + f"{IN_WORDS}{shown(self.default)})"
        group.add_argument(f"--{self.name}", *self.aliases, **options)


def flag(default: Any, help: str, role: Role, *, stated_as: str | None = None, named: bool | None = None,
         reloadable: bool = False, aliases: tuple[str, ...] = (), positional: bool = False,
         choices: tuple[Any, ...] | None = None, **options: Any) -> Any:
    """A field of a FlagGroup that is a flag; `Flag` says what the arguments are. options: further arguments of
    `add_argument`."""
    named = role in CHANGES_RESULTS if named is None else named
    return field(default=default, metadata={"flag": dict(
        help=help, role=role, stated_as=stated_as, named=named, reloadable=reloadable, aliases=aliases,
        positional=positional, choices=choices, options=options)})


@dataclass(frozen=True)
class FlagGroup:
    """A group of flags that belong together. title: the group's heading in --help."""

    title: ClassVar[str]

    @classmethod
    def of(cls: type[T], args: Any) -> T:
        """The settings as parsed; the default of a flag that the command does not have."""
        return cls.read(vars(args))

    @classmethod
    def read(cls: type[T], flags: dict[str, Any]) -> T:
        """The settings from flags by name, as a file holds them, once they are checked."""
        return cls(**{name: flags.get(name, declared.default) for name, declared in flags_of(cls).items()})


def flags_of(*classes: type[FlagGroup]) -> dict[str, Flag]:
    """All flags of some groups by name, in their order."""
    return {found.name: read_flag(found, get_type_hints(cls, include_extras=True)[found.name])
            for cls in classes for found in fields(cls)}


def read_flag(declared: Field, kind: Any) -> Flag:
    assert declared.default is not MISSING
    choices = declared.metadata["flag"]["choices"]
    kind = Literal[choices] if choices else kind  # type: ignore[valid-type]  # known at run time
    return Flag(declared.name, kind, declared.default, **declared.metadata["flag"])


@cache
def checker(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def parse_as(kind: Any) -> Callable[[str], Any]:
    """A type for argparse: reads what the command line says as a value of `kind`, a type that pydantic checks."""
    def parse(text: str) -> Any:
        try:
            return checker(kind).validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(complaint(kind, text, error)) from error
    return parse


def complaint(kind: Any, text: str, error: ValidationError) -> str:
    """Says what is wrong with a value, in words that come behind the flag's name."""
    first, bounds = error.errors(include_url=False)[0], interval(kind)
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    if first["type"] in OUT_OF_RANGE and bounds:
        return f"{text} does not lie in {bounds}"
    is_whole = get_origin(kind) is Annotated and get_args(kind)[0] is int
    return f"{text!r} is no {'whole number' if is_whole else 'number'}"


def interval(kind: Any) -> str | None:
    """The range of a number's type as mathematicians write it, such as `[0, 1)`; None where it has none."""
    bounds = [bound for annotation in get_args(kind)[1:] for bound in getattr(annotation, "metadata", [annotation])]
    found = {name: getattr(bound, name) for bound in bounds for name in ("gt", "ge", "lt", "le")
             if hasattr(bound, name)}
    if not found:
        return None
    low = f"[{found['ge']:g}" if "ge" in found else f"({found.get('gt', float('-inf')):g}"
    high = f"{found['le']:g}]" if "le" in found else f"{found.get('lt', float('inf')):g})"
    return f"{low}, {high}"


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix(f"{ROOT}/")


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """The words of a command line that gives these flags. One that takes no value is among them where it is True."""
    return [word for name, value in flags.items() if value is not False
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def check_flags(flags: dict[str, Any], declared: dict[str, Flag], source: str) -> dict[str, Any]:
    """Flags that a file holds. Raises UserError for one that the command line could not have given."""
    for name, known in declared.items():
        value = flags.get(name, known.default)
        if value is not known.default and not known.accepts(value):
            raise UserError(f"{source}: --{name} cannot be {str(value)[:99]!r}: name another run")
    return flags


class Flags(argparse.Namespace):
    """Parsed flags. given: the names of those on the command line; it is not among `vars`."""

    __slots__ = ("given",)


def usage(prog: str, flags: dict[str, Flag]) -> str:
    """The command in one line: the flags that it needs, and what is given without a flag's name."""
    needed = [f"--{name} {declared.options.get('metavar', name.upper())}" for name, declared in flags.items()
              if declared.options.get("required")]
    forms = {None: "{}", "+": "{} ...", "*": "[{} ...]"}  # by argparse's nargs
    values = [forms[declared.options.get("nargs")].format(declared.options["metavar"])
              for declared in flags.values() if declared.positional]
    return " ".join(["python", prog, *needed, "[FLAG ...]", *values])


class Parser(argparse.ArgumentParser):
    """A command's parser: one group of arguments for each FlagGroup, the command's own first.

    It takes no abbreviated flags, says which flags were given, and reports mistakes in one line (UsageError). prog: the
    words behind `python`. defaults: the defaults that differ from those in the flags' classes.
    """

    def __init__(self, prog: str, doc: str | None, *classes: type[FlagGroup], epilog: str | None = None,
                 **defaults: Any):
        columns = min(WIDTH, shutil.get_terminal_size().columns)
        self.flags = {name: replace(declared, default=defaults.get(name, declared.default))
                      for name, declared in flags_of(*classes).items()}
        super().__init__(f"python {prog}", usage(prog, self.flags), summary(doc), epilog, allow_abbrev=False,
                         formatter_class=partial(argparse.HelpFormatter, width=columns - 1, max_help_position=26))
        for cls in classes:
            group = self.add_argument_group(cls.title)
            for name in flags_of(cls):
                self.flags[name].add_to(group)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        flags, unknown = super().parse_known_args(args, namespace or Flags())
        unset = argparse.Namespace(**dict.fromkeys(vars(flags), UNSET))
        flags.given = {name for name, value in vars(super().parse_known_args(args, unset)[0]).items()
                       if value is not UNSET}
        return flags, unknown

    def parse_args(self, args=None, namespace=None) -> Flags:  # type: ignore[override]  # argparse's has overloads
        return super().parse_args(args, namespace)

    def error(self, message):
        message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1 ", message)
        raise UsageError(f"{message} ({self.prog} --help lists all flags)")
