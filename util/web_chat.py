"""The chat as a page in the browser (Gradio): a conversation with one run, or one question to several.

Notable:
- A message takes two steps: the first reads it and its picture, at once and whoever else is waiting; the second waits
  its turn at the model. So what cannot be asked costs only its sender a message.
- Pictures arrive as files and are opened by util.pictures, never by Gradio, whose errors are not made to be read.
- Answers are shown as HTML that is made here; what a model writes is escaped.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import gradio as gr
import torch
from PIL import Image

from lavin.errors import UserError
from util.chat import Answer, Chatbot, Question, Settings, Turn, make_prompt
from util.datasets import load_scienceqa, to_tensor
from util.pictures import open_picture
from util.prompts import OPTIONS

MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # all that uses the model waits in one queue
MOST_RUNS = 4  # compared at once
N_EXAMPLES = 6
THUMBNAIL = 200  # pixels
MOST_UPLOADED = "20mb"
CSS = """
main.app {max-width: 1240px !important; width: 100%}
#title h1 {margin: 0} #title p {margin: 0; opacity: .7}
.answer {font-size: 14px; line-height: 1.45}
.note {opacity: .6; font-size: 12px}
#chat [aria-label=Share] {display: none}
.options {margin: 8px 0 4px; min-width: 200px}
.option {display: grid; grid-template-columns: minmax(0, 1fr) 90px 52px; gap: 10px; align-items: center;
         font-size: 13px}
.option u {height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; display: block}
.option i {display: block; height: 100%; background: var(--color-accent)}
.option b {text-align: right; font-weight: 400; font-variant-numeric: tabular-nums}
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


@dataclass
class Conversation:
    """One user's. picture: that of the latest message that had one. question: the one to be answered next."""

    turns: list[Turn] = field(default_factory=list)
    picture: torch.Tensor | None = None
    question: Question | None = None


class Page:
    """What the page does; `stopped` are the sessions that want no more of their answer."""

    def __init__(self, bot: Chatbot):
        self.bot = bot
        self.stopped = set()

    def stop(self, request: gr.Request):
        self.stopped.add(request.session_hash)

    def read(self, message: dict, context: str, options: str) -> tuple[Question, Image.Image | None]:
        """A message as a question, and its picture small. Raises UserError for what cannot be asked."""
        question = Question(message["text"].strip(), None, context.strip(),
                            tuple(line.strip() for line in options.splitlines() if line.strip()))
        make_prompt(question, "QCM-A")  # to hear of what cannot be asked
        if not message["files"]:
            return question, None
        picture = open_picture(message["files"][-1])
        question = replace(question, picture=to_tensor(picture, self.bot.model.vision.image_size))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return question, picture

    def ask(self, message, context, options, shown, conversation, request: gr.Request):
        """Puts a message into the conversation and empties its fields; what cannot be asked stays in them."""
        self.stopped.discard(request.session_hash)
        conversation.question = None
        try:
            question, picture = self.read(message, context, options)
        except UserError as error:
            gr.Warning(escape(str(error)), title="Not sent")
            return gr.skip(), conversation, gr.skip(), gr.skip(), gr.skip()
        if picture:
            conversation.picture = question.picture
            shown = [*shown, bubble("user", gr.Image(picture, show_label=False, buttons=[], container=False))]
        elif not question.options:
            question = replace(question, picture=conversation.picture)
        conversation.question = question
        shown = [*shown, bubble("user", question_html(question)), bubble("assistant", "…")]
        return shown, conversation, busy(), "", ""

    def answer(self, run, max_new_tokens, greedy, temperature, top_p, shown, conversation, request: gr.Request):
        """Streams into the last bubble, if there is a question."""
        if conversation.question is None:
            return
        settings = make_settings(max_new_tokens, greedy, temperature, top_p)
        answer = None
        for answer, text in self.stream(run, conversation.turns, conversation.question, settings, request.session_hash):
            shown[-1]["content"] = f"<div class='note'>{as_html(run)}</div>{text}"
            yield shown, conversation
        if answer:
            conversation.turns = [*conversation.turns, Turn(answer.prompt, answer.text)]
            yield shown, conversation

    def ask_several(self, message, context, options, runs, request: gr.Request):
        """As `ask`, for the comparison."""
        self.stopped.discard(request.session_hash)
        try:
            question, picture = self.read(message, context, options)
            if not 2 <= len(runs) <= MOST_RUNS:
                raise UserError(f"choose 2 to {MOST_RUNS} variants")
        except UserError as error:
            gr.Warning(escape(str(error)), title="Not sent")
            return None, *[gr.skip()] * 6
        return (question, gr.update(value=picture, visible=bool(picture)), question_html(question),
                cards(dict.fromkeys(runs, "…")), busy(), "", "")

    def answer_several(self, runs, max_new_tokens, greedy, temperature, top_p, question, request: gr.Request):
        """Streams into the cards, one run after the other, all with the same seed."""
        if question is None:
            return
        settings = make_settings(max_new_tokens, greedy, temperature, top_p)
        texts = dict.fromkeys(runs, "…")
        for run in runs:
            for _, texts[run] in self.stream(run, [], question, settings, request.session_hash):
                yield cards(texts)

    def stream(self, run: str, turns: list[Turn], question: Question, settings: Settings, session: str
               ) -> Iterator[tuple[Answer | None, str]]:
        """The answer so far and how it is shown; a mistake is told in its place, with None."""
        answer, notes, tokens, start = Answer(""), [], 0, time.perf_counter()
        try:
            for answer in self.bot.answer(run, turns, question, settings):
                if session in self.stopped:
                    notes.append("stopped")
                    break
                tokens += not answer.probabilities
                yield answer, answer_html(answer, question)
        except (UserError, torch.OutOfMemoryError) as error:
            yield None, f"<i>{escape(str(error).splitlines()[0])}</i>"
            return
        notes.append(f"{tokens} tokens in {time.perf_counter() - start:.1f} s")
        if answer.dropped:
            notes.append(f"the {answer.dropped} oldest turns no longer fit and were left out")
        yield answer, answer_html(answer, question, notes)


