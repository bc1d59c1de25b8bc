"""A comparison as a table: aligned text, Markdown, LaTeX (rounded, with notes), CSV (unrounded, one number a cell).

The text fits the terminal: columns that have no room are in the files alone.
"""

import csv
import io
import math
from collections.abc import Iterable

import numpy as np

from lavin.runtime.console import counted
from util.comparison.comparison import Comparison, Difference, Method
from util.comparison.factorial import Effect, find_effects, find_grid
from util.comparison.methods import BASE_IN_WORDS
from util.comparison.references import CHANCE, Reference
from util.comparison.statistics import LEVEL, design_effect, equal_variances
from util.document import Bullets, Part, Table, to_markdown, to_text

NONE = "–"
DIFFERENCE = ["vs. base", "verdict", "vs. base, 95 %", "p", "p (Holm)", "detectable"]
IN_TERMINAL = ["Avg", "vs. base", "verdict", "vs. base, 95 %", "p (Holm)", "seeds", "detectable", "Avg, 95 %"]  # first
EFFECT_IN_TERMINAL = ["points", "95 %", "p (Holm)", "kind", "detectable"]
EFFECT = ["Effect", "kind", "points", "95 %", "p", "p (Holm)", "detectable"]
EFFECTS_NOTE = ("Effects: a schedule's is its difference to the base's, averaged over the dropouts; a dropout's "
                "likewise; an interaction is what both give together beyond the sum of what each gives alone. Seeds "
                "are blocks, since a seed may suit a schedule with every dropout; those count that all of these "
                "methods have. p (Holm) is adjusted over the effects of a kind.")
NEGLIGIBLE = 1.0  # points: intervals that exclude more than this are said to show no difference above it
BETTER, WORSE, WITHIN, CANNOT_TELL = "better", "worse", f"within {NEGLIGIBLE:g} point", "cannot tell"
LATEX = str.maketrans({"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
                       "{": r"\{", "}": r"\}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$", "±": r"$\pm$",
                       "−": "$-$", "–": "--"})


def table_parts(comparison: Comparison) -> list[Part]:
    """The table, the effects where there are any, and the notes, as parts of a report."""
    effects = find_effects(comparison)
    of_effects: list[Part] = [Table(EFFECT, list(map(effect_cells, effects)), EFFECT_IN_TERMINAL),
                              EFFECTS_NOTE] if effects else []
    return [Table(*rounded_cells(comparison), IN_TERMINAL), *of_effects, Bullets(notes(comparison))]


def text_table(comparison: Comparison, width: int = 10**6) -> str:
    """Tables and notes in lines of at most `width` characters, 80 or more."""
    return to_text(table_parts(comparison), width, "table.md")


def markdown_table(comparison: Comparison) -> str:
    return to_markdown(table_parts(comparison))


def latex_table(comparison: Comparison) -> str:
    """A floating table that needs the packages booktabs and graphicx; the notes are its caption."""
    header, (*rows, counts) = rounded_cells(comparison)
    effects = find_effects(comparison)
    of_effects = [r"\par\medskip", *tabular(EFFECT, list(map(effect_cells, effects)))] if effects else []
    caption = " ".join([*notes(comparison), *[EFFECTS_NOTE] * bool(effects)])
    return "\n".join([r"\begin{table*}", r"\centering", r"\resizebox{\textwidth}{!}{%",
                      "\n".join(tabular(header, rows, [counts])) + "}", *of_effects,
                      rf"\caption{{{caption.translate(LATEX)}}}", r"\end{table*}", ""])


def tabular(header: list[str], *parts: list[list[str]]) -> list[str]:
    """The lines of a table in LaTeX, with a rule before each part of its rows."""
    def line(row: list[str]) -> str:
        return " & ".join(cell.translate(LATEX) for cell in row) + r" \\"
    return [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", line(header),
            *(text for rows in parts for text in (r"\midrule", *map(line, rows))), r"\bottomrule", r"\end{tabular}"]


def csv_table(comparison: Comparison) -> str:
    """The table as CSV: percentages and points have four decimals, and a cell without a value is empty. A row with 0
    seeds is no method: the untuned base, or chance."""
    out = io.StringIO()
    write, columns = csv.writer(out, lineterminator="\n").writerow, list(comparison.counts)
    write(["method", "published", "seeds", "n", *columns, "Avg_low", "Avg_high",
           *(f"{column}_sd" for column in columns), "parse_failures", "difference", "difference_low", "difference_high",
           "p", "p_holm", "difference_detectable"])
    for method in comparison.methods:
        d = comparison.differences.get(method.name)
        write([method.name, int(method.published), len(method.runs), method.counts["Avg"],
               *fixed([*map(method.accuracy, columns), *method.interval("Avg"), *map(method.deviation, columns),
                       method.parse_failures]),
               *fixed((d.points, d.low, d.high) if d else (None,) * 3), *p_values(d),
               *fixed([d.detectable if d else None])])
    for reference in comparison.references:
        write([reference.name, 0, 0, comparison.counts["Avg"],
               *fixed([*(reference.accuracies[column] for column in columns), *(reference.interval or (None, None)),
                       *[None] * len(columns), reference.parse_failures]), *[""] * 6])
    return out.getvalue()


