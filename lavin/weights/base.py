"""The base LLaMA: finds its files, opens them in the format of Meta, Hugging Face or GGUF, and adds Vicuna v0's delta.

A base model is a folder or a GGUF file: `--llama_model_path`/`--llm_model`, or `--llm_model` itself if that is a path,
or the name of a model on the hub.
All tensors are read, dequantized, concatenated and permuted on access, one at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lavin.llama import LlamaConfig
from lavin.runtime.errors import UserError
from lavin.weights.gguf.file import is_gguf
from lavin.weights.gguf_llama import open_gguf
from lavin.weights.hub import model_path
from lavin.weights.hugging_face import open_hugging_face
from lavin.weights.meta import open_meta
from lavin.weights.tensor_files import hf_weight_files

VOCAB_TENSORS = ("tok_embeddings.weight", "output.weight")  # one row for each token of the vocabulary


@dataclass(frozen=True)
class BaseWeights:
    """A LLaMA on disk. tensors: its tensors by our names. source: the name of its files in error messages."""

    config: LlamaConfig
    tensors: Mapping[str, torch.Tensor]
    source: str


# --- Formats ---

@dataclass(frozen=True)
class Format:
    """How the base model at a path, a folder or a file, is recognised and read.

    matches(path): whether the model has this format.
    files(path): the files that the weights are read from, also a required one that is missing. Raises UserError where
    it cannot tell.
    tokenizers(path): the places where the model may have a tokenizer of its own, the best first.
    open(path, vocab_size): the fields of BaseWeights. Raises UserError for broken files.
    """

    matches: Callable[[Path], bool]
    files: Callable[[Path], list[Path]]
    tokenizers: Callable[[Path], list[Path]]
    open: Callable[[Path, int], tuple[LlamaConfig, Mapping[str, torch.Tensor], str]]


def is_hugging_face(folder: Path) -> bool:
    """Folders of Mistral have params.json too, but no weights of Meta's format."""
    return (folder / "config.json").is_file() and not all(map(Path.is_file, required_of_meta(folder)))


def hugging_face_files(folder: Path) -> list[Path]:
    return [folder / "config.json", *hf_weight_files(folder)]


def required_of_meta(folder: Path) -> list[Path]:
    return [folder / "params.json", folder / "consolidated.00.pth"]


def meta_files(folder: Path) -> list[Path]:
    return list(dict.fromkeys([*required_of_meta(folder), *sorted(folder.glob("consolidated.*.pth"))]))


def tokenizers_in(folder: Path) -> list[Path]:
    return [folder / "tokenizer.model", folder / "tokenizer.json"]


GGUF = Format(matches=is_gguf, files=lambda path: [path], tokenizers=lambda path: [path],
              open=lambda path, vocab_size: open_gguf(path))
HUGGING_FACE = Format(matches=is_hugging_face, files=hugging_face_files, tokenizers=tokenizers_in,
                      open=lambda folder, vocab_size: open_hugging_face(folder))
META = Format(matches=lambda path: True, files=meta_files, tokenizers=tokenizers_in, open=open_meta)
FORMATS = (GGUF, HUGGING_FACE, META)  # the first that matches is taken


def find_format(path: Path) -> Format:
    return next(known for known in FORMATS if known.matches(path))


# --- The base model that the flags name ---

def base_path(llama_model_path: str, llm_model: str) -> Path:
    """A folder, or a GGUF file; a model of the hub is fetched, if it is not in the hub's cache."""
    path = Path(llama_model_path, llm_model)
    if is_base(path):
        return path
    own_path = model_path(llm_model, "--llm_model")
    return own_path if is_base(own_path) else path


def is_base(path: Path) -> bool:
    return path.is_dir() or (is_gguf(path) and path.is_file())


def find_tokenizer(llama_model_path: str, llm_model: str) -> Path:
    """The base model's own tokenizer, or LLaMA's in `llama_model_path`."""
    path = base_path(llama_model_path, llm_model)
    own = (candidate for candidate in find_format(path).tokenizers(path) if candidate.is_file())
    return next(own, Path(llama_model_path, "tokenizer.model"))


