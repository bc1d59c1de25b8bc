"""Instruction tuning from all_data.json (tools/data_processing.py): all texts in memory, images decoded step by step.

The 80,000 images of LLaVA-Instruct would take 12 GB decoded. They are decoded once before the first step, to find bad
files early, and again, by a few threads, in the step that needs them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lavin.runtime.console import print_rank0, progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from lavin.tokenizer import Example, Tokenizer
from util.data.images import IMAGE_ERRORS, load_image

HINT = "make it with tools/data_processing.py, or name it with --data_path"


@dataclass(frozen=True)
class LazyImage:
    """An Example's image that is not decoded yet; `decode` gives uint8 [3, size, size]."""

    path: Path
    size: int

    def decode(self) -> torch.Tensor:
        return load_image(self.path, self.size)

    def problem(self) -> str | None:
        """What is wrong with the file, or None where it decodes."""
        try:
            self.decode()
        except FileNotFoundError:
            return "is missing"
        except IMAGE_ERRORS as error:
            return f"does not decode ({error})"
        return None


def image_path(data_root: str, record: dict) -> Path:
    """A file of COCO's train2014. LLaVA-Instruct leaves the prefix of its name out."""
    return Path(data_root, "images", "train2014", f"COCO_train2014_{record['image'].removeprefix('COCO_train2014_')}")


def read_records(path: Path) -> list[dict]:
    """Raises UserError where the file is not in the format that data_processing.py writes."""
    try:
        records = read_json(path, HINT)["all"]
        valid = records and all(isinstance(r["instruction"], str) and isinstance(r["answer"], str) and "image" in r
                                for r in records)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"{path} is not the all_data.json of instruction tuning: {HINT}")
    return records


def find_bad_images(images: list[LazyImage], threads: int) -> dict[LazyImage, str]:
    """The images that do not decode, each with what is wrong."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        problems = progress_bar(pool.map(LazyImage.problem, images), "pictures", total=len(images))
        return {image: problem for image, problem in zip(images, problems, strict=True) if problem}


def load_instructions(args, tokenizer: Tokenizer, image_size: int) -> list[Example]:
    """The records of --data_path (default: all_data.json in --data_root), tokenized; `image` is a LazyImage or None.

    An image that is missing or does not decode raises UserError. With --skip_bad, its records are left out instead.
    """
    records = read_records(Path(args.data_path or f"{args.data_root}/all_data.json"))
    images = {r["image"]: LazyImage(image_path(args.data_root, r), image_size) for r in records if r["image"]}
    bad_images = find_bad_images(list(images.values()), args.num_workers)
    if bad_images and not args.skip_bad:
        image, problem = next(iter(bad_images.items()))
        raise UserError(f"picture {image.path} {problem}; {len(bad_images)} of {len(images)} are so: put COCO's "
                        "train2014 there, or leave such records out with --skip_bad")
    kept = [r for r in records if not r["image"] or images[r["image"]] not in bad_images]
    if not kept:
        raise UserError(f"no record is left: all pictures in {args.data_root}/images/train2014 are missing or broken")
    examples = [tokenizer.example(r["instruction"], r["answer"], images.get(r["image"]), args.n_prompt,
                                  args.max_seq_len) for r in progress_bar(kept, "records")]
    n_truncated = sum(example.answer_start == len(example.ids) for example in examples)
    if n_truncated == len(examples):
        raise UserError(f"--max_seq_len {args.max_seq_len} leaves no answer to learn from: raise it")
    print_rank0(f"{len(examples)} records, {sum(bool(r['image']) for r in kept)} with a picture, "
                f"{len(records) - len(kept)} left out for their picture"
                + (f", {n_truncated} whose answer lies beyond --max_seq_len {args.max_seq_len}" if n_truncated else ""))
    return examples


def decode_images(examples: list[Example], threads: int = 4) -> list[Example]:
    """The examples with every LazyImage decoded; other images stay as they are."""
    lazy_images = {i: example.image for i, example in enumerate(examples) if isinstance(example.image, LazyImage)}
    if not lazy_images:
        return examples
    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = dict(zip(lazy_images, pool.map(LazyImage.decode, lazy_images.values()), strict=True))
    return [replace(example, image=decoded.get(i, example.image)) for i, example in enumerate(examples)]
