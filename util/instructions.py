"""Instruction tuning from all_data.json (tools/data_processing.py): texts in memory, pictures decoded step by step.

The 80,000 pictures of LLaVA-Instruct would take 12 GB decoded. They are decoded once before the first step, to know of
a bad file then, and again by a few threads for the step that needs them.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lavin.errors import UserError
from lavin.tokenizer import Example, Tokenizer
from util.datasets import PICTURE_ERRORS, load_picture
from util.files import read_json
from util.logging import progress, say

MEND = "make it with tools/data_processing.py, or name it with --data_path"


@dataclass(frozen=True)
class Picture:
    """Stands in an Example for a picture that is yet to be decoded to uint8 [3, size, size]."""

    path: Path
    size: int

    def decode(self) -> torch.Tensor:
        return load_picture(self.path, self.size)

    def fault(self) -> str | None:
        try:
            self.decode()
        except FileNotFoundError:
            return "is missing"
        except PICTURE_ERRORS as error:
            return f"does not decode ({error})"
        return None


def picture_path(data_root: str, record: dict) -> Path:
    """COCO's train2014, which LLaVA-Instruct names without prefix."""
    return Path(data_root, "images", "train2014", f"COCO_train2014_{record['image'].removeprefix('COCO_train2014_')}")


def read_records(path: Path) -> list[dict]:
    """Raises UserError where the file is not data_processing.py's."""
    try:
        records = read_json(path, MEND)["all"]
        whole = records and all(isinstance(r["instruction"], str) and isinstance(r["answer"], str) and "image" in r
                                for r in records)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is not the all_data.json of instruction tuning: {MEND}")
    return records


def check_pictures(pictures: list[Picture], threads: int) -> dict[Picture, str]:
    """What is wrong with those that do not decode."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        faults = progress(pool.map(Picture.fault, pictures), "pictures", total=len(pictures))
        return {picture: fault for picture, fault in zip(pictures, faults) if fault}


def load_instructions(args, tokenizer: Tokenizer, image_size: int) -> list[Example]:
    """The records of --data_path (all_data.json in --data_root), tokenized; `image` is a Picture.

    A picture that is missing or does not decode raises UserError, or, with --skip_bad, takes its records out.
    """
    records = read_records(Path(args.data_path or f"{args.data_root}/all_data.json"))
    pictures = {r["image"]: Picture(picture_path(args.data_root, r), image_size) for r in records if r["image"]}
    faults = check_pictures(list(pictures.values()), args.num_workers)
    if faults and not args.skip_bad:
        picture, fault = next(iter(faults.items()))
        raise UserError(f"picture {picture.path} {fault}; {len(faults)} of {len(pictures)} are so: put COCO's "
                        "train2014 there, or leave such records out with --skip_bad")
    kept = [r for r in records if not r["image"] or pictures[r["image"]] not in faults]
    if not kept:
        raise UserError(f"no record is left: all pictures in {args.data_root}/images/train2014 are missing or broken")
    examples = [tokenizer.example(r["instruction"], r["answer"], pictures.get(r["image"]), args.n_prompt,
                                  args.max_seq_len) for r in progress(kept, "records")]
    cut = sum(example.answer_start == len(example.ids) for example in examples)
    if cut == len(examples):
        raise UserError(f"--max_seq_len {args.max_seq_len} leaves no answer to learn from: raise it")
    say(f"{len(examples)} records, {sum(bool(r['image']) for r in kept)} with a picture, "
        f"{len(records) - len(kept)} left out for their picture"
        + (f", {cut} whose answer lies beyond --max_seq_len {args.max_seq_len}" if cut else ""))
    return examples


def with_pictures(examples: list[Example], threads: int = 4) -> list[Example]:
    """Examples whose pictures are decoded. Others than Picture's are left as they are."""
    waiting = {i: example.image for i, example in enumerate(examples) if isinstance(example.image, Picture)}
    if not waiting:
        return examples
    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = dict(zip(waiting, pool.map(Picture.decode, waiting.values())))
    return [replace(example, image=decoded.get(i, example.image)) for i, example in enumerate(examples)]
