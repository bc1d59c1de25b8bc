"""Writes a scored run as a folder to share: its adapters, its recipe and scores, and a model card.

    python -m tools.publish RUN --out FOLDER [--push USER/REPO]

`--adapter_path FOLDER`, and after --push `--adapter_path USER/REPO`, load the adapters again and give the same answers.
Paths of your machine are left out. --push needs `hf auth login`, or HF_TOKEN.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, ClassVar

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from lavin.runtime.errors import UserError, first_line, one_line_errors
from lavin.runtime.files import sha256, value_sha256, write_json, write_text
from lavin.runtime.flags import Flag, FlagGroup, Flags, Parser, Role, flag, flags_of
from lavin.runtime.schema import FileName, PathText
from lavin.weights.adapters import SHARED_SETTINGS, SHARED_TENSORS, Checkpoint, read_adapters
from lavin.weights.hub import Repository
from tools.output import make_folder, save_tensors
from util.comparison.comparison import clusters_of
from util.comparison.statistics import accuracy_interval
from util.evaluation.answers import read_answers
from util.evaluation.results import read_scores
from util.flags import SHARED
from util.runs import GENERATIONS, RECIPE, SCORES, last_checkpoint, user_error_if_malformed
from util.training.recipe import read_recipe

OF_TRAINING = ("optimizer", "scaler", "record", "skipped", "went_back_to")  # entries of no use to others
CARD = Template("""\
---
tags:
- lavin
- visual-question-answering
pipeline_tag: visual-question-answering
$base_model---

# $name

