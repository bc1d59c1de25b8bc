"""The study's scripts train by the published loss, on any number of GPUs: a loop that is written by hand, as the public
code has it, ends with the same adapters."""

import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DistributedSampler

from lavin.model import pack
from tiny import ROOT, tiny_example, tiny_model
from train import get_args_parser
from util.lr_sched import adjust_learning_rate
from util.trackers import Trackers
from util.training import optimizer
from util.training.epoch_record import EpochRecord
from util.training.metrics import Metrics
from util.training.settings import TrainSettings
from util.training.trainer import Trainer

EPOCHS, STEPS = 2, 2  # of 32 samples
SHORT = ("--epochs", str(EPOCHS), "--warmup_epochs", "0.5", "--blr", "0.1", "--dropout_prob", "0")


def settings_of_scripts(gpus: int) -> TrainSettings:
    """The settings that scripts/common.sh gives to train.py, with few epochs, a higher rate, and no dropout."""
    words = subprocess.run(["bash", "-c", "source scripts/common.sh && printf '%s\\n' \"${RECIPE[@]}\""], cwd=ROOT,
                           env={**os.environ, "GPUS": str(gpus)}, check=True, capture_output=True, text=True).stdout
    return TrainSettings.of(get_args_parser().parse_args([*words.split("\n")[:-1], *SHORT]), gpus)


def samples() -> list:
    """The samples of an epoch, with answers of 1 to 11 tokens, so that a mean over micro-batches is not the step's
    mean."""
    return [tiny_example(i, 2 + i % 5, 1 + 7 * i % 11, image=i % 3 == 0) for i in range(STEPS * 32)]


@pytest.fixture(scope="module")
def float64():
    """The model casts to float32 with .float(), and the loss weights have that type. Of the optimizer step, AdamW's
    `found_inf`, which is made of a boolean, stays so."""
    to_float32 = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: to_float32(tensor) if tensor.dtype == torch.bool else
                      tensor.double())
        patch.setattr(torch, "float32", torch.float64)
        yield
    torch.set_default_dtype(torch.float32)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fresh_model():
    model = tiny_model(dropout_prob=0.0).double()
    for name, p in model.named_parameters():  # the base is frozen in training
        p.requires_grad_("adapter" in name)
    return model


class Ranks:
    """Threads that stand for the processes of torchrun, each with a model of its own. They sum their gradients."""

    def __init__(self, world: int):
        self.world, self.barrier, self.sent = world, threading.Barrier(world), {}
        self.rank = threading.local()

    def all_reduce_gradients(self, parameters, numbers):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.sent[self.rank.number] = [*gradients, numbers]
        self.barrier.wait(60)
        *sums, numbers = [sum(tensors) for tensors in zip(*(self.sent[r] for r in range(self.world)), strict=True)]
        self.barrier.wait(60)
        for p, gradient in zip(parameters, sums, strict=True):
            p.grad.copy_(gradient)
        return numbers

    def train(self, settings: TrainSettings, models: list) -> list[float]:
        """Trains all epochs; returns the losses of the steps."""
        records, errors = [[] for _ in models], []

        def of_rank(rank: int) -> None:
            self.rank.number = rank
            try:
                run = SimpleNamespace(folder="", path=None, checkpoint=None)
                trainer = Trainer(settings, models[rank], dict(enumerate(samples())), run, rank, self.world)
                trainer.metrics = Metrics(Trackers("", Path(), Path(), {}), trainer.frozen, None)
                for epoch in range(EPOCHS):
                    record = EpochRecord(epoch)
                    for step, (global_batch, local_batch) in enumerate(trainer.batches(epoch)):
                        trainer.train_step(record, step, global_batch, local_batch)
                    record.read_all()
                    records[rank] += [loss for loss, *_ in record.steps]
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()
        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert all(losses == records[0] for losses in records)
        return records[0]


@pytest.fixture(scope="module")
def published(float64) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapters and the losses of the public code's loop on four GPUs with micro-batches of two, of which each step
    accumulates four. The mean over the GPUs is that of DistributedDataParallel."""
    schedule = settings_of_scripts(4).schedule
    model, examples = fresh_model().train(), samples()
    matrices, vectors = ([p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == wide]
                         for wide in (True, False))
    adamw = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95),
                              weight_decay=0.02)
    samplers = [DistributedSampler(examples, num_replicas=4, rank=rank) for rank in range(4)]
    losses = []
    for epoch in range(EPOCHS):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [list(sampler) for sampler in samplers]
        n_micro_steps = len(orders[0]) // 2
        for micro_step in range(n_micro_steps):
            if micro_step % 4 == 0:
                adjust_learning_rate(adamw, micro_step / n_micro_steps + epoch, schedule)
                losses.append(0.0)
            for order in orders:
                pair = [examples[i] for i in order[2 * micro_step:2 * micro_step + 2]]
                n_tokens = sum(len(example.ids) - example.answer_start for example in pair)
                loss = model(pack(pair)) / n_tokens / 4 / len(orders)
                loss.backward()
                losses[-1] += loss.item()
            if micro_step % 4 == 3:
                adamw.step()
                adamw.zero_grad(set_to_none=False)
    return trained(model), losses


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_the_scripts_train_by_the_published_loss_on_any_number_of_gpus(published, monkeypatch, gpus):
    expected, expected_losses = published
    ranks, models = Ranks(gpus), [fresh_model().train() for _ in range(gpus)]
    monkeypatch.setattr(optimizer.distributed, "all_reduce_gradients", ranks.all_reduce_gradients)
    losses = ranks.train(settings_of_scripts(gpus), models)
    assert losses == pytest.approx(expected_losses, rel=1e-12) and len(losses) == EPOCHS * STEPS
    before = trained(fresh_model())
    for model in models:
        for name, tensor in trained(model).items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-12, rtol=1e-12, msg=name)
            assert (tensor - before[name]).abs().max() > 1e-3, name
