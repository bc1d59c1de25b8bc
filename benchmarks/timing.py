"""What the benchmarks share: a clock that the GPU keeps, the matmul rate of this hardware, memory, the table of ratios."""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, whatever the working directory
from util.logging import table  # noqa: E402


def mark(device):
    """A moment on the device's own clock, which work that is queued later does not delay."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first, last) -> float:
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1000


def step_seconds(step, device, steps: int, warm_up: int) -> float:
    """Median seconds of step(i), one right after another, after `warm_up` of them."""
    marks = []
    for i in range(warm_up + steps):
        step(i)
        if i >= warm_up - 1:
            marks.append(mark(device))
    return statistics.median(seconds_between(a, b) for a, b in zip(marks, marks[1:]))


def matmul_peak(device, dtype) -> float:
    """FLOP/s of a large square product of fresh random matrices, median of ten."""
    n = 8192 if device.type == "cuda" else 512
    pairs = [[torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)] for _ in range(13)]
    return 2 * n**3 / step_seconds(lambda i: pairs[i][0] @ pairs[i][1], device, 10, 3)


def start_memory(device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")


def hardware(device, peak: float) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, matmul {peak / 1e12:.3g} TFLOP/s"


def report(rows: list[dict]) -> str:
    """Aligned table; a number becomes three or more significant digits."""
    def cell(value):
        return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
