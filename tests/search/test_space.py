"""The space of a search: its file, what is sampled from it, and the methods that are tried first."""

import json
import random
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from lavin.runtime.flags import command_line
from tiny import ROOT
from user_errors import error_message
from util.comparison.methods import named_methods
from util.lr_sched import SCHEDULES, schedules_with
from util.search import command
from util.search.settings import SPACE
from util.search.space import read_space

EFFECTIVE_32 = ["--batch_size", "2", "--accum_iter", "16"]
FLOAT = {"kind": "float", "low": 0, "high": 0.3, "default": 0.1}


class Draws:
    """Stands for an Optuna trial."""

    def __init__(self, seed: int):
        self.rng, self.params = random.Random(seed), {}

    def suggest_categorical(self, name, choices):
        return self.params.setdefault(name, self.rng.choice(choices))

    def suggest_float(self, name, low, high, log=False):
        return self.params.setdefault(name, self.rng.choice([low, high, self.rng.uniform(low, high)]))

    def suggest_int(self, name, low, high, log=False):
        return self.params.setdefault(name, self.rng.randint(low, high))


@pytest.fixture(scope="module")
def space():
    return read_space(SPACE)


def published_flags(script) -> list[str]:
    """The flags that a script of the study gives to train.py, from its own text and that of common.sh."""
    recipe = re.search(r"RECIPE=\(\n(.*?)\n\)", (ROOT / "scripts" / "common.sh").read_text(), re.S)[1]
    setup = re.search(r"SETUP=\(\n(.*?)\n\)", (ROOT / "scripts" / "common.sh").read_text(), re.S)[1]
    own = re.search(r"finetune_and_evaluate \w+ (.*)\"\$@\"", script.read_text().replace("\\\n", " "))[1]
    text = " ".join([setup, recipe.replace('"${SETUP[@]}"', ""), own]).replace("$((16 / WORLD))", "16")
    return shlex.split(text)


def test_the_first_trials_are_the_published_methods(space):
    for method, values in zip(named_methods(), space.first_sets(), strict=True):
        script = published_flags(ROOT / "scripts" / f"finetuning_sqa_7b_{method.key}.sh".replace("_base", ""))
        not_searched = ["--max_seq_len", "512", "--loss_norm", "microbatch", "--epochs", "20", "--n_prompt", "6",
                        "--prompt_format", "QCM-ALE"]
        expected = vars(train.get_args_parser().parse_args(script))
        found = vars(train.get_args_parser().parse_args([*EFFECTIVE_32, *not_searched, *command_line(values)]))
        assert found == expected


def test_flags_are_checked_for_the_gpus_of_a_trial():
    """The learning rate, 9e-3 times the samples of a step by 256, is twice as high on two GPUs."""
    words = ["--batch_size", "1", "--accum_iter", "1", "--min_lr", "5e-5"]
    command.check_trial(words, 2, {"blr": 9e-3})
    assert "--min_lr 5e-05 must lie between 0 and" in error_message(command.check_trial, words, 1, {"blr": 9e-3})


def test_every_end_of_the_default_space_is_taken_by_train(space):
    space.check(lambda values: command.check_trial(EFFECTIVE_32, 1, values))


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_no_suggestion_is_refused_and_the_same_trial_gives_the_same(space, seed):
    draws = Draws(seed)
    values = space.suggest(draws)
    command.check_trial(EFFECTIVE_32, 1, values)
    params = dict(draws.params)
    assert space.suggest(draws) == values and draws.params == params
    assert ("min_lr" in values) == (values["lr_schedule"] in schedules_with("min_lr"))
    assert ("dropout_lim" in values) == (values["dropout_var"] != 1)


def test_enqueued_parameters_are_sampled_back_to_their_flags(space):
    for values in space.first_sets():
        draws = Draws(0)
        draws.params = space.encode(values)
        assert space.suggest(draws) == values


