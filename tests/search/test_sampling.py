"""Sampling of a search: the distributions that a space file promises, and the first trials that it lists."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

pytest.importorskip("optuna")
import optuna

import train
from tiny import ROOT
from util.lr_sched import SCHEDULES, learning_rate
from util.search import command
from util.search.folder import read_records
from util.search.settings import SPACE
from util.search.space import read_space
from util.search.study import COMPLETE, Study, run_trial

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SPACES = sorted((ROOT / "scripts").glob("search_*.json"))
IMPLAUSIBLE = 1e-4  # p-value of samples that do not follow the distribution; the seeds are fixed


def samples(path, n: int, fixed=None) -> list[dict]:
    """Flags of n trials that Optuna draws at random."""
    space = read_space(path).fix(fixed or {})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(n)]


def write_space(folder, parameters: dict, enqueue=({},)):
    path = folder / "space.json"
    path.write_text(json.dumps({"parameters": parameters, "enqueue": list(enqueue)}))
    return path


def rates(schedule, **changes) -> list[float]:
    args = SimpleNamespace(**{"lr": 0.01, "epochs": 20, "warmup_epochs": 2, "min_lr": 0, "lr_schedule": schedule,
                              **changes})
    return [learning_rate(epoch, args) for epoch in np.arange(0, 20, 0.25)]


def in_full(path) -> dict:
    """A space file without its short forms, read without the search's own code: choices are those of train.py's parser,
    a schedule uses a flag where the rate changes with it, and methods have the flags of scripts/methods.json."""
    content = json.loads(path.read_text())
    choices = {action.dest: action.choices for action in train.get_args_parser()._actions}
    for flag, parameter in content["parameters"].items():
        if parameter["kind"] == "categorical":
            parameter.setdefault("choices", choices[flag])
        if parameter.get("when") == {"lr_schedule": "uses it"}:
            other = {"min_lr": 1e-4, "warmup_epochs": 4}[flag]
            parameter["when"] = {"lr_schedule": [schedule for schedule in SCHEDULES
                                                 if rates(schedule) != rates(schedule, **{flag: other})]}
    if content["enqueue"] == "methods":
        methods = json.loads((ROOT / "scripts" / "methods.json").read_text())
        content["enqueue"] = [method["flags"] for method in methods.values()]
    return content


# --- Distributions ---

def distribution(parameter: dict):
    """SciPy's, of a float between two numbers."""
    low, high = parameter["low"], parameter["high"]
    return scipy.stats.loguniform(low, high) if parameter.get("log") else scipy.stats.uniform(low, high - low)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_range_of_a_space_is_sampled_as_its_file_says(path):
    """Floats between numbers, and choices; the file is read here without the search's own code."""
    trials = samples(path, 400)
    for flag, parameter in in_full(path)["parameters"].items():
        values = [trial[flag] for trial in trials if flag in trial]
        if parameter["kind"] == "categorical":
            counts = [values.count(choice) for choice in parameter["choices"]]
            assert sum(counts) == len(values) and scipy.stats.chisquare(counts).pvalue > IMPLAUSIBLE, flag
        elif not isinstance(parameter["low"], str) and not isinstance(parameter["high"], str):
            assert scipy.stats.kstest(values, distribution(parameter).cdf).pvalue > IMPLAUSIBLE, flag
            assert parameter["low"] <= min(values) and max(values) <= parameter["high"], flag


def test_a_bound_that_is_another_flags_value_holds_in_each_trial_and_the_range_is_sampled_evenly():
    """A rising dropout is sampled between its start and 0.4, a falling one between 0 and its start."""
    trials = samples(SPACE, 400)
    rising = [(trial["dropout_lim"] - trial["dropout_prob"]) / (0.4 - trial["dropout_prob"]) for trial in trials
              if trial["dropout_var"] > 1]
    falling = [trial["dropout_lim"] / trial["dropout_prob"] for trial in trials if trial["dropout_var"] < 1]
    for places in (rising, falling):
        assert len(places) > 100 and 0 <= min(places) and max(places) <= 1
        assert scipy.stats.kstest(places, "uniform").pvalue > IMPLAUSIBLE


