"""Clusters of questions in files, tables and figures."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_comparison import STEP, write_run

from lavin.runtime.errors import UserError
from util.comparison import figures
from util.comparison.comparison import compare
from util.comparison.finished_runs import read_run
from util.comparison.statistics import accuracy_interval, contrast, design_effect, mcnemar, seed_variance, tango
from util.comparison.tables import text_table

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
    difference = comparison.differences["Step Decay"]
    base, step = (method.outcomes[0] for method in comparison.methods)
    assert difference.p == mcnemar(step, base, np.array(CLUSTERS)) == 2 / 2**3  # 2, 1 and 1 more in three clusters
    ends = tango(step, base, np.array(CLUSTERS))
    assert (difference.low, difference.high) == pytest.approx([100 * end for end in ends])
    ends = accuracy_interval(step[None], np.array(CLUSTERS), None)
    assert comparison.methods[1].interval("Avg") == pytest.approx([100 * end for end in ends])


def test_clusters_and_seeds_are_counted_together(tmp_path):
    rights = ("1111100000", "1111111001", "0101110000")
    for seed, right in enumerate(rights):
        write_clustered(tmp_path / f"base{seed}", right, seed=seed)
        write_clustered(tmp_path / f"step{seed}", right[::-1], seed=seed, **STEP)
    comparison = compare([str(tmp_path)])
    base = np.array([[int(digit) for digit in right] for right in rights])
    rows, clusters = [base, base[:, ::-1]], np.array(CLUSTERS)
    between = seed_variance(rows, clusters)
    ends = accuracy_interval(base, clusters, between)
    assert comparison.methods[0].interval("Avg") == pytest.approx([100 * end for end in ends])
    assert comparison.differences["Step Decay"].p == contrast(rows, (-1, 1), clusters, between).p


def test_the_table_states_the_clusters_and_their_design_effects(tmp_path):
    write_clustered(tmp_path / "base", "1111100000")
    write_clustered(tmp_path / "step", "1111111110", **STEP)
    base, step = np.array([1] * 5 + [0] * 5), np.array([1] * 9 + [0])
    effects = [design_effect(values, np.array(CLUSTERS)) for values in (base, step, step - base)]
    text = text_table(compare([str(tmp_path)]))
    assert "5 clusters of 1 to 3 questions" in text
    assert f"measured as {np.mean(effects[:2]):.2f} for accuracies, {effects[2]:.2f} for differences" in text


@pytest.mark.parametrize("order", [["base", "step"], ["step", "base"]])
def test_the_fewest_clusters_count_whatever_the_order_of_runs(tmp_path, order):
    """The names of clusters are no part of the data's checksum where questions have no lecture."""
    write_clustered(tmp_path / "base", "1111100000", [0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    write_clustered(tmp_path / "step", "1111111110", **STEP)
    comparison = compare([str(tmp_path / name) for name in order])
    assert comparison.clusters.tolist() == CLUSTERS
    assert (f"Note: {tmp_path}/base: the questions have other clusters than in {tmp_path}/step, whose clusters, "
            "the fewest, count for all.") in text_table(comparison)


def test_clusters_of_other_names_are_the_same(tmp_path):
    write_clustered(tmp_path / "base", "1111100000", [9 - name for name in CLUSTERS])
    write_clustered(tmp_path / "step", "1111111110", **STEP)
    comparison = compare([str(tmp_path)])
    assert comparison.clusters.tolist() == CLUSTERS
    assert not any("have other clusters" in note for note in comparison.notes)


@pytest.mark.parametrize("clusters", [[], CLUSTERS[:-1], [0] * 10, range(10)])
def test_without_clusters_all_questions_are_independent(tmp_path, clusters):
    """The clusters are not saved, saved for some answers, all the same, or all different."""
    write_clustered(tmp_path / "base", "1111100000", clusters)
    write_clustered(tmp_path / "step", "1111111110", clusters, **STEP)
    comparison = compare([str(tmp_path)])
    assert comparison.clusters is None and "clusters of" not in text_table(comparison)
    assert comparison.differences["Step Decay"].p == 2 / 2**4


def test_a_cluster_that_is_no_text_is_refused(tmp_path):
    line = {"qid": "0", "prediction": 0, "answer": 0, "cluster": 7}
    write_run(tmp_path / "a", "1", files={"generations.jsonl": [line]})
    with pytest.raises(UserError, match="line 1: cluster: should be a valid string, not 7"):
        read_run(tmp_path / "a")


def test_intervals_with_clusters_are_drawn(tmp_path):
    write_clustered(tmp_path / "base", "1111111000")
    (method,) = compare([str(tmp_path)]).methods
    _, ax = plt.subplots()
    figures.draw_accuracy(ax, [method], cut=True)
    (container,) = ax.containers
    assert container.lines[2][0].get_segments()[0][:, 0] == pytest.approx(method.interval("Avg"))
    low, high = ax.get_xlim()
    assert low <= method.interval("Avg")[0] and method.interval("Avg")[1] <= high
    plt.close()
