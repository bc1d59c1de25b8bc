"""A study is of one thing: the same data, the same frozen models and the same way of scoring in all of its runs.

What a run is of is said by the files in its folder: its recipe (train.py) and its scores (eval.py). study.json says it
of the study. Entries that an earlier version did not write are not compared.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from util.data.datasets import ScienceQA
from util.evaluation.results import read_scores
from util.evaluation.scienceqa import summarize
from util.fingerprint import both_tell
from util.runs import RECIPE, SCORES
from util.search.errors import WorkerError
from util.search.folder import RUN_FOLDERS
from util.training.recipe import TRAIN_FLAGS, make_recipe
from util.training.settings import EFFECTIVE_BATCH, TrainSettings

Identity = Mapping[str, Mapping[str, Any]]  # the entries of each part

# the parts of an identity: the file of a run's folder that says it, and the words of messages
FILES = {"train": RECIPE, "trials": f"rungs/*/{SCORES}", "val": f"val/{SCORES}", "test": SCORES}
WORDS = {"train": "training", "trials": "the scores of trials", "val": "the scores on validation",
         "test": "the scores on test"}
# how eval.py is asked in each part
SCORING = {"trials": {"split": "val", "decode": "score"}, "val": {"split": "val", "decode": "score"},
           "test": {"split": "test", "decode": "generate"}}
FIX = "put back what it began with, or search in another folder with --study"

# entries of scores.json that are the result, or that each run has its own of
RESULT = {*summarize([], ScienceQA(Path(), {}, {}), 0), "checkpoint", "checkpoint_sha256", "adapter"}


# --- What a study is of ---

def study_identity(settings: TrainSettings, data: Mapping[str, ScienceQA], questions: int) -> dict[str, dict[str, Any]]:
    """The identity of a study that begins. settings: those of any of its trials. data: by split. questions: the number
    of those that trials are scored on."""
    parts = {"train": data["train"], "trials": data["val"].sample(questions), "val": data["val"], "test": data["test"]}
    return {part: {**checksums(make_recipe(settings, torch.float32, 1, problems)), **SCORING.get(part, {})}
            for part, problems in parts.items()}


def checksums(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a recipe that are no flags: those of the data and of the frozen models."""
    return {name: value for name, value in recipe.items() if name not in TRAIN_FLAGS and name != EFFECTIVE_BATCH}


def recorded_identity(study: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The identity of a study by study.json or, where an earlier version wrote that, by most of its runs: each entry by
    those that tell it, since runs that it made tell less than those that this version adds."""
    known = {part: settings.get("identity", {}).get(part, SCORING.get(part, {})) for part in FILES}
    found: dict[str, dict[str, Counter]] = {part: {} for part in FILES}
    for folder in run_folders(study):
        for part, entries in said_by_files(folder, searched_flags(settings)):
            for name, value in entries.items():
                found[part].setdefault(name, Counter())[json.dumps(value)] += 1
    return {part: {**{name: json.loads(counts.most_common(1)[0][0]) for name, counts in found[part].items()},
                   **known[part]} for part in FILES}


# --- What its runs are of ---

def run_folders(study: Path) -> list[Path]:
    return sorted(path for name in RUN_FOLDERS for path in (study / name).glob("*") if path.is_dir())


def searched_flags(settings: Mapping[str, Any]) -> set[str]:
    return {parameter.get("flag", name) for name, parameter in settings["space"]["parameters"].items()}


def said_by_files(folder: Path, searched: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """The parts of an identity that the files in a run's folder tell. A file that is broken tells nothing: the commands
    that need it replace it, or name it."""
    parts = []
    for part, pattern in FILES.items():
        for path in sorted(folder.glob(pattern)):
            try:
                entries = checksums(read_json(path)["recipe"]) if part == "train" else conditions(read_scores(path))
            except (UserError, KeyError, AttributeError):
                continue
            parts.append((part, {name: value for name, value in entries.items() if name not in searched}))
    return parts


def conditions(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of scores.json that say on what, and how, a run was scored."""
    return {name: value for name, value in scores.items() if name not in RESULT}


def runs_of_something_else(study: Path, settings: Mapping[str, Any], name: str) -> dict[str, str]:
    """The runs in one of RUN_FOLDERS that cannot be compared to the study's others, with what differs."""
    identity, searched = recorded_identity(study, settings), searched_flags(settings)
    reasons = {folder.name: [line for part, entries in said_by_files(folder, searched)
                             for line in differences({part: entries}, identity)]
               for folder in run_folders(study) if folder.parent.name == name}
    return {run: "; ".join(dict.fromkeys(lines)) for run, lines in reasons.items() if lines}


# --- Comparing ---

def differences(identity: Identity, other: Identity) -> list[str]:
    """A line for each entry that both tell, and in which they differ."""
    parts: dict[str, list[str]] = {}
    for part in identity.keys() & other.keys():
        for name, value in identity[part].items():
            if both_tell(name, identity[part], other[part]) and value != other[part][name]:
                parts.setdefault(name.removesuffix("_sha256"), []).append(WORDS[part])
    return [f"other {name} in {' and '.join(sorted(set(words)))}" for name, words in sorted(parts.items())]


def require_same(path: Path, identity: Identity, other: Identity, fix: str = FIX) -> None:
    """Raises WorkerError where a file of a run is of something else than the study."""
    lines = differences(identity, other)
    if lines:
        raise WorkerError(f"{path} is of something else than its study ({'; '.join(lines)}): {fix}")
