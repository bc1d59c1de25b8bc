"""Writes all_data.json, for instruction tuning, from the files of Alpaca and LLaVA-Instruct.

    python -m tools.data_processing [--data_root ../data] [--out ../data/all_data.json]

Reads those of alpaca_data.json, complex_reasoning_77k.json, detail_23k.json and conversation_58k.json that exist.
Writes their records under `all`, as published: `instruction` (the whole prompt), `answer`, `image` (None, or the name
of a file in COCO), `image_source` and `qid`. Each question of a conversation becomes one record. Malformed records are
reported, counted and left out.

Alpaca: Taori et al. 2023; LLaVA-Instruct: Liu et al. 2023, arXiv 2304.08485.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lavin.runtime.console import counted
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.files import PUT_IT_THERE, load_json, write_json
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import is_plain_name
from util.data.prompts import instruction_prompt

ALPACA = "alpaca_data.json"
LLAVA = ("complex_reasoning_77k.json", "detail_23k.json", "conversation_58k.json")
MAX_REPORTED = 10  # malformed records that are reported one by one; the others are only counted


@dataclass(frozen=True)
class Files(FlagGroup):
    """The files that are read and written."""

    title: ClassVar[str] = "files"
    data_root: Path = flag(Path("../data"), "folder of the files", Role.DATA)
    out: Path | None = flag(None, "the file to write (default: all_data.json in --data_root)", Role.RUN)


def get_args_parser() -> Parser:
    return Parser("-m tools.data_processing", __doc__, Files)


def record(qid: str, question: str, answer: str, image: str | None, context: str = "") -> dict:
    """Raises ValueError where a part is not text, or the question or the answer is empty."""
    for name, text in (("question", question), ("answer", answer), ("input", context)):
        if not isinstance(text, str):
            raise ValueError(f"its {name} is no text")
    if not question.strip() or not answer.strip():
        raise ValueError("its question or answer is empty")
    return {"instruction": instruction_prompt(question.strip(), context.strip()), "answer": answer.strip(),
            "image": image, "image_source": image and "mscoco", "qid": qid}


def alpaca_records(item: dict, number: int) -> list[dict]:
    return [record(f"alpaca_{number}", item["instruction"], item["output"], None, item.get("input", ""))]


def llava_records(item: dict, number: int, source: str) -> list[dict]:
    """One record for each question of a conversation and its answer."""
    image, turns = item["image"], item["conversations"]
    if not isinstance(image, str) or not is_plain_name(image):
        raise ValueError("its image is not a file name")
    if not turns or len(turns) % 2 or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("its turns do not alternate between human and gpt")
    return [record(f"{source}_{number}_{i}", question["value"].replace("<image>", ""), answer["value"], image)
            for i, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True))]


def read_list(path: Path) -> list:
    items = load_json(path, PUT_IT_THERE, "fetch it again")
    if not isinstance(items, list):
        raise UserError(f"{path} holds no list of records: fetch it again")
    return items


def records_of(path: Path) -> Iterator[tuple[list[dict], str]]:
    """Yields, for each item of a file, its records and an empty string, or no records and what is wrong with the
    item."""
    for number, item in enumerate(read_list(path)):
        try:
            if path.name == ALPACA:
                yield alpaca_records(item, number), ""
            else:
                yield llava_records(item, number, path.stem), ""
        except KeyError as error:
            yield [], f"{path.name}, record {number}: lacks {error.args[0]}"
        except (ValueError, TypeError, AttributeError) as error:
            yield [], f"{path.name}, record {number}: {error}"


def process(data_root: Path, out: Path) -> tuple[int, list[str]]:
    """Writes `out`; returns the number of its records, and one line about each item that was left out."""
    paths = [path for name in (ALPACA, *LLAVA) if (path := data_root / name).is_file()]
    if not paths:
        raise UserError(f"{data_root} has none of {', '.join((ALPACA, *LLAVA))}: put them there, "
                        "or name their folder with --data_root")
    all_records, errors = [], []
    for path in paths:
        n_records, n_errors = len(all_records), len(errors)
        for records, error in records_of(path):
            all_records += records
            errors += [error] if error else []
        print(f"{path}: {counted(len(all_records) - n_records, 'record')}, {len(errors) - n_errors} malformed")
    if not all_records:
        raise UserError(f"{data_root} has no valid record: {errors[0] if errors else 'its files are empty'}")
    write_json(out, {"all": all_records})
    return len(all_records), errors


def main(args: Flags) -> None:
    out = args.out or args.data_root / "all_data.json"
    n_records, errors = process(args.data_root, out)
    for error in errors[:MAX_REPORTED]:
        print(f"left out: {error}")
    if len(errors) > MAX_REPORTED:
        print(f"left out: {len(errors) - MAX_REPORTED} more")
    print(f"{counted(n_records, 'record')}, {len(errors)} left out: {out}")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
