"""The chatbot: streaming, fitting the conversation into the context, switching runs, and unusual images."""

import io
import itertools
import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import demo
from eval import get_args_parser
from lavin.fast.captured_models import capture_passes
from lavin.generation.generate import generate, stream
from lavin.model import pack
from lavin.runtime.errors import UserError
from lavin.runtime.flags import command_line, flags_of
from tests.conftest import write_scienceqa
from tiny import tiny_example, tiny_model
from tiny_runs import load_checkpoint, write_run
from util.chat import chatbot
from util.chat.chatbot import Chatbot, Question, Settings, Turn, find_runs, fit, make_prompt
from util.chat.command import load_chatbot
from util.chat.examples import find_examples
from util.chat.uploads import open_image
from util.flags import SHARED
from util.trained_model import load_model

QUESTION = "Which pond crosses the map?"


def streamed(monkeypatch, tokenizer, ids: list[int], limit: int = 100) -> list[str]:
    """The texts that `stream` yields if the model generates `ids`."""
    monkeypatch.setattr("lavin.generation.generate.decode", lambda *_: (torch.tensor([token]) for token in ids[:limit]))
    return list(stream(torch.nn.Identity(), tokenizer, None, limit))


def test_stream_never_yields_partial_characters(monkeypatch, tokenizer):
    text = "The pond é 漢字 🙂 é."
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # the rare characters are several byte tokens
    steps = streamed(monkeypatch, tokenizer, [*ids, tokenizer.eos_id, *tokenizer.encode("more")])
    assert len(steps) == len(ids) and steps[-1] == text
    assert all(after.startswith(before) and "\ufffd" not in after
               for before, after in itertools.pairwise(["", *steps]))
    assert any("漢" in step and "字" not in step for step in steps)
    assert streamed(monkeypatch, tokenizer, ids[:-4])[-1] + "é." != text  # ends inside a character, which is left out
    for end in range(1, len(ids)):
        assert text.startswith(streamed(monkeypatch, tokenizer, ids[:end])[-1])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_stream_ends_with_the_answer_of_generate(tokenizer, temperature):
    model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    for image in (False, True):
        example = tiny_example(5, 6, 0, image)
        *_, last = stream(model, tokenizer, example, 12, temperature, 0.9, seed=3)
        answer, = generate(model, tokenizer, [example], 12, temperature=temperature, top_p=0.9, seeds=[3])
        assert last == answer.rstrip("\ufffd") and last


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


def test_fit_drops_as_few_of_the_oldest_turns_as_possible(tokenizer):
    turns = [Turn(f"Instruction: Which pond {word}?\nResponse:", f"The {word} pond.") for word in ("one", "two", "six")]
    prompt = "Instruction: Why?\nResponse:"
    texts = ["".join(f"{turn.prompt}{turn.answer}\n" for turn in turns[i:]) + prompt for i in range(4)]
    sizes = [2 + len(tokenizer.encode("Image: N/A")) + len(tokenizer.encode(text)) for text in texts]  # modality, BOS
    assert sizes == sorted(sizes, reverse=True)
    for dropped, size in enumerate(sizes):
        example, num_dropped = fit(tokenizer, turns, prompt, None, 6, size + 10, answer_tokens=10)
        assert num_dropped == dropped and example.ids == tokenizer.example(texts[dropped]).ids
        if dropped < 3:
            assert fit(tokenizer, turns, prompt, None, 6, size + 9, answer_tokens=10)[1] == dropped + 1
    # without turns, the answer may be shorter than answer_tokens
    assert fit(tokenizer, turns, prompt, None, 6, sizes[3] + 1, answer_tokens=10)[1] == 3
    with pytest.raises(UserError, match="the question has 1 token too many"):
        fit(tokenizer, turns, prompt, None, 6, sizes[3], answer_tokens=10)
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    size_with_image = 2 + len(tokenizer.encode("Image: ")) + 6 + len(tokenizer.encode(texts[0]))
    assert fit(tokenizer, turns, prompt, image, 6, size_with_image + 10, 10)[1] == 0
    assert fit(tokenizer, turns, prompt, image, 6, size_with_image + 9, 10)[1] == 1


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Three runs that can share a model, and four folders that cannot or are not finished. Read-only."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "plain", base, 1)
    write_run(folder / "scaled", base, 2, adapter_scale=0.5, temperature=2.0, dropout_prob=0.3, dropout_lim=0.3)
    write_run(folder / "third", base, 3)
    write_run(folder / "wide", base, 4, adapter_dim=8)
    for name in ("broken", "started", "scored"):
        (folder / name).mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "broken" / "checkpoint-0.pth").touch()
    (folder / "started" / "config.json").write_text('{"flags": {}}')
    (folder / "scored" / "scores.json").write_text("{}")
    return folder


