"""The node's cache: a second load decodes and tokenizes nothing; whatever is wrong with it, the data are right."""

import json
import os
import shutil
import time
import zlib
from pathlib import Path

import filelock
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from forked import in_processes
from lavin.runtime.distributed import LAUNCHER_VARIABLES
from lavin.tokenizer import Example, Tokenizer
from poisoned_entries import LAYOUTS, is_a_link_to_an_entry, is_a_named_pipe, replace
from tools.make_toy_base import train_tokenizer
from user_errors import change_json, error_message
from util.data import cache, images
from util.data.datasets import load_scienceqa
from util.data.examples import load_examples
from util.data.images import load_images
from util.data.prompts import build_prompt
from util.data.settings import TrainingData


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LAVIN_CACHE", str(tmp_path / "cache"))
    cache.report_no_cache.cache_clear()
    cache.report_distrust.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Paths of the pictures that have been decoded since."""
    paths, load_image = [], images.load_image
    monkeypatch.setattr(images, "load_image", lambda path, size: paths.append(path) or load_image(path, size))
    return paths


def load(root, skip_bad=False, size=8, split="test") -> tuple[dict, list]:
    """Images and skipped problems."""
    data = load_scienceqa(root, split)
    return load_images(data, size, 2, skip_bad), data.bad_pictures


def without_cache(monkeypatch, root, **flags) -> tuple[dict, list]:
    with monkeypatch.context() as patch:
        patch.setenv("LAVIN_CACHE", "")
        return load(root, **flags)


def assert_equal(loaded: tuple[dict, list], expected: tuple[dict, list]) -> None:
    assert loaded[0].keys() == expected[0].keys() and loaded[1] == expected[1]
    assert all(torch.equal(image, expected[0][qid]) for qid, image in loaded[0].items())


def entry(folder, what="pictures"):
    path, = folder.glob(f"lavin-{what}-*.safetensors")
    return path


# --- Hits ---

def test_the_second_load_decodes_nothing(folder, decoded, scienceqa, monkeypatch):
    first = load(scienceqa)
    assert len(decoded) == 3
    assert_equal(load(scienceqa), first)
    assert len(decoded) == 3
    assert_equal(first, without_cache(monkeypatch, scienceqa))
    assert len(decoded) == 6


def test_pictures_are_mapped_from_the_file_and_what_is_written_to_them_stays_in_the_process(folder, scienceqa):
    for _ in range(2):  # also in the process that wrote them
        loaded, _ = load(scienceqa)
        assert str(entry(folder)) in Path("/proc/self/maps").read_text()
    content = entry(folder).read_bytes()
    loaded["113"].fill_(7)
    assert entry(folder).read_bytes() == content and (load(scienceqa)[0]["113"] != 7).any()


def examples(data, tokenizer_file, **changes) -> dict:
    changes = {"n_prompt": 6, "max_seq_len": 200, **changes}
    n_prompt, settings = changes.pop("n_prompt"), TrainingData(**changes)
    return {qid: (list(example.ids), example.answer_start, example.image is not None)
            for qid, example in load_examples(data, settings, Tokenizer(tokenizer_file), 8, n_prompt, 2).items()}


def test_entries_have_the_permissions_of_other_files(folder, scienceqa):
    """Several people may share a cache, in which each can read the others' entries."""
    load(scienceqa)
    (folder / "other").touch()
    assert entry(folder).stat().st_mode == (folder / "other").stat().st_mode


def test_the_second_load_tokenizes_nothing(folder, scienceqa, tokenizer, tokenizer_file, monkeypatch):
    data = load_scienceqa(scienceqa, "train", scienceqa / "captions.json")
    first = examples(data, tokenizer_file)
    for qid, (ids, answer_start, has_image) in first.items():
        prompt, answer = build_prompt(data.problems[qid], "QCM-ALE", data.captions[qid])
        expected = tokenizer.example(prompt, answer, torch.zeros(()) if has_image else None, 6, 200)
        assert has_image == bool(data.problems[qid]["image"])
        assert (ids, answer_start) == (expected.ids, expected.answer_start)
    monkeypatch.setattr(Tokenizer, "example", None)
    assert examples(data, tokenizer_file) == first


@pytest.mark.parametrize("change", [{"prompt_format": "QCM-A"}, {"n_prompt": 3}, {"max_seq_len": 90}])
def test_other_settings_have_other_ids(folder, scienceqa, tokenizer_file, monkeypatch, change):
    data = load_scienceqa(scienceqa, "train")
    first, changed = examples(data, tokenizer_file), examples(data, tokenizer_file, **change)
    monkeypatch.setenv("LAVIN_CACHE", "")
    assert first != changed == examples(data, tokenizer_file, **change)


