"""The numbers and pictures of a report against a study whose files are written here, so that they can be worked out."""

import itertools
import json
import os
import random

import numpy as np
import pytest
import scipy.stats

pytest.importorskip("optuna")
import matplotlib.pyplot as plt
import optuna
from optuna.distributions import FloatDistribution, distribution_to_json

from lavin.runtime.files import write_json
from util.search import figures, summary
from util.search.folder import change_record, read_records
from util.search.progress import cost_lines, progress_line
from util.search.report import markdown
from util.search.summary import StudyReport, importance

FLAGS = {"blr": {"kind": "float", "low": 0.002, "high": 0.04, "log": True, "default": 0.009},
         "lr_schedule": {"kind": "categorical", "choices": ["cosine", "step"], "default": "cosine"},
         "min_lr": {"kind": "float", "low": 0, "high": 1e-4, "default": 0, "when": {"lr_schedule": ["cosine"]}}}
# state, blr, correct of 1,000 after 2, 6 and 20 epochs, seconds, GPUs. What was pruned, or runs still, has scored best
# of all after 6 epochs; three quarters of the trials with a score were scored there, and half of them at the end.
TRIALS = [("COMPLETE", 0.009, (600, 700, 760), 2000, 1), ("COMPLETE", 0.004, (610, 690, 800), 1800, 2),
          ("PRUNED", 0.030, (500,), 300, 1), ("PRUNED", 0.008, (650, 850), 600, 1),
          ("COMPLETE", 0.006, (620, 710, 780), 2000, 1), ("PRUNED", 0.020, (590, 660), 600, 1),
          ("FAIL", 0.040, (), 100, 4), ("RUNNING", 0.005, (640, 900), 700, 1), ("PRUNED", 0.035, (400,), 200, 1),
          ("COMPLETE", 0.007, (605, 705, 770), 2000, 1)]
SCORED = [i for i, trial in enumerate(TRIALS) if trial[2]]
AFTER_6 = {i: TRIALS[i][2][1] / 10 for i in SCORED if len(TRIALS[i][2]) > 1}
FINISHED = {i: trial[2][2] / 10 for i, trial in enumerate(TRIALS) if trial[0] == "COMPLETE"}


def values_of(number: int) -> dict:
    """Each third trial has the step schedule, which has no smallest rate."""
    blr = TRIALS[number][1]
    return {"blr": blr, "lr_schedule": "step"} if number % 3 == 2 else {
        "blr": blr, "lr_schedule": "cosine", "min_lr": number * 1e-6}


def write_run(folder, state, values, correct, seconds, gpus, **more) -> None:
    rungs = [{"epoch": epoch, "correct": n, "questions": 1000}
             for epoch, n in zip((2, 6, 20), correct, strict=False)]
    folder.mkdir(parents=True)
    write_json(folder / "trial.json", {"state": state, "values": values, "rungs": rungs, "seconds": float(seconds),
                                       "gpus": gpus, **more})


def write_settings(folder) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "study.json", {
        "name": "S", "trials": 12, "pruner": "asha", "questions": 1000, "steps_per_epoch": 397, "confirm": 1,
        "seeds": 2, "space": {"parameters": FLAGS, "enqueue": [{}]}, "flags": {"epochs": 20}})


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "S"
    write_settings(folder)
    for number, (state, _, correct, seconds, gpus) in enumerate(TRIALS):
        write_run(folder / "trials" / f"{number:03d}", state, values_of(number), correct, seconds, gpus, params={},
                  **({"message": "diverged"} if state == "FAIL" else {}))
    return folder


def confirm(study) -> None:
    """The base and trial 1, twice each on ten questions: 5, 6 and 8, 7 right ones. The test split has other answers."""
    for name, seed, right in (("000", 1, 5), ("000", 2, 6), ("001", 1, 8), ("001", 2, 7)):
        folder = study / "confirm" / f"{name}-seed{seed}"
        write_run(folder, "COMPLETE", values_of(int(name)), (), 900, 2, configuration=name, seed=seed)
        change_record(folder, rungs=[{"epoch": 20, "correct": right, "questions": 10}])
        for part, n in (("val", right), (".", 1)):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / "generations.jsonl").write_text("".join(
                json.dumps({"qid": str(i), "prediction": int(i < n), "answer": 1}) + "\n" for i in range(10)))
    write_json(study / "verdict.json", {
        "winner": "001", "n_configurations": 1, "seeds": 2, "difference": 20.0, "low": 0.0, "high": 40.0,
        "questions": 10, "p": 0.1, "found": False})


