"""tools/download.py and tools/fetch.py, against a local server."""

import shutil
import stat
import time
import zipfile
from types import SimpleNamespace

import pytest

from hub_server import serving
from tools import download, fetch
from user_errors import error_message
from util.data.datasets import load_scienceqa


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def site(tmp_path, scienceqa, monkeypatch):
    """The places of ScienceQA's authors, with the small ScienceQA."""
    folder = tmp_path / "site"
    (folder / "scienceqa").mkdir(parents=True)
    for name in ("problems.json", "pid_splits.json"):
        shutil.copy(scienceqa / name, folder / "scienceqa")
    shutil.copy(scienceqa / "captions.json", folder)
    for split in ("train", "test"):
        shutil.make_archive(str(folder / split), "zip", scienceqa / "images", split)
    with serving(folder) as server:
        monkeypatch.setattr(download, "SCIENCEQA", server.url)
        monkeypatch.setattr(download, "PICTURES", server.url)
        yield server


# --- A file ---

def test_a_file_goes_on_where_its_connection_ended(site, tmp_path):
    content = bytes(range(256)) * 20000
    (site.folder / "big").write_bytes(content)
    site.cut = [3_000_000, 1_000_000]
    fetch.fetch(f"{site.url}/big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == content
    assert site.ranges == ["bytes=0-", "bytes=3000000-", "bytes=4000000-"]
    assert [path.name for path in tmp_path.iterdir() if "big" in path.name] == ["big"]


def test_a_file_of_another_version_is_not_joined(site, tmp_path):
    (site.folder / "big").write_bytes(b"a" * 3000)
    size, etag = fetch.describe(f"{site.url}/big")
    site.cut = [1000]
    with pytest.raises(OSError, match="1,000 of 3,000 bytes"):
        fetch.append(f"{site.url}/big", fetch.part_path(tmp_path / "big", etag, size), size, etag)
    (site.folder / "big").write_bytes(b"b" * 3000)
    fetch.fetch(f"{site.url}/big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == b"b" * 3000


def test_a_server_that_gives_nothing_ends_in_one_line(site, tmp_path):
    (site.folder / "big").write_bytes(b"a" * 3000)
    site.cut = [0] * 100
    assert "the same command goes on" in error_message(fetch.fetch, f"{site.url}/big", tmp_path / "big")
    assert not (tmp_path / "big").exists()
    assert "404" in error_message(fetch.fetch, f"{site.url}/missing", tmp_path / "missing")


def test_wrong_content_is_not_kept(site, tmp_path, monkeypatch):
    (site.folder / "big").write_bytes(b"a" * 3000)
    monkeypatch.setattr("hub_server.etag", lambda path: 32 * "0")
    assert "wrong content (MD5" in error_message(fetch.fetch, f"{site.url}/big", tmp_path / "big")
    assert not [path for path in tmp_path.iterdir() if "big" in path.name]


def test_a_full_disk_is_told_first(site, tmp_path, monkeypatch):
    (site.folder / "big").write_bytes(b"a" * 3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2999))
    assert "big needs 0.00 GB, and only 0.00 GB are free" in error_message(fetch.fetch, f"{site.url}/big",
                                                                           tmp_path / "big")
    assert not [path for path in tmp_path.iterdir() if "big" in path.name]


# --- ScienceQA ---

def test_scienceqa_is_there_after_one_command(site, scienceqa, tmp_path):
    root = tmp_path / "data"
    download.download("scienceqa", root, root / "weights")
    for split in ("train", "test"):
        there, expected = (load_scienceqa(str(folder), split, str(folder / "captions.json"))
                           for folder in (root, scienceqa))
        assert (there.fingerprint, there.pictures_sha256) == (expected.fingerprint, expected.pictures_sha256)
    fetched = dict(site.fetched)
    assert sorted(path.name for path in root.iterdir()) == ["captions.json", "images", "pid_splits.json",
                                                            "problems.json"]
    download.download("scienceqa", root, root / "weights")
    assert dict(site.fetched) == fetched  # what is there stays


def test_pictures_of_ones_own_are_not_replaced(site, tmp_path):
    own = tmp_path / "data" / "images" / "train" / "101"
    own.mkdir(parents=True)
    assert "images/train lacks pictures: move it away" in error_message(download.fetch_scienceqa, tmp_path / "data")
    assert list((tmp_path / "data" / "images").rglob("*.png")) == [] and own.is_dir()


def write_zip(path, members: dict[str, bytes], mode: int = stat.S_IFREG | 0o644) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(member, content)


@pytest.mark.parametrize("members, mode, words", [
    ({"train/1/image.png": b"1", "../../evil.png": b"2"}, None, "'../../evil.png', which leads out of its folder"),
    ({"/tmp/evil.png": b"2"}, None, "'/tmp/evil.png', which leads out"),
    ({"train/1/image.png": b"/etc/passwd"}, stat.S_IFLNK | 0o777, "which leads out"),
    ({"train/1/image.png": bytes(10**7)}, None, "declares 10,000,000 bytes of pictures")])
def test_hostile_archives_write_nothing(tmp_path, members, mode, words):
    write_zip(tmp_path / "train.zip", members, mode or stat.S_IFREG | 0o644)
    assert words in error_message(download.unpack, tmp_path / "train.zip", tmp_path / "images", "train")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["images", "train.zip"]


def test_what_macos_adds_is_left_out(tmp_path):
    write_zip(tmp_path / "train.zip", {"train/1/image.png": b"1", "__MACOSX/train/._1": b"2", "train/.DS_Store": b"3",
                                       "train/1/.DS_Store": b"4"})
    download.unpack(tmp_path / "train.zip", tmp_path / "images", "train")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if path.is_file()] == [
        "train.zip", "images/train/1/image.png"]


def test_a_damaged_archive_leaves_nothing(tmp_path):
    write_zip(tmp_path / "train.zip", {f"train/{i}/image.png": bytes([i]) * 999 for i in range(9)})
    content = bytearray((tmp_path / "train.zip").read_bytes())
    content[50] ^= 255
    (tmp_path / "train.zip").write_bytes(content)
    assert "is damaged" in error_message(download.unpack, tmp_path / "train.zip", tmp_path / "images", "train")
    assert list((tmp_path / "images").iterdir()) == []


def test_unknown_names(tmp_path):
    message = error_message(download.download, "llama", tmp_path, tmp_path)
    assert message == "'llama' is none of scienceqa, llama-7b, clip, adapters, and no USER/REPO of the hub"