def test_other_texts_pictures_and_tokenizers_have_other_ids(folder, scienceqa_copy, tokenizer_file, tmp_path):
    def ids(captions=None, tokenizer=tokenizer_file):
        return examples(load_scienceqa(scienceqa_copy, "train", captions), tokenizer)

    plain = ids()
    assert ids(scienceqa_copy / "captions.json") != plain
    problems = json.loads((scienceqa_copy / "problems.json").read_text())
    change_json(scienceqa_copy / "problems.json", {"101": {**problems["101"], "image": None}})
    assert {qid for qid, (row, *_) in ids().items() if row != plain[qid][0]} == {"101"}
    other = tmp_path / "tokenizer.model"
    train_tokenizer(load_scienceqa(scienceqa_copy, "train"), other)
    assert all(example[0] != plain[qid][0] for qid, example in ids(tokenizer=other).items())


def test_ids_of_other_code_are_not_used(folder, scienceqa, tokenizer_file, monkeypatch, tmp_path):
    """Earlier versions, for instance, tokenized prompt and answer as one text."""
    data = load_scienceqa(scienceqa, "train")
    examples(data, tokenizer_file)
    (tmp_path / "tokenizer.py").write_text("# changed")
    monkeypatch.setattr("lavin.tokenizer.CODE", (tmp_path / "tokenizer.py",))
    monkeypatch.setattr(Tokenizer, "example", lambda *_: Example([1, 2, 3], 2))
    assert {tuple(ids) for ids, _, _ in examples(data, tokenizer_file).values()} == {(1, 2, 3)}


# --- Changed pictures ---

def changed_pixels(path, status) -> None:
    Image.new("RGB", (9, 9)).save(path)


def other_size_same_time(path, status) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [changed_pixels, other_size_same_time])
def test_a_changed_picture_is_decoded_again(folder, decoded, scienceqa_copy, monkeypatch, change):
    load(scienceqa_copy)
    path = scienceqa_copy / "images" / "test" / "113" / "image.png"
    change(path, path.stat())
    again = load(scienceqa_copy)
    assert len(decoded) == 6
    assert_equal(again, without_cache(monkeypatch, scienceqa_copy))


@pytest.fixture
def bitmaps(scienceqa_copy):
    """The data with pictures of one size and one time of change."""
    for path in scienceqa_copy.glob("images/test/*/image.png"):
        Image.open(path).save(path, "BMP")
        os.utime(path, (0, 0))
    return scienceqa_copy


def exchange(root) -> None:
    """Exchanges two pictures, of which then size, path and time of change are as before."""
    first, second = (root / "images" / "test" / qid / "image.png" for qid in ("113", "115"))
    contents = second.read_bytes(), first.read_bytes()
    assert contents[0] != contents[1] and len(contents[0]) == len(contents[1])
    for path, content in zip((first, second), contents, strict=True):
        path.write_bytes(content)
        os.utime(path, (0, 0))


def test_pictures_of_the_same_size_and_time_are_told_by_their_content(folder, decoded, bitmaps, tmp_path, monkeypatch):
    """The pictures change in place, and between two copies of the data."""
    first = load(bitmaps)
    shutil.copytree(bitmaps, tmp_path / "other")
    for root in (tmp_path / "other", bitmaps):
        exchange(root)
        again = load(root)
        assert_equal(again, without_cache(monkeypatch, root))
        assert torch.equal(again[0]["113"], first[0]["115"]) and not torch.equal(again[0]["113"], first[0]["113"])


def test_the_same_content_at_another_time_is_not_decoded_again(folder, decoded, scienceqa_copy):
    load(scienceqa_copy)
    for path in scienceqa_copy.glob("images/test/*/image.png"):
        path.write_bytes(path.read_bytes())
    load(scienceqa_copy)
    assert len(decoded) == 3


def test_a_picture_that_changes_while_it_is_decoded_is_not_kept(folder, scienceqa_copy, monkeypatch):
    """Its pixels would be kept under the checksum of another content."""
    path, load_image = scienceqa_copy / "images" / "test" / "113" / "image.png", images.load_image

    def change_then_load(picture, size):
        if picture == path:
            changed_pixels(path, None)
        return load_image(picture, size)

    with monkeypatch.context() as patch:
        patch.setattr(images, "load_image", change_then_load)
        assert "113/image.png changes while it is read" in error_message(load, scienceqa_copy)
    assert not list(folder.glob("*pictures*.safetensors"))
    assert_equal(load(scienceqa_copy), without_cache(monkeypatch, scienceqa_copy))


