"""The work of train.py: it opens the run's folder, loads the data and the model, and trains."""

from pathlib import Path

import torch

from lavin.fast.speed_up import check_fast_paths
from lavin.runtime import distributed
from lavin.runtime.console import counted, is_main_process, print_rank0, working_on
from lavin.runtime.device import choose_device, choose_dtype, set_determinism
from lavin.runtime.errors import UserError
from lavin.runtime.flags import Flags
from lavin.weights.base import base_path, require_base
from lavin.weights.hub import commits, model_path
from util.data.checksums import file_states, require_unchanged
from util.data.examples import load_examples, load_training_data
from util.fingerprint import equal_on_all_nodes, frozen_files, with_fetched
from util.provenance import write_config
from util.runs import locked
from util.shared_base import SharedBase
from util.trackers import require_trackers
from util.training.epoch_record import EpochRecord
from util.training.metrics import drop_metrics
from util.training.recipe import differences, fit_effective_batch, make_recipe
from util.training.resume import take_flags_of_run
from util.training.run_folder import RunFolder, open_run
from util.training.settings import TrainSettings, get_args_parser
from util.training.trainer import Trainer


def main(args: Flags) -> None:
    """The command train.py."""
    run(args, SharedBase())
    distributed.close()


def run(args: Flags, shared: SharedBase) -> None:
    """The command among others of its process, which share the base. shared: the object that lends it."""
    effective_batch = take_flags_of_run(args, get_args_parser()) if args.resume else None
    rank, world, local_rank = distributed.init(args.model_parallel_size)
    if effective_batch:
        fit_effective_batch(args, effective_batch, world)
    settings = TrainSettings.of(args, world)
    require_base(settings.base.llama_model_path, settings.base.llm_model, use_vicuna=settings.base.use_vicuna)
    device = choose_device(settings.execution.device, local_rank)
    with locked(settings.run.output_dir), working_on(Path(settings.run.output_dir).name):
        train(settings, rank, world, device, shared)


def train(settings: TrainSettings, rank: int, world: int, device: torch.device, shared: SharedBase) -> None:
    # everything that is fast and may refuse the command comes first
    dtype = choose_dtype(settings.execution.precision, device)
    require_trackers(settings.run.trackers)
    data = distributed.from_rank_0(lambda: load_training_data(settings.data))
    states = file_states([*frozen_files(settings.base), *data.picture_paths.values()])
    recipe = equal_on_all_nodes(lambda: make_recipe(settings, dtype, world, data), differences)
    run = distributed.from_rank_0(lambda: open_run(settings.run, recipe, settings.schedule.epochs))
    if run.finished:
        print_rank0(f"run: {run.folder}, which is finished: {counted(settings.schedule.epochs, 'epoch')} of this "
                    "recipe")
        return
    model, tokenizer = load_model(settings, device, dtype, shared)
    examples = load_examples(data, settings.data, tokenizer, model.vision.image_size, settings.adapter.n_prompt,
                             settings.execution.num_workers)
    require_unchanged(states)
    run.recipe = with_fetched(recipe, settings.base.vision_model)
    trainer = Trainer(settings, model, examples, run, rank, world)
    require_equal_examples(trainer.examples_sha256)
    record = trainer.restore(tokenizer)
    begin(run, settings, device, world, model.llama.config.n_layers, record)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print_rank0(f"{n_trained:,} trained parameters, {dtype} on {device}, effective batch {trainer.effective_batch}, "
                f"lr {settings.schedule.lr:.3g}, {settings.schedule.lr_schedule}")
    trainer.train(record)
    part = (f", {trainer.end} of {counted(settings.schedule.epochs, 'epoch')}: the same command without "
            "--stop_after_epoch goes on" if trainer.end < settings.schedule.epochs else "")
    print_rank0(f"run: {run.folder}{part}")


def require_equal_examples(sha256: str) -> None:
    """Raises UserError where processes have other examples, of the same files: they divide the samples of a step by
    these. sha256: the checksum of this process's examples."""
    of_rank_0, *of_others = distributed.all_gather_object(sha256)
    differing = [str(rank) for rank, other in enumerate(of_others, 1) if other != of_rank_0]
    if differing:
        raise UserError(f"rank {', '.join(differing)} has other token ids than rank 0, of the same files: install the "
                        "same versions of sentencepiece and tokenizers on all nodes")


def load_model(settings: TrainSettings, device: torch.device, dtype: torch.dtype, shared: SharedBase):
    """The model with fresh adapters, the same on every rank, and its tokenizer."""
    base, execution = settings.base, settings.execution
    check_fast_paths(device, dtype, base.bits, execution.compile, execution.cuda_graphs)
    # with warn_only, the ViT's attention would not be deterministic; bitsandbytes does not guarantee determinism
    set_determinism(True, warn_only=base.bits in ("4bit", "8bit"))
    torch.manual_seed(settings.optimization.seed)
    model, tokenizer = shared.lend(base, execution, settings.adapter, device, dtype, settings.data.max_seq_len,
                                   settings.optimization.drop_path)
    model.set_gradient_checkpointing(settings.optimization.gradient_checkpointing)
    return model, tokenizer


def begin(run: RunFolder, settings: TrainSettings, device: torch.device, world: int, n_layers: int,
          record: EpochRecord) -> None:
    """Writes, on rank 0, what the run's folder holds before the first step. record: the place where training begins."""
    if is_main_process():
        place, base = {"epoch": record.epoch, "step": len(record.steps)}, settings.base
        run.begin(settings.flags)
        drop_metrics(run.path, **place)
        write_config(run.path, settings.flags, device, world, n_layers, place if run.checkpoint else None,
                     commits({base.llm_model: base_path(base.llama_model_path, base.llm_model),
                              base.vision_model: model_path(base.vision_model, "--vision_model")}))
