"""Answers: ragged prefill into a key/value cache, batched decoding, option scoring.

Notable:
- Prefill is training's forward pass, which fills the cache on its way; decoding adds one row a sequence. Both give the
  logits of the full forward.
- A sequence's answer does not depend on its batch mates, sampled or not: each sequence draws from its own generator.
- The modality token needs no cache: all that it does is in the routing table that prefill fills in.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from lavin.errors import UserError
from lavin.llama import LlamaConfig, PackedPlan
from lavin.mm_adapter import Routing
from lavin.model import MODALITIES, LaVIN, pack
from lavin.tokenizer import Example, Tokenizer

STEPS_BEFORE_GRAPH = 8  # short answers end before a CUDA graph of the step would pay


class KVCache:
    """Keys and values [L, B, H_kv, T, d] of B sequences, and how much of each is filled [B]."""

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, device, dtype):
        capacity += -capacity % 64  # what attention's kernels like best
        shape = (config.n_layers, batch_size, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)


class PrefillPlan(PackedPlan):
    """The packed row of training, in which the samples' keys and values fill the cache."""

    def __init__(self, cache: KVCache, *layout, **starts):
        super().__init__(*layout, **starts)
        self.cache = cache
        self.sequences, self.slots = self.documents[MODALITIES:] - MODALITIES, self.places[MODALITIES:]
        cache.lengths += self.offsets.diff()[MODALITIES:]

    def of(self, layer: int):
        return PrefillLayer(self, self.cache.keys[layer], self.cache.values[layer])


@dataclass
class PrefillLayer:
    plan: PrefillPlan
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, query, key, value):
        self.keys[self.plan.sequences, :, self.plan.slots] = key[MODALITIES:]
        self.values[self.plan.sequences, :, self.plan.slots] = value[MODALITIES:]
        return self.plan.attend(query, key, value)


class DecodePlan:
    """One new token for every sequence of the cache."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.slots = cache.lengths.clone()
        self.positions = self.slots + 1
        self.documents = torch.arange(len(self.slots), device=self.slots.device)
        self.mask = (torch.arange(cache.keys.shape[3], device=self.slots.device) <= self.slots[:, None])[:, None, None]
        cache.lengths += 1

    def of(self, layer: int):
        return DecodeLayer(self, self.cache.keys[layer], self.cache.values[layer])


@dataclass
class DecodeLayer:
    plan: DecodePlan
    keys: torch.Tensor
    values: torch.Tensor

    def attend(self, query, key, value):
        self.keys[self.plan.documents, :, self.plan.slots] = key
        self.values[self.plan.documents, :, self.plan.slots] = value
        out = F.scaled_dot_product_attention(query[:, :, None], self.keys, self.values, attn_mask=self.plan.mask,
                                             enable_gqa=query.shape[1] != key.shape[1])
        return out[:, :, 0]


@torch.no_grad()
def decode(model: LaVIN, examples: list[Example], max_new_tokens: int,
           choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the next token ids [B] of all sequences, `max_new_tokens` times; the caller may stop before.

    choose: logits [B, V] float32 -> ids [B].
    """
    batch = pack(examples).to(model.device)
    cache = KVCache(model.llama.config, len(examples), max(batch.lengths) + max_new_tokens, model.device, model.dtype)
    table = [{} for _ in model.llama.layers]
    hidden = model.hidden_states(batch, partial(PrefillPlan, cache), table)
    logits = model.llama.output(hidden[cache.lengths.cumsum(0) - 1]).float()
    routing = Routing(batch.modality, table)

    def step(ids):
        return model.llama.output(model.llama(model.llama.tok_embeddings(ids), DecodePlan(cache), routing)).float()

    for i in range(max_new_tokens):
        ids = choose(logits)
        yield ids
        if i == STEPS_BEFORE_GRAPH and model.device.type == "cuda" and model.records_graphs:
            step = as_graph(step, ids)
        if i + 1 < max_new_tokens:
            logits = step(ids)


def as_graph(step: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same step, launched as one CUDA graph: at small batches the host is slower than the GPU."""
    graph, given = torch.cuda.CUDAGraph(), ids.clone()
    with torch.cuda.graph(graph):
        logits = step(given)

    def replay(ids):
        given.copy_(ids)
        graph.replay()
        return logits

    return replay


def sampler(temperature: float, top_p: float, seeds: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Greedy at temperature 0; else nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751), one seed a sequence."""
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits):
        probabilities = (logits / temperature).softmax(-1)
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > top_p, 0)
        # drawn in the vocabulary's order, since rounding may swap two tokens of almost the same probability
        kept = torch.zeros_like(probabilities).scatter(-1, order, ordered).cpu()
        picks = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(kept, generators)]
        return torch.cat(picks).to(logits.device)

    return choose


def generate(model: LaVIN, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int,
             is_complete: Callable[[str], bool] = lambda text: False, temperature: float = 0.0, top_p: float = 1.0,
             seeds: list[int] | None = None) -> list[str]:
    """Continues each example to EOS, to a text that `is_complete`, or by `max_new_tokens`. Returns the new texts."""
    model.eval()
    written: list[list[int]] = [[] for _ in examples]
    texts = [""] * len(examples)
    open_ = set(range(len(examples)))
    for ids in decode(model, examples, max_new_tokens, sampler(temperature, top_p, seeds or [0] * len(examples))):
        for i, token in enumerate(ids.tolist()):
            if i not in open_:
                continue
            if token != tokenizer.eos_id:
                written[i].append(token)
                texts[i] = tokenizer.decode(written[i])
            if token == tokenizer.eos_id or is_complete(texts[i]):
                open_.remove(i)
        if not open_:
            break
    return texts


def option_example(tokenizer: Tokenizer, prompt: str, options: list[str], **layout) -> tuple[Example, list[int]]:
    """The longest start that all answers `options` to a prompt share, and each option's next token.

    layout: image and n_prompt, as for Tokenizer.example. Raises UserError where two options go on alike.
    """
    ids = [tokenizer.example(prompt, option, **layout).ids for option in options]
    shared = next(i for i, tokens in enumerate(zip(*ids)) if len(set(tokens)) > 1)
    tokens = [row[shared] for row in ids]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"this tokenizer does not tell the options {options} apart by one token: use the base model's own")
    return Example(ids[0][:shared], shared, layout.get("image")), tokens


@torch.no_grad()
def score_options(model: LaVIN, questions: list[tuple[Example, list[int]]]) -> list[list[float]]:
    """Log-probabilities of each question's options, from one prefill. questions: see `option_example`."""
    model.eval()
    logits = next(decode(model, [example for example, _ in questions], 1, lambda logits: logits))
    return [row[tokens].log_softmax(-1).tolist() for row, (_, tokens) in zip(logits, questions)]
