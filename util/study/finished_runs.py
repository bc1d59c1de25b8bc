"""Reads finished runs for a comparison. A run that is broken or unfinished, or whose scores are of something else,
raises UserError with the reason.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from lavin.mm_adapter import dropout_schedule
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json_lines, read_whole_lines, sha256
from lavin.runtime.schema import declared, read_validated, validate
from util.evaluation.scoring import COLUMNS
from util.lr_sched import LearningRate, check_schedule
from util.runs import checkpoint_path

N_LAYERS = 32  # of LLaMA-7B
FIX = "train or evaluate again"
TWO_BYTES = ("bf16", "fp16")  # their answers hardly differ, and the hardware chooses


# --- What the files must hold ---

def has_all_columns(numbers: dict) -> dict:
    missing = [column for column in COLUMNS if column not in numbers]
    if missing:
        raise ValueError(f"lacks {missing[0]}")
    return numbers


Count = Annotated[int, Field(ge=0)]
ByColumn = Annotated[dict[str, Count], AfterValidator(has_all_columns)]
Epoch = Count


@declared
class Flags(TypedDict):
    """Those of train.py that a comparison computes with."""

    lr_schedule: str
    lr: float
    min_lr: float
    epochs: Annotated[int, Field(ge=1, le=10**6)]
    warmup_epochs: float
    dropout_prob: float
    dropout_var: float
    dropout_lim: float
    batch_size: Annotated[int, Field(ge=1)]
    accum_iter: Annotated[int, Field(ge=1)]


@declared
class Config(TypedDict):
    flags: Flags
    world_size: Annotated[int, Field(ge=1)]
    n_layers: NotRequired[Annotated[int, Field(ge=1, le=10_000)]]


@declared
class LogLine(TypedDict):
    epoch: Epoch
    train_closs: float | None
    steps_left_out: NotRequired[Count]


@declared
class MetricsLine(TypedDict):
    epoch: Epoch
    step: Annotated[int, Field(ge=1)]
    loss: Annotated[float, Field(ge=0)] | None


@declared
class Scores(TypedDict):
    """Beside the columns' percentages. Earlier versions did not say what they had scored."""

    counts: ByColumn
    correct: ByColumn
    split: str
    checkpoint: NotRequired[str | None]
    checkpoint_sha256: NotRequired[str | None]
    prompt_format: NotRequired[str]
    decode: NotRequired[str]
    precision: NotRequired[str]
    bits: NotRequired[str]
    data: NotRequired[str]


@declared
class Generation(TypedDict):
    qid: str
    prediction: int
    answer: int
    cluster: NotRequired[str]  # earlier versions did not save it


# --- Runs ---

@dataclass(frozen=True)
class Run:
    """One seed of one method. predictions: none for published runs. answers: the correct ones, and clusters: the names
    of the questions' clusters; None if not saved."""

    folder: str
    flags: dict  # train.py's flags, plus "effective batch"
    losses: list[float]  # mean training loss of each epoch
    counts: dict[str, int]  # number of questions by column
    correct: dict[str, int]
    split: str = "test"
    predictions: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] | None = None
    clusters: dict[str, str] | None = None
    n_layers: int = N_LAYERS
    scored_with: dict = field(default_factory=dict)  # decode, precision and data, where scores.json says so
    step_losses: list[tuple[float, float]] = field(default_factory=list)  # (epoch as a fraction, loss)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    config: Any = read_validated(folder / "config.json", Config,
                                 "train.py writes it: name the folder of a training run", FIX)
    flags, n_layers = read_flags(config, folder / "config.json")
    log = read_log(folder / "log.txt", flags["epochs"])
    hint = f"run eval.py --adapter_path {folder}"
    scores: Any = read_validated(folder / "scores.json", Scores, hint, FIX)
    predictions = read_validated(folder / "preds.json", dict[str, int], hint, FIX)
    check_counts(scores, len(predictions), folder / "scores.json")
    check_origin(scores, flags, folder, hint)
    answers, clusters = read_answers(folder / "generations.jsonl", predictions)
    if answers and scores["correct"]["Avg"] != sum(predictions[qid] == answer for qid, answer in answers.items()):
        raise UserError(f"{folder / 'scores.json'} does not count the answers of preds.json: {hint}")
    steps = read_metrics(folder / "metrics.jsonl")
    return Run(str(folder), flags, [float("nan") if line["train_closs"] is None else line["train_closs"]
                                    for line in log], scores["counts"], scores["correct"], scores["split"], predictions,
               answers, clusters, n_layers, scored_with(scores), by_fraction(steps), notes(scores, log, steps))


def read_flags(config: dict, path: Path) -> tuple[dict, int]:
    """The flags of the run and the number of LLaMA's layers."""
    flags, n_layers = dict(config["flags"]), config.get("n_layers", N_LAYERS)
    try:
        check_schedule(LearningRate.read(flags))
        dropout_schedule(n_layers, flags["dropout_prob"], flags["dropout_var"], flags["dropout_lim"])
    except ValueError as error:
        raise UserError(f"{path}: {error}: {FIX}") from error
    flags["effective batch"] = flags["batch_size"] * flags["accum_iter"] * config["world_size"]
    return flags, n_layers


