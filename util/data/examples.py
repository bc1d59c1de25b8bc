"""Training examples: problems of ScienceQA, or records of instruction tuning, as token ids with their pictures.

The ids of all examples lie in one array, which comes from the node's cache: as Python's integers, those of ScienceQA's
12,726 problems would take 150 MB in every process.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavin.runtime.console import counted, print_rank0, progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.files import json_list_sha256, sha256
from lavin.tokenizer import IMAGE_SLOT, Example, Tokenizer
from util.data.cache import Arrays, Layout, cached
from util.data.datasets import ScienceQA, load_scienceqa
from util.data.images import load_images
from util.data.instructions import Instructions, load_pictures, read_instructions
from util.data.prompts import build_prompt
from util.data.settings import TrainingData


def load_training_data(settings: TrainingData) -> ScienceQA | Instructions:
    """The train split, or with --do_pretrain the records of instruction tuning: read and checked, which is fast."""
    if settings.do_pretrain:
        return read_instructions(settings.data_root, settings.data_path)
    return load_scienceqa(settings.data_root, "train", settings.captions)


def load_examples(data: ScienceQA | Instructions, settings: TrainingData, tokenizer: Tokenizer, image_size: int,
                  n_prompt: int, threads: int) -> dict[str, Example]:
    """The tokenized examples by question id or, for instruction tuning, `record N`; ScienceQA's have decoded images.

    n_prompt: the number of image features. threads: the number of threads that decode pictures.
    """
    max_seq_len = settings.max_seq_len
    if isinstance(data, Instructions):
        examples = instruction_examples(data, tokenizer, image_size, n_prompt, max_seq_len, threads, settings.skip_bad)
        report("record", examples, len(data.records) - len(examples), max_seq_len)
        return examples

    def text(qid: str) -> tuple[str, str]:
        return build_prompt(data.problems[qid], settings.prompt_format, data.captions.get(qid, ""))

    images = load_images(data, image_size, threads, settings.skip_bad)
    examples = tokenized(list(data.problems), text, images, tokenizer, n_prompt, max_seq_len, "problems")
    report("problem", examples, len(data.bad_pictures), max_seq_len)
    return examples


def report(what: str, examples: dict[str, Example], bad_pictures: int, max_seq_len: int) -> None:
    """One line of counts. Raises UserError where truncation leaves no answer at all."""
    n_truncated = sum(example.answer_start == len(example.ids) for example in examples.values())
    if n_truncated == len(examples):
        raise UserError(f"--max_seq_len {max_seq_len} leaves no answer to learn from: raise it")
    n_pictures = sum(example.image is not None for example in examples.values())
    print_rank0(f"{counted(len(examples), what)}, {n_pictures} with a picture, {bad_pictures} dropped for a bad picture"
                + (f", {n_truncated} whose answer lies beyond --max_seq_len {max_seq_len}" if n_truncated else ""))


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


# --- Token ids ---

def tokenized(names: list[str], text: Callable[[str], tuple[str, str]], images: Mapping[str, Any],
              tokenizer: Tokenizer, n_prompt: int, max_seq_len: int, unit: str) -> dict[str, Example]:
    """Examples by name. text(name): prompt and answer. images: the images of examples that have one, by name. unit: a
    word for the examples, for the progress bar."""
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
    """Packs examples: ids [sum of lengths] int32 and, for each example, where it ends in them, and where its answer
    starts."""
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
