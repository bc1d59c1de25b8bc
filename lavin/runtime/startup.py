"""A program's settings that have to be made before its imports, which load torch and take seconds."""

import os
import signal
import sys
from types import TracebackType

INSTALL = ("bash scripts/environment.sh requirements.txt makes .venv with all packages (then source "
           ".venv/bin/activate), or pip install -r requirements.txt")


def prepare_imports() -> None:
    """Settles how torch's threads wait, and lets Ctrl-C end the program in silence until `one_line_errors` takes over.
    A package that is missing ends the program in one line.

    Threads of OpenMP spin while they wait, unless the environment says otherwise before torch is loaded: programs that
    share a node would take each other's cores. `limit_threads` (lavin/runtime/device.py) sets their number later.
    SIGINT stays ignored where a shell's background commands ignore it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # which would show where the imports were
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = report_missing_package


def report_missing_package(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Prints an error that nothing has caught: with its traceback, unless a package is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        program = os.path.basename(sys.argv[0])
        print(f"{program}: error: the package {error.name} is missing: {INSTALL}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def prepare_cuda() -> None:
    """Settles what CUDA takes from the environment at its first use.

    Commands whose results are compared do it alike, and so do the benchmarks of these commands.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # tensor sizes change all the time
