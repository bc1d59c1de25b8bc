"""Pages as tests read them: fenced blocks, commands, `code` in the text, links, headings and tables.

A placeholder is a word in capitals in the place of a name or a number: RUN, FOLDER/a.png, --trials N.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from unittest import mock

from torch.distributed.run import get_args_parser as torchrun_parser

from lavin.runtime import signals
from lavin.runtime.errors import UsageError
from tiny import ROOT

PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")
SOURCES = (".py", ".sh", ".sbatch")  # files that only the tree has
USERS = (".png", ".jpg", ".pth", ".pt", ".gguf", ".safetensors", ".bin", ".zip")  # pictures and weights of any name
ENDING = re.compile(r"\.[a-z][a-z0-9]{1,10}$")
FIRST_WORDS = ("python", "bash", "source", "sbatch", "torchrun", "pip")  # of the commands that are ours to check
SHELL_WORDS = ("do", "then", "else", "if", "while", "!", "{", "(")  # a command may stand behind them
RANGE = re.compile(r"(\d[\d,]*(?:\.\d+)?)(?: (?:to|and) (\d[\d,]*(?:\.\d+)?))? ((?:samples|questions|tokens)/s)")


@dataclass(frozen=True)
class Page:
    """A Markdown file: its text without the fenced blocks, and these."""

    path: Path
    text: str
    blocks: tuple[tuple[str, str], ...]  # language and content

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def spans(self) -> list[str]:
        """The code between backticks."""
        return [" ".join(span.split()) for span in re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", self.text)]

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", self.text))

    @property
    def anchors(self) -> set[str]:
        """The addresses that GitHub makes of the headings."""
        headings = re.findall(r"^#+ (.+)$", self.text, re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    @property
    def tables(self) -> list[list[list[str]]]:
        """The cells of each table by row, its header first."""
        found = re.findall(r"(?:^\|.*\|\n)+", self.text + "\n", re.M)
        rows = [[[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
                for table in found]
        return [[table[0], *table[2:]] for table in rows]


@cache
def read_page(path: Path) -> Page:
    text = path.read_text()
    fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
    return Page(path, fence.sub("", text), tuple(fence.findall(text)))


@cache
def tree() -> frozenset[str]:
    """The project's files by their paths; without git, as in a copy of the project, all that are not hidden."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True)
    names = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("[!.]*")]
    return frozenset(name for name in names if (ROOT / name).is_file())


@cache
def code() -> str:
    """The text of all programs and scripts, without the tests."""
    return "\n".join((ROOT / name).read_text() for name in sorted(tree())
                     if name.endswith((".py", ".sh", ".sbatch", ".json", ".txt", ".toml")) or name.startswith("slurm/")
                     if not re.match(r"tests/(?!faults/)|assets/|benchmarks/.*json", name))


@cache
def names_in_code() -> frozenset[str]:
    """The names of files and folders that the code reads or writes, as patterns: `checkpoint-{epoch}.pth` is
    `checkpoint-*.pth`, and `LaVIN-$MODEL-$1` is `LaVIN-*-*`. Braces around a quotation mark
    are those of a dict."""
    text = re.sub(r"\$\{[^}]*\}|\$\w+|\{[^{}\x22\n]*\}|\b[A-Z][A-Z0-9_]*(?=\.)", "*", code())
    return frozenset(name for name in re.findall(r"[\w.*-]+", text)
                     if re.search(r"[a-zA-Z]{3}", ENDING.sub("", name) or name))


# --- paths ---

def looks_like_path(word: str) -> bool:
    """Says whether a word is a path, and no formula or list of words: it has a slash or a file's ending."""
    return (re.fullmatch(r"[\w.~$*+-]+(/[\w.~$*+{}-]*)*", word) is not None and re.search("[a-z]{2}", word) is not None
            and ("/" in word or ENDING.search(word) is not None) and not re.match(r"(\w+\.)+\w+/s$|\w+/s$", word))


