"""Cheap checksums of the frozen models' files: of what a run was trained on, and of what is loaded now."""

from pathlib import Path

from lavin.runtime.files import sampled_sha256
from lavin.weights.base import base_files
from lavin.weights.tensor_files import hf_weight_files


def fingerprints(args) -> dict[str, str]:
    """Of the files that the flags name: `base`, LLaMA's and its tokenizer's, and `vision`."""
    files = base_files(args.llama_model_path, args.llm_model, getattr(args, "tokenizer_path", None), args.use_vicuna)
    return {"base": sampled_sha256(files), "vision": vision_fingerprint(args.vision_model)}


def vision_fingerprint(vision_model: str) -> str:
    """Of a folder or a file, or the name of a model on timm's hub."""
    path = Path(vision_model)
    if path.is_dir():
        return sampled_sha256([path / "config.json", *hf_weight_files(path)])
    return sampled_sha256([path]) if path.is_file() else vision_model