def load_run_model(run):
    """The model and the tokenizer as eval.py loads them, without switching adapters."""
    return load_model(get_args_parser().parse_args(["--adapter_path", str(run), "--device", "cpu"]))[:2]


@pytest.fixture
def bot(runs):
    return Chatbot(*load_run_model(runs / "plain"), find_runs(str(runs))[0], max_seq_len=200)


def test_warmup_captures_prefills_and_keeps_answers(bot, runs):
    capture_passes(bot.model)
    bot.warmup()
    session, graphs = bot.model.session, set(bot.model.llama.forward.graphs)
    assert len(graphs) == 4 and len(bot.model.vision.forward.graphs) == 1
    cold = Chatbot(*load_run_model(runs / "plain"), bot.runs, max_seq_len=200)
    image = torch.full((3, *[bot.model.vision.image_size] * 2), 200, dtype=torch.uint8)
    for question in (Question("Which pond is deeper?"), Question("What is this?", image)):
        warm, expected = (list(b.answer("plain", [], question, Settings(12)))[-1].text for b in (bot, cold))
        assert warm == expected
    assert bot.model.session is session and set(bot.model.llama.forward.graphs) == graphs


def test_find_runs_keeps_those_that_can_share_a_model(runs, tmp_path):
    shared, left_out = find_runs(str(runs))
    assert list(shared) == ["plain", "scaled", "third"]
    broken, wide = sorted(left_out)
    assert "broken/config.json is not valid JSON" in broken
    assert wide.endswith("wide is left out: it cannot share the others' model (--adapter_dim 8, not 4)")
    assert list(find_runs(str(runs / "wide"))[0]) == ["wide"]
    for without_runs in (tmp_path, tmp_path / "none", runs / "scored"):
        with pytest.raises(UserError):
            find_runs(str(without_runs))


