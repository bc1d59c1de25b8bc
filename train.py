"""Fine-tunes LaVIN on ScienceQA: `python train.py ...`, or `torchrun --nproc_per_node N train.py ...` for N GPUs.

The run's folder, --output_dir, holds config.json, log.txt and checkpoint-{epoch}.pth; eval.py adds the scores.
"""

import argparse
import gc
import math
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # no two steps are of one size

import torch

from lavin import parallel
from lavin.checkpoint import load_adapters, load_base, read_adapters, require_base, save_adapters
from lavin.errors import UserError, one_line_errors
from lavin.fast import speed_up
from lavin.frozen import check_fp8
from lavin.mm_adapter import AdapterConfig, dropout_schedule
from lavin.model import pack
from lavin.precision import choose_device, choose_dtype
from lavin.recording import forget_recorded
from util.datasets import build_example, epoch_batches, load_pictures, load_scienceqa, steps_per_epoch
from util.flags import captions_of, check_counts, check_shared, shared_flags
from util.instructions import load_instructions, with_pictures
from util.logging import is_first, progress, say
from util.lr_sched import SCHEDULES, adjust_learning_rate, check_schedule
from util.runs import append_log, checkpoint_path, last_checkpoint, start_afresh, write_config


STEPS_SHOWN = 10  # reading a loss makes the host wait for the GPU
TRIAL_TOKENS = 2048  # of the pass that shows how much memory a token takes
MEMORY_SHARE = 0.9  # of the GPU's memory that passes may fill


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train.py", description=__doc__.splitlines()[0], parents=[shared_flags()],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data_path", default="", help="all_data.json of --do_pretrain (the one in --data_root)")
    add("--do_pretrain", action="store_true", help="instruction tuning in place of ScienceQA: tools/data_processing.py")

    add("--drop_path", default=0.0, type=float, help="stochastic depth of LLaMA's layers")
    add("--dropout_prob", default=0.1, type=float, help="adapter dropout of the first layer")
    add("--dropout_var", default=1.0, type=float, help="factor of the dropout from each layer to the next")
    add("--dropout_lim", default=0.2, type=float, help="dropout at which the growth or fall ends")

    add("--batch_size", default=4, type=int, help="samples of a micro-batch on one GPU")
    add("--accum_iter", default=1, type=int, help="micro-batches of an optimizer step")
    add("--epochs", default=20, type=int)
    add("--lr_schedule", default="cosine", choices=SCHEDULES)
    add("--warmup_epochs", default=2.0, type=float, help="linear warm-up; none with --lr_schedule cyclical")
    add("--blr", default=9e-3, type=float, help="base learning rate: lr = blr * effective batch / 256")
    add("--lr", default=None, type=float, help="learning rate itself, in place of --blr")
    add("--min_lr", default=0.0, type=float, help="lower end of the cosine and cyclical schedules")
    add("--weight_decay", default=0.02, type=float, help="on matrices; biases and vectors have none")
    add("--clip_grad", default=None, type=float, help="largest gradient norm; default: no clipping")
    add("--loss_norm", default="batch", choices=["batch", "microbatch"],
        help="mean over the answer tokens of the optimizer step, or of each micro-batch as published")
    add("--gradient_checkpointing", action="store_true", help="recompute layers in the backward pass: less memory")

    add("--output_dir", default="./output_dir", help="the run's folder")
    add("--log_dir", default=None, help="folder for TensorBoard events (pip install tensorboard)")
    add("--resume", default="", help="checkpoint-*.pth, or a run's folder, to go on from")
    add("--seed", default=0, type=int)
    return parser


def check_args(args) -> None:
    """Refuses what cannot work before anything is loaded."""
    check_shared(args)
    check_counts(args, "batch_size", "accum_iter")
    if not 0 <= args.drop_path < 1:
        raise UserError(f"--drop_path {args.drop_path} must lie in [0, 1)")
    try:
        dropout_schedule(1, args.dropout_prob, args.dropout_var, args.dropout_lim)
        check_schedule(args)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_examples(args, tokenizer, image_size: int) -> list:
    """The train split, tokenized and with its pictures; with --do_pretrain, the records of instruction tuning."""
    if args.do_pretrain:
        return load_instructions(args, tokenizer, image_size)
    data = load_scienceqa(args.data_root, "train", captions_of(args))
    pictures = load_pictures(data, image_size, args.num_workers, args.skip_bad)
    with progress(data.problems, "problems") as bar:  # closed before an error is told
        examples = [build_example(data, qid, pictures.get(qid), tokenizer, args.prompt_format, args.n_prompt,
                                  args.max_seq_len) for qid in bar]
    cut = sum(example.answer_start == len(example.ids) for example in examples)
    if cut == len(examples):
        raise UserError(f"--max_seq_len {args.max_seq_len} leaves no answer to learn from: raise it")
    say(f"{len(examples)} problems, {len(pictures)} with a picture, {len(data.skipped)} left out for their picture"
        + (f", {cut} whose answer lies beyond --max_seq_len {args.max_seq_len}" if cut else ""))
    return examples


