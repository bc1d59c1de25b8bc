"""Checksums of the frozen models' files: what a run was trained on, and what is loaded now.

There are two for each model: `base` and `vision`, of parts of the files, as every version has recorded them, and
`base_sha256` and `vision_sha256`, of their whole content, which earlier versions did not record.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavin.runtime.console import print_rank0
from lavin.runtime.files import sampled_sha256
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


def fingerprints(base: BaseSettings, tokenizer_path: str | None = None) -> dict[str, str | None]:
    """The checksums of LLaMA's files and its tokenizer's, and of the image encoder's."""
    files = base_files(base.llama_model_path, base.llm_model, tokenizer_path, base.use_vicuna)
    of_vit = vit_files(base.vision_model)
    return {"base": sampled_sha256(files), "vision": vision_fingerprint(base.vision_model),
            "base_sha256": files_sha256(files), "vision_sha256": files_sha256(of_vit) if of_vit else None}


def vision_fingerprint(vision_model: str) -> str:
    """The checksum of parts of a folder's or a file's content, or the name of a model on timm's hub."""
    path = model_path(vision_model, "--vision_model")
    if path.is_dir():
        return sampled_sha256([path / "config.json", *hf_weight_files(path)])
    return sampled_sha256([path]) if path.is_file() else vision_model


# --- Records ---

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
