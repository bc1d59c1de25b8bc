"""Scores a run on ScienceQA: `python eval.py --adapter_path RUN ...`, or under torchrun, which shares out the questions.

Writes preds.json, generations.jsonl and scores.json into the run's folder. Adapter flags are read from the checkpoint.
"""

import argparse
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lavin import parallel
from lavin.checkpoint import load_adapters, load_base, read_adapters, require_base
from lavin.errors import UserError, one_line_errors
from lavin.fast import speed_up
from lavin.frozen import check_fp8
from lavin.generation import generate, option_example, score_options
from lavin.mm_adapter import AdapterConfig
from lavin.precision import choose_device, choose_dtype
from util.datasets import load_pictures, load_scienceqa
from util.files import write_json, write_json_lines
from util.flags import captions_of, check_counts, check_shared, inherit, shared_flags
from util.logging import is_first, progress, say, table
from util.prompts import answer_text, build_prompt, parse_answer
from util.runs import last_checkpoint
from util.scoring import COLUMNS, score

ANSWER_TOKENS = 64  # where the answer comes first; else up to --max_seq_len


def get_args_parser() -> argparse.ArgumentParser:
    shared = shared_flags()
    parser = argparse.ArgumentParser("eval.py", description=__doc__.splitlines()[0], parents=[shared], epilog=(
        "Flags of model and data that are left out are those of the training run."))
    parser.set_defaults(**dict.fromkeys(vars(shared.parse_args([]))))
    add = parser.add_argument
    add("--adapter_path", help="a checkpoint, or a run's folder; left out: the untuned base")
    add("--output_dir", help="where results go (the folder of --adapter_path)")
    add("--tokenizer_path", help="tokenizer.model (the base model's)")
    add("--split", default="test", help="split of pid_splits.json (test)")
    add("--decode", default="generate", choices=["generate", "score"],
        help="let the model write its answer, or compare the letters' probabilities in one pass (generate)")
    add("--max_batch_size", default=64, type=int, help="questions answered at once (64)")
    add("--generation_temperature", default=0.0, type=float, help="of sampling (0: the likeliest token)")
    add("--top_p", default=0.75, type=float, help="nucleus of sampling, where the temperature is not 0 (0.75)")
    add("--seed", default=0, type=int, help="of sampling (0)")
    return parser


def check_adapter_flags(args, trained: dict) -> None:
    """Raises UserError where a flag contradicts the adapter configuration of the checkpoint."""
    for name, value in trained.items():
        flag = getattr(args, name, None)
        if flag is not None and flag != value:
            raise UserError(f"--{name} {flag} contradicts {args.adapter_path}, trained with --{name} {value}: "
                            "leave the flag out")


def load_model(args, fast: bool = True):
    """Base, tokenizer, and the checkpoint's path; sets the flags that were left out to the checkpoint's.

    fast: as `speed_up` makes it; else the plain model, whose parameters have the names of the base's.
    """
    if args.llama_model_path and args.llm_model:
        require_base(args.llama_model_path, args.llm_model, args.tokenizer_path)
    path = last_checkpoint(args.adapter_path) if args.adapter_path else None
    checkpoint = read_adapters(path) if path else {}
    adapter = checkpoint.get("adapter_config", {})
    check_adapter_flags(args, adapter)
    inherit(args, checkpoint.get("flags", {}))
    check_shared(args)
    require_base(args.llama_model_path, args.llm_model, args.tokenizer_path, args.use_vicuna)
    device = choose_device(args.device, parallel.init(args.model_parallel_size)[2])
    dtype = choose_dtype(args.precision, device)
    if args.bits == "fp8":
        check_fp8(device, dtype)
    adapter = adapter or {name: getattr(args, name) for name in AdapterConfig.__dataclass_fields__ if hasattr(args, name)}
    model, tokenizer = load_base(args.llama_model_path, args.llm_model, args.vision_model, AdapterConfig(**adapter),
                                 device, dtype, tokenizer_path=args.tokenizer_path, use_vicuna=args.use_vicuna,
                                 bits=args.bits)
    if path:
        load_adapters(model, checkpoint["model"], str(path))
    return (speed_up(model, args.bits) if fast else model).eval(), tokenizer, path


class Asked(NamedTuple):
    """A question as the model gets it; picture: uint8 [3, S, S] or None. seed: of its own, where answers are sampled."""

    qid: str
    prompt: str
    picture: torch.Tensor | None
    n_choices: int
    seed: int


