"""What a run says on the terminal: lines and progress bars from the first process only, aligned tables."""

import os

from tqdm import tqdm


def is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def say(*words) -> None:
    if is_first():
        tqdm.write(" ".join(str(word) for word in words))


def progress(items, what: str, total: int | None = None, unit: str = "it"):
    """A bar with rate and ETA."""
    return tqdm(items, desc=what, total=total, unit=unit, disable=not is_first(), dynamic_ncols=True, mininterval=0.5)


def table(header: list[str], rows: list[list]) -> str:
    """Text table: first column left, all others right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
