"""LaVIN: modality token + image features + text -> loss or hidden states.

Notable:
- A batch is one packed row: the two modality tokens first, each a document of its own, then the samples. So there is no
  padding, no position attends to a modality token, and the whole batch shares two router inputs a layer.
- Parameters with `adapter` in their name are trained; all others are frozen, in the compute dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lavin.attention import HAS_TRITON, VarlenMetadata
from lavin.llama import Llama, LlamaConfig
from lavin.loss import answer_loss
from lavin.mm_adapter import (
    INIT_DEVICE,
    MODALITIES,
    AdaptedBlock,
    AdapterConfig,
    Routing,
    VisualProjection,
    adapt_llama,
    adapt_vit,
)
from lavin.routing_cache import RoutingCache
from lavin.runtime.device import stack_on_device, to_device
from lavin.tokenizer import IMAGE_SLOT, Example
from lavin.vision import VisionEncoder


@dataclass
class Batch:
    """Samples whose tokens are concatenated to N tokens.

    - ids [N]: token ids; 0 in image slots.
    - lengths: the number of tokens of each of the B samples.
    - modality [B]: 0 for text, 1 for an image.
    - images [I, 3, S, S] uint8: the images of the samples that have one, in order.
    - image_slots [I * n_prompt]: the rows that get image embeddings.
    - logit_indices [M]: the rows whose next token is predicted; targets [M]: those next tokens.
    - loss_weights [M] float32: the weight of each target in the loss.
    """

    ids: torch.Tensor
    lengths: list[int]
    modality: torch.Tensor
    images: torch.Tensor | None
    image_slots: torch.Tensor
    logit_indices: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor


def pack(examples: list[Example], loss_weights: list[float] | None = None, device="cpu") -> Batch:
    """Concatenates examples to a Batch. `loss_weights` has a weight for each example, which all its answer tokens get
    (default: 1).
    """
    ids, logit_indices, images, token_weights = [], [], [], []
    for example, weight in zip(examples, loss_weights or [1.0] * len(examples), strict=True):
        begin = len(ids)
        ids += example.ids
        logit_indices += range(begin + example.answer_start - 1, len(ids) - 1)
        token_weights += [weight] * (len(logit_indices) - len(token_weights))
        if example.image is not None:
            images.append(example.image)
    # through NumPy, which reads long lists five times as fast
    ids, logit_indices = (torch.from_numpy(np.array(numbers, dtype=np.int64)) for numbers in (ids, logit_indices))
    is_slot, modality = ids == IMAGE_SLOT, [int(example.image is not None) for example in examples]
    on_host = {"ids": ids.masked_fill(is_slot, 0), "modality": torch.tensor(modality),
               "image_slots": is_slot.nonzero()[:, 0], "logit_indices": logit_indices,
               "targets": ids[logit_indices + 1], "loss_weights": torch.tensor(token_weights, dtype=torch.float32)}
    tensors = zip(on_host, to_device(list(on_host.values()), device), strict=True)
    return Batch(lengths=[len(example.ids) for example in examples],
                 images=stack_on_device(images, device) if images else None, **dict(tensors))


class LaVIN(nn.Module):
    """LLaMA and a ViT, both frozen, with trained adapters inside them and a trained projection between them."""

    def __init__(self, config: LlamaConfig, vit: nn.Module, adapter: AdapterConfig, drop_path: float = 0.0):
        super().__init__()
        # replaced in lavin/fast/speed_up.py and lavin/weights/tensor_parallel.py
        self.answer_loss: Callable = answer_loss
        self.use_triton = HAS_TRITON  # in attention; set in lavin/fast/speed_up.py
        self.use_cuda_graphs = False  # in decoding; set in lavin/fast/captured_models.py
        self.llama = Llama(config, lambda config, layer: AdaptedBlock(config))
        self.vision = VisionEncoder(vit, adapter.n_prompt)
        self.attach(adapter, drop_path)

    def attach(self, adapter: AdapterConfig, drop_path: float = 0.0) -> None:
        """Makes fresh adapters, on INIT_DEVICE, in the place of those that are there, and forgets all that depends on
        these: the model is then as if it had just been built around its frozen parts.

        Raises ValueError for adapters that do not fit the model.
        """
        dim = self.llama.config.dim
        self.adapter = adapter
        self.vision.set_features(adapter.n_prompt)
        adapt_llama(self.llama, adapter, drop_path)
        adapt_vit(self.vision.vit, adapter)
        self.adapter_proj = VisualProjection(self.vision.width, adapter.hidden_proj, dim)
        self.adapter_modality_embedding = nn.Embedding(MODALITIES, dim, device=INIT_DEVICE)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = "adapter" in name
        self.routing_cache = RoutingCache(self.llama, self.adapter_modality_embedding)
        self.session: Any = None  # the latest generation session (lavin/generation/generate.py)
        self.set_gradient_checkpointing(False)
        self.train()

    @property
    def device(self):
        return self.adapter_modality_embedding.weight.device

    @property
    def dtype(self):
        return self.llama.tok_embeddings.weight.dtype

    def set_gradient_checkpointing(self, on: bool) -> None:
        self.llama.gradient_checkpointing = self.vision.gradient_checkpointing = on

    def embed(self, batch: Batch):
        """Returns the embeddings of the samples' tokens and images [N, D]."""
        x = self.llama.tok_embeddings(batch.ids)
        if batch.images is not None:
            features = self.vision(batch.images)  # [I, n_prompt, width]
            image_embeddings = self.adapter_proj(features.float()).flatten(0, 1).to(x.dtype)  # [I * n_prompt, D]
            x = x.index_put((batch.image_slots,), image_embeddings)
        return x

    def modality_tokens(self):
        """Returns the two modality tokens [2, D], which begin every packed row, and their modalities [2]."""
        return (self.adapter_modality_embedding.weight.to(self.dtype),
                torch.arange(MODALITIES, device=self.device))

    def attn_metadata(self, lengths: list[int]):
        """Returns the metadata of a packed row: two modality tokens, then samples of these lengths.

        Every sample's modality token is at position 0, so its first own token is at position 1.
        """
        return VarlenMetadata([1] * MODALITIES + lengths, self.device,
                              position_offsets=[0] * MODALITIES + [1] * len(lengths), use_triton=self.use_triton)

    def hidden_states(self, batch: Batch):
        """Returns the normalised last hidden states of the samples [N, D]."""
        tokens, token_modality = self.modality_tokens()
        attn_metadata = self.attn_metadata(batch.lengths)
        modality = torch.cat((token_modality, batch.modality))[attn_metadata.document_ids]  # [2 + N]
        x = torch.cat((tokens, self.embed(batch)))  # [2 + N, D]
        return self.llama(x, attn_metadata, Routing.from_modality(modality))[MODALITIES:]

    def forward(self, batch: Batch):
        """Returns the sum of the weighted cross-entropies of the answer tokens, a float32 scalar."""
        hidden = self.hidden_states(batch)[batch.logit_indices]
        return self.answer_loss(hidden, self.llama.output.weight, batch.targets, batch.loss_weights)

    @torch.no_grad()
    def prefill(self, batch: Batch, make_metadata=VarlenMetadata):
        """Returns `hidden_states` in inference. The routers read the routing cache, so the modality tokens are left
        out.

        `make_metadata` is VarlenMetadata, or a function with its arguments.
        """
        x = self.embed(batch)  # first: the GPU works on the images while the host prepares the rest
        attn_metadata = make_metadata(batch.lengths, self.device, position_offsets=[1] * len(batch.lengths),
                                      use_triton=self.use_triton)
        routing = Routing.from_modality(batch.modality[attn_metadata.document_ids], self.routing_cache.refresh(self))
        return self.llama(x, attn_metadata, routing)