def make_optimizer(model, args) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def answer_tokens(examples: list) -> int:
    return sum(len(example.ids) - example.answer_start for example in examples)


def weigh(micro_batches: list[list], n_answer_tokens: int, loss_norm: str, n_micro: int) -> list[tuple]:
    """(example, factor in the loss) for all samples of this process.

    n_answer_tokens: of all samples of the step, on all processes. n_micro: micro-batches of the step, likewise.
    """
    pairs = []
    for examples in micro_batches:
        n = n_answer_tokens if loss_norm == "batch" else answer_tokens(examples) * n_micro
        pairs += [(example, 1 / max(n, 1)) for example in examples]
    return pairs


def passes(pairs: list[tuple], most_tokens: float) -> list[list[tuple]]:
    """The samples in order, in groups of at most `most_tokens` or of one sample: the step is the same for any split."""
    groups, room = [], 0
    for example, factor in pairs:
        if len(example.ids) > room:
            groups.append([])
            room = most_tokens
        groups[-1].append((example, factor))
        room -= len(example.ids)
    return groups


def accumulate(model, pairs: list[tuple], most_tokens: float, scaler) -> torch.Tensor:
    """Adds the gradients of one process's samples; returns its share of the step's loss."""
    total = torch.zeros((), device=model.device)
    for group in passes(pairs, most_tokens):
        loss = model(pack(*zip(*group)).to(model.device))
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def accumulate_in_memory(model, pairs: list[tuple], most_tokens: float, scaler) -> tuple[torch.Tensor, float]:
    """`accumulate` in passes of half the size, again and again, where memory does not do; also the size that did."""
    while True:
        try:
            return accumulate(model, pairs, most_tokens, scaler), most_tokens
        except torch.OutOfMemoryError:
            if parallel.model_size > 1:  # the others wait for this one in the midst of a pass
                raise
            if len(passes(pairs, most_tokens)) == len(pairs):  # one sample a pass, and no less is possible
                raise
        most_tokens = min(most_tokens, sum(len(example.ids) for example, _ in pairs)) / 2
        model.zero_grad()
        forget_recorded(model)
        gc.collect()  # what the failed pass held


def tokens_per_pass(model, examples: list, scaler) -> float:
    """Most tokens whose pass fits this GPU's memory, by what a trial over the longest examples takes."""
    if model.device.type != "cuda":
        return math.inf
    longest = passes([(example, 0.0) for example in sorted(examples, key=lambda e: -len(e.ids))], TRIAL_TOKENS)[0]
    trial = [(example, 0.0) for example in with_pictures([example for example, _ in longest])]
    before = torch.cuda.memory_allocated(model.device)
    accumulate(model.train(), trial[-1:], math.inf, scaler)  # compiles, in little memory
    torch.cuda.reset_peak_memory_stats(model.device)
    _, most = accumulate_in_memory(model, trial, TRIAL_TOKENS, scaler)
    if most < TRIAL_TOKENS:
        return most
    taken = torch.cuda.max_memory_allocated(model.device) - before
    room = MEMORY_SHARE * torch.cuda.get_device_properties(model.device).total_memory - before
    return max(room, 0) / taken * sum(len(example.ids) for example, _ in trial)


def optimizer_step(optimizer, scaler, parameters, loss: torch.Tensor, clip_grad: float | None) -> torch.Tensor:
    """Sums the gradients of all processes and steps; returns the step's loss, and 1 where a step was made, else 0.

    What is not finite is not finite on every process after the sum, so all of them leave out the same step. Nothing
    here waits for the GPU: a fused optimizer itself leaves out what `found_inf` marks.
    """
    loss = parallel.sum_gradients(parameters, loss)
    scaler.unscale_(optimizer)
    finite = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf).isfinite()
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = 1 - finite.float()
        optimizer.step()
    optimizer.zero_grad()
    return torch.stack((loss, finite.to(loss.dtype)))


