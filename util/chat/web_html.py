"""HTML, CSS and JavaScript of the chat page. Text from users and models is escaped."""

from collections.abc import Sequence
from html import escape

from util.chat.chatbot import Answer, Question
from util.data.prompts import OPTIONS

CSS = """
main.app {max-width: 1240px !important; width: 100%}
#title h1 {margin: 0} #title p {margin: 0}
.note, .details {font-size: 13px; line-height: 1.45} .note, .card-title {overflow-wrap: anywhere}
.note {color: var(--neutral-600)} .dark .note {color: var(--neutral-300)}
#chat {height: 48vh; min-height: 300px; overflow-y: auto; flex-wrap: nowrap; gap: 0; border-radius: var(--block-radius);
       border: var(--block-border-width) solid var(--border-color-primary)}
#chat > .block, #chat [role=log] {height: auto !important; overflow: visible !important; flex: none;
                                      border-width: 0 !important}
#chat .placeholder {margin: 15vh auto; text-align: center}
#chat .top-panel {position: sticky; width: 100%; justify-content: flex-end; border-width: 0 0 1px; border-radius: 0}
#growing:not(:has(.message)), #growing .top-panel, .icon-button-wrapper:not(:has(button)) {display: none}
#chat .message-row:has(.component) + .message-buttons {display: none}
.options {margin: 2px 0 6px; min-width: 200px}
.option {display: grid; grid-template-columns: minmax(0, 1fr) 90px 52px; gap: 10px; align-items: center;
         font-size: 13px}
.option u {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; display: block}
.option i {display: block; height: 100%; background: var(--color-accent)}
.option b {text-align: right; font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap}
.option.right span {font-weight: 600}
.gallery {display: grid !important; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 8px}
.gallery-item {height: 66px} .gallery-item span {width: 100%}
.gallery-item .container {display: flex !important; flex-wrap: nowrap; justify-content: space-between;
                          align-items: center}
.gallery-item p {text-align: left; font-size: 13px; line-height: 1.35; max-width: none !important}
.gallery-item img {height: 50px !important; width: 50px !important; object-fit: cover; flex: none}
[role=tab].selected {color: var(--primary-700) !important}
.dark [role=tab].selected {color: var(--primary-300) !important}
input[role=combobox] {text-overflow: ellipsis; padding-right: 28px !important}
.card {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 14px}
.card-title {font-weight: 600} :is(.card, #compared-details) .html-container {padding: 0}
"""

# Screen readers get names that Gradio leaves out. The chat goes to a new question, and follows the answer until the
# reader scrolls up. A picture that is dropped on the chat goes into the message.
JS = """() => {
    new MutationObserver(() => {
        for (const img of document.querySelectorAll('button:not([aria-label]) > .image-frame > img'))
            img.closest('button').ariaLabel = 'Enlarge the picture';
        for (const file of document.querySelectorAll('.thumbnail-wrapper[role=listitem]')) file.role = 'group';
    }).observe(document.body, {childList: true, subtree: true});
    const chat = document.querySelector('#chat'), growing = document.querySelector('#growing');
    let atEnd = true, top = 0, height = 0, growingHeight = 0;
    chat.addEventListener('scroll', () => {
        if (chat.scrollTop < top && chat.scrollHeight >= height) atEnd = false;
        else if (chat.scrollHeight - chat.scrollTop - chat.clientHeight < 5) atEnd = true;
        [top, height] = [chat.scrollTop, chat.scrollHeight];
    });
    const follow = new ResizeObserver(() => {
        if (!growingHeight && growing.offsetHeight) atEnd = true;
        growingHeight = growing.offsetHeight;
        if (atEnd) chat.scrollTop = chat.scrollHeight;
    });
    for (const part of chat.children) follow.observe(part);
    chat.addEventListener('dragover', event => event.preventDefault());
    chat.addEventListener('drop', event => {
        event.preventDefault();
        const input = document.querySelector('#message input[type=file]');
        input.files = event.dataTransfer.files;
        input.dispatchEvent(new Event('change', {bubbles: true}));
    });
}"""

DOWNLOAD = """(text, name) => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
}"""


def escape_html(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def details_html(question: Question) -> str:
    """Returns the context and the options of a question, or nothing where it has none."""
    options = [f"({letter}) {option}" for letter, option in zip(OPTIONS, question.options, strict=False)]
    lines = [escape_html(line) for line in (question.context, *options) if line]
    return f"<div class='details'>{'<br>'.join(lines)}</div>" if lines else ""


def answer_notes(answer: Answer, question: Question, notes: Sequence[str], right: int | None = None) -> str:
    """Returns what is shown below an answer: each option's probability, and notes. right: the index of the right
    option, where it is known.
    """
    parts = []
    if answer.probabilities:
        rows = [option_html(*option, is_right=i == right) for i, option in
                enumerate(zip(OPTIONS, question.options, answer.probabilities, strict=False))]
        parts = ["<div class='options'>", *rows, "</div>"]
    if right is not None:
        notes = [f"right answer: ({OPTIONS[right]}) {question.options[right]}", *notes]
    return "".join([*parts, f"<div class='note'>{escape_html(' · '.join(notes))}</div>"])


def option_html(letter: str, option: str, p: float, is_right: bool) -> str:
    return (f"<div class='option{' right' * is_right}'><span>({letter}) {escape_html(option)}{' ✓' * is_right}</span>"
            f"<u><i style='width: {100 * p:.1f}%'></i></u><b>{100 * p:.1f} %</b></div>")


def title_html(run: str) -> str:
    return f"<div class='card-title'>{escape_html(run)}</div>"
