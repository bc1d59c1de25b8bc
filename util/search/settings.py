"""The flags of search.py name the study and say how its trials are made, and what they may cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from lavin.runtime.flags import FlagGroup, Parser, Role, flag
from lavin.runtime.schema import Count, FileName, Positive, Text

SPACE = Path(__file__).parents[2] / "scripts" / "search_space.json"


@dataclass(frozen=True)
class Search(FlagGroup):
    """The study, and how trials are chosen, ended early and confirmed."""

    title: ClassVar[str] = "search"
    study: Path = flag(None, "the study's folder, shared by all workers", Role.RUN, required=True)
    trials: Count = flag(64, "number of trials", Role.RECIPE)
    space: FileName = flag(str(SPACE), "JSON file of the flags to search and their ranges", Role.RECIPE)
    storage: Text | None = flag(
        None, "address of a database for many nodes (default: a journal file in the folder)", Role.EXECUTION)
    pruner: str = flag(
        "asha", "ends trials early, at scores within the full schedule: all but the best third, or those below the "
        "median", Role.RECIPE, choices=("asha", "median", "none"))
    questions: Count = flag(1000, "questions of the validation split that trials are scored on", Role.DATA)
    confirm: Annotated[int, Field(ge=0, le=1000)] = flag(
        3, "best configurations to run again with fresh seeds, beside the base; 0: none, and no winner", Role.RECIPE)
    seeds: Count = flag(3, "fresh seeds of each of these configurations", Role.RECIPE)
    gpus: Count = flag(1, "GPUs of one trial, by torchrun", Role.EXECUTION)
    gpu_hours: Positive | None = flag(None, "stop when all workers together have used them", Role.EXECUTION)
    train: list[str] | None = flag(None, "flags of train.py for all trials", Role.RECIPE, positional=True, nargs="*",
                                   metavar="-- FLAG")


def get_args_parser() -> Parser:
    return Parser("search.py", "Searches hyperparameters on validation.", Search)
