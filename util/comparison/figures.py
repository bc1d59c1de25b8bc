"""Figures of a comparison (PNG and SVG).

A point is a mean over seeds, its bar the 95 % confidence interval, a small tick a single seed. The band around a loss
curve is the standard deviation over the seeds. The loss by step is drawn for each run that has metrics.jsonl, and the
effects of schedule and dropout where runs cross them. Of many methods, the base and the best are told apart, and the
others are grey.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from textwrap import fill

os.environ["MPLBACKEND"] = "Agg"  # writes files, never opens a window; a notebook's backend may not be installed here
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from lavin.mm_adapter import dropout_schedule
from lavin.runtime.console import counted
from lavin.runtime.files import atomic_write
from util.comparison.comparison import Comparison, Method, seeds_in_words
from util.comparison.factorial import Effect, find_effects
from util.comparison.methods import method_names
from util.comparison.references import Reference
from util.comparison.statistics import LEVEL
from util.lr_sched import LearningRate, learning_rate

# Okabe & Ito's palette for all kinds of colour vision, with wine in place of its yellow, which is hardly visible in
# print. Markers and dashes differ too, for prints in grey.
COLOURS = ["#000000", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9", "#009E73", "#0072B2", "#882255"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 2, 2)), (0, (9, 2))]
CODES = {"NAT, SOC, LAN": "natural, social and language science",
         "TXT, IMG, NO": "with a text, a picture or neither as context", "G1-6, G7-12": "grades"}
MANY, BEST = 20, 10  # of more than MANY methods, the base and the BEST others are told apart
GREY = {"color": "#999999", "marker": "none", "linestyle": "-", "linewidth": 0.5, "zorder": 1.5}
FEW_EPOCHS = 5  # of fewer epochs, the overview has the loss by step
MEANS = 2000  # points of a running mean
SMOOTHED = 40  # the running mean is over this fraction of the run,
LEAST_SMOOTHED = 4  # or over so many values to each side, where they are no more than an eighth of a short run
RC_PARAMS = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
             "axes.axisbelow": True, "legend.frameon": False, "legend.handlelength": 3, "lines.linewidth": 1.2,
             "lines.markersize": 4.5, "figure.dpi": 130, "svg.hashsalt": "lavin", "figure.constrained_layout.use": True}


def styles(methods: list[Method]) -> dict[str, dict]:
    """Plot styles by method name. Those of scripts/methods.json are fixed; others get those that are used least."""
    names = list(dict.fromkeys(method.name.removesuffix(" (published)") for method in methods))
    fixed = dict(zip(method_names(), zip(COLOURS, MARKERS, DASHES, strict=False), strict=False))
    style_by_name = {name: fixed[name] for name in names if name in fixed}
    black = [] if method_names()[0] in names else COLOURS[:1]  # it is the base's
    for name in names:
        if name not in fixed:
            style_by_name[name] = least_used_style(list(style_by_name.values()), [*COLOURS[1:], *black])
    mixed = len({method.published for method in methods}) > 1
    result = {}
    for method in methods:
        colour, marker, dashes = style_by_name[method.name.removesuffix(" (published)")]
        # next to the user's own runs, published ones are hollow and pale
        hollow = {"markerfacecolor": "white", "alpha": 0.6} if mixed and method.published else {}
        result[method.name] = {"color": colour, "marker": marker, "linestyle": dashes, **hollow}
    return result


def least_used_style(used: list[tuple], colours: list[str]) -> tuple:
    """The colour that is used least, with the marker and the dashes that are used least with it, and then in all."""
    colour = min(colours, key=[style[0] for style in used].count)

    def least_used(choices: list, part: int):
        parts = [(style[0] == colour, style[part]) for style in used]
        return min(choices, key=lambda choice: (parts.count((True, choice)), parts.count((False, choice))))
    return colour, least_used(MARKERS, 1), least_used(DASHES, 2)


def wrap(name: str) -> str:
    return fill(name, 30)


def others_last(methods: list[Method]) -> list[Method]:
    """The methods that are told apart, in their order, and then the others."""
    if len(methods) <= MANY:
        return methods
    best = sorted(methods[1:], key=lambda method: method.overall, reverse=True)[:BEST]
    names = {methods[0].name, *(method.name for method in best)}
    return sorted(methods, key=lambda method: method.name not in names)


def told_apart(methods: list[Method]) -> tuple[list[Method], list[Method]]:
    """The methods that have colours and names, and the others. methods: the result of `others_last`."""
    n = len(methods) if len(methods) <= MANY else 1 + BEST
    return methods[:n], methods[n:]


def drawn(methods: list[Method]) -> list[tuple[Method, dict, str | None]]:
    """Each method with its style and its label, which the others share."""
    named, others = told_apart(methods)
    shared = [counted(len(others), "other"), *[None] * (len(others) - 1)] if others else []
    return [*((method, style, wrap(method.name)) for method, style in zip(named, styles(named).values(), strict=True)),
            *((method, GREY, label) for method, label in zip(others, shared, strict=True))]


# Panels: each function draws all methods into one Axes.


def draw_losses(ax: Axes, methods: list[Method]) -> None:
    for method, style, label in drawn(methods):
        losses = [run.losses for run in method.runs]
        mean, deviation = np.mean(losses, 0), np.std(losses, 0, ddof=min(1, len(losses) - 1))
        epochs = np.arange(1, len(mean) + 1)
        ax.plot(epochs, mean, label=label, **style)
        if len(losses) > 1 and style is not GREY:
            low = np.maximum(mean - deviation, mean / 10)  # a log scale cannot show values <= 0
            ax.fill_between(epochs, low, mean + deviation, color=style["color"], alpha=0.12, linewidth=0)
    ax.set(title="Training loss", xlabel="epoch", ylabel="loss, mean of the epoch (log scale)", yscale="log")
    loss_ticks(ax)


def draw_losses_by_step(ax: Axes, methods: list[Method]) -> None:
    """Every run's losses, pale, under the running means of all; one label a method."""
    for method, style, label in drawn(methods):
        front = {"linewidth": 1.4, "zorder": 3, **style, "marker": "none"}
        for run in filter(lambda run: run.step_losses, method.runs):
            epochs, losses = np.array(run.step_losses).T
            if style is not GREY:
                ax.plot(epochs, losses, color=style["color"], linewidth=0.4, alpha=0.25, zorder=1)
            places, means = running_mean(losses)
            ax.plot(epochs[places], means, label=label, **front)
            label = None
    ax.set(title="Training loss by step", xlabel="epoch", yscale="log",
           ylabel="loss (log scale); in front, its running mean")
    loss_ticks(ax)


