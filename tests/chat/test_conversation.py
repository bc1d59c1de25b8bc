"""The rule of conversation, which page and terminal share, and the files that a conversation is kept in."""

import json
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lavin.runtime.errors import UserError
from util.chat.chatbot import Answer, Settings, Turn
from util.chat.conversation import Conversation, read_options
from util.chat.export import as_json, as_markdown

SIZE = 4  # of pictures


class Bot:
    """It answers each question in three steps, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def answer(self, run, turns, question, settings):
        if "long" in question.text:
            raise UserError("too long")
        self.asked.append((run, turns, question, settings))
        for n in range(1, 4):
            text = f"{run} says {question.text}"[:-3 + n or None]
            yield Answer(f"[{question.text}]", text, tokens=n, complete=n == 3)


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for colour in ("red", "blue"):
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{colour}.png")
        paths.append(str(tmp_path / f"{colour}.png"))
    return paths


def ask(conversation, bot, text, run="one", settings=None, **question):
    return list(conversation.answer(bot, run, conversation.question(text, **question), settings or Settings()))[-1]


def state(conversation) -> tuple:
    return list(conversation.exchanges), conversation.picture, conversation.image


def test_a_picture_is_in_use_until_another_comes_or_it_is_dropped(pictures):
    conversation, bot = Conversation(), Bot()
    red, blue = pictures
    ask(conversation, bot, "before")
    conversation.use_picture(red, SIZE)
    ask(conversation, bot, "text")
    ask(conversation, bot, "choice", options=("a", "b"))
    with pytest.raises(UserError):
        conversation.use_picture(__file__, SIZE)
    ask(conversation, bot, "after a bad one")
    conversation.use_picture(blue, SIZE)
    ask(conversation, bot, "blue")
    conversation.drop_picture()
    ask(conversation, bot, "without")
    questions = [question for _, _, question, _ in bot.asked]
    assert [question.picture for question in questions] == ["", red, red, red, blue, ""]
    colours = [None if question.image is None else question.image[:, 0, 0].tolist() for question in questions]
    assert colours == [None, *[[255, 0, 0]] * 3, [0, 0, 255], None]


def test_refused_questions_change_nothing(pictures):
    conversation, bot = Conversation(), Bot()
    conversation.use_picture(pictures[0], SIZE)
    ask(conversation, bot, "first")
    before = state(conversation)
    for text, options in ((" ", ()), ("x", ("one",)), ("x", "abcdef"), ("half \ud800", ()), ("x", ("a", "\ud800"))):
        with pytest.raises(UserError):
            conversation.question(text, options=options)
    with pytest.raises(UserError, match="too long"):  # refused by the model
        ask(conversation, bot, "long")
    with pytest.raises(UserError, match="too long"):
        list(conversation.answer(bot, "one", conversation.edited(0, "long"), Settings(), at=0))
    with pytest.raises(UserError, match="write a question"):
        conversation.edited(0, " ")
    assert state(conversation) == before
    for refused in (Conversation().undo, lambda: Conversation().regenerate(bot, "one", Settings()),
                    lambda: Conversation().compare(bot, "one", Settings())):
        with pytest.raises(UserError, match="ask a question first"):
            refused()


def test_a_question_can_be_asked_again_edited_compared_and_taken_back(pictures):
    conversation, bot = Conversation(), Bot()
    ask(conversation, bot, "first")
    conversation.use_picture(pictures[0], SIZE)
    ask(conversation, bot, "second", context="hint", options=("a", "b"))
    second = conversation.last.question
    conversation.use_picture(pictures[1], SIZE)
    first_turn = [Turn("[first]", "one says first")]
    list(conversation.regenerate(bot, "two", Settings()))
    assert bot.asked[-1][:3] == ("two", first_turn, second) and len(conversation.exchanges) == 2
    assert conversation.last.run == "two" and conversation.last.answer.text == "two says second"
    before = state(conversation)
    list(conversation.compare(bot, "three", Settings()))
    assert bot.asked[-1][:3] == ("three", first_turn, second) and state(conversation) == before
    ask(conversation, bot, "third")
    list(conversation.answer(bot, "one", conversation.edited(1, "other"), Settings(), at=1))
    assert bot.asked[-1][1] == first_turn and [turn.prompt for turn in conversation.turns] == ["[first]", "[other]"]
    edited = conversation.last.question
    assert (edited.context, edited.options, edited.picture) == ("hint", ("a", "b"), pictures[0])
    assert conversation.undo() == edited and conversation.picture == pictures[0]
    assert conversation.turns == first_turn and conversation.question("x").image is edited.image


def test_an_answer_that_is_left_counts_as_far_as_it_came():
    conversation, bot = Conversation(), Bot()
    answers = conversation.answer(bot, "one", conversation.question("first"), Settings())
    assert conversation.exchanges == []
    next(answers)
    answers.close()
    assert conversation.turns == [Turn("[first]", "one says fir")] and not conversation.last.answer.complete
    assert "*(greedy, stopped)*" in as_markdown(conversation)


def test_each_answer_is_drawn_with_another_seed_unless_one_is_given():
    conversation, bot = Conversation(), Bot()
    for seed in (None, None, 7, 7):
        ask(conversation, bot, "x", settings=Settings(temperature=1.0, seed=seed))
    seeds = [settings.seed for *_, settings in bot.asked]
    assert seeds == [exchange.settings.seed for exchange in conversation.exchanges]
    assert seeds[2:] == [7, 7] and seeds[0] != seeds[1] and None not in seeds
    drawn = Settings().drawn()
    assert drawn.drawn() == drawn
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="the seed"):
            Settings(seed=seed)


@given(st.lists(st.text(alphabet="ab \n\t", max_size=3), max_size=9))
def test_options_are_2_to_5_texts_or_none(parts):
    texts = [part.strip() for part in parts if part.strip()]
    if len(texts) in (0, 2, 3, 4, 5):
        assert read_options(parts) == tuple(texts)
    else:
        with pytest.raises(UserError, match="give 2 to 5 options"):
            read_options(parts)


def test_a_conversation_can_be_copied_and_begins_empty():
    """Gradio copies the first one for each visitor."""
    first = Conversation()
    copied = deepcopy(first)
    ask(first, Bot(), "x")
    assert copied == Conversation() and copied.turns == []


def test_exports_hold_all_that_decided_an_answer(pictures):
    conversation, bot = Conversation(), Bot()
    conversation.use_picture(pictures[0], SIZE)
    ask(conversation, bot, "Où ?", context="hint", options=("a", "b"),
        settings=Settings(9, temperature=0.5, top_p=0.9, seed=3))
    ask(conversation, bot, "second", "two")
    first, second = json.loads(as_json(conversation))
    assert first == {"run": "one", "question": "Où ?", "context": "hint", "options": ["a", "b"], "picture": "red.png",
                     "answer": "one says Où ?", "probabilities": [], "complete": True, "tokens": 3, "dropped_turns": 0,
                     "prompt": "[Où ?]", "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert second["run"] == "two" and second["picture"] == "red.png"
    markdown = as_markdown(conversation)
    positions = [markdown.index(part) for part in (
        "**You:** Où ?", "hint", "*Picture: red.png*", "- (A) a\n- (B) b",
        "**one** *(temperature 0.5, top-p 0.9, seed 3)*", "one says Où ?", "\n\n---\n\n**You:** second",
        "**two** *(greedy)*")]
    assert positions == sorted(positions)
    assert as_json(Conversation()) == "[]"


def test_a_picture_of_a_question_is_no_copy(pictures):
    """20 questions about one picture share its pixels."""
    conversation, bot = Conversation(), Bot()
    conversation.use_picture(pictures[0], SIZE)
    for i in range(3):
        ask(conversation, bot, str(i))
    assert len({exchange.question.image.data_ptr() for exchange in conversation.exchanges}) == 1
    assert torch.equal(conversation.image, conversation.last.question.image)
