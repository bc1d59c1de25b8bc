"""The report of a study, from the files in its folder alone."""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("optuna")
import matplotlib.pyplot as plt

import plot_results
from lavin.runtime.console import duration
from lavin.runtime.files import read_json, write_json
from tiny_study import confirm_study, quality, search_study
from user_errors import error_message
from util.comparison.statistics import wilson
from util.search import figures, summary
from util.search.confirm import sentence
from util.search.folder import LOG, RECORD, VERDICT, gpu_seconds, read_records
from util.search.progress import cost_lines, progress_line
from util.search.report import facts, markdown, write_report
from util.search.summary import StudyReport, importance

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
TRIALS = 24


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Read-only."""
    folder = tmp_path_factory.mktemp("search") / "S"
    search_study(folder, TRIALS)
    confirm_study(folder, n=300, k=2, seeds=2)
    return folder


@pytest.fixture
def study(searched, tmp_path):
    return shutil.copytree(searched, tmp_path / "S")


def report_of(study) -> str:
    """The text of the report, for which no pictures are drawn."""
    return markdown(StudyReport(study), [])


def empty_file(_, path) -> None:
    """Writes this in place of a picture, which takes long to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_and_read(study, out) -> str:
    write_report(study, out)
    return (out / "report.md").read_text()


def test_the_report_needs_neither_storage_nor_optuna(study, tmp_path, monkeypatch):
    (study / "journal.log").unlink()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "optuna", None)
        patched.setattr(figures, "save_figure", empty_file)
        text = write_and_read(study, tmp_path / "without")
    assert "The importance of the parameters is left out: pip install -r requirements/search.txt." in text
    assert "importance.png" not in text
    text = write_and_read(study, tmp_path / "with")
    for name in ("history", "learning_curves", "rates", "parameters", "importance"):
        assert f"({name}.png)" in text
        for suffix in ("png", "svg"):
            assert (tmp_path / "with" / f"{name}.{suffix}").stat().st_size > 5000


def test_it_says_what_was_found_first(study):
    verdict = read_json(study / VERDICT)
    text = report_of(study)
    assert text.splitlines()[2] == sentence(verdict)
    assert "Accuracy in % of the 300 validation questions, mean over 2 fresh seeds" in text
    write_json(study / VERDICT, {**verdict, "found": not verdict["found"]})
    assert report_of(study).splitlines()[2] == sentence({**verdict, "found": not verdict["found"]})
    (study / VERDICT).unlink()
    assert "so there is no winner: the best of many trials is lucky" in report_of(study)


def test_the_table_has_the_farthest_and_best_trials_with_their_flags(study):
    report, text = StudyReport(study), report_of(study)
    rows = [row.split(" | ") for row in text.split("## Trials")[1].splitlines() if row.startswith("| 0")]
    assert len(rows) == 10
    reached = [(int(row[2]), float(row[3])) for row in rows]
    assert reached == sorted(reached, reverse=True)
    best = max((record["rungs"][-1]["correct"], name) for name, record in report.records.items()
               if record["state"] == "COMPLETE")
    assert rows[0][0] == f"| {best[1]}" and rows[0][3] == f"{best[0] / 10:.2f}"
    assert report.changes(report.base) == "the base"
    assert report.changes({**report.base, "blr": 0.02, "adapter_dim": 4}) == "--blr 0.02 --adapter_dim 4"


def test_the_budget_counts_epochs_hours_and_failures(study):
    path = study / "trials" / "003" / RECORD
    write_json(path, {**read_json(path), "state": "FAIL", "message": "training diverged"})
    text, records = report_of(study), read_records(study)
    epochs = sum(record["rungs"][-1]["epoch"] for record in records.values())
    assert f"- {epochs * 397:,} steps, {100 * epochs / (TRIALS * 20):.0f} % of those without pruning; " in text
    assert f"{epochs * 60 / 3600:.2f} GPU-hours" in text and gpu_seconds(list(records.values())) == 60 * epochs
    assert "- Trial 003 failed: training diverged" in text and "1 failed" in text
    assert "- 6 runs with fresh seeds: 47,640 steps, 2.00 GPU-hours." in text


def test_a_killed_commands_seconds_are_in_the_report(study):
    path = study / "trials" / "003" / RECORD
    (path.parent / LOG).touch()
    os.utime(path.parent / LOG, (10_000, 10_000))
    write_json(path, {**read_json(path), "since": 10_000 - 7200, "gpus": 2})
    records = read_records(study)
    epochs = sum(record["rungs"][-1]["epoch"] for record in records.values())
    more = 60 * records["003"]["rungs"][-1]["epoch"] + 2 * 7200  # its own twice, on two GPUs
    assert f"{(epochs * 60 + more) / 3600:.2f} GPU-hours" in report_of(study)


