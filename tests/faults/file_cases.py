"""Files of others' making for inputs.py: exchanged for others of equal size and time, torn, planted, or so written that
they declare more than they hold."""

import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file

from lavin.runtime.files import sampled_sha256
from tests import bombs, poisoned_entries
from tests.faults.cases import (
    COCO,
    REFUSED,
    Case,
    damage,
    flips,
    instead,
    problem_with_picture,
    set_torch,
    write,
)
from util import shared_base

USERS_FILE, USERS_TEXT = "thesis.tex", "years of work"  # no command may change it
ANOTHER_USER = 4321

# --- Files exchanged for others of equal size and time ---

Exchange = Callable[[bytes], bytes]


def exchange(file: str, make: Exchange, keeps_samples: bool = False) -> None:
    """Replaces a file by another one of its size and time. keeps_samples: whether the parts by which earlier versions
    knew the file must stay."""
    found, old, sampled = os.stat(file), Path(file).read_bytes(), sampled_sha256([Path(file)])
    new = make(old)
    assert new != old and len(new) == len(old)
    write(file, new)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert not keeps_samples or sampled_sha256([Path(file)]) == sampled


def other_picture(old: bytes) -> bytes:
    """A picture of one colour and equal size: the bytes behind its end do not matter."""
    content = io.BytesIO()
    Image.new("RGB", (9, 9), (250, 3, 70)).save(content, "PNG")
    return content.getvalue().ljust(len(old), b"\0")


