"""Checksums of files: content decides, states only save hashing."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies

from user_errors import error_message
from util.data import cache, checksums


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIN_CACHE", str(tmp_path / "cache"))
    cache.report_no_cache.cache_clear()
    checksums.hash_files_once.cache_clear()
    monkeypatch.setattr(checksums, "RECENT_SECONDS", 0)  # else files of a test are too young to be kept
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that have been hashed since."""
    names, digest = [], checksums.part_digest
    monkeypatch.setattr(checksums, "part_digest", lambda path, start: names.append(path.name) or digest(path, start))
    return names


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


@given(content=strategies.binary(max_size=40), part_bytes=strategies.integers(1, 17), buffer=strategies.integers(1, 9))
def test_every_byte_of_a_file_counts_in_parts_of_any_size(content, part_bytes, buffer, tmp_path_factory):
    """The digest of the digests of its parts, however they are read."""
    path = tmp_path_factory.mktemp("file") / "file"
    path.write_bytes(content)
    parts = [content[i:i + part_bytes] for i in range(0, len(content) or 1, part_bytes)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIN_CACHE", "")
        patch.setattr(checksums, "PART_BYTES", part_bytes)
        patch.setattr(checksums, "BUFFER_BYTES", buffer)
        assert checksums.file_sha256s([path]) == [expected]


def later_start(files: list[Path]) -> list[str | None]:
    checksums.hash_files_once.cache_clear()
    return checksums.file_sha256s(files)


def test_a_later_start_hashes_nothing(folder, files, hashed):
    first = checksums.file_sha256s(files)
    assert len(set(first)) == 3 and sorted(hashed) == ["a", "b", "c"]
    assert later_start(files) == first and len(hashed) == 3
    assert checksums.file_sha256s(files[::-1]) == first[::-1]


def other_content_same_size_and_time(path) -> None:
    found = path.stat()
    path.write_bytes(b"z" * found.st_size)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def another_file_of_the_same_size_and_time(path) -> None:
    """Puts another file there as rsync does: ctime says when it came."""
    found = path.stat()
    new = path.with_name("new")
    new.write_bytes(b"z" * found.st_size)
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
    new.replace(path)


def one_byte_more(path) -> None:
    path.write_bytes(path.read_bytes() + b"z")


@pytest.mark.parametrize("change", [other_content_same_size_and_time, another_file_of_the_same_size_and_time,
                                    one_byte_more])
def test_a_changed_file_is_hashed_again(folder, files, change):
    first = checksums.file_sha256s(files)
    time.sleep(0.02)  # ctime has steps of milliseconds
    change(files[1])
    again = checksums.file_sha256s(files)
    assert [a == b for a, b in zip(first, again, strict=True)] == [True, False, True]


def test_the_same_content_has_the_same_checksum_elsewhere_and_later(folder, files, tmp_path, hashed):
    copies = [Path(shutil.copy(path, tmp_path / f"copy of {path.name}")) for path in files]
    os.utime(copies[0], (7, 7))
    assert checksums.file_sha256s(copies) == checksums.file_sha256s(files) and len(hashed) == 6


def test_files_that_changed_a_moment_ago_are_not_kept(folder, files, hashed, monkeypatch):
    """They may change again in the same step of the file system's clock."""
    monkeypatch.setattr(checksums, "RECENT_SECONDS", 60)
    for _ in range(2):
        checksums.file_sha256s(files)
    assert len(hashed) == 6 and not list(folder.glob("*.safetensors"))


def test_files_that_change_while_they_are_hashed_are_named(folder, files, monkeypatch):
    part_digest = checksums.part_digest

    def change(path, start):
        one_byte_more(files[2])
        return part_digest(path, start)

    monkeypatch.setattr(checksums, "part_digest", change)
    assert error_message(checksums.file_sha256s, files).startswith(f"{files[2]} changes while it is read")
    assert not list(folder.glob("*.safetensors"))


def test_what_is_no_file_has_no_checksum(folder, files, tmp_path, monkeypatch):
    """A named pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    missing = [tmp_path / name for name in ("pipe", "link", "nowhere", ".")]
    assert checksums.file_sha256s(missing) == [None] * 4
    assert checksums.file_sha256s([*missing, files[0]])[4] == checksums.file_sha256s(files)[0]
    monkeypatch.setattr(os, "access", lambda path, mode: path != files[1])  # root may read all
    assert [found is None for found in checksums.file_sha256s(files)] == [False, True, False]


def test_a_lost_or_broken_entry_costs_hashing_again_and_no_cache_every_time(folder, files, hashed, monkeypatch):
    first = checksums.file_sha256s(files)
    entry, = folder.glob("lavin-checksums-*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-7])
    assert later_start(files) == first and len(hashed) == 6
    shutil.rmtree(folder)
    assert later_start(files) == first and len(hashed) == 9
    monkeypatch.setenv("LAVIN_CACHE", "")
    for _ in range(2):
        assert later_start(files) == first
    assert len(hashed) == 15


def test_without_a_cache_a_process_hashes_each_file_once(folder, files, hashed, monkeypatch):
    """eval.py asks for the base's checksum twice, and search.py four times: 13 GB each time."""
    monkeypatch.setenv("LAVIN_CACHE", "")
    first = checksums.file_sha256s(files)
    assert checksums.file_sha256s(files) == first and len(hashed) == 3
    one_byte_more(files[1])
    assert checksums.file_sha256s(files)[1] != first[1] and len(hashed) == 6


def test_one_checksum_of_names_and_contents(folder, files):
    a, b, c = files
    values = [checksums.named_files_sha256(paths) for paths in (
        {"1": a, "2": b}, {"1": b, "2": a}, {"2": b, "1": a}, {"1": a, "3": b}, {"1": a, "2": Path("nowhere")},
        {"1": a}, {})]
    assert len(set(values)) == len(values)


def test_each_of_many_files_has_its_own_state(tmp_path):
    paths = [tmp_path / str(i) for i in range(2 * checksums.STATES_AT_ONCE + 3)]
    for i, path in enumerate(paths[:-1]):
        path.write_bytes(bytes(i))
    found = checksums.file_states(paths)
    assert list(found) == paths and found.pop(paths[-1]) is None
    assert [state[2] for state in found.values()] == list(range(len(paths) - 1))
