"""The plan against scipy's noncentral t, tables, simulated studies of known variances, and cases computed by hand."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import nct, t
from test_clusters import write_clustered
from test_comparison import FLAGS, STEP, write_run

import plot_results
from lavin.runtime.errors import UsageError, UserError
from util.evaluation.answers import Answer
from util.evaluation.scoring import COLUMNS
from util.study.comparison import Comparison, Method, compare, published
from util.study.finished_runs import Run
from util.study.planning import (
    Variances,
    detectable,
    measure,
    plan,
    questions_needed,
    seeds_detectable,
)

# What variances allow


@pytest.mark.parametrize("seeds", [3, 4, 5, 10, 30, 100])
def test_seeds_find_their_difference_four_times_of_five(seeds):
    """The exact power of Student's t-test."""
    found, df = seeds_detectable(Variances(0.25, 0, 0, ()), seeds), 2 * (seeds - 1)
    noncentrality = found / math.sqrt(2 * 0.25 / seeds)
    critical = t.ppf(0.975, df)
    power = nct.sf(critical, df, noncentrality) + nct.cdf(-critical, df, noncentrality)
    assert power == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize("seeds, quantiles", [(2, (4.303, 1.061)), (3, (2.776, 0.941)), (4, (2.447, 0.906)),
                                              (6, (2.228, 0.879)), (31, (2.000, 0.848))])
def test_seeds_detectable_by_the_table_of_students_t(seeds, quantiles):
    """Quantiles of any textbook's table, at 97.5 and 80 % and 2 (seeds - 1) degrees of freedom; a variance of 0.25."""
    assert seeds_detectable(Variances(0.25, 0, 0, ()), seeds) == pytest.approx(sum(quantiles) * (0.5 / seeds) ** 0.5,
                                                                               rel=4e-4)


@pytest.mark.parametrize("effect, seeds", [(0.5, 64), (0.8, 26), (1.0, 17)])
def test_seeds_needed_equal_cohens_table(effect, seeds):
    """Cohen (1988), table 2.4.1, also by statsmodels' TTestIndPower; the standard deviation between seeds is 1."""
    variances = Variances(1, 0, 0, ())
    assert seeds_detectable(variances, seeds) <= effect < seeds_detectable(variances, seeds - 1)


def test_questions_alone_by_hand():
    """10 % of the questions discordant, 1,000 questions: 2.8016 * sqrt(0.1 / 1000)."""
    one_seed = Variances(0, 1000, 0, ())
    assert detectable(one_seed, 1, 1000) == pytest.approx(2.8016, abs=1e-4)
    assert questions_needed(one_seed, 1, 0.5) == math.ceil(1000 * (2.8015852 / 0.5) ** 2) == 31396
    noisy = Variances(0, 600, 200, ())  # 600 + 2 * 200 with one seed, 600 + 2 * 200 / 4 with four
    assert detectable(noisy, 1, 1000) == pytest.approx(2.8016, abs=1e-4)
    assert detectable(noisy, 4, 700) == pytest.approx(2.8016, abs=1e-4)


def test_one_seed_tells_nothing_of_methods_whose_seeds_differ():
    assert detectable(Variances(0.01, 100, 0, ()), 1, 10**9) == math.inf
    assert questions_needed(Variances(0.01, 100, 0, ()), 1, 50) is None


