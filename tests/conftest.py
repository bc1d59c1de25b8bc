"""Session-wide fixtures: a tokenizer, tiny base weights in the real file formats, and a small ScienceQA."""

import gc
import json
import random
import signal
from pathlib import Path

import hypothesis
import pytest
import torch
from PIL import Image

from lavin.runtime import signals
from lavin.runtime.distributed import LAUNCHER_VARIABLES
from lavin.timm_compat import import_timm
from lavin.tokenizer import Tokenizer
from tiny import problem
from tiny_base import Base, write_base

for number in signals.STOP_SIGNALS:
    if signal.getsignal(number) == signal.SIG_IGN:  # by nohup, or in a background job: child processes would inherit it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
# the same examples in every run, and no deadline: chance and a busy machine are no faults of the code
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")
import_timm()  # first: transformers, which some tests ask, would import a torchvision that is made for another torch
torch.set_num_threads(1)  # with models this small, synchronizing threads costs more than it saves


@pytest.fixture(scope="session", autouse=True)
def inherited_variables():
    """Tests, and the commands that they start, end and speak alike wherever they are run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*LAUNCHER_VARIABLES, "TORCHELASTIC_ERROR_FILE", "PYTHONUNBUFFERED", "PYTHONIOENCODING",
                     "PYTHONOPTIMIZE", "LAVIN_WORKER"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Tests, and the commands that they start, do not write into the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAVIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def frozen_heap():
    """Garbage collections do not visit the many objects of all tests and packages. When a training thaws its own, it
    would thaw these, too, so nothing is thawed. Returns the function that thaws all of them."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        thaw = gc.unfreeze
        patch.setattr(gc, "unfreeze", lambda: None)
        yield thaw


@pytest.fixture(autouse=True)
def stop_signals():
    """A test that runs a command in this process leaves no handlers to the next one, nor to child processes."""
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)
    signals.requested, signals._ending = None, False


REAL_SCIENCEQA = Path(__file__).parents[2] / "shared" / "scienceqa"


@pytest.fixture(scope="session")
def real_scienceqa():
    """Folder with 150 real ScienceQA problems; it is not part of the repository."""
    if not REAL_SCIENCEQA.is_dir():
        pytest.skip(f"no {REAL_SCIENCEQA}")
    return REAL_SCIENCEQA


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A SentencePiece BPE model with LLaMA's options and special ids, trained on made-up sentences."""
    import sentencepiece
    rng = random.Random(0)
    nouns = "pond river magnet lizard cloud bridge teacher sentence map island".split()
    verbs = "reaches pulls warms crosses names follows".split()
    lines = [f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} on day {rng.randrange(100)}."
             for _ in range(250)]
    lines += [f"Question: Which {rng.choice(nouns)} {rng.choice(verbs)} first?\\nContext: N/A\\nOptions: (A) one"
              f" (B) two (C) three\\nResponse:The answer is {rng.choice('ABCDE')}. BECAUSE: it is." for _ in range(150)]
    lines += ["Image: N/A", "Image: "] * 20
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=480,
        byte_fallback=True, bos_id=1, eos_id=2, unk_id=0, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return Tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_file) -> Base:
    return write_base(tmp_path_factory.mktemp("base"), tokenizer_file)


def make_problems() -> dict[str, dict]:
    """12 train and 6 test problems: all subjects, with and without hint and image, 2 to 4 choices."""
    subjects = ("natural science", "social science", "language science")
    problems = {}
    for i in range(18):
        choices = [f"the {word} pond" for word in ("north", "south", "old", "new")[:2 + i % 3]]
        problems[str(100 + i)] = problem(
            question=f"Which pond did walk {i} reach first?", choices=choices, answer=i % len(choices),
            hint="The walk began in the north." if i % 4 == 1 else "", image="image.png" if i % 2 else None,
            grade=f"grade{1 + i % 12}", subject=subjects[i % 3], split="train" if i < 12 else "test")
    return problems


def write_scienceqa(root: Path) -> Path:
    problems = make_problems()
    root.mkdir(exist_ok=True)
    (root / "problems.json").write_text(json.dumps(problems))
    splits = {split: [qid for qid, p in problems.items() if p["split"] == split] for split in ("train", "test")}
    (root / "pid_splits.json").write_text(json.dumps(splits))
    (root / "captions.json").write_text(json.dumps({"captions": {qid: "A pond seen from above." for qid in problems}}))
    rng = random.Random(1)
    for qid, p in problems.items():
        if p["image"]:
            folder = root / "images" / p["split"] / qid
            folder.mkdir(parents=True)
            image = Image.frombytes("L", (20, 30), rng.randbytes(600)).convert("RGB")
            image.paste(tuple(rng.randrange(256) for _ in range(3)), (0, 0, rng.randrange(1, 20), 30))
            image.save(folder / p["image"])
    return root


@pytest.fixture(scope="session")
def scienceqa(tmp_path_factory) -> Path:
    """The folder of a small ScienceQA, which all tests share and none may change; those that change files use
    `scienceqa_copy`."""
    return write_scienceqa(tmp_path_factory.mktemp("data"))


@pytest.fixture
def scienceqa_copy(tmp_path) -> Path:
    return write_scienceqa(tmp_path / "data")
