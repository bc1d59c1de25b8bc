"""The chat in a terminal: a line is a question, or a command if it starts with a slash."""

import codecs
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from lavin.runtime.console import counted, format_table
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import write_text
from util.chat.chatbot import Answer, Chatbot, Question, Settings
from util.chat.conversation import Conversation, read_options
from util.chat.export import as_json, as_markdown, how
from util.chat.line_editing import ReadLine, line_reader
from util.data.prompts import OPTIONS

FORMATS = {".json": as_json, ".md": as_markdown}  # of a saved conversation, by the end of its name


@dataclass
class Terminal:
    """The state of the chat. `context` and `options` are those of the next question, and `draft` is the text that
    stands in the next line to be edited.
    """

    bot: Chatbot
    settings: Settings
    run: str
    read: ReadLine
    conversation: Conversation = field(default_factory=Conversation)
    context: str = ""
    options: tuple[str, ...] = ()
    draft: str = ""
    saved: set[Path] = field(default_factory=set)

    def prompt(self) -> str:
        """Says who answers, and with what the next question is asked."""
        attached = [Path(self.conversation.picture).name] if self.conversation.picture else []
        attached += [f"{len(self.options)} options"] if self.options else []
        attached += ["context"] if self.context else []
        return f"\n{self.run}" + (f" [{', '.join(attached)}]" if attached else "") + "> "

    def read_line(self, prompt: str, text: str = "") -> str:
        line = self.read(prompt, text).strip("\ufeff").strip()  # Windows begins a file with a byte order mark
        try:
            line.encode()
        except UnicodeError as error:
            raise UserError("that is not UTF-8 text: write it again") from error
        return line

    # --- Questions ---

    def ask(self, text: str) -> None:
        question = self.conversation.question(text, self.context, self.options)
        self.answer(question, len(self.conversation.exchanges))
        self.context, self.options = "", ()

    def answer(self, question: Question, at: int) -> None:
        """Asks a question behind the first `at` exchanges."""
        before = self.conversation.exchanges[:]
        show(self.conversation.answer(self.bot, self.run, question, self.settings, at), question)
        if self.conversation.exchanges != before and self.settings.temperature > 0:
            print(f"({how(self.conversation.last)})")

    def retry(self, _: str) -> None:
        self.answer(self.conversation.last.question, len(self.conversation.exchanges) - 1)

    def edit(self, text: str) -> None:
        last, at = self.conversation.last, len(self.conversation.exchanges) - 1
        text = text or self.read_line("edit> ", last.question.text)
        self.answer(self.conversation.edited(at, text), at)

    def undo(self, _: str) -> None:
        question = self.conversation.undo()
        self.context, self.options, self.draft = question.context, question.options, question.text
        print(f"taken back: {question.text}")

    def compare(self, numbers: str) -> None:
        last, settings = self.conversation.last, self.settings.drawn()
        for run in self.choose_runs(numbers):
            print(f"\n{run}:")
            show(self.conversation.compare(self.bot, run, settings), last.question)

    # --- What a question is asked with ---

    def use_picture(self, path: str) -> None:
        path = path.strip().strip("'\"")  # a file dropped on a terminal comes in quotes
        if not path:
            raise UserError(f"the picture in use is {self.conversation.picture or 'none'}: /picture FILE takes another")
        self.conversation.use_picture(os.path.expanduser(path), self.bot.model.vision.image_size)

    def drop(self, _: str) -> None:
        self.conversation.drop_picture()
        self.context, self.options = "", ()

    def use_options(self, text: str) -> None:
        parts = text.split("|")
        if len(parts) > 1 and not all(part.strip() for part in parts):
            raise UserError("an option is empty: /options A | B | C")
        options = read_options(parts)
        if not options:
            raise UserError(f"give 2 to {len(OPTIONS)} options: /options A | B | C (/drop asks without any)")
        self.options = options

    def use_context(self, text: str) -> None:
        self.context = text

    # --- Runs and sampling ---

    def list_runs(self, _: str) -> None:
        print("\n".join(f"{i:3}  {run}" for i, run in enumerate(self.bot.runs, 1)))

    def use_run(self, number: str) -> None:
        self.run, = self.choose_runs(number, most=1)

    def choose_runs(self, numbers: str, most: int | None = None) -> list[str]:
        names, chosen = {str(i): run for i, run in enumerate(self.bot.runs, 1)}, numbers.split()
        if not chosen or not names.keys() >= set(chosen) or len(chosen) > (most or len(chosen)):
            raise UserError(f"give {'a number' if most == 1 else 'numbers'} from 1 to {len(names)}; /runs lists them")
        return [names[number] for number in chosen]

    def be_greedy(self, _: str) -> None:
        self.sample(temperature=0.0)

    def use_temperature(self, text: str) -> None:
        self.sample(temperature=number(text, float, "/temperature 0.7"))

    def use_top_p(self, text: str) -> None:
        self.sample(top_p=number(text, float, "/top_p 0.75"))

    def use_seed(self, text: str) -> None:
        self.sample(seed=number(text, int, "/seed 1") if text else None)

    def use_length(self, text: str) -> None:
        self.sample(max_new_tokens=number(text, int, "/max_new_tokens 128"))

    def sample(self, **changed) -> None:
        self.settings = settings = replace(self.settings, **changed)
        way = "greedy" if settings.temperature == 0 else (
            f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, "
            f"{'another seed for each answer' if settings.seed is None else f'seed {settings.seed}'}")
        print(f"{way}, up to {counted(settings.max_new_tokens, 'token')}")

    # --- The conversation ---

    def begin_anew(self, _: str) -> None:
        self.conversation, self.context, self.options = Conversation(), "", ()

    def save(self, name: str) -> None:
        path = Path(os.path.expanduser(name))
        if path.suffix not in FORMATS:
            raise UserError("name a file that ends with .md, for readers, or .json, for programs: /save chat.md")
        _ = self.conversation.last  # or says that there is nothing to save
        try:
            if os.path.lexists(path) and path.resolve() not in self.saved:
                raise UserError(f"{path} is there already: name another")
            write_text(path, FORMATS[path.suffix](self.conversation))
            self.saved.add(path.resolve())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path} ({first_line(error)}): name another file") from error
        print(f"saved: {path}")

    def help(self, _: str) -> None:
        print("\n".join(["Write a question, or", *(
            f"  {f'/{name} {command.argument}':<23} {command.help}" for name, command in COMMANDS.items())]))


