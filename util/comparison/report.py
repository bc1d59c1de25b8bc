"""The page of a comparison (report.html): what was compared, the table with its notes, and the figures."""

from collections.abc import Iterable
from pathlib import Path

from util.comparison.comparison import Comparison, seeds_in_words
from util.comparison.tables import table_parts
from util.document import Bullets, Heading, Part, Picture, to_page
from util.evaluation.scoring import COLUMNS
from util.provenance import short_commit

CAPTIONS = {"overview": "Overview of the figures",
            "accuracy": "Overall accuracy of each method, with 95 % intervals",
            "categories": "Accuracy by category of questions, with 95 % intervals",
            "loss": "Training loss by epoch", "losses_by_step": "Training loss by step, with its running mean",
            "learning_rates": "Learning rate within the epochs", "dropout": "Dropout of each layer",
            "effects": "Effects of schedule and dropout, with 95 % intervals"}


def comparison_page(comparison: Comparison, folder: Path, prefix: str, written: list[Path], command: str) -> str:
    """The page as HTML. folder, prefix: the folder of the figures, and the beginning of their files' names. written:
    the files of this comparison, beside which the folder may have figures of an earlier one. command: the one that
    makes all of this."""
    pictures: list[Part] = [Picture(name, caption) for name, caption in CAPTIONS.items()
                            if folder / f"{prefix}{name}.png" in written]
    return to_page("Comparison of methods", facts(comparison),
                   [Heading("Table"), *table_parts(comparison), Heading("Figures"), *pictures,
                    Heading("How to get this again"), *how_again(comparison, command)], folder, prefix)


def facts(comparison: Comparison) -> dict[str, str]:
    """The facts on what was compared, by their names."""
    methods = comparison.methods
    own = [run for method in comparison.own for run in method.runs]
    runs = own or methods[0].runs
    of_scienceqa = " of ScienceQA" if comparison.counts.keys() == COLUMNS.keys() else ""
    found = {
        "Methods": f"{len(methods)}, {seeds_in_words(methods)} each",
        "Questions": f"{comparison.counts['Avg']:,} of the {runs[0].split} split{of_scienceqa}",
        "Data": distinct(f"{run.flags.get('data_root', '')}{checksum(run.scored_with.get('data'))}" for run in runs),
        "Base model": distinct(f"{run.flags.get('llm_model')}{checksum(run.trained_on.get('base'))}" for run in runs),
        "Epochs": distinct(run.flags["epochs"] for run in runs),
        "Scored with": distinct(f"{name} {value}" for run in runs for name, value in run.scored_with.items()
                                if name in ("decode", "precision")),
        "Commits of the code": distinct(f"`{short_commit(commit)}`" for run in runs for commit in run.commits)}
    return {name: value for name, value in found.items() if value}


def distinct(values: Iterable[object]) -> str:
    """The distinct values in words, in their order."""
    return ", ".join(dict.fromkeys(map(str, values)))


def checksum(value: str | None) -> str:
    return f" (checksum {value[:12]})" if value else ""


def how_again(comparison: Comparison, command: str) -> list[Part]:
    own = [run for method in comparison.own for run in method.runs]
    folders = [Bullets([f"`{run.folder}`" for run in own])] if own else []
    words = ("The table and the figures are made of these folders, each of which has its run's flags (config.json), "
             "checksums of its data and models (recipe.json) and every answer (generations.jsonl). The command: " if own
             else "The published runs are in assets/published.json: ")
    return [f"{words}`{command}`", *folders]
