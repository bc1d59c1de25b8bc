"""The choice of the next token: greedy or nucleus sampling. Logits that are not finite give no token."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from lavin.runtime.errors import UserError

NOT_FINITE = -1  # in place of a token id: read with the ids, so that the check costs no wait for the GPU


class NotFinite(UserError):
    """The logits of some sequences hold a NaN or an infinity that a choice would depend on. `indices` says which
    sequences.
    """

    def __init__(self, indices: list[int], whose: str = ""):
        super().__init__(f"the model gives NaN{whose}: the weights or the adapters are broken")
        self.indices = indices


@contextmanager
def named_failures(names: list[str]) -> Iterator[None]:
    """Adds to a NotFinite that is raised inside which sequences it concerns. `names` has one name for each sequence."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(error.indices, f" for {', '.join(names[i] for i in error.indices[:8])}") from error


def refuse_not_finite(indices: Iterable[int]) -> None:
    """Raises NotFinite where there are `indices`, those of the sequences whose logits are not finite."""
    found = list(indices)
    if found:
        raise NotFinite(found)


def sampling_seed(seed: int, name: str) -> int:
    """Returns the seed of one question's draws, which depends on the --seed of the command and the question's name
    alone.

    It is a checksum of both, so that no question draws with one --seed what another question draws with another.
    """
    return zlib.crc32(f"{seed} {name}".encode())


def sampler(temperature: float, top_p: float, seeds: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that maps logits [B, V] to ids [B].

    It is greedy at temperature 0, and else samples from the nucleus (Holtzman et al. 2020, arXiv 1904.09751). An id is
    NOT_FINITE where a row has a NaN or an infinity, or nothing but -inf. `seeds` has one seed for each sequence, which
    draws from its own generator, so that it does not depend on the rest of the batch.
    """
    if temperature == 0:
        return greedy
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sample(logits):
        # the maximum is subtracted first, so that a small temperature, if float32 has it, cannot overflow
        probabilities = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
        # Sampled in vocabulary order: rounding may swap two tokens of almost equal probability in sorted order.
        nucleus = torch.zeros_like(probabilities).scatter(-1, order, ordered).cpu()
        ids = [torch.tensor([NOT_FINITE]) if row.isnan().any() else torch.multinomial(row, 1, generator=generator)
               for row, generator in zip(nucleus, generators, strict=True)]
        return torch.cat(ids).to(logits.device)

    return sample


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Returns the likeliest ids [B] for logits [B, V], with NOT_FINITE as in `sampler`."""
    ids = logits.argmax(-1, keepdim=True)  # of a NaN, where there is one
    return ids.masked_fill(~logits.gather(-1, ids).isfinite(), NOT_FINITE)[:, 0]
