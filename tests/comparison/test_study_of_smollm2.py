"""The tables of docs/study.md are those of the runs in assets/smollm2_study."""

import re
import tarfile
from pathlib import Path

import pytest

from documents import read_page
from plot_results import get_args_parser, make_comparison
from tiny import ROOT
from util.comparison.methods import named_methods
from util.comparison.tables import text_table

STUDY = ROOT / "assets" / "smollm2_study"
METHODS, CROSSED, FOUR = (block for name in ("study.md", "statistics.md")
                          for _, block in read_page(ROOT / "docs" / name).blocks
                          if block.startswith("Effect ") or block.startswith("Method ") and name == "study.md")


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[Path]]:
    """The folders of runs by method, and that of the untuned base."""
    root = tmp_path_factory.mktemp("study")
    with tarfile.open(STUDY / "runs.tar.xz") as archive:
        archive.extractall(root, filter="data")
    folders: dict[str, list[Path]] = {}
    for path in sorted((root / "runs" / "study_smollm2").iterdir()):
        folders.setdefault(path.name.removeprefix("LaVIN-smollm2.gguf-").partition("-seed")[0], []).append(path)
    return folders


def printed(folders: list[Path]) -> str:
    comparison = make_comparison(get_args_parser().parse_args([*map(str, folders), "--out", "unused"]))
    return text_table(comparison, 120)


def test_every_method_has_five_seeds(runs):
    assert {name: len(folders) for name, folders in runs.items()} == {**dict.fromkeys(runs, 5), "untuned": 1}
    assert len(runs) == 1 + 22


def test_the_table_of_the_eight_methods_is_made_of_the_runs(runs):
    names = ["base", "cyclical", "step", "exponential", "drop_inc", "drop_dec", "drop_inc_v2", "drop_dec_v2", "untuned"]
    text = printed([folder for name in names for folder in runs[name]])
    header, _, *lines = text.splitlines()
    columns = [cells(header).index(name) for name in cells(METHODS.splitlines()[0])]
    made = {cells(line)[0]: cells(line) for line in lines if line}
    for name, *shown in map(cells, METHODS.splitlines()[2:]):
        row = made[name] if name != "chance" else [*made[name][:3], "–", *made[name][3:]]  # its empty interval
        assert [row[column] for column in columns] == [name, *shown]
    assert "Bartlett" not in text


@pytest.mark.parametrize("block", [CROSSED, FOUR], ids=["study", "statistics"])
def test_the_effects_are_made_of_the_runs(runs, block):
    names = ["base", "step", "drop_dec_v2", "step+drop_dec_v2"] if block == FOUR else \
        [name for name in runs if name not in ("drop_inc", "drop_dec")]
    text = printed([folder for name in names for folder in runs[name]])
    assert ("± from 1.57 to 12.88; Bartlett's test: p <0.001" in " ".join(text.split())) == (block == CROSSED)
    lines = list(map(cells, text.splitlines()))
    for line in block.splitlines():
        if not line.startswith("-"):
            assert cells(line) in lines


def test_the_column_of_the_readme_is_that_of_the_table():
    header, *rows = map(cells, METHODS.splitlines())
    difference, interval = header.index("vs. base"), header.index("vs. base, 95 %")
    of_table = {row[0]: f"{row[difference]} ({row[interval]})" for row in rows if len(row) == len(header)}
    lines = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines()
             if line.startswith("| `finetuning_sqa_7b")]
    of_script = {re.search(r"7b_?(\w*)\.sh", line[1])[1] or "base": line[5].strip() for line in lines}
    assert of_script == {method.key: of_table[method.name] for method in named_methods()} | {"base": ""}
