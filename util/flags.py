"""Flags shared by train.py, eval.py and demo.py: base model, adapters, data. Checkpoints store their values."""

import argparse

from lavin.runtime.errors import UserError
from util.data.prompts import PROMPT_FORMATS


def shared_flags() -> argparse.ArgumentParser:
    """A parent for the parsers of the commands (argparse's `parents`)."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--llm_model", default="7B",
        help="the base model: a folder in --llama_model_path, or a path; Meta's files or Hugging Face's")
    add("--llama_model_path", "--ckpt_dir", default="../data/weights/",
        help="folder of the base models and tokenizer.model")
    add("--vision_model", default="vit_large_patch14_clip_quickgelu_224.openai",
        help="image encoder: OpenAI's ViT-L-14.pt, a Hugging Face or timm folder or file, or a timm model name")
    add("--cpu_load", action="store_true", help="published flag; weights are always read through host memory")
    add("--bits", default="16bit", choices=["16bit", "8bit", "4bit", "fp8"],
        help="LLaMA's frozen matrices; 4bit and 8bit: pip install -r requirements-lite.txt")
    add("--model_parallel_size", default=1, type=int,
        help="consecutive processes that share one model, for models too large for one GPU")
    add("--use_vicuna", action="store_true",
        help="Vicuna: adds its v0 delta, in folder vicuna_NAME next to --llm_model NAME; full weights need no delta")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="compute dtype; auto: bf16, fp16 or fp32 by hardware")
    add("--device", default=None, help="cuda or cpu; default: cuda where there is one")

    add("--data_root", default="../data", help="folder of problems.json, pid_splits.json, images/")
    add("--caption_file", default=None, help="captions.json; default: the one in --data_root")
    add("--use_caption", action="store_true", help="add the picture's caption to the context")
    add("--skip_bad", action="store_true", help="leave out problems whose picture is missing or broken")
    add("--prompt_format", default="QCM-ALE", choices=PROMPT_FORMATS,
        help="parts of the prompt and of the answer, in order")
    add("--max_seq_len", default=512, type=int, help="maximum number of tokens of prompt and answer")
    add("--num_workers", default=4, type=int, help="threads that decode pictures")

    add("--adapter_type", default="attn", choices=["attn", "block"],
        help="adapters in LLaMA: before attention, or also before the feed-forward layer")
    add("--visual_adapter_type", default="router", choices=["normal", "router", "router_block"],
        help="adapters in the ViT")
    add("--adapter_dim", default=8, type=int, help="rank of the adapters")
    add("--adapter_scale", default=1.0, type=float, help="scale of the adapters' output")
    add("--temperature", default=10.0, type=float, help="router temperature: 10 for 7B, 5 for 13B")
    add("--hidden_proj", default=128, type=int, help="hidden width of the image projection")
    add("--n_prompt", default=6, type=int, help="number of image features; must divide the ViT's depth")
    return parser


# not inherited from a checkpoint, since a run may be evaluated on another machine
MACHINE_FLAGS = ("device", "precision", "num_workers", "cpu_load", "model_parallel_size")


def inherit(args: argparse.Namespace, trained: dict) -> None:
    """Sets shared flags that were left out (None) to the values of a training run, or else to their defaults."""
    for name, default in vars(shared_flags().parse_args([])).items():
        if getattr(args, name) is None:
            setattr(args, name, default if name in MACHINE_FLAGS else trained.get(name, default))


def caption_path(args: argparse.Namespace) -> str | None:
    """The caption file, or None without --use_caption."""
    return (args.caption_file or f"{args.data_root}/captions.json") if args.use_caption else None


def check_counts(args: argparse.Namespace, *flags: str) -> None:
    """Raises UserError for a flag below 1."""
    for flag in flags:
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least 1")


def check_shared(args: argparse.Namespace) -> None:
    """Raises UserError for invalid values and combinations of the shared flags."""
    if args.model_parallel_size > 1 and args.bits != "16bit":
        raise UserError(f"--model_parallel_size {args.model_parallel_size} works with 16-bit weights only: give "
                        f"--bits 16bit in place of {args.bits}, or leave --model_parallel_size out")
    check_counts(args, "max_seq_len", "n_prompt", "hidden_proj", "adapter_dim")
    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature} must be positive")
