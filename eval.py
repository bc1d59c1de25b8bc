"""Scores a run on ScienceQA: `python eval.py --adapter_path RUN ...`, or under torchrun, which divides the questions.

Writes preds.json, generations.jsonl and scores.json to the run's folder; those of a run's early checkpoint to a folder
inside it. Adapter flags are read from the checkpoint. The same command again goes on where it was killed.
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lavin.generation.generate import generate
from lavin.generation.option_scoring import option_example, score_options
from lavin.generation.sampling import NotFinite, sampling_seed
from lavin.runtime import distributed
from lavin.runtime.console import format_table, is_main_process, print_rank0, progress_bar, summary
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import read_json, read_json_lines, write_json, write_json_lines
from lavin.tokenizer import Example
from util.data.batches import balanced_parts
from util.data.datasets import ScienceQA, load_scienceqa
from util.data.images import load_images
from util.data.prompts import answer_text, build_prompt, fit_prompt, is_answered, parse_answer
from util.flags import Parser, caption_path, count, interval, non_empty, non_negative, seed, shared_flags
from util.results import (
    answer_all,
    drop_partial,
    model_identity,
    results_folder,
    sampling_identity,
    scored_before,
)
from util.runs import checkpoints, locked
from util.scoring import COLUMNS, cluster, score
from util.trained_model import Trained, load_model, read_trained
from util.training.resume import take_flags_of_run

MAX_ANSWER_TOKENS = 64  # in formats that begin with the answer; in others, --max_seq_len
FILES = ("generations.jsonl", "preds.json", "scores.json")
PARTIAL = "answers"  # beginning of the names of the files of answers as they come


def get_args_parser() -> argparse.ArgumentParser:
    shared = shared_flags()
    parser = Parser("eval.py", description=summary(__doc__), parents=[shared], epilog=(
        "Model and data flags that are left out take the values of the training run."))
    parser.set_defaults(**dict.fromkeys(vars(shared.parse_args([]))))
    add = parser.add_argument
    add("--adapter_path", type=non_empty, help="a checkpoint, or a run's folder (without it: the untuned base)")
    add("--output_dir", type=non_empty,
        help="folder for the results (that of the run; for an early checkpoint, one inside it)")
    add("--tokenizer_path", help="tokenizer.model (the base model's)")
    add("--split", default="test", help="split of pid_splits.json (test)")
    add("--questions", type=count, help="answer this many of the split's questions, always the same ones (all)")
    add("--decode", default="generate", choices=["generate", "score"],
        help="generate the answer's text, or compare the option letters' probabilities in one pass (generate)")
    add("--max_batch_size", default=64, type=count, help="questions per batch (64)")
    add("--generation_temperature", default=0.0, type=non_negative, help="sampling temperature (0: greedy decoding)")
    add("--top_p", default=0.75, type=interval(float, "(0, 1]"),
        help="nucleus of sampling, used when the temperature is not 0 (0.75)")
    add("--seed", default=0, type=seed, help="sampling seed (0)")
    add("--trained_with", nargs=argparse.REMAINDER, metavar="FLAG",
        help="the run that train.py writes with these flags, in place of --adapter_path; comes last")
    return parser


# --- What is scored ---

def take_run(args) -> None:
    """Sets --adapter_path to the run that train.py writes with the flags of --trained_with. Raises UserError where it
    is unfinished."""
    if args.trained_with is None:
        return
    if args.adapter_path:
        raise UserError("--trained_with names a run, and so does --adapter_path: leave one out")
    import train  # late: it also sets environment variables that only training needs
    parser = train.get_args_parser()
    trained: Any = parser.parse_args(args.trained_with)
    if trained.resume:
        take_flags_of_run(trained, parser)
    n_done = max(checkpoints(Path(trained.output_dir)), default=-1) + 1
    if n_done < trained.epochs:
        raise UserError(f"{trained.output_dir} is unfinished ({n_done} of {trained.epochs} epochs): train it first")
    args.adapter_path = trained.output_dir


def identity(args, trained: Trained, data: ScienceQA) -> dict:
    """All that determines the scores, except whether pictures that --skip_bad leaves out are there."""
    return {**model_identity(args, trained), "prompt_format": args.prompt_format, "max_seq_len": args.max_seq_len,
            "decode": args.decode, **(sampling_identity(args) if args.decode == "generate" else {}),
            "split": args.split, "data": data.fingerprint}


# --- Answers ---

class EvalQuestion(NamedTuple):
    """A question as the model gets it. example: the prompt, tokenized, with its image. seed: for sampling, independent
    of the batch. cut: whether the prompt was too long, and words in its middle are left out.
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
    """With which all answers to a prompt begin: `The answer is`."""
    example, _ = option_example(tokenizer, prompt, [answer_text(0), answer_text(1)])
    return list(example.ids[len(tokenizer.example(prompt).ids):])


def generate_batch(model, tokenizer, batch: list[EvalQuestion], args) -> list[tuple[str, int, bool]]:
    """For each question: the text, the option index, and whether the text names it; if not, the most likely one."""
    max_new_tokens = MAX_ANSWER_TOKENS if answers_first(args.prompt_format) else args.max_seq_len
    draft = first_tokens(tokenizer, batch[0].prompt) if answers_first(args.prompt_format) else []
    texts = generate(model, tokenizer, [question.example for question in batch], max_new_tokens, is_answered,
                     args.generation_temperature, args.top_p, [question.seed for question in batch], draft)
    predictions = [parse_answer(text, question.n_choices) for text, question in zip(texts, batch, strict=True)]
    # scores the whole batch, not only the unparsed questions: a single one would need a session of its own
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


