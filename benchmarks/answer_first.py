"""SmolLM2 on easy-VQA with the answer first (QCM-A): by learning rate, number of questions, and first adapters.

    bash scripts/quickstart_smollm2.sh           # before: it makes the data, the ViT and the run to begin with
    python benchmarks/answer_first.py            # ten runs, six at once: some 10 minutes on an H100
    python benchmarks/answer_first.py --match "960 questions, 16 epochs, blr 0.02" --device cpu --jobs 2

"many questions" are all about colours and shapes, and 8,000 of yes or no, whose pictures are train's and not in
validation; "warm" runs begin with the adapters of the quickstart's base run. Test as in the quickstart, and with
exchanged pictures.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

import timing  # first: it extends sys.path

# isort: split
sys.path.append(str(Path(timing.__file__).parents[1] / "tools"))
import eval as evaluation
import make_easy_vqa
import train
from lavin.runtime.console import format_table, summary
from lavin.runtime.files import read_json
from lavin.weights.adapters import load_adapters
from output import make_folder, write_scienceqa
from topic_scores import correct_by_topic
from util.trained_model import last_checkpoint

DATA, WEIGHTS, RUNS = Path("data/easy_vqa"), Path("weights"), Path("runs/smollm2")
FLAGS = ("--llm_model smollm2.gguf --prompt_format QCM-A --max_seq_len 128 --batch_size 16 --accum_iter 1 "
         "--warmup_epochs 0.2 --weight_decay 0.02 --temperature 10 --compile off").split()
MOST = 8000  # questions of a type


class Run(NamedTuple):
    many: bool
    epochs: int
    blr: float
    warm: bool
    seed: int = 0

    def __str__(self) -> str:
        return (f"{'many' if self.many else '960'} questions, {self.epochs} epochs, blr {self.blr:g}"
                f"{', warm' * self.warm}, seed {self.seed}")


PLAN = (Run(False, 16, 0.02, False), Run(False, 16, 0.02, False, 1), Run(False, 40, 0.02, False),
        Run(False, 16, 0.02, True), Run(False, 16, 0.02, True, 1), Run(False, 16, 0.08, True),
        Run(True, 5, 0.02, False), Run(True, 5, 0.08, False), Run(True, 5, 0.02, True), Run(True, 5, 0.08, True))


def write_many(out: Path) -> None:
    """easy-VQA as in the quickstart, but with many questions a picture in train."""
    problems, pictures, captions = make_easy_vqa.make_problems(make_easy_vqa.SIZES, 0)
    make_easy_vqa.add_shuffled(problems, pictures, captions)
    problems = {qid: problem for qid, problem in problems.items() if problem["split"] not in ("train", "pretrain")}
    held_out, rng = {pictures[qid] for qid in problems}, Random(1)
    folder = make_easy_vqa.package_data() / "train"
    descriptions = make_easy_vqa.describe(folder)
    for topic, answers in make_easy_vqa.ANSWERS.items():
        questions = [question for question in make_easy_vqa.read_questions(folder) if question.answer in answers
                     and question.picture in descriptions and question.picture not in held_out]
        for question in rng.sample(questions, min(MOST, len(questions))):
            qid, description = str(100_000 + len(problems)), descriptions[question.picture]
            problems[qid] = make_easy_vqa.record(topic, question, description, "train", rng)
            pictures[qid], captions[qid] = question.picture, f"A {description}."
    make_folder(out)
    write_scienceqa(out, problems, {qid: captions[qid] for qid in problems},
                    lambda qid, path: shutil.copyfile(pictures[qid], path))


def load_warm(load_base, *args, **kwargs):
    """As load_base, with the adapters of the quickstart's base run."""
    path = last_checkpoint(str(RUNS / "LaVIN-smollm2.gguf-base-seed0"))
    model, tokenizer = load_base(*args, **kwargs)
    load_adapters(model, torch.load(path, map_location="cpu", weights_only=True)["model"], str(path))
    return model, tokenizer


def train_and_score(out: Path, device: str, run: Run) -> list[str]:
    """Its row of the table. In a process of its own."""
    os.environ["TQDM_DISABLE"] = "1"
    folder, data = out / str(run).replace(", ", "-").replace(" ", ""), out / "many" if run.many else DATA
    if run.warm:
        train.load_base = partial(load_warm, train.load_base)
    common = ["--vision_model", str(WEIGHTS / "smollm2" / "vit"), "--device", device, "--data_root", str(data)]
    train.main(train.get_args_parser().parse_args(
        [*FLAGS, *common, "--llama_model_path", str(WEIGHTS), "--output_dir", str(folder), "--epochs", str(run.epochs),
         "--blr", str(run.blr), "--seed", str(run.seed)]))
    row, problems = [str(run)], read_json(data / "problems.json")
    for split in ("test", "shuffled"):
        results = folder / split
        evaluation.main(evaluation.get_args_parser().parse_args(
            ["--adapter_path", str(folder), "--split", split, "--device", device, "--output_dir", str(results)]))
        by_topic = correct_by_topic(results, problems)
        row += [f"{100 * sum(by_topic[topic]) / len(by_topic[topic]):.1f}" for topic in make_easy_vqa.ANSWERS]
    return row


def main(args) -> None:
    plan = [run for run in PLAN if args.match in str(run)]
    if any(run.many for run in plan) and not (args.out / "many" / "problems.json").is_file():
        write_many(args.out / "many")
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        rows = pool.map(partial(train_and_score, args.out, args.device), plan, chunksize=1)
    topics = list(make_easy_vqa.ANSWERS)
    print(format_table(["accuracy %", *topics, *(f"{topic}, exchanged" for topic in topics)], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--out", default=RUNS / "answer_first", type=Path, help="folder of the runs, which go on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", default=6, type=int, help="runs at once")
    parser.add_argument("--match", default="", help="only the runs whose names contain this")
    main(parser.parse_args())
