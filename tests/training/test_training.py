"""Gradients and optimizer steps do not depend on micro-batches, splits and processes; runs repeat and resume."""

import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import train
from forked import in_child, in_processes, joined
from lavin.model import LaVIN, pack
from lavin.runtime import distributed
from lavin.tokenizer import Example
from reference import loss as reference_loss
from tiny import ROOT, mixed_examples, tiny_example, tiny_model
from tiny_runs import NO_SCALING, load_checkpoint, read_log, run_flags, train_run
from util.data.batches import balanced_parts, epoch_batches, micro_batches, steps_per_epoch
from util.training import accumulation
from util.training.accumulation import (
    accumulate_gradients,
    accumulate_with_oom_retry,
    count_answer_tokens,
    loss_weights,
    probe_max_tokens,
    split_by_tokens,
)
from util.training.optimizer import make_optimizer, optimizer_step


def test_gradients_equal_finite_differences(monkeypatch):
    """They are taken in float64, along one random direction for each trained tensor."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the model casts to float32 with .float()
    model = tiny_model(adapter_type="block", visual_adapter_type="router_block", llama={"n_layers": 2}).double()
    batch = pack(mixed_examples())
    model(batch).backward()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        losses = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                p += h * direction
                losses.append(model(batch).item())
                p -= h * direction
        finite_difference = (losses[0] - losses[1]) / 2e-5
        assert (p.grad * direction).sum().item() == pytest.approx(finite_difference, rel=1e-5, abs=1e-7), name


def samples():
    """Eight examples; their answer lengths differ widely, so a mean over micro-batch means is not the overall mean."""
    return [tiny_example(i, 2 + i, answer, image=i % 2 == 0) for i, answer in enumerate((1, 9, 2, 7, 1, 1, 8, 3))]


def one_step(batch_size: int, loss_norm: str, world_size: int = 1, rank: int = 0, with_nan: bool = False,
             max_tokens: float = math.inf) -> dict:
    """One optimizer step on all samples, of which this process takes its part; micro-batches have `batch_size` samples.

    Returns the loss, whether the optimizer stepped, the change of the parameters, and whether gradients are left.
    """
    model = tiny_model().train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout.zero_()
    if with_nan:
        model.llama.layers[0].adapter_attn.conv_A.bias.data[0] = math.nan
    examples = samples()
    everyone = list(range(len(examples)))
    weights = loss_weights([everyone] if loss_norm == "batch" else micro_batches(everyone, batch_size), examples)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, fused=True)
    pairs = [(examples[i], weights[i]) for i in everyone[rank::world_size]]
    loss = accumulate_gradients(model, pairs, max_tokens, NO_SCALING)
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    loss, stepped, _, _ = optimizer_step(optimizer, NO_SCALING, parameters, loss, None).tolist()
    return {"loss": loss, "stepped": stepped, "step": torch.cat([p.detach().flatten() for p in parameters]) - before,
            "gradients_left": any(p.grad is not None for p in parameters)}


def assert_same(a: dict, b: dict) -> None:
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    torch.testing.assert_close(a["step"], b["step"], atol=1e-5, rtol=1e-4)


def test_accumulation_gives_the_same_step():
    full_batch = one_step(8, "batch")
    assert full_batch["stepped"] and full_batch["step"].abs().max() > 1e-3 and not full_batch["gradients_left"]
    mean = reference_loss(tiny_model(), samples()).item() / count_answer_tokens(samples())
    assert full_batch["loss"] == pytest.approx(mean, rel=1e-5)
    for batch_size in (4, 2):
        assert_same(one_step(batch_size, "batch"), full_batch)


@pytest.mark.parametrize("loss_norm", ["batch", "microbatch"])
def test_any_split_by_tokens_gives_the_same_step(loss_norm):
    """Splits combine or divide micro-batches; the longest sample has 26 tokens."""
    unsplit = one_step(2, loss_norm)
    for max_tokens in (40, 30, 5):
        assert_same(one_step(2, loss_norm, max_tokens=max_tokens), unsplit)


def test_out_of_memory_halves_the_splits_and_keeps_the_gradients(monkeypatch, capsys):
    """Memory for 45 tokens; if a single sample does not fit, the error is raised."""
    limit, forward = 45, LaVIN.forward

    def forward_with_little_memory(model, batch):
        loss = forward(model, batch)
        if len(batch.ids) > limit:
            loss.backward()  # partial gradients, which must be discarded
            raise torch.OutOfMemoryError
        return loss
    model, pairs = tiny_model(), [(example, 0.1) for example in samples()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_loss = accumulate_gradients(model, pairs, math.inf, NO_SCALING)
    expected = [p.grad.clone() for p in parameters]
    monkeypatch.setattr(LaVIN, "forward", forward_with_little_memory)
    model.zero_grad()
    loss, max_tokens = accumulate_with_oom_retry(model, pairs, math.inf, NO_SCALING)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5) and max_tokens < 60
    assert f"passes have at most {int(max_tokens)} tokens" in capsys.readouterr().out
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    limit = 5
    with pytest.raises(torch.OutOfMemoryError):
        accumulate_with_oom_retry(model, pairs, math.inf, NO_SCALING)


@pytest.mark.parametrize("limit", [1e9, 1100, 300])
def test_probe_max_tokens(monkeypatch, limit):
    """A GPU of 100,000 bytes: the weights take 20,000, a token takes 10; splits above `limit` tokens do not fit."""
    peak, split_sizes = [], []

    def accumulate(model, pairs, max_tokens, scaler):
        for split in split_by_tokens(pairs, max_tokens):
            split_sizes.append(sum(len(example.ids) for example, _ in split))
            if split_sizes[-1] > limit:
                raise torch.OutOfMemoryError
            peak.append(20_000 + 10 * split_sizes[-1])
    monkeypatch.setattr(accumulation, "accumulate_gradients", accumulate)
    for name, value in {"memory_allocated": lambda device: 20_000, "max_memory_allocated": lambda device: max(peak),
                        "reset_peak_memory_stats": lambda device: peak.clear(),
                        "get_device_properties": lambda device: SimpleNamespace(total_memory=100_000)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    model = tiny_model()
    monkeypatch.setattr(LaVIN, "device", torch.device("cuda"))
    examples = [Example([3] * n, n - 1) for n in (100, 511, 200, 511, 511, 300, 511)]
    if limit < 511:
        with pytest.raises(torch.OutOfMemoryError):
            probe_max_tokens(model, examples, NO_SCALING)
        return
    max_tokens = probe_max_tokens(model, examples, NO_SCALING)
    assert split_sizes[0] == 511  # the first split, which compiles, is small
    assert max_tokens == (pytest.approx(7000) if limit > 2048 else 1022)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), max_tokens=st.integers(1, 60))
def test_splits_keep_the_order_and_the_limit_and_are_as_few_as_possible(lengths, max_tokens):
    pairs = [(Example([3] * n, n), i) for i, n in enumerate(lengths)]
    splits = split_by_tokens(pairs, max_tokens)
    assert [pair for split in splits for pair in split] == pairs
    sizes = [[len(example.ids) for example, _ in split] for split in splits]
    assert all(sum(size) <= max_tokens or len(size) == 1 for size in sizes)
    assert all(sum(size) + next_size[0] > max_tokens for size, next_size in itertools.pairwise(sizes))


def test_microbatch_norm_is_the_published_mean_over_micro_batches():
    model = tiny_model()
    for batch_size, n in ((8, 1), (4, 2), (2, 4)):
        batches = [samples()[i::n] for i in range(n)]
        means = [reference_loss(model, batch).item() / count_answer_tokens(batch) for batch in batches]
        result = one_step(batch_size, "microbatch")
        assert result["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    by_batch, by_micro_batch = one_step(8, "batch"), one_step(2, "microbatch")
    assert abs(by_micro_batch["loss"] - by_batch["loss"]) > 1e-3  # the two differ on these samples
    assert not torch.allclose(by_micro_batch["step"], by_batch["step"], atol=1e-4)


@pytest.mark.parametrize("loss_norm", ["batch", "microbatch"])
def test_a_sample_whose_answer_was_cut_away_changes_nothing_about_a_step(loss_norm):
    """It has no answer token, so it counts as none, as does a micro-batch of such samples."""
    model, examples = tiny_model(), [tiny_example(1, 5, 3), tiny_example(2, 6, 0), tiny_example(3, 4, 2)]
    losses = []
    for groups in ([[0], [2]], [[0, 1], [2]], [[0], [1], [2]]):
        weights = loss_weights(groups if loss_norm == "microbatch" else [sum(groups, [])], examples)
        pairs = [(examples[i], weight) for i, weight in weights.items()]
        losses.append(accumulate_gradients(model, pairs, math.inf, NO_SCALING).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6) and losses[0] > 1
    assert loss_weights([[1]], examples) == {1: 0.0}


def test_non_finite_step_is_skipped():
    result = one_step(4, "batch", with_nan=True)
    assert not result["stepped"] and not math.isfinite(result["loss"]) and not result["gradients_left"]
    assert not result["step"].nan_to_num().any()


@pytest.fixture(scope="module")
def two_processes(base, scienceqa, tmp_path_factory):
    """The results of one_step on both processes, and the folder of a run that they trained and evaluated."""
    out = tmp_path_factory.mktemp("two")
    flags = run_flags(base, scienceqa, out / "run", "--dropout_prob", "0")

    def work():
        with joined() as (rank, world):
            results = [one_step(4, "batch", world, rank), one_step(2, "batch", world, rank),
                       one_step(2, "microbatch", world, rank),
                       one_step(4, "batch", world, rank, with_nan=rank == 1)]
            train.main(train.get_args_parser().parse_args([*flags, "--batch_size", "2"]))
            torch.distributed.barrier()  # rank 0 writes the checkpoint
            evaluation.main(evaluation.get_args_parser().parse_args(["--adapter_path", str(out / "run"), "--device",
                                                                     "cpu"]))
        return results
    return in_processes(work, 2), out / "run"


def test_two_processes_give_the_same_step(two_processes):
    """Processes x micro-batches x size: 2 x 1 x 4 and 2 x 2 x 2 samples against 1 x 1 x 8."""
    full_batch = one_step(8, "batch")
    for results in two_processes[0]:
        assert_same(results[0], full_batch)
        assert_same(results[1], full_batch)


def test_two_processes_give_the_published_mean_over_micro_batches(two_processes):
    """The same four micro-batches of two samples as on one process, whichever rank has their samples."""
    (_, _, first, _), (_, _, second, _) = two_processes[0]
    means = [reference_loss(tiny_model(), samples()[i::4]).item() / count_answer_tokens(samples()[i::4])
             for i in range(4)]
    assert first["loss"] == second["loss"] == pytest.approx(sum(means) / 4, rel=1e-5)
    assert_same(first, one_step(2, "microbatch"))
    assert torch.equal(first["step"], second["step"])


def test_non_finite_loss_on_one_process_skips_the_step_on_both(two_processes):
    for *_, with_nan in two_processes[0]:
        assert not with_nan["stepped"] and not with_nan["step"].nan_to_num().any() and not with_nan["gradients_left"]


def test_two_processes_give_the_same_run(two_processes, base, scienceqa, tmp_path):
    """Training and evaluation equal those of one process with the same effective batch size."""
    folder = two_processes[1]
    one_process = train_run(base, scienceqa, tmp_path, "--dropout_prob", "0")
    adapters = load_checkpoint(folder / "checkpoint-2.pth")["model"]
    for name, tensor in one_process["model"].items():
        torch.testing.assert_close(adapters[name], tensor, atol=2e-3, rtol=0, msg=name)
    assert [line["train_closs"] for line in read_log(folder)] == pytest.approx(
        [line["train_closs"] for line in read_log(tmp_path)], rel=1e-4)
    by_step = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
               for path in (folder, tmp_path)]
    for line, expected in zip(*by_step, strict=True):  # by rank 0 only
        assert (line["epoch"], line["step"]) == (expected["epoch"], expected["step"])
    assert json.loads((folder / "config.json").read_text())["world_size"] == 2
    shutil.copy(folder / "checkpoint-2.pth", tmp_path)
    evaluation.main(evaluation.get_args_parser().parse_args(["--adapter_path", str(tmp_path), "--device", "cpu"]))
    for name in ("preds.json", "generations.jsonl", "scores.json"):
        assert (folder / name).read_text() == (tmp_path / name).read_text()


def test_training_leaves_no_object_out_of_garbage_collections(base, scienceqa, tmp_path, frozen_heap):
    """Several runs of one process would not free each other's models."""
    def work():
        gc.unfreeze = frozen_heap
        train_run(base, scienceqa, tmp_path / "run")
        assert gc.get_freeze_count() == 0
    ended = in_child(work)
    assert ended.status == 0, ended.errors


