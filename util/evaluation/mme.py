"""Scores a run on MME: the two questions of each picture, the files of answers and scores, and the table."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavin.generation.generate import generate
from lavin.generation.sampling import named_failures, sampling_seed
from lavin.runtime import distributed
from lavin.runtime.console import format_table, progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.files import json_sha256, read_json_lines, write_json_lines
from lavin.runtime.flags import Flags
from util.data.checksums import States, file_states, named_files_sha256, require_unchanged
from util.data.images import IMAGE_ERRORS, load_image
from util.data.mme import Pair, is_decided, load_mme, read_answer, score
from util.data.prompts import instruction_prompt
from util.evaluation import evaluate
from util.evaluation.results import model_identity
from util.evaluation.settings import Generation, take_run
from util.flags import BaseSettings, Execution
from util.runs import MME_ANSWERS, MME_SCORES
from util.shared_base import SharedBase
from util.trained_model import Trained, read_trained

MAX_ANSWER_TOKENS = 20  # generation stops earlier, as soon as the answer is decided


@dataclass
class MMETask:
    """MME's pairs of questions. An answer of the task is the list of a pair's two answers, as plain values."""

    pairs: list[Pair]
    trained: Trained
    base: BaseSettings
    generation: Generation
    tokenizer_path: str | None
    threads: int  # that decode pictures
    states: States = field(default_factory=dict)  # of the pictures, which are read batch by batch

    partial_prefix = "mme_answers"
    scores_file = MME_SCORES

    def pictures(self) -> list[Path]:
        return [pair.picture for pair in self.pairs]

    def identity(self) -> dict[str, Any]:
        return {**model_identity(self.base, self.trained, self.tokenizer_path), **self.generation.identity(),
                "data": json_sha256([[pair.name, *pair.questions, *pair.answers] for pair in self.pairs]),
                "pictures": named_files_sha256({pair.name: pair.picture for pair in self.pairs})}

    def prepare(self, model) -> list[str]:
        self.states = file_states(self.pictures())
        return [pair.name for pair in self.pairs]

    def answer(self, model, tokenizer, keys: list[str]) -> Iterator[dict[str, Any]]:
        of_pair = {pair.name: pair.picture for pair in self.pairs}
        for batch in answer_pairs(model, tokenizer, self.pairs, keys, self.generation, self.threads):
            require_unchanged({of_pair[name]: self.states[of_pair[name]] for name in batch})
            yield batch

    def write_answers(self, folder: Path, answers: list[Any]) -> None:
        write_json_lines(folder / MME_ANSWERS, (answer for of_pair in answers for answer in of_pair))

    def scores(self, answers: list[Any]) -> dict[str, Any]:
        return score([answer for of_pair in answers for answer in of_pair])

    def rescore(self, folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
        return score(read_json_lines(folder / MME_ANSWERS))

    def report(self, scores: dict[str, Any]) -> list[str]:
        return [score_table(scores)]


def load_pair_images(pairs: list[Pair], size: int, threads: int) -> list[torch.Tensor]:
    """Raises UserError, which names the file, for an image that does not decode."""
    def load(pair):
        try:
            return load_image(pair.picture, size)
        except IMAGE_ERRORS as error:
            raise UserError(f"picture {pair.picture} does not decode ({error}): fetch it again") from error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(load, pairs))


def answer_pairs(model, tokenizer, pairs: list[Pair], names: list[str], generation: Generation, threads: int
                 ) -> Iterator[dict[str, list[dict]]]:
    """Yields the two answers to each of the pairs `names`, by name, batch by batch. A pair's questions share a batch.
    """
    pair_of, batch_size = {pair.name: pair for pair in pairs}, max(1, generation.max_batch_size // 2)
    with progress_bar(None, "pictures", total=len(names), unit="picture") as bar:
        for start in range(0, len(names), batch_size):
            batch = [pair_of[name] for name in names[start:start + batch_size]]
            seeds = [sampling_seed(generation.seed, f"{pair.name} {i}") for pair in batch for i in range(2)]
            texts = iter(answer_batch(model, tokenizer, batch, seeds, generation, threads))
            yield {pair.name: [
                {"subtask": pair.subtask, "picture": pair.name, "question": question, "answer": answer,
                 "text": (text := next(texts)), "prediction": read_answer(text)}
                for question, answer in zip(pair.questions, pair.answers, strict=True)] for pair in batch}
            bar.update(len(batch))


def answer_batch(model, tokenizer, batch: list[Pair], seeds: list[int], generation: Generation, threads: int
                 ) -> list[str]:
    """The texts of two answers a pair."""
    images = load_pair_images(batch, model.vision.image_size, threads)
    examples = [tokenizer.example(instruction_prompt(question), None, image, model.adapter.n_prompt)
                for pair, image in zip(batch, images, strict=True) for question in pair.questions]
    with named_failures([f"picture {pair.name}" for pair in batch for _ in pair.questions]):
        return generate(model, tokenizer, examples, MAX_ANSWER_TOKENS, is_decided,
                        generation.generation_temperature, generation.top_p, seeds)


def score_table(scores: dict) -> str:
    rows = [[name, f"{s['accuracy']:.2f}", f"{s['accuracy+']:.2f}", f"{s['score']:.2f}", s["questions"], s["other"]]
            for name, s in scores["subtasks"].items()]
    rows += [[name, "", "", "-" if scores[name] is None else f"{scores[name]:.2f}", "", ""]
             for name in ("perception", "cognition")]
    return format_table(["", "accuracy", "accuracy+", "score", "questions", "other"], rows)


def main(args: Flags) -> None:
    """The command eval_mme.py."""
    take_run(args)
    known = load_mme(args.mme_root) if args.mme_root else None  # reports a wrong folder before the checkpoint is read
    trained = read_trained(args)
    pairs = distributed.from_rank_0(lambda: known or load_mme(f"{args.data_root}/mme"))
    task = MMETask(pairs, trained, BaseSettings.of(args), Generation.of(args),
                   args.tokenizer_path, Execution.of(args).num_workers)
    evaluate.run(task, args, trained, SharedBase())
    distributed.close()