def test_flags_that_are_given_are_not_searched(space):
    fixed = space.fix({"lr_schedule": "step", "blr": 0.16, "dropout_prob": 0.25})
    values = fixed.suggest(Draws(1))
    assert not {"lr_schedule", "blr", "dropout_prob", "min_lr"} & values.keys() and "warmup_epochs" in values
    rising = [values["dropout_lim"] for values in map(fixed.suggest, map(Draws, range(200)))
              if values["dropout_var"] > 1]
    assert min(rising) == 0.25 and max(rising) == 0.4
    # the published sets with another schedule or dropout are left out, and so are those whose limit is now too low
    assert [values["dropout_var"] for values in fixed.first_sets()] == [1]
    others = [method for method in named_methods() if method.flags.get("lr_schedule", "step") != "step"]
    assert len(others) >= 2
    # the base and the method `step` are the same here
    assert len(space.fix({"lr_schedule": "step"}).first_sets()) == len(named_methods()) - len(others) - 1
    assert "nothing is left to search" in error_message(make({"dropout_prob": FLOAT}).fix, {"dropout_prob": 0.1})


def make(parameters: dict, enqueue: Any = ({},)):
    """The space that is read from a file with these parameters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "space.json")
        path.write_text(json.dumps({"parameters": parameters, "enqueue": enqueue}))
        return read_space(path)


SCHEDULE = {"lr_schedule": {"kind": "categorical", "default": "cosine"}}


def test_choices_and_the_schedules_that_use_a_flag_follow_from_its_declaration():
    space = make({**SCHEDULE, "min_lr": {**FLOAT, "when": {"lr_schedule": "uses it"}},
                  "warmup_epochs": {**FLOAT, "when": {"lr_schedule": "uses it", "min_lr": [0]}}})
    schedule, min_lr, warmup = space.parameters.values()
    assert schedule["choices"] == list(SCHEDULES)
    assert min_lr["when"] == {"lr_schedule": schedules_with("min_lr")}
    assert warmup["when"] == {"lr_schedule": schedules_with("warmup_epochs"), "min_lr": [0]}


def test_a_space_in_full_is_the_same_space(space):
    """Versions without short forms wrote the space in full, and their studies go on only in the same space."""
    content = json.loads(SPACE.read_text())
    content["enqueue"] = [{}, {"lr_schedule": "cyclical", "min_lr": 5e-5}, {"lr_schedule": "step"}]
    content["parameters"]["lr_schedule"]["choices"] = list(SCHEDULES)
    content["parameters"]["min_lr"]["when"] = {"lr_schedule": schedules_with("min_lr")}
    full = make(content["parameters"], content["enqueue"])
    assert full.parameters == space.parameters and full.enqueue == space.enqueue[:3]


def test_methods_stand_for_their_flags():
    dropout = {flag: {**FLOAT, "high": high, "default": default}
               for flag, high, default in (("dropout_prob", 0.3, 0.1), ("dropout_var", 2, 1), ("dropout_lim", 1, 0.2))}
    flags = {method.key: method.flags for method in named_methods()}
    space = make(dropout, ["base", "drop_dec", {"dropout_prob": 0.3}])
    assert space.enqueue == [{}, flags["drop_dec"], {"dropout_prob": 0.3}]
    assert "space.json: enqueue: stpe is no method of scripts/methods.json" in error_message(make, dropout, ["stpe"])
    in_space = [values for values in flags.values() if values.keys() <= dropout.keys()]
    assert make(dropout, "methods").enqueue == in_space and 5 <= len(in_space) < len(flags)


@pytest.mark.parametrize("changes, words", [
    ({"kind": "int"}, "space.json: dropout_prob is int, so low, high and default must be whole"),
    ({"kind": "categorical"}, "space.json: dropout_prob needs choices"),
    ({"choices": [1]}, "space.json: dropout_prob needs low and high, and no choices, since it is float"),
    ({"log": True}, "space.json: dropout_prob needs low below high, and above 0 where it is log"),
    ({"default": 0.5}, "space.json: dropout_prob has the default 0.5, which does not lie in [0, 0.3]"),
    ({"high": "blr", "log": True}, "space.json: dropout_prob has another flag's value as a bound"),
    ({"low": None}, "space.json: parameters.dropout_prob.low"),
    ({"step": 1}, "space.json: parameters.dropout_prob.step: is unknown to this version of LaVIN"),
    ({"kind": "bool"}, "space.json: parameters.dropout_prob.kind: should be 'float', 'int' or 'categorical'")])
def test_a_parameter_that_does_not_fit_together_is_refused(changes, words):
    assert error_message(make, {"dropout_prob": {**FLOAT, **changes}}).split("/")[-1].startswith(words)


def check(parameters: dict, enqueue=({},), words=("--epochs", "3")):
    make(parameters, enqueue).check(lambda values: command.check_trial(list(words), 1, values))


@pytest.mark.parametrize("parameters, enqueue, words", [
    ({"droput_prob": FLOAT}, [{}], "space.json: droput_prob: --droput_prob is no flag of train.py"),
    ({"save_every_minutes": {**FLOAT}}, [{}], "space.json: save_every_minutes: --save_every_minutes changes no result"),
    ({"dropout_prob": {**FLOAT, "when": {"lr_schedule": ["step"]}}}, [{}],
     "space.json: dropout_prob depends on lr_schedule, which comes later or is not there"),
    ({"dropout_prob": {**FLOAT, "high": "dropout_lim"}}, [{}],
     "space.json: dropout_prob depends on dropout_lim, which comes later or is not there"),
    ({"dropout_prob": FLOAT}, [{"dropuot": 1}], "space.json: enqueue: --dropuot is no flag of train.py"),
    ({"dropout_prob": FLOAT}, [{"dropout_prob": 0.4}], "space.json: dropout_prob 0.4 is not in the space"),
    ({"dropout_prob": FLOAT}, [{"epochs": 4}], "space.json: epochs is set where it is not searched"),
    ({"dropout_prob": FLOAT}, ["step"], "space.json: lr_schedule is set where it is not searched"),
    ({"dropout_prob": FLOAT}, "steps", "space.json: enqueue: should be a valid list, not 'steps'"),
    ({**SCHEDULE, "blr": {**FLOAT, "when": {"lr_schedule": "uses it"}}}, [{}],
     'space.json: blr has a "uses it" that no schedule fulfils'),
    ({**SCHEDULE, "min_lr": {**FLOAT, "when": {"lr_schedule": "uses"}}}, [{}],
     "space.json: parameters.min_lr.when.lr_schedule: should be a valid list, not 'uses'"),
    ({"lr_schedule": {"kind": "categorical", "choices": ["cosine", "linaer"], "default": "cosine"}}, [{}],
     "space.json: lr_schedule linaer: --lr_schedule invalid choice: 'linaer'"),
    ({"prompt_format": {"kind": "categorical", "choices": ["QCM-ALE", "QCM-LEA"], "default": "QCM-ALE"}}, [{}],
     "space.json: prompt_format QCM-LEA: a search scores its trials by the likeliest answer"),
    ({"warmup_epochs": {**FLOAT, "high": 5}}, [{}],
     "space.json: warmup_epochs 5: --warmup_epochs 5.0 must lie at or above 0, and below --epochs 3"),
    ({"dropout_prob": {**FLOAT, "high": 1}}, [{}], "space.json: dropout_prob 1: --dropout_prob 1 does not lie in")])
def test_a_space_that_train_refuses_is_refused_before_anything_is_trained(parameters, enqueue, words):
    assert error_message(check, parameters, enqueue).split("/")[-1].startswith(words)


def test_whole_numbers_are_sampled():
    space = make({"hidden_proj": {"kind": "int", "low": 8, "high": 10, "default": 8}})
    assert {space.suggest(Draws(i))["hidden_proj"] for i in range(50)} == {8, 9, 10}
