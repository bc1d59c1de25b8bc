"""Writes the mini ScienceQA: invented problems in ScienceQA's layout, with images that are needed for the answer.

    python -m tools.make_mini_scienceqa [--out data/mini] [--seed 0]

Writes problems.json, pid_splits.json, captions.json and images/{split}/{id}/image.png, as in ScienceQA (Lu et al. 2022,
arXiv 2209.09513). The same seed gives the same problems and pixels. No problem is in two splits.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from collections.abc import Iterator
from pathlib import Path
from random import Random

from lavin.runtime.errors import one_line_errors
from lavin.runtime.flags import Parser, parse_as
from lavin.runtime.schema import Seed
from tools.mini_pictures import Canvas
from tools.mini_questions import PICTURE_SKILLS, TEXT_SKILLS, Problem, Skill, make_problem
from tools.output import make_folder, write_scienceqa

SIZES = {"train": 2000, "val": 120, "test": 400}
IMAGE_FRACTION = 0.45  # of problems that have an image
MAX_ATTEMPTS = 1000  # to find a problem that no split has yet


def cycle_facts(skill: Skill, rng: Random) -> Iterator[tuple[str, str]]:
    """All facts, endlessly, reshuffled in every round, so that each is asked about equally often."""
    while True:
        yield from rng.sample(skill.facts, len(skill.facts))


def new_problems(skill: Skill, n: int, taken: set, rng: Random) -> list[Problem]:
    """n problems whose keys are not in `taken`; adds their keys to it.

    Raises ValueError where the skill's tables do not give that many.
    """
    problems, facts = [], cycle_facts(skill, rng)
    for _ in range(n):
        fact = next(facts)
        candidates = (make_problem(skill, fact, rng) for _ in range(MAX_ATTEMPTS))
        problem = next((problem for problem in candidates if problem.key not in taken), None)
        if problem is None:
            raise ValueError(f"{skill.name}: no new problem about {fact} after {len(problems)}; ask for fewer")
        taken.add(problem.key)
        problems.append(problem)
    return problems


def split_evenly(n: int, parts: int) -> list[int]:
    """n as a sum of `parts` integers that differ by at most one."""
    return [(n * (i + 1)) // parts - (n * i) // parts for i in range(parts)]


def make_problems(sizes: dict[str, int], seed: int) -> dict[str, tuple[str, Problem]]:
    """id -> (split, problem), in the order of ids; the splits are mixed."""
    rng, taken, items = Random(seed), set(), []
    for split, size in sizes.items():
        n_images = round(IMAGE_FRACTION * size)
        for skills, n in ((PICTURE_SKILLS, n_images), (TEXT_SKILLS, size - n_images)):
            for skill, n_problems in zip(skills, split_evenly(n, len(skills)), strict=True):
                items += [(split, problem) for problem in new_problems(skill, n_problems, taken, rng)]
    rng.shuffle(items)
    return {str(i): item for i, item in enumerate(items, 1)}


def record(split: str, problem: Problem) -> dict:
    """The 14 fields of problems.json."""
    skill = problem.skill
    return {"question": problem.question, "choices": list(problem.choices), "answer": problem.answer,
            "hint": problem.hint, "image": "image.png" if skill.draw else None, "task": skill.task,
            "grade": problem.grade, "subject": skill.subject, "topic": skill.topic, "category": skill.category,
            "skill": skill.name, "lecture": problem.lecture, "solution": problem.solution, "split": split}


def draw(problem: Problem, qid: str, seed: int):
    """The picture of a problem whose skill has one."""
    assert problem.skill.draw
    canvas = Canvas(Random(f"{seed} {qid}"))
    problem.skill.draw(canvas, **problem.scene)
    return canvas.finish()


def write_mini_scienceqa(out: Path, sizes: dict[str, int], seed: int) -> dict[str, tuple[str, Problem]]:
    """Returns the problems."""
    problems = make_problems(sizes, seed)
    captions = {qid: problem.caption for qid, (_, problem) in problems.items() if problem.skill.draw}
    write_scienceqa(out, {qid: record(*item) for qid, item in problems.items()}, captions,
                    lambda qid, path: draw(problems[qid][1], qid, seed).save(path, format="png"))
    return problems


def main() -> None:
    parser = Parser("make_mini_scienceqa.py", __doc__)
    parser.add_argument("--out", default="data/mini", type=Path, help="folder to write (data/mini)")
    parser.add_argument("--seed", default=0, type=parse_as(Seed))
    args = parser.parse_args()
    make_folder(args.out)
    problems = write_mini_scienceqa(args.out, SIZES, args.seed)
    n_images = sum(bool(problem.skill.draw) for _, problem in problems.values())
    sizes = ", ".join(f"{size} {split}" for split, size in SIZES.items())
    print(f"{args.out}: {len(problems)} problems ({sizes}), {n_images} with a picture")


if __name__ == "__main__":
    with one_line_errors():
        main()
