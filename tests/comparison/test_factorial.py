"""Main effects and interactions of crossed schedules and dropouts: by hand, and in tables, figures and plans."""

import csv

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_comparison import write_run

import plot_results
from util.comparison import figures
from util.comparison.comparison import compare
from util.comparison.factorial import find_effects, find_grid
from util.comparison.planning import detectable, measure, measure_family
from util.comparison.statistics import block_variance, contrast, holm
from util.comparison.tables import notes

SCHEDULES = {"Base": {}, "Step Decay": {"lr_schedule": "step"}, "Exp. Decay": {"lr_schedule": "exponential"}}
DROPOUTS = {"Base": {}, "dropout 0.3": {"dropout_prob": 0.3, "dropout_lim": 0.2}}
N = 60


def answers(schedule: str, dropout: str, seed: int) -> str:
    """Step decay alone gains the first ten questions, dropout 0.3 the next ten; together they lose five of these."""
    rng = np.random.default_rng([seed, *map(ord, schedule + dropout)])
    right = np.array([False] * 25 + [True] * 35)
    if schedule == "Step Decay":
        right[:10] = True
    if dropout != "Base":
        right[10:20] = True
    if schedule == "Step Decay" and dropout != "Base":
        right[:5] = False
    right ^= rng.random(N) < 0.03
    return "".join("01"[int(digit)] for digit in right)


@pytest.fixture
def study(tmp_path):
    for i, (schedule, flags) in enumerate(SCHEDULES.items()):
        for j, (dropout, more) in enumerate(DROPOUTS.items()):
            for seed in range(3):
                write_run(tmp_path / f"runs/{i}{j}{seed}", answers(schedule, dropout, seed), seed=seed, **flags, **more)
    return tmp_path / "runs"


def rows_of(schedule: str, dropout: str) -> np.ndarray:
    return np.array([[int(digit) for digit in answers(schedule, dropout, seed)] for seed in range(3)])


def test_effects_by_hand(study):
    effects = {effect.name: effect for effect in find_effects(compare([str(study)]))}
    assert [(effect.family, name) for name, effect in effects.items()] == [
        ("schedule", "Step Decay"), ("schedule", "Exp. Decay"), ("dropout", "dropout 0.3"),
        ("interaction", "Step Decay x dropout 0.3"), ("interaction", "Exp. Decay x dropout 0.3")]
    rows = {(s, d): rows_of(s, d) for s in SCHEDULES for d in DROPOUTS}
    means = {key: 100 * row.mean() for key, row in rows.items()}
    step = (means["Step Decay", "Base"] + means["Step Decay", "dropout 0.3"]
            - means["Base", "Base"] - means["Base", "dropout 0.3"]) / 2
    assert effects["Step Decay"].points == pytest.approx(step)
    both = (means["Step Decay", "dropout 0.3"] - means["Step Decay", "Base"]
            - means["Base", "dropout 0.3"] + means["Base", "Base"])
    assert effects["Step Decay x dropout 0.3"].points == pytest.approx(both) and both < 0
    keys = [("Step Decay", "dropout 0.3"), ("Step Decay", "Base"), ("Base", "dropout 0.3"), ("Base", "Base")]
    family = np.array([[{("Step Decay", "dropout 0.3"): 1, ("Step Decay", "Base"): -1, ("Base", "dropout 0.3"): -1,
                         ("Base", "Base"): 1}.get(key, 0) for key in rows],
                       [{("Exp. Decay", "dropout 0.3"): 1, ("Exp. Decay", "Base"): -1, ("Base", "dropout 0.3"): -1,
                         ("Base", "Base"): 1}.get(key, 0) for key in rows]])
    between = block_variance(list(rows.values()), None, family)
    estimate = contrast([rows[key] for key in keys], (1, -1, -1, 1), None, between)
    found = effects["Step Decay x dropout 0.3"]
    assert found.p == pytest.approx(estimate.p) and found.detectable == pytest.approx(100 * estimate.detectable(2))
    assert (found.low, found.high) == pytest.approx([100 * end for end in estimate.interval()])
    for family in ("schedule", "interaction"):
        of_family = [effect for effect in effects.values() if effect.family == family]
        assert [effect.holm for effect in of_family] == holm([effect.p for effect in of_family])
    assert effects["dropout 0.3"].holm == effects["dropout 0.3"].p  # alone in its family


def test_what_is_not_crossed_is_left_out(study, tmp_path):
    write_run(study / "more", lr_schedule="cyclical", min_lr=5e-5)  # without the other dropout
    for name, more in DROPOUTS.items():
        write_run(study / f"rate {name}", "1" * N, lr=0.002, lr_schedule="step", **more)  # differs in something else
    comparison = compare([str(study)])
    grid = find_grid(comparison)
    assert grid.schedules == list(SCHEDULES) and grid.dropouts == list(DROPOUTS)
    assert all(sum(weights.values()) == pytest.approx(0)
               for effects in grid.families().values() for weights in effects.values())


