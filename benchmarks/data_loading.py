"""Time and memory until ScienceQA's training data are ready, with and without the node's cache (util/data/cache.py).

    python benchmarks/data_loading.py                 # as many problems and pictures as ScienceQA has
    python benchmarks/data_loading.py --size small    # a smoke test

Each row starts processes at once, which read, check and tokenize the train split and get its pictures as train.py does,
without a model. "ready" is the slowest one's time without imports, "CPU" the sum of their CPU time in it. "PSS" is the
sum of their memory when the data are ready, in which a page that n processes share counts as 1/n in each; "imports" is
that of one before. The last rows are eval.py's: the test split, and its prompts. Problems and pictures are random, with
real lengths and numbers.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from timing import report  # first: it extends sys.path

# isort: split
import eval as evaluation
from lavin.runtime.console import progress_bar, summary
from lavin.runtime.files import write_json
from lavin.tokenizer import Tokenizer
from random_lavin import length_rows
from util.data.batches import load_examples, load_training_data
from util.data.datasets import load_scienceqa
from util.data.examples import examples_sha256
from util.data.images import load_images

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from make_toy_base import train_tokenizer

# split -> problems, and those of them that have a picture
SIZES = {"full": {"train": (12_726, 6_218), "val": (4_241, 2_097), "test": (4_241, 2_017)},
         "small": {"train": (20, 10), "test": (8, 4)}}
IMAGE_SIZE = 224
SETTINGS: dict[str, Any] = {"do_pretrain": False, "prompt_format": "QCM-ALE", "n_prompt": 6, "max_seq_len": 512,
                            "num_workers": 4, "skip_bad": False, "seed": 0}


# --- The data ---

def make_words(rng: Random) -> list[str]:
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(1200)})


def make_problem(words: list[str], rng: Random, split: str, has_picture: bool) -> dict:
    """About as many words as one of 150 real problems has tokens."""
    prompt, total, _ = rng.choice(length_rows())

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=max(n, 1)))

    return {"question": text(prompt // 2), "choices": [text(prompt // 8) for _ in range(4)], "answer": rng.randrange(4),
            "hint": "", "lecture": text((total - prompt) * 2 // 3), "solution": text((total - prompt) // 3),
            "image": "image.png" if has_picture else None, "grade": "grade3", "subject": "natural science",
            "split": split, "topic": text(1), "category": text(1), "skill": text(4)}


def make_pictures(n: int) -> list[bytes]:
    """PNGs of 30,000 to 350,000 pixels, every second one smooth, and so larger as a file."""
    rng, files = np.random.default_rng(0), []
    for i in range(n):
        width, height = (int(size) for size in rng.integers((200, 150), (700, 500)))
        blocks = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), np.uint8))
        file = io.BytesIO()
        resampling = Image.Resampling.BICUBIC if i % 2 else Image.Resampling.NEAREST
        blocks.resize((width, height), resampling).save(file, "PNG")
        files.append(file.getvalue())
    return files


def write_scienceqa(root: Path, sizes: dict[str, tuple[int, int]]) -> None:
    rng, pictures = Random(0), make_pictures(32)
    words, problems, splits = make_words(rng), {}, {}
    for split, (n, n_pictures) in sizes.items():
        splits[split] = [str(len(problems) + i) for i in range(n)]
        problems |= {qid: make_problem(words, rng, split, i * n_pictures // n < (i + 1) * n_pictures // n)
                     for i, qid in enumerate(splits[split])}
    for qid, problem in progress_bar(problems.items(), "pictures"):
        if problem["image"]:
            path = root / "images" / problem["split"] / qid / problem["image"]
            path.parent.mkdir(parents=True)
            path.write_bytes(rng.choice(pictures))
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", splits)


# --- One process ---

def load_for_training(args, tokenizer: Tokenizer):
    data = load_training_data(args, None)
    examples = load_examples(data, args, tokenizer, IMAGE_SIZE)
    return data, examples, data.fingerprint, examples_sha256(examples)  # the last two: of recipe and checkpoints


def load_for_eval(args, tokenizer: Tokenizer):
    data = load_scienceqa(args.data_root, "test", None)
    images = load_images(data, IMAGE_SIZE, args.num_workers, args.skip_bad)
    return data.fingerprint, [evaluation.make_question(tokenizer, args.n_prompt, data, qid, images.get(qid), args)
                              for qid in data.problems]


def pss_gib(process_id: int) -> float:
    lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 2**20


def work(load, root: Path) -> None:
    """Says how long it took, and waits with the data in memory."""
    args = argparse.Namespace(**SETTINGS, data_root=str(root))
    tokenizer, before = Tokenizer(root / "tokenizer.model"), pss_gib(os.getpid())
    start, start_cpu = time.perf_counter(), time.process_time()
    data = load(args, tokenizer)
    print(json.dumps([time.perf_counter() - start, time.process_time() - start_cpu, before]), flush=True)
    sys.stdin.read()
    del data


# --- Rows ---

def measure(what: str, root: Path, cache: str, n_processes: int, load) -> dict:
    command = [sys.executable, __file__, "--work", load.__name__, str(root)]
    processes = [subprocess.Popen(command, env={**os.environ, "LAVIN_CACHE": cache}, text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(n_processes)]
    results = [json.loads(next(line for line in process.stdout or () if line.startswith("["))) for process in processes]
    seconds, cpu_seconds, before = zip(*results, strict=True)
    row = {"what": what, "processes": str(n_processes), "ready, s": max(seconds), "CPU, s": sum(cpu_seconds),
           "PSS, GiB": sum(pss_gib(process.pid) for process in processes), "imports, GiB": max(before)}
    for process in processes:
        process.communicate()
    print(report([row]), flush=True)
    return row


def main(args) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        write_scienceqa(root, SIZES[args.size])
        train_tokenizer(load_scienceqa(name, "test"), root / "tokenizer.model")
        rows = []
        for what, n, load in (("train.py", 1, load_for_training), ("train.py", args.processes, load_for_training),
                              ("eval.py", 1, load_for_eval)):
            with tempfile.TemporaryDirectory(dir=root) as cache:
                rows += [measure(f"{what}, {state}", root, folder, n, load) for state, folder in
                         (("no cache", ""), ("first with it", cache), ("later", cache))]
        print(report(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--size", default="full", choices=SIZES)
    parser.add_argument("--processes", default=4, type=int, help="in the rows of several")
    parser.add_argument("--folder", help="for data and caches, 2 GB (the system's temporary one)")
    parser.add_argument("--work", nargs=2, metavar=("LOAD", "DATA"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(globals()[args.work[0]], Path(args.work[1]))
    else:
        main(args)
