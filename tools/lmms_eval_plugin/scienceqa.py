"""ScienceQA as eval.py asks it, for the tasks of lmms-eval in this folder's YAML files.

A document is a row of the hub's copy: image, question, choices, answer, hint, lecture, solution and others.
"""

from typing import Any

from util.data.prompts import answer_text, build_prompt
from util.evaluation.answers import parse_answer


def pictures(doc: dict[str, Any]) -> list[Any]:
    return [] if doc["image"] is None else [doc["image"]]


def prompt(doc: dict[str, Any], settings: dict[str, str]) -> str:
    """The prompt of training. settings: the entry lmms_eval_specific_kwargs of the YAML file."""
    return build_prompt(doc, settings["prompt_format"])[0]


def options(doc: dict[str, Any]) -> list[str]:
    """The answers up to the letter, so that they differ in one token, as those that eval.py --decode score compares."""
    return [answer_text(i).removesuffix(".") for i in range(len(doc["choices"]))]


def target(doc: dict[str, Any]) -> str:
    return answer_text(doc["answer"])


def is_right(doc: dict[str, Any], texts: list[str]) -> dict[str, float]:
    return {"exact_match": float(parse_answer(texts[0], len(doc["choices"])) == doc["answer"])}
