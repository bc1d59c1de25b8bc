"""MME (Fu et al. 2023, arXiv 2306.13394): its folders, its rule for reading an answer, its scores.

Each picture has two questions, one whose answer is yes and one whose answer is no. Of a subtask, accuracy is the
percentage of questions answered right, accuracy+ that of pictures with both right, and the score their sum.
"""

from dataclasses import dataclass
from pathlib import Path

from lavin.errors import UserError

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
SUFFIXES = (".jpg", ".png", ".jpeg")
DECIDING = 4  # characters, in which the official rule looks for yes or no


@dataclass(frozen=True)
class Pair:
    """A picture with its two questions and their answers, `yes` or `no`."""

    subtask: str
    picture: Path
    questions: tuple[str, str]
    answers: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{self.subtask}/{self.picture.name}"


def load_mme(root: str) -> list[Pair]:
    """All pictures of the subtasks that are there, in the order of SUBTASKS.

    A subtask's folder holds both pictures and texts, or images/ and questions_answers_YN/. Raises UserError where there
    is no subtask, and for a text without a picture or without two lines `question<TAB>Yes|No`.
    """
    pairs = []
    for subtask in SUBTASKS:
        folder = Path(root, subtask)
        texts, pictures = folder / "questions_answers_YN", folder / "images"
        if not texts.is_dir():
            texts = pictures = folder
        pairs += [read_pair(subtask, path, pictures) for path in sorted(texts.glob("*.txt"))]
    if not pairs:
        raise UserError(f"{root} has none of MME's subtasks ({', '.join(SUBTASKS[:3])}, ...): "
                        "name its folder with --mme_root")
    return pairs


def read_pair(subtask: str, path: Path, pictures: Path) -> Pair:
    lines = [line.rstrip().rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != 2 or any(len(line) != 2 or line[1].strip().lower() not in ("yes", "no") for line in lines):
        raise UserError(f"{path} is not two lines of question, tab, and Yes or No: fetch it again")
    picture = next((found for suffix in SUFFIXES if (found := pictures / (path.stem + suffix)).is_file()), None)
    if picture is None:
        raise UserError(f"{path} has no picture {pictures / path.stem}.jpg or .png: put it there "
                        "(some subtasks' pictures are fetched apart from their texts)")
    questions, answers = zip(*lines)
    return Pair(subtask, picture, questions, tuple(answer.strip().lower() for answer in answers))


def read_answer(text: str) -> str:
    """`yes`, `no`, or `other`, as the official tool reads it: whichever stands in the first four characters."""
    start = text.strip().lower()[:DECIDING]
    return next((word for word in ("yes", "no") if word in start), "other")


def is_told(text: str) -> bool:
    """Whether no further text can change what `read_answer` reads."""
    return read_answer(text) != "other" or len(text.lstrip()) >= DECIDING


def score(answers: list[dict]) -> dict:
    """Of answers with `subtask`, `picture`, `answer` and `prediction` (from read_answer): what each subtask scored.

    `other` counts as wrong. A sum is None where one of its subtasks is missing.
    """
    subtasks = {}
    for subtask in SUBTASKS:
        own = [answer for answer in answers if answer["subtask"] == subtask]
        if not own:
            continue
        right = [answer["prediction"] == answer["answer"] for answer in own]
        pictures = {answer["picture"]: True for answer in own}
        for answer, is_right in zip(own, right):
            pictures[answer["picture"]] &= is_right
        accuracy, plus = 100 * sum(right) / len(right), 100 * sum(pictures.values()) / len(pictures)
        subtasks[subtask] = {"accuracy": accuracy, "accuracy+": plus, "score": accuracy + plus, "questions": len(own),
                             "other": sum(answer["prediction"] == "other" for answer in own)}
    return {"subtasks": subtasks, "perception": total(subtasks, PERCEPTION), "cognition": total(subtasks, COGNITION)}


def total(subtasks: dict, names: tuple[str, ...]) -> float | None:
    return sum(subtasks[name]["score"] for name in names) if all(name in subtasks for name in names) else None