@pytest.mark.parametrize("log", [False, True])
def test_whole_numbers_are_sampled_evenly_or_by_their_logarithm(tmp_path, log):
    """A number k has the probability of the logarithms of k - 0.5 to k + 0.5 where `log` is set."""
    path = write_space(tmp_path, {"adapter_dim": {"kind": "int", "low": 2, "high": 9, "log": log, "default": 2}})
    numbers = np.arange(2, 10)
    values = [trial["adapter_dim"] for trial in samples(path, 600)]
    weights = np.log((numbers + 0.5) / (numbers - 0.5)) if log else np.ones(8)
    counts = [values.count(number) for number in numbers]
    assert sum(counts) == 600 and all(isinstance(value, int) for value in values)
    assert scipy.stats.chisquare(counts, 600 * weights / weights.sum()).pvalue > IMPLAUSIBLE


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_rates_and_factors_are_searched_by_their_logarithm_on_both_sides_of_the_base(path):
    """A rate of half and one of twice the base's are as far from it, so that a range over a decade is log. The base's
    value can be lowered and raised at least threefold, and at most tenfold."""
    n_factors = 0
    for flag, parameter in json.loads(path.read_text())["parameters"].items():
        low, default, high = (parameter.get(key) for key in ("low", "default", "high"))
        if not {type(low), type(high)} <= {int, float} or not 0 < 10 * low < high:
            continue
        n_factors += 1
        assert parameter.get("log") and 3 <= default / low <= 10 and 3 <= high / default <= 10, flag
    assert n_factors


def test_choices_of_numbers_lie_evenly_on_both_sides_of_the_base():
    """The choices of a size in the default space are factors of 2 apart, up to fourfold in each direction. Those of the
    dropout's factor lie symmetrically about 1, two hundredths or less apart, and hold those of all methods."""
    parameters = in_full(SPACE)["parameters"]
    numeric = {flag: parameter for flag, parameter in parameters.items() if "choices" in parameter
               and not any(isinstance(choice, str) for choice in parameter["choices"])}
    assert set(numeric) == {"adapter_dim", "dropout_var"}
    assert numeric["adapter_dim"]["choices"] == [numeric["adapter_dim"]["default"] * 2**i for i in range(-2, 3)]
    factors = numeric["dropout_var"]["choices"]
    assert numeric["dropout_var"]["default"] == 1 and np.allclose(np.add(factors, factors[::-1]), 2)
    assert factors == sorted(factors) and max(np.diff(factors)) < 0.0201 and len(factors) == 7
    methods = json.loads((ROOT / "scripts" / "methods.json").read_text())
    assert {method["flags"].get("dropout_var", 1) for method in methods.values()} <= set(factors)


def test_the_quick_starts_sizes_are_factors_of_two_apart_and_hold_the_base():
    parameter = in_full(ROOT / "scripts" / "search_quickstart.json")["parameters"]["adapter_dim"]
    assert parameter["choices"] == [2, 4, 8, 16] and parameter["default"] == 8


@pytest.mark.parametrize("low, high", [(0.00123456, 0.00123459), (0.12345, 0.98765)])
def test_no_rounding_leaves_the_range(tmp_path, low, high):
    path = write_space(tmp_path, {"blr": {"kind": "float", "low": low, "high": high, "default": low}})
    values = [trial["blr"] for trial in samples(path, 50)]
    assert low <= min(values) and max(values) <= high


def test_sampled_numbers_are_short_but_no_coarser_than_a_thousandth(tmp_path):
    """Four significant digits: they can be typed, and neighbours in a range stay different."""
    path = write_space(tmp_path, {"blr": {"kind": "float", "low": 2e-3, "high": 4e-2, "log": True, "default": 9e-3}})
    values = [trial["blr"] for trial in samples(path, 200)]
    assert len(set(values)) > 190 and all(value == float(f"{value:.3e}") for value in values)


def test_every_end_of_the_quick_starts_space_is_taken_by_train():
    """train.py also gets the flags that the quick start's script gives to all trials."""
    given = re.search(r"--device cpu [^)]*", (ROOT / "scripts" / "toy.sh").read_text())[0].split()
    space = read_space(ROOT / "scripts" / "search_quickstart.json")
    space.check(lambda values: command.check_trial(given, 1, values))


# --- Conditions ---

CONDITIONAL = {"lr_schedule": {"kind": "categorical", "choices": ["cosine", "cyclical", "step"], "default": "cosine"},
               "adapter_dim": {"kind": "categorical", "choices": [2, 4], "default": 4},
               "min_lr": {"kind": "float", "low": 0, "high": 2e-4, "default": 0,
                          "when": {"lr_schedule": ["cosine", "cyclical"], "adapter_dim": [2]}}}


def test_a_parameter_is_searched_where_all_of_its_conditions_hold_and_nowhere_else(tmp_path):
    trials = samples(write_space(tmp_path, CONDITIONAL), 60)
    combinations = {(trial["lr_schedule"], trial["adapter_dim"], "min_lr" in trial) for trial in trials}
    assert combinations == {(schedule, dim, schedule != "step" and dim == 2)
                            for schedule in ("cosine", "cyclical", "step") for dim in (2, 4)}


