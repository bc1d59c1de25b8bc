"""Scores a run on MME: `python eval_mme.py --adapter_path RUN --mme_root FOLDER`, or under torchrun, like eval.py.

Writes mme_answers.jsonl and mme_scores.json to the run's folder. Adapter flags are read from the checkpoint.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

import eval as evaluation
from lavin.generation.generate import generate
from lavin.generation.sampling import sampling_seed
from lavin.runtime import distributed
from lavin.runtime.console import format_table, is_main_process, print_rank0, progress_bar, summary
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import json_sha256, read_json_lines, write_json, write_json_lines
from util.data.images import IMAGE_ERRORS, load_image
from util.data.mme import Pair, is_decided, load_mme, read_answer, score
from util.data.prompts import instruction_prompt
from util.flags import Parser
from util.results import (
    answer_all,
    drop_partial,
    model_identity,
    results_folder,
    sampling_identity,
    scored_before,
)
from util.runs import locked
from util.trained_model import Trained, load_model, read_trained

MAX_ANSWER_TOKENS = 20  # generation stops earlier, as soon as the answer is decided
FILES = ("mme_answers.jsonl", "mme_scores.json")
PARTIAL = "mme_answers"


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("eval_mme.py", description=summary(__doc__), add_help=False,
                    parents=[evaluation.get_args_parser()])
    parser.add_argument("--mme_root", "--root_dir_", help="folder of MME's subtasks (mme in --data_root)")
    parser.add_argument("--options", nargs="+", help="published flag, without effect")
    return parser


def fingerprint(pairs: list[Pair]) -> str:
    return json_sha256([[pair.name, *pair.questions, *pair.answers] for pair in pairs])


def load_pair_images(pairs: list[Pair], size: int, threads: int) -> list[torch.Tensor]:
    """Raises UserError, which names the file, for an image that does not decode."""
    def load(pair):
        try:
            return load_image(pair.picture, size)
        except IMAGE_ERRORS as error:
            raise UserError(f"picture {pair.picture} does not decode ({error}): fetch it again") from error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(load, pairs))


def answer_pairs(model, tokenizer, pairs: list[Pair], args, names: list[str]) -> Iterator[dict[str, list[dict]]]:
    """The two answers to each of the pairs `names`, batch by batch, by name. A pair's questions share a batch."""
    pair_of, batch_size = {pair.name: pair for pair in pairs}, max(1, args.max_batch_size // 2)
    with progress_bar(None, "pictures", total=len(names), unit="picture") as bar:
        for start in range(0, len(names), batch_size):
            batch = [pair_of[name] for name in names[start:start + batch_size]]
            seeds = [sampling_seed(args.seed, f"{pair.name} {i}") for pair in batch for i in range(2)]
            texts = iter(answer_batch(model, tokenizer, batch, seeds, args))
            yield {pair.name: [
                {"subtask": pair.subtask, "picture": pair.name, "question": question, "answer": answer,
                 "text": (text := next(texts)), "prediction": read_answer(text)}
                for question, answer in zip(pair.questions, pair.answers, strict=True)] for pair in batch}
            bar.update(len(batch))


def answer_batch(model, tokenizer, batch: list[Pair], seeds: list[int], args) -> list[str]:
    """The texts of two answers a pair."""
    images = load_pair_images(batch, model.vision.image_size, args.num_workers)
    examples = [tokenizer.example(instruction_prompt(question), None, image, model.adapter.n_prompt)
                for pair, image in zip(batch, images, strict=True) for question in pair.questions]
    with evaluation.named_failures([f"picture {pair.name}" for pair in batch for _ in pair.questions]):
        return generate(model, tokenizer, examples, MAX_ANSWER_TOKENS, is_decided, args.generation_temperature,
                        args.top_p, seeds)


def score_table(scores: dict) -> str:
    rows = [[name, f"{s['accuracy']:.2f}", f"{s['accuracy+']:.2f}", f"{s['score']:.2f}", s["questions"], s["other"]]
            for name, s in scores["subtasks"].items()]
    rows += [[name, "", "", "-" if scores[name] is None else f"{scores[name]:.2f}", "", ""]
             for name in ("perception", "cognition")]
    return format_table(["", "accuracy", "accuracy+", "score", "questions", "other"], rows)


def report(folder: Path, scores: dict, trained: Trained) -> None:
    print_rank0(score_table(scores))
    print_rank0(f"scores: {folder / 'mme_scores.json'}{evaluation.beside(folder, trained)}")


def main(args) -> None:
    evaluation.take_run(args)
    pairs = load_mme(args.mme_root) if args.mme_root else None  # reports a wrong folder before the checkpoint is read
    trained = read_trained(args)
    pairs = pairs or load_mme(f"{args.data_root}/mme")
    folder = distributed.from_rank_0(lambda: results_folder(args.output_dir, trained.path))
    with locked(folder):
        evaluate(args, trained, pairs, folder)
    distributed.close()


def evaluate(args, trained: Trained, pairs: list[Pair], folder: Path) -> None:
    what = distributed.from_rank_0(lambda: {
        **model_identity(args, trained), **sampling_identity(args), "data": fingerprint(pairs)})
    scores = distributed.from_rank_0(lambda: scored_before(
        [folder / name for name in FILES], what, lambda _: {**score(read_json_lines(folder / FILES[0])), **what}))
    if scores:
        print_rank0("scored before, with the same settings:")
        report(folder, scores, trained)
        return
    model, tokenizer, _ = load_model(args, trained)
    answers_by_name = answer_all(folder, PARTIAL, what, [pair.name for pair in pairs],
                                 partial(answer_pairs, model, tokenizer, pairs, args))
    if is_main_process():
        answers = [answer for of_pair in answers_by_name.values() for answer in of_pair]
        scores = {**score(answers), **what}
        (folder / "mme_scores.json").unlink(missing_ok=True)  # where it is, the answers are those that it scores
        write_json_lines(folder / "mme_answers.jsonl", answers)
        write_json(folder / "mme_scores.json", scores)
        drop_partial(folder, PARTIAL)
        report(folder, scores, trained)


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
