"""A run as a model of lmms-eval: its tasks ask, and the answers come from the functions that eval.py uses.

    python -m lmms_eval --model lavin --model_args adapter_path=RUN --tasks scienceqa --batch_size 64

--model_args takes the flags of eval.py that concern the model.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image

from lavin.generation.generate import generate
from lavin.generation.option_scoring import answer_losses
from lavin.generation.sampling import named_failures, sampling_seed
from lavin.runtime.console import counted, progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.flags import Parser, command_line
from lavin.tokenizer import Example
from util.data.images import image_to_tensor, to_rgb
from util.data.prompts import RESPONSE, fit_prompt, instruction_prompt
from util.data.settings import DataSettings
from util.evaluation.answers import NAMED_OPTION, is_answered
from util.flags import SHARED
from util.trained_model import load_model

T = TypeVar("T")


class Question(NamedTuple):
    """A request of lmms-eval as the model gets it. name: the task, and the number of the document in it."""

    name: str
    prompt: str
    image: torch.Tensor | None
    is_instruction: bool


# --- Settings ---

def get_args_parser() -> Parser:
    parser = Parser("eval.py", __doc__, *SHARED)  # messages name the program whose --help lists these flags
    parser.add_argument("--adapter_path", help="a checkpoint, or a run's folder (without it: the untuned base)")
    parser.add_argument("--tokenizer_path", help="tokenizer.model or tokenizer.json (the base model's)")
    return parser


def sampling_of(options: dict[str, Any]) -> tuple[float, float]:
    """The temperature and the nucleus that a task asks for. options: its generation_kwargs."""
    temperature = 0.0 if options.get("do_sample") is False else float(options.get("temperature") or 0)
    return temperature, float(options.get("top_p") or 1)


# --- Requests ---

def batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start:start + size]


def seeded(requests: list[Instance]) -> Iterator[tuple[Instance, int]]:
    """Each request with the seed of its draws, which is another one where a task asks the same question again."""
    times: Counter[str] = Counter()
    for request in requests:
        *_, doc_id, task, split = request.args
        name = f"{task} {split} {doc_id}"
        yield request, sampling_seed(torch.initial_seed(), f"{name} {times[name]}")
        times[name] += 1


# --- Texts ---

def stops_of(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else until


def is_complete(text: str, stops: list[str]) -> bool:
    return is_answered(text) or any(stop in text for stop in stops)


def before(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def given_letter(text: str) -> str:
    """The letter alone where a text says that the answer is this letter: the tasks of lmms-eval compare it so."""
    match = NAMED_OPTION.search(text)
    return match.group(1) if match else text


# --- The model ---

class LaVINModel(lmms):
    """Answers the requests of lmms-eval.

    A context that ends with `Response:` is a whole prompt, and its text is returned as it is. Any other context becomes
    an instruction, as in the chat, and of an answer that names an option the letter is returned.
    """

    is_simple = True

    def __init__(self, batch_size: int | str = 1, **flags: Any) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise UserError(f"--batch_size {batch_size} is no number: give the number of questions per batch")
        args = get_args_parser().parse_args(command_line(flags))  # lmms-eval made numbers and booleans of words
        if args.model_parallel_size > 1:
            raise UserError("--model_parallel_size is for eval.py: lmms-eval gives each process questions of its own")
        self.model, self.tokenizer, _ = load_model(args)
        self.batch_size, self.max_seq_len = int(batch_size), DataSettings.of(args).max_seq_len

    @property
    def device(self) -> torch.device:
        return self.model.device

    def question(self, context: str, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Question:
        name = f"{task} {doc_id}"
        image = self.picture(doc_to_visual(self.task_dict[task][split][doc_id]), name)
        is_instruction = not context.endswith(RESPONSE)
        prompt = fit_prompt(self.tokenizer, instruction_prompt(context) if is_instruction else context, image,
                            self.model.adapter.n_prompt, self.max_seq_len)
        return Question(name, prompt, image, is_instruction)

    def picture(self, visuals: list[Any], name: str) -> torch.Tensor | None:
        """Raises UserError for what the model cannot see: more than one picture, a film, a sound."""
        if not visuals:
            return None
        if len(visuals) > 1 or not isinstance(visuals[0], Image.Image):
            kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
            raise UserError(f"question {name} has {counted(len(visuals), 'input')} of type {kinds}, and LaVIN sees one "
                            "picture: choose other tasks")
        return image_to_tensor(to_rgb(visuals[0]), self.model.vision.image_size)

    def example(self, question: Question, answer: str | None = None) -> Example:
        """The tokens of a question, and of an answer without EOS: the text may go on."""
        example = self.tokenizer.example(question.prompt, answer, question.image, self.model.adapter.n_prompt)
        return example if answer is None else replace(example, ids=example.ids[:-1])

    def generate_until(self, requests: list[Instance]) -> list[str]:
        texts: list[str] = []
        with progress_bar(None, "questions", total=len(requests), unit="question") as bar:
            for options, group in groupby(seeded(requests), lambda pair: pair[0].args[1]):
                for batch in batches(list(group), self.batch_size):
                    questions = [self.question(request.args[0], *request.args[2:]) for request, _ in batch]
                    texts += self.generate_batch(questions, [seed for _, seed in batch], options)
                    bar.update(len(batch))
        return texts

    def generate_batch(self, questions: list[Question], seeds: list[int], options: dict[str, Any]) -> list[str]:
        """options: the generation_kwargs of the task."""
        stops = stops_of(options)
        with named_failures([f"question {question.name}" for question in questions]):
            texts = generate(self.model, self.tokenizer, [self.example(question) for question in questions],
                             int(options.get("max_new_tokens") or self.max_seq_len), partial(is_complete, stops=stops),
                             *sampling_of(options), seeds)
        texts = [before(text, stops) for text in texts]
        return [given_letter(text) if question.is_instruction else text
                for text, question in zip(texts, questions, strict=True)]

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """For each continuation, the mean cross-entropy of its tokens, and whether greedy decoding would write it.

        lmms-eval chooses the lowest number, which all its models give, though its function is called a likelihood. It
        makes a text of a plain pair, and then fails: a GenerationResult reaches the task as it is.
        """
        losses: list[tuple[float, bool]] = []
        with progress_bar(None, "options", total=len(requests), unit="option") as bar:
            for batch in batches(requests, self.batch_size):
                questions = [self.question(request.args[0], *request.args[2:]) for request in batch]
                examples = [self.example(question, self.continuation(*request.args))
                            for question, request in zip(questions, batch, strict=True)]
                with named_failures([f"question {question.name}" for question in questions]):
                    losses += answer_losses(self.model, examples)
                bar.update(len(batch))
        return [GenerationResult(pair) for pair in losses]

    def continuation(self, _context: str, text: Any, _doc_to_visual: Any, doc_id: int, task: str, split: str) -> str:
        """The text of a continuation. The task's blank before it goes: answers follow `Response:` without one."""
        return (text(self.task_dict[task][split][doc_id]) if callable(text) else text).strip()

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UserError("LaVIN answers single questions, and the task asks in several rounds: choose other tasks")