def test_broken_runs_are_left_out(runs, tmp_path):
    for name in ("whole", "cut", "empty", "no flags", "no prompt format", "no flags in config"):
        shutil.copytree(runs / "plain", tmp_path / name)
    checkpoint = (runs / "plain" / "checkpoint-3.pth").read_bytes()
    (tmp_path / "cut" / "checkpoint-3.pth").write_bytes(checkpoint[:len(checkpoint) // 2])
    (tmp_path / "empty" / "checkpoint-3.pth").write_bytes(b"")
    content = load_checkpoint(runs / "plain" / "checkpoint-3.pth")
    torch.save({**content, "flags": None}, tmp_path / "no flags" / "checkpoint-3.pth")
    torch.save({**content, "flags": {"prompt_format": "X"}}, tmp_path / "no prompt format" / "checkpoint-3.pth")
    (tmp_path / "no flags in config" / "config.json").write_text(json.dumps({"flags": {"llm_model": []}}))
    (tmp_path / "whole" / "checkpoint-²².pth").touch()
    shared, left_out = find_runs(str(tmp_path))
    assert list(shared) == ["whole"]
    assert len(left_out) == 5 and not any("\n" in line for line in left_out)
    load_chatbot(demo.get_args_parser().parse_args(["--runs", str(tmp_path), "--device", "cpu"]))


def test_runs_of_smollm2_are_the_default_or_else_those_of_this_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smollm2 = tmp_path / "runs" / "smollm2"
    shutil.copytree(runs / "plain", tmp_path / "here")
    shutil.copytree(runs / "scored", smollm2 / "untuned")  # not finished
    args = demo.get_args_parser().parse_args(["--device", "cpu"])
    assert list(load_chatbot(args).runs) == ["here"] and "runs in .: here\n" in capsys.readouterr().out
    for name in ("one", "two"):
        shutil.copytree(runs / "plain", smollm2 / name)
    args = demo.get_args_parser().parse_args(["--device", "cpu"])
    assert list(load_chatbot(args).runs) == ["one", "two"]
    assert "runs in runs/smollm2: one, two\n" in capsys.readouterr().out
    args = demo.get_args_parser().parse_args(["--device", "cpu", "--runs", "."])
    assert list(load_chatbot(args).runs) == ["here"]


def test_switched_adapters_answer_as_their_run(bot, runs):
    image = tiny_example(0, 1, image=True).image
    for question in (Question(QUESTION), Question(QUESTION, image)):
        answers = {}
        for run in ("plain", "scaled", "third", "plain"):
            *_, answer = bot.answer(run, [], question, Settings(max_new_tokens=10))
            model, tokenizer = load_run_model(runs / run)
            example = tokenizer.example(f"Instruction: {QUESTION}\nResponse:", None, question.image)
            assert answer.text == generate(model, tokenizer, [example], 10)[0].rstrip("\ufffd")
            assert answers.setdefault(run, answer) == answer
        assert len({answer.text for answer in answers.values()}) == 3


def letter_probabilities(run, prompt: str, reason: str = "") -> torch.Tensor:
    """The probabilities of A, B and C where an answer names its option, from one forward pass."""
    model, tokenizer = load_run_model(run)
    a, b, c = (tokenizer.example(prompt, f"{reason}The answer is {letter}.") for letter in "ABC")
    at = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y)  # the token of the letter
    with torch.no_grad():
        logits = model.llama.output(model.hidden_states(pack([a])))[at - 1]
    return logits[[a.ids[at], b.ids[at], c.ids[at]]].softmax(-1)


@pytest.mark.parametrize("text, reason", [
    ("The north is deep. The answer is B.", "The north is deep. "), ("The answer is A. BECAUSE: it is.", ""),
    ("It is deep.", ""), ("The answer is", "")])
def test_probabilities_follow_the_reason_that_was_written(bot, runs, monkeypatch, text, reason):
    """A model that was trained with --prompt_format QCM-EA writes its reason first."""
    monkeypatch.setattr("util.chat.chatbot.stream", lambda *arguments: iter([text]))
    *_, answer = bot.answer("scaled", [], Question(QUESTION, options=("north", "south", "old")), Settings())
    torch.testing.assert_close(torch.tensor(answer.probabilities),
                               letter_probabilities(runs / "scaled", answer.prompt, reason))


def test_probabilities_equal_the_full_forward_pass(bot, runs):
    question = Question(QUESTION, options=("north", "south", "old"))
    *_, answer = bot.answer("scaled", [Turn("unread", "unread")], question, Settings(max_new_tokens=5))
    # a question with options does not depend on earlier turns
    assert list(bot.answer("scaled", [], question, Settings(max_new_tokens=5)))[-1] == answer
    prompt = f"Question: {QUESTION}\nContext: N/A\nOptions: (A) north (B) south (C) old\nResponse:"
    torch.testing.assert_close(torch.tensor(answer.probabilities), letter_probabilities(runs / "scaled", prompt))
    assert answer.prompt == prompt and answer.dropped == 0 and answer.text


def test_earlier_turns_are_used_and_dropped_if_too_long(bot):
    turns = [Turn(f"Instruction: {QUESTION}\nResponse:", "The map.")] * 2
    bot.max_seq_len = 2 + 8 + len(bot.tokenizer.encode(  # fits one of the two turns
        f"Image: N/A{turns[0].prompt}{turns[0].answer}\nInstruction: Why?\nResponse:"))
    answers = [list(bot.answer("plain", past, Question("Why?"), Settings(max_new_tokens=8)))[-1]
               for past in (turns, turns[1:], [])]
    assert [answer.dropped for answer in answers] == [1, 0, 0]
    assert answers[0].text == answers[1].text != answers[2].text


def test_a_run_is_read_again_only_where_its_checkpoint_changed(bot, runs, tmp_path, monkeypatch):
    reads, read = [], chatbot.read_adapters
    monkeypatch.setattr(chatbot, "read_adapters", lambda path: reads.append(path) or read(path))

    def answer(run):
        return list(bot.answer(run, [], Question(QUESTION), Settings(max_new_tokens=6)))[-1].text

    shutil.copytree(runs / "plain", tmp_path / "run")
    bot.runs = {"run": tmp_path / "run", "third": runs / "third"}
    texts = [answer(run) for run in ("run", "run", "third", "third", "run")]
    assert len(reads) == 3 and texts[0] == texts[1] == texts[4] != texts[2] == texts[3]
    shutil.copy(runs / "third" / "checkpoint-3.pth", tmp_path / "run")
    assert answer("run") == texts[2]


def test_new_question_ends_an_unfinished_answer(bot):
    unfinished = bot.answer("plain", [], Question(QUESTION), Settings())
    next(unfinished)
    *_, answer = bot.answer("third", [], Question(QUESTION), Settings(max_new_tokens=6))
    assert list(unfinished) == []
    *_, again = bot.answer("third", [], Question(QUESTION), Settings(max_new_tokens=6))
    assert answer == again


def test_bot_works_after_a_question_that_is_too_long(bot):
    with pytest.raises(UserError, match="too many"):
        next(bot.answer("plain", [], Question(QUESTION * 40), Settings()))
    assert list(bot.answer("plain", [], Question(QUESTION), Settings(max_new_tokens=2)))


def colours(image: Image.Image) -> list[tuple]:
    """The colours at the centres of the left and the right half."""
    return [image.getpixel((x, image.height // 2)) for x in (image.width // 4, 3 * image.width // 4)]


def red_and_blue(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (30, 0, 60, 40))
    return image.convert(mode)


@pytest.mark.parametrize("name, mode, options", [
    ("cmyk.jpg", "CMYK", {"quality": 95}), ("palette.png", "P", {}), ("alpha.png", "RGBA", {}),
    ("plain.bmp", "RGB", {}),
    ("moving.gif", "P", {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "green")]}),
    ("moving.webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "green")], "quality": 95})])
def test_unusual_image_formats(tmp_path, name, mode, options):
    red_and_blue(mode).save(tmp_path / name, **options)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (60, 40)
    for colour, expected in zip(colours(image), [(255, 0, 0), (0, 0, 255)], strict=True):
        assert max(abs(a - b) for a, b in zip(colour, expected, strict=True)) < 12


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: rotate by 90 degrees clockwise for display
    red_and_blue().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (60, 40) and colours(image) == [(255, 0, 0), (0, 0, 255)]


def test_bad_images_raise_one_line_errors(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("1", (10_000, 8_000)).save(tmp_path / "large.png")  # below Pillow's own limit
    Image.effect_noise((60, 40), 50).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, reason in {"huge": "50 million pixels", "large": "50 million pixels", "cut": "is broken",
                         "text": "is not a picture", "empty": r"is empty \(0 bytes\)", "script": "is not a picture",
                         "pipe": "is no file", "folder": "is no file"}.items():
        with pytest.raises(UserError, match=f"^{name}.png .*{reason}") as caught:
            open_image(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)


def test_terminal_chat(runs, monkeypatch, capsys):
    lines = iter(["/runs", QUESTION, "/options north | south", QUESTION, "/compare 1 2", "/image none.png", "/run 9",
                  "/run 2", "/new", QUESTION, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    args = demo.get_args_parser().parse_args(["--runs", str(runs), "--device", "cpu", "--cli", "--max_new_tokens", "9"])
    demo.main(args)
    printed = capsys.readouterr().out
    bot, asked = load_chatbot(args), Question(QUESTION, options=("north", "south"))
    (first, choice), (second, other) = ([list(bot.answer(run, [], question, Settings(9)))[-1] for question in
                                         (Question(QUESTION), asked)] for run in ("plain", "scaled"))
    at = 0
    for part in ("wide is left out", "  3  third", first.text, choice.text,
                 f"(A) north  {100 * choice.probabilities[0]:9.1f} %", "\nplain:\n", choice.text, "\nscaled:\n",
                 other.text, "no file none.png", "give a number from 1 to 3", second.text):
        assert part in printed[at:], part
        at = printed.index(part, at) + len(part)


def test_compare_asks_the_last_question_as_it_was_asked(runs, monkeypatch, capsys):
    """The question comes after the turns before it, without its own answer, and with all flags of sampling."""
    lines = iter([QUESTION, "And the second?", "/compare 2 3", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked, answer = [], Chatbot.answer
    monkeypatch.setattr(Chatbot, "answer", lambda self, run, turns, question, settings: asked.append(
        (len(turns), question.text, settings)) or answer(self, run, turns, question, settings))
    demo.main(demo.get_args_parser().parse_args(["--runs", str(runs), "--device", "cpu", "--cli", "--max_new_tokens",
                                                 "3", "--generation_temperature", "0.5", "--top_p", "0.25"]))
    capsys.readouterr()
    assert [(turns, question) for turns, question, _ in asked] == [(0, QUESTION), *[(1, "And the second?")] * 3]
    settings = [settings for *_, settings in asked]
    assert {replace(one, seed=None) for one in settings} == {Settings(3, 0.5, 0.25)}
    assert settings[2] == settings[3]  # the same draws for both
    assert None not in {one.seed for one in settings}  # else each answer would draw its own


class Typed(io.TextIOWrapper):
    """Standard input with these bytes."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="utf-8")


def talk(runs, monkeypatch, capsys, content: bytes, *flags: str) -> list[str]:
    """The lines that the terminal chat prints."""
    monkeypatch.setattr(sys, "stdin", Typed(content))
    demo.main(demo.get_args_parser().parse_args(
        ["--runs", str(runs), "--device", "cpu", "--cli", "--max_new_tokens", "2", *flags]))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("line, printed", [
    ("/run 1 1", "give a number from 1 to 3; /runs lists them"), ("/run", "give a number from 1"),
    ("/run ²", "give a number from 1"), ("/run " + "9" * 5000, "give a number from 1"), ("/run 0", "give a number"),
    ("/compare 1", "ask a question first"), ("/image \0", "is broken"), ("/image /dev/zero", "is no file"),
    ("/options a|b|c|d|e|f\nWhich?", "give 2 to 5 options"), (b"Which \xff pond?", "that is not UTF-8 text"),
    (QUESTION * 100, "tokens too many"), ("/image ~nosuchuser/a.png", "no file ~nosuchuser/a.png"),
    ("/image " + "a" * 5000, "File name too long"), ("/image", "the picture in use is none"), ("/", "Write a question"),
    ("/options " + "|" * 5000, "an option is empty"), ("/options |\nWhich?", "an option is empty"),
    ("/options A | | B\nWhich?", "an option is empty"), ("/options |A", "an option is empty"),
    ("/options", "give 2 to 5 options: /options A"), ("/options A\nWhich?", "give 2 to 5 options"),
    ("/nothing", "there is no command /nothing"),
    ("/temperature hot", "give a number"), ("/temperature nan", "no number from 0"), ("/top_p 2", "does not lie in"),
    ("/seed -1", "no number from 0"), ("/max_new_tokens 0", "allow at least 1"), ("/retry", "ask a question first"),
    ("/undo", "ask a question first"), ("/edit x", "ask a question first"), ("/save a.md", "ask a question first"),
    ("Why?\n/save a.txt", "ends with .md"), ("Why?\n/save /dev/null/a.md", "cannot write"),
    ("Why?\n/save \0.md", "cannot write"), ("Why?\n/save " + "a" * 5000 + ".md", "cannot write"),
    ("/context " + "\u2028" * 99 + "\nWhy?", ""),
    ("</s> <s> </s>", ""), ("\x1b[2J\x07", ""), ("\u200b", ""), ("\0", ""), ("/run 2; rm -r .", "give a number")])
def test_no_line_ends_the_terminal_chat(runs, monkeypatch, capsys, line, printed):
    line = line if isinstance(line, bytes) else line.encode()
    lines = talk(runs, monkeypatch, capsys, line + b"\n/run 2\n/quit\n")
    assert not printed or sum(printed in answer for answer in lines) == 1
    assert lines[-1] == "scaled> "


def test_a_dropped_picture_and_a_byte_order_mark_are_understood(runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    red_and_blue().save(tmp_path / "a picture.png")
    for path in (f"'{tmp_path}/a picture.png'", "~/a picture.png"):
        lines = talk(runs, monkeypatch, capsys, f"\ufeff/image {path}\n/quit\n".encode())
        assert lines[-2:] == ["plain> ", "plain [a picture.png]> "], lines


def test_keys_of_an_ascii_environment_are_utf_8(runs, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("util.chat.chatbot.stream", lambda model, tokenizer, example, *_: asked.append(
        tokenizer.decode([i for i in example.ids if i >= 0])) or iter(["yes"]))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Où est l'étang ?\n".encode()), encoding="ascii"))
    demo.main(demo.get_args_parser().parse_args(["--runs", str(runs), "--device", "cpu", "--cli"]))
    assert "Où est l'étang ?" in asked[0] and "not UTF-8" not in capsys.readouterr().out


# --- The published demo ---

def test_published_flags_are_accepted(runs, monkeypatch):
    """These flags are those of the published demo.py, and of eval.py's published script."""
    command = """--server_name 127.0.0.1 --ckpt_dir ../data/weights/ --llm_model 13B --max_seq_len 512
        --adapter_type attn --adapter_path ./15-eph-pretrain.pth --temperature 5. --use_vicuna --options a=b c=d
        --tokenizer_path ../data/weights/tokenizer.model --adapter_dim 8 --adapter_scale 1 --n_prompt 6
        --visual_adapter_type router --hidden_proj 128 --bits 4bit --top_p 0.75 --generation_temperature 0.1"""
    args = demo.get_args_parser().parse_args(command.split())
    assert (args.runs, args.server_name, args.llama_model_path, args.temperature) == (
        "./15-eph-pretrain.pth", "127.0.0.1", "../data/weights/", 5)


@pytest.mark.parametrize("flag", ["--adapter_path", "--runs"])
def test_a_single_checkpoint_answers_as_its_run(bot, runs, flag):
    checkpoint = runs / "scaled" / "checkpoint-3.pth"
    single = load_chatbot(demo.get_args_parser().parse_args([flag, str(checkpoint), "--device", "cpu"]))
    assert list(single.runs) == ["scaled/checkpoint-3.pth"]
    *_, expected = bot.answer("scaled", [], Question(QUESTION), Settings(4))
    *_, answer = single.answer("scaled/checkpoint-3.pth", [], Question(QUESTION), Settings(4))
    assert answer == expected


def test_published_adapters_answer_by_the_flags_that_they_were_trained_with(bot, runs, tmp_path):
    """A published checkpoint holds no configuration, and the run `scaled` another scale than the default."""
    content = load_checkpoint(runs / "scaled" / "checkpoint-3.pth")
    torch.save({"model": content["model"]}, tmp_path / "published.pth")
    flags = command_line({name: value for name, value in {**content["flags"], **content["adapter_config"]}.items()
                          if name in flags_of(*SHARED) and value is not None})
    published = load_chatbot(demo.get_args_parser().parse_args(
        ["--adapter_path", str(tmp_path / "published.pth"), "--device", "cpu", *flags]))
    name, = published.runs
    *_, expected = bot.answer("scaled", [], Question(QUESTION, options=("north", "south")), Settings(4))
    *_, answer = published.answer(name, [], Question(QUESTION, options=("north", "south")), Settings(4))
    assert answer == expected


def test_terminal_chat_goes_on_without_gpu_memory(runs, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("util.chat.chatbot.stream", fail)
    lines = talk(runs, monkeypatch, capsys, b"Why?\n/run 2\n")  # the end of the input ends it, too
    assert sum(line.endswith("CUDA out of memory.") for line in lines) == 1 and lines[-1] == "scaled> "


def test_closed_standard_input_is_said(runs, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input, which is closed"):
        demo.main(demo.get_args_parser().parse_args(["--runs", str(runs), "--device", "cpu", "--cli"]))


@pytest.mark.parametrize("wrong", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1.0},
                                   {"top_p": 0.0}, {"top_p": float("nan")}, {"max_new_tokens": 0}])
def test_settings_that_give_no_answer_are_refused(wrong):
    with pytest.raises(UserError):
        Settings(**wrong)


def test_examples_need_neither_skills_nor_all_pictures(tmp_path):
    root = write_scienceqa(tmp_path / "data")
    assert len(find_examples(str(root))) == 2  # one skill: one with and one without a picture
    problems = json.loads((root / "problems.json").read_text())
    for qid, problem in problems.items():
        del problem["skill"]
        if problem["image"] and problem["split"] == "test" and qid != "117":
            (root / "images" / "test" / qid / problem["image"]).unlink()
    (root / "problems.json").write_text(json.dumps(problems))
    (with_image, *_), (text_only, *_) = find_examples(str(root))
    assert with_image["files"] == [str(root / "images/test/117/image.png")] and not text_only["files"]
    assert find_examples(str(tmp_path)) == []
    problems = {qid: problem for qid, problem in problems.items() if problem["image"]}  # as easy-VQA's
    (root / "problems.json").write_text(json.dumps(problems))
    splits = json.loads((root / "pid_splits.json").read_text())
    (root / "pid_splits.json").write_text(json.dumps({
        split: [qid for qid in ids if qid in problems] for split, ids in splits.items()}))
    assert [message for message, *_ in find_examples(str(root))] == [with_image]
