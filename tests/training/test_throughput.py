"""Frozen weights are counted by the configuration, MFU is FLOPs over the data sheet's peak."""

import json
from types import SimpleNamespace

import pytest
import torch

from lavin.tokenizer import Example
from tiny import tiny_model
from util.trackers import Trackers
from util.training import metrics
from util.training.epoch_record import EpochRecord
from util.training.throughput import FrozenWeights, frozen_weights, peak_flops


@pytest.mark.parametrize("llama", [{}, {"n_kv_heads": None}, {"d_head": 16, "d_ff": 40}])
def test_the_configuration_counts_as_many_weights_as_there_are(llama):
    model = tiny_model(llama=llama)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "adapter" not in name}
    weights = frozen_weights(model)
    assert weights.layers == sum(n for name, n in matrices.items() if name.startswith("llama.layers"))
    assert weights.head == matrices["llama.output.weight"]
    assert weights.vit == sum(n for name, n in matrices.items() if ".blocks." in name)
    assert weights.positions == model.vision.vit.pos_embed.shape[1]


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
    ("Tesla V100-SXM2-32GB", 125), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("Unknown", None)])
def test_peak_of_the_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16, 4) == (tflops and pytest.approx(4e12 * tflops))
    assert peak_flops(cuda, torch.float32, 4) is None and peak_flops(torch.device("cpu"), torch.float16, 1) is None


def test_metrics_divide_the_work_of_the_steps_that_were_read_by_their_time(tmp_path, monkeypatch):
    """Two of three launched steps are read after 4 s: 2 samples of 10 tokens, 4 of them answers, 1 picture each."""
    clock = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    untracked = Trackers("", tmp_path, tmp_path, {})
    lines = metrics.Metrics(untracked, FrozenWeights(layers=1000, head=100, vit=10, positions=5), peak_flops=1e6)
    record = EpochRecord(0, steps=[[2.0, 1.0, 0.5], [4.0, 0.0, float("inf")]], rates=[0.1, 0.2, 0.3])
    for _ in range(3):
        lines.add([Example([3] * 10, 6, torch.zeros(1))])
    clock[0] += 4
    lines.write(tmp_path, record, memory_gib=1.5, steps_per_epoch=3)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"epoch": 0, "step": 2, "loss": 2.0, "lr": 0.2, "grad_norm": None, "samples_per_s": 0.5,
                    "tokens_per_s": 5.0, "mfu": pytest.approx(2 * 4 * (1000 * 10 + 100 * 4 + 10 * 5) / 4 / 1e6),
                    "peak_memory_gib": 1.5, "skipped_steps": 1}
    assert len(lines.work) == 1 and lines.first_step == 2
