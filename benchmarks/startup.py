"""How long a run takes from the model in memory to its tenth step, without and with what an earlier run compiled.

    python benchmarks/startup.py                        # 7B on this GPU
    python benchmarks/startup.py --size tiny --steps 2  # a smoke test on a CPU

Each row is a process of its own, both with one new folder for compiled kernels. "first pass" compiles on one sample,
"probe" measures the memory a token takes, and the steps capture a CUDA graph for each new size.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from timing import report  # first: it extends sys.path

# isort: split
import train  # noqa: F401, sets CUDA's environment variables
from lavin.fast.speed_up import speed_up
from lavin.runtime.console import summary
from lavin.runtime.files import read_json, write_json
from random_lavin import random_examples, random_lavin
from train_throughput import our_trainer
from util.training.accumulation import accumulate_gradients, probe_max_tokens
from util.training.optimizer import make_scaler

SAMPLES = 32  # a step


def measure(args) -> dict[str, float]:
    """Seconds of each part."""
    device = torch.device(args.device)
    torch.use_deterministic_algorithms(True)  # as train.py does
    torch.utils.deterministic.fill_uninitialized_memory = False
    model = random_lavin(args.size, device, torch.bfloat16 if device.type == "cuda" else torch.float32).train()
    scaler = make_scaler(model)
    examples = random_examples(model, 400, 0)
    marks = [time.perf_counter()]

    def mark() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    speed_up(model, args.bits)
    mark()
    accumulate_gradients(model, [(max(examples, key=lambda example: len(example.ids)), 0.0)], float("inf"), scaler)
    mark()
    probe_max_tokens(model, examples, scaler)
    model.zero_grad()
    mark()
    step = our_trainer(model)
    for i in range(args.steps):
        step(random_examples(model, SAMPLES, i + 1))
    mark()
    parts = ("speed_up", "first pass", "probe", f"{args.steps} steps")
    return {**dict(zip(parts, (b - a for a, b in zip(marks, marks[1:], strict=False)), strict=True)),
            "all": marks[-1] - marks[0]}


def main(args) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        out = Path(folder) / "seconds.json"
        for cache in ("empty", "warm"):
            flags = [f"--{name}={value}" for name, value in vars(args).items() if name != "out"]
            subprocess.run([sys.executable, __file__, *flags, f"--out={out}"], check=True, env=os.environ | caches)
            rows.append({"cache": cache, **{f"{part}, s": seconds for part, seconds in read_json(out).items()}})
            print(report(rows[-1:]), flush=True)
    print(report(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--size", default="7B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", default="16bit", choices=["16bit", "fp8"])
    parser.add_argument("--steps", default=10, type=int)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    write_json(Path(args.out), measure(args)) if args.out else main(args)