class Command(NamedTuple):
    """A command: what it does with the text behind its name, and the names that other chats have for it."""

    run: Callable[[Terminal, str], None]
    argument: str
    help: str
    aliases: tuple[str, ...] = ()


COMMANDS = {
    "retry": Command(Terminal.retry, "", "the last question again", ("regenerate", "regen")),
    "edit": Command(Terminal.edit, "[TEXT]", "the last question with another text"),
    "undo": Command(Terminal.undo, "", "take the last question back"),
    "compare": Command(Terminal.compare, "NUMBER ...", "the last question to these runs"),
    "picture": Command(Terminal.use_picture, "FILE", "a picture, from now on", ("image",)),
    "options": Command(Terminal.use_options, "A | B | C", "options of the next question"),
    "context": Command(Terminal.use_context, "TEXT", "a hint for the next question"),
    "drop": Command(Terminal.drop, "", "ask without picture, options and context"),
    "runs": Command(Terminal.list_runs, "", "list the runs"),
    "run": Command(Terminal.use_run, "NUMBER", "who answers from now on"),
    "greedy": Command(Terminal.be_greedy, "", "always take the likeliest token"),
    "temperature": Command(Terminal.use_temperature, "NUMBER", "draw tokens: 0.7 is usual, 0 is greedy"),
    "top_p": Command(Terminal.use_top_p, "NUMBER", "draw among the likeliest tokens only: 0.75"),
    "seed": Command(Terminal.use_seed, "[NUMBER]", "the same draws again; without one, other draws"),
    "max_new_tokens": Command(Terminal.use_length, "NUMBER", "the longest answer"),
    "new": Command(Terminal.begin_anew, "", "forget conversation and picture", ("clear",)),
    "save": Command(Terminal.save, "FILE", "keep the conversation, as .md or .json"),
    "help": Command(Terminal.help, "", "this list", ("?", "")),
    "quit": Command(lambda *_: None, "", "end, as Ctrl-D does (Ctrl-C stops an answer)", ("exit", "bye")),
}
NAMES = {name: main for main, command in COMMANDS.items() for name in (main, *command.aliases)}


def talk(bot: Chatbot, settings: Settings) -> None:
    """Reads standard input until /quit, its end, or Ctrl-C twice. No error ends it but that of the terminal itself."""
    prepare_input()
    terminal = Terminal(bot, settings, next(iter(bot.runs)), line_reader([f"/{name}" for name in COMMANDS]))
    print(f"{counted(len(bot.runs), 'run')}, {terminal.run} answers. /help lists the commands.")
    interrupted = False  # by a first Ctrl-C, while no answer was given
    while True:
        try:
            draft, terminal.draft = terminal.draft, ""
            line = terminal.read_line(terminal.prompt(), draft)
            interrupted = False
            if not take(terminal, line):
                return
        except (UserError, torch.OutOfMemoryError) as error:
            print(first_line(error))
        except EOFError:
            print()  # the line of the prompt ends
            return
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            print("\n(Ctrl-C again, Ctrl-D or /quit ends)")


def prepare_input() -> None:
    if sys.stdin is None:
        raise UserError("--cli reads questions from standard input, which is closed: leave it open")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # an environment in ascii says nothing about the terminal's keys
        encoding = "utf-8" if codecs.lookup(sys.stdin.encoding).name == "ascii" else sys.stdin.encoding
        # else a wrong byte also loses the lines that were read with it
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")


def take(terminal: Terminal, line: str) -> bool:
    """Does what a line says. Returns whether the chat goes on."""
    if not line.startswith("/"):
        if line:
            terminal.ask(line)
        return True
    name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
    if name not in NAMES:
        raise UserError(f"there is no command /{name}: /help lists them")
    if NAMES[name] == "quit":
        return False
    COMMANDS[NAMES[name]].run(terminal, argument)
    return True


def show(answers: Iterator[Answer], question: Question) -> None:
    """Prints an answer as it grows; Ctrl-C stops it."""
    answer = Answer("")
    try:
        for new in answers:
            print(new.text.removeprefix(answer.text), end="", flush=True)
            answer = new
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    if answer.dropped:
        print(f"({counted(answer.dropped, 'old turn')} no longer fit and {'was' if answer.dropped == 1 else 'were'} "
              "left out)")
    if answer.probabilities:
        rows = [[f"({letter}) {option}", f"{100 * p:.1f} %"]
                for letter, option, p in zip(OPTIONS, question.options, answer.probabilities, strict=False)]
        print(format_table(["option", "probability"], rows))


def number(text: str, kind: type, example: str):
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"give a number: {example}") from error

