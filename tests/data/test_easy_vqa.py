"""easy-VQA as ScienceQA: the declared schema, splits by picture, shuffled options, the package's own answers."""

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict

import pytest
from scipy.stats import chisquare

from lavin.runtime.errors import UserError
from tools.make_easy_vqa import (
    ANSWERS,
    SIZES,
    Question,
    facts,
    get_args_parser,
    main,
    make_problems,
    write_easy_vqa,
)
from util.data.datasets import cluster, load_scienceqa

easy_vqa = pytest.importorskip("easy_vqa")
SPLITS = ("train", "val", "test")
SMALL = {"train": 96, "val": 24, "test": 48}


@pytest.fixture(scope="module")
def made():
    """Problems, pictures and captions of the default sizes, without writing files."""
    return make_problems(SIZES, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("easy_vqa")
    write_easy_vqa(root, SMALL, 0)
    return root


def right_answer(problem: dict) -> str:
    return problem["choices"][problem["answer"]]


def package_questions(split: str) -> dict[tuple[str, str], set[str]]:
    """(path of the picture, question) -> the answers that the package itself gives."""
    texts, answers, ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    answers_of = defaultdict(set)
    for text, answer, picture in zip(texts, answers, ids, strict=True):
        answers_of[paths[picture], text.capitalize()].add(answer)
    return answers_of


@pytest.mark.parametrize("split", [*SPLITS, "shuffled"])
def test_load_scienceqa_reads_every_split(written, split):
    data = load_scienceqa(str(written), split, str(written / "captions.json"))
    assert len(data.problems) == SMALL[split if split in SPLITS else "test"]
    assert all(data.picture_path(qid).is_file() and data.captions[qid] for qid in data.problems)


def test_answers_are_the_packages_own(made):
    problems, pictures, _ = made
    for split in SPLITS:
        answers_of = package_questions("test" if split == "test" else "train")
        for qid, problem in problems.items():
            if problem["split"] == split:
                assert answers_of[str(pictures[qid]), problem["question"]] == {right_answer(problem)}


def test_solutions_and_captions_agree_with_all_that_the_package_says(made):
    problems, pictures, captions = made
    answers_of = package_questions("train") | package_questions("test")
    by_picture = defaultdict(list)
    for (path, _), answers in answers_of.items():
        by_picture[path] += answers
    for qid, problem in problems.items():
        colour, shape = captions[qid].removeprefix("A ").rstrip(".").split()
        begin, answer = f"The picture shows a {colour} {shape}", f", so {right_answer(problem)}."
        assert problem["solution"].startswith(begin) and problem["solution"].endswith(answer)
        between = problem["solution"].removeprefix(begin).removesuffix(answer)
        if problem["topic"] != "yes or no":
            assert not between
            continue
        asked, negated = re.fullmatch(r"\. A (\w+)(?: shape)? is (not )?in it", between).groups()
        assert asked in problem["question"].lower().rstrip("?").split()
        assert (asked in (colour, shape)) != bool(negated)
        denies = bool({"no", "not"} & set(problem["question"].split()))
        assert (right_answer(problem) == "yes") == (bool(negated) == denies)
        named = {answer for answer in by_picture[str(pictures[qid])] if answer not in ANSWERS["yes or no"]}
        assert named <= {colour, shape}


def test_no_picture_is_asked_about_twice(made):
    problems, pictures, _ = made
    assert len(set(pictures.values())) == len(problems) == sum(SIZES.values())
    for qid, problem in problems.items():
        assert (pictures[qid].parents[1].name == "test") == (problem["split"] == "test")
    contents = defaultdict(set)  # also none under two names
    for qid, path in pictures.items():
        contents[problems[qid]["split"]].add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert set(contents) == set(SIZES)
    assert all(not contents[a] & contents[b] for a, b in itertools.combinations(contents, 2))


def test_options_are_distinct_and_of_the_questions_topic(made):
    for problem in made[0].values():
        possible = ANSWERS[problem["topic"]]
        assert len(set(problem["choices"])) == len(problem["choices"]) == min(len(possible), 5)
        assert set(problem["choices"]) <= set(possible)


@pytest.mark.parametrize("topic", ANSWERS)
def test_the_right_option_is_uniform(made, topic):
    problems = [problem for problem in made[0].values() if problem["topic"] == topic]
    counts = Counter(problem["answer"] for problem in problems)
    assert chisquare([counts[i] for i in range(len(problems[0]["choices"]))]).pvalue > 0.01


@pytest.mark.parametrize("split", SPLITS)
def test_all_answers_of_a_topic_are_right_equally_often(made, split):
    for topic, answers in ANSWERS.items():
        counts = Counter(right_answer(problem) for problem in made[0].values()
                         if (problem["split"], problem["topic"]) == (split, topic))
        assert counts.keys() == set(answers) and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_wording_does_not_tell_yes_from_no(made, split):
    answers = defaultdict(Counter)
    for problem in made[0].values():
        if (problem["split"], problem["topic"]) == (split, "yes or no"):
            answers[problem["question"]][right_answer(problem)] += 1
    total = sum(map(Counter.total, answers.values()))
    assert sum(max(counts.values()) for counts in answers.values()) <= 0.52 * total


def test_shuffled_pictures_are_those_of_other_test_questions(written):
    problems = json.loads((written / "problems.json").read_text())

    def picture(qid):
        return (written / "images" / problems[qid]["split"] / qid / "image.png").read_bytes()

    test = [qid for qid, problem in problems.items() if problem["split"] == "test"]
    for qid in test:
        assert {**problems[f"{qid}s"], "split": "test"} == problems[qid] and picture(f"{qid}s") != picture(qid)
    assert Counter(map(picture, test)) == Counter(picture(f"{qid}s") for qid in test)


def test_questions_of_one_type_on_equal_pictures_are_a_cluster(made):
    problems, _, captions = made
    of_test = [qid for qid, problem in problems.items() if problem["split"] == "test"]
    clusters = {cluster(qid, problems[qid]) for qid in of_test}
    assert clusters == {f"{problems[qid]['topic']}/{captions[qid][2:-1]}" for qid in of_test}
    assert 40 < len(clusters) <= 3 * 8 * 3  # types of question x colours x shapes


def test_sizes_are_flags(tmp_path):
    main(get_args_parser().parse_args(["--out", str(tmp_path), "--train", "60", "--test", "90"]))
    splits = json.loads((tmp_path / "pid_splits.json").read_text())
    assert {split: len(ids) for split, ids in splits.items() if split in SIZES} == {**SIZES, "train": 60, "test": 90}


def test_same_seed_gives_the_same_problems():
    assert make_problems(SMALL, 0) == make_problems(SMALL, 0) != make_problems(SMALL, 1)


@pytest.mark.parametrize("text, answer, expected", [
    ("what is the blue shape?", "circle", {("colour", "blue"), ("shape", "circle")}),
    ("is there a red shape?", "yes", {("colour", "red")}),
    ("is there a red shape?", "no", set()),
    ("is no red shape present?", "no", {("colour", "red")}),
    ("is no red shape present?", "yes", set()),
    ("does the image not contain a triangle?", "no", {("shape", "triangle")})])
def test_facts_by_hand(text, answer, expected):
    assert set(facts(Question(text, answer, None))) == expected


def test_too_many_questions_are_refused():
    with pytest.raises(UserError, match="give fewer with --train"):
        make_problems({"train": 4500}, 0)
