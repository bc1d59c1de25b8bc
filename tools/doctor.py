"""What this machine has, what a run would use, and what would fail (lines with `!`): bash scripts/check.sh [flags]."""

from lavin.runtime.startup import INSTALL, prepare_imports

if __name__ == "__main__":
    prepare_imports()

import io
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from importlib import metadata
from pathlib import Path

from lavin.runtime.packages import OPTIONAL

ROOT = Path(__file__).parents[1]
HELP = """usage: bash scripts/check.sh [FLAG ...]

Says what this machine has, what a run would use, and what would fail (lines
with `!`). Flags are those of train.py: python train.py --help lists them."""
import_error: Exception | None = None
try:  # packages may be missing or broken, and this program says so
    import torch
    from packaging.specifiers import SpecifierSet

    from lavin.attention import select_attention
    from lavin.fast.speed_up import choose_fast_paths
    from lavin.kernels.fp8 import FP8_CAPABILITY
    from lavin.runtime.console import counted
    from lavin.runtime.device import choose_device, choose_dtype, compute_capability
    from lavin.runtime.errors import describe, one_line_errors
    from lavin.timm_compat import import_timm
    from lavin.tokenizer import Tokenizer
    from lavin.weights.base import base_files, base_path, open_base, require_base
    from lavin.weights.hub import FETCH_ELSEWHERE, Repository, cached, is_offline, model_path, offline, require_cached
    from lavin.weights.vision import DOWNLOAD_HINT, open_vit
    from util.data.datasets import find_problems_file, load_scienceqa
    from util.data.instructions import read_instructions
    from util.data.settings import DataSettings
    from util.flags import BaseSettings, Execution, stays_plain
    from util.training.resume import take_flags_of_run
    from util.training.settings import TrainSettings, get_args_parser
    timm = import_timm()
except Exception as error:  # of many types: a library of CUDA that is gone, a torchvision of another torch
    import_error = error

INSTALLED = {found.name.lower(): found.version for found in metadata.distributions() if found.name}
LLAMA_HEAD_DIM = 128  # of 7B and 13B
BITSANDBYTES = ", and bitsandbytes (pip install -r requirements/lite.txt)"
BITSANDBYTES_CAPABILITY = {"8bit": (7, 5), "4bit": (6, 0)}  # the least that it supports
BUILDS = ("; for older GPUs or drivers: pip install -r requirements.txt -c requirements/constraints/v100.txt (or "
          "cuda12.txt or cuda11.txt of that folder)")
GPU_QUERY = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]


def row(label: str, text: str) -> str:
    return f"{label:<20}  {text}"


def size(n: float) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n} bytes"


def file_row(path: Path, note: str = "") -> str:
    return row(path.name, f"{size(path.stat().st_size) if path.is_file() else 'not'} in {path.parent}{note}")


def checked(lines: Iterable[str]) -> Iterator[str]:
    """A section, in which an error becomes a line: this program gets to its end, whatever is wrong."""
    try:
        yield from lines
    except Exception as error:
        yield f"! {describe(error) or f'{repr(error)[:300]} (a bug: please report it)'}"


def machine() -> Iterator[str]:
    yield row("Python", f"{platform.python_version()}, {sys.executable}")
    yield row("system", platform.platform())
    yield row("CPU", f"{platform.machine()}, cores: {len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    yield row("memory", size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    try:
        done = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=10)
        for i, line in enumerate((done.stdout or done.stderr).strip().splitlines()):
            yield row("nvidia-smi" if done.returncode else f"GPU {i}", line)
    except (OSError, subprocess.TimeoutExpired):
        yield row("GPU", "none: nvidia-smi is not there, or does not answer")


