"""Fine-tunes LaVIN on ScienceQA: `python train.py ...`, or `torchrun --nproc_per_node N train.py ...` for N GPUs.

The run's folder, --output_dir, belongs to one recipe: the same command again goes on, or says that the run is finished.
It gets recipe.json, config.json, log.txt, metrics.jsonl and checkpoint-{epoch}.pth; eval.py adds the scores.
"""

import argparse
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # tensor sizes change from step to step

import torch

from lavin.fast.speed_up import check_fast_paths, speed_up
from lavin.mm_adapter import AdapterConfig, dropout_schedule
from lavin.runtime import distributed
from lavin.runtime.console import is_main_process, print_rank0, summary
from lavin.runtime.device import choose_device, choose_dtype
from lavin.runtime.errors import UserError, one_line_errors
from lavin.weights.base import require_base
from lavin.weights.load import load_base
from util.data.batches import load_examples, load_training_data
from util.flags import (
    Parser,
    caption_path,
    check_shared,
    count,
    interval,
    non_empty,
    non_negative,
    positive,
    probability,
    seed,
    shared_flags,
)
from util.lr_sched import SCHEDULES, check_schedule, fit_warmup
from util.runs import locked, write_config
from util.training.metrics import drop_metrics, summary_writer
from util.training.recipe import fit_effective_batch, make_recipe
from util.training.resume import take_flags_of_run
from util.training.run_folder import open_run
from util.training.trainer import Trainer


def get_args_parser() -> Parser:
    parser = Parser("train.py", description=summary(__doc__), parents=[shared_flags()],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data_path", default="", help="all_data.json for --do_pretrain (the one in --data_root)")
    add("--do_pretrain", action="store_true",
        help="instruction tuning instead of ScienceQA, on the file of tools/data_processing.py")

    add("--drop_path", default=0.0, type=probability, help="stochastic depth of LLaMA's layers")
    add("--dropout_prob", default=0.1, type=probability, help="adapter dropout of the first layer")
    add("--dropout_var", default=1.0, type=positive, help="factor of the dropout from each layer to the next")
    add("--dropout_lim", default=0.2, type=probability, help="limit at which the dropout stops growing or falling")

    add("--batch_size", default=4, type=interval(int, "[1, 65536]"), help="samples per micro-batch on one GPU")
    add("--accum_iter", default=1, type=interval(int, "[1, 65536]"), help="micro-batches per optimizer step")
    add("--epochs", default=20, type=count)
    add("--lr_schedule", default="cosine", choices=SCHEDULES)
    add("--warmup_epochs", default=2.0, type=non_negative,
        help="linear warm-up; a tenth of --epochs where these are fewer; none with --lr_schedule cyclical")
    add("--blr", default=9e-3, type=positive, help="base learning rate: lr = blr * effective batch / 256")
    add("--lr", default=None, type=positive, help="learning rate, instead of --blr")
    add("--min_lr", default=0.0, type=non_negative,
        help="lowest learning rate of the cosine and cyclical schedules")
    add("--weight_decay", default=0.02, type=non_negative, help="on matrices; biases and vectors have none")
    add("--clip_grad", default=None, type=positive, help="maximum gradient norm; default: no clipping")
    add("--loss_norm", default="batch", choices=["batch", "microbatch"],
        help="mean over the answer tokens of the optimizer step, or of each micro-batch as published")
    add("--gradient_checkpointing", action="store_true",
        help="recompute layers in the backward pass, without CUDA graphs: less memory, much slower")

    add("--output_dir", default="./output_dir", type=non_empty, help="the run's folder")
    add("--overwrite", action="store_true", help="replace a run of another recipe in --output_dir")
    add("--resume", default="", metavar="RUN",
        help="go on with this run, by its own flags, or back to one of its checkpoints")
    add("--save_every_minutes", default=10.0, type=positive, help="time between checkpoints in the middle of an epoch")
    add("--stop_after_epoch", default=None, type=count,
        help="stop after this many epochs of the whole schedule; the same command without it goes on")
    add("--keep_last", default=None, type=count, help="checkpoints of whole epochs to keep; default: all")
    add("--log_dir", default=None, help="folder for TensorBoard events (pip install tensorboard)")
    add("--seed", default=0, type=seed)
    return parser


def check_args(args) -> None:
    """Raises UserError for invalid combinations of flags, before anything is loaded."""
    check_shared(args)
    try:
        dropout_schedule(1, args.dropout_prob, args.dropout_var, args.dropout_lim)
        check_schedule(args)
    except ValueError as error:
        raise UserError(str(error)) from error


def derive_flags(args, world: int) -> None:
    """Sets those that depend on others, unless they were given: --lr, and the warm-up of few epochs."""
    if args.lr is None:
        args.lr = args.blr * args.batch_size * args.accum_iter * world / 256
    fit_warmup(args)


def main(args) -> None:
    effective_batch = take_flags_of_run(args, get_args_parser()) if args.resume else None
    rank, world, local_rank = distributed.init(args.model_parallel_size)
    if effective_batch:
        fit_effective_batch(args, effective_batch, world)
    derive_flags(args, world)
    check_args(args)
    require_base(args.llama_model_path, args.llm_model, use_vicuna=args.use_vicuna)
    device = choose_device(args.device, local_rank)
    with locked(args.output_dir):
        train(args, rank, world, device)
    distributed.close()


def train(args, rank: int, world: int, device: torch.device) -> None:
    # first everything that is fast and may refuse the command
    dtype = choose_dtype(args.precision, device)
    if args.log_dir:
        summary_writer()
    data = load_training_data(args, caption_path(args))
    run = distributed.from_rank_0(lambda: open_run(args, make_recipe(args, dtype, world, data)))
    if run.finished:
        print_rank0(f"run: {run.folder}, which is finished: all {args.epochs} epochs of this recipe are there")
        return
    check_fast_paths(device, dtype, args.bits, args.compile, args.cuda_graphs)

    # with warn_only, the ViT's attention would not be deterministic; bitsandbytes does not guarantee determinism
    torch.use_deterministic_algorithms(True, warn_only=args.bits in ("4bit", "8bit"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)  # the same initial adapters on every rank
    adapter = AdapterConfig(**{name: getattr(args, name) for name in AdapterConfig.__dataclass_fields__})
    model, tokenizer = load_base(args.llama_model_path, args.llm_model, args.vision_model, adapter, device, dtype,
                                 args.drop_path, use_vicuna=args.use_vicuna, bits=args.bits,
                                 max_seq_len=args.max_seq_len)
    speed_up(model, args.bits, args.compile, args.cuda_graphs)
    model.set_gradient_checkpointing(args.gradient_checkpointing)
    examples = load_examples(data, args, tokenizer, model.vision.image_size)
    trainer = Trainer(args, model, examples, run, rank, world)
    record = trainer.restore()
    if is_main_process():
        run.begin(vars(args))
        drop_metrics(run.path, record.epoch, len(record.steps))
        write_config(run.path, vars(args), device, world, model.llama.config.n_layers,
                     {"epoch": record.epoch, "step": len(record.steps)} if run.checkpoint else None)
    print_rank0(f"{sum(p.numel() for p in trainer.parameters):,} trained parameters, {dtype} on {device}, effective "
                f"batch {trainer.effective_batch}, lr {args.lr:.3g}, {args.lr_schedule}")
    trainer.train(record)
    part = f", {trainer.end} of {args.epochs} epochs: the same command without --stop_after_epoch goes on"
    print_rank0(f"run: {run.folder}{part if trainer.end < args.epochs else ''}")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
