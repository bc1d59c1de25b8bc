"""scripts/methods.json: scripts, search spaces and published figures agree with it, and what it may not hold."""

import json
import re
import shlex

import pytest

import train
from tiny import ROOT
from user_errors import error_message
from util.comparison.comparison import PUBLISHED
from util.comparison.methods import (
    BASE_IN_WORDS,
    METHODS,
    WORDED,
    may_be_base,
    method_name,
    named_methods,
    read_methods,
    usual_min_lr,
)
from util.lr_sched import SCHEDULES
from util.search.settings import SPACE
from util.search.space import read_space
from util.training.recipe import TRAIN_FLAGS

OTHER_SCRIPTS = {"lite"}  # of the 7B model: not a method, but the base method on other weights
DEFAULTS = {flag: TRAIN_FLAGS[flag].default for flag in TRAIN_FLAGS}


def flags_of_script(key: str) -> dict:
    """The flags by which a method's script differs from scripts/common.sh."""
    text = (ROOT / "scripts" / f"finetuning_sqa_7b{'' if key == 'base' else f'_{key}'}.sh").read_text()
    words = shlex.split(re.search(rf"finetune_and_evaluate {key} (.*)\"\$@\"", text.replace("\\\n", " "))[1])
    args = train.get_args_parser().parse_args(words)
    return {flag: getattr(args, flag) for flag in args.given}


def test_each_method_has_a_script_and_each_script_a_method():
    scripts = {path.stem.removeprefix("finetuning_sqa_7b").removeprefix("_") or "base"
               for path in ROOT.glob("scripts/finetuning_sqa_7b*.sh")} - OTHER_SCRIPTS
    assert scripts == {method.key for method in named_methods()}


@pytest.mark.parametrize("method", named_methods(), ids=lambda method: method.key)
def test_a_script_shows_the_flags_of_its_method(method):
    shown = flags_of_script(method.key)
    assert shown.keys() >= {*WORDED}  # in sight, where users edit them
    assert shown == {flag: method.flags.get(flag, DEFAULTS[flag]) for flag in {*shown, *method.flags}}


def test_the_factorial_crosses_every_method_that_only_chooses_a_schedule():
    text = (ROOT / "scripts" / "run_factorial.sh").read_text()
    default = re.search(r"^SCHEDULES=\$\{SCHEDULES:-(.*)\}$", text, re.M)[1]
    assert default.split() == [method.key for method in named_methods()
                               if method.flags.keys() <= {"lr_schedule", "min_lr"}]


def test_the_published_figures_are_those_of_the_first_methods():
    facts = json.loads(PUBLISHED.read_text())
    assert list(facts["methods"]) == [method.key for method in named_methods()][:8]
    assert not any({"flags", "changes", "name"} & found.keys() for found in facts["methods"].values())
    assert {flag: facts["flags"][flag] for flag in WORDED} == {flag: DEFAULTS[flag] for flag in WORDED}
    assert facts["flags"]["lr"] == DEFAULTS["blr"] * 32 / 256 and facts["flags"]["epochs"] == DEFAULTS["epochs"]


def test_the_base_schedule_is_the_first_and_is_named_in_one_place():
    """Whoever changes the base finds no other place in the code that knows which one it is."""
    base = next(iter(SCHEDULES))
    assert DEFAULTS["lr_schedule"] == base and SCHEDULES[base].display_name is None
    assert may_be_base(DEFAULTS) and BASE_IN_WORDS == f"--lr_schedule {base}, --dropout_var 1"
    assert not any(may_be_base({**DEFAULTS, **method.flags}) for method in named_methods()[1:])
    for path in (ROOT / "util").rglob("*.py"):
        assert path.name == "lr_sched.py" or not re.search(rf"\b{base}\b", path.read_text()), path


def test_a_search_tries_all_methods_first():
    space = read_space(SPACE)
    assert space.enqueue == [method.flags for method in named_methods()]