def likeliest(model, tokenizer, batches: Iterable[list[Asked]]) -> Iterator[list[int]]:
    """The likeliest option of each question of each batch, by the first token in which its answers differ."""
    questions = ([option_example(tokenizer, asked.prompt, [answer_text(k) for k in range(asked.n_choices)],
                                 image=asked.picture, n_prompt=model.adapter.n_prompt) for asked in batch]
                 for batch in batches)
    for batch in score_options(model, questions):
        yield [scores.index(max(scores)) for scores in batch]


def write_batch(model, tokenizer, batch: list[Asked], args) -> list[tuple[str, int, bool]]:
    """Text, option index, and whether the text named it; where it did not, the likeliest option stands."""
    examples = [tokenizer.example(asked.prompt, None, asked.picture, model.adapter.n_prompt) for asked in batch]
    longest = ANSWER_TOKENS if answers_first(args.prompt_format) else args.max_seq_len
    texts = generate(model, tokenizer, examples, longest, lambda text: parse_answer(text, 26) is not None,
                     args.generation_temperature, args.top_p, [asked.seed for asked in batch])
    predictions = [parse_answer(text, asked.n_choices) for text, asked in zip(texts, batch)]
    # of the whole batch, for which the model's session is made
    guesses = next(likeliest(model, tokenizer, [batch])) if None in predictions else predictions
    return [(text, guess if prediction is None else prediction, prediction is not None)
            for text, prediction, guess in zip(texts, predictions, guesses)]


def answer_batches(model, tokenizer, batches: list[list[Asked]], args) -> Iterator[list[tuple[str, int, bool]]]:
    """As `write_batch`, batch after batch."""
    if args.decode == "score":
        return ([(answer_text(i), i, True) for i in options] for options in likeliest(model, tokenizer, batches))
    return (write_batch(model, tokenizer, batch, args) for batch in batches)


def answers_first(prompt_format: str) -> bool:
    return prompt_format.split("-")[1].startswith("A")


def answer_questions(model, tokenizer, data, pictures: dict, args) -> list[dict]:
    """This process's share of the questions, answered."""
    rank, world, _ = parallel.init()
    asked = [Asked(qid, build_prompt(problem, args.prompt_format, data.captions.get(qid, ""))[0], pictures.get(qid),
                   len(problem["choices"]), zlib.crc32(f"{args.seed} {qid}".encode()))
             for qid, problem in list(data.problems.items())[rank::world]]
    batches = [asked[start:start + args.max_batch_size] for start in range(0, len(asked), args.max_batch_size)]
    answers = []
    with progress(None, "questions", total=len(asked), unit="question") as bar:
        for batch, results in zip(batches, answer_batches(model, tokenizer, batches, args)):
            answers += [{"qid": asked.qid, "text": text, "prediction": prediction, "parsed": parsed,
                         "answer": data.problems[asked.qid]["answer"]}
                        for asked, (text, prediction, parsed) in zip(batch, results)]
            bar.update(len(batch))
    return answers


def write_results(folder: Path, answers: list[dict], data, args, path: Path | None) -> dict:
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
    return table(["", *COLUMNS], [["accuracy %", *percent], ["questions", *scores["counts"].values()]])


def main(args) -> None:
    if not args.adapter_path and not args.output_dir:
        raise UserError("without --adapter_path the untuned base is scored: say where with --output_dir")
    check_counts(args, "max_batch_size")
    torch.manual_seed(args.seed)
    model, tokenizer, path = load_model(args)
    if args.decode == "score" and not answers_first(args.prompt_format):
        raise UserError(f"--decode score compares answers, and in --prompt_format {args.prompt_format} a solution comes "
                        "first: leave --decode out")
    data = load_scienceqa(args.data_root, args.split, captions_of(args))
    pictures = load_pictures(data, model.vision.image_size, args.num_workers, args.skip_bad)

    shares = parallel.gather(answer_questions(model, tokenizer, data, pictures, args))
    by_qid = {answer["qid"]: answer for share in shares for answer in share}
    if is_first():
        folder = Path(args.output_dir) if args.output_dir else path.parent
        scores = write_results(folder, [by_qid[qid] for qid in data.problems], data, args, path)
        say(score_table(scores))
        say(f"{scores['parse_failures']} answers named no option, {scores['skipped']} problems left out for their picture")
        say(f"scores: {folder / 'scores.json'}")
    parallel.close()


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
