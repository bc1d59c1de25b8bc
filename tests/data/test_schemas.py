"""The schemas of input files: every fault is one line that names file, record and field, before anything is loaded."""

import copy
import gzip
import json
import os
import shutil
import time

import pytest
from hypothesis import given, settings, strategies

from lavin.runtime.errors import UserError
from lavin.runtime.schema import Size, Text, read_validated, validate
from tiny import IMAGE_SIZE, problem
from user_errors import change_json, error_message
from util.data.datasets import Problem, ScienceQA, load_scienceqa
from util.data.examples import load_examples, load_training_data
from util.data.images import load_images
from util.data.prompts import PROMPT_FORMATS, build_prompt
from util.data.settings import TrainingData
from util.evaluation.answers import Answer
from util.evaluation.scoring import score

# --- JSON ---

@pytest.mark.parametrize("text, words", [
    ('{"a": 1, "b": 2, "a": 1}', "two entries 'a'"), ('{"a": {"b": 1, "b": 2}}', "two entries 'b'"),
    ('{"a": NaN}', "NaN is no number"), ('{"a": -Infinity}', "-Infinity is no number"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"), ("9" * 5000, "digits"), ("", "Expecting value"),
    (b"\xff\xfe", "utf-8"), ("\ufeff{}", "BOM"), ('{"a": 1}\n{"a": 2}', "Extra data"),
    (gzip.compress(b"{}", mtime=0), "utf-8"), ('{"a": 1,}', "property name"), ("{'a': 1}", "property name"),
    ("// a\n{}", "Expecting value"), ("version https://git-lfs.github.com/spec/v1\n", "Expecting value"),
    ("<!DOCTYPE html>", "Expecting value")])
def test_json_that_is_refused(tmp_path, text, words):
    path = tmp_path / "file.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = error_message(read_validated, path, dict[str, int])
    assert f"{path} is not valid JSON" in message and words in message and message.endswith("fetch or write it again")


@pytest.mark.parametrize("text", ['{"a":\r\n 1}\r\n', '{"a":\r 1}', ' \n{"\\u0061": 1}', '{"a": 1}\n\n'])
def test_json_as_other_systems_write_it(tmp_path, text):
    (tmp_path / "file.json").write_bytes(text.encode())
    assert read_validated(tmp_path / "file.json", dict[str, int]) == {"a": 1}


def test_a_file_that_cannot_be_read_ends_in_the_hint(tmp_path):
    assert error_message(read_validated, tmp_path / "none.json", dict, "look elsewhere").endswith(": look elsewhere")
    assert str(tmp_path) in error_message(read_validated, tmp_path, dict)


@pytest.mark.parametrize("value, schema, words", [
    (7, dict[str, int], "it: should be a valid dictionary, not 7: fix"),
    ({"a": {"b": [1, "x" * 999]}}, dict[str, dict[str, list[int]]],
     f"it: a.b[1]: should be a valid integer, not '{'x' * 119}...: fix"),
    ({"a": True, "b": None, "c": 1}, dict[str, int], "a: should be a valid integer, not True (and 1 more)"),
    ({5: 1}, dict[str, int], "should be a valid string, not 5"), ({"a\nb": None}, dict[str, int], r"'a\nb': "),
    ({"a": 2**40}, dict[str, Size], "a: should be less than or equal to 16777216, not 1099511627776"),
    ({"a": 10**9999}, dict[str, Size], "a huge number"), ({"a": "\ud800"}, dict[str, Text], r"a: 'utf-8' codec"),
    ({"a": [1]}, dict[str, int], "not a list"), ([1.0], list[int], "[0]: should be a valid integer, not 1.0")])
def test_messages_name_the_field_and_show_plain_values_only(value, schema, words):
    assert words in error_message(validate, value, schema, "it", "fix")


# --- ScienceQA ---

PROBLEM_FAULTS = [(field, value) for field, values in {
    "question": (None, 7, "", " \n", ["a"], "\ud800"), "choices": (None, "AB", {"A": "a", "B": "b"}, [1, 2], ["a"],
                                                                   ["a", ""], list("abcdef"), ["a", None]),
    "answer": ("A", None, 1.0, True, [1], -1, 3, 10**30), "hint": (None, 7, ["a"], "a\udfff"),
    "lecture": (None, 7, {}), "solution": (None, 7, []),
    "image": (7, True, ["image.png"], {"bytes": ""}, "", "../image.png", "/etc/passwd", "..", "a\0b", "a\nb"),
    "grade": (None, 7, "Grade7", "college", "grade0", "grade13", "grade99", "grade07", "grade7\n"),
    "subject": (None, "natural", 7, ""), "split": (None, 7, "../train", ""), "skill": (None, 7), "topic": (7,),
    "category": (["a"],)}.items() for value in values]


@pytest.mark.parametrize("field, value", PROBLEM_FAULTS)
def test_error_names_problem_and_field(scienceqa_copy, field, value):
    path = scienceqa_copy / "problems.json"
    change_json(path, {"101": {**json.loads(path.read_text())["101"], field: value}})
    assert error_message(load_scienceqa, scienceqa_copy, "train").startswith(f"{path}: problem 101: {field}")
    assert len(load_scienceqa(scienceqa_copy, "test").problems) == 6  # the other split's problems are not checked


def test_a_choice_that_is_listed_twice_is_counted(scienceqa_copy, capsys):
    path = scienceqa_copy / "problems.json"
    load_scienceqa(scienceqa_copy, "train")
    assert "twice" not in capsys.readouterr().out
    change_json(path, {"103": {**json.loads(path.read_text())["103"], "choices": ["a", "a ", "b"]}})
    load_scienceqa(scienceqa_copy, "train")
    assert "a choice is listed twice in 1 problem, the first is 103\n" in capsys.readouterr().out


@pytest.mark.parametrize("value", [None, 7, [], "text"])
def test_error_names_the_problem_that_is_no_object(scienceqa_copy, value):
    change_json(scienceqa_copy / "problems.json", {"101": value})
    assert "problem 101: should be a valid dictionary" in error_message(load_scienceqa, scienceqa_copy, "train")


JSON_VALUES = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats(allow_nan=False,
                                                                                          allow_infinity=False)
    | strategies.text(strategies.characters(blacklist_categories=()), max_size=9)
    | strategies.sampled_from(["grade3", "image.png", "natural science", "..", "1"]),
    lambda children: strategies.lists(children, max_size=5) | strategies.dictionaries(strategies.text(max_size=3),
                                                                                      children, max_size=3))


