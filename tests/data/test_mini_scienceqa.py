"""The mini ScienceQA: schema, layout, reproducibility, and picture questions that the text alone cannot answer."""

import json
import re
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest
from PIL import Image

from tools import make_mini_scienceqa
from tools.make_mini_scienceqa import SIZES, make_problem, make_problems, texts, write_mini_scienceqa
from tools.mini_questions import KINDS
from util.evaluation.scoring import COLUMNS

SMALL = {"train": 80, "val": 40, "test": 40}
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "image": (str, type(None)), "task": str,
          "grade": str, "subject": str, "topic": str, "category": str, "skill": str, "lecture": str, "solution": str,
          "split": str}
PICTURE_KINDS = [kind for kind in KINDS if kind.draw]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.skill)
each_picture_kind = pytest.mark.parametrize("kind", PICTURE_KINDS, ids=lambda kind: kind.skill)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    write_mini_scienceqa(root, SMALL, 0)
    return root


@pytest.fixture(scope="module")
def all_problems():
    """The fields of all problems of the default sizes; no picture is drawn."""
    return [problem.fields for problem in make_problems(SIZES, 0).values()]


def load(root, name):
    return json.loads((root / name).read_text())


def subjects_of(kind) -> list[str]:
    """All that a question of the kind can be about."""
    return [x for xs in kind.facts.values() for x in xs.split(", ")]


def test_every_problem_has_the_14_fields(all_problems):
    for problem in all_problems:
        assert problem.keys() == FIELDS.keys()
        assert all(isinstance(problem[name], field_type) for name, field_type in FIELDS.items())
        assert "{" not in str([problem[name] for name in FIELDS])[1:-1]  # all templates are filled in


def test_options_are_distinct_and_the_answer_is_one_of_them(all_problems):
    for problem in all_problems:
        assert 2 <= len(problem["choices"]) <= 5 and 0 <= problem["answer"] < len(problem["choices"])
        assert len(set(problem["choices"])) == len(problem["choices"])


def test_same_fields_splits_and_captions_as_the_real_data_set(written, real_scienceqa):
    real = next(iter(load(real_scienceqa, "problems.json").values()))
    assert next(iter(load(written, "problems.json").values())).keys() == real.keys()
    assert load(written, "pid_splits.json").keys() == load(real_scienceqa, "pid_splits.json").keys()
    assert load(written, "captions.json").keys() == load(real_scienceqa, "captions.json").keys()


def test_splits_partition_the_problems(written):
    problems, splits = load(written, "problems.json"), load(written, "pid_splits.json")
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(problems)
    assert splits["trainval"] == splits["train"] + splits["val"]
    for name, size in SMALL.items():
        assert len(splits[name]) == size and set(splits[f"mini{name}"]) < set(splits[name])
        assert all(problems[qid]["split"] == name for qid in splits[name])


def test_images_and_captions_belong_to_the_problems_with_image(written):
    with_image = {qid: p for qid, p in load(written, "problems.json").items() if p["image"]}
    expected = {written / "images" / p["split"] / qid / p["image"] for qid, p in with_image.items()}
    assert {path for path in (written / "images").rglob("*") if path.is_file()} == expected
    assert load(written, "captions.json")["captions"].keys() == with_image.keys()
    for path in expected:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.mode == "RGB" and min(image.size) >= 200


def test_same_seed_gives_the_same_bytes(written, tmp_path):
    def contents(root):
        return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    write_mini_scienceqa(tmp_path / "again", SMALL, 0)
    write_mini_scienceqa(tmp_path / "other", SMALL, 1)
    assert contents(tmp_path / "again") == contents(written)
    assert contents(tmp_path / "other") != contents(written)


@pytest.mark.parametrize("split", SIZES)
def test_each_split_has_questions_in_all_columns_of_the_score_table(all_problems, split):
    problems = [problem for problem in all_problems if problem["split"] == split]
    counts = {column: sum(map(belongs, problems)) for column, belongs in COLUMNS.items()}
    assert len(counts) == 9 and min(counts.values()) >= len(problems) / 10
    assert counts["IMG"] == round(0.45 * counts["Avg"]) and counts["Avg"] == SIZES[split]


def test_variety(all_problems):
    test = [problem for problem in all_problems if problem["split"] == "test"]
    assert {problem["grade"] for problem in all_problems} == {f"grade{i}" for i in range(1, 13)}
    assert {len(problem["choices"]) for problem in test} == {2, 3, 4, 5}
    assert {problem["task"] for problem in test} == {"closed choice", "yes or no", "true-or false"}
    for optional in ("hint", "lecture", "solution", "image"):
        assert {bool(problem[optional]) for problem in test} == {True, False}


def test_no_text_is_asked_twice(all_problems):
    """A text that came with one picture in training would otherwise tell what another picture does not show."""
    assert max(Counter((problem["question"], problem["hint"]) for problem in all_problems).values()) == 1


@each_picture_kind
def test_question_and_hint_do_not_depend_on_the_picture(kind):
    assert len({frozenset(texts(kind, x, Random(0))) for x in subjects_of(kind)}) == 1


@each_picture_kind
def test_question_and_hint_name_no_option(kind):
    words = {word for x in subjects_of(kind) for text in texts(kind, x, Random(0))
             for word in re.findall(r"\w+", " ".join(text))}
    assert not {word for y in kind.facts for word in (y, *y.split()) if word != "o'clock"} & words


@each_picture_kind
def test_pictures_of_different_things_differ(kind):
    """They differ at the resolution of small models, with all else equal."""
    pictures = [np.asarray(kind.picture(x, Random(1)).resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
                for x in subjects_of(kind)]
    for a, b in combinations(pictures, 2):
        assert (np.abs(a - b).max(-1) > 60).sum() >= 6


@each_picture_kind
def test_pictures_of_the_same_thing_vary(kind):
    x = subjects_of(kind)[0]
    assert len({kind.picture(x, Random(seed)).tobytes() for seed in range(20)}) > 4


@each_picture_kind
def test_different_pictures_have_different_captions(kind):
    captions = {kind.caption.format(x=x) for x in subjects_of(kind)}
    assert len(captions) == len(set(subjects_of(kind)))


@pytest.mark.parametrize("split", SIZES)
def test_all_options_are_right_equally_often(all_problems, split):
    right_answers = {}
    for problem in all_problems:
        if problem["split"] == split:
            key = problem["skill"], tuple(problem["choices"])
            right_answers.setdefault(key, Counter())[problem["answer"]] += 1
    for (_, choices), counts in right_answers.items():
        counts = [counts[i] for i in range(len(choices))]
        assert max(counts) - min(counts) <= 1


@each_kind
def test_exactly_one_option_is_right(kind):
    assert len(subjects_of(kind)) == len(set(subjects_of(kind)))  # nothing has two answers
    for y in kind.facts:
        problem = make_problem(kind, y, "train", set(), Random(0))
        assert problem.fields["choices"][problem.fields["answer"]] == y
        assert problem.x in kind.facts[y].split(", ")


def test_asking_for_too_many_problems_is_refused(monkeypatch):
    monkeypatch.setattr(make_mini_scienceqa, "KINDS", KINDS[:1] + KINDS[-1:])
    with pytest.raises(ValueError, match="ask for fewer"):
        make_problems({"train": 10_000}, 0)
