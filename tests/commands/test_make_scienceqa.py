"""tools/make_scienceqa.py: one's own questions, in several formats, become ScienceQA's files."""

import csv
import hashlib
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools.make_scienceqa import (
    Question,
    divide,
    get_args_parser,
    main,
    make_scienceqa,
    read_answer,
    read_question,
    shared_groups,
)
from user_errors import error_message
from util.data.datasets import load_scienceqa

ROWS = [{"question": f"Which pond is number {i}?", "choices": ["the north pond", "the south pond", "the old pond"],
         "answer": i % 3, "hint": "It rained." if i % 2 else "", "lecture": "Ponds have numbers.", "split": split}
        for i, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 2)]


def png(seed: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (seed, 0, 0)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """Pictures 0.png to 9.png."""
    for i in range(10):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return [f"{i}.png" for i in range(10)]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # with the mark that Excel writes
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([{**row, "choices": " | ".join(row["choices"]), "answer": "ABC"[row["answer"]]}
                          for row in rows])


def conversation(row):
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABC", row["choices"], strict=True))
    return {"image": row["image"], "split": row["split"], "hint": row["hint"], "lecture": row["lecture"],
            "conversations": [{"from": "human", "value": f"<image>\n{row['question']}\nOptions: {options}"},
                              {"from": "gpt", "value": f"The answer is {'ABC'[row['answer']]}."}]}


@pytest.mark.parametrize("name", ["questions.csv", "questions.jsonl", "questions.json", "llava.json"])
def test_formats_say_the_same(tmp_path, pictures, name):
    rows = [{**row, "image": picture} for row, picture in zip(ROWS, pictures, strict=True)]
    path = tmp_path / name
    if path.suffix == ".csv":
        write_csv(path, rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps([conversation(row) for row in rows] if name == "llava.json" else rows))
    _, errors = make_scienceqa(path, tmp_path / "out", 0.1, 0.2)
    assert errors == []
    data = load_scienceqa(str(tmp_path / "out"), "train")
    for i, (qid, problem) in enumerate(data.problems.items()):
        assert {field: problem[field] for field in ("question", "choices", "answer", "hint", "lecture")} == {
            field: ROWS[i][field] for field in ("question", "choices", "answer", "hint", "lecture")}
        assert data.picture_path(qid).read_bytes() == png(i)
    assert [len(load_scienceqa(str(tmp_path / "out"), split).problems) for split in ("val", "test")] == [2, 2]


def test_parquet_and_what_the_package_datasets_saves(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**{name: row[name] for name in ("question", "choices", "answer")},
             "image": {"bytes": png(i), "path": None} if i else None} for i, row in enumerate(ROWS)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for part, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 5), ("validation-00000-of-00001", 9)):
        parquet.write_table(table.slice(first, 5), tmp_path / "hub" / "data" / f"{part}.parquet")
    for split, n in (("train", 10), ("test", 2)):
        (tmp_path / "saved" / split).mkdir(parents=True)
        with pyarrow.ipc.new_stream(str(tmp_path / "saved" / split / "data-00000-of-00001.arrow"),
                                    table.schema) as file:
            file.write_table(table.slice(0, n))
    for name, sizes in (("a.parquet", {}), ("hub", {"train": 10, "val": 1}), ("saved", {"train": 10, "test": 2})):
        questions, errors = make_scienceqa(tmp_path / name, tmp_path / f"out-{name}", 0.1, 0.2)
        assert errors == [] and len({question.qid for question in questions}) == (sum(sizes.values()) or 10)
        assert all(sum(question.problem["split"] == split for question in questions) == n
                   for split, n in sizes.items())
        assert {question.problem["image"] for question in questions} == {None, "image.png"}
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "a.parquet cannot be read" in error_message(make_scienceqa, tmp_path / "a.parquet", tmp_path / "b", 0.1, 0.2)


def test_grade_and_subject_are_there_only_where_a_row_has_them(tmp_path):
    plain = read_question(ROWS[0], 1, tmp_path, tmp_path).problem
    assert not {"grade", "subject", "category"} & plain.keys()
    given = {"grade": "grade7", "subject": "social science", "category": "Maps"}
    assert read_question(ROWS[0] | given, 1, tmp_path, tmp_path).problem == {**plain, **given}
    assert read_question(ROWS[0] | dict.fromkeys(given, " "), 1, tmp_path, tmp_path).problem == plain


@pytest.mark.parametrize("value, expected", [("B", 1), ("b", 1), ("1", 1), (2, 2), ("10", 0), ("the", 2), ("0", 0)])
def test_answers(value, expected):
    assert read_answer(value, ["10", "20", "the"]) == expected


