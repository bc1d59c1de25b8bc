"""GPUs of one host: training and answering on 1, 2 and 4 of them, and one model divided among 2 and 4.

    python benchmarks/scaling.py                                      # 7B on this host's GPUs
    python benchmarks/scaling.py --size tiny --device cpu --processes 1 2   # that everything works, not how fast

Each row is a torchrun of its own. Every process draws the same frozen weights and the same samples of real lengths, the
adapters are those of one seed, and there is no dropout: all rows should train alike and answer alike. "losses differ" is the
largest relative difference to one process in the first steps; "adapters differ" is that of all trained parameters after
them, which is larger, since AdamW makes steps of full size of gradients that are no more than rounding.
"""

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

from timing import peak_gib, report, start_memory, step_seconds  # first: it finds the project
import eval as evaluation
import train
from eval_throughput import RandomTokenizer, questions
from random_lavin import SIZES, random_examples
from lavin import parallel
from lavin.checkpoint import frozen_places, place_weights
from lavin.fast import speed_up
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.precision import choose_device
from lavin.vision import timm
from util.logging import is_first

EFFECTIVE = 32


class Drawn(Mapping):
    """Random frozen weights, each of a seed of its own: the same in every process."""

    def __init__(self, places: dict, device):
        self.shapes, self.device = {name: shape for name, (_, shape) in places.items()}, device

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, name):
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(self.shapes[name], device=self.device).normal_(float("norm" in name), 0.02, generator=generator)


def drawn_lavin(size: str, device, dtype) -> LaVIN:
    """Whole, or this process's part of it where processes share a model."""
    config, vit = SIZES[size]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LaVIN(config, timm.create_model(num_classes=0, **vit), AdapterConfig(dropout_prob=0.0))
    tensors = Drawn(frozen_places(model.llama), device)
    if parallel.model_size > 1:
        from lavin.tensor_parallel import OwnParts, divide
        divide(model)
        tensors = OwnParts(tensors)
    place_weights(model.llama, frozen_places(model.llama), tensors, "random", device, dtype)
    vit_places = frozen_places(model.vision.vit)
    place_weights(model.vision.vit, vit_places, Drawn(vit_places, device), "random", device, dtype)
    return speed_up(model.to(device))


def training(args, model, rank: int, world: int) -> dict:
    """Losses and adapters of the first steps; samples/s at the effective batch, and at that batch on every GPU."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = train.make_optimizer(model, argparse.Namespace(lr=1e-3, weight_decay=0.02))
    scaler = torch.amp.GradScaler(model.device.type, enabled=False)

    def step(everyone) -> torch.Tensor:
        """train.py's, of samples that all processes know and share out."""
        pairs = train.weigh([everyone[rank::world]], train.answer_tokens(everyone), "batch", world)
        loss = train.accumulate(model, pairs, math.inf, scaler)
        return train.optimizer_step(optimizer, scaler, parameters, loss, None)[0]

    losses = torch.stack([step(random_examples(model, EFFECTIVE, i)) for i in range(args.steps)])
    adapters = torch.cat([p.detach().flatten() for p in parameters]).cpu()
    start_memory(model.device)
    rates = []
    for n in (EFFECTIVE, EFFECTIVE * world):
        samples = [random_examples(model, n, 100 + i) for i in range(args.warm_up + args.repeats)]
        rates.append(n / step_seconds(lambda i: step(samples[i]), model.device, args.repeats, args.warm_up))
    zero = torch.zeros((), device=model.device)
    summing = step_seconds(lambda i: parallel.sum_gradients(parameters, zero), model.device, args.repeats, 2)
    return {"losses": losses.cpu(), "adapters": adapters, "rates": rates, "sum": summing, "GiB": peak_gib(model.device)}


def answering(args, model) -> dict:
    """Questions/s of all processes, and every question's answer."""
    tokenizer = RandomTokenizer(model.llama.config.vocab_size)
    flags = argparse.Namespace(prompt_format="QCM-ALE", max_seq_len=512, max_batch_size=64, seed=0, top_p=0.75,
                               generation_temperature=0.0, decode="score")
    predictions = {}
    for seed, n in ((1, 128), (0, args.questions)):  # the first compiles
        asked = questions(model, n, seed)
        parallel.of_all(None)  # all begin together
        start = time.perf_counter()
        shares = parallel.gather(evaluation.answer_questions(model.eval(), tokenizer, *asked, flags))
        seconds = time.perf_counter() - start
        predictions = {answer["qid"]: answer["prediction"] for share in shares for answer in share}
    return {"rate": args.questions / seconds, "predictions": predictions}


def work(args) -> None:
    """One of the processes of a row."""
    rank, world, local_rank = parallel.init(args.shared)
    device = choose_device(args.device, local_rank)
    model = drawn_lavin(args.size, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    answers = answering(args, model)  # before training: of the same adapters in all rows
    results = {**training(args, model, rank, world), **answers}
    if is_first():
        torch.save(results, args.out)
    parallel.close()


def measure(args, processes: int, shared: int) -> dict:
    """A row's results, from a torchrun of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.pt"
        flags = [f"--{name}={value}" for name, value in vars(args).items() if name != "processes" and value is not None]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                        __file__, *flags, f"--out={out}", f"--shared={shared}"], check=True)
        return torch.load(out)


def main(args) -> None:
    rows, first = [], None
    plans = [(n, 1) for n in args.processes] + [(n, n) for n in args.processes if n > 1]
    for processes, shared in plans:
        seen = measure(args, processes, shared)
        first = first or seen
        rows.append({
            "what": f"{processes} share one model" if shared > 1 else f"{processes}, a model each",
            f"samples/s, {EFFECTIVE} a step": seen["rates"][0], "ratio": seen["rates"][0] / first["rates"][0],
            f"{EFFECTIVE} a model": seen["rates"][1], "ratio ": seen["rates"][1] / first["rates"][1],
            "sum of gradients, ms": 1000 * seen["sum"], "questions/s": seen["rate"], "ratio  ": seen["rate"] / first["rate"],
            "GiB": seen["GiB"],
            "losses differ": f"{((seen['losses'] - first['losses']).abs() / first['losses']).max():.1e}",
            "adapters differ": f"{(seen['adapters'] - first['adapters']).norm() / first['adapters'].norm():.1e}",
            "answers differ": f"{sum(seen['predictions'][qid] != p for qid, p in first['predictions'].items())}"})
        print(report(rows[-1:]), flush=True)
    print(report(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="7B", choices=SIZES)
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", default=20, type=int, help="whose losses are compared")
    parser.add_argument("--repeats", default=8, type=int)
    parser.add_argument("--warm_up", default=3, type=int)
    parser.add_argument("--questions", default=1024, type=int)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--shared", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work(args) if args.out else main(args)
