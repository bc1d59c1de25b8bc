"""Models and adapters of the Hugging Face hub: `USER/REPO`, or `USER/REPO@REVISION`, where a path of one is asked for.

huggingface_hub keeps the files in its own cache (HF_HOME), goes on with a file that was cut off, lets one process of a
node fetch it while the others wait, and reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. A path that exists is never
taken for a name.
"""

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from lavin.runtime.console import is_main_process, is_terminal, print_rank0
from lavin.runtime.errors import UserError, first_line
from lavin.runtime.files import require_space
from lavin.tokenizer_formats import SPECIAL_IDS
from lavin.weights.adapters import SHARED_SETTINGS, SHARED_TENSORS
from lavin.weights.tensor_files import hf_weight_files

ANSWER_SECONDS = 5  # within which the hub must answer
# The files of a model that are read here, with `*` for any text. Of several formats of the weights, the first is taken.
DESCRIPTIONS = (SHARED_SETTINGS, "params.json", "tokenizer.model", "tokenizer.json", *SPECIAL_IDS)
WEIGHTS = ((SHARED_TENSORS,), ("model*.safetensors", "model*.safetensors.index.json"),
           ("pytorch_model*.bin", "pytorch_model*.bin.index.json"), ("consolidated.*.pth",))
FILE_SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".gguf")  # of files, which are named by paths
# what to do on a machine without a network, in a message
FETCH_ELSEWHERE = ("fetch it where there is one by python -m tools.download {}, into the same HF_HOME, or correct the "
                   "path")


@dataclass(frozen=True)
class Repository:
    """A model on the hub. revision: a branch, a tag or a commit; None for the newest."""

    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Repository | None":
        """None where `name` is a path that exists, or cannot be a name of the hub."""
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*?)(?:@(\w[\w./-]*))?", name, re.ASCII)
        is_path = Path(name).suffix in FILE_SUFFIXES or Path(name).exists()
        return cls(match[1], match[2]) if match and not is_path else None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


class BrokenOff(UserError):
    """The hub answers, and yet a model cannot be fetched now. reason: the message of the hub's client."""

    def __init__(self, repository: Repository, reason: str):
        super().__init__(f"{repository} cannot be fetched ({reason}): the same command goes on")
        self.reason = reason


# --- The network ---

def hub_answers() -> bool:
    """Says whether there is a network: without one, the hub's own client tries for 50 s, even for files in its cache.
    """
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except HTTPError:
        return True
    except OSError as error:  # the hub's client may know other certificates
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def is_offline() -> bool:
    return constants.HF_HUB_OFFLINE or not hub_answers()


@contextmanager
def offline(without_network: bool = True) -> Iterator[None]:
    """Lets nothing be fetched: what is not in the cache is missing."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or without_network
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# --- The cache ---

def cached(repository: Repository) -> Path | None:
    """The folder of a model in the hub's cache; None where it is not there, or not all of its weights."""
    found = (try_to_load_from_cache(repository.id, name, revision=repository.revision) for name in DESCRIPTIONS)
    folder = next((Path(path).parent.resolve() for path in found if isinstance(path, str)), None)
    return folder if folder and has_weights(folder) else None


def has_weights(folder: Path) -> bool:
    """Says whether the weights are there; all of them, where an index lists them."""
    if (folder / SHARED_TENSORS).is_file() or any(folder.glob("consolidated.*.pth")):
        return True
    try:
        return bool(hf_weight_files(folder))
    except UserError:
        return False


def require_cached(repository_id: str) -> Path:
    """The folder in the hub's cache of a model that timm fetches. Raises OSError where it is not there."""
    try:
        return Path(snapshot_download(repository_id, local_files_only=True))
    except OSError as error:
        raise OSError(f"no network to {constants.ENDPOINT}, and nothing of it in the cache") from error


def model_path(name: str, flag: str) -> Path:
    """The path that a flag names: the flag's own value, or the folder of a model of the hub. Raises UserError, which
    begins with the flag, where neither is there."""
    repository = Repository.parse(name)
    try:
        return cached_or_fetched(repository) if repository else Path(name)
    except UserError as error:
        raise UserError(f"{flag} {name}: there is no such path, and {error}") from error


