"""Training steps of public packages beside ours, on random LLaMA weights and samples of the same lengths.

    python -m benchmarks.peers                                # 7B on this GPU: all rows whose packages are there
    python -m benchmarks.peers --rows "ours, bf16" "Liger"    # the rows whose names contain one of these
    python -m benchmarks.peers --size tiny --samples 4        # a smoke test on a CPU

Theirs train LoRA of rank 8 on the queries' and values' matrices, text only; ours trains all adapters. Each row is a
process of its own. Ratios are to the best row of theirs with the same precision.
"""

from lavin.runtime.startup import prepare_cuda, prepare_imports

if __name__ == "__main__":
    prepare_imports()
    prepare_cuda()

import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.random_lavin import random_examples, random_lavin, redrawn
from benchmarks.timing import hardware, make_parser, matmul_peak, peak_gib, report, start_memory, step_seconds
from benchmarks.train_throughput import our_trainer
from benchmarks.transformers_llama import transformers_llama
from lavin.fast.speed_up import speed_up
from lavin.runtime.arithmetic import round_up
from lavin.tokenizer import Example

ROOT = Path(__file__).parents[1]
SECONDS = 400  # after which a row is ended
OUTPUT = "row: "  # begins the line of a row's numbers


# --- Rows: each makes a function that takes the samples of a step ---

def ours(args, bits: str) -> Callable:
    model = random_lavin(args.size, args.device, args.dtype).train()
    return our_trainer(speed_up(model, bits))


def peers_model(args, liger: bool, fp8: bool, compiled: bool, attention: str):
    """LLaMA of transformers with LoRA of peft."""
    from peft import LoraConfig, get_peft_model
    model = transformers_llama(args.size, args.device, args.dtype, attention)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        # Liger's loss alone where layers are compiled: Inductor fuses the rest
        apply_liger_kernel_to_llama(rope=not compiled, rms_norm=not compiled, swiglu=not compiled, model=model)
    if fp8:
        from torchao.float8 import convert_to_float8_training
        convert_to_float8_training(model.model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)).train()
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.compile()
    return model


def peers_optimizer(model) -> Callable:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.95),
                                  fused=True)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()
    return step


def answer_labels(sample: Example) -> list[int]:
    """The ids of the answer, and -100, which the loss leaves out, in place of the prompt's."""
    return [-100] * sample.answer_start + list(sample.ids[sample.answer_start:])


def padded(args) -> Callable:
    """Micro-batches of 8 samples, which are padded to their longest."""
    model = peers_model(args, False, False, False, "sdpa")
    optimizer_step = peers_optimizer(model)

    def step(samples: list[Example]) -> None:
        for start in range(0, len(samples), 8):
            chunk = samples[start:start + 8]
            longest = max(len(sample.ids) for sample in chunk)
            padding = [[0] * (longest - len(sample.ids)) for sample in chunk]
            ids, labels, mask = (torch.tensor(rows, device=args.device) for rows in (
                [[*sample.ids, *left] for sample, left in zip(chunk, padding, strict=True)],
                [[*answer_labels(sample), *(-100 for _ in left)] for sample, left in zip(chunk, padding, strict=True)],
                [[*(1 for _ in sample.ids), *left] for sample, left in zip(chunk, padding, strict=True)]))
            (model(input_ids=ids, attention_mask=mask, labels=labels).loss * len(chunk) / len(samples)).backward()
        optimizer_step()
    return step


def packed(args, liger: bool = True, compiled: bool = False, fp8: bool = False) -> Callable:
    """All samples in one row, without padding; attention stays within a sample."""
    register_packed_attention()
    model = peers_model(args, liger, fp8, compiled, "packed")
    optimizer_step = peers_optimizer(model)

    def step(samples: list[Example]) -> None:
        n_tokens = sum(len(sample.ids) for sample in samples)
        left = round_up(n_tokens, 16) - n_tokens  # fp8 products want multiples of 16
        if left:
            samples = [*samples, Example([0] * left, left, None)]
        lengths = [len(sample.ids) for sample in samples]
        ends = F.pad(torch.tensor(lengths, device=args.device).cumsum(0, dtype=torch.int32), (1, 0))
        ids, labels, positions = (torch.tensor([list(chain.from_iterable(rows))], device=args.device) for rows in (
            (sample.ids for sample in samples), map(answer_labels, samples), map(range, lengths)))
        model(input_ids=ids, position_ids=positions, labels=labels, cu_seqlens=ends,
              longest=round_up(max(lengths), 64), use_cache=False).loss.backward()
        optimizer_step()
    return step


