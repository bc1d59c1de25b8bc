"""Scores a run on ScienceQA: `python eval.py --adapter_path RUN ...`, or under torchrun, which divides the questions.

Writes preds.json, generations.jsonl and scores.json to the run's folder. Adapter flags are read from the checkpoint.
"""

import argparse
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lavin.generation.generate import generate
from lavin.generation.option_scoring import option_example, score_options
from lavin.runtime import distributed
from lavin.runtime.console import format_table, is_main_process, print_rank0, progress_bar
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import write_json, write_json_lines
from util.data.datasets import load_scienceqa
from util.data.images import load_images
from util.data.prompts import answer_text, build_prompt, is_answered, parse_answer
from util.flags import caption_path, check_counts, shared_flags
from util.scoring import COLUMNS, score
from util.trained_model import load_model, results_folder

MAX_ANSWER_TOKENS = 64  # in formats that begin with the answer; in others, --max_seq_len


def get_args_parser() -> argparse.ArgumentParser:
    shared = shared_flags()
    parser = argparse.ArgumentParser("eval.py", description=__doc__.splitlines()[0], parents=[shared], epilog=(
        "Model and data flags that are left out take the values of the training run."))
    parser.set_defaults(**dict.fromkeys(vars(shared.parse_args([]))))
    add = parser.add_argument
    add("--adapter_path", help="a checkpoint, or a run's folder (without it: the untuned base)")
    add("--output_dir", help="folder for the results (the folder of --adapter_path)")
    add("--tokenizer_path", help="tokenizer.model (the base model's)")
    add("--split", default="test", help="split of pid_splits.json (test)")
    add("--decode", default="generate", choices=["generate", "score"],
        help="generate the answer's text, or compare the option letters' probabilities in one pass (generate)")
    add("--max_batch_size", default=64, type=int, help="questions per batch (64)")
    add("--generation_temperature", default=0.0, type=float, help="sampling temperature (0: greedy decoding)")
    add("--top_p", default=0.75, type=float, help="nucleus of sampling, used when the temperature is not 0 (0.75)")
    add("--seed", default=0, type=int, help="sampling seed (0)")
    return parser


class EvalQuestion(NamedTuple):
    """A question as the model gets it. image: uint8 [3, S, S] or None. seed: for sampling, independent of the batch."""

    qid: str
    prompt: str
    image: torch.Tensor | None
    n_choices: int
    seed: int


def most_likely_options(model, tokenizer, batches: Iterable[list[EvalQuestion]]) -> Iterator[list[int]]:
    """The most likely option of each question, batch by batch, by the first token in which its answers differ."""
    examples = ([option_example(tokenizer, question.prompt, [answer_text(k) for k in range(question.n_choices)],
                                image=question.image, n_prompt=model.adapter.n_prompt) for question in batch]
                for batch in batches)
    for batch_scores in score_options(model, examples):
        yield [scores.index(max(scores)) for scores in batch_scores]


def generate_batch(model, tokenizer, batch: list[EvalQuestion], args) -> list[tuple[str, int, bool]]:
    """For each question: the text, the option index, and whether the text names it; if not, the most likely one."""
    examples = [tokenizer.example(question.prompt, None, question.image, model.adapter.n_prompt) for question in batch]
    max_new_tokens = MAX_ANSWER_TOKENS if answers_first(args.prompt_format) else args.max_seq_len
    texts = generate(model, tokenizer, examples, max_new_tokens, is_answered, args.generation_temperature, args.top_p,
                     [question.seed for question in batch])
    predictions = [parse_answer(text, question.n_choices) for text, question in zip(texts, batch, strict=True)]
    # scores the whole batch, not only the unparsed questions, so that the model's session can be reused
    fallbacks = next(most_likely_options(model, tokenizer, [batch])) if None in predictions else [0] * len(batch)
    return [(text, fallback if prediction is None else prediction, prediction is not None)
            for text, prediction, fallback in zip(texts, predictions, fallbacks, strict=True)]


def answer_batches(model, tokenizer, batches: list[list[EvalQuestion]], args) -> Iterator[list[tuple[str, int, bool]]]:
    """As `generate_batch`, batch by batch; with --decode score, the text is that of the most likely option."""
    if args.decode == "score":
        options_by_batch = most_likely_options(model, tokenizer, batches)
        return ([(answer_text(i), i, True) for i in options] for options in options_by_batch)
    return (generate_batch(model, tokenizer, batch, args) for batch in batches)


def answers_first(prompt_format: str) -> bool:
    return prompt_format.split("-")[1].startswith("A")


def answer_questions(model, tokenizer, data, images: dict, args) -> list[dict]:
    """The answers to this rank's part of the questions."""
    rank, world, _ = distributed.init()
    questions = [EvalQuestion(qid, build_prompt(problem, args.prompt_format, data.captions.get(qid, ""))[0],
                              images.get(qid), len(problem["choices"]), zlib.crc32(f"{args.seed} {qid}".encode()))
                 for qid, problem in list(data.problems.items())[rank::world]]
    batches = [questions[start:start + args.max_batch_size] for start in range(0, len(questions), args.max_batch_size)]
    answers = []
    with progress_bar(None, "questions", total=len(questions), unit="question") as bar:
        for batch, results in zip(batches, answer_batches(model, tokenizer, batches, args), strict=True):
            answers += [{"qid": question.qid, "text": text, "prediction": prediction, "parsed": parsed,
                         "answer": data.problems[question.qid]["answer"]}
                        for question, (text, prediction, parsed) in zip(batch, results, strict=True)]
            bar.update(len(batch))
    return answers


def write_results(folder: Path, answers: list[dict], data, args, path: Path | None) -> dict:
    """Writes the three result files; returns the scores. path: of the checkpoint."""
    predictions = {answer["qid"]: answer["prediction"] for answer in answers}
    scores = {**score(data.problems, predictions), "questions": len(answers),
              "parse_failures": sum(not answer["parsed"] for answer in answers), "skipped": len(data.skipped),
              "split": args.split, "checkpoint": path and path.name}
    write_json_lines(folder / "generations.jsonl", answers)
    write_json(folder / "preds.json", predictions)
    write_json(folder / "scores.json", scores)
    return scores


def score_table(scores: dict) -> str:
    percent = ["-" if scores[column] is None else f"{scores[column]:.2f}" for column in COLUMNS]
    return format_table(["", *COLUMNS], [["accuracy %", *percent], ["questions", *scores["counts"].values()]])


def main(args) -> None:
    folder = results_folder(args)
    check_counts(args, "max_batch_size")
    torch.manual_seed(args.seed)
    model, tokenizer, path = load_model(args)
    if args.decode == "score" and not answers_first(args.prompt_format):
        raise UserError(f"--decode score compares answers, but in --prompt_format {args.prompt_format} the solution "
                        "comes first: leave --decode out")
    data = load_scienceqa(args.data_root, args.split, caption_path(args))
    images = load_images(data, model.vision.image_size, args.num_workers, args.skip_bad)

    answers_by_rank = distributed.gather_data_parallel(answer_questions(model, tokenizer, data, images, args))
    by_qid = {answer["qid"]: answer for answers in answers_by_rank for answer in answers}
    if is_main_process():
        scores = write_results(folder, [by_qid[qid] for qid in data.problems], data, args, path)
        print_rank0(score_table(scores))
        print_rank0(f"{scores['parse_failures']} answers named no option, "
                    f"{scores['skipped']} problems left out for their picture")
        print_rank0(f"scores: {folder / 'scores.json'}")
    distributed.close()


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