@settings(max_examples=400, deadline=None)
@given(strategies.sampled_from(sorted(problem(extra=1))), JSON_VALUES, strategies.sampled_from(PROMPT_FORMATS))
def test_any_value_in_any_field_works_to_the_end_or_is_refused_in_one_line(field, value, prompt_format):
    parsed = json.loads(json.dumps(problem(**{field: value})))
    try:
        checked = validate(parsed, Problem, "problem 1")
    except UserError as error:
        assert "\n" not in str(error) and f"problem 1: {field}" in str(error)
        return
    assert checked == parsed
    for text in build_prompt(checked, prompt_format):
        text.encode()
    assert score({"1": checked}, [Answer("1", checked["answer"], checked["answer"])])["Avg"] == 100


@pytest.mark.parametrize("splits, words", [
    ({"train": None}, "train: should be a valid list, not None"), ({"train": "100"}, "train: should be a valid list"),
    ({"train": ["100", 101]}, "train[1]: should be a valid string, not 101"), ({"train": [["100"]]}, "train[0]: "),
    ({"train": ["100", "100"]}, "train: has '100' twice"), ({"train": []}, "no problem in split train"),
    ({"train": ["../100"]}, "train[0]: is no plain name of a file or folder: '../100'"), ({"test": [".."]}, "test[0]"),
    ({"test": ["112", "101"]}, "train and test share 1 problem, the first is 101"), ([], "a valid dictionary"),
    ({"val": ["102", "103"]}, "train and val share 2 problems, the first is 102")])
