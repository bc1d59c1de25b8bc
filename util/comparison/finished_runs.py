"""Reads finished runs for a comparison. A run that is broken or unfinished, or whose scores are of something else,
raises UserError with the reason.

What a run answered is read from generations.jsonl. Earlier versions, and other programs, may have left preds.json
alone, which does not say what is correct.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, Field, NonNegativeInt, ValidationInfo
from typing_extensions import NotRequired, TypedDict

from lavin.mm_adapter import AdapterConfig, AdapterShape, dropout_schedule
from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, read_json_lines, sha256, whole_lines
from lavin.runtime.flags import Flag, flags_of
from lavin.runtime.schema import declared, read_validated, shown, validate
from util.evaluation.answers import Answer, read_answers
from util.fingerprint import FROZEN, FROZEN_SHA256, both_tell
from util.lr_sched import LearningRate, check_schedule
from util.provenance import commits_of
from util.runs import CONFIG, GENERATIONS, LOG, METRICS, PREDICTIONS, RECIPE, SCORES, checkpoint_path
from util.training.recipe import INPUTS, other_inputs, read_recipe
from util.training.settings import EFFECTIVE_BATCH, Optimization

FEW_UNPARSED = 0.01  # share of answers that name no option, above which the table says so
N_LAYERS = 32  # of LLaMA-7B
FIX = "train or evaluate again"
# an entry of flags, by which a method is named: what `Optimization.entries` calls batch_size, which is no flag's value
MICRO_BATCH = "micro_batch"
ASKED_WITH = ("prompt_format", "bits")  # flags that a run is trained with, and must be scored with
TWO_BYTES = ("bf16", "fp16")  # their answers hardly differ, and the hardware chooses
# what scores are made with and must be the same in all runs, as reasons say it, and the flag of train.py that may make
# it differ
CONDITIONS = {"decode": ("--decode", None), "precision": ("--precision", "precision"),
              "data": ("data of checksum", "use_caption"), "pictures": ("pictures of checksum", None)}


# --- What the files must hold ---

def has_all_columns(numbers: dict, info: ValidationInfo) -> dict:
    """The columns of a run are those of `counts`, which is checked first and needs Avg alone."""
    columns = info.data.get("counts", {**numbers, "Avg": 0})
    for column in columns:
        if column not in numbers:
            raise ValueError(f"lacks {shown(column, quoted=False)}")
    for column in numbers:
        if column not in columns:
            raise ValueError(f"has {shown(column, quoted=False)}, and counts has not")
    return numbers


ByColumn = Annotated[dict[str, NonNegativeInt], AfterValidator(has_all_columns)]
Percentage = Annotated[float, Field(ge=0, le=100)]
Epoch = NonNegativeInt
# earlier versions wrote the second name
SkippedSteps = Annotated[NonNegativeInt, Field(validation_alias=AliasChoices("skipped_steps", "steps_left_out"))]


def flags_computed_with() -> dict[str, Flag]:
    """The flags of train.py that a comparison computes with: the learning rate's, the dropout's, and those of which the
    effective batch is the product."""
    found = flags_of(LearningRate, Optimization, AdapterConfig)
    stated_elsewhere = {name for name, declared in found.items() if declared.stated_as in found}  # --blr, by --lr
    of_batch = {name for name, declared in found.items() if declared.stated_as == EFFECTIVE_BATCH}
    names = (flags_of(LearningRate, AdapterConfig).keys() | of_batch) - flags_of(AdapterShape).keys() - stated_elsewhere
    return {name: found[name] for name in found if name in names}


FlagsOfRun: Any = declared(TypedDict("FlagsOfRun", {  # type: ignore[misc, operator]  # mypy wants the names spelled out
    name: declared.optional_kind for name, declared in flags_computed_with().items()}))


@declared
class Resumed(TypedDict):
    git_commit: NotRequired[str | None]


@declared
class Config(TypedDict):
    flags: FlagsOfRun
    world_size: Annotated[int, Field(ge=1)]
    n_layers: NotRequired[Annotated[int, Field(ge=1, le=10_000)]]
    git_commit: NotRequired[str | None]
    resumed: NotRequired[list[Resumed]]


@declared
class LogLine(TypedDict):
    epoch: Epoch
    train_closs: float | None
    skipped_steps: NotRequired[SkippedSteps]


@declared
class MetricsLine(TypedDict):
    epoch: Epoch
    step: Annotated[int, Field(ge=1)]
    loss: Annotated[float, Field(ge=0)] | None


@declared
class Scores(TypedDict):
    """The entries of scores.json beside the columns' percentages. Earlier versions did not say what they had scored."""

    counts: ByColumn
    correct: ByColumn
    split: str
    checkpoint: NotRequired[str | None]
    checkpoint_sha256: NotRequired[str | None]
    prompt_format: NotRequired[str]
    decode: NotRequired[str]
    precision: NotRequired[str]
    bits: NotRequired[str]
    adapter: NotRequired[dict[str, Any] | None]
    data: NotRequired[str]
    pictures: NotRequired[str]
    chance: NotRequired[Annotated[dict[str, Percentage | None], AfterValidator(has_all_columns)]]
    parse_failures: NotRequired[NonNegativeInt]
    git_commit: NotRequired[str | None]


