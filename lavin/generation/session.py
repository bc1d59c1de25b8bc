"""A generation session: prefill and decoding steps for a fixed number of sequences, reused from one batch to the next.

Notable:
- Prefill is training's forward pass, which also fills the KV cache; a step adds one token to each sequence. Both give
  the logits of the full forward pass.
- Both read the model's routing cache, so that neither computes expert mixtures or adapter projections.
- All tensors of a step stay at their address, so that it can be replayed as a CUDA graph. Prefills are captured as
  training passes are (lavin/fast/captured_models.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from lavin.fast.cuda_graphs import capture, graph_pool
from lavin.generation.kv_cache import DecodeMetadata, KVCache, PrefillMetadata
from lavin.mm_adapter import MODALITIES, Routing
from lavin.model import LaVIN, pack
from lavin.runtime.arithmetic import round_up
from lavin.runtime.device import to_device
from lavin.tokenizer import Example

SEQUENCES_PER_IDLE = 32  # of a session's sequences, one in so many may be a copy, whose tokens nobody reads
WARMUP_STEPS = 2  # before a step is captured: the first compiles


class Session:
    """Generates for `batch_size` sequences of fewer than `capacity` tokens at a time, or for slightly fewer sequences.
    """

    def __init__(self, model: LaVIN, batch_size: int, capacity: int):
        config, device = model.llama.config, model.device
        # rounded up, and by more for few sequences: a conversation grows, and their cache is small
        self.capacity = round_up(capacity, max(64, 512 // batch_size))
        self.model, self.batch_size, self.key = model, batch_size, self.session_key(model)
        self.cache = KVCache(config, batch_size, self.capacity, device, model.dtype)
        self.ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.logits = torch.zeros(batch_size, config.vocab_size, device=device)
        self.one_hot = torch.zeros(batch_size, MODALITIES, device=device)  # each sequence's modality
        self.pool = graph_pool(device)
        self.num_steps = 0
        self.replay_step: Callable[[], None] | None = None

    @staticmethod
    def session_key(model: LaVIN) -> tuple:
        """Returns what a session depends on: it is reused while this is equal, whatever the values of the parameters.
        """
        return model.device, model.dtype

    def fits(self, model: LaVIN, batch_size: int, capacity: int) -> bool:
        """Says whether the session can take a batch of this size.

        The batches of an evaluation differ by one sequence: the smaller ones leave one idle.
        """
        idle = self.batch_size - batch_size
        return (self.key == self.session_key(model) and capacity <= self.capacity
                and 0 <= idle <= batch_size // SEQUENCES_PER_IDLE)

    def prefill(self, examples: list[Example], draft: Sequence[int] = ()) -> torch.Tensor:
        """Starts new sequences, each of which goes on with the tokens `draft`.

        Returns the logits [1 + draft, B, V] float32 of the tokens behind the prompt and behind each token of the draft.
        """
        device, n = self.model.device, len(examples)
        examples = examples + examples[-1:] * (self.batch_size - n)
        batch = pack([replace(example, ids=[*example.ids, *draft]) for example in examples], device=device)
        ends = torch.tensor(batch.lengths).cumsum(0)
        lengths, rows = to_device([torch.tensor(batch.lengths), ends - 1 + torch.arange(-len(draft), 1)[:, None]],
                                  device)
        hidden = self.model.prefill(batch, partial(PrefillMetadata, self.cache))
        self.cache.lengths.copy_(lengths)
        self.one_hot.copy_(F.one_hot(batch.modality, MODALITIES))
        return self.model.llama.output(hidden[rows[:, :n]]).float()

    def rewind(self, n: int) -> None:
        """Takes the last n tokens of every sequence back."""
        self.cache.lengths -= n

    def run_step(self) -> None:
        x = self.model.llama.tok_embeddings(self.ids)
        routing = Routing(self.one_hot, self.model.routing_cache.layers)
        attn_metadata = DecodeMetadata(self.cache, self.model.use_triton)
        self.logits.copy_(self.model.llama.output(self.model.llama(x, attn_metadata, routing)))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Adds a token [B] to every sequence; returns the logits [B, V] float32 of the next one.

        A sequence that has no token, but NOT_FINITE, is complete: it goes on with any.
        """
        self.ids[:len(ids)].copy_(ids.clamp_min(0))
        if self.num_steps == WARMUP_STEPS and self.model.use_cuda_graphs:
            self.replay_step = capture(self.run_step, self.model.device, self.pool)
        self.num_steps += 1
        (self.replay_step or self.run_step)()
        return self.logits[:len(ids)].clone()
