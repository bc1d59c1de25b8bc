"""Runs on a user's own questions: the columns of tables, figures and pages are those of the scores."""

import csv
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from test_comparison import STEP, write_run
from test_document import Reader

import plot_results
from user_errors import error_message
from util.comparison import figures
from util.comparison.comparison import compare
from util.comparison.finished_runs import read_run
from util.comparison.report import facts
from util.comparison.tables import csv_table, latex_table, markdown_table, text_table
from util.evaluation.scoring import short_names

SIZES = {"Plants": 6, "Animals": 3, "TXT": 4, "NO": 6, "Avg": 10}


def write_own(folder: Path, n_right: int = 6, sizes: dict[str, int] = SIZES, change=(), **flags) -> str:
    """A run on ten questions, of which the first ones are answered correctly. change: entries of scores.json."""
    correct = {column: min(n, n_right) for column, n in sizes.items()}
    scores = {**{column: 100 * correct[column] / n if n else None for column, n in sizes.items()}, "counts": sizes,
              "correct": correct, "chance": dict.fromkeys(sizes, 50.0), "split": "test", **dict(change)}
    return write_run(folder, "1" * n_right + "0" * (10 - n_right), files={"scores.json": scores}, **flags)


@pytest.fixture
def study(tmp_path) -> Path:
    for seed in (0, 1):
        write_own(tmp_path / "runs" / f"base{seed}", 6 + seed, seed=seed)
        write_own(tmp_path / "runs" / f"step{seed}", 7 + seed, seed=seed, **STEP)
    return tmp_path / "runs"


def test_tables_have_the_columns_of_the_scores(study):
    comparison = compare([str(study)])
    assert not comparison.excluded
    header, _, base, step, chance, questions, *_ = markdown_table(comparison).splitlines()
    assert header.split(" | ")[:8] == ["| Method", "seeds", *SIZES, "n"]
    assert questions.split(" | ")[2:7] == ["6", "3", "4", "6", "10"]
    assert chance.split(" | ")[2:7] == ["50.00"] * 5
    assert base.split(" | ")[2:7] == ["100.00 ± 0.00"] * 4 + ["65.00 ± 7.07"]
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert list(rows[0])[4:16] == [*SIZES, "Avg_low", "Avg_high", *(f"{column}_sd" for column in SIZES)]
    assert (rows[0]["Plants"], rows[0]["Avg"], rows[1]["Avg"], rows[-1]["Animals"]) == (
        "100.0000", "65.0000", "75.0000", "50.0000")
    assert r"Method & seeds & Plants & Animals & TXT & NO & Avg & n" in latex_table(comparison)
    assert text_table(comparison).splitlines()[0].split()[:7] == ["Method", "seeds", *SIZES]


def test_the_figure_has_the_columns_and_explains_those_that_are_there(study):
    comparison = compare([str(study)])
    _, ax = plt.subplots()
    figures.draw_categories(ax, comparison.methods)
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "Plants\nn = 6", "Animals\nn = 3", "TXT\nn = 4", "NO\nn = 6"]
    assert ax.get_xlabel() == "TXT, IMG, NO: with a text, a picture or neither as context."
    plt.close("all")


def test_the_page_says_no_scienceqa_of_own_questions(study, tmp_path):
    assert facts(compare([str(study)]))["Questions"] == "10 of the test split"
    write_run(tmp_path / "other")
    assert facts(compare([str(tmp_path / "other")]))["Questions"] == "10 of the test split of ScienceQA"


def test_runs_with_other_columns_are_left_out_with_the_reason(study):
    other = write_own(study / "other", sizes={"Cells": 9, "NO": 10, "Avg": 10}, lr=0.5, **STEP)
    scienceqa = write_run(study / "scienceqa", lr=0.25, **STEP)
    comparison = compare([str(study)])
    assert sorted(comparison.excluded) == [f"{folder}: its scores have other columns than the others': evaluate on the "
                                           "same data" for folder in (other, scienceqa)]
    assert list(comparison.counts) == list(SIZES) and len(comparison.methods) == 2


def test_without_a_base_the_columns_of_most_runs_are_compared(tmp_path):
    other = write_own(tmp_path / "a", sizes={"Cells": 9, "NO": 10, "Avg": 10}, **STEP)
    for seed in (1, 2):
        write_own(tmp_path / f"b{seed}", seed=seed, **STEP)
    comparison = compare([str(tmp_path)])
    assert list(comparison.counts) == list(SIZES) and [line.split(": ")[0] for line in comparison.excluded] == [other]


@pytest.mark.parametrize("change, words", [
    ({"correct": {"Plants": 6, "TXT": 4, "NO": 6, "Avg": 6}}, "correct: lacks Animals"),
    ({"chance": {**SIZES, "NAT": 50.0}}, "chance: has NAT, and counts has not"),
    ({"counts": {"Plants": 6}}, "counts: lacks Avg"), ({"Animals": None}, "(Animals None is not 3 of 3)"),
    ({"counts": {**SIZES, "a\nb": 1}}, "lacks 'a\\nb'")])
def test_columns_that_are_not_those_of_the_counts_are_named(tmp_path, change, words):
    assert words in error_message(read_run, Path(write_own(tmp_path / "run", change=change)))


NAMES = short_names(["<b>Bold</b> & more", "100 %", "C#", "a | b", "$x^2$ and $y_1$", "`code` **x**", "\\textbf{x}",
                     "\x1b[31mred, \"quoted\""])


@pytest.mark.filterwarnings("error")
def test_names_are_read_back_from_every_form(tmp_path, monkeypatch, capsys):
    """The most columns that there can be, with names of many kinds."""
    monkeypatch.setattr(figures, "FIGURES", {"categories": figures.FIGURES["categories"]})
    sizes = {**dict.fromkeys(NAMES, 1), "TXT": 1, "IMG": 1, "NO": 9, "Avg": 10}
    write_own(tmp_path / "runs" / "base", sizes=sizes)
    write_own(tmp_path / "runs" / "step", 7, sizes=sizes, **STEP)
    out = tmp_path / "out"
    plot_results.main(plot_results.get_args_parser().parse_args([str(tmp_path / "runs"), "--out", str(out)]))
    header = (out / "table.md").read_text().splitlines()[0]
    assert header.strip("| ").split(" | ")[1:13] == [*sizes]
    assert next(csv.reader((out / "table.csv").read_text().splitlines()))[4:16] == [*sizes]
    line = next(line for line in (out / "table.tex").read_text().splitlines() if line.startswith("Method & "))
    assert [re.sub(r"\\([%#&])", r"\1", cell) for cell in re.split(r" (?<!\\)& ", line)][1:13] == [*sizes]
    reader = Reader((out / "report.html").read_text())
    assert {*sizes} <= {*reader.texts} and not {"b", "i"} & {*reader.tags}
    assert "\x1b" not in capsys.readouterr().out and (out / "categories.png").is_file()


def test_names_of_this_test_are_as_meant():
    assert json.dumps(NAMES, ensure_ascii=False) == (
        '["B Bold /b.", "100 %", "C#", "A b", "X 2 and y 1", "Code x", "Textbf x", "31mred quo."]')
