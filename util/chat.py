"""Conversation with finished runs: the frozen base once, adapters swapped from one question to the next.

Notable:
- A question without options continues the conversation, in the prompt of instruction tuning. One with options is asked
  on its own, in the prompt format that the run was trained with, as eval.py asks it.
- What no longer fits into max_seq_len goes, oldest turn first, and the answer says how many turns went.
- One model serves all: a newer question ends an abandoned one between two of its tokens, never in the midst of one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import torch

from lavin.checkpoint import load_adapters, read_adapters
from lavin.errors import UserError
from lavin.generation import option_example, rehearse, score_options
from lavin.mm_adapter import AdapterConfig, RepAdapter, RepAdapterRouter
from lavin.model import LaVIN
from lavin.streaming import stream
from lavin.tokenizer import Example, Tokenizer
from util.files import read_json
from util.finished_runs import run_folders, written_by_us
from util.prompts import OPTIONS, answer_text, build_prompt, instruction_prompt
from util.runs import checkpoints, last_checkpoint

# flags that runs on one model must share: the base, and what decides the shapes of the adapters
SHARED = ("llm_model", "use_vicuna", "vision_model", "adapter_type", "visual_adapter_type", "adapter_dim", "n_prompt",
          "hidden_proj")


@dataclass(frozen=True)
class Question:
    """picture: uint8 [3, S, S]. context: more to go by, a hint or Alpaca's `input`. options: none, or 2 to 5."""

    text: str
    picture: torch.Tensor | None = None
    context: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """temperature 0: the likeliest token."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.75
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """An answer so far. probabilities: of the question's options, with the whole text. dropped: turns left out."""

    prompt: str
    text: str = ""
    dropped: int = 0
    probabilities: tuple[float, ...] = ()


def find_runs(folder: str) -> tuple[dict[str, Path], list[str]]:
    """The finished runs in a folder that can share one model, by name, and a line on each that cannot.

    A run is finished where it has a config.json and a checkpoint. Where runs differ in SHARED, most runs win.
    Raises UserError where there is none.
    """
    paths = [path for path in run_folders([folder]) if (path / "config.json").is_file() and checkpoints(path)]
    if not paths:
        raise UserError(f"--runs {folder} holds no finished run (config.json and checkpoint-*.pth): train one first")
    flags, left_out = {}, []
    for path in paths:
        try:
            flags[path] = read_flags(path)
        except UserError as error:
            left_out.append(f"{path} is left out: {error}")
    if not flags:
        raise UserError("; ".join(left_out))
    common = dict(Counter(tuple((name, f.get(name)) for name in SHARED) for f in flags.values()).most_common(1)[0][0])
    for path, own in list(flags.items()):
        others = [f"--{name} {own.get(name)}, not {value}" for name, value in common.items() if own.get(name) != value]
        if others:
            left_out.append(f"{path} is left out: it cannot share the others' model ({', '.join(others)})")
            del flags[path]
    return {path.name or str(path): path for path in flags}, left_out


def read_flags(run: Path) -> dict:
    path = run / "config.json"
    with written_by_us(path):
        return dict(read_json(path)["flags"])


def make_prompt(question: Question, prompt_format: str) -> str:
    """Raises UserError where there is nothing to answer, or more options than letters."""
    text = question.text.strip()
    if not text:
        raise UserError("write a question")
    if not question.options:
        return instruction_prompt(text, question.context.strip())
    if not 2 <= len(question.options) <= len(OPTIONS):
        raise UserError(f"give 2 to {len(OPTIONS)} options, one a line")
    problem = {"question": text, "choices": question.options, "hint": question.context.strip(), "lecture": "",
               "solution": "", "answer": 0}
    return build_prompt(problem, prompt_format)[0]


def fit(tokenizer: Tokenizer, turns: list[Turn], prompt: str, picture: torch.Tensor | None, n_prompt: int,
        max_seq_len: int, room: int) -> tuple[Example, int]:
    """The conversation as one example that leaves `room` tokens for the answer, and how many turns were dropped for it.

    Raises UserError where the question alone fills max_seq_len; where it leaves less than `room`, that must do.
    """
    for dropped in range(len(turns) + 1):
        past = "".join(f"{turn.prompt}{turn.answer}\n" for turn in turns[dropped:])
        example = tokenizer.example(past + prompt, None, picture, n_prompt)
        left = max_seq_len - 1 - len(example.ids)  # 1: the modality token
        if left >= room:
            break
    if left < 1:
        raise UserError(f"the question has {1 - left} tokens too many for the model's {max_seq_len}: shorten it")
    return example, dropped


class Chatbot:
    """Answers with any of `runs` (name -> folder, from find_runs) on one model, which already has their shape."""

    def __init__(self, model: LaVIN, tokenizer: Tokenizer, runs: dict[str, Path], max_seq_len: int):
        self.model, self.tokenizer, self.runs, self.max_seq_len = model.eval(), tokenizer, runs, max_seq_len
        self.lock = Lock()
        self.latest = object()  # the question that the model is at

    def use(self, run: str) -> str:
        """Puts a run's latest adapters into the model; returns the run's prompt format."""
        path = last_checkpoint(str(self.runs[run]))
        checkpoint = read_adapters(path)
        load_adapters(self.model, checkpoint["model"], str(path))
        self.model.adapter = adapter = AdapterConfig(**checkpoint["adapter_config"])
        for module in self.model.modules():
            if isinstance(module, RepAdapter):
                module.scale = adapter.adapter_scale
            if isinstance(module, RepAdapterRouter):
                module.temperature = adapter.temperature
        return checkpoint["flags"]["prompt_format"]

    def warm_up(self) -> None:
        """Makes the first question as quick as any."""
        self.use(next(iter(self.runs)))
        rehearse(self.model, self.max_seq_len - 1)  # 1: the modality token

    def answer(self, run: str, turns: list[Turn], question: Question, settings: Settings) -> Iterator[Answer]:
        """The answer as it grows; ends early where another question is asked. Raises UserError as `fit` does."""
        steps = self.steps(run, turns, question, settings)
        self.latest = me = object()
        while True:
            # a page answers in threads of its own, each of which begins on the first GPU
            with self.lock, torch.cuda.device_of(self.model.adapter_modality_embedding.weight):
                answer = next(steps, None) if self.latest is me else None
            if answer is None:
                return
            yield answer

    def steps(self, run, turns, question, settings) -> Iterator[Answer]:
        prompt = make_prompt(question, self.use(run))
        example, dropped = fit(self.tokenizer, [] if question.options else turns, prompt, question.picture,
                               self.model.adapter.n_prompt, self.max_seq_len, settings.max_new_tokens)
        answer = Answer(prompt, dropped=dropped)
        room = min(settings.max_new_tokens, self.max_seq_len - 1 - len(example.ids))
        for text in stream(self.model, self.tokenizer, example, room, settings.temperature, settings.top_p,
                           settings.seed):
            answer = replace(answer, text=text)
            yield answer
        if question.options:
            yield replace(answer, probabilities=self.probabilities(prompt, question))

    def probabilities(self, prompt: str, question: Question) -> tuple[float, ...]:
        """Of the options, by the token in which their answers differ, as eval.py chooses where a text names none."""
        answers = [answer_text(i) for i in range(len(question.options))]
        asked = option_example(self.tokenizer, prompt, answers, image=question.picture,
                               n_prompt=self.model.adapter.n_prompt)
        return tuple(torch.tensor(next(score_options(self.model, [[asked]]))[0]).exp().tolist())
