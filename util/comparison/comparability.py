"""Which runs can be compared: those that were asked the same questions in the same way. The others come with a reason.
"""

from collections import Counter
from dataclasses import replace

from lavin.runtime.console import counted
from util.comparison.finished_runs import CONDITIONS, Run
from util.fingerprint import both_tell
from util.training.recipe import INPUTS, other_inputs


def same_questions(runs: list[Run], base: Run | None) -> tuple[list[Run], list[str]]:
    """Keeps the runs that were asked the base's questions in the base's way or, without a base, the most frequent way.

    Returns these runs, with answers if any run knows the right options, and the reasons why the others are excluded.
    """
    def asked(run):
        return run.split, run.questions, frozenset(run.counts), frozenset(run.scored_with.items())

    most_common = Counter(map(asked, runs)).most_common(1)[0][0]
    reference = base or next(run for run in runs if asked(run) == most_common)
    right_options = next((run.right_options for run in [reference, *runs]
                          if run.right_options.keys() == reference.questions), {})
    reasons = [why_incomparable(run, reference, right_options) for run in runs]
    return ([run.with_right_options(right_options) for run, reason in zip(runs, reasons, strict=True) if not reason],
            [f"{run.folder}: {reason}" for run, reason in zip(runs, reasons, strict=True) if reason])


def why_incomparable(run: Run, reference: Run, right_options: dict[str, int]) -> str | None:
    """The reason why the run is excluded; None where it can be compared to the reference."""
    if run.split != reference.split:
        return f"of split {run.split}, not {reference.split}: run eval.py with --split {reference.split}"
    if run.questions != reference.questions:
        return (f"its {counted(len(run.questions), 'question')} and the others' {len(reference.questions):,} differ: "
                "evaluate on the same")
    if run.counts.keys() != reference.counts.keys():
        return "its scores have other columns than the others': evaluate on the same data"
    if run.answers and run.right_options != right_options:
        return "its questions have other right answers: evaluate on the same data"
    for name, (words, flag) in CONDITIONS.items():
        is_method = flag and run.flags.get(flag) != reference.flags.get(flag)  # trained so, and named after it
        if both_tell(name, run.scored_with, reference.scored_with) and not is_method:
            value, expected = run.scored_with[name], reference.scored_with[name]
            if value != expected:
                return f"scored with {words} {value}, not {expected}: run eval.py as for the others"
    return None


def with_note_on_inputs(run: Run, reference: Run) -> Run:
    """The run, with a note where it was trained on other data, pictures or models than the reference."""
    names = set(INPUTS)
    if run.flags.get("use_caption") != reference.flags.get("use_caption"):  # trained so, and named after it
        names -= {"data"}
    others = other_inputs(run.trained_on, reference.trained_on, names)
    note = f"was trained on {', '.join(others)} than {reference.folder}"
    return replace(run, notes=[*run.notes, note]) if others else run
