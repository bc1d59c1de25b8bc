"""Training throughput: the published recipe and ours, on random weights and samples of real lengths.

    python -m benchmarks.train_throughput                # 7B on this GPU
    python -m benchmarks.train_throughput --size tiny    # a smoke test on a CPU, in seconds
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import gc
import math
from functools import partial

import torch

from benchmarks.published_recipe import published_loss
from benchmarks.random_lavin import random_examples, random_lavin, redrawn
from benchmarks.timing import (
    hardware,
    make_parser,
    matmul_peak,
    peak_gib,
    print_kernels,
    report,
    start_memory,
    step_seconds,
)
from lavin.fast.speed_up import speed_up
from lavin.runtime.device import set_determinism
from util.training.accumulation import accumulate_gradients, count_answer_tokens
from util.training.optimizer import make_optimizer, make_scaler, optimizer_step
from util.training.throughput import frozen_weights, step_flops


def trained_parameters(model) -> list:
    return [p for p in model.parameters() if p.requires_grad]


def published_trainer(model, pass_size: int = 64):
    """The published training loop: fp16 with loss scaling; reads the loss at every pass of `pass_size` samples."""
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)

    def step(samples):
        passes = [samples[i:i + pass_size] for i in range(0, len(samples), pass_size)]
        losses = []
        for pass_samples in passes:
            loss = published_loss(model, pass_samples, 512) / len(passes)
            scaler.scale(loss).backward()
            losses.append(loss.item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return sum(losses)

    return step


def our_trainer(model, max_tokens: float = math.inf):
    """train.py's optimizer step, with passes of at most `max_tokens`."""
    optimizer = make_optimizer(model, weight_decay=0.02)
    scaler = make_scaler(model)

    def step(samples):
        weight = 1 / count_answer_tokens(samples)
        loss = accumulate_gradients(model, [(sample, weight) for sample in samples], max_tokens, scaler)
        return optimizer_step(optimizer, scaler, optimizer.parameters, loss, None)

    return step


class Benchmark:
    """Measures the rows of the table; ratios are to the first one."""

    def __init__(self, args):
        self.args, self.device, self.rows = args, torch.device(args.device), []
        cuda = self.device.type == "cuda"
        self.bf16, self.fp16 = (torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.float32)
        self.peak = matmul_peak(self.device, self.bf16)
        print(hardware(self.device, self.peak), flush=True)

    def model(self, dtype, bits: str | None = None):
        """A new random model. bits: the argument of `speed_up`; None leaves the model plain."""
        gc.unfreeze()  # so that the previous model is freed
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        model = random_lavin(self.args.size, self.device, dtype).train()
        self.weights = frozen_weights(model)
        return speed_up(model, bits) if bits else model

    def measure(self, what: str, model, step, n: int, full: bool = False) -> None:
        total = self.args.steps + self.args.warm_up
        samples = [random_examples(model, n, 1000 * n + i, full=full) for i in range(total)]
        steps = samples[self.args.warm_up:]
        flops = sum(step_flops(self.weights, step_samples) for step_samples in steps) / len(steps)
        n_tokens = sum(len(sample.ids) for step_samples in steps for sample in step_samples) / len(steps)
        step(samples[0])  # compiles
        gc.collect()
        start_memory(self.device)
        for batch_samples in samples:  # captures every bucket: each keeps the memory that it allocates
            step(batch_samples)
        samples = [redrawn(model, batch_samples, i) for i, batch_samples in enumerate(samples)]
        gc.collect()
        gc.freeze()  # as in train.py
        seconds = step_seconds(lambda i: step(samples[i]), self.device, self.args.steps, self.args.warm_up)
        self.rows.append({
            "what": what, "samples": f"{n}", "ms a step": 1000 * seconds, "samples/s": n / seconds,
            "tokens/s": n_tokens / seconds,
            "of peak": flops / seconds / self.peak, "GiB": peak_gib(self.device),
            "ratio": n / seconds / self.rows[0]["samples/s"] if self.rows else 1.0})
        print(report(self.rows[-1:]), flush=True)


def main(args) -> None:
    bench = Benchmark(args)

    model = bench.model(bench.fp16)
    bench.measure("published recipe, fp16", model, published_trainer(model), 4)
    set_determinism(True)  # as train.py does, unlike the published code
    bench.measure("ours, plain, fp16", model, our_trainer(model), 8)
    model = None
    model = bench.model(bench.fp16, "16bit")
    bench.measure("ours, fp16", model, our_trainer(model), args.samples)
    model = None
    model = bench.model(bench.bf16, "16bit")
    step = our_trainer(model)
    bench.measure("ours, bf16, 512 tokens each", model, step, 4, full=True)
    model.set_gradient_checkpointing(True)
    bench.measure("  and gradient checkpointing", model, step, 4, full=True)
    bench.measure("  and one sample", model, step, 1, full=True)
    model.set_gradient_checkpointing(False)
    bench.measure("ours, bf16", model, step, 8)
    bench.measure("ours, bf16", model, step, args.samples)
    if args.profile:
        print_kernels(partial(step, random_examples(model, args.samples, 7)), bench.device)
    model = step = None
    model = bench.model(bench.bf16, "fp8")
    step = our_trainer(model)
    bench.measure("ours, fp8", model, step, args.samples)
    if args.profile:
        print_kernels(partial(step, random_examples(model, args.samples, 7)), bench.device)
    print(report(bench.rows))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--samples", default=32, type=int, help="samples per step, all in one pass")
    parser.add_argument("--steps", default=10, type=int)
    parser.add_argument("--warm_up", default=4, type=int)
    parser.add_argument("--profile", action="store_true", help="list the kernels of one bf16 and one fp8 step")
    main(parser.parse_args())
