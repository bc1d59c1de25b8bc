"""Reads finished runs for a comparison. An unfinished or inconsistent run raises UserError with the reason."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from lavin.mm_adapter import dropout_schedule
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, read_json_lines
from util.lr_sched import check_schedule
from util.runs import user_error_if_malformed
from util.scoring import COLUMNS

N_LAYERS = 32  # of LLaMA-7B


@dataclass(frozen=True)
class Run:
    """One seed of one method. predictions: none for published runs. answers: the correct ones, None if not saved."""

    folder: str
    flags: dict  # train.py's flags, plus "effective batch"
    losses: list[float]  # mean training loss of each epoch
    counts: dict[str, int]  # number of questions by column
    correct: dict[str, int]
    split: str = "test"
    predictions: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] | None = None
    n_layers: int = N_LAYERS


def read_run(folder: Path) -> Run:
    flags, n_layers = read_config(folder / "config.json")
    losses = read_losses(folder / "log.txt", flags["epochs"])
    hint = f"run eval.py --adapter_path {folder}"
    scores, predictions = (read_json(folder / name, hint) for name in ("scores.json", "preds.json"))
    with user_error_if_malformed(folder / "scores.json"):
        counts, correct = ({column: int(scores[key][column]) for column in COLUMNS} for key in ("counts", "correct"))
        check_scores(scores, counts, correct, len(predictions))
        split = scores["split"]
    answers = read_answers(folder / "generations.jsonl", predictions)
    if answers and correct["Avg"] != sum(predictions[qid] == answer for qid, answer in answers.items()):
        raise UserError(f"{folder / 'scores.json'} does not count the answers of preds.json: {hint}")
    return Run(str(folder), flags, losses, counts, correct, split, predictions, answers, n_layers)


def read_config(path: Path) -> tuple[dict, int]:
    """The flags of the run and the number of LLaMA's layers."""
    config = read_json(path, "train.py writes it: name the folder of a training run")
    with user_error_if_malformed(path):
        flags = dict(config["flags"])
        args = SimpleNamespace(**flags)
        check_schedule(args)
        n_layers = config.get("n_layers", N_LAYERS)
        dropout_schedule(n_layers, args.dropout_prob, args.dropout_var, args.dropout_lim)
        flags["effective batch"] = args.batch_size * args.accum_iter * config["world_size"]
        return flags, n_layers


def read_losses(path: Path, epochs: int) -> list[float]:
    """Mean loss by epoch. A resumed run may have logged an epoch twice: the last line counts."""
    lines = read_json_lines(path) if path.is_file() else []
    with user_error_if_malformed(path):
        losses = {line["epoch"]: float("nan" if line["train_closs"] is None else line["train_closs"]) for line in lines}
        done = sum(epoch in losses for epoch in range(epochs))
    if done < epochs:
        raise UserError(f"unfinished, {done} of {epochs} epochs in {path}: train.py --resume {path.parent} goes on")
    return [losses[epoch] for epoch in range(epochs)]


def check_scores(scores: dict, counts: dict[str, int], correct: dict[str, int], n_predictions: int) -> None:
    """Raises ValueError where the percentages contradict the counts, or the counts the number of predictions."""
    for column, n in counts.items():
        percent = scores[column]
        same = percent is None if n == 0 else percent is not None and abs(percent - 100 * correct[column] / n) < 0.006
        if not same:
            raise ValueError(f"{column} {percent} is not {correct[column]} of {n}")
    if not counts["Avg"] == n_predictions > 0:
        raise ValueError(f"{counts['Avg']} questions, {n_predictions} in preds.json")


def read_answers(path: Path, predictions: dict[str, int]) -> dict[str, int] | None:
    """The correct answers, which eval.py saves together with the generated texts; None where there is no such file."""
    if not path.is_file():
        return None
    lines = read_json_lines(path)
    with user_error_if_malformed(path):
        if {line["qid"]: line["prediction"] for line in lines} != predictions:
            raise ValueError("its predictions are not those of preds.json")
        return {line["qid"]: line["answer"] for line in lines}
