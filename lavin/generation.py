"""Answers: batched decoding, sampling, option scoring.

Notable: a sequence's answer does not depend on its batch mates, sampled or not: each sequence draws from its own
generator.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch

from lavin.errors import UserError
from lavin.model import LaVIN
from lavin.precision import fetch
from lavin.session import MOST_RECORDED, PLAIN_STEPS, PREFILL_STEP, Session
from lavin.tokenizer import IMAGE_SLOT, Example, Tokenizer


@contextmanager
def session_for(model: LaVIN, examples: list[Example], new_tokens: int) -> Iterator[Session]:
    """The model's latest session where it fits, else a new one; for the time being nobody else's."""
    wanted = model, len(examples), max(len(example.ids) for example in examples) + new_tokens
    session, model.session = model.session, None
    if session is None or not session.fits(*wanted):
        session = None  # makes room
        session = Session(*wanted)
    try:
        yield session
    finally:
        model.session = model.session or session  # another answer may have come between


@torch.no_grad()
def decode(model: LaVIN, examples: list[Example], max_new_tokens: int,
           choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the next token ids [B] of all sequences, `max_new_tokens` times; the caller may stop before.

    choose: logits [B, V] float32 -> ids [B].
    """
    with session_for(model, examples, max_new_tokens) as session:
        logits = session.prefill(examples)
        for i in range(max_new_tokens):
            ids = choose(logits)
            yield ids
            if i + 1 < max_new_tokens:
                logits = session.step(ids)


def rehearse(model: LaVIN, longest: int) -> None:
    """Short answers to one sequence at a time, of at most `longest` tokens, so that a first question waits for nothing.

    They compile what it needs and, where answers are recorded, record it for every length, with and without a picture.
    """
    model.eval()
    most = min(longest, MOST_RECORDED) if model.records_graphs else PREFILL_STEP
    for picture in (None, torch.zeros(3, *[model.vision.image_size] * 2, dtype=torch.uint8)):
        slots = [] if picture is None else [IMAGE_SLOT] * model.adapter.n_prompt
        for rows in reversed(range(PREFILL_STEP, most + PREFILL_STEP, PREFILL_STEP)):
            length = min(rows, longest)
            example = Example(slots + [0] * (length - len(slots)), length, picture)
            for _ in range(2):  # the second time it is recorded
                list(islice(decode(model, [example], longest - length, lambda logits: logits.argmax(-1)), PLAIN_STEPS + 2))


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


Question = tuple[Example, list[int]]  # see `option_example`


@torch.no_grad()
def score_options(model: LaVIN, batches: Iterable[list[Question]]) -> Iterator[list[list[float]]]:
    """Log-probabilities of the options of each question of each batch, from one prefill a batch.

    A batch is launched before the scores of the one before are read, so that the GPU has always something to do.
    """
    model.eval()
    launched = None  # a batch, and its logits on their way
    for questions in batches:
        examples = [example for example, _ in questions]
        with session_for(model, examples, 0) as session:
            logits = fetch(session.prefill(examples))
        if launched:
            yield read_scores(*launched)
        launched = logits, questions
    if launched:
        yield read_scores(*launched)


def read_scores(logits: Callable[[], torch.Tensor], questions: list[Question]) -> list[list[float]]:
    return [row[tokens].log_softmax(-1).tolist() for row, (_, tokens) in zip(logits(), questions)]
