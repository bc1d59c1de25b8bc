"""Writes the mini ScienceQA: invented problems in ScienceQA's layout, with images that are needed for the answer.

    python -m tools.make_mini_scienceqa [--out data/mini] [--seed 0]

Writes problems.json, pid_splits.json, captions.json and images/{split}/{id}/image.png, as in ScienceQA (Lu et al. 2022,
arXiv 2209.09513). The same seed gives the same problems and pixels. No two problems have the same question with
the same hint: what was learned of one tells nothing about a picture that comes with another.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from random import Random
from typing import ClassVar, NamedTuple

from lavin.runtime.console import counted
from lavin.runtime.errors import one_line_errors
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import Seed
from tools.mini_questions import KINDS, Kind
from tools.output import make_folder, write_scienceqa

SIZES = {"train": 2000, "val": 120, "test": 400}
PICTURE_FRACTION = 0.45  # of the problems
NAMES = ("Ada", "Ali", "Amy", "Ana", "Ben", "Bob", "Cora", "Dan", "Emma", "Eva", "Finn", "Gina", "Hugo", "Ida", "Ines",
         "Ivan", "Jack", "Jane", "Kate", "Kim", "Leo", "Lisa", "Max", "Mia", "Noah", "Nina", "Olga", "Otto", "Paul",
         "Rosa", "Sam", "Tom")
OPENINGS = ("", "{name} asks: ", "{name} wants to know: ")


@dataclass(frozen=True)
class Output(FlagGroup):
    """The data set that is written."""

    title: ClassVar[str] = "data set"
    out: Path = flag(Path("data/mini"), "folder to write", Role.RUN)
    seed: Seed = flag(0, "seed of the problems and their pictures", Role.DATA)


def get_args_parser() -> Parser:
    return Parser("-m tools.make_mini_scienceqa", __doc__, Output)


class Problem(NamedTuple):
    """A problem with its 14 fields of problems.json, its kind, and what its picture shows."""

    fields: dict
    kind: Kind
    x: str

    @property
    def caption(self) -> str:
        return self.kind.caption.format(x=self.x)


def texts(kind: Kind, x: str, rng: Random) -> list[tuple[str, str]]:
    """All questions about x with their hints, in random order."""
    different = dict.fromkeys(((opening + kind.question).format(x=x, name=name), hint.format(x=x, name=name))
                              for opening, hint, name in product(OPENINGS, kind.hints, NAMES))
    return rng.sample(list(different), len(different))


def make_problem(kind: Kind, y: str, split: str, taken: set, rng: Random) -> Problem:
    """A problem whose answer is y, with a text that is not yet in `taken`; adds its text there.

    Some lectures and solutions are empty, as in the real data set. ValueError says that the kind has no text left.
    """
    x, choices = rng.choice(kind.facts[y].split(", ")), kind.choices(y)
    text = next((text for text in texts(kind, x, rng) if text not in taken), None)
    if text is None:
        raise ValueError(f"{kind.skill}: all texts about {x} are taken; ask for fewer problems")
    taken.add(text)
    question, hint = text
    return Problem({
        "question": question, "choices": choices, "answer": choices.index(y), "hint": hint,
        "image": "image.png" if kind.draw else None, "task": kind.task, "grade": f"grade{rng.randint(*kind.grades)}",
        "subject": kind.subject, "topic": kind.topic, "category": kind.topic.replace("-", " ").capitalize(),
        "skill": kind.skill, "lecture": kind.lecture if rng.random() < 0.9 else "",
        "solution": kind.solution.format(x=x, y=y) if rng.random() < 0.9 else "", "split": split}, kind, x)


def split_evenly(n: int, parts: int) -> list[int]:
    """Returns n as a sum of `parts` integers that differ by at most one."""
    return [(n * (i + 1)) // parts - (n * i) // parts for i in range(parts)]


def make_problems(sizes: dict[str, int], seed: int) -> dict[str, Problem]:
    """The problems by id, which mixes kinds and splits. A split has all answers of a kind equally often."""
    rng, taken, problems = Random(seed), set(), []
    for split, size in sizes.items():
        n_pictures = round(PICTURE_FRACTION * size)
        for has_picture, n in ((True, n_pictures), (False, size - n_pictures)):
            kinds = [kind for kind in KINDS if bool(kind.draw) == has_picture]
            for kind, n_problems in zip(kinds, split_evenly(n, len(kinds)), strict=True):
                answers = cycle(rng.sample(list(kind.facts), len(kind.facts)))
                problems += [make_problem(kind, y, split, taken, rng) for y in islice(answers, n_problems)]
    rng.shuffle(problems)
    return {str(i): problem for i, problem in enumerate(problems, 1)}


def write_mini_scienceqa(out: Path, sizes: dict[str, int], seed: int) -> dict[str, Problem]:
    """Writes the data set, and returns its problems by id."""
    problems = make_problems(sizes, seed)

    def write_picture(qid: str, path: Path) -> None:
        problems[qid].kind.picture(problems[qid].x, Random(f"{seed} {qid}")).save(path, format="png")

    write_scienceqa(out, {qid: problem.fields for qid, problem in problems.items()},
                    {qid: problem.caption for qid, problem in problems.items() if problem.kind.draw}, write_picture)
    return problems


def main(args: Flags) -> None:
    make_folder(args.out)
    problems = write_mini_scienceqa(args.out, SIZES, args.seed)
    n_pictures = sum(bool(problem.kind.draw) for problem in problems.values())
    sizes = ", ".join(f"{size} {split}" for split, size in SIZES.items())
    print(f"{args.out}: {counted(len(problems), 'problem')} ({sizes}), {n_pictures} with a picture")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
