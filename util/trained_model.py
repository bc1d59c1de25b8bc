"""Loads the model of a training run, for evaluation, chat and export."""

from pathlib import Path

from lavin.fast.speed_up import speed_up
from lavin.kernels.fp8 import check_fp8
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN
from lavin.runtime import distributed
from lavin.runtime.device import choose_device, choose_dtype
from lavin.runtime.errors import UserError
from lavin.tokenizer import Tokenizer
from lavin.weights.adapters import load_adapters, read_adapters
from lavin.weights.base import require_base
from lavin.weights.load import load_base
from util.flags import check_shared, inherit
from util.runs import last_checkpoint


def check_adapter_flags(args, trained: dict) -> None:
    """Raises UserError where a flag contradicts the adapter configuration of the checkpoint."""
    for name, value in trained.items():
        flag = getattr(args, name, None)
        if flag is not None and flag != value:
            raise UserError(f"--{name} {flag} contradicts {args.adapter_path}, trained with --{name} {value}: "
                            "leave the flag out")


def results_folder(args) -> Path:
    """--output_dir, or the run's folder. Raises UserError where neither it nor --adapter_path is given."""
    if args.output_dir:
        return Path(args.output_dir)
    if not args.adapter_path:
        raise UserError("without --adapter_path the untuned base is scored: name a folder for its results with "
                        "--output_dir")
    path = Path(args.adapter_path)
    return path if path.is_dir() else path.parent


def load_model(args, fast: bool = True) -> tuple[LaVIN, Tokenizer, Path | None]:
    """The model with the adapters of --adapter_path (fresh ones without it), its tokenizer, and the checkpoint's path.

    Sets flags that were left out to the checkpoint's values. fast: apply `speed_up`; without it, parameters keep their
    names in the base model.
    """
    if args.llama_model_path and args.llm_model:
        require_base(args.llama_model_path, args.llm_model, args.tokenizer_path)
    path = last_checkpoint(args.adapter_path) if args.adapter_path else None
    checkpoint = read_adapters(path) if path else {}
    adapter = checkpoint.get("adapter_config", {})
    check_adapter_flags(args, adapter)
    inherit(args, checkpoint.get("flags", {}))
    check_shared(args)
    require_base(args.llama_model_path, args.llm_model, args.tokenizer_path, args.use_vicuna)
    device = choose_device(args.device, distributed.init(args.model_parallel_size)[2])
    dtype = choose_dtype(args.precision, device)
    if args.bits == "fp8":
        check_fp8(device, dtype)
    adapter = adapter or {name: getattr(args, name) for name in AdapterConfig.__dataclass_fields__
                          if hasattr(args, name)}
    model, tokenizer = load_base(args.llama_model_path, args.llm_model, args.vision_model, AdapterConfig(**adapter),
                                 device, dtype, tokenizer_path=args.tokenizer_path, use_vicuna=args.use_vicuna,
                                 bits=args.bits)
    if path:
        load_adapters(model, checkpoint["model"], str(path))
    return (speed_up(model, args.bits) if fast else model).eval(), tokenizer, path