def train_epoch(model, optimizer, scaler, examples, args, epoch: int, rank: int, world: int, most_tokens: float
                ) -> tuple[dict, float]:
    """One pass over the examples; returns the epoch's line of log.txt, and the most tokens a pass that memory did for."""
    model.train()
    torch.manual_seed((args.seed * 1_000_003 + epoch) * world + rank)  # dropout: a resumed run repeats it
    parameters = [p for p in model.parameters() if p.requires_grad]
    effective = args.batch_size * args.accum_iter * world
    n_steps = steps_per_epoch(len(examples), effective)
    batches = epoch_batches(len(examples), args.batch_size, args.accum_iter, rank, world, args.seed, epoch)
    bar = progress(batches, f"epoch {epoch}", total=n_steps, unit="step")
    steps, rates, start = [], [], time.perf_counter()
    for step, (everyone, own) in enumerate(bar):
        # the share of the epoch's samples seen so far, which no split over processes changes
        rates.append(adjust_learning_rate(optimizer, epoch + step * effective / len(examples), args))
        n_micro = sum(math.ceil(len(everyone[r::world]) / args.batch_size) for r in range(world))
        micro_batches = [with_pictures([examples[i] for i in indices], args.num_workers) for indices in own]
        pairs = weigh(micro_batches, answer_tokens([examples[i] for i in everyone]), args.loss_norm, n_micro)
        loss, most_tokens = accumulate_in_memory(model, pairs, most_tokens, scaler)
        steps.append(optimizer_step(optimizer, scaler, parameters, loss, args.clip_grad))
        if step % STEPS_SHOWN == 0:
            bar.set_postfix(loss=f"{steps[-1][0].item():.4f}", lr=f"{rates[-1]:.2e}", refresh=False)
    losses = [loss for loss, stepped in torch.stack(steps).tolist() if stepped]
    seconds = time.perf_counter() - start
    return {"epoch": epoch, "train_lr": sum(rates) / len(rates),
            "train_closs": sum(losses) / len(losses) if losses else None, "steps_left_out": len(steps) - len(losses),
            "samples_per_s": n_steps * min(effective, len(examples)) / seconds, "seconds": seconds,
            "peak_memory_gib": peak_memory_gib(model.device)}, most_tokens


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def resume(model, optimizer, scaler, path: Path, args) -> int:
    """Goes on from a checkpoint; returns the next epoch."""
    checkpoint = read_adapters(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"--resume {path}: it holds adapters only; name a checkpoint-*.pth that train.py wrote")
    for name, value in checkpoint["adapter_config"].items():
        if getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)} contradicts --resume {path}, trained with --{name} {value}: "
                            "give that, or start afresh")
    load_adapters(model, checkpoint["model"], f"--resume {path}")
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    if checkpoint["epoch"] + 1 >= args.epochs:
        say(f"{path} is of epoch {checkpoint['epoch']}, the last of --epochs {args.epochs}: nothing is left to do")
    return checkpoint["epoch"] + 1


def main(args) -> None:
    rank, world, local_rank = parallel.init(args.model_parallel_size)
    if args.lr is None:
        args.lr = args.blr * args.batch_size * args.accum_iter * world / 256
    check_args(args)
    require_base(args.llama_model_path, args.llm_model, use_vicuna=args.use_vicuna)
    device = choose_device(args.device, local_rank)
    dtype = choose_dtype(args.precision, device)
    if args.bits == "fp8":
        check_fp8(device, dtype)
    # strict, or the ViT's attention does not repeat itself; bitsandbytes promises nothing
    torch.use_deterministic_algorithms(True, warn_only=args.bits in ("4bit", "8bit"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)  # the same fresh adapters on every process

    adapter = AdapterConfig(**{name: getattr(args, name) for name in AdapterConfig.__dataclass_fields__})
    model, tokenizer = load_base(args.llama_model_path, args.llm_model, args.vision_model, adapter, device, dtype,
                                 args.drop_path, use_vicuna=args.use_vicuna, bits=args.bits)
    speed_up(model, args.bits)
    model.set_gradient_checkpointing(args.gradient_checkpointing)
    examples = load_examples(args, tokenizer, model.vision.image_size)
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    folder = Path(args.output_dir)
    first_epoch = resume(model, optimizer, scaler, last_checkpoint(args.resume), args) if args.resume else 0
    if is_first():
        if not args.resume and start_afresh(folder):
            say(f"{folder} held an earlier run, which this one replaces")
        write_config(folder, vars(args), device, world, model.llama.config.n_layers)
    say(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained parameters, {dtype} on {device}, "
        f"effective batch {args.batch_size * args.accum_iter * world}, lr {args.lr:.3g}, {args.lr_schedule}")
    events = open_events(args.log_dir) if args.log_dir and is_first() else None

    most_tokens = parallel.least(tokens_per_pass(model, examples, scaler))
    gc.collect()
    gc.freeze()  # what loading and compiling left behind is never searched again
    model.zero_grad()
    for epoch in range(first_epoch, args.epochs):
        entry, most_tokens = train_epoch(model, optimizer, scaler, examples, args, epoch, rank, world, most_tokens)
        if is_first():
            append_log(folder, entry)
            save_adapters(model, checkpoint_path(folder, epoch), epoch=epoch, flags=vars(args),
                          optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            for name in ("train_closs", "train_lr") if events else ():
                events.add_scalar(name, entry[name] or math.nan, epoch)
        say(f"epoch {epoch}: loss {entry['train_closs'] or math.nan:.4f}, {entry['samples_per_s']:.1f} samples/s"
            + (f", {entry['steps_left_out']} steps left out (not finite)" if entry["steps_left_out"] else ""))
    parallel.close()
    say(f"run: {folder}")


def open_events(folder: str):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--log_dir writes TensorBoard events: pip install tensorboard, or leave it out") from error
    return SummaryWriter(folder)


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
