"""Fine-tunes LaVIN on ScienceQA: `python train.py ...`, or `torchrun --nproc_per_node N train.py ...` for N GPUs.

Writes config.json, log.txt and checkpoint-{epoch}.pth to the run's folder, --output_dir; eval.py adds the scores.
"""

import argparse
import gc
import math
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # tensor sizes change from step to step

import torch

from lavin.fast.speed_up import speed_up
from lavin.kernels.fp8 import check_fp8
from lavin.mm_adapter import AdapterConfig, dropout_schedule
from lavin.runtime import distributed
from lavin.runtime.console import is_main_process, print_rank0, progress_bar
from lavin.runtime.device import choose_device, choose_dtype
from lavin.runtime.errors import UserError, one_line_errors
from lavin.weights.adapters import save_adapters
from lavin.weights.base import require_base
from lavin.weights.load import load_base
from util.data.batches import epoch_batches, load_examples, steps_per_epoch
from util.data.instructions import decode_images
from util.flags import caption_path, check_counts, check_shared, shared_flags
from util.lr_sched import SCHEDULES, adjust_learning_rate, check_schedule
from util.runs import append_log, checkpoint_path, clear_results, last_checkpoint, write_config
from util.training.accumulation import (
    accumulate_with_oom_retry,
    count_answer_tokens,
    probe_max_tokens,
    with_loss_weights,
)
from util.training.optimizer import make_optimizer, optimizer_step
from util.training.resume import resume_training

STEPS_PER_DISPLAY = 10  # steps between displayed losses: reading a loss makes the host wait for the GPU


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train.py", description=__doc__.splitlines()[0], parents=[shared_flags()],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data_path", default="", help="all_data.json for --do_pretrain (the one in --data_root)")
    add("--do_pretrain", action="store_true",
        help="instruction tuning instead of ScienceQA, on the file of tools/data_processing.py")

    add("--drop_path", default=0.0, type=float, help="stochastic depth of LLaMA's layers")
    add("--dropout_prob", default=0.1, type=float, help="adapter dropout of the first layer")
    add("--dropout_var", default=1.0, type=float, help="factor of the dropout from each layer to the next")
    add("--dropout_lim", default=0.2, type=float, help="limit at which the dropout stops growing or falling")

    add("--batch_size", default=4, type=int, help="samples per micro-batch on one GPU")
    add("--accum_iter", default=1, type=int, help="micro-batches per optimizer step")
    add("--epochs", default=20, type=int)
    add("--lr_schedule", default="cosine", choices=SCHEDULES)
    add("--warmup_epochs", default=2.0, type=float, help="linear warm-up; none with --lr_schedule cyclical")
    add("--blr", default=9e-3, type=float, help="base learning rate: lr = blr * effective batch / 256")
    add("--lr", default=None, type=float, help="learning rate, instead of --blr")
    add("--min_lr", default=0.0, type=float, help="lowest learning rate of the cosine and cyclical schedules")
    add("--weight_decay", default=0.02, type=float, help="on matrices; biases and vectors have none")
    add("--clip_grad", default=None, type=float, help="maximum gradient norm; default: no clipping")
    add("--loss_norm", default="batch", choices=["batch", "microbatch"],
        help="mean over the answer tokens of the optimizer step, or of each micro-batch as published")
    add("--gradient_checkpointing", action="store_true", help="recompute layers in the backward pass: less memory")

    add("--output_dir", default="./output_dir", help="the run's folder")
    add("--log_dir", default=None, help="folder for TensorBoard events (pip install tensorboard)")
    add("--resume", default="", help="checkpoint-*.pth, or a run's folder, to continue from")
    add("--seed", default=0, type=int)
    return parser


def check_args(args) -> None:
    """Raises UserError for invalid flags, before anything is loaded."""
    check_shared(args)
    check_counts(args, "batch_size", "accum_iter")
    if not 0 <= args.drop_path < 1:
        raise UserError(f"--drop_path {args.drop_path} must lie in [0, 1)")
    try:
        dropout_schedule(1, args.dropout_prob, args.dropout_var, args.dropout_lim)
        check_schedule(args)
    except ValueError as error:
        raise UserError(str(error)) from error


