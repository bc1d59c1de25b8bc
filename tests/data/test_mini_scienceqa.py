"""The mini ScienceQA: schema, layout, reproducibility, and image questions that the text alone cannot answer."""

import json
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest
from PIL import Image

from tools.make_mini_scienceqa import SIZES, make_problems, new_problems, write_mini_scienceqa
from tools.mini_pictures import Canvas
from tools.mini_questions import PICTURE_SKILLS, TEXT_SKILLS, Skill, make_problem

SMALL = {"train": 80, "val": 40, "test": 40}
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "image": (str, type(None)), "task": str,
          "grade": str, "subject": str, "topic": str, "category": str, "skill": str, "lecture": str, "solution": str,
          "split": str}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    write_mini_scienceqa(root, SMALL, 0)
    return root


@pytest.fixture(scope="module")
def all_problems():
    """All problems of the default sizes, without drawing their images."""
    return make_problems(SIZES, 0)


def load(root, name):
    return json.loads((root / name).read_text())


def test_every_problem_has_the_14_fields(written):
    for problem in load(written, "problems.json").values():
        assert problem.keys() == FIELDS.keys()
        assert all(isinstance(problem[name], field_type) for name, field_type in FIELDS.items())
        assert 2 <= len(problem["choices"]) <= 5 and 0 <= problem["answer"] < len(problem["choices"])
        assert len(set(problem["choices"])) == len(problem["choices"])
        assert "{" not in str([problem[name] for name in FIELDS])[1:-1]  # all templates are filled in


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


def test_sizes_and_variety(all_problems):
    test = [problem for split, problem in all_problems.values() if split == "test"]
    assert len(test) >= 300
    assert 0.4 <= sum(bool(problem.skill.draw) for problem in test) / len(test) <= 0.5
    assert {problem.skill.subject for problem in test} == {"natural science", "social science", "language science"}
    assert {problem.grade for _, problem in all_problems.values()} == {f"grade{i}" for i in range(1, 13)}
    assert {len(problem.choices) for problem in test} == {2, 3, 4, 5}
    assert len({problem.skill.task for problem in test}) == 3
    for text in ("hint", "lecture", "solution"):
        assert {bool(getattr(problem, text)) for problem in test} == {True, False}


def test_no_problem_is_in_two_splits(all_problems):
    keys = {split: {p.key for s, p in all_problems.values() if s == split} for split in SIZES}
    assert all(not keys[a] & keys[b] for a, b in combinations(SIZES, 2))


@pytest.mark.parametrize("skill", PICTURE_SKILLS, ids=lambda skill: skill.name)
def test_question_and_hint_do_not_depend_on_the_image(skill):
    for seed in range(20):
        texts = {}
        for fact in skill.facts:
            problem = make_problem(skill, fact, Random(seed))
            texts.setdefault(problem.choices, set()).add((problem.question, problem.hint))
        assert all(len(different) == 1 for different in texts.values())


@pytest.mark.parametrize("skill", PICTURE_SKILLS, ids=lambda skill: skill.name)
def test_images_of_different_answers_differ(skill):
    """At the resolution of small models, with all else equal."""
    def draw_small(fact):
        canvas = Canvas(Random(1))
        skill.draw(canvas, **make_problem(skill, fact, Random(1)).scene)
        return np.asarray(canvas.finish().resize((48, 48), Image.Resampling.BICUBIC)).astype(int)

    for a, b in combinations([draw_small(fact) for fact in skill.facts], 2):
        assert (np.abs(a - b).max(-1) > 60).sum() >= 6


@pytest.mark.parametrize("split", SIZES)
def test_all_choices_of_an_image_question_are_right_equally_often(all_problems, split):
    right_answers = {}
    for problem_split, problem in all_problems.values():
        if problem_split == split and problem.skill.draw:
            right_answers.setdefault((problem.skill.name, problem.choices), Counter())[problem.answer] += 1
    for (_, choices), counts in right_answers.items():
        counts = [counts[i] for i in range(len(choices))]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("skill", PICTURE_SKILLS + TEXT_SKILLS, ids=lambda skill: skill.name)
def test_exactly_one_choice_is_right(skill):
    for x, y in skill.facts:
        problem = make_problem(skill, (x, y), Random(0))
        assert problem.choices[problem.answer] == y
        # if the hint contains the answer, other choices are right with other hints
        if not any("{y}" in hint for hint in skill.hints):
            assert [choice for choice in problem.choices if (x, choice) in skill.facts] == [y]


def picture_skill(**changes) -> Skill:
    return Skill(**{**vars(PICTURE_SKILLS[0]), **changes})


def test_text_that_reveals_the_image_is_refused():
    for changes in ({"questions": ("Is it {x}?",)}, {"hints": ("It is {y}.",)}):
        with pytest.raises(ValueError, match="the text tells"):
            picture_skill(**changes)


def test_asking_for_too_many_problems_is_refused():
    skill = picture_skill(questions=("{name}?",), hints=("",))
    with pytest.raises(ValueError, match="ask for fewer"):
        new_problems(skill, 10_000, set(), Random(0))