def test_a_run_of_a_method_has_its_name():
    for method in named_methods():
        assert method_name({**DEFAULTS, **method.flags}, DEFAULTS) == method.name


@pytest.mark.parametrize("flag, value, is_named", [
    ("precision", "fp16", True), ("bits", "fp8", True), ("adapter_dim", 4, True), ("prompt_format", "QCM-A", True),
    ("loss_norm", "microbatch", True), ("seed", 7, False), ("compile", "off", False), ("num_workers", 9, False),
    ("device", "cuda:3", False), ("output_dir", "elsewhere", False), ("save_every", 9, False)])
def test_a_name_mentions_what_changes_the_training_and_nothing_else(flag, value, is_named):
    name = method_name({**DEFAULTS, flag: value}, DEFAULTS)
    assert name == named_methods()[0].name + (f" + {flag} {value}" if is_named else "")


def test_a_schedule_has_the_min_lr_of_its_method():
    assert [usual_min_lr(schedule) for schedule in ("cyclical", "cosine", "step")] == [5e-5, 0, 0]


@pytest.fixture
def more(tmp_path, monkeypatch):
    """Reads the methods with some more."""
    def read(**entries):
        path = tmp_path / "methods.json"
        path.write_text(json.dumps({**json.loads(METHODS.read_text()), **entries}))
        found = read_methods(path)
        monkeypatch.setattr("util.comparison.methods.named_methods", lambda: found)
        return found
    return read


@pytest.mark.parametrize("entries", [{}, {"step": {"flags": {"lr_schedule": "step"}}}])
def test_the_first_method_is_the_base(tmp_path, entries):
    (tmp_path / "methods.json").write_text(json.dumps(entries))
    assert "methods.json: the first method is the base, and has no flags" in error_message(
        read_methods, tmp_path / "methods.json")


def test_a_method_of_any_flags_has_its_name(more):
    more(wide={"name": "Wide", "flags": {"adapter_dim": 16}},
         both={"name": "Both", "flags": {"lr_schedule": "step", "adapter_dim": 16}})
    for flags, name in (({}, "Base"), ({"adapter_dim": 16}, "Wide"), ({"adapter_dim": 4}, "Base + adapter_dim 4"),
                        ({"adapter_dim": 16, "lr": 0.5}, "Wide + lr 0.5"), ({"lr_schedule": "step"}, "Step Decay"),
                        ({"lr_schedule": "step", "adapter_dim": 16}, "Both"),
                        ({"lr_schedule": "exponential", "adapter_dim": 16}, "Exp. Decay + adapter_dim 16"),
                        ({"dropout_var": 1.01, "adapter_dim": 16}, "Inc. Drop. Prob + adapter_dim 16")):
        assert method_name({**DEFAULTS, "lr": 0.1, **flags}, {**DEFAULTS, "lr": 0.1}) == name


@pytest.mark.parametrize("entry, words", [
    ({"flags": {"dropuot": 1}}, "more: --dropuot is no flag of train.py: correct it"),
    ({"flags": {"lr_schedule": "linaer"}}, "more: --lr_schedule cannot be 'linaer': correct it"),
    ({"flags": {"dropout_prob": 1.5}, "name": "More"}, "more: --dropout_prob cannot be 1.5: correct it"),
    ({"flags": {"lr_schedule": "step"}}, "more has the name of another method, 'Step Decay': correct it"),
    ({"flags": {"lr_schedule": "step", "adapter_dim": 16}}, "more is not named, and does more than choose a schedule"),
    ({"flags": {"min_lr": 0.1}}, "more is not named, and does more than choose a schedule"),
    ({"name": "More"}, "more.flags: is missing: correct it"),
    ({"name": "More", "flags": {}, "published": True}, "more.published: is unknown to this version")])
def test_a_method_that_cannot_be_is_refused_by_name(more, entry, words):
    assert error_message(more, more=entry).split("methods.json: ")[1].startswith(words)