def as_pattern(name: str) -> str:
    """The name of a file with `*` in the place of a word in capitals (`finetuning_sqa_7b_METHOD.sh`, `FILE.gguf`) or of
    a problem's id."""
    return "*" if PLACEHOLDER.fullmatch(name) or name.isdecimal() else \
        re.sub(r"(?<=[_-])[A-Z][A-Z0-9_]+(?=\.|$)|^[A-Z][A-Z0-9_]*(?=\.(?!md$))", "*", name)


def known_to_code(name: str) -> bool:
    """Says whether the code reads or writes files or folders of this name."""
    return any(fnmatch(name, known) or fnmatch(known, name) for known in names_in_code())


def path_exists(word: str, page: Page) -> bool:
    """Says whether a path is in the tree, is one that the code reads or writes, or is made by the page's own commands.

    Paths outside the project are taken.
    """
    if re.match(r"[~/$]|\.\.|\w+://", word) or word in made_by(page):
        return True
    parts = [as_pattern(part) for part in word.strip("/").removeprefix("./").split("/")]
    pattern = "/".join(parts)
    places = (ROOT, page.path.parent)
    if any(list(place.glob(pattern)) for place in places) or any(fnmatch(name, f"*/{pattern}") for name in tree()):
        return True
    if parts[0] in {name.split("/")[0] for name in tree()} or word.endswith(SOURCES):
        return False
    return word.endswith(USERS) or all(set(part) <= {"*", "."} or known_to_code(part) for part in parts)


def made_by(page: Page) -> set[str]:
    """The files that the page's blocks write, or that users write for them: `cp A B`, `command > B`, `curl -d @B`."""
    return {found for language, block in page.blocks if language == "bash"
            for found in re.findall(r"(?:> *|\b(?:cp|mv) \S+ | @)(\S+)", block)}


# --- commands ---

