"""The plan against scipy's noncentral t, tables, simulated studies of known variances, and cases computed by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import nct, norm, t
from test_clusters import write_clustered
from test_comparison import FLAGS, STEP, write_run

import plot_results
from lavin.runtime.errors import UsageError, UserError
from tests.simulated_studies import World, simulate
from util.comparison.comparison import Comparison, Method, compare, differences_to_first, published
from util.comparison.finished_runs import Run
from util.comparison.planning import (
    Variances,
    detectable,
    measure,
    plan,
    questions_needed,
    seeds_needed,
)
from util.comparison.tables import csv_table, difference_cells
from util.evaluation.answers import Answer
from util.evaluation.scoring import COLUMNS

# What variances allow


@pytest.mark.parametrize("seeds", [3, 4, 5, 10, 30, 100])
def test_seeds_find_their_difference_four_times_of_five(seeds):
    """The exact power of Student's t-test."""
    found, df = detectable(Variances(0.25, 0, 0), seeds, 10**9), 2 * (seeds - 1)
    noncentrality = found / math.sqrt(2 * 0.25 / seeds)
    critical = t.ppf(0.975, df)
    power = nct.sf(critical, df, noncentrality) + nct.cdf(-critical, df, noncentrality)
    assert power == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize("seeds, quantiles", [(2, (4.303, 1.061)), (3, (2.776, 0.941)), (4, (2.447, 0.906)),
                                              (6, (2.228, 0.879)), (31, (2.000, 0.848))])
def test_detectable_by_the_table_of_students_t(seeds, quantiles):
    """Quantiles of any textbook's table, at 97.5 and 80 % and 2 (seeds - 1) degrees of freedom; a variance of 0.25."""
    assert detectable(Variances(0.25, 0, 0), seeds, 10**9) == pytest.approx(sum(quantiles) * (0.5 / seeds) ** 0.5,
                                                                         rel=4e-4)


@pytest.mark.parametrize("effect, seeds", [(0.5, 64), (0.8, 26), (1.0, 17)])
def test_seeds_needed_equal_cohens_table(effect, seeds):
    """Cohen (1988), table 2.4.1, also by statsmodels' TTestIndPower; the standard deviation between seeds is 1."""
    assert seeds_needed(Variances(1, 0, 0), 10**9, effect) == seeds


def test_questions_alone_by_hand():
    """10 % of the questions discordant, 1,000 questions, and two imaginary ones."""
    variance = (999 * 1000 + 2 * 100**2) / (1001 * 1002)
    by_hand = (1.9623 + 0.8420) * math.sqrt(variance)  # t of 1,001 degrees of freedom
    assert detectable(Variances(0, 1000, 0), 2, 1000) == pytest.approx(by_hand, rel=1e-4)
    assert questions_needed(Variances(0, 1000, 0), 2, 0.5) == pytest.approx(1000 * (2.8015852 / 0.5) ** 2, rel=1e-3)
    lectures = Variances(0, 1000, 0, cluster_size=100)  # ten clusters, and two imaginary ones of a question each
    variance = (1000 * 1000 * 9 / 10 + 2 * 100**2) / 1002**2 * 12 / 11
    assert detectable(lectures, 2, 1000) == pytest.approx((2.2010 + 0.8755) * math.sqrt(variance), rel=1e-4)


def test_one_seed_tells_nothing_of_methods():
    assert detectable(Variances(0, 100, 0), 1, 10**9) == math.inf
    assert questions_needed(Variances(0.01, 100, 0), 1, 50) is None


def test_more_methods_need_more():
    """The quantile of the smallest p (Holm): 5 % over all of them."""
    two, eight = (detectable(Variances(0, 1000, 0, methods=m), 50, 10**6) for m in (2, 8))
    assert eight / two == pytest.approx((norm.ppf(1 - 0.025 / 7) + norm.ppf(0.8)) / 2.8015852, rel=1e-3)


@given(st.floats(0, 2), st.floats(1, 3000), st.floats(0.1, 1000), st.integers(2, 60), st.floats(0.1, 5))
def test_questions_needed_are_the_fewest_that_find_it(seeds_variance, questions, noise, seeds, points):
    variances = Variances(seeds_variance, questions, noise)
    n = questions_needed(variances, seeds, points)
    if n is None:
        assert detectable(variances, seeds, 10**9) > points
    else:
        assert detectable(variances, seeds, n) <= points and (n == 2 or detectable(variances, seeds, n - 1) > points)
    assert detectable(variances, seeds + 1, 1000) < detectable(variances, seeds, 1000)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_studies_of_the_planned_size_find_the_difference(seeds):
    """Simulated studies, by what their own tables print. 200 studies: the error of a rate is 3 points."""
    world = World(seeds, deviation=1.0, lectures=False, n=1500)
    rng = np.random.default_rng(seeds)
    many, clusters = replace(world, seeds=40).study(rng, np.zeros(2))
    variances = measure(comparison_of(many, clusters))
    power, _ = simulate(world, detectable(variances, seeds, 1500), 200)
    assert 0.68 < power < 0.93