def test_an_answer_that_is_a_choices_text_is_meant_so():
    assert read_answer("1", ["3", "2", "1"]) == 2 and read_answer("B", ["B", "A"]) == 0
    assert read_answer(1, ["3", "2", "1"]) == 1


def test_columns_of_letters(tmp_path):
    row = {"question": "Which?", "A": "one", "B": "two", "C": "", "answer": "B", "index": 3}
    question = read_question(row, 1, tmp_path, tmp_path)
    assert question.problem["choices"] == ["one", "two"] and question.problem["answer"] == 1


@pytest.mark.parametrize("change, words", [
    ({"answer": "D"}, "row 2: answer 'D' is neither one of the choices nor its letter"),
    ({"question": " "}, "row 2: question: is empty"), ({"choices": "one", "answer": 0}, "row 2: choices: "),
    ({"question": None}, "row 2 lacks question"), ({"image": "none.png"}, "none.png is missing"),
    ({"image": "text.png"}, "does not decode"), ({"id": "../x"}, "row 2: id '../x' cannot be the name of a folder"),
    ({"id": "1"}, "row 2: id '1' occurs twice"), ({"subject": "alchemy"}, "row 2: subject: "),
    ({"conversations": [{"value": "Why?"}, {"value": "So."}]}, "row 2: its conversation lists no options")])
def test_wrong_rows_are_named_and_left_out(tmp_path, change, words):
    (tmp_path / "text.png").write_text("no picture")
    rows = [ROWS[0] | {"id": "1"}, ROWS[1] | {"id": "2"} | change, ROWS[2] | {"id": "3"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, errors = make_scienceqa(tmp_path / "q.jsonl", tmp_path / "out", 0.1, 0.2)
    assert [question.qid for question in questions] == ["1", "3"] and len(errors) == 1 and words in errors[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pid_splits.json", "problems.json"]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=80))
def test_a_group_lies_in_one_split(groups):
    questions = [Question(str(i), {}, None, str(group)) for i, group in enumerate(groups)]
    divide(questions, 0.2, 0.3)
    assert shared_groups(questions) == 0
    again = [Question(str(i), {}, None, str(group)) for i, group in reversed(list(enumerate(groups)))]
    divide(again, 0.2, 0.3)
    assert [question.problem for question in again[::-1]] == [question.problem for question in questions]


def test_the_fractions_are_about_those_asked_for():
    questions = [Question(str(i), {}, None, hashlib.sha256(bytes([i % 256, i // 256])).hexdigest())
                 for i in range(4000)]
    divide(questions, 0.1, 0.2)
    shares = [sum(question.problem["split"] == split for question in questions) / 4000 for split in ("val", "test")]
    assert shares == pytest.approx([0.1, 0.2], abs=0.02)


def test_equal_pictures_are_one_group_and_shared_ones_are_told(tmp_path, pictures, capsys):
    (tmp_path / "copy.png").write_bytes(png(0))
    rows = [ROWS[0] | {"image": "0.png"}, ROWS[9] | {"image": "copy.png"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(get_args_parser().parse_args([str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out")]))
    shown, progress = capsys.readouterr()
    assert progress == ""  # what is over at once shows none, and a log gets no carriage returns
    assert "warning: several splits share a group or a picture (1 in all), " in shown
    assert ": 2 questions (1 train, 1 test), 2 with a picture; 0 rows left out\n" in shown


@pytest.mark.parametrize("splits, missing", [(("train", "train"), ["test"]), (("test", "val"), ["train"]),
                                             (("train", "test"), [])])
def test_a_split_without_a_question_is_told(tmp_path, capsys, splits, missing):
    rows = [row | {"split": split} for row, split in zip(ROWS, splits, strict=False)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    main(get_args_parser().parse_args([str(tmp_path / "q.json"), "--out", str(tmp_path / "out")]))
    assert re.findall("no question is in split (.*):", capsys.readouterr().out) == missing


@pytest.mark.parametrize("fraction", ["-0.1", "1", "nan"])
def test_a_fraction_that_is_none_is_refused(fraction):
    for flag in ("--val", "--test"):
        words = ["q.json", "--out", "out", flag, fraction]
        assert f"{flag} {fraction} does not lie in [0, 1)" in error_message(get_args_parser().parse_args, words)


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps(ROWS))
    make_scienceqa(tmp_path / "q.json", tmp_path / "out", 0.1, 0.2)
    assert "holds data already" in error_message(make_scienceqa, tmp_path / "q.json", tmp_path / "out", 0.1, 0.2)
    for name, content, words in (("a.xlsx", "", "is no .csv"), ("b.json", "{}", "holds no list"),
                                 ("c.json", "[]", "has no question that is right: it is empty")):
        (tmp_path / name).write_text(content)
        assert words in error_message(make_scienceqa, tmp_path / name, tmp_path / name[0], 0.1, 0.2)
