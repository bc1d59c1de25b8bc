"""Scaling on one host: training and evaluation on 1, 2 and 4 GPUs, and one model sharded over 2 and 4.

    python -m benchmarks.scaling                                            # 7B on this host's GPUs
    python -m benchmarks.scaling --size tiny --device cpu --processes 1 2   # a smoke test

Each row is a separate torchrun. All processes generate the same frozen weights, adapters and samples, and there is no
dropout, so all rows should give the same losses and answers, up to rounding. "losses differ" is the largest relative
difference to one process in the first steps. "adapters differ" is the relative difference of all trained parameters
after these steps; it is larger, since AdamW takes full-size steps even where a gradient is only rounding error.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import argparse
import math
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.eval_throughput import RandomTokenizer, answer_all, questions
from benchmarks.random_lavin import SIZES, random_examples, redrawn
from benchmarks.timing import make_parser, peak_gib, report, start_memory, step_seconds
from lavin.fast.speed_up import speed_up
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.runtime import distributed
from lavin.runtime.console import is_main_process
from lavin.runtime.device import choose_device
from lavin.timm_compat import timm
from lavin.weights.load import frozen_parameters, load_frozen
from util.data.batches import balanced_parts
from util.evaluation.answers import predictions_of
from util.evaluation.settings import Answering
from util.training.accumulation import accumulate_gradients, count_answer_tokens
from util.training.optimizer import make_optimizer, optimizer_step
from util.training.throughput import frozen_weights, step_flops

EFFECTIVE_BATCH = 32


class RandomTensors(Mapping):
    """Maps names to random frozen weights, each seeded by its name, so that all processes get the same."""

    def __init__(self, parameters: dict, device):
        self.shapes, self.device = {name: shape for name, (_, shape) in parameters.items()}, device

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, name):
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.empty(self.shapes[name], device=self.device)
        return weight.normal_(float("norm" in name), 0.02, generator=generator)


def seeded_lavin(size: str, device, dtype) -> LaVIN:
    """The whole model, or this process's shard of it."""
    config, vit = SIZES[size]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LaVIN(config, timm.create_model(num_classes=0, **vit), AdapterConfig(dropout_prob=0.0))
    tensors: Mapping = RandomTensors(frozen_parameters(model.llama), device)
    if distributed.model_parallel_size > 1:
        from lavin.weights.tensor_parallel import ShardedTensors, shard_model
        shard_model(model)
        tensors = ShardedTensors(tensors)
    load_frozen(model.llama, frozen_parameters(model.llama), tensors, "random", device, dtype)
    vit_parameters = frozen_parameters(model.vision.vit)
    load_frozen(model.vision.vit, vit_parameters, RandomTensors(vit_parameters, device), "random", device, dtype)
    return speed_up(model.to(device))


def measure_training(args, model, rank: int, world: int) -> dict:
    """Losses and adapters of the first steps; samples/s at the effective batch, and at that batch on each GPU."""
    optimizer = make_optimizer(model.train(), weight_decay=0.02)
    parameters = optimizer.parameters
    scaler = torch.amp.GradScaler(model.device.type, enabled=False)
    weights = frozen_weights(model)

    def step(global_batch) -> torch.Tensor:
        """train.py's optimizer step on this rank's share of the batch."""
        part = balanced_parts([step_flops(weights, [sample]) for sample in global_batch], world)[rank]
        weight = 1 / count_answer_tokens(global_batch)
        loss = accumulate_gradients(model, [(global_batch[i], weight) for i in part], math.inf, scaler)
        return optimizer_step(optimizer, scaler, parameters, loss, None)[0]

    losses = torch.stack([step(random_examples(model, EFFECTIVE_BATCH, i)) for i in range(args.steps)])
    adapters = torch.cat([p.detach() for p in parameters]).cpu()
    start_memory(model.device)
    rates = []
    for n in (EFFECTIVE_BATCH, EFFECTIVE_BATCH * world):
        samples = [random_examples(model, n, 100 + i) for i in range(args.warm_up + args.repeats)]
        for global_batch in samples:  # captures every bucket
            step(global_batch)
        samples = [redrawn(model, global_batch, i) for i, global_batch in enumerate(samples)]
        seconds = step_seconds(lambda i, s=samples: step(s[i]), model.device, args.repeats, args.warm_up)
        rates.append(n / seconds)
    zero = torch.zeros(1, device=model.device)
    all_reduce = step_seconds(lambda i: distributed.all_reduce_gradients(parameters, zero), model.device, args.repeats,
                              warm_up=2)
    return {"losses": losses.cpu(), "adapters": adapters, "rates": rates, "all_reduce": all_reduce,
            "GiB": peak_gib(model.device)}


