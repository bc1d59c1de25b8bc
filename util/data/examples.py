"""Tokenized examples: the ids of all of them in one array, from the node's cache.

As Python's integers, the ids of ScienceQA's 12,726 problems would take 150 MB in every process.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavin.runtime.console import progress_bar
from lavin.runtime.files import json_list_sha256, sha256
from lavin.tokenizer import IMAGE_SLOT, Example, Tokenizer
from util.data.cache import Arrays, Layout, cached


def tokenized(names: list[str], text: Callable[[str], tuple[str, str]], images: Mapping[str, Any],
              tokenizer: Tokenizer, n_prompt: int, max_seq_len: int, unit: str) -> dict[str, Example]:
    """Examples by name. text: prompt and answer of a name. images: of those that have one. unit: what they are."""
    def tokenize() -> Arrays:
        with progress_bar(names, unit) as bar:  # `with` closes the bar before an error message is printed
            return packed(tokenizer.example(*text(name), images.get(name), n_prompt, max_seq_len) for name in bar)

    arrays = cached("tokens", [sha256(Path(__file__)), tokenizer.fingerprint, n_prompt, max_seq_len, json_list_sha256(
        [*text(name), name in images] for name in names)], tokenize, layout(len(names)))
    ids, ends = memoryview(arrays["ids"].numpy()), arrays["ends"].tolist()
    return {name: Example(ids[start:end], answer_start, images.get(name)) for name, start, end, answer_start
            in zip(names, [0, *ends[:-1]], ends, arrays["answer_starts"].tolist(), strict=True)}


def layout(n: int) -> Layout:
    """The layout of n packed examples."""
    return {"ids": (torch.int32, (None,)), "ends": (torch.int64, (n,)), "answer_starts": (torch.int64, (n,))}


def packed(examples: Iterable[Example]) -> Arrays:
    """ids [sum of lengths] int32; for each example: ends, where it ends in them, and answer_starts."""
    ids, ends, answer_starts = array("i"), [], []
    for example in examples:
        ids.extend(example.ids)
        ends.append(len(ids))
        answer_starts.append(example.answer_start)
    return {"ids": torch.from_numpy(np.array(ids, np.int32)), "ends": torch.tensor(ends),
            "answer_starts": torch.tensor(answer_starts)}


def any_joined(tokenizer: Tokenizer, examples: Iterable[Example]) -> bool:
    """Whether an example had other ids in earlier versions, which tokenized prompt and answer as one text: it is tried
    with a few tokens at the end of the prompt and at the beginning of the answer."""
    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode([i for i in ids if i != IMAGE_SLOT])

    return any(tokenizer.joins(text(example.ids[max(0, start - 8):start]), text(example.ids[start:start + 8]))
               for example in examples for start in [example.answer_start])


def examples_sha256(examples: Mapping[str, Example]) -> str:
    """The checksum of what a run learns from: its recipe does not tell which pictures were bad, nor the tokenizer."""
    return json_list_sha256((name, list(example.ids), example.answer_start, example.image is None)
                            for name, example in examples.items())
