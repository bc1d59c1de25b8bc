"""Loads the model of a training run, for evaluation, chat and export."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavin.fast.speed_up import check_fast_paths, choose_attention
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.runtime import distributed
from lavin.runtime.console import is_main_process, print_rank0
from lavin.runtime.device import choose_device, choose_dtype
from lavin.runtime.errors import UserError
from lavin.runtime.flags import Flags, check_flags, flags_of
from lavin.tokenizer import TOKENIZATION, Tokenizer
from lavin.weights.adapters import load_adapters, read_adapters
from lavin.weights.base import require_base
from lavin.weights.load import load_base
from util.data.checksums import States, file_states, require_unchanged
from util.data.prompts import RESPONSE, answer_text
from util.fingerprint import FROZEN, FROZEN_SHA256, fingerprints, frozen_files, is_comparable
from util.flags import SHARED, BaseSettings, Execution, check_shared, inherit
from util.runs import last_checkpoint
from util.shared_base import SharedBase


@dataclass(frozen=True)
class Trained:
    """A training run's model, as far as it is known before the base model is loaded.

    path: the checkpoint; None for the untuned base, whose `tensors` are empty. image_statistics: mean and std of the
    pixels in training, where the checkpoint states them. tokenization: TOKENIZATION, where the checkpoint states it.
    states: the states of the model's files before any of them was read.
    """

    path: Path | None
    tensors: dict[str, Any]
    adapter: AdapterConfig
    device: torch.device
    dtype: torch.dtype
    image_statistics: dict[str, list[float]] = field(default_factory=dict)
    tokenization: str | None = None
    states: States = field(default_factory=dict)


# --- What a checkpoint was trained on ---

def is_sha256(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def warn_of_other_base(path: Path, checkpoint: dict, found: Mapping[str, Any]) -> None:
    """Says so where a checkpoint was trained on other files: of another model, or of the same in another format."""
    for (name, flag), content in zip(FROZEN.items(), FROZEN_SHA256, strict=True):
        trained_on = {**found, **checkpoint}
        is_other = any(trained_on[entry] != found[entry] and is_comparable(entry, trained_on, found)
                       for entry in (name, content))
        # a name of timm's hub cannot be compared with a checksum of files
        if is_other and is_sha256(trained_on[name]) == is_sha256(found[name]):
            print_rank0(f"warning: {path} was trained on other files of {flag} than these: if they hold another model "
                        "or tokenizer, its answers say nothing about the training")


def warn_of_other_tokenization(path: Path, tokenization: str | None, tokenizer: Tokenizer) -> None:
    """Says so where a checkpoint has seen other ids where an answer begins than those that it gets now.

    tokenization: the TOKENIZATION that the checkpoint states.
    """
    if tokenization != TOKENIZATION and tokenizer.joins(RESPONSE, answer_text(0)):
        print_rank0(f"warning: {path} was trained by an earlier version, which tokenized prompt and answer together: "
                    f"with this tokenizer a token joined `{RESPONSE}` and the answer, which is no longer so, so that "
                    "its answers may be worse than after a new training")


def image_statistics(model: LaVIN) -> dict[str, list[float]]:
    """Mean and std by which the model normalises pixels."""
    return {"image_mean": list(model.vision.mean), "image_std": list(model.vision.std)}


def check_image_statistics(model: LaVIN, trained: dict, source: str) -> None:
    """Raises UserError where the adapters in `source` have seen pixels of another normalisation."""
    for name, values in image_statistics(model).items():
        expected = trained.get(name, values)
        if any(abs(a - b) > 1e-3 for a, b in zip(expected, values, strict=True)):
            raise UserError(f"{source} was trained with {name} {expected}, and this --vision_model has {values}: name "
                            "the one that it was trained with")


# --- Loading ---

def check_adapter_flags(args: Flags, trained: dict) -> None:
    """Raises UserError where a given flag contradicts the adapter configuration of the checkpoint."""
    for name, value in trained.items():
        if name in args.given and getattr(args, name) != value:
            raise UserError(f"--{name} {getattr(args, name)} contradicts {args.adapter_path}, trained with --{name} "
                            f"{value}: leave the flag out")


def read_trained(args: Flags) -> Trained:
    """Reads the checkpoint of --adapter_path and checks the flags, which is fast; sets flags that were left out to the
    checkpoint's values."""
    if {"llama_model_path", "llm_model"} <= args.given:
        require_base(args.llama_model_path, args.llm_model, args.tokenizer_path)
    path = last_checkpoint(args.adapter_path) if args.adapter_path else None
    states = file_states([path] if path else [])
    checkpoint = read_adapters(path) if path else {"model": {}}
    adapter = checkpoint.get("adapter_config", {})
    check_adapter_flags(args, adapter)
    inherit(args, check_flags(checkpoint.get("flags", {}), flags_of(*SHARED), str(path)))
    check_shared(args)
    require_base(args.llama_model_path, args.llm_model, args.tokenizer_path, args.use_vicuna)
    base = BaseSettings.of(args)
    states = {**states, **file_states(frozen_files(base, args.tokenizer_path))}
    if path and is_main_process() and FROZEN.keys() & checkpoint.keys():
        warn_of_other_base(path, checkpoint, fingerprints(base, args.tokenizer_path))
    device = choose_device(args.device, distributed.init(args.model_parallel_size)[2])
    dtype = choose_dtype(args.precision, device)
    check_fast_paths(device, dtype, args.bits, args.compile, args.cuda_graphs)
    return Trained(path, checkpoint["model"], AdapterConfig.read(adapter or vars(args)), device, dtype,
                   {name: checkpoint[name] for name in ("image_mean", "image_std") if name in checkpoint},
                   checkpoint.get("tokenization"), states)


def load_model(args, trained: Trained | None = None, shared: SharedBase | None = None
               ) -> tuple[LaVIN, Tokenizer, Path | None]:
    """The model with the adapters of --adapter_path, its tokenizer, and the checkpoint's path. Without --adapter_path
    the adapters are fresh, and always the same ones.

    trained: the result of `read_trained(args)`, where it was called before. shared: the process's SharedBase, where it
    has one. Raises UserError where a file has changed since `read_trained`.
    """
    trained = trained or read_trained(args)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, tokenizer = (shared or SharedBase()).lend(
            BaseSettings.of(args), Execution.of(args), trained.adapter, trained.device, trained.dtype, args.max_seq_len,
            tokenizer_path=args.tokenizer_path)
    take_adapters(model, tokenizer, trained)
    return model.eval(), tokenizer, trained.path


def load_plain_model(args) -> tuple[LaVIN, Tokenizer, Path | None]:
    """The same in the modules of the reference implementation: parameters keep their names in the base model."""
    trained = read_trained(args)
    model, tokenizer = load_base(args.llama_model_path, args.llm_model, args.vision_model, trained.adapter,
                                 trained.device, trained.dtype, tokenizer_path=args.tokenizer_path,
                                 use_vicuna=args.use_vicuna, bits=args.bits, max_seq_len=args.max_seq_len)
    take_adapters(model, tokenizer, trained)
    choose_attention(model)
    return model.eval(), tokenizer, trained.path


def take_adapters(model: LaVIN, tokenizer: Tokenizer, trained: Trained) -> None:
    """Loads the adapters of the checkpoint, where there is one. Raises UserError where they do not fit."""
    if trained.path:
        warn_of_other_tokenization(trained.path, trained.tokenization, tokenizer)
        check_image_statistics(model, trained.image_statistics, str(trained.path))
        load_adapters(model, trained.tensors, str(trained.path))
    require_unchanged(trained.states)