def effects_csv(comparison: Comparison) -> str | None:
    """The effects of schedule and dropout as CSV; None where runs do not cross them."""
    effects = find_effects(comparison)
    if not effects:
        return None
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(["effect", "kind", "points", "low", "high", "p", "p_holm", "detectable"])
    for effect in effects:
        write([effect.name, effect.family, *fixed([effect.points, effect.low, effect.high]), f"{effect.p:.6g}",
               f"{effect.holm:.6g}", *fixed([effect.detectable])])
    return out.getvalue()


def fixed(numbers: Iterable[float | None]) -> list[str]:
    return ["" if number is None or math.isinf(number) else f"{number:.4f}" for number in numbers]


def p_values(d: Difference | None) -> list[str]:
    return ["" if p is None else f"{p:.6g}" for p in ((d.p, d.holm) if d else (None, None))]


def rounded_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The header and the rows, the last of which has the numbers of questions, without columns that say nothing."""
    header = ["Method", "seeds", *comparison.counts, "n", "Avg, 95 %", *DIFFERENCE]
    rows = [method_cells(method, comparison) for method in comparison.methods]
    rows += [reference_cells(reference, comparison) for reference in comparison.references]
    counts = [f"{n:,}" for n in comparison.counts.values()]
    rows.append(["questions", NONE, *counts, *[NONE] * (len(header) - len(counts) - 2)])
    kept = [i for i, name in enumerate(header)
            if any(row[i] != NONE for row in rows) and not (name == "seeds" and all(row[i] in "1–" for row in rows))]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def method_cells(method: Method, comparison: Comparison) -> list[str]:
    low, high = method.interval("Avg")
    return [method.name, str(len(method.runs)), *(accuracy(method, column) for column in comparison.counts),
            f"{method.counts['Avg']:,}", f"{low:.2f} to {high:.2f}",
            *difference_cells(comparison.differences.get(method.name))]


def reference_cells(reference: Reference, comparison: Comparison) -> list[str]:
    low_high = f"{reference.interval[0]:.2f} to {reference.interval[1]:.2f}" if reference.interval else NONE
    accuracies = [NONE if (value := reference.accuracies[column]) is None else f"{value:.2f}"
                  for column in comparison.counts]
    return [reference.name, NONE, *accuracies, f"{comparison.counts['Avg']:,}", low_high, *[NONE] * len(DIFFERENCE)]


def effect_cells(effect: Effect) -> list[str]:
    return [effect.name, effect.family, points(effect.points), f"{points(effect.low)} to {points(effect.high)}",
            p_value(effect.p), p_value(effect.holm), half_width(effect.detectable)]


def difference_cells(d: Difference | None) -> list[str]:
    """The cells in the columns of DIFFERENCE."""
    if d is None:
        return [NONE] * len(DIFFERENCE)
    interval = NONE if d.low is None or d.high is None else f"{points(d.low)} to {points(d.high)}"
    return [points(d.points), verdict(d), interval, p_value(d.p), p_value(d.holm),
            NONE if d.detectable is None else half_width(d.detectable)]


def accuracy(method: Method, column: str) -> str:
    mean, deviation = method.accuracy(column), method.deviation(column)
    return NONE if mean is None else f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def points(value: float) -> str:
    return f"{round(value, 2) + 0:+.2f}".replace("-", "−")  # + 0 turns -0.0 into 0.0


def half_width(value: float) -> str:
    return f"±{value:.2f}" if math.isfinite(value) else NONE


def p_value(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def notes(comparison: Comparison) -> list[str]:
    """The sentences on how the numbers were computed, what they do not cover, and which runs are excluded."""
    own = [comparison.differences[method.name] for method in comparison.own if method.name in comparison.differences]
    lines = [f"Accuracy in % of {counted(comparison.counts['Avg'], 'question')}. Intervals hold at 95 % each, not all "
             "together."]
    if own:
        lines += difference_notes([difference for difference in own if difference.low is not None])
        lines += one_seed_notes(comparison.own)
    elif len(comparison.methods) > 1 and not comparison.differences:
        lines.append(f"No run is the base ({BASE_IN_WORDS}): for differences, choose one with --base.")
    lines += verdicts(comparison)
    lines += reference_notes(comparison)
    if comparison.clusters is not None:
        lines.append(cluster_note(comparison, comparison.clusters))
    if any(len(method.runs) > 1 for method in comparison.methods):
        lines.append("±: standard deviation over the seeds; all else is of their mean. The variance between seeds is "
                     "taken as the same for all methods: an accuracy of a single seed has it from the others.")
        lines += variance_notes(comparison.methods)
    if (grid := find_grid(comparison)) and not grid.has_effects:
        lines.append("Schedules and dropouts are crossed, but these methods do not have two seeds in common, which the "
                     "effects of both need.")
    if any(method.published for method in comparison.methods):
        lines.append("The published figures are of one run each, and come without predictions: their differences are "
                     "of these runs, unpaired (Newcombe's interval) and untested. Another seed may give others, so "
                     "they do not tell whether one method is better than another.")
    return [*lines, *(f"Note: {note}." for note in comparison.notes),
            *(f"Excluded: {reason}" for reason in comparison.excluded)]


def reference_notes(comparison: Comparison) -> list[str]:
    """The sentences on the rows that are no methods."""
    words = [f"{reference.name} ({reference.note})" for reference in comparison.references]
    lines = [f"Shown beside the methods, and not tested: {'; '.join(words)}."] if words else []
    if comparison.own and CHANCE not in [reference.name for reference in comparison.references]:
        lines.append("Chance is not known, since an earlier version scored these runs: eval.py --adapter_path RUN adds "
                     "it, and computes nothing again.")
    return lines


def variance_notes(methods: list[Method]) -> list[str]:
    """The sentence on variances between seeds that are not the same for all methods."""
    p = equal_variances([method.accuracies("Avg") for method in methods])
    if p is None or p >= LEVEL:
        return []
    deviations = [deviation for method in methods if (deviation := method.deviation("Avg")) is not None]
    return [f"But these variances differ by more than chance (± from {min(deviations):.2f} to {max(deviations):.2f}; "
            f"Bartlett's test: p {'' if p < 0.001 else '= '}{p_value(p)}). So intervals are too short, and p is too "
            "small, for the methods with the largest ±; for the others, the reverse. Compare these without them."]


def difference_notes(differences: list[Difference]) -> list[str]:
    """The sentences on the differences of own runs to the base."""
    if not differences:
        return []
    n = len(differences)
    adjusted = f"p (Holm) is p adjusted for {counted(n, 'method')}"
    if differences[0].p is None:
        return ["No run kept generations.jsonl, which has the right answers: differences are unpaired (Newcombe's "
                "interval) and untested."]
    if not differences[0].is_of_methods:
        return ["vs. base: one run against another, on the same questions (Tango's interval, exact McNemar test); "
                f"{adjusted}. Another seed may give other numbers, so they do not tell whether one method is better "
                "than another: that takes two seeds at least, better five."]
    return [f"vs. base: on the same questions; interval and p count questions and seeds as samples; {adjusted}. "
            "detectable: the true difference that about four of five such studies would show by p (Holm) below 0.05 (a "
            "power of 80 %; –: none)."]


def one_seed_notes(methods: list[Method]) -> list[str]:
    """The sentence on methods that have one seed, while others have several."""
    single = [method.name for method in methods if len(method.runs) == 1]
    if not methods[0].has_answers or len(single) in (0, len(methods)):
        return []
    return [f"One seed: {', '.join(single)}. It may be a lucky one, so a difference of such a method, or to such a "
            "base, has no interval, p or verdict: train it with other seeds, two in all at least, better five."]


def verdict(difference: Difference) -> str:
    """A word on whether the method is better than the base; none where single runs were compared."""
    if not difference.is_of_methods or difference.holm is None:
        return NONE
    if difference.holm < LEVEL:
        return BETTER if difference.points > 0 else WORSE
    return WITHIN if difference.largest <= NEGLIGIBLE else CANNOT_TELL


def verdicts(comparison: Comparison) -> list[str]:
    """The sentences that tell methods that differ from the base, those that do not, and those that nobody can tell."""
    differ, negligible, open_ = [], [], []
    for name, difference in comparison.differences.items():
        if verdict(difference) in (BETTER, WORSE):
            differ.append(f"{name} ({points(difference.points)})")
        elif verdict(difference) == WITHIN:
            negligible.append(f"{name} ({difference.largest:.2f})")
        elif verdict(difference) == CANNOT_TELL:
            open_.append(f"{name} ({difference.largest:.2f})")
    largest = "In brackets, the largest difference that the interval contains."
    said = {"Differs from the base": (differ, "In brackets, the difference in points."),
            f"No difference above {NEGLIGIBLE:g} point": (negligible, largest),
            "Too few questions or seeds to tell": (open_, largest)}
    return [f"{words}: {', '.join(names)}. {brackets}" for words, (names, brackets) in said.items() if names]


def cluster_note(comparison: Comparison, clusters: np.ndarray) -> str:
    """The sentences on the clusters, with the design effects measured on them."""
    sizes = np.bincount(clusters)
    means = [method.outcomes.mean(0) for method in comparison.own]
    effects = [design_effect(mean, clusters) for mean in means]
    of_differences = [design_effect(mean - means[0], clusters) for mean in means[1:]]
    of_pairs = f", {np.mean(of_differences):.2f} for differences" if of_differences and comparison.differences else ""
    return ("Questions with the same lecture (without one: topic and skill) are taken as correlated, here "
            f"{counted(len(sizes), 'cluster')} of {sizes.min()} to {counted(int(sizes.max()), 'question')}. This "
            f"multiplies variances by the design effect, measured as {np.mean(effects):.2f} for accuracies{of_pairs} "
            "(means over the methods).")
