"""SentencePiece or tokenizer.json, and the token layout of one example: BOS, image prefix, prompt, answer, EOS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from sentencepiece import SentencePieceProcessor
from typing_extensions import TypedDict

from lavin.runtime.errors import UserError
from lavin.runtime.schema import declared, read_validated

IMAGE_SLOT = -1  # placeholder among token ids for an image embedding

# a special token is text, or an object with its text; its id is a number, or a list whose first is the usual one
Token = Annotated[str | None, BeforeValidator(lambda token: token.get("content") if isinstance(token, dict) else token)]
TokenId = Annotated[int | None, BeforeValidator(lambda ids: ids[0] if isinstance(ids, list) and ids else ids)]


@declared
class TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json, or config.json in the same folder."""

    bos_token: Token
    eos_token: Token
    bos_token_id: TokenId
    eos_token_id: TokenId


@dataclass(frozen=True)
class Example:
    """One sample, without its modality token.

    ids: token ids, IMAGE_SLOT for each image embedding. answer_start: index of the first answer token (len(ids) where
    there is no answer). image: uint8 [3, S, S] or None.
    """

    ids: list[int]
    answer_start: int
    image: torch.Tensor | None = None


class SentencePiece:
    """LLaMA's `tokenizer.model`."""

    def __init__(self, path: Path):
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is no SentencePiece model: copy tokenizer.model again; Llama 3's is of another "
                            "kind: put its tokenizer.json from Hugging Face in its place") from error
        self.n_words, self.bos_id, self.eos_id = self.model.vocab_size(), self.model.bos_id(), self.model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path} has no BOS or no EOS token: take the tokenizer.model of the base model")
        self.encode, self.decode = self.model.encode, self.model.decode


class HuggingFaceTokenizer:
    """A `tokenizer.json`; BOS and EOS come from tokenizer_config.json or else config.json in the same folder."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{path} is read by Hugging Face's tokenizers: pip install tokenizers") from error
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(f"{path} is no tokenizer ({error}): fetch or copy it again") from error
        self.n_words = self.model.get_vocab_size()
        self.bos_id, self.eos_id = (self.special_id(path, name) for name in ("bos", "eos"))

    def special_id(self, path: Path, name: str) -> int:
        for file, key in (("tokenizer_config.json", f"{name}_token"), ("config.json", f"{name}_token_id")):
            config_path = path.with_name(file)
            config: Any = read_validated(config_path, TokenizerConfig) if config_path.is_file() else {}
            value = config.get(key)
            token_id = self.model.token_to_id(value) if isinstance(value, str) else value
            if token_id in range(self.n_words):
                return token_id
            if token_id is not None:
                raise UserError(f"{config_path}: {key}: {path.name} has no token {token_id}: fetch both again")
        raise UserError(f"{path}: neither tokenizer_config.json nor config.json in its folder names a {name.upper()} "
                        "token: copy them there")

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class Tokenizer:
    """LLaMA's `tokenizer.model`, or a `tokenizer.json`. Raises UserError where the file is missing or broken."""

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: put LLaMA's tokenizer.model there")
        self.model = (HuggingFaceTokenizer if path.suffix == ".json" else SentencePiece)(path)
        self.n_words, self.bos_id, self.eos_id = self.model.n_words, self.model.bos_id, self.model.eos_id

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.model.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def prefix(self, n_slots: int) -> list[int]:
        """`[BOS] [Image: ]` and n_slots image slots, or `[BOS] [Image: N/A]` without any."""
        return self.encode("Image: " if n_slots else "Image: N/A", bos=True) + [IMAGE_SLOT] * n_slots

    def example(self, prompt: str, answer: str | None = None, image: torch.Tensor | None = None,
                n_prompt: int = 6, max_seq_len: int | None = None) -> Example:
        """`[BOS] [Image: ] [n_prompt slots] prompt answer [EOS]`, or `[BOS] [Image: N/A] prompt answer [EOS]`.

        Prompt and answer are tokenized together. Truncated so that it fits max_seq_len with its modality token. Without
        an answer the example ends with the prompt, for generation.
        """
        prefix = self.prefix(0 if image is None else n_prompt)
        text = self.encode(prompt)
        if answer is None:
            ids, start = text, len(text)
        else:
            ids = self.encode(prompt + answer, eos=True)
            # a token that spans both belongs to the answer
            start = next((i for i, (a, b) in enumerate(zip(text, ids, strict=False)) if a != b), len(text))
        ids = [*prefix, *ids]
        limit = len(ids) if max_seq_len is None else max_seq_len - 1
        if limit <= len(prefix):
            raise UserError(f"--max_seq_len {max_seq_len} leaves no room for text behind the image: raise it")
        return Example(ids[:limit], min(len(prefix) + start, limit), image)
