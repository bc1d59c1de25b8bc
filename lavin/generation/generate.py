"""Batched decoding to texts, at once or streamed. A sequence's answer does not depend on the rest of its batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from lavin.generation.sampling import NOT_FINITE, refuse_not_finite, sampler
from lavin.generation.session import MAX_CAPTURED_TOKENS, PREFILL_BUCKET, WARMUP_STEPS, Session
from lavin.model import LaVIN
from lavin.tokenizer import IMAGE_SLOT, Example, Tokenizer

INCOMPLETE = "\ufffd"  # how SentencePiece decodes bytes that are not yet a complete UTF-8 character


@contextmanager
def session_for(model: LaVIN, examples: list[Example], new_tokens: int) -> Iterator[Session]:
    """The model's latest session where it fits, else a new one. While it is in use, nobody else gets it."""
    wanted = model, len(examples), max(len(example.ids) for example in examples) + new_tokens
    session = model.session
    model.session = None
    if session is None or not session.fits(*wanted):
        session = None  # frees its memory before the new one is allocated
        session = Session(*wanted)
    try:
        yield session
    finally:
        model.session = model.session or session  # another answer may have returned its own meanwhile


@torch.no_grad()
def decode(model: LaVIN, examples: list[Example], max_new_tokens: int,
           choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the next token ids [B] of all sequences, `max_new_tokens` times; the caller may stop earlier.

    choose: logits [B, V] float32 -> ids [B].
    """
    with session_for(model, examples, max_new_tokens) as session:
        logits = session.prefill(examples)
        for i in range(max_new_tokens):
            ids = choose(logits)
            yield ids
            if i + 1 < max_new_tokens:
                logits = session.step(ids.clamp_min(0))  # NOT_FINITE, of a sequence that is complete, is no token


def warmup(model: LaVIN, max_tokens: int) -> None:
    """Compiles and captures everything that answers to single prompts need, so that the first question is fast.

    max_tokens: of prompt and answer together. Every prompt length bucket runs twice, with and without an image, since a
    prefill is captured the second time; without CUDA graphs one bucket is enough.
    """
    model.eval()
    longest_prompt = min(max_tokens, MAX_CAPTURED_TOKENS) if model.use_cuda_graphs else PREFILL_BUCKET
    for image in (None, torch.zeros(3, *[model.vision.image_size] * 2, dtype=torch.uint8)):
        slots = [] if image is None else [IMAGE_SLOT] * model.adapter.n_prompt
        for rows in reversed(range(PREFILL_BUCKET, longest_prompt + PREFILL_BUCKET, PREFILL_BUCKET)):
            length = min(rows, max_tokens)
            example = Example(slots + [0] * (length - len(slots)), length, image)
            for _ in range(2):
                greedy = decode(model, [example], max_tokens - length, sampler(0, 1, []))
                list(islice(greedy, WARMUP_STEPS + 2))  # the step is captured too


def generate(model: LaVIN, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int,
             is_complete: Callable[[str], bool] = lambda text: False, temperature: float = 0.0, top_p: float = 1.0,
             seeds: list[int] | None = None) -> list[str]:
    """Continues each example up to EOS, a text that `is_complete`, or max_new_tokens. Returns the new texts.

    Raises NotFinite, a UserError, for an unfinished sequence with logits that are not finite.
    """
    model.eval()
    written: list[list[int]] = [[] for _ in examples]
    texts = [""] * len(examples)
    unfinished = set(range(len(examples)))
    for ids in decode(model, examples, max_new_tokens, sampler(temperature, top_p, seeds or [0] * len(examples))):
        tokens = ids.tolist()
        refuse_not_finite(i for i in unfinished if tokens[i] == NOT_FINITE)
        for i in sorted(unfinished):
            token = tokens[i]
            if token != tokenizer.eos_id:
                written[i].append(token)
                texts[i] = tokenizer.decode(written[i])
            if token == tokenizer.eos_id or is_complete(texts[i]):
                unfinished.remove(i)
        if not unfinished:
            break
    return texts


def stream(model: LaVIN, tokenizer: Tokenizer, example: Example, max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, seed: int = 0) -> Iterator[str]:
    """Yields the text so far after every token, up to EOS or max_new_tokens; each text begins with the one before.

    A character that takes several tokens (byte fallback) is held back until it is complete. All tokens are decoded
    again each time, since a token's text depends on its neighbours; over a whole answer that takes a few milliseconds.
    """
    model.eval()
    written = []
    for ids in decode(model, [example], max_new_tokens, sampler(temperature, top_p, [seed])):
        token = ids.item()
        refuse_not_finite([0] * (token == NOT_FINITE))
        if token == tokenizer.eos_id:
            return
        written.append(token)
        yield tokenizer.decode(written).rstrip(INCOMPLETE)