def read_log(path: Path, epochs: int) -> list[dict]:
    """The line of every epoch. A resumed run may have logged an epoch twice: the last line counts."""
    lines: Any = [validate(line, LogLine, f"{path}, line {i}", FIX)
                  for i, line in enumerate(read_json_lines(path) if path.is_file() else [], 1)]
    by_epoch = {line["epoch"]: line for line in lines}
    done = sum(epoch in by_epoch for epoch in range(epochs))
    if done < epochs:
        raise UserError(f"unfinished, {done} of {epochs} epochs in {path}: train.py --resume {path.parent} goes on")
    return [by_epoch[epoch] for epoch in range(epochs)]


def read_metrics(path: Path) -> list[dict]:
    """In the order of steps; none where there is no file. A torn line ends them."""
    if not path.is_file():
        return []
    lines: Any = [validate(line, MetricsLine, f"{path}, line {i}", FIX)
                  for i, line in enumerate(read_whole_lines(path), 1)]
    by_step = {(line["epoch"], line["step"]): line for line in lines}
    return [by_step[key] for key in sorted(by_step)]


def by_fraction(steps: list[dict]) -> list[tuple[float, float]]:
    """(epoch as a fraction, mean loss of the steps up to there), where it is not 0 and not all steps were skipped."""
    per_epoch = max((line["step"] for line in steps), default=1)
    return [(line["epoch"] + line["step"] / per_epoch, line["loss"]) for line in steps if line["loss"]]


# --- Scores ---

def check_counts(scores: dict, n_predictions: int, path: Path) -> None:
    """Raises UserError where the percentages contradict the counts, or the counts the number of predictions."""
    for column in COLUMNS:
        n, correct, percent = scores["counts"][column], scores["correct"][column], scores.get(column)
        is_number = isinstance(percent, int | float)
        if is_number != (n > 0) or (is_number and abs(percent - 100 * correct / n) >= 0.006):
            raise UserError(f"{path} is broken ({column} {percent} is not {correct} of {n}): {FIX}")
    n = scores["counts"]["Avg"]
    if not n == n_predictions > 0:
        raise UserError(f"{path} is broken ({n} questions, {n_predictions} in preds.json): {FIX}")


def check_origin(scores: dict, flags: dict, folder: Path, hint: str) -> None:
    """Raises UserError for scores of something else than the run's last checkpoint, asked as in training."""
    last = checkpoint_path(folder, flags["epochs"] - 1)
    name = scores.get("checkpoint", last.name)
    if name != last.name:
        raise UserError(f"its scores are of {name or 'the untuned base'}, not of {last.name}: {hint}")
    known = scores.get("checkpoint_sha256")
    if known and last.is_file() and sha256(last) != known:
        raise UserError(f"its scores are of another {last.name} than the one there: {hint}")
    for flag in ("prompt_format", "bits"):
        trained, scored = flags.get(flag), scores.get(flag)
        if None not in (trained, scored) and trained != scored:
            raise UserError(f"scored with --{flag} {scored}, trained with {trained}: {hint} --{flag} {trained}")


def scored_with(scores: dict) -> dict:
    """What must be the same in all runs."""
    found = {name: scores[name] for name in ("decode", "precision", "data") if name in scores}
    if "data" in found:
        found["data"] = found["data"][:12]
    if found.get("precision") in TWO_BYTES:
        found["precision"] = " or ".join(TWO_BYTES)
    return found


def notes(scores: dict, log: list[dict], steps: list[dict]) -> list[str]:
    """What the table says of a run that it compares."""
    lines = []
    if "checkpoint_sha256" not in scores:
        lines.append("scored by an earlier version: which checkpoint, and how, cannot be checked")
    if scores.get("decode") == "score":
        lines.append("scored with --decode score, which compares the options' letters: answers written out may differ")
    n_skipped = sum(line.get("steps_left_out", 0) for line in log)
    if n_skipped:
        of_all = f" of {len(log) * max(line['step'] for line in steps):,}" if steps else ""
        lines.append(f"{n_skipped:,}{of_all} steps were skipped, since their gradients were not finite")
    return lines


def read_answers(path: Path, predictions: dict[str, int]) -> tuple[dict[str, int] | None, dict[str, str] | None]:
    """The correct answers and the clusters, which eval.py saves together with the generated texts; None where they are
    not there."""
    if not path.is_file():
        return None, None
    lines: Any = [validate(line, Generation, f"{path}, line {i}", FIX) for i, line in
                  enumerate(read_json_lines(path), 1)]
    if {line["qid"]: line["prediction"] for line in lines} != predictions:
        raise UserError(f"{path} is broken (its predictions are not those of preds.json): {FIX}")
    clusters = {line["qid"]: line["cluster"] for line in lines if "cluster" in line}
    return {line["qid"]: line["answer"] for line in lines}, clusters if clusters.keys() == predictions.keys() else None
