"""The accuracies of a few problems, computed by hand: ScienceQA's nine, and those of a data set's own categories; which
problems form a cluster."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny import problem
from util.data.datasets import cluster
from util.evaluation.answers import Answer
from util.evaluation.scoring import COLUMNS, MAX_CATEGORIES, MAX_NAME, columns_of, score, short_names

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


# --- Columns of a data set's own ---

def own(**changes) -> dict:
    """A problem without grade and subject, category and topic."""
    known = problem(**changes)
    return {name: value for name, value in known.items()
            if name in changes or name not in ("grade", "subject", "category", "topic")}


def own_problems(categories: list[str], entry: str = "category") -> dict[str, dict]:
    return {str(i): own(**{entry: category}) for i, category in enumerate(categories)}


def scored(problems: dict[str, dict], right: str) -> dict:
    """right: a character for each problem, 1 where its answer is right."""
    return score(problems, [Answer(qid, p["answer"] if digit == "1" else 1 - p["answer"], p["answer"])
                            for (qid, p), digit in zip(problems.items(), right, strict=True)])


def test_own_categories_are_columns_in_the_order_of_frequency():
    problems = own_problems(["animals", "Plants", "Plants ", "", "plants", "Cells"])
    problems["0"]["hint"] = "Look up."
    result = scored(problems, "110101")
    assert list(result["counts"].items()) == [("Plants", 3), ("Animals", 1), ("Cells", 1), ("TXT", 1), ("NO", 5),
                                              ("Avg", 6)]
    assert result["correct"] == {"Plants": 1, "Animals": 1, "Cells": 1, "TXT": 1, "NO": 3, "Avg": 4}
    assert (result["Plants"], result["Avg"]) == pytest.approx((100 / 3, 200 / 3))
    assert result["chance"] == dict.fromkeys(result["counts"], 50.0)


def test_topics_are_columns_where_no_problem_has_a_category():
    assert list(scored(own_problems(["b", "a", "a"], "topic"), "111")["counts"]) == ["A", "B", "NO", "Avg"]
    problems = own_problems(["b", "a"], "topic") | {"9": own(category="c", image="image.png")}
    assert list(scored(problems, "111")["counts"]) == ["C", "IMG", "NO", "Avg"]
    assert list(scored({"1": own()}, "1")["counts"]) == ["NO", "Avg"]


def test_of_many_categories_the_most_frequent_are_columns():
    names = [f"Unit {i}" for i in range(10, 30)]
    counts = scored(own_problems([name for i, name in enumerate(names) for _ in range(i + 1)]), "1" * 210)["counts"]
    assert counts == {**{f"Unit {i}": i - 9 for i in range(29, 21, -1)}, "NO": 210, "Avg": 210}


def test_a_grade_or_a_subject_that_some_problems_lack_gives_own_columns():
    for name in ("grade", "subject"):
        problems = {qid: dict(p) for qid, p in PROBLEMS.items()}
        assert columns_of(list(problems.values())) is COLUMNS
        del problems["c"][name]
        assert list(scored(problems, "111111")["counts"]) == ["Ponds", "TXT", "IMG", "NO", "Avg"]


def test_names_are_cut_numbered_and_unlike_scienceqas():
    assert short_names(["Photosynthesis", "Photosynthetic cells", "Photosynthes", "Avg", "No", "(data)", "***", "C#",
                        "<b>R&D</b>", "$x_1$ | \\y", "植物"]) == [
        "Photosynth.", "Photosyn. 2", "Photosyn. 3", "Avg 2", "No 2", "Data", "Category", "C#", "B R&D /b", "X 1 y",
        "植物"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["split", "counts", "(data)", "avg", "TXT", "no", "Avg_low", "Photosynthesis", "Photosynthetic", "$x$", "|", "**"])


@given(st.lists(TEXTS, unique=True))
def test_any_text_gets_a_name_that_every_table_can_show(texts):
    names = short_names(texts)
    assert len(names) == len(texts) == len({name.casefold() for name in names})
    for name in names:
        assert 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()
        assert not re.search(r"[|`*_<>\\$\[\]{}~^\"=@\n]", name) and not re.match("[-+a-z]", name)
    assert not {name.casefold() for name in names} & {column.casefold() for column in COLUMNS}


@given(st.lists(st.tuples(TEXTS, st.sampled_from(["", "Look up."]), st.sampled_from([None, "image.png"]),
                          st.booleans()), min_size=1, max_size=40), st.randoms())
def test_own_columns_count_every_question_once_and_in_any_order(questions, rng):
    problems = {str(i): own(category=category, hint=hint, image=image)
                for i, (category, hint, image, _) in enumerate(questions)}
    answers = [Answer(str(i), int(right), 1) for i, (*_, right) in enumerate(questions)]
    result = score(problems, answers)
    counts, sizes = result["counts"], Counter(" ".join(q[0].split()).upper() for q in questions if q[0].split())
    of_categories = [n for column, n in counts.items() if column not in COLUMNS]
    assert len(of_categories) <= MAX_CATEGORIES and of_categories == sorted(of_categories, reverse=True)
    assert sum(of_categories) <= sum(sizes.values()) and 0 not in counts.values()
    assert list(counts)[-1] == "Avg" and counts["Avg"] == len(questions)
    assert counts.get("NO", 0) == sum(not hint and not image for _, hint, image, _ in questions)
    assert result["correct"]["Avg"] == sum(right for *_, right in questions)
    assert counts.keys() == result["correct"].keys() == result["chance"].keys() < result.keys()
    rng.shuffle(answers)
    assert json.dumps(score(problems, answers)) == json.dumps(result)


def test_cluster_of_a_problem():
    same = cluster("1", problem(lecture="Depth is measured down.\n", topic="a"))
    assert same == cluster("2", problem(lecture="Depth is measured down.", topic="b")) and same.startswith("lecture ")
    assert cluster("1", problem(lecture="Depth is measured up.")) != same
    assert cluster("1", problem(lecture=" ", topic="a", skill="b")) == "a/b"
    bare = problem(lecture="")
    del bare["topic"], bare["skill"]
    assert cluster("1", bare) == "question 1"
