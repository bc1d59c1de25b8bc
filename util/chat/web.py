"""The chat as a web page (Gradio): a conversation with one run, or one question to several runs.

Notable:
- A message is handled in two steps. The first reads the message and its image at once, however many users wait. The
  second waits in the queue for the model. So an invalid message is refused without delay for anyone.
- Images arrive as files and are opened by util.chat.uploads, not by Gradio, whose error messages do not help users.
- Answers are shown as HTML from util.chat.web_html, which escapes the model's output.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import torch
from PIL import Image

from lavin.runtime.console import print_rank0
from lavin.runtime.errors import UserError
from util.chat.address import notice, without_proxy
from util.chat.chatbot import Answer, Chatbot, Question, Settings, Turn, make_prompt
from util.chat.examples import find_examples
from util.chat.uploads import open_image
from util.chat.web_html import CSS, answer_html, cards_html, note_html, question_html
from util.data.images import image_to_tensor

os.environ["MPLBACKEND"] = "Agg"  # Gradio sets Matplotlib's backend after each message, and a notebook's is not there
# else /tmp/gradio, which another user of this machine may own
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(tempfile.gettempdir(), f"gradio-{os.getuid()}")))
# Kubernetes gives it the address of a service of this name, which Gradio cannot read; the page has --port
os.environ.pop("GRADIO_SERVER_PORT", None)
with without_proxy():
    import gradio as gr

MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1}  # one queue for all events that use the model
NO_QUEUE = {"concurrency_limit": None, "show_progress": "hidden"}
MAX_RUNS = 4  # in one comparison
THUMBNAIL_SIZE = 200  # pixels
MAX_UPLOAD = "20mb"


@dataclass
class Conversation:
    """The conversation of one user.

    `image` is the latest one sent, and `question` the one to be answered next, or None if it was refused.
    """

    turns: list[Turn] = field(default_factory=list)
    image: torch.Tensor | None = None
    question: Question | None = None


class Page:
    """The event handlers of the page. `stopped` holds the sessions whose user pressed stop."""

    def __init__(self, bot: Chatbot):
        self.bot = bot
        self.stopped = set()

    def stop(self, request: gr.Request):
        self.stopped.add(request.session_hash)

    def read(self, message: dict, context: str, options: str) -> tuple[Question, Image.Image | None]:
        """Returns a message as a question, and a thumbnail of its image. Raises UserError where the message is invalid.
        """
        question = Question((message["text"] or "").strip(), None, (context or "").strip(),
                            tuple(line.strip() for line in (options or "").split("\n") if line.strip()))
        try:
            make_prompt(question, "QCM-A").encode()  # validates; any prompt format will do
        except UnicodeError as error:  # JSON can spell half a character
            raise UserError("the question is not UTF-8 text: write it again") from error
        if not message["files"]:
            return question, None
        thumbnail = open_image(message["files"][-1])
        question = replace(question, image=image_to_tensor(thumbnail, self.bot.model.vision.image_size))
        thumbnail.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        return question, thumbnail

    def ask(self, message, context, options, history, conversation, request: gr.Request):
        """Adds a message to the conversation and clears the input fields; if it is invalid, they keep their content."""
        self.stopped.discard(request.session_hash)
        conversation.question = None
        try:
            question, thumbnail = self.read(message, context, options)
        except UserError as error:
            gr.Warning(escape(str(error)), title="Not sent")
            return gr.skip(), conversation, gr.skip(), gr.skip(), gr.skip()
        if thumbnail:
            conversation.image = question.image
            history = [*history, bubble("user", gr.Image(thumbnail, show_label=False, buttons=[], container=False))]
        elif not question.options:
            question = replace(question, image=conversation.image)
        conversation.question = question
        history = [*history, bubble("user", question_html(question)), bubble("assistant", "…")]
        return history, conversation, busy(), "", ""

    def answer(self, run, max_new_tokens, greedy, temperature, top_p, history, conversation, request: gr.Request):
        """Streams the answer into the last bubble, unless the question was refused, or the conversation cleared."""
        if conversation.question is None or not history:
            return
        settings = make_settings(max_new_tokens, greedy, temperature, top_p)
        answer = None
        for partial, html in self.stream(run, conversation.turns, conversation.question, settings,
                                         request.session_hash):
            answer = partial
            history[-1]["content"] = note_html(run or "") + html
            yield history, conversation
        if answer:
            conversation.turns = [*conversation.turns, Turn(answer.prompt, answer.text)]
            yield history, conversation

    def ask_several(self, message, context, options, runs, request: gr.Request):
        """Adds a message to the comparison, as `ask` does to the conversation."""
        self.stopped.discard(request.session_hash)
        try:
            question, thumbnail = self.read(message, context, options)
            if not 2 <= len(runs) <= MAX_RUNS:
                raise UserError(f"choose 2 to {MAX_RUNS} variants")
        except UserError as error:
            gr.Warning(escape(str(error)), title="Not sent")
            return None, *[gr.skip()] * 6
        return (question, gr.update(value=thumbnail, visible=bool(thumbnail)), question_html(question),
                cards_html(dict.fromkeys(runs, "…")), busy(), "", "")

    def answer_several(self, runs, max_new_tokens, greedy, temperature, top_p, question, request: gr.Request):
        """Streams the answers into the cards, one run after the other, with the same seed for all."""
        if question is None:
            return
        settings = make_settings(max_new_tokens, greedy, temperature, top_p)
        answers = dict.fromkeys(runs, "…")
        for run in runs:
            for _, html in self.stream(run, [], question, settings, request.session_hash):
                answers[run] = html
                yield cards_html(answers)

    def stream(self, run: str, turns: list[Turn], question: Question, settings: Settings, session: str
               ) -> Iterator[tuple[Answer | None, str]]:
        """Yields the answer so far and its HTML; on an error, None and the error message as HTML."""
        answer, notes, tokens, start = Answer(""), [], 0, time.perf_counter()
        try:
            if run not in self.bot.runs:
                raise UserError("choose a variant")
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


def busy():
    return gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)


def ready():
    return gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False)


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
                    history = gr.Chatbot(elem_id="chat", height="48vh", min_height=300, show_label=False, buttons=[],
                                         allow_file_downloads=False,
                                         placeholder="**Ask anything.**<br>A picture stays until another one comes.")
                    message = message_box("Ask, or drop a picture here")
                    show_examples(examples, [message, context, options])
                with gr.Tab("Compare"):
                    compared_runs = gr.Dropdown(runs, value=runs[:2], multiselect=True, max_choices=MAX_RUNS,
                                                label="Variants", container=False)
                    question = message_box(f"One question to 2, 3 or {MAX_RUNS} variants")
                    with gr.Row():
                        thumbnail = gr.Image(show_label=False, visible=False, height=THUMBNAIL_SIZE, buttons=[],
                                             interactive=False, container=False, scale=0, min_width=THUMBNAIL_SIZE)
                        question_text = gr.HTML()
                    answers = gr.HTML()
                    show_examples(examples, [question, context, options])
            with gr.Column(scale=1, min_width=260):
                options.render()
                context.render()
                sampling = sampling_controls(settings, bot.max_seq_len)

        conversation, submitted = gr.State(Conversation()), gr.State()  # submitted: the question to be compared
        answering = message.submit(page.ask, [message, context, options, history, conversation],
                                   [history, conversation, message, context, options], **NO_QUEUE).then(
            page.answer, [run, *sampling, history, conversation], [history, conversation], show_progress="hidden",
            **MODEL_QUEUE)
        answering.then(ready, None, message, **NO_QUEUE)
        message.stop(page.stop, None, None, queue=False)
        gr.on([new.click, history.clear], lambda: ([], Conversation(), ready()), None, [history, conversation, message],
              cancels=[answering], **NO_QUEUE)

        comparing = question.submit(
            page.ask_several, [question, context, options, compared_runs],
            [submitted, thumbnail, question_text, answers, question, context, options], **NO_QUEUE).then(
            page.answer_several, [compared_runs, *sampling, submitted], answers, show_progress="hidden", **MODEL_QUEUE)
        comparing.then(ready, None, question, **NO_QUEUE)
        question.stop(page.stop, None, None, queue=False)
    return blocks


def sampling_controls(settings: Settings, max_seq_len: int) -> list:
    """Makes the inputs of `make_settings`, in its order."""
    with gr.Accordion("Sampling", open=True):
        greedy = gr.Checkbox(settings.temperature == 0, label="Greedy: always the likeliest token")
        temperature = gr.Slider(0.05, 2, settings.temperature or 0.7, step=0.05, label="Temperature")
        top_p = gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p")
        limit = max(max_seq_len // 2, 2)  # the other half is for the conversation
        max_new_tokens = gr.Slider(1, limit, min(settings.max_new_tokens, limit), step=1, label="Most tokens")
    return [max_new_tokens, greedy, temperature, top_p]


def serve(bot: Chatbot, settings: Settings, data_root: str, port: int | None = None, share: bool = False,
          server_name: str = "127.0.0.1", auth: tuple[str, str] | None = None, block: bool = True, **launch):
    """Runs the page, until interrupted if `block`. Only this machine can connect, unless `share` or `server_name` says
    otherwise.
    """
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"],
                              font_mono=["monospace"])  # system fonts: the browser downloads none
    blocks = build(bot, settings, data_root).queue(max_size=64)
    with nullcontext() if share else without_proxy():
        launched = blocks.launch(
            server_name=f"[{server_name}]" if ":" in server_name and "[" not in server_name else server_name,
            server_port=port, share=share, auth=auth, theme=theme, css=CSS, footer_links=[], ssr_mode=False,
            max_file_size=MAX_UPLOAD, allowed_paths=[str(Path(data_root, "images").resolve())],
            prevent_thread_lock=True, **launch)
    if warning := notice(server_name, blocks.server_port):
        print_rank0(warning)
    if block:
        blocks.block_thread()
    return launched
