"""Ways in which an entry of the node's cache may be of somebody else's making: each takes the path of a whole one."""

import os

import torch
from safetensors.torch import load_file, save

from util.data import cache


def replace(path, content: bytes) -> None:
    """Puts another file in its place: the first may still be mapped."""
    path.unlink()
    path.write_bytes(content)


def has_other_names(path) -> None:
    write_entry(path, {"pixel": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "good": torch.ones(3, dtype=torch.bool)})


def has_a_name_more(path) -> None:
    write_entry(path, {name: array for name, array in load_file(path).items() if name != cache.CHECKSUM}
                | {"more": torch.zeros(1)})


def lacks_a_row(path) -> None:
    write_entry(path, {name: array[:-1] for name, array in load_file(path).items() if name != cache.CHECKSUM})


def has_other_types(path) -> None:
    write_entry(path, {name: array.int() for name, array in load_file(path).items() if name != cache.CHECKSUM})


def has_other_dimensions(path) -> None:
    write_entry(path, {name: array.flatten() for name, array in load_file(path).items() if name != cache.CHECKSUM})


def write_entry(path, arrays) -> None:
    """A whole entry, with the right checksum."""
    replace(path, save({**arrays, cache.CHECKSUM: torch.tensor(cache.checksum(arrays))}))


def is_a_named_pipe(path) -> None:
    path.unlink()
    os.mkfifo(path)


def is_a_link_to_an_entry(path) -> None:
    """Says whether it is a link to an entry, whose content somebody else may decide."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


LAYOUTS = (has_other_names, has_a_name_more, lacks_a_row, has_other_types, has_other_dimensions)
