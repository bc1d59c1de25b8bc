"""Files of a few bytes that declare sizes which no machine has: one line at once, before anything makes room."""

import json
import struct
import zipfile

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavin.runtime.errors import UserError
from lavin.tokenizer import Tokenizer
from lavin.weights.gguf.file import open_file
from lavin.weights.gguf.header import MAX_ELEMENTS, check_header
from lavin.weights.tensor_files import read_tensors
from user_errors import error_message
from util.training.run_folder import Checkpoint, Damaged

HUGE = 2**60
UINT8, UINT32, BOOL, TEXT, ARRAY = 0, 4, 7, 8, 9


# --- GGUF ---

def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(kind: int, value: bytes, key: bytes = b"a.b") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, n: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + content


def tensor(dimensions: int, sizes: bytes = b"") -> bytes:
    return text(b"output.weight") + struct.pack("<I", dimensions) + sizes + struct.pack("<IQ", 0, 0)


def gguf_file(*parts: bytes, entries: int = 1, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + b"".join(parts)


BOMBS = {
    "array of bytes": gguf_file(entry(ARRAY, array(UINT8, HUGE))),
    "array of numbers whose size overflows": gguf_file(entry(ARRAY, array(UINT32, 2**62 + 1, bytes(8)))),
    "array of texts": gguf_file(entry(ARRAY, array(TEXT, HUGE, text(b"x")))),
    "array of an unknown type": gguf_file(entry(ARRAY, array(99, 8, bytes(8)))),
    "array of arrays": gguf_file(entry(ARRAY, array(ARRAY, 1) * 5000)),
    "long array": gguf_file(entry(ARRAY, array(BOOL, MAX_ELEMENTS + 1, bytes(MAX_ELEMENTS + 1)))),
    "text": gguf_file(entry(TEXT, text(b"x", HUGE))), "key": gguf_file(text(b"x", HUGE)),
    "text in an array": gguf_file(entry(ARRAY, array(TEXT, 1, text(b"x", HUGE)))),
    "entries": gguf_file(entries=HUGE), "tensors": gguf_file(entry(UINT32, bytes(4)), tensors=HUGE),
    "dimensions": gguf_file(tensor(2**32 - 1), entries=0, tensors=1),
    "name of a tensor": gguf_file(text(b"x", HUGE) + bytes(40), entries=0, tensors=1)}


@pytest.mark.parametrize("name", BOMBS)
def test_a_gguf_file_that_declares_more_than_it_holds(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gguf, "GGUFReader", lambda *_: pytest.fail("the package makes room for what is declared"))
    (tmp_path / "m.gguf").write_bytes(BOMBS[name])
    message = error_message(open_file, tmp_path / "m.gguf")
    assert message.startswith(f"{tmp_path / 'm.gguf'} cannot be read as weights (") and "\n" not in message


def test_a_tensor_that_the_file_does_not_hold(tmp_path):
    """Its entry is as long as others': the package compares its size, also where the product overflows."""
    for sizes in (struct.pack("<2Q", 2**30, 2**29), struct.pack("<2Q", 2**32, 2**32), struct.pack("<Q", HUGE)):
        (tmp_path / "m.gguf").write_bytes(gguf_file(tensor(len(sizes) // 8, sizes), entries=0, tensors=1) + bytes(64))
        assert "cannot be read as weights" in error_message(open_file, tmp_path / "m.gguf")


KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
VALUES = st.one_of(
    st.sampled_from(sorted(KINDS)).map(lambda kind: (kind, bytes(struct.calcsize(KINDS[kind])))),
    st.binary(max_size=5).map(lambda content: (TEXT, text(content))),
    st.lists(st.binary(max_size=5), max_size=3).map(lambda items: (ARRAY, array(TEXT, len(items),
                                                                                 b"".join(map(text, items))))),
    st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 3)).map(
        lambda pair: (ARRAY, array(*pair, bytes(pair[1] * struct.calcsize(KINDS[pair[0]]))))))


@given(st.lists(VALUES, max_size=4), st.integers(0, 2), st.data())
def test_every_header_is_read_to_its_end_and_no_cut_one(tmp_path_factory, values, tensors, data):
    path = tmp_path_factory.getbasetemp() / "header.gguf"
    content = gguf_file(*(entry(kind, value) for kind, value in values), tensor(2, bytes(16)) * tensors,
                        entries=len(values), tensors=tensors)
    path.write_bytes(content)
    check_header(path)
    path.write_bytes(content[:data.draw(st.integers(4, len(content) - 1))])
    with pytest.raises(ValueError):
        check_header(path)


# --- safetensors ---

def safetensors(header: dict | bytes, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


@pytest.mark.parametrize("content", [
    safetensors({}, HUGE), safetensors({"x": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, HUGE]}}),
    safetensors({"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    safetensors({"x": {"dtype": "F32", "shape": [4], "data_offsets": [HUGE, HUGE + 16]}}),
    safetensors(b"[" * 100_000), safetensors(b'{"x":' * 100_000)])
def test_a_safetensors_file_that_declares_more_than_it_holds(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    assert "m.safetensors cannot be read as weights (" in error_message(read_tensors, tmp_path / "m.safetensors")


# --- torch ---

def compressed(path):
    """The same file with compressed records: 256 KiB of zeros in a few bytes."""
    small = path.with_name("compressed.pth")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    return small


def enlarged(path):
    """The same file, whose directory says 4 GB of each record."""
    content = path.read_bytes()
    head, *records = content.split(b"PK\x01\x02")
    changed = [record[:16] + struct.pack("<II", 2**32 - 16, 2**32 - 16) + record[24:] for record in records]
    path.write_bytes(b"PK\x01\x02".join([head, *changed]))
    return path


@pytest.mark.parametrize("make", [compressed, enlarged])
def test_a_torch_file_whose_records_are_larger_than_it_is(tmp_path, monkeypatch, make):
    torch.save({"x": torch.zeros(2**16)}, tmp_path / "m.pth")
    path = make(tmp_path / "m.pth")
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it unpacks what is declared"))
    assert f"{path} cannot be read as weights (its records are larger" in error_message(read_tensors, path)
    with pytest.raises(Damaged, match="its records are larger than the file"):
        Checkpoint.read(path)
    monkeypatch.setattr("lavin.weights.tensor_files.CHECKED_BYTES", 0)  # large files, whose checksums are not compared
    assert "its records are larger" in error_message(read_tensors, path)


def test_a_tensor_of_more_numbers_than_the_file_holds(tmp_path):
    torch.save({"x": torch.zeros(1).expand(2**40)}, tmp_path / "m.pth")
    message = error_message(read_tensors, tmp_path / "m.pth")
    assert "m.pth: x: is a tensor of 1,099,511,627,776 numbers, of which the file holds fewer" in message


@pytest.mark.parametrize("content", [b"\x80\x02B" + b"\xff\xff\xff\x7f", b"\x80\x04\x8e" + struct.pack("<Q", HUGE),
                                     b"\x80\x02\x8b" + b"\xff\xff\xff\x7f"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_declares_more_than_it_holds(tmp_path, content):
    (tmp_path / "m.pth").write_bytes(content)
    assert "m.pth cannot be read as weights" in error_message(read_tensors, tmp_path / "m.pth")


# --- Tokenizers ---

@pytest.mark.parametrize("name, content", [
    ("tokenizer.model", b"\x0a\xff\xff\xff\xff\x0f" + bytes(20)), ("tokenizer.model", b"\x0a" + b"\xff" * 9 + b"\1"),
    ("tokenizer.model", b"\x0b" * 100_000), ("tokenizer.json", b"[" * 100_000), ("tokenizer.json", b'{"a":' * 100_000)])
def test_a_tokenizer_that_declares_more_than_it_holds(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is no .*: fetch or copy it again"):
        Tokenizer(tmp_path / name)
