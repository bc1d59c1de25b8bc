"""Streaming, the conversation's length, swapping of runs, and pictures from strangers."""


import pytest
import torch
from PIL import Image

import demo
from eval import get_args_parser
from lavin.generation.generate import generate, stream
from lavin.model import pack
from lavin.runtime.errors import UserError
from tiny import tiny_example, tiny_model
from tiny_runs import write_run
from util.chat.chatbot import Chatbot, Question, Settings, Turn, find_runs, fit, make_prompt
from util.chat.uploads import open_image
from util.trained_model import load_model

QUESTION = "Which pond crosses the map?"


def said(monkeypatch, tokenizer, ids: list[int], limit: int = 100) -> list[str]:
    """What is streamed when the model writes `ids`."""
    monkeypatch.setattr("lavin.generation.generate.decode", lambda *_: (torch.tensor([token]) for token in ids[:limit]))
    return list(stream(torch.nn.Identity(), tokenizer, None, limit))


def test_no_character_is_shown_in_parts(monkeypatch, tokenizer):
    text = "The pond é 漢字 🙂 é."
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # the last characters are bytes
    steps = said(monkeypatch, tokenizer, [*ids, tokenizer.eos_id, *tokenizer.encode("more")])
    assert len(steps) == len(ids) and steps[-1] == text
    assert all(after.startswith(before) and "\ufffd" not in after for before, after in zip(["", *steps], steps))
    assert any("漢" in step and "字" not in step for step in steps)
    assert said(monkeypatch, tokenizer, ids[:-4])[-1] + "é." != text  # cut inside a character: it is not shown
    for end in range(1, len(ids)):
        assert text.startswith(said(monkeypatch, tokenizer, ids[:end])[-1])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_stream_ends_as_the_whole_answer(tokenizer, temperature):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    for image in (False, True):
        example = tiny_example(5, 6, 0, image)
        *_, last = stream(model, tokenizer, example, 12, temperature, 0.9, seed=3)
        whole, = generate(model, tokenizer, [example], 12, temperature=temperature, top_p=0.9, seeds=[3])
        assert last == whole.rstrip("\ufffd") and last


def test_prompts():
    assert make_prompt(Question(" Name a pond. "), "QCM-ALE") == "Instruction: Name a pond.\nResponse:"
    assert make_prompt(Question("Sort.", context="b a"), "QCM-ALE") == "Instruction: Sort. b a\nResponse:"
    choice = Question("Which?", context="In the north.", options=("old", "new"))
    assert make_prompt(choice, "QCM-ALE") == ("Question: Which?\nContext: In the north.\nOptions: (A) old (B) new\n"
                                              "Response:")
    assert make_prompt(choice, "CQM-A").startswith("Context: In the north.\nQuestion: Which?")
    for bad in (Question(" "), Question("Which?", options=("one",)), Question("Which?", options=tuple("abcdef"))):
        with pytest.raises(UserError):
            make_prompt(bad, "QCM-ALE")


def test_the_oldest_turns_go_first_and_no_more_than_must(tokenizer):
    turns = [Turn(f"Instruction: Which pond {word}?\nResponse:", f"The {word} pond.") for word in ("one", "two", "six")]
    prompt = "Instruction: Why?\nResponse:"
    texts = ["".join(f"{turn.prompt}{turn.answer}\n" for turn in turns[i:]) + prompt for i in range(4)]
    sizes = [2 + len(tokenizer.encode("Image: N/A")) + len(tokenizer.encode(text)) for text in texts]  # modality, BOS
    assert sizes == sorted(sizes, reverse=True)
    for dropped, size in enumerate(sizes):
        example, gone = fit(tokenizer, turns, prompt, None, 6, size + 10, answer_tokens=10)
        assert gone == dropped and example.ids == tokenizer.example(texts[dropped]).ids
        if dropped < 3:
            assert fit(tokenizer, turns, prompt, None, 6, size + 9, answer_tokens=10)[1] == dropped + 1
    assert fit(tokenizer, turns, prompt, None, 6, sizes[3] + 1, answer_tokens=10)[1] == 3  # the answer gets what is left
    with pytest.raises(UserError, match="the question has 1 tokens too many"):
        fit(tokenizer, turns, prompt, None, 6, sizes[3], answer_tokens=10)
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    with_picture = 2 + len(tokenizer.encode("Image: ")) + 6 + len(tokenizer.encode(texts[0]))
    assert fit(tokenizer, turns, prompt, picture, 6, with_picture + 10, 10)[1] == 0
    assert fit(tokenizer, turns, prompt, picture, 6, with_picture + 9, 10)[1] == 1


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Three that share a model, and four that do not or are not finished. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "plain", base, 1)
    write_run(folder / "scaled", base, 2, adapter_scale=0.5, temperature=2.0, dropout_prob=0.3, dropout_lim=0.3)
    write_run(folder / "third", base, 3)
    write_run(folder / "wide", base, 4, adapter_dim=8)
    for name in ("broken", "begun", "scored"):
        (folder / name).mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "broken" / "checkpoint-0.pth").touch()
    (folder / "begun" / "config.json").write_text('{"flags": {}}')
    (folder / "scored" / "scores.json").write_text("{}")
    return folder


