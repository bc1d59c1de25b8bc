"""The files of a study's folder, which its report is made from; no storage is needed to read them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from lavin.runtime.files import read_json, write_json
from lavin.runtime.schema import declared, read_validated

STUDY, RECORD = "study.json", "trial.json"
LOG = "search.log"  # what the commands of a trial say; touched while they run
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
    seconds: of all commands that have ended, on `gpus` GPUs. since: when the one that runs, or was killed, began.
    message: of a failed trial."""

    state: Literal["RUNNING", "COMPLETE", "PRUNED", "FAIL"]
    values: dict[str, Any]
    rungs: list[Rung]
    seconds: Annotated[float, Field(ge=0)]
    gpus: Annotated[int, Field(ge=1)]
    since: NotRequired[float]
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
    """trial.json of a run that begins or goes on, which keeps its GPU-seconds where it had another number of GPUs."""
    path = folder / RECORD
    known: dict[str, Any] = {"rungs": [], "seconds": 0.0, "gpus": gpus}
    if path.is_file():
        known = with_killed(folder, read_json(path))
    seconds = known["seconds"] * known["gpus"] / gpus
    write_json(path, {**known, **what, "state": "RUNNING", "seconds": seconds, "gpus": gpus})


def change_record(folder: Path, **what: Any) -> None:
    write_json(folder / RECORD, {**read_json(folder / RECORD), **what})


def sign_of_life(log: Path) -> float:
    """Touches the log of a command that runs; returns when, by the clock of the file system."""
    log.touch()
    return log.stat().st_mtime


def add_seconds(folder: Path, seconds: float) -> None:
    """Of a command that has ended."""
    record = read_json(folder / RECORD)
    record.pop("since", None)
    write_json(folder / RECORD, {**record, "seconds": record["seconds"] + seconds})


def with_killed(folder: Path, record: Any) -> Any:
    """With the seconds of a command that runs, or was killed with its worker, up to its last sign of life."""
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
    """In percent."""
    return 100 * rung["correct"] / rung["questions"]


def is_study(path: str | Path) -> bool:
    return (Path(path) / STUDY).is_file()


def read_settings(study: Path) -> Any:
    return read_validated(study / STUDY, Settings, "name a study's folder", FIX)


def read_records(study: Path, part: str = "trials") -> dict[str, Any]:
    """By the name of the folder, in the order of trials, with the seconds up to now. part: trials or confirm."""
    paths = sorted((study / part).glob(f"*/{RECORD}"), key=lambda path: (len(path.parent.name), path.parent.name))
    return {path.parent.name: with_killed(path.parent, read_validated(path, Record, "name a study's folder", FIX))
            for path in paths}


def all_records(study: Path) -> list[Any]:
    return [record for part in PARTS for record in read_records(study, part).values()]


def gpu_seconds(records: list[Any]) -> float:
    return sum(record["seconds"] * record["gpus"] for record in records)
