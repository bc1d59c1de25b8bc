"""The records of instruction tuning, from all_data.json (tools/data_processing.py), and their pictures.

The 80,000 pictures of LLaVA-Instruct would take 12 GB decoded. They are decoded once before the first step, to find bad
files early, and again in the step that needs them (`decode_images` in images.py), where their pixels must be the same.
One process of each node reads the files for their checksums, and the decoder finds them in the system's page cache.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from lavin.runtime.console import progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.files import json_list_sha256
from lavin.runtime.schema import NonBlankText, PlainName, declared, read_validated, validate
from util.data.checksums import named_files_sha256
from util.data.images import LazyImage, require_equal_ranks

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
    """The checked records of all_data.json, in their order. root: the folder of --data_root."""

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
        problems = progress_bar(pool.map(LazyImage.problem, images), "pictures", total=len(images), unit="picture")
        return {image: problem for image, problem in zip(images, problems, strict=True) if problem}


def load_pictures(data: Instructions, size: int, threads: int, skip_bad: bool) -> dict[str, LazyImage]:
    """All pictures, by the name that the records give them; none is decoded yet, but each has been, as a trial.

    A picture that is missing or does not decode raises UserError, or is left out with skip_bad.
    """
    pictures = {name: LazyImage(path, size) for name, path in data.picture_paths.items()}
    bad_pictures = find_bad_images(list(pictures.values()), threads)
    if bad_pictures and not skip_bad:
        picture, problem = next(iter(bad_pictures.items()))
        raise UserError(f"picture {picture.path} {problem} ({len(bad_pictures):,} of {len(pictures):,} in all): put "
                        "COCO's train2014 there, or leave such records out with --skip_bad")
    good_pictures = {name: picture for name, picture in pictures.items() if picture not in bad_pictures}
    require_equal_ranks(dict.fromkeys(good_pictures), "picture")
    return good_pictures
