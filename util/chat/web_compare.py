"""The tab Compare: one question to several runs, whose answers stand side by side.

The question is a new one, which is asked on its own, or the last one of the chat, which is asked after the turns that
were before it there.
"""

import time
from dataclasses import dataclass, field

from lavin.runtime.errors import UserError, first_line
from util.chat.asking import REFUSALS, box_value, busy, make_settings, read_question, ready, refusing, updates
from util.chat.bubbles import exchange_notes, thumbnail
from util.chat.chatbot import Answer, Chatbot, Question, Settings, Turn
from util.chat.conversation import Conversation, Exchange
from util.chat.markdown import without_html
from util.chat.own_gradio import gr
from util.chat.web_html import answer_notes, details_html, title_html

MAX_RUNS = 4  # in one comparison


@dataclass
class Comparison:
    """The comparison of one user: the question, the turns that it is asked after, who is asked, and how."""

    conversation: Conversation = field(default_factory=Conversation)  # for the picture in use
    question: Question | None = None
    turns: list[Turn] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    is_asked: bool = False
    is_answering: bool = False
    stopped: bool = False


class CompareTab:
    """The event handlers. right: the index of the right option by question and options, where it is known."""

    def __init__(self, bot: Chatbot, right: dict):
        self.bot, self.right = bot, right

    def begin(self, comparison: Comparison, question: Question, turns: list[Turn], runs: list[str], sampling) -> list:
        """Makes a question the one to be answered; returns what shows it, and empty cards."""
        if comparison.is_asked or comparison.is_answering:
            raise UserError("the answers are still being written: stop them first")
        if not 2 <= len(runs) <= MAX_RUNS:
            raise UserError(f"choose 2 to {MAX_RUNS} variants")
        comparison.settings = make_settings(*sampling).drawn()  # with one seed for all
        comparison.question, comparison.turns, comparison.runs = question, turns, runs
        comparison.is_asked, comparison.stopped = True, False
        picture = thumbnail(question.picture) if question.picture else None
        after = "*(after the turns before it)*" if turns and not question.options else ""
        return [gr.update(value=picture, visible=bool(picture)), f"{without_html(question.text)} {after}",
                details_html(question), *cards(runs)]

    def send(self, message, context, options, runs, comparison, *sampling):
        """Compares the answers to a message. Its picture stays in the box."""
        with refusing():
            question = read_question(comparison.conversation, message, context, options,
                                     self.bot.model.vision.image_size)
            return (*self.begin(comparison, question, [], runs, sampling), busy(value=box_value("", question.picture)),
                    "", "", comparison)
        return [gr.skip()] * (3 + 4 * MAX_RUNS + 4)

    def again(self, runs, comparison, *sampling):
        """Compares the answers to the same question once more, of other variants or with other settings."""
        with refusing():
            if comparison.question is None:
                raise UserError("ask a question first")
            return *self.begin(comparison, comparison.question, comparison.turns, runs, sampling), busy(), comparison
        return [gr.skip()] * (3 + 4 * MAX_RUNS + 2)

    def last_of_chat(self, session, runs, comparison, *sampling):
        """Compares the answers to the last question of the chat, and opens this tab."""
        with refusing():
            question, turns = session.conversation.last.question, session.conversation.turns[:-1]
            return (*self.begin(comparison, question, turns, runs, sampling), busy(), comparison,
                    gr.Tabs(selected="compare"))
        return [gr.skip()] * (3 + 4 * MAX_RUNS + 3)

    def answer(self, comparison):
        """Streams the answers into the cards, one run after the other."""
        skip_all = [gr.skip()] * (4 * MAX_RUNS)
        if not comparison.is_asked:
            yield skip_all
            return
        comparison.is_asked, comparison.is_answering = False, True
        try:
            for i, run in enumerate(comparison.runs):
                for text, notes in self.stream(run, comparison):
                    yield [*skip_all[:4 * i + 2], without_html(text) or "…", notes, *skip_all[4 * (i + 1):]]
        finally:
            comparison.is_answering = False

    def stream(self, run, comparison):
        """Yields text and notes of a run's answer; an error is a note."""
        question, settings, start = comparison.question, comparison.settings, time.perf_counter()
        answer, fault = Answer(""), ""
        if comparison.stopped:
            yield "", answer_notes(answer, question, ["not asked"])
            return
        try:
            answers = self.bot.answer(run, comparison.turns, question, settings)
            for answer in updates(answers, lambda: comparison.stopped):
                yield answer.text, ""
        except REFUSALS as error:
            fault = first_line(error)
        exchange = Exchange("", question, settings, answer)
        yield answer.text, exchange_notes(exchange, time.perf_counter() - start, fault,
                                          self.right.get((question.text, question.options)))

    def stop(self, comparison):
        comparison.stopped = True

    def finish(self, comparison):
        if comparison.is_answering:  # another question
            return [gr.skip()] * 2
        comparison.is_asked = False
        return ready(), comparison


def cards(runs: list[str]) -> list:
    """Returns the columns, titles, texts and notes of MAX_RUNS cards, of which those of the runs are shown."""
    updates_of_cards: list = []
    for run in [*runs, *[None] * (MAX_RUNS - len(runs))]:
        updates_of_cards += [gr.Column(visible=run is not None), title_html(run or ""), "…", ""]
    return updates_of_cards