def test_of_combinations_that_are_not_complete_the_largest_grid_is_taken(tmp_path):
    """Either other schedule has a dropout of its own beside the base's, and the second one another one, too."""
    more = {"Base": {}, "dropout 0.3": {"dropout_prob": 0.3}, "dropout 0.25": {"dropout_prob": 0.25},
            "dropout 0.2": {"dropout_prob": 0.2}}
    crossed = {"Base": list(more), "Step Decay": ["Base", "dropout 0.3"],
               "Exp. Decay": ["Base", "dropout 0.25", "dropout 0.2"]}
    for schedule, dropouts in crossed.items():
        for dropout in dropouts:
            write_run(tmp_path / f"{schedule} {dropout}", **SCHEDULES[schedule], **more[dropout])
    grid = find_grid(compare([str(tmp_path)]))
    assert grid.schedules == ["Base", "Exp. Decay"]
    assert grid.dropouts[0] == "Base" and set(grid.dropouts) == {"Base", "dropout 0.25", "dropout 0.2"}


def test_nothing_crossed_has_no_effects(tmp_path):
    for seed in range(2):
        for name, flags in SCHEDULES.items():
            write_run(tmp_path / f"{name}{seed}", seed=seed, **flags)
    assert find_grid(compare([str(tmp_path)])) is None and find_effects(compare([str(tmp_path)])) == []


def test_one_seed_has_no_effects(tmp_path):
    for i, flags in enumerate(SCHEDULES.values()):
        for j, more in enumerate(DROPOUTS.values()):
            write_run(tmp_path / f"{i}{j}", **flags, **more)
    comparison = compare([str(tmp_path)])
    assert find_grid(comparison) is not None and find_effects(comparison) == []


def test_effects_are_in_tables_figures_and_plans(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {})

    def run_command(*words):
        plot_results.main(plot_results.get_args_parser().parse_args([str(study), *map(str, words)]))
        return capsys.readouterr().out

    text, effects = run_command("--out", tmp_path / "out"), find_effects(compare([str(study)]))
    assert (tmp_path / "out" / "effects.png").is_file() and (tmp_path / "out" / "effects.svg").is_file()
    for effect in effects:
        assert any(line.startswith(effect.name) and f"{effect.points:+.2f}".replace("-", "−") in line
                   for line in text.splitlines())
        assert f"| {effect.name} | {effect.family} |" in (tmp_path / "out" / "table.md").read_text()
        assert f"\n{effect.name} & {effect.family} & " in (tmp_path / "out" / "table.tex").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "effects.csv").open()))
    assert [float(row["points"]) for row in rows] == pytest.approx([effect.points for effect in effects], abs=1e-4)
    plan = run_command("--plan", "1").splitlines()
    assert plan[0].split("  ")[-3:] == ["schedule effect", "dropout effect", "interaction effect"]
    comparison = compare([str(study)])
    variances, grid = measure(comparison), find_grid(comparison)
    families = grid.families()
    assert plan[3].split()[-3:] == [
        f"±{detectable(measure_family(variances, comparison, grid, families[family]), 3, N, weights, tests):.2f}"
        for family, weights, tests in (
            ("schedule", (0.5, 0.5, -0.5, -0.5), 2), ("dropout", (1 / 3, 1 / 3, 1 / 3, -1 / 3, -1 / 3, -1 / 3), 1),
            ("interaction", (1, -1, -1, 1), 2))]


def accuracies_of(rows: dict) -> np.ndarray:
    """[schedules, dropouts, seeds]."""
    return np.array([[rows[s, d].mean(1) for d in DROPOUTS] for s in SCHEDULES])


def test_the_variance_between_seeds_is_the_error_term_of_a_split_plot(study):
    """The mean squares of schedule x seed, dropout x seed and of all three, as textbooks sum them; but no less than the
    variance between the seeds of a method."""
    grid = find_grid(compare([str(study)]))
    a = accuracies_of({(s, d): rows_of(s, d) for s in SCHEDULES for d in DROPOUTS})
    of_runs = a.var(2, ddof=1).mean()
    n_schedules, n_dropouts, n_seeds = a.shape

    def mean(*kept: int) -> np.ndarray:
        return a.mean(tuple({0, 1, 2} - set(kept)), keepdims=True)

    of_schedule = mean(0, 2) - mean(0) - mean(2) + mean()
    of_dropout = mean(1, 2) - mean(1) - mean(2) + mean()
    of_both = a - mean(0, 1) - mean(0, 2) - mean(1, 2) + mean(0) + mean(1) + mean(2) - mean()
    expected = {"schedule": (n_dropouts * (of_schedule**2).sum(), (n_schedules - 1) * (n_seeds - 1)),
                "dropout": (n_schedules * (of_dropout**2).sum(), (n_dropouts - 1) * (n_seeds - 1)),
                "interaction": ((of_both**2).sum(), (n_schedules - 1) * (n_dropouts - 1) * (n_seeds - 1))}
    for family, (squares, freedom) in expected.items():
        found = grid.seed_variance(grid.families()[family], None)
        assert found.freedom == freedom and found.accuracies == pytest.approx(max(squares / freedom, of_runs))
    assert sum(squares / freedom > of_runs for squares, freedom in expected.values()) in (1, 2)