# --- Runs ---

@dataclass(frozen=True)
class Run:
    """One seed of one method.

    answers: sorted by question; empty where it is not known which options are right. predictions: the chosen options by
    question, where this is all that is known of the answers. Published runs have neither. The untuned base has the
    flags ASKED_WITH alone, and the checksums of its models.
    """

    folder: str
    flags: dict  # train.py's flags, plus EFFECTIVE_BATCH and MICRO_BATCH
    losses: list[float]  # mean training loss of each epoch
    counts: dict[str, int]  # number of questions by column, in the order of columns
    correct: dict[str, int]
    split: str = "test"
    answers: list[Answer] = field(default_factory=list)
    predictions: dict[str, int] = field(default_factory=dict)
    n_layers: int = N_LAYERS
    scored_with: dict = field(default_factory=dict)  # decode, precision, data and pictures, where scores.json says so
    trained_on: dict = field(default_factory=dict)  # checksums of data, pictures and models, where recipe.json has them
    step_losses: list[tuple[float, float]] = field(default_factory=list)  # (epoch as a fraction, loss)
    notes: list[str] = field(default_factory=list)
    chance: dict[str, float | None] = field(default_factory=dict)  # percentages of guessing, where scores.json has them
    commits: list[str] = field(default_factory=list)  # of the code that trained and scored it
    parse_failures: int | None = None  # answers that named no option, where scores.json counts them

    @property
    def questions(self) -> frozenset[str]:
        """The questions that the run was asked."""
        return frozenset(self.predictions) | {answer.qid for answer in self.answers}

    @property
    def right_options(self) -> dict[str, int]:
        """The right option of each question, as far as the run knows it."""
        return {answer.qid: answer.answer for answer in self.answers}

    def with_right_options(self, right_options: dict[str, int]) -> "Run":
        """The run with answers in place of mere predictions, by the right options that another run knows."""
        if self.answers or not right_options:
            return self
        return replace(self, predictions={}, answers=[Answer(qid, prediction, right_options[qid])
                                                      for qid, prediction in sorted(self.predictions.items())])


def read_run(folder: Path) -> Run:
    """The run in a folder of train.py and eval.py. Raises UserError where it cannot be compared, and says why."""
    config: Any = read_validated(folder / CONFIG, Config,
                                 "train.py writes it: name the folder of a training run", FIX)
    flags, n_layers = read_flags(config, folder / CONFIG)
    log = read_log(folder / LOG, flags["epochs"])
    hint = f"run eval.py --adapter_path {folder}"
    scores, answers, predictions = read_results(folder, hint)
    check_origin(scores, flags, folder, hint)
    inputs, losses = trained_on(folder), read_metrics(folder / METRICS)
    return Run(str(folder), flags, [float("nan") if line["train_closs"] is None else line["train_closs"]
                                    for line in log], scores["counts"], scores["correct"], scores["split"], answers,
               predictions, n_layers, scored_with(scores), inputs, by_fraction(losses),
               notes(scores, answers, inputs, log, losses), scores.get("chance", {}), commits_of(config, scores),
               scores.get("parse_failures"))


def is_untuned(folder: Path) -> bool:
    """Whether a folder holds scores of the base without adapters, and is no training run's."""
    path = folder / SCORES
    return not (folder / CONFIG).is_file() and path.is_file() and read_json(path).get("checkpoint", "") is None


