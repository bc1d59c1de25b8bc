"""Checksums of the frozen models' files: what a run was trained on, and what is loaded now.

There are two for each model: `base` and `vision`, of parts of the files, as every version has recorded them, and
`base_sha256` and `vision_sha256`, of their whole content, which earlier versions did not record.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavin.runtime import distributed
from lavin.runtime.console import print_rank0
from lavin.runtime.errors import UserError
from lavin.runtime.files import sampled_sha256
from lavin.tokenizer_formats import special_id_files
from lavin.weights.base import base_files
from lavin.weights.hub import model_path
from lavin.weights.tensor_files import hf_weight_files
from lavin.weights.vision import vit_files
from util.data.checksums import files_sha256
from util.flags import BaseSettings

FROZEN = {"base": "--llm_model", "vision": "--vision_model"}  # entry -> flag
FROZEN_SHA256 = {"base_sha256": "--llm_model", "vision_sha256": "--vision_model"}
# entries of recipes and scores on the content of files that earlier versions did not record
RECENT = ("pictures", *FROZEN_SHA256)


def frozen_files(base: BaseSettings, tokenizer_path: str | None = None) -> list[Path]:
    """Every file that LLaMA, its tokenizer and the image encoder are read from."""
    return [*with_special_ids(base_files(base.llama_model_path, base.llm_model, tokenizer_path, base.use_vicuna)),
            *vit_files(base.vision_model)]


def with_special_ids(files: list[Path]) -> list[Path]:
    """The files of a base, the first of which is the tokenizer's, with those that say its BOS and EOS."""
    return list(dict.fromkeys([*files, *special_id_files(files[0])]))


def fingerprints(base: BaseSettings, tokenizer_path: str | None = None) -> dict[str, str | None]:
    """The checksums of LLaMA's files and its tokenizer's, and of the image encoder's."""
    files = base_files(base.llama_model_path, base.llm_model, tokenizer_path, base.use_vicuna)
    return {"base": sampled_sha256(files), "vision": vision_fingerprint(base.vision_model),
            "base_sha256": files_sha256(with_special_ids(files)), **vision_sha256(base.vision_model)}


def vision_sha256(vision_model: str) -> dict[str, str | None]:
    files = vit_files(vision_model)
    return {"vision_sha256": files_sha256(files) if files else None}


def vision_fingerprint(vision_model: str) -> str:
    """The checksum of parts of a folder's or a file's content, or the name of a model on timm's hub."""
    path = model_path(vision_model, "--vision_model")
    if path.is_dir():
        return sampled_sha256([path / "config.json", *hf_weight_files(path)])
    return sampled_sha256([path]) if path.is_file() else vision_model


def with_fetched(record: dict[str, Any], vision_model: str) -> dict[str, Any]:
    """The record, with the checksum of an image encoder that timm has fetched since the record was made."""
    return {**record, **vision_sha256(vision_model)} if record["vision_sha256"] is None else record


# --- Records ---

def equal_on_all_nodes(make: Callable[[], dict[str, Any]], differences: Callable[[dict, dict], list[str]]
                       ) -> dict[str, Any]:
    """A record of what is read here, which one process of each node makes, of the node's own files: each node may have
    copies. Raises UserError, on all ranks, where one differs from that of rank 0.

    differences(record, other): the words for what differs.
    """
    (_, record), *others = distributed.from_each_node(make).items()
    for process, other in others:
        words = differences(other, record)
        if words:
            raise UserError(f"{process} reads something else than rank 0 ({'; '.join(words)}): give all nodes the same "
                            "files and GPUs")
    return record


def both_tell(name: str, record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records have an entry. None says that it is not known, as in records of earlier versions."""
    return None not in (record.get(name), other.get(name))


def is_comparable(name: str, record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes, or the scores of two evaluations, can differ in an entry.

    One that lacks an entry is of something else. Only entries of RECENT are compared where both tell them.
    """
    return name not in RECENT or both_tell(name, record, other)


def report_unrecorded(path: Path, record: Mapping[str, Any]) -> None:
    """Says so where a record is of an earlier version."""
    if not record.keys() >= set(RECENT):
        print_rank0(f"{path} is of an earlier version, which recorded no checksum of the pictures, and of the models' "
                    "files only of parts: whether the rest is the same cannot be told")
