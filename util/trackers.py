"""Experiment trackers, in which runs are watched while they train: TensorBoard, Weights & Biases, MLflow.

A tracker never stops a run: one that fails is left out from then on, with a line that says why. Where each run is
found again is kept in its folder (trackers.json), so that a resumed run goes on in the same run of the tracker, and its
scores are added to it. The trials of a study of search.py are a group, and so are other runs that lie in one folder.

Each tracker reads its own environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI and so on).
"""

import os
import re
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator

from lavin.runtime.console import is_main_process, print_rank0
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import read_json, write_json
from util.runs import TRACKERS

PROJECT = "lavin"  # where the environment names no other
GROUP = "WANDB_RUN_GROUP"  # the variable that names the group of a run, for MLflow too
# MLflow would wait many minutes for a server that does not answer
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """A tracker's library, as it is used here. Methods may raise any exception."""

    place: dict[str, Any]  # by which the run is found again

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds numbers under a step since the run's start."""

    def summarize(self, numbers: Mapping[str, float]) -> None:
        """Adds numbers on the whole run."""

    def show(self, figure: Path) -> None:
        """Adds a PNG."""

    def close(self, failed: bool) -> None:
        """Writes what is left, and says how the process ends that the run was shown by."""


class TensorBoard:
    """place: the folder of its events."""

    def __init__(self, folder: Path, config: Mapping[str, Any], place: dict[str, Any], first_step: int | None):
        self.place = {"log_dir": place.get("log_dir") or str(folder / "tensorboard")}
        # TensorBoard hides steps from purge_step on, which an interrupted run left and this process makes again
        self.events = summary_writer()(self.place["log_dir"], purge_step=None if first_step is None else first_step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()  # else a process that is killed would lose the lines of the last minutes

    def summarize(self, numbers: Mapping[str, float]) -> None:
        self.log(numbers, 0)

    def show(self, figure: Path) -> None:
        import numpy as np
        from PIL import Image
        self.events.add_image(figure.stem, np.asarray(Image.open(figure).convert("RGB")), dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.events.close()


def summary_writer() -> type:
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter


class WandB:
    """place: the run's id."""

    def __init__(self, folder: Path, config: Mapping[str, Any], place: dict[str, Any], first_step: int | None):
        import wandb
        self.wandb, self.place = wandb, {"id": place.get("id") or secrets.token_hex(4)}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=group_of(folder),
            id=self.place["id"], name=folder.name, dir=folder, config=dict(config), resume="allow",
            reinit="create_new", settings=wandb.Settings(console="off", quiet=True, init_timeout=30))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def summarize(self, numbers: Mapping[str, float]) -> None:
        self.run.summary.update(dict(numbers))

    def show(self, figure: Path) -> None:
        self.run.log({figure.stem: self.wandb.Image(str(figure))})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """place: the run's id and the store that has it."""

    def __init__(self, folder: Path, config: Mapping[str, Any], place: dict[str, Any], first_step: int | None):
        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow
        self.client = mlflow.MlflowClient(place.get("tracking_uri") or mlflow.get_tracking_uri())
        self.id, self.logged = place.get("run_id", ""), 0
        if self.id:
            self.client.update_run(self.id, "RUNNING")
            self.logged = max((point.step for point in self.client.get_metric_history(self.id, "lr")), default=0)
        else:
            self.id = self.client.create_run(
                self.experiment(), run_name=folder.name, tags={"group": group_of(folder)}).info.run_id
            self.client.log_batch(self.id, params=[mlflow.entities.Param(name, str(value)[:6000])
                                                   for name, value in config.items()])
        self.place = {"run_id": self.id, "tracking_uri": self.client.tracking_uri}

    def experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if step > self.logged:  # the steps that a resumed run repeats have the same numbers
            for name, value in numbers.items():
                self.client.log_metric(self.id, name, value, step=step)

    def summarize(self, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.id, re.sub(r"[^\w. -]", ".", name), value)  # it refuses other characters

    def show(self, figure: Path) -> None:
        self.client.log_artifact(self.id, str(figure))

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def group_of(folder: Path) -> str:
    return os.environ.get(GROUP) or folder.absolute().parent.name


KNOWN: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def known_names(text: str) -> str:
    """Names of trackers with commas between them. Raises ValueError for another name."""
    unknown = [name for name in text.split(",") if name not in KNOWN]
    if text and unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(KNOWN)}")
    return text


Names = Annotated[str, AfterValidator(known_names)]


def require_trackers(names: str) -> None:
    """Raises UserError for a tracker that is not installed. Fast, to be called before slow work."""
    for name in filter(None, names.split(",")):
        if find_spec(name) is None:
            raise UserError(f"--report_to {name}: the package is not installed: pip install {name}, or leave it out")


class Trackers:
    """The trackers of one run. On other ranks than 0 there are none.

    names: the names of known trackers, with commas between them. folder: the run's folder, after which it is named.
    path: the file that says where the trackers have the run. config: the run's flags. first_step: the steps from the
    run's start up to this process; those that the trackers have beyond it are made again. None: the process makes no
    steps. log_dir: TensorBoard's folder, where it is not in the run's.

    `with` closes them, also where the run fails. Where it is stopped, they stay as those of a run that goes on, since
    the process must end before its grace period does, and a tracker may wait for its server.
    """

    def __init__(self, names: str, folder: Path, path: Path, config: Mapping[str, Any], first_step: int | None = None,
                 log_dir: str | None = None):
        self.open: dict[str, Tracker] = {}
        if not (names and is_main_process()):
            return
        places = read_places(path)
        if log_dir:
            places["tensorboard"] = {"log_dir": log_dir}
        for name in names.split(","):
            self.attempt(name, partial(self.begin, name, folder, config, places.get(name, {}), first_step))
        write_json(path, places | {name: tracker.place for name, tracker in self.open.items()})

    def begin(self, name: str, folder: Path, config: Mapping[str, Any], place: dict[str, Any], first_step: int | None
              ) -> None:
        self.open[name] = KNOWN[name](folder, config, place, first_step)

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        """Leaves the tracker out where the action fails."""
        try:
            action()
        except Exception as error:  # of many types: no network, no space, not logged in
            self.open.pop(name, None)
            print_rank0(f"warning: {name} is left out from now on ({first_line(error)})")

    def each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            self.attempt(name, partial(action, tracker))

    def log(self, numbers: Mapping[str, float | None], step: int) -> None:
        """Adds the numbers that are known."""
        known = {name: value for name, value in numbers.items() if value is not None}
        self.each(lambda tracker: tracker.log(known, step))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or issubclass(kind, Exception):
            self.each(lambda tracker: tracker.close(failed=kind is not None))


def read_places(path: Path) -> dict[str, Any]:
    """The places where the trackers have a run, by tracker; empty where it is not tracked."""
    try:
        return read_json(path)
    except UserError:
        return {}


def add_scores(folder: Path, scores: Mapping[str, float]) -> None:
    """Adds scores to the runs of the trackers in which the run of this folder is."""
    places = read_places(folder / TRACKERS)
    named = {f"scores/{name}": value for name, value in scores.items()}
    with Trackers(",".join(name for name in KNOWN if name in places), folder, folder / TRACKERS, {}) as trackers:
        trackers.each(lambda tracker: tracker.summarize(named))


def show_figures(names: str, folder: Path, figures: list[Path]) -> None:
    """Adds figures to a run of each tracker that has the name of their folder."""
    with Trackers(names, folder, folder / TRACKERS, {}) as trackers:
        for figure in figures:
            trackers.each(lambda tracker, figure=figure: tracker.show(figure))  # type: ignore[misc]
