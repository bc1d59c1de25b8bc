"""The choice of the next token: greedy or nucleus sampling."""

from collections.abc import Callable

import torch


def sampler(temperature: float, top_p: float, seeds: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function logits [B, V] -> ids [B]. Greedy at temperature 0, else nucleus sampling (Holtzman et al. 2020,
    arXiv 1904.09751).

    seeds: one for each sequence, which draws from its own generator, so that it does not depend on the rest of the
    batch.
    """
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(logits):
        probabilities = (logits / temperature).softmax(-1)
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
        # Sampled in vocabulary order: rounding may swap two tokens of almost equal probability in sorted order.
        nucleus = torch.zeros_like(probabilities).scatter(-1, order, ordered).cpu()
        ids = [torch.multinomial(row, 1, generator=generator)
               for row, generator in zip(nucleus, generators, strict=True)]
        return torch.cat(ids).to(logits.device)

    return sample
