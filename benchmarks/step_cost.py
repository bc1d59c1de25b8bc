"""The costs of a training step for host and GPU, by its number of samples: for small bases, the host may be slower.

    python -m benchmarks.step_cost                # SmolLM2's shape, 8 to 128 samples a step
    python -m benchmarks.step_cost --size 7B --samples 8 32
    python -m benchmarks.step_cost --size tiny    # a smoke test on a CPU, in seconds

- ms a step: median, of steps back to back; the numbers of a step are read while the next one runs, as in training.
- host ms: from the call of a step to its return, on an idle GPU, which does not wait for the GPU.
- busy ms, kernels: of the GPU in one step, by PyTorch's profiler. launches: the host's calls that start kernels, graphs
  and copies.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import gc
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.random_lavin import image_generator, random_examples, random_lavin, redrawn
from benchmarks.timing import hardware, make_parser, matmul_peak, peak_gib, report, start_memory, step_seconds
from benchmarks.train_throughput import our_trainer
from lavin.fast.speed_up import speed_up
from lavin.runtime.device import copy_to_host, limit_threads, set_determinism
from lavin.tokenizer import IMAGE_SLOT, Example

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
SHORT = range(60, 81)  # tokens of a sample with a small base
ANSWER = 12  # tokens of its answer


def short_examples(model, n: int, seed: int) -> list[Example]:
    """n random samples of about 70 tokens, each with a picture."""
    rng, vocab, random_image = random.Random(seed), model.llama.config.vocab_size, image_generator(model, seed)
    slots = [IMAGE_SLOT] * model.adapter.n_prompt
    lengths = [rng.choice(SHORT) - len(slots) for _ in range(n)]
    ids = [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]
    return [Example(row[:4] + slots + row[4:], len(row) + len(slots) - ANSWER, random_image()) for row in ids]


def reading_late(step: Callable) -> Callable:
    """The step as the trainer makes it: it reads the numbers of the step before."""
    in_flight: list[Callable] = []

    def read_late(samples) -> None:
        in_flight.append(copy_to_host(step(samples)))
        if len(in_flight) > 1:
            in_flight.pop(0)().tolist()
    return read_late


def host_seconds(step, device, steps: int) -> float:
    """Median seconds until step(i) returns, on an idle GPU."""
    seconds = []
    for i in range(steps):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def profiled(run: Callable[[], object], device, show: bool) -> dict:
    """The GPU's busy milliseconds, its kernels and the host's launches in a call. show: whether to print the kernels
    and the launches."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    averages = profiler.key_averages()
    if show:
        for by in ("self_cuda_time_total", "self_cpu_time_total"):
            print(averages.table(sort_by=by, row_limit=50, max_name_column_width=90), flush=True)
    return {"busy ms": sum(event.time_range.elapsed_us() for event in events) / 1000, "kernels": f"{len(events)}",
            "launches": f"{sum(a.count for a in averages if a.key.startswith(LAUNCHES))}"}


def measure(model, step, samples_of: Callable, n: int, args, device) -> dict:
    batches = [samples_of(model, n, 1000 * n + i) for i in range(args.steps + args.warm_up)]
    step(batches[0])  # compiles
    start_memory(device)
    for batch in batches:  # captures every bucket
        step(batch)
    batches = [redrawn(model, batch, i) for i, batch in enumerate(batches)]
    gc.collect()
    gc.freeze()  # as in train.py
    seconds = step_seconds(lambda i: step(batches[i]), device, args.steps, args.warm_up)
    host = host_seconds(lambda i: step(batches[i]), device, args.steps)
    n_tokens = sum(len(sample.ids) for batch in batches for sample in batch) / len(batches)
    return {"samples": f"{n}", "ms a step": 1000 * seconds, "samples/s": n / seconds, "tokens/s": n_tokens / seconds,
            "host ms": 1000 * host, **profiled(partial(step, batches[-1]), device, args.profile),
            "GiB": peak_gib(device)}


def main(args) -> None:
    device = torch.device(args.device)
    limit_threads(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(hardware(device, matmul_peak(device, dtype)), flush=True)
    set_determinism(True)  # as train.py does
    model = speed_up(random_lavin(args.size, device, dtype).train(), args.bits)
    step = reading_late(our_trainer(model))
    samples_of = random_examples if args.size in ("7B", "13B") else short_examples
    rows = []
    for n in args.samples:
        rows.append({"what": f"{args.size} {args.bits}", **measure(model, step, samples_of, n, args, device)})
        print(report(rows[-1:]), flush=True)
    print(report(rows))


if __name__ == "__main__":
    parser = make_parser(__doc__, size="SmolLM2")
    parser.add_argument("--bits", default="16bit", choices=("16bit", "fp8"))
    parser.add_argument("--samples", default=[8, 16, 32, 64, 128], type=int, nargs="+", help="samples per step")
    parser.add_argument("--steps", default=20, type=int)
    parser.add_argument("--warm_up", default=4, type=int)
    parser.add_argument("--profile", action="store_true", help="list the kernels and the host's operations of a step")
    main(parser.parse_args())
