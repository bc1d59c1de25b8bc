"""The figures of a study are drawn as PNG and SVG, in the style of a comparison's figures.

A trial's colour tells its state, and its marker is filled if the trial has finished. Pale bars are 95 % intervals,
which account for the questions alone.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from lavin.runtime.arithmetic import ceil_div
from lavin.runtime.console import counted
from util.comparison.figures import (  # its imports of matplotlib follow its choice of a backend
    COLOURS,
    MARKERS,
    LogLocator,
    MaxNLocator,
    NullLocator,
    integer_ticks,
    own_style,
    plt,
    save_figure,
)
from util.search.folder import BASE, STATES
from util.search.space import flag_of
from util.search.summary import StudyReport, Trial, importance

BLUE, GREY, BLACK, ORANGE, PINK, GREEN = "#0072B2", "#999999", "#000000", "#D55E00", "#CC79A7", "#009E73"
COLOUR_OF = {"COMPLETE": BLUE, "PRUNED": GREY, "FAIL": PINK, "RUNNING": GREEN}  # by a trial's state
UNFINISHED_MARKERS = ["v", "s", "D", "^"]  # by the epochs that trials reached
COLUMNS = 4  # of panels


def style(trial: Trial, colour: str | None = None) -> dict[str, Any]:
    colour = colour or COLOUR_OF[trial.state]
    return {"color": colour, "markerfacecolor": colour if trial.is_finished else "white"}


def score_label(report: StudyReport, epoch: int | None = None) -> str:
    after = f", after {epoch} of {counted(report.epochs, 'epoch')}" if epoch else ""
    return f"accuracy on {report.trials[0].questions:,} validation\nquestions (%){after}"


def legend_below(figure, ncols: int = 5) -> None:
    """Draws one legend for all panels, with an entry for each label."""
    labelled = {label: handle for ax in figure.axes
                for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=ncols, fontsize=8)


def draw_interval(ax, x: float, trial: Trial, percent: float, colour: str) -> None:
    ax.vlines(x, *trial.interval(percent), color=colour, alpha=0.3, linewidth=1, zorder=0.5)


def history(report: StudyReport):
    figure, ax = plt.subplots(figsize=(7.5, 4.4))
    others = [trial for trial in report.trials if not trial.is_finished]
    marker_of = dict(zip(sorted({trial.last[0] for trial in others}), UNFINISHED_MARKERS, strict=False))
    for state, epoch in itertools.product(STATES, marker_of):
        alike = [trial for trial in others if (trial.state, trial.last[0]) == (state, epoch)]
        if alike:
            ax.plot([int(trial.name) for trial in alike], [trial.last[1] for trial in alike], marker_of[epoch],
                    label=f"{STATES[state]} after {counted(epoch, 'epoch')}", **style(alike[0]))
    finished = [(int(trial.name), trial.last[1]) for trial in report.trials if trial.is_finished]
    if finished:
        numbers, values = map(list, zip(*finished, strict=True))
        ax.plot(numbers, values, "o", color=COLOUR_OF["COMPLETE"], label=STATES["COMPLETE"])
        best = list(np.maximum.accumulate(values))
        ax.step([*numbers, int(report.trials[-1].name)], [*best, best[-1]], where="post", color=ORANGE, zorder=1,
                label="best finished so far")
    for trial in report.trials:
        draw_interval(ax, int(trial.name), trial, trial.last[1], style(trial)["color"])
    base = report.base_trial
    if base and base.is_finished:
        ax.axhline(base.last[1], color=BLACK, linestyle="--", linewidth=0.8, label="the base", zorder=0)
    ax.set(title="Trials in their order", xlabel="trial", ylabel=score_label(report))
    ax.xaxis.set_major_locator(integer_ticks())
    legend_below(figure, ncols=4)
    return figure


def learning_curves(report: StudyReport):
    figure, ax = plt.subplots(figsize=(7.5, 4.8))
    best = next((trial for trial in report.ranked if trial.is_finished), report.ranked[0])
    named = {BASE: ("the base", BLACK), best.name: ("the best", ORANGE)}
    if best.name == BASE:
        named = {BASE: ("the base, and the best", BLACK)}
    for trial in reversed(report.ranked):
        special = trial.name in named
        label, colour = named.get(trial.name, (STATES[trial.state], COLOUR_OF[trial.state]))
        ax.plot(*zip(*trial.curve, strict=True), marker="o" if trial.is_finished else "v", label=label,
                linewidth=2 if special else 0.8, zorder=3 if special else 2, alpha=1 if special else 0.75,
                **style(trial, colour))
        for epoch, percent in trial.curve if special else []:
            draw_interval(ax, epoch, trial, percent, colour)
    ax.set(title="Accuracy within the full schedule", xlabel="epoch", ylabel=score_label(report))
    ax.xaxis.set_major_locator(integer_ticks())
    legend_below(figure)
    return figure


def rates(report: StudyReport):
    """Draws the scores by learning rate. Returns None if no learning rate is searched, or if all trials have the same.
    """
    flag = next((flag for flag in ("blr", "lr") if flag in report.base), None)
    if flag is None or flag in report.flags_with_one_value:
        return None
    figure, ax = plt.subplots(figsize=(7.5, 4.8))
    schedules = sorted({str(trial.values.get("lr_schedule", "")) for trial, _ in report.comparable})
    for schedule, colour, marker in zip(schedules, COLOURS[1:], MARKERS, strict=False):
        for trial, percent in report.comparable:
            if str(trial.values.get("lr_schedule", "")) == schedule:
                ax.plot(trial.values[flag], percent, marker, linestyle="none", label=schedule or "trials",
                        **style(trial, colour))
                draw_interval(ax, trial.values[flag], trial, percent, colour)
    mark_base(ax, report.base[flag])
    ax.set(title="Learning rate (filled: finished trials)", xlabel=f"--{flag} (log scale)", xscale="log",
           ylabel=score_label(report, report.shared_epoch))
    plain_log_ticks(ax)
    legend_below(figure)
    return figure


def mark_base(ax, x: float) -> None:
    ax.axvline(x, color=BLACK, linestyle="--", linewidth=0.8, label="the base's value", zorder=0)


def plain_log_ticks(ax) -> None:
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def parameters(report: StudyReport):
    """Draws a panel for each searched flag, with the scores of the trials that use it. Returns None if no flag has two
    values."""
    flags = [flag for flag in dict.fromkeys(flag for trial, _ in report.comparable for flag in trial.values)
             if flag not in report.flags_with_one_value]
    if not flags:
        return None
    columns = min(COLUMNS, len(flags))
    rows = ceil_div(len(flags), columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.7 * columns, 2.3 * rows + 0.6), sharey=True, squeeze=False)
    for ax, flag in zip(axes.flat, flags, strict=False):
        draw_parameter(ax, report, flag)
    for ax in axes.flat[len(flags):]:
        ax.set_visible(False)
    figure.supylabel(score_label(report, report.shared_epoch), fontsize=9)
    legend_below(figure)
    return figure


def draw_parameter(ax, report: StudyReport, flag: str) -> None:
    used = [(trial, percent) for trial, percent in report.comparable if flag in trial.values]
    parameter = next(p for name, p in report.settings["space"]["parameters"].items() if flag_of(name, p) == flag)
    is_categorical = parameter["kind"] == "categorical"
    choices = parameter.get("choices", [])
    place = choices.index if is_categorical else float
    for trial, percent in used:
        ax.plot(place(trial.values[flag]), percent, "o" if trial.is_finished else "v", label=STATES[trial.state],
                **style(trial))
        draw_interval(ax, place(trial.values[flag]), trial, percent, style(trial)["color"])
    if flag in report.base:
        mark_base(ax, place(report.base[flag]))
    ax.set(xlabel=f"--{flag}")
    if is_categorical:
        long = sum(len(str(choice)) for choice in choices) > 18
        ax.set_xticks(range(len(choices)), choices, rotation=25 if long else 0, ha="right" if long else "center")
        ax.set_xlim(-0.5, len(choices) - 0.5)
    elif parameter.get("log"):
        ax.set(xscale="log")
        plain_log_ticks(ax)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter("{x:g}")


def draw_importance(report: StudyReport):
    """Draws the importance of the parameters. Returns None if it is not known."""
    shares = importance(report)
    if not shares:
        return None
    figure, ax = plt.subplots(figsize=(6.4, 1.6 + 0.28 * len(shares)))
    ys, (found, chance) = np.arange(len(shares)), np.array(list(shares.values())).T * 100
    ax.barh(ys, found, color=[BLUE if a > b else GREY for a, b in shares.values()], height=0.65)
    ax.plot(chance, ys, "|", color=BLACK, markersize=11, markeredgewidth=1.5, label="less than this by chance, 95 %")
    ax.set(title=f"Importance for accuracy after {report.shared_epoch} of {counted(report.epochs, 'epoch')}",
           xlabel="share of the parameter (%), PED-ANOVA", yticks=ys, yticklabels=list(shares),
           ylim=(len(shares) - 0.4, -0.6))
    ax.set_xlim(0, 1.08 * max(*found, *chance))
    ax.grid(axis="y", visible=False)
    legend_below(figure)
    return figure


FIGURES = {"history": history, "learning_curves": learning_curves, "rates": rates, "parameters": parameters,
           "importance": draw_importance}


def write_figures(report: StudyReport, folder: Path) -> list[Path]:
    written = []
    with own_style():
        for name, draw in FIGURES.items():
            figure = draw(report)
            if figure is None:
                continue
            for suffix in ("png", "svg"):
                written.append(folder / f"{name}.{suffix}")
                save_figure(figure, written[-1])
            plt.close(figure)
    return written
