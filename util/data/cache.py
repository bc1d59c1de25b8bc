"""A node's cache of arrays: made once, by whoever comes first, and memory-mapped by all ranks, runs and trials.

An entry is a safetensors file, named by a checksum of all that it was made of, so that it never has to be updated. Its
pages belong to the system's page cache: however many processes map them, they are in memory once. A mapping is private:
what a process writes to its tensors reaches neither the file nor another process.

An entry that others could have written is not used, nor a folder in which they could replace one: its checksum tells
what is broken, not who made it.
"""

import os
import re
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lavin.runtime.console import print_rank0
from lavin.runtime.errors import first_line
from lavin.runtime.files import PART_SUFFIX, atomic_write, json_sha256

Arrays = dict[str, torch.Tensor]
Layout = dict[str, tuple[torch.dtype, tuple[int | None, ...]]]  # types and sizes by name; None: any size

CHECKSUM = "checksum"  # name of an entry's tensor that holds the checksum of the others
CHUNK_BYTES = 2**24  # of a checksum; threads share the chunks
UNUSED_SECONDS = 30 * 24 * 3600  # after which an entry is removed: no process can still have it mapped
WAIT_SECONDS = 600  # for another process that makes an entry; some file systems never grant a lock
PERMISSIONS = 0o644  # of entries; only their owner may change them, whatever the umask is
FOLDER_PERMISSIONS = 0o755
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
WRITABLE, FOREIGN = "others can write to it", "it belongs to another user"  # faults of files and folders
OWN_NAMES = re.compile(r"\.?lavin-\w+-[0-9a-f]{32}\.safetensors.*")  # of entries, their locks and parts


def cache_folder() -> Path | None:
    """LAVIN_CACHE, or else `lavin` in XDG_CACHE_HOME or ~/.cache. None where LAVIN_CACHE is empty: no cache."""
    chosen = os.environ.get("LAVIN_CACHE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavin"
    except RuntimeError:  # this user has no home
        return None


def cached(what: str, key: Any, make: Callable[[], Arrays], layout: Layout) -> Arrays:
    """The CPU tensors that `make` returns, mapped from the cache; where it cannot be used, `make`'s own.

    what: a word for the entry. key: all that the tensors are made of (data, settings, and code), as a value of JSON's
    types. layout: the layout that an entry must have to be used.
    """
    folder = cache_folder()
    if folder is None or not is_usable(folder):
        return make()
    path = folder / f"lavin-{what}-{json_sha256(key)[:32]}.safetensors"
    arrays = read(path, layout)
    if arrays is None:
        with making(path, what):
            arrays = read(path, layout) or write(path, make(), layout)
    return arrays


# --- Whom to trust ---

def is_usable(folder: Path) -> bool:
    """Whether the cache may be used. Makes its folder; says, once, what is wrong with it."""
    try:
        folder.mkdir(FOLDER_PERMISSIONS, parents=True, exist_ok=True)
        fault = distrust(folder.stat())
    except OSError as error:
        fault = error.strerror
    if fault:
        report_no_cache(folder, f"{fault}: chmod go-w {folder}" if fault == WRITABLE else fault)
    return not fault


def distrust(found: os.stat_result) -> str | None:
    """Why a file or folder of the cache is not used; None where only this user and root can have changed it. In a
    folder with the sticky bit, as /tmp, others can add files, but not replace this user's."""
    if found.st_uid not in (os.geteuid(), 0):
        return FOREIGN
    is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    return WRITABLE if found.st_mode & OTHERS_WRITE and not is_sticky else None


def is_trusted(path: Path) -> bool:
    """Whether an entry is there, and a regular file that only this user can have written: a named pipe would be waited
    for. Says, once, where others can."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode):
        return False
    fault = distrust(found)
    if fault:
        report_distrust(path, fault)
    return not fault


# --- Entries ---

def read(path: Path, layout: Layout) -> Arrays | None:
    """The tensors of an entry; None where it is not there, not trusted, cut short, changed, or of another layout."""
    if not is_trusted(path):
        return None
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError):
        return None
    if arrays.pop(CHECKSUM, torch.tensor(-1)).tolist() != checksum(arrays) or not has_layout(arrays, layout):
        return None
    with suppress(OSError):
        os.utime(path)  # it is in use
    return arrays


def has_layout(arrays: Arrays, layout: Layout) -> bool:
    return arrays.keys() == layout.keys() and all(
        arrays[name].dtype == dtype and len(arrays[name].shape) == len(sizes)
        and all(size in (None, found) for size, found in zip(sizes, arrays[name].shape, strict=True))
        for name, (dtype, sizes) in layout.items())


def write(path: Path, arrays: Arrays, layout: Layout) -> Arrays:
    """Writes an entry; returns its tensors, mapped, or `arrays` where that fails."""
    try:
        remove_unused(path)
        with atomic_write(path, PERMISSIONS) as part:
            save_file({**arrays, CHECKSUM: torch.tensor(checksum(arrays))}, part)
    except (OSError, SafetensorError) as error:
        report_no_cache(path.parent, getattr(error, "strerror", None) or first_line(error))
        return arrays
    return read(path, layout) or arrays


def checksum(arrays: Arrays) -> int:
    """CRC-32 of names, types, shapes and bytes."""
    parts: list[Any] = []
    with ThreadPoolExecutor(4) as pool:
        for name, array in sorted(arrays.items()):
            content = array.reshape(-1).view(torch.uint8).numpy()
            chunks = (content[i:i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES))
            parts += [name, array.dtype, list(array.shape), *pool.map(zlib.crc32, chunks)]
    return zlib.crc32(repr(parts).encode())


@contextmanager
def making(path: Path, what: str) -> Iterator[None]:
    """One process at a time; where there are no locks, each works for itself."""
    lock = filelock.FileLock(f"{path}.lock")
    with suppress(OSError, NotImplementedError):  # filelock.Timeout is an OSError
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print_rank0(f"waiting for the {what}, which another process prepares")
            lock.acquire(timeout=WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


def remove_unused(path: Path) -> None:
    """Removes old entries, and what a killed process left of this one."""
    for other in path.parent.iterdir():
        with suppress(OSError):
            is_old = OWN_NAMES.fullmatch(other.name) and time.time() - other.stat().st_mtime > UNUSED_SECONDS
            if is_old or (other.name.startswith(f".{path.name}.") and other.suffix == PART_SUFFIX):
                other.unlink()


@cache
def report_no_cache(folder: Path, reason: str) -> None:
    """Says, once, why there is no cache."""
    print_rank0(f"no cache of pictures, token ids and checksums in {folder} ({reason}), so every process prepares its "
                "own: name another folder in LAVIN_CACHE, or leave it empty")


@cache
def report_distrust(path: Path, fault: str) -> None:
    """Says, once, why an entry is not used."""
    print_rank0(f"{path} of the cache is not used ({fault}), and made anew")
