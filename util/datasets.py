"""ScienceQA from its files: problems, captions, pictures, and the batches of each optimizer step.

Notable:
- Texts are tokenized once and pictures decoded once, before the first step: a bad file is known then, not an hour
  later, and no step waits for either.
- The samples of an optimizer step depend on seed and epoch alone; processes and micro-batches only share them out.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lavin.errors import UserError
from lavin.tokenizer import Example, Tokenizer
from util.files import read_json
from util.logging import progress
from util.prompts import OPTIONS, build_prompt

FIELDS = ("question", "choices", "answer", "hint", "image", "grade", "subject", "lecture", "solution")
PICTURE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on bad files


@dataclass
class ScienceQA:
    """One split: its problems by id, in the split's order, their captions, and what was left out."""

    root: Path
    problems: dict[str, dict]
    captions: dict[str, str]
    skipped: list[str] = field(default_factory=list)

    def picture_path(self, qid: str) -> Path | None:
        problem = self.problems[qid]
        return problem["image"] and self.root / "images" / problem.get("split", "") / qid / problem["image"]


def find_problems_file(root: Path) -> Path:
    """problems.json, or problem.json as some READMEs spell it."""
    other = root / "problem.json"
    return other if other.is_file() and not (root / "problems.json").is_file() else root / "problems.json"


def load_scienceqa(data_root: str, split: str, caption_file: str | None = None) -> ScienceQA:
    """Reads one split. Captions are read where a file is given.

    Raises UserError for files that are missing or broken, an unknown split, and problems that lack a field.
    """
    root = Path(data_root)
    path = find_problems_file(root)
    mend = "put ScienceQA's files there, or name their folder with --data_root"
    everything, splits = read_json(path, mend), read_json(root / "pid_splits.json", mend)
    if split not in splits:
        raise UserError(f"--split {split}: {root / 'pid_splits.json'} has {', '.join(splits)}")
    problems = {}
    for qid in splits[split]:
        if qid not in everything:
            raise UserError(f"{path} lacks problem {qid}, which pid_splits.json lists: the files belong to two data sets")
        problems[qid] = everything[qid]
        check_problem(path, qid, everything[qid])
    captions = read_json(caption_file, "name it with --caption_file") if caption_file else {}
    return ScienceQA(root, problems, captions.get("captions", {}))


def check_problem(path: Path, qid: str, problem: dict) -> None:
    missing = [name for name in FIELDS if name not in problem]
    if missing:
        raise UserError(f"{path}: problem {qid} lacks {', '.join(missing)}: fetch the file again")
    if not 2 <= len(problem["choices"]) <= len(OPTIONS):
        raise UserError(f"{path}: problem {qid} has {len(problem['choices'])} choices, not 2 to {len(OPTIONS)}: leave it out")
    if not 0 <= problem["answer"] < len(problem["choices"]):
        raise UserError(f"{path}: problem {qid} has no choice number {problem['answer']}: fetch the file again")


def load_picture(path: Path, size: int) -> torch.Tensor:
    """uint8 [3, size, size]: bicubic, aspect not kept."""
    with Image.open(path) as image:
        return to_tensor(image, size)


def to_tensor(image: Image.Image, size: int) -> torch.Tensor:
    pixels = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_pictures(data: ScienceQA, size: int, threads: int, skip_bad: bool) -> dict[str, torch.Tensor]:
    """Every picture of the split, by problem id.

    A picture that is missing or does not decode raises UserError, or, with skip_bad, takes its problem out of `data`.
    """
    paths = {qid: path for qid in data.problems if (path := data.picture_path(qid))}
    pictures = {}

    def load(item):
        try:
            return item[0], load_picture(item[1], size), None
        except PICTURE_ERRORS as error:
            return item[0], None, error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for qid, picture, error in progress(pool.map(load, paths.items()), "pictures", total=len(paths)):
            if error is None:
                pictures[qid] = picture
            elif skip_bad:
                data.skipped.append(qid)
                del data.problems[qid]
            else:
                reason = "is missing" if isinstance(error, FileNotFoundError) else f"does not decode ({error})"
                pool.shutdown(cancel_futures=True)
                raise UserError(f"picture {paths[qid]} {reason}: put it there, or leave such problems out with --skip_bad")
    if not data.problems:
        raise UserError(f"no problem is left in {data.root}: all pictures are missing or broken")
    return pictures


def build_example(data: ScienceQA, qid: str, picture: torch.Tensor | None, tokenizer: Tokenizer, prompt_format: str,
                  n_prompt: int, max_seq_len: int) -> Example:
    """One problem with its answer, as train.py sees it."""
    prompt, answer = build_prompt(data.problems[qid], prompt_format, data.captions.get(qid, ""))
    return tokenizer.example(prompt, answer, picture, n_prompt, max_seq_len)


def steps_per_epoch(n_examples: int, effective_batch: int) -> int:
    """Whole optimizer steps; the last, incomplete one is left out, as in the published runs."""
    return max(1, n_examples // effective_batch)


def epoch_batches(n_examples: int, batch_size: int, accum_iter: int, rank: int, world: int, seed: int, epoch: int
                  ) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For each optimizer step: all its sample indices, and this process's share as micro-batches."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_examples, generator=generator).tolist()
    effective = batch_size * accum_iter * world
    for step in range(steps_per_epoch(n_examples, effective)):
        everyone = order[step * effective:(step + 1) * effective]
        own = everyone[rank::world]
        yield everyone, [own[i:i + batch_size] for i in range(0, len(own), batch_size)]
