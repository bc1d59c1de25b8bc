"""Training throughput: the published recipe and ours, in one run, on random weights and real lengths.

    python benchmarks/train_throughput.py                # 7B on this GPU
    python benchmarks/train_throughput.py --size tiny    # seconds on a CPU: that everything works, not how fast
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from published_recipe import published_loss  # noqa: E402
from random_lavin import random_examples, random_lavin  # noqa: E402
from lavin.model import pack  # noqa: E402
from util.logging import table  # noqa: E402


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_peak(device, dtype) -> float:
    """FLOP/s of a large square product of fresh random matrices, median of ten."""
    n = 8192 if device.type == "cuda" else 512
    seconds = []
    for _ in range(13):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[3:])


def frozen_flops(model, batch) -> float:
    """Arithmetic of one step that no implementation can leave out: forward and input gradient of the frozen matrices.

    4 x parameters x tokens, for LLaMA's layers at every token, its head at answer tokens, the ViT at patch positions.
    """
    weights = lambda module: sum(p.numel() for name, p in module.named_parameters()  # noqa: E731
                                 if p.ndim > 1 and "adapter" not in name)
    tokens, pictures = sum(batch.lengths), 0 if batch.images is None else len(batch.images)
    patches = model.vision.vit.pos_embed.shape[1]
    return 4 * (weights(model.llama.layers) * tokens + model.llama.output.weight.numel() * len(batch.target)
                + weights(model.vision.vit.blocks) * patches * pictures)


def time_steps(step, draw, device, steps: int, warm_up: int) -> tuple[float, float]:
    """Median seconds of `step(samples)` on fresh samples, and peak memory in GiB."""
    seconds = []
    for i in range(warm_up + steps):
        samples = draw(i)
        if i == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        step(samples)
        synchronize(device)
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return statistics.median(seconds), peak


def report(rows: list[dict], peak: float) -> str:
    base = rows[0]["samples_per_s"]
    return table(["what", "samples", "ms a step", "samples/s", "tokens/s", "of peak", "GiB", "ratio"],
                 [[row["what"], row["n"], f"{1000 * row['seconds']:.0f}", f"{row['samples_per_s']:.1f}",
                   f"{row['tokens'] / row['seconds']:.0f}", f"{row['flops'] / row['seconds'] / peak:.2f}",
                   f"{row['gib']:.1f}", f"{row['samples_per_s'] / base:.2f}"] for row in rows])


def trainer(model, loss_of, parameters):
    """One optimizer step on a list of samples."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02, fused=True)

    def step(samples):
        loss_of(samples).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops_of(model, draw) -> tuple[float, float]:
    batches = [pack(draw(i)) for i in range(8)]
    return (statistics.mean(frozen_flops(model, b) for b in batches), statistics.mean(sum(b.lengths) for b in batches))


def main(args) -> None:
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    bf16 = torch.bfloat16 if cuda else torch.float32
    fp16 = torch.float16 if cuda else torch.float32
    peak = matmul_peak(device, bf16)
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}: matmul {peak / 1e12:.0f} TFLOP/s")
    rows = []

    def measure(what, model, loss_of, n, full=False):
        parameters = [p for p in model.parameters() if p.requires_grad]
        draw = lambda i: random_examples(model, n, 1000 * n + i, full=full)  # noqa: E731
        flops, tokens = flops_of(model, draw)
        cache = {i: draw(i) for i in range(args.steps + args.warm_up)}
        seconds, gib = time_steps(trainer(model, loss_of, parameters), cache.get, device, args.steps, args.warm_up)
        rows.append({"what": what, "n": n, "seconds": seconds, "samples_per_s": n / seconds, "tokens": tokens,
                     "flops": flops, "gib": gib})
        print(report(rows[-1:] if len(rows) == 1 else [rows[0], rows[-1]], peak), flush=True)
        for p in parameters:
            p.grad = None

    def mean_loss(model):
        def loss_of(samples):
            batch = pack(samples).to(device)
            return model(batch) / len(batch.target)
        return loss_of

    model = random_lavin(args.size, device, fp16)
    model.train()
    measure("published recipe, fp16", model, lambda samples: published_loss(model, samples, 512), 4)
    del model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    model = random_lavin(args.size, device, bf16).train()
    measure("ours, plain", model, mean_loss(model), 8)
    from lavin.fast import speed_up
    speed_up(model)
    for n, full in ((4, True), (16, False), (32, False)):
        measure("ours, fast" + (", full" if full else ""), model, mean_loss(model), n, full)
    if args.profile:
        from torch.profiler import ProfilerActivity, profile
        step = trainer(model, mean_loss(model), [p for p in model.parameters() if p.requires_grad])
        samples = random_examples(model, 32, 7)
        step(samples)
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            step(samples)
            synchronize(device)
        print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))
    print(report(rows, peak))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="7B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", default=10, type=int)
    parser.add_argument("--warm_up", default=4, type=int)
    parser.add_argument("--profile", action="store_true")
    main(parser.parse_args())