Adapters (Mixture-of-Modality Adaptation; [LaVIN](https://arxiv.org/abs/2305.15023), Luo et al. 2023) for a frozen LLaMA
and a frozen image encoder. They hold $n_parameters trained parameters, without the base model.

## Base models

| | name | SHA-256 of the files |
| --- | --- | --- |
| LLaMA and its tokenizer | `$llm_model` | `$base_sha256` |
| image encoder | `$vision_model` | `$vision_sha256` |

The adapters say nothing with another base model. A program that loads them warns where its files have other checksums.

## Training

$training

`recipe.json` holds everything that determines the result, with checksums of the questions and pictures.

## Scores

$n_questions questions of split `$split`, $decode, in $precision. Percent correct:

| $columns |
|$rules|
| $accuracies |

Avg is $average, with a 95 % interval from $low to $high. The interval is of this run: it holds what other questions of
this kind would change, and not what another seed would.

## Use

With the program that wrote this page, LaVIN for hyperparameter studies:

```bash
python eval.py --adapter_path $where --llm_model MODEL --vision_model ENCODER --output_dir results
```

## Limits

The model answers multiple-choice questions with the letter of an option, and explains it. It was scored on the
questions above alone. Explanations may be wrong where the answer is right, and the base model's biases are its own.
""")


@dataclass(frozen=True)
class Shared(FlagGroup):
    """The run that is shared, and the places that get it."""

    title: ClassVar[str] = "share"
    run: Path | None = flag(None, "folder of a run that is trained and scored", Role.RUN, positional=True, type=Path,
                            metavar="RUN")
    out: Path | None = flag(None, "folder to write", Role.RUN, required=True)
    push: str | None = flag(None, "uploads the folder to the Hugging Face hub, too", Role.RUN, metavar="USER/REPO")


def get_args_parser() -> Parser:
    return Parser("-m tools.publish", __doc__, Shared)


# --- What is shared ---

def without_paths(flags: Mapping[str, Any], declared: Mapping[str, Flag]) -> dict[str, Any]:
    """The flags without those that are folders of this machine; of a file or a folder that is a model, its name."""
    def shared(name: str) -> Any:
        value = flags[name]
        is_local = declared[name].optional_kind == FileName and not Repository.parse(value)
        return Path(value).name if is_local else value
    return {name: shared(name) for name in declared
            if flags.get(name) is not None and declared[name].optional_kind != PathText}


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries of a checkpoint but for its tensors and the state of training, in a form that JSON has."""
    settings: dict[str, Any] = {name: value for name, value in checkpoint.items()
                                if name not in ("model", "sha256", *OF_TRAINING)}
    settings["flags"] = without_paths(checkpoint.get("flags", {}), flags_of(*SHARED))
    return {**settings, "sha256": value_sha256({**settings, "model": checkpoint["model"]})}


def interval(run: Path) -> tuple[float, float]:
    """The interval of the run's accuracy, as fractions."""
    answers = read_answers(run / GENERATIONS)
    clusters = clusters_of([answer.cluster for answer in answers])
    return accuracy_interval(np.array([[answer.correct for answer in answers]]), clusters, None)


def card(name: str, where: str, checkpoint: Checkpoint, recipe: Mapping[str, Any], scores: Mapping[str, Any],
         limits: tuple[float, float], settings: Mapping[str, Any]) -> str:
    flags = settings["flags"]
    llm_model, vision_model = (str(flags.get(flag, "not recorded")) for flag in ("llm_model", "vision_model"))
    hub_model = Repository.parse(llm_model)
    columns = [column for column in scores["counts"] if scores[column] is not None]
    training = [f"`--{flag} {recipe[flag]}`" for flag in ("lr_schedule", "lr", "epochs", "dropout_prob", "dropout_var",
                                                          "adapter_dim", "prompt_format", "seed") if flag in recipe]
    return CARD.substitute(
        name=name, where=where, n_parameters=f"{sum(tensor.numel() for tensor in checkpoint['model'].values()):,}",
        base_model=f"base_model: {hub_model.id}\n" if hub_model else "", llm_model=llm_model, vision_model=vision_model,
        base_sha256=checkpoint.get("base_sha256", "not recorded"),
        vision_sha256=checkpoint.get("vision_sha256") or "not recorded", training=", ".join(training),
        n_questions=f"{scores['counts']['Avg']:,}", split=scores.get("split", "test"),
        decode="scored by the likelihood of each option" if scores.get("decode") == "score" else "answers written out",
        precision=scores.get("precision", "an unrecorded precision"), columns=" | ".join(columns),
        rules="|".join([" --: "] * len(columns)), accuracies=" | ".join(f"{scores[column]:.2f}" for column in columns),
        average=f"{scores['Avg']:.2f}", low=f"{100 * limits[0]:.2f}", high=f"{100 * limits[1]:.2f}")


def publish(run: Path, out: Path, name: str, where: str) -> None:
    """Writes the folder. where: the --adapter_path by which others load it. Raises UserError where the run is not
    scored, or its scores are of another checkpoint."""
    path = last_checkpoint(str(run))
    checkpoint: Any = read_adapters(path)
    if not (run / SCORES).is_file():
        raise UserError(f"{run} has no {SCORES}: score it with eval.py --adapter_path {run} first")
    scores = read_scores(run / SCORES)
    if scores.get("checkpoint") != path.name or scores.get("checkpoint_sha256") not in (None, sha256(path)):
        raise UserError(f"{run / SCORES} is of {scores.get('checkpoint')}, not of {path.name} as it is: score it with "
                        "eval.py first")
    settings, recipe = settings_of(checkpoint), read_recipe(run)
    with user_error_if_malformed(run / SCORES):
        text = card(name, where, checkpoint, recipe, scores, interval(run), settings)
    save_tensors(checkpoint["model"], out / SHARED_TENSORS)
    write_json(out / SHARED_SETTINGS, settings)
    write_json(out / RECIPE, {"recipe": recipe})
    write_json(out / SCORES, scores)
    write_text(out / "README.md", text)


def push(folder: Path, repository: str) -> str:
    """Uploads the folder; returns its address. Raises UserError where the hub refuses it."""
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Adapters of LaVIN")
        return f"{api.endpoint}/{repository}"
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"--push {repository}: the hub refuses it ({first_line(error)}): log in by hf auth login with "
                        f"a token that may write; {folder} stays") from error


def main(args: Flags) -> None:
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"--out {args.out} is not empty: name another folder")
    make_folder(args.out)
    publish(args.run, args.out, args.run.name, args.push or args.out.name)
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    if args.push:
        print(push(args.out, args.push))


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
