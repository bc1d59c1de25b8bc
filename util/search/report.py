"""The report of a study tells what was found, the best trials and the budget, and shows the figures.

It is made from the files in the study's folder alone, written as Markdown and as a page, and printed in a terminal. It
lacks the importance of parameters if Optuna is not installed.
"""

import shlex
from pathlib import Path
from typing import Any

from lavin.runtime.console import counted
from lavin.runtime.files import write_text
from util.comparison.comparison import compare
from util.comparison.tables import NONE, points, table_parts
from util.document import Bullets, Heading, Part, Picture, Table, to_markdown, to_page, to_text
from util.provenance import short_commit
from util.search.confirm import (
    Confirmation,
    is_current,
    questions_of_trials,
    read_confirmation,
    read_verdict,
    retested,
    sentence,
)
from util.search.figures import write_figures
from util.search.folder import BASE, CONFIRM, STATES, gpu_seconds
from util.search.identity import FILES
from util.search.progress import unit_of_hours
from util.search.summary import MIN_TRIALS, StudyReport

N_BEST = 10  # the table of trials has so many rows


# --- Parts ---

def trial_table(report: StudyReport) -> Table:
    """Returns the table of the best trials."""
    rows = []
    for trial in report.ranked[:N_BEST]:
        epoch, percent = trial.last
        low, high = trial.interval(percent)
        rows.append([trial.name, STATES[trial.state], str(epoch), f"{percent:.2f}", f"{low:.2f} to {high:.2f}",
                     f"`{report.changes(trial.values)}`"])
    return Table(["trial", "state", "epochs", "accuracy", "95 %", "flags"], rows,
                 ["trial", "accuracy", "95 %", "epochs", "state"])


def confirmation_table(report: StudyReport, found: Confirmation) -> Table:
    """Returns the table of the runs with fresh seeds, with the outcomes in `found`."""
    rows, values = [], {record["configuration"]: record["values"] for record in report.confirmed.values()}
    for name, outcomes in sorted(found.outcomes.items(), key=lambda item: -item[1].mean()):
        means, difference = 100 * outcomes.mean(1), [NONE, NONE]
        if name != BASE:
            low, high = (points(100 * end) for end in found.interval(name))
            difference = [points(means.mean() - 100 * found.base.mean()), f"{low} to {high}"]
        deviation = f" ± {means.std(ddof=1):.2f}" if len(means) > 1 else ""
        rows.append([name, f"{means.mean():.2f}{deviation}", *difference,
                     f"`{report.changes(values[name])}`"])
    return Table(["trial", "accuracy", "vs. base", "95 %", "flags"], rows,
                 ["trial", "accuracy", "vs. base", "95 %"])


def confirmation(report: StudyReport) -> list[Part]:
    """Returns the paragraphs on the verdict, with the tables that it rests on."""
    verdict, left_out_runs = read_verdict(report.folder), report.left_out_of_confirmed
    if verdict is None:
        return ["No configuration has been confirmed with fresh seeds yet, so there is no winner: the best of many "
                "trials is lucky, and its own accuracy promises too much."]
    runs = {name: record for name, record in report.confirmed.items() if name not in left_out_runs}
    text: list[Part] = left_out("Runs", left_out_runs, "are not compared to the others")
    if not {BASE, verdict["winner"]} <= {record["configuration"] for record in runs.values()}:
        return [sentence(verdict), *text] if is_current(verdict) else text
    found = read_confirmation([(record["configuration"], report.folder / CONFIRM / name)
                               for name, record in runs.items()], questions_of_trials(report.folder))
    verdict = retested(verdict, found)
    kind = "validation questions that trials were not scored on" if found.fresh else "validation questions"
    return [sentence(verdict), *text, f"Accuracy in % of the {found.base.shape[1]:,} {kind}, mean over "
            f"{counted(verdict['seeds'], 'fresh seed')} ± their standard deviation; the intervals count questions and "
            "seeds as samples, and hold together:", confirmation_table(report, found),
            *on_test(report.folder, verdict["winner"], runs)]


def on_test(study: Path, winner: str, runs: dict[str, Any]) -> list[Part]:
    """Returns the paragraphs on the winner's and the base's scores on the test split. There are none if the base was
    not scored on it."""
    scored = {name: str(study / CONFIRM / name) for name, record in runs.items()
              if record["configuration"] in (BASE, winner) and (study / CONFIRM / name / FILES["test"]).is_file()}
    base = next((folder for name, folder in scored.items() if runs[name]["configuration"] == BASE), None)
    if base is None:
        return []
    return [f"Trial {winner} and the base on the test split, which was scored once, after that:",
            *table_parts(compare(list(scored.values()), base))]


def left_out(what: str, reasons: dict[str, str], and_so: str) -> list[Part]:
    """Returns the paragraph on runs that have another identity than the study (identity.py); there may be none.

    `what` names the runs, `reasons` says of each what differs, and `and_so` says how the report treats them.
    """
    names = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return [f"{what} with other data, models or scoring than the study's {and_so} ({names})."] if reasons else []