def table_after(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below the heading, without its two first rows."""
    lines = text.split(heading, 1)[1].splitlines()
    after = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    rows = itertools.takewhile(lambda line: line.startswith("|"), after)
    return [row.strip("| ").split(" | ") for row in rows][2:]


# --- Numbers ---

def test_the_table_ranks_by_how_far_trials_came_and_gives_wilsons_intervals(study):
    rows = table_after(markdown(StudyReport(study), []), "## Trials")
    assert [int(row[0]) for row in rows] == [1, 4, 9, 0, 7, 3, 5, 2, 8]
    words = {"COMPLETE": "finished", "PRUNED": "pruned", "RUNNING": "unfinished"}
    for row in rows:
        state, blr, correct, *_ = TRIALS[int(row[0])]
        interval = scipy.stats.binomtest(correct[-1], 1000).proportion_ci(0.95, "wilson")
        assert row[1:5] == [words[state], str((2, 6, 20)[len(correct) - 1]), f"{correct[-1] / 10:.2f}",
                            f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"]
        assert (f"--blr {blr:g}" in row[5]) == (int(row[0]) != 0) and ("--lr_schedule step" in row[5]) == (
            int(row[0]) % 3 == 2)


def test_flags_that_the_base_does_not_have_are_named_too(study):
    write_run(study / "trials" / "010", "COMPLETE", {**values_of(0), "dropout_lim": 0.2}, (700, 800, 900), 60, 1)
    assert table_after(markdown(StudyReport(study), []), "## Trials")[0][5] == "`--dropout_lim 0.2`"


def test_a_long_table_ends_with_the_tenth_best(study):
    for number in range(10, 16):
        write_run(study / "trials" / f"{number:03d}", "COMPLETE", values_of(0), (500, 500, 900 + number), 60, 1)
    rows = table_after(markdown(StudyReport(study), []), "## Trials")
    assert [int(row[0]) for row in rows] == [15, 14, 13, 12, 11, 10, 1, 4, 9, 0]


def test_the_budget_is_of_all_trials_and_apart_from_the_fresh_runs(study):
    """Epochs: 4 x 20 + 3 x 6 + 2 x 2 = 102, of 10 x 20. GPU-seconds: 10,400, 1,800 more for the trial on two GPUs, and
    300 more for the failed one on four. The fresh runs: 4 x 20 epochs, and 4 x 900 seconds on two GPUs."""
    confirm(study)
    text = markdown(StudyReport(study), [])
    seconds = sum(seconds * gpus for *_, seconds, gpus in TRIALS)
    assert seconds == 10_300 + 1800 + 300
    assert "- 10 of 12 trials: 4 finished, 4 pruned, 1 failed, 1 unfinished." in text
    assert f"- {102 * 397:,} steps, 51 % of those without pruning; {seconds / 3600:.2f} GPU-hours." in text
    assert f"- 4 runs with fresh seeds: {80 * 397:,} steps, {7200 / 3600:.2f} GPU-hours." in text


def test_the_table_of_fresh_runs_is_of_validation_with_the_deviation_between_seeds(study):
    """0.8 and 0.7 have the mean 75 and the standard deviation 10 / sqrt(2)."""
    confirm(study)
    rows = table_after(markdown(StudyReport(study), []), "# Results of the study S")
    assert [row[:2] for row in rows] == [["001", "75.00 ± 7.07"], ["000", "55.00 ± 7.07"]]
    low, high = map(float, rows[0][3].replace("−", "-").split(" to "))
    assert rows[0][2] == "+20.00" and low < 0 < 20 < high  # two seeds of ten questions tell little
    assert "--blr 0.004" in rows[0][4] and rows[1][4] == "`the base`"


def test_trials_are_compared_at_the_last_rung_of_three_quarters_of_them(study):
    report = StudyReport(study)
    assert report.shared_epoch == 6
    assert {int(trial.name): percent for trial, percent in report.comparable} == AFTER_6
    write_run(study / "trials" / "010", "PRUNED", values_of(2), (300,), 60, 1)  # 7 of 10: a little less
    assert StudyReport(study).shared_epoch == 2


def test_trials_are_read_in_their_order_also_beyond_a_thousand(study):
    for number in (998, 999, 1000, 1001):
        write_run(study / "trials" / f"{number:03d}", "PRUNED", values_of(0), (500,), 60, 1)
    assert list(read_records(study))[-4:] == ["998", "999", "1000", "1001"]


@pytest.mark.parametrize("since, counted", [(9_000, 1000), (10_500, 0)])
def test_a_killed_commands_seconds_last_to_its_last_sign_of_life_and_are_never_negative(study, since, counted):
    """This holds also where the file system's clock was set back."""
    folder = study / "trials" / "007"
    (folder / "search.log").touch()
    os.utime(folder / "search.log", (10_000, 10_000))
    change_record(folder, since=since)
    assert read_records(study)["007"]["seconds"] == 700 + counted


def test_progress_names_the_best_finished_trial_and_counts_what_has_ended(study):
    """Better trials that were pruned, or that run still, are not named. Nine have ended in 9,600 s, and one runs."""
    seconds = sum(trial[3] for trial in TRIALS if trial[0] != "RUNNING") / 9 * 3
    assert progress_line(study, 12) == ("9 of 12 trials: 4 finished, 4 pruned, 1 failed; best 80.00 (trial 001); about "
                                        f"{round(seconds / 60)} min left")


def test_the_cost_is_foretold_by_gpu_seconds_an_epoch(study):
    """The GPU-seconds of all trials that have a score are divided by their epochs."""
    settings = {"trials": 12, "confirm": 1, "seeds": 2, "steps_per_epoch": 397, "pruner": "asha",
                "flags": {"epochs": 20}}
    per_epoch = sum(TRIALS[i][3] * TRIALS[i][4] for i in SCORED) / 102
    assert cost_lines(study, settings, [2, 6, 20], on_cpu=False)[-1] == (
        f"GPU-hours: at most {(12 + 4) * 20 * per_epoch / 3600:.2f}, by the trials so far ({per_epoch:.1f} s an epoch)")


# --- Importance ---

@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_importance_is_of_the_better_half_where_the_trials_are_compared(tmp_path, monkeypatch):
    """`half` decides which half a trial is in, `top` only which are the very best. After 20 epochs, which a few trials
    reach, the order is another one, and trials without a score count for nothing."""
    monkeypatch.setattr(summary, "SHUFFLES", 40)
    write_settings(tmp_path / "S")
    rng = random.Random(0)
    for number in range(40):
        params = {"half": rng.random() / 2 + (number >= 20) / 2, "top": 0.99 if number < 4 else rng.random()}
        correct = (900 - 10 * number, 900 - 10 * number, rng.randrange(100, 900))[:3 if number % 4 == 0 else 2]
        stored = {name: {"value": value, "distribution": distribution_to_json(FloatDistribution(0.0, 1.0))}
                  for name, value in params.items()}
        write_run(tmp_path / "S" / "trials" / f"{number:03d}", "PRUNED", params, correct, 60, 1, params=stored)
        write_run(tmp_path / "S" / "trials" / f"{100 + number}", "FAIL", params, (), 60, 1, params=stored)
    report = StudyReport(tmp_path / "S")
    shares = importance(report)
    study = optuna.create_study(direction="maximize")
    for trial, percent in report.comparable:
        study.add_trial(optuna.create_trial(params=trial.values, value=percent, distributions=dict.fromkeys(
            trial.values, FloatDistribution(0.0, 1.0))))
    expected = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5))
    assert {name: share for name, (share, _) in shares.items()} == pytest.approx(expected, abs=0.02)
    assert list(shares) == ["half", "top"] and shares["half"][0] > shares["half"][1] > 0
    assert shares["top"][0] < shares["top"][1]
    figure = figures.draw_importance(report)
    ax = figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["half", "top"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([100 * share for share, _ in shares.values()])
    assert list(ax.lines[0].get_xdata()) == pytest.approx([100 * chance for _, chance in shares.values()])
    plt.close(figure)


# --- Pictures ---

@pytest.fixture
def drawn(study, tmp_path, monkeypatch):
    """The pictures of the study by name."""
    found = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.update({path.stem: figure}))
    figures.write_figures(StudyReport(study), tmp_path)
    yield found
    plt.close("all")


