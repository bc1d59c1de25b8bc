"""GPU memory and speed of LaVIN-lite: the weights, and training steps of one sample of 512 tokens with a picture.

    python benchmarks/lite_memory.py --size 7B --bits 4bit     # a GPU; 13B too
    python benchmarks/lite_memory.py --size tiny               # a smoke test on a CPU, which measures no memory

Random weights are generated and quantized one tensor at a time, as train.py loads its files.
"""

import argparse

import torch

from timing import peak_gib, report, start_memory, step_seconds  # first: it extends sys.path

# isort: split
from lavin.fast.speed_up import can_speed_up, speed_up
from lavin.runtime.console import summary
from lavin.runtime.device import DTYPES, choose_dtype
from lavin.weights.quantization import weight_bytes
from random_lavin import SIZES, random_examples, random_lavin
from train_throughput import our_trainer

WARM_UP = 3  # steps: the first compiles, the second captures


def main(args) -> None:
    device = torch.device(args.device)
    dtype = choose_dtype(args.precision, device)
    gib = weight_bytes(random_lavin(args.size, "meta", dtype, bits=args.bits)) / 2**30
    start_memory(device)
    model = random_lavin(args.size, device, dtype, bits=args.bits).train()
    rows = [{"what": "weights and adapters, counted", "GiB": gib, "ms a sample": ""},
            {"what": "  as held", "GiB": weight_bytes(model) / 2**30, "ms a sample": ""},
            {"what": "  at most while loading", "GiB": peak_gib(device), "ms a sample": ""}]
    samples = random_examples(model, 1, seed=0, full=True)
    for fast in (False, True) if can_speed_up(model.llama.layers[0].attention.wq) else (False,):
        if fast:
            speed_up(model, args.bits)
        for recompute in (True, False):
            start_memory(device)
            model.set_gradient_checkpointing(recompute)
            step = our_trainer(model)
            seconds = step_seconds(lambda _, step=step: step(samples), device, args.steps, WARM_UP)
            what = f"training, {'as train.py does' if fast else 'plain'}" + ", gradient checkpointing" * recompute
            rows.append({"what": what, "GiB": peak_gib(device), "ms a sample": 1000 * seconds})
            print(report(rows[-1:]), flush=True)
    print(f"{args.size}, {args.bits}, {dtype}")
    print(report(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--size", default="7B", choices=SIZES)
    parser.add_argument("--bits", default="4bit", choices=["16bit", "8bit", "4bit"])
    parser.add_argument("--precision", default="auto", choices=["auto", *DTYPES],
                        help="fp16: what GPUs before Ampere use")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", default=3, type=int)
    main(parser.parse_args())
