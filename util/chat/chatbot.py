"""A conversation with finished runs: one frozen base model, whose adapters are swapped between questions.

Notable:
- A question without options continues the conversation, in the prompt format of instruction tuning. A question with
  options is asked on its own, in the prompt format that the run was trained with, as in eval.py.
- If the conversation exceeds max_seq_len, its oldest turns are dropped, and the answer tells how many.
- All users share one model: a newer question ends an unfinished answer, always between two tokens.
"""

import math
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from threading import Lock

import torch

from lavin.generation.generate import stream, warmup
from lavin.generation.option_scoring import option_example, score_options
from lavin.mm_adapter import AdapterConfig, AdapterShape, RepAdapter, RepAdapterRouter
from lavin.model import LaVIN
from lavin.runtime.console import counted
from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json
from lavin.runtime.flags import flags_of
from lavin.tokenizer import Example, Tokenizer
from lavin.weights.adapters import load_adapters, read_adapters
from util.data.prompts import OPTIONS, PROMPT_FORMATS, answer_text, build_prompt, instruction_prompt
from util.data.settings import DataSettings
from util.evaluation.answers import given_reason
from util.fingerprint import FROZEN, FROZEN_SHA256
from util.flags import BaseSettings
from util.runs import CONFIG, checkpoints, last_checkpoint, run_folders, user_error_if_malformed
from util.trained_model import check_image_statistics

# flags that must be equal in all runs on one model: they determine the base model and the shapes of the adapters
SHARED_FLAGS = tuple(name for name, declared in flags_of(BaseSettings, AdapterShape).items() if not declared.reloadable)
SEEDS = 2**32  # the number of seeds, from 0
# what a checkpoint was trained on, where it says so, as a message calls it
TRAINED_ON = {name: f"files of {flag}" for name, flag in (FROZEN | FROZEN_SHA256).items()}


@dataclass(frozen=True)
class Question:
    """A question. `image` is uint8 [3, S, S] or None, `context` a hint or Alpaca's `input`, and `options` are none, or
    2 to 5. `picture` is the file that the image is of, for people to see.
    """

    text: str
    image: torch.Tensor | None = None
    context: str = ""
    options: tuple[str, ...] = ()
    picture: str = ""


