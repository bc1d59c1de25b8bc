"""An answer as it is written: the text of one sequence, token by token."""

from collections.abc import Iterator

from lavin.generation import decode, sampler
from lavin.model import LaVIN
from lavin.tokenizer import Example, Tokenizer

HALF = "\ufffd"  # what SentencePiece writes for bytes that are no whole UTF-8 character


def stream(model: LaVIN, tokenizer: Tokenizer, example: Example, max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, seed: int = 0) -> Iterator[str]:
    """Yields the text so far, once a token, up to EOS or max_new_tokens; each begins with the one before.

    A character that takes several tokens (byte fallback) is held back until it is whole. All tokens are decoded each
    time, since a token's text depends on its neighbours; for an answer that is a few milliseconds in all.
    """
    model.eval()
    written = []
    for ids in decode(model, [example], max_new_tokens, sampler(temperature, top_p, [seed])):
        token = ids.item()
        if token == tokenizer.eos_id:
            return
        written.append(token)
        yield tokenizer.decode(written).rstrip(HALF)