def running_mean(values: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Places among the values, not more than a line has pixels, and the means there: over a centred window, at the ends
    over the part of it that lies inside."""
    half = max(len(values) // SMOOTHED // 2, min(LEAST_SMOOTHED, len(values) // 8))
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


def draw_accuracy(ax: Axes, methods: list[Method], cut: bool, references: Sequence[Reference] = ()) -> None:
    """Avg by method, the first on top; the others share a row, and references come last. cut: points on a truncated
    axis; otherwise bars from 0."""
    named, others = told_apart(methods)
    for y, (method, style) in enumerate(zip(named, styles(named).values(), strict=True)):
        mean = method.overall
        error = {"xerr": distances(mean, method.interval("Avg")), "capsize": 2.5}
        if cut:
            ax.errorbar(mean, y, **error, **{**style, "linestyle": "none"})
            if len(method.runs) > 1:
                ax.plot(method.accuracies("Avg"), [y + 0.25] * len(method.runs), "|", color=style["color"])
        else:
            ax.barh(y, mean, color=lighten(style["color"], 0.3 if style.get("alpha") else 0.6), height=0.7)
            ax.errorbar(mean, y, **error, color="black")
        write_beside(ax, y, f"{mean:.2f}")
    rows = [*(wrap(method.name) for method in named), *[counted(len(others), "other")] * bool(others)]
    if others:
        ax.plot([method.overall for method in others], [len(named)] * len(others), ".", color=GREY["color"], alpha=0.6)
    ax.set(title="Overall accuracy, 95 % intervals", xlabel="accuracy (%)",
           ylim=(len(rows) + len(references) - 0.4, -0.6), yticks=range(len(rows) + len(references)),
           yticklabels=[*rows, *(reference.name for reference in references)])
    ax.grid(axis="y", visible=False)
    if cut:
        ax.axvline(methods[0].overall, color="grey", linewidth=0.8, linestyle="--", zorder=0)
        of_named = [value for method in named for value in (*method.interval("Avg"), *method.accuracies("Avg"))]
        cut_axis(ax, "x", [*of_named, *(method.overall for method in others)])
    else:
        ax.set_xlim(0, 100)
    for y, reference in enumerate(references, len(rows)):
        draw_reference(ax, y, reference)


def draw_reference(ax: Axes, y: int, reference: Reference) -> None:
    """The accuracy of no method; an arrow where it lies outside the axis."""
    low, high = ax.get_xlim()
    value = reference.overall
    outside = "<" if value < low else ">" if value > high else None
    error = {"xerr": distances(value, reference.interval)} if reference.interval and not outside else {}
    ax.errorbar(np.clip(value, low, high), y, **error, capsize=2.5, color="dimgrey", marker=outside or "x",
                clip_on=not outside)
    write_beside(ax, y, f"{value:.2f}")


def write_beside(ax: Axes, y: int, text: str) -> None:
    ax.annotate(text, (1, y), xycoords=ax.get_yaxis_transform(), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8)


def distances(mean: float, interval: tuple[float, float]) -> list[list[float]]:
    """An error bar's lengths to the left and to the right."""
    return [[mean - interval[0]], [interval[1] - mean]]


def lighten(colour: str, share: float) -> tuple:
    """Blends `share` of the colour with white."""
    return tuple(1 - share * (1 - channel) for channel in to_rgb(colour))


def find_categories(methods: list[Method]) -> list[str]:
    """The columns that have questions, but not all of them: a column of all questions has nothing that Avg has not."""
    counts = methods[0].counts
    return [column for column, n in counts.items() if 0 < n < counts["Avg"]]


def draw_categories(ax: Axes, methods: list[Method]) -> None:
    """The categories from left to right; within each, the methods in their order, and then the others as points."""
    (named, others), counts, columns = told_apart(methods), methods[0].counts, find_categories(methods)
    offsets = np.linspace(-0.38, 0.38, len(named) + bool(others)) if len(methods) > 1 else np.zeros(1)
    ends = []
    for offset, (method, style) in zip(offsets, zip(named, styles(named).values(), strict=True), strict=False):
        means = np.array([method.accuracy(column) for column in columns])
        bounds = np.array([method.interval(column) for column in columns])
        ax.errorbar(np.arange(len(columns)) + offset, means, yerr=[means - bounds[:, 0], bounds[:, 1] - means],
                    capsize=1.5, elinewidth=1, label=wrap(method.name), **{**style, "linestyle": "none"})
        ends += bounds.ravel().tolist()
    for method in others:
        means = np.array([method.accuracy(column) for column in columns])
        ax.plot(np.arange(len(columns)) + offsets[-1], means, ".", color=GREY["color"], alpha=0.4)
        ends += means.tolist()
    ax.set(title="Accuracy by category, 95 % intervals", ylabel="accuracy (%)", xlim=(-0.5, len(columns) - 0.5),
           xticks=range(len(columns)), xticklabels=[f"{column}\nn = {counts[column]:,}" for column in columns])
    codes = [f"{names}: {words}." for names, words in CODES.items() if {*columns} & {*names.split(", ")}]
    ax.set_xlabel("  ".join(codes), fontsize=8)
    for edge in range(1, len(columns)):
        ax.axvline(edge - 0.5, color="grey", linewidth=0.6, alpha=0.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    cut_axis(ax, "y", ends)


def cut_axis(ax: Axes, axis: str, values: list[float]) -> None:
    """Limits the axis to the range of all that is drawn; if it then does not start at 0, its label says so. No value
    lies on a limit, where its marker would be clipped or hidden by the frame."""
    low, high = 2 * np.ceil(min(values) / 2) - 2, min(2 * np.floor(max(values) / 2) + 2, 100)
    if low < 10:
        low = 0
    margin = min(1, 0.03 * (high - low))  # beyond 0 and 100
    ax.set(**{f"{axis}lim": (low - margin * (min(values) <= 0), high + margin * (high == 100))})
    getattr(ax, f"{axis}axis").set_major_locator(integer_ticks())
    if low > 0:
        ax.set(**{f"{axis}label": f"accuracy (%), axis cut: starts at {low:g}, not 0"})


def integer_ticks() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def draw_learning_rates(ax: Axes, methods: list[Method], legend: bool = True) -> None:
    def rates(method):
        schedule = LearningRate.read(method.flags)
        epochs = np.linspace(0, schedule.epochs, 2001)[:-1]  # no optimizer step happens at the very end
        return epochs, np.array([learning_rate(epoch, schedule) for epoch in epochs])

    names = draw_distinct_curves(ax, methods, rates, legend)
    flat = [name for method, name in names if is_flat(rates(method), LearningRate.read(method.flags))]
    ax.set(xlabel="epoch", ylabel="learning rate")
    ax.set_title("\n".join([title("Learning rate", legend), *[fill(f"{', '.join(flat)}: flat within the epochs trained",
                                                                        45)] * bool(flat)]))
    ax.xaxis.set_major_locator(integer_ticks())
    ax.yaxis.set_major_formatter("{x:g}")


def is_flat(curve: tuple[np.ndarray, np.ndarray], schedule: LearningRate) -> bool:
    epochs, rates = curve
    return len(set(rates[epochs >= schedule.warmup_epochs])) == 1


def draw_dropout(ax: Axes, methods: list[Method], legend: bool = True) -> None:
    def probabilities(method):
        n, flags = method.runs[0].n_layers, method.flags
        schedule = dropout_schedule(n, flags["dropout_prob"], flags["dropout_var"], flags["dropout_lim"])
        return np.arange(1, n + 1), np.array(schedule)

    draw_distinct_curves(ax, methods, probabilities, legend, markers=True)
    ax.set(title=title("Dropout by layer", legend), ylabel="dropout probability",
           xlabel="layer of LLaMA (the image encoder's blocks alike)")
    ax.xaxis.set_major_locator(integer_ticks())
    ax.set_ylim(0)


def title(words: str, legend: bool) -> str:
    return words if legend else f"{words} (methods may share a line)"


def draw_distinct_curves(ax: Axes, methods: list[Method], curve, legend: bool, markers: bool = False
                         ) -> list[tuple[Method, str]]:
    """Methods with the same curve share one line; its label has the first method's name and the number of others.
    Returns the first method and the label of each line that has one."""
    lines: list[tuple] = []  # x, y, methods
    for method in methods:
        x, y = curve(method)
        same = next((sharing for _, other, sharing in lines if np.array_equal(other, y)), None)
        if same is None:
            lines.append((x, y, [method]))
        else:
            same.append(method)
    style_by_name = {method.name: style for method, style, _ in drawn(methods)}
    n_grey = sum(len(sharing) for *_, sharing in lines if style_by_name[sharing[0].name] is GREY)
    names = []
    for x, y, sharing in lines:
        style = style_by_name[sharing[0].name]
        more = f" and {len(sharing) - 1} more" if len(sharing) > 1 else ""
        label = f"{sharing[0].name}{more}"
        if style is GREY:
            label, n_grey = counted(n_grey, "other") if n_grey else "", 0
        ax.plot(x, y, label=wrap(label) or None, **(style if markers else {**style, "marker": "none"}))
        names += [(sharing[0], label)] if label else []
    if legend:
        below = ax.transAxes + ScaledTranslation(0, -0.45, ax.figure.dpi_scale_trans)  # inches: clears the axis label
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, borderaxespad=0,
                  ncols=2)
    return names


# Figures


def single_panel(draw, width: float = 6.4, height: float = 4.2, legend: bool = False):
    def figure(methods: list[Method], references: Sequence[Reference] = ()) -> Figure:
        more = max(0, len(told_apart(methods)[0]) - 8)  # names in a legend
        fig, ax = plt.subplots(figsize=(width, height + (0.1 if legend else 0.18) * more))
        draw(ax, methods)
        if legend:
            legend_below(fig, methods, int(width / 2.4))
        return fig
    return figure


def legend_below(figure: Figure, methods: list[Method], columns: int) -> None:
    """One legend for all panels, with each method's line and marker."""
    handles = [Line2D([], [], label=label, **style) for _, style, label in drawn(methods) if label]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def accuracy_figure(methods: list[Method], references: Sequence[Reference] = ()) -> Figure:
    """Bars from 0 on the left; the same numbers on a truncated axis on the right."""
    fig, (full, close_up) = plt.subplots(1, 2, sharey=True, figsize=(9, 1.3 + 0.34 * n_rows(methods, references)))
    draw_accuracy(full, methods, cut=False, references=references)
    draw_accuracy(close_up, methods, cut=True, references=references)
    close_up.set_title("The same, close up")
    return fig


def n_rows(methods: list[Method], references: Sequence[Reference]) -> float:
    """The height of a panel of accuracies, in rows; a name of two lines needs more than one."""
    named, others = told_apart(methods)
    lines = sum(wrap(method.name).count("\n") + 1 for method in named)
    return max(len(named), 0.65 * lines) + bool(others) + len(references)


def overview(methods: list[Method], references: Sequence[Reference] = ()) -> Figure:
    extra = 0.3 * max(0, n_rows(methods, references) - 8)  # inches, for more than eight rows of names
    has_categories = bool(find_categories(methods))
    fig = plt.figure(figsize=(10, 10.5 + 1.4 * extra - 3.5 * (not has_categories)))
    heights = [3.3 + extra, *[3] * has_categories, 2.6]
    grid = fig.add_gridspec(len(heights), 2, height_ratios=heights)
    runs = [run for method in methods for run in method.runs]
    by_step = max(len(run.losses) for run in runs) < FEW_EPOCHS and any(run.step_losses for run in runs)
    (draw_losses_by_step if by_step else draw_losses)(fig.add_subplot(grid[0, 0]), methods)
    draw_accuracy(fig.add_subplot(grid[0, 1]), methods, cut=True, references=references)
    if has_categories:
        draw_categories(fig.add_subplot(grid[1, :]), methods)
    draw_learning_rates(fig.add_subplot(grid[-1, 0]), methods, legend=False)
    draw_dropout(fig.add_subplot(grid[-1, 1]), methods, legend=False)
    legend_below(fig, methods, 4)
    return fig


FIGURES = {"overview": overview, "accuracy": accuracy_figure, "loss": single_panel(draw_losses, 7.5, 5.6, legend=True),
           "losses_by_step": single_panel(draw_losses_by_step, 7.5, 5.6, legend=True),
           "categories": single_panel(draw_categories, 10, 4.6, legend=True),
           "learning_rates": single_panel(draw_learning_rates), "dropout": single_panel(draw_dropout)}


def subtitle(comparison: Comparison) -> str:
    """One line each for published and own runs: base model, number of questions, number of seeds."""
    def line(methods, label):
        models = sorted({str(method.flags.get("llm_model")) for method in methods})
        return (f"{label}: base model {', '.join(models)}, "
                f"{counted(comparison.counts['Avg'], f'{methods[0].runs[0].split} question')}, "
                f"{seeds_in_words(methods)} a method")
    groups = [("published runs", [m for m in comparison.methods if m.published]),
              ("these runs", comparison.own)]
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
    methods = others_last(comparison.methods)
    drawings = {name: partial(draw, methods, comparison.references) for name, draw in FIGURES.items()}
    if not any(run.step_losses for method in methods for run in method.runs):
        drawings.pop("losses_by_step", None)
    if not find_categories(methods):
        drawings.pop("categories", None)
    if effects:
        drawings["effects"] = partial(draw_effects, effects)
    with own_style():
        for name, draw in drawings.items():
            figure = draw()
            figure.suptitle(subtitle(comparison), fontsize=9)
            for suffix in ("png", "svg"):
                written.append(folder / f"{prefix}{name}.{suffix}")
                save_figure(figure, written[-1])
            plt.close(figure)
    return written
