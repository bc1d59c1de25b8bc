"""tools/topic_scores.py: percentages by topic that are computed by hand, and folders of other data refused."""

import json
from pathlib import Path

import pytest

from lavin.runtime.errors import UserError
from tools.topic_scores import topic_report

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
    intro, columns, table = topic_report([tuned, partly], PROBLEMS, 80).split("\n\n")
    assert "by topic" in intro and columns.splitlines() == [f"1: {tuned}", f"2: {partly}"]
    header, _, first, second = (line.split() for line in table.splitlines())
    assert header == ["topic", "questions", "1", "2"]
    assert first == ["colour", "3", "66.7", "0.0", "(1)"] and second == ["shape", "1", "100.0", "-"]


@pytest.mark.parametrize("n_topics, n_folders, name", [(26, 1, "topic"), (26, 9, "topic"), (3, 40, "t"),
                                                       (5, 9, "science and engineering practices and more of it")])
def test_any_number_of_topics_and_folders_fits_a_terminal(tmp_path, monkeypatch, n_topics, n_folders, name):
    monkeypatch.chdir(tmp_path)
    topics = [f"{name} {i}" for i in range(n_topics)]
    problems = {str(i): {"topic": topic} for i, topic in enumerate(topics)}
    folders = [write_answers(Path(f"run{j}"), dict.fromkeys(problems, 0)) for j in range(n_folders)]
    text = topic_report(folders, problems, 80)
    assert max(map(len, text.splitlines())) <= 80 and "more column" not in text
    assert text.count("100.0") == n_topics * n_folders and set(name.split()) <= set(text.split())
    headers = [line.split()[2:] for line in text.splitlines() if line.startswith("topic ") and "questions" in line]
    assert sum(headers, []) == [str(j + 1) for j in range(n_folders)]


def test_folders_without_answers_or_of_other_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="score it with eval.py first"):
        topic_report([tmp_path], PROBLEMS, 80)
    with pytest.raises(UserError, match="answers problem 9"):
        topic_report([write_answers(tmp_path / "other", {"9": 0})], PROBLEMS, 80)


def test_an_answer_that_is_none_is_named(tmp_path):
    folder = write_answers(tmp_path / "broken", {"1": 0, "2": None})
    with pytest.raises(UserError, match="generations.jsonl, line 2: prediction: should be a valid integer, not None"):
        topic_report([folder], PROBLEMS, 80)
