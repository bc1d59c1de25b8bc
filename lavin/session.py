"""Where answers are written, to one batch after another: cache, routing, prefill and the step that adds a token.

Notable:
- Prefill is training's forward pass, which fills the cache on its way; a step adds one row a sequence. Both give the
  logits of the full forward.
- The modality token needs no cache: all that it does is in the routing table that prefill fills in, with the adapters'
  matrices, which a step need not prepare again.
- All stays where it is, so that the GPU can repeat steps and short prefills as one launch (lavin/recording.py).
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from lavin.llama import LlamaConfig, PackedPlan
from lavin.mm_adapter import Routing
from lavin.model import MODALITIES, Batch, LaVIN, pack
from lavin.precision import send
from lavin.recording import graph_pool, record
from lavin.tokenizer import Example

PLAIN_STEPS = 8  # that a session takes before it records one: the first compile, and short answers need no more
PREFILL_STEP = 64  # tokens; to a multiple of it a recorded prefill is filled up
MOST_RECORDED = 1024  # tokens of a prefill to be recorded: a longer one keeps the GPU busy by itself


class KVCache:
    """Keys and values [L, B, H_kv, T, d] of B sequences, and how much of each is filled [B]."""

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, device, dtype):
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


class Prefill:
    """The prefill of one sequence, for all prompts of up to `rows` tokens and as many pictures as `batch` has.

    A shorter prompt is filled up behind its end, where nothing sees it before a decoded token takes its place.
    """

    def __init__(self, session: "Session", batch: Batch, rows: int):
        device = batch.ids.device
        self.batch = replace(batch, ids=torch.zeros(rows, dtype=torch.long, device=device), lengths=[rows])
        self.lengths = torch.zeros_like(session.cache.lengths)
        self.plan = session.plan(self.batch.lengths)  # kept, as the rest is, since a graph reads it
        self.times, self.recorded = 0, None

    def __call__(self, session: "Session", batch: Batch, lengths: torch.Tensor) -> None:
        self.lengths.copy_(lengths)
        self.batch.ids[:len(batch.ids)].copy_(batch.ids)
        self.batch.modality.copy_(batch.modality)
        self.batch.slots.copy_(batch.slots)
        if batch.images is not None:
            self.batch.images.copy_(batch.images)
        run = partial(session.run_prefill, self.batch, self.plan, self.lengths)
        if self.times == 1:  # the first may have to compile
            self.recorded = record(run, self.lengths.device, session.pool)
        self.times += 1
        (self.recorded or run)()


class Session:
    """Answers `batch_size` sequences of at most `capacity` tokens at a time."""

    def __init__(self, model: LaVIN, batch_size: int, capacity: int):
        config, device = model.llama.config, model.device
        # a conversation grows, and a long cache for one sequence costs little
        self.capacity = capacity + -capacity % max(64, 512 // batch_size)
        self.model, self.made_for = model, self.what(model, batch_size)
        self.cache = KVCache(config, batch_size, self.capacity, device, model.dtype)
        self.ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch_size, config.vocab_size, device=device)
        self.routing, self.pool = None, graph_pool(device)
        self.prefills = {}
        self.steps, self.recorded_step = 0, None

    @staticmethod
    def what(model: LaVIN, batch_size: int) -> tuple:
        """All that a session hangs on beside the values of parameters; answers know no dropout."""
        adapter = replace(model.adapter, dropout_prob=0.0, dropout_var=1.0, dropout_lim=0.0)
        return batch_size, adapter, model.device, model.dtype

    def fits(self, model: LaVIN, batch_size: int, capacity: int) -> bool:
        return self.made_for == self.what(model, batch_size) and capacity <= self.capacity

    def plan(self, lengths: list[int]) -> PrefillPlan:
        return self.model.plan(lengths, partial(PrefillPlan, self.cache))

    def run_prefill(self, batch: Batch, plan: PrefillPlan, lengths: torch.Tensor) -> None:
        table = [{} for _ in self.model.llama.layers]
        hidden = self.model.hidden_states(batch, plan, table)
        self.logits.copy_(self.model.llama.output(hidden[lengths.cumsum(0) - 1]))
        self.cache.lengths.copy_(lengths)
        routing = Routing.of_rows(batch.modality, table)
        if self.routing is None:
            self.routing = deepcopy(routing)  # what is in 16 bits anyway would be the parameters themselves
        self.routing.rows.copy_(routing.rows)
        torch._foreach_copy_(kept(self.routing), kept(routing))

    def prefill(self, examples: list[Example]) -> torch.Tensor:
        """Begins anew; returns the logits [B, V] float32 of each sequence's next token."""
        batch = pack(examples)
        lengths, rows = send(torch.tensor(batch.lengths), self.model.device), sum(batch.lengths)
        rows, kind, batch = rows + -rows % PREFILL_STEP, batch.images is not None, batch.to(self.model.device)
        if self.model.records_graphs and len(examples) == 1 and rows <= min(self.capacity, MOST_RECORDED):
            if (rows, kind) not in self.prefills:
                self.prefills[rows, kind] = Prefill(self, batch, rows)
            self.prefills[rows, kind](self, batch, lengths)
        else:
            self.run_prefill(batch, self.plan(batch.lengths), lengths)
        return self.logits.clone()

    def run_step(self) -> None:
        x = self.model.llama.tok_embeddings(self.ids)
        self.logits.copy_(self.model.llama.output(self.model.llama(x, DecodePlan(self.cache), self.routing)))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Adds a token [B] to every sequence; returns the logits [B, V] float32 of the next."""
        self.ids.copy_(ids)
        if self.steps == PLAIN_STEPS and self.model.records_graphs:
            self.recorded_step = record(self.run_step, self.model.device, self.pool)
        self.steps += 1
        (self.recorded_step or self.run_step)()
        return self.logits.clone()


def kept(routing: Routing) -> list[torch.Tensor]:
    return [tensor for layer in routing.table for adapter in layer.values() for tensor in adapter]