def train_epoch(model, optimizer, scaler, examples, args, epoch: int, rank: int, world: int, max_tokens: float
                ) -> tuple[dict, float]:
    """One epoch; returns its line of log.txt, and `max_tokens`, lowered where a pass ran out of memory."""
    model.train()
    torch.manual_seed((args.seed * 1_000_003 + epoch) * world + rank)  # of dropout; per epoch: a resumed run repeats it
    parameters = [p for p in model.parameters() if p.requires_grad]
    effective_batch = args.batch_size * args.accum_iter * world
    n_steps = steps_per_epoch(len(examples), effective_batch)
    batches = epoch_batches(len(examples), args.batch_size, args.accum_iter, rank, world, args.seed, epoch)
    bar = progress_bar(batches, f"epoch {epoch}", total=n_steps, unit="step")
    steps, rates, start = [], [], time.perf_counter()
    for step, (global_batch, local_batches) in enumerate(bar):
        # the epoch's fraction counts samples, so that the rate does not depend on the number of processes
        rates.append(adjust_learning_rate(optimizer, epoch + step * effective_batch / len(examples), args))
        micro_batches = [decode_images([examples[i] for i in indices], args.num_workers) for indices in local_batches]
        n_answer_tokens = count_answer_tokens([examples[i] for i in global_batch])
        n_micro_batches = sum(math.ceil(len(global_batch[r::world]) / args.batch_size) for r in range(world))
        weighted_examples = with_loss_weights(micro_batches, n_answer_tokens, args.loss_norm, n_micro_batches)
        loss, max_tokens = accumulate_with_oom_retry(model, weighted_examples, max_tokens, scaler)
        steps.append(optimizer_step(optimizer, scaler, parameters, loss, args.clip_grad))
        if step % STEPS_PER_DISPLAY == 0:
            bar.set_postfix(loss=f"{steps[-1][0].item():.4f}", lr=f"{rates[-1]:.2e}", refresh=False)
    losses = [loss for loss, stepped in torch.stack(steps).tolist() if stepped]
    seconds = time.perf_counter() - start
    return {"epoch": epoch, "train_lr": sum(rates) / len(rates),
            "train_closs": sum(losses) / len(losses) if losses else None, "steps_left_out": len(steps) - len(losses),
            "samples_per_s": n_steps * min(effective_batch, len(examples)) / seconds, "seconds": seconds,
            "peak_memory_gib": peak_memory_gib(model.device)}, max_tokens


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def main(args) -> None:
    rank, world, local_rank = distributed.init(args.model_parallel_size)
    if args.lr is None:
        args.lr = args.blr * args.batch_size * args.accum_iter * world / 256
    check_args(args)
    require_base(args.llama_model_path, args.llm_model, use_vicuna=args.use_vicuna)
    device = choose_device(args.device, local_rank)
    dtype = choose_dtype(args.precision, device)
    if args.bits == "fp8":
        check_fp8(device, dtype)
    # with warn_only, the ViT's attention would not be deterministic; bitsandbytes does not guarantee determinism
    torch.use_deterministic_algorithms(True, warn_only=args.bits in ("4bit", "8bit"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)  # the same initial adapters on every rank

    adapter = AdapterConfig(**{name: getattr(args, name) for name in AdapterConfig.__dataclass_fields__})
    model, tokenizer = load_base(args.llama_model_path, args.llm_model, args.vision_model, adapter, device, dtype,
                                 args.drop_path, use_vicuna=args.use_vicuna, bits=args.bits)
    speed_up(model, args.bits)
    model.set_gradient_checkpointing(args.gradient_checkpointing)
    examples = load_examples(args, caption_path(args), tokenizer, model.vision.image_size)
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    folder = Path(args.output_dir)
    first_epoch = resume_training(model, optimizer, scaler, last_checkpoint(args.resume), args) if args.resume else 0
    if is_main_process():
        if not args.resume and clear_results(folder):
            print_rank0(f"{folder} held an earlier run, which this one replaces")
        write_config(folder, vars(args), device, world, model.llama.config.n_layers)
    print_rank0(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained parameters, {dtype} on "
                f"{device}, effective batch {args.batch_size * args.accum_iter * world}, lr {args.lr:.3g}, "
                f"{args.lr_schedule}")
    events = open_tensorboard(args.log_dir) if args.log_dir and is_main_process() else None

    max_tokens = distributed.all_min(probe_max_tokens(model, examples, scaler))
    gc.collect()
    gc.freeze()  # excludes the objects of loading and compiling from later garbage collections
    model.zero_grad()
    for epoch in range(first_epoch, args.epochs):
        entry, max_tokens = train_epoch(model, optimizer, scaler, examples, args, epoch, rank, world, max_tokens)
        if is_main_process():
            append_log(folder, entry)
            save_adapters(model, checkpoint_path(folder, epoch), epoch=epoch, flags=vars(args),
                          optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            if events:
                for name in ("train_closs", "train_lr"):
                    events.add_scalar(name, entry[name] or math.nan, epoch)
        print_rank0(f"epoch {epoch}: loss {entry['train_closs'] or math.nan:.4f}, "
                    f"{entry['samples_per_s']:.1f} samples/s"
                    + (f", {entry['steps_left_out']} steps left out (not finite)" if entry["steps_left_out"] else ""))
    distributed.close()
    print_rank0(f"run: {folder}")


def open_tensorboard(folder: str):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--log_dir writes TensorBoard events: pip install tensorboard, or leave it out") from error
    return SummaryWriter(folder)


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
