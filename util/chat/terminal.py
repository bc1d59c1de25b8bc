"""The chat in a terminal: a line is a question, or a command if it starts with a slash."""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from lavin.runtime.console import format_table
from lavin.runtime.errors import UserError, first_line
from util.chat.chatbot import Answer, Chatbot, Question, Settings, Turn
from util.chat.uploads import open_image
from util.data.images import image_to_tensor
from util.data.prompts import OPTIONS

HELP = """Write a question, or
  /runs                  list the runs
  /run NUMBER            who answers from now on
  /compare NUMBER ...    the last question to two or more of them
  /image FILE            a picture, for the questions that follow
  /options A | B | C     options of the next question
  /context TEXT          more to go by for the next question
  /new                   forget conversation and picture
  /quit                  end (Ctrl-C stops an answer)"""


@dataclass
class Conversation:
    run: str
    turns: list[Turn] = field(default_factory=list)
    next: Question = Question("")  # collects image, context and options until its text is entered
    last: Question | None = None


def talk(bot: Chatbot, settings: Settings) -> None:
    """Reads standard input until /quit or its end. No error ends it but that of the terminal itself."""
    if sys.stdin is None:
        raise UserError("--cli reads questions from standard input, which is closed: leave it open")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # an environment in ascii says nothing about the terminal's keys
        encoding = "utf-8" if codecs.lookup(sys.stdin.encoding).name == "ascii" else sys.stdin.encoding
        # else a wrong byte also loses the lines that were read with it
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    names = list(bot.runs)
    conversation = Conversation(names[0])
    print(f"{len(names)} runs, {names[0]} answers. /help lists the commands.")
    while True:
        try:
            line = read_line(f"\n{conversation.run}> ")
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                command(bot, conversation, settings, *line[1:].split(maxsplit=1))
            elif line:
                ask(bot, conversation, settings, line)
        except (UserError, torch.OutOfMemoryError) as error:
            print(first_line(error))
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(stopped; /quit ends)")


def read_line(prompt: str) -> str:
    line = input(prompt).strip("\ufeff").strip()  # Windows begins a file with a byte order mark
    try:
        line.encode()
    except UnicodeError as error:
        raise UserError("that is not UTF-8 text: write it again") from error
    return line


def command(bot: Chatbot, conversation: Conversation, settings: Settings, name: str = "", argument: str = "") -> None:
    if name == "runs":
        print("\n".join(f"{i:3}  {run}" for i, run in enumerate(bot.runs, 1)))
    elif name == "run":
        conversation.run = choose_runs(bot, argument, most=1)[0]
    elif name == "compare":
        if conversation.last is None:
            raise UserError("ask a question first")
        for run in choose_runs(bot, argument):
            print(f"\n{run}:")
            show(bot.answer(run, conversation.turns[:-1], conversation.last, settings), conversation.last)
    elif name == "image":
        path = os.path.expanduser(argument.strip().strip("'\""))  # a file dropped on a terminal comes in quotes
        image = image_to_tensor(open_image(path), bot.model.vision.image_size)
        conversation.next = replace(conversation.next, image=image)
    elif name == "options":
        options = tuple(option.strip() for option in argument.split("|"))
        conversation.next = replace(conversation.next, options=options)
    elif name == "context":
        conversation.next = replace(conversation.next, context=argument)
    elif name == "new":
        conversation.turns, conversation.next = [], Question("")
    else:
        print(HELP)


def choose_runs(bot: Chatbot, numbers: str, most: int | None = None) -> list[str]:
    names, chosen = {str(i): run for i, run in enumerate(bot.runs, 1)}, numbers.split()
    if not chosen or not names.keys() >= set(chosen) or len(chosen) > (most or len(chosen)):
        raise UserError(f"give {'a number' if most == 1 else 'numbers'} from 1 to {len(names)}; /runs lists them")
    return [names[number] for number in chosen]


def ask(bot: Chatbot, conversation: Conversation, settings: Settings, text: str) -> None:
    question = replace(conversation.next, text=text)
    answer = show(bot.answer(conversation.run, conversation.turns, question, settings), question)
    conversation.turns.append(Turn(answer.prompt, answer.text))
    conversation.last, conversation.next = question, Question("", question.image)


def show(answers: Iterator[Answer], question: Question) -> Answer:
    """Prints an answer as it grows; Ctrl-C stops it. Returns the answer so far."""
    answer = Answer("")
    try:
        for new in answers:
            print(new.text.removeprefix(answer.text), end="", flush=True)
            answer = new
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    if answer.dropped:
        print(f"(the {answer.dropped} oldest turns no longer fit and were left out)")
    if answer.probabilities:
        rows = [[f"({letter}) {option}", f"{100 * p:.1f} %"]
                for letter, option, p in zip(OPTIONS, question.options, answer.probabilities, strict=False)]
        print(format_table(["option", "probability"], rows))
    return answer
