"""Cheap checksums of the frozen models' files: what a run was trained on, and what is loaded now."""

from pathlib import Path

from lavin.runtime.files import sampled_sha256
from lavin.weights.base import base_files
from lavin.weights.tensor_files import hf_weight_files
from util.flags import BaseSettings


def fingerprints(base: BaseSettings, tokenizer_path: str | None = None) -> dict[str, str]:
    """The checksums `base`, of LLaMA's files and its tokenizer's, and `vision`, of the image encoder's."""
    files = base_files(base.llama_model_path, base.llm_model, tokenizer_path, base.use_vicuna)
    return {"base": sampled_sha256(files), "vision": vision_fingerprint(base.vision_model)}


def vision_fingerprint(vision_model: str) -> str:
    """The checksum of a folder's or a file's content, or the name of a model on timm's hub."""
    path = Path(vision_model)
    if path.is_dir():
        return sampled_sha256([path / "config.json", *hf_weight_files(path)])
    return sampled_sha256([path]) if path.is_file() else vision_model
