"""Compiles every Triton kernel for GPUs of several compute capabilities, by one of each minor version of Triton from
that of torch 2.6 on. It needs no GPU and runs no kernel; each version is a download of 200 MB from PyPI.

    python benchmarks/triton_versions.py                    # exits with status 1 where a kernel does not compile
    python benchmarks/triton_versions.py --versions 3.6.0

The operators are called on tensors without memory (torch's FakeTensorMode), in 7B's shapes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from timing import report  # first: it extends sys.path

# isort: split
from lavin.kernels import flash_attention, fused_ops, kv_cache, single_row
from lavin.kernels.fp8 import FP8_DTYPE
from lavin.runtime import device
from lavin.runtime.console import summary
from lavin.runtime.errors import first_line

VERSIONS = ["3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0"]
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (12, 0)]  # A100, L40, H100, and RTX 50, which torch 2.6 does not know yet
N, D, H, HEADS, HEAD_DIM, RANK = 300, 4096, 11008, 32, 128, 8  # tokens; the others are 7B's


def calls(dtype: torch.dtype, fp8: bool) -> Iterator[tuple]:
    """(operator, its arguments), for every operator with a kernel. fp8: for those that take or give fp8."""
    new = partial(torch.empty, device="cuda", dtype=dtype)
    rows, heads, lengths = new(N, 2 * H), new(N, HEADS, HEAD_DIM), new(5, dtype=torch.int32)
    angles, positions, lse = (new(shape, dtype=kind) for shape, kind in (
        ((N, 1, HEAD_DIM), torch.float32), ((N,), torch.int64), ((HEADS, N), torch.float32)))
    weight = new(2 * H, D, dtype=FP8_DTYPE if fp8 else dtype)
    scale = new(2 * H, 1, dtype=torch.float32) if fp8 else None
    yield fused_ops.swiglu, rows, fp8
    yield fused_ops.swiglu_backward, rows, new(N, H), fp8
    yield fused_ops.qkv_rope_backward, heads, heads, heads, angles, angles, fp8
    yield single_row.gemv, new(1, D), weight, scale
    yield single_row.gemv_swiglu, new(1, D), weight, scale, None
    if not fp8:
        cache, one = new(4, HEADS, 640, HEAD_DIM), new(4, HEADS, HEAD_DIM)
        numbers = new(1, 2, dtype=torch.float32), new(2, 2, dtype=torch.float32)
        yield single_row.gemv_swiglu, new(1, D), weight, scale, new(2 * H)
        yield single_row.norm_adapter, new(1, D), new(D), 1e-6, *numbers, new(RANK, D), new(RANK), new(D, 24)
        yield flash_attention.flash_attention, heads, heads, heads, lengths, 200
        yield flash_attention.flash_attention_backward, heads, heads, heads, lengths, 200, heads, lse, heads
        yield kv_cache.fill_cache, cache, cache, heads, heads, positions, positions
        yield kv_cache.decode_attention, one, one, one, cache, cache, new(4, dtype=torch.int64)


def triton_version() -> tuple[int, ...]:
    import triton
    return tuple(map(int, triton.__version__.split(".")[:2]))


def launches(capability: tuple[int, int]) -> list[tuple]:
    """(kernel, arguments, keyword arguments) of all operators on a GPU of this compute capability."""
    from triton.runtime.jit import JITFunction
    found: list[tuple] = []

    def record(kernel, grid):
        return lambda *args, **kwargs: found.append((kernel, args, kwargs))

    kinds = [(torch.bfloat16, False), (torch.float16, False), *[(torch.bfloat16, True)] * (capability >= (8, 9))]
    cuda = "13.0" if triton_version() >= (3, 5) else "12.8"  # with which torch has such a Triton
    device.pdl_options.cache_clear()
    with FakeTensorMode(), patch.object(JITFunction, "__getitem__", record), \
            patch.object(torch.version, "cuda", cuda), patch.object(device, "compute_capability", lambda _: capability):
        for dtype, fp8 in kinds:
            for operator, *inputs in calls(dtype, fp8):
                n = len(found)
                operator._init_fn(*inputs)  # the function itself: torch would call the operator's fake
                assert len(found) > n, f"{operator} launched nothing"
    return found


class NoGPU:
    """In place of Triton's driver: all that compiling asks of it."""

    def __init__(self, capability: tuple[int, int]):
        from triton.backends.compiler import GPUTarget
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return f"a GPU of {self.target.arch}"  # kernels are kept by device

    def get_current_stream(self, device) -> int:
        return 0


def compile_kernel(kernel, args: tuple, kwargs: dict[str, Any]) -> None:
    """As a launch does, up to the machine code."""
    kernel.warmup(*(value.dtype if isinstance(value, torch.Tensor) else value for value in args), grid=(1,), **kwargs)


def compile_all() -> int:
    """With the Triton that can be imported. Returns the number of kernels that do not compile."""
    from triton.runtime import driver
    n_failed = 0
    for capability in CAPABILITIES[:-1] if triton_version() == (3, 2) else CAPABILITIES:
        found, errors = launches(capability), []
        driver.set_active(NoGPU(capability))
        for kernel, args, kwargs in found:
            try:
                compile_kernel(kernel, args, kwargs)
            except Exception as error:  # Triton raises exceptions of many kinds
                errors.append(f"{kernel.__name__}: {first_line(error)}")
        n_failed += len(errors)
        n_pdl = sum(kwargs.get("USE_PDL", False) for _, _, kwargs in found)
        where = "Triton {}.{}, compute capability {}.{}".format(*triton_version(), *capability)
        print(f"{where}: {len(found)} launches, {n_pdl} of them by PDL, {len(errors)} do not compile",
              *errors, sep="\n  ", flush=True)
    return n_failed


def main(args) -> int:
    rows = []
    for version in args.versions:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder,
                            f"triton=={version}"], check=True)
            paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
            ended = subprocess.run([sys.executable, __file__, "--versions"],
                                   env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": f"{folder}/cache"})
        rows.append({"Triton": version, "": "all compile" if ended.returncode == 0 else "FAILED"})
    print(report(rows))
    return sum(row[""] == "FAILED" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--versions", nargs="*", default=VERSIONS, help="none: the Triton that is installed")
    args = parser.parse_args()
    sys.exit((main(args) if args.versions else compile_all()) > 0)
