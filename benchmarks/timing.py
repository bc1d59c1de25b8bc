"""Shared by the benchmarks: their flags, timing with CUDA events, peak matmul rate, peak memory, the printed table."""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.random_lavin import SIZES
from lavin.runtime.console import format_table, summary


def make_parser(doc: str | None, size: str = "7B") -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have. doc: the module's docstring. size: the default of --size."""
    parser = argparse.ArgumentParser(description=summary(doc))
    parser.add_argument("--size", default=size, choices=SIZES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def mark(device):
    """A timestamp in the device's stream: a CUDA event, or on a CPU the time in seconds."""
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
    """Median seconds per step(i), run back to back, after `warm_up` untimed steps."""
    marks = []
    for i in range(warm_up + steps):
        step(i)
        if i >= warm_up - 1:
            marks.append(mark(device))
    return statistics.median(seconds_between(a, b) for a, b in pairwise(marks))


def matmul_peak(device, dtype) -> float:
    """FLOP/s of a large square matmul: median of ten, each of other random matrices."""
    n = 8192 if device.type == "cuda" else 512
    pairs = [[torch.randn(n, n, device=device, dtype=dtype) for _ in range(2)] for _ in range(13)]
    return 2 * n**3 / step_seconds(lambda i: pairs[i][0] @ pairs[i][1], device, 10, 3)


def print_kernels(run: Callable[[], object], device) -> None:
    """Calls it twice and prints the GPU's kernels of the second time."""
    from torch.profiler import ProfilerActivity, profile
    if device.type != "cuda":
        return
    run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90), flush=True)


def start_memory(device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")


def hardware(device, peak: float) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, matmul {peak / 1e12:.3g} TFLOP/s"


def report(rows: list[dict]) -> str:
    """An aligned table; numbers with three or more significant digits."""
    def cell(value):
        return value if isinstance(value, str) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return format_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
