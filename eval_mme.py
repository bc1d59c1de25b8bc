"""Scores a run on MME: `python eval_mme.py --adapter_path RUN --mme_root FOLDER`, or under torchrun, like eval.py.

Writes mme_answers.jsonl and mme_scores.json into the run's folder. Adapter flags are read from the checkpoint.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import eval as evaluation
from lavin import parallel
from lavin.errors import UserError, one_line_errors
from lavin.generation import generate
from util.datasets import PICTURE_ERRORS, load_picture
from util.files import write_json, write_json_lines
from util.flags import check_counts
from util.logging import is_first, progress, say, table
from util.mme import Pair, is_told, load_mme, read_answer, score
from util.prompts import instruction_prompt

ANSWER_TOKENS = 20  # an answer ends as soon as it is told


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval_mme.py", description=__doc__.splitlines()[0],
                                     parents=[evaluation.get_args_parser()], add_help=False)
    parser.add_argument("--mme_root", help="folder of MME's subtasks (mme in --data_root)")
    return parser


def open_pictures(pairs: list[Pair], size: int, threads: int) -> list[torch.Tensor]:
    """Raises UserError that names a picture which does not decode."""
    def load(pair):
        try:
            return load_picture(pair.picture, size)
        except PICTURE_ERRORS as error:
            raise UserError(f"picture {pair.picture} does not decode ({error}): fetch it again") from error

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(load, pairs))


def answer_pairs(model, tokenizer, pairs: list[Pair], args) -> list[tuple[int, dict]]:
    """This process's share of the pictures: each one's number and an answer; both its questions go in one batch."""
    rank, world, _ = parallel.init()
    share, at_once = list(enumerate(pairs))[rank::world], max(1, args.max_batch_size // 2)
    answers = []
    with progress(None, "pictures", total=len(share), unit="picture") as bar:
        for start in range(0, len(share), at_once):
            numbers, batch = zip(*share[start:start + at_once])
            pictures = open_pictures(batch, model.vision.image_size, args.num_workers)
            examples = [tokenizer.example(instruction_prompt(question), None, picture, model.adapter.n_prompt)
                        for pair, picture in zip(batch, pictures) for question in pair.questions]
            texts = iter(generate(model, tokenizer, examples, ANSWER_TOKENS, is_told, args.generation_temperature,
                                  args.top_p, [args.seed + 2 * number + i for number in numbers for i in range(2)]))
            answers += [(number, {"subtask": pair.subtask, "picture": pair.name, "question": question, "answer": answer,
                                  "text": (text := next(texts)), "prediction": read_answer(text)})
                        for number, pair in zip(numbers, batch)
                        for question, answer in zip(pair.questions, pair.answers)]
            bar.update(len(batch))
    return answers


def score_table(scores: dict) -> str:
    rows = [[name, f"{s['accuracy']:.2f}", f"{s['accuracy+']:.2f}", f"{s['score']:.2f}", s["questions"], s["other"]]
            for name, s in scores["subtasks"].items()]
    rows += [[name, "", "", "-" if scores[name] is None else f"{scores[name]:.2f}", "", ""]
             for name in ("perception", "cognition")]
    return table(["", "accuracy", "accuracy+", "score", "questions", "other"], rows)


def main(args) -> None:
    if not args.adapter_path and not args.output_dir:
        raise UserError("without --adapter_path the untuned base is scored: say where with --output_dir")
    check_counts(args, "max_batch_size")
    pairs = load_mme(args.mme_root) if args.mme_root else None  # a wrong folder is known before the model is loaded
    model, tokenizer, path = evaluation.load_model(args)
    pairs = pairs or load_mme(f"{args.data_root}/mme")

    shares = parallel.gather(answer_pairs(model, tokenizer, pairs, args))
    if is_first():
        numbered = sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])
        answers = [answer for _, answer in numbered]
        folder = Path(args.output_dir) if args.output_dir else path.parent
        scores = {**score(answers), "checkpoint": path and path.name}
        write_json_lines(folder / "mme_answers.jsonl", answers)
        write_json(folder / "mme_scores.json", scores)
        say(score_table(scores))
        say(f"scores: {folder / 'mme_scores.json'}")
    parallel.close()


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
