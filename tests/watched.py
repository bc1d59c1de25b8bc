"""Records what training does in each forward pass: its samples, loss weights, random draws and parameters."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lavin.model import LaVIN


@dataclass
class Pass:
    """One forward pass in training.

    samples: the token ids of each sample, in order. weights: the loss weights of each sample's answer tokens.
    draws: all random tensors, such as dropout masks. parameters: the trained parameters before the pass, by name.
    """

    samples: list[tuple[int, ...]]
    weights: list[list[float]]
    draws: list[torch.Tensor]
    parameters: dict[str, torch.Tensor]

    @property
    def first_draws(self) -> tuple[float, ...]:
        """The first numbers that the pass drew: two passes with equal masks have them in common."""
        return tuple(self.draws[0].flatten()[:8].tolist())


class Draws(TorchDispatchMode):
    """Records the result of every random operation of PyTorch, whichever of them the model uses."""

    def __init__(self, record: list[torch.Tensor]):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # attention has the tag too, since it could drop scores; LaVIN's does not, and returns several tensors
        if torch.Tag.nondeterministic_seeded in function.tags and isinstance(result, torch.Tensor):
            self.record.append(result.clone())
        return result


def sample_weights(batch) -> list[list[float]]:
    """The loss weights of each sample's answer tokens."""
    ends = torch.tensor(batch.lengths).cumsum(0)
    sample_of = torch.searchsorted(ends, batch.logit_indices, right=True).tolist()
    weights: list[list[float]] = [[] for _ in batch.lengths]
    for sample, weight in zip(sample_of, batch.loss_weights.tolist(), strict=True):
        weights[sample].append(weight)
    return weights


@contextmanager
def watched():
    """Yields the list of the passes that training makes in this context, which grows while it trains."""
    passes: list[Pass] = []
    forward = LaVIN.forward

    def watch(model, batch):
        if not model.training:
            return forward(model, batch)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        passes.append(Pass([tuple(ids.tolist()) for ids in batch.ids.split(batch.lengths)], sample_weights(batch), [],
                           parameters))
        with Draws(passes[-1].draws):
            return forward(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LaVIN, "forward", watch)
        yield passes
