"""Training throughput and memory by the choices made for a V100, on a newer GPU (as_v100.py).

    python benchmarks/v100_throughput.py [--compiler broken]    # 7B on this GPU
    python benchmarks/v100_throughput.py --size tiny            # a smoke test on a CPU, in seconds
"""

import argparse

import torch

import timing  # noqa: F401, first: it extends sys.path

# isort: split
import as_v100

# isort: split
from timing import report
from lavin.runtime.console import summary
from train_throughput import Benchmark, our_trainer, published_trainer

PUBLISHED = "published recipe"
PUBLISHED_PASS = 4  # samples: as published; a pass of 32 would not fit into memory


def main(args) -> None:
    if args.compiler == "broken":
        as_v100.break_compiler()
    bench = Benchmark(args)
    model = bench.model(bench.fp16)
    for n in args.samples:
        bench.measure(PUBLISHED, model, published_trainer(model, PUBLISHED_PASS), n)
    torch.use_deterministic_algorithms(True)  # as train.py does, unlike the published code
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = None
    for n in (2, 4):  # models of their own, since memory that graphs share is counted once
        model = None
        model = bench.model(bench.fp16, "16bit")
        step = our_trainer(model, args.max_tokens)
        bench.measure("ours, 512 tokens each", model, step, n, full=True)
    for n in args.samples:
        bench.measure("ours", model, step, n)
    model.set_gradient_checkpointing(True)
    for n in (1, 4):
        bench.measure("  and gradient checkpointing", model, step, n, full=True)
    print(report([{**row, "ratio": ratio(bench.rows, row)} for row in bench.rows]))


def ratio(rows: list[dict], row: dict) -> float:
    """To the published recipe with as many samples, where it was measured."""
    published = [other["samples/s"] for other in rows
                 if other["what"] == PUBLISHED and other["samples"] == row["samples"]]
    return row["samples/s"] / published[0] if published else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--size", default="7B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="works", choices=["works", "broken"], help="torch.compile and Triton")
    parser.add_argument("--samples", default=[2, 8, 32], type=int, nargs="*", help="per optimizer step")
    parser.add_argument("--max_tokens", default=6000, type=int, help="of one pass")
    parser.add_argument("--steps", default=6, type=int)
    parser.add_argument("--warm_up", default=3, type=int)
    main(parser.parse_args())
