"""Results of an evaluation: the folder that they belong to, their identity (all that determines them), and whether they
are there already."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lavin.runtime.console import print_rank0
from lavin.runtime.device import precision_name
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, sha256, write_json
from lavin.weights.adapters import SHARED_TENSORS
from util.fingerprint import RECENT, fingerprints, is_comparable, report_unrecorded
from util.flags import BaseSettings
from util.provenance import COMMIT, short_commit
from util.runs import CONFIG, RECIPE, checkpoints, user_error_if_malformed
from util.trained_model import Trained

# --- The folder ---

def config_file(folder: Path) -> Path | None:
    """The file with the flags of the run that the folder belongs to, if it is a run's."""
    return next((path for path in (folder / CONFIG, folder / RECIPE) if path.is_file()), None)


def final_checkpoint(folder: Path) -> Path | None:
    """The checkpoint after a run's last epoch; None: unfinished. Where the folder does not say how many epochs
    there are to be, it is the latest one."""
    path, by_epoch = config_file(folder), checkpoints(folder)
    epochs = 0
    if path:
        with user_error_if_malformed(path):
            epochs = int(read_json(path)["flags"].get("epochs", 0))
    last = max(by_epoch, default=-1)
    return by_epoch[last] if by_epoch and last + 1 >= epochs else None


def results_folder(output_dir: str | None, checkpoint: Path | None) -> Path:
    """--output_dir, or the checkpoint's folder, which is the run's; for a run's early checkpoint, a folder of its own
    inside. Raises UserError where results of something else would go among a run's, or nothing says where to."""
    if output_dir:
        folder = Path(output_dir)
        if config_file(folder) and (checkpoint is None or checkpoint.resolve().parent != folder.resolve()):
            raise UserError(f"--output_dir {output_dir} is the folder of a run, and {checkpoint or 'the untuned base'} "
                            "is not of that run: name another folder")
        return folder
    if checkpoint is None:
        raise UserError("without --adapter_path the untuned base is scored: name a folder for its results with "
                        "--output_dir")
    folder = checkpoint.parent
    if checkpoint.name == SHARED_TENSORS:
        raise UserError(f"{folder} holds adapters that were shared: name a folder for their results with --output_dir")
    is_of_run = config_file(folder) or checkpoint in checkpoints(folder).values()
    return folder / checkpoint.stem if is_of_run and checkpoint != final_checkpoint(folder) else folder


# --- What is scored ---

def model_identity(base: BaseSettings, trained: Trained, tokenizer_path: str | None) -> dict:
    """Identifies the model that answers; all of it is known before the model is loaded."""
    return {"checkpoint": trained.path and trained.path.name,
            "checkpoint_sha256": trained.path and sha256(trained.path),
            "precision": precision_name(trained.dtype), "bits": base.bits,
            **fingerprints(base, tokenizer_path), "adapter": asdict(trained.adapter)}


# --- Scores that are there ---

ADDED = ("chance",)  # entries of scores.json that follow from the answers, and that earlier versions did not compute
EARLIER_NAMES = {"skipped": "bad_pictures"}  # of entries of scores.json, by which earlier versions wrote them


def read_scores(path: Path) -> dict[str, Any]:
    """The entries of a file of scores, by their names in this version."""
    return {EARLIER_NAMES.get(name, name): value for name, value in read_json(path).items()}


def scored_before(path: Path, identity: dict, rescore: Callable[[dict], dict]) -> dict | None:
    """The scores in a file, if they have this identity and are those of the answers beside them; says what will be
    replaced if not.

    rescore(scores): the scores by the answers, which may have been changed or lost since.
    """
    if not path.is_file():
        return None
    try:
        scores = read_scores(path)
    except UserError:
        scores = {}
    other = differing_words(scores, identity)
    added = {} if other else entries_to_add(scores, identity, rescore)
    if not other and added is not None:
        report_unrecorded(path, scores)
        if added:
            write_json(path, scores | added)
        return scores | added
    print_rank0(f"{path} holds scores of another {', '.join(other) or 'evaluation'}: they will be replaced")
    return None


def differing(recorded: dict, identity: dict) -> list[str]:
    """The entries of an identity of which a record tells another value."""
    return [name for name, value in identity.items()
            if recorded.get(name) != value and is_comparable(name, recorded, identity)]


def differing_words(recorded: dict, identity: dict) -> list[str]:
    """The same entries as messages call them."""
    return list(dict.fromkeys(name.removesuffix("_sha256") for name in differing(recorded, identity)))


def entries_to_add(scores: dict, identity: dict, rescore: Callable[[dict], dict]) -> dict[str, Any] | None:
    """The entries that the scores lack, since earlier versions did not compute them; None where the scores are not
    those of the answers."""
    try:
        expected = {**rescore(scores), **identity}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None
    added = {name: expected[name] for name in ADDED if name in expected and name not in scores}
    return added if without_recent(expected) == without_recent(scores | added) else None


def without_recent(record: dict) -> dict:
    """Returns a record without what earlier versions did not record, nor the code, which is told and not compared."""
    return {name: value for name, value in record.items() if name not in (*RECENT, "git_commit")}


def note_on_code(scores: dict, path: Path) -> str:
    """Returns what to say of scores by the code of another commit; nothing where a commit is not known."""
    commit = scores.get("git_commit")
    if not commit or not COMMIT or commit == COMMIT:
        return ""
    return f" but by the code of commit {short_commit(str(commit))} (to score again, remove {path})"
