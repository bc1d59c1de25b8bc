"""Chat latency at batch 1, on random weights: time to first token and tokens/s of the published recipe and of ours.

If transformers is installed, its `generate` with a static cache answers the same prompts, without pictures. Ours is
warmed up as in demo.py. "cold" is the first token without `warmup`, as in a program that calls `generate` directly: the
first call with a prompt of a length bucket captures that bucket.

    python -m benchmarks.chat_latency                    # 7B on this GPU
    python -m benchmarks.chat_latency --size tiny        # a smoke test on a CPU, in seconds
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import gc
import statistics
import time
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks.published_recipe import published_answers
from benchmarks.random_lavin import random_examples, random_lavin, redrawn
from benchmarks.timing import hardware, make_parser, matmul_peak, peak_gib, print_kernels, report, start_memory
from benchmarks.transformers_llama import TokenTimes, generate, transformers_llama
from lavin.fast.captured_models import free_graphs
from lavin.fast.speed_up import speed_up
from lavin.generation.generate import decode, warmup

SKIPPED_TOKENS = 16  # at the start of an answer, excluded from tokens/s


def first_and_rate(times: list[float]) -> tuple[float, float]:
    """Seconds to the first token, and tokens/s after SKIPPED_TOKENS. times: of the start, and then of each token."""
    start, *tokens = times
    rate = (len(tokens) - SKIPPED_TOKENS) / (tokens[-1] - tokens[SKIPPED_TOKENS - 1])
    return tokens[0] - start, rate


def answer(model, example, n_tokens: int) -> tuple[float, float]:
    """Seconds to our first token, and tokens/s after SKIPPED_TOKENS."""
    times = [time.perf_counter()]
    for _ in decode(model, [example], n_tokens, lambda logits: logits.argmax(-1)):
        times.append(time.perf_counter())  # when a token has reached the host, as the chat shows each immediately
    return first_and_rate(times)


def transformers_answer(model, example, n_tokens: int) -> tuple[float, float]:
    """Seconds to the first token of transformers' `generate`, and tokens/s after SKIPPED_TOKENS."""
    start, streamer = time.perf_counter(), TokenTimes()
    generate(model, [example], n_tokens, streamer)
    return first_and_rate([start, *streamer.times[1:]])  # without the prompt's


def median_answer(answer_prompt, prompts, n_tokens: int) -> tuple[float, float]:
    """Medians of the prompts' seconds to the first token and tokens/s."""
    results = [answer_prompt(prompt, n_tokens) for prompt in prompts]
    first, rate = (statistics.median(column) for column in zip(*results, strict=True))
    return first, rate


def cold_first_token(model, example) -> float:
    """Seconds to the first token of the first call with the prompt's length bucket."""
    free_graphs(model.llama, model.vision)
    return answer(model, example, SKIPPED_TOKENS + 1)[0]


def main(args) -> None:
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    bf16, fp16 = (torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.float32)
    print(hardware(device, matmul_peak(device, bf16)), flush=True)
    rows: list[dict] = []

    def add(what: str, cold: float, first: float, rate: float) -> None:
        rows.append({"what": what, "first token, ms": 1000 * first, "cold": 1000 * cold, "tokens/s": rate,
                     "GiB": peak_gib(device), "ratio": rate / rows[0]["tokens/s"] if rows else 1.0})
        print(report(rows[-1:]), flush=True)

    model = random_lavin(args.size, device, fp16).eval()
    prompts = random_examples(model, max(args.repeats, 8), 0, answers=False)  # some with images
    seconds = []
    start_memory(device)
    for n_tokens in (2, 1, 1 + args.tokens):  # the first only warms up
        start = time.perf_counter()
        published_answers(model, prompts[:1], n_tokens).cpu()
        seconds.append(time.perf_counter() - start)
    add("published, fp16", seconds[1], seconds[1], args.tokens / (seconds[2] - seconds[1]))

    timed = prompts[-args.repeats:]
    if find_spec("transformers"):
        model = None
        gc.collect()
        model = transformers_llama(args.size, device, bf16)
        start_memory(device)
        longest = max(timed, key=lambda prompt: len(prompt.ids))  # sets the size of the cache
        for _ in range(2):  # compiles and captures
            transformers_answer(model, longest, args.tokens)
        first, rate = median_answer(partial(transformers_answer, model), timed, args.tokens)
        add("transformers, static cache, bf16", first, first, rate)

    for bits in ("16bit", "fp8", *["4bit"] * bool(find_spec("bitsandbytes"))):
        model = None
        gc.collect()
        torch.compiler.reset()
        model = speed_up(random_lavin(args.size, device, bf16, bits=bits), bits).eval()
        warmup(model, max(len(prompt.ids) for prompt in prompts) + args.tokens)
        start_memory(device)
        first, rate = median_answer(partial(answer, model), redrawn(model, timed, 1), args.tokens)
        cold = statistics.median(cold_first_token(model, prompt) for prompt in timed)
        add(f"ours, {bits.replace('16bit', 'bf16')}", cold, first, rate)
        if args.profile:
            print_kernels(partial(answer, model, timed[0], SKIPPED_TOKENS + 17), device)
    print(report(rows))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", default=144, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--profile", action="store_true", help="list the kernels of an answer of 33 tokens")
    main(parser.parse_args())
