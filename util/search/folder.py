"""A study's folder has these files. Its report is made from them alone, without Optuna's storage.

study.json     what the study is: space, flags, pruner, number of trials, precision; it never changes
journal.log    Optuna's journal, unless the study is in a database (storage.py)
trials/NNN/    a run of train.py; trial.json: flags, state, accuracy at each rung, seconds
trials/NNN/rungs/K/  the scores after K epochs
confirm/NAME/  a run with a fresh seed (confirm.py), with a trial.json too
confirm/NAME/val/    its scores on all of the validation split
verdict.json   the winner, and how it compares to the base (confirm.py)
.locks/        a file for each trial, each run and the verdict, which the worker that is at work on it has locked
"""

import time
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.files import PUT_IT_THERE, load_json, write_json
from lavin.runtime.schema import declared, read_validated
from util.data.checksums import State, file_state, is_recent
from util.search.errors import WorkerError
from util.training.settings import EFFECTIVE_BATCH

STUDY, RECORD, VERDICT = "study.json", "trial.json", "verdict.json"
RUN_FOLDERS = TRIALS, CONFIRM = "trials", "confirm"  # of a study: they hold the folders of its runs
RUNGS, VALIDATION = "rungs", "val"  # folders of scores in a run's folder
# the states of a trial, as trial.json has them, in the words that people read
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "unfinished"}
LOG = "search.log"  # it has what a trial's commands say, and is touched while they run
CLOCKS_DIFFER = 600.0  # the clocks of a machine and of its file server differ by so many seconds at most
BASE = "000"  # the first trial, which all others are compared to
FIX = "put back a copy of it, or search in another folder with --study"
RECORD_FIX = "put back a copy of it, or remove it: a trial that goes on writes it again, one that has ended is left out"


def trial_folder(study: Path, number: int) -> Path:
    return study / TRIALS / f"{number:03d}"


def lock_path(study: Path, name: str) -> Path:
    """Returns the path of the file that a worker locks while it is at work on this trial, this run or the verdict."""
    return study / ".locks" / name


@declared
class Rung(TypedDict):
    """The scores after some epochs."""

    epoch: Annotated[int, Field(ge=1)]
    correct: Annotated[int, Field(ge=0)]
    questions: Annotated[int, Field(ge=1)]


@declared
class Param(TypedDict):
    """A parameter as Optuna stores it. `distribution` is a text in Optuna's own JSON."""

    value: Any
    distribution: str


@declared
class Record(TypedDict):
    """The content of trial.json.

    `values` has the searched flags, and `params` the same values as Optuna stores them (runs in confirm/ have none).
    `seconds` is the time of all commands that have ended, on `gpus` GPUs. `since` is when the command began that runs
    now, or was killed. `message` says why a trial failed.
    """

    state: Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
    values: dict[str, Any]
    rungs: list[Rung]
    seconds: Annotated[float, Field(ge=0)]
    gpus: Annotated[int, Field(ge=1)]
    since: NotRequired[float]
    params: NotRequired[dict[str, Param]]
    message: NotRequired[str]


