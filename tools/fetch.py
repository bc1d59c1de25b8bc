"""Fetches a file over HTTP: it is gone on with where a connection or a process ended, and is whole or absent."""

import hashlib
import http.client
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lavin.runtime.arithmetic import ceil_div
from lavin.runtime.console import progress_bar
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import require_space, sync

TIMEOUT_SECONDS = 30  # without a byte
TRIES = 5  # in a row that bring nothing new
TOO_MANY_REQUESTS = 429
MIB = 2**20


def fetch(url: str, path: Path) -> None:
    """Writes the file at an address to `path`, unless it is there.

    What has come is kept in a file beside it, under a name that tells its version (ETag), and the same call goes on.
    The size is compared with what the server has announced, and the content with its MD5 where the ETag is one, as in
    S3. Raises UserError where the server does not give the file, or the disk has too little space.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    n_failures = 0
    while not path.exists():
        part, before = None, 0
        try:
            size, etag = describe(url)
            part = part_path(path, etag, size)
            before = part.stat().st_size if part.exists() else 0
            require_space(path.parent, size - before, path.name)
            append(url, part, size, etag)
            finish(part, path, etag)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, HTTPError) and error.code < 500 and error.code != TOO_MANY_REQUESTS:
                raise UserError(f"{url} cannot be fetched ({error}): its place may have changed, so look for it at its "
                                "authors'") from error
            brought_new = part is not None and part.exists() and part.stat().st_size > before
            n_failures = 1 if brought_new else n_failures + 1
            if n_failures == TRIES:
                raise UserError(f"{url} cannot be fetched ({first_line(error)}): the same command goes on where it "
                                "has ended") from error
            time.sleep(2 ** (n_failures - 1))


def describe(url: str) -> tuple[int, str]:
    """The size of the file at an address in bytes, and its version, the ETag."""
    with urlopen(Request(url, headers={"Range": "bytes=0-0"}), timeout=TIMEOUT_SECONDS) as response:
        headers = response.headers
        size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        if not size.isdecimal() or headers.get_content_type() == "text/html":
            raise UserError(f"{url} is a web page, not a file: its place has changed, so look for it at its authors'")
        return int(size), headers.get("ETag", "")


def part_path(path: Path, etag: str, size: int) -> Path:
    """The file that holds what has come of this version."""
    version = hashlib.sha256(f"{etag} {size}".encode()).hexdigest()[:12]
    return path.with_name(f".{path.name}.{version}.incomplete")


def append(url: str, part: Path, size: int, etag: str) -> None:
    """Appends what `part` lacks. Raises OSError where the connection ends before."""
    done = part.stat().st_size if part.exists() else 0
    if done == size:
        return
    headers = {"Range": f"bytes={done}-", **({"If-Range": etag} if etag else {})}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:  # the server sends the whole file
            done = 0
        with open(part, "ab" if done else "wb") as file:
            for chunk in progress_bar(chunks(response), part.name.split(".")[1], total=ceil_div(size, MIB),
                                      initial=done // MIB, unit="MiB"):
                file.write(chunk)
            if file.tell() != size:
                raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes")


def chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while chunk := response.read(MIB):
        yield chunk


def finish(part: Path, path: Path, etag: str) -> None:
    """Gives the whole file its name. Raises UserError where it is not what the server has announced."""
    announced = re.fullmatch(r'"([0-9a-f]{32})"', etag)
    if announced:
        digest = hashlib.md5(usedforsecurity=False)
        with open(part, "rb") as file:
            while chunk := file.read(MIB):
                digest.update(chunk)
        found = digest.hexdigest()
        if found != announced[1]:
            part.unlink()
            raise UserError(f"{path.name} came with wrong content (MD5 {found}, not {announced[1]}): fetch it again")
    sync(part)
    part.replace(path)
