"""Multiple-choice answers without generation: log-probabilities of the options from one forward pass, or the losses of
whole texts."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from lavin.generation.generate import session_for, set_eval
from lavin.generation.sampling import refuse_not_finite
from lavin.model import LaVIN, pack
from lavin.runtime.device import copy_to_host, to_device
from lavin.runtime.errors import UserError
from lavin.tokenizer import Example, Tokenizer

OptionExample = tuple[Example, list[int]]  # see `option_example`


def option_example(tokenizer: Tokenizer, prompt: str, options: list[str], **layout) -> OptionExample:
    """Returns the longest token prefix that all answers `options` to a prompt share, and each option's next token.

    `layout` holds image and n_prompt, as in Tokenizer.example. Raises UserError where two options continue with the
    same token.
    """
    ids = [tokenizer.example(prompt, option, **layout).ids for option in options]
    prefix = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    tokens = [row[prefix] for row in ids]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"this tokenizer does not tell the options {options} apart by one token: "
                        "use the base model's own")
    return Example(ids[0][:prefix], prefix, layout.get("image")), tokens


@torch.no_grad()
def score_options(model: LaVIN, batches: Iterable[list[OptionExample]]) -> Iterator[list[list[float]]]:
    """Returns the log-probabilities of each question's options, batch by batch.

    The next batch is launched before the scores of the last one are read, so that the GPU never waits for the host.
    Raises NotFinite, a UserError, for logits that are not finite.
    """
    set_eval(model)
    in_flight = None
    for questions in batches:
        logits = copy_to_host(next_token_logits(model, [example for example, _ in questions]))
        if in_flight:
            yield option_log_probs(*in_flight)
        in_flight = logits, questions
    if in_flight:
        yield option_log_probs(*in_flight)


def next_token_logits(model: LaVIN, examples: list[Example]) -> torch.Tensor:
    """Returns the logits [B, V] float32 of the token behind each example."""
    if len(examples) == 1:  # as in the chat, which has captured a session's prefills
        with session_for(model, examples, 1) as session:
            return session.prefill(examples)[0]
    batch = pack(examples, device=model.device)
    last, = to_device([torch.tensor(batch.lengths).cumsum(0) - 1], model.device)
    return model.llama.output(model.prefill(batch)[last]).float()


def option_log_probs(logits: Callable[[], torch.Tensor], questions: list[OptionExample]) -> list[list[float]]:
    """Returns the log-probabilities of each question's options. `logits()` gives the logits [B, V] of the tokens behind
    the questions. Raises NotFinite where one of them is not finite."""
    scores = [row[tokens].log_softmax(-1).tolist() for row, (_, tokens) in zip(logits(), questions, strict=True)]
    refuse_not_finite(i for i, of_options in enumerate(scores) if math.isnan(of_options[0]))  # one makes all NaN
    return scores


@torch.no_grad()
def answer_losses(model: LaVIN, examples: list[Example]) -> list[tuple[float, bool]]:
    """Returns the mean cross-entropy of each example's answer tokens, and whether every one of them is the likeliest.

    Raises NotFinite, a UserError, for losses that are not finite.
    """
    set_eval(model)
    batch = pack(examples, device=model.device)
    logits = model.llama.output(model.prefill(batch)[batch.logit_indices]).float()
    losses, is_likeliest = F.cross_entropy(logits, batch.targets, reduction="none"), logits.argmax(-1) == batch.targets
    lengths = [len(example.ids) - example.answer_start for example in examples]
    found = [(of_answer.mean().item(), bool(are_likeliest.all())) for of_answer, are_likeliest
             in zip(losses.cpu().split(lengths), is_likeliest.cpu().split(lengths), strict=True)]
    refuse_not_finite(i for i, (loss, _) in enumerate(found) if not math.isfinite(loss))
    return found
