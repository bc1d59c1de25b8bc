"""The flags of data: which examples a model sees, and in which form."""

from dataclasses import dataclass
from typing import ClassVar

from lavin.runtime.flags import FlagGroup, Role, flag
from lavin.runtime.schema import Count, PathText
from util.data.prompts import PROMPT_FORMATS


@dataclass(frozen=True)
class DataSettings(FlagGroup):
    """ScienceQA's files, and how a problem becomes a prompt."""

    title: ClassVar[str] = "data"
    data_root: PathText = flag("../data", "folder of problems.json, pid_splits.json, images/", Role.DATA,
                               stated_as="data", named=False)
    caption_file: PathText | None = flag(None, "captions.json (default: the one in --data_root)", Role.DATA,
                                     stated_as="data", named=False)
    use_caption: bool = flag(False, "add the picture's caption to the context", Role.DATA)
    skip_bad: bool = flag(False, "leave out problems whose picture is missing or broken", Role.DATA)
    prompt_format: str = flag("QCM-ALE", "parts of the prompt and of the answer, in order", Role.DATA,
                              choices=PROMPT_FORMATS, metavar="FORMAT")
    max_seq_len: Count = flag(512, "maximum number of tokens of prompt and answer", Role.DATA)

    @property
    def captions(self) -> str | None:
        """The caption file; None without --use_caption."""
        return (self.caption_file or f"{self.data_root}/captions.json") if self.use_caption else None


@dataclass(frozen=True)
class TrainingData(DataSettings):
    """The data, for ScienceQA or for instruction tuning."""

    do_pretrain: bool = flag(
        False, "instruction tuning instead of ScienceQA, on the file of tools/data_processing.py", Role.DATA)
    data_path: PathText = flag("", "all_data.json for --do_pretrain (default: the one in --data_root)", Role.DATA,
                           stated_as="data", named=False)
