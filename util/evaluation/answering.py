"""Asks a model the questions of ScienceQA: prompts, batches, texts, and the options that they name."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from lavin.generation.generate import generate
from lavin.generation.option_scoring import option_example, score_options
from lavin.generation.sampling import named_failures, sampling_seed
from lavin.runtime.console import progress_bar
from lavin.tokenizer import Example
from util.data.batches import balanced_parts
from util.data.datasets import ScienceQA, cluster
from util.data.prompts import answer_text, build_prompt, fit_prompt
from util.data.settings import DataSettings
from util.evaluation.answers import Answer, is_answered, parse_answer
from util.evaluation.settings import Answering

MAX_ANSWER_TOKENS = 64  # in formats that begin with the answer; in others, --max_seq_len


class EvalQuestion(NamedTuple):
    """A question as the model gets it.

    example: the tokenized prompt, with its image. seed: the seed of its draws, which does not depend on the batch. cut:
    whether the prompt was too long, so that words in its middle are left out.
    """

    qid: str
    prompt: str
    example: Example
    n_choices: int
    seed: int
    cut: bool = False


def most_likely_options(model, tokenizer, batches: Iterable[list[EvalQuestion]]) -> Iterator[list[int]]:
    """The most likely option of each question, batch by batch, by the first token in which its answers differ."""
    examples = ([option_example(tokenizer, question.prompt, [answer_text(k) for k in range(question.n_choices)],
                                image=question.example.image, n_prompt=model.adapter.n_prompt) for question in batch]
                for batch in batches)
    for batch_scores in score_options(model, examples):
        yield [scores.index(max(scores)) for scores in batch_scores]


def first_tokens(tokenizer, prompt: str) -> list[int]:
    """The tokens with which all answers to a prompt begin: `The answer is`."""
    example, _ = option_example(tokenizer, prompt, [answer_text(0), answer_text(1)])
    return list(example.ids[len(tokenizer.example(prompt).ids):])


def generate_batch(model, tokenizer, batch: list[EvalQuestion], data: DataSettings, answering: Answering
                   ) -> list[tuple[str, int, bool]]:
    """Answers each question: the text, the option's index, and whether the text names it; if not, the likeliest one."""
    is_first = answers_first(data.prompt_format)
    draft = first_tokens(tokenizer, batch[0].prompt) if is_first else []
    texts = generate(model, tokenizer, [question.example for question in batch],
                     MAX_ANSWER_TOKENS if is_first else data.max_seq_len, is_answered,
                     answering.generation_temperature, answering.top_p, [question.seed for question in batch], draft)
    predictions = [parse_answer(text, question.n_choices) for text, question in zip(texts, batch, strict=True)]
    # scores the whole batch, not only the unparsed questions: a single one would need a session of its own
    fallbacks = next(most_likely_options(model, tokenizer, [batch])) if None in predictions else [0] * len(batch)
    return [(text, fallback if prediction is None else prediction, prediction is not None)
            for text, prediction, fallback in zip(texts, predictions, fallbacks, strict=True)]


def answer_batches(model, tokenizer, batches: list[list[EvalQuestion]], data: DataSettings, answering: Answering
                   ) -> Iterator[list[tuple[str, int, bool]]]:
    """Yields what `generate_batch` gives, batch by batch; with --decode score, the text is that of the likeliest
    option."""
    if answering.decode == "score":
        options_by_batch = most_likely_options(model, tokenizer, batches)
        return ([(answer_text(i), i, True) for i in options] for options in options_by_batch)
    return (generate_batch(model, tokenizer, batch, data, answering) for batch in batches)


def answers_first(prompt_format: str) -> bool:
    """Whether answers in this format begin with the option, and the solution follows."""
    return prompt_format.split("-")[1].startswith("A")


def make_question(tokenizer, n_prompt: int, problems: ScienceQA, qid: str, image: torch.Tensor | None,
                  data: DataSettings, seed: int) -> EvalQuestion:
    """The question as the model gets it. seed: the --seed of the command."""
    problem = problems.problems[qid]
    whole, _ = build_prompt(problem, data.prompt_format, problems.captions.get(qid, ""))
    prompt = fit_prompt(tokenizer, whole, image, n_prompt, data.max_seq_len)
    return EvalQuestion(qid, prompt, tokenizer.example(prompt, None, image, n_prompt), len(problem["choices"]),
                        sampling_seed(seed, qid), prompt != whole)


def answer_questions(model, tokenizer, problems: ScienceQA, images: dict, qids: list[str], data: DataSettings,
                     answering: Answering) -> Iterator[list[Answer]]:
    """Yields the answers to the questions `qids`, batch by batch. Raises UserError, naming them, where the model gives
    NaN."""
    questions = [make_question(tokenizer, model.adapter.n_prompt, problems, qid, images.get(qid), data, answering.seed)
                 for qid in qids]
    # batches of about as many tokens each, so that few sizes are captured in CUDA graphs
    parts = balanced_parts([len(question.example.ids) for question in questions],
                           math.ceil(len(questions) / answering.max_batch_size))
    batches = [[questions[i] for i in part] for part in parts]
    results = answer_batches(model, tokenizer, batches, data, answering)
    with progress_bar(None, "questions", total=len(questions), unit="question") as bar:
        for batch in batches:
            with named_failures([f"question {question.qid}" for question in batch]):
                answered = next(results)
            yield [make_answer(question, problems.problems[question.qid], *result)
                   for question, result in zip(batch, answered, strict=True)]
            bar.update(len(batch))


def make_answer(question: EvalQuestion, problem: dict, text: str, prediction: int, parsed: bool) -> Answer:
    return Answer(question.qid, prediction, problem["answer"], text, parsed, cluster(question.qid, problem),
                  question.cut)