def find_delta(folder: Path, use_vicuna: bool) -> Path | None:
    """The folder of Vicuna's delta weights: `vicuna_NAME`, a sibling of LLaMA's folder `NAME`.

    None without --use_vicuna, and if `folder` holds Vicuna's full weights in Hugging Face's format. Raises UserError
    if there is neither.
    """
    delta = folder.with_name(f"vicuna_{folder.name}")
    if not use_vicuna or (find_format(folder) is HUGGING_FACE and not delta.is_dir()):
        return None
    if not delta.is_dir():
        raise UserError(f"--use_vicuna: no folder {delta}: put Vicuna's v0 delta there, or name a folder of Vicuna's "
                        "full weights with --llm_model")
    return delta


def require_base(llama_model_path: str, llm_model: str, tokenizer_path: str | None = None,
                 use_vicuna: bool = False) -> None:
    """Raises UserError that names the first missing file of a base model. Fast, to be called before slow work."""
    path = base_path(llama_model_path, llm_model)
    for file in (*find_format(path).files(path), Path(tokenizer_path or find_tokenizer(llama_model_path, llm_model))):
        if not file.is_file():
            raise UserError(f"missing {file}: put LLaMA's {file.name} there, "
                            "or name another place with --llama_model_path and --llm_model")
    delta = find_delta(path, use_vicuna)
    if delta:
        hf_weight_files(delta)


def base_files(llama_model_path: str, llm_model: str, tokenizer_path: str | None = None, use_vicuna: bool = False
               ) -> list[Path]:
    """Every file that the base LLaMA and its tokenizer are read from."""
    path = base_path(llama_model_path, llm_model)
    delta = find_delta(path, use_vicuna)
    files = [Path(tokenizer_path or find_tokenizer(llama_model_path, llm_model)), *find_format(path).files(path),
             *(hf_weight_files(delta) if delta else [])]
    return list(dict.fromkeys(files))  # a GGUF file is both


def open_base(path: Path, vocab_size: int, use_vicuna: bool = False) -> BaseWeights:
    """Opens a base model of any format. vocab_size: the size of the tokenizer's vocabulary, used where Meta's
    params.json says -1. Raises UserError for broken files."""
    base = BaseWeights(*find_format(path).open(path, vocab_size))
    delta = find_delta(path, use_vicuna)
    if is_delta(base):
        raise UserError(f"{base.source} holds a delta, not full weights: name the LLaMA that it belongs to with "
                        "--llm_model and add --use_vicuna, with the delta in a folder vicuna_NAME next to it")
    return apply_delta(base, BaseWeights(*open_hugging_face(delta))) if delta else base


# --- Vicuna v0 ---

def is_delta(weights: BaseWeights) -> bool:
    """The scales of a norm are far from 0 in full weights, and near 0 in a delta. Missing ones are reported later."""
    norm = weights.tensors.get("norm.weight")
    return norm is not None and norm.numel() > 0 and bool(norm.float().mean().abs() < 0.05)


class WeightsWithDelta(Mapping):
    """Maps names to base + delta, added in float32. The delta's extra vocabulary row, v0's [PAD], is dropped."""

    def __init__(self, base: BaseWeights, delta: BaseWeights):
        self.base, self.delta = base, delta

    def __iter__(self):
        return iter(self.base.tensors)

    def __len__(self):
        return len(self.base.tensors)

    def __getitem__(self, name):
        weight, delta = self.base.tensors[name], self.delta.tensors[name]
        if name in VOCAB_TENSORS:
            delta = delta[:len(weight)]
        if weight.shape != delta.shape:
            raise UserError(f"{self.delta.source}: {name} is {list(delta.shape)} and {self.base.source} has "
                            f"{list(weight.shape)}: it is the delta of another model")
        return weight.float() + delta.float()


def apply_delta(base: BaseWeights, delta: BaseWeights) -> BaseWeights:
    """Raises UserError if `delta` is of another model, or holds full weights."""
    unmatched = sorted(base.tensors.keys() ^ delta.tensors.keys())
    if unmatched:
        raise UserError(f"{delta.source} and {base.source} do not hold the same tensors ({unmatched[0]}): "
                        "it is the delta of another model")
    scales = [weights.tensors["norm.weight"].float().mean() for weights in (delta, base)
              if "norm.weight" in weights.tensors]
    if len(scales) == 2 and scales[0] > scales[1] / 2:
        raise UserError(f"--use_vicuna: {delta.source} holds full weights, not a delta: name it with --llm_model "
                        "and leave the flag out")
    return BaseWeights(base.config, WeightsWithDelta(base, delta), f"{base.source} + {delta.source}")