@cache  # a process asks the hub once
def cached_or_fetched(repository: Repository) -> Path:
    """The folder of a model, which is fetched where the hub has a newer one than the cache, and can be reached.

    Raises UserError where it is in neither, or where the hub does not give it to this user.
    """
    folder = cached(repository)
    if not is_offline():
        try:
            return fetch(repository)
        except BrokenOff as error:
            if folder is None:
                raise
            print_rank0(f"{repository} cannot be fetched ({error.reason}): the files in the hub's cache are used, of "
                        f"commit {folder.name}")
    if folder is None:
        raise UserError(f"{repository} is not in the hub's cache, and there is no network to {constants.ENDPOINT}: "
                        f"{FETCH_ELSEWHERE.format(repository)}")
    return folder


def commits(paths: Mapping[str, Path]) -> dict[str, str]:
    """For those of the models, name -> path, that are read from the hub's cache, the commit of their files.
    USER/REPO@COMMIT gives the same files at any time."""
    return {name: path.name for name, path in paths.items()
            if path.parent.name == "snapshots" and path.is_relative_to(Path(constants.HF_HUB_CACHE).resolve())}


# --- Fetching ---

def fetch(repository: Repository, folder: Path | None = None) -> Path:
    """Fetches the files of a model that are read here, into the hub's cache or into `folder`; returns where they are.
    In the cache, a branch stays that of the commit before until all files of the new one are there.

    Raises UserError where there is no such model, where it asks for a consent that this user has not given, or where
    the disk has too little space for it, and BrokenOff where the same command may succeed later.
    """
    if not (is_terminal() and is_main_process()):
        disable_progress_bars()
    try:
        info = HfApi().model_info(repository.id, revision=repository.revision, files_metadata=True)
        sizes, newest = files_to_fetch(repository, info), Repository(repository.id, info.sha)
        require_space(folder or Path(constants.HF_HUB_CACHE), missing_bytes(newest, sizes, folder), str(repository))
        path = Path(snapshot_download(newest.id, revision=newest.revision, allow_patterns=list(sizes),
                                      local_dir=folder)).resolve()
        if not folder and cached(repository) != path:  # the branch is not yet that of this commit
            snapshot_download(repository.id, revision=repository.revision, allow_patterns=list(sizes))
        return path
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{repository.id} asks for a consent: give it at {constants.ENDPOINT}/{repository.id}, and log "
                        "in by hf auth login, or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repository.id} has no revision {repository.revision}: correct it, or leave it "
                        "out") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{repository.id} is no model at {constants.ENDPOINT}: correct it, or log in by "
                        "hf auth login if the model is private") from error
    except Exception as error:  # the hub's client raises many types of exception where a connection breaks off
        raise BrokenOff(repository, first_line(error)) from error


def files_to_fetch(repository: Repository, info: ModelInfo) -> dict[str, int]:
    """The size in bytes of each file of a model that is read here. Raises UserError where there are no weights."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    formats = [[name for name in sizes if matches(name, patterns)] for patterns in WEIGHTS]
    weights = next(filter(None, formats), None)
    if weights is None:
        raise UserError(f"{repository} has no weights in a format that is read here (safetensors, pytorch_model.bin, "
                        "or Meta's consolidated.00.pth): name another")
    return {name: size for name, size in sizes.items() if name in weights or name in DESCRIPTIONS}


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file that lies in no folder has a name of these forms."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), name) for pattern in patterns)


def missing_bytes(repository: Repository, sizes: dict[str, int], folder: Path | None) -> int:
    """The bytes that are left to be fetched, and said on a line where there are some."""
    def is_there(name: str) -> bool:
        if folder:
            return (folder / name).is_file()
        return isinstance(try_to_load_from_cache(repository.id, name, revision=repository.revision), str)
    missing = sum(size for name, size in sizes.items() if not is_there(name))
    if missing:
        print_rank0(f"fetching {repository} from {constants.ENDPOINT}: {missing / 1e9:.2f} GB, into "
                    f"{folder or constants.HF_HUB_CACHE}")
    return missing
