"""The published recipe, implemented plainly: the baseline that the benchmarks compare with.

Every sample is padded, attention scores are materialised, the ViT also runs for samples without an image, on a blank
one, logits are computed at every position, and nothing is compiled. Decoding starts at the end of the batch's shortest
prompt and never stops early. The modules and weights are the model's own.
"""

import torch
import torch.nn.functional as F

from lavin.model import LaVIN
from lavin.tokenizer import IMAGE_SLOT, Example

IGNORE = -100


class PaddedMetadata:
    """Attention metadata of tokens `start` to `start + T` of B padded sequences, as B * T rows.

    Only the modality token itself attends to position 0. cache: layer -> keys and values of all earlier positions, or
    None in training.
    """

    def __init__(self, n: int, length: int, device, start: int = 0, cache: dict | None = None):
        self.shape, self.start, self.cache = (n, length), start, cache
        self.position_ids = torch.arange(start, start + length, device=device).repeat(n)
        mask = torch.full((length, start + length), float("-inf"), device=device).triu(start + 1)
        mask[1 if start == 0 else 0:, 0] = float("-inf")
        self.mask = mask  # [T, start + T]

    def for_layer(self, layer: int):
        return PaddedLayer(self, layer)


class PaddedLayer:
    def __init__(self, attn_metadata: PaddedMetadata, layer: int):
        self.shape, self.mask, self.cache, self.layer = (attn_metadata.shape, attn_metadata.mask, attn_metadata.cache,
                                                         layer)

    def attend(self, query, key, value):
        query, key, value = (x.unflatten(0, self.shape).transpose(1, 2) for x in (query, key, value))  # [B, H, T, d]
        if self.cache is not None:
            if self.layer in self.cache:
                key, value = (torch.cat(pair, 2) for pair in zip(self.cache[self.layer], (key, value), strict=True))
            self.cache[self.layer] = key, value
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5 + self.mask.to(query.dtype)
        out = scores.float().softmax(-1).to(query.dtype) @ value
        return out.transpose(1, 2).flatten(0, 1)


class PaddedRouting:
    """Routes each sequence by its own modality token, at position 0. cache: its mixtures, kept for later tokens."""

    def __init__(self, shape, cache: dict | None = None):
        self.shape, self.cache = shape, cache

    def for_layer(self, layer: int):
        return PaddedLayerRouting(self, layer)


class PaddedLayerRouting:
    def __init__(self, routing: PaddedRouting, layer: int):
        self.shape, self.cache, self.layer = routing.shape, routing.cache, layer

    def adapter_inputs(self, name, adapter, x):
        key = self.layer, name
        mixture = None if self.cache is None else self.cache.get(key)
        if mixture is None:
            mixture = adapter.mixture(x.unflatten(0, self.shape)[:, 0])
        if self.cache is not None:
            self.cache[key] = mixture
        return mixture.repeat_interleave(self.shape[1], 0),


def pad_batch(model: LaVIN, examples: list[Example], length: int):
    """Ids and labels [B, length], embeddings [B, length, D]; position 0 is the modality token's."""
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

    is_slot = ids == IMAGE_SLOT
    x = model.llama.tok_embeddings(ids.masked_fill(is_slot, 0))
    features = model.adapter_proj(model.vision(images).float()).to(x.dtype)  # [B, n_prompt, D]
    x = x.index_put((is_slot,), features[modality.bool()].flatten(0, 1))
    return ids, labels, torch.cat((model.adapter_modality_embedding(modality)[:, None].to(x.dtype), x[:, 1:]), 1)


def published_loss(model: LaVIN, examples: list[Example], max_seq_len: int) -> torch.Tensor:
    """Mean cross-entropy of a padded micro-batch."""
    ids, labels, x = pad_batch(model, examples, max_seq_len)
    n, length = ids.shape
    hidden = model.llama(x.flatten(0, 1), PaddedMetadata(n, length, model.device), PaddedRouting(ids.shape))
    logits = model.llama.output(hidden).unflatten(0, ids.shape)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


@torch.no_grad()
def published_answers(model: LaVIN, examples: list[Example], new_tokens: int) -> torch.Tensor:
    """Greedy ids [B, longest prompt + new_tokens]: one token per step, starting at the end of the shortest prompt."""
    lengths = torch.tensor([1 + len(example.ids) for example in examples], device=model.device)
    ids, _, x = pad_batch(model, examples, int(lengths.max()) + new_tokens)
    kv_cache, mixtures, start = {}, {}, 0
    for end in range(int(lengths.min()), ids.shape[1]):
        attn_metadata = PaddedMetadata(len(ids), end - start, model.device, start, kv_cache)
        routing = PaddedRouting(attn_metadata.shape, mixtures)
        hidden = model.llama(x[:, start:end].flatten(0, 1), attn_metadata, routing)
        token = model.llama.output(hidden.unflatten(0, attn_metadata.shape)[:, -1]).float().argmax(-1)
        is_answer = end >= lengths  # longer prompts keep their own token at this position
        ids[is_answer, end] = token[is_answer]
        x[is_answer, end] = model.llama.tok_embeddings(token[is_answer])
        start = end
    return ids
