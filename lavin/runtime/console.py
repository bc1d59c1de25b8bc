"""Terminal output: lines and progress bars from rank 0 only, aligned tables."""

import io
import os
import sys

from tqdm import tqdm


def setup() -> None:
    """Makes both outputs such that writing to them does not end a program; called once where a program starts."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the program goes on, and its words are lost
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log in ascii or latin-1 gets a ? for each other character
        sys.stdout.reconfigure(errors="replace")


def summary(doc: str | None) -> str:
    """The first line of a module's docstring, for --help; python -OO drops docstrings."""
    return (doc or "").partition("\n")[0]


def by_program(message: str) -> str:
    """The message in one line, behind the program's name, as it ends on stderr."""
    return " ".join(f"{os.path.basename(sys.argv[0])}: {message}".splitlines())  # a file's name may have two lines


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print_rank0(*words) -> None:
    if is_main_process():
        tqdm.write(" ".join(str(word) for word in words))


def progress_bar(items, description: str, total: int | None = None, unit: str = "it", initial: int = 0,
                 delay: float = 0) -> tqdm:
    """A bar with rate and ETA, on rank 0 only. delay: seconds until it appears."""
    return tqdm(items, desc=description, total=total, unit=unit, initial=initial, disable=not is_main_process(),
                dynamic_ncols=True, mininterval=0.5, delay=delay)


def format_table(header: list[str], rows: list[list]) -> str:
    """Aligned text: first column left, all others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
