"""The published recipe, written plainly: the floor that the benchmarks measure against.

Every sample padded, attention scores materialised, the ViT on blank pictures for samples that have none, logits at every
position, nothing compiled; answers written to their last token, from the shortest prompt of the batch on. It computes
with the same modules and weights as the rest.
"""

import torch
import torch.nn.functional as F

from lavin.model import LaVIN
from lavin.tokenizer import IMAGE_SLOT, Example

IGNORE = -100


class PaddedPlan:
    """Tokens `start` to `start + T` of B padded sequences, as B * T rows; nobody but itself sees the modality token.

    cache: keys and values of all positions so far, for every layer, or None where nothing came before.
    """

    def __init__(self, n: int, length: int, device, start: int = 0, cache: dict | None = None):
        self.shape, self.start, self.cache = (n, length), start, cache
        self.positions = torch.arange(start, start + length, device=device).repeat(n)
        mask = torch.full((length, start + length), float("-inf"), device=device).triu(start + 1)
        mask[1 if start == 0 else 0:, 0] = float("-inf")
        self.mask = mask

    def of(self, layer: int):
        return PaddedLayer(self, layer)


class PaddedLayer:
    def __init__(self, plan: PaddedPlan, layer: int):
        self.plan, self.layer = plan, layer

    def attend(self, query, key, value):
        query, key, value = (x.unflatten(0, self.plan.shape).transpose(1, 2) for x in (query, key, value))
        if self.plan.cache is not None:
            earlier = self.plan.cache.get(self.layer)
            if earlier is not None:
                key, value = torch.cat((earlier[0], key), 2), torch.cat((earlier[1], value), 2)
            self.plan.cache[self.layer] = key, value
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + self.plan.mask.to(query.dtype)
        out = scores.float().softmax(-1).to(query.dtype) @ value
        return out.transpose(1, 2).flatten(0, 1)


class PaddedRouting:
    """Each sequence is routed by its own modality token, at position 0; later tokens by what it was."""

    def __init__(self, shape, kept: dict | None = None):
        self.shape, self.kept = shape, kept

    def of(self, layer: int):
        return PaddedLayerRouting(self, layer)


class PaddedLayerRouting:
    def __init__(self, routing: PaddedRouting, layer: int):
        self.routing, self.layer = routing, layer

    def beside(self, name, adapter, x):
        kept, key = self.routing.kept, (self.layer, name)
        known = None if kept is None else kept.get(key)
        if known is None:
            known = adapter.mixture(x.unflatten(0, self.routing.shape)[:, 0])
        if kept is not None:
            kept[key] = known
        return known.repeat_interleave(self.routing.shape[1], 0),


def padded(model: LaVIN, examples: list[Example], length: int):
    """Ids with room for the modality token [B, length], labels likewise, embeddings [B, length, D]."""
    n, device = len(examples), model.device
    ids = torch.zeros(n, length, dtype=torch.long)
    labels = torch.full((n, length), IGNORE)
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
    return ids, labels, torch.cat((model.adapter_modality_embedding(modality)[:, None].to(x.dtype), x[:, 1:]), 1)


def published_loss(model: LaVIN, examples: list[Example], max_seq_len: int) -> torch.Tensor:
    """Mean cross-entropy of a padded micro-batch."""
    ids, labels, x = padded(model, examples, max_seq_len)
    plan = PaddedPlan(*ids.shape, model.device)
    logits = model.llama.output(model.llama(x.flatten(0, 1), plan, PaddedRouting(plan.shape)))
    logits = logits.unflatten(0, plan.shape)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


@torch.no_grad()
def published_answers(model: LaVIN, examples: list[Example], new_tokens: int) -> torch.Tensor:
    """Greedy ids [B, longest prompt + new_tokens]: one token a pass from the end of the shortest prompt on."""
    lengths = torch.tensor([1 + len(example.ids) for example in examples], device=model.device)
    ids, _, x = padded(model, examples, int(lengths.max()) + new_tokens)
    cache, kept, start = {}, {}, 0
    for end in range(int(lengths.min()), ids.shape[1]):
        plan = PaddedPlan(len(ids), end - start, model.device, start, cache)
        hidden = model.llama(x[:, start:end].flatten(0, 1), plan, PaddedRouting(plan.shape, kept))
        token = model.llama.output(hidden.unflatten(0, plan.shape)[:, -1]).float().argmax(-1)
        written = end >= lengths
        ids[written, end] = token[written]
        x[written, end] = model.llama.tok_embeddings(token[written])
        start = end
    return ids