def make_settings(max_new_tokens, greedy, temperature, top_p) -> Settings:
    return Settings(int(max_new_tokens), 0.0 if greedy else temperature, top_p, seed=time.time_ns() % 2**32)


def bubble(role: str, content) -> dict:
    return {"role": role, "content": content}


def as_html(text: str) -> str:
    """Line breaks as tags: a blank line would end HTML inside Markdown."""
    return escape(text).replace("\n", "<br>")


def question_html(question: Question) -> str:
    options = [f"({letter}) {option}" for letter, option in zip(OPTIONS, question.options)]
    lines = filter(None, [question.text, question.context, *options])
    return "<div class='answer'>" + "<br>".join(map(as_html, lines)) + "</div>"


def answer_html(answer: Answer, question: Question, notes: list[str] = []) -> str:
    parts = [f"<div class='answer'>{as_html(answer.text) or '…'}</div>"]
    if answer.probabilities:
        parts += ["<div class='options'>", *map(option_html, OPTIONS, question.options, answer.probabilities), "</div>"]
    if notes:
        parts.append(f"<div class='note'>{as_html(' · '.join(notes))}</div>")
    return "".join(parts)


def option_html(letter: str, option: str, p: float) -> str:
    return (f"<div class='option'><span>({letter}) {as_html(option)}</span><u><i style='width: {100 * p:.1f}%'></i></u>"
            f"<b>{100 * p:.1f} %</b></div>")


def cards(texts: dict[str, str]) -> str:
    """Answers side by side, by run."""
    inside = "".join(f"<div class='card'><h4>{as_html(run)}</h4>{text}</div>" for run, text in texts.items())
    return f"<div class='cards'>{inside}</div>"


def busy():
    return gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)


def ready():
    return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False)


def find_examples(data_root: str) -> list[list]:
    """Message, context and options of test questions, each of another skill, with pictures and without."""
    try:
        data = load_scienceqa(data_root, "test")
    except UserError:
        return []
    found = {}
    for qid, problem in data.problems.items():
        path = data.picture_path(qid)
        found.setdefault((path is not None, problem["skill"]), [
            {"text": problem["question"], "files": [str(path)] if path else []}, problem["hint"],
            "\n".join(problem["choices"])])
    pictures, texts = ([example for (seen, _), example in found.items() if seen == wanted] for wanted in (True, False))
    return [example for pair in zip(pictures, texts) for example in pair][:N_EXAMPLES]