def packages() -> Iterator[str]:
    required = dict(re.findall(r"^([\w-]+)(.*)", (ROOT / "requirements.txt").read_text(), re.M))
    found = INSTALLED if import_error else {**INSTALLED, "torch": torch.__version__}  # which names its CUDA version
    yield from (row(name, found.get(name, "-")) for name in (*required, *OPTIONAL, "tensorboard", "gradio"))
    missing = [name for name in required if name not in INSTALLED]
    if missing:
        yield f"! missing: {', '.join(missing)}: {INSTALL}"
    elif import_error:
        yield f"! a package does not work ({repr(import_error)[:300]}): remove .venv (rm -r .venv); {INSTALL}"
    else:
        yield from (f"! {name} {INSTALLED[name]} is not {wanted}, which requirements.txt asks for: {INSTALL}"
                    for name, wanted in required.items() if not SpecifierSet(wanted).contains(INSTALLED[name], True))


def run(args) -> Iterator[str]:
    n_gpus = torch.cuda.device_count()
    yield row("CUDA of torch", f"{torch.version.cuda or '-'}; it sees {counted(n_gpus, 'GPU')}"
              f"{'' if n_gpus else BUILDS}")
    device = choose_device(args.device, 0)
    dtype, gpu = choose_dtype(args.precision, device), device.type == "cuda"
    yield row("device", torch.cuda.get_device_name(device) if gpu else "CPU")
    yield row("precision", f"{dtype} (auto: bf16 from compute capability 8.0 on, fp16 on older GPUs, fp32 on a CPU)")
    for bits, least in {"fp8": FP8_CAPABILITY, **BITSANDBYTES_CAPABILITY}.items():
        works = (not gpu or compute_capability(device) >= least) and (bits == "fp8" or "bitsandbytes" in INSTALLED)
        needs = f"compute capability {least[0]}.{least[1]} or newer, or a CPU{'' if bits == 'fp8' else BITSANDBYTES}"
        yield row(f"--bits {bits}", "possible" if works else f"needs {needs}")
        if args.bits == bits and not works:
            yield f"! --bits {bits} needs {needs}: leave it at 16bit"
    paths = choose_fast_paths(device, dtype, args.bits, args.compile, args.cuda_graphs)
    yield row("attention", select_attention(device, dtype, LLAMA_HEAD_DIM, use_triton=not paths.note).__name__)
    plain = stays_plain(BaseSettings.of(args), Execution.of(args))
    for label in ("fused", "compiled", "captured"):
        yield row(label, "yes" if getattr(paths, label) and not plain else "no")
    if paths.note:
        yield row("", paths.note)


def data(args) -> Iterator[str]:
    """Yields the rows on the data. train.py reads the train split, and eval.py, after it, the test split."""
    if args.do_pretrain:
        yield row("instructions", counted(len(read_instructions(args.data_root, args.data_path).records), "record"))
        return
    root = Path(args.data_root)
    yield from map(file_row, (find_problems_file(root), root / "pid_splits.json"))
    yield file_row(Path(args.caption_file or root / "captions.json"), ", for --use_caption")
    yield from checked(split(args, "train"))
    yield from (line for line in checked(split(args, "val")) if line[0] != "!")
    yield from checked(split(args, "test"))


def split(args, name: str) -> Iterator[str]:
    with redirect_stdout(io.StringIO()) as warnings:
        scienceqa = load_scienceqa(args.data_root, name, DataSettings.of(args).captions)
    pictures = [path for path in map(scienceqa.picture_path, scienceqa.problems) if path]
    with ThreadPoolExecutor(16) as pool:  # a network's file system takes milliseconds a file
        missing = [path for path, there in zip(pictures, pool.map(Path.is_file, pictures), strict=True) if not there]
    yield row(f"{name} split", f"{counted(len(scienceqa.problems), 'problem')}, {counted(len(pictures), 'picture')}")
    yield from (row("", line) for line in warnings.getvalue().splitlines())
    if missing and not args.skip_bad:
        yield (f"! split {name} lacks {counted(len(missing), 'picture')}, the first is {missing[0]}: put them there, "
               "or leave their problems out with --skip_bad")


