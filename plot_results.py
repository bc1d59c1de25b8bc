"""Compares runs: `python plot_results.py RUN [RUN ...]`; without an argument, the published eight methods.

Writes figures (util/comparison/figures.py), a table in Markdown, CSV and LaTeX (util/comparison/tables.py), and a page
with all of it (util/comparison/report.py). With --plan, it prints how many seeds and questions a difference needs
(util/comparison/planning.py). Of a study of search.py, it writes the report (util/search/report.py).
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import shlex
from pathlib import Path

from lavin.runtime.console import text_width
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import write_text
from lavin.runtime.flags import Flags
from util.comparison.comparison import Comparison, compare, published, with_published
from util.comparison.figures import write_figures
from util.comparison.planning import plan
from util.comparison.report import comparison_page
from util.comparison.settings import get_args_parser
from util.comparison.tables import csv_table, effects_csv, latex_table, markdown_table, text_table
from util.search.folder import is_study
from util.search.report import report_text, write_report
from util.trackers import require_trackers, show_figures

TABLES = {"table.md": markdown_table, "table.csv": csv_table, "table.tex": latex_table, "effects.csv": effects_csv}


def write_comparison(comparison: Comparison, folder: Path, command: str) -> list[Path]:
    prefix = "published_" if all(method.published for method in comparison.methods) else ""
    written = write_figures(comparison, folder, prefix)
    for name, render in TABLES.items():
        text = render(comparison)
        if text:  # effects are there only where runs cross schedule and dropout
            written.append(folder / f"{prefix}{name}")
            write_text(written[-1], text)
    page = comparison_page(comparison, folder, prefix, written, command)
    written.append(folder / f"{prefix}report.html")
    write_text(written[-1], page)
    return written


def command_of(args: Flags) -> str:
    """The command line that makes the same again."""
    base = ["--base", args.base] if args.base else []
    return shlex.join(["python", "plot_results.py", *args.runs, *base, *["--published"] * args.published, "--out",
                       args.out])


def make_comparison(args: Flags) -> Comparison:
    if args.base and not args.runs:
        raise UserError("--base is one of the runs to compare: name these too")
    if args.plan and args.published:
        raise UserError("--plan goes by the runs, without runs by the published ones: leave --published out")
    comparison = compare(args.runs, args.base) if args.runs else published()
    return with_published(comparison) if args.runs and args.published else comparison


def study_of(args: Flags) -> Path | None:
    """The folder of search.py that is named, if it is one."""
    studies = [run for run in args.runs if is_study(run)]
    if studies and (len(args.runs) > 1 or args.base or args.published or args.plan):
        raise UserError(f"{studies[0]} is a study of search.py: name it alone")
    return Path(studies[0]) if studies else None


def main(args: Flags) -> None:
    require_trackers(args.report_to)
    study, width = study_of(args), text_width()
    if args.plan:
        print(plan(make_comparison(args), args.plan))
        return
    try:
        if study:
            written = write_report(study, Path(args.out))
            text = report_text(study, width)
        else:
            comparison = make_comparison(args)
            written = write_comparison(comparison, Path(args.out), command_of(args))
            text = text_table(comparison, width)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot write {error.filename} ({error.strerror}): "
                        "name another folder") from error
    print(text, *written, sep="\n")
    show_figures(args.report_to, Path(args.out), [path for path in written if path.suffix == ".png"])


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
