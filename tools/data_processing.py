"""Writes all_data.json, for instruction tuning, from Alpaca's and LLaVA-Instruct's files.

    python tools/data_processing.py [--data_root ../data] [--out ../data/all_data.json]

Reads alpaca_data.json, complex_reasoning_77k.json, detail_23k.json and conversation_58k.json, those that are there.
A record is `instruction` (the whole prompt), `answer`, `image` (None, or a file's name in COCO), `image_source` and
`qid`, under `all`, as published. Each question of a
conversation is a record of its own. Malformed records are named, counted and left out.

Alpaca: Taori et al. 2023; LLaVA-Instruct: Liu et al. 2023, arXiv 2304.08485.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lavin.errors import UserError, one_line_errors  # noqa: E402
from util.files import write_json  # noqa: E402
from util.prompts import instruction_prompt  # noqa: E402

ALPACA = "alpaca_data.json"
LLAVA = ("complex_reasoning_77k.json", "detail_23k.json", "conversation_58k.json")
NAMED = 10  # malformed records told one by one; the others are counted


def record(qid: str, question: str, answer: str, image: str | None, context: str = "") -> dict:
    """Raises ValueError where a part is no text, or question or answer is empty."""
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
    """Of a conversation, each question with its answer."""
    image, turns = item["image"], item["conversations"]
    if not isinstance(image, str) or not image:
        raise ValueError("its image is no file's name")
    if not turns or len(turns) % 2 or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError("its turns are not human and gpt by turns")
    return [record(f"{source}_{number}_{i}", question["value"].replace("<image>", ""), answer["value"], image)
            for i, (question, answer) in enumerate(zip(turns[::2], turns[1::2]))]


def read_list(path: Path) -> list:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(items, list):
        raise UserError(f"{path} holds no list of records: fetch it again")
    return items


def records_of(path: Path) -> Iterator[tuple[list[dict], str]]:
    """For each item of a file: its records, or none and what is wrong with it."""
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
    """Writes `out`; returns the number of its records, and a line on each record left out."""
    paths = [path for name in (ALPACA, *LLAVA) if (path := data_root / name).is_file()]
    if not paths:
        raise UserError(f"{data_root} has none of {', '.join((ALPACA, *LLAVA))}: put them there, "
                        "or name their folder with --data_root")
    everything, wrong = [], []
    for path in paths:
        before = len(everything), len(wrong)
        for found, reason in records_of(path):
            everything += found
            wrong += [reason] if reason else []
        print(f"{path}: {len(everything) - before[0]} records, {len(wrong) - before[1]} malformed")
    if not everything:
        raise UserError(f"no record of {data_root} is whole; the first: {wrong[0] if wrong else 'there is none'}")
    write_json(out, {"all": everything})
    return len(everything), wrong


def main() -> None:
    parser = argparse.ArgumentParser("data_processing.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", default="../data", type=Path, help="folder of the files (../data)")
    parser.add_argument("--out", type=Path, help="all_data.json, to be written (in --data_root)")
    args = parser.parse_args()
    out = args.out or args.data_root / "all_data.json"
    n, wrong = process(args.data_root, out)
    for line in wrong[:NAMED]:
        print(f"left out: {line}")
    if len(wrong) > NAMED:
        print(f"left out: {len(wrong) - NAMED} more")
    print(f"{n} records, {len(wrong)} left out: {out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
