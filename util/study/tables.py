"""A comparison as a table: aligned text, Markdown, LaTeX (rounded, with notes), CSV (unrounded, one number a cell)."""

import csv
import io
from collections.abc import Iterable

import numpy as np

from lavin.runtime.console import format_table
from util.evaluation.scoring import COLUMNS
from util.study.comparison import Comparison, Difference, Method
from util.study.statistics import DRAWS, design_effect

NONE = "–"
DIFFERENCE = ["vs. base, 95 %", "detectable", "p", "p (Holm)"]
NEGLIGIBLE = 1.0  # points: intervals that exclude more than this are said to show no difference
LATEX = str.maketrans({"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
                       "{": r"\{", "}": r"\}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$", "±": r"$\pm$",
                       "−": "$-$", "–": "--"})


def text_table(comparison: Comparison) -> str:
    return "\n".join([format_table(*rounded_cells(comparison)), "", *notes(comparison)])


def markdown_table(comparison: Comparison) -> str:
    header, rows = rounded_cells(comparison)
    alignment = [":--"] + ["--:"] * (len(header) - 1)
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (header, alignment, *rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(comparison))]) + "\n"


def latex_table(comparison: Comparison) -> str:
    """A floating table that needs the packages booktabs and graphicx; the notes are its caption."""
    header, rows = rounded_cells(comparison)
    head, *body = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in (header, *rows)]
    return "\n".join([r"\begin{table*}", r"\centering", r"\resizebox{\textwidth}{!}{%",
                      rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", head, r"\midrule",
                      *body[:-1], r"\midrule", body[-1], r"\bottomrule", r"\end{tabular}}",
                      rf"\caption{{{' '.join(notes(comparison)).translate(LATEX)}}}", r"\end{table*}", ""])


def csv_table(comparison: Comparison) -> str:
    """The table as CSV: percentages and points have four decimals, and a cell without a value is empty."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(["method", "published", "seeds", "n", *COLUMNS, "Avg_low", "Avg_high",
           *(f"{column}_sd" for column in COLUMNS), "difference", "difference_low", "difference_high",
           "difference_detectable", "p_mcnemar", "p_holm", "superiority", "superiority_low", "superiority_high",
           "Avg_clustered_low", "Avg_clustered_high", "difference_clustered_low", "difference_clustered_high",
           "difference_clustered_detectable", "p_clustered", "p_clustered_holm"])
    for method in comparison.methods:
        d, c = comparison.differences.get(method.name), comparison.clustered.get(method.name)
        numbers = [*map(method.accuracy, COLUMNS), *method.interval("Avg"), *map(method.deviation, COLUMNS),
                   *((d.points, d.low, d.high, d.detectable) if d else (None,) * 4)]
        clustered = [*(method.clustered or (None, None)), *((c.low, c.high, c.detectable) if c else (None,) * 3)]
        write([method.name, int(method.published), len(method.runs), method.counts["Avg"],
               *fixed(numbers), *p_values(d), *fixed(comparison.superiority(method) or (None,) * 3),
               *fixed(clustered), *p_values(c)])
    return out.getvalue()


def fixed(numbers: Iterable[float | None]) -> list[str]:
    return ["" if number is None else f"{number:.4f}" for number in numbers]


def p_values(d: Difference | None) -> list[str]:
    return ["" if p is None else f"{p:.6g}" for p in ((d.p, d.holm) if d else (None, None))]


def rounded_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, the last of which has the numbers of questions, without columns that say nothing."""
    header = ["Method", "seeds", *COLUMNS, "n", "Avg, 95 %", "Avg, clustered", "vs. base", *DIFFERENCE,
              "vs. base, clustered", "detectable, clustered", "p (Holm), clustered", "beats base"]
    rows = [method_cells(method, comparison) for method in comparison.methods]
    counts = [f"{comparison.counts[column]:,}" for column in COLUMNS]
    rows.append(["questions", NONE, *counts, *[NONE] * (len(header) - len(COLUMNS) - 2)])
    kept = [i for i, name in enumerate(header)
            if any(row[i] != NONE for row in rows) and not (name == "seeds" and all(row[i] in "1–" for row in rows))]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def method_cells(method: Method, comparison: Comparison) -> list[str]:
    d = comparison.differences.get(method.name)
    ends, detectable, _, holm = difference_cells(comparison.clustered.get(method.name))
    return [method.name, str(len(method.runs)), *(accuracy(method, column) for column in COLUMNS),
            f"{method.counts['Avg']:,}", interval(method.interval("Avg")), interval(method.clustered),
            points(d.points) if d else NONE, *difference_cells(d), ends, detectable, holm,
            superiority(comparison.superiority(method))]


