"""Evaluation throughput on ScienceQA: the published recipe and ours, on random weights and samples of real lengths.

    python -m benchmarks.eval_throughput                 # 7B on this GPU
    python -m benchmarks.eval_throughput --size tiny     # a smoke test on a CPU, in seconds

Random weights never generate `The answer is X.`, which has five tokens in LLaMA's vocabulary. So RandomTokenizer
decodes any five tokens as that sentence, and our sampler chooses those that a trained model would. Everything else is
eval.py's own code. If transformers is installed, its `generate` with a static cache writes five tokens for each of some
prompts, without pictures.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import gc
import random
import time
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.published_recipe import published_answers
from benchmarks.random_lavin import (
    IMAGE_PREFIX,
    TEXT_PREFIX,
    image_generator,
    length_rows,
    random_examples,
    random_lavin,
)
from benchmarks.timing import hardware, make_parser, matmul_peak, peak_gib, print_kernels, report, start_memory
from benchmarks.transformers_llama import generate as transformers_generate
from benchmarks.transformers_llama import transformers_llama
from lavin.fast.speed_up import speed_up
from lavin.generation import generate
from lavin.generation.sampling import greedy
from lavin.tokenizer import IMAGE_SLOT, Example
from util.data.datasets import ScienceQA
from util.data.settings import DataSettings
from util.evaluation.answering import answer_questions
from util.evaluation.answers import Answer
from util.evaluation.settings import Answering

ANSWER = (4, 5, 6, 7 + ord("A"), 8)  # `The answer is A.`


def trained_sampler(*settings):
    """A sampler that finds the most likely token of random weights, and takes the next one of ANSWER."""
    tokens = iter(ANSWER)
    return lambda logits: torch.full_like(greedy(logits), next(tokens))


class RandomTokenizer:
    """Encodes a prompt as random tokens, with the length of a real problem; `The answer is X.` is five tokens."""

    eos_id = -1

    def __init__(self, vocab: int):
        self.vocab = vocab

    def example(self, prompt: str, answer=None, image=None, n_prompt: int = 6, max_seq_len=None) -> Example:
        rng = random.Random(prompt)
        rows = length_rows()
        length, _, _ = rows[zlib.crc32(prompt.encode()) % len(rows)]
        prefix = [3] * (1 + TEXT_PREFIX) if image is None else [3] * (1 + IMAGE_PREFIX) + [IMAGE_SLOT] * n_prompt
        ids = prefix + rng.choices(range(3, self.vocab), k=length - 1)
        start = len(ids)
        ids += [*ANSWER[:3], 7 + ord(answer[-2]), ANSWER[4]] if answer else []
        return Example(ids, start, image)

    def decode(self, ids: list[int]) -> str:
        return "The answer is A." if len(ids) >= 5 else ""


TestSet = tuple[ScienceQA, dict[str, torch.Tensor]]  # problems, and images by question id


def questions(model, n: int, seed: int) -> TestSet:
    """n problems with four choices each, and images, by question id, for 45% of them."""
    rng = random.Random(seed)
    problems = {str(i): {"question": f"{seed} {i}", "choices": list("abcd"), "answer": 0, "hint": "", "lecture": "",
                         "solution": ""} for i in range(n)}
    random_image = image_generator(model, seed)
    images = {qid: random_image() for qid in problems if rng.random() < 0.45}
    return ScienceQA(Path(), problems, {}), images


def answer_all(model, tokenizer, test_set: TestSet, answering: Answering, rank: int = 0, world: int = 1
               ) -> list[Answer]:
    """Answers this rank's part of the questions by the code of eval.py."""
    problems, images = test_set
    qids = list(problems.problems)[rank::world]
    batches = answer_questions(model, tokenizer, problems, images, qids, DataSettings(), answering)
    return [answer for batch in batches for answer in batch]


def transformers_seconds(model, prompts: list[Example], batch_size: int) -> float:
    """Seconds for all prompts, in batches of similar lengths. Compiling and capturing come before."""
    prompts = sorted(prompts, key=lambda prompt: -len(prompt.ids))  # the longest sets the size of the cache
    batches = [prompts[start:start + batch_size] for start in range(0, len(prompts), batch_size)]
    for batch in batches[:2]:
        transformers_generate(model, batch, len(ANSWER))
    start = time.perf_counter()
    for batch in batches:
        transformers_generate(model, batch, len(ANSWER)).tolist()
    return time.perf_counter() - start


def main(args) -> None:
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    bf16, fp16 = (torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.float32)
    print(hardware(device, matmul_peak(device, bf16)), flush=True)
    rows: list[dict] = []

    def add(what: str, n: int, seconds: float) -> None:
        rows.append({"what": what, "questions": f"{n}", "seconds": seconds, "questions/s": n / seconds,
                     "test set (4,241), s": 4241 * seconds / n, "GiB": peak_gib(device),
                     "ratio": n / seconds / rows[0]["questions/s"] if rows else 1.0})
        print(report(rows[-1:]), flush=True)

    model = random_lavin(args.size, device, fp16).eval()
    published_answers(model, random_examples(model, 2, 0, answers=False), 2)
    start_memory(device)
    start = time.perf_counter()
    published_answers(model, random_examples(model, args.batch, 1, answers=False), 64).cpu()
    add(f"published, fp16, batch {args.batch}, 64 tokens", args.batch, time.perf_counter() - start)

    if find_spec("transformers"):
        prompts = random_examples(model, 8 * args.batch, 1, answers=False)
        model = None
        gc.collect()
        model = transformers_llama(args.size, device, bf16)
        start_memory(device)
        add("transformers, static cache, bf16, 5 tokens", len(prompts),
            transformers_seconds(model, prompts, args.batch))

    with patch.object(generate, "sampler", trained_sampler):
        for bits in ("16bit", "fp8"):
            model = None
            gc.collect()
            torch.compiler.reset()
            model = speed_up(random_lavin(args.size, device, bf16), bits).eval()
            tokenizer = RandomTokenizer(model.llama.config.vocab_size)
            for decode in ("generate", "score"):
                answering = Answering(decode=decode, max_batch_size=args.batch)
                answer_all(model, tokenizer, questions(model, 2 * args.batch, 0), answering)  # compiles
                start_memory(device)
                test_set = questions(model, args.questions, 1)
                start = time.perf_counter()
                answer_all(model, tokenizer, test_set, answering)
                seconds = time.perf_counter() - start
                add(f"ours, {bits.replace('16bit', 'bf16')}, --decode {decode}", args.questions, seconds)
                if args.profile:
                    four_batches = questions(model, 4 * args.batch, 2)
                    print_kernels(partial(answer_all, model, tokenizer, four_batches, answering), device)
    print(report(rows))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--questions", default=4241, type=int, help="for ours; the published recipe answers one batch")
    parser.add_argument("--profile", action="store_true", help="list the kernels of four batches of each")
    main(parser.parse_args())
