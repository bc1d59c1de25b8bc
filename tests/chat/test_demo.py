"""The web page in headless Chromium. Needs requirements/demo.txt, playwright, and Chromium."""

import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

import demo
import lavin.generation.generate
from tiny_runs import write_run
from util.chat.chatbot import Question, Settings
from util.chat.command import load_chatbot
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


def open_page(browser, address):
    page = browser.new_context().new_page()
    page.set_default_timeout(20_000)
    page.goto(address)
    page.locator(".message-wrap, .bubble-wrap").first.wait_for()
    yield page
    page.context.close()


def send(page, text: str = QUESTION, image_path=None) -> None:
    if image_path:
        page.locator("input[type=file]:not([disabled])").first.set_input_files(image_path)
        page.locator(".thumbnails, .thumbnail-item").first.wait_for()
    box = page.locator("textarea[data-testid=textbox]:visible").first
    box.fill(text)
    box.press("Enter")


def start_new_conversation(page) -> None:
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("document.querySelectorAll('.bot').length == 0")


def last_answer(page) -> str:
    """Wait until the last answer is complete; returns its text."""
    bubble = page.locator(".bot .note", has_text="tokens in").last
    bubble.wait_for()
    return one_line(page.locator(".bot .answer").last.inner_text())


def test_server_listens_on_localhost_only(address):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert not demo.get_args_parser().parse_args([]).share


def test_tokens_arrive_before_the_answer_ends(page, bot):
    send(page)
    page.locator(".bot .answer").wait_for()
    shown = set()
    while not page.locator(".bot .note", has_text="tokens in").count():
        shown.add(one_line(page.locator(".bot .answer").inner_text()))
        page.wait_for_timeout(20)
    complete = one_line(expected(bot).text)
    assert last_answer(page) == complete
    partial = shown - {"…", "", complete}
    assert len(partial) >= 3 and all(complete.startswith(part) for part in partial)


def test_image_upload_and_another_run(page, bot, scienceqa):
    path = next(Path(scienceqa).glob("images/test/*/image.png"))
    question = Question(QUESTION, load_image(path, bot.model.vision.image_size))
    send(page, image_path=path)
    assert last_answer(page) == one_line(expected(bot, "first", question).text) != one_line(expected(bot).text)
    assert page.locator(".user img").count() == 1
    start_new_conversation(page)
    page.get_by_role("combobox", name="Variant").click()
    page.get_by_role("option", name="second").click()
    send(page)
    assert last_answer(page) == one_line(expected(bot, "second").text)  # without the image
    assert page.locator(".bot .note").first.inner_text() == "second"


def test_stop(page, bot):
    send(page)
    page.wait_for_function("document.querySelector('.bot .answer')?.innerText.length > 3")
    page.locator("button.stop-button").click()
    page.locator(".bot .note", has_text="stopped").wait_for()
    complete = one_line(expected(bot).text)
    assert complete.startswith(last_answer(page)) and last_answer(page) != complete
    page.locator("button.submit-button").wait_for()
    send(page, "Why?")  # the conversation continues
    page.wait_for_function("document.querySelectorAll('.bot .answer').length == 2")


def test_options_show_their_probabilities(page, bot):
    page.get_by_role("textbox", name="Options").fill("north\nsouth\nold")
    page.get_by_role("textbox", name="Context").fill("It is deep.")
    send(page)
    answer = last_answer(page)
    expected_answer = expected(bot, "first", Question(QUESTION, None, "It is deep.", ("north", "south", "old")))
    assert answer == one_line(expected_answer.text)
    shown = [one_line(row.inner_text()) for row in page.locator(".bot .option").all()]
    assert shown == [f"({letter}) {option} {100 * p:.1f} %" for letter, option, p
                     in zip("ABC", ("north", "south", "old"), expected_answer.probabilities, strict=True)]
    assert page.get_by_role("textbox", name="Options").input_value() == ""  # cleared after the question


def test_compare(page, bot):
    page.get_by_role("tab", name="Compare").click()
    send(page)
    page.locator(".card .note", has_text="tokens in").nth(1).wait_for()
    names = page.locator(".card h4").all_inner_texts()
    answers = [one_line(text) for text in page.locator(".card .answer").all_inner_texts()]
    assert names == ["first", "second"]
    assert answers == [one_line(expected(bot, run).text) for run in names]


def test_compared_variants_sample_with_one_seed(bot, monkeypatch):
    seeds = []
    monkeypatch.setattr(bot, "answer", lambda run, turns, question, settings: seeds.append(settings.seed) or iter(()))
    gradio = pytest.importorskip("gradio", reason="needs gradio")
    from util.chat.web import Page
    request = gradio.Request(session_hash="one")
    list(Page(bot).answer_several(list(bot.runs), 9, False, 0.7, 0.9, Question(QUESTION), request))
    assert len(seeds) == 3 and len(set(seeds)) == 1


def test_an_example_fills_the_question(page, scienceqa):
    page.locator(".gallery-item:visible").first.click()
    page.wait_for_function("document.querySelector('textarea[data-testid=textbox]').value.startsWith('Which pond did')")
    assert "the north pond" in page.get_by_role("textbox", name="Options").input_value()


def test_bad_image_shows_an_error_to_its_sender_only(page, other_page, bot, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.effect_noise((60, 40), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    send(other_page)
    for name, reason in {"huge": "has more than 50 million pixels", "cut": "is broken", "empty": "is not a picture",
                         "text": "is not a picture"}.items():
        send(page, image_path=tmp_path / f"{name}.png")
        page.locator(".toast-body", has_text=f"{name}.png {reason}").first.wait_for()
        assert page.locator(".bot").count() == 0
        assert page.locator("textarea[data-testid=textbox]").first.input_value() == QUESTION  # the question is kept
        page.reload()
    assert last_answer(other_page) == one_line(expected(bot).text)
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    send(page, image_path=tmp_path / "cmyk.jpg")
    assert last_answer(page)
