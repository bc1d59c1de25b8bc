"""The files of a study's folder, which its report is made from; no storage is needed to read them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.files import read_json, write_json
from lavin.runtime.schema import declared, read_validated
from util.training.settings import EFFECTIVE_BATCH

STUDY, RECORD = "study.json", "trial.json"
LOG = "search.log"  # what the commands of a trial say; touched while they run
RUN_FOLDERS = ("trials", "confirm")
FIX = "the search writes it: start the study anew in another folder"


def trial_folder(study: Path, number: int) -> Path:
    return study / "trials" / f"{number:03d}"


@declared
class Rung(TypedDict):
    """The scores after some epochs."""

    epoch: Annotated[int, Field(ge=1)]
    correct: Annotated[int, Field(ge=0)]
    questions: Annotated[int, Field(ge=1)]


@declared
class Param(TypedDict):
    """A parameter as Optuna stores it. distribution: in Optuna's own JSON."""

    value: Any
    distribution: str


@declared
class Record(TypedDict):
    """The content of trial.json.

    values: those of the flags that are searched. params: the same by Optuna's names; none in confirm/. seconds: the
    time of all commands that have ended, on `gpus` GPUs. since: when the one that runs, or was killed, began. message:
    why a trial failed.
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
    """The flags of a study by their names in this version: earlier ones wrote the effective batch with a blank."""
    return {EFFECTIVE_BATCH if name == "effective batch" else name: value for name, value in flags.items()}


@declared
class Settings(TypedDict):
    """The content of study.json, as far as a report needs it.

    flags: those of train.py that change results, and what `Optimization.entries` states of others.
    """

    name: str
    trials: Annotated[int, Field(ge=1)]
    pruner: str
    questions: Annotated[int, Field(ge=1)]
    steps_per_epoch: Annotated[int, Field(ge=1)]
    confirm: Annotated[int, Field(ge=0)]
    seeds: Annotated[int, Field(ge=1)]
    space: dict[str, Any]
    flags: Annotated[dict[str, Any], AfterValidator(with_one_name)]


def begin_record(folder: Path, gpus: int, **what: Any) -> None:
    """Writes trial.json of a run that begins, or goes on; with another number of GPUs it keeps its GPU-seconds."""
    path = folder / RECORD
    known: dict[str, Any] = {"rungs": [], "seconds": 0.0, "gpus": gpus}
    if path.is_file():
        known = with_killed(folder, read_json(path))
    seconds = known["seconds"] * known["gpus"] / gpus
    write_json(path, {**known, **what, "state": "RUNNING", "seconds": seconds, "gpus": gpus})


def change_record(folder: Path, **what: Any) -> None:
    """Changes entries of trial.json."""
    write_json(folder / RECORD, {**read_json(folder / RECORD), **what})


def sign_of_life(log: Path) -> float:
    """Touches the log of a command that runs; returns when, by the clock of the file system."""
    log.touch()
    return log.stat().st_mtime


def add_seconds(folder: Path, seconds: float) -> None:
    """Adds the seconds of a command that has ended."""
    record = read_json(folder / RECORD)
    record.pop("since", None)
    write_json(folder / RECORD, {**record, "seconds": record["seconds"] + seconds})


def with_killed(folder: Path, record: Any) -> Any:
    """The record with the seconds of a command that runs, or was killed with its worker, up to its last sign of
    life."""
    if "since" not in record:
        return record
    seconds = (folder / LOG).stat().st_mtime - record["since"]
    return {**{name: value for name, value in record.items() if name != "since"},
            "seconds": record["seconds"] + max(0.0, seconds)}


def add_rung(folder: Path, epoch: int, scores: dict[str, Any]) -> float:
    """Adds the scores after this number of epochs; returns the accuracy in percent."""
    rung = {"epoch": epoch, "correct": scores["correct"]["Avg"], "questions": scores["counts"]["Avg"]}
    earlier = [other for other in read_json(folder / RECORD)["rungs"] if other["epoch"] < epoch]
    change_record(folder, rungs=[*earlier, rung])
    return accuracy(rung)


def accuracy(rung: Any) -> float:
    """The accuracy in percent."""
    return 100 * rung["correct"] / rung["questions"]


def is_study(path: str | Path) -> bool:
    """Whether this is the folder of a study of search.py."""
    return (Path(path) / STUDY).is_file()


def read_settings(study: Path) -> Any:
    return read_validated(study / STUDY, Settings, "name a study's folder", FIX)


def read_records(study: Path, name: str = "trials") -> dict[str, Any]:
    """The records by their folder, in the order of trials, with the seconds up to now. name: one of RUN_FOLDERS."""
    paths = sorted((study / name).glob(f"*/{RECORD}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return {path.parent.name: with_killed(path.parent, read_validated(path, Record, "name a study's folder", FIX))
            for path in paths}


def all_records(study: Path) -> list[Any]:
    return [record for name in RUN_FOLDERS for record in read_records(study, name).values()]


def gpu_seconds(records: list[Any]) -> float:
    return sum(record["seconds"] * record["gpus"] for record in records)
