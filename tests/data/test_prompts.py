"""Every prompt format in full, and which of its tokens are targets of the loss."""

import json

import pytest
import torch

from lavin.runtime.errors import UserError
from lavin.tokenizer import IMAGE_SLOT, Example
from tiny import IMAGE_SIZE, problem
from util.data.prompts import PROMPT_FORMATS, build_prompt
from util.evaluation.answers import parse_answer

PROBLEM = problem(question="Which pond freezes first?", choices=["the old pond", "the new pond", "neither"], answer=1,
                  hint="It is a  cold night.", lecture="Water freezes.\nShallow water freezes first.",
                  solution="The new pond is shallow.\n\nIt freezes.")
Q = "Question: Which pond freezes first?"
C = "Context: It is a cold night."
M = "Options: (A) the old pond (B) the new pond (C) neither"
L = r"Water freezes.\nShallow water freezes first."
E = r"The new pond is shallow.\n\nIt freezes."
A = "The answer is B."
R = "Response:"

OUTPUTS = {"A": A, "LA": f"{L} {A}", "EA": f"{E} {A}", "LEA": f"{L} {E} {A}", "ELA": f"{E} {L} {A}",
           "AL": f"{A} BECAUSE: {L}", "AE": f"{A} BECAUSE: {E}", "ALE": f"{A} BECAUSE: {L} {E}",
           "AEL": f"{A} BECAUSE: {E} {L}"}
EXPECTED = {f"CQM-{output}": ([C, Q, M, R], answer) for output, answer in OUTPUTS.items()}
EXPECTED |= {f"QCM-{output}": ([Q, C, M, R], answer) for output, answer in OUTPUTS.items()}
EXPECTED |= {
    "QCML-A": ([Q, C, M, f"BECAUSE: {L}", R], A),
    "QCME-A": ([Q, C, M, f"BECAUSE: {E}", R], A),
    "QCMLE-A": ([Q, C, M, f"BECAUSE: {L} {E}", R], A),
    "QCLM-A": ([Q, C, f"BECAUSE: {L}", M, R], A),
    "QCEM-A": ([Q, C, f"BECAUSE: {E}", M, R], A),
    "QCLEM-A": ([Q, C, f"BECAUSE: {L} {E}", M, R], A),
    "QCML-AE": ([Q, C, M, f"BECAUSE: {L}", R], f"{A} BECAUSE: {E}"),
}


def test_every_format_has_an_expected_prompt():
    assert set(PROMPT_FORMATS) == set(EXPECTED)


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_format(prompt_format):
    lines, answer = EXPECTED[prompt_format]
    assert build_prompt(PROBLEM, prompt_format) == ("\n".join(lines), answer)


@pytest.mark.parametrize("hint, caption, context", [
    ("", "", "N/A"), ("Look.", "", "Look."), ("", "A pond.", "A pond."), ("Look.", "A pond.", "Look. A pond.")])
def test_context(hint, caption, context):
    prompt, _ = build_prompt({**PROBLEM, "hint": hint}, "QCM-A", caption)
    assert prompt == "\n".join((Q, f"Context: {context}", M, R))


@pytest.mark.parametrize("lecture, solution, reason", [
    ("", "", ""), ("One.", "", " BECAUSE: One."), ("", "Two.", " BECAUSE: Two."),
    ("One.", "Two.", " BECAUSE: One. Two.")])
def test_missing_lecture_or_solution(lecture, solution, reason):
    """An empty `BECAUSE:` is left out of the answer and of the prompt."""
    bare = {**PROBLEM, "lecture": lecture, "solution": solution}
    assert build_prompt(bare, "QCM-ALE")[1] == A + reason
    assert build_prompt(bare, "QCM-LEA")[1] == (reason.removeprefix(" BECAUSE: ") + " " + A).strip()
    lines = [Q, C, M, reason.strip(), R] if reason else [Q, C, M, R]
    assert build_prompt(bare, "QCMLE-A")[0] == "\n".join(lines)


@pytest.mark.parametrize("text, choices, index", [
    ("The answer is A.", 2, 0), ("The answer is C. BECAUSE: no.", 3, 2), ("It rains. The answer is B.", 2, 1),
    ("The answer is C.", 2, None), ("The answer is B", 3, None), ("the answer is b.", 3, None), ("", 4, None),
    ("The answer is Z.", 26, None), ("The answer is AB.", 3, None)])
