"""Checksums of files by their whole content; a later start reads them from the node's cache.

A file's checksum is the SHA-256 of the SHA-256s of its parts, which threads hash side by side: 13 GB take seconds. The
cache (cache.py) keeps the checksums of a list of files under the state of each: device, inode, size, and the times of
the last change of content and of anything (ctime, which no program can set). Where one state differs, the list is
hashed again. A process remembers checksums in the same way, so that without a cache it hashes each file once. Nothing
else goes by states: they only save hashing.
"""

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch

from lavin.runtime.console import BAR_SECONDS, progress_bar
from lavin.runtime.errors import UserError
from lavin.runtime.files import json_list_sha256, json_sha256
from util.data.cache import Arrays, cached

PART_BYTES = 2**26  # of a file, hashed by one thread
BUFFER_BYTES = 2**20
STATES_AT_ONCE = 64  # files that one thread asks for, since handing out each one costs more than its state
RECENT_SECONDS = 2  # a file may change again without another ctime, whose steps are up to 2 s long on some file systems
CHANGES = "changes while it is read"
REMEMBERED = 16  # lists of files: the base's, the ViT's, and the pictures of each split

State = tuple[int, ...]
States = Mapping[Path, State | None]


def file_state(path: Path) -> State | None:
    """Another one where a file was changed or replaced; None where there is no regular file that can be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_recent(state: State) -> bool:
    """Whether a file may have changed again without another state."""
    return state[-1] > time.time_ns() - RECENT_SECONDS * 10**9


def file_states(paths: Iterable[Path]) -> States:
    paths = list(paths)
    parts = [paths[start:start + STATES_AT_ONCE] for start in range(0, len(paths), STATES_AT_ONCE)]
    with ThreadPoolExecutor() as pool:  # on a network's file system, each one waits for the server
        states = chain.from_iterable(pool.map(lambda part: list(map(file_state, part)), parts))
        return dict(zip(paths, states, strict=True))


def require_unchanged(before: States) -> None:
    """Raises UserError for a file that has changed since its state was taken: what was read of it may be of the one
    content, and its checksum of the other."""
    now = file_states(before)
    for path, state in before.items():
        if state != now[path]:
            raise UserError(f"{path} {CHANGES}: start again when all files are there")


def file_sha256s(paths: Sequence[Path]) -> list[str | None]:
    """The checksum of each file; None where there is no regular file that can be read."""
    files = {path: state for path, state in file_states(paths).items() if state}
    if not files:
        return [None] * len(paths)
    hash_them = hash_files if any(map(is_recent, files.values())) else hash_files_once
    hashed = hash_them(tuple(files.items()))
    checksums = dict(zip(files, hashed["sha256"], strict=True))
    return [checksums[path].numpy().tobytes().hex() if path in checksums else None for path in paths]


@lru_cache(REMEMBERED)
def hash_files_once(files: tuple[tuple[Path, State], ...]) -> Arrays:
    """The digests of the files [number of files, 32], from the node's cache."""
    return cached("checksums", [[str(path.absolute()), *state] for path, state in files], lambda: hash_files(files),
                  {"sha256": (torch.uint8, (len(files), 32))})


def hash_files(files: tuple[tuple[Path, State], ...]) -> Arrays:
    digests = sha256_digests({path: size for path, (_, _, size, _, _) in files})
    require_unchanged(dict(files))
    return {"sha256": torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)}


def sha256_digests(sizes: Mapping[Path, int]) -> Iterator[bytes]:
    """The digest of each file. Raises OSError for a file that cannot be read."""
    parts = [(path, start) for path, size in sizes.items() for start in range(0, max(size, 1), PART_BYTES)]
    digests: dict[Path, list[bytes]] = {path: [] for path in sizes}
    with ThreadPoolExecutor() as pool:
        try:
            of_parts = progress_bar(pool.map(part_digest, *zip(*parts, strict=True)), "checksums of files",
                                    total=len(parts), delay=BAR_SECONDS)
            for (path, _), digest in zip(parts, of_parts, strict=True):
                digests[path].append(digest)
        finally:
            pool.shutdown(cancel_futures=True)  # a program that is stopped ends at once
    return (hashlib.sha256(b"".join(of_file)).digest() for of_file in digests.values())


def part_digest(path: Path, start: int) -> bytes:
    digest, left = hashlib.sha256(), PART_BYTES
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (n := file.readinto(buffer[:left])):
            digest.update(buffer[:n])
            left -= n
    return digest.digest()


def files_sha256(paths: Sequence[Path]) -> str:
    """One checksum of the content of several files, in their order."""
    return json_sha256(file_sha256s(paths))


def named_files_sha256(paths: Mapping[str, Path]) -> str:
    """One checksum of the names in `paths` and of the content of their files, in their order."""
    return json_list_sha256(list(zip(paths, file_sha256s(list(paths.values())), strict=True)))
