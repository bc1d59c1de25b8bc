"""Instruction tuning from all_data.json (tools/data_processing.py): all texts in memory, images decoded step by step.

The 80,000 images of LLaVA-Instruct would take 12 GB decoded. They are decoded once before the first step, to find bad
files early, and again, by a few threads, in the step that needs them. Their checksums need no reading of their own: the
files lie in the system's page cache when they are decoded, and a later start only asks for their states.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from typing_extensions import TypedDict

from lavin.runtime.console import progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.files import json_list_sha256
from lavin.runtime.schema import NonBlankText, PlainName, declared, read_validated, validate
from lavin.tokenizer import Example, Tokenizer
from util.data.checksums import file_sha256s, named_files_sha256
from util.data.examples import tokenized
from util.data.images import IMAGE_ERRORS, image_fault, load_image, require_equal_ranks

HINT = "make it with python -m tools.data_processing, or name it with --data_path"


@declared
class Record(TypedDict):
    instruction: NonBlankText  # the whole prompt
    answer: NonBlankText
    image: PlainName | None


@declared
class AllData(TypedDict):
    all: Annotated[list[Any], Field(min_length=1)]  # of Record


@dataclass(frozen=True)
class Instructions:
    """The checked records of all_data.json, in their order. root: --data_root."""

    root: Path
    records: Sequence[Record]

    @property
    def picture_paths(self) -> dict[str, Path]:
        """The pictures, by the names that the records give them."""
        return {name: image_path(self.root, name) for record in self.records if (name := record["image"])}

    @property
    def pictures_sha256(self) -> str:
        """Equal for pictures of equal content, wherever they are stored."""
        return named_files_sha256(self.picture_paths)

    @property
    def fingerprint(self) -> str:
        """Equal for records of equal results."""
        return json_list_sha256([record["instruction"], record["answer"], record["image"]] for record in self.records)


@dataclass(frozen=True)
class LazyImage:
    """An Example's image that is not decoded yet; `decode` gives uint8 [3, size, size]."""

    path: Path
    size: int

    def decode(self) -> torch.Tensor:
        return load_image(self.path, self.size)

    def problem(self) -> str | None:
        """Says what is wrong with the file; None where it decodes."""
        try:
            self.decode()
        except IMAGE_ERRORS as error:
            return image_fault(error)
        return None


def image_path(root: Path, name: str) -> Path:
    """A file of COCO's train2014. LLaVA-Instruct leaves the prefix of its name out."""
    return root / "images" / "train2014" / f"COCO_train2014_{name.removeprefix('COCO_train2014_')}"


def read_instructions(data_root: str, data_path: str) -> Instructions:
    """The records of --data_path (default: all_data.json in --data_root). Raises UserError for other formats."""
    path = Path(data_path or f"{data_root}/all_data.json")
    records = read_validated(path, AllData, HINT, HINT)["all"]
    return Instructions(Path(data_root), [validate(record, Record, f"{path}: record {i}", HINT)
                                               for i, record in enumerate(records)])


def find_bad_images(images: list[LazyImage], threads: int) -> dict[LazyImage, str]:
    """The images that do not decode, each with what is wrong."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        problems = progress_bar(pool.map(LazyImage.problem, images), "pictures", total=len(images))
        return {image: problem for image, problem in zip(images, problems, strict=True) if problem}


def load_pictures(data: Instructions, size: int, threads: int, skip_bad: bool) -> dict[str, LazyImage]:
    """All pictures, by the name that the records give them; none is decoded yet, but each has been, as a trial.

    A picture that is missing or does not decode raises UserError, or is left out with skip_bad.
    """
    pictures = {name: LazyImage(path, size) for name, path in data.picture_paths.items()}
    bad_pictures = find_bad_images(list(pictures.values()), threads)
    if bad_pictures and not skip_bad:
        picture, problem = next(iter(bad_pictures.items()))
        raise UserError(f"picture {picture.path} {problem}; {len(bad_pictures)} of {len(pictures)} are so: put COCO's "
                        "train2014 there, or leave such records out with --skip_bad")
    good_pictures = {name: picture for name, picture in pictures.items() if picture not in bad_pictures}
    checksums = file_sha256s([picture.path for picture in good_pictures.values()])
    require_equal_ranks(dict(zip(good_pictures, checksums, strict=True)), "picture")
    return good_pictures


def instruction_examples(data: Instructions, tokenizer: Tokenizer, image_size: int, n_prompt: int, max_seq_len: int,
                         threads: int, skip_bad: bool) -> dict[str, Example]:
    """The records, tokenized; `image` is a LazyImage or None. With skip_bad, those of a bad picture are left out."""
    pictures = load_pictures(data, image_size, threads, skip_bad)
    kept = {f"record {i}": record for i, record in enumerate(data.records)
            if record["image"] is None or record["image"] in pictures}
    if not kept:
        raise UserError(f"no record is left: all pictures in {data.root}/images/train2014 are missing or broken")

    def text(name: str) -> tuple[str, str]:
        return kept[name]["instruction"], kept[name]["answer"]

    images = {name: pictures[record["image"]] for name, record in kept.items() if record["image"]}
    return tokenized(list(kept), text, images, tokenizer, n_prompt, max_seq_len, "records")


def decode_images(examples: list[Example], threads: int = 4) -> list[Example]:
    """The examples with every LazyImage decoded; other images stay as they are."""
    lazy_images = {i: example.image for i, example in enumerate(examples) if isinstance(example.image, LazyImage)}
    if not lazy_images:
        return examples
    with ThreadPoolExecutor(max(1, threads)) as pool:
        decoded = dict(zip(lazy_images, pool.map(LazyImage.decode, lazy_images.values()), strict=True))
    return [replace(example, image=decoded.get(i, example.image)) for i, example in enumerate(examples)]
