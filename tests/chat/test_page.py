"""The web page in headless Chromium. The tests need requirements/demo.txt, playwright and Chromium, and are skipped
without them.

The test with axe-core needs the variable AXE, which names its axe.min.js (npm install axe-core, anywhere).
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

import demo
import lavin.generation.generate
from tiny_runs import write_run
from util.chat.chatbot import Question, Settings, Turn
from util.chat.command import load_chatbot
from util.chat.examples import find_examples
from util.chat.markdown import without_html
from util.data.images import load_image

SETTINGS = Settings(max_new_tokens=16)
QUESTION = "Which pond crosses the map?"
SECONDS_PER_TOKEN = 0.04  # slow enough for the tests to observe partial answers


@pytest.fixture(scope="module")
def bot(base, scienceqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second", "third")):
        write_run(folder / name, base, seed)
    return load_chatbot(demo.get_args_parser().parse_args(["--runs", str(folder), "--device", "cpu"]))


def expected(bot, run: str = "first", question: Question | None = None):
    *_, answer = bot.answer(run, [], question or Question(QUESTION), SETTINGS)
    return answer


def one_line(text: str) -> str:
    """Collapse whitespace, as browsers do."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def address(bot, scienceqa):
    gradio = pytest.importorskip("gradio")
    from util.chat.web import serve
    _, address, _ = serve(bot, SETTINGS, str(scienceqa), block=False, quiet=True)
    decode = lavin.generation.generate.decode
    lavin.generation.generate.decode = lambda *args: (time.sleep(SECONDS_PER_TOKEN) or ids for ids in decode(*args))
    yield address
    lavin.generation.generate.decode = decode
    gradio.close_all()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield browser


@pytest.fixture
def page(browser, address):
    yield from open_page(browser, address)


@pytest.fixture
def other_page(browser, address):
    yield from open_page(browser, address)


def open_page(browser, address, **context):
    page = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **context).new_page()
    page.set_default_timeout(20_000)
    page.goto(address)
    page.locator("#message textarea").wait_for()
    yield page
    page.context.close()


def message_box(page, name: str = "message"):
    return page.locator(f"#{name} textarea")


def send(page, text: str = QUESTION, picture=None, box: str = "message") -> None:
    if picture:
        page.locator(f"#{box} input[type=file]").first.set_input_files(picture)
        page.locator(f"#{box} .thumbnail-item").first.wait_for()
    message_box(page, box).fill(text)
    message_box(page, box).press("Enter")


def ask(page, *message) -> str:
    """Sends a message; returns its answer."""
    before = page.locator("#conversation .note").count()
    send(page, *message)
    return answer_number(page, before + 1)


def answer_number(page, n: int) -> str:
    """Waits until there are n complete answers; returns the last one."""
    page.wait_for_function("n => document.querySelectorAll('#conversation .note').length == n", arg=n)
    page.locator("button.submit-button:visible").wait_for()
    return one_line(page.locator("#conversation .bot .md").last.inner_text())


def shown(page) -> list[str]:
    """The texts of all bubbles."""
    return page.locator("#conversation [data-testid=user], #conversation [data-testid=bot]").all_inner_texts()


def refused(page, reason: str) -> None:
    """Waits for the toast with the reason, and closes it."""
    page.locator("[data-testid=toast-body]", has_text=f"Not sent: {reason}").wait_for()
    page.locator("[data-testid=toast-close]").click()
    page.locator("[data-testid=toast-body]").wait_for(state="detached")


def press(page, name: str) -> None:
    """Presses one of the buttons below the last message that has it."""
    page.locator(f"#conversation [aria-label='{name}']:visible").last.click()


def picture_of(scienceqa) -> Path:
    return next(Path(scienceqa).glob("images/test/*/image.png"))


