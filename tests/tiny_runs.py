"""Runs on the tiny base weights: trained by train.py in this process, or written with random adapters."""

import json

import torch

import train
from lavin.mm_adapter import AdapterConfig
from lavin.runtime.files import value_sha256
from lavin.weights.load import load_base
from tiny import randomise_adapters, save_adapters

NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


def run_flags(base, scienceqa, folder, *flags) -> list[str]:
    return [*base.flags, "--data_root", str(scienceqa), "--output_dir", str(folder), "--device", "cpu", "--batch_size",
            "4", "--epochs", "3", "--warmup_epochs", "1", "--lr", "1e-2", "--max_seq_len", "160", *flags]


def train_run(base, scienceqa, folder, *flags) -> dict:
    """Run train.main in this process; returns the last checkpoint."""
    train.main(train.get_args_parser().parse_args(run_flags(base, scienceqa, folder, *flags)))
    return load_checkpoint(folder / "checkpoint-2.pth")


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def load_checkpoint(path):
    return torch.load(path, weights_only=True)


def forget_in_checkpoint(path, *names) -> None:
    """Makes a checkpoint as an earlier version has written it, without these entries."""
    content = {name: value for name, value in load_checkpoint(path).items() if name not in (*names, "sha256")}
    torch.save({**content, "sha256": value_sha256(content)}, path)


def write_run(folder, base, seed: int, **adapter) -> None:
    """Write a finished run with random adapters."""
    config = AdapterConfig(**{"adapter_dim": 4, "hidden_proj": 8, **adapter})
    model, _ = load_base(str(base.weights), "tiny", str(base.vision), config, torch.device("cpu"), torch.float32)
    torch.manual_seed(seed)
    randomise_adapters(model)
    flags = {"llm_model": "tiny", "llama_model_path": str(base.weights), "vision_model": str(base.vision),
             "use_vicuna": False, "prompt_format": "QCM-ALE", "max_seq_len": 200, **vars(config)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    save_adapters(model, folder / "checkpoint-3.pth", epoch=3, flags=flags)
