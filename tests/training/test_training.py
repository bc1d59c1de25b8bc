"""Gradients, and the optimizer step: the same however its samples are shared out, resumed or repeated."""

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
from lavin.model import LaVIN, pack
from lavin.runtime import distributed
from lavin.tokenizer import Example
from reference import loss as reference_loss
from tiny import ROOT, mixed_examples, tiny_example, tiny_model
from tiny_runs import NO_SCALING, load, log, run, run_flags
from util.data.batches import epoch_batches, steps_per_epoch
from util.training import accumulation
from util.training.accumulation import (
    accumulate_gradients,
    accumulate_with_oom_retry,
    count_answer_tokens,
    probe_max_tokens,
    split_by_tokens,
    with_loss_weights,
)
from util.training.optimizer import make_optimizer, optimizer_step


def test_gradients_equal_finite_differences(monkeypatch):
    """In float64, along a random direction for every trained tensor."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the model's own steps to float32
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
        slope = (losses[0] - losses[1]) / 2e-5
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def samples():
    """Eight, of very different answer lengths, so that a mean of means is another mean."""
    return [tiny_example(i, 2 + i, answer, image=i % 2 == 0) for i, answer in enumerate((1, 9, 2, 7, 1, 1, 8, 3))]


def one_step(batch_size: int, loss_norm: str, world: int = 1, rank: int = 0, poisoned: bool = False,
             most_tokens: float = math.inf) -> dict:
    """The optimizer step on all samples, this process's share of it in micro-batches; its loss, gradients, parameters."""
    model = tiny_model().train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout.zero_()
    if poisoned:
        model.llama.layers[0].adapter_attn.conv_A.bias.data[0] = math.nan
    everyone = samples()
    own = everyone[rank::world]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, fused=True)
    pairs = with_loss_weights([own[i:i + batch_size] for i in range(0, len(own), batch_size)],
                        count_answer_tokens(everyone), loss_norm, len(everyone) // batch_size)
    loss = accumulate_gradients(model, pairs, most_tokens, NO_SCALING)
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    loss, stepped = optimizer_step(optimizer, NO_SCALING, parameters, loss, None).tolist()
    return {"loss": loss, "stepped": stepped, "step": torch.cat([p.detach().flatten() for p in parameters]) - before,
            "gradients_left": any(p.grad is not None for p in parameters)}


def assert_same(a: dict, b: dict) -> None:
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    torch.testing.assert_close(a["step"], b["step"], atol=1e-5, rtol=1e-4)


def test_accumulation_gives_the_same_step():
    whole = one_step(8, "batch")
    assert whole["stepped"] and whole["step"].abs().max() > 1e-3 and not whole["gradients_left"]
    mean = reference_loss(tiny_model(), samples()).item() / count_answer_tokens(samples())
    assert whole["loss"] == pytest.approx(mean, rel=1e-5)
    for batch_size in (4, 2):
        assert_same(one_step(batch_size, "batch"), whole)


@pytest.mark.parametrize("loss_norm", ["batch", "microbatch"])
def test_any_regrouping_into_passes_gives_the_same_step(loss_norm):
    """By tokens, across micro-batches and within them; the longest sample has 26 tokens."""
    whole = one_step(2, loss_norm)
    for most_tokens in (40, 30, 5):
        assert_same(one_step(2, loss_norm, most_tokens=most_tokens), whole)


def test_too_large_a_pass_is_halved_and_the_step_is_the_same(monkeypatch):
    """A model whose memory holds 45 tokens; where not even one sample fits, the error stands."""
    limit, forward = 45, LaVIN.forward

    def small_memory(model, batch):
        loss = forward(model, batch)
        if len(batch.ids) > limit:
            loss.backward()  # what is half done must not count
            raise torch.OutOfMemoryError
        return loss
    model, pairs = tiny_model(), [(example, 0.1) for example in samples()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = accumulate_gradients(model, pairs, math.inf, NO_SCALING)
    expected = [p.grad.clone() for p in parameters]
    monkeypatch.setattr(LaVIN, "forward", small_memory)
    model.zero_grad()
    loss, most = accumulate_with_oom_retry(model, pairs, math.inf, NO_SCALING)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5) and most < 60
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    limit = 5
    with pytest.raises(torch.OutOfMemoryError):
        accumulate_with_oom_retry(model, pairs, math.inf, NO_SCALING)


@pytest.mark.parametrize("limit", [1e9, 1100, 300])
def test_memory_trial(monkeypatch, limit):
    """A GPU of 100,000 bytes, of which 20,000 are taken, and of 10 a token; passes above `limit` tokens fail."""
    peak, groups = [], []

    def accumulate(model, pairs, most_tokens, scaler):
        for group in split_by_tokens(pairs, most_tokens):
            groups.append(sum(len(example.ids) for example, _ in group))
            if groups[-1] > limit:
                raise torch.OutOfMemoryError
            peak.append(20_000 + 10 * groups[-1])
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
    found = probe_max_tokens(model, examples, NO_SCALING)
    assert groups[0] == 511  # compiles in little memory
    assert found == (pytest.approx(7000) if limit > 2048 else 1022)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), most=st.integers(1, 60))