def test_a_condition_on_a_flag_that_is_given_counts_its_given_value(tmp_path):
    path = write_space(tmp_path, CONDITIONAL)
    assert not any("min_lr" in trial for trial in samples(path, 20, {"lr_schedule": "step"}))
    trials = samples(path, 20, {"lr_schedule": "cyclical", "adapter_dim": 2})
    assert all(set(trial) == {"min_lr"} for trial in trials)


def test_a_condition_on_a_flag_that_is_itself_not_searched_does_not_hold(tmp_path):
    """The default of the flag, which would be 0 here, does not make it hold either."""
    path = write_space(tmp_path, {**CONDITIONAL, "min_lr": {"kind": "categorical", "choices": [0, 1e-4], "default": 0,
                                                            "when": {"lr_schedule": ["cosine"]}},
                                  "weight_decay": {"kind": "float", "low": 0, "high": 0.2, "default": 0.02,
                                                   "when": {"min_lr": [0]}}})
    trials = samples(path, 60)
    assert {("weight_decay" in trial) for trial in trials} == {True, False}
    assert all(("weight_decay" in trial) == (trial.get("min_lr") == 0) for trial in trials)


def test_flags_of_the_learning_rate_are_searched_with_the_schedules_that_use_them():
    """Judged by the rate itself: it changes with the flag, or it does not."""
    parameters, expected = read_space(SPACE).parameters, in_full(SPACE)["parameters"]
    assert parameters["lr_schedule"]["choices"] == list(SCHEDULES)
    for flag in ("min_lr", "warmup_epochs"):
        assert set(parameters[flag]["when"]["lr_schedule"]) == set(expected[flag]["when"]["lr_schedule"]) < {*SCHEDULES}


# --- The first trials ---

def settings_of(space, trials: int, **changes) -> dict:
    return {"trials": trials, "pruner": "none", "questions": 100, "confirm": 0, "seeds": 1, "steps_per_epoch": 1,
            "space": {"parameters": space.parameters, "enqueue": space.enqueue}, "flags": {"epochs": 20, "seed": 0},
            **changes}


def taken(folder, path, trials: int, n: int) -> list[dict]:
    """Flags of the first n trials of a study of so many, as they would be trained; each one scores the same."""
    space = read_space(path)
    study = Study(folder, space, settings_of(space, trials), None)
    values = []
    for _ in range(n):
        trial = study.take()
        values.append(trial.values)
        run_trial(study, trial, lambda trial, epochs: 50.0)
    assert [record["values"] for record in read_records(folder).values()] == values  # as trial.json says
    return values


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_the_first_trials_are_the_sets_of_the_file_in_its_order(path, tmp_path):
    """Each with the defaults of all other parameters whose conditions hold."""
    content = in_full(path)
    values = taken(tmp_path, path, 20, len(content["enqueue"]) + 2)
    for changes, found in zip(content["enqueue"], values, strict=False):
        expected = dict(changes)
        for name, parameter in content["parameters"].items():
            flag = parameter.get("flag", name)
            if all(expected.get(other) in allowed for other, allowed in parameter.get("when", {}).items()):
                expected.setdefault(flag, parameter["default"])
        assert found == expected
    assert all(drawn not in values[:len(content["enqueue"])] for drawn in values[len(content["enqueue"]):])


def test_the_base_is_what_train_does_without_a_search():
    trained = vars(train.get_args_parser().parse_args([]))
    base = read_space(SPACE).first_sets()[0]
    assert base == {flag: trained[flag] for flag in base}


def test_a_default_that_a_listed_set_moves_out_of_its_range_is_the_nearest_value_in_it(tmp_path):
    path = write_space(tmp_path, {
        "dropout_prob": {"kind": "float", "low": 0, "high": 0.3, "default": 0.1},
        "dropout_lim": {"kind": "float", "low": "dropout_prob", "high": 0.4, "default": 0.2}},
        [{}, {"dropout_prob": 0.3}])
    sets = [{"dropout_prob": 0.1, "dropout_lim": 0.2}, {"dropout_prob": 0.3, "dropout_lim": 0.3}]
    assert read_space(path).first_sets() == sets == taken(tmp_path / "S", path, 4, 2)


def test_a_study_of_fewer_trials_than_sets_takes_the_first_ones(tmp_path):
    space = read_space(SPACE)
    assert taken(tmp_path, SPACE, 3, 3) == space.first_sets()[:3]
    study = Study(tmp_path, space, settings_of(space, 3), None)
    assert study.take() is None and len(study.trials(COMPLETE)) == 3