def make_question(tokenizer, n_prompt: int, data, qid: str, image: torch.Tensor | None, args) -> EvalQuestion:
    whole, _ = build_prompt(data.problems[qid], args.prompt_format, data.captions.get(qid, ""))
    prompt = fit_prompt(tokenizer, whole, image, n_prompt, args.max_seq_len)
    return EvalQuestion(qid, prompt, tokenizer.example(prompt, None, image, n_prompt),
                        len(data.problems[qid]["choices"]), sampling_seed(args.seed, qid), prompt != whole)


def answer_questions(model, tokenizer, data, images: dict, args, qids: list[str]) -> Iterator[dict[str, dict]]:
    """The answers to the questions `qids`, batch by batch, by id. Raises UserError, naming them, where the model gives
    NaN."""
    questions = [make_question(tokenizer, model.adapter.n_prompt, data, qid, images.get(qid), args) for qid in qids]
    # of about as many tokens each, so that few sizes are captured in CUDA graphs
    parts = balanced_parts([len(question.example.ids) for question in questions],
                           math.ceil(len(questions) / args.max_batch_size))
    batches = [[questions[i] for i in part] for part in parts]
    results = answer_batches(model, tokenizer, batches, args)
    with progress_bar(None, "questions", total=len(questions), unit="question") as bar:
        for batch in batches:
            with named_failures([f"question {question.qid}" for question in batch]):
                answered = next(results)
            yield {question.qid: {"qid": question.qid, "text": text, "prediction": prediction, "parsed": parsed,
                                  "answer": data.problems[question.qid]["answer"],
                                  "cluster": cluster(question.qid, data.problems[question.qid]),
                                  **({"cut": True} if question.cut else {})}
                   for question, (text, prediction, parsed) in zip(batch, answered, strict=True)}
            bar.update(len(batch))


@contextmanager
def named_failures(names: list[str]) -> Iterator[None]:
    """names: of the batch's sequences."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(error.indices, f" for {', '.join(names[i] for i in error.indices[:8])}") from error


# --- Results ---

def predictions_of(answers: list[dict]) -> dict[str, int]:
    return {answer["qid"]: answer["prediction"] for answer in answers}


def summarize(answers: list[dict], data: ScienceQA, n_skipped: int, what: dict) -> dict:
    """scores.json. what: is scored."""
    return {**score(data.problems, predictions_of(answers)), "questions": len(answers),
            "parse_failures": sum(not answer["parsed"] for answer in answers), "skipped": n_skipped,
            "prompts_cut": sum("cut" in answer for answer in answers), **what}


def recount(folder: Path, data: ScienceQA, what: dict, scores: dict) -> dict:
    """The scores by the answers in the folder; none where preds.json has others."""
    answers = read_json_lines(folder / "generations.jsonl")
    if read_json(folder / "preds.json") != predictions_of(answers):
        return {}
    return summarize(answers, data, scores["skipped"], what)


def write_results(folder: Path, answers: list[dict], data: ScienceQA, what: dict) -> dict:
    """Writes the three result files; returns the scores."""
    scores = summarize(answers, data, len(data.skipped), what)
    (folder / "scores.json").unlink(missing_ok=True)
    write_json_lines(folder / "generations.jsonl", answers)
    write_json(folder / "preds.json", predictions_of(answers))
    write_json(folder / "scores.json", scores)  # last: where it is, all files are there, and of one evaluation
    return scores


def score_table(scores: dict) -> str:
    percent = ["-" if scores[column] is None else f"{scores[column]:.2f}" for column in COLUMNS]
    return format_table(["", *COLUMNS], [["accuracy %", *percent], ["questions", *scores["counts"].values()]])


def report(folder: Path, scores: dict, trained: Trained) -> None:
    print_rank0(score_table(scores))
    print_rank0(f"{scores['parse_failures']} answers named no option, "
                f"{scores['skipped']} problems left out for their picture")
    if scores["prompts_cut"]:
        print_rank0(f"{scores['prompts_cut']} prompts are longer than --max_seq_len {scores['max_seq_len']}: words in "
                    "their middle are left out")
    print_rank0(f"scores: {folder / 'scores.json'}{beside(folder, trained)}")


def beside(folder: Path, trained: Trained) -> str:
    """What the last line says of a run's early checkpoint."""
    path = trained.path
    return (f" ({path.name} is not the run's last checkpoint, so the run's own scores stay)"
            if path and folder == path.parent / path.stem else "")


def main(args) -> None:
    take_run(args)
    trained = read_trained(args)
    if args.decode == "score" and not answers_first(args.prompt_format):
        raise UserError(f"--decode score compares answers, but in --prompt_format {args.prompt_format} the solution "
                        "comes first: leave --decode out")
    data = load_scienceqa(args.data_root, args.split, caption_path(args))
    data = data.sample(args.questions) if args.questions else data
    folder = distributed.from_rank_0(lambda: results_folder(args.output_dir, trained.path))
    with locked(folder):
        evaluate(args, trained, data, folder)
    distributed.close()


def evaluate(args, trained: Trained, data: ScienceQA, folder: Path) -> None:
    what = distributed.from_rank_0(lambda: identity(args, trained, data))
    scores = distributed.from_rank_0(lambda: scored_before([folder / name for name in FILES], what,
                                                               partial(recount, folder, data, what)))
    if scores:
        print_rank0("scored before, with the same settings:")
        report(folder, scores, trained)
        return
    torch.manual_seed(args.seed)
    model, tokenizer, _ = load_model(args, trained)
    images = load_images(data, model.vision.image_size, args.num_workers, args.skip_bad)
    answers = answer_all(folder, PARTIAL, what, list(data.problems),
                         partial(answer_questions, model, tokenizer, data, images, args))
    if is_main_process():
        scores = write_results(folder, list(answers.values()), data, what)
        drop_partial(folder, PARTIAL)
        report(folder, scores, trained)


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
