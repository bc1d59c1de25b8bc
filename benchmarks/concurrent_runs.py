"""The same training runs one after another, each on all GPUs, and at once, each on a GPU of its own.

    python3 benchmarks/concurrent_runs.py                                    # all GPUs of this host, as many runs
    python3 benchmarks/concurrent_runs.py --gpus 1 --runs 4                  # four at once on one GPU
    python3 benchmarks/concurrent_runs.py --size tiny --gpus 2 --device cpu  # a smoke test

As scripts/run_all_variants.sh does with JOBS=1 and JOBS=RUNS: train.py with several seeds, on generated
problems and random weights in a temporary folder. "wall s" counts all from their start to their end, loading too; the
compiler's cache is warm. "samples/s" are those of all runs that train together, in their last epochs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import timing  # first: it extends sys.path

# isort: split
sys.path.append(str(Path(__file__).parents[1] / "tools"))
import make_toy_base
from lavin.llama import Llama, LlamaConfig
from lavin.runtime.console import format_table, summary
from lavin.runtime.files import read_json_lines, write_json
from lavin.timm_compat import timm
from make_mini_scienceqa import write_mini_scienceqa
from util.data.datasets import load_scienceqa

ROOT = Path(timing.__file__).parents[1]
CLIP = "vit_large_patch14_clip_quickgelu_224"
SIZES: dict[str, tuple[dict[str, Any], str, dict[str, Any], int]] = {  # params.json, ViT and its arguments, samples
    "7B8L": ({"dim": 4096, "n_layers": 8, "n_heads": 32, "multiple_of": 256}, CLIP, {}, 1600),  # 8 of 7B's 32 layers
    "tiny": (make_toy_base.LLAMA, make_toy_base.VIT_NAME, make_toy_base.VIT, 64)}
EPOCHS = 2


def random_weights(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Norms about 1, matrices small."""
    return {name: torch.empty(tensor.shape, dtype=dtype).normal_(tensor.ndim == 1 and name.endswith("weight"), 0.02)
            for name, tensor in module.state_dict().items()}


def write_world(root: Path, size: str) -> None:
    """Data and a base of random weights."""
    params, vit_name, vit_args, n_samples = SIZES[size]
    dtype = torch.float32 if size == "tiny" else torch.float16
    write_mini_scienceqa(root / "data", {"train": n_samples, "val": 2, "test": 64}, 0)
    (root / "weights" / size).mkdir(parents=True)
    make_toy_base.make_folder(root / "vit")
    tokenizer = make_toy_base.train_tokenizer(load_scienceqa(str(root / "data"), "train"),
                                              root / "weights" / "tokenizer.model")
    params = {**params, "norm_eps": 1e-6, "vocab_size": -1}
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_params(params, tokenizer.n_words))
        vit = timm.create_model(vit_name, num_classes=0, **vit_args)
    write_json(root / "weights" / size / "params.json", params)
    torch.save(random_weights(llama, dtype), root / "weights" / size / "consolidated.00.pth")
    make_toy_base.save_tensors(random_weights(vit, dtype), root / "vit" / "model.safetensors")
    pixels = vit_args.get("img_size", 224)
    write_json(root / "vit" / "config.json", {
        "architecture": vit_name, "model_args": vit_args, "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, pixels, pixels], "num_classes": 0}})


def start(root: Path, args, out: Path, devices: list[int], seed: int) -> subprocess.Popen:
    """A training on these GPUs, with an effective batch of 32."""
    launcher = ["-m", "util.launch", "--standalone", "--nproc_per_node", str(len(devices))] if len(devices) > 1 else []
    flags = ["--llama_model_path", str(root / "weights"), "--llm_model", args.size, "--vision_model", str(root / "vit"),
             "--data_root", str(root / "data"), "--batch_size", "2", "--accum_iter", str(16 // len(devices)),
             "--epochs", str(EPOCHS), "--seed", str(seed), "--output_dir", str(out / str(seed)),
             *(["--device", args.device] if args.device else [])]
    out.mkdir(exist_ok=True)
    with open(out / f"{seed}.log", "wb") as log:
        return subprocess.Popen([sys.executable, *launcher, "train.py", *flags], cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))})


def run_all(root: Path, args, name: str, jobs: int, runs: int) -> tuple[float, float]:
    """Wall seconds, and samples/s in the last epochs of `jobs` runs together."""
    each, out, begin = max(1, args.gpus // jobs), root / name, time.perf_counter()
    for first in range(0, runs, jobs):
        running = [start(root, args, out, [(i * each + k) % args.gpus for k in range(each)], first + i)
                   for i in range(jobs)]
        if any([process.wait() for process in running]):
            logs = (path.read_text(errors="replace")[-2000:] for path in out.glob("*.log"))
            sys.exit("\n".join([*logs, "concurrent_runs.py: a run failed, as it says above"]))
    seconds = time.perf_counter() - begin
    rates = [read_json_lines(path)[-1]["samples_per_s"] for path in out.glob("*/log.txt")]
    return seconds, jobs * sum(rates) / len(rates)


def main(args) -> None:
    runs = args.runs or max(2, args.gpus)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_world(root, args.size)
        run_all(root, args, "warm", 1, 1)
        rows: list[list[str]] = []
        for jobs, what in ((1, f"one after another, on {args.gpus} GPU{'s' * (args.gpus > 1)}"),
                           (runs, "at once" + f", on {max(1, args.gpus // runs)} each" * (args.gpus > 1))):
            seconds, rate = run_all(root, args, f"jobs{jobs}", jobs, runs)
            first = float(rows[0][1]) if rows else seconds
            rows.append([f"{runs} runs {what}", f"{seconds:.1f}", f"{first / seconds:.2f}", f"{rate:.1f}"])
            print(format_table(["what", "wall s", "times as fast", "samples/s"], rows[-1:]), flush=True)
    print("\n" + format_table(["what", "wall s", "times as fast", "samples/s"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--size", default="7B8L", choices=SIZES)
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--gpus", default=max(1, torch.cuda.device_count()), type=int)
    parser.add_argument("--runs", type=int, help="default: as many as GPUs, and two on one")
    main(parser.parse_args())
