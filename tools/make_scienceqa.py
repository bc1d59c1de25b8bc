"""Makes ScienceQA's files of your own multiple-choice questions.

    python -m tools.make_scienceqa questions.csv --out ../mine

Reads CSV, JSON Lines, a JSON list, LLaVA's conversations, Parquet, and a folder that the package datasets has saved.
Each row is a question: question, choices, answer; if you have them image, hint, lecture, solution, category, topic,
skill, grade, subject, split, group, id. Rows that are wrong are reported, counted and left out. Rows without a split
are divided: those of one group, or of one picture, go to the same split.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import csv
import hashlib
import io
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from lavin.runtime.console import BAR_SECONDS, counted, progress_bar
from lavin.runtime.errors import UsageError, UserError, first_line, one_line_errors
from lavin.runtime.files import (
    PUT_IT_THERE,
    WRITE_IT_AGAIN,
    load_json,
    parse_json,
    read_json_lines,
    read_text,
    sha256,
    write_json,
)
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import Probability, is_plain_name, validate
from tools.output import make_folder, split_ids
from util.data.datasets import DISJOINT_SPLITS, Problem
from util.data.images import IMAGE_ERRORS, image_fault, open_picture
from util.data.prompts import OPTIONS

MAX_REPORTED = 10  # wrong rows that are reported one by one
TEXTS = ("hint", "lecture", "solution")
GIVEN = ("category", "topic", "skill", "grade", "subject", "split")  # only where a row has them
SPLIT_NAMES = {"validation": "val", "dev": "val"}  # in other data sets
KNOWN_SPLITS = (*DISJOINT_SPLITS, *SPLIT_NAMES)
BATCH_ROWS = 256  # that are in memory at a time, with their pictures
OTHER_NAMES = {"context": "hint", "explanation": "solution", "options": "choices", "pid": "id", "question_id": "id",
               "label": "answer"}  # of columns, in other data sets
# an option in a conversation: (A) text, or A. text on a line of its own
OPTION = re.compile(r"\(([A-E])\)\s*(.+?)(?=\s*\([A-E]\)|\n|$)|^([A-E])[.:)]\s*(.+)$", re.MULTILINE)
LETTER = re.compile(r"(?:answer is|answer:)?\s*\(?([A-E])\)?[.)]?\s*$|answer is \(?([A-E])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Questions(FlagGroup):
    """The questions that are read, and the data set that is written."""

    title: ClassVar[str] = "data set"
    source: Path | None = flag(None, "file or folder of the questions", Role.DATA, positional=True, type=Path,
                               metavar="QUESTIONS")
    out: Path | None = flag(None, "folder to write: the --data_root of other commands", Role.RUN, required=True)
    val: Probability = flag(0.1, "fraction of the rows without a split that are for validation", Role.DATA)
    test: Probability = flag(0.2, "fraction of the rows without a split that are for tests", Role.DATA)


def get_args_parser() -> Parser:
    return Parser("-m tools.make_scienceqa", __doc__, Questions)


@dataclass
class Question:
    """A row that has been checked. picture: a copy of its file. group: rows with the same one go to one split."""

    qid: str
    problem: dict[str, Any]
    picture: Path | None
    group: str


# --- Rows ---

def read_rows(path: Path) -> Iterable[Any]:
    """The rows of a file or folder. Raises UserError where the format is none of those above, or it cannot be read."""
    if path.suffix in (".csv", ".tsv"):
        return csv.DictReader(io.StringIO(read_file(path)), delimiter="\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    if path.suffix == ".json":
        rows = load_json(path, PUT_IT_THERE, WRITE_IT_AGAIN)
        if not isinstance(rows, list):
            raise UserError(f"{path} holds no list: write the questions as a list of objects")
        return rows
    if path.suffix == ".parquet" or path.is_dir():
        return read_arrow(path)
    raise UserError(f"{path} is no .csv, .tsv, .jsonl, .json or .parquet file, and no folder: name another")


def read_file(path: Path) -> str:
    try:
        return read_text(path).removeprefix("\ufeff")  # which Excel writes first
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({first_line(error)}): {PUT_IT_THERE}") from error


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, or of all Parquet or Arrow files in a folder and its folders, each with its split.

    A file's split is what its name begins with (train-00000-of-00002.parquet), or the name of its folder, as the
    package datasets writes them.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs the package pyarrow: pip install -r requirements/parquet.txt") from error
    files = sorted(file for pattern in ("*.parquet", "*.arrow") for file in path.rglob(pattern)) or [path]
    for file in files:
        known = [name for name in (file.name.partition("-")[0], file.parent.name) if name in KNOWN_SPLITS]
        try:
            batches = (pyarrow.ipc.open_stream(file) if file.suffix == ".arrow" else
                       pyarrow.parquet.ParquetFile(file).iter_batches(BATCH_ROWS))
            for batch in batches:
                yield from ({"split": known[0] if known else "", **row} for row in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}): {WRITE_IT_AGAIN}") from error


def of_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """The question, the choices and the answer of a conversation in LLaVA's format, whose first turn lists options.

    Raises ValueError where it does not, or where the answer names none of them.
    """
    turns = row["conversations"]
    question, answer = (turns[i]["value"].replace("<image>", "").strip() for i in (0, 1))
    found = list(OPTION.finditer(question))
    if not found:
        raise ValueError("its conversation lists no options (A) ... (B) ...: tools.data_processing makes data for "
                         "instruction tuning of free questions")
    letter = LETTER.search(answer)
    text = question[:found[0].start()].strip().removesuffix("Options:").strip()
    return {**row, "question": text, "choices": [match[2] or match[4] for match in found],
            "answer": next(filter(None, letter.groups()), "") if letter else answer,
            "solution": row.get("solution") or (answer[:letter.start()].strip() if letter else "")}


# --- Fields ---

def read_choices(row: dict[str, Any]) -> list[str]:
    """From `choices`, a list, or its JSON, or text between bars (a | b | c); or from columns A, B, C and so on."""
    choices = row.get("choices")
    if isinstance(choices, str):
        choices = parse_json(choices) if choices.lstrip().startswith("[") else choices.split("|")
    if choices is None:
        choices = [row[letter] for letter in OPTIONS if str(row.get(letter, "")).strip()]
    return [str(choice).strip() for choice in choices]


def read_answer(value: Any, choices: list[str]) -> int:
    """The number of the right choice, 0 for the first, from its text, its letter, or its number."""
    text = str(value).strip()
    if not isinstance(value, int) and text in choices:
        return choices.index(text)
    if len(text) == 1 and text.upper() in OPTIONS[:len(choices)]:
        return OPTIONS.index(text.upper())
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    raise ValueError(f"answer {text!r} is neither one of the choices nor its letter or number (0 for the first)")


def copy_picture(value: Any, folder: Path, target: Path) -> Path | None:
    """Copies a picture, a path in `folder` or {"bytes": content}, to `target` with the suffix of its format; None where
    there is none. Raises ValueError for one that cannot be opened."""
    value = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if not value:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    source = "in the file" if isinstance(value, bytes) else folder / value
    try:
        if isinstance(value, bytes):
            target.write_bytes(value)
        else:
            shutil.copyfile(source, target)
        open_picture(target)
        with Image.open(target) as image:
            return target.rename(target.with_suffix(f".{(image.format or 'img').lower()}"))
    except IMAGE_ERRORS as error:
        target.unlink(missing_ok=True)
        raise ValueError(f"picture {source} {image_fault(error)}") from error


def read_question(row: dict[str, Any], number: int, folder: Path, pictures: Path) -> Question:
    """The question of a row, with its picture copied to the folder `pictures`. folder: relative paths begin there.
    Raises ValueError, KeyError, TypeError or UserError where the row is wrong."""
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    row = {OTHER_NAMES.get(name, name): value for name, value in row.items() if value is not None}
    if "conversations" in row:
        row = of_conversation(row)
    choices, qid = read_choices(row), str(row.get("id", number))
    texts = {name: str(row.get(name, "")).strip() for name in (*TEXTS, *GIVEN)}
    texts["split"] = SPLIT_NAMES.get(texts["split"], texts["split"])
    problem = {"question": str(row["question"]).strip(), "choices": choices,
               "answer": read_answer(row["answer"], choices), "image": None,
               **{name: text for name, text in texts.items() if text or name in TEXTS}}
    validate(problem, Problem, "", "")
    if not is_plain_name(qid):
        raise ValueError(f"id {qid!r} cannot be the name of a folder")
    picture = copy_picture(row.get("image"), folder, pictures / str(number))
    if picture:
        problem["image"] = f"image{picture.suffix}"
    group = str(row.get("group", "")) or (sha256(picture) if picture else qid)
    return Question(qid, problem, picture, group)


def read_questions(source: Path, pictures: Path) -> tuple[list[Question], list[str]]:
    """The questions of a file, with copies of their pictures, and a line about each row that is wrong."""
    questions, errors, folder = {}, [], source if source.is_dir() else source.parent
    for number, row in enumerate(progress_bar(read_rows(source), source.name, unit="row", delay=BAR_SECONDS), 1):
        try:
            question = read_question(row, number, folder, pictures)
            if question.qid in questions:
                raise ValueError(f"id {question.qid!r} occurs twice")
            questions[question.qid] = question
        except KeyError as error:
            errors.append(f"row {number} lacks {error.args[0]}")
        except (ValueError, TypeError, AttributeError, UserError) as error:
            errors.append(f"row {number}: {str(error).strip(': ')}")
    return list(questions.values()), errors


# --- Splits ---

def divide(questions: list[Question], val: float, test: float) -> None:
    """Gives each question without a split one of train, val and test, of which the last two get about these fractions
    of the groups. It is the same one each time, whatever their order and number."""
    for question in questions:
        if "split" not in question.problem:
            place = int(hashlib.sha256(question.group.encode()).hexdigest()[:12], 16) / 16**12  # in [0, 1)
            question.problem["split"] = "test" if place < test else "val" if place < test + val else "train"


def shared_groups(questions: list[Question]) -> int:
    """The number of groups, or pictures, that several of the given splits share."""
    splits = defaultdict(set)
    for question in questions:
        splits[question.group].add(question.problem["split"])
    return sum(len(of_group) > 1 for of_group in splits.values())


def write_questions(out: Path, questions: list[Question]) -> None:
    for question in questions:
        if question.picture:
            path = out / "images" / question.problem["split"] / question.qid / question.problem["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            question.picture.rename(path)
    problems = {question.qid: question.problem for question in questions}
    write_json(out / "pid_splits.json", split_ids(problems))
    write_json(out / "problems.json", problems)


def make_scienceqa(source: Path, out: Path, val: float, test: float) -> tuple[list[Question], list[str]]:
    """Returns the questions that were written, and a line about each row that was left out."""
    if (out / "images").exists() or (out / "problems.json").exists():
        raise UserError(f"--out {out} holds data already: name another folder, or remove it")
    pictures = out / ".pictures"
    shutil.rmtree(pictures, ignore_errors=True)  # of a process that was killed
    try:
        questions, errors = read_questions(source, pictures)
        if not questions:
            raise UserError(f"{source} has no question that is right: {errors[0] if errors else 'it is empty'}")
        divide(questions, val, test)
        write_questions(out, questions)
    finally:
        shutil.rmtree(pictures, ignore_errors=True)
    return questions, errors


def main(args: Flags) -> None:
    if args.val + args.test >= 1:
        raise UsageError(f"--val {args.val:g} and --test {args.test:g} leave nothing to train on: lower one")
    make_folder(args.out)
    questions, errors = make_scienceqa(args.source, args.out, args.val, args.test)
    for error in errors[:MAX_REPORTED]:
        print(f"left out: {error}")
    if len(errors) > MAX_REPORTED:
        print(f"left out: {len(errors) - MAX_REPORTED} more")
    if shared := shared_groups(questions):
        print(f"warning: several splits share a group or a picture ({shared:,} in all), so that a model may know test "
              "questions' pictures from training")
    sizes = Counter(question.problem["split"] for question in questions)
    for split in ("train", "test"):
        if not sizes[split]:
            print(f"warning: no question is in split {split}: write more rows, or a column split")
    n_pictures = sum(question.picture is not None for question in questions)
    print(f"{args.out}: {counted(len(questions), 'question')} ("
          + ", ".join(f"{n:,} {split}" for split, n in sizes.items())
          + f"), {n_pictures:,} with a picture; {counted(len(errors), 'row')} left out")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
