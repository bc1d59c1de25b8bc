"""A conversation as a file that people keep: JSON for programs, Markdown for readers."""

import json
from pathlib import Path

from util.chat.conversation import Conversation, Exchange
from util.data.prompts import OPTIONS


def as_json(conversation: Conversation) -> str:
    """Returns the exchanges with all that decided them, in the order in which they were asked."""
    return json.dumps([exchange_dict(exchange) for exchange in conversation.exchanges], indent=1, ensure_ascii=False)


def exchange_dict(exchange: Exchange) -> dict:
    question, settings, answer = exchange.question, exchange.settings, exchange.answer
    return {"run": exchange.run, "question": question.text, "context": question.context,
            "options": list(question.options), "picture": Path(question.picture).name or None,
            "answer": answer.text, "probabilities": list(answer.probabilities), "complete": answer.complete,
            "tokens": answer.tokens, "dropped_turns": answer.dropped, "prompt": answer.prompt,
            "max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_p": settings.top_p,
            "seed": settings.seed}


def as_markdown(conversation: Conversation) -> str:
    return "\n\n---\n\n".join(map(exchange_markdown, conversation.exchanges)) + "\n"


def exchange_markdown(exchange: Exchange) -> str:
    question, answer = exchange.question, exchange.answer
    parts = [f"**You:** {question.text}", question.context]
    if question.picture:
        parts.append(f"*Picture: {Path(question.picture).name}*")
    options = [f"({letter}) {option}" for letter, option in zip(OPTIONS, question.options, strict=False)]
    parts += ["\n".join(f"- {option}" for option in options), f"**{exchange.run}** *({how(exchange)})*", answer.text]
    probabilities = zip(options, answer.probabilities, strict=False)
    parts.append("\n".join(f"- {option}: {100 * p:.1f} %" for option, p in probabilities))
    return "\n\n".join(filter(None, parts))


def how(exchange: Exchange) -> str:
    """Says how the answer was chosen."""
    settings = exchange.settings
    words = ["greedy"] if settings.temperature == 0 else [
        f"temperature {settings.temperature:g}", f"top-p {settings.top_p:g}", f"seed {settings.seed}"]
    return ", ".join(words + ["stopped"] * (not exchange.answer.complete))