@given(st.floats(0, 2), st.floats(0, 3000), st.floats(0.1, 1000), st.integers(2, 60), st.floats(0.1, 5))
def test_questions_needed_are_the_fewest_that_find_it(seeds_variance, questions, noise, seeds, points):
    variances = Variances(seeds_variance, questions, noise, ())
    n = questions_needed(variances, seeds, points)
    if n is None:
        assert detectable(variances, seeds, 10**12) >= points
    else:
        assume(1 < n < 10**9)
        assert detectable(variances, seeds, n) <= points * (1 + 1e-9) and detectable(variances, seeds, n - 1) > points
    assert detectable(variances, seeds + 1, 1000) < detectable(variances, seeds, 1000)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_simulated_studies_of_the_planned_size_find_the_difference(seeds):
    """By Welch's t-test with random seeds and questions (Satterthwaite 1946); at least 4 times of 5."""
    variances, n, n_studies = Variances(0.2, 400, 300, ()), 2000, 20_000
    of_seeds, of_questions = variances.seeds + variances.noise / n, variances.questions / n
    rng = np.random.default_rng(seeds)
    true = detectable(variances, seeds, n)
    runs = rng.normal(0, math.sqrt(of_seeds), (2, n_studies, seeds))
    difference = true + runs[0].mean(1) - runs[1].mean(1) + rng.normal(0, math.sqrt(of_questions), n_studies)
    estimated = runs.var(2, ddof=1).sum(0) / seeds
    df = (estimated + of_questions) ** 2 / (estimated**2 / (2 * (seeds - 1)))
    power = np.mean(abs(difference) / np.sqrt(estimated + of_questions) > t.ppf(0.975, df))
    assert 0.79 < power < (0.95 if seeds == 2 else 0.85)


# Variances of runs


def simulated_comparison(n=20_000, seeds=6, deviation=0.02, clusters=None) -> Comparison:
    """Two methods, right with a probability that depends on question, method and seed. The chances of a question are
    0.6 in one method and 0.8 in the other or the reverse, at random: of a variance between differences of 0.2^2."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-0.1, 0.1], n) if clusters is None else rng.choice([-0.1, 0.1], clusters.max() + 1)[clusters]
    methods = []
    for name, half in (("Base", sign), ("Step Decay", -sign)):
        chance = 0.7 + half + rng.normal(0, deviation, (seeds, 1))
        right = rng.random((seeds, n)) < chance
        runs = [Run("", {**FLAGS, "seed": i}, [], dict.fromkeys(COLUMNS, n), dict.fromkeys(COLUMNS, int(row.sum())),
                    answers=[Answer(str(q), int(not x), 0) for q, x in enumerate(row)]) for i, row in enumerate(right)]
        methods.append(Method(name, runs))
    return Comparison(methods, {}, [], clusters=clusters)


def test_variances_are_found_again():
    found = measure(simulated_comparison())
    assert found.noise == pytest.approx(1e4 * (0.8 * 0.2 + 0.6 * 0.4) / 2, rel=0.03)
    assert found.questions == pytest.approx(1e4 * 0.2**2, rel=0.05)
    many = measure(simulated_comparison(2000, seeds=40))
    assert math.sqrt(many.seeds) == pytest.approx(2, rel=0.15)
    assert "12 runs of 2 methods" in found.notes[0] and "Measured, on 20,000 questions" in found.notes[1]
    assert measure(simulated_comparison(deviation=0)).seeds < 0.1


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
    in_table = np.mean([difference.detectable for difference in published().differences.values()])
    assert detectable(Variances(0, found.questions, 0, ()), 1, 4241) == pytest.approx(in_table, abs=0.001)


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
    assert [line.split() for line in lines[2:5]] == [["1", "–", "–"], ["2", "±3.33", "–"], ["3", "±2.49", "–"]]
    assert lines[8].split() == ["50", "±2.00", "97,786"]
    assert "No number of seeds finds a difference of 0.5 points with 4,241 questions" in lines[10]
    assert sum(line.startswith("Assumed") for line in lines) == 2 and not list(tmp_path.iterdir())


def test_plan_of_own_runs_names_the_seeds(tmp_path, capsys):
    for seed, right in enumerate(("1111100000", "1111000000", "1110100000")):
        write_clustered(tmp_path / f"base{seed}", right, seed=seed)
        write_clustered(tmp_path / f"step{seed}", right[:-4] + "0110", seed=seed, **STEP)
    run_command("--plan", "60", tmp_path)
    out = capsys.readouterr().out
    comparison = compare([str(tmp_path)])
    variances = measure(comparison)
    enough = next(seeds for seeds in range(1, 100) if detectable(variances, seeds, 10) <= 60)
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
