"""All runs of a study have the same data, the same frozen models and the same way of scoring: the study's identity.

study.json has the identity of the study. A run tells its own by the files in its folder: its recipe (by train.py) and
its scores (by eval.py). Entries that an earlier version did not write are not compared. A command goes on with the
study in a folder only if its identity and its settings are those of the study (`check_settings`).
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
from util.search.folder import RUN_FOLDERS, RUNGS, VALIDATION, read_settings
from util.search.space import flag_of
from util.training.recipe import TRAIN_FLAGS, make_recipe
from util.training.recipe import differences as recipe_differences
from util.training.settings import EFFECTIVE_BATCH, TrainSettings

Identity = Mapping[str, Mapping[str, Any]]  # it has the entries of each part by their names

# an identity has four parts; these are the file of a run's folder that tells each, and its name in messages
FILES = {"train": RECIPE, "trials": f"{RUNGS}/*/{SCORES}", "val": f"{VALIDATION}/{SCORES}", "test": SCORES}
WORDS = {"train": "training", "trials": "the scores of trials", "val": "the scores on validation",
         "test": "the scores on test"}
# the flags with which eval.py makes the scores of each part
SCORING = {"trials": {"split": "val", "decode": "score"}, "val": {"split": "val", "decode": "score"},
           "test": {"split": "test", "decode": "generate"}}
FIX = "put back what it began with, or search in another folder with --study"

# these entries of scores.json are results, or differ between the runs of a study
RESULT = {*summarize([], ScienceQA(Path(), {}, {}), 0), "checkpoint", "checkpoint_sha256", "adapter", "git_commit"}


# --- The identity of a study ---

def study_identity(settings: TrainSettings, data: Mapping[str, ScienceQA], questions: int) -> dict[str, dict[str, Any]]:
    """Returns the identity of a study that begins. `settings` are those of any of its trials, `data` has the splits by
    name, and `questions` is the number of questions that trials are scored on."""
    parts = {"train": data["train"], "trials": data["val"].sample(questions), "val": data["val"], "test": data["test"]}
    return {part: {**checksums(make_recipe(settings, torch.float32, 1, problems)), **SCORING.get(part, {})}
            for part, problems in parts.items()}


def checksums(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a recipe that are no flags: they are checksums of the data and of the frozen models."""
    return {name: value for name, value in recipe.items() if name not in TRAIN_FLAGS and name != EFFECTIVE_BATCH}