def commands_in(script: str) -> Iterator[list[str]]:
    """The commands of a piece of shell, each as its words, without redirections."""
    lines, script = "", re.sub(r"\\\n", " ", re.sub(r"\[(.+?)\]", r"\1", script))
    for line in re.sub(r"(?<=\s)[\d&]?>{1,2}[ &]*\S+", "", script).splitlines():
        lines += f"{line}\n"
        lexer = shlex.shlex(lines, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation that goes on in the next line
            continue
        lines, command = "", []
        for word in (*words, ";"):
            if set(word) <= set(";&|"):
                yield command
                command = []
            else:
                command.append(word)


def split_environment(words: list[str]) -> tuple[list[str], list[str]]:
    """The names of the variables that are set for a command, and the command itself."""
    variables = []
    while words and (words[0] in SHELL_WORDS or re.match(r"\w+=", words[0])):
        variables += re.findall(r"^(\w+)=", words[0])
        words = words[1:]
    return variables, words


class Parsed(BaseException):
    """Ends a program as soon as it has made its parser. It is no Exception, so that no program handles it."""


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """Returns the parser of a program, a file of the tree.

    It is that of the module's `get_args_parser`, or else the one that the program makes when it starts.
    """
    folder = os.path.dirname(program).replace("/", ".")
    with mock.patch.dict(os.environ), mock.patch.object(signals, "install"), mock.patch.object(signal, "signal"):
        module = importlib.import_module(f"{folder}.{Path(program).stem}".strip("."))
        if hasattr(module, "get_args_parser"):
            return module.get_args_parser()
        made = []

        def note(parser, *_, **__):
            made.append(parser)
            raise Parsed

        with mock.patch.object(argparse.ArgumentParser, "parse_args", note), contextlib.suppress(Parsed), \
                mock.patch.object(sys, "argv", [program]):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    return made[0]


@cache
def programs() -> tuple[str, ...]:
    """The files that are started with python and take flags."""
    started = [name for name in sorted(tree()) if re.fullmatch(r"(?!tests/.*test_).*\.py", name)
               and re.search(r'^if __name__ == "__main__"|__main__\.py$', f"{(ROOT / name).read_text()}{name}", re.M)]
    return tuple(name for name in started if re.search(r"parse_args|ArgumentParser", (ROOT / name).read_text()))


def action_of(parser: argparse.ArgumentParser, flag: str) -> argparse.Action | None:
    return parser._option_string_actions.get(flag)


def example_of(action: argparse.Action | None) -> str:
    """Returns a value that a flag takes, for the place of a placeholder."""
    if action is None or not (action.choices or action.type):
        return "x"
    if action.choices:
        return str(next(iter(action.choices)))
    return next((value for value in ("1", "0.5") if not refusal(action, value)), "x")


def refusal(action: argparse.Action, value: str) -> str | None:
    """Returns why a flag does not take a value, or None."""
    try:
        value = action.type(value) if callable(action.type) else value
    except (ValueError, argparse.ArgumentTypeError) as error:
        return str(error)
    return None if not action.choices or value in action.choices else f"is none of {list(action.choices)}"


def without_placeholders(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Returns the words with a valid value in the place of each placeholder, without `FLAGS`, `FLAG...` and `...`."""
    found = []
    for before, word in zip(("", *words), words, strict=False):
        if re.fullmatch(r"FLAGS?(\.\.\.)?|\.\.\.", word):
            continue
        is_placeholder = PLACEHOLDER.fullmatch(word) and before.startswith("--")
        found.append(example_of(action_of(parser, before)) if is_placeholder else word)
    return found


def wrong_flags(parser: argparse.ArgumentParser, words: list[str], whole: bool = True) -> str | None:
    """Returns why a parser refuses the words of a command, or None. `whole`: required flags must be there."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            parser.parse_args(without_placeholders(parser, words))
    except UsageError as error:
        errors.write(str(error))
    except SystemExit as end:
        if not end.code:  # --help
            return None
    message = errors.getvalue().strip().split("\n")[-1]
    return None if not message or (not whole and "are required" in message) else message


def flags_of_script(script: str) -> list[argparse.ArgumentParser] | None:
    """The parsers of the programs to which a script hands its arguments; None where these are not the project's."""
    text = (ROOT / script).read_text()
    if "python -m pytest" in text:
        return None
    named = [f"{stem.replace('.', '/')}.py" for stem in re.findall(r"-m (\w+\.\w+)", text)] + \
        [name for name in re.findall(r"\b\w+\.py\b", text) if name in programs()]
    return [parser_of(name) for name in named if name in (*programs(), "tools/doctor.py")] or [parser_of("train.py")]


def wrong_script(words: list[str], page: Page) -> str | None:
    """Returns what is wrong with a script of the tree and its flags, or None. The script's path is the first word."""
    script, *rest = words
    if script not in tree():
        return None if path_exists(script, page) else f"{script} does not exist"
    if rest and rest[0] in tree():  # a job that starts a script
        return wrong_script(rest, page)
    parsers = flags_of_script(script)
    return None if parsers is None else wrong_flag_words(rest, parsers)


def wrong_flag_words(words: list[str], parsers: list[argparse.ArgumentParser]) -> str | None:
    """Names the first flag that none of the parsers has, or whose value none takes."""
    for i, word in enumerate(words):
        if not re.match(r"--[a-z]", word):
            continue
        flag, _, value = word.rstrip(".,:").partition("=")
        actions = [action for parser in parsers if (action := action_of(parser, flag))]
        if not actions:
            return f"{flag} is no flag"
        takes_value = [action for action in actions if action.nargs != 0]
        value = value or " ".join(words[i + 1:i + 2])
        if not takes_value or not value or PLACEHOLDER.match(value) or value.startswith(("--", "...")):
            continue
        if all(refusal(action, value) for action in takes_value):
            return f"{flag} does not take {value}"
    return None


def wrong_python(words: list[str], page: Page, whole: bool) -> str | None:
    """Returns what is wrong with the arguments of python, or None."""
    if words and words[0] == "-c":
        compile(words[1], page.name, "exec")
        return None
    if words[:2] == ["-m", "util.launch"]:
        return wrong_torchrun(words[2:], page, whole)
    if words and words[0] == "-m":
        stem = words[1].replace(".", "/")
        if not (ROOT / stem.split("/")[0]).is_dir():
            return None  # a module of somebody else
        program = next((name for name in (f"{stem}.py", f"{stem}/__main__.py") if name in tree()), None)
        words = [program or f"{stem}.py", *words[2:]]
    if not words or words[0].startswith("-"):
        return None
    if words[0] not in tree():
        return f"{words[0]} does not exist"
    rest, _, of_train = " ".join(map(shlex.quote, words[1:])).partition(" -- ")
    return wrong_flags(parser_of(words[0]), shlex.split(rest), whole) or \
        (wrong_flags(parser_of("train.py"), shlex.split(of_train)) if of_train else None)


def wrong_torchrun(words: list[str], page: Page, whole: bool) -> str | None:
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    if at == len(words):
        return wrong_flag_words(words, [torchrun_parser()])
    return wrong_flags(torchrun_parser(), words[:at + 1]) or wrong_python(words[at:], page, whole)


def wrong_pip(words: list[str], page: Page) -> str | None:
    """Names a requirements or constraints file that does not exist."""
    files = [name for flag, name in zip(words, words[1:], strict=False) if flag in ("-r", "-c")]
    return next((f"{name} does not exist" for name in files if not path_exists(name, page)), None)


def is_read(variable: str, page: Page) -> bool:
    """Says whether the code, a block of the page or a library reads a variable of the environment."""
    text = code() + "".join(block for _, block in page.blocks)
    return re.match(r"(CUDA|HF|NCCL|OMP|PYTORCH)_", variable) is not None or \
        re.search(rf"\$\{{?{variable}\b|[\"']{variable}[\"']", text) is not None


def wrong_command(words: list[str], page: Page, whole: bool = True) -> str | None:
    """Returns what is wrong with a command, where its program, its flags or its files are the project's, or None.

    `whole` says that the command is complete, and not only named in the text.
    """
    variables, words = split_environment(words)
    if unknown := [name for name in variables if not is_read(name, page)]:
        return f"{unknown[0]} is no variable that the code reads"
    if not words:
        return None
    program = words[0].rpartition("/")[2]
    if re.fullmatch(r"python3?", program):
        return wrong_python(words[1:], page, whole)
    if program == "torchrun":
        return wrong_torchrun(words[1:], page, whole)
    if program == "pip":
        return wrong_pip(words[1:], page)
    if program in ("bash", "source", "sbatch"):
        at = [i for i, word in enumerate(words) if i and (word in tree() or ENDING.search(word))]
        return wrong_script(words[at[0]:], page) if at else None
    return next((f"{word} does not exist" for word in words
                 if word.endswith(SOURCES) and looks_like_path(word) and not path_exists(word, page)), None)


# --- figures ---

def as_number(text: str) -> float:
    return float(text.replace(",", ""))


def numbers(text: str) -> set[float]:
    return set(map(as_number, re.findall(r"\d[\d,]*(?:\.\d+)?", text)))


def speeds(page: Page) -> set[tuple[float, str]]:
    """All figures of a page in samples/s, questions/s or tokens/s: in its text, and in tables that name the unit in the
    header of the column, at the beginning of the row, or in the table's first cell."""
    found = set()
    for low, high, unit in RANGE.findall(re.sub(r"\s+", " ", page.text)):
        found |= {(number, unit) for number in numbers(f"{low} {high}")}
    for header, *rows in page.tables:
        for row in rows:
            for title, cell in zip(header[1:], row[1:], strict=True):
                unit = re.search(r"\w+/s\b", f"{title} {row[0]} {header[0]}")
                found |= {(number, unit[0]) for number in numbers(cell)} if unit else set()
    return found