def register_packed_attention() -> None:
    """transformers' attention by name: PyTorch's for sequences of different lengths; on a CPU, one at a time."""
    from transformers import AttentionInterface

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, cu_seqlens=None, longest=None, **_):
        if query.device.type == "cpu":
            parts = [F.scaled_dot_product_attention(*(x[..., a:b, :] for x in (query, key, value)), is_causal=True)
                     for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)]
            return torch.cat(parts, 2).transpose(1, 2), None
        from torch.nn.attention.varlen import varlen_attn
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, width]
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))[None], None

    AttentionInterface.register("packed", attend)


PEERS = ("transformers", "peft")
# name: precision, the packages that it needs, the step's maker
ROWS: dict[str, tuple[str, tuple[str, ...], Callable]] = {
    "transformers, peft: padded, 8 x 4": ("bf16", PEERS, padded),
    "  packed": ("bf16", PEERS, lambda args: packed(args, liger=False)),
    "  packed, Liger": ("bf16", (*PEERS, "liger_kernel"), packed),
    "  packed, Liger, compiled": ("bf16", (*PEERS, "liger_kernel"), lambda args: packed(args, compiled=True)),
    "  packed, Liger, compiled, torchao float8": ("fp8", (*PEERS, "liger_kernel", "torchao"), lambda args: packed(
        args, compiled=True, fp8=True)),
    "ours, bf16, text only": ("bf16", (), lambda args: ours(args, "16bit")),
    "ours, bf16, with pictures": ("bf16", (), lambda args: ours(args, "16bit")),
    "ours, fp8, text only": ("fp8", (), lambda args: ours(args, "fp8")),
    "ours, fp8, with pictures": ("fp8", (), lambda args: ours(args, "fp8")),
}


# --- Measuring ---

def measure(args, name: str) -> dict[str, float]:
    """The numbers of a row, in this process."""
    with torch.device("meta"):
        lengths_of = random_lavin(args.size, "meta", args.dtype)  # samples depend on the vocabulary alone
    total = args.steps + args.warm_up
    batches = [random_examples(lengths_of, args.samples, i, images="pictures" in name) for i in range(total)]
    step = ROWS[name][2](args)
    step(batches[0])  # compiles
    gc.collect()
    start_memory(args.device)
    for batch in batches:  # captures every size: replays take their memory from what the capture allocated
        step(batch)
    batches = [redrawn(lengths_of, batch, i) for i, batch in enumerate(batches)]
    seconds = step_seconds(lambda i: step(batches[i]), args.device, args.steps, args.warm_up)
    return {"ms a step": 1000 * seconds, "samples/s": args.samples / seconds, "GiB": peak_gib(args.device)}


def missing(name: str) -> list[str]:
    return [package for package in ROWS[name][1] if importlib.util.find_spec(package) is None]


def in_process(args, name: str) -> dict[str, float] | str:
    """The numbers of a row, or why there are none."""
    if missing(name):
        return f"not installed: {', '.join(missing(name))}"
    words = ["--size", args.size, "--device", str(args.device), "--samples", str(args.samples), "--steps",
             str(args.steps), "--warm_up", str(args.warm_up), "--only", name]
    try:
        done = subprocess.run([sys.executable, "-m", "benchmarks.peers", *words], cwd=ROOT, capture_output=True,
                              text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS} s"
    numbers = [line.removeprefix(OUTPUT) for line in done.stdout.splitlines() if line.startswith(OUTPUT)]
    return json.loads(numbers[0]) if numbers else (done.stderr.strip().splitlines() or ["no output"])[-1][:200]


def with_ratios(rows: dict[str, dict[str, float]]) -> list[dict]:
    """The table's rows. Their ratio is to the fastest row of theirs with the same precision."""
    best: dict[str, float] = {}
    for name, numbers in rows.items():
        precision = ROWS[name][0]
        if not name.startswith("ours"):
            best[precision] = max(best.get(precision, 0.0), numbers["samples/s"])
    return [{"what": name, **numbers, "ratio": numbers["samples/s"] / best.get(ROWS[name][0], float("nan"))}
            for name, numbers in rows.items()]


def main(args) -> None:
    args.device = torch.device(args.device)
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    if args.only:
        print(OUTPUT + json.dumps(measure(args, args.only)))
        return
    print(hardware(args.device, matmul_peak(args.device, args.dtype)), flush=True)
    rows = {}
    for name in ROWS:
        if not args.rows or any(part in name for part in args.rows):
            found = in_process(args, name)
            if isinstance(found, str):
                print(f"{name.strip()}: {found}", flush=True)
            else:
                rows[name] = found
                print(report(with_ratios({name: found})), flush=True)
    print(report(with_ratios(rows)))


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--samples", default=32, type=int, help="samples a step")
    parser.add_argument("--steps", default=10, type=int)
    parser.add_argument("--warm_up", default=4, type=int)
    parser.add_argument("--rows", nargs="+", metavar="PART", help="only the rows whose names contain one of these")
    parser.add_argument("--only", help="one row, in this process")
    main(parser.parse_args())