def test_parse_answer(text, choices, index):
    assert parse_answer(text, choices) == index


IMAGE = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


@pytest.mark.parametrize("image", [None, IMAGE])
def test_layout_of_one_example(tokenizer, image):
    prompt, answer = build_prompt(PROBLEM, "QCM-ALE")
    example = tokenizer.example(prompt, answer, image, n_prompt=6)
    prefix = tokenizer.encode("Image: ") + [IMAGE_SLOT] * 6 if image is not None else tokenizer.encode("Image: N/A")
    assert example.ids == [1, *prefix, *tokenizer.encode(prompt + answer), 2]
    assert tokenizer.decode([i for i in example.ids if i >= 0]) == \
        f"Image: {'' if image is not None else 'N/A'} {prompt}{answer}"
    assert example.image is image


def check_labels(tokenizer, example: Example, question: Example, answer: str) -> None:
    """The targets are the answer and EOS; all tokens before them equal the prompt used for generation."""
    targets = example.ids[example.answer_start:]
    assert targets[-1] == tokenizer.eos_id
    assert tokenizer.decode(targets[:-1]) == answer
    assert example.ids[:example.answer_start] == question.ids
    assert question.answer_start == len(question.ids)


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
@pytest.mark.parametrize("image", [None, IMAGE])
def test_targets_are_the_answer_and_eos(tokenizer, prompt_format, image):
    prompt, answer = build_prompt(PROBLEM, prompt_format)
    example, question = tokenizer.example(prompt, answer, image), tokenizer.example(prompt, None, image)
    check_labels(tokenizer, example, question, answer)


def test_max_seq_len_includes_the_modality_token(tokenizer):
    prompt, answer = build_prompt(PROBLEM, "QCM-ALE")
    full = tokenizer.example(prompt, answer, IMAGE)
    n = len(full.ids)
    assert tokenizer.example(prompt, answer, IMAGE, max_seq_len=n + 1) == full
    truncated = tokenizer.example(prompt, answer, IMAGE, max_seq_len=n)
    assert truncated.ids == full.ids[:-1] and truncated.answer_start == full.answer_start
    without_answer = tokenizer.example(prompt, answer, IMAGE, max_seq_len=20)
    assert without_answer.ids == full.ids[:19] and without_answer.answer_start == 19  # no targets
    with pytest.raises(UserError, match="--max_seq_len 10"):
        tokenizer.example(prompt, answer, IMAGE, max_seq_len=10)


def test_all_formats_on_the_real_problems(tokenizer, real_scienceqa):
    problems = json.loads((real_scienceqa / "problems.json").read_text())
    captions = json.loads((real_scienceqa / "captions.json").read_text())["captions"]
    assert len(problems) == 150
    for prompt_format in PROMPT_FORMATS:
        for qid, p in problems.items():
            prompt, answer = build_prompt(p, prompt_format, captions.get(qid, ""))
            assert prompt.endswith("\nResponse:")
            assert all(text in prompt + "\n" for text in ("Question: ", "\nOptions: (A) ") if prompt_format[0] == "Q")
            assert not prompt.endswith(" ") and "BECAUSE:\n" not in prompt and not answer.endswith("BECAUSE:")
            assert parse_answer(answer, len(p["choices"])) == p["answer"]
            assert captions.get(qid, "")[:40].replace("  ", " ") in prompt
            for letter, field in (("L", "lecture"), ("E", "solution")):
                start = p[field].split("\n")[0].split("  ")[0].strip()
                assert (start in answer) or letter not in prompt_format.split("-")[1]
                assert (start in prompt) or letter not in prompt_format.split("-")[0]


def test_labels_of_the_real_problems(tokenizer, real_scienceqa):
    problems = json.loads((real_scienceqa / "problems.json").read_text())
    for p in problems.values():
        image = IMAGE if p["image"] else None
        prompt, answer = build_prompt(p, "QCM-ALE")
        example = tokenizer.example(prompt, answer, image, 6, 10_000)
        check_labels(tokenizer, example, tokenizer.example(prompt, None, image), answer)
