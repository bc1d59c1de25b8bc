"""Figures of a comparison (PNG and SVG).

A point is a mean over seeds, its bar the 95 % confidence interval, a small tick a single seed. The band around a loss
curve is the standard deviation over the seeds. The loss by step is drawn for each run that has metrics.jsonl, and the
effects of schedule and dropout where runs cross them.
"""

import os
from contextlib import AbstractContextManager
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill

os.environ["MPLBACKEND"] = "Agg"  # writes files, never opens a window; a notebook's backend may not be installed here
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from lavin.mm_adapter import dropout_schedule
from lavin.runtime.files import atomic_write
from util.comparison.comparison import Comparison, Method
from util.comparison.factorial import Effect, find_effects
from util.comparison.methods import method_names
from util.comparison.statistics import LEVEL
from util.evaluation.scoring import COLUMNS
from util.lr_sched import LearningRate, learning_rate

CATEGORIES = [column for column in COLUMNS if column != "Avg"]
# Okabe & Ito's palette for all kinds of colour vision, with wine in place of its yellow, which is hardly visible in
# print. Markers and dashes differ too, for prints in grey.
COLOURS = ["#000000", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#009E73", "#0072B2", "#882255"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 2, 2)), (0, (9, 2))]
MEANS = 2000  # points of a running mean
SMOOTHED = 40  # the running mean is over this fraction of the run
RC_PARAMS = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
             "axes.axisbelow": True, "legend.frameon": False, "legend.handlelength": 3, "lines.linewidth": 1.2,
             "lines.markersize": 4.5, "figure.dpi": 130, "svg.hashsalt": "lavin", "figure.constrained_layout.use": True}


def styles(methods: list[Method]) -> dict[str, dict]:
    """Plot styles by method name. Those of scripts/methods.json are fixed; others get the next unused ones."""
    ordered = dict.fromkeys([*method_names(), *(method.name.removesuffix(" (published)") for method in methods)])
    style_by_name = dict(zip(ordered, zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False), strict=False))
    mixed = len({method.published for method in methods}) > 1
    result = {}
    for method in methods:
        colour, marker, dashes = style_by_name[method.name.removesuffix(" (published)")]
        # next to the user's own runs, published ones are hollow and pale
        hollow = {"markerfacecolor": "white", "alpha": 0.6} if mixed and method.published else {}
        result[method.name] = {"color": colour, "marker": marker, "linestyle": dashes, **hollow}
    return result


def wrap(name: str) -> str:
    return fill(name, 30)


# Panels: each function draws all methods into one Axes.


def draw_losses(ax: Axes, methods: list[Method]) -> None:
    for method, style in zip(methods, styles(methods).values(), strict=True):
        losses = [run.losses for run in method.runs]
        mean, deviation = np.mean(losses, 0), np.std(losses, 0, ddof=min(1, len(losses) - 1))
        epochs = np.arange(1, len(mean) + 1)
        ax.plot(epochs, mean, label=wrap(method.name), **style)
        if len(losses) > 1:
            low = np.maximum(mean - deviation, mean / 10)  # a log scale cannot show values <= 0
            ax.fill_between(epochs, low, mean + deviation, color=style["color"], alpha=0.12, linewidth=0)
    ax.set(title="Training loss", xlabel="epoch", ylabel="loss, mean of the epoch (log scale)", yscale="log")
    loss_ticks(ax)


def draw_losses_by_step(ax: Axes, methods: list[Method]) -> None:
    """Every run's losses, pale, under their running mean; one label a method."""
    for method, style in zip(methods, styles(methods).values(), strict=True):
        label: str | None = wrap(method.name)
        for run in filter(lambda run: run.step_losses, method.runs):
            epochs, losses = np.array(run.step_losses).T
            ax.plot(epochs, losses, color=style["color"], linewidth=0.4, alpha=0.25)
            places, means = running_mean(losses)
            ax.plot(epochs[places], means, linewidth=1, label=label, color=style["color"], linestyle=style["linestyle"])
            label = None
    ax.set(title="Training loss by step", xlabel="epoch", yscale="log",
           ylabel="loss (log scale); in front, its running mean")
    loss_ticks(ax)


