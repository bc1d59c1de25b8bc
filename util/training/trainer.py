"""The training loop: it saves, stops when it is asked to, and ends where training diverges."""

import gc
import math
import time
from functools import partial
from itertools import islice

import numpy as np
import torch

from lavin.runtime import distributed, signals
from lavin.runtime.console import counted, duration, is_main_process, print_rank0, progress_bar
from lavin.runtime.errors import UserError
from lavin.tokenizer import TOKENIZATION, Tokenizer
from lavin.weights.adapters import pack_adapters
from util.data.batches import epoch_batches, micro_batches, steps_per_epoch
from util.data.examples import any_joined, examples_sha256
from util.data.images import decode_images
from util.lr_sched import adjust_learning_rate
from util.runs import TRACKERS
from util.trackers import Trackers
from util.trained_model import image_statistics
from util.training.accumulation import accumulate_with_oom_retry, loss_weights, probe_max_tokens
from util.training.epoch_record import MAX_SKIPPED, EpochRecord, loss_in_words
from util.training.metrics import Metrics
from util.training.optimizer import make_optimizer, make_scaler, optimizer_step
from util.training.recipe import INPUTS
from util.training.resume import restore
from util.training.run_folder import RunFolder
from util.training.settings import TrainSettings
from util.training.throughput import frozen_weights, peak_flops, peak_memory_gib, step_flops


