"""The flags of plot_results.py: which runs are compared, and what is made of the comparison."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from lavin.runtime.flags import FlagGroup, Parser, Role, flag
from lavin.runtime.schema import PathText
from util.comparison.methods import BASE_IN_WORDS
from util.trackers import Names


@dataclass(frozen=True)
class Plots(FlagGroup):
    """The runs, and what is drawn of them."""

    title: ClassVar[str] = "comparison"
    runs: list[str] = flag((), "a run's folder, or a folder of runs; or a study of search.py", Role.RUN,
                           positional=True, nargs="*", metavar="RUN")
    base: PathText | None = flag(
        None, f"the run that others are compared to (default: the one with {BASE_IN_WORDS})", Role.DISPLAY,
        metavar="RUN")
    published: bool = flag(False, "add the published runs to the comparison", Role.DISPLAY)
    plan: Annotated[float, Field(gt=0, lt=100)] | None = flag(
        None, "only print how many seeds and questions a difference of this size needs, by these runs", Role.DISPLAY,
        metavar="POINTS")
    report_to: Names = flag("", "trackers that get the figures: tensorboard, wandb, mlflow, with commas between them",
                            Role.DISPLAY)
    out: PathText = flag("plots", "folder of figures and tables", Role.DISPLAY)


def get_args_parser() -> Parser:
    return Parser("plot_results.py", "Compares runs; without an argument, the published eight methods.", Plots)