def test_another_size_split_pillow_or_code_decodes_again(folder, decoded, scienceqa, monkeypatch, tmp_path):
    assert load(scienceqa)[0]["113"].shape == (3, 8, 8)
    assert load(scienceqa, size=16)[0]["113"].shape == (3, 16, 16)
    assert len(load(scienceqa, split="train")[0]) == 6
    assert len(decoded) == 12
    monkeypatch.setattr(images.PIL, "__version__", "0")
    load(scienceqa)
    assert len(decoded) == 15
    (tmp_path / "images.py").write_text("# changed")
    monkeypatch.setattr(images, "__file__", str(tmp_path / "images.py"))
    load(scienceqa)
    assert len(decoded) == 18


def test_a_copy_of_the_data_elsewhere_is_not_decoded(folder, decoded, scienceqa_copy, tmp_path):
    """Jobs make such copies on a node's own disk."""
    first = load(scienceqa_copy)
    shutil.copytree(scienceqa_copy, tmp_path / "node")
    assert_equal(load(tmp_path / "node"), first)
    assert len(decoded) == 3


# --- Bad pictures ---

@pytest.fixture
def faulty(scienceqa_copy):
    """One of three pictures is missing, and one is broken."""
    folder = scienceqa_copy / "images" / "test"
    (folder / "113" / "image.png").unlink()
    (folder / "117" / "image.png").write_bytes(b"no image")
    return scienceqa_copy


def test_bad_pictures_are_reported_after_a_cache_exists(folder, faulty, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("LAVIN_CACHE", "")
        message = error_message(load, faulty)
    assert "113/image.png is missing" in message and error_message(load, faulty) == message
    assert not list(folder.glob("*.safetensors"))
    load(faulty, skip_bad=True)
    assert entry(folder) and error_message(load, faulty) == message


def test_a_picture_that_became_bad_is_reported(folder, scienceqa_copy):
    load(scienceqa_copy)
    (scienceqa_copy / "images" / "test" / "115" / "image.png").write_bytes(b"no image")
    assert "115/image.png does not decode" in error_message(load, scienceqa_copy)


def test_skip_bad_skips_the_same(folder, decoded, faulty, monkeypatch):
    expected = without_cache(monkeypatch, faulty, skip_bad=True)
    assert expected[1] == ["113", "117"]
    for _ in range(2):
        assert_equal(load(faulty, skip_bad=True), expected)
    assert sum(Path(path).parent.name == "115" for path in decoded) == 2  # once without a cache, once for it


def test_a_fault_that_has_passed_is_forgotten(folder, scienceqa, monkeypatch):
    def fail(path, size):
        raise OSError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(images, "load_image", fail)
        assert "the network is down" in error_message(load, scienceqa)
        assert load(scienceqa, skip_bad=True)[1] == ["113", "115", "117"]
    assert_equal(load(scienceqa, skip_bad=True), without_cache(monkeypatch, scienceqa))


# --- Broken entries ---

def flip(path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    replace(path, content)


def cut(path, at: float) -> None:
    content = path.read_bytes()
    replace(path, content[:int(at * len(content))])


def lacks_checksum(path, at: float) -> None:
    arrays = load_file(path)
    del arrays[cache.CHECKSUM]
    replace(path, save(arrays))


def has_another_type(path, at: float) -> None:
    arrays = load_file(path)
    replace(path, save({**arrays, "good": arrays["good"].view(torch.uint8)}))


def is_a_link_to_nothing(path, at: float) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage, at", [
    *[(flip, at) for at in (0, 0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1)], *[(cut, at) for at in (0, 0.001, 0.3, 0.99)],
    (lacks_checksum, 0), (has_another_type, 0), (is_a_link_to_nothing, 0)])
def test_a_broken_entry_is_made_again(folder, decoded, scienceqa, damage, at):
    first = load(scienceqa)
    damage(entry(folder), at)
    assert_equal(load(scienceqa), first)
    assert len(decoded) == 6 and load_file(entry(folder)).keys() == {"pixels", "good", "checksum"}
    load(scienceqa)
    assert len(decoded) == 6


