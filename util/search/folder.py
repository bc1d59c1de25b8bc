"""The files of a study's folder, which its report is made from; no storage is needed to read them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.files import read_json, write_json
from lavin.runtime.schema import declared, read_validated

STUDY, RECORD = "study.json", "trial.json"
PARTS = ("trials", "confirm")  # folders of runs
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
    """As Optuna stores it. distribution: in its own JSON."""

    value: Any
    distribution: str


@declared
class Record(TypedDict):
    """trial.json. values: of the flags that are searched. params: the same by Optuna's names; none in confirm/.
    seconds: of all commands, on `gpus` GPUs. message: of a failed trial."""

    state: Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
    values: dict[str, Any]
    rungs: list[Rung]
    seconds: Annotated[float, Field(ge=0)]
    gpus: Annotated[int, Field(ge=1)]
    params: NotRequired[dict[str, Param]]
    message: NotRequired[str]


@declared
class Settings(TypedDict):
    """study.json, as far as a report needs it. flags: train.py's, all but those of where and how it is executed."""

    name: str
    trials: Annotated[int, Field(ge=1)]
    pruner: str
    questions: Annotated[int, Field(ge=1)]
    steps_per_epoch: Annotated[int, Field(ge=1)]
    confirm: Annotated[int, Field(ge=0)]
    seeds: Annotated[int, Field(ge=1)]
    space: dict[str, Any]
    flags: dict[str, Any]


def begin_record(folder: Path, gpus: int, **what: Any) -> None:
    """trial.json of a run that begins or goes on."""
    path = folder / RECORD
    known = read_json(path) if path.is_file() else {"rungs": [], "seconds": 0.0}
    write_json(path, {**known, **what, "state": "RUNNING", "gpus": gpus})


def change_record(folder: Path, **what: Any) -> None:
    write_json(folder / RECORD, {**read_json(folder / RECORD), **what})


def add_seconds(folder: Path, seconds: float) -> None:
    change_record(folder, seconds=read_json(folder / RECORD)["seconds"] + seconds)


def add_rung(folder: Path, epoch: int, scores: dict[str, Any]) -> float:
    """Adds the scores after this number of epochs; returns the accuracy in percent."""
    rung = {"epoch": epoch, "correct": scores["correct"]["Avg"], "questions": scores["counts"]["Avg"]}
    earlier = [other for other in read_json(folder / RECORD)["rungs"] if other["epoch"] < epoch]
    change_record(folder, rungs=[*earlier, rung])
    return accuracy(rung)


def accuracy(rung: Any) -> float:
    """In percent."""
    return 100 * rung["correct"] / rung["questions"]


def is_study(path: str | Path) -> bool:
    return (Path(path) / STUDY).is_file()


def read_settings(study: Path) -> Any:
    return read_validated(study / STUDY, Settings, "name a study's folder", FIX)


def read_records(study: Path, part: str = "trials") -> dict[str, Any]:
    """By the name of the folder, in the order of trials. part: trials or confirm."""
    paths = sorted((study / part).glob(f"*/{RECORD}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return {path.parent.name: read_validated(path, Record, "name a study's folder", FIX) for path in paths}


def all_records(study: Path) -> list[Any]:
    return [record for part in PARTS for record in read_records(study, part).values()]


def gpu_seconds(records: list[Any]) -> float:
    return sum(record["seconds"] * record["gpus"] for record in records)