def with_one_name(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags of a study by their names in this version. Earlier versions wrote the effective batch's name
    with a blank."""
    return {EFFECTIVE_BATCH if name == "effective batch" else name: value for name, value in flags.items()}


@declared
class Settings(TypedDict):
    """The content of study.json, as far as a report needs it.

    `identity` says which data, models and scoring all runs have in common (identity.py). `flags` has the flags of
    train.py that change results, and what `Optimization.entries` states of others. Earlier versions wrote neither
    `identity` nor `rungs`.
    """

    name: str
    trials: Annotated[int, Field(ge=1)]
    pruner: str
    questions: Annotated[int, Field(ge=1)]
    rungs: NotRequired[list[Annotated[int, Field(ge=1)]]]
    steps_per_epoch: Annotated[int, Field(ge=1)]
    confirm: Annotated[int, Field(ge=0)]
    seeds: Annotated[int, Field(ge=1)]
    identity: NotRequired[dict[str, dict[str, Any]]]
    space: dict[str, Any]
    flags: Annotated[dict[str, Any], AfterValidator(with_one_name)]


def load_record(folder: Path) -> Any:
    """Returns the content of trial.json in the folder of a run that this worker holds. Raises WorkerError if the file
    is broken."""
    try:
        return load_json(folder / RECORD, PUT_IT_THERE, RECORD_FIX)
    except UserError as error:
        raise WorkerError(str(error)) from error


def begin_record(folder: Path, gpus: int, **what: Any) -> None:
    """Writes trial.json of a run that begins or goes on. A run that goes on with another number of GPUs keeps its
    GPU-seconds."""
    path = folder / RECORD
    known: dict[str, Any] = {"rungs": [], "seconds": 0.0, "gpus": gpus}
    if path.is_file():
        known = with_killed(folder, load_record(folder))
    seconds = known["seconds"] * known["gpus"] / gpus
    write_json(path, {**known, **what, "state": "RUNNING", "seconds": seconds, "gpus": gpus})


def change_record(folder: Path, **what: Any) -> None:
    """Changes entries of trial.json."""
    write_json(folder / RECORD, {**load_record(folder), **what})


def sign_of_life(log: Path) -> float:
    """Touches the log of a command that runs, and returns the time of this by the file system's clock."""
    log.touch()
    return log.stat().st_mtime


def add_seconds(folder: Path, seconds: float) -> None:
    """Adds the seconds of a command that has ended to trial.json."""
    record = load_record(folder)
    record.pop("since", None)
    write_json(folder / RECORD, {**record, "seconds": record["seconds"] + seconds})


def with_killed(folder: Path, record: Any) -> Any:
    """Returns the record with the seconds, up to the last sign of life, of a command that runs or was killed with its
    worker."""
    return {**{name: value for name, value in record.items() if name != "since"},
            "seconds": record["seconds"] + seconds_of_unended(folder, record)}


def seconds_of_unended(folder: Path, record: Any) -> float:
    """Returns the seconds of the command that runs or was killed. They are 0 if there is none, if its log is lost, or
    if the log's date lies in the future: then a clock was wrong, and nobody knows how long the command ran."""
    log = folder / LOG
    if "since" not in record or not log.is_file():
        return 0.0
    last = log.stat().st_mtime
    return max(0.0, last - record["since"]) if last <= time.time() + CLOCKS_DIFFER else 0.0


def add_rung(folder: Path, epoch: int, scores: dict[str, Any]) -> float:
    """Adds the scores after so many epochs to trial.json, and returns the accuracy in percent."""
    rung = {"epoch": epoch, "correct": scores["correct"]["Avg"], "questions": scores["counts"]["Avg"]}
    earlier = [other for other in load_record(folder)["rungs"] if other["epoch"] < epoch]
    change_record(folder, rungs=[*earlier, rung])
    return accuracy(rung)


def accuracy(rung: Any) -> float:
    """Returns the accuracy of a rung in percent."""
    return 100 * rung["correct"] / rung["questions"]


def is_study(path: str | Path) -> bool:
    """Returns whether this is the folder of a study of search.py."""
    return (Path(path) / STUDY).is_file()


def read_settings(study: Path) -> Any:
    return read_validated(study / STUDY, Settings, "name a study's folder", FIX)


def read_records(study: Path, name: str = TRIALS) -> dict[str, Any]:
    """Returns the records of all runs in one of RUN_FOLDERS by the runs' names, in the order of trials, with their
    seconds up to now."""
    paths = sorted((study / name).glob(f"*/{RECORD}"), key=lambda path: (len(path.parent.name), path.parent.name))
    records = {path: read_record(path) for path in paths}
    return {path.parent.name: with_killed(path.parent, record) for path, record in records.items()}


def read_record(path: Path) -> Any:
    """Returns the content of a trial.json, and reads the file only if it has changed: each waiting worker asks for all
    of these files every two seconds, and the study may lie on a network's file system."""
    state = file_state(path)
    return read_record_once(path, state) if state and not is_recent(state) else validated_record(path)


@lru_cache(4096)
def read_record_once(path: Path, state: State) -> Any:
    return validated_record(path)


def validated_record(path: Path) -> Any:
    return read_validated(path, Record, "name a study's folder", RECORD_FIX)


def base_values(study: Path, records: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of the base. Raises UserError if its record was lost."""
    if BASE not in records:
        raise UserError(f"{trial_folder(study, 0) / RECORD} is missing, and all trials are compared to this one: {FIX}")
    return records[BASE]["values"]


def all_records(study: Path) -> list[Any]:
    return [record for name in RUN_FOLDERS for record in read_records(study, name).values()]


def longest_unended(study: Path) -> tuple[Path, float]:
    """Returns the run whose running or killed command has taken the most GPU-seconds, and their number."""
    folders = [path.parent for name in RUN_FOLDERS for path in (study / name).glob(f"*/{RECORD}")]
    seconds = {folder: seconds_of_unended(folder, record) * record["gpus"]
               for folder in folders for record in [load_record(folder)]}
    return max(seconds.items(), key=lambda item: item[1], default=(study, 0.0))


def gpu_seconds(records: list[Any]) -> float:
    return sum(record["seconds"] * record["gpus"] for record in records)
