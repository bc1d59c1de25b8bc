"""Scores a run on MME: `python eval_mme.py --adapter_path RUN --mme_root FOLDER`, or under torchrun, like eval.py.

Writes mme_answers.jsonl and mme_scores.json to the run's folder. Adapter flags are read from the checkpoint.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch

import eval as evaluation
from lavin.generation.generate import generate
from lavin.runtime import distributed
from lavin.runtime.console import format_table, is_main_process, print_rank0, progress_bar
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import write_json, write_json_lines
from util.data.images import IMAGE_ERRORS, load_image
from util.data.mme import Pair, is_decided, load_mme, read_answer, score
from util.data.prompts import instruction_prompt
from util.flags import check_counts
from util.trained_model import load_model, results_folder

MAX_ANSWER_TOKENS = 20  # generation stops earlier, as soon as the answer is decided


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval_mme.py", description=__doc__.splitlines()[0],
                                     parents=[evaluation.get_args_parser()], add_help=False)
    parser.add_argument("--mme_root", help="folder of MME's subtasks (mme in --data_root)")
    return parser


def load_pair_images(pairs: list[Pair], size: int, threads: int) -> list[torch.Tensor]:
    """Raises UserError, which names the file, for an image that does not decode."""
    def load(pair):
        try:
            return load_image(pair.picture, size)
        except IMAGE_ERRORS as error:
            raise UserError(f"picture {pair.picture} does not decode ({error}): fetch it again") from error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(load, pairs))


def answer_pairs(model, tokenizer, pairs: list[Pair], args) -> list[tuple[int, dict]]:
    """The answers to this rank's part of the pairs, each with its pair's index. A pair's questions share a batch."""
    rank, world, _ = distributed.init()
    local_pairs, batch_size = list(enumerate(pairs))[rank::world], max(1, args.max_batch_size // 2)
    answers = []
    with progress_bar(None, "pictures", total=len(local_pairs), unit="picture") as bar:
        for start in range(0, len(local_pairs), batch_size):
            indexed_batch = local_pairs[start:start + batch_size]
            indices, batch = [index for index, _ in indexed_batch], [pair for _, pair in indexed_batch]
            images = load_pair_images(batch, model.vision.image_size, args.num_workers)
            examples = [tokenizer.example(instruction_prompt(question), None, image, model.adapter.n_prompt)
                        for pair, image in zip(batch, images, strict=True) for question in pair.questions]
            seeds = [args.seed + 2 * index + i for index in indices for i in range(2)]
            texts = iter(generate(model, tokenizer, examples, MAX_ANSWER_TOKENS, is_decided,
                                  args.generation_temperature, args.top_p, seeds))
            answers += [(index, {"subtask": pair.subtask, "picture": pair.name, "question": question, "answer": answer,
                                 "text": (text := next(texts)), "prediction": read_answer(text)})
                        for index, pair in zip(indices, batch, strict=True)
                        for question, answer in zip(pair.questions, pair.answers, strict=True)]
            bar.update(len(batch))
    return answers


def score_table(scores: dict) -> str:
    rows = [[name, f"{s['accuracy']:.2f}", f"{s['accuracy+']:.2f}", f"{s['score']:.2f}", s["questions"], s["other"]]
            for name, s in scores["subtasks"].items()]
    rows += [[name, "", "", "-" if scores[name] is None else f"{scores[name]:.2f}", "", ""]
             for name in ("perception", "cognition")]
    return format_table(["", "accuracy", "accuracy+", "score", "questions", "other"], rows)


def main(args) -> None:
    folder = results_folder(args)
    check_counts(args, "max_batch_size")
    pairs = load_mme(args.mme_root) if args.mme_root else None  # reports a wrong folder before the model is loaded
    model, tokenizer, path = load_model(args)
    pairs = pairs or load_mme(f"{args.data_root}/mme")

    answers_by_rank = distributed.gather_data_parallel(answer_pairs(model, tokenizer, pairs, args))
    if is_main_process():
        indexed_answers = [item for items in answers_by_rank for item in items]
        answers = [answer for _, answer in sorted(indexed_answers, key=lambda item: item[0])]
        scores = {**score(answers), "checkpoint": path and path.name}
        write_json_lines(folder / "mme_answers.jsonl", answers)
        write_json(folder / "mme_scores.json", scores)
        print_rank0(score_table(scores))
        print_rank0(f"scores: {folder / 'mme_scores.json'}")
    distributed.close()


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