def difference_cells(d: Difference | None) -> list[str]:
    """The cells in the columns of DIFFERENCE."""
    if d is None:
        return [NONE] * len(DIFFERENCE)
    return [f"{points(d.low)} to {points(d.high)}", f"±{d.detectable:.2f}" if d.detectable else NONE, p_value(d.p),
            p_value(d.holm)]


def interval(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else NONE


def superiority(estimate_and_ends: tuple[float, float, float] | None) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*estimate_and_ends) if estimate_and_ends else NONE


def accuracy(method: Method, column: str) -> str:
    mean, deviation = method.accuracy(column), method.deviation(column)
    return NONE if mean is None else f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def points(value: float) -> str:
    return f"{round(value, 2) + 0:+.2f}".replace("-", "−")  # + 0 turns -0.0 into 0.0


def p_value(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def notes(comparison: Comparison) -> list[str]:
    """The sentences on how the numbers were computed, what they do not cover, and which runs are excluded."""
    published = any(method.published for method in comparison.methods)
    max_seeds = max(len(method.runs) for method in comparison.methods)
    own = [comparison.differences[method.name] for method in comparison.methods
           if not method.published and method.name in comparison.differences]
    lines = [f"Accuracy in % of {comparison.counts['Avg']:,} questions. Intervals are Wilson's, from n alone, and not "
             "adjusted for the number of methods."]
    if own and own[0].p is not None:
        lines.append("vs. base: on the same questions; exact McNemar test, p adjusted after Holm for "
                     f"{len(own)} method{'s' * (len(own) > 1)}; interval by paired bootstrap, {DRAWS:,} draws.")
    elif own:
        lines.append("No run kept generations.jsonl, which has the right answers: differences are unpaired (Newcombe's "
                     "interval) and untested.")
    elif len(comparison.methods) > 1 and not comparison.differences:
        lines.append("No run is the base (cosine schedule, --dropout_var 1): for differences, choose one with --base.")
    if comparison.differences:
        lines.append("detectable: the smallest difference to the base that a test on these questions finds 4 times of "
                     "5, before Holm's adjustment. A smaller one that was not found may well be there.")
        lines += verdicts(comparison)
    if comparison.clusters is not None:
        lines.append(cluster_note(comparison, comparison.clusters))
    if max_seeds > 1:
        lines.append("±: standard deviation over the seeds; all else is of their mean. The bootstrap draws seeds as "
                     "well as questions, the test is about the questions alone.")
    if any(map(comparison.superiority, comparison.methods)):
        lines.append("beats base: the probability that a new run scores above a new run of the base on these questions "
                     "(Mann-Whitney), and its 95 % interval (Newcombe 2006), from the seeds alone.")
    if published:
        lines.append("The published figures come without predictions: their differences are unpaired (Newcombe's "
                     "interval) and untested. Their counts by category are the only ones that make every percentage.")
    if any(len(method.runs) == 1 for method in comparison.methods):
        lines.append("Methods with one seed: what another seed would give is in no interval and no test.")
    return [*lines, *(f"Note: {note}." for note in comparison.notes),
            *(f"Excluded: {reason}" for reason in comparison.excluded)]


def verdicts(comparison: Comparison) -> list[str]:
    """The sentences that tell "no difference" from "too few to tell", by the intervals of the differences."""
    possible = {name: (comparison.clustered.get(name) or difference).possible
                for name, difference in comparison.differences.items()}
    left = {name: points for name, points in possible.items() if points is not None}
    none = [f"{name} ({points:.2f})" for name, points in left.items() if points <= NEGLIGIBLE]
    open_ = [f"{name} ({points:.2f})" for name, points in left.items() if points > NEGLIGIBLE]
    kind = "clustered interval" if comparison.clustered else "interval"
    said = {f"No difference above {NEGLIGIBLE:g} point": none, "Too few questions or seeds to tell": open_}
    return [f"{words}: {', '.join(names)}. In brackets, the largest difference that the {kind} does not exclude."
            for words, names in said.items() if names]


def cluster_note(comparison: Comparison, clusters: np.ndarray) -> str:
    """The sentences on the clusters, with the design effects measured on them."""
    sizes = np.bincount(clusters)
    means = [method.outcomes.mean(0) for method in comparison.methods if not method.published]
    effects = [design_effect(mean, clusters) for mean in means]
    of_differences = [design_effect(mean - means[0], clusters) for mean in means[1:]]
    differences = f", {np.mean(of_differences):.2f} for differences" if comparison.clustered else ""
    return ("clustered: questions with the same lecture (without one: topic and skill) are taken as correlated, here "
            f"{len(sizes):,} clusters of {sizes.min()} to {sizes.max()} questions. This multiplies variances by the "
            f"design effect, measured as {np.mean(effects):.2f} for accuracies{differences} (means over the methods).")