def running_mean(values: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Places among the values, not more than a line has pixels, and the means there: over a centred window, at the ends
    over the part of it that lies inside."""
    half = len(values) // SMOOTHED // 2
    places = np.linspace(0, len(values) - 1, min(len(values), MEANS)).round().astype(int)
    return places, [values[max(0, i - half):i + half + 1].mean() for i in places]


def loss_ticks(ax: Axes) -> None:
    ax.xaxis.set_major_locator(integer_ticks())
    if not np.isfinite(ax.dataLim.minposy):  # no epoch has a loss: a log axis would have no range
        ax.set_yscale("linear")
        return
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if high < 5 * low else (1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def draw_accuracy(ax: Axes, methods: list[Method], cut: bool) -> None:
    """Avg by method, the first on top. cut: points on a truncated axis; otherwise bars from 0."""
    style_by_name = styles(methods)
    for y, method in enumerate(methods):
        mean, style = method.overall, style_by_name[method.name]
        error = {"xerr": distances(mean, method.interval("Avg")), "capsize": 2.5}
        if cut:
            ax.errorbar(mean, y, **error, **{**style, "linestyle": "none"})
            if len(method.runs) > 1:
                ax.plot(method.accuracies("Avg"), [y + 0.25] * len(method.runs), "|", color=style["color"])
        else:
            ax.barh(y, mean, color=lighten(style["color"], 0.3 if style.get("alpha") else 0.6), height=0.7)
            ax.errorbar(mean, y, **error, color="black")
        ax.annotate(f"{mean:.2f}", (1, y), xycoords=ax.get_yaxis_transform(), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8)
    ax.set(title="Overall accuracy, 95 % intervals", xlabel="accuracy (%)", ylim=(len(methods) - 0.4, -0.6),
           yticks=range(len(methods)), yticklabels=[wrap(method.name) for method in methods])
    ax.grid(axis="y", visible=False)
    if cut:
        ax.axvline(methods[0].overall, color="grey", linewidth=0.8, linestyle="--", zorder=0)
        intervals = [method.interval("Avg") for method in methods]
        cut_axis(ax, "x", [low for low, _ in intervals], [high for _, high in intervals])
    else:
        ax.set_xlim(0, 100)


def distances(mean: float, interval: tuple[float, float]) -> list[list[float]]:
    """An error bar's lengths to the left and to the right."""
    return [[mean - interval[0]], [interval[1] - mean]]


def lighten(colour: str, share: float) -> tuple:
    """Blends `share` of the colour with white."""
    return tuple(1 - share * (1 - channel) for channel in to_rgb(colour))


def draw_categories(ax: Axes, methods: list[Method]) -> None:
    """The categories that have questions, from left to right; within each, the methods in their order."""
    style_by_name, counts = styles(methods), methods[0].counts
    columns = [column for column in CATEGORIES if counts[column]]
    offsets = np.linspace(-0.38, 0.38, len(methods)) if len(methods) > 1 else [0]
    intervals = []
    for offset, method in zip(offsets, methods, strict=True):
        means = np.array([method.accuracy(column) for column in columns])
        bounds = np.array([method.interval(column) for column in columns])
        ax.errorbar(np.arange(len(columns)) + offset, means, yerr=[means - bounds[:, 0], bounds[:, 1] - means],
                    capsize=1.5, elinewidth=1, label=wrap(method.name),
                    **{**style_by_name[method.name], "linestyle": "none"})
        intervals += bounds.tolist()
    ax.set(title="Accuracy by category, 95 % intervals", ylabel="accuracy (%)", xlim=(-0.5, len(columns) - 0.5),
           xticks=range(len(columns)), xticklabels=[f"{column}\nn = {counts[column]:,}" for column in columns])
    for edge in range(1, len(columns)):
        ax.axvline(edge - 0.5, color="grey", linewidth=0.6, alpha=0.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    cut_axis(ax, "y", [low for low, _ in intervals], [high for _, high in intervals])


def cut_axis(ax: Axes, axis: str, lows: list[float], highs: list[float]) -> None:
    """Limits the axis to the range of the intervals; if it then does not start at 0, its label says so."""
    low, high = 2 * np.floor(min(lows) / 2), 2 * np.ceil(max(highs) / 2)
    if low < 10:
        low = 0
    margin = min(1, 0.03 * (high - low)) if high == 100 else 0  # so that a marker at 100 is not clipped
    ax.set(**{f"{axis}lim": (low, high + margin)})
    getattr(ax, f"{axis}axis").set_major_locator(integer_ticks())
    if low > 0:
        ax.set(**{f"{axis}label": f"accuracy (%), axis cut: starts at {low:g}, not 0"})


def integer_ticks() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def draw_learning_rates(ax: Axes, methods: list[Method]) -> None:
    def rates(method):
        schedule = LearningRate.read(method.flags)
        epochs = np.linspace(0, schedule.epochs, 2001)[:-1]  # no optimizer step happens at the very end
        return epochs, np.array([learning_rate(epoch, schedule) for epoch in epochs])

    draw_distinct_curves(ax, methods, rates)
    ax.set(title="Learning rate", xlabel="epoch", ylabel="learning rate")
    ax.xaxis.set_major_locator(integer_ticks())
    ax.yaxis.set_major_formatter("{x:g}")


def draw_dropout(ax: Axes, methods: list[Method]) -> None:
    def probabilities(method):
        n, flags = method.runs[0].n_layers, method.flags
        schedule = dropout_schedule(n, flags["dropout_prob"], flags["dropout_var"], flags["dropout_lim"])
        return np.arange(1, n + 1), np.array(schedule)

    draw_distinct_curves(ax, methods, probabilities, markers=True)
    ax.set(title="Dropout by layer", ylabel="dropout probability",
           xlabel="layer of LLaMA (the image encoder's blocks alike)")
    ax.xaxis.set_major_locator(integer_ticks())
    ax.set_ylim(0)


def draw_distinct_curves(ax: Axes, methods: list[Method], curve, markers: bool = False) -> None:
    """Methods with the same curve share one line; its label has the first method's name and the number of others."""
    lines: list[tuple] = []  # x, y, method names
    for method in methods:
        x, y = curve(method)
        same = next((names for _, other, names in lines if np.array_equal(other, y)), None)
        if same is None:
            lines.append((x, y, [method.name]))
        else:
            same.append(method.name)
    style_by_name = styles(methods)
    for x, y, names in lines:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        style = style_by_name[names[0]] if markers else {**style_by_name[names[0]], "marker": "none"}
        ax.plot(x, y, label=wrap(names[0] + more), **style)
    below = ax.transAxes + ScaledTranslation(0, -0.45, ax.figure.dpi_scale_trans)  # inches, to clear the axis label
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0, ncols=2)


# Figures


def single_panel(draw, width: float = 6.4, height: float = 4.2, legend: bool = False):
    def figure(methods: list[Method]) -> Figure:
        fig, ax = plt.subplots(figsize=(width, height))
        draw(ax, methods)
        if legend:
            fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=int(width / 2.4))
        return fig
    return figure