def read_untuned(folder: Path) -> Run:
    """The untuned base in a folder of eval.py. Raises UserError where its scores cannot be compared, and says why."""
    scores, answers, predictions = read_results(folder, f"run eval.py --output_dir {folder}")
    flags = {flag: scores[flag] for flag in ASKED_WITH if flag in scores}
    models = {name: scores[name] for name in (*FROZEN, *FROZEN_SHA256) if name in scores}
    return Run(str(folder), flags, [], scores["counts"], scores["correct"], scores["split"], answers, predictions,
               scored_with=scored_with(scores), trained_on=models, chance=scores.get("chance", {}),
               parse_failures=scores.get("parse_failures"))


def read_results(folder: Path, hint: str) -> tuple[dict[str, Any], list[Answer], dict[str, int]]:
    """The content of scores.json, the answers sorted by question, and the predictions where no answers were kept."""
    scores: Any = read_validated(folder / SCORES, Scores, hint, FIX)
    answers: list[Answer] = []
    predictions: dict[str, int] = {}
    if (folder / GENERATIONS).is_file():
        answers = sorted(read_answers(folder / GENERATIONS, FIX), key=lambda answer: answer.qid)
    else:
        predictions = read_validated(folder / PREDICTIONS, dict[str, int], hint, FIX)
    check_counts(scores, folder / SCORES)
    check_answers(scores, answers, predictions, folder, hint)
    return scores, answers, predictions


def read_flags(config: dict, path: Path) -> tuple[dict, int]:
    """The flags of the run and the number of LLaMA's layers."""
    flags, n_layers = dict(config["flags"]), config.get("n_layers", N_LAYERS)
    try:
        check_schedule(LearningRate.read(flags))
        dropout_schedule(n_layers, flags["dropout_prob"], flags["dropout_var"], flags["dropout_lim"])
    except ValueError as error:
        raise UserError(f"{path}: {error}: {FIX}") from error
    optimization = Optimization.read(flags)
    flags[EFFECTIVE_BATCH] = optimization.effective_batch(config["world_size"])
    if optimization.loss_norm == "microbatch":
        flags[MICRO_BATCH] = optimization.batch_size
    return flags, n_layers


def trained_on(folder: Path) -> dict[str, Any]:
    """The checksums of what the run was trained on; none where there is no recipe.json."""
    recipe = read_recipe(folder) if (folder / RECIPE).is_file() else {}
    return {name: recipe[name] for name in INPUTS if name in recipe}


def read_log(path: Path, epochs: int) -> list[dict]:
    """The line of every epoch. A resumed run may have logged an epoch twice: the last line counts."""
    if not path.is_file():  # it is written with the first epoch's checkpoint
        raise UserError(f"{path} is missing: if the run is unfinished, train.py --resume {path.parent} goes on; if the "
                        "file was lost, put it back, or train again")
    lines: Any = [validate(line, LogLine, f"{path}, line {i}", FIX) for i, line in enumerate(read_json_lines(path), 1)]
    by_epoch = {line["epoch"]: line for line in lines}
    done = sum(epoch in by_epoch for epoch in range(epochs))
    if done < epochs:
        raise UserError(f"unfinished, {done} of {counted(epochs, 'epoch')} in {path}: train.py --resume "
                        f"{path.parent} goes on")
    return [by_epoch[epoch] for epoch in range(epochs)]


def read_metrics(path: Path) -> dict[tuple[int, int], float | None]:
    """The losses in metrics.jsonl by epoch and step; none where there is no file. A torn line ends them. A long run has
    a million lines, of which the other numbers are not kept."""
    losses = {}
    for i, line in enumerate(whole_lines(path) if path.is_file() else [], 1):
        checked: Any = validate(line, MetricsLine, f"{path}, line {i}", FIX)
        losses[checked["epoch"], checked["step"]] = checked["loss"]
    return losses


def by_fraction(losses: dict[tuple[int, int], float | None]) -> list[tuple[float, float]]:
    """Pairs of an epoch as a fraction and the mean loss of the steps up to there, in their order, where it is not 0 and
    not all of them were skipped."""
    per_epoch = last_step(losses)
    return [(epoch + step / per_epoch, loss) for epoch, step in sorted(losses) if (loss := losses[epoch, step])]