def recorded_identity(study: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the identity that study.json records.

    An earlier version's study.json lacks entries. Each of these gets the value that is most frequent among the runs
    that have the entry; the runs of that version have fewer entries than those that this version adds.
    """
    known = {part: settings.get("identity", {}).get(part, SCORING.get(part, {})) for part in FILES}
    found: dict[str, dict[str, Counter]] = {part: {} for part in FILES}
    for folder in run_folders(study):
        for part, entries in said_by_files(folder, searched_flags(settings)):
            for name, value in entries.items():
                found[part].setdefault(name, Counter())[json.dumps(value)] += 1
    return {part: {**{name: json.loads(counts.most_common(1)[0][0]) for name, counts in found[part].items()},
                   **known[part]} for part in FILES}


# --- The identity of its runs ---

def run_folders(study: Path) -> list[Path]:
    return sorted(path for name in RUN_FOLDERS for path in (study / name).glob("*") if path.is_dir())


def searched_flags(settings: Mapping[str, Any]) -> set[str]:
    return {flag_of(name, parameter) for name, parameter in settings["space"]["parameters"].items()}


def said_by_files(folder: Path, searched: set[str]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the parts of an identity that the files in a run's folder tell, without the searched flags. A broken file
    is passed over, since the commands that need it replace it or name it."""
    parts = []
    for part, pattern in FILES.items():
        for path in sorted(folder.glob(pattern)):
            try:
                entries = checksums(read_json(path)["recipe"]) if part == "train" else conditions(read_scores(path))
            except (UserError, KeyError, AttributeError, TypeError):
                continue
            parts.append((part, {name: value for name, value in entries.items() if name not in searched}))
    return parts


def conditions(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of scores.json that say on which data, and how, a run was scored."""
    columns = scores.get("counts", ())
    return {name: value for name, value in scores.items() if name not in RESULT and name not in columns}


def runs_of_something_else(study: Path, settings: Mapping[str, Any], name: str) -> dict[str, str]:
    """Returns the runs in one of RUN_FOLDERS whose identity is not the study's, with a text on what differs. They
    cannot be compared to the others."""
    identity, searched = recorded_identity(study, settings), searched_flags(settings)
    reasons = {folder.name: [line for part, entries in said_by_files(folder, searched)
                             for line in differences({part: entries}, identity)]
               for folder in run_folders(study) if folder.parent.name == name}
    return {run: "; ".join(dict.fromkeys(lines)) for run, lines in reasons.items() if lines}


# --- Comparing ---

def differences(identity: Identity, other: Identity) -> list[str]:
    """Returns a line for each entry that both identities have, and in which they differ."""
    parts: dict[str, list[str]] = {}
    for part in identity.keys() & other.keys():
        for name, value in identity[part].items():
            if both_tell(name, identity[part], other[part]) and value != other[part][name]:
                parts.setdefault(name.removesuffix("_sha256"), []).append(WORDS[part])
    return [f"other {name} in {' and '.join(sorted(set(words)))}" for name, words in sorted(parts.items())]


def require_same(path: Path, identity: Identity, other: Identity, fix: str = FIX) -> None:
    """Raises WorkerError if the identity of a run, as the file at `path` tells it, is not the study's."""
    lines = differences(identity, other)
    if lines:
        raise WorkerError(f"{path} does not fit its study, since it has {'; '.join(lines)}: {fix}")


# --- The settings of a command ---

def check_settings(folder: Path, settings: dict[str, Any], storage_url: str | None) -> str:
    """Returns the name that the folder's study has in the storage. Raises UserError if the study has another identity
    or other settings than the command; the message names what differs."""
    found = read_settings(folder)
    identity, known = settings.get("identity", {}), recorded_identity(folder, found)
    of_other = differences(identity, known)
    if "identity" not in found and of_other == [f"other data in {WORDS['trials']}"]:
        raise UserError(f"{folder} was begun by an earlier version, which asked its trials other questions of val: "
                        "finish it with that version, or search in another folder with --study")
    if of_other:
        raise UserError(f"{folder} holds a study with {'; '.join(of_other)}: {FIX}")
    # the first worker's precision stays, and another path may lead to the same content
    wanted = {name: value for name, value in settings.items() if name not in ("precision", "identity")}
    compared = names_of(identity) & names_of(known)
    other = differing_settings(*(without_flags(entries, compared) for entries in (
        wanted, {name: found.get(name) for name in wanted})))
    if other:
        raise UserError(f"{folder} is a study of other settings ({'; '.join(other)}): give its own, or name another "
                        "folder with --study")
    if found["in_database"] != (storage_url is not None):
        raise UserError(f"{folder} is a study in " + ("a database: name it with --storage" if found["in_database"] else
                                                      "journal.log: leave --storage out"))
    return found["name"]


def names_of(identity: Identity) -> set[str]:
    return {name for part in identity.values() for name in part}


def without_flags(settings: dict[str, Any], entries: set[str]) -> dict[str, Any]:
    """Returns the settings without the flags whose effect one of these entries of a recipe states."""
    return {**settings, "flags": {name: value for name, value in settings["flags"].items() if
                                  name not in TRAIN_FLAGS or TRAIN_FLAGS[name].stated_as not in entries}}


def differing_settings(settings: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Returns a line for each setting that differs. It begins with the flag."""
    lines = []
    for name in settings.keys() | found.keys():
        value, other = settings.get(name), found.get(name)
        if name == "flags":
            lines += [f"train.py's {line}" for line in recipe_differences(value or {}, other or {})]
        elif value != other:
            lines.append(f"other --{name}" if isinstance(value, dict) else f"--{name} {value}, not {other}")
    return sorted(lines)