def loaded(run):
    """As eval.py loads it: nothing is swapped."""
    return load_model(get_args_parser().parse_args(["--adapter_path", str(run), "--device", "cpu"]))[:2]


@pytest.fixture
def bot(runs):
    return Chatbot(*loaded(runs / "plain"), find_runs(str(runs))[0], max_seq_len=200)


def test_warming_up_prepares_answers_and_changes_none(bot, runs):
    bot.model.use_cuda_graphs = True
    bot.warmup()
    session = bot.model.session
    assert len(session.prefills) == 2 * 4 and all(prefill.replay for prefill in session.prefills.values())
    cold = Chatbot(*loaded(runs / "plain"), bot.runs, max_seq_len=200)
    picture = torch.full((3, *[bot.model.vision.image_size] * 2), 200, dtype=torch.uint8)
    for question in (Question("Which pond is deeper?"), Question("What is this?", picture)):
        warm, expected = (list(b.answer("plain", [], question, Settings(12)))[-1].text for b in (bot, cold))
        assert warm == expected
    assert bot.model.session is session and len(session.prefills) == 2 * 4


def test_runs_that_share_a_model_are_found(runs, tmp_path):
    found, left_out = find_runs(str(runs))
    assert list(found) == ["plain", "scaled", "third"]
    broken, wide = sorted(left_out)
    assert "broken/config.json is not valid JSON" in broken
    assert wide.endswith("wide is left out: it cannot share the others' model (--adapter_dim 8, not 4)")
    assert list(find_runs(str(runs / "wide"))[0]) == ["wide"]
    for nothing in (tmp_path, tmp_path / "none", runs / "scored"):
        with pytest.raises(UserError):
            find_runs(str(nothing))


def test_swapped_adapters_answer_as_their_own_run(bot, runs):
    picture = tiny_example(0, 1, image=True).image
    for question in (Question(QUESTION), Question(QUESTION, picture)):
        answers = {}
        for run in ("plain", "scaled", "third", "plain"):
            *_, answer = bot.answer(run, [], question, Settings(max_new_tokens=10))
            model, tokenizer = loaded(runs / run)
            alone = tokenizer.example(f"Instruction: {QUESTION}\nResponse:", None, question.image)
            assert answer.text == generate(model, tokenizer, [alone], 10)[0].rstrip("\ufffd")
            assert answers.setdefault(run, answer) == answer
        assert len({answer.text for answer in answers.values()}) == 3


def test_probabilities_are_those_of_the_full_forward(bot, runs):
    question = Question(QUESTION, options=("north", "south", "old"))
    *_, answer = bot.answer("scaled", [Turn("unread", "unread")], question, Settings(max_new_tokens=5))
    assert list(bot.answer("scaled", [], question, Settings(max_new_tokens=5)))[-1] == answer  # it stands on its own
    model, tokenizer = loaded(runs / "scaled")
    prompt = f"Question: {QUESTION}\nContext: N/A\nOptions: (A) north (B) south (C) old\nResponse:"
    a, b, c = (tokenizer.example(prompt, f"The answer is {letter}.") for letter in "ABC")
    at = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y)
    with torch.no_grad():
        logits = model.llama.output(model.hidden_states(pack([a])))[at - 1]
    expected = logits[[a.ids[at], b.ids[at], c.ids[at]]].softmax(-1)
    torch.testing.assert_close(torch.tensor(answer.probabilities), expected)
    assert answer.prompt == prompt and answer.dropped == 0 and answer.text


