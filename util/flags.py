"""Flags: their ranges, which of them the command line names, and those that train.py, eval.py and demo.py share."""

import argparse
import re
import sys
from collections.abc import Callable
from typing import cast

from lavin.runtime.errors import UsageError, UserError
from util.data.prompts import PROMPT_FORMATS

UNSET = object()


class Flags(argparse.Namespace):
    """Parsed flags. given: the names of those on the command line; it is not among `vars`."""

    __slots__ = ("given",)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, says which flags were given, and reports mistakes in one line (UsageError)."""

    def __init__(self, prog: str | None = None, **kwargs):
        super().__init__(prog, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        flags, unknown = super().parse_known_args(args, namespace or Flags())
        unset = argparse.Namespace(**dict.fromkeys(vars(flags), UNSET))
        flags.given = {name for name, value in vars(super().parse_known_args(args, unset)[0]).items()
                       if value is not UNSET}
        return flags, unknown

    def check(self, flags: dict, source: str) -> dict:
        """Flags that a file holds. Raises UserError for one that the command line could not have given."""
        for action in self._actions:
            value = flags.get(action.dest, action.default)
            if value is not action.default and not is_value_of(action, value):
                raise UserError(f"{source}: --{action.dest} cannot be {str(value)[:99]!r}: name another run")
        return flags

    def error(self, message):
        message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1 ", message)
        raise UsageError(f"{message} (python {self.prog} --help lists all flags)")


def is_value_of(action: argparse.Action, value) -> bool:
    """Whether a parsed flag can have the value."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    if action.choices is not None or action.type in (None, non_empty):
        return isinstance(value, str) and "\0" not in value and (action.choices is None or value in action.choices)
    try:
        return type(value) in (int, float) and cast(Callable, action.type)(str(value)) == value
    except (ValueError, argparse.ArgumentTypeError):
        return False


def interval(kind: type, bounds: str) -> Callable:
    """An argparse type: a number in an interval such as "[0, 1)". nan lies in none."""
    low, high = map(float, bounds[1:-1].split(","))

    def parse(text: str):
        value = kind(text)
        if not ((low < value or (bounds[0] == "[" and value == low))
                and (value < high or (bounds[-1] == "]" and value == high))):
            raise argparse.ArgumentTypeError(f"{text} does not lie in {bounds}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # in argparse's messages
    return parse


count = interval(int, "[1, 1e6]")
positive = interval(float, "(0, inf)")
non_negative = interval(float, "[0, inf)")
probability = interval(float, "[0, 1)")
# of torch's generators, and of what is computed from it and the number of an epoch
seed = interval(int, "[0, 4294967295]")


def non_empty(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("'' names no file or folder")
    return text


def shared_flags() -> Parser:
    """A parent for the parsers of the commands (argparse's `parents`)."""
    parser = Parser(add_help=False)
    add = parser.add_argument
    add("--llm_model", default="7B", type=non_empty,
        help="the base model: a folder in --llama_model_path, or a path; Meta's files, Hugging Face's or a GGUF file")
    add("--llama_model_path", "--ckpt_dir", default="../data/weights/",
        help="folder of the base models and tokenizer.model")
    add("--vision_model", default="vit_large_patch14_clip_quickgelu_224.openai", type=non_empty,
        help="image encoder: OpenAI's ViT-L-14.pt, a Hugging Face or timm folder or file, or a timm model name")
    add("--cpu_load", action="store_true", help="published flag; weights are always read through host memory")
    add("--bits", default="16bit", choices=["16bit", "8bit", "4bit", "fp8"],
        help="LLaMA's frozen matrices; 4bit and 8bit: pip install -r requirements-lite.txt")
    add("--model_parallel_size", default=1, type=count,
        help="consecutive processes that share one model, for models too large for one GPU")
    add("--use_vicuna", action="store_true",
        help="Vicuna: adds its v0 delta, in folder vicuna_NAME next to --llm_model NAME; full weights need no delta")
    add("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"],
        help="compute dtype; auto: bf16, fp16 or fp32 by hardware")
    add("--device", default=None, help="cuda or cpu; default: cuda where there is one")
    add("--compile", default="auto", choices=["auto", "on", "off"], help="torch.compile; auto: on GPUs where it works")
    add("--cuda_graphs", default="auto", choices=["auto", "on", "off"],
        help="training passes and decoding captured in CUDA graphs; auto: on GPUs")

    add("--data_root", default="../data", help="folder of problems.json, pid_splits.json, images/")
    add("--caption_file", default=None, help="captions.json; default: the one in --data_root")
    add("--use_caption", action="store_true", help="add the picture's caption to the context")
    add("--skip_bad", action="store_true", help="leave out problems whose picture is missing or broken")
    add("--prompt_format", default="QCM-ALE", choices=PROMPT_FORMATS,
        help="parts of the prompt and of the answer, in order")
    add("--max_seq_len", default=512, type=count, help="maximum number of tokens of prompt and answer")
    add("--num_workers", default=4, type=interval(int, "[0, 1024]"), help="threads that decode pictures")

    add("--adapter_type", default="attn", choices=["attn", "block"],
        help="adapters in LLaMA: before attention, or also before the feed-forward layer")
    add("--visual_adapter_type", default="router", choices=["normal", "router", "router_block"],
        help="adapters in the ViT")
    add("--adapter_dim", default=8, type=interval(int, "[1, 65536]"), help="rank of the adapters")
    add("--adapter_scale", default=1.0, type=interval(float, "(0, 1e6]"), help="scale of the adapters' output")
    add("--temperature", default=10.0, type=interval(float, "(0, 1e6]"),
        help="router temperature: 10 for 7B, 5 for 13B")
    add("--hidden_proj", default=128, type=interval(int, "[1, 65536]"), help="hidden width of the image projection")
    add("--n_prompt", default=6, type=count, help="number of image features; must divide the ViT's depth")
    return parser


# not inherited from a checkpoint, since a run may be evaluated on another machine
MACHINE_FLAGS = ("device", "precision", "compile", "cuda_graphs", "num_workers", "cpu_load", "model_parallel_size")


def inherit(args: argparse.Namespace, trained: dict, source: str) -> None:
    """Sets shared flags that were left out (None) to the values of a training run, or else to their defaults.

    source: names the checkpoint that `trained` comes from.
    """
    parser = shared_flags()
    parser.check(trained, source)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) is None:
            setattr(args, name, default if name in MACHINE_FLAGS else trained.get(name, default))


def caption_path(args: argparse.Namespace) -> str | None:
    """The caption file, or None without --use_caption."""
    return (args.caption_file or f"{args.data_root}/captions.json") if args.use_caption else None


def stays_plain(args: argparse.Namespace) -> bool:
    """Whether --compile and --cuda_graphs change nothing, as lavin/fast/speed_up.py decides by the model."""
    return args.bits == "8bit" or args.model_parallel_size > 1


def check_shared(args: argparse.Namespace) -> None:
    """Raises UserError for combinations of the shared flags that do not work."""
    if "on" in (args.compile, args.cuda_graphs) and stays_plain(args):
        raise UserError("--compile and --cuda_graphs do nothing with --bits 8bit, nor with --model_parallel_size: "
                        "leave them at auto")
    if args.model_parallel_size > 1 and args.bits != "16bit":
        raise UserError(f"--model_parallel_size {args.model_parallel_size} works with 16-bit weights only: give "
                        f"--bits 16bit in place of {args.bits}, or leave --model_parallel_size out")