def accuracy_figure(methods: list[Method]) -> Figure:
    """Bars from 0 on the left; the same numbers on a truncated axis on the right."""
    fig, (full, close_up) = plt.subplots(1, 2, sharey=True, figsize=(9, 1.3 + 0.34 * len(methods)))
    draw_accuracy(full, methods, cut=False)
    draw_accuracy(close_up, methods, cut=True)
    close_up.set_title("The same, close up")
    return fig


def overview(methods: list[Method]) -> Figure:
    extra = 0.3 * max(0, len(methods) - 8)  # inches, for more than eight method names
    fig = plt.figure(figsize=(10, 10.5 + 2 * extra))
    grid = fig.add_gridspec(3, 2, height_ratios=[3.3 + extra, 3, 2.6])
    losses, accuracy, categories, rates, dropout = map(fig.add_subplot, [grid[0, 0], grid[0, 1], grid[1, :], grid[2, 0],
                                                                          grid[2, 1]])
    draw_losses(losses, methods)
    draw_accuracy(accuracy, methods, cut=True)
    draw_categories(categories, methods)
    draw_learning_rates(rates, methods)
    draw_dropout(dropout, methods)
    fig.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


FIGURES = {"overview": overview, "accuracy": accuracy_figure, "loss": single_panel(draw_losses, 7.5, 5.6, legend=True),
           "losses_by_step": single_panel(draw_losses_by_step, 7.5, 5.6, legend=True),
           "categories": single_panel(draw_categories, 10, 4.6, legend=True),
           "learning_rates": single_panel(draw_learning_rates), "dropout": single_panel(draw_dropout)}