def test_every_bit_of_an_entry_counts(tmp_path):
    """Flips of the header give other names, types and shapes."""
    path = tmp_path / "lavin-x.safetensors"
    arrays = {"a": torch.arange(6, dtype=torch.uint8).view(2, 3), "b": torch.tensor([True, False])}
    layout = {"a": (torch.uint8, (2, 3)), "b": (torch.bool, (2,))}
    cache.write(path, arrays, layout)
    content = path.read_bytes()
    assert cache.read(path, layout).keys() == {"a", "b"}
    for i in range(8 * len(content)):
        changed = bytearray(content)
        changed[i // 8] ^= 1 << i % 8
        replace(path, changed)
        arrays = cache.read(path, layout)
        assert arrays is None or content[i // 8:i // 8 + 1].isspace()


@pytest.mark.parametrize("poison", [*LAYOUTS, is_a_named_pipe, is_a_link_to_an_entry])
def test_an_entry_of_another_layout_or_kind_is_made_again(folder, decoded, scienceqa, poison):
    first = load(scienceqa)
    poison(entry(folder))
    assert_equal(load(scienceqa), first)
    assert len(decoded) == 6
    load(scienceqa)
    assert len(decoded) == 6 and not entry(folder).is_symlink()


@pytest.mark.parametrize("poison", LAYOUTS)
def test_an_entry_of_ids_of_another_layout_is_made_again(folder, scienceqa, tokenizer_file, poison):
    data = load_scienceqa(scienceqa, "train")
    first = examples(data, tokenizer_file)
    poison(entry(folder, "tokens"))
    assert examples(data, tokenizer_file) == first


# --- Others ---

def of_another_user(monkeypatch, *paths) -> None:
    """Makes files and folders look as if they belonged to somebody else: a test cannot give a file away."""
    def owned(stat):
        def changed(path, **options):
            found = stat(path, **options)
            return os.stat_result([*found[:4], 4321, *found[5:]]) if path in paths else found
        return changed

    monkeypatch.setattr(Path, "stat", owned(Path.stat))
    monkeypatch.setattr(Path, "lstat", owned(Path.lstat))


def lines_on(path, capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if str(path) in line]


def test_an_entry_of_another_user_is_not_used(folder, decoded, scienceqa, monkeypatch, capsys):
    first = load(scienceqa)
    of_another_user(monkeypatch, entry(folder))
    for _ in range(2):
        assert_equal(load(scienceqa), first)
    assert len(decoded) == 9 and os.geteuid() != 4321
    line, = lines_on(entry(folder), capsys)
    assert "it belongs to another user" in line


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o1646])
def test_an_entry_that_others_can_write_to_is_made_again(folder, decoded, scienceqa, capsys, mode):
    load(scienceqa)
    entry(folder).chmod(mode)
    load(scienceqa)
    line, = lines_on(entry(folder), capsys)
    assert "others can write to it" in line and len(decoded) == 6
    load(scienceqa)
    assert len(decoded) == 6


def test_a_folder_of_another_user_is_not_used(folder, decoded, scienceqa, monkeypatch, capsys):
    load(scienceqa)
    of_another_user(monkeypatch, folder)
    for _ in range(2):
        load(scienceqa)
    line, = lines_on(folder, capsys)
    assert "it belongs to another user" in line and "LAVIN_CACHE" in line and len(decoded) == 9


@pytest.mark.parametrize("mode, is_used", [(0o755, True), (0o1777, True), (0o700, True), (0o775, False), (0o757, False),
                                           (0o2775, False)])
def test_a_folder_that_others_can_write_to_is_not_used_without_the_sticky_bit(folder, decoded, scienceqa, capsys, mode,
                                                                             is_used):
    load(scienceqa)
    folder.chmod(mode)
    for _ in range(2):
        load(scienceqa)
    lines = lines_on(folder, capsys)
    assert len(decoded) == (3 if is_used else 9)
    assert not lines if is_used else len(lines) == 1 and f"chmod go-w {folder}" in lines[0]
    folder.chmod(0o755)


def test_whatever_the_umask_is_others_cannot_write_to_the_cache(folder, decoded, scienceqa, capsys):
    before = os.umask(0o002)  # where each user has a group of his own
    try:
        load(scienceqa)
        load(scienceqa)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode for path in (folder, entry(folder))}
    assert not [name for name, mode in modes.items() if mode & cache.OTHERS_WRITE] and len(decoded) == 3
    assert not lines_on(folder, capsys)


