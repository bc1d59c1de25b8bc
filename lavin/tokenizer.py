"""The token layout of one example: BOS, image prefix, prompt, answer, EOS.

A prompt and its answer are two segments: no token spans both, so that generation begins with the very ids that training
has before the answer. A segment behind another one gets no space that SentencePiece puts before a text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from lavin import tokenizer_formats
from lavin.runtime.errors import UserError
from lavin.runtime.files import sha256
from lavin.weights.gguf import vocabulary as gguf
from lavin.weights.gguf.file import is_gguf, open_file

CODE = tuple(map(Path, (__file__, tokenizer_formats.__file__, gguf.__file__)))  # on which ids depend
IMAGE_SLOT = -1  # placeholder among token ids for an image embedding
# how prompt and answer become ids: a checkpoint states it, and one that does not had both tokenized as one text
TOKENIZATION = "prompt and answer apart"


@dataclass(frozen=True)
class Example:
    """One sample, without its modality token.

    ids: token ids, IMAGE_SLOT for each image embedding; a list, or a view of an array. answer_start: index of the first
    answer token (len(ids) where there is no answer). image: uint8 [3, S, S] or None.
    """

    ids: Sequence[int]
    answer_start: int
    image: torch.Tensor | None = None


class Tokenizer:
    """LLaMA's or Llama 3's `tokenizer.model`, a `tokenizer.json`, or the tokenizer in a GGUF file. Raises UserError
    where it is missing or broken.

    n_words: the size of the vocabulary. bos_id, eos_id: the ids of BOS and EOS. A model may have no BOS: bos_id is then
    None, and examples begin without it.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: put LLaMA's tokenizer.model there")
        self.path, self.model = path, tokenizer_formats.open_model(path)
        self.n_words, self.bos_id, self.eos_id = self.model.n_words, self.model.bos_id, self.model.eos_id

    @property
    def fingerprint(self) -> list:
        """The identity of everything that ids depend on: the file, BOS and EOS, the library and this code."""
        content = gguf.sha256(gguf.read_vocabulary(open_file(self.path))) if is_gguf(self.path) else sha256(self.path)
        return [content, self.bos_id, self.eos_id, self.model.library, *map(sha256, CODE)]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before + self.model.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def encode_segments(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of texts that follow each other, such as a prompt and its answer. Those of a text do not depend on
        the texts behind it."""
        segments: list[list[int]] = []
        for text in texts:
            segments.append((self.model.encode_continuation if any(segments) else self.model.encode)(text))
        return segments

    def joins(self, prompt: str, answer: str) -> bool:
        """Whether both would have other ids if they were tokenized as one text, as earlier versions did."""
        return self.encode(prompt + answer) != list(chain(*self.encode_segments([prompt, answer])))

    def prefix(self, n_slots: int) -> list[int]:
        """`[BOS] [Image: ]` and n_slots image slots, or `[BOS] [Image: N/A]` without any."""
        return self.encode("Image: " if n_slots else "Image: N/A", bos=True) + [IMAGE_SLOT] * n_slots

    def example(self, prompt: str, answer: str | None = None, image: torch.Tensor | None = None,
                n_prompt: int = 6, max_seq_len: int | None = None, history: Sequence[str] = ()) -> Example:
        """`[BOS] [Image: ] [n_prompt slots] prompt answer [EOS]`, or `[BOS] [Image: N/A] prompt answer [EOS]`.

        Truncated so that it fits max_seq_len with its modality token. Without an answer the example ends with the
        prompt, for generation. history: the segments of a conversation before the prompt.
        """
        prefix = self.prefix(0 if image is None else n_prompt)
        *before, answer_ids = self.encode_segments([*history, prompt, answer or ""])
        start = len(prefix) + sum(map(len, before))
        ids = [*prefix, *chain(*before), *answer_ids, *([] if answer is None else [self.eos_id])]
        limit = len(ids) if max_seq_len is None else max_seq_len - 1
        if limit <= len(prefix):
            raise UserError(f"--max_seq_len {max_seq_len} leaves no room for text behind the image: raise it")
        return Example(ids[:limit], min(start, limit), image)