def weights(args) -> Iterator[str]:
    """Opens the base, which finds files that were cut short; its tensors are not read."""
    base = args.llama_model_path, args.llm_model
    if not Path(*base).exists() and is_to_be_fetched(args.llm_model):
        yield from to_be_fetched("base model", "--llm_model", args.llm_model,
                                 FETCH_ELSEWHERE.format(args.llm_model))
        return
    with offline():
        require_base(*base, use_vicuna=args.use_vicuna)
    files = base_files(*base, use_vicuna=args.use_vicuna)
    yield from map(file_row, files)
    open_base(base_path(*base), Tokenizer(files[0]).n_words, args.use_vicuna)


def is_to_be_fetched(name: str) -> bool:
    """Whether this is a model of the hub that is not in the cache."""
    repository = Repository.parse(name)
    return repository is not None and cached(repository) is None


def to_be_fetched(label: str, flag: str, name: str, fix: str) -> Iterator[str]:
    """A model that a run fetches when it starts. fix: what to do on a machine without a network."""
    yield row(label, f"{name}, to be downloaded")
    if is_offline():
        yield f"! {flag} {name}: no network, and it is not in the cache: {fix}"


def vision(args) -> Iterator[str]:
    label, flag, name = "vision model", "--vision_model", args.vision_model
    if is_to_be_fetched(name):
        yield from to_be_fetched(label, flag, name, FETCH_ELSEWHERE.format(name))
        return
    with offline():
        path = model_path(name, flag)
        if path.exists() or not timm.models.is_model(name.split(".")[0]):
            open_vit(name)  # or says what is wrong with the name
            yield from map(file_row, sorted(path.iterdir()) if path.is_dir() else [path])
            return
    try:
        require_cached(timm.models.get_pretrained_cfg(name).hf_hub_id)
        yield row(label, f"{name}, in the cache")
    except Exception:  # not in the cache, or a name that timm has replaced
        yield from to_be_fetched(label, flag, name, f"{DOWNLOAD_HINT}, and name that")


def output(args) -> Iterator[str]:
    existing = next(path for path in Path(args.output_dir, "a").absolute().parents if path.exists())
    free, needed = shutil.disk_usage(existing).free, 100e6 * ((args.keep_last or args.epochs) + 1)  # 7B: 45 MB
    yield row("output folder", f"{args.output_dir}, {size(free)} free")
    if free < needed:
        yield (f"! only {size(free)} are free in {args.output_dir}, and a run's checkpoints take up to {size(needed)}: "
               "free some, add --keep_last 1, or name another folder with --output_dir")
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        yield f"! --output_dir {args.output_dir}: {existing} is no folder to write to: name another"


def flags(args) -> Iterator[str]:
    args.lr = args.lr or 1.0  # train.py computes it from the number of processes
    TrainSettings.of(args, world=1)
    yield from ()


def of_train_py(argv: list[str]) -> Iterator[str]:
    args = get_args_parser().parse_args(argv)
    if args.resume:
        take_flags_of_run(args, get_args_parser())
    yield from checked(flags(args))
    for section in (run, data, weights, vision, output):
        yield f"== {section.__name__}"
        yield from checked(section(args))


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return 0
    problems: dict[str, None] = {}  # in their order, without repeats
    home = rf"(?<![\w.~-]){re.escape(os.path.expanduser('~'))}(?![\w.-])"  # names a user
    for section in (machine(), packages(), checked(of_train_py(argv))):
        for line in section if not problems else ():  # without its packages, train.py's flags are not known
            if line.startswith("!"):
                problems[line] = None
            else:
                print(re.sub(home, "~", line), flush=True)
    end = ["== what would fail", *problems] if problems else ["== nothing found that would stop a run"]
    print(re.sub(home, "~", "\n".join(end)))
    return 1 if problems else 0


if __name__ == "__main__":
    with nullcontext() if import_error else one_line_errors():
        sys.exit(main(sys.argv[1:]))