def test_trials_are_compared_where_three_quarters_of_them_were_scored(study):
    report = StudyReport(study)
    assert report.shared_epoch == 2 and len(report.comparable) == TRIALS
    for trial, percent in report.comparable:
        assert percent == trial.curve[0][1]


def test_importance_tells_what_matters_from_chance(study, monkeypatch):
    """The same trials in two worlds: one in which only the rate matters, and one in which nothing does."""
    monkeypatch.setattr(summary, "SHUFFLES", 40)
    report, rng = StudyReport(study), np.random.default_rng(0)
    drawn = [replace(trial, record={**trial.record, "params": {
        **trial.record["params"], "blr": {**trial.record["params"]["blr"], "value": 0.002 * 20 ** rng.random()}}})
        for _ in range(3) for trial, _ in report.comparable]
    for matters in (True, False):
        report.comparable = [(trial, trial.record["params"]["blr"]["value"] if matters else rng.random())
                             for trial in drawn]
        shares = importance(report)
        assert sum(share for share, _ in shares.values()) == pytest.approx(1)
        passed = [name for name, (share, chance) in shares.items() if share > chance]
        assert (next(iter(shares)) == "blr" and "blr" in passed) if matters else len(passed) <= 3


def test_a_study_is_drawn_alone(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", empty_file)

    def plot(*flags):
        plot_results.main(plot_results.get_args_parser().parse_args([*map(str, flags), "--out", str(tmp_path / "x")]))

    plot(study)
    out = capsys.readouterr().out
    assert out.startswith(f"Results of the study {study.name}\n") and str(tmp_path / "x" / "rates.svg") in out
    for others in ((study, study), (study, "--base", study), (study, "--published")):
        assert "is a study of search.py: name it alone" in error_message(plot, *others)


def test_a_broken_or_empty_study_is_named(study, tmp_path):
    path = study / "trials" / "002" / RECORD
    path.write_text(json.dumps({**read_json(path), "rungs": [{"epoch": 2, "correct": 3}]}))
    assert f"{path}: rungs[0].questions: is missing" in error_message(write_report, study, tmp_path / "out")
    shutil.rmtree(study / "trials")
    assert "has no scored trial yet" in error_message(write_report, study, tmp_path / "out")


def test_the_terminal_shows_what_fits_and_no_markdown(study, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "save_figure", empty_file)
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        plot_results.main(plot_results.get_args_parser().parse_args([str(study), "--out", str(tmp_path / "x")]))
        text, paths = capsys.readouterr().out.split(f"\n{tmp_path / 'x' / 'report.md'}\n")
        assert max(map(len, text.splitlines())) <= width and str(tmp_path / "x" / "report.html") in paths
        assert not {"|", "`", "#"} & {*text} and "](" not in text
        for row in StudyReport(study).ranked[:10]:
            assert f"\n{row.name} " in text.split("Trials")[1]


def test_a_study_named_search_has_a_title_without_an_echo(study, tmp_path):
    shutil.copytree(study, tmp_path / "search")
    assert report_of(tmp_path / "search").startswith("# Results of the study search\n")


@pytest.mark.parametrize("device, unit", [("cpu: x86_64", "hours on a CPU"), ("cuda: NVIDIA H200", "GPU-hours")])
def test_hours_are_a_gpus_only_on_a_gpu(study, device, unit):
    write_json(study / "trials" / "000" / "config.json", {"device": device})
    other = {"hours on a CPU", "GPU-hours"} - {unit}
    assert report_of(study).count(unit) == 2 and other.pop() not in report_of(study)


def test_the_page_has_tables_pictures_and_the_meaning_of_importance(study, tmp_path):
    write_report(study, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == page.count("data:image/png;base64,") == 5 and "PED-ANOVA, which estimates" in page
    assert page.count("<table>") == 2 and "Results of the study S" in page and "plot_results.py" in page
    assert "PED-ANOVA, which estimates" in (tmp_path / "out" / "report.md").read_text()
    assert "<dt>Trials</dt><dd>24 of 24" in page


def test_the_commits_of_all_runs_are_told(study):
    """A trial that a worker began after the project's files had changed is of another commit."""
    for run, config in (("trials/000", {"git_commit": "a" * 40, "resumed": [{"git_commit": "b" * 40}]}),
                        ("trials/003", {"git_commit": f"{'b' * 40}-dirty"}), ("trials/004", {"git_commit": None}),
                        (f"confirm/{min(read_records(study, 'confirm'))}", {"git_commit": "c" * 40})):
        write_json(study / run / "config.json", config)
    assert facts(StudyReport(study))["Commits of the code"] == ", ".join(
        f"`{commit}`" for commit in (12 * "a", 12 * "b", f"{12 * 'b'}-dirty", 12 * "c"))


def test_points_of_pictures_have_their_intervals(study):
    report = StudyReport(study)
    low, high = (100 * end for end in wilson(0.75 * 1000, 1000))
    assert report.trials[0].interval(75.0) == pytest.approx((low, high))
    for draw, expected in ((figures.history, [(int(t.name), t, t.last[1]) for t in report.trials]),
                           (figures.rates, [(t.values["blr"], t, percent) for t, percent in report.comparable])):
        figure = draw(report)
        drawn = {tuple(np.round(collection.get_segments()[0], 6).ravel()) for collection in figure.axes[0].collections}
        assert drawn == {tuple(np.round([x, t.interval(percent)[0], x, t.interval(percent)[1]], 6))
                         for x, t, percent in expected}
        plt.close(figure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("varied", ["blr", "lr_schedule", None])
def test_a_flag_with_a_single_value_draws_no_panel_and_is_named(study, tmp_path, varied):
    report = StudyReport(study)
    base = report.base
    report.trials = [replace(trial, values={flag: trial.values.get(flag, value) if flag == varied else value
                                            for flag, value in base.items()}) for trial in report.trials]
    with figures.own_style():
        rates, parameters = figures.rates(report), figures.parameters(report)
        for figure in filter(None, (rates, parameters)):
            figure.canvas.draw()
    assert (rates is not None) == (varied == "blr") and (parameters is not None) == (varied is not None)
    if parameters:
        assert [ax.get_xlabel() for ax in parameters.axes if ax.get_visible()] == [f"--{varied}"]
    assert report.flags_with_one_value == [flag for flag in base if flag != varied]
    assert "have the same value of --" in markdown(report, [])
    plt.close("all")


# --- While it runs ---

def test_the_progress_line(study):
    for number in (4, 5):
        path = study / "trials" / f"{number:03d}" / RECORD
        write_json(path, {**read_json(path), "state": "RUNNING"})
    records = read_records(study)
    states = [record["state"] for record in records.values()]
    best = max((record["rungs"][-1]["correct"], name) for name, record in records.items()
               if record["state"] == "COMPLETE")
    seconds = np.mean([record["seconds"] for record in records.values() if record["state"] != "RUNNING"])
    left = duration(seconds * (40 - TRIALS + 2) / 2)  # by two workers
    assert progress_line(study, 40) == (
        f"{TRIALS - 2} of 40 trials: {states.count('COMPLETE')} finished, {states.count('PRUNED')} pruned, 0 failed; "
        f"best {best[0] / 10:.2f} (trial {best[1]}); about {left} left")


def test_the_cost_is_told_before(study, tmp_path):
    settings = {"trials": 64, "confirm": 3, "seeds": 3, "steps_per_epoch": 397, "pruner": "asha",
                "flags": {"epochs": 20}}
    first, second, hours = cost_lines(tmp_path / "none", settings, [2, 6, 20], on_cpu=True)
    assert "64 trials of at most 20 epochs x 397 steps, scored after epochs 2, 6 and 20" in first
    assert first.endswith(": 508,160 steps at most")
    assert second == "then 12 runs with fresh seeds (the best 3 and the base, 3 each): 95,280 steps"
    assert hours == "hours on a CPU: unknown until the first trial is scored"
    assert cost_lines(study, settings, [2, 6, 20], on_cpu=False)[-1] == (
        f"GPU-hours: at most {(64 + 12) * 20 * 60 / 3600:.2f}, by the trials so far (60.0 s an epoch)")
    assert len(cost_lines(study, {**settings, "confirm": 0}, [20], on_cpu=False)) == 2


def test_one_trial_is_in_the_singular(tmp_path):
    settings = {"trials": 1, "confirm": 1, "seeds": 1, "steps_per_epoch": 1, "pruner": "none", "flags": {"epochs": 1}}
    first, second, _ = cost_lines(tmp_path, settings, [1], on_cpu=True)
    assert first == f"{tmp_path}: 1 trial of at most 1 epoch x 1 step: 1 step at most"
    assert second == "then 2 runs with fresh seeds (the best 1 and the base, 1 each): 2 steps"
    assert progress_line(tmp_path, 1).startswith("0 of 1 trial: ")


def test_the_made_up_world_has_a_better_point():
    assert quality({"blr": 10 ** -1.8, "lr_schedule": "cosine"}) > quality({"blr": 0.002, "lr_schedule": "cosine"})