def test_the_conversation_is_read_and_shortened(bot):
    turns = [Turn(f"Instruction: {QUESTION}\nResponse:", "The map.")] * 2
    bot.max_seq_len = 2 + 8 + len(bot.tokenizer.encode(  # room for one turn of two
        f"Image: N/A{turns[0].prompt}{turns[0].answer}\nInstruction: Why?\nResponse:"))
    answers = [list(bot.answer("plain", past, Question("Why?"), Settings(max_new_tokens=8)))[-1]
               for past in (turns, turns[1:], [])]
    assert [answer.dropped for answer in answers] == [1, 0, 0]
    assert answers[0].text == answers[1].text != answers[2].text


def test_a_newer_question_ends_an_abandoned_one(bot):
    abandoned = bot.answer("plain", [], Question(QUESTION), Settings())
    next(abandoned)
    *_, answer = bot.answer("third", [], Question(QUESTION), Settings(max_new_tokens=6))
    assert list(abandoned) == []
    *_, again = bot.answer("third", [], Question(QUESTION), Settings(max_new_tokens=6))
    assert answer == again


def test_a_question_that_cannot_be_asked_leaves_the_bot_in_order(bot):
    with pytest.raises(UserError, match="too many"):
        next(bot.answer("plain", [], Question(QUESTION * 40), Settings()))
    assert list(bot.answer("plain", [], Question(QUESTION), Settings(max_new_tokens=2)))


def colours(image: Image.Image) -> list[tuple]:
    """Of the left and the right half."""
    return [image.getpixel((x, image.height // 2)) for x in (image.width // 4, 3 * image.width // 4)]


def halves(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (30, 0, 60, 40))
    return image.convert(mode)


@pytest.mark.parametrize("name, mode, options", [
    ("cmyk.jpg", "CMYK", {"quality": 95}), ("palette.png", "P", {}), ("alpha.png", "RGBA", {}), ("plain.bmp", "RGB", {}),
    ("moving.gif", "P", {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "green")]}),
    ("moving.webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "green")], "quality": 95})])
def test_unusual_pictures_work(tmp_path, name, mode, options):
    halves(mode).save(tmp_path / name, **options)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (60, 40)
    for seen, expected in zip(colours(image), [(255, 0, 0), (0, 0, 255)]):
        assert max(abs(a - b) for a, b in zip(seen, expected)) < 12


def test_a_turned_picture_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    halves().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (60, 40) and colours(image) == [(255, 0, 0), (0, 0, 255)]


def test_bad_pictures_are_told_in_a_line(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("1", (10_000, 8_000)).save(tmp_path / "large.png")  # below Pillow's own limit
    Image.effect_noise((60, 40), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, reason in {"huge": "50 million pixels", "large": "50 million pixels", "cut": "is broken",
                         "text": "is not a picture", "empty": "is not a picture", "script": "is not a picture"}.items():
        with pytest.raises(UserError, match=f"^{name}.png .*{reason}") as caught:
            open_image(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)


def test_the_terminal(runs, monkeypatch, capsys):
    lines = iter(["/runs", QUESTION, "/options north | south", QUESTION, "/compare 1 2", "/image none.png", "/run 9",
                  "/run 2", "/new", QUESTION, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    args = demo.get_args_parser().parse_args(["--runs", str(runs), "--device", "cpu", "--cli", "--max_new_tokens", "9"])
    demo.main(args)
    printed = capsys.readouterr().out
    bot, asked = demo.load_chatbot(args), Question(QUESTION, options=("north", "south"))
    (first, choice), (second, other) = ([list(bot.answer(run, [], question, Settings(9)))[-1] for question in
                                         (Question(QUESTION), asked)] for run in ("plain", "scaled"))
    at = 0
    for part in ("wide is left out", "  3  third", first.text, choice.text,
                 f"(A) north  {100 * choice.probabilities[0]:9.1f} %", "\nplain:\n", choice.text, "\nscaled:\n", other.text,
                 "no file none.png", "give numbers from 1 to 3", second.text):
        assert part in printed[at:], part
        at = printed.index(part, at) + len(part)
