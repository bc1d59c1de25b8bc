"""The published recipe, written plainly: the floor that the benchmarks measure against.

Every sample padded to max_seq_len, attention scores materialised, the ViT on blank pictures for samples that have none,
logits at every position, nothing compiled. It computes with the same modules and weights as the rest.
"""

import torch
import torch.nn.functional as F

from lavin.model import LaVIN
from lavin.tokenizer import IMAGE_SLOT, Example

IGNORE = -100


class PaddedPlan:
    """B padded sequences of T tokens as B * T rows; nobody but itself sees the modality token at position 0."""

    def __init__(self, n: int, length: int, device):
        self.shape = (n, length)
        self.positions = torch.arange(length, device=device).repeat(n)
        mask = torch.full((length, length), float("-inf"), device=device).triu(1)
        mask[1:, 0] = float("-inf")
        self.mask = mask

    def attend(self, layer, query, key, value):
        query, key, value = (x.unflatten(0, self.shape).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + self.mask.to(query.dtype)
        out = scores.float().softmax(-1).to(query.dtype) @ value
        return out.transpose(1, 2).flatten(0, 1)


class PaddedRouting:
    """Each sequence is routed by its own modality token."""

    def __init__(self, shape):
        self.shape = shape

    def mixture(self, adapter, x):
        return adapter.mixture(x.unflatten(0, self.shape)[:, 0]).repeat_interleave(self.shape[1], 0)


def published_loss(model: LaVIN, examples: list[Example], max_seq_len: int) -> torch.Tensor:
    """Mean cross-entropy of a padded micro-batch."""
    n, device = len(examples), model.device
    ids = torch.zeros(n, max_seq_len, dtype=torch.long)
    labels = torch.full((n, max_seq_len), IGNORE)
    images = torch.zeros(n, 3, model.vision.image_size, model.vision.image_size, dtype=torch.uint8)
    for i, example in enumerate(examples):
        row = torch.tensor(example.ids)
        ids[i, 1:1 + len(row)] = row
        labels[i, 1 + example.answer_start:1 + len(row)] = row[example.answer_start:]
        if example.image is not None:
            images[i] = example.image
    ids, labels, images = ids.to(device), labels.to(device), images.to(device)
    modality = torch.tensor([int(example.image is not None) for example in examples], device=device)

    slots = ids == IMAGE_SLOT
    x = model.llama.tok_embeddings(ids.masked_fill(slots, 0))
    features = model.adapter_proj(model.vision(images).float()).to(x.dtype)
    x = x.index_put((slots,), features[modality.bool()].flatten(0, 1))
    x = torch.cat((model.adapter_modality_embedding(modality)[:, None].to(x.dtype), x[:, 1:]), 1)
    plan = PaddedPlan(n, max_seq_len, device)
    logits = model.llama.output(model.llama(x.flatten(0, 1), plan, PaddedRouting(plan.shape)))
    logits = logits.unflatten(0, plan.shape)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
