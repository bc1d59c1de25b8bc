"""Flags are declared once: with a role, a range that holds for command lines and files alike, and a place in --help."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import demo
import eval as evaluation
import eval_mme
import plot_results
import search
import train
from lavin.runtime.errors import UsageError
from lavin.runtime.flags import FlagGroup, Parser, Role, check_flags, command_line, flag, flags_of
from lavin.runtime.schema import PathText
from tiny import ROOT
from tools import (
    data_processing,
    doctor,
    download,
    export_hf,
    make_easy_vqa,
    make_mini_scienceqa,
    make_scienceqa,
    make_toy_base,
    publish,
    topic_scores,
)
from user_errors import error_message
from util.flags import inherit

COMMANDS = {module.__name__: module.get_args_parser for module in (
    train, evaluation, eval_mme, demo, search, plot_results, data_processing, download, export_hf, make_easy_vqa,
    make_mini_scienceqa, make_scienceqa, make_toy_base, publish, topic_scores)}
FIRST_GROUP = {"train": "run", "eval": "what is scored", "eval_mme": "MME", "demo": "runs", "search": "search",
               "plot_results": "comparison", "tools.data_processing": "files", "tools.export_hf": "export",
               "tools.make_easy_vqa": "data set", "tools.make_mini_scienceqa": "data set",
               "tools.make_scienceqa": "data set", "tools.make_toy_base": "toy base", "tools.publish": "share",
               "tools.download": "files", "tools.topic_scores": "results"}


@dataclass(frozen=True)
class Group(FlagGroup):
    """Flags of every kind."""

    title: ClassVar[str] = "group"
    share: Annotated[float, Field(ge=0, lt=1)] = flag(0.5, "a share of 100%", Role.RECIPE)
    count: Annotated[int, Field(ge=1, le=9)] | None = flag(None, "a number", Role.DATA, aliases=("--number",))
    kind: str = flag("a", "one of two", Role.MODEL, choices=("a", "b"))
    fast: bool = flag(False, "whether", Role.EXECUTION)
    place: PathText = flag("", "a path", Role.RUN)


def parse(*words: str):
    return Parser("command.py", "Does this.", Group).parse_args(list(words))


def test_a_flag_without_a_role_cannot_be_declared():
    with pytest.raises(TypeError, match="role"):
        flag(1, "a flag")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_command_is_declared(name):
    parser = COMMANDS[name]()
    assert {action.dest for action in parser._actions} == {"help", *parser.flags}
    assert all(isinstance(declared.role, Role) and declared.help for declared in parser.flags.values())


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "218"])
def test_help_fits_the_terminal_and_begins_with_the_commands_own_flags(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = COMMANDS[name]().format_help()
    assert max(map(len, text.splitlines())) <= 80
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[1] == FIRST_GROUP[name] and headings[0] in ("options", "optional arguments")
    assert text.startswith(f"usage: python {'-m ' * name.startswith('tools.')}{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_every_default_once(name):
    """It is the one that holds: a command may have another one than the flags that it shares."""
    parser = COMMANDS[name]()
    for action in parser._actions:
        declared = parser.flags.get(action.dest)
        words = re.findall(r"\(default: (.*?)\)(?= |$)", action.help or "")
        if declared and declared.default not in (None, (), "", False):
            default = str(action.default).removeprefix(f"{ROOT}/")
            assert words in ([default], [f"{action.default:g}"] if isinstance(action.default, float) else [])
        assert len(words) <= 1
        assert not re.search(rf"\({re.escape(str(action.default))}\)", action.help or "")


def test_help_says_what_a_command_needs():
    first_line = export_hf.get_args_parser().format_help().splitlines()[0]
    assert "--adapter_path RUN --out FOLDER [FLAG ...]" in first_line
    for name, needed in (("tools.download", "[FLAG ...] NAME ..."), ("tools.publish", "--out OUT [FLAG ...] RUN"),
                         ("plot_results", "[FLAG ...] [RUN ...]")):
        assert COMMANDS[name]().format_help().splitlines()[0].endswith(f" {needed}")


def test_a_command_may_have_other_defaults_than_the_flags_that_it_shares():
    args = export_hf.get_args_parser().parse_args(["--adapter_path", "run", "--out", "folder"])
    assert (args.device, args.precision) == ("cpu", "fp16") and args.given == {"adapter_path", "out"}


def test_help_of_the_doctor_examines_nothing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "machine", None)
    assert doctor.main(["--data_root", "x", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_default_could_have_been_given(name):
    for declared in COMMANDS[name]().flags.values():
        assert declared.default in (None, ()) or declared.accepts(declared.default), declared.name


def test_flags_are_parsed_and_those_that_were_given_are_known():
    flags = parse("--number", "3", "--fast")
    assert Group.of(flags) == Group(0.5, 3, "a", True, "") and flags.given == {"count", "fast"}
    assert parse("--share", "0.5").given == {"share"}  # also where it is the default


@pytest.mark.parametrize("words", [
    (), ("--fast",), ("--share", "0.25", "--count", "3", "--kind", "b", "--fast", "--place", "my run")])
def test_flags_as_words_are_what_was_given(words):
    flags = parse(*words)
    assert command_line({name: getattr(flags, name) for name in vars(flags) if name in flags.given}) == [*words]
    assert vars(parse(*command_line({**vars(flags), "count": 3}))) == {**vars(flags), "count": 3}  # --fast may be False


@pytest.mark.parametrize("words, message", [
    (("--share", "1"), "--share 1 does not lie in [0, 1)"), (("--share", "nan"), "--share nan does not lie in [0, 1)"),
    (("--share", "x"), "--share 'x' is no number"), (("--count", "0"), "--count 0 does not lie in [1, 9]"),
    (("--number", "10"), "--count 10 does not lie in [1, 9]"), (("--count", "2.5"), "--count '2.5' is no whole number"),
    (("--count", "9" * 30), "--count " + "9" * 30 + " does not lie in [1, 9]"),
    (("--kind", "c"), "--kind invalid choice"), (("--place", "a\0b"), "--place 'a\\x00b' names no file or folder"),
    (("--shar", "0.1"), "unrecognized arguments")])
def test_what_no_flag_can_have_is_refused_in_one_line(words, message):
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)))
def test_files_may_hold_what_the_command_line_could_have_given_and_nothing_else(value):
    """One declaration decides both: a number of a file is taken if and only if its text is taken."""
    for name, declared in flags_of(Group).items():
        if declared.kind is bool or value is None:
            continue
        try:
            parsed = getattr(parse(f"--{name}={value}"), name)
        except UsageError:
            parsed = None
        if isinstance(value, bool):
            assert not declared.accepts(value)
        elif declared.accepts(value):
            assert parsed == value


def test_a_flag_of_a_file_that_could_not_be_given_is_named():
    assert check_flags({"share": 0.25, "other": 3}, flags_of(Group), "a.json") == {"share": 0.25, "other": 3}
    for wrong in ({"share": 1.0}, {"count": "3"}, {"fast": 1}, {"kind": "c"}, {"count": True}, {"place": None}):
        assert f"a.json: --{next(iter(wrong))} cannot be" in error_message(
            check_flags, wrong, flags_of(Group), "a.json")


def test_a_command_that_loads_a_run_takes_its_model_and_data_and_chooses_the_machine_anew():
    of_run = {"llm_model": "tiny", "bits": "fp8", "use_caption": True, "prompt_format": "QCM-A", "max_seq_len": 77}
    of_its_machine = {"device": "cuda:3", "precision": "fp16", "compile": "off", "cuda_graphs": "on",
                      "model_parallel_size": 2, "num_workers": 9, "cpu_load": True}
    args = evaluation.get_args_parser().parse_args(["--max_seq_len", "99"])
    before = vars(args).copy()
    inherit(args, {**of_run, **of_its_machine})
    assert {name: getattr(args, name) for name in of_run} == {**of_run, "max_seq_len": 99}
    assert {name: getattr(args, name) for name in of_its_machine} == {name: before[name] for name in of_its_machine}
