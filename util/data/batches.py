"""The batches of each optimizer step, and the parts of them that processes take.

Which samples an optimizer step takes, and which of them are a micro-batch of the published loss, depends only on the
seed and the epoch, never on the number of processes: that only divides the samples.
"""

import math
from collections.abc import Iterator

import torch

PUBLISHED_GPUS = 4  # of the published runs


def steps_per_epoch(n_examples: int, effective_batch: int) -> int:
    """Complete optimizer steps; the last, incomplete one is dropped, as in the published runs."""
    return max(1, n_examples // effective_batch)


def balanced_parts(costs: list[float], n_parts: int) -> list[list[int]]:
    """The indices of `costs` in parts of nearly the same sum, whose sizes differ by at most 1; the larger parts first.

    Greedy (Graham 1969): the n most expensive go to a part each, then the next n, the most expensive of them to the
    part with the least so far.
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    sums = [0.0] * n_parts
    for start in range(0, len(order), n_parts or 1):
        cheapest_first = sorted(range(n_parts), key=sums.__getitem__)
        for part, i in zip(cheapest_first, order[start:start + n_parts], strict=False):
            parts[part].append(i)
            sums[part] += costs[i]
    return sorted(map(sorted, parts), key=lambda part: -len(part))


def micro_batches(batch: list[int], size: int) -> list[list[int]]:
    """The samples of an optimizer step in micro-batches of at most `size`, over each of which the published loss is a
    mean.

    Each of the 4 GPUs of the published runs took every fourth sample, so that 4 * size consecutive samples made
    4 micro-batches. With --seed 0, the order of samples is that of these runs, too (torch's DistributedSampler).
    """
    found = []
    for start in range(0, len(batch), PUBLISHED_GPUS * size):
        consecutive = batch[start:start + PUBLISHED_GPUS * size]
        n = math.ceil(len(consecutive) / size)
        found += [consecutive[i::n] for i in range(n)]
    return found


def epoch_batches(costs: list[float], effective_batch: int, rank: int, world: int, seed: int, epoch: int
                  ) -> Iterator[tuple[list[int], list[int]]]:
    """Yields, for each optimizer step, the indices of its samples, and of those that this rank takes.

    costs: the cost of each example. All ranks get parts of nearly the same cost, since in every step the slowest sets
    the pace.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(costs), generator=generator).tolist()
    for step in range(steps_per_epoch(len(costs), effective_batch)):
        global_batch = order[step * effective_batch:(step + 1) * effective_batch]
        part = balanced_parts([costs[i] for i in global_batch], world)[rank]
        yield global_batch, [global_batch[i] for i in part]