def subtitle(comparison: Comparison) -> str:
    """One line each for published and own runs: base model, number of questions, number of seeds."""
    def line(methods, label):
        models = sorted({str(method.flags.get("llm_model")) for method in methods})
        seeds = sorted({len(method.runs) for method in methods})
        return (f"{label}: base model {', '.join(models)}, {comparison.counts['Avg']:,} {methods[0].runs[0].split} "
                f"questions, {' or '.join(map(str, seeds))} seed{'s' * (seeds != [1])} a method")
    groups = [("published runs", [m for m in comparison.methods if m.published]),
              ("these runs", [m for m in comparison.methods if not m.published])]
    return "\n".join(line(methods, label) for label, methods in groups if methods)


def save_figure(figure: Figure, path: Path) -> None:
    # without the date, the same runs give the same file
    metadata = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    with atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format=path.suffix[1:], **metadata)


def draw_effects(effects: list[Effect]) -> Figure:
    """Each effect with its interval, by kind; filled where p (Holm) lies below 5 %."""
    figure, ax = plt.subplots(figsize=(7, 1.2 + 0.28 * len(effects)))
    kinds = list(dict.fromkeys(effect.family for effect in effects))
    for y, effect in enumerate(effects):
        colour = COLOURS[1 + kinds.index(effect.family)]
        ax.errorbar(effect.points, y, xerr=distances(effect.points, (effect.low, effect.high)), capsize=2.5,
                    color=colour, marker=MARKERS[kinds.index(effect.family)],
                    markerfacecolor=colour if effect.holm < LEVEL else "white",
                    label=effect.family if effect.family not in ax.get_legend_handles_labels()[1] else None)
    ax.axvline(0, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    ax.set(title="Effects, 95 % intervals (filled: p (Holm) below 0.05)", xlabel="points of accuracy",
           ylim=(len(effects) - 0.4, -0.6), yticks=range(len(effects)),
           yticklabels=[fill(effect.name, 44) for effect in effects])
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=len(kinds))
    return figure


def own_style() -> AbstractContextManager:
    """Figures are drawn by Matplotlib's defaults and RC_PARAMS, whatever the user's matplotlibrc has: with another font
    or another size, texts would overlap, and TeX may not be installed."""
    return plt.style.context(["default", RC_PARAMS])


def write_figures(comparison: Comparison, folder: Path, prefix: str) -> list[Path]:
    effects, written = find_effects(comparison), []
    drawings = {name: partial(draw, comparison.methods) for name, draw in FIGURES.items()}
    if effects:
        drawings["effects"] = partial(draw_effects, effects)
    with own_style():
        for name, draw in drawings.items():
            if name == "losses_by_step" and not any(run.step_losses for m in comparison.methods for run in m.runs):
                continue
            figure = draw()
            figure.suptitle(subtitle(comparison), fontsize=9)
            for suffix in ("png", "svg"):
                written.append(folder / f"{prefix}{name}.{suffix}")
                save_figure(figure, written[-1])
            plt.close(figure)
    return written