def other_signs(old: bytes) -> bytes:
    """Other signs of some float32 numbers between the beginning of the file and its middle."""
    new = bytearray(old)
    for i in range(len(old) * 2 // 5 // 4 * 4 + 3, len(old) * 9 // 20, 4):
        new[i] ^= 0x80
    return bytes(new)


def other_matrix(old: bytes) -> bytes:
    """A file of torch with another matrix: its records have checksums."""
    tensors, other = torch.load(io.BytesIO(old), weights_only=True), Path("consolidated.00.pth")
    tensors["layers.1.attention.wk.weight"].neg_()
    torch.save(tensors, other)  # the name of a file is a part of its content
    return other.read_bytes()


def other_pieces(old: bytes) -> bytes:
    """A tokenizer of sentencepiece in which two pieces of the training texts have each other's place."""
    model = sentencepiece.SentencePieceProcessor(model_proto=old)
    problems = json.loads(Path("data/problems.json").read_text())
    ids = model.encode(" ".join(problem["question"] for problem in problems.values()))
    pieces = [piece.encode() for piece in dict.fromkeys(map(model.id_to_piece, ids)) if len(piece) > 2]
    fields = [field for piece in pieces if old.count(field := b"\x0a" + bytes([len(piece)]) + piece) == 1]
    first, second = next(pair for pair in combinations(fields, 2) if len(pair[0]) == len(pair[1]))
    return swapped(old, first, second)


def swapped(old: bytes, first: bytes, second: bytes) -> bytes:
    """Puts two parts of equal length, each of which is there once, into each other's place."""
    new = bytearray(old)
    for part, other in ((first, second), (second, first)):
        begin = old.index(part)
        new[begin:begin + len(part)] = other
    return bytes(new)


def in_json(*path: str | int) -> Exchange:
    """Puts upper case for lower into the text at this path."""
    def make(old: bytes) -> bytes:
        text: Any = json.loads(old)
        for key in path:
            text = text[key]
        written = json.dumps(text).encode()
        return old.replace(written, written.swapcase(), 1)
    return make


def words(before: str, after: str) -> Exchange:
    return lambda old: old.replace(before.encode(), after.encode(), 1)


def other_split(old: bytes) -> bytes:
    """The training and the test problems have exchanged a problem each."""
    train, test = (next(f'"{qid}"' for qid in json.loads(old)[split] if len(qid) == 1) for split in ("train", "test"))
    return swapped(old, train.encode(), test.encode())


OF_TRAINING = ("again", "go on", "go on mid", "resume", "search")  # what was begun is not of these files
OF_SCORES = ("score again", "score mme again")
ANEW = {"score again": "score", "score mme again": "score mme"}  # others: the same command, in a folder of its own
OTHER_MODEL = "was trained on other files"


def exchanged(what: str, file: str, make: Exchange, *commands: str, told: str = "", keeps_samples: bool = False
              ) -> Iterator[Case]:
    for command in commands:
        is_begun = command in OF_TRAINING
        yield Case("exchanged files", f"{command}: {what} ({file})", command,
                   partial(exchange, file, make, keeps_samples),
                   cached=command in ("train", "captions", "pretrain", "hf", "gguf", *OF_SCORES),
                   anew=REFUSED if is_begun else ANEW.get(command, command),
                   told=told if command in ("chat", *OF_SCORES) else "")


def exchanged_cases() -> Iterator[Case]:
    train, test = problem_with_picture("train"), problem_with_picture("test")
    shard = sorted(map(str, Path("weights/hf").glob("*.safetensors")))[1]
    base: dict[str, Any] = {"told": OTHER_MODEL, "keeps_samples": True}
    all_commands = ("train", *OF_TRAINING, *OF_SCORES)
    yield from exchanged("a training picture", f"data/images/train/{train}/image.png", other_picture,
                         "train", "captions", "hf", "gguf", *OF_TRAINING)
    yield from exchanged("a test picture", f"data/images/test/{test}/image.png", other_picture, "score again", "search")
    yield from exchanged("a picture of MME", "data/mme/count/a.png", other_picture, "score mme again")
    yield from exchanged("a picture of COCO", f"data/{COCO}", other_picture, "pretrain")
    yield from exchanged("a matrix", "weights/tiny/consolidated.00.pth", other_matrix, *all_commands, "chat", **base)
    yield from exchanged("a matrix", shard, other_signs, "hf", **base)
    yield from exchanged("a matrix", "weights/tiny.gguf", other_signs, "gguf", **base)
    yield from exchanged("a matrix of the ViT", "vit/model.safetensors", other_signs, *all_commands, "chat", **base)
    yield from exchanged("the constant of its norms", "weights/tiny/params.json", words("1e-06", "3e-02"),
                         *all_commands, "chat", told=OTHER_MODEL)
    yield from exchanged("the tokenizer", "weights/tokenizer.model", other_pieces, *all_commands, "captions", "chat",
                         told=OTHER_MODEL)
    yield from exchanged("a caption", "data/captions.json", in_json("captions", train), "captions")
    for part in ("question", "hint", "solution"):
        yield from exchanged(f"a {part}", "data/problems.json", in_json(train, part), "train", "captions", *OF_TRAINING)
    yield from exchanged("a question", "data/problems.json", in_json(test, "question"), "score again", "search")
    yield from exchanged("the split", "data/pid_splits.json", other_split, "train", "score again", *OF_TRAINING)
    yield from exchanged("an instruction", "data/all_data.json", in_json("all", 1, "instruction"), "pretrain")
    yield from exchanged("a question of MME", "data/mme/count/a.txt", words("pond", "lake"), "score mme again")
    yield from exchanged("a checkpoint", "run/checkpoint-1.pth", lambda _: Path("run/checkpoint-0.pth").read_bytes(),
                         *OF_SCORES)
    yield Case("exchanged files", "plot: a checkpoint (run/checkpoint-1.pth)", "plot", partial(
        exchange, "run/checkpoint-1.pth", lambda _: Path("run/checkpoint-0.pth").read_bytes()), anew=REFUSED)


def exchange_once_loaded(file: str, make: Exchange) -> None:
    """The models are loaded of the old file, whose checksum was taken before."""
    def load(*args, load_base=shared_base.load_base, **more):
        loaded = load_base(*args, **more)
        exchange(file, make)
        return loaded

    shared_base.load_base = load  # in the process of the case


def exchanged_meanwhile_cases() -> Iterator[Case]:
    of_model = {"weights/tiny/consolidated.00.pth": other_matrix, "vit/model.safetensors": other_signs,
                "weights/tokenizer.model": other_pieces}
    training, scoring = ("train", "go on", "resume"), ("score", "score mme")
    pictures = {f"data/images/train/{problem_with_picture('train')}/image.png": training,
                f"data/images/test/{problem_with_picture('test')}/image.png": ("score",),
                "data/mme/count/a.png": ("score mme",), f"data/{COCO}": ("pretrain",)}
    found: list[tuple[str, Exchange, tuple[str, ...]]] = [
        (file, make, (*training, *scoring, "chat")) for file, make in of_model.items()]
    found += [(file, other_picture, commands) for file, commands in pictures.items()]
    found += [("run/checkpoint-1.pth", lambda _: Path("run/checkpoint-0.pth").read_bytes(), (*scoring, "chat"))]
    for file, make, commands in found:
        yield from (Case("files exchanged while they are read", f"{command}: {file}", command,
                         partial(exchange_once_loaded, file, make), anew=REFUSED) for command in commands)


# --- Torn files ---

def edit(file: str, change: Callable[[bytes], bytes]) -> None:
    write(file, change(Path(file).read_bytes()))


def half(line: bytes) -> bytes:
    return line[:len(line) // 2]


TEARS: dict[str, Callable[[bytes], bytes]] = {
    "lacks its last byte": lambda old: old[:-1], "lacks 30 bytes": lambda old: old[:-30],
    "lacks half of its last line": lambda old: old[:-len(old.splitlines()[-1]) // 2],
    "ends in a NUL": lambda old: old + b"\0", "ends in NULs": lambda old: old + bytes(100_000),
    "ends in NULs and a line feed": lambda old: old + bytes(40) + b"\n",
    "has NULs for its last 40 bytes": lambda old: old[:-40] + bytes(40),
    "has NULs from its middle on": lambda old: old[:len(old) // 2] + bytes(len(old) - len(old) // 2),
    "has NULs in its middle": lambda old: old[:len(old) // 2] + bytes(20) + old[len(old) // 2 + 20:],
    "ends in half a record": lambda old: old + half(old.splitlines()[-1]),
    "ends in half a record and a whole one":
        lambda old: old + half(old.splitlines()[-1]) + old.splitlines()[-1] + b"\n",
    "ends in an empty line": lambda old: old + b"\n", "is all NULs": lambda old: bytes(len(old)),
    "lacks its first line": lambda old: old[old.index(b"\n") + 1:]}
TRIAL = "study/trials/001"
JOURNALS = {
    "run/metrics.jsonl": ("plot", "again"), "half/metrics.jsonl": ("go on", "resume"),
    "mid/metrics.jsonl": ("go on mid",), "run/log.txt": ("plot", "again"), "half/log.txt": ("go on", "resume"),
    "mid/log.txt": ("go on mid",), "run/generations.jsonl": ("plot", "eval again"),
    "run/mme_answers.jsonl": ("mme again",), "part/generations.0.partial.jsonl": ("eval goes on",),
    "study/journal.log": ("search", "report"), "study/study.json": ("search", "report"),
    f"{TRIAL}/trial.json": ("search", "report"), "study/trials/000/trial.json": ("search", "report"),
    f"{TRIAL}/recipe.json": ("search",), f"{TRIAL}/rungs/1/scores.json": ("search",),
    f"{TRIAL}/rungs/1/generations.jsonl": ("search", "report"), f"{TRIAL}/search.log": ("search", "report")}


def torn_cases() -> Iterator[Case]:
    for file, commands in JOURNALS.items():
        yield from (Case("torn files", f"{command}: {file} {what}", command, partial(edit, file, change))
                    for (what, change), command in product(TEARS.items(), commands))
    # without trial.json, a trial that has ended is left out, as the message on broken ones says
    yield from damage("files of studies", ("search", "report"), "study/study.json")
    yield from damage("files of studies", ("search", "report"), f"{TRIAL}/trial.json",
                      skip=("is missing", "is a link to nothing", "is a link to itself"))
    yield from damage("files of studies", ("search",), "study/journal.log", False)
    yield from flips("files of studies", ("search",), "study/journal.log", 20)
    yield from damage("partial answers", ("eval goes on",), "part/generations.0.partial.jsonl")


# --- Planted files ---

def make_socket(file: str) -> None:
    here = os.getcwd()
    os.chdir(Path(file).parent)  # the paths of sockets are short
    socket.socket(socket.AF_UNIX).bind(Path(file).name)
    os.chdir(here)


def in_place_of(file: str, make: Callable[[str], Any]) -> None:
    """Puts something where a command would write a file."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).unlink(missing_ok=True)
    make(file)


PLANTED: dict[str, Callable[[str], Any]] = {
    "a link to a user's file": lambda file: os.symlink(Path(USERS_FILE).absolute(), file),
    "a link to nothing": lambda file: os.symlink("nothing", file),
    "a link to itself": lambda file: os.symlink(Path(file).name, file),
    "a link to a folder": lambda file: os.symlink(Path("data").absolute(), file),
    "a link to endless zeros": lambda file: os.symlink("/dev/zero", file),
    "a named pipe": os.mkfifo, "a folder": os.mkdir, "a socket": make_socket}
LOCKS = {"output_dir/.lock": "train", "half/.lock": "go on", "run/.lock": "eval again", "scored/.lock": "eval",
         "part/.lock": "eval goes on", "study/.lock": "search", "study/.journal.lock": "search",
         "study/.locks/001": "search", "output_dir/.owner.json": "train", "run/.owner.json": "eval again"}


def others_content(entry: Path) -> None:
    """A whole entry with the right checksum, of the same layout and of other content."""
    arrays = {name: array if array.dtype == torch.bool else array.flip(0) for name, array in load_file(entry).items()
              if name != poisoned_entries.cache.CHECKSUM}
    poisoned_entries.write_entry(entry, arrays)


def of_another_user(entry: Path) -> None:
    others_content(entry)
    os.chown(entry, ANOTHER_USER, ANOTHER_USER)


def open_to_others(entry: Path) -> None:
    others_content(entry)
    entry.chmod(0o666)


def in_a_folder_of_another_user(entry: Path) -> None:
    others_content(entry)
    os.chown(entry.parent, ANOTHER_USER, ANOTHER_USER)


def in_a_folder_open_to_others(entry: Path) -> None:
    others_content(entry)
    entry.parent.chmod(0o777)


def a_link_to_others_content(entry: Path) -> None:
    others_content(entry)
    poisoned_entries.is_a_link_to_an_entry(entry)


def instead_of_itself(make: Callable[[str], Any], entry: Path) -> None:
    instead(str(entry), make)


def instead_of_a_part(make: Callable[[str], Any], entry: Path) -> None:
    """Puts something where the process will write the entry, before it renames it."""
    make(str(entry.with_name(f".{entry.name}.{socket.gethostname()}.{os.getpid()}.part")))
    entry.unlink()


def instead_of_its_lock(make: Callable[[str], Any], entry: Path) -> None:
    in_place_of(f"{entry}.lock", make)
    entry.unlink()


POISONS: dict[str, Callable[[Path], Any]] = {
    **{poison.__name__.replace("_", " "): poison for poison in (*poisoned_entries.LAYOUTS, open_to_others,
                                                               in_a_folder_open_to_others, a_link_to_others_content)},
    **{f"is {what}": partial(instead_of_itself, make) for what, make in PLANTED.items()},
    **{f"has {what} for its lock": partial(instead_of_its_lock, make) for what, make in PLANTED.items()},
    **{f"has {what} for its part": partial(instead_of_a_part, make) for what, make in PLANTED.items()}}
OF_ROOT: dict[str, Callable[[Path], Any]] = {
    poison.__name__.replace("_", " "): poison for poison in (of_another_user, in_a_folder_of_another_user)}


def poison_entries(pattern: str, poison: Callable[[Path], Any]) -> None:
    entries = list(Path("cache").absolute().glob(f"lavin-{pattern}-*.safetensors"))
    assert entries
    for entry in entries:
        poison(entry)


def planted_cases() -> Iterator[Case]:
    for (file, command), (what, make) in product(LOCKS.items(), PLANTED.items()):
        yield Case("planted files", f"{command}: {file} is {what}", command, partial(in_place_of, file, make))
    poisons = POISONS | (OF_ROOT if os.geteuid() == 0 else {})  # only root gives files away
    readers = (("*", "train"), ("tokens", "train"), ("pictures", "train"), ("checksums", "score again"))
    for (pattern, command), (what, poison) in product(readers, poisons.items()):
        yield Case("planted files", f"{command}: an entry of the cache ({pattern}) {what}", command,
                   partial(poison_entries, pattern, poison), cached=True)


# --- Files that declare more than they hold ---

PICKLES = {"weights/tiny/consolidated.00.pth": ("train",), "run/checkpoint-1.pth": ("eval", "chat", "export"),
           "half/checkpoint-0.pth": ("go on",), "mid/last.pth": ("go on mid",)}
JSON_FILES = {
    "data/problems.json": ("train", "eval"), "data/pid_splits.json": ("train",), "data/captions.json": ("captions",),
    "data/all_data.json": ("pretrain",), "data/alpaca_data.json": ("prepare",), "weights/tiny/params.json": ("train",),
    "weights/hf/config.json": ("hf",), "weights/hf/model.safetensors.index.json": ("hf",),
    "vit/config.json": ("train",),
    "run/config.json": ("plot", "eval", "chat"), "half/recipe.json": ("go on", "resume"), "run/log.txt": ("plot",),
    "half/log.txt": ("go on",), "run/metrics.jsonl": ("plot",), "run/scores.json": ("plot", "eval again"),
    "run/preds.json": ("plot", "eval again"), "run/generations.jsonl": ("plot",), "run/mme_scores.json": ("mme again",),
    "run/mme_answers.jsonl": ("mme again",), "study/study.json": ("search", "report"),
    f"{TRIAL}/trial.json": ("search", "report"), "study/journal.log": ("search",), f"{TRIAL}/recipe.json": ("search",),
    "part/generations.0.partial.jsonl": ("eval goes on",)}
DEPTHS = (90, 400, 900, 980, 5000)


def with_nested_value(depth: int, old: bytes) -> bytes:
    """Puts a deeply nested value into the first object, as an entry that it has no use for."""
    return old.replace(b"{", b'{"unused": ' + bombs.nested(depth) + b", ", 1)


def alone(file: str, other: str, content: bytes) -> None:
    """Writes a file that takes the place of another one, which is removed."""
    Path(other).unlink()
    write(file, content)


def declared_sizes(files: dict, contents: dict[str, bytes]) -> Iterator[Case]:
    for (file, commands), (what, content) in product(files.items(), contents.items()):
        yield from (Case("headers", f"{command}: {file} declares too much ({what})", command,
                         partial(write, file, content)) for command in commands)


def header_cases() -> Iterator[Case]:
    kind, train, test = "headers", problem_with_picture("train"), problem_with_picture("test")
    shard = str(min(Path("weights/hf").glob("*.safetensors")))
    yield from declared_sizes({"weights/tiny.gguf": ("gguf",)}, bombs.GGUF)
    yield from declared_sizes({"vit/model.safetensors": ("train",), shard: ("hf",)}, bombs.SAFETENSORS)
    yield from declared_sizes(PICKLES, bombs.PICKLES)
    yield from declared_sizes({"weights/tokenizer.model": ("train", "eval"), "weights/hf/tokenizer.model": ("hf",)},
                              bombs.TOKENIZER_MODELS)
    yield from declared_sizes({
        f"data/images/train/{train}/image.png": ("train",), f"data/images/test/{test}/image.png": ("eval",),
        f"data/{COCO}": ("pretrain",), "data/mme/count/a.png": ("mme",)}, bombs.PICTURES)
    yield from declared_sizes(JSON_FILES, bombs.JSON)
    for file, commands in PICKLES.items():
        for command, make in product(commands, (bombs.compressed, bombs.enlarged)):
            yield Case(kind, f"{command}: {file} is {make.__name__}", command, partial(replace_by, file, make))
    yield Case(kind, "train: a tensor of more numbers than the file holds", "train", partial(
        set_torch, "weights/tiny/consolidated.00.pth", ("norm.weight",), torch.zeros(1).expand(2**40)))
    for what, content in bombs.TOKENIZER_JSONS.items():
        yield Case(kind, f"hf: tokenizer.json declares too much ({what})", "hf", partial(
            alone, "weights/hf/tokenizer.json", "weights/hf/tokenizer.model", content))
    for what, content in bombs.PICTURES.items():
        yield Case(kind, f"chat: a picture declares too much ({what})", "chat", partial(write, "new.png", content),
                   lines=("/image new.png", "/new", *Case.lines))
    for (file, commands), depth in product(JSON_FILES.items(), DEPTHS):
        if file == "run/mme_answers.jsonl":  # as it stands, it is a part of the result
            continue
        yield from (Case(kind, f"{command}: {file} has an unused entry of depth {depth}", command, partial(
            edit, file, partial(with_nested_value, depth))) for command in commands)
    yield from damage("GGUF", ("gguf",), "weights/tiny.gguf", False)
    yield from (Case("GGUF", f"gguf: weights/tiny.gguf has bit {seed} of its beginning flipped", "gguf", partial(
        edit, "weights/tiny.gguf", partial(flip_beginning, seed))) for seed in range(100))


def flip_beginning(seed: int, old: bytes) -> bytes:
    """Flips a bit of the first 600 bytes, which are metadata."""
    new = bytearray(old)
    new[seed * 6] ^= 1 << seed % 8
    return bytes(new)


def replace_by(file: str, make: Callable[[Path], Path]) -> None:
    os.replace(make(Path(file)), file)


KINDS = (exchanged_cases, exchanged_meanwhile_cases, torn_cases, planted_cases, header_cases)
