"""Statistics with clustered questions against scipy, statsmodels, tables, loops and simulations; clusters in files,
tables and figures."""

import csv
import io
import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, sem
from test_comparison import STEP, write_run

from lavin.runtime.errors import UserError
from util.study import figures, statistics
from util.study.comparison import compare
from util.study.finished_runs import read_run
from util.study.statistics import (
    design_effect,
    effective_size,
    expected_design_effect,
    mcnemar,
    paired_bootstrap,
    standard_error,
    wilson,
)
from util.study.tables import csv_table, rounded_cells, text_table

# Formulas


@st.composite
def clustered_values(draw):
    """Values [n], and their clusters, of which each has at least one."""
    clusters = draw(st.lists(st.integers(0, 5), min_size=2, max_size=30))
    values = draw(st.lists(st.integers(-2, 2), min_size=len(clusters), max_size=len(clusters)))
    return np.array(values, float), np.unique(clusters, return_inverse=True)[1]


@given(clustered_values())
def test_standard_error_sums_the_products_of_residuals_within_clusters(drawn):
    values, clusters = drawn
    n, g = len(values), clusters.max() + 1
    residuals = values - values.mean()
    total = sum(residuals[i] * residuals[j] for i in range(n) for j in range(n) if clusters[i] == clusters[j])
    assert standard_error(values, clusters) == pytest.approx(np.sqrt(max(0, total) * g / max(1, g - 1)) / n, abs=1e-7)


def test_standard_error_equals_statsmodels():
    """OLS on a constant with cov_type="cluster", statsmodels 0.15."""
    values = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1])
    clusters = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    assert standard_error(values, clusters) == pytest.approx(0.04618802153517005, rel=1e-9)


@given(clustered_values())
def test_a_question_as_its_own_cluster_is_the_plain_case(drawn):
    values, _ = drawn
    alone = np.arange(len(values))
    assert standard_error(values, alone) == standard_error(values) == pytest.approx(sem(values), abs=1e-12)
    assert design_effect(values, alone) == pytest.approx(1)
    method, base = (values[None] > 0).astype(int), (values[None] > -1).astype(int)
    assert mcnemar(method, base, alone) == mcnemar(method, base)
    assert paired_bootstrap(method, base, alone) == paired_bootstrap(method, base)


def test_design_effect_by_hand():
    clusters = np.repeat(np.arange(10), 4)
    copies = np.repeat([1, 0, 0, 1, 1, 1, 0, 1, 0, 1], 4)  # 40 questions say as much as 10
    assert design_effect(copies, clusters) == pytest.approx(39 / 9)
    assert effective_size(copies, clusters) == pytest.approx(40 / (39 / 9) * (1.959964 / 2.262157) ** 2, rel=1e-5)
    opposite = np.tile([1, 0], 20)  # no variance between clusters: no more than 40 independent questions
    assert effective_size(opposite, clusters) == pytest.approx(40 * (1.959964 / 2.262157) ** 2, rel=1e-5)
    assert design_effect(np.ones(40), clusters) == 1
    assert expected_design_effect(40, 3 / 39, 0.2) == pytest.approx(1 + 3 * 0.2)  # Kish's, for clusters of 4


@pytest.mark.parametrize("n_clusters, quantile", [(2, 12.706), (3, 4.303), (5, 2.776), (12, 2.201), (61, 2.000),
                                                  (121, 1.980)])
def test_few_clusters_count_less_by_the_table_of_students_t(n_clusters, quantile):
    """Quantiles of any textbook's table, at 97.5 % and one degree of freedom less than clusters."""
    pairs, clusters = np.tile([1, 0], n_clusters), np.repeat(np.arange(n_clusters), 2)
    assert effective_size(pairs, clusters) == pytest.approx(2 * n_clusters * (1.959964 / quantile) ** 2, rel=6e-4)