def test_passes_keep_order_and_limit_and_are_few(lengths, most):
    pairs = [(Example([3] * n, n), i) for i, n in enumerate(lengths)]
    groups = split_by_tokens(pairs, most)
    assert [pair for group in groups for pair in group] == pairs
    sizes = [[len(example.ids) for example, _ in group] for group in groups]
    assert all(sum(size) <= most or len(size) == 1 for size in sizes)
    assert all(sum(a) + b[0] > most for a, b in zip(sizes, sizes[1:]))


def test_microbatch_norm_is_the_published_mean_of_means():
    model = tiny_model()
    for batch_size in (8, 4, 2):
        parts = [samples()[i:i + batch_size] for i in range(0, 8, batch_size)]
        means = [reference_loss(model, part).item() / count_answer_tokens(part) for part in parts]
        result = one_step(batch_size, "microbatch")
        assert result["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    whole, parted = one_step(8, "batch"), one_step(2, "microbatch")
    assert abs(parted["loss"] - whole["loss"]) > 1e-3  # or this test could not tell the two apart
    assert not torch.allclose(parted["step"], whole["step"], atol=1e-4)


def test_non_finite_step_is_left_out():
    result = one_step(4, "batch", poisoned=True)
    assert not result["stepped"] and not math.isfinite(result["loss"]) and not result["gradients_left"]
    assert not result["step"].nan_to_num().any()


WORKER = """
import sys, torch
sys.path[:0] = {path!r}
import eval, train
from lavin.runtime import distributed
from test_training import one_step
torch.set_num_threads(1)
rank, world, _ = distributed.init()
results = [one_step(4, "batch", world, rank), one_step(2, "batch", world, rank), one_step(2, "microbatch", world, rank),
           one_step(4, "batch", world, rank, poisoned=rank == 1)]
torch.save(results, f"{out}/{{rank}}.pt")
close, distributed.close = distributed.close, lambda: None  # one group for both commands
train.main(train.get_args_parser().parse_args({flags!r} + ["--batch_size", "2"]))
torch.distributed.barrier()  # the first process writes the checkpoint
eval.main(eval.get_args_parser().parse_args(["--adapter_path", {folder!r}, "--device", "cpu"]))
close()
"""


@pytest.fixture(scope="module")
def two_processes(base, scienceqa, tmp_path_factory):
    """Both processes' results of one_step, and a run of theirs, trained and evaluated."""
    out = tmp_path_factory.mktemp("two")
    flags = run_flags(base, scienceqa, out / "run", "--dropout_prob", "0")
    (out / "worker.py").write_text(WORKER.format(path=sys.path, out=str(out), flags=flags,
                                                 folder=str(out / "run")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen([*command, str(out / "worker.py")], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as workers:
        try:
            errors = workers.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            workers.terminate()  # torchrun ends its processes; killed, it would leave them behind
            raise
    assert workers.returncode == 0, errors
    return [torch.load(out / f"{rank}.pt") for rank in (0, 1)], out / "run"


def test_two_processes_give_the_same_step(two_processes):
    """2 x 4 and 2 x 2 x 2 samples against 1 x 8."""
    whole = one_step(8, "batch")
    for process in two_processes[0]:
        assert_same(process[0], whole)
        assert_same(process[1], whole)


def test_two_processes_give_the_published_mean_of_means(two_processes):
    """Each rank's samples, two by two: four micro-batches."""
    (_, _, first, _), (_, _, second, _) = two_processes[0]
    order = samples()[0::2] + samples()[1::2]
    means = [reference_loss(tiny_model(), order[i:i + 2]).item() / count_answer_tokens(order[i:i + 2]) for i in (0, 2, 4, 6)]
    assert first["loss"] == second["loss"] == pytest.approx(sum(means) / 4, rel=1e-5)
    assert torch.equal(first["step"], second["step"])


def test_one_process_not_finite_leaves_the_step_out_on_both(two_processes):
    for *_, poisoned in two_processes[0]:
        assert not poisoned["stepped"] and not poisoned["step"].nan_to_num().any() and not poisoned["gradients_left"]


def test_two_processes_give_the_same_run(two_processes, base, scienceqa, tmp_path):
    """Training and evaluation, against one process with the same effective batch."""
    folder = two_processes[1]
    alone = run(base, scienceqa, tmp_path, "--dropout_prob", "0")
    together = load(folder / "checkpoint-2.pth")["model"]
    for name, tensor in alone["model"].items():
        torch.testing.assert_close(together[name], tensor, atol=2e-3, rtol=0, msg=name)
    assert [line["train_closs"] for line in log(folder)] == pytest.approx(
        [line["train_closs"] for line in log(tmp_path)], rel=1e-4)
    assert json.loads((folder / "config.json").read_text())["world_size"] == 2
    shutil.copy(folder / "checkpoint-2.pth", tmp_path)
    evaluation.main(evaluation.get_args_parser().parse_args(["--adapter_path", str(tmp_path), "--device", "cpu"]))
    for name in ("preds.json", "generations.jsonl", "scores.json"):
        assert (folder / name).read_text() == (tmp_path / name).read_text()


def test_what_has_no_gradient_gets_zeros():
    """As the ViT's adapters in a step without pictures: weight decay and moments go on."""
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1, 2))
    p.grad = torch.tensor([3.0, 4.0])
    assert distributed.all_reduce_gradients([p, q], torch.tensor(5.0)) == 5
    assert torch.equal(p.grad, torch.tensor([3.0, 4.0])) and torch.equal(q.grad, torch.zeros(1, 2))


def test_gradients_are_clipped_at_their_common_norm():
    steps = []
    for clip in (None, 0.5):
        p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        p.grad, q.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        optimizer_step(torch.optim.SGD([p, q], lr=1.0, fused=True), NO_SCALING, [p, q], torch.tensor(1.0), clip)
        steps.append(-torch.cat((p, q)).detach())
    torch.testing.assert_close(steps[0], torch.tensor([3.0, 0, 0, 4]))
    torch.testing.assert_close(steps[1], torch.tensor([0.3, 0, 0, 0.4]))


def test_weight_decay_is_on_matrices_only():
    args = train.get_args_parser().parse_args(["--lr", "1e-3", "--weight_decay", "0.05"])
    model = tiny_model()
    decay = {id(p): group["weight_decay"] for group in make_optimizer(model, args).param_groups
             for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert decay.pop(id(p)) == (0.0 if name.endswith("bias") else 0.05), name
    assert not decay
    assert make_optimizer(model, args).defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("n, batch_size, accum", [(23, 2, 2), (16, 1, 4), (9, 4, 1)])
def test_steps_take_the_same_samples_on_any_number_of_processes(n, batch_size, accum):
    def steps(batch_size, accum, world, epoch=3):
        ranks = [list(epoch_batches(n, batch_size, accum, rank, world, 7, epoch)) for rank in range(world)]
        for parts in zip(*ranks):
            shares = [i for _, own in parts for micro in own for i in micro]
            assert sorted(shares) == sorted(parts[0][0]) and all(p[0] == parts[0][0] for p in parts)
            assert all(len(micro) == batch_size for _, own in parts for micro in own)
        return [sorted(everyone) for everyone, _ in ranks[0]]

    whole = steps(batch_size * accum * 2, 1, 1)
    assert len(whole) == steps_per_epoch(n, batch_size * accum * 2) == n // (batch_size * accum * 2)
    assert steps(batch_size, accum, 2) == steps(batch_size * accum, 1, 2) == steps(batch_size, 2 * accum, 1) == whole
    seen = [i for step in whole for i in step]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(n))
    assert steps(batch_size * accum * 2, 1, 1, epoch=4) != whole


def test_fewer_samples_than_a_step_make_one_step():
    (everyone, own), = epoch_batches(3, 4, 2, 0, 1, 0, 0)
    assert sorted(everyone) == sorted(own[0]) == [0, 1, 2]


def rank_one_of(launcher: int) -> int:
    """The process of rank 1 that torchrun started."""
    children = (Path("/proc") / str(launcher) / "task" / str(launcher) / "children").read_text().split()
    return next(int(pid) for pid in children if b"\0RANK=1\0" in (Path("/proc") / pid / "environ").read_bytes())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to find the processes in")
def test_a_killed_process_ends_the_run_which_then_resumes(base, scienceqa, tmp_path):
    folder = tmp_path / "run"
    flags = run_flags(base, scienceqa, folder, "--batch_size", "2", "--epochs", "1000")
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(ROOT / "train.py"), *flags], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as workers:
        try:
            deadline = time.monotonic() + 120
            while not (folder / "checkpoint-1.pth").exists():
                assert workers.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            os.kill(rank_one_of(workers.pid), signal.SIGKILL)
            errors = workers.communicate(timeout=60)[1]
        finally:
            workers.terminate()
    assert workers.returncode != 0 and "Signal 9 (SIGKILL)" in errors and "rank      : 1" in errors
    done = len(log(folder))
    resumed = [*flags[:-1], str(done + 1), "--lr", "1e-2", "--batch_size", "4", "--resume", str(folder)]
    train.main(train.get_args_parser().parse_args(resumed))
    assert [line["epoch"] for line in log(folder)] == list(range(done + 1))
    assert load(folder / f"checkpoint-{done}.pth")["epoch"] == done


def flat(thing):
    """All tensors and numbers of a checkpoint, in order."""
    if isinstance(thing, dict):
        return [leaf for key in sorted(thing, key=str) for leaf in flat(thing[key])]
    if isinstance(thing, (list, tuple)):
        return [leaf for item in thing for leaf in flat(item)]
    return [torch.as_tensor(thing)] if isinstance(thing, (int, float, torch.Tensor)) else []


def identical(a, b) -> bool:
    return all(flat(a[part]) and len(flat(a[part])) == len(flat(b[part])) and
               all(torch.equal(x, y) for x, y in zip(flat(a[part]), flat(b[part]))) for part in ("model", "optimizer"))


def test_runs_repeat_and_resume_bit_for_bit(base, scienceqa, tmp_path):
    """With dropout and stochastic depth on: both draw alike again."""
    flags = ("--drop_path", "0.2", "--dropout_prob", "0.3", "--dropout_lim", "0.3")
    first = run(base, scienceqa, tmp_path / "a", *flags)
    assert identical(run(base, scienceqa, tmp_path / "b", *flags), first)
    assert not identical(load(tmp_path / "a" / "checkpoint-1.pth"), first)
    (tmp_path / "b" / "checkpoint-2.pth").unlink()
    (tmp_path / "b" / "checkpoint-1.pth").unlink()
    torch.manual_seed(99)
    assert identical(run(base, scienceqa, tmp_path / "b", *flags, "--resume", str(tmp_path / "b")), first)
    logs = [[{key: line[key] for key in ("epoch", "train_lr", "train_closs")} for line in log(tmp_path / name)]
            for name in "ab"]
    assert logs[0] == logs[1] and [line["epoch"] for line in logs[0]] == [0, 1, 2]
    assert not identical(run(base, scienceqa, tmp_path / "c", *flags, "--seed", "1"), first)


def test_micro_batches_give_the_same_run(base, scienceqa, tmp_path):
    """Whole runs: the loss of every epoch, and the adapters at the end."""
    still = ("--dropout_prob", "0")
    whole = run(base, scienceqa, tmp_path / "whole", *still)
    parts = run(base, scienceqa, tmp_path / "parts", *still, "--batch_size", "1", "--accum_iter", "4")
    moved = 0.0
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, atol=2e-3, rtol=0, msg=name)
        moved = max(moved, tensor.abs().max().item() if ".conv_D." in name else 0.0)
    assert moved > 0.02  # far more than the tolerance: it trained


def test_training_lowers_the_loss(base, scienceqa, tmp_path):
    run(base, scienceqa, tmp_path, "--epochs", "8", "--lr", "3e-2")
    losses = [line["train_closs"] for line in log(tmp_path)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.4