def test_missing_gradients_become_zeros():
    """The ViT's adapters get no gradient without images; weight decay and moments must be updated all the same."""
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1, 2))
    p.grad = torch.tensor([3.0, 4.0])
    assert distributed.all_reduce_gradients([p, q], torch.tensor([5.0, 2.0])).tolist() == [5, 2]
    assert torch.equal(p.grad, torch.tensor([3.0, 4.0])) and torch.equal(q.grad, torch.zeros(1, 2))


def test_gradients_are_clipped_by_their_global_norm():
    steps = []
    for clip in (None, 0.5):
        p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        optimizer_step(torch.optim.SGD([p, q], lr=1.0, fused=True), NO_SCALING, [p, q], torch.tensor(1.0), clip)
        steps.append(-torch.cat((p, q)).detach())
    torch.testing.assert_close(steps[0], torch.tensor([3.0, 0, 0, 4]))
    torch.testing.assert_close(steps[1], torch.tensor([0.3, 0, 0, 0.4]))


def test_weight_decay_is_on_matrices_only():
    model = tiny_model()
    optimizer = make_optimizer(model, 0.05)
    decay = {id(p): group["weight_decay"] for group, flat in zip(optimizer.param_groups, optimizer.flat, strict=True)
             for p in flat.parameters}
    assert [group["params"] for group in optimizer.param_groups] == [[flat.flat] for flat in optimizer.flat]
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert decay.pop(id(p)) == (0.0 if name.endswith("bias") else 0.05), name
    assert not decay
    assert make_optimizer(model, 0.05).defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("n, effective_batch", [(23, 8), (16, 8), (9, 8), (13, 4)])