def test_clustered_test_equals_enumerating_the_sign_flips_of_clusters():
    rng = np.random.default_rng(1)
    method, base = (rng.random((3, 40)) < 0.8).astype(int), (rng.random((2, 40)) < 0.6).astype(int)
    clusters = rng.integers(10, size=40)
    sums = np.array([(method.mean(0) - base.mean(0))[clusters == c].sum() for c in range(10)])
    flipped = np.array(list(itertools.product([1, -1], repeat=10))) @ sums
    expected = np.mean(abs(flipped) >= abs(sums.sum()) - 1e-9)
    assert expected < 0.5
    assert mcnemar(method, base, clusters) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(method, base) != pytest.approx(expected, rel=0.1)


def test_clustered_bootstrap_resamples_clusters_of_any_size():
    rng = np.random.default_rng(5)
    clusters = np.sort(rng.integers(30, size=200))
    differences = rng.choice([0, 1, 1, 1, 1], 200) * (clusters % 3 > 0)
    method, base = (differences > 0)[None].astype(int), (differences < 0)[None].astype(int)
    drawn = [np.concatenate([np.flatnonzero(clusters == c) for c in rng.integers(30, size=30)]) for _ in range(4000)]
    expected = np.percentile([(method - base)[0, questions].mean() for questions in drawn], [2.5, 97.5])
    assert paired_bootstrap(method, base, clusters) == pytest.approx(tuple(expected), abs=0.011)
    plain = paired_bootstrap(method, base)
    assert expected[1] - expected[0] > 1.3 * (plain[1] - plain[0])


# Rates in simulated studies: of 60 lectures with 1 to 20 questions, which share half of what decides an answer


