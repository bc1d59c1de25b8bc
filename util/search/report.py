"""The report of a study, from the files in its folder alone: what was found, the best trials, the budget, pictures.

The importance of parameters is missing where Optuna is not installed.
"""

from pathlib import Path
from typing import Any

from lavin.runtime.files import write_text
from util.comparison.comparison import compare
from util.comparison.statistics import wilson
from util.comparison.tables import NONE, markdown_table, points
from util.search.confirm import (
    VERDICT,
    Confirmation,
    is_current,
    questions_of_trials,
    read_confirmation,
    read_verdict,
    retested,
    sentence,
)
from util.search.figures import write_figures
from util.search.folder import BASE, gpu_seconds
from util.search.identity import FILES
from util.search.summary import MIN_TRIALS, StudyReport

N_BEST = 10  # rows of the table of trials
MARKS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "unfinished"}


# --- Text ---

def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown: columns are aligned right, but for the first one, and the last one if it holds flags."""
    alignment = [":--", *["--:"] * (len(header) - 2), ":--" if header[-1] == "flags" else "--:"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, alignment, *rows))


def trial_table(report: StudyReport) -> str:
    rows = []
    for trial in report.ranked[:N_BEST]:
        epoch, percent = trial.last
        low, high = (100 * bound for bound in wilson(percent * trial.questions / 100, trial.questions))
        rows.append([trial.name, MARKS[trial.state], str(epoch), f"{percent:.2f}", f"{low:.2f} to {high:.2f}",
                     f"`{report.changes(trial.values)}`"])
    return table(["trial", "state", "epochs", "accuracy", "95 %", "flags"], rows)


def confirmation_table(report: StudyReport, found: Confirmation) -> str:
    """The table of the runs with fresh seeds, scored on all of the validation split."""
    rows, values = [], {record["configuration"]: record["values"] for record in report.confirmed.values()}
    for name, outcomes in sorted(found.outcomes.items(), key=lambda item: -item[1].mean()):
        means, difference = 100 * outcomes.mean(1), [NONE, NONE]
        if name != BASE:
            low, high = (points(100 * end) for end in found.interval(name))
            difference = [points(means.mean() - 100 * found.base.mean()), f"{low} to {high}"]
        deviation = f" ± {means.std(ddof=1):.2f}" if len(means) > 1 else ""
        rows.append([name, f"{means.mean():.2f}{deviation}", *difference,
                     f"`{report.changes(values[name])}`"])
    return table(["trial", "accuracy", "vs. base", "95 %", "flags"], rows)


def confirmation(report: StudyReport) -> list[str]:
    """The paragraphs on the verdict, with the tables that it rests on."""
    if not (report.folder / VERDICT).is_file():
        return ["No configuration has been confirmed with fresh seeds yet, so there is no winner: the best of many "
                "trials is lucky, and its own accuracy promises too much."]
    verdict, left_out_runs = read_verdict(report.folder), report.left_out_of_confirmed
    runs = {name: record for name, record in report.confirmed.items() if name not in left_out_runs}
    text = left_out("Runs", left_out_runs, "are not compared to the others")
    if not {BASE, verdict["winner"]} <= {record["configuration"] for record in runs.values()}:
        return [sentence(verdict), *text] if is_current(verdict) else text
    found = read_confirmation([(record["configuration"], report.folder / "confirm" / name)
                               for name, record in runs.items()], questions_of_trials(report.folder))
    verdict = retested(verdict, found)
    kind = "validation questions that trials were not scored on" if found.fresh else "validation questions"
    return [sentence(verdict), *text, f"Accuracy in % of the {found.base.shape[1]:,} {kind}, mean over "
            f"{verdict['seeds']} fresh seeds ± their standard deviation; the intervals count questions and seeds as "
            "samples, and hold together:", confirmation_table(report, found),
            *on_test(report.folder, verdict["winner"], runs)]


def on_test(study: Path, winner: str, runs: dict[str, Any]) -> list[str]:
    """The paragraphs on the test split, of the winner's and the base's runs; none where the base was not scored."""
    scored = {name: str(study / "confirm" / name) for name, record in runs.items()
              if record["configuration"] in (BASE, winner) and (study / "confirm" / name / FILES["test"]).is_file()}
    base = next((folder for name, folder in scored.items() if runs[name]["configuration"] == BASE), None)
    if base is None:
        return []
    return [f"Trial {winner} and the base on the test split, which was scored once, after that:",
            markdown_table(compare(list(scored.values()), base)).strip()]


def left_out(what: str, reasons: dict[str, str], and_so: str) -> list[str]:
    """The paragraph on runs that are of something else than the study."""
    names = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return [f"{what} that are of something else than the study {and_so} ({names})."] if reasons else []


def budget(report: StudyReport) -> list[str]:
    """The lines on what the study has cost so far."""
    states = [record["state"] for record in report.records.values()]
    counts = ", ".join(f"{states.count(state)} {word}" for state, word in MARKS.items() if state in states)
    steps, confirmed = report.steps(report.records), report.steps(report.confirmed)
    unpruned = len(states) * report.epochs * report.settings["steps_per_epoch"]
    hours = [gpu_seconds(list(records.values())) / 3600 for records in (report.records, report.confirmed)]
    lines = [f"- {len(states)} of {report.settings['trials']} trials: {counts}.",
             f"- {steps:,} steps, {100 * steps / unpruned:.0f} % of those without pruning; {hours[0]:.2f} GPU-hours."]
    if report.confirmed:
        lines.append(f"- {len(report.confirmed)} runs with fresh seeds: {confirmed:,} steps, {hours[1]:.2f} GPU-hours.")
    return lines + [f"- Trial {name} failed: {record.get('message', 'without a message')}"
                    for name, record in report.records.items() if record["state"] == "FAIL"]


def why_no_importance(report: StudyReport) -> str:
    few = len(report.comparable) < MIN_TRIALS
    return f"it takes at least {MIN_TRIALS} trials" if few else "pip install -r requirements/search.txt"


PICTURES = {"history": "Every trial's accuracy at its last score, and the best finished one so far",
            "learning_curves": "Accuracy within the schedule; pruned trials end early",
            "rates": "Base learning rate against accuracy",
            "parameters": "Each parameter against accuracy",
            "importance": "Importance of the parameters, their shares in reaching the better half of the trials; one "
                          "that does not pass its mark may be chance"}


def markdown(report: StudyReport, drawn: list[str]) -> str:
    questions = report.trials[0].questions
    parts = [f"# Search {report.folder.resolve().name}", *confirmation(report), "## Trials",
             f"Accuracy in % of the same {questions:,} validation questions for all trials, one seed each (Wilson's "
             "intervals, from the questions alone). The best of many is lucky: the runs with fresh seeds count.",
             trial_table(report), *left_out("Trials", report.left_out, "are not ranked with the others"),
             "## Budget", "\n".join(budget(report)), "## Pictures",
             *(f"{PICTURES[name]}:\n\n![{PICTURES[name]}]({name}.png)" for name in PICTURES if name in drawn)]
    if "importance" not in drawn:
        parts.append(f"The importance of the parameters is left out: {why_no_importance(report)}.")
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path, out: Path) -> list[Path]:
    """Writes report.md and the pictures; returns their paths."""
    report = StudyReport(folder)
    drawn = write_figures(report, out)
    write_text(out / "report.md", markdown(report, [path.stem for path in drawn]))
    return [out / "report.md", *drawn]
