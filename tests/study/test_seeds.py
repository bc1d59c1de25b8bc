"""The probability that a new run beats another, against scipy, a published example and simulations; in the table."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm
from test_comparison import INCREASING, STEP, write_run

from util.study.comparison import compare
from util.study.statistics import probability_of_superiority
from util.study.tables import csv_table, rounded_cells, text_table


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_superiority_is_mann_whitneys_statistic_and_symmetric(method, base):
    a, b = np.array(method), np.array(base)
    estimate, low, high = probability_of_superiority(a, b)
    assert estimate == pytest.approx(mannwhitneyu(a, b).statistic / (len(a) * len(b)))
    assert 0 <= low <= estimate <= high <= 1 and high - low > 0.2
    reverse = probability_of_superiority(b, a)
    assert (1 - reverse[0], 1 - reverse[2], 1 - reverse[1]) == pytest.approx((estimate, low, high), abs=2e-4)


def test_superiority_equals_a_published_example():
    """Of the R package SingleCaseES (NAP, method 5 of Newcombe 2006), whose root finder stops at 1e-4."""
    after, before = np.array([28, 25, 24, 27, 30, 30, 29]), np.array([20, 20, 26, 25, 22, 23])
    assert probability_of_superiority(after, before) == pytest.approx((0.9166667, 0.5973406, 0.9860176), abs=1e-4)


@pytest.mark.parametrize("n_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("effect", [0, 1, 2])
def test_intervals_of_superiority_cover_the_truth_with_few_seeds(n_seeds, effect):
    rng = np.random.default_rng(n_seeds)
    true, n_studies, covered = norm.cdf(effect / np.sqrt(2)), 300, 0
    for _ in range(n_studies):
        _, low, high = probability_of_superiority(rng.normal(effect, 1, n_seeds), rng.normal(0, 1, n_seeds))
        covered += low <= true <= high
    assert covered / n_studies > 0.87


def test_superiority_is_in_the_table_where_both_have_several_seeds(tmp_path):
    for seed, right in enumerate(("1111100000", "1111000000", "1111110000")):
        write_run(tmp_path / f"base{seed}", right, seed=seed)
    for seed, right in enumerate(("1111111000", "1111110000")):
        write_run(tmp_path / f"step{seed}", right, seed=seed, **STEP)
    write_run(tmp_path / "inc", **INCREASING)
    comparison = compare([str(tmp_path)])
    estimate, low, high = probability_of_superiority(np.array([70, 60]), np.array([50, 40, 60]))
    assert estimate == 5.5 / 6
    header, (base, step, inc, _) = rounded_cells(comparison)
    assert header[-1] == "beats base" and base[-1] == inc[-1] == "–"
    assert step[-1] == f"0.92 ({low:.2f} to {high:.2f})"
    assert "a new run scores above a new run of the base" in text_table(comparison)
    row = list(csv.DictReader(io.StringIO(csv_table(comparison))))[1]
    assert float(row["superiority_low"]) == pytest.approx(low, abs=1e-4)