def test_error_names_the_split(scienceqa_copy, splits, words):
    path = scienceqa_copy / "pid_splits.json"
    if isinstance(splits, dict):
        change_json(path, splits)
    else:
        path.write_text(json.dumps(splits))
    message = error_message(load_scienceqa, scienceqa_copy, "train")
    assert str(path) in message and words in message


@pytest.mark.parametrize("captions, words", [
    ({"100": "A pond."}, "captions: is missing"), ({"captions": None}, "captions: should be a valid dictionary"),
    ({"captions": {"100": None}}, "captions.100: should be a valid string, not None"),
    ({"captions": {"100": "\ud800"}}, "captions.100: 'utf-8'"), ({"captions": ["A pond."]}, "not a list")])
def test_error_names_the_caption_and_the_form(scienceqa_copy, captions, words):
    path = scienceqa_copy / "captions.json"
    path.write_text(json.dumps(captions))
    message = error_message(load_scienceqa, scienceqa_copy, "train", path)
    assert str(path) in message and words in message and message.endswith('write it as {"captions": {id: text}}')


def test_captions_of_another_data_set_are_refused_and_missing_ones_counted(scienceqa_copy, capsys):
    path = scienceqa_copy / "captions.json"
    load_scienceqa(scienceqa_copy, "train", path)
    assert capsys.readouterr().out == ""
    path.write_text(json.dumps({"captions": {"112": "A pond."}}))  # of the test split
    assert "none of this split's 12 questions" in error_message(load_scienceqa, scienceqa_copy, "train", path)
    path.write_text(json.dumps({"captions": {"101": "A pond.", "103": "A map.", "9000": "A sea."}}))
    assert load_scienceqa(scienceqa_copy, "train", path).captions["101"] == "A pond."
    assert capsys.readouterr().out == f"{path} has captions for 2 of 6 pictures, and 1 for unknown problems\n"


def test_real_problems_load(real_scienceqa):
    problems = json.loads((real_scienceqa / "problems.json").read_text())
    for split, n in {"train": 50, "val": 50, "test": 50, "trainval": 100, "minitest": 1}.items():
        data = load_scienceqa(real_scienceqa, split, real_scienceqa / "captions.json")
        assert len(data.problems) == n and data.problems == {qid: problems[qid] for qid in data.problems}