def message_box(placeholder: str) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(placeholder=placeholder, file_types=["image"], file_count="single", sources=["upload"],
                                show_label=False, lines=1, max_lines=6, autofocus=True)


def show_examples(examples: list[list], fields: list) -> None:
    if examples:
        gr.Examples(examples, fields, label="Examples", visible_columns=[0])


def build(bot: Chatbot, settings: Settings, data_root: str) -> gr.Blocks:
    runs, page, examples = list(bot.runs), Page(bot), find_examples(data_root)
    with gr.Blocks(title="LaVIN", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        options = gr.Textbox(label="Options", lines=4, render=False, placeholder=(
            "One a line, for a multiple-choice question. It is asked on its own, and each option's probability shown."))
        context = gr.Textbox(label="Context", placeholder="A hint to go by", render=False)
        gr.Markdown("# LaVIN\nAsk a finished run about a text or a picture.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=3, min_width=480):
                with gr.Tab("Chat"):
                    with gr.Row(equal_height=True):
                        run = gr.Dropdown(runs, value=runs[0], label="Variant", container=False, scale=4)
                        new = gr.Button("New conversation", size="md", scale=1, min_width=150)
                    shown = gr.Chatbot(elem_id="chat", height="48vh", min_height=300, show_label=False, buttons=[],
                                       allow_file_downloads=False,
                                       placeholder="**Ask anything.**<br>A picture stays until another one comes.")
                    message = message_box("Ask, or drop a picture here")
                    show_examples(examples, [message, context, options])
                with gr.Tab("Compare"):
                    several = gr.Dropdown(runs, value=runs[:2], multiselect=True, max_choices=MOST_RUNS,
                                          label="Variants", container=False)
                    question = message_box(f"One question to 2, 3 or {MOST_RUNS} variants")
                    with gr.Row():
                        picture = gr.Image(show_label=False, visible=False, height=THUMBNAIL, buttons=[],
                                           interactive=False, container=False, scale=0, min_width=THUMBNAIL)
                        asked_text = gr.HTML()
                    answers = gr.HTML()
                    show_examples(examples, [question, context, options])
            with gr.Column(scale=1, min_width=260):
                options.render()
                context.render()
                with gr.Accordion("Sampling", open=True):
                    greedy = gr.Checkbox(settings.temperature == 0, label="Greedy: always the likeliest token")
                    temperature = gr.Slider(0.05, 2, settings.temperature or 0.7, step=0.05, label="Temperature")
                    top_p = gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p")
                    most = max(bot.max_seq_len // 2, 2)  # the conversation has the rest
                    longest = gr.Slider(1, most, min(settings.max_new_tokens, most), step=1, label="Most tokens")

        conversation, asked = gr.State(Conversation()), gr.State()
        sampling = [longest, greedy, temperature, top_p]
        at_once = {"concurrency_limit": None, "show_progress": "hidden"}
        answering = message.submit(page.ask, [message, context, options, shown, conversation],
                                   [shown, conversation, message, context, options], **at_once).then(
            page.answer, [run, *sampling, shown, conversation], [shown, conversation], show_progress="hidden", **MODEL)
        answering.then(ready, None, message, **at_once)
        message.stop(page.stop, None, None, queue=False)
        gr.on([new.click, shown.clear], lambda: ([], Conversation(), ready()), None, [shown, conversation, message],
              cancels=[answering], **at_once)

        comparing = question.submit(page.ask_several, [question, context, options, several],
                                    [asked, picture, asked_text, answers, question, context, options], **at_once).then(
            page.answer_several, [several, *sampling, asked], answers, show_progress="hidden", **MODEL)
        comparing.then(ready, None, question, **at_once)
        question.stop(page.stop, None, None, queue=False)
    return blocks


def serve(bot: Chatbot, settings: Settings, data_root: str, port: int | None, share: bool, **launch):
    """Opens the page on this machine alone, unless shared; returns when interrupted."""
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"],
                              font_mono=["monospace"])  # fonts of the user's own: nothing is fetched
    return build(bot, settings, data_root).queue(max_size=64).launch(
        server_name="127.0.0.1", server_port=port, share=share, theme=theme, css=CSS, footer_links=[], ssr_mode=False,
        max_file_size=MOST_UPLOADED, allowed_paths=[str(Path(data_root, "images").resolve())], **launch)
