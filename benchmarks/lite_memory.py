"""GPU memory of LaVIN-lite: the weights, and training steps of one sample of 512 tokens with a picture.

    python benchmarks/lite_memory.py --size 7B --bits 4bit     # a GPU; 13B too
    python benchmarks/lite_memory.py --size tiny               # a smoke test on a CPU, which measures no memory

Random weights are generated and quantized one tensor at a time, as train.py loads its files.
"""

import argparse

import torch

from timing import peak_gib, report, start_memory  # first: it extends sys.path

# isort: split
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.runtime.console import summary
from lavin.runtime.device import DTYPES, choose_dtype
from lavin.timm_compat import timm
from lavin.weights.load import frozen_parameters, load_frozen_tensor, quantize_model
from lavin.weights.quantization import weight_bytes
from random_lavin import SIZES, random_examples
from train_throughput import our_trainer


def random_lite(size: str, bits: str, device, dtype) -> LaVIN:
    """LaVIN with random weights on `device`; on `meta`, only the shapes and dtypes."""
    config, vit = SIZES[size]
    with torch.device("meta"):
        model = LaVIN(config, timm.create_model(num_classes=0, **vit), AdapterConfig())
    parameters = frozen_parameters(model)
    if bits != "16bit":
        quantize_model(model, bits)
    for full_name, shape in parameters.values():
        owner, _, name = full_name.rpartition(".")
        weight = torch.empty(shape, device=device, dtype=dtype).normal_(float("norm" in full_name), 0.02)
        load_frozen_tensor(model.get_submodule(owner), name, weight, device, dtype)
    return model.to(device)


def main(args) -> None:
    device = torch.device(args.device)
    dtype = choose_dtype(args.precision, device)
    gib = weight_bytes(random_lite(args.size, args.bits, "meta", dtype)) / 2**30
    start_memory(device)
    model = random_lite(args.size, args.bits, device, dtype).train()
    rows = [{"what": "weights and adapters, counted", "GiB": gib},
            {"what": "  as held", "GiB": weight_bytes(model) / 2**30},
            {"what": "  at most while loading", "GiB": peak_gib(device)}]
    for recompute in (True, False):
        start_memory(device)
        model.set_gradient_checkpointing(recompute)
        step = our_trainer(model)
        losses = [step(random_examples(model, 1, seed=0, full=True))[0].item() for _ in range(args.steps)]
        rows.append({"what": "training" + ", gradient checkpointing" * recompute, "GiB": peak_gib(device)})
        print(f"losses of {len(losses)} steps on one sample:", *(f"{loss:.3f}" for loss in losses))
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
