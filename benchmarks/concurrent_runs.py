"""The same training runs one after another, each on all GPUs, and at once, each on a GPU of its own.

    python3 benchmarks/concurrent_runs.py                                    # all GPUs of this host, as many runs
    python3 benchmarks/concurrent_runs.py --gpus 1 --runs 4                  # four at once on one GPU
    python3 benchmarks/concurrent_runs.py --size tiny --gpus 2 --device cpu  # a smoke test

These are runs of scripts/run_all_variants.sh with JOBS=1 and JOBS=RUNS: seeds of the base method, trained and scored,
on generated problems and random weights in a temporary folder. "wall s" counts all from the command to its end; the
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
# run_all_variants.sh calls python; its figures are not measured, and need more packages
PYTHON = '#!/bin/sh\n[ "$1" = plot_results.py ] || exec "{}" "$@"\n'


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
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(PYTHON.format(sys.executable))
    (root / "bin" / "python").chmod(0o755)


def run_variants(root: Path, args, out: str, jobs: int, runs: int) -> tuple[float, float]:
    """Wall seconds, and samples/s in the last epochs of `jobs` runs together."""
    environment = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "GPUS": str(args.gpus),
                   "JOBS": str(jobs), "METHODS": "base", "SEEDS": " ".join(map(str, range(runs))), "MODEL": args.size,
                   "DATA_ROOT": str(root / "data"), "WEIGHTS": str(root / "weights"), "OUTPUT_ROOT": str(root / out)}
    flags = ["--vision_model", str(root / "vit"), "--epochs", str(EPOCHS), *(["--device", args.device] if args.device
                                                                             else [])]
    log, start = root / f"{out}.log", time.perf_counter()
    with open(log, "wb") as output:
        status = subprocess.run(["bash", str(ROOT / "scripts" / "run_all_variants.sh"), *flags], env=environment,
                                stdout=output, stderr=output).returncode
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{log.read_text(errors='replace')[-3000:]}\nconcurrent_runs.py: a run failed, as it says above")
    rates = [read_json_lines(path)[-1]["samples_per_s"] for path in (root / out).glob("*/log.txt")]
    return seconds, jobs * sum(rates) / len(rates)


def main(args) -> None:
    runs = args.runs or max(2, args.gpus)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_world(root, args.size)
        run_variants(root, args, "warm", 1, 1)
        rows: list[list[str]] = []
        for jobs, what in ((1, f"one after another, on {args.gpus} GPU{'s' * (args.gpus > 1)}"),
                           (runs, "at once" + f", on {max(1, args.gpus // runs)} each" * (args.gpus > 1))):
            seconds, rate = run_variants(root, args, f"jobs{jobs}", jobs, runs)
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
