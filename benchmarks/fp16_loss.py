"""fp16 with loss scaling against float32, on a toy base whose residual stream has outliers as large as real LLaMA's.

    python benchmarks/fp16_loss.py [--base weights/toy] [--data_root data/mini]    # both from scripts/quickstart.sh

Both train the same adapters on the same samples, by a V100's choices (as_v100.py). From the second layer on, three
channels of every token hold --outlier, and the norms scale them down: LLaMA has such channels (Dettmers et al. 2022,
arXiv 2208.07339). Exit status 1 where the mean losses differ by more than 1%.
"""

import argparse
import math
import sys
from random import Random

import torch

import timing  # noqa: F401, first: it extends sys.path

# isort: split
import as_v100  # noqa: F401

# isort: split
from timing import report
from lavin.fast.speed_up import speed_up
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN, pack
from lavin.runtime.console import summary
from lavin.runtime.device import choose_device
from lavin.weights.load import load_base
from util.data.datasets import load_scienceqa
from util.data.images import load_images
from util.data.prompts import build_prompt
from util.training.accumulation import accumulate_gradients, count_answer_tokens, with_loss_weights
from util.training.optimizer import make_optimizer, make_scaler, optimizer_step

CHANNELS = [3, 50, 99]
OUTLIER_NORM = 0.02  # the norms' weight in these channels


def inputs_of(norms: list, model: LaVIN, examples: list) -> list[torch.Tensor]:
    """What each norm reads [N, D] in a pass over the examples."""
    found: dict = {}
    hooks = [norm.register_forward_pre_hook(lambda norm, args: found.update({norm: args[0].float()}))
             for norm in norms]
    with torch.no_grad():
        model(pack(examples, device=model.device))
    for hook in hooks:
        hook.remove()
    return [found[norm] for norm in norms]


def add_outliers(model: LaVIN, outlier: float, examples: list) -> None:
    """In place, by a bias of the first layer. The other channels keep their size behind the later norms."""
    llama = model.llama
    bias = torch.zeros(llama.config.dim, device=model.device)
    bias[CHANNELS] = outlier
    norms = [*(norm for block in llama.layers[1:] for norm in (block.attention_norm, block.ffn_norm)), llama.norm]
    for norm, x in zip(norms, inputs_of(norms, model, examples), strict=True):
        squares = x.square().mean()
        norm.weight.data *= ((squares + bias.square().mean()) / squares).sqrt()
        norm.weight.data[CHANNELS] = OUTLIER_NORM
    llama.layers[0].feed_forward.w2.bias = torch.nn.Parameter(bias, requires_grad=False)


def load(args, data, images: dict, dtype: torch.dtype, seed: int) -> tuple[LaVIN, list]:
    """The model, before `speed_up`, and its samples. seed: of the adapters."""
    torch.manual_seed(seed)
    adapter, device = AdapterConfig(dropout_prob=0.0), choose_device(args.device, 0)
    model, tokenizer = load_base("", args.base, f"{args.base}/vit", adapter, device, torch.float32)
    examples = [tokenizer.example(*build_prompt(problem, "QCM-ALE"), images.get(qid), adapter.n_prompt, 512)
                for qid, problem in data.problems.items()]
    add_outliers(model, args.outlier, examples[:64])
    for name, parameter in model.named_parameters():
        if "adapter" not in name:
            parameter.data = parameter.data.to(dtype)
    return model.train(), examples


def train(args, data, images: dict, dtype: torch.dtype, seed: int) -> dict:
    """A row of the table. seed: of the adapters and the order of samples."""
    model, examples = load(args, data, images, dtype, seed)
    largest = inputs_of([model.llama.norm], model, examples[:64])[0].abs().max().item()
    speed_up(model, compile="off")  # compiling would take longer than training
    optimizer = make_optimizer(model, argparse.Namespace(lr=args.lr, weight_decay=0.02))
    scaler = make_scaler(model)
    parameters, steps, rng = [p for p in model.parameters() if p.requires_grad], [], Random(seed)
    for _ in range(args.steps):
        samples = rng.sample(examples, 8)
        weighted = with_loss_weights([samples], count_answer_tokens(samples), "batch", 1)
        loss = accumulate_gradients(model, weighted, math.inf, scaler)
        steps.append(optimizer_step(optimizer, scaler, parameters, loss, None)[:2])
    losses, made = torch.stack(steps).t().tolist()
    return {"what": f"{str(dtype).removeprefix('torch.')}, seed {seed}", "largest activation": largest,
            "first loss": losses[0], "mean loss": sum(losses) / len(losses),
            "of the last 50": sum(losses[-50:]) / len(losses[-50:]),
            "skipped steps": f"{made.count(0.0)}", "loss scale": scaler.get_scale()}


def main(args) -> bool:
    data = load_scienceqa(args.data_root, "train")
    images = load_images(data, args.image_size, 4, False)
    rows = [train(args, data, images, dtype, seed) for seed in range(args.seeds)
            for dtype in (torch.float32, torch.float16)]
    print(report(rows))
    ratio = sum(row["mean loss"] for row in rows[1::2]) / sum(row["mean loss"] for row in rows[::2])
    print(f"the mean loss of fp16 is {ratio:.4f} times float32's")
    return abs(ratio - 1) > 0.01


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--base", default="weights/toy")
    parser.add_argument("--data_root", default="data/mini")
    parser.add_argument("--image_size", default=48, type=int, help="of the base's ViT")
    parser.add_argument("--device")
    parser.add_argument("--outlier", default=400.0, type=float)
    parser.add_argument("--lr", default=9e-3 * 32 / 256, type=float, help="default: the published one")
    parser.add_argument("--steps", default=200, type=int)
    parser.add_argument("--seeds", default=3, type=int, help="runs to average")
    sys.exit(main(parser.parse_args()))
