"""The nine accuracies of a few problems, computed by hand; which problems form a cluster."""

import pytest

from tiny import problem
from util.data.datasets import cluster
from util.evaluation.answers import Answer
from util.evaluation.scoring import COLUMNS, score

NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
PROBLEMS = {
    "a": problem(subject=NATURAL, hint="Look up.", image="image.png", grade="grade1", answer=0),
    "b": problem(subject=NATURAL, hint="", image="image.png", grade="grade6", answer=1),
    "c": problem(subject=SOCIAL, hint="", image=None, grade="grade7", answer=0),
    "d": problem(subject=LANGUAGE, hint="Read it.", image=None, grade="grade12", answer=1),
    "e": problem(subject=LANGUAGE, hint="", image=None, grade="grade10", answer=1),
    "f": problem(subject=LANGUAGE, hint="", image=None, grade="grade2", answer=0),
}


def answers(predictions: dict[str, int]) -> list[Answer]:
    return [Answer(qid, prediction, PROBLEMS[qid]["answer"]) for qid, prediction in predictions.items()]


def test_nine_accuracies():
    """The answers to a, c, d and f are right, and those to b and e are wrong."""
    result = score(PROBLEMS, answers({"a": 0, "b": 0, "c": 0, "d": 1, "e": 0, "f": 0}))
    assert result["counts"] == {"NAT": 2, "SOC": 1, "LAN": 3, "TXT": 2, "IMG": 2, "NO": 3, "G1-6": 3, "G7-12": 3,
                                "Avg": 6}
    assert result["correct"] == {"NAT": 1, "SOC": 1, "LAN": 2, "TXT": 2, "IMG": 1, "NO": 2, "G1-6": 2, "G7-12": 2,
                                 "Avg": 4}
    assert [result[column] for column in COLUMNS] == pytest.approx(
        [50, 100, 200 / 3, 100, 50, 200 / 3, 200 / 3, 200 / 3, 200 / 3])
    assert list(COLUMNS) == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]


def test_empty_categories_have_no_accuracy():
    result = score(PROBLEMS, answers({"c": 1}))  # only answered questions count
    assert {column: result[column] for column in COLUMNS} == {
        "NAT": None, "SOC": 0, "LAN": None, "TXT": None, "IMG": None, "NO": 0, "G1-6": None, "G7-12": 0, "Avg": 0}
    assert all(score(PROBLEMS, [])[column] is None for column in COLUMNS)


def test_chance_is_the_mean_of_one_by_the_number_of_options():
    options = {"a": 2, "b": 3, "c": 4, "d": 2, "e": 5, "f": 3}
    problems = {qid: {**PROBLEMS[qid], "choices": list("ABCDE"[:n])} for qid, n in options.items()}
    chance = score(problems, answers(dict.fromkeys("abcdef", 0)))["chance"]
    assert chance == pytest.approx({
        "NAT": 100 * (1 / 2 + 1 / 3) / 2, "SOC": 25, "LAN": 100 * (1 / 2 + 1 / 5 + 1 / 3) / 3,
        "TXT": 50, "IMG": 100 * (1 / 2 + 1 / 3) / 2, "NO": 100 * (1 / 4 + 1 / 5 + 1 / 3) / 3,
        "G1-6": 100 * (1 / 2 + 1 / 3 + 1 / 3) / 3, "G7-12": 100 * (1 / 4 + 1 / 2 + 1 / 5) / 3,
        "Avg": 100 * (1 / 2 + 1 / 3 + 1 / 4 + 1 / 2 + 1 / 5 + 1 / 3) / 6})
    of_one = score(problems, answers({"c": 0}))["chance"]  # only answered questions count
    assert of_one["Avg"] == of_one["SOC"] == 25 and of_one["NAT"] is None


def test_cluster_of_a_problem():
    same = cluster("1", problem(lecture="Depth is measured down.\n", topic="a"))
    assert same == cluster("2", problem(lecture="Depth is measured down.", topic="b")) and same.startswith("lecture ")
    assert cluster("1", problem(lecture="Depth is measured up.")) != same
    assert cluster("1", problem(lecture=" ", topic="a", skill="b")) == "a/b"
    bare = problem(lecture="")
    del bare["topic"], bare["skill"]
    assert cluster("1", bare) == "question 1"
