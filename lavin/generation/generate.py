"""Batched decoding to texts, at once or streamed. A sequence's answer does not depend on the rest of its batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch

from lavin.fast.captured_models import MAX_CAPTURED_TOKENS, PREFILL_BUCKET, free_graphs
from lavin.generation.sampling import NOT_FINITE, refuse_not_finite, sampler
from lavin.generation.session import WARMUP_STEPS, Session
from lavin.model import LaVIN
from lavin.runtime.device import copy_to_host
from lavin.tokenizer import IMAGE_SLOT, Example, Tokenizer

INCOMPLETE = "\ufffd"  # how SentencePiece decodes bytes that are not yet a complete UTF-8 character


def set_eval(model: LaVIN) -> None:
    """Calls `model.eval()` where it is needed: walking all modules of 7B takes 2 ms, for every answer."""
    if model.training:
        model.eval()


@contextmanager
def session_for(model: LaVIN, examples: list[Example], new_tokens: int) -> Iterator[Session]:
    """Returns the model's latest session where it fits, else a new one. Nobody else gets a session while it is in use.
    """
    wanted = model, len(examples), max(len(example.ids) for example in examples) + new_tokens
    session = model.session
    model.session = None
    if session is None or not session.fits(*wanted):
        session = None  # its memory is freed before the new one is allocated
        free_graphs(model.llama)  # captured prefills hold the KV cache that they fill
        session = Session(*wanted)
    try:
        yield session
    finally:
        model.session = model.session or session  # another answer may have returned its own meanwhile


@torch.no_grad()
def decode(model: LaVIN, examples: list[Example], max_new_tokens: int,
           choose: Callable[[torch.Tensor], torch.Tensor], draft: Sequence[int] = ()) -> Iterator[torch.Tensor]:
    """Yields the next token ids [B] of all sequences, on the host, `max_new_tokens` times; the caller may stop earlier.

    `choose` maps logits [B, V] float32 to ids [B]. `draft` holds tokens with which answers probably begin: the prefill
    has them behind every prompt, so that as many as all sequences choose take no steps. The ids are the same without a
    draft (speculative decoding, Leviathan et al. 2023, arXiv 2211.17192, for greedy choices).
    """
    draft = list(draft[:max_new_tokens - 1])
    # A captured step of a single sequence is launched before the ids that it continues are read: it is so short that
    # the GPU would wait for the host. The last one is for nothing, which would cost a large batch more.
    is_ahead = model.use_cuda_graphs and len(examples) == 1
    with session_for(model, examples, len(draft) + max_new_tokens) as session:
        logits = list(session.prefill(examples, draft))  # [B, V] each: of the next tokens, as far as they are known
        for i in range(max_new_tokens):
            ids = choose(logits.pop(0))
            read_ids, is_last = copy_to_host(ids), i + 1 == max_new_tokens
            if is_ahead and not logits and not is_last:
                logits = [session.step(ids)]
            yield (ids_on_host := read_ids())
            if i < len(draft) and not (ids_on_host == draft[i]).all():
                session.rewind(len(logits))
                logits, draft = [], []
            if not logits and not is_last:
                logits = [session.step(ids)]


def warmup(model: LaVIN, max_tokens: int) -> None:
    """Compiles and captures everything that answers to single prompts need, so that the first question is fast.

    `max_tokens` counts prompt and answer together. With CUDA graphs, prompts of every length bucket are captured.
    """
    set_eval(model)
    longest_prompt = min(max_tokens - 1, MAX_CAPTURED_TOKENS) if model.use_cuda_graphs else PREFILL_BUCKET
    buckets = range(PREFILL_BUCKET, longest_prompt + PREFILL_BUCKET, PREFILL_BUCKET)
    image, n_slots = torch.zeros(3, *[model.vision.image_size] * 2, dtype=torch.uint8), model.adapter.n_prompt
    for rows in (buckets[-1], *reversed(buckets)):  # the first prefill compiles, and is not captured
        length = min(rows, longest_prompt)
        example = Example([IMAGE_SLOT] * n_slots + [0] * (length - n_slots), length, image)
        list(islice(decode(model, [example], max_tokens - length, sampler(0, 1, [])), WARMUP_STEPS + 2))


def generate(model: LaVIN, tokenizer: Tokenizer, examples: list[Example], max_new_tokens: int,
             is_complete: Callable[[str], bool] = lambda text: False, temperature: float = 0.0, top_p: float = 1.0,
             seeds: list[int] | None = None, draft: Sequence[int] = ()) -> list[str]:
    """Continues each example up to EOS, a text that `is_complete`, or max_new_tokens. Returns the new texts.

    `draft` is what `decode` describes. Raises NotFinite, a UserError, for an unfinished sequence with logits that are
    not finite.
    """
    set_eval(model)
    written: list[list[int]] = [[] for _ in examples]
    texts = [""] * len(examples)
    unfinished = set(range(len(examples)))
    choose = sampler(temperature, top_p, seeds or [0] * len(examples))
    for ids in decode(model, examples, max_new_tokens, choose, draft):
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
    set_eval(model)
    written = []
    for ids in decode(model, [example], max_new_tokens, sampler(temperature, top_p, [seed])):
        token = ids.item()
        refuse_not_finite([0] * (token == NOT_FINITE))
        if token == tokenizer.eos_id:
            return
        written.append(token)
        yield tokenizer.decode(written).rstrip(INCOMPLETE)
