"""The bubbles of the chat page: what gr.Chatbot shows of an exchange.

An exchange has two messages, the user's and the run's, and each of them has several bubbles. Texts are Markdown.
Messages are made once, in the form in which Gradio sends them: a picture is written to a file then, and its bubble
names the file.
"""

from pathlib import Path

from lavin.runtime.console import counted
from util.chat.chatbot import Question
from util.chat.conversation import Exchange
from util.chat.markdown import without_html
from util.chat.own_gradio import gr
from util.chat.uploads import open_image
from util.chat.web_html import answer_notes, details_html

save_pil_to_cache = gr.processing_utils.save_pil_to_cache

THUMBNAIL_SIZE = 200  # pixels
CHATBOT = gr.Chatbot(render=False)  # only to make messages
HTML_PROPS = {"html_template": "${value}", "css_template": "", "js_on_load": None, "props": {}}  # those of gr.HTML


def thumbnail(path: str):
    image = open_image(path)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return image


def user_message(question: Question, shows_picture: bool):
    """Returns the picture, the text, and context and options, each in a bubble. Gradio lets people edit the text."""
    parts: list = [text_part(question.text)]
    if shows_picture:
        path = save_pil_to_cache(thumbnail(question.picture), CHATBOT.GRADIO_CACHE, format="png")
        parts.insert(0, {"path": path, "alt_text": Path(question.picture).name})
    if details := details_html(question):
        parts.append(html_part(details))
    return message("user", *parts)


def run_message(text: str, notes: str = ""):
    """Returns the answer, and notes on it, which are HTML, each in a bubble."""
    return message("assistant", text_part(text or "…"), *[html_part(notes)] * bool(notes))


def text_part(text: str) -> dict:
    return {"type": "text", "text": without_html(text)}


def html_part(html: str) -> dict:
    return {"type": "component", "component": "html", "value": html, "constructor_args": {},
            "props": {"value": html, **HTML_PROPS}}


def message(role: str, *content):
    made, = CHATBOT.postprocess([{"role": role, "content": list(content)}]).root
    return made


def exchange_notes(exchange: Exchange, seconds: float, error: str, right: int | None) -> str:
    """Returns the notes below an answer. right: the index of the right option, where it is known."""
    answer, settings = exchange.answer, exchange.settings
    notes = [*filter(None, [exchange.run, f"{counted(answer.tokens, 'token')} in {seconds:.1f} s", error])]
    if settings.temperature:
        notes.append(f"seed {settings.seed}")
    if not answer.complete:
        notes.append("stopped")
    if answer.dropped:
        notes.append(f"oldest turns that no longer fit and were left out: {answer.dropped}")
    return answer_notes(answer, exchange.question, notes, right)
