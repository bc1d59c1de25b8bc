"""The folder of a training run: which recipe it belongs to, where training goes on, and what is saved in which order.

- recipe.json is written first and never changed, once there is a checkpoint. The same recipe goes on from its last
  whole checkpoint.
- Nothing old is changed before the first new checkpoint is whole. Until then, a run that replaces another one
  (--overwrite), or that goes back to one of its earlier checkpoints (--resume), writes into a folder of its own,
  STAGING.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavin.runtime.console import print_rank0
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import atomic_write, read_json_lines, write_json, write_json_lines
from lavin.runtime.flags import check_flags
from lavin.weights.adapters import read_adapters
from util.fingerprint import report_unrecorded
from util.runs import (
    CONFIG,
    LAST,
    LOG,
    METRICS,
    PARTIAL_SUFFIX,
    RECIPE,
    RESULTS,
    RUN_FILES,
    TRACKERS,
    checkpoint_path,
    checkpoints,
    user_error_if_malformed,
)
from util.training.recipe import INPUTS, TRAIN_FLAGS, differences, read_recipe
from util.training.settings import RunSettings

COPIED = (RECIPE, CONFIG, LOG, METRICS, TRACKERS)  # into STAGING, where a run goes back to a checkpoint
FILES = (*COPIED, LAST)  # that train.py writes, beside checkpoints
STAGING = ".staging"  # folder of what replaces a run or its later part, until its first checkpoint is whole
PROMOTING = ".promoting"  # the same folder while its files are moved to the place of the old ones


class Damaged(Exception):
    """A checkpoint that cannot be used. The message says why, in words that come behind `is broken`."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: what it holds is as `Trainer.save` wrote it, by its checksum."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Raises Damaged."""
        try:
            return cls(path, read_adapters(path))
        except Exception as error:  # damaged headers raise many types of exception
            raise Damaged(first_line(error)) from error

    @property
    def epoch(self) -> int:
        return self.content["epoch"]

    @property
    def went_back_to(self) -> int | None:
        """The epoch of the checkpoint that the run last went back to, because --resume named it."""
        return self.content.get("went_back_to")


@dataclass
class RunFolder:
    """A run's folder, and the place where its training goes on.

    folder: the folder of --output_dir. keep_last: the number of checkpoints of whole epochs to keep; None: all.
    checkpoint: the checkpoint from which training goes on, read once; None: training begins. went_back_to: the epoch of
    the checkpoint that --resume named. staged: whether files go into STAGING, since they are to replace a run or its
    later part.
    """

    folder: Path
    recipe: dict
    epochs: int
    keep_last: int | None = None
    checkpoint: Checkpoint | None = None
    went_back_to: int | None = None
    staged: bool = False
    saved_here: bool = False  # whether this process has saved a checkpoint

    @property
    def path(self) -> Path:
        """The folder that files are written to."""
        return self.folder / STAGING if self.staged else self.folder

    @property
    def finished(self) -> bool:
        last = checkpoint_path(self.folder, self.epochs - 1)
        return self.checkpoint is not None and self.checkpoint.path == last and not self.staged

    def begin(self, flags: dict) -> None:
        """Prepares the folder. This comes when everything is loaded, so that a command that fails before leaves the
        folder as it was."""
        if self.staged and self.path.exists():
            shutil.rmtree(self.path)
        if not self.checkpoint:
            write_json(self.path / RECIPE, {"recipe": self.recipe, "flags": flags})
        elif self.staged:
            for path in filter(Path.exists, map(self.folder.joinpath, COPIED)):
                with atomic_write(self.path / path.name) as tmp_path:
                    shutil.copyfile(path, tmp_path)

    def save(self, content: bytes, epoch: int, entry: dict | None = None) -> None:
        """Writes a checkpoint, and then removes what it replaces.

        entry: the epoch's line of log.txt; None: the checkpoint is in the middle of the epoch.
        """
        path = self.path / LAST if entry is None else checkpoint_path(self.path, epoch)
        with atomic_write(path) as tmp_path:
            tmp_path.write_bytes(content)
            if entry:  # after what a full disk would stop, and before the epoch counts as done
                append_log(self.path, entry)
        if not self.saved_here:
            self.saved_here = True
            if self.staged:
                promote(self.folder, self.went_back_to)
                self.staged = False
            drop_stale(self.folder, epoch if entry is None else epoch + 1)
        if entry:
            (self.folder / LAST).unlink(missing_ok=True)
            if self.keep_last:
                for old, old_path in list(checkpoints(self.folder).items())[:-self.keep_last]:
                    if old != self.went_back_to:  # which the same command names again
                        old_path.unlink()


def open_run(settings: RunSettings, recipe: dict, epochs: int) -> RunFolder:
    """Decides, with the folder locked, what the command means there. Raises UserError for another run's folder."""
    folder = Path(settings.output_dir)
    for path in map(folder.joinpath, FILES):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file: remove it, or name another --output_dir")
    recover_promotion(folder)
    run = RunFolder(folder, recipe, epochs, settings.keep_last)
    reason = refusal(folder, recipe)
    if reason:
        if not settings.overwrite:
            raise UserError(f"{folder} {reason}: name another --output_dir, or replace it with --overwrite")
        run.staged = True
    else:
        find_start(run, settings.resume)
        if run.checkpoint:
            require_own(run.checkpoint, recipe)
    return run