def test_steps_take_the_same_samples_on_any_number_of_processes(n, effective_batch):
    def steps(world_size, epoch=3):
        costs = [float(i % 7) for i in range(n)]
        ranks = [list(epoch_batches(costs, effective_batch, rank, world_size, 7, epoch)) for rank in range(world_size)]
        for step in zip(*ranks, strict=True):
            assert sorted(i for _, local_batch in step for i in local_batch) == sorted(step[0][0])
            assert all(global_batch == step[0][0] for global_batch, _ in step)
            assert all(len(local_batch) == effective_batch / world_size for _, local_batch in step)
        return [global_batch for global_batch, _ in ranks[0]]

    expected = steps(1)
    assert len(expected) == steps_per_epoch(n, effective_batch) == n // effective_batch
    assert steps(2) == steps(4) == expected
    used = [i for step in expected for i in step]
    assert len(set(used)) == len(used) and set(used) <= set(range(n))
    assert steps(1, epoch=4) != expected


@given(n=st.integers(1, 70), size=st.integers(1, 9))
def test_micro_batches_are_as_few_as_their_size_allows_and_of_nearly_the_same_size(n, size):
    batch = list(range(n))
    found = micro_batches(batch, size)
    assert sorted(i for micro_batch in found for i in micro_batch) == batch
    assert len(found) == math.ceil(n / size) and max(map(len, found)) <= size
    assert all(len(micro_batch) == size for micro_batch in found) or n % size


