"""MME (Fu et al. 2023, arXiv 2306.13394): reads its folders, parses answers by its official rule, computes its scores.

Each image has two questions, one with the answer yes and one with the answer no. A subtask's accuracy is the percentage
of correctly answered questions, accuracy+ the percentage of images with both questions correct, the score their sum.
"""

from dataclasses import dataclass
from pathlib import Path

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_lines
from lavin.runtime.schema import shown

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")
N_CHARACTERS = 4  # of an answer, in which the official rule looks for yes or no


@dataclass(frozen=True)
class Pair:
    """An image with its two questions and their answers, `yes` or `no`."""

    subtask: str
    picture: Path
    questions: tuple[str, str]
    answers: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{self.subtask}/{self.picture.name}"


def load_mme(root: str) -> list[Pair]:
    """All images of the subtasks in `root`, in the order of SUBTASKS.

    A subtask's folder holds images and text files together, or in images/ and questions_answers_YN/. Raises UserError
    where there is no subtask, and for a text file without an image or without two lines `question<TAB>Yes|No`.
    """
    pairs = []
    for subtask in SUBTASKS:
        folder = Path(root, subtask)
        text_folder, image_folder = folder / "questions_answers_YN", folder / "images"
        if not text_folder.is_dir():
            text_folder = image_folder = folder
        pairs += [read_pair(subtask, path, image_folder) for path in sorted(text_folder.glob("[!.]*.txt"))]
    if not pairs:
        raise UserError(f"{root} has none of MME's subtasks ({', '.join(SUBTASKS[:3])}, ...): "
                        "name its folder with --mme_root")
    return pairs


def read_questions(path: Path) -> list[tuple[str, str]]:
    """The two questions of a text file, each with its answer, `yes` or `no`."""
    try:
        lines = list(read_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): fetch it again, or save it as UTF-8") from error
    lines[:1] = [line.removeprefix("\ufeff") for line in lines[:1]]
    questions = [read_line(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if len(questions) != 2:
        raise UserError(f"{path} is not two lines of question, tab, and Yes or No: fetch it again")
    return questions


def read_line(line: str, source: str) -> tuple[str, str]:
    question, _, answer = line.rstrip().rpartition("\t")
    if not question.strip():
        raise UserError(f"{source} is not question, tab, and Yes or No: fetch it again")
    if answer.strip().lower() not in ("yes", "no"):
        raise UserError(f"{source} has the answer {shown(answer)}, not Yes or No: fetch it again")
    return question, answer.strip().lower()


def read_pair(subtask: str, path: Path, image_folder: Path) -> Pair:
    questions, answers = zip(*read_questions(path), strict=True)
    candidates = [image_folder / (path.stem + suffix) for suffix in SUFFIXES]
    picture = next((candidate for candidate in candidates if candidate.is_file()), None)
    if picture is None:
        raise UserError(f"{path} has no picture {image_folder / path.stem}.jpg or .png: put it there "
                        "(some subtasks' pictures are downloaded separately)")
    return Pair(subtask, picture, questions, answers)


def read_answer(text: str) -> str:
    """`yes`, `no`, or `other`, by the official rule: the word found in the first four characters."""
    start = text.strip().lower()[:N_CHARACTERS]
    return next((word for word in ("yes", "no") if word in start), "other")


def is_decided(text: str) -> bool:
    """Whether the result of `read_answer` cannot change however the text continues."""
    return read_answer(text) != "other" or len(text.lstrip()) >= N_CHARACTERS


def score(answers: list[dict]) -> dict:
    """The scores of each subtask, and their sums over the perception and the cognition subtasks.

    answers: dicts with `subtask`, `picture`, `answer` and `prediction` (the result of `read_answer`); the prediction
    `other` counts as wrong. A sum is None where one of its subtasks is missing.
    """
    subtasks = {}
    for subtask in SUBTASKS:
        subtask_answers = [answer for answer in answers if answer["subtask"] == subtask]
        if not subtask_answers:
            continue
        correct = [answer["prediction"] == answer["answer"] for answer in subtask_answers]
        both_correct = {answer["picture"]: True for answer in subtask_answers}
        for answer, is_correct in zip(subtask_answers, correct, strict=True):
            both_correct[answer["picture"]] &= is_correct
        accuracy, plus = 100 * sum(correct) / len(correct), 100 * sum(both_correct.values()) / len(both_correct)
        subtasks[subtask] = {"accuracy": accuracy, "accuracy+": plus, "score": accuracy + plus,
                             "questions": len(subtask_answers),
                             "other": sum(answer["prediction"] == "other" for answer in subtask_answers)}
    return {"subtasks": subtasks, "perception": total(subtasks, PERCEPTION), "cognition": total(subtasks, COGNITION)}


def total(subtasks: dict, names: tuple[str, ...]) -> float | None:
    return sum(subtasks[name]["score"] for name in names) if all(name in subtasks for name in names) else None