def refusal(folder: Path, recipe: dict) -> str | None:
    """The reason why a run of this recipe may not be written to the folder; None where it may."""
    trained = [name for name in (*RESULTS, LAST) if (folder / name).exists()]
    trained += [checkpoint.name for checkpoint in checkpoints(folder).values()]
    if not (folder / RECIPE).is_file():
        found = trained + [name for name in RUN_FILES if (folder / name).exists()]
        return f"holds {found[0]} of something else (it has no recipe.json)" if found else None
    if not trained:
        return None
    recorded = read_recipe(folder)
    other = differences(recipe, recorded)
    if not other:
        report_unrecorded(folder / RECIPE, recorded)
    return f"belongs to another recipe ({'; '.join(other)})" if other else None


def find_start(run: RunFolder, resume: str) -> None:
    """Sets where training goes on: at the latest whole checkpoint, or at the one that --resume names.

    The same --resume again, after training has gone on from there, does not go back a second time.
    """
    run.checkpoint = latest_whole_checkpoint(run.folder)
    went_back_to = run.checkpoint.went_back_to if run.checkpoint else None
    if not resume or Path(resume).is_dir() or Path(resume).name == LAST:
        run.went_back_to = went_back_to
        return
    named = Path(resume)
    run.went_back_to = next((epoch for epoch, path in checkpoints(run.folder).items() if path.samefile(named)), None)
    try:
        checkpoint = Checkpoint.read(named)
    except Damaged as damage:
        raise UserError(f"--resume {named} is broken ({damage}): name an earlier one") from damage
    if run.went_back_to is None:  # a copy under another name
        run.checkpoint = checkpoint
    elif not run.checkpoint or went_back_to != run.went_back_to:
        run.checkpoint = replace(checkpoint, path=checkpoint_path(run.folder, run.went_back_to))
        run.staged = not run.finished


def require_own(checkpoint: Checkpoint, recipe: dict) -> None:
    """Raises UserError for a checkpoint of another recipe than the folder's: somebody has put it there."""
    of_recipe = {name: declared for name, declared in TRAIN_FLAGS.items() if declared.belongs_to_recipe}
    flags = check_flags(checkpoint.content.get("flags", {}), of_recipe, str(checkpoint.path))
    stated = {**{name: flags[name] for name in of_recipe if name in flags},
              **{name: checkpoint.content[name] for name in INPUTS if name in checkpoint.content}}
    other = differences(stated, {name: recipe[name] for name in stated})
    if other:
        raise UserError(f"{checkpoint.path} was written by a run of another recipe ({'; '.join(other)}) than that of "
                        "its folder: put back the run's own, or remove it")


def latest_whole_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that training goes on from; None where none is whole. Prints which later ones are broken."""
    by_epoch, broken, found = checkpoints(folder), [], None
    for path in filter(Path.is_file, (folder / LAST, *reversed(by_epoch.values()))):
        try:
            checkpoint = Checkpoint.read(path)
        except Damaged as damage:
            broken.append(f"{path} is broken ({damage})")
            continue
        if path.name != LAST or checkpoint.epoch > max(by_epoch, default=-1):
            found = checkpoint
            break  # else LAST is older than a whole epoch's, since the process was killed before it removed LAST
    for line in broken:
        print_rank0(f"{line}: "
                    f"{f'{found.path.name} is used' if found else 'no whole one is left, so training begins anew'}")
    return found


def drop_stale(folder: Path, next_epoch: int) -> None:
    """Removes the checkpoints of `next_epoch` and later, the scores of these, and those of the run."""
    for epoch, path in checkpoints(folder).items():
        if epoch >= next_epoch:
            path.unlink()
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    for path in (*map(folder.joinpath, RESULTS), *folder.glob(f"*{PARTIAL_SUFFIX}")):
        path.unlink(missing_ok=True)


def append_log(folder: Path, entry: dict) -> None:
    """Adds an epoch's line to log.txt; replaces lines of this and later epochs, which an interrupted run left."""
    path = folder / LOG
    with user_error_if_malformed(path):
        earlier = [line for line in read_json_lines(path) if line["epoch"] < entry["epoch"]] if path.is_file() else []
    write_json_lines(path, [*earlier, entry])


# --- Replacing a run, or its later part ---

def promote(folder: Path, went_back_to: int | None) -> None:
    """Replaces the run in `folder`, or what it has after the epoch that training went back to, by what is in STAGING,
    which has a whole checkpoint. `recover_promotion` completes it if it is interrupted."""
    drop_stale(folder, next_epoch=0 if went_back_to is None else went_back_to + 1)
    for name in FILES:
        if not (folder / STAGING / name).exists():  # else it is replaced, so that recipe.json is always there
            (folder / name).unlink(missing_ok=True)
    (folder / STAGING).rename(folder / PROMOTING)  # from here on, nothing is removed
    move_promoted(folder)


def move_promoted(folder: Path) -> None:
    """Moves the files of PROMOTING to their places in the run's folder."""
    for path in (folder / PROMOTING).iterdir():
        path.replace(folder / path.name)
    (folder / PROMOTING).rmdir()


def recover_promotion(folder: Path) -> None:
    """Completes `promote` where it was interrupted, or was about to begin: a staged checkpoint is whole."""
    if (folder / PROMOTING).is_dir():
        move_promoted(folder)
        return
    for path in (folder / STAGING).glob("*.pth"):
        with suppress(Damaged):
            promote(folder, Checkpoint.read(path).went_back_to)
            return