def budget(report: StudyReport) -> list[str]:
    """Returns the sentences on what the study has cost so far."""
    states = [record["state"] for record in report.records.values()]
    counts = ", ".join(f"{states.count(state)} {word}" for state, word in STATES.items() if state in states)
    steps, confirmed = report.steps(report.records), report.steps(report.confirmed)
    unpruned = len(states) * report.epochs * report.settings["steps_per_epoch"]
    hours = [f"{gpu_seconds(list(records.values())) / 3600:.2f} {unit_of_hours(report.on_cpu)}"
             for records in (report.records, report.confirmed)]
    lines = [f"{len(states)} of {counted(report.settings['trials'], 'trial')}: {counts}.",
             f"{counted(steps, 'step')}, {100 * steps / unpruned:.0f} % of those without pruning; {hours[0]}."]
    if report.confirmed:
        lines.append(f"{counted(len(report.confirmed), 'run')} with fresh seeds: {counted(confirmed, 'step')}, "
                     f"{hours[1]}.")
    return lines + [f"Trial {name} failed: {record.get('message', 'without a message')}"
                    for name, record in report.records.items() if record["state"] == "FAIL"]


def why_no_importance(report: StudyReport) -> str:
    few = len(report.comparable) < MIN_TRIALS
    return f"it takes at least {counted(MIN_TRIALS, 'trial')}" if few else "pip install -r requirements/search.txt"


PED_ANOVA = ("PED-ANOVA, which estimates the importance, compares how a parameter's values are distributed among the "
             "better half of the trials and among all of them: the more the two differ, the larger is its share.")
PICTURES = {"history": "Every trial's accuracy at its last score with its 95 % interval, and the best finished one so "
                       "far",
            "learning_curves": "Accuracy within the schedule, with 95 % intervals of the base and the best; pruned "
                               "trials end early",
            "rates": "Base learning rate against accuracy, with 95 % intervals",
            "parameters": "Each parameter against accuracy, with 95 % intervals",
            "importance": "Importance of the parameters, their shares in reaching the better half of the trials; one "
                          "that does not pass its mark may be chance"}


def findings(report: StudyReport) -> list[Part]:
    """Returns the report without its pictures."""
    return [*confirmation(report), Heading("Trials"),
            f"Accuracy in % of the same {counted(report.trials[0].questions, 'validation question')} for all trials, "
            "one seed each (Wilson's intervals, from the questions alone). The best of many is lucky: the runs with "
            "fresh seeds count.",
            trial_table(report), *left_out("Trials", report.left_out, "are not ranked with the others"),
            Heading("Budget"), Bullets(budget(report))]


def pictures(report: StudyReport, drawn: list[str]) -> list[Part]:
    """Returns the part with the pictures of these names, and with the reasons why others are missing."""
    found: list[Part] = [Heading("Pictures"), *(Picture(name, PICTURES[name]) for name in PICTURES if name in drawn)]
    if report.flags_with_one_value:
        found.append("All trials that can be compared have the same value of "
                     f"{', '.join(f'--{flag}' for flag in report.flags_with_one_value)}: there is nothing to draw.")
    return [*found, PED_ANOVA if "importance" in drawn else
            f"The importance of the parameters is left out: {why_no_importance(report)}."]


def title(report: StudyReport) -> str:
    return f"Results of the study {report.folder.resolve().name}"


# --- Forms ---

def markdown(report: StudyReport, drawn: list[str]) -> str:
    return f"# {title(report)}\n\n{to_markdown([*findings(report), *pictures(report, drawn)])}"


def report_text(folder: Path, width: int) -> str:
    """Returns the report without its pictures, in lines of at most `width` characters."""
    report = StudyReport(folder)
    return f"{title(report)}\n\n{to_text(findings(report), width, 'report.md')}\n"


def facts(report: StudyReport) -> dict[str, str]:
    """Returns the facts on what was searched, by their names."""
    settings, config = report.settings, report.base_config
    identity = settings.get("identity", {})
    data = identity.get("trials", {}).get("data")
    found = {
        "Trials": f"{len(report.records)} of {settings['trials']}, of at most {counted(report.epochs, 'epoch')}, "
                  f"pruned by {settings['pruner']}",
        "Searched": ", ".join(f"--{flag}" for flag in report.base),
        "Questions": f"{report.trials[0].questions:,} of validation for trials",
        "Fresh seeds": f"{settings['seeds']} for each of {counted(1 + settings['confirm'], 'configuration')}, one of "
                       "which is the base" if settings["confirm"] else "none",
        "Data": f"checksum {data[:12]}" if data else "",
        "Base model": str(config.get("flags", {}).get("llm_model", "")),
        "Commits of the code": ", ".join(f"`{short_commit(commit)}`" for commit in report.commits)}
    return {name: value for name, value in found.items() if value}


def write_report(folder: Path, out: Path) -> list[Path]:
    """Writes report.md, report.html and the pictures, and returns their paths."""
    report = StudyReport(folder)
    files = write_figures(report, out)
    drawn = [path.stem for path in files]
    write_text(out / "report.md", markdown(report, drawn))
    command = shlex.join(["python", "plot_results.py", str(folder), "--out", str(out)])
    again: list[Part] = [Heading("How to get this again"),
                         f"The study's folder has the flags and the scores of every trial: `{command}`"]
    write_text(out / "report.html", to_page(title(report), facts(report), [
        *findings(report), *pictures(report, drawn), *again], out))
    return [out / "report.md", out / "report.html", *files]
