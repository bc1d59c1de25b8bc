"""The mixture of experts that each row of a pass gets from the decoder's adapters, and its cache for generation.

The routers read the two modality tokens alone. So all that an adapter's router and projections compute depends only on
parameters, and generation computes it once for all answers (`RoutingCache`), where training does in every pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lavin.llama import Llama, rotary_by_layer

MODALITIES = 2  # text, image

# a layer's part of the cache: the adapter's name -> (mixtures [2, 2], *projections), see RepAdapterRouter.routed
LayerEntries = dict[str, tuple]


@dataclass
class LayerRouting:
    """The part of a Routing that one layer needs."""

    one_hot: torch.Tensor
    cache: LayerEntries | None

    def adapter_inputs(self, name: str, adapter: Any, x) -> tuple:
        """Returns the arguments of an adapter's forward besides x [N, D]: its mixture [N, 2] and its projections."""
        mixtures, *projections = adapter.routed(x[:MODALITIES]) if self.cache is None else self.cache[name]
        return self.one_hot @ mixtures, projections


@dataclass
class Routing:
    """The expert mixture of every row of a pass, by modality. It is the `routing` of lavin.llama.Llama.

    `one_hot` [N, 2] float32 is each row's modality: a matrix product with it selects mixtures, and its gradient is
    deterministic, unlike that of indexing. `cache` is a RoutingCache's `layers`. Without one, every layer computes its
    entries from rows 0 and 1, which must then be the two modality tokens (training).
    """

    one_hot: torch.Tensor
    cache: list[LayerEntries] | None = None

    @classmethod
    def from_modality(cls, modality: torch.Tensor, cache: list[LayerEntries] | None = None) -> "Routing":
        """Makes the routing of rows from their modality [N]: 0 for text, 1 for an image."""
        return cls(F.one_hot(modality, MODALITIES).float(), cache)

    def for_layer(self, layer: int) -> LayerRouting:
        return LayerRouting(self.one_hot, None if self.cache is None else self.cache[layer])


class RoutingCache:
    """The entries of all layers, computed from the parameters at the time of the last `refresh`.

    `refresh` writes new entries into the same tensors of `layers`, since captured passes read these.
    """

    def __init__(self, llama: Llama, modality_embedding: nn.Embedding):
        self.layers: list[LayerEntries] = []
        self.computed_from: list[tuple[int, int]] = []
        self.sources = [modality_embedding, *(part for name, part in llama.named_modules() if "adapter" in name)]

    def versions(self) -> list[tuple[int, int]]:
        """Returns the address of every tensor that the entries depend on, and PyTorch's count of the writes to it.

        Loading a checkpoint, an optimizer step and another scale or temperature change one or the other. Only a write
        through a parameter's `.data` does not, and goes unnoticed.
        """
        return [(tensor.data_ptr(), tensor._version) for part in self.sources
                for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]

    @torch.no_grad()
    def refresh(self, model) -> list[LayerEntries]:
        """Computes the entries of a LaVIN again where its adapters have changed. Returns `layers`."""
        versions = self.versions()
        if versions != self.computed_from:
            self.store(self.compute(model))
            self.computed_from = versions
        return self.layers

    @staticmethod
    def compute(model) -> list[LayerEntries]:
        """Computes the entries: the modality tokens alone go through the layers, one by one and not compiled, which
        would take longer.
        """
        x, modality = model.modality_tokens()
        one_hot, attn_metadata, layers = F.one_hot(modality, MODALITIES).float(), model.attn_metadata([]), []
        rotary = rotary_by_layer(model.llama.config, attn_metadata.position_ids)
        for i, layer in enumerate(model.llama.layers):
            x, entries = layer.route_modality_tokens(x, one_hot, rotary[i], attn_metadata.for_layer(i))
            layers.append(entries)
        return layers

    def store(self, layers: list[LayerEntries]) -> None:
        tensors, new_tensors = all_tensors(self.layers), all_tensors(layers)
        if [(t.dtype, t.device) for t in tensors] == [(t.dtype, t.device) for t in new_tensors]:
            torch._foreach_copy_(tensors, new_tensors)
        else:  # copies, since some are parameters where no cast is needed
            self.layers = [{name: tuple(tensor.clone() for tensor in entry) for name, entry in entries.items()}
                           for entries in layers]


def all_tensors(layers: list[LayerEntries]) -> list[torch.Tensor]:
    return [tensor for entries in layers for entry in entries.values() for tensor in entry]
