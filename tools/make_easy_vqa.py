"""Lays easy-VQA (package easy-vqa, MIT) out as ScienceQA: a fixed subset, three types of question, shuffled options.

    python -m tools.make_easy_vqa [--out data/easy_vqa] [--seed 0] [--train 960] [--test 400]

Writes problems.json, pid_splits.json, captions.json and images/{split}/{id}/image.png. The topic is the type of
question, and the skill is what the picture shows: both together are the cluster of a question, since a model that does
not know teal rectangles fails on all of them. Each picture, of one coloured shape, is asked about once; test has
pictures of the package's own test split only. Of each type, all answers are right equally often, for each wording as
far as the package has such questions: the text alone does not tell the answer. Split `pretrain` has further train
pictures, on which a ViT can be pretrained. Split `shuffled` is test with each picture at another question.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import Count, Seed
from tools.make_mini_scienceqa import split_evenly
from tools.output import make_folder, write_scienceqa
from util.data.prompts import OPTIONS

SIZES = {"train": 960, "val": 200, "test": 400, "pretrain": 2300}
ANSWERS = {"colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
           "shape": ("circle", "rectangle", "triangle"),
           "yes or no": ("yes", "no")}
NEGATIONS = {"no", "not"}


@dataclass(frozen=True)
class Output(FlagGroup):
    """The data set that is written."""

    title: ClassVar[str] = "data set"
    out: Path = flag(Path("data/easy_vqa"), "folder to write", Role.RUN)
    seed: Seed = flag(0, "seed of the choice of questions", Role.DATA)
    train: Count = flag(SIZES["train"], "questions to fine-tune on", Role.DATA)
    test: Count = flag(SIZES["test"], "questions to score", Role.DATA)


def get_args_parser() -> Parser:
    return Parser("-m tools.make_easy_vqa", __doc__, Output)


class Question(NamedTuple):
    """A question of the package. picture: its PNG."""

    text: str
    answer: str
    picture: Path


def package_data() -> Path:
    spec = find_spec("easy_vqa")
    if spec is None or not spec.origin:
        raise UserError("the package easy-vqa is missing: pip install -r requirements/smollm2.txt")
    return Path(spec.origin).parent / "data"


@cache
def read_questions(folder: Path) -> list[Question]:
    """Reads the questions in data/train or data/test of the package."""
    return [Question(text, answer, folder / "images" / f"{picture}.png")
            for text, answer, picture in json.loads((folder / "questions.json").read_text(encoding="utf-8"))]


def facts(question: Question) -> Iterator[tuple[str, str]]:
    """The ("colour", its name) and ("shape", its name) that a question and its answer tell of the picture."""
    words = set(question.text.rstrip("?").split())
    if question.answer in ANSWERS["yes or no"] and (question.answer == "yes") == bool(words & NEGATIONS):
        return  # what is named is not there
    for topic in ("colour", "shape"):
        yield from ((topic, name) for name in (words | {question.answer}) & set(ANSWERS[topic]))


@cache
def describe(folder: Path) -> dict[Path, str]:
    """`blue circle` for each picture of data/train or data/test whose questions tell both."""
    known = defaultdict(dict)
    for question in read_questions(folder):
        known[question.picture].update(facts(question))
    return {picture: f"{of['colour']} {of['shape']}" for picture, of in known.items() if len(of) == 2}


def choose(questions: list[Question], n: int, taken: set[Path], rng: Random) -> list[tuple[str, Question]]:
    """Chooses n questions, about as many of each topic, answer and wording; returns them with their topics. Adds their
    pictures to `taken`, and takes none that is in it already."""
    by_wording = defaultdict(lambda: defaultdict(list))
    for question in rng.sample(questions, len(questions)):
        by_wording[question.answer][question.text].append(question)
    texts = sorted({question.text for question in questions})
    chosen = []
    for (topic, answers), n_topic in zip(ANSWERS.items(), split_evenly(n, len(ANSWERS)), strict=True):
        order = rng.sample(texts, len(texts))  # one for all answers, so that each wording has as many of each
        for answer, n_answer in zip(answers, split_evenly(n_topic, len(answers)), strict=True):
            wordings = cycle([text for text in order if text in by_wording[answer]])
            for _ in range(n_answer):
                chosen.append((topic, next_new(by_wording[answer], wordings, taken)))
    return rng.sample(chosen, n)


def next_new(questions: dict[str, list[Question]], wordings: Iterator[str], taken: set[Path]) -> Question:
    """A question about a picture that is not taken, of the next wording that has one; takes the picture."""
    while any(questions.values()):
        of_wording = questions[next(wordings)]
        while of_wording:
            question = of_wording.pop()
            if question.picture not in taken:
                taken.add(question.picture)
                return question
    raise UserError("easy-VQA has no more questions about new pictures: give fewer with --train or --test")


def explain(topic: str, question: Question, description: str) -> str:
    """The solution. For yes or no it takes two steps: whether what is asked about is there, and then the answer, which
    depends on that and on whether the question has a negation."""
    if topic != "yes or no":
        return f"The picture shows a {description}, so {question.answer}."
    words = question.text.rstrip("?").split()
    [asked] = {*ANSWERS["colour"], *ANSWERS["shape"]} & set(words)
    what = asked if asked in ANSWERS["shape"] else f"{asked} shape"
    is_there = "is" if asked in description.split() else "is not"
    return f"The picture shows a {description}. A {what} {is_there} in it, so {question.answer}."


def record(topic: str, question: Question, description: str, split: str, rng: Random) -> dict:
    """The 14 fields of problems.json."""
    others = [answer for answer in ANSWERS[topic] if answer != question.answer]
    choices = [question.answer, *rng.sample(others, min(len(others), len(OPTIONS) - 1))]
    rng.shuffle(choices)
    return {"question": question.text.capitalize(), "choices": choices, "answer": choices.index(question.answer),
            "hint": "", "image": "image.png", "task": "yes or no" if topic == "yes or no" else "closed choice",
            "grade": "grade1", "subject": "natural science", "topic": topic, "category": "Pictures",
            "skill": description, "lecture": "", "solution": explain(topic, question, description), "split": split}


def make_problems(sizes: dict[str, int], seed: int) -> tuple[dict[str, dict], dict[str, Path], dict[str, str]]:
    """Problems, pictures and captions, by id."""
    rng, data, taken = Random(seed), package_data(), set()
    problems, pictures, captions = {}, {}, {}
    for split, n in sizes.items():
        folder = data / ("test" if split == "test" else "train")
        descriptions = describe(folder)
        known = [question for question in read_questions(folder) if question.picture in descriptions]
        for topic, question in choose(known, n, taken, rng):
            qid, description = str(len(problems) + 1), descriptions[question.picture]
            problems[qid] = record(topic, question, description, split, rng)
            pictures[qid], captions[qid] = question.picture, f"A {description}."
    return problems, pictures, captions


def add_shuffled(problems: dict[str, dict], pictures: dict[str, Path], captions: dict[str, str]) -> None:
    """The test problems once more, as split `shuffled`, each with the picture and the caption of the next one."""
    test = [qid for qid, problem in problems.items() if problem["split"] == "test"]
    for qid, other in zip(test, test[1:] + test[:1], strict=True):
        problems[f"{qid}s"] = problems[qid] | {"split": "shuffled"}
        pictures[f"{qid}s"], captions[f"{qid}s"] = pictures[other], captions[other]


def write_easy_vqa(out: Path, sizes: dict[str, int], seed: int) -> dict[str, dict]:
    """Returns the problems."""
    problems, pictures, captions = make_problems(sizes, seed)
    add_shuffled(problems, pictures, captions)
    write_scienceqa(out, problems, captions, lambda qid, path: shutil.copyfile(pictures[qid], path))
    return problems


def main(args: Flags) -> None:
    make_folder(args.out)
    sizes = {**SIZES, "train": args.train, "test": args.test}
    write_easy_vqa(args.out, sizes, args.seed)
    print(f"{args.out}: " + ", ".join(f"{size} {split}" for split, size in sizes.items()) + " problems, all with a "
          "picture; and split shuffled, test with exchanged pictures")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
