"""The terminal chat as people type: the commands, which follow the same rule as the page, line editing, and Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lavin.runtime.errors import UserError
from tiny import ROOT
from util.chat.chatbot import Answer, Settings
from util.chat.terminal import COMMANDS, NAMES, Terminal, take, talk


class Bot:
    """Its answers say what it was asked with."""

    runs = {"plain": None, "other": None}
    model = SimpleNamespace(vision=SimpleNamespace(image_size=8))

    def __init__(self):
        self.asked = []

    def answer(self, run, turns, question, settings):
        self.asked.append((run, [turn.prompt for turn in turns], question, settings))
        yield Answer(question.text, "an ans")
        yield Answer(question.text, f"an answer of {run}", complete=True)


@pytest.fixture
def chat():
    return Terminal(Bot(), Settings(), "plain", lambda prompt, text: f"{text} Or not?")


def say(chat: Terminal, *lines: str) -> None:
    for line in lines:
        assert take(chat, line)


def asked(chat: Terminal) -> list[tuple]:
    return [(run, turns, question.text, question.options, question.context) for run, turns, question, _ in
            chat.bot.asked]


def test_a_question_can_be_asked_again_edited_and_taken_back(chat):
    say(chat, "One?", "Two?", "/run 2", "/retry", "/edit Three?", "/edit", "/undo", "/undo")
    assert asked(chat) == [("plain", [], "One?", (), ""), *[
        (run, ["One?"], text, (), "") for run, text in (("plain", "Two?"), ("other", "Two?"), ("other", "Three?"),
                                                        ("other", "Three? Or not?"))]]
    assert not chat.conversation.exchanges and chat.draft == "One?"


def test_what_a_question_is_asked_with_holds_for_it_alone_but_for_the_picture(chat, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "pond.png")
    say(chat, f"/picture '{tmp_path}/pond.png'", "/options A | B", "/context By the map.")
    assert chat.prompt() == "\nplain [pond.png, 2 options, context]> "
    say(chat, "Which?", "Why?")
    assert asked(chat) == [("plain", [], "Which?", ("A", "B"), "By the map."), ("plain", ["Which?"], "Why?", (), "")]
    assert chat.prompt() == "\nplain [pond.png]> " and all(question.picture for _, _, question, _ in chat.bot.asked)
    say(chat, "/undo", "/undo")
    assert chat.prompt() == "\nplain [pond.png, 2 options, context]> "  # so that it can be asked as it was
    say(chat, "/drop", "Which?")
    *_, (_, _, question, _) = chat.bot.asked
    assert not question.picture and question.image is None and not question.options and not question.context


@pytest.mark.parametrize("line", ["/options", "/options A", "/options A|B|C|D|E|F", "/options A | | B", "/options A |"])
def test_options_that_cannot_be_asked_are_refused_at_once(chat, line):
    say(chat, "/options yes | no")
    with pytest.raises(UserError, match="option"):
        take(chat, line)
    say(chat, "Which?")  # and what was there stays
    assert asked(chat) == [("plain", [], "Which?", ("yes", "no"), "")]


def test_a_refused_question_keeps_its_options(chat):
    say(chat, "/options yes | no")
    with pytest.raises(UserError):
        take(chat, "half \udcff")
    assert chat.options == ("yes", "no") and not chat.bot.asked


def test_sampling(chat, capsys):
    say(chat, "/temperature 0.7", "/top_p 0.5", "/seed 3", "/max_new_tokens 9", "Why?", "/seed", "Why?", "Why?",
        "/greedy", "Why?")
    *settings, greedy = [settings for *_, settings in chat.bot.asked]
    assert settings[0] == Settings(9, 0.7, 0.5, 3) and greedy.temperature == 0
    assert len({one.seed for one in settings}) == 3 and all(one.temperature == 0.7 for one in settings)
    printed = capsys.readouterr().out
    assert "temperature 0.7, top-p 0.5, seed 3, up to 9 tokens\n" in printed and "greedy, up to 9 tokens" in printed
    assert f"(temperature 0.7, top-p 0.5, seed {settings[1].seed})" in printed  # by which the answer can be had again


def test_a_conversation_is_saved_and_other_files_are_not_replaced(chat, tmp_path):
    (tmp_path / "mine.md").write_text("mine")
    say(chat, "Why?", f"/save {tmp_path}/chat.json", "How?", f"/save {tmp_path}/chat.json", f"/save {tmp_path}/chat.md")
    assert [entry["question"] for entry in json.loads((tmp_path / "chat.json").read_text())] == ["Why?", "How?"]
    assert "**You:** How?" in (tmp_path / "chat.md").read_text()
    with pytest.raises(UserError, match=r"mine.md is there already"):
        take(chat, f"/save {tmp_path}/mine.md")
    assert (tmp_path / "mine.md").read_text() == "mine"


def test_a_new_conversation_forgets_all(chat, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "pond.png")
    say(chat, f"/image {tmp_path}/pond.png", "Why?", "/context x", "/options A | B", "/clear")
    assert chat.prompt() == "\nplain> " and not chat.conversation.exchanges


def test_help_lists_every_command_within_80_columns(chat, capsys):
    say(chat, "/help")
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"  /(\w+)", line)[1] for line in lines[1:]] == list(COMMANDS)
    assert max(map(len, lines)) <= 80 and len(NAMES) == sum(1 + len(command.aliases) for command in COMMANDS.values())


@pytest.mark.parametrize("keys, ends", [
    ([KeyboardInterrupt, KeyboardInterrupt], True), ([KeyboardInterrupt, "Why?", KeyboardInterrupt, "/quit"], False),
    ([EOFError], True), (["/bye"], True)])
def test_two_interruptions_in_a_row_end_the_chat(monkeypatch, capsys, keys, ends):
    keys = iter(keys)

    def read(prompt):
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key
    monkeypatch.setattr("builtins.input", read)
    talk(Bot(), Settings())
    assert next(keys, None) is None and ("an answer" in capsys.readouterr().out) != ends


def test_the_line_of_the_prompt_ends_with_the_chat(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    talk(Bot(), Settings())
    assert capsys.readouterr().out.endswith("> \n")


# --- At a terminal ---

EDIT = """
import sys
if {without}: sys.modules.update(dict.fromkeys({without}))
from util.chat.line_editing import line_reader
read = line_reader(["/run", "/retry"])
for text in ("", "", "", "a draft"):
    print("got", repr(read("ask> ", text)), flush=True)
