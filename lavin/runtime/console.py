"""Terminal output: lines and progress from rank 0 only, aligned tables."""

import io
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from tqdm import tqdm

LINE_SECONDS = 30  # between two lines of progress, where there is no terminal
BAR_SECONDS = 2  # after which progress appears of what is often over at once
run_name = ""  # set by `working_on`


def setup() -> None:
    """Makes both outputs such that writing to them does not end a program; called once where a program starts."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the program goes on, and its words are lost
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a log in ascii or latin-1 gets a ? for each other character, and each line when it is written
        sys.stdout.reconfigure(errors="replace", line_buffering=True)


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
        # a bar in the terminal is drawn again below the line
        (tqdm.write if is_terminal() else print)(" ".join(str(word) for word in words))


@contextmanager
def working_on(name: str) -> Iterator[None]:
    """Names the run that this process works on, with which all its progress begins: it tells jobs side by side apart.
    """
    global run_name
    before, run_name = run_name, name
    try:
        yield
    finally:
        run_name = before


def progress_bar(items, description: str, total: int | None = None, unit: str = "it", initial: int = 0,
                 delay: float = 0) -> tqdm:
    """Progress with rate and ETA, on rank 0 only: a bar, or lines where there is no terminal. delay: seconds until it
    appears."""
    options = {"desc": f"{run_name}, {description}" if run_name else description, "total": total, "unit": unit,
               "initial": initial, "disable": not is_main_process()}
    if is_terminal():
        return tqdm(items, dynamic_ncols=True, mininterval=0.5, delay=delay, **options)
    return Lines(items, delay=delay, **options)


def is_terminal() -> bool:
    """Whether progress, which goes to stderr, is seen in a terminal, and not kept in a file."""
    return sys.stderr.isatty()


class Lines(tqdm):
    """Progress as lines of a log: one in LINE_SECONDS, and one at the end, with the mean rate, if that comes after
    `delay` seconds."""

    _instances: WeakSet = WeakSet()  # a bar among tqdm's own is cleared and drawn again where tqdm.write writes a line

    def __init__(self, items, delay: float, **options):
        self.shortest = delay
        super().__init__(items, delay=LINE_SECONDS, mininterval=LINE_SECONDS, miniters=1,
                         bar_format="{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}", **options)

    @staticmethod
    def status_printer(file):
        def write_line(status: str) -> None:
            file.write(f"{status}\n")
            file.flush()
        return write_line

    def moveto(self, n: int) -> None:
        """A log has no cursor to be moved."""

    def close(self) -> None:
        if not self.disable and self.n > self.last_print_n and self._time() - self.start_t >= self.shortest:
            self._ema_dt = lambda: None  # then the rate is that of the whole, as in super().close
            self.display()
        self.delay = math.inf  # super() writes a last line, unless nothing was to be seen yet
        super().close()

    def __del__(self) -> None:
        """Progress that an error left open adds nothing below the error's line."""


def counted(n: int, what: str) -> str:
    """`1 answer`, `2,000 answers`, or `0 processes`."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{n:,} {what if n == 1 else plural}"


def listed(items: Iterable[object], last: str = "and") -> str:
    """`2`, or `2, 6 and 20`. last: the word before the last item."""
    *most, end = map(str, items)
    return f"{', '.join(most)} {last} {end}" if most else end


def duration(seconds: float) -> str:
    """`41 min`, or `2 h 05 min`."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"


def text_width() -> int:
    """The columns that a text may take: those of the terminal, if it has the 80 that tables need, and 120 in a file."""
    return max(80, shutil.get_terminal_size((120, 24)).columns)


def format_table(header: list[str], rows: list[list]) -> str:
    """Aligned text: first column left, all others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
