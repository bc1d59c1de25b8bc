"""The prefill of a single prompt in a CUDA graph, for all prompts of one padded length."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lavin.fast.cuda_graphs import capture
from lavin.model import Batch

if TYPE_CHECKING:
    from lavin.generation.session import Session


class CapturedPrefill:
    """Static inputs and graph of one bucket: prompts of up to `rows` tokens, with as many images as `batch` has.

    A shorter prompt is padded at its end: the prompt's tokens do not see the padding, and decoded tokens overwrite it
    in the cache before it could be attended to.
    """

    def __init__(self, session: "Session", batch: Batch, rows: int):
        device = batch.ids.device
        self.batch = replace(batch, ids=torch.zeros(rows, dtype=torch.long, device=device), lengths=[rows])
        self.lengths = torch.zeros_like(session.cache.lengths)
        self.attn_metadata = session.prefill_metadata(self.batch.lengths)  # the graph reads it: keep it alive
        self.num_calls = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, session: "Session", batch: Batch, lengths: torch.Tensor) -> None:
        self.lengths.copy_(lengths)
        self.batch.ids[:len(batch.ids)].copy_(batch.ids)
        self.batch.modality.copy_(batch.modality)
        self.batch.image_slots.copy_(batch.image_slots)
        if self.batch.images is not None:
            self.batch.images.copy_(batch.images)

        def run():
            session.run_prefill(self.batch, self.attn_metadata, self.lengths)

        if self.num_calls == 1:  # the first call may have to compile
            self.replay = capture(run, self.lengths.device, session.pool)
        self.num_calls += 1
        (self.replay or run)()
