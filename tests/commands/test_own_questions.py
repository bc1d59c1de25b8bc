"""A user's own questions, from a table to the table of methods: the columns are the user's categories."""

import csv
import json
import re

import pytest

import eval as eval_command
import plot_results
from tiny_runs import train_run
from tools.make_scienceqa import make_scienceqa
from tools.publish import publish
from util.comparison import figures
from util.evaluation.scienceqa import ScienceQATask
from util.evaluation.scoring import MAX_CATEGORIES
from util.search.identity import conditions

CATEGORIES = ["land & sea", "Weather", "Land & sea", "Weather", "Land & sea", ""]
COLUMNS = {"Land & sea": 3, "Weather": 2, "TXT": 2, "NO": 4, "Avg": 6}


def write_table(path) -> None:
    rows = [{"question": f"Which pond did walk {i} reach first?", "choices": "the north pond | the south pond",
             "answer": "AB"[i % 2], "hint": "It rained." if i % 3 == 1 else "", "category": CATEGORIES[i % 6],
             "split": "train" if i < 12 else "test"} for i in range(18)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def evaluate(base, data, run) -> None:
    eval_command.main(eval_command.get_args_parser().parse_args(
        ["--adapter_path", str(run), "--data_root", str(data), "--device", "cpu", "--max_seq_len", "160", *base.flags]))


@pytest.fixture(scope="module")
def studied(base, tmp_path_factory):
    """The folder of the data, and of two runs that are scored on them."""
    root = tmp_path_factory.mktemp("own")
    write_table(root / "questions.csv")
    assert make_scienceqa(root / "questions.csv", root / "data", 0.1, 0.2)[1] == []
    for name in ("base", "step"):
        run = root / "runs" / name
        train_run(base, root / "data", run, "--lr_schedule", {"base": "cosine"}.get(name, name), "--adapter_dim", "4")
        evaluate(base, root / "data", run)
    return root


def test_the_scores_have_the_categories_as_columns(studied, base, capsys):
    scores = json.loads((studied / "runs" / "base" / "scores.json").read_text())
    assert list(scores["counts"].items()) == [*COLUMNS.items()] and "NAT" not in scores
    assert [scores[column] for column in COLUMNS] == [100 * scores["correct"][column] / n
                                                      for column, n in COLUMNS.items()]
    capsys.readouterr()
    evaluate(base, studied / "data", studied / "runs" / "base")
    before, header, _, accuracies, questions, *_ = capsys.readouterr().out.splitlines()
    assert before.startswith("scored before") and header.split() == ["Land", "&", "sea", *list(COLUMNS)[1:]]
    assert questions.split() == ["questions", *map(str, COLUMNS.values())]


@pytest.mark.parametrize("columns, width", [("", 120), ("60", 80), ("100", 100), ("160", 160)])
def test_the_table_of_scores_fits_the_terminal(columns, width, monkeypatch):
    """Eight long names and 100 % everywhere are as wide as it can get. Where there is no terminal, it has 120 columns.
    """
    monkeypatch.setenv("COLUMNS", columns)
    counts = {**{f"Category {i:>02}": 12_345 for i in range(MAX_CATEGORIES)}, "TXT": 1, "IMG": 1, "NO": 1, "Avg": 2}
    scores = dict.fromkeys(counts, 100.0) | {"counts": counts, "parse_failures": 0,
                                               "bad_pictures": 0, "prompts_cut": 0}
    header, _, accuracies, questions, *note = ScienceQATask.report(None, scores)[0].splitlines()
    shown = re.split("  +", header.strip())
    assert len(header) <= width and {"Category 00", "Avg"} <= {*shown} <= {*counts}
    assert accuracies.split() == ["accuracy", "%", *["100.00"] * len(shown)]
    assert questions.split() == ["questions", *(str(counts[name]) for name in shown)]
    assert note == ([f"{len(counts) - len(shown)} more columns of the table in a wider terminal, and in scores.json."]
                    if width < 146 else [])


def test_the_lines_below_the_table_say_one_in_the_singular():
    scores = {"Avg": 0.0, "counts": {"Avg": 1}, "parse_failures": 1, "bad_pictures": 1, "prompts_cut": 1,
              "max_seq_len": 64}
    assert ScienceQATask.report(None, scores)[1:] == [
        "1 answer named no option, 1 problem dropped for a bad picture",
        "words in the middle of 1 prompt are left out, since --max_seq_len is 64"]


def test_the_table_has_the_categories_as_columns(studied, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FIGURES", {"categories": figures.FIGURES["categories"]})
    monkeypatch.setenv("COLUMNS", "250")  # the width of the terminal
    plot_results.main(plot_results.get_args_parser().parse_args([str(studied / "runs"), "--out", str(tmp_path)]))
    header, *rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()
                     if line.startswith("| ")]
    assert header[:7] == ["Method", *COLUMNS, "n"]
    assert [row[0] for row in rows] == [":--", "Base", "Step Decay", "chance", "questions"]
    assert rows[-1][1:6] == [str(n) for n in COLUMNS.values()] and rows[-2][1:6] == ["50.00"] * 5
    assert capsys.readouterr().out.split()[:8] == ["Method", "Land", "&", "sea", *list(COLUMNS)[1:]]
    assert r"Land \& sea & Weather & TXT" in (tmp_path / "table.tex").read_text()


def test_what_is_shared_has_the_categories_as_columns(studied, tmp_path):
    publish(studied / "runs" / "step", tmp_path / "shared", "step", "step")
    assert f"| {' | '.join(COLUMNS)} |" in (tmp_path / "shared" / "README.md").read_text()


def test_a_search_takes_no_column_for_a_condition(studied):
    assert not conditions(json.loads((studied / "runs" / "base" / "scores.json").read_text())).keys() & COLUMNS.keys()


def test_a_category_that_is_corrected_is_told_as_other_data(studied, base, capsys):
    """It decides the columns of the scores, as a subject does with ScienceQA."""
    path = studied / "data" / "problems.json"
    before = path.read_text()
    try:
        path.write_text(before.replace("Weather", "Climate"))
        evaluate(base, studied / "data", studied / "runs" / "step")
    finally:
        path.write_text(before)
    assert "holds scores of another data: they will be replaced" in capsys.readouterr().out
    assert "Climate" in json.loads((studied / "runs" / "step" / "scores.json").read_text())["counts"]