@given(st.integers(2, 5), st.integers(2, 4), st.booleans(), st.integers(0, 10**6))
def test_the_plan_for_as_many_seeds_and_questions_says_what_the_table_says(seeds, n_methods, clustered, seed):
    rng = np.random.default_rng(seed)
    clusters = np.arange(300) // 3 if clustered else None
    question = rng.standard_normal(300)
    rows = [(question + rng.standard_normal(300) + rng.standard_normal((seeds, 300))
             + 0.3 * rng.standard_normal((seeds, 1)) < 1).astype(int) for _ in range(n_methods)]
    comparison = comparison_of(rows, clusters)
    in_table = [difference.detectable**2 for difference in differences_to_first(comparison.methods, clusters).values()]
    variances = measure(comparison)
    if variances.seeds and variances.questions:  # else the table takes the larger of the two, which the plan does not
        assert detectable(variances, seeds, 300) == pytest.approx(math.sqrt(np.mean(in_table)), rel=0.01)


@pytest.mark.parametrize("n", [8, 100, 400])
@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_answers_allow_no_more_in_the_plan_than_in_the_table(n, seeds):
    """All variances are 0, but a few equal answers tell little. In the table, two imaginary questions say so."""
    comparison = comparison_of([np.ones((seeds, n), int)] * 2)
    (difference,) = differences_to_first(comparison.methods).values()
    assert detectable(measure(comparison), seeds, n) == pytest.approx(difference.detectable)
    assert 300 < questions_needed(measure(comparison), seeds, 1.0) < 500
    assert "–" in plan(comparison, 1) if n == 8 else "396" in plan(comparison, 1)


def test_an_assumed_deviation_does_not_make_few_equal_answers_tell_much():
    comparison = comparison_of([np.ones((1, 8), int)] * 2)
    assert detectable(measure(comparison), 6, 8) > 40 and seeds_needed(measure(comparison), 8, 1.0) is None


def test_a_difference_that_is_impossible_is_none_that_is_found():
    """Two equal answers: a t-test would need 170 points."""
    comparison = comparison_of([np.ones((2, 2), int)] * 2)
    (difference,) = differences_to_first(comparison.methods).values()
    assert difference.is_of_methods and difference.detectable == detectable(measure(comparison), 2, 2) == math.inf
    compared = replace(comparison, differences=differences_to_first(comparison.methods))
    assert difference_cells(difference)[-1] == "–" and csv_table(compared).splitlines()[-1].endswith(",")


# Variances of runs


def comparison_of(outcomes: list[np.ndarray], clusters=None) -> Comparison:
    methods = []
    for name, rows in zip(("Base", "Step Decay", "Exp. Decay", "Cyclical LR"), outcomes, strict=False):
        n = rows.shape[1]
        runs = [Run("", {**FLAGS, "seed": i}, [], dict.fromkeys(COLUMNS, n), dict.fromkeys(COLUMNS, int(row.sum())),
                    answers=[Answer(str(q), int(not x), 0) for q, x in enumerate(row)]) for i, row in enumerate(rows)]
        methods.append(Method(name, runs))
    return Comparison(methods, {}, [], clusters=clusters)


