"""Files of a few bytes that declare sizes which no machine has: one line at once, before anything makes room."""

import struct
import zipfile

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bombs
from bombs import ARRAY, HUGE, TEXT, array, compressed, enlarged, entry, gguf_file, tensor, text
from lavin.runtime.errors import UserError
from lavin.tokenizer import Tokenizer
from lavin.weights.gguf.file import open_file
from lavin.weights.gguf.header import check_header
from lavin.weights.tensor_files import read_tensors
from user_errors import error_message
from util.training.run_folder import Checkpoint, Damaged

# --- GGUF ---

@pytest.mark.parametrize("name", bombs.GGUF)
def test_a_gguf_file_that_declares_more_than_it_holds(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gguf, "GGUFReader", lambda *_: pytest.fail("the package makes room for what is declared"))
    (tmp_path / "m.gguf").write_bytes(bombs.GGUF[name])
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

@pytest.mark.parametrize("name", bombs.SAFETENSORS)
def test_a_safetensors_file_that_declares_more_than_it_holds(tmp_path, name):
    (tmp_path / "m.safetensors").write_bytes(bombs.SAFETENSORS[name])
    assert "m.safetensors cannot be read as weights (" in error_message(read_tensors, tmp_path / "m.safetensors")


# --- torch ---

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


@pytest.mark.parametrize("name", bombs.PICKLES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_declares_more_than_it_holds(tmp_path, name):
    (tmp_path / "m.pth").write_bytes(bombs.PICKLES[name])
    assert "m.pth cannot be read as weights" in error_message(read_tensors, tmp_path / "m.pth")


# --- Tokenizers ---

@pytest.mark.parametrize("name, content", [
    *(("tokenizer.model", content) for content in bombs.TOKENIZER_MODELS.values()),
    *(("tokenizer.json", content) for content in bombs.TOKENIZER_JSONS.values())])
def test_a_tokenizer_that_declares_more_than_it_holds(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is no .*: fetch or copy it again"):
        Tokenizer(tmp_path / name)