def measure_evaluation(args, model) -> dict:
    """Questions/s of all processes together, and the prediction for every question."""
    tokenizer = RandomTokenizer(model.llama.config.vocab_size)
    answering = Answering(decode="score")
    predictions: dict[str, int] = {}
    for seed, n in ((1, 128), (0, args.questions)):  # the first compiles
        test_set = questions(model, n, seed)
        distributed.all_gather_object(None)  # a barrier
        start = time.perf_counter()
        local_answers = answer_all(model.eval(), tokenizer, test_set, answering, *distributed.init()[:2])
        gathered = distributed.gather_data_parallel(local_answers)
        seconds = time.perf_counter() - start
        predictions = predictions_of(answer for answers in gathered for answer in answers)
    return {"rate": args.questions / seconds, "predictions": predictions}


def work(args) -> None:
    """Runs in each process of a row: measures, and rank 0 saves the results to args.out."""
    rank, world, local_rank = distributed.init(args.shared)
    device = choose_device(args.device, local_rank)
    model = seeded_lavin(args.size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    evaluated = measure_evaluation(args, model)  # before training, while the adapters are the same in all rows
    results = {**measure_training(args, model, rank, world), **evaluated}
    if is_main_process():
        torch.save(results, args.out)
    distributed.close()


def measure(args, processes: int, shared: int) -> dict:
    """A row's results, from a separate torchrun. shared: processes that share one model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.pt"
        flags = [f"--{name}={value}" for name, value in vars(args).items()
                 if name != "processes" and value is not None]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc_per_node", str(processes),
                        "-m", "benchmarks.scaling", *flags, f"--out={out}", f"--shared={shared}"], check=True)
        return torch.load(out)


def main(args) -> None:
    rows, first = [], None
    layouts = [(n, 1) for n in args.processes] + [(n, n) for n in args.processes if n > 1]
    for processes, shared in layouts:
        results = measure(args, processes, shared)
        first = first or results
        rows.append({
            "what": f"one model on {processes}" if shared > 1 else f"{processes}, a model each",
            f"samples/s, {EFFECTIVE_BATCH} a step": results["rates"][0],
            "ratio": results["rates"][0] / first["rates"][0],
            f"{EFFECTIVE_BATCH} a model": results["rates"][1], "ratio ": results["rates"][1] / first["rates"][1],
            "all-reduce, ms": 1000 * results["all_reduce"],
            "questions/s": results["rate"], "ratio  ": results["rate"] / first["rate"], "GiB": results["GiB"],
            "losses differ": f"{((results['losses'] - first['losses']).abs() / first['losses']).max():.1e}",
            "adapters differ": f"{(results['adapters'] - first['adapters']).norm() / first['adapters'].norm():.1e}",
            "answers differ": f"{sum(results['predictions'][qid] != p for qid, p in first['predictions'].items())}"})
        print(report(rows[-1:]), flush=True)
    print(report(rows))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", default=20, type=int, help="steps whose losses are compared")
    parser.add_argument("--repeats", default=8, type=int)
    parser.add_argument("--warm_up", default=3, type=int)
    parser.add_argument("--questions", default=1024, type=int)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work(args) if args.out else main(args)
