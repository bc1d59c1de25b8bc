"""The report of a study, from the files in its folder alone: what was found, the best trials, the budget, pictures.

The importance of parameters is computed by Optuna, and left out where it is not installed.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, write_text
from util.search.confirm import BASE, VERDICT, read_outcomes, sentence
from util.search.folder import accuracy, gpu_seconds, read_records, read_settings
from util.study.comparison import compare
from util.study.statistics import paired_bootstrap, wilson
from util.study.tables import NONE, markdown_table, points

N_BEST = 10  # rows of the table of trials
MIN_TRIALS = 10  # for the importance of parameters
SHUFFLES = 100  # of the accuracies, for what chance alone gives
MARKS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "unfinished"}


@dataclass(frozen=True)
class Trial:
    """A trial that has a score. curve: (epoch, accuracy in percent) at each rung."""

    name: str
    state: str
    values: dict[str, Any]
    curve: list[tuple[int, float]]
    questions: int
    record: Any

    @property
    def last(self) -> tuple[int, float]:
        return self.curve[-1]


class StudyReport:
    """What is known of a study. Raises UserError where its folder does not hold one with a scored trial."""

    def __init__(self, folder: Path):
        self.folder, self.settings, self.records = folder, read_settings(folder), read_records(folder)
        self.confirmed = read_records(folder, "confirm")
        self.trials = [Trial(name, record["state"], record["values"],
                             [(rung["epoch"], accuracy(rung)) for rung in record["rungs"]],
                             record["rungs"][-1]["questions"], record)
                       for name, record in self.records.items() if record["rungs"]]
        if not self.trials:
            raise UserError(f"{folder} has no scored trial yet: start search.py, and draw it later")
        self.base = self.records[BASE]["values"]

    @property
    def base_trial(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.name == BASE), None)

    @property
    def epochs(self) -> int:
        return self.settings["flags"]["epochs"]

    @cached_property
    def ranked(self) -> list[Trial]:
        """Those that came farthest first, and of these the best."""
        return sorted(self.trials, key=lambda trial: trial.last, reverse=True)

    @cached_property
    def shared_epoch(self) -> int:
        """The last one after which three quarters of the trials were scored: there they can be compared."""
        n_scored = Counter(epoch for trial in self.trials for epoch, _ in trial.curve)
        return max(epoch for epoch, n in n_scored.items() if 4 * n >= 3 * len(self.trials))

    @cached_property
    def comparable(self) -> list[tuple[Trial, float]]:
        """Trials with their accuracy after `shared_epoch`."""
        return [(trial, dict(trial.curve)[self.shared_epoch]) for trial in self.trials
                if self.shared_epoch in dict(trial.curve)]

    def changes(self, values: dict[str, Any]) -> str:
        """What differs from the base, as flags."""
        changed = [f"--{flag} {value:g}" if isinstance(value, float) else f"--{flag} {value}"
                   for flag, value in values.items() if value != self.base.get(flag)]
        return " ".join(changed) or "the base"

    def steps(self, records: dict[str, Any]) -> int:
        return self.settings["steps_per_epoch"] * sum(record["rungs"][-1]["epoch"] for record in records.values()
                                                      if record["rungs"])


# --- Importance ---

def importance(report: StudyReport) -> dict[str, tuple[float, float]]:
    """Each parameter's share in reaching the better half of the trials (PED-ANOVA; Watanabe et al. 2023, arXiv
    2304.10255), largest first, and the share that it stays below in 95 % of shuffles of the accuracies: by chance.

    Empty without Optuna, and with too few trials.
    """
    if len(report.comparable) < MIN_TRIALS:
        return {}
    try:
        import optuna
    except ModuleNotFoundError:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    for trial, _ in report.comparable:
        params, distributions = {}, {}
        for name, stored in trial.record["params"].items():
            params[name] = stored["value"]
            distributions[name] = optuna.distributions.json_to_distribution(stored["distribution"])
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=0.0))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)

    def shares(values) -> dict[str, float]:
        with warnings.catch_warnings():  # of parameters that few trials have
            warnings.simplefilter("ignore")
            return optuna.importance.get_param_importances(study, evaluator=evaluator,
                                                           target=lambda trial: -values[trial.number])

    values, rng = [value for _, value in report.comparable], np.random.default_rng(0)
    shuffled = [shares(rng.permutation(values)) for _ in range(SHUFFLES)]
    return {name: (share, float(np.quantile([other[name] for other in shuffled], 0.95)))
            for name, share in shares(values).items()}


# --- Text ---

def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column left, the last one left if it holds flags, all others right."""
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


def confirmation_table(report: StudyReport, outcomes: dict[str, np.ndarray]) -> str:
    """Of the runs with fresh seeds, on all of the validation split."""
    rows = []
    for name in sorted(outcomes, key=lambda name: -outcomes[name].mean()):
        means, difference = 100 * outcomes[name].mean(1), [NONE, NONE]
        if name != BASE:
            low, high = paired_bootstrap(outcomes[name], outcomes[BASE])
            difference = [points(means.mean() - 100 * outcomes[BASE].mean()),
                          f"{points(100 * low)} to {points(100 * high)}"]
        deviation = f" ± {means.std(ddof=1):.2f}" if len(means) > 1 else ""
        rows.append([name, f"{means.mean():.2f}{deviation}", *difference,
                     f"`{report.changes(report.records[name]['values'])}`"])
    return table(["trial", "accuracy", "vs. base", "95 %", "flags"], rows)


def confirmation(report: StudyReport) -> list[str]:
    """The verdict, and the tables that it rests on."""
    if not (report.folder / VERDICT).is_file():
        return ["No configuration has been confirmed with fresh seeds yet, so there is no winner: the best of many "
                "trials is lucky, and its own accuracy promises too much."]
    verdict: Any = read_json(report.folder / VERDICT)
    folders = {name: report.folder / "confirm" / name for name in report.confirmed}
    outcomes = read_outcomes([(record["configuration"], folders[name]) for name, record in report.confirmed.items()])
    n = next(iter(outcomes.values())).shape[1]
    text = [sentence(verdict), f"Accuracy in % of all {n:,} validation questions, mean over {verdict['seeds']} fresh "
            "seeds ± their standard deviation; intervals by paired bootstrap over questions and seeds:",
            confirmation_table(report, outcomes)]
    tested = [str(folders[name]) for name, record in report.confirmed.items()
              if record["configuration"] in (BASE, verdict["winner"]) and (folders[name] / "scores.json").is_file()]
    if tested:
        base = next(str(folders[name]) for name, record in report.confirmed.items() if record["configuration"] == BASE)
        text += [f"Trial {verdict['winner']} and the base on the test split, which was scored once, after that:",
                 markdown_table(compare(tested, base)).strip()]
    return text


def budget(report: StudyReport) -> list[str]:
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
             trial_table(report), "## Budget", "\n".join(budget(report)), "## Pictures",
             *(f"{PICTURES[name]}:\n\n![{PICTURES[name]}]({name}.png)" for name in PICTURES if name in drawn)]
    if "importance" not in drawn:
        parts.append(f"The importance of the parameters is left out: {why_no_importance(report)}.")
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path, out: Path) -> list[Path]:
    """Writes report.md and the pictures; returns their paths."""
    from util.search.figures import write_figures  # late: matplotlib takes a second
    report = StudyReport(folder)
    drawn = write_figures(report, out)
    write_text(out / "report.md", markdown(report, [path.stem for path in drawn]))
    return [out / "report.md", *drawn]