class Trainer:
    """Trains the adapters of `model` on `examples` (by question id) in the run's folder.

    rank, world: this process's rank among the data-parallel processes, and their number. max_tokens: the most tokens of
    one pass, which is lowered where a pass ran out of memory.
    """

    metrics: Metrics

    def __init__(self, settings: TrainSettings, model, examples: dict, run: RunFolder, rank: int, world: int):
        self.settings, self.model, self.run, self.rank, self.world = settings, model, run, rank, world
        self.qids, self.examples = list(examples), list(examples.values())
        self.examples_sha256 = examples_sha256(examples)
        self.effective_batch = settings.optimization.effective_batch(world)
        self.n_steps = steps_per_epoch(len(examples), self.effective_batch)
        self.optimizer = make_optimizer(model, settings.optimization.weight_decay)
        self.scaler = make_scaler(model)
        epochs = settings.schedule.epochs
        self.end = min(epochs, settings.run.stop_after_epoch or epochs)  # epochs after which this command stops
        self.frozen = frozen_weights(model)
        self.costs = [step_flops(self.frozen, [example]) for example in self.examples]
        self.max_tokens = math.inf
        self.last_save = time.monotonic()

    def restore(self, tokenizer: Tokenizer) -> EpochRecord:
        """The record of the epoch to begin or to go on with. tokenizer: the tokenizer that made the examples."""
        if not self.run.checkpoint:
            return EpochRecord(0)
        record = restore(self.model, self.optimizer, self.scaler, self.run.checkpoint, self.examples_sha256,
                         partial(any_joined, tokenizer, self.examples))
        print_rank0(f"{self.run.folder} goes on from {self.run.checkpoint.path.name}: epoch {record.epoch}, step "
                    f"{len(record.steps)} of {self.n_steps}")
        return record

    def train(self, record: EpochRecord) -> None:
        """Trains the epochs from the record's on."""
        run = self.settings.run
        with Trackers(run.trackers, self.run.folder, self.run.path / TRACKERS, self.settings.flags,
                      first_step=record.epoch * self.n_steps + len(record.steps), log_dir=run.log_dir) as trackers:
            self.metrics = Metrics(trackers, self.frozen, peak_flops(self.model.device, self.model.dtype,
                                                                     self.world * distributed.model_parallel_size))
            self.max_tokens = distributed.all_min(probe_max_tokens(self.model, self.examples, self.scaler))
            gc.collect()
            gc.freeze()  # excludes the objects of loading and compiling from later garbage collections
            try:
                self.optimizer.zero_grad()
                self.last_save = time.monotonic()
                with signals.deferred():
                    self.train_epochs(record)
            finally:
                gc.unfreeze()

    def train_epochs(self, record: EpochRecord) -> None:
        """Trains and saves epoch by epoch. Raises Stopped between two of them where a process was asked to stop."""
        while record.epoch < self.end:
            self.train_epoch(record)
            entry = record.log_line(self.n_steps * min(self.effective_batch, len(self.examples)),
                                    peak_memory_gib(self.model.device))
            self.save(record, entry)
            print_rank0(f"{self.run.folder.name}, epoch {record.epoch}: {loss_in_words(entry['train_closs'])}, "
                        f"{entry['samples_per_s']:.1f} samples/s"
                        + (f", {counted(n, 'skipped step')} (not finite)" if (n := entry["skipped_steps"]) else "")
                        + self.time_left(record))
            if record.stop and record.epoch + 1 < self.end:
                self.stop(record)
            record = EpochRecord(record.epoch + 1, record.skipped)

    def time_left(self, record: EpochRecord) -> str:
        """Words on how long this command will train, by the speed of the epoch; none in its last epoch, of which the
        progress itself says it."""
        if record.epoch + 1 == self.end:
            return ""
        n_steps = (self.end - record.epoch) * self.n_steps - len(record.steps)
        return f", about {duration(record.seconds_for(n_steps))} left in all"

    def batches(self, epoch: int, first_step: int = 0):
        batches = epoch_batches(self.costs, self.effective_batch, self.rank, self.world,
                                self.settings.optimization.seed, epoch)
        return islice(batches, first_step, None)

    def train_epoch(self, record: EpochRecord) -> None:
        """Makes the steps that are not in the record yet. Raises Stopped, after saving, where a process was asked to
        stop.
        """
        self.model.train()
        first_step = len(record.steps)
        self.metrics.restart(first_step)
        record.start_clock()
        with progress_bar(self.batches(record.epoch, first_step), f"epoch {record.epoch}", total=self.n_steps,
                          initial=first_step, unit="step") as bar:
            for step, (global_batch, local_batch) in enumerate(bar, first_step):
                self.train_step(record, step, global_batch, local_batch)
                self.observe(record, bar)
                if step + 1 < self.n_steps:  # else the epoch's own checkpoint follows
                    self.save_if_due(record)
            record.read_all()
            self.observe(record, bar)

    def train_step(self, record: EpochRecord, step: int, global_batch: list[int], local_batch: list[int]) -> None:
        """Makes an optimizer step on the samples of the global batch, of which this rank takes the local batch."""
        chosen = self.settings.optimization
        torch.manual_seed(dropout_seed(chosen.seed, record.epoch, step, self.rank))
        # the epoch's fraction counts samples, so that the rate does not depend on the number of processes
        fraction = step * self.effective_batch / len(self.examples)
        rate = adjust_learning_rate(self.optimizer, record.epoch + fraction, self.settings.schedule)
        groups = [global_batch] if chosen.loss_norm == "batch" else micro_batches(global_batch, chosen.batch_size)
        weights = loss_weights(groups, self.examples)
        examples = decode_images([self.examples[i] for i in local_batch], self.settings.execution.num_workers)
        weighted_examples = [(example, weights[i]) for i, example in zip(local_batch, examples, strict=True)]
        loss, self.max_tokens = accumulate_with_oom_retry(self.model, weighted_examples, self.max_tokens, self.scaler)
        numbers = optimizer_step(self.optimizer, self.scaler, self.optimizer.parameters, loss, chosen.clip_grad,
                                 stop=signals.requested is not None)
        record.add(numbers, rate, has_answers=any(weights.values()))
        self.metrics.add([self.examples[i] for i in global_batch])

    def observe(self, record: EpochRecord, bar) -> None:
        """Reports the steps that have been read. Raises UserError where training has diverged."""
        n = len(record.steps)
        if self.write_metrics(record):
            bar.set_postfix_str(f"{loss_in_words(record.steps[-1][0])}, lr {record.rates[n - 1]:.2e}"
                                f"{self.time_left(record)}", refresh=False)
        if record.skipped >= MAX_SKIPPED or record.skipped_steps() == self.n_steps:
            loss, qids = record.steps[-1][0], [self.qids[i] for i in next(self.batches(record.epoch, n - 1))[0]]
            questions = ", ".join(qids[:8]) + ", ..." * (len(qids) > 8)
            raise UserError(f"training diverged: the gradients of {counted(record.skipped, 'step')} in a row are not "
                            f"finite, up to epoch {record.epoch}, step {n} ({loss_in_words(loss)}, loss scale "
                            f"{self.scaler.get_scale():g}, questions {questions}): take a lower --lr or --clip_grad, "
                            "or check the base weights")

    def write_metrics(self, record: EpochRecord) -> bool:
        """Writes the line of metrics.jsonl that is due after the steps that have been read. Returns whether one was."""
        is_due = is_main_process() and self.metrics.is_due(len(record.steps), self.n_steps)
        if is_due:
            self.metrics.write(self.run.path, record, peak_memory_gib(self.model.device), self.n_steps)
        return is_due

    def save_if_due(self, record: EpochRecord) -> None:
        if record.stop:
            self.save(record)
            self.stop(record)
        if time.monotonic() - self.last_save > 60 * self.settings.run.save_every_minutes:
            self.save(record)

    def stop(self, record: EpochRecord) -> None:
        raise signals.Stopped(f"stopped by {signals.requested or 'a signal'}, and saved, in epoch {record.epoch} after "
                              f"step {len(record.steps)} of {self.n_steps}: the same command, or --resume "
                              f"{self.run.folder}, goes on")

    def save(self, record: EpochRecord, entry: dict | None = None) -> None:
        """Saves a checkpoint, on rank 0. entry: the epoch's line of log.txt; None in the middle of the epoch."""
        self.last_save = time.monotonic()
        if is_main_process():
            state = record.state_dict()
            self.write_metrics(record)  # first: a run that goes on from the checkpoint writes no line on its steps
            content = pack_adapters(
                self.model, epoch=record.epoch, flags=self.settings.flags, optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(), skipped=record.skipped, record=None if entry else state,
                examples=self.examples_sha256, went_back_to=self.run.went_back_to, tokenization=TOKENIZATION,
                **{name: self.run.recipe[name] for name in INPUTS}, **image_statistics(self.model))
            self.run.save(content, record.epoch, entry)


def dropout_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """The seed of a step's dropout masks: a run that goes on in the middle of an epoch repeats them without a saved
    state."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0])
