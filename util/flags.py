"""The flags that train.py, eval.py, demo.py and the tools share: the base model, and how a command runs."""

import argparse
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from lavin.mm_adapter import AdapterShape
from lavin.runtime.errors import UserError
from lavin.runtime.flags import FlagGroup, Flags, Role, flag, flags_of
from lavin.runtime.schema import Count, FileName, PathText, Text
from util.data.settings import DataSettings


@dataclass(frozen=True)
class BaseSettings(FlagGroup):
    """The frozen models, and where their files are."""

    title: ClassVar[str] = "base model"
    llm_model: FileName = flag(
        "7B", "the base model: a folder in --llama_model_path, a path (Meta's files, Hugging Face's or a "
        "GGUF file), or USER/REPO of the Hugging Face hub",
        Role.MODEL, stated_as="base")
    llama_model_path: PathText = flag(
        "../data/weights/", "folder of the base models and tokenizer.model", Role.MODEL, stated_as="base", named=False,
        reloadable=True, aliases=("--ckpt_dir",))
    vision_model: FileName = flag(
        "vit_large_patch14_clip_quickgelu_224.openai",
        "image encoder: OpenAI's ViT-L-14.pt, a Hugging Face or timm folder or file, USER/REPO of the Hugging Face "
        "hub, or a timm model name",
        Role.MODEL, stated_as="vision")
    bits: str = flag("16bit", "LLaMA's frozen matrices; 4bit and 8bit: pip install -r requirements/lite.txt",
                     Role.MODEL, choices=("16bit", "8bit", "4bit", "fp8"), reloadable=True)
    use_vicuna: bool = flag(
        False, "Vicuna: adds its v0 delta, in folder vicuna_NAME next to --llm_model NAME; full weights need no delta",
        Role.MODEL)


@dataclass(frozen=True)
class Execution(FlagGroup):
    """The machine that a command runs on, and how. An evaluation chooses anew: it may run on another machine."""

    title: ClassVar[str] = "execution"
    device: Text | None = flag(None, "cuda or cpu (default: cuda where there is one)", Role.EXECUTION)
    precision: str = flag("auto", "compute dtype; auto: bf16, fp16 or fp32 by hardware", Role.EXECUTION,
                          choices=("auto", "bf16", "fp16", "fp32"), stated_as="precision", named=True)
    compile: str = flag("auto", "torch.compile; auto: on GPUs where it works", Role.EXECUTION,
                        choices=("auto", "on", "off"))
    cuda_graphs: str = flag("auto", "training passes and decoding captured in CUDA graphs; auto: on GPUs",
                            Role.EXECUTION, choices=("auto", "on", "off"))
    model_parallel_size: Count = flag(
        1, "consecutive processes that share one model, for models too large for one GPU", Role.EXECUTION)
    num_workers: Annotated[int, Field(ge=0, le=1024)] = flag(4, "threads that decode pictures", Role.EXECUTION)
    cpu_load: bool = flag(False, "published flag; weights are always read through host memory", Role.EXECUTION)


# what a command needs that loads a model: the groups of flags that train.py, eval.py and demo.py have in common
SHARED = (BaseSettings, AdapterShape, DataSettings, Execution)
INHERITED = "Flags of the model and the data that are left out take the values of the training run."  # in --help


def inherit(args: Flags, trained: dict) -> None:
    """Sets the shared flags that the command line left out to the values of a training run, all but those of execution.

    trained: the run's flags, checked by `check_flags`.
    """
    for name, declared in flags_of(*SHARED).items():
        if declared.role is not Role.EXECUTION and name not in args.given and name in trained:
            setattr(args, name, trained[name])


def stays_plain(base: BaseSettings, execution: Execution) -> bool:
    """Whether --compile and --cuda_graphs change nothing, as lavin/fast/speed_up.py decides by the model."""
    return base.bits == "8bit" or execution.model_parallel_size > 1


def check_shared(args: argparse.Namespace) -> None:
    """Raises UserError for combinations of the shared flags that do not work."""
    base, execution = BaseSettings.of(args), Execution.of(args)
    if "on" in (execution.compile, execution.cuda_graphs) and stays_plain(base, execution):
        raise UserError("--compile and --cuda_graphs do nothing with --bits 8bit, nor with --model_parallel_size: "
                        "leave them at auto")
    if execution.model_parallel_size > 1 and base.bits != "16bit":
        raise UserError(f"--model_parallel_size {execution.model_parallel_size} works with 16-bit weights only: give "
                        f"--bits 16bit in place of {base.bits}, or leave --model_parallel_size out")
