"""The flags of demo.py: which runs answer, how the page is served, and how answers are chosen."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from lavin.runtime.flags import FlagGroup, Parser, Role, flag
from lavin.runtime.schema import Count, FileName, Fraction, NonNegative, PathText
from util.chat.address import Credentials
from util.flags import SHARED

SMOLLM2_RUNS = "runs/smollm2"  # where scripts/quickstart_smollm2.sh writes


@dataclass(frozen=True)
class Runs(FlagGroup):
    """The runs that answer."""

    title: ClassVar[str] = "runs"
    runs: FileName | None = flag(
        None, f"folder of finished runs, one of them, or a checkpoint (default: {SMOLLM2_RUNS} where it has any, "
        "else .)", Role.RUN, aliases=("--adapter_path",))
    tokenizer_path: PathText | None = flag(None, "tokenizer.model (default: the base model's)", Role.MODEL)


@dataclass(frozen=True)
class Page(FlagGroup):
    """The page or the terminal in which people talk to the runs."""

    title: ClassVar[str] = "page"
    cli: bool = flag(False, "in the terminal", Role.DISPLAY)
    share: bool = flag(False, "a public link through gradio.live; else this machine alone can connect", Role.DISPLAY)
    server_name: FileName = flag(
        "127.0.0.1", "address of this machine that the page listens on; others can connect to any but 127.0.0.1, which "
        "needs --auth", Role.DISPLAY)
    port: Annotated[int, Field(ge=1, le=65535)] | None = flag(
        None, "port of the page (default: the first free one from 7860)", Role.DISPLAY, aliases=("--server_port",))
    auth: Credentials | None = flag(None, "who may use the page", Role.DISPLAY, metavar="USER:PASSWORD")


@dataclass(frozen=True)
class Sampling(FlagGroup):
    """The way that answers are chosen, until a user changes it."""

    title: ClassVar[str] = "answers"
    generation_temperature: NonNegative = flag(0.0, "initial sampling temperature; 0: greedy", Role.RECIPE)
    top_p: Fraction = flag(0.75, "initial threshold of nucleus sampling", Role.RECIPE)
    max_new_tokens: Count = flag(128, "initial limit on the length of an answer", Role.RECIPE)
    options: list[str] | None = flag(None, "published flag, without effect", Role.EXECUTION, nargs="+")


def get_args_parser() -> Parser:
    return Parser("demo.py", "Talk to finished runs, in the browser or in the terminal.", Runs, Page, Sampling, *SHARED,
                  epilog="Flags of the model and the data that are left out are those of the runs.")