def simulated_comparison(n=20_000, seeds=6, deviation=0.02, clusters=None) -> Comparison:
    """Two methods, right with a probability that depends on question, method and seed. The chances of a question are
    0.6 in one method and 0.8 in the other or the reverse, at random: of a variance between differences of 0.2^2."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-0.1, 0.1], n) if clusters is None else rng.choice([-0.1, 0.1], clusters.max() + 1)[clusters]
    rows = []
    for half in (sign, -sign):
        chance = 0.7 + half + rng.normal(0, deviation, (seeds, 1))
        rows.append((rng.random((seeds, n)) < chance).astype(int))
    return comparison_of(rows, clusters)


def test_variances_are_found_again():
    found = measure(simulated_comparison())
    assert found.noise == pytest.approx(1e4 * (0.8 * 0.2 + 0.6 * 0.4) / 2, rel=0.03)
    assert found.questions == pytest.approx(1e4 * 0.2**2, rel=0.05)
    many = measure(simulated_comparison(2000, seeds=40))
    assert math.sqrt(many.seeds) == pytest.approx(2, rel=0.15)
    assert "12 runs of 2 methods" in found.notes[0] and "Measured, on 20,000 questions" in found.notes[1]
    assert measure(simulated_comparison(deviation=0)).seeds < 0.1


def test_the_standard_deviation_between_seeds_has_the_interval_of_any_textbook():
    """Two methods with three seeds each: 4 degrees of freedom, whose chi-squared quantiles are 0.484 and 11.143."""
    rows = [(np.arange(1000) < np.array([[500], [520], [540]])).astype(int)] * 2  # a standard deviation of 2 points
    low, high = 2 * math.sqrt(4 / 11.143), 2 * math.sqrt(4 / 0.4844)
    assert f"of 2.00 points (95 % interval {low:.2f} to {high:.2f})" in measure(comparison_of(rows)).notes[0]


def test_clusters_multiply_the_variance_between_questions():
    clusters = np.repeat(np.arange(1000), 10)
    found = measure(simulated_comparison(10_000, clusters=clusters))
    assert found.questions == pytest.approx(10 * 1e4 * 0.2**2, rel=0.1)
    assert found.noise == pytest.approx(1e4 * (0.8 * 0.2 + 0.6 * 0.4) / 2, rel=0.05)
    assert "clustered by lecture" in found.notes[1]


def test_single_seeds_leave_what_they_cannot_show_to_assumptions(tmp_path):
    write_run(tmp_path / "base", "1111100000")
    write_run(tmp_path / "step", "1111111110", **STEP)
    found = measure(compare([str(tmp_path)]))
    assert (found.seeds, found.noise) == (0.25, 0)
    assert found.questions == pytest.approx(1e4 * 0.4 * 0.6 * 10 / 9)  # 4 of 10 differ, all in one direction
    assert found.notes[0].startswith("Assumed: a standard deviation of 0.5 points") and "Measured" in found.notes[1]


def test_without_predictions_answers_are_assumed_independent():
    found = measure(published())
    base, *others = [method.overall for method in published().methods]
    assert found.questions == pytest.approx(base * (100 - base) + np.mean([p * (100 - p) for p in others]))


def test_accuracies_without_answers_still_tell_of_seeds(tmp_path):
    for seed, right in enumerate(("1111100000", "1111000000", "1111110000")):
        write_run(tmp_path / f"base{seed}", right, seed=seed, files={"generations.jsonl": None})
    write_run(tmp_path / "step", files={"generations.jsonl": None}, **STEP)
    found = measure(compare([str(tmp_path)]))
    assert (found.seeds, found.noise) == (pytest.approx(100), 0) and "3 runs of 1 method:" in found.notes[0]


# The command


def run_command(*arguments) -> None:
    plot_results.main(plot_results.get_args_parser().parse_args(list(map(str, arguments))))


def test_plan_of_the_published_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_command("--plan", "0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-1] == "questions for 0.5 points" and "4,241 questions" in lines[0]
    assert [line.split() for line in lines[2:4]] == [["2", "±3.13", "–"], ["3", "±2.90", "–"]]
    assert lines[7].split() == ["50", "±2.52", "211,699"]
    assert "No number of seeds finds a difference of 0.5 points with 4,241 questions" in lines[9]
    assert sum(line.startswith("Assumed") for line in lines) == 2 and not list(tmp_path.iterdir())


def test_plan_of_own_runs_names_the_seeds(tmp_path, capsys):
    for seed, right in enumerate(("1111100000", "1111000000", "1110100000")):
        write_clustered(tmp_path / f"base{seed}", right, seed=seed)
        write_clustered(tmp_path / f"step{seed}", right[:-4] + "0110", seed=seed, **STEP)
    run_command("--plan", "60", tmp_path)
    out = capsys.readouterr().out
    comparison = compare([str(tmp_path)])
    variances = measure(comparison)
    enough = next(seeds for seeds in range(2, 100) if detectable(variances, seeds, 10) <= 60)
    assert f"needs {enough} seed" in out and "6 runs of 2 methods" in out and out == plan(comparison, 60) + "\n"


def test_a_plan_needs_two_methods_of_one_kind(tmp_path):
    write_run(tmp_path / "base")
    with pytest.raises(UserError, match="--plan goes by .*: leave --published out"):
        run_command("--plan", "0.5", "--published", tmp_path)
    with pytest.raises(UserError, match="--plan needs runs of two methods"):
        run_command("--plan", "0.5", tmp_path)


@pytest.mark.parametrize("points", ["0", "-1", "nan", "100", "half"])
def test_a_difference_that_makes_no_sense_is_refused(points):
    with pytest.raises(UsageError, match="--plan"):
        run_command("--plan", points)
