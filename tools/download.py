"""Fetches data and weights, each under a name, to where the scripts look for them.

    python -m tools.download scienceqa      problems, captions and pictures, to --data_root
    python -m tools.download llama-7b       LLaMA-7B in Meta's layout (an unofficial copy), to --weights
    python -m tools.download clip           CLIP ViT-L/14, to --weights
    python -m tools.download adapters       the published LaVIN-7B's adapters, to --weights
    python -m tools.download USER/REPO      a model of the Hugging Face hub, to its cache; USER/REPO@REVISION too

The same command goes on where it was interrupted. What is there already stays. HF_ENDPOINT, HF_HOME and HF_TOKEN work
as in other programs that use the hub.
"""

from lavin.runtime.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from lavin.runtime.console import counted, progress_bar
from lavin.runtime.errors import UsageError, UserError, one_line_errors
from lavin.runtime.files import require_space
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import is_plain_name, read_validated
from lavin.weights import hub
from lavin.weights.hub import Repository
from tools.fetch import fetch
from util.data.datasets import DISJOINT_SPLITS

SCIENCEQA = "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data"
PICTURES = "https://scienceqa.s3.us-west-1.amazonaws.com/images"
MODELS = {"llama-7b": ("nyanko7/LLaMA-7B", "7B"), "clip": ("openai/clip-vit-large-patch14", "clip-vit-large-patch14")}
ADAPTERS = {  # of the model zoo of https://github.com/luogen1996/LaVIN
    "sqa-llama-7b.pth": "https://drive.usercontent.google.com/download?id=10X2qCBYrLH1grZOHwHRMXLUoz-S6MSgV&confirm=t"}
LARGEST_RATIO = 10  # of a zip file's content to the file: pictures are hardly compressed a second time
NAMES = ("scienceqa", *MODELS, "adapters")


@dataclass(frozen=True)
class Wanted(FlagGroup):
    """The files that are fetched, and where they go."""

    title: ClassVar[str] = "files"
    names: list[str] | None = flag(None, f"what to fetch: {', '.join(NAMES)}, or USER/REPO of the Hugging Face hub",
                                   Role.DATA, positional=True, nargs="+", metavar="NAME")
    data_root: Path = flag(Path("../data"), "folder of ScienceQA", Role.RUN)
    weights: Path | None = flag(None, "folder of the models (default: weights in --data_root)", Role.RUN)


def get_args_parser() -> Parser:
    return Parser("-m tools.download", __doc__, Wanted)


def fetch_scienceqa(root: Path) -> None:
    """Problems and captions of ScienceQA's repository, and the pictures of each split that lacks some."""
    for name, path in (("problems.json", "scienceqa/problems.json"), ("pid_splits.json", "scienceqa/pid_splits.json"),
                       ("captions.json", "captions.json")):
        fetch(f"{SCIENCEQA}/{path}", root / name)
    problems = read_validated(root / "problems.json", dict[str, dict[str, Any]])
    for split in DISJOINT_SPLITS:
        pictures = expected_pictures(problems, split)
        if all((root / "images" / picture).is_file() for picture in pictures):
            continue
        if (root / "images" / split).exists():
            raise UserError(f"{root / 'images' / split} lacks pictures: move it away, and the same command fetches all")
        archive = root / f"{split}.zip"
        fetch(f"{PICTURES}/{split}.zip", archive)
        unpack(archive, root / "images", split)
        archive.unlink()
    print(f"{counted(len(problems), 'problem')}: {root}")


def expected_pictures(problems: dict[str, dict[str, Any]], split: str) -> list[str]:
    """The pictures of a split, each as SPLIT/ID/FILE."""
    return [f"{split}/{qid}/{problem['image']}" for qid, problem in problems.items()
            if problem.get("split") == split and problem.get("image")]


def unpack(archive: Path, folder: Path, split: str) -> None:
    """Unpacks the pictures SPLIT/ID/FILE of a zip file below `folder`; the split's folder is whole or absent.

    Other members, such as those that macOS adds, are left out. Raises UserError, and writes nothing, where a member
    would lie outside of the folder or is no file, where the content is much larger than the zip file, and where a
    member is damaged.
    """
    part = folder / f".{split}.incomplete"
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if is_picture(member, archive, split)]
            size = sum(member.file_size for member in members)
            if size > LARGEST_RATIO * archive.stat().st_size:
                raise UserError(f"{archive} declares {size:,} bytes of pictures, far more than it can hold: remove it")
            require_space(folder, size, f"unpacking {archive.name}")
            for member in progress_bar(members, archive.name, unit="picture"):
                content.extract(member, part)
        (part / split).rename(folder / split)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}): remove it, and the same command fetches it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def is_picture(member: zipfile.ZipInfo, archive: Path, split: str) -> bool:
    """Whether a member is a file SPLIT/ID/FILE. Raises UserError for one that would lead out of the folder."""
    path, mode = PurePosixPath(member.filename), member.external_attr >> 16
    if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(mode):
        raise UserError(f"{archive} holds {member.filename!r}, which leads out of its folder: remove it")
    return (not member.is_dir() and len(path.parts) == 3 and path.parts[0] == split
            and all(is_plain_name(part) and not part.startswith(".") for part in path.parts))


def fetch_adapters(folder: Path) -> None:
    for name, url in ADAPTERS.items():
        fetch(url, folder / name)
        print(f"{name}: {folder / name}")


def download(name: str, data_root: Path, weights: Path) -> None:
    """Raises UsageError for an unknown name, and UserError where something cannot be fetched."""
    if name == "scienceqa":
        fetch_scienceqa(data_root)
    elif name == "adapters":
        fetch_adapters(weights)
    elif name in MODELS:
        repository_id, folder = MODELS[name]
        print(f"{name}: {hub.fetch(Repository(repository_id), weights / folder)}")
    elif repository := Repository.parse(name):
        print(f"{name}: {hub.fetch(repository)}")
    else:
        raise UsageError(f"{name!r} is none of {', '.join(NAMES)}, and no USER/REPO of the hub")


def main(args: Flags) -> None:
    for name in args.names:
        download(name, args.data_root, args.weights or args.data_root / "weights")


if __name__ == "__main__":
    with one_line_errors():
        main(get_args_parser().parse_args())
