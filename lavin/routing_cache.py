"""The cache of the routers' mixtures, which generation computes once for all answers.

The decoder's routers read the two modality tokens alone. So all that an adapter's router and projections compute
depends only on parameters, and need not be computed in every pass as it is in training.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lavin.llama import Llama, rotary_by_layer
from lavin.mm_adapter import MODALITIES, LayerEntries


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