@given(st.lists(st.floats(1, 512), min_size=1, max_size=80), st.integers(1, 8))
def test_balanced_parts_cost_about_the_same(costs, n_parts):
    parts = balanced_parts(costs, n_parts)
    assert sorted(i for part in parts for i in part) == list(range(len(costs)))
    sizes, sums = [len(part) for part in parts], [sum(costs[i] for i in part) for part in parts]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert all(part == sorted(part) for part in parts)
    assert max(sums) - min(sums) <= max(costs) * (1 + 1e-12)  # sums round


def test_ranks_get_equal_numbers_of_tokens():
    """The first rank would get all long examples if samples were dealt by turns."""
    costs = [512.0, 64.0] * 16
    for global_batch, local_batch in epoch_batches(costs, 16, 0, 2, 0, 0):
        assert abs(2 * sum(costs[i] for i in local_batch) - sum(costs[i] for i in global_batch)) <= 512 - 64


def test_fewer_samples_than_the_effective_batch_make_one_step():
    (global_batch, local_batch), = epoch_batches([1.0] * 3, 8, 0, 1, 0, 0)
    assert sorted(global_batch) == sorted(local_batch) == [0, 1, 2]


def pid_of_rank_one(launcher: int) -> int:
    """torchrun's child process of rank 1."""
    children = (Path("/proc") / str(launcher) / "task" / str(launcher) / "children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in (Path("/proc") / pid / "environ").read_bytes())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the worker processes")
