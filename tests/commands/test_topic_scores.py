"""tools/topic_scores.py: percentages by topic that are computed by hand, and folders of other data refused."""

import json

import pytest

from lavin.runtime.errors import UserError
from tools.topic_scores import topic_table

PROBLEMS = {"1": {"topic": "colour"}, "2": {"topic": "colour"}, "3": {"topic": "shape"}, "4": {"topic": "colour"}}


def write_answers(folder, predictions: dict[str, int]):
    """All right answers are 0."""
    folder.mkdir()
    lines = [json.dumps({"qid": qid, "prediction": prediction, "answer": 0}) for qid, prediction in predictions.items()]
    (folder / "generations.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_percentages_by_hand(tmp_path):
    tuned = write_answers(tmp_path / "tuned", {"1": 0, "2": 1, "3": 0, "4": 0})
    partly = write_answers(tmp_path / "partly", {"1": 1})
    header, _, first, second = topic_table([tuned, partly], PROBLEMS).splitlines()
    assert header.split()[-2:] == ["colour", "shape"]
    assert first.split() == ["tuned", "66.7", "(3)", "100.0", "(1)"]
    assert second.split() == ["partly", "0.0", "(1)", "-"]


def test_folders_without_answers_or_of_other_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="score it with eval.py first"):
        topic_table([tmp_path], PROBLEMS)
    with pytest.raises(UserError, match="answers problem 9"):
        topic_table([write_answers(tmp_path / "other", {"9": 0})], PROBLEMS)


def test_an_answer_that_is_none_is_named(tmp_path):
    folder = write_answers(tmp_path / "broken", {"1": 0, "2": None})
    with pytest.raises(UserError, match="generations.jsonl, line 2: prediction: should be a valid integer, not None"):
        topic_table([folder], PROBLEMS)
