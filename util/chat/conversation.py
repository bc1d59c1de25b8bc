"""A conversation with finished runs. The page and the terminal both talk through it, so that one rule holds for both.

The rule:
- A picture is in use from when it is given until another one is given, it is dropped, or the conversation begins anew.
  Every question is asked with the picture in use.
- Context and options belong to one question. A question with options is asked on its own; any other question is asked
  after all earlier turns.
- A question that is refused changes nothing.
- An exchange can be taken back, and its question can be asked again, edited, or put to other runs: always with the
  picture, the context and the options that it had, and after the turns that were before it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from lavin.runtime.errors import UserError
from util.chat.chatbot import Answer, Chatbot, Question, Settings, Turn, make_prompt
from util.chat.uploads import open_image
from util.data.images import image_to_tensor
from util.data.prompts import OPTIONS


@dataclass(frozen=True)
class Exchange:
    """A question and its answer so far. `settings` has the seed that was drawn for it."""

    run: str
    question: Question
    settings: Settings
    answer: Answer


def read_options(parts: Iterable[str]) -> tuple[str, ...]:
    """Returns the options without blanks around them and without empty ones. Raises UserError where their number is
    wrong. No parts are no options.
    """
    options = tuple(option for part in parts if (option := part.strip()))
    if options and not 2 <= len(options) <= len(OPTIONS):
        raise UserError(f"give 2 to {len(OPTIONS)} options")
    return options


@dataclass
class Conversation:
    """The exchanges so far, and the picture in use: `image` is uint8 [3, S, S] or None, and `picture` its file."""

    exchanges: list[Exchange] = field(default_factory=list)
    picture: str = ""
    image: torch.Tensor | None = None

    @property
    def turns(self) -> list[Turn]:
        return [Turn(exchange.answer.prompt, exchange.answer.text) for exchange in self.exchanges]

    @property
    def last(self) -> Exchange:
        """The last exchange. Raises UserError where there is none."""
        if not self.exchanges:
            raise UserError("ask a question first")
        return self.exchanges[-1]

    def use_picture(self, path: str, image_size: int) -> None:
        """Makes a file the picture in use. Raises UserError, and keeps the one in use, where the file is no picture."""
        self.image = image_to_tensor(open_image(path), image_size)
        self.picture = path

    def drop_picture(self) -> None:
        self.picture, self.image = "", None

    def question(self, text: str, context: str = "", options: Iterable[str] = ()) -> Question:
        """Returns a question about the picture in use. Raises UserError where the question is invalid."""
        return checked(Question(text.strip(), self.image, context.strip(), read_options(options), self.picture))

    def answer(self, bot: Chatbot, run: str, question: Question, settings: Settings, at: int | None = None
               ) -> Iterator[Answer]:
        """Asks a question behind the first `at` exchanges (by default: all), and yields the growing answer.

        From the first token on, the new exchange is the last one. Until then nothing changes, so that a question that
        the model cannot take leaves the conversation as it is. An answer may be left at any token: what is there
        counts as the answer.
        """
        at = len(self.exchanges) if at is None else at
        settings = settings.drawn()
        for answer in bot.answer(run, self.turns[:at], question, settings):
            self.exchanges[at:] = [Exchange(run, question, settings, answer)]
            yield answer

    def regenerate(self, bot: Chatbot, run: str, settings: Settings) -> Iterator[Answer]:
        """Asks the last question again. The new answer takes the place of the old one."""
        return self.answer(bot, run, self.last.question, settings, at=len(self.exchanges) - 1)

    def compare(self, bot: Chatbot, run: str, settings: Settings) -> Iterator[Answer]:
        """Puts the last question to a run as it was asked; the conversation stays as it is. Give all runs the same
        `settings.drawn()`.
        """
        return bot.answer(run, self.turns[:-1], self.last.question, settings)

    def edited(self, at: int, text: str) -> Question:
        """Returns the question of exchange `at` with another text, to be given to `answer` with this `at`; there, the
        exchanges from `at` on are forgotten. Raises UserError where the text is invalid.
        """
        return checked(replace(self.exchanges[at].question, text=text.strip()))

    def undo(self) -> Question:
        """Forgets the last exchange and returns its question. Its picture is in use again, so that the question can be
        asked as it was.
        """
        question = self.last.question
        self.picture, self.image = question.picture, question.image
        self.exchanges.pop()
        return question


def checked(question: Question) -> Question:
    """Returns the question. Raises UserError where it is empty, or no text."""
    try:
        make_prompt(question, "QCM-A").encode()  # any prompt format will do
    except UnicodeError as error:  # JSON can spell half a character, and a terminal can send a wrong byte
        raise UserError("the question is not UTF-8 text: write it again") from error
    return question