def test_checking_all_of_scienceqa_takes_a_second_at_most(tmp_path):
    problems = {str(i): problem(lecture=f"{i} " * 400) for i in range(21_000)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": list(problems)}))
    start = time.process_time()
    data = load_scienceqa(tmp_path, "train")
    assert time.process_time() - start < 2 and data.problems == problems  # 0.5 s on an idle core


# --- Fingerprints ---

def test_fingerprint_changes_with_everything_that_determines_results(scienceqa):
    data = load_scienceqa(scienceqa, "train", scienceqa / "captions.json")
    assert len(data.fingerprint) == 64
    for field, value in {"question": "?", "choices": ["a", "b"], "answer": 1, "hint": "?", "image": "b.png",
                         "lecture": "?", "solution": "?", "grade": "grade12", "subject": "social science"}.items():
        changed = copy.deepcopy(data)
        changed.problems["100"][field] = value
        assert changed.fingerprint != data.fingerprint, field
    others = [ScienceQA(data.root, data.problems, {**data.captions, "101": "Another."}),
              ScienceQA(data.root, dict(reversed(data.problems.items())), data.captions),
              ScienceQA(data.root, dict(list(data.problems.items())[:-1]), data.captions)]
    assert len({other.fingerprint for other in (data, *others)}) == 4


def test_the_fingerprint_of_problems_with_grade_and_subject_stays_that_of_earlier_versions(scienceqa):
    """It was computed by the version before these fields were optional. A run goes on by it."""
    data = ScienceQA(scienceqa, json.loads((scienceqa / "problems.json").read_text()), {"100": "A pond."})
    assert data.fingerprint == "2277beb2ae95557448bf735d6218d9a4407305c8c11ee66d1461846449e2c789"


def test_without_a_grade_or_a_subject_the_fingerprint_holds_what_the_columns_go_by(scienceqa):
    data = load_scienceqa(scienceqa, "train")
    found = {data.fingerprint}
    for missing in (("grade",), ("subject",), ("grade", "subject")):
        changed = copy.deepcopy(data)
        for name in missing:
            del changed.problems["100"][name]
        found.add(changed.fingerprint)
        for name in ("category", "topic"):
            changed.problems["101"][name] += "s"
            found.add(changed.fingerprint)
    assert len(found) == 10


@pytest.mark.parametrize("field, value, words", [
    ("grade", "college", "'college' is none of grade1 to grade12, ScienceQA's grades: leave grade out of your own"),
    ("subject", "alchemy", "language science, ScienceQA's subjects: write other ones as category")])
def test_what_scienceqa_does_not_know_is_told_where_to_write_it(scienceqa_copy, field, value, words):
    path = scienceqa_copy / "problems.json"
    content = json.loads(path.read_text())["101"]
    change_json(path, {"101": {**content, field: value}})
    assert words in error_message(load_scienceqa, scienceqa_copy, "train")
    del content[field]
    change_json(path, {"101": content})
    assert field not in load_scienceqa(scienceqa_copy, "train").problems["101"]


def test_fingerprint_does_not_depend_on_path_key_order_or_unused_entries(scienceqa, scienceqa_copy):
    path = scienceqa_copy / "problems.json"
    problems = {qid: {"extra": 1, **dict(reversed(p.items())), "skill": "x"}
                for qid, p in reversed(json.loads(path.read_text()).items())}
    path.write_text(json.dumps(problems, indent=3))
    change_json(scienceqa_copy / "captions.json", {"extra": 1})
    one, other = (load_scienceqa(root, "train", root / "captions.json") for root in (scienceqa, scienceqa_copy))
    assert one.fingerprint == other.fingerprint != load_scienceqa(scienceqa, "train").fingerprint


# --- Instruction tuning ---

RECORDS = [{"instruction": f"Name pond {i}.", "answer": "The north pond.", "image": None, "qid": i} for i in range(3)]


def instruction_settings(root, **changes) -> TrainingData:
    return TrainingData(**{"do_pretrain": True, "data_root": str(root), "max_seq_len": 100, **changes})


def examples_of(data, settings: TrainingData, tokenizer, image_size: int = 8) -> dict:
    return load_examples(data, settings, tokenizer, image_size, n_prompt=6, threads=2)


@pytest.mark.parametrize("content, words", [
    ({"all": []}, "all: should have at least 1 item"), ({"all": None}, "all: should be a valid list"),
    ({}, "all: is missing"), (RECORDS, "should be a valid dictionary"), ({"all": [*RECORDS, None]}, "record 3: "),
    *[({"all": [*RECORDS, {**RECORDS[0], field: value}]}, f"record 3: {field}: ") for field, value in [
        ("instruction", None), ("instruction", ""), ("instruction", "\ud800"), ("answer", 7), ("answer", " "),
        ("image", 7), ("image", ["1.jpg"]), ("image", ""), ("image", "../1.jpg"), ("image", False)]]])
def test_error_names_record_and_field(tmp_path, content, words):
    (tmp_path / "all_data.json").write_text(json.dumps(content))
    message = error_message(load_training_data, instruction_settings(tmp_path))
    assert message.startswith(f"{tmp_path / 'all_data.json'}: {words}") and "python -m tools.data_processing" in message


def test_instructions_have_a_fingerprint_and_become_examples_by_record(tmp_path, tokenizer, capsys):
    def load(records, root):
        root.mkdir()
        (root / "all_data.json").write_text(json.dumps({"all": records}))
        return load_training_data(instruction_settings(root))
    data = load(RECORDS, tmp_path / "a")
    assert load([dict(reversed({**r, "qid": 0}.items())) for r in RECORDS], tmp_path / "b").fingerprint == \
        data.fingerprint != load(RECORDS[::-1], tmp_path / "c").fingerprint
    assert list(examples_of(data, instruction_settings(tmp_path), tokenizer)) == [f"record {i}" for i in range(3)]
    assert capsys.readouterr().out == "3 records, 0 with a picture, 0 dropped for a bad picture\n"


# --- Training examples ---

def scienceqa_settings(root, **changes) -> TrainingData:
    return TrainingData(**{"data_root": str(root), "max_seq_len": 160, **changes})


def test_problems_become_examples_by_question_in_the_splits_order(scienceqa, tokenizer, capsys):
    settings = scienceqa_settings(scienceqa)
    data = load_training_data(settings)
    examples = examples_of(data, settings, tokenizer, IMAGE_SIZE)
    assert list(examples) == list(data.problems)
    assert all((examples[qid].image is None) == (p["image"] is None) for qid, p in data.problems.items())
    assert capsys.readouterr().out == "12 problems, 6 with a picture, 0 dropped for a bad picture\n"


def test_truncated_answers_are_counted_and_none_left_is_an_error(scienceqa, tokenizer, capsys):
    settings = scienceqa_settings(scienceqa)
    lengths = [example.answer_start for example in examples_of(load_training_data(settings), settings, tokenizer
                                                               ).values()]
    for limit, n in ((max(lengths), sum(length + 1 >= max(lengths) for length in lengths)), (40, 12)):
        settings = scienceqa_settings(scienceqa, max_seq_len=limit)
        if n == 12:
            assert "--max_seq_len 40 leaves no answer" in error_message(
                examples_of, load_training_data(settings), settings, tokenizer)
        else:
            examples_of(load_training_data(settings), settings, tokenizer)
            assert f"{n} whose answer lies beyond --max_seq_len {limit}" in capsys.readouterr().out


# --- Pictures ---

@pytest.mark.parametrize("name", ["my picture (1).png", " é水.png", "a%20b.png", "#1?.png", "-rf.png", "~a", "a" * 250])
def test_pictures_of_any_name(scienceqa_copy, name):
    folder, path = scienceqa_copy / "images" / "train" / "101", scienceqa_copy / "problems.json"
    (folder / "image.png").rename(folder / name)
    change_json(path, {"101": {**json.loads(path.read_text())["101"], "image": name}})
    assert len(load_images(load_scienceqa(scienceqa_copy, "train"), 8, 2, skip_bad=False)) == 6


def test_a_folder_that_links_to_itself_and_a_name_that_is_too_long(scienceqa_copy):
    folder, path = scienceqa_copy / "images" / "train" / "101", scienceqa_copy / "problems.json"
    shutil.rmtree(folder)
    folder.symlink_to("101")
    change_json(path, {"103": {**json.loads(path.read_text())["103"], "image": "a" * 300}})
    data = load_scienceqa(scienceqa_copy, "train")
    assert f"{folder}/image.png does not decode" in error_message(load_images, data, 8, 2, skip_bad=False)
    load_images(data, 8, 2, skip_bad=True)
    assert data.bad_pictures == ["101", "103"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_picture_that_is_no_file_does_not_hang(scienceqa_copy, make):
    path = scienceqa_copy / "images" / "train" / "101" / "image.png"
    path.unlink()
    make(path)
    data = load_scienceqa(scienceqa_copy, "train")
    message = error_message(load_images, data, IMAGE_SIZE, 2, skip_bad=False)
    assert str(path) in message and "it is no file" in message
    load_images(data, IMAGE_SIZE, 2, skip_bad=True)
    assert data.bad_pictures == ["101"]
