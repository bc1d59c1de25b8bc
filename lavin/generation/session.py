"""A generation session: prefill and decoding steps for a fixed number of sequences, reused from one batch to the next.

Notable:
- Prefill is training's forward pass, which also fills the KV cache; a step adds one token to each sequence. Both give
  the logits of the full forward pass.
- Prefill stores each layer's expert mixtures and adapter projections, so that a step need not compute them.
- All tensors stay at their address, so that steps and short prefills can be replayed as CUDA graphs.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch

from lavin.fast.cuda_graphs import capture, graph_pool
from lavin.generation.captured_prefill import CapturedPrefill
from lavin.generation.kv_cache import DecodeMetadata, KVCache, PrefillMetadata
from lavin.mm_adapter import Routing
from lavin.model import Batch, LaVIN, pack
from lavin.runtime.device import to_device
from lavin.tokenizer import Example

WARMUP_STEPS = 8  # before a step is captured: the first compiles, and short answers do not repay a capture
PREFILL_BUCKET = 64  # captured prefills are padded to a multiple of this many tokens
MAX_CAPTURED_TOKENS = 1024  # longer prefills keep the GPU busy without a graph


class Session:
    """Generates for `batch_size` sequences of at most `capacity` tokens at a time."""

    def __init__(self, model: LaVIN, batch_size: int, capacity: int):
        config, device = model.llama.config, model.device
        # rounded up, and by more for few sequences: a conversation grows, and their cache is small
        self.capacity = capacity + -capacity % max(64, 512 // batch_size)
        self.model, self.key = model, self.session_key(model, batch_size)
        self.cache = KVCache(config, batch_size, self.capacity, device, model.dtype)
        self.ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch_size, config.vocab_size, device=device)
        self.routing: Routing | None = None  # every sequence's, with the complete cache; made by the first prefill
        self.pool = graph_pool(device)
        self.prefills: dict[tuple[int, bool], CapturedPrefill] = {}  # by (padded length, has an image)
        self.num_steps = 0
        self.replay_step: Callable[[], None] | None = None

    @staticmethod
    def session_key(model: LaVIN, batch_size: int) -> tuple:
        """What must be equal for a session to be reused, besides capacity; parameter values and dropout may differ."""
        adapter = replace(model.adapter, dropout_prob=0.0, dropout_var=1.0, dropout_lim=0.0)
        return batch_size, adapter, model.device, model.dtype

    def fits(self, model: LaVIN, batch_size: int, capacity: int) -> bool:
        return self.key == self.session_key(model, batch_size) and capacity <= self.capacity

    def prefill_metadata(self, lengths: list[int]) -> PrefillMetadata:
        return self.model.attn_metadata(lengths, partial(PrefillMetadata, self.cache))

    def run_prefill(self, batch: Batch, attn_metadata: PrefillMetadata, lengths: torch.Tensor) -> None:
        """lengths [B]: of the prompts, without padding."""
        routing_cache = [{} for _ in self.model.llama.layers]
        hidden = self.model.hidden_states(batch, attn_metadata, routing_cache)
        self.logits.copy_(self.model.llama.output(hidden[lengths.cumsum(0) - 1]))
        self.cache.lengths.copy_(lengths)
        routing = Routing.from_modality(batch.modality, routing_cache)
        if self.routing is None:
            self.routing = deepcopy(routing)  # not the tensors themselves: some are parameters when no cast is needed
        self.routing.one_hot.copy_(routing.one_hot)
        torch._foreach_copy_(cached_tensors(self.routing), cached_tensors(routing))

    def prefill(self, examples: list[Example]) -> torch.Tensor:
        """Starts new sequences; returns the logits [B, V] float32 of each one's next token."""
        batch = pack(examples)
        lengths, rows = to_device(torch.tensor(batch.lengths), self.model.device), sum(batch.lengths)
        rows, has_image, batch = rows + -rows % PREFILL_BUCKET, batch.images is not None, batch.to(self.model.device)
        if self.model.use_cuda_graphs and len(examples) == 1 and rows <= min(self.capacity, MAX_CAPTURED_TOKENS):
            if (rows, has_image) not in self.prefills:
                self.prefills[rows, has_image] = CapturedPrefill(self, batch, rows)
            self.prefills[rows, has_image](self, batch, lengths)
        else:
            self.run_prefill(batch, self.prefill_metadata(batch.lengths), lengths)
        return self.logits.clone()

    def run_step(self) -> None:
        x = self.model.llama.tok_embeddings(self.ids)
        self.logits.copy_(self.model.llama.output(self.model.llama(x, DecodeMetadata(self.cache), self.routing)))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Adds a token [B] to every sequence; returns the logits [B, V] float32 of the next one."""
        self.ids.copy_(ids)
        if self.num_steps == WARMUP_STEPS and self.model.use_cuda_graphs:
            self.replay_step = capture(self.run_step, self.model.device, self.pool)
        self.num_steps += 1
        (self.replay_step or self.run_step)()
        return self.logits.clone()


def cached_tensors(routing: Routing) -> list[torch.Tensor]:
    return [tensor for layer in routing.cache or [] for adapter in layer.values() for tensor in adapter]
