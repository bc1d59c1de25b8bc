"""Gradient accumulation: the samples of an optimizer step in forward-backward passes as large as GPU memory allows.

`loss_weights` averages the loss over micro-batches or over the whole step, however the samples are divided into passes.
"""

import gc
import math

import torch

from lavin.fast.captured_models import free_graphs
from lavin.model import pack
from lavin.runtime import distributed
from lavin.runtime.console import counted, print_rank0
from util.data.images import decode_images

PROBE_TOKENS = 2048  # size of the pass that measures the memory per token
MEMORY_FRACTION = 0.9  # of the GPU's memory, which passes may fill


def count_answer_tokens(examples: list) -> int:
    return sum(len(example.ids) - example.answer_start for example in examples)


def loss_weights(groups: list[list[int]], examples: list) -> dict[int, float]:
    """The weight of an answer token in the loss of an optimizer step, by the index of its sample.

    groups: the indices of all samples of the step, over all ranks, in groups. The loss is the mean over the groups of
    the mean over a group's answer tokens; a group without any has no mean, and does not count.
    """
    counts = [count_answer_tokens([examples[i] for i in group]) for group in groups]
    n_groups = sum(count > 0 for count in counts)
    return {i: 1 / (count * n_groups) if count else 0.0
            for group, count in zip(groups, counts, strict=True) for i in group}


def split_by_tokens(weighted_examples: list[tuple], max_tokens: float) -> list[list[tuple]]:
    """The samples, in order, in groups of at most `max_tokens` tokens, or of one sample that is longer.

    The loss weights do not depend on the groups, so the gradients are the same for any split.
    """
    groups: list[list[tuple]] = []
    tokens_left: float = 0
    for example, loss_weight in weighted_examples:
        if len(example.ids) > tokens_left:
            groups.append([])
            tokens_left = max_tokens
        groups[-1].append((example, loss_weight))
        tokens_left -= len(example.ids)
    return groups


def accumulate_gradients(model, weighted_examples: list[tuple], max_tokens: float, scaler) -> torch.Tensor:
    """Adds up the gradients of this rank's samples; returns this rank's part of the step's loss."""
    total = torch.zeros((), device=model.device)
    for group in split_by_tokens(weighted_examples, max_tokens):
        loss = model(pack([example for example, _ in group], [loss_weight for _, loss_weight in group], model.device))
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def accumulate_with_oom_retry(model, weighted_examples: list[tuple], max_tokens: float, scaler
                              ) -> tuple[torch.Tensor, float]:
    """`accumulate_gradients`; when GPU memory runs out, says so, and starts again with half of `max_tokens`.

    Returns the loss and the `max_tokens` that fit. They are not saved, since they are this GPU's: a run that goes on
    finds them anew.
    """
    while True:
        try:
            return accumulate_gradients(model, weighted_examples, max_tokens, scaler), max_tokens
        except torch.OutOfMemoryError:
            if distributed.model_parallel_size > 1:  # the ranks that share this model wait inside the failed pass
                raise
            if len(split_by_tokens(weighted_examples, max_tokens)) == len(weighted_examples):  # one sample per pass
                raise
        max_tokens = min(max_tokens, sum(len(example.ids) for example, _ in weighted_examples)) / 2
        print_rank0("GPU memory ran out: from now on, passes have at most "
                    f"{counted(int(max_tokens), 'token')}, which is slower")
        model.zero_grad(set_to_none=False)  # they are parts of flat ones
        free_graphs(model.llama, model.vision)
        gc.collect()  # frees what the failed pass held


def probe_max_tokens(model, examples: list, scaler) -> float:
    """The most tokens that a pass can have in this GPU's memory, extrapolated from a pass over the longest examples."""
    if model.device.type != "cuda":
        return math.inf
    # loss weights of 0: the probe must not leave gradients
    by_length = [(example, 0.0) for example in sorted(examples, key=lambda e: -len(e.ids))]
    longest = split_by_tokens(by_length, PROBE_TOKENS)[0]
    probe = [(example, 0.0) for example in decode_images([example for example, _ in longest])]
    memory_before = torch.cuda.memory_allocated(model.device)
    accumulate_gradients(model.train(), probe[-1:], math.inf, scaler)  # compiles, on one sample, in little memory
    torch.cuda.reset_peak_memory_stats(model.device)
    _, max_tokens = accumulate_with_oom_retry(model, probe, PROBE_TOKENS, scaler)
    if max_tokens < PROBE_TOKENS:
        return max_tokens
    memory_used = torch.cuda.max_memory_allocated(model.device) - memory_before
    memory_limit = MEMORY_FRACTION * torch.cuda.get_device_properties(model.device).total_memory
    return max(memory_limit - memory_before, 0) / memory_used * sum(len(example.ids) for example, _ in probe)
