"""Files: written atomically (complete or absent), read with errors that name the file, and identified by checksums."""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lavin.runtime.errors import UserError, first_line

PART_SUFFIX = ".part"  # of files that are being written
SAMPLE_BYTES = 2**20
LFS_POINTER = b"version https://git-lfs"
# how messages on files end
PUT_IT_THERE, WRITE_IT_AGAIN = "put it there, or correct the path", "fetch or write it again"


@contextmanager
def atomic_write(path: str | Path, permissions: int = 0o666) -> Iterator[Path]:
    """Yields a temporary path in the same folder, renamed to `path` on success: readers never see half a file.

    The name is this process's own, and the content is on the disk before the file is renamed, so that neither another
    process nor a machine that loses power can leave half a file under `path`. The file gets a new file's permissions,
    even if its writer sets others: safetensors lets only the owner read, and shutil copies the source's.
    permissions: the mode of a new file, which the process's umask reduces.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PART_SUFFIX}")
    try:
        tmp_path.unlink(missing_ok=True)
        tmp_path.touch(permissions)
        mode = tmp_path.stat().st_mode
        yield tmp_path
        if tmp_path.stat().st_mode != mode:
            tmp_path.chmod(mode)
        sync(tmp_path)
        os.replace(tmp_path, path)
        sync(path.parent)
    except OSError as error:  # names no file where a disk is full, and the temporary one elsewhere
        if error.filename is None or Path(error.filename) == tmp_path:
            error.filename = str(path)
        raise
    finally:
        tmp_path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_pipes(path: Path) -> None:
    """Raises OSError for what is no regular file: a named pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))


def read_text(path: str | Path, errors: str = "strict") -> str:
    refuse_pipes(Path(path))
    return Path(path).read_text(encoding="utf-8", errors=errors)


def read_lines(path: str | Path, errors: str = "strict") -> Iterator[str]:
    """The lines of a file, which end at LF, CR LF or CR. str.splitlines would also divide them at U+2028, NEL, VT and
    others, which a text may hold."""
    refuse_pipes(Path(path))
    with open(path, encoding="utf-8", errors=errors) as file:
        for line in file:
            yield line.removesuffix("\n")


def parse_json(text: str) -> Any:
    """Raises ValueError, also for what Python's parser takes and JSON does not have, or loses silently."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's parser would silently keep the last of several entries with one key."""
    content = dict(pairs)
    if len(content) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has two entries {key[:99]!r}")
    return content


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def load_json(path: str | Path, hint: str, fix: str) -> Any:
    """Raises UserError, which ends in `hint` where the file cannot be read, and in `fix` where it is broken."""
    try:
        return parse_json(read_text(path))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {hint}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): {fix}") from error


def read_json(path: str | Path, hint: str = PUT_IT_THERE) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing (the message ends in `hint`) or broken."""
    value = load_json(path, hint, WRITE_IT_AGAIN)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {WRITE_IT_AGAIN}")
    return value


def read_json_lines(path: str | Path) -> list:
    """One JSON value a line. Raises UserError where the file is missing or a line is broken."""
    try:
        return [parse_json(line) for line in read_lines(path)]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {PUT_IT_THERE}") from error
    except ValueError as error:
        raise UserError(f"{path} has a line that is not valid JSON ({error}): write it again") from error


def whole_lines(path: Path) -> Iterator[Any]:
    """One JSON value a line, one at a time, without a torn last one, whose writer was killed or had no space left.

    Raises UserError where another line is broken.
    """
    broken: UserError | None = None
    for i, line in enumerate(read_lines(path, errors="replace"), 1):
        if broken:
            raise broken
        try:
            value = parse_json(line)
        except ValueError as error:
            broken = UserError(f"{path}, line {i} is not valid JSON ({error}): remove the file")
        else:
            yield value


def read_whole_lines(path: Path) -> list:
    return list(whole_lines(path))


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: str | Path, values) -> None:
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def require_space(folder: Path, n_bytes: int, what: str) -> None:
    """Raises UserError where the disk of a folder, which may not be there yet, has less free space."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(f"{what} needs {n_bytes / 1e9:.2f} GB, and only {free / 1e9:.2f} GB are free in {existing}: "
                        "free some, or name another folder")


# --- Checksums ---

def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file of weights that another library cannot read."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return UserError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder")
    return UserError(f"{path} cannot be read as weights ({first_line(error)}): fetch or copy it again")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sampled_sha256(paths: list[Path]) -> str:
    """Identifies large files cheaply: by their number, sizes, and first, middle and last MiB."""
    digest = hashlib.sha256()
    for path in paths:
        refuse_pipes(path)
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for start in sorted({0, max(0, (size - SAMPLE_BYTES) // 2), max(0, size - SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def value_sha256(value) -> str:
    """The digest of a nested value of dicts, in any order, lists, plain values, and tensors on any device."""
    digest = hashlib.sha256()

    def update(part) -> None:
        if isinstance(part, dict):
            digest.update(f"dict {len(part)} ".encode())
            for key in sorted(part, key=repr):
                update([key, part[key]])
        elif isinstance(part, list | tuple):
            digest.update(f"list {len(part)} ".encode())
            for item in part:
                update(item)
        elif isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {list(part.shape)} ".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(f"{type(part).__name__} {part!r} ".encode())

    update(value)
    return digest.hexdigest()


def json_sha256(value) -> str:
    """The digest of a value that JSON can hold; the order of its dicts does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def json_list_sha256(items: Iterable) -> str:
    """The same as json_sha256(list(items)), with one item in memory at a time."""
    digest = hashlib.sha256(b"[")
    for i, item in enumerate(items):
        digest.update(f"{', ' if i else ''}{json.dumps(item, sort_keys=True)}".encode())
    digest.update(b"]")
    return digest.hexdigest()
