"""The part that both tabs of the page share: a message is read, refused or asked, and its answer is streamed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

import torch

from lavin.runtime.errors import UserError, first_line
from util.chat.chatbot import Answer, Question, Settings
from util.chat.conversation import Conversation
from util.chat.own_gradio import gr

SECONDS_PER_UPDATE = 0.1  # of an answer that is streamed: each update costs more, the longer the conversation is
REFUSALS = (UserError, torch.OutOfMemoryError)


def refuse(error: Exception) -> None:
    """Says in a toast why a message was not sent."""
    gr.Warning(f"Not sent: {escape(first_line(error))}")


@contextmanager
def refusing() -> Iterator[None]:
    """Ends the block at a UserError, which is shown in a toast."""
    try:
        yield
    except REFUSALS as error:
        refuse(error)


def read_question(conversation: Conversation, message: dict, context: str, options: str, image_size: int) -> Question:
    """Returns a message as a question. The picture in its box, or the last of several, is the one in use. Raises
    UserError where anything is wrong.
    """
    path = (message["files"] or [""])[-1]
    if not path:
        conversation.drop_picture()
    elif path != conversation.picture:
        conversation.use_picture(path, image_size)
    return conversation.question(message["text"] or "", context or "", (options or "").split("\n"))


def make_settings(max_new_tokens, greedy, temperature, top_p, seed) -> Settings:
    """Returns the settings of the page's controls. Raises UserError where they give no answer."""
    try:
        number = int(seed) if seed.strip() and not greedy else None
    except ValueError as error:
        raise UserError(f"the seed {seed} is no whole number: leave it empty for another one each time") from error
    return Settings(int(max_new_tokens), 0.0 if greedy else temperature, top_p, number)


def updates(answers: Iterator[Answer], is_stopped: Callable[[], bool]) -> Iterator[Answer]:
    """Yields the answers that are to be shown: now and then one, and the last one."""
    answer, shown = None, 0.0
    for answer in answers:
        if is_stopped():
            break
        if time.perf_counter() - shown >= SECONDS_PER_UPDATE:
            yield answer
            shown = time.perf_counter()
    if answer is not None:
        yield answer


def message_box(placeholder: str, name: str):
    return gr.MultimodalTextbox(
        placeholder=placeholder, file_types=["image"], file_count="multiple", sources=["upload"], label="Message",
        show_label=False, lines=1, max_lines=6, autofocus=True, elem_id=name,
        max_plain_text_length=1_000_000)  # else a long text that is pasted becomes a file


def box_value(text: str, picture: str) -> dict:
    return {"text": text, "files": [picture] if picture else []}


def busy(**value):
    """Returns the box while a question is answered."""
    return gr.MultimodalTextbox(interactive=False, submit_btn=False, stop_btn=True, **value)


def ready(**value):
    return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False, **value)
