"""Files are complete or absent, JSON is what it seems, checksums see every change."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lavin.runtime.errors import UserError
from lavin.runtime.files import (
    atomic_write,
    json_list_sha256,
    json_sha256,
    read_json,
    read_json_lines,
    read_lines,
    read_whole_lines,
    sampled_sha256,
    unique_keys,
    value_sha256,
)
from lavin.runtime.schema import read_validated
from util.runs import locked


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as tmp:
        tmp.write_text("new")
        raise KeyError
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with locked(tmp_path):
        (tmp_path / ".file.host.1.part").write_text("half")  # of a process that was killed
    with locked(tmp_path):
        assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("named, expected", [(None, "file"), ("other", "other")])
def test_an_error_while_writing_names_the_file(tmp_path, named, expected):
    """A full disk names none, and a temporary name would say nothing."""
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "file") as tmp:
        tmp.write_text("half")
        raise OSError(28, "No space left on device", *([str(tmp_path / named)] if named else []))
    assert caught.value.filename == str(tmp_path / expected)
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_write(tmp_path / "file") as tmp:
        tmp.write_text("new")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("text, words", [
    ('{"a": 1, "a": 2}', "two entries 'a'"), ('{"a": NaN}', "NaN is no number"), ('{"a": -Infinity}', "no number"),
    ("[" * 100_000, "nested too deeply"), ("{", "not valid JSON"), ("[]", "no JSON object")])
def test_json_that_is_not_what_it_seems_is_refused(tmp_path, text, words):
    (tmp_path / "file").write_text(text)
    with pytest.raises(UserError, match=words):
        read_json(tmp_path / "file")


@pytest.mark.parametrize("read", [read_json, read_json_lines, lambda path: read_validated(path, dict[str, int]),
                                  lambda path: sampled_sha256([path])])
def test_a_named_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "file")
    with pytest.raises((UserError, OSError), match="it is no file"):
        read(tmp_path / "file")


def test_lines_are_read_up_to_a_torn_one(tmp_path):
    (tmp_path / "file").write_text('{"a": 1}\n[2]\n{"a": 3')
    assert read_whole_lines(tmp_path / "file") == [{"a": 1}, [2]]
    (tmp_path / "file").write_text('{"a": 1}\n[2\n{"a": 3}\n')
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_whole_lines(tmp_path / "file")


SEPARATORS = "\u2028\u2029\x85\v\f\x1c\x1d\x1e"  # str.splitlines divides a text at these


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("read", [read_json_lines, read_whole_lines])
def test_lines_end_at_a_line_feed_alone(tmp_path, read, end):
    """Other programs write U+2028 and its kind into JSON as they are."""
    values = [{"a": "\u2028x\x85\u2029"}, 2]
    (tmp_path / "file").write_bytes("".join(json.dumps(value, ensure_ascii=False) + end for value in values).encode())
    assert read(tmp_path / "file") == values
    (tmp_path / "file").write_text("")
    assert read(tmp_path / "file") == []


@given(st.lists(st.text(st.sampled_from(SEPARATORS + "a \t"), max_size=5), min_size=1))
def test_all_of_a_text_is_in_its_lines(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert list(read_lines(path)) == lines


class CountedKey(str):
    """A key that counts how often it is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        type(self).compared += 1
        return str.__eq__(self, other)


def test_a_key_that_is_there_twice_is_found_in_one_pass():
    keys = [CountedKey(i) for i in range(1000)]
    with pytest.raises(ValueError, match="two entries '999'"):
        unique_keys([(key, None) for key in [*keys, CountedKey(999)]])
    assert CountedKey.compared < 5000  # each with each other would be 500,000


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
                    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children),
                    max_leaves=6)


@given(JSON)
def test_a_checksum_of_a_value_is_that_of_its_copy_and_of_no_other(value):
    """This holds also for values inside others, where lengths tell lists apart."""
    assert value_sha256(value) == value_sha256(json.loads(json.dumps(value)))
    assert len({value_sha256(other) for other in ([value], [[value]], {"a": value}, [value, value])}) == 4


@given(st.lists(JSON, max_size=3))
def test_a_checksum_of_items_one_by_one_is_that_of_their_list(items):
    assert json_list_sha256(iter(items)) == json_sha256(items)


def test_a_checksum_sees_every_bit_shape_and_dtype_of_a_tensor():
    tensor = torch.arange(6.0)
    others = [tensor + 1e-6, tensor.reshape(2, 3), tensor.to(torch.bfloat16), tensor.int(), tensor[:5], -tensor]
    assert len({value_sha256(other) for other in [tensor, *others]}) == 7
    assert value_sha256(tensor) == value_sha256(torch.stack((tensor, tensor), 1)[:, 0])  # not how it lies in memory


def write_private(path):
    """Writes a file that only its owner may read, as safetensors does, and as a copy of such a file is."""
    path.write_text("x")
    path.chmod(0o600)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("write", [lambda path: path.write_text("x"), write_private])
def test_files_follow_the_umask(tmp_path, write, umask, mode):
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o600)
    old = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as tmp:
            write(tmp)
    finally:
        assert os.umask(old) == umask
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_sampled_checksum_sees_the_size_and_the_first_middle_and_last_bytes(tmp_path):
    content, seen = bytearray(5 * 2**20), set()
    for position in (None, 0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        (tmp_path / "file").write_bytes(changed)
        seen.add(sampled_sha256([tmp_path / "file"]))
    (tmp_path / "file").write_bytes(content + b"\0")
    seen.add(sampled_sha256([tmp_path / "file"]))
    assert len(seen) == 5
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1}) != json_sha256({"a": 1, "b": [3]})