"""
CHAT = """
import sys
sys.modules["prompt_toolkit"] = None
sys.path.insert(0, "tests")
import time
from util.chat.chatbot import Answer, Settings
from util.chat.terminal import talk

class Bot:
    runs = {"plain": None}
    def answer(self, run, turns, question, settings):
        yield Answer("", "it begins")
        time.sleep(60)

talk(Bot(), Settings())
print("the end")
"""


class Typist:
    """A Python program at a terminal of its own."""

    def __init__(self, program: str):
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm", INPUTRC="/dev/null")
            os.execv(sys.executable, [sys.executable, "-c", program])
        self.seen = ""

    def wait(self, text: str, seconds: float = 60) -> None:
        """Reads until the text has come after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 0.1)[0]:
                read = os.read(self.terminal, 4096).decode(errors="replace")
                self.seen += read
                if "\x1b[6n" in read:  # prompt_toolkit asks where the cursor is
                    os.write(self.terminal, b"\x1b[1;1R")
        self.seen = self.seen.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def interrupt(self) -> None:
        """Types Ctrl-C once the program is asleep. Python keeps a signal that comes just before it sleeps or waits for
        keys until it wakes, which here would be never."""
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        self.type("\x03")

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("without", [
    pytest.param((), marks=pytest.mark.skipif(not find_spec("prompt_toolkit"), reason="prompt_toolkit")),
    ("prompt_toolkit",)], ids=["prompt_toolkit", "readline"])
def test_lines_are_edited_and_there_is_a_history(without):
    typist = Typist(EDIT.format(without=without))
    typist.wait("ask>")
    typist.type("abc\x1b[D\x1b[DX\r")  # twice left
    typist.wait("got 'aXbc'")
    typist.wait("ask>")
    typist.type("\x1b[A!\r")  # up
    typist.wait("got 'aXbc!'")
    typist.wait("ask>")
    typist.type("/ret\t")
    typist.wait("ry")
    typist.type("\r")
    typist.wait("got '/retry'")
    typist.wait("draft")
    typist.type("!\r")
    typist.wait("got 'a draft!'")
    assert typist.status() == 0


def test_without_line_editing_lines_are_read():
    typist = Typist(EDIT.format(without=("prompt_toolkit", "readline")))
    for text in ("abc", "/run", "x", "y"):
        typist.wait("ask>")
        typist.type(f"{text}\r")
        typist.wait(f"got '{text}'")
    assert typist.status() == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc tells whether a program sleeps")
def test_ctrl_c_stops_an_answer_and_twice_ends_the_chat():
    typist = Typist(CHAT)
    typist.wait("plain> ")
    typist.type("Why?\r")
    typist.wait("it begins")
    typist.interrupt()
    typist.wait("(stopped)")
    typist.wait("plain> ")
    typist.type("half a line")
    typist.wait("half a line")
    typist.interrupt()
    typist.wait("(Ctrl-C again, Ctrl-D or /quit ends)")
    typist.wait("plain> ")
    typist.interrupt()
    typist.wait("the end")
    assert typist.status() == 0