def test_a_seed_that_suits_a_schedule_with_every_dropout_counts_once(tmp_path):
    """All runs of a schedule and a seed answer alike: more dropouts tell nothing more about the schedule."""
    right = {"Base": (30, 40, 50), "Step Decay": (45, 35, 40), "Exp. Decay": (20, 25, 50)}
    for i, (schedule, flags) in enumerate(SCHEDULES.items()):
        for j, more in enumerate(DROPOUTS.values()):
            for seed, n in enumerate(right[schedule]):
                write_run(tmp_path / f"{i}{j}{seed}", "1" * n + "0" * (N - n), seed=seed, **flags, **more)
    grid = find_grid(compare([str(tmp_path)]))
    of_schedules = grid.seed_variance(grid.families()["schedule"], None)
    a = np.array(list(right.values())) / N  # [schedules, seeds]
    residuals = a - a.mean(0) - a.mean(1, keepdims=True) + a.mean()
    per_effect = 2 / (len(DROPOUTS) * 3)  # of the variance of a seed: the squares of weights, over the seeds
    assert per_effect * of_schedules.accuracies == pytest.approx(2 / 3 * (residuals**2).sum() / 4)
    assert grid.seed_variance(grid.families()["dropout"], None).accuracies == pytest.approx(a.var(1, ddof=1).mean())


def test_effects_are_of_the_seeds_that_all_methods_have(study):
    effects = find_effects(compare([str(study)]))
    for folder, seed in (("0", 7), ("further", 8)):  # of the base alone, before and behind its other runs
        write_run(study / folder, "1" * N, seed=seed)
    assert find_effects(compare([str(study)])) == effects


def test_the_plan_of_an_effect_is_that_of_its_table(study):
    comparison = compare([str(study)])
    grid, variances = find_grid(comparison), measure(comparison)
    for family, effects in grid.families().items():
        planned, found = measure_family(variances, comparison, grid, effects), grid.seed_variance(effects, None)
        assert planned.seeds + planned.noise / N == pytest.approx(1e4 * found.accuracies)
        assert planned.directions * (3 - 1) == found.freedom
        weights = next(iter(effects.values())).values()
        of_table = [effect.detectable for effect in find_effects(comparison) if effect.family == family]
        assert detectable(planned, 3, N, weights, len(effects)) == pytest.approx(np.mean(of_table), rel=0.15)


def test_the_plan_takes_the_noise_of_single_answers_out_of_the_variance_between_questions(tmp_path):
    """All answers are drawn alike, so that methods and questions have nothing of their own: more seeds would average
    all of it out."""
    rng = np.random.default_rng(0)
    for i, flags in enumerate(SCHEDULES.values()):
        for j, more in enumerate(DROPOUTS.values()):
            for seed in range(3):
                right = "".join(map(str, (rng.random(2000) < 0.7).astype(int)))
                write_run(tmp_path / f"{i}{j}{seed}", right, seed=seed, **flags, **more)
    comparison = compare([str(tmp_path)])
    grid = find_grid(comparison)
    for effects in grid.families().values():
        planned = measure_family(measure(comparison), comparison, grid, effects)
        assert planned.noise == pytest.approx(1e4 * 0.7 * 0.3, rel=0.05)
        assert planned.questions < 0.1 * planned.noise


def test_without_two_seeds_in_common_there_are_no_effects_and_a_note(tmp_path):
    for i, flags in enumerate(SCHEDULES.values()):
        for j, more in enumerate(DROPOUTS.values()):
            for seed in (0, 1 + i):
                write_run(tmp_path / f"{i}{j}{seed}", seed=seed, **flags, **more)
    comparison = compare([str(tmp_path)])
    assert find_effects(comparison) == []
    assert any("do not have two seeds in common" in note for note in notes(comparison))


def test_the_figure_fills_what_differs(study):
    effects = find_effects(compare([str(study)]))
    figure = figures.draw_effects(effects)
    ax = figure.axes[0]
    for container, effect in zip(ax.containers, effects, strict=True):
        point, _, (bar,) = container.lines
        assert point.get_xdata()[0] == effect.points
        assert bar.get_segments()[0][:, 0] == pytest.approx([effect.low, effect.high])
        assert (point.get_markerfacecolor() == "white") == (effect.holm >= 0.05)
    assert [label.get_text() for label in ax.get_yticklabels()] == [effect.name for effect in effects]
    plt.close(figure)
