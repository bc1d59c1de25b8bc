"""HTML and CSS of the chat page. Text from users and models is escaped."""

from collections.abc import Sequence
from html import escape

from util.chat.chatbot import Answer, Question
from util.data.prompts import OPTIONS

CSS = """
main.app {max-width: 1240px !important; width: 100%}
#title h1 {margin: 0} #title p {margin: 0; opacity: .7}
.answer {font-size: 14px; line-height: 1.45}
.note {opacity: .6; font-size: 12px}
#chat .message-buttons, #chat [aria-label=Share] {display: none}
.options {margin: 8px 0 4px; min-width: 200px}
.option {display: grid; grid-template-columns: minmax(0, 1fr) 90px 52px; gap: 10px; align-items: center;
         font-size: 13px}
.option u {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; display: block}
.option i {display: block; height: 100%; background: var(--color-accent)}
.option b {text-align: right; font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap}
.gallery {display: grid !important; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 8px}
.gallery-item {height: 66px} .gallery-item span {width: 100%}
.gallery-item .container {display: flex !important; flex-wrap: nowrap; justify-content: space-between;
                          align-items: center}
.gallery-item p {text-align: left; font-size: 13px; line-height: 1.35; max-width: none !important}
.gallery-item img {height: 50px !important; width: 50px !important; object-fit: cover; flex: none}
.cards {display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin-top: 10px}
.card {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 14px}
.card h4 {margin: 0 0 8px; overflow-wrap: anywhere}
"""


def escape_html(text: str) -> str:
    """Escapes a text. Line breaks become <br> tags, since a blank line would end an HTML block inside Markdown."""
    return escape(text).replace("\n", "<br>")


def question_html(question: Question) -> str:
    options = [f"({letter}) {option}" for letter, option in zip(OPTIONS, question.options, strict=False)]
    lines = filter(None, [question.text, question.context, *options])
    return "<div class='answer'>" + "<br>".join(map(escape_html, lines)) + "</div>"


def answer_html(answer: Answer, question: Question, notes: Sequence[str] = ()) -> str:
    parts = [f"<div class='answer'>{escape_html(answer.text) or '…'}</div>"]
    if answer.probabilities:
        parts += ["<div class='options'>", *map(option_html, OPTIONS, question.options, answer.probabilities), "</div>"]
    if notes:
        parts.append(note_html(" · ".join(notes)))
    return "".join(parts)


def note_html(text: str) -> str:
    return f"<div class='note'>{escape_html(text)}</div>"


def option_html(letter: str, option: str, p: float) -> str:
    return (f"<div class='option'><span>({letter}) {escape_html(option)}</span>"
            f"<u><i style='width: {100 * p:.1f}%'></i></u><b>{100 * p:.1f} %</b></div>")


def cards_html(answers: dict[str, str]) -> str:
    """Returns the runs' answers, which are HTML already, as a row of cards."""
    cards = "".join(f"<div class='card'><h4>{escape_html(run)}</h4>{answer}</div>" for run, answer in answers.items())
    return f"<div class='cards'>{cards}</div>"