def simulated_study(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outcomes [1, n] of two methods that are equally good, at 70 % on average; clusters."""
    clusters = np.repeat(np.arange(60), rng.integers(1, 21, 60))
    shared = rng.standard_normal((3, 60))[:, clusters]
    own = rng.standard_normal((3, len(clusters)))
    ability = shared[0] + own[0] + shared[1:] + own[1:]  # of the question, and of each method
    return *(ability > -2 * norm.ppf(0.7)).astype(int)[:, None], clusters


def test_clustered_intervals_and_tests_keep_their_promise_and_plain_ones_do_not(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 400)
    rng = np.random.default_rng(0)
    covered, plainly, zero, zero_plainly, found, found_plainly = np.zeros(6)
    n_studies = 300
    for _ in range(n_studies):
        method, base, clusters = simulated_study(rng)
        n = effective_size(method[0], clusters)
        low, high = wilson(method.mean() * n, n)
        covered += low <= 0.7 <= high
        low, high = wilson(method.sum(), method.size)
        plainly += low <= 0.7 <= high
        low, high = paired_bootstrap(method, base, clusters)
        zero += low <= 0 <= high
        low, high = paired_bootstrap(method, base)
        zero_plainly += low <= 0 <= high
        found += mcnemar(method, base, clusters) < 0.05
        found_plainly += mcnemar(method, base) < 0.05
    rates = np.array([covered, zero, n_studies - found]) / n_studies
    assert (abs(rates - 0.95) < 0.031).all()
    assert max(plainly, zero_plainly, n_studies - found_plainly) / n_studies < 0.8


# In files, tables and figures


CLUSTERS = [0, 0, 0, 1, 1, 2, 2, 3, 4, 4]


def write_clustered(folder: Path, right: str, clusters=CLUSTERS, **flags) -> None:
    write_run(folder, right, **flags)
    path = folder / "generations.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, name in zip(lines, clusters, strict=False):
        line["cluster"] = f"lecture {name}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_clusters_of_one_run_are_used_for_all(tmp_path):
    write_run(tmp_path / "base", "1111100000")
    write_clustered(tmp_path / "step", "1111111110", **STEP)
    comparison = compare([str(tmp_path)])
    assert comparison.clusters.tolist() == CLUSTERS
    difference = comparison.clustered["Step Decay"]
    method, base = comparison.methods[1].outcomes, comparison.methods[0].outcomes
    assert difference.p == mcnemar(method, base, np.array(CLUSTERS)) == 2 / 2**3  # 2, 1 and 1 more in three clusters
    assert comparison.differences["Step Decay"].p == 2 / 2**4
    ends = paired_bootstrap(method, base, np.array(CLUSTERS))
    assert (difference.low, difference.high) == pytest.approx([100 * end for end in ends])
    error = standard_error((method - base)[0], np.array(CLUSTERS))
    assert difference.detectable == pytest.approx(100 * 2.8015852 * error)
    n = effective_size(method[0], np.array(CLUSTERS))
    assert comparison.methods[1].clustered == pytest.approx([100 * end for end in wilson(0.9 * n, n)])
    header, (_, step, _) = rounded_cells(comparison)
    cells = dict(zip(header, step, strict=True))
    assert cells["p (Holm), clustered"] == "0.250" and cells["p (Holm)"] == "0.125"
    assert cells["Avg, clustered"] == "{:.2f} to {:.2f}".format(*comparison.methods[1].clustered)
    row = list(csv.DictReader(io.StringIO(csv_table(comparison))))[1]
    assert (row["p_clustered"], row["p_mcnemar"]) == ("0.25", "0.125")
    assert float(row["difference_clustered_low"]) == pytest.approx(difference.low, abs=1e-4)


def test_clustered_intervals_are_of_the_mean_over_the_seeds(tmp_path):
    rights = ("1111100000", "1111111001", "0101110000")
    for seed, right in enumerate(rights):
        write_clustered(tmp_path / f"base{seed}", right, seed=seed)
    (method,) = compare([str(tmp_path)]).methods
    mean = np.array([[int(digit) for digit in right] for right in rights]).mean(0)
    n = effective_size(mean, np.array(CLUSTERS))
    assert method.clustered == pytest.approx([100 * end for end in wilson(mean.mean() * n, n)])


def test_the_table_states_the_clusters_and_their_design_effects(tmp_path):
    write_clustered(tmp_path / "base", "1111100000")
    write_clustered(tmp_path / "step", "1111111110", **STEP)
    base, step = np.array([1] * 5 + [0] * 5), np.array([1] * 9 + [0])
    effects = [design_effect(values, np.array(CLUSTERS)) for values in (base, step, step - base)]
    text = text_table(compare([str(tmp_path)]))
    assert "5 clusters of 1 to 3 questions" in text
    assert f"measured as {np.mean(effects[:2]):.2f} for accuracies, {effects[2]:.2f} for differences" in text


@pytest.mark.parametrize("clusters", [[], CLUSTERS[:-1], [0] * 10, range(10)])
def test_without_clusters_there_are_no_clustered_columns(tmp_path, clusters):
    """Of an earlier version, of one that was updated in between, all the same, and all different."""
    write_clustered(tmp_path / "base", "1111100000", clusters)
    write_clustered(tmp_path / "step", "1111111110", clusters, **STEP)
    comparison = compare([str(tmp_path)])
    assert not comparison.clustered and "clustered" not in text_table(comparison)
    assert comparison.differences["Step Decay"].p == 2 / 2**4
    assert list(csv.DictReader(io.StringIO(csv_table(comparison))))[1]["p_clustered"] == ""


def test_a_cluster_that_is_no_text_is_refused(tmp_path):
    line = {"qid": "0", "prediction": 0, "answer": 0, "cluster": 7}
    write_run(tmp_path / "a", "1", files={"generations.jsonl": [line]})
    with pytest.raises(UserError, match="line 1: cluster: should be a valid string, not 7"):
        read_run(tmp_path / "a")


def test_clustered_intervals_are_drawn_thin(tmp_path):
    write_clustered(tmp_path / "base", "1111111000")
    (method,) = compare([str(tmp_path)]).methods
    _, ax = plt.subplots()
    figures.draw_accuracy(ax, [method], cut=True)
    thin, thick = (container.lines[2][0] for container in ax.containers)
    assert thin.get_segments()[0][:, 0] == pytest.approx(method.clustered)
    assert thick.get_segments()[0][:, 0] == pytest.approx(method.interval("Avg"))
    assert thin.get_linewidth()[0] < thick.get_linewidth()[0] and "thin: clustered" in ax.get_title()
    low, high = ax.get_xlim()
    assert low <= method.clustered[0] and method.clustered[1] <= high
    plt.close()