def test_server_listens_on_localhost_only(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert not demo.get_args_parser().parse_args([]).share


def test_tokens_arrive_before_the_answer_ends(page, bot):
    send(page)
    page.locator("#growing .bot .md").wait_for()
    growing = set()
    while not page.locator("#conversation .note").count():
        growing.update(map(one_line, page.locator("#growing .bot .md").all_inner_texts()))
        page.wait_for_timeout(20)
    complete = one_line(expected(bot).text)
    assert answer_number(page, 1) == complete
    partial = growing - {"…", "", complete}
    assert len(partial) >= 3 and all(complete.startswith(part) for part in partial)


def test_image_upload_and_another_run(page, bot, scienceqa):
    path = picture_of(scienceqa)
    question = Question(QUESTION, load_image(path, bot.model.vision.image_size))
    assert ask(page, QUESTION, path) == one_line(expected(bot, "first", question).text) != one_line(expected(bot).text)
    assert page.locator("#conversation .user img").count() == 1
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("document.querySelectorAll('.bot').length == 0")
    page.get_by_role("combobox", name="Variant").click()
    page.get_by_role("option", name="second").click()
    assert ask(page) == one_line(expected(bot, "second").text)  # without the image
    assert page.locator("#conversation .note").inner_text().startswith("second · ")


def test_a_picture_is_in_use_until_it_is_removed(page, bot, scienceqa):
    """The box shows it, also for questions with options."""
    image, options = load_image(picture_of(scienceqa), bot.model.vision.image_size), ("north", "south")
    ask(page, QUESTION, picture_of(scienceqa))
    page.get_by_role("textbox", name="Options").fill("\n".join(options))
    with_picture, without = (expected(bot, "first", Question(QUESTION, i, options=options)) for i in (image, None))
    assert with_picture.probabilities != without.probabilities
    assert ask(page) == one_line(with_picture.text)
    assert page.locator(".option b").last.inner_text() == f"{100 * with_picture.probabilities[1]:.1f} %"
    assert page.locator("#conversation .user img").count() == 1  # where it was sent, and not again
    thumbnail = page.locator("#message .thumbnail-item")
    assert thumbnail.count() == 1
    thumbnail.hover()
    page.locator("#message .delete-button").click()
    page.get_by_role("textbox", name="Options").fill("\n".join(options))
    assert ask(page) == one_line(without.text) and thumbnail.count() == 0


def test_a_refused_message_changes_nothing(page, scienceqa, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    ask(page, QUESTION, picture_of(scienceqa))
    ask(page, "And?")
    before = shown(page)
    options = page.get_by_role("textbox", name="Options")
    for text, given, reason in (("", "", "write a question"), ("Why?", "one", "give 2 to 5 options"),
                                ("Why?", "a\nb\nc\nd\ne\nf", "give 2 to 5 options"),
                                ("pond " * 300 + "?", "", "the question has")):  # which only the model refuses
        options.fill(given)
        send(page, text)
        refused(page, reason)
        page.locator("button.submit-button:visible").wait_for()
        assert shown(page) == before and message_box(page).input_value() == text
        assert page.locator("#growing .message").count() == 0 and options.input_value() == given
    options.fill("")
    page.locator("#conversation [aria-label=Edit]").first.click()
    page.locator("#conversation textarea").fill("")
    page.locator("#conversation [aria-label=Submit]").click()
    refused(page, "write a question")
    assert shown(page) == before
    send(page, "Why?", tmp_path / "text.png")
    refused(page, "text.png is not a picture")
    assert shown(page) == before and message_box(page).input_value() == "Why?"


def test_a_refused_message_changes_no_comparison(page):
    page.get_by_role("tab", name="Compare").click()
    send(page, box="compared-message")
    page.locator(".card .note", has_text="tokens in").nth(1).wait_for()
    page.locator("#compared-message button.submit-button:visible").wait_for()
    before = page.locator(".card").all_inner_texts()
    send(page, "", box="compared-message")
    refused(page, "write a question")
    page.get_by_role("textbox", name="Options").fill("one")
    send(page, "Why?", box="compared-message")
    refused(page, "give 2 to 5 options")
    page.get_by_label("Greedy").uncheck()
    page.wait_for_function("!document.querySelector('[aria-label*=Temperature]').disabled")
    page.get_by_label("Seed").fill("x")
    page.get_by_role("button", name="Ask again").click()
    refused(page, "the seed x is no whole number")
    assert page.locator(".card").all_inner_texts() == before
    assert message_box(page, "compared-message").input_value() == "Why?"


def test_a_question_that_is_sent_twice_is_answered_once(bot, scienceqa):
    """Before the box is closed, or by a button of another message."""
    pytest.importorskip("gradio")
    from util.chat.web_chat import ChatTab, Session
    tab, session, sampling = ChatTab(bot, {}), Session(), ("first", 8, True, 0.7, 0.9, "")
    message = {"text": QUESTION, "files": []}
    tab.send(message, "", "", session)
    with pytest.warns(UserWarning, match="still being written"):
        tab.send(message, "", "", session)
    first, second = tab.answer(*sampling, session), tab.answer(*sampling, session)
    next(first)
    with pytest.warns(UserWarning, match="still being written"):
        tab.send(message, "", "", session)
    list(second)
    tab.finish(session)
    assert session.is_answering
    list(first)
    assert len(session.conversation.exchanges) == 1 and len(session.bubbles) == 2
    tab.finish(session)
    tab.send(message, "", "", session)
    list(tab.answer(*sampling, session))
    assert len(session.conversation.exchanges) == 2


def test_stop(page, bot):
    send(page)
    page.wait_for_function("document.querySelector('#growing .bot .md')?.innerText.length > 3")
    page.locator("button.stop-button").click()
    page.locator("#conversation .note", has_text="stopped").wait_for()
    complete, answer = one_line(expected(bot).text), answer_number(page, 1)
    assert complete.startswith(answer) and answer != complete
    ask(page, "Why?")  # the conversation continues


def test_a_question_is_asked_again_edited_and_taken_back(page, bot, scienceqa):
    path = picture_of(scienceqa)
    first = ask(page, QUESTION, path)
    page.get_by_role("textbox", name="Context").fill("It is deep.")
    ask(page, "Why?")
    page.get_by_role("combobox", name="Variant").click()
    page.get_by_role("option", name="second").click()
    press(page, "Retry")
    page.locator("#conversation .note", has_text="second").wait_for()
    assert len(page.locator("#conversation .note").all()) == 2 and shown(page).count("Why?") == 1
    page.locator("button.submit-button:visible").wait_for()
    press(page, "Undo")
    page.wait_for_function("document.querySelectorAll('#conversation .note').length == 1")
    assert message_box(page).input_value() == "Why?"
    assert page.get_by_role("textbox", name="Context").input_value() == "It is deep."
    assert page.locator("#message .thumbnail-item").count() == 1
    page.locator("#conversation [aria-label=Edit]").last.click()
    page.locator("#conversation textarea").fill("Is <b> so?")
    page.locator("#conversation [aria-label=Submit]").click()
    page.locator("#conversation .note", has_text="second").wait_for()
    question = Question("Is <b> so?", load_image(path, bot.model.vision.image_size))
    assert answer_number(page, 1) == one_line(expected(bot, "second", question).text) != first
    assert "Is <b> so?" in shown(page)


def test_texts_are_copied_and_the_conversation_saved_as_they_are(page, bot):
    ask(page, "Is `<b>` so?")
    press(page, "Copy message")
    assert page.evaluate("navigator.clipboard.readText()") == without_html(expected(
        bot, "first", Question("Is `<b>` so?")).text)
    saved = {}
    for name in ("Markdown", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save {name}").click()
        saved[download.value.suggested_filename] = Path(download.value.path()).read_text()
    exchange, = json.loads(saved["conversation.json"])
    assert exchange["question"] == "Is `<b>` so?" and exchange["run"] == "first"
    assert "**You:** Is `<b>` so?" in saved["conversation.md"]


def test_the_reader_stays_where_he_scrolls_while_an_answer_grows(page):
    for i in range(3):
        ask(page, f"Question {i}?")
    place, end = (f"(chat => {formula})(document.querySelector('#chat'))" for formula in (
        "chat.scrollTop", "chat.scrollHeight - chat.scrollTop - chat.clientHeight"))
    send(page)
    page.wait_for_function("document.querySelector('#growing .bot .md')?.innerText.length > 1")
    assert page.evaluate(end) < 5
    page.mouse.move(300, 400)
    page.mouse.wheel(0, -150)
    page.wait_for_function(f"{end} > 100")
    before = page.evaluate(place)
    answer_number(page, 4)
    page.wait_for_timeout(400)
    assert page.evaluate(place) == before
    ask(page)  # goes to the new question
    page.wait_for_function(f"{end} < 5")


def test_nothing_stays_in_the_browser_and_nothing_is_listed(page, address, scienceqa):
    ask(page, QUESTION, picture_of(scienceqa))
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
    assert page.context.cookies() == [] or all(len(cookie["value"]) < 100 for cookie in page.context.cookies())
    assert page.request.get(f"{address}gradio_api/runs").status == 404


def test_streaming_sends_only_what_changed_and_writes_pictures_once(bot, scienceqa, monkeypatch):
    """However long the conversation is, and however many pictures it has."""
    gradio = pytest.importorskip("gradio")
    from util.chat import bubbles
    from util.chat.web_chat import ChatTab, Session
    tab, session, written = ChatTab(bot, {}), Session(), []
    monkeypatch.setattr(bubbles, "save_pil_to_cache", lambda *a, save=bubbles.save_pil_to_cache, **b: written.append(
        save(*a, **b)) or written[-1])
    for i in range(3):
        tab.send({"text": f"Question {i}?", "files": [str(picture_of(scienceqa))]}, "", "", session)
        *growing, last = tab.answer("first", 8, True, 0.7, 0.9, "", session)
        assert growing and all(history == gradio.skip() and len(grown) == 2 for history, grown, *_ in growing)
        assert len(last[0]) == 2 * (i + 1) and last[1] == []
        pictures = [part.file.path for message in last[0] for part in message.content if part.type == "file"]
        assert pictures == written and len(written) == 1  # shown where it was sent; a name, not pixels


def test_texts_are_markdown_without_html_and_the_browser_fetches_nothing(page, bot, monkeypatch):
    text = ("**bold** <b id=x>tag</b>\r\r<img src='http://127.0.0.1:9/a.png'> ![picture](http://127.0.0.1:9/b.png) "
            "<script>document.title = 'x'</script> `<i>code</i>`\n\n```\n<u>code</u>\n```\n<table background='x'>")
    monkeypatch.setattr("util.chat.chatbot.stream", lambda *_: iter([text]))
    fetched = []
    page.on("response", lambda response: fetched.append(response.url))
    page.on("requestfailed", lambda request: fetched.append(request.url) if request.failure != "csp" else None)
    page.get_by_role("textbox", name="Context").fill(text)
    page.get_by_role("textbox", name="Options").fill("<b id=x>a</b>\n{{b}} ${1 + 1}")
    bot.max_seq_len, before = 2000, bot.max_seq_len
    try:
        ask(page, text)
    finally:
        bot.max_seq_len = before
    for side in ("user", "bot"):
        bubble = page.locator(f"#conversation .{side} .md").last
        assert bubble.locator("strong").inner_text() == "bold"
        assert bubble.locator("b, script, u, i, table").count() == 0
        assert bubble.locator("code").first.inner_text() == "<i>code</i>"
        assert "<b id=x>tag</b>" in bubble.inner_text() and "<u>code</u>" in bubble.locator("pre").inner_text()
    assert page.locator("#x").count() == 0 and page.title() == "LaVIN"
    assert "(B) {{b}} ${1 + 1}" in page.locator(".details").inner_text()
    assert fetched and not [url for url in fetched if "127.0.0.1:9/" in url]


def test_options_show_their_probabilities_and_examples_their_answer(page, bot, scienceqa):
    page.get_by_role("textbox", name="Options").fill("north\nsouth\nold")
    page.get_by_role("textbox", name="Context").fill("It is deep.")
    answer = ask(page)
    expected_answer = expected(bot, "first", Question(QUESTION, None, "It is deep.", ("north", "south", "old")))
    assert answer == one_line(expected_answer.text)
    rows = [one_line(row.inner_text()) for row in page.locator("#conversation .option").all()]
    assert rows == [f"({letter}) {option} {100 * p:.1f} %" for letter, option, p
                    in zip("ABC", ("north", "south", "old"), expected_answer.probabilities, strict=True)]
    assert page.get_by_role("textbox", name="Options").input_value() == ""  # cleared after the question
    message, context, options, right = find_examples(str(scienceqa))[0]
    page.locator(".gallery-item:visible").first.click()
    page.wait_for_function("text => document.querySelector('#message textarea').value == text", arg=message["text"])
    assert page.get_by_role("textbox", name="Options").input_value() == options
    message_box(page).press("Enter")
    answer_number(page, 2)
    note = page.locator("#conversation .note").last.inner_text()
    assert f"right answer: ({'ABCDE'[right]}) {options.splitlines()[right]}" in note
    assert page.locator("#conversation .option.right span").inner_text().endswith("✓")


def test_compare(page, bot):
    page.get_by_role("tab", name="Compare").click()
    send(page, box="compared-message")
    page.locator(".card .note", has_text="tokens in").nth(1).wait_for()
    names = page.locator(".card-title:visible").all_inner_texts()
    answers = [one_line(text) for text in page.locator(".card .answer .md:visible").all_inner_texts()]
    assert names == ["first", "second"]
    assert answers == [one_line(expected(bot, run).text) for run in names]


def test_the_last_question_of_the_chat_is_compared_as_it_was_asked(page, bot):
    first, why = ask(page), ask(page, "Why?")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator(".card .note", has_text="tokens in").nth(1).wait_for()
    turns = [Turn(f"Instruction: {QUESTION}\nResponse:", expected(bot).text)]
    answers = [one_line(text) for text in page.locator(".card .answer .md:visible").all_inner_texts()]
    *_, second = bot.answer("second", turns, Question("Why?"), SETTINGS)
    assert one_line(expected(bot).text) == first and answers == [why, one_line(second.text)]
    page.locator("#compared-message button.submit-button:visible").wait_for()
    page.get_by_role("button", name="Ask again").click()
    page.locator("#compared-message button.stop-button:visible").wait_for()
    page.locator(".card .note", has_text="tokens in").nth(1).wait_for()
    assert [one_line(text) for text in page.locator(".card .answer .md:visible").all_inner_texts()] == answers


def test_compared_variants_sample_with_one_seed(bot, monkeypatch):
    seeds = []
    monkeypatch.setattr(bot, "answer", lambda run, turns, question, settings: seeds.append(settings.seed) or iter(()))
    pytest.importorskip("gradio", reason="needs gradio")
    from util.chat.web_compare import CompareTab, Comparison
    for seed in ("", "7"):
        comparison, tab = Comparison(question=Question(QUESTION)), CompareTab(bot, {})
        tab.again(list(bot.runs), comparison, 9, False, 0.7, 0.9, seed)
        list(tab.answer(comparison))
    assert len(seeds) == 6 and len(set(seeds[:3])) == 1 and seeds[3:] == [7, 7, 7]
    assert None not in seeds  # else each answer would draw its own


def test_what_greedy_does_not_use_is_grey_and_the_seed_is_shown(page):
    names = ("Temperature", "Top-p", "Seed")
    controls = [page.get_by_label(name).first for name in names]
    assert all(control.is_disabled() for control in controls)
    page.get_by_label("Greedy").uncheck()
    page.wait_for_function("!document.querySelector('[aria-label*=Temperature]').disabled")
    assert not any(control.is_disabled() for control in controls)
    page.get_by_label("Seed").fill("12")
    first = ask(page)
    assert page.locator("#conversation .note").inner_text().endswith("seed 12")
    press(page, "Retry")
    page.locator("button.stop-button:visible").wait_for()
    assert answer_number(page, 1) == first
    page.get_by_label("Seed").fill("x")
    send(page)
    refused(page, "the seed x is no whole number")


def test_a_picture_may_be_dropped_on_the_chat(page, bot, scienceqa):
    path = picture_of(scienceqa)
    transfer = page.evaluate_handle("""async bytes => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], 'dropped.png', {type: 'image/png'}));
        return transfer;
    }""", list(path.read_bytes()))
    page.dispatch_event("#chat", "drop", {"dataTransfer": transfer})
    page.locator("#message .thumbnail-item").wait_for()
    question = Question(QUESTION, load_image(path, bot.model.vision.image_size))
    assert ask(page) == one_line(expected(bot, "first", question).text)


def test_who_waits_sees_his_place_in_the_queue(page, other_page, bot):
    with bot.lock:  # the first answer cannot begin
        send(page)
        page.locator("button.stop-button:visible").wait_for()
        page.wait_for_timeout(1000)
        send(other_page)
        other_page.locator("#growing > .wrap:not(.hide)", has_text=re.compile(r"queue: \d+/\d+")).wait_for()
        assert other_page.locator("#growing > .wrap").evaluate("wrap => getComputedStyle(wrap).opacity") == "1"
    answer_number(other_page, 1)


def test_bad_image_shows_an_error_to_its_sender_only(page, other_page, bot, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.effect_noise((60, 40), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    send(other_page)
    for name, reason in {"huge.png": "has more than 50 million pixels", "cut.png": "is broken",
                         "empty.png": "is empty (0 bytes)", "text.png": "is not a picture",
                         "phone.heic": "is a HEIC or AVIF picture"}.items():
        send(page, QUESTION, tmp_path / name)
        refused(page, f"{name} {reason}")
        assert page.locator(".bot").count() == 0
        assert message_box(page).input_value() == QUESTION  # the question is kept
        page.reload()
        message_box(page).wait_for()
    assert answer_number(other_page, 1) == one_line(expected(bot).text)
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert ask(page, QUESTION, tmp_path / "cmyk.jpg")


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(browser, address, scienceqa, width, scheme):
    axe = os.environ.get("AXE")
    if not axe:
        pytest.skip("no AXE, the path of axe.min.js")
    for page in open_page(browser, address, viewport={"width": width, "height": 844}, color_scheme=scheme):
        page.get_by_role("textbox", name="Options").fill("north\nsouth")
        ask(page, QUESTION, picture_of(scienceqa))
        page.add_script_tag(path=axe)
        for tab in ("Chat", "Compare"):
            page.get_by_role("tab", name=tab).click()
            found = page.evaluate("axe.run()")["violations"]
            assert [(rule["id"], node["html"][:200]) for rule in found if rule["impact"] in ("serious", "critical")
                    for node in rule["nodes"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
