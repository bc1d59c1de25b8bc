"""The flags of eval.py and eval_mme.py: what is scored, on which questions, and how answers are chosen."""

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

from lavin.runtime.errors import UserError
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag, flags_of
from lavin.runtime.schema import Count, FileName, Fraction, NonNegative, PathText, Seed, Text
from util.flags import INHERITED, SHARED
from util.training.resume import finished_run


@dataclass(frozen=True)
class Scored(FlagGroup):
    """The run that is scored, and where its results go."""

    title: ClassVar[str] = "what is scored"
    adapter_path: FileName | None = flag(None, "a checkpoint, or a run's folder (without it: the untuned base)",
                                         Role.RUN)
    output_dir: FileName | None = flag(
        None, "folder for the results (default: that of the run; for an early checkpoint, one inside it)", Role.RUN)
    tokenizer_path: PathText | None = flag(None, "tokenizer.model (default: the base model's)", Role.MODEL)
    trained_with: list[str] | None = flag(
        None, "the run that train.py writes with these flags, in place of --adapter_path; comes last", Role.RUN,
        nargs=argparse.REMAINDER, metavar="FLAG")


@dataclass(frozen=True)
class Questions(FlagGroup):
    """The questions of ScienceQA that are asked."""

    title: ClassVar[str] = "questions"
    split: Text = flag("test", "split of pid_splits.json", Role.DATA)
    questions: Count | None = flag(
        None, "answer this many of the split's questions, always the same ones (default: all)", Role.DATA)


SAMPLING = ("generation_temperature", "top_p", "seed")  # flags without effect on greedy answers and compared options


@dataclass(frozen=True)
class Generation(FlagGroup):
    """The way that answers are written out."""

    title: ClassVar[str] = "answers"
    max_batch_size: Count = flag(64, "questions per batch", Role.EXECUTION)
    generation_temperature: NonNegative = flag(0.0, "sampling temperature; 0: greedy decoding", Role.RECIPE)
    top_p: Fraction = flag(0.75, "nucleus of sampling, used when the temperature is not 0", Role.RECIPE)
    seed: Seed = flag(0, "sampling seed", Role.RECIPE)

    def samples(self) -> bool:
        return self.generation_temperature > 0

    def identity(self) -> dict[str, Any]:
        """The flags that determine the answers: all of role RECIPE, but those of sampling where nothing is sampled."""
        return {name: getattr(self, name) for name, declared in flags_of(type(self)).items()
                if declared.role is Role.RECIPE and (self.samples() or name not in SAMPLING)}


@dataclass(frozen=True)
class Answering(Generation):
    """The way that answers are chosen: written out, or among the options."""

    decode: str = flag(
        "generate", "generate the answer's text, or compare the option letters' probabilities in one pass", Role.RECIPE,
        choices=("generate", "score"))

    def samples(self) -> bool:
        return self.decode == "generate" and super().samples()


@dataclass(frozen=True)
class MME(FlagGroup):
    """The data of MME."""

    title: ClassVar[str] = "MME"
    mme_root: PathText | None = flag(None, "folder of MME's subtasks (default: mme in --data_root)", Role.DATA,
                                 aliases=("--root_dir_",))
    options: list[str] | None = flag(None, "published flag, without effect", Role.EXECUTION, nargs="+")
    split: Text | None = flag(None, "published flag, without effect", Role.EXECUTION)


def scienceqa_parser() -> Parser:
    return Parser("eval.py", "Scores a run on ScienceQA.", Scored, Questions, Answering, *SHARED, epilog=INHERITED)


def mme_parser() -> Parser:
    return Parser("eval_mme.py", "Scores a run on MME.", MME, Scored, Generation, *SHARED, epilog=INHERITED)


def take_run(args: Flags) -> None:
    """Sets --adapter_path to the run that train.py writes with the flags of --trained_with. Raises UserError where the
    run is unfinished."""
    if args.trained_with is None:
        return
    if args.adapter_path:
        raise UserError("--trained_with names a run, and so does --adapter_path: leave one out")
    args.adapter_path = finished_run(args.trained_with)