def test_run_ends_when_a_process_is_killed_and_can_be_resumed(base, scienceqa, tmp_path):
    folder = tmp_path / "run"
    flags = run_flags(base, scienceqa, folder, "--batch_size", "2", "--epochs", "60")
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(ROOT / "train.py"), *flags], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as workers:
        try:
            deadline = time.monotonic() + 120
            while not (folder / "checkpoint-1.pth").exists():
                assert workers.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            os.kill(pid_of_rank_one(workers.pid), signal.SIGKILL)
            errors = workers.communicate(timeout=60)[1]
        finally:
            workers.terminate()
    assert workers.returncode != 0 and "Signal 9 (SIGKILL)" in errors and "rank      : 1" in errors
    done = len(read_log(folder))
    assert 2 <= done < 60
    train.main(train.get_args_parser().parse_args(["--resume", str(folder)]))  # by one process, with the run's flags
    assert [line["epoch"] for line in read_log(folder)] == list(range(60))
    assert load_checkpoint(folder / "checkpoint-59.pth")["epoch"] == 59


def flatten(value):
    """All tensors and numbers of a nested structure, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in flatten(value[key])]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flatten(item)]
    return [torch.as_tensor(value)] if isinstance(value, (int, float, torch.Tensor)) else []


def identical(a, b) -> bool:
    """Whether two checkpoints hold the same bits in model and optimizer."""
    for name in ("model", "optimizer"):
        leaves, other_leaves = flatten(a[name]), flatten(b[name])
        if not leaves or len(leaves) != len(other_leaves):
            return False
        if not all(torch.equal(x, y) for x, y in zip(leaves, other_leaves, strict=True)):
            return False
    return True


def test_runs_are_reproducible_and_resume_bit_for_bit(base, scienceqa, tmp_path):
    """The masks of dropout and stochastic depth must repeat, too."""
    flags = ("--drop_path", "0.2", "--dropout_prob", "0.3", "--dropout_lim", "0.3")
    first = train_run(base, scienceqa, tmp_path / "a", *flags)
    assert identical(train_run(base, scienceqa, tmp_path / "b", *flags), first)
    assert not identical(load_checkpoint(tmp_path / "a" / "checkpoint-1.pth"), first)
    (tmp_path / "b" / "checkpoint-2.pth").unlink()
    (tmp_path / "b" / "checkpoint-1.pth").unlink()
    torch.manual_seed(99)
    assert identical(train_run(base, scienceqa, tmp_path / "b", *flags, "--resume", str(tmp_path / "b")), first)
    logs = [[{key: line[key] for key in ("epoch", "train_lr", "train_closs")} for line in read_log(tmp_path / name)]
            for name in "ab"]
    assert logs[0] == logs[1] and [line["epoch"] for line in logs[0]] == [0, 1, 2]
    assert not identical(train_run(base, scienceqa, tmp_path / "c", *flags, "--seed", "1"), first)


def test_micro_batches_give_the_same_run(base, scienceqa, tmp_path):
    """Complete runs end with the same adapters."""
    no_dropout = ("--dropout_prob", "0")
    full_batch = train_run(base, scienceqa, tmp_path / "full_batch", *no_dropout)
    accumulated = train_run(base, scienceqa, tmp_path / "accumulated", *no_dropout, "--batch_size", "1",
                            "--accum_iter", "4")
    max_change = 0.0
    for name, tensor in full_batch["model"].items():
        torch.testing.assert_close(accumulated["model"][name], tensor, atol=2e-3, rtol=0, msg=name)
        max_change = max(max_change, tensor.abs().max().item() if ".conv_D." in name else 0.0)
    assert max_change > 0.02  # conv_D starts at zero: the run changed it by far more than the tolerance


def test_training_lowers_the_loss(base, scienceqa, tmp_path):
    train_run(base, scienceqa, tmp_path, "--epochs", "8", "--lr", "3e-2")
    losses = [line["train_closs"] for line in read_log(tmp_path)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.4
