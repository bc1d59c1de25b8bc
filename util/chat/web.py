"""The chat as a web page (Gradio): its layout, its events, and its server.

Notable:
- Answers, pictures and turns stay on this machine: Gradio's run history is off, so that nothing is kept in the browser,
  and the browser is told to load nothing from elsewhere, whatever a text names.
- The server remembers the conversation, so that a message does not carry it back and forth. While an answer grows, it
  is in a chatbot of its own, so that the browser draws the others only once for each answer, however many there are.
"""

import time
from contextlib import nullcontext
from pathlib import Path

from starlette.middleware import Middleware

from lavin.runtime.console import print_rank0
from util.chat.address import notice, without_proxy
from util.chat.asking import message_box
from util.chat.bubbles import THUMBNAIL_SIZE
from util.chat.chatbot import Chatbot, Settings
from util.chat.examples import find_examples
from util.chat.own_gradio import gr
from util.chat.web_chat import ChatTab, Session
from util.chat.web_compare import MAX_RUNS, CompareTab, Comparison
from util.chat.web_html import CSS, DOWNLOAD, JS

# one queue for all events that use the model; the place in it is shown
MODEL_QUEUE = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
NO_QUEUE = {"concurrency_limit": None, "show_progress": "hidden"}
MAX_UPLOAD = "20mb"
HOUR, DAY = 3600, 86400
PLACEHOLDER = "**Ask anything.**<br>A picture stays until another one comes, or you remove it."
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class ContentPolicy:
    """Tells the browser, with each reply, to load nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY)]
            await send(message)
        await self.app(scope, receive, send_with_policy)


def build(bot: Chatbot, settings: Settings, data_root: str) -> gr.Blocks:
    examples = find_examples(data_root)
    right = {(message["text"], tuple(options.split("\n"))): answer for message, _, options, answer in examples}
    runs = list(bot.runs)
    with gr.Blocks(title="LaVIN", analytics_enabled=False, delete_cache=(HOUR, DAY)) as blocks:
        gr.Markdown("# LaVIN\nAsk a finished run about a text or a picture.", elem_id="title")
        options = gr.Textbox(label="Options", lines=4, render=False, placeholder=(
            "One a line, for a multiple-choice question. It is asked on its own, and each option's probability shown."))
        context = gr.Textbox(label="Context", placeholder="A hint for the question", render=False)
        sampling = sampling_controls(settings, bot.max_seq_len)
        session, comparison = gr.State(Session()), gr.State(Comparison())
        with gr.Row():
            with gr.Column(scale=3, min_width=320), gr.Tabs() as tabs:
                with gr.Tab("Chat", id="chat"):
                    compare = chat_tab(ChatTab(bot, right), runs, session, [context, options], sampling, examples)
                with gr.Tab("Compare", id="compare"):
                    compare_tab(CompareTab(bot, right), runs, comparison, [context, options], sampling, examples,
                                session, compare, tabs)
            with gr.Column(scale=1, min_width=260):
                options.render()
                context.render()
                with gr.Accordion("Sampling", open=True):
                    for control in sampling:
                        control.render()
        _, greedy, *drawing = sampling
        greedy.change(lambda is_greedy: [gr.update(interactive=not is_greedy)] * len(drawing), greedy, drawing,
                      queue=False, show_progress="hidden", api_visibility="private")
        blocks.load(js=JS)
    return blocks


def chat_tab(tab: ChatTab, runs: list[str], session, fields: list, sampling: list, examples: list[list]) -> gr.Button:
    """Lays out the tab Chat; returns its button that opens a comparison."""
    with gr.Row(equal_height=True):
        run = gr.Dropdown(runs, value=runs[0], label="Variant", container=False, scale=4, min_width=240)
        new = gr.Button("New conversation", size="md", scale=1, min_width=150)
    compare, markdown, json = (gr.Button(name, render=False) for name in (
        "Compare", "Save Markdown", "Save JSON"))
    with gr.Column(elem_id="chat"):
        history, growing = (gr.Chatbot(
            elem_id=name, height="auto", container=False, label=name.capitalize(), show_label=False, autoscroll=False,
            buttons=buttons, allow_file_downloads=False, group_consecutive_messages=False, editable=editable,
            placeholder=placeholder) for name, buttons, editable, placeholder in (
                ("conversation", ["copy", compare, markdown, json], "user", PLACEHOLDER),
                ("growing", [], None, " ")))
    message = message_box("Ask, or drop a picture here", "message")
    show_examples(examples, [message, *fields])

    box, shown = [message, *fields], [history, growing]
    asked = [
        message.submit(tab.send, [*box, session], [growing, *box, session], api_name="send", **NO_QUEUE),
        history.retry(tab.retry, session, [*shown, message, session], api_visibility="private", **NO_QUEUE),
        history.edit(tab.edit, session, [*shown, message, session], api_visibility="private", **NO_QUEUE)]
    answering = [event.then(tab.answer, [run, *sampling, session], [*shown, *box, session], api_name="answer",
                            show_progress_on=growing, **MODEL_QUEUE) for event in asked]
    for event in answering:
        event.then(tab.finish, session, [growing, message, session], api_visibility="private", **NO_QUEUE)
    message.stop(tab.stop, session, None, queue=False, api_visibility="private")
    history.undo(tab.undo, session, [history, *box, session], api_visibility="private", **NO_QUEUE)
    gr.on([new.click, history.clear], tab.new, None, [*shown, message, session], cancels=answering,
          api_visibility="private", **NO_QUEUE)
    text, name = gr.Textbox(visible=False), gr.Textbox(visible=False)
    for button, write in ((markdown, tab.markdown), (json, tab.json)):
        button.click(write, session, [text, name], api_visibility="private", **NO_QUEUE).then(
            None, [text, name], None, js=DOWNLOAD)
    return compare


def compare_tab(tab: CompareTab, runs: list[str], comparison, fields: list, sampling: list, examples: list[list],
                session, compare: gr.Button, tabs: gr.Tabs) -> None:
    """Lays out the tab Compare."""
    with gr.Row():
        chosen = gr.Dropdown(runs, value=runs[:2], multiselect=True, max_choices=MAX_RUNS, label="Variants",
                             container=False, scale=4, min_width=240)
        again = gr.Button("Ask again", size="md", scale=1, min_width=150)
    message = message_box(f"One question to 2, 3 or {MAX_RUNS} variants", "compared-message")
    with gr.Row():
        picture = gr.Image(show_label=False, visible=False, buttons=[], interactive=False,
                           container=False, scale=0, min_width=THUMBNAIL_SIZE)
        with gr.Column():
            question, details = gr.Markdown(elem_id="compared-question"), gr.HTML(elem_id="compared-details")
    cards: list = []
    with gr.Row(equal_height=True):
        for _ in range(MAX_RUNS):
            with gr.Column(visible=False, min_width=220, elem_classes="card") as card:
                cards += [card, gr.HTML(), gr.Markdown(elem_classes="answer"), gr.HTML()]
    show_examples(examples, [message, *fields])

    shown, box = [picture, question, details, *cards], [message, *fields]
    asked = [
        message.submit(tab.send, [*box, chosen, comparison, *sampling], [*shown, *box, comparison],
                       api_name="compare", **NO_QUEUE),
        again.click(tab.again, [chosen, comparison, *sampling], [*shown, message, comparison],
                    api_visibility="private", **NO_QUEUE),
        compare.click(tab.last_of_chat, [session, chosen, comparison, *sampling], [*shown, message, comparison, tabs],
                      api_visibility="private", **NO_QUEUE)]
    for event in asked:
        event.then(tab.answer, comparison, cards, api_name="answer_several",
                   show_progress_on=question, **MODEL_QUEUE).then(
            tab.finish, comparison, [message, comparison], api_visibility="private", **NO_QUEUE)
    message.stop(tab.stop, comparison, None, queue=False, api_visibility="private")


def show_examples(examples: list[list], fields: list) -> None:
    if examples:
        gr.Examples([example[:3] for example in examples], fields, label="Examples", visible_columns=[0])


def sampling_controls(settings: Settings, max_seq_len: int) -> list:
    """Makes the inputs of `make_settings`, in its order, which are still to be rendered."""
    is_greedy, limit = settings.temperature == 0, max(max_seq_len // 2, 2)  # the other half is for the conversation
    max_new_tokens = gr.Slider(1, limit, min(settings.max_new_tokens, limit), step=1, label="Most tokens", render=False)
    greedy = gr.Checkbox(is_greedy, label="Greedy: always the likeliest token", render=False)
    drawing = [gr.Slider(0.05, 2, settings.temperature or 0.7, step=0.05, label="Temperature",
                         interactive=not is_greedy, render=False),
               gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p", interactive=not is_greedy, render=False),
               gr.Textbox(label="Seed", placeholder="another one each time", interactive=not is_greedy, render=False)]
    return [max_new_tokens, greedy, *drawing]


def serve(bot: Chatbot, settings: Settings, data_root: str, port: int | None = None, share: bool = False,
          server_name: str = "127.0.0.1", auth: tuple[str, str] | None = None, block: bool = True, quiet: bool = False):
    """Runs the page, until interrupted if `block`. Only this machine can connect, unless `share` or `server_name` says
    otherwise.
    """
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"],
                              font_mono=["monospace"])  # system fonts: the browser downloads none
    theme.set(body_text_color_subdued="*neutral_500", input_placeholder_color="*neutral_500",
              input_placeholder_color_dark="*neutral_400")  # which can be read
    blocks = build(bot, settings, data_root).queue(max_size=64)
    with nullcontext() if share else without_proxy():
        launched = blocks.launch(
            server_name=f"[{server_name}]" if ":" in server_name and "[" not in server_name else server_name,
            server_port=port, share=share, auth=auth, theme=theme, css=CSS, footer_links=[], ssr_mode=False,
            run_history=False, app_kwargs={"middleware": [Middleware(ContentPolicy)]},
            max_file_size=MAX_UPLOAD, allowed_paths=[str(Path(data_root, "images").resolve())],
            prevent_thread_lock=True, quiet=True)
    if not quiet:
        print_rank0(f"the page is at {launched[1].rstrip('/')} (Ctrl-C closes it)")
    if warning := notice(server_name, blocks.server_port):
        print_rank0(warning)
    if block:
        wait(blocks, bot)
    return launched


def wait(blocks: gr.Blocks, bot: Chatbot) -> None:
    """Serves the page until Ctrl-C. The server's thread ends with the program: closing it would wait for browsers."""
    try:
        while blocks.is_running:
            time.sleep(0.1)
    except KeyboardInterrupt:
        print_rank0("\nthe page is closed")
    finally:
        bot.end()
