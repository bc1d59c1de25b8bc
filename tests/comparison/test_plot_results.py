"""The data in every figure (lines, points, bars, intervals), distinct styles, and the files that the command writes."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from test_comparison import CYCLICAL, INCREASING, METRICS_LINE, STEP, write_run

import plot_results
from lavin.mm_adapter import dropout_schedule
from lavin.runtime.errors import one_line_errors
from util.comparison import figures
from util.comparison.comparison import Method, compare, published
from util.comparison.figures import COLOURS, FIGURES
from util.comparison.methods import PUBLISHED
from util.comparison.references import Reference
from util.comparison.statistics import wilson
from util.evaluation.scoring import COLUMNS
from util.lr_sched import learning_rate

CATEGORIES = [column for column in COLUMNS if column != "Avg"]
# as published, in the order of the publication
NAMES = ["Base", "Cyclical LR", "Step Decay", "Exp. Decay", "Inc. Drop. Prob", "Dec. Drop. Prob", "Inc. Drop. Prob V2",
         "Dec. Drop. Prob V2"]


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.fixture
def runs(tmp_path):
    """Base with three seeds and Step Decay with one. Three of the categories have all questions, the others none."""
    for seed, right in enumerate(("1111111100", "1111111000", "1111110000")):
        write_run(tmp_path / f"base{seed}", right, losses=(1.0 + seed**2, 0.1), seed=seed)
    write_run(tmp_path / "step", "1111111110", losses=(3.0, 0.2), **STEP)
    return compare([str(tmp_path)])


def error_bars(container) -> np.ndarray:
    """Shape [points, ends, (x, y)]."""
    return np.array(container.lines[2][0].get_segments())


def texts(artists) -> list[str]:
    return [artist.get_text().replace("\n", " ") for artist in artists]


def test_losses_of_the_published_runs(ax):
    methods = published().methods
    figures.draw_losses(ax, methods)
    assert [line.get_label() for line in ax.lines] == NAMES
    for line, method in zip(ax.lines, methods, strict=True):
        assert line.get_xdata().tolist() == list(range(1, 21))
        assert line.get_ydata() == pytest.approx(method.runs[0].losses)
    assert ax.get_yscale() == "log" and "log scale" in ax.get_ylabel()
    assert not ax.collections  # one seed has no band


def test_losses_by_step_are_drawn_with_their_running_mean(ax, tmp_path):
    n = 80
    lines = [{"epoch": i // 40, "step": i % 40 + 1, "loss": 1 + i % 2} for i in range(n)]
    for seed in (0, 1):
        write_run(tmp_path / f"base{seed}", files={"metrics.jsonl": lines if seed else None}, seed=seed)
    write_run(tmp_path / "step", files={"metrics.jsonl": lines}, **STEP)
    write_run(tmp_path / "inc", **INCREASING)
    figures.draw_losses_by_step(ax, compare([str(tmp_path)]).methods)
    assert texts(ax.legend().texts) == ["Base", "Step Decay"] and ax.get_yscale() == "log"
    losses, mean = ax.lines[:2]
    assert losses.get_xdata().tolist() == pytest.approx([(i + 1) / 40 for i in range(n)])
    assert losses.get_ydata().tolist() == [1 + i % 2 for i in range(n)]
    ends = [7 / 5, 3 / 2, 10 / 7, 3 / 2]  # of nine values in the middle, fewer at the ends
    assert mean.get_ydata() == pytest.approx(ends + [13 / 9, 14 / 9] * (n // 2 - 4) + [3 - end for end in ends[::-1]])
    assert mean.get_zorder() > max(line.get_zorder() for line in ax.lines[::2]) and mean.get_linewidth() > 1


class CountedMeans(np.ndarray):
    added = 0

    def mean(self, *args, **kwargs):
        type(self).added += len(self)
        return np.asarray(self).mean(*args, **kwargs)


@pytest.mark.parametrize("n", [1, 39, 40, 2000, 2001, 100_000])
def test_a_running_mean_of_any_length_takes_few_additions(n):
    """A million losses, with the window of a fortieth, would be 25,000 million. One that is huge spoils its window
    alone, as it would not in differences of sums."""
    losses = np.random.default_rng(0).random(n) + 1
    losses[:n // 3] *= 1e25
    CountedMeans.added = 0
    places, means = figures.running_mean(losses.view(CountedMeans))
    assert len(places) == min(n, 2000) and places[0] == 0 and places[-1] == n - 1 and len(set(places)) == len(places)
    half = max(n // 40 // 2, min(4, n // 8))
    for i, mean in list(zip(places, means, strict=True))[::97]:
        assert mean == pytest.approx(np.mean([losses[j] for j in range(n) if abs(j - i) <= half][:2 * half + 1]))
    assert CountedMeans.added <= 2000 * (2 * half + 1)


def test_losses_over_seeds_are_a_mean_and_a_band(ax, runs):
    figures.draw_losses(ax, runs.methods)
    assert ax.lines[0].get_ydata() == pytest.approx([8 / 3, 0.1])  # the mean of 1, 2, 5
    (band,) = ax.collections
    ends = (8 / 3 + np.array([-1, 1]) * np.sqrt(13 / 3)).round(6).tolist()
    assert set(band.get_paths()[0].vertices[:, 1].round(6)) == {*ends, 0.1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("losses", [(None, 0.1), (None, None)])
def test_epochs_without_a_loss_are_gaps(ax, tmp_path, losses):
    """All their steps were skipped, or none has an answer token. The same in the mean of several seeds."""
    lines = [{"epoch": i, "step": 1, "loss": loss} for i, loss in enumerate(losses)]
    write_run(tmp_path / "runs" / "base0", losses=losses, files={"metrics.jsonl": lines})
    write_run(tmp_path / "runs" / "base1", losses=(4.0, 0.3), seed=1)
    write_run(tmp_path / "runs" / "step", losses=losses, **STEP)
    comparison = compare([str(tmp_path / "runs")])
    figures.draw_losses(ax, comparison.methods)
    for line, last in zip(ax.lines, (0.2, 0.1), strict=True):
        assert line.get_ydata() == pytest.approx([np.nan, last if losses[1] else np.nan], nan_ok=True)
    assert figures.write_figures(comparison, tmp_path, "")


@pytest.mark.parametrize("last", [0.0677, 0.0071, 0.101])
def test_loss_axis_has_at_least_two_ticks(ax, runs, last):
    figures.draw_losses(ax, [replace(method, runs=[replace(method.runs[0], losses=[0.1066, last])])
                             for method in runs.methods])
    low, high = ax.get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in ax.get_yticks()) <= 10


def test_accuracy_with_a_cut_axis(ax):
    methods = published().methods
    figures.draw_accuracy(ax, methods, cut=True)
    assert texts(ax.get_yticklabels()) == NAMES and ax.get_ylim()[0] > ax.get_ylim()[1]  # the base is at the top
    for y, (method, container) in enumerate(zip(methods, ax.containers, strict=True)):
        low, high = wilson(method.runs[0].correct["Avg"], 4241)
        assert error_bars(container)[0] == pytest.approx(np.array([[100 * low, y], [100 * high, y]]))
        assert container.lines[0].get_xydata()[0] == pytest.approx([method.accuracy("Avg"), y])
    assert texts(ax.texts) == ["88.82", "86.11", "87.13", "86.16", "87.17", "87.62", "87.46", "87.95"]
    assert ax.get_xlim() == (84, 90) and ax.get_xlabel() == "accuracy (%), axis cut: starts at 84, not 0"


def test_accuracy_bars_start_at_0(ax):
    methods = published().methods
    figures.draw_accuracy(ax, methods, cut=False)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([method.accuracy("Avg") for method in methods])
    assert {bar.get_x() for bar in ax.patches} == {0} and ax.get_xlim() == (0, 100) and "cut" not in ax.get_xlabel()
    bars = [container for container in ax.containers if hasattr(container, "has_xerr")]
    assert len(bars) == len(methods)
    for bar, method in zip(bars, methods, strict=True):
        assert error_bars(bar)[0, :, 0] == pytest.approx(method.interval("Avg"))


def test_accuracy_shows_each_seed(ax, runs):
    figures.draw_accuracy(ax, runs.methods, cut=True)
    ticks = [line for line in ax.lines if line.get_marker() == "|" and len(line.get_xdata()) == 3]
    assert [sorted(line.get_xdata()) for line in ticks] == [[60, 70, 80]]
    assert texts(ax.texts) == ["70.00", "90.00"]


@pytest.mark.parametrize("rights", [(60, 61, 62, 20), (0, 100, 50, 50), (40, 60, 50, 50), (38, 39, 94, 39)])
def test_the_axis_has_room_for_every_seed_and_interval(ax, tmp_path, rights):
    """A seed may lie outside its method's interval, and on one of the axis' ends it would not be seen."""
    for seed, right in enumerate(rights):
        write_run(tmp_path / f"base{seed}", "1" * right + "0" * (100 - right), seed=seed)
    (method,) = compare([str(tmp_path)]).methods
    figures.draw_accuracy(ax, [method], cut=True)
    (low, high), ends = ax.get_xlim(), method.interval("Avg")
    assert low < min(*rights, *ends) and max(*rights, *ends) < high and -1 <= low and high <= 101


def test_categories(ax):
    methods = published().methods
    figures.draw_categories(ax, methods)
    assert texts(ax.get_xticklabels())[:3] == ["NAT n = 2,252", "SOC n = 889", "LAN n = 1,100"]
    for method, container in zip(methods, ax.containers, strict=True):
        points = container.lines[0].get_xydata()
        assert points[:, 0].round().tolist() == list(range(8))
        assert points[:, 1] == pytest.approx([method.accuracy(column) for column in CATEGORIES])
        intervals = [method.interval(column) for column in CATEGORIES]
        assert error_bars(container)[:, :, 1] == pytest.approx(np.array(intervals))
    assert [container.get_label() for container in ax.containers] == NAMES
    assert ax.get_ylabel() == "accuracy (%), axis cut: starts at 78, not 0"


def with_counts(method: Method, **changed: int) -> Method:
    """The method with other numbers of questions in some columns."""
    (run,) = method.runs
    counts = {**run.counts, **changed}
    return replace(method, runs=[replace(run, counts=counts, correct={column: min(n, run.correct[column])
                                                                      for column, n in counts.items()})])


def test_categories_without_questions_or_with_all_of_them_are_left_out(ax):
    """All questions of easy-VQA are NAT, IMG and G1-6: each of these would be Avg again, with another interval."""
    methods = [with_counts(method, NAT=4241, SOC=0, LAN=0) for method in published().methods]
    figures.draw_categories(ax, methods)
    assert ax.containers[0].lines[0].get_xdata().round().tolist() == [0, 1, 2, 3, 4]
    assert [text.split()[0] for text in texts(ax.get_xticklabels())] == ["TXT", "IMG", "NO", "G1-6", "G7-12"]
    assert ax.get_xlabel() == "TXT, IMG, NO: with a text, a picture or neither as context.  G1-6, G7-12: grades."


def test_without_a_category_its_figure_and_panel_are_left_out(tmp_path, runs, monkeypatch):
    figure = figures.overview(runs.methods)
    assert [ax.get_title().split(" (")[0] for ax in figure.axes] == [
        "Training loss", "Overall accuracy, 95 % intervals", "Learning rate", "Dropout by layer"]
    plt.close(figure)
    monkeypatch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in ("dropout", "categories")})
    assert {path.stem for path in figures.write_figures(runs, tmp_path / "out", "")} == {"dropout"}


def test_axis_from_0_is_not_labelled_as_cut(ax):
    figures.cut_axis(ax, "y", [8.0, 60.0, 99.5, 70.0])
    assert ax.get_ylim() == (0, 101) and ax.get_ylabel() == ""
    figures.cut_axis(ax, "y", [0.0, 60.0])
    assert ax.get_ylim() == (-1, 62) and ax.get_ylabel() == ""
    figures.cut_axis(ax, "y", [92.5, 99.5])
    assert 100 < ax.get_ylim()[1] < 100.5  # no tick above 100


def test_learning_rates_of_the_four_schedules(ax):
    methods = published().methods
    figures.draw_learning_rates(ax, methods)
    assert texts(ax.get_legend().texts) == ["Base and 4 more", "Cyclical LR", "Step Decay", "Exp. Decay"]
    for line, method in zip(ax.lines, methods[:4], strict=True):
        args = SimpleNamespace(**method.flags)
        assert line.get_ydata() == pytest.approx([learning_rate(epoch, args) for epoch in line.get_xdata()])
        assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0, pytest.approx(20, abs=0.02))
    assert max(ax.lines[0].get_ydata()) == pytest.approx(1.125e-3)
    assert ax.lines[1].get_ydata()[0] == pytest.approx(5e-5)


def test_dropout_of_each_layer(ax):
    methods = published().methods
    figures.draw_dropout(ax, methods)
    assert texts(ax.get_legend().texts) == ["Base and 3 more", *NAMES[4:]]
    for line, (prob, var, lim) in zip(ax.lines, [(0.1, 1, 0.2), (0.1, 1.01, 0.2), (0.2, 0.99, 0.1), (0.1, 1.03, 0.2),
                                                 (0.2, 0.97, 0.1)], strict=True):
        assert line.get_xdata().tolist() == list(range(1, 33))
        assert line.get_ydata() == pytest.approx(dropout_schedule(32, prob, var, lim))
    assert ax.get_ylim()[0] == 0


def test_dropout_has_one_point_per_layer_of_the_run(ax, runs):
    figures.draw_dropout(ax, runs.methods)
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert all(tick == round(tick) for tick in ax.get_xticks())


def step_study(folder, epochs: int) -> list[Method]:
    lines = [{"epoch": i // 20, "step": i % 20 + 1, "loss": 1.0 + i % 3} for i in range(20 * epochs)]
    for name, flags in (("base", {}), ("step", STEP)):
        write_run(folder / name, losses=[1.0] * epochs, files={"metrics.jsonl": lines}, epochs=epochs, **flags)
    return compare([str(folder)]).methods


@pytest.mark.parametrize("epochs", [2, 4, 5])
def test_the_overview_has_the_loss_by_step_where_epochs_are_few(tmp_path, epochs):
    figure = figures.overview(step_study(tmp_path, epochs))
    assert figure.axes[0].get_title() == ("Training loss by step" if epochs < 5 else "Training loss")
    assert len(figure.axes[0].lines[0].get_xdata()) == (20 * epochs if epochs < 5 else epochs)
    plt.close(figure)


@pytest.mark.parametrize("epochs", [2, 20])
def test_a_schedule_that_is_flat_within_the_epochs_is_named(ax, tmp_path, epochs):
    figures.draw_learning_rates(ax, step_study(tmp_path, epochs))
    assert ("Step Decay: flat within the epochs" in ax.get_title()) == (epochs == 2) and "Base" not in ax.get_title()


def test_references_are_beside_the_methods_and_do_not_stretch_the_axis(ax):
    methods = published().methods
    references = [Reference("untuned base", {"Avg": 39.0}, (37.0, 41.0), ""), Reference("chance", {"Avg": 85.0}, None,
                                                                                        "")]
    figures.draw_accuracy(ax, methods, cut=True, references=references)
    assert texts(ax.get_yticklabels())[-2:] == ["untuned base", "chance"] and texts(ax.texts)[-2:] == ["39.00", "85.00"]
    assert ax.get_xlim() == (84, 90) and ax.get_ylim()[0] > len(methods) + 1
    untuned, chance = (container.lines[0] for container in ax.containers[-2:])
    assert (untuned.get_marker(), *untuned.get_xydata()[0]) == ("<", 84, 8)  # it lies to the left of the axis
    assert (chance.get_marker(), *chance.get_xydata()[0]) == ("x", 85, 9)


def many_methods(n: int) -> list[Method]:
    base = published().methods[0]
    def run(i):
        correct = {column: round(base.runs[0].correct[column] * (0.9 - 0.001 * (i * 7 % n))) for column in CATEGORIES}
        flags = {**base.flags, "lr": 0.001 + i * 1e-5}
        return replace(base.runs[0], flags=flags, correct={**correct, "Avg": correct["G1-6"] + correct["G7-12"]})
    return [base, *(Method(f"Base + lr {0.001 + i * 1e-5:g} + adapter_dim {i}", [run(i)]) for i in range(1, n))]


@pytest.mark.filterwarnings("error")
def test_of_many_methods_the_base_and_the_best_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in ("overview", "accuracy")})
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure))
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: path.suffix == ".png" and figure.canvas.draw())
    drawn, methods = [], many_methods(120)
    figures.write_figures(replace(published(), methods=methods), tmp_path, "")
    monkeypatch.undo()
    overview, accuracy = drawn
    assert len(overview.legends[0].texts) == 12 and texts(overview.legends[0].texts)[-1] == "109 others"
    labels = texts(overview.axes[1].get_yticklabels())
    assert labels == texts(accuracy.axes[0].get_yticklabels()) and labels[-1] == "109 others"
    named, others = figures.told_apart(figures.others_last(methods))
    assert labels[:-1] == [method.name for method in named] and named[0] is methods[0] and len(others) == 109
    assert min(method.overall for method in named) >= max(method.overall for method in others)
    (grey,) = [line for line in overview.axes[1].lines if len(line.get_xdata()) == 109]
    assert sorted(grey.get_xdata()) == pytest.approx(sorted(method.overall for method in others))
    for figure in drawn:
        plt.close(figure)


def test_up_to_twenty_methods_are_all_told_apart():
    methods = many_methods(20)
    assert figures.told_apart(figures.others_last(methods)) == (methods, [])


def test_overview_has_all_panels_and_one_legend():
    methods = published().methods
    figure = figures.overview(methods)
    losses, accuracy, categories, rates, dropout = figure.axes
    assert [len(ax.lines) for ax in (losses, rates, dropout)] == [8, 4, 5]
    assert len(accuracy.containers) == len(categories.containers) == 8
    assert texts(figure.legends[0].texts) == NAMES and not any(ax.get_legend() for ax in figure.axes)
    assert "NAT, SOC, LAN: natural, social and language science" in categories.get_xlabel()
    plt.close(figure)


def shortened(method: Method) -> Method:
    """Returns a comparison of two epochs, within which Step Decay is flat."""
    (run,) = method.runs
    return replace(method, runs=[replace(run, losses=run.losses[:2], flags={**run.flags, "epochs": 2,
                                                                            "warmup_epochs": 0.5})])


@pytest.mark.parametrize("name, which", [*((name, "few") for name in FIGURES), ("learning_rates", "short"),
                                         *(("overview", which) for which in ("short", "most", "many", "alone"))])
def test_no_text_is_cut_off_or_overlaps(name, which):
    """Titles, labels and legends lie inside the figure and do not overlap, even with a long method name."""
    methods = published().methods
    methods.append(Method("Inc. Drop. Prob 0.1 x 1.02 to 0.2 + lr 0.002 + warmup_epochs 0", methods[4].runs))
    methods = {"few": methods, "short": [shortened(method) for method in methods], "most": many_methods(20),
               "many": figures.others_last(many_methods(120)),
               "alone": [with_counts(method, **dict.fromkeys(CATEGORIES, 0)) for method in methods]}[which]
    references = [Reference("untuned base", {"Avg": 39.0}, (37.0, 41.0), ""),
                  Reference("chance", {"Avg": 85.0}, None, "")]
    with figures.own_style():
        figure = FIGURES[name](methods, references)
        figure.suptitle("a subtitle")
        figure.canvas.draw()
    artists = [figure._suptitle, *figure.legends]
    for ax in figure.axes:
        legend = [ax.get_legend()] if ax.get_legend() else []
        artists += [ax.title, ax.xaxis.label, *legend]
        low, high = sorted(ax.get_ylim())  # Matplotlib before 3.11 also lists labels outside, which it does not draw
        artists += [label for label in ax.get_yticklabels()
                    if label.get_visible() and low <= label.get_position()[1] <= high]
        artists += ax.texts
    boxes = [artist.get_window_extent() for artist in artists if not hasattr(artist, "get_text") or artist.get_text()]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b) and a.width and b.width] == []
    plt.close(figure)


MATPLOTLIBRC = {"text.usetex": True, "font.size": 30, "font.family": "no such font", "axes.facecolor": "black",
                "axes.prop_cycle": plt.cycler(color=["red"]), "lines.marker": "x", "savefig.dpi": 30,
                "savefig.bbox": "tight", "savefig.transparent": True, "savefig.format": "pdf",
                "figure.autolayout": True, "svg.fonttype": "none", "path.simplify": False,
                "axes.formatter.use_locale": True, "image.cmap": "hot"}


def test_figures_do_not_depend_on_the_users_matplotlibrc(tmp_path, monkeypatch):
    """TeX, fonts, sizes and what a file is saved with; its own cycle of colours."""
    monkeypatch.setitem(figures.RC_PARAMS, "figure.dpi", 40)
    monkeypatch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in ("loss", "accuracy", "dropout")})
    written = []
    for name, settings in (("plain", {}), ("users", MATPLOTLIBRC)):
        with plt.rc_context(settings):
            paths = figures.write_figures(published(), tmp_path / name, "")
        written.append({path.name: path.read_bytes() for path in paths})
    assert written[0] == written[1] and len(written[0]) == 6


def test_styles_are_distinct():
    methods = [Method(f"method {i}", []) for i in range(30)]
    method_styles = figures.styles(methods).values()
    assert len({(style["color"], style["marker"]) for style in method_styles}) == 30
    assert len({(style["color"], str(style["linestyle"])) for style in method_styles}) == 30
    known = list(figures.styles([Method(name, []) for name in NAMES]).values())
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in known}) == len(NAMES)


@pytest.mark.parametrize("names", [
    ["Base", "Base + dropout 0.05"], ["Base", *(f"Base + lr {i}" for i in range(7))],
    ["Base", "Step Decay", *(f"mine {i}" for i in range(3)), "Dec. Drop. Prob"], [f"mine {i}" for i in range(8)],
    [*NAMES[1:], "mine"]])
def test_own_variants_have_colours_that_no_other_method_has(names):
    drawn = figures.styles([Method(name, []) for name in names])
    assert [*drawn] == names and len({style["color"] for style in drawn.values()}) == len(names) <= len(COLOURS)
    known = figures.styles([Method(name, []) for name in NAMES])
    assert all(drawn[name] == known[name] for name in names if name in NAMES)


def test_black_is_the_base_s_alone():
    drawn = figures.styles([Method(name, []) for name in ("mine", "Base", *map(str, range(15)))])
    assert [name for name, style in drawn.items() if style["color"] == COLOURS[0]] == ["Base"]


def test_published_methods_have_the_same_colour_and_hollow_markers():
    method_styles = figures.styles([Method("Step Decay", []), Method("Step Decay (published)", [], published=True)])
    style, published_style = method_styles.values()
    assert style["color"] == published_style["color"]
    assert published_style["markerfacecolor"] == "white" and "markerfacecolor" not in style


# Linear RGB as seen without red, green or blue cones (Machado, Oliveira & Fernandes 2009, severity 1).
MISSING_CONES = {
    "none": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def cielab(linear_rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear_rgb.clip(0, 1)
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])  # CIELAB's linear branch, for very dark colours, is left out
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", MISSING_CONES)
def test_colours_are_distinct_with_colour_blindness(cones):
    linear = [np.where(np.array(c) <= 0.04045, np.array(c) / 12.92, ((np.array(c) + 0.055) / 1.055) ** 2.4)
              for c in map(to_rgb, COLOURS)]
    perceived = [cielab(MISSING_CONES[cones] @ colour) for colour in linear]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(perceived, 2)) > 15


# The command


def run_command(*arguments):
    with one_line_errors():
        plot_results.main(plot_results.get_args_parser().parse_args(list(map(str, arguments))))


FILES = sorted([f"{name}.{suffix}" for name in FIGURES if name != "categories" for suffix in ("png", "svg")]
               + ["table.md", "table.csv", "table.tex", "report.html"])


def test_command_writes_all_files_and_prints_their_paths_last(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(figures.RC_PARAMS, "figure.dpi", 40)
    for name, flags in (("base", {}), ("cyclical", CYCLICAL), ("inc", INCREASING)):
        write_run(tmp_path / "runs" / name, **flags)
    (tmp_path / "runs" / "inc" / "metrics.jsonl").write_text(json.dumps(METRICS_LINE) + "\n")
    write_run(tmp_path / "runs" / "unfinished", losses=[1.0], **STEP)
    run_command(tmp_path / "runs", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[0] == "Method"
    assert sorted(printed[-len(FILES):]) == [str(tmp_path / "out" / name) for name in FILES]
    assert "unfinished, 1 of 2 epochs" in " ".join(printed).split("Excluded:")[1]
    assert "Step Decay" not in (tmp_path / "out" / "accuracy.svg").read_text()


def test_without_arguments_the_published_runs_are_plotted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"dropout": FIGURES["dropout"]})
    run_command()
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "published_dropout.png", "published_dropout.svg", "published_report.html",
        "published_table.csv", "published_table.md", "published_table.tex"]
    first = (tmp_path / "plots" / "published_dropout.svg").read_bytes()
    run_command()
    assert (tmp_path / "plots" / "published_dropout.svg").read_bytes() == first
    assert "88.82" in capsys.readouterr().out


def test_the_published_figures_in_assets_say_what_those_of_today_say(tmp_path, monkeypatch):
    """The words are compared, which Matplotlib writes as comments. Numbers at the axes depend on its version."""
    monkeypatch.setitem(figures.RC_PARAMS, "figure.dpi", 40)
    run_command("--out", tmp_path)

    def words(figure: Path) -> list[str]:
        return [text for text in re.findall("<!-- (.*?) -->", figure.read_text()) if re.search("[A-Za-z]", text)]

    drawn = {path.name: words(path) for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: words(path) for path in PUBLISHED.parent.glob("*.svg")}


def test_own_runs_beside_the_published_ones_keep_the_published_files(tmp_path, monkeypatch):
    """The published files have names of their own, by which assets/ and README know them."""
    monkeypatch.setattr(figures, "FIGURES", {"dropout": FIGURES["dropout"]})
    facts = published()
    counts, correct = facts.counts, facts.methods[0].runs[0].correct
    n, k = counts["Avg"], correct["Avg"]
    scores = {column: 100 * correct[column] / counts[column] for column in correct}
    write_run(tmp_path / "base", "1" * k + "0" * (n - k), files={
        "scores.json": {**scores, "counts": counts, "correct": correct, "split": "test"}})
    run_command(tmp_path / "base", "--published", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dropout.png", "dropout.svg", "report.html", "table.csv", "table.md", "table.tex"]


def test_interrupted_save_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("old")
    figure = plt.figure()

    def interrupted_savefig(file, **kwargs):
        file.write_text("ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", interrupted_savefig)
    with pytest.raises(KeyboardInterrupt):
        figures.save_figure(figure, path)
    assert path.read_text() == "old"


def test_without_metrics_no_loss_by_step_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {name: FIGURES[name] for name in ("dropout", "losses_by_step")})
    write_run(tmp_path / "run")
    run_command(tmp_path / "run", "--out", tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == ["dropout"]


def test_user_errors_are_one_line(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    for arguments, message in (([tmp_path / "none"], "no folder .*none: name a run"),
                               ([tmp_path / "run", "--published"], "--published: .*: leave it out"),
                               (["--base", tmp_path / "run"], "--base is one of the runs"),
                               ([tmp_path / "run", "--out", tmp_path / "file"], "--out .*file.*: name another folder")):
        with pytest.raises(SystemExit) as error:
            run_command(*arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert error.value.code == 1 and re.search(message, line)


def test_subtitle_describes_the_runs(runs):
    assert figures.subtitle(runs) == "these runs: base model toy, 10 test questions, 1 or 3 seeds a method"
    assert figures.subtitle(published()) == "published runs: base model 7B, 4,241 test questions, 1 seed a method"
