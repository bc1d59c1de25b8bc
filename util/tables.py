"""A comparison as a table: aligned text, Markdown, LaTeX (rounded, with notes), CSV (unrounded, one number a cell)."""

import csv
import io

from util.comparison import Comparison, Method
from util.logging import table
from util.scoring import COLUMNS
from util.statistics import DRAWS

NONE = "–"
LATEX = str.maketrans({"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$",
                       "{": r"\{", "}": r"\}", "^": r"\^{}", "~": r"\~{}", "<": "$<$", ">": "$>$", "±": r"$\pm$",
                       "−": "$-$", "–": "--"})


def text_table(comparison: Comparison) -> str:
    return "\n".join([table(*rounded(comparison)), "", *notes(comparison)])


def markdown_table(comparison: Comparison) -> str:
    header, rows = rounded(comparison)
    ruler = [":--"] + ["--:"] * (len(header) - 1)
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (header, ruler, *rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(comparison))]) + "\n"


def latex_table(comparison: Comparison) -> str:
    """A floating table for the packages booktabs and graphicx; the notes are its caption."""
    header, rows = rounded(comparison)
    head, *body = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in (header, *rows)]
    return "\n".join([r"\begin{table*}", r"\centering", r"\resizebox{\textwidth}{!}{%",
                      rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", head, r"\midrule",
                      *body[:-1], r"\midrule", body[-1], r"\bottomrule", r"\end{tabular}}",
                      rf"\caption{{{' '.join(notes(comparison)).translate(LATEX)}}}", r"\end{table*}", ""])


def csv_table(comparison: Comparison) -> str:
    """Percent and points with four decimals; a cell is empty where there is no such number."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(["method", "published", "seeds", "n", *COLUMNS, "Avg_low", "Avg_high",
           *(f"{column}_sd" for column in COLUMNS), "difference", "difference_low", "difference_high",
           "p_mcnemar", "p_holm"])
    for method in comparison.methods:
        d = comparison.differences.get(method.name)
        numbers = [*map(method.accuracy, COLUMNS), *method.interval("Avg"), *map(method.deviation, COLUMNS),
                   *((d.points, d.low, d.high) if d else (None,) * 3)]
        write([method.name, int(method.published), len(method.runs), method.counts["Avg"],
               *("" if number is None else f"{number:.4f}" for number in numbers),
               *("" if p is None else f"{p:.6g}" for p in ((d.p, d.holm) if d else (None, None)))])
    return out.getvalue()


def rounded(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text, the numbers of questions last; without the columns that say nothing here."""
    header = ["Method", "seeds", *COLUMNS, "n", "Avg, 95 %", "vs. base", "vs. base, 95 %", "p", "p (Holm)"]
    rows = [row(method, comparison) for method in comparison.methods]
    rows.append(["questions", NONE, *(f"{comparison.counts[column]:,}" for column in COLUMNS), *[NONE] * 6])
    kept = [i for i, name in enumerate(header)
            if any(cells[i] != NONE for cells in rows) and not (name == "seeds" and all(c[i] in "1–" for c in rows))]
    return [header[i] for i in kept], [[cells[i] for i in kept] for cells in rows]


def row(method: Method, comparison: Comparison) -> list[str]:
    low, high = method.interval("Avg")
    d = comparison.differences.get(method.name)
    difference = ([points(d.points), f"{points(d.low)} to {points(d.high)}", probability(d.p), probability(d.holm)]
                  if d else [NONE] * 4)
    return [method.name, str(len(method.runs)), *(accuracy(method, column) for column in COLUMNS),
            f"{method.counts['Avg']:,}", f"{low:.2f} to {high:.2f}", *difference]


def accuracy(method: Method, column: str) -> str:
    mean, deviation = method.accuracy(column), method.deviation(column)
    return NONE if mean is None else f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def points(value: float) -> str:
    return f"{round(value, 2) + 0:+.2f}".replace("-", "−")  # + 0: no negative zero


def probability(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def notes(comparison: Comparison) -> list[str]:
    """What the numbers mean, and what they do not cover."""
    published = any(method.published for method in comparison.methods)
    most_seeds = max(len(method.runs) for method in comparison.methods)
    own = [comparison.differences[method.name] for method in comparison.methods
           if not method.published and method.name in comparison.differences]
    found = [f"Accuracy in % of {comparison.counts['Avg']:,} questions. Intervals are Wilson's, from n alone, and not "
             "adjusted for the number of methods."]
    if own and own[0].p is not None:
        found.append("vs. base: on the same questions; exact McNemar test, p adjusted after Holm for "
                     f"{len(own)} method{'s' * (len(own) > 1)}; interval by paired bootstrap, {DRAWS:,} draws.")
    elif own:
        found.append("No run kept generations.jsonl, which has the right answers: differences are unpaired (Newcombe's "
                     "interval) and untested.")
    elif len(comparison.methods) > 1 and not comparison.differences:
        found.append("No run is the base (cosine schedule, --dropout_var 1): for differences, choose one with --base.")
    if most_seeds > 1:
        found.append("±: standard deviation over the seeds; all else is of their mean. The bootstrap draws seeds as "
                     "well as questions, the test is about the questions alone.")
    if published:
        found.append("The published figures come without predictions: their differences are unpaired (Newcombe's "
                     "interval) and untested. Their counts by category are the only ones that make every percentage.")
    if any(len(method.runs) == 1 for method in comparison.methods):
        found.append("Methods with one seed: what another seed would give is in no interval and no test.")
    return found + [f"Left out: {reason}" for reason in comparison.left_out]
