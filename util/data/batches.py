"""Training examples, and the batches of each optimizer step.

Which samples an optimizer step takes depends only on the seed and the epoch, never on the number of processes or the
micro-batch size: those only divide the samples.
"""

from collections.abc import Iterator

import torch

from lavin.runtime.console import print_rank0, progress_bar
from lavin.runtime.errors import UserError
from lavin.tokenizer import Example, Tokenizer
from util.data.datasets import ScienceQA, load_scienceqa
from util.data.images import load_images
from util.data.instructions import load_instructions
from util.data.prompts import build_prompt


def build_example(data: ScienceQA, qid: str, image: torch.Tensor | None, tokenizer: Tokenizer, prompt_format: str,
                  n_prompt: int, max_seq_len: int) -> Example:
    """One problem with its answer, tokenized for training."""
    prompt, answer = build_prompt(data.problems[qid], prompt_format, data.captions.get(qid, ""))
    return tokenizer.example(prompt, answer, image, n_prompt, max_seq_len)


def load_examples(args, caption_file: str | None, tokenizer: Tokenizer, image_size: int) -> list[Example]:
    """The train split, tokenized, with decoded images; with --do_pretrain, the records of instruction tuning."""
    if args.do_pretrain:
        return load_instructions(args, tokenizer, image_size)
    data = load_scienceqa(args.data_root, "train", caption_file)
    images = load_images(data, image_size, args.num_workers, args.skip_bad)
    with progress_bar(data.problems, "problems") as bar:  # `with` closes the bar before an error message is printed
        examples = [build_example(data, qid, images.get(qid), tokenizer, args.prompt_format, args.n_prompt,
                                  args.max_seq_len) for qid in bar]
    n_truncated = sum(example.answer_start == len(example.ids) for example in examples)
    if n_truncated == len(examples):
        raise UserError(f"--max_seq_len {args.max_seq_len} leaves no answer to learn from: raise it")
    print_rank0(f"{len(examples)} problems, {len(images)} with a picture, "
                f"{len(data.skipped)} left out for their picture"
                + (f", {n_truncated} whose answer lies beyond --max_seq_len {args.max_seq_len}" if n_truncated else ""))
    return examples


def steps_per_epoch(n_examples: int, effective_batch: int) -> int:
    """Complete optimizer steps; the last, incomplete one is dropped, as in the published runs."""
    return max(1, n_examples // effective_batch)


def epoch_batches(n_examples: int, batch_size: int, accum_iter: int, rank: int, world: int, seed: int, epoch: int
                  ) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For each optimizer step: the indices of its global batch, and this rank's part of it as micro-batches."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_examples, generator=generator).tolist()
    effective_batch = batch_size * accum_iter * world
    for step in range(steps_per_epoch(n_examples, effective_batch)):
        global_batch = order[step * effective_batch:(step + 1) * effective_batch]
        local_batch = global_batch[rank::world]
        yield global_batch, [local_batch[i:i + batch_size] for i in range(0, len(local_batch), batch_size)]
