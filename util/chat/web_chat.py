"""The tab Chat: a conversation with one run at a time. Its rule is in util.chat.conversation.

A question is handled in two steps. The first, `send` or its like, reads it at once, however many users wait; a question
that it refuses changes nothing on the page. The second, `answer`, waits in the queue for the model.
"""

import time
from dataclasses import dataclass, field

from lavin.runtime.errors import UserError, first_line
from util.chat.asking import REFUSALS, box_value, busy, make_settings, read_question, ready, refuse, refusing, updates
from util.chat.bubbles import exchange_notes, run_message, user_message
from util.chat.chatbot import Chatbot, Question
from util.chat.conversation import Conversation
from util.chat.export import as_json, as_markdown
from util.chat.markdown import with_html
from util.chat.own_gradio import gr


@dataclass
class Session:
    """The chat of one user. `bubbles` has two messages for each exchange. `asked` is the question that waits for its
    answer, its message, and the number of exchanges before it; or None.
    """

    conversation: Conversation = field(default_factory=Conversation)
    bubbles: list = field(default_factory=list)
    asked: tuple | None = None
    is_answering: bool = False
    stopped: bool = False


class ChatTab:
    """The event handlers. right: the index of the right option by question and options, where it is known."""

    def __init__(self, bot: Chatbot, right: dict):
        self.bot, self.right = bot, right

    def begin(self, session: Session, question: Question, at: int) -> list:
        """Makes a question the one to be answered behind `at` exchanges; returns its bubbles."""
        before = session.conversation.exchanges[at - 1].question.picture if at else ""
        asked = user_message(question, shows_picture=question.picture not in ("", before))
        session.asked, session.stopped = (question, asked, at), False
        return [asked]

    def refuse_while_answering(self, session: Session) -> None:
        if session.asked or session.is_answering:
            raise UserError("the answer is still being written: stop it first")

    def send(self, message, context, options, session):
        """Adds a message to the conversation. Its picture stays in the box."""
        with refusing():
            self.refuse_while_answering(session)
            question = read_question(session.conversation, message, context, options, self.bot.model.vision.image_size)
            asked = self.begin(session, question, len(session.conversation.exchanges))
            return asked, busy(value=box_value("", question.picture)), "", "", session
        return [gr.skip()] * 5

    def retry(self, session):
        """Asks the last question again."""
        with refusing():
            self.refuse_while_answering(session)
            at = len(session.conversation.exchanges) - 1
            asked = self.begin(session, session.conversation.last.question, at)
            return session.bubbles[:2 * at], asked, busy(), session
        return [gr.skip()] * 4

    def edit(self, session, edited: gr.EditData):
        """Asks a question again with another text, and forgets what came after it."""
        with refusing():
            self.refuse_while_answering(session)
            at = edited.index // 2
            asked = self.begin(session, session.conversation.edited(at, with_html(edited.value)), at)
            return session.bubbles[:2 * at], asked, busy(), session
        return session.bubbles, *[gr.skip()] * 3  # the page shows the other text already

    def undo(self, session):
        """Takes the last exchange back. Its question returns to the box."""
        with refusing():
            self.refuse_while_answering(session)
            question = session.conversation.undo()
            session.bubbles = session.bubbles[:-2]
            return (session.bubbles, box_value(question.text, question.picture), question.context,
                    "\n".join(question.options), session)
        return [gr.skip()] * 5

    def answer(self, run, max_new_tokens, greedy, temperature, top_p, seed, session):
        """Streams the answer to the question that was begun. If the model refuses the question, all is as before."""
        if not session.asked:
            yield [gr.skip()] * 6
            return
        (question, asked, at), start, is_begun, fault = session.asked, time.perf_counter(), False, ""
        session.asked, session.is_answering = None, True
        conversation, before = session.conversation, session.bubbles[:2 * at]
        unchanged = [gr.skip()] * 3
        try:
            settings = make_settings(max_new_tokens, greedy, temperature, top_p, seed)
            answers = conversation.answer(self.bot, run, question, settings, at)
            for answer in updates(answers, lambda: session.stopped):
                is_begun = True
                yield gr.skip(), [asked, run_message(answer.text)], *unchanged, gr.skip()
        except REFUSALS as error:
            if not is_begun:
                refuse(error)
                is_new = at == len(conversation.exchanges)
                box = [ready(value=box_value(question.text, question.picture)), question.context,
                       "\n".join(question.options)]
                yield session.bubbles, [], *(box if is_new else unchanged), session
                return
            fault = first_line(error)
        finally:
            session.is_answering = False
        if is_begun:
            exchange = conversation.last
            notes = exchange_notes(exchange, time.perf_counter() - start, fault,
                                   self.right.get((question.text, question.options)))
            session.bubbles = [*before, asked, run_message(exchange.answer.text, notes)]
        yield session.bubbles, [], *unchanged, session

    def stop(self, session):
        session.stopped = True

    def finish(self, session):
        """Makes the box ready, also where the answer could not begin because the queue is full."""
        if session.is_answering:  # another question
            return [gr.skip()] * 3
        session.asked = None
        return [], ready(), session

    def new(self):
        return [], [], ready(value=None), Session()

    def markdown(self, session):
        return as_markdown(session.conversation), "conversation.md"

    def json(self, session):
        return as_json(session.conversation), "conversation.json"