@dataclass(frozen=True)
class Settings:
    """The sampling parameters. Temperature 0 is greedy decoding. Without a seed, each answer is drawn with another one.
    Raises UserError where they give no answer.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 0.75
    seed: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"the temperature {self.temperature} is no number from 0: 0 is greedy, 0.7 is usual")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} does not lie in (0, 1]: 0.75 is usual")
        if self.max_new_tokens < 1:
            raise UserError(f"an answer of {counted(self.max_new_tokens, 'token')} is none: allow at least 1")
        if self.seed is not None and not 0 <= self.seed < SEEDS:
            raise UserError(f"the seed {self.seed} is no number from 0 to {SEEDS - 1}: leave it out, and each answer "
                            "gets another one")

    def drawn(self) -> "Settings":
        """Returns these settings with a seed."""
        return replace(self, seed=secrets.randbelow(SEEDS)) if self.seed is None else self


@dataclass(frozen=True)
class Turn:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """The answer so far, of `tokens` tokens. `dropped` turns were left out. The last one is complete, and has the
    `probabilities` of the options.
    """

    prompt: str
    text: str = ""
    dropped: int = 0
    probabilities: tuple[float, ...] = ()
    tokens: int = 0
    complete: bool = False


def find_runs(folder: str) -> tuple[dict[str, Path], list[str]]:
    """Returns the finished runs in a folder that can share one model, by name, and a line on each run that cannot.

    A finished run has a config.json and a checkpoint, which is read to see that it is whole. Where runs differ in
    SHARED_FLAGS, the largest group is used. Raises UserError where there is none.
    """
    paths = [path for path in run_folders([folder]) if (path / CONFIG).is_file() and checkpoints(path)]
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
    groups = Counter(tuple((name, run_flags.get(name)) for name in SHARED_FLAGS) for run_flags in flags.values())
    common = dict(groups.most_common(1)[0][0])
    for path, run_flags in list(flags.items()):
        conflicts = [f"--{name} {run_flags.get(name)}, not {value}" for name, value in common.items()
                     if run_flags.get(name) != value]
        if conflicts:
            left_out.append(f"{path} is left out: it cannot share the others' model ({', '.join(conflicts)})")
            del flags[path]
    left_out += leave_out_other_files(flags)
    return {path.name or str(path): path for path in flags}, left_out


def leave_out_other_files(flags: dict[Path, dict]) -> list[str]:
    """Removes the runs that were trained on other files than most; returns a line on each. A checkpoint from before
    this was recorded fits all."""
    lines = []
    for name, what in TRAINED_ON.items():
        known = Counter(run_flags[name] for run_flags in flags.values() if run_flags[name]).most_common(1)
        for path in [path for path, run_flags in flags.items() if run_flags[name] not in (None, *dict(known))]:
            lines.append(f"{path} is left out: it was trained with other {what} than the others")
            del flags[path]
    return lines


def read_flags(run: Path) -> dict:
    """Returns the flags of config.json, and TRAINED_ON. Raises UserError where that file or the checkpoint is broken.
    """
    path, checkpoint = run / CONFIG, last_checkpoint(str(run))
    with user_error_if_malformed(path):
        flags = dict(read_json(path)["flags"])
        hash(tuple(flags.get(name) for name in SHARED_FLAGS))  # to be counted
    trained, _ = read_trained_format(checkpoint)
    return {**flags, **{name: trained.get(name) for name in TRAINED_ON}}


def read_trained_format(path: Path) -> tuple[dict, str]:
    """Returns a checkpoint, and the prompt format that it was trained with. A published one does not say: it gets the
    default.
    """
    checkpoint = read_adapters(path)
    if "adapter_config" not in checkpoint:
        return checkpoint, DataSettings().prompt_format
    with user_error_if_malformed(path):
        AdapterConfig(**checkpoint["adapter_config"])
        prompt_format = checkpoint["flags"]["prompt_format"]
    if prompt_format not in PROMPT_FORMATS:
        raise UserError(f"{path} was trained with the unknown --prompt_format {prompt_format}: train again")
    return checkpoint, prompt_format


def make_prompt(question: Question, prompt_format: str) -> str:
    """Returns the prompt of a question. Raises UserError where the question is empty or the number of options is wrong.
    """
    text = question.text.strip()
    if not text:
        raise UserError("write a question")
    if not question.options:
        return instruction_prompt(text, question.context.strip())
    if not 2 <= len(question.options) <= len(OPTIONS):
        raise UserError(f"give 2 to {len(OPTIONS)} options")
    problem = {"question": text, "choices": question.options, "hint": question.context.strip(), "lecture": "",
               "solution": "", "answer": 0}
    return build_prompt(problem, prompt_format)[0]


def segments(turns: list[Turn], prompt: str) -> list[str]:
    """A conversation as texts that are tokenized apart: prompts and answers in turn, and a prompt at the end. The
    newline behind an answer begins the next prompt, so that the answer keeps the ids that were generated."""
    prompts = [turn.prompt for turn in turns] + [prompt]
    later = zip((turn.answer for turn in turns), (f"\n{text}" for text in prompts[1:]), strict=True)
    return [prompts[0], *chain(*later)]


def fit(tokenizer: Tokenizer, turns: list[Turn], prompt: str, image: torch.Tensor | None, n_prompt: int,
        max_seq_len: int, answer_tokens: int) -> tuple[Example, int]:
    """Returns the conversation as one example, and how many of its oldest turns were dropped to leave room for
    `answer_tokens`.

    If the question alone leaves fewer tokens than that, the answer gets what is left. Raises UserError if none is left.
    """
    for dropped in range(len(turns) + 1):
        *history, last = segments(turns[dropped:], prompt)
        example = tokenizer.example(last, None, image, n_prompt, history=history)
        tokens_left = max_seq_len - 1 - len(example.ids)  # 1: the modality token
        if tokens_left >= answer_tokens:
            break
    if tokens_left < 1:
        raise UserError(f"the question has {counted(1 - tokens_left, 'token')} too many for the model's {max_seq_len}: "
                        "shorten it")
    return example, dropped


class Chatbot:
    """It answers with any of `runs` (name -> folder, from find_runs). The model must have their adapter shapes."""

    def __init__(self, model: LaVIN, tokenizer: Tokenizer, runs: dict[str, Path], max_seq_len: int):
        self.model, self.tokenizer, self.runs, self.max_seq_len = model.eval(), tokenizer, runs, max_seq_len
        self.adapter = model.adapter  # of checkpoints that do not say: from the command line
        self.loaded_file: tuple | None = None  # the checkpoint whose adapters the model has
        self.prompt_format = ""  # in which it was trained
        self.lock = Lock()
        self.latest_request = object()  # only the latest one may use the model

    def load_run(self, run: str) -> str:
        """Loads a run's last adapters into the model, unless it has them; returns the run's prompt format."""
        if run not in self.runs:
            raise UserError(f"choose one of the runs: {', '.join(self.runs)}")
        path = last_checkpoint(str(self.runs[run]))
        file = path, path.stat().st_mtime_ns, path.stat().st_size
        if file != self.loaded_file:
            self.loaded_file = None  # where loading fails
            self.prompt_format = self.load_checkpoint(path)
            self.loaded_file = file
        return self.prompt_format

    def load_checkpoint(self, path: Path) -> str:
        checkpoint, prompt_format = read_trained_format(path)
        check_image_statistics(self.model, checkpoint, str(path))
        load_adapters(self.model, checkpoint["model"], str(path))
        config = checkpoint.get("adapter_config")
        self.model.adapter = adapter = AdapterConfig(**config) if config else self.adapter
        for module in self.model.modules():
            if isinstance(module, RepAdapter):
                module.scale.fill_(adapter.adapter_scale)
            if isinstance(module, RepAdapterRouter):
                module.temperature.fill_(adapter.temperature)
        return prompt_format

    def warmup(self) -> None:
        """Compiles and captures the model now, so that the first question is not slower than the others."""
        self.load_run(next(iter(self.runs)))
        warmup(self.model, self.max_seq_len - 1)  # 1: the modality token

    def answer(self, run: str, turns: list[Turn], question: Question, settings: Settings) -> Iterator[Answer]:
        """Yields the growing answer; stops early when another question is asked. Raises UserError as `fit` does."""
        steps = self.steps(run, turns, question, settings.drawn())
        self.latest_request = request = object()
        while True:
            # Gradio calls this from worker threads, whose current CUDA device is GPU 0, not necessarily the model's.
            with self.lock, torch.cuda.device_of(self.model.adapter_modality_embedding.weight):
                answer = next(steps, None) if self.latest_request is request else None
            if answer is None:
                return
            yield answer

    def end(self) -> None:
        """Ends all answers for good, before the program ends: Python must not end while another thread computes."""
        self.lock.acquire()

    def steps(self, run, turns, question, settings) -> Iterator[Answer]:
        """Yields one answer per generated token, and a last one that is complete."""
        prompt = make_prompt(question, self.load_run(run))
        example, dropped = fit(self.tokenizer, [] if question.options else turns, prompt, question.image,
                               self.model.adapter.n_prompt, self.max_seq_len, settings.max_new_tokens)
        answer = Answer(prompt, dropped=dropped)
        max_new_tokens = min(settings.max_new_tokens, self.max_seq_len - 1 - len(example.ids))
        for text in stream(self.model, self.tokenizer, example, max_new_tokens, settings.temperature, settings.top_p,
                           settings.seed):
            answer = replace(answer, text=text, tokens=answer.tokens + 1)
            yield answer
        reason = given_reason(answer.text)
        probabilities = self.probabilities(prompt, reason, question) if question.options else ()
        yield replace(answer, probabilities=probabilities, complete=True)

    def probabilities(self, prompt: str, reason: str, question: Question) -> tuple[float, ...]:
        """The probability of each option, by the token in which their answers differ: eval.py goes by the same.

        reason: the text that the model has written before the answer; without it, the scores would contradict an answer
        that follows from it.
        """
        answers = [reason + answer_text(i) for i in range(len(question.options))]
        scored = option_example(self.tokenizer, prompt, answers, image=question.image,
                                n_prompt=self.model.adapter.n_prompt)
        return tuple(torch.tensor(next(score_options(self.model, [[scored]]))[0]).exp().tolist())