def last_step(losses: dict[tuple[int, int], float | None]) -> int:
    return max((step for _, step in losses), default=1)


# --- Scores ---

def check_counts(scores: dict, path: Path) -> None:
    """Raises UserError where the percentages contradict the counts."""
    for column, n in scores["counts"].items():
        correct, percent = scores["correct"][column], scores.get(column)
        is_number = isinstance(percent, int | float)
        if is_number != (n > 0) or (is_number and abs(percent - 100 * correct / n) >= 0.006):
            raise UserError(f"{path} is broken ({column} {percent} is not {correct} of {n}): {FIX}")


def check_answers(scores: dict, answers: list[Answer], predictions: dict[str, int], folder: Path, hint: str) -> None:
    """Raises UserError where scores are not of the answers beside them."""
    path, name = folder / SCORES, GENERATIONS if (folder / GENERATIONS).is_file() else PREDICTIONS
    n, n_found = scores["counts"]["Avg"], len(answers or predictions)
    if not n == n_found > 0:
        raise UserError(f"{path} is broken ({counted(n, 'question')}, {n_found} in {name}): {FIX}")
    if answers and scores["correct"]["Avg"] != sum(answer.correct for answer in answers):
        raise UserError(f"{path} does not count the answers of {name}: {hint}")


def check_origin(scores: dict, flags: dict, folder: Path, hint: str) -> None:
    """Raises UserError for scores of something else than the run's last checkpoint, asked as in training."""
    last = checkpoint_path(folder, flags["epochs"] - 1)
    name = scores.get("checkpoint", last.name)
    if name != last.name:
        raise UserError(f"its scores are of {name or 'the untuned base'}, not of {last.name}: {hint}")
    known = scores.get("checkpoint_sha256")
    if known and last.is_file() and sha256(last) != known:
        raise UserError(f"its scores are of another {last.name} than the one there: {hint}")
    adapter = scores.get("adapter") or {}
    for flag in flags_of(AdapterConfig):
        if both_tell(flag, flags, adapter) and flags[flag] != adapter[flag]:
            raise UserError(f"its scores are of adapters with --{flag} {adapter[flag]}, and it was trained with "
                            f"{flags[flag]}: {hint}")
    for flag in ASKED_WITH:
        if both_tell(flag, flags, scores) and flags[flag] != scores[flag]:
            raise UserError(f"scored with --{flag} {scores[flag]}, trained with {flags[flag]}: "
                            f"{hint} --{flag} {flags[flag]}")


def scored_with(scores: dict) -> dict[str, str]:
    """The conditions of the scores that must be the same in all runs, as far as they are recorded."""
    def shown(name: str) -> str:
        if name in ("data", "pictures"):
            return scores[name][:12]
        return " or ".join(TWO_BYTES) if scores[name] in TWO_BYTES else scores[name]
    return {name: shown(name) for name in CONDITIONS if name in scores}


def notes(scores: dict, answers: list[Answer], inputs: dict, log: list[dict],
          losses: dict[tuple[int, int], float | None]) -> list[str]:
    """The sentences that the table has on a run that it compares. inputs: what it was trained on."""
    lines = []
    if "checkpoint_sha256" not in scores:
        lines.append("scored by an earlier version: which checkpoint, and how, cannot be checked")
    if scores.get("decode") == "score":
        lines.append("scored with --decode score, which compares the options' letters: answers written out may differ")
    unparsed = sum(not answer.parsed for answer in answers)
    if unparsed > FEW_UNPARSED * len(answers) and scores.get("decode") != "score":
        lines.append(f"{unparsed:,} of {counted(len(answers), 'answer')} named no option, so that the most likely one "
                     "counts: read generations.jsonl")
    others = other_inputs(scores, inputs, (*FROZEN, *FROZEN_SHA256))
    if others:
        lines.append(f"was scored on {', '.join(others)} than it was trained on")
    skipped_steps = sum(line.get("skipped_steps", 0) for line in log)
    if skipped_steps:
        of_all = f" of {len(log) * last_step(losses):,}" if losses else ""
        lines.append(f"{counted(skipped_steps, 'step')}{of_all} skipped for gradients that were not finite")
    return lines