def test_pictures_do_not_depend_on_the_users_matplotlibrc(study, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(figures, "save_figure", lambda *_: found.append(plt.rcParams["text.usetex"]))
    with plt.rc_context({"text.usetex": True}):
        figures.write_figures(StudyReport(study), tmp_path)
    assert found and not any(found)


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    """Points by the label of their line."""
    return {line.get_label(): list(zip(map(float, line.get_xdata()), np.round(np.asarray(line.get_ydata(), float), 6),
                                       strict=True)) for line in ax.lines}


def points_of(ax) -> list[tuple[float, float]]:
    """The points of all lines but those that mark a value of the base."""
    return sorted(point for line in ax.lines if line.get_linestyle() != "--" for point in zip(
        map(float, line.get_xdata()), np.round(np.asarray(line.get_ydata(), float), 6), strict=True))


def test_the_history_has_each_trials_last_score_and_the_best_of_the_finished_ones_so_far(drawn):
    found = lines(drawn["history"].axes[0])
    assert found["finished"] == [(0, 76), (1, 80), (4, 78), (9, 77)]
    assert found["best finished so far"] == [(0, 76), (1, 80), (4, 80), (9, 80), (9, 80)]
    assert found["pruned after 2 epochs"] == [(2, 50), (8, 40)]
    assert found["pruned after 6 epochs"] == [(3, 85), (5, 66)] and found["unfinished after 6 epochs"] == [(7, 90)]
    assert {y for _, y in found["the base"]} == {76}


def test_pictures_tell_trials_that_have_failed_or_run_still_from_pruned_ones(study):
    write_run(study / "trials" / "010", "FAIL", values_of(0), (510, 520), 60, 1)
    report = StudyReport(study)
    words = {"finished", "pruned", "unfinished", "failed"}
    for draw in (figures.history, figures.learning_curves, figures.parameters):
        figure = draw(report)
        labels = {text.get_text().split(" after ")[0] for text in figure.legends[0].get_texts()}
        assert words <= labels <= words | {"the base", "the best", "best finished so far", "the base's value"}
        colours = {line.get_label(): line.get_color() for ax in figure.axes for line in ax.lines}
        of_word = {word: {colour for label, colour in colours.items() if label.split(" after ")[0] == word}
                   for word in words}
        assert all(len(found) == 1 for found in of_word.values()) and len(set.union(*of_word.values())) == 4
        plt.close(figure)


def test_the_learning_curves_are_those_of_the_trials_and_mark_the_best_finished_one(drawn):
    ax = drawn["learning_curves"].axes[0]
    curves = sorted([(int(x), y) for x, y in zip(line.get_xdata(), np.round(line.get_ydata(), 6), strict=True)]
                    for line in ax.lines)
    assert curves == sorted([[(epoch, n / 10) for epoch, n in zip((2, 6, 20), TRIALS[i][2], strict=False)]
                             for i in SCORED])
    assert lines(ax)["the best"] == [(2, 61), (6, 69), (20, 80)] and lines(ax)["the base"][-1] == (20, 76)


def test_flags_are_drawn_against_the_score_at_the_rung_where_trials_are_compared(drawn):
    """A point stands for each trial that was scored there and has the flag; those of finished trials are filled."""
    assert points_of(drawn["rates"].axes[0]) == sorted((TRIALS[i][1], percent) for i, percent in AFTER_6.items())
    by_flag = {ax.get_xlabel(): ax for ax in drawn["parameters"].axes if ax.get_visible()}
    for flag in ("blr", "min_lr"):
        assert points_of(by_flag[f"--{flag}"]) == sorted(
            (values_of(i)[flag], percent) for i, percent in AFTER_6.items() if flag in values_of(i))
    filled = {round(line.get_ydata()[0], 6): line.get_markerfacecolor() != "white"
              for line in by_flag["--blr"].lines if line.get_linestyle() != "--"}
    assert filled == {percent: i in FINISHED for i, percent in AFTER_6.items()}
