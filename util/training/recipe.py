"""A run's recipe: everything that determines its result, on whatever machine and number of processes it runs.

Paths do not belong to it, but what they lead to does: the training problems, and a cheap checksum of the base's files.
"""

from pathlib import Path

import torch

from lavin.runtime.device import DTYPES
from lavin.runtime.errors import UserError
from lavin.runtime.files import sampled_sha256
from lavin.weights.base import base_folder, find_delta, find_tokenizer, is_hugging_face
from lavin.weights.tensor_files import hf_weight_files

# flags of where and how a run is executed
EXECUTION_FLAGS = {"device", "num_workers", "cpu_load", "model_parallel_size", "gradient_checkpointing", "output_dir",
                   "log_dir", "resume", "overwrite", "save_every_minutes", "keep_last"}
# flags that the recipe states in another form: by checksums, the learning rate, the dtype, the effective batch
RESTATED_FLAGS = {"llm_model", "llama_model_path", "vision_model", "data_root", "data_path", "caption_file", "blr",
                  "precision", "batch_size", "accum_iter"}
# entries of a recipe that are no flags, as a message calls them
DESCRIPTIONS = {"effective_batch": "effective batch (--batch_size x --accum_iter x processes)",
                "data": "training data of --data_root", "base": "files of --llm_model",
                "vision": "files of --vision_model"}


def make_recipe(args, dtype: torch.dtype, world: int, data) -> dict:
    """data: with a `fingerprint`. Raises UserError, or OSError, for files that cannot be read."""
    recipe = {name: value for name, value in vars(args).items() if name not in EXECUTION_FLAGS | RESTATED_FLAGS}
    if args.loss_norm == "microbatch":
        recipe["batch_size"] = args.batch_size  # its loss depends on the size of a micro-batch
    return {**recipe, "precision": next(name for name, known in DTYPES.items() if known == dtype),
            "effective_batch": args.batch_size * args.accum_iter * world, "data": data.fingerprint,
            "base": sampled_sha256(base_files(args)), "vision": vision_fingerprint(args.vision_model)}


def base_files(args) -> list[Path]:
    """Every file that the base LLaMA and its tokenizer are read from."""
    folder = base_folder(args.llama_model_path, args.llm_model)
    delta = find_delta(folder, args.use_vicuna)
    weights = ([folder / "config.json", *hf_weight_files(folder)] if is_hugging_face(folder)
               else [folder / "params.json", *sorted(folder.glob("consolidated.*.pth"))])
    return [find_tokenizer(args.llama_model_path, args.llm_model), *weights, *(hf_weight_files(delta) if delta else [])]


def vision_fingerprint(vision_model: str) -> str:
    """Of a folder or a file, or the name of a model on timm's hub."""
    path = Path(vision_model)
    if path.is_dir():
        return sampled_sha256([path / "config.json", *hf_weight_files(path)])
    return sampled_sha256([path]) if path.is_file() else vision_model


def differences(recipe: dict, other: dict) -> list[str]:
    """What of `recipe` is not as in `other`, each as words that begin with the flag."""
    lines = []
    for name in sorted(recipe.keys() | other.keys()):
        value, other_value = recipe.get(name), other.get(name)
        if value != other_value:
            lines.append(f"other {DESCRIPTIONS[name]}" if isinstance(value, str) and name in DESCRIPTIONS else
                         f"{DESCRIPTIONS.get(name, f'--{name}')} {value}, not {other_value}")
    return lines


def fit_effective_batch(args, effective_batch: int, world: int) -> None:
    """Sets batch_size and accum_iter, unless they were given, so that another number of processes makes the same steps.

    Raises UserError where it cannot.
    """
    sizes = [args.batch_size] if "batch_size" in args.given or args.loss_norm == "microbatch" else \
        range(args.batch_size, 0, -1)
    for size in sizes:
        if effective_batch % (size * world) == 0 and "accum_iter" not in args.given:
            args.batch_size, args.accum_iter = size, effective_batch // (size * world)
            return
    if args.batch_size * args.accum_iter * world != effective_batch:
        raise UserError(f"--resume {args.resume}: {world} processes cannot make its effective batch {effective_batch} "
                        f"of --batch_size {args.batch_size}: start another number of processes")
