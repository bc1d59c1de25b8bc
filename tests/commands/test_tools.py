"""The tools as commands: wrong arguments take one line, and what they write has the permissions of any other file."""

import os
import resource
import stat
import subprocess
import sys

import pytest
import torch

from killed import contents, killed_after
from lavin.runtime.errors import UserError
from tiny import ROOT
from tiny_runs import write_run
from tools import make_toy_base
from tools.make_mini_scienceqa import write_mini_scienceqa
from tools.output import make_folder, save_tensors, write_scienceqa
from util.data.datasets import load_scienceqa


def errors(tool: str, *arguments: str, code: int = 1) -> str:
    """Runs a tool that fails; returns what it prints to stderr, without its progress bars."""
    done = subprocess.run([sys.executable, "-m", f"tools.{tool}", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture
def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file")


@pytest.mark.parametrize("tool, flags, code, message", [
    ("make_mini_scienceqa", ["--out", "{file}/mini"], 1, "cannot write to --out {file}/mini (Not a directory)"),
    ("make_mini_scienceqa", ["--seed", "-1"], 2, "--seed -1"),
    ("make_toy_base", ["--out", "{file}/toy"], 1, "cannot write to --out {file}/toy/vit (Not a directory)"),
    ("make_toy_base", ["--seed", "one"], 2, "--seed"),
    ("data_processing", ["--data_root", "{data}", "--out", "{file}/all.json"], 1, "{file}"),
    ("data_processing", ["--outt", "x"], 2, "unrecognized arguments: --outt x")])
def test_wrong_arguments_take_one_line(tmp_path, a_file, tool, flags, code, message):
    (tmp_path / "alpaca_data.json").write_text('[{"instruction": "Name a pond.", "output": "The north pond."}]')
    names = {"file": a_file, "data": tmp_path}
    line, = errors(tool, *(flag.format(**names) for flag in flags), code=code).splitlines()
    assert line.startswith(f"{tool}.py: error: ") and message.format(**names) in line


def test_export_checks_its_folder_before_it_loads_the_model(base, a_file, tmp_path):
    write_run(tmp_path / "run", base, 1)
    line, = errors("export_hf", "--adapter_path", str(tmp_path / "run"), "--out", f"{a_file}/hf",
                   "--llama_model_path", "none").splitlines()
    assert "cannot write to --out" in line


def test_toy_base_needs_a_batch_of_problems_and_pictures(tmp_path):
    write_mini_scienceqa(tmp_path, {"train": 40, "val": 10, "test": 10}, 0)
    data = load_scienceqa(str(tmp_path), "train", str(tmp_path / "captions.json"))
    pictures = dict.fromkeys(qid for qid in data.problems if data.picture_path(qid))
    assert len(pictures) < make_toy_base.BATCH_SIZE
    assert errors("make_toy_base", "--data_root", str(tmp_path), "--out", str(tmp_path / "toy")).splitlines()[-1] == (
        f"make_toy_base.py: error: {tmp_path} has 40 problems and 18 pictures to train on, and 32 of each are needed: "
        "make more")
    data.captions.popitem()
    with pytest.raises(UserError, match="captions.json lacks"):
        make_toy_base.check_amount(data, dict.fromkeys([*pictures, *data.problems]))


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_tensors_have_the_permissions_of_other_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_full_disk_takes_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*a.safetensors .*make room"):
            save_tensors({"a": torch.zeros(10_000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_folders_are_made_and_left_empty(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_where_problems_json_is_all_is_whole_whenever_the_writer_was_killed(tmp_path):
    """This holds also where the tool writes over other data, of which there is more."""
    def write(name: str, content: str, n: int) -> None:
        splits = ["train", "val", "test"] * n
        problems = {str(i): {"split": split, "question": content} for i, split in enumerate(splits)}
        write_scienceqa(tmp_path / name, problems, dict.fromkeys(problems, content),
                        lambda qid, path: path.write_text(content))

    for n_files in range(6 + 3):  # pictures, and the rest
        write("data", "old", 3)
        with killed_after(n_files):
            write("data", "new", 2)
        assert not (tmp_path / "data" / "problems.json").exists()
    write("data", "new", 2)
    write("new", "new", 2)
    data, new = (contents(tmp_path / name) for name in ("data", "new"))
    assert {name: data[name] for name in new} == new