def test_a_lock_that_is_a_link_empties_no_file(folder, decoded, scienceqa, tmp_path):
    load(scienceqa)
    path, thesis = entry(folder), tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    path.unlink()
    lock = path.with_name(f"{path.name}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(thesis)
    load(scienceqa)
    assert thesis.read_text() == "years of work" and len(decoded) == 6


def test_what_a_killed_process_left_is_removed(folder, decoded, scienceqa):
    load(scienceqa)
    path, first = entry(folder), load(scienceqa)
    part = path.with_name(f".{path.name}.elsewhere.7{cache.PART_SUFFIX}")
    path.rename(part)
    cut(part, 0.5)
    assert_equal(load(scienceqa), first)
    assert not part.exists() and len(decoded) == 6


def test_entries_unused_for_a_month_are_removed(folder, scienceqa):
    load(scienceqa)
    load(scienceqa, size=16)
    used, unused = sorted(folder.glob("*pictures*.safetensors"), key=lambda path: path.stat().st_size)
    other = folder / "results.safetensors"
    other.touch()
    for path in (used, unused, other):
        os.utime(path, (0, time.time() - 31 * 24 * 3600))
    load(scienceqa)  # uses the first
    load(scienceqa, split="train")  # writes another
    assert used.exists() and other.exists() and not unused.exists()


# --- Without a cache ---

def test_where_nothing_can_be_written_it_is_said_once(folder, decoded, scienceqa, tokenizer_file, capsys, monkeypatch):
    folder.write_text("")
    data = load_scienceqa(scienceqa, "train")
    loaded = [examples(data, tokenizer_file) for _ in range(2)]
    assert loaded[0] == loaded[1] and len(decoded) == 12
    line, = [line for line in capsys.readouterr().out.splitlines() if "cache" in line]
    assert str(folder) in line and "LAVIN_CACHE" in line


def test_a_folder_that_can_only_be_read_is_read(folder, decoded, scienceqa, monkeypatch):
    load(scienceqa)
    monkeypatch.setattr(cache.filelock, "FileLock", None)
    monkeypatch.setattr(cache.os, "utime", lambda path: os.stat(path / "none"))
    load(scienceqa)
    assert len(decoded) == 3


def test_a_full_disk(folder, decoded, scienceqa, capsys, monkeypatch):
    def fail(arrays, path):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(cache, "save_file", fail)
    assert len(load(scienceqa)[0]) == 3 and "No space left" in capsys.readouterr().out
    assert {path.suffix for path in folder.iterdir()} == {".lock"}
    load(scienceqa)
    assert len(decoded) == 6


def test_a_file_system_without_locks(folder, decoded, scienceqa, monkeypatch):
    def fail(lock, timeout):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    for _ in range(2):
        assert len(load(scienceqa)[0]) == 3
    assert len(decoded) == 3


def test_a_lock_that_is_never_granted(folder, decoded, scienceqa, monkeypatch, capsys):
    """A process that hangs may hold it: after a time, the others go on."""
    load(scienceqa)
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.1)
    path = entry(folder)
    path.unlink()
    with filelock.FileLock(f"{path}.lock"):
        load(scienceqa)
    assert len(decoded) == 6 and path.exists()
    assert "waiting for the pictures, which another process prepares" in capsys.readouterr().out


@pytest.mark.parametrize("variables, expected", [
    ({"LAVIN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"), ({"LAVIN_CACHE": "", "XDG_CACHE_HOME": "/b"}, None),
    ({"XDG_CACHE_HOME": "/b"}, "/b/lavin"), ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/lavin"),
    ({"HOME": "/c"}, "/c/.cache/lavin")])
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("LAVIN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == (Path(expected) if expected else None)


# --- Several processes ---

def test_of_two_processes_one_decodes(folder, scienceqa, tmp_path, monkeypatch):
    log, load_image = tmp_path / "decoded", images.load_image

    def slow(path, size):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        time.sleep(0.3)
        return load_image(path, size)

    def load_alone() -> dict:
        for name in LAUNCHER_VARIABLES:  # the processes do not know each other
            del os.environ[name]
        images.load_image = slow
        return {qid: zlib.crc32(image.numpy()) for qid, image in load(scienceqa, split="train")[0].items()}
    checksums = in_processes(load_alone, 2)
    expected = without_cache(monkeypatch, scienceqa, split="train")[0]
    assert checksums == [{qid: zlib.crc32(image.numpy()) for qid, image in expected.items()}] * 2
    assert len(log.read_text().splitlines()) == len(set(log.read_text().splitlines())) == 6
