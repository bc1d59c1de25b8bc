"""Bad inputs for inputs.py: a small world of files, the commands that read them, and the ways in which each is wrong.

The world is a folder, and all paths in it are relative, so that a copy of it gives the same results.
"""

import argparse
import copy
import csv
import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from io import StringIO
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from lavin.llama import Llama, LlamaConfig
from lavin.runtime import files
from lavin.runtime.files import write_json
from lavin.runtime.flags import CHANGES_RESULTS, Flag
from lavin.timm_compat import timm
from tests.tiny_gguf import sentencepiece_vocabulary, write_gguf
from tests.tiny_weights import write_hugging_face
from tools import make_toy_base
from tools.make_mini_scienceqa import write_mini_scienceqa
from util.data.datasets import load_scienceqa
from util.runs import last_checkpoint
from util.training.recipe import TRAIN_FLAGS

# --- The world ---

LLAMA = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-6, "vocab_size": -1}
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2}
SIZES = {"train": 12, "val": 2, "test": 6}
BASE = ("--llama_model_path", "weights", "--llm_model", "tiny", "--vision_model", "vit", "--data_root", "data",
        "--device", "cpu")
SAMPLE_BYTES = 64  # of the files of models, so that some as small as these have parts that are not sampled
TRAIN = (*BASE, "--batch_size", "4", "--epochs", "2", "--warmup_epochs", "1", "--lr", "1e-2", "--max_seq_len", "500",
         "--adapter_dim", "4", "--hidden_proj", "8")


def write_base(root: Path, data: Path, llama: dict = LLAMA, vit: dict = VIT) -> int:
    """Random weights in weights/tiny and vit, and a tokenizer. Returns the size of its vocabulary."""
    torch.manual_seed(0)
    folder = root / "weights" / "tiny"
    folder.mkdir(parents=True)
    tokenizer = make_toy_base.train_tokenizer(load_scienceqa(str(data), "train"), folder.parent / "tokenizer.model")
    model = Llama(LlamaConfig.from_params(llama, tokenizer.n_words))
    torch.save({name: perturbed(name, tensor) for name, tensor in model.state_dict().items()},
               folder / "consolidated.00.pth")
    write_json(folder / "params.json", llama)
    encoder = timm.create_model(make_toy_base.VIT_NAME, num_classes=0, **vit)
    make_toy_base.make_folder(root / "vit")
    make_toy_base.save_tensors({name: perturbed(name, tensor) for name, tensor in encoder.state_dict().items()},
                               root / "vit" / "model.safetensors")
    write_json(root / "vit" / "config.json", {
        "architecture": make_toy_base.VIT_NAME, "model_args": vit, "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, vit["img_size"], vit["img_size"]], "num_classes": 0}})
    return tokenizer.n_words


def perturbed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with other norms and sharper attention: many faults would not show with the initial ones."""
    if tensor.ndim == 1:
        return tensor + 0.3 * torch.randn_like(tensor)
    return 3 * tensor if "wq" in name or "wk" in name else tensor


def build_world(root: Path) -> None:
    """Data, and bases of each format."""
    data, tokenizer = root / "data", root / "weights" / "tokenizer.model"
    write_mini_scienceqa(data, SIZES, 0)
    vocab_size = write_base(root, data)
    model = write_hugging_face(root / "weights" / "hf", tokenizer, max_shard_size="40KB", vocab_size=vocab_size)
    write_gguf(root / "weights" / "tiny.gguf", model, sentencepiece_vocabulary(tokenizer))
    picture = next(data.glob("images/train/*/image.png")).read_bytes()
    write_instructions(data, picture)
    write_mme(data / "mme", picture)


COCO = "images/train2014/COCO_train2014_000.png"  # of record 1


def write_instructions(data: Path, picture: bytes) -> None:
    (data / "images" / "train2014").mkdir()
    (data / COCO).write_bytes(picture)
    write_json(data / "all_data.json", {"all": [
        {"instruction": f"Name {i}.", "answer": "The north pond.", "image": "000.png" if i == 1 else None, "qid": i}
        for i in range(4)]})
    write_json(data / "alpaca_data.json", [{"instruction": f"Name pond {i}.", "input": "", "output": "North."}
                                           for i in range(3)])


def write_mme(root: Path, picture: bytes) -> None:
    for subtask, name in product(("existence", "count"), ("a", "b")):
        (root / subtask).mkdir(parents=True, exist_ok=True)
        (root / subtask / f"{name}.png").write_bytes(picture)
        (root / subtask / f"{name}.txt").write_text(f"Is {name} a pond?\tYes\nIs {name} a map?\tNo\n")


class Killed(BaseException):
    """Stands for a process that ends at once."""


def train_runs() -> None:
    """Trains runs in the world's folder, after `build_world`, in a process each, since a run changes torch's settings.
    `run` is finished and scored, and `half` lacks its last epoch."""
    main, argv, _ = COMMANDS["train"]
    for folder in ("run", "half"):
        call(main, [*argv, "--output_dir", folder])
    Path("half/checkpoint-1.pth").unlink()
    Path("half/log.txt").write_text(Path("half/log.txt").read_text().splitlines()[0] + "\n")
    for name in ("eval again", "mme again"):
        call(*COMMANDS[name][:2])


def interrupt_eval() -> None:
    """`part` has the answers of an evaluation that ended before its scores were written."""
    from util.evaluation import evaluate
    evaluate.drop_partial = lambda *_: None  # type: ignore[assignment]
    call("eval", [*COMMANDS["eval goes on"][1]])
    for name in ("scores.json", "preds.json", "generations.jsonl"):
        Path("part", name).unlink()


def search() -> None:
    """`study` has two trials, which have ended."""
    call(*COMMANDS["search"][:2])


def train_mid() -> None:
    """`mid` ended in its fifth step, with a checkpoint of the fourth."""
    from util.training.trainer import Trainer
    made, train_step = [], Trainer.train_step

    def step(self, *args):
        made.append(1)
        if len(made) == 6:
            raise Killed
        train_step(self, *args)
    Trainer.train_step = step  # type: ignore[method-assign]
    try:
        call("train", [*COMMANDS["train"][1], "--output_dir", "mid", "--save_every_minutes", "1e-9"])
    except Killed:
        Trainer.train_step = train_step  # type: ignore[method-assign]


# --- Commands ---

def call(module: str, argv) -> None:
    """A command in this process."""
    if module == "search":  # its commands are processes of their own, in which nothing is changed
        files.SAMPLE_BYTES = 2**20
    sys.argv = [f"{module.rpartition('.')[2]}.py", *argv]
    import_module(module).main(import_module(module).get_args_parser().parse_args(list(argv)))


def adapters(folder: str) -> Callable[[str], str]:
    def digest(_: str) -> str:
        tensors = torch.load(last_checkpoint(folder), weights_only=True)["model"]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in sorted(tensors.items()))).hexdigest()
    return digest


def scores(folder: str, answers: str, name: str, parts: tuple) -> Callable[[str], str]:
    def read(_: str) -> str:
        found = json.loads(Path(folder, name).read_text())
        return json.dumps([*(found[part] for part in parts), Path(folder, answers).read_text().split()])
    return read


def whole_scores(folder: str, *names: str) -> Callable[[str], str]:
    """Reads files of scores whole, with the checksums of what was scored."""
    return lambda _: json.dumps([Path(folder, name).read_text() for name in names])


def trials(_: str) -> str:
    """The trials of a study, by its folder and by its storage, without their seconds."""
    from util.search.folder import read_records, read_settings
    from util.search.storage import open_optuna
    study = Path("study")
    stored = open_optuna(study, read_settings(study)["name"], None, False, None).get_trials(deepcopy=False)
    return json.dumps([[[name, record["state"], record["values"], record["rungs"]]
                        for name, record in read_records(study).items()],
                       [[trial.number, trial.state.name, trial.value, trial.params] for trial in stored]])


def report(_: str) -> str:
    return "\n".join(line for line in Path("plots/report.md").read_text().splitlines() if "GPU-hours" not in line)


def content(path: str) -> Callable[[str], str]:
    return lambda _: hashlib.sha256(Path(path).read_bytes()).hexdigest()


def last_answer(output: str) -> str:
    return output.rpartition("> ")[0].rpartition("> ")[2]


def table(_: str) -> str:
    """Reads the numbers of a table: its notes may differ."""
    rows = list(csv.reader(StringIO(Path("plots/table.csv").read_text())))
    return json.dumps([[cell for cell in row if not cell.endswith("run")] for row in rows])


SCIENCEQA = ("preds.json", "scores.json", ("Avg", "NAT", "counts", "correct"))
MME = ("mme_answers.jsonl", "mme_scores.json", ("subtasks",))
ALL_SCORES, ALL_MME = ("scores.json", "preds.json", "generations.jsonl"), ("mme_scores.json", "mme_answers.jsonl")
EVAL = ("--adapter_path", "run", "--output_dir", "scored", "--device", "cpu")
SEARCH = ("--study", "study", "--trials", "2", "--confirm", "0", "--pruner", "none", "--questions", "1", "--", *BASE,
          "--epochs", "1", "--warmup_epochs", "0.5", "--batch_size", "4", "--accum_iter", "3", "--max_seq_len", "500")
CHAT = ("--runs", "run", "--cli", "--device", "cpu", "--max_new_tokens", "8", "--max_seq_len", "300")
COMMANDS: dict[str, tuple[str, tuple, Callable[[str], str]]] = {  # module, flags, and the result from what is printed
    "train": ("train", TRAIN, adapters("output_dir")),
    "captions": ("train", (*TRAIN, "--use_caption"), adapters("output_dir")),
    "pretrain": ("train", (*TRAIN, "--do_pretrain", "--batch_size", "2"), adapters("output_dir")),
    "hf": ("train", (*TRAIN, "--llm_model", "hf"), adapters("output_dir")),
    "gguf": ("train", (*TRAIN, "--llm_model", "tiny.gguf"), adapters("output_dir")),
    "again": ("train", (*TRAIN, "--output_dir", "run"), adapters("run")),
    "go on": ("train", (*TRAIN, "--output_dir", "half"), adapters("half")),
    "go on mid": ("train", (*TRAIN, "--output_dir", "mid"), adapters("mid")),
    "resume": ("train", ("--resume", "half"), adapters("half")),
    "eval": ("eval", EVAL, scores("scored", *SCIENCEQA)),
    "eval again": ("eval", EVAL[:2] + EVAL[4:], scores("run", *SCIENCEQA)),
    "mme": ("eval_mme", EVAL, scores("scored", *MME)),
    "mme again": ("eval_mme", EVAL[:2] + EVAL[4:], scores("run", *MME)),
    "eval goes on": ("eval", (*EVAL[:2], "--output_dir", "part", *EVAL[4:]), scores("part", *SCIENCEQA)),
    "score": ("eval", EVAL, whole_scores("scored", *ALL_SCORES)),
    "score again": ("eval", EVAL[:2] + EVAL[4:], whole_scores("run", *ALL_SCORES)),
    "score mme": ("eval_mme", EVAL, whole_scores("scored", *ALL_MME)),
    "score mme again": ("eval_mme", EVAL[:2] + EVAL[4:], whole_scores("run", *ALL_MME)),
    "plot": ("plot_results", ("run",), table),
    "search": ("search", SEARCH, trials),
    "report": ("plot_results", ("study",), report),
    "chat": ("demo", CHAT, last_answer),
    "export": ("tools.export_hf", ("--adapter_path", "run", "--out", "exported"),
               content("exported/model.safetensors")),
    "prepare": ("tools.data_processing", ("--data_root", "data", "--out", "prepared.json"), content("prepared.json")),
}


@dataclass(frozen=True)
class Case:
    """A bad input. change: makes it in the current folder. argv: flags beside the command's. lines: the lines of
    standard input.

    cached: whether the command has filled the node's cache before the change. anew: the command whose result with the
    changed files is right; REFUSED: no result is right. told: words that must come with the result.
    """

    kind: str
    name: str
    command: str
    change: Callable[[], Any] = lambda: None
    argv: tuple = ()
    lines: tuple = ("Which pond is deeper?", "/quit")
    cached: bool = False
    anew: str = ""
    told: str = ""


REFUSED = "refused"


# --- Wrong values ---

MISSING = type("Missing", (), {"__repr__": lambda self: "missing", "__deepcopy__": lambda self, memo: self})()
HALF_CHARACTER = "\ud800"
TEXTS = ("", "x", "../x", "²")
NUMBERS = (-1, 0, 7, 1.5, 10**30, float("nan"))
OTHERS = (MISSING, None, True, HALF_CHARACTER, [], ["x"], {})
WRONG = (*TEXTS, *NUMBERS, *OTHERS)
FEW = (MISSING, None, "x", -1, 1.5, 10**30, float("nan"), [])
REAL_NUMBERS = (7, 1.5, 10**30)  # right for a number that has no bound


def wrong(*right, values: tuple = WRONG) -> list:
    """The values that are none of the right ones. True equals 1, and nan not itself."""
    texts = set(map(repr, right))
    return [value for value in values if repr(value) not in texts]


def replace_at(value: Any, path: tuple, new: Any) -> Any:
    """A copy whose entry at the path (keys and indices) is new, or missing."""
    if not path:
        return new
    value = copy.copy(value)
    if new is MISSING and len(path) == 1:
        del value[path[0]]
    else:
        value[path[0]] = replace_at(value[path[0]] if len(path) > 1 else None, path[1:], new)
    return value


def set_json(file: str, path: tuple, new: Any) -> None:
    value = replace_at(json.loads(Path(file).read_text()), path, new)
    Path(file).write_text(json.dumps(value))


def set_line(file: str, path: tuple, new: Any) -> None:
    """Sets the value at this path in the first line of a file of JSON lines."""
    first, *rest = Path(file).read_text().splitlines()
    Path(file).write_text("\n".join([json.dumps(replace_at(json.loads(first), path, new)), *rest]) + "\n")


def set_torch(file: str, path: tuple, new: Any) -> None:
    torch.save(replace_at(torch.load(file, weights_only=True), path, new), file)


def fields(kind: str, commands: tuple, file: str, values: Mapping[Any, list], change=set_json) -> Iterator[Case]:
    """Yields cases in which an entry of a file has a wrong value. values: the wrong ones by the path of the entry."""
    for path, wrong_values in values.items():
        for new, command in product(wrong_values, commands):
            yield Case(kind, f"{command}: {file} {'.'.join(map(str, path))} = {str(new)[:60]!r}", command,
                       partial(change, file, path, new))


# --- Damaged files ---

def write(file: str, new: bytes) -> None:
    Path(file).write_bytes(new)


def cut(file: str, keep: float) -> None:
    old = Path(file).read_bytes()
    write(file, old[:int(len(old) * keep)] if keep < 1 else old[:-1])


def flip(file: str, start: float, seed: int) -> None:
    """A random bit of a random byte after a fraction of the file."""
    old, rng = bytearray(Path(file).read_bytes()), Random(f"{file} {seed}")
    old[rng.randrange(int(len(old) * start), len(old))] ^= 1 << rng.randrange(8)
    write(file, bytes(old))


def instead(file: str, make: Callable[[str], Any]) -> None:
    Path(file).unlink()
    make(file)


def double_key(file: str) -> None:
    """The first key of the first object again."""
    text = Path(file).read_text()
    key = text[text.index('"'):text.index(":") + 1]
    Path(file).write_text(text.replace("{", "{" + key + "null,", 1))


NO_FILE: dict[str, Callable[[str], Any]] = {
    "missing": lambda file: None, "a folder": os.mkdir, "a named pipe": os.mkfifo,
    "a link to itself": lambda file: os.symlink(Path(file).name, file),
    "a link to nothing": lambda file: os.symlink("nothing", file)}
CONTENTS = {"empty": b"", "null": b"null", "a number": b"7", "a list": b"[]", "an object": b"{}", "a text": b'"x"',
            "no UTF-8": b"\xff\xfe{}", "zeros": bytes(999), "words": b"It is a pond.\n" * 40,
            "deep": b"[" * 100_000 + b"]" * 100_000, "a huge number": b"9" * 5000, "NaN": b"NaN"}
CUTS = (0.1, 0.5, 0.9, 0.99)


def damage(kind: str, commands: tuple, file: str, json_file: bool = True, skip: tuple = ()) -> Iterator[Case]:
    """Yields cases in which a file is missing, cut, changed or of another format. skip: the changes that this file may
    have."""
    changes: dict[str, Callable[[], Any]] = {
        **{f"is {what}": partial(instead, file, make) for what, make in NO_FILE.items()},
        **{f"is {what}": partial(write, file, new) for what, new in CONTENTS.items()},
        **{f"is cut at {keep}": partial(cut, file, keep) for keep in CUTS}}
    if json_file:
        changes |= {"has a key twice": partial(double_key, file),
                    "begins with a BOM": lambda: write(file, b"\xef\xbb\xbf" + Path(file).read_bytes()),
                    "ends in garbage": lambda: write(file, Path(file).read_bytes() + b"x"),
                    "is UTF-16": lambda: write(file, Path(file).read_text().encode("utf-16"))}
    for (what, change), command in product(changes.items(), commands):
        if what not in skip:
            yield Case(kind, f"{command}: {file} {what}", command, change)


def flips(kind: str, commands: tuple, file: str, n: int, start: float = 0.0) -> Iterator[Case]:
    for seed, command in product(range(n), commands):
        yield Case(kind, f"{command}: {file} has bit {seed} flipped", command,
                   partial(flip, file, start, seed))


# --- Kinds of cases ---

def problem_with_picture(split: str) -> str:
    problems = json.loads(Path("data/problems.json").read_text())
    return next(qid for qid, problem in problems.items() if problem["split"] == split and problem["image"])


def data_cases() -> Iterator[Case]:
    kind, file = "problems.json", "data/problems.json"
    choices = ("AB", [1, 2], ["a"], ["a", ""], list("abcdef"), ["a", None], {"A": "a", "B": "b"})
    wrong_values = {"question": wrong(*TEXTS[1:]), "choices": [*WRONG, *choices], "answer": wrong(0),
                    "image": wrong(None), "grade": [*wrong(MISSING), "grade0", "grade13", "Grade7"],
                    "subject": wrong(MISSING),
                    "split": [*WRONG], **dict.fromkeys(("hint", "lecture", "solution"), wrong(*TEXTS)),
                    **dict.fromkeys(("skill", "topic", "category"), wrong(MISSING, *TEXTS))}
    for split, command in (("train", "train"), ("test", "eval")):
        qid = problem_with_picture(split)
        yield from fields(kind, (command,), file, {(qid, name): values for name, values in wrong_values.items()})
        yield from fields(kind, (command,), file, {(qid,): list(WRONG)})
    yield from damage(kind, ("train",), file)

    kind, file = "pid_splits.json", "data/pid_splits.json"
    train, test = (json.loads(Path(file).read_text())[split] for split in ("train", "test"))
    for split, command in (("train", "train"), ("test", "eval")):
        yield from fields(kind, (command,), file, {(split,): [*WRONG, [*train, train[0]], [*train, test[0]], ["../1"]],
                                                   (split, 0): wrong(MISSING)})
    yield from damage(kind, ("train", "eval"), file)

    kind, file = "captions.json", "data/captions.json"
    qid = problem_with_picture("train")
    yield from fields(kind, ("captions",), file, {("captions",): list(WRONG),
                                                  ("captions", qid): wrong(MISSING, *TEXTS)})
    yield from damage(kind, ("captions",), file)

    kind, file = "all_data.json", "data/all_data.json"
    yield from fields(kind, ("pretrain",), file, {
        ("all",): list(WRONG), ("all", 1): wrong(MISSING), ("all", 1, "image"): wrong(None),
        **{("all", 1, name): wrong(*TEXTS[1:]) for name in ("instruction", "answer")}})
    yield from damage(kind, ("pretrain",), file)
    yield from damage("alpaca_data.json", ("prepare",), "data/alpaca_data.json")


PARAMS = {"dim": (), "n_layers": (), "n_heads": (), "n_kv_heads": (), "multiple_of": (), "norm_eps": (MISSING,),
          "rope_theta": (MISSING, *REAL_NUMBERS), "vocab_size": (), "use_scaled_rope": (MISSING, True),
          "rope_scaling_factor": (MISSING, *REAL_NUMBERS), "ffn_dim_multiplier": (MISSING, None)}
HF_CONFIG = {"model_type": (), "hidden_size": (), "num_hidden_layers": (), "num_attention_heads": (), "vocab_size": (),
             "intermediate_size": (), "num_key_value_heads": (), "head_dim": (), "rms_norm_eps": (MISSING,),
             "tie_word_embeddings": (True,), "hidden_act": (), "attention_bias": (), "mlp_bias": (),
             "quantization_config": (MISSING,), "rope_parameters": (), "rope_scaling": (MISSING,)}
VIT_CONFIG: tuple[tuple, ...] = (
    ("architecture",), ("num_classes",), ("model_args",), ("pretrained_cfg",), ("pretrained_cfg", "input_size"),
    ("pretrained_cfg", "mean"), *(("model_args", name) for name in VIT))


def config_cases() -> Iterator[Case]:
    yield from fields("params.json", ("train",), "weights/tiny/params.json",
                      {(name,): wrong(*right) for name, right in PARAMS.items()})
    yield from damage("params.json", ("train",), "weights/tiny/params.json")
    file, index = "weights/hf/config.json", "weights/hf/model.safetensors.index.json"
    yield from fields("config.json (HF)", ("hf",), file, {(name,): wrong(*right) for name, right in HF_CONFIG.items()})
    yield from damage("config.json (HF)", ("hf",), file)
    tensor = "model.embed_tokens.weight"
    yield from fields("index.json (HF)", ("hf",), index, {("weight_map",): list(WRONG),
                                                          ("weight_map", tensor): list(WRONG)})
    yield from damage("index.json (HF)", ("hf",), index)
    yield from fields("config.json (ViT)", ("train",), "vit/config.json",
                      {path: wrong(*([MISSING] if path[-1] in ("mean", "num_heads") else [])) for path in VIT_CONFIG})
    yield from damage("config.json (ViT)", ("train",), "vit/config.json")


def wrong_tensors(tensor: torch.Tensor) -> list:
    return [tensor.long(), tensor.to(torch.complex64), tensor > 0, tensor[..., :-1], tensor[None], tensor[:0],
            tensor.sum(), tensor.flatten()[:1], tensor.to_sparse(), tensor.tolist(), tensor / 0, tensor * float("nan")]


def set_safetensors(file: str, path: tuple, new: Any) -> None:
    new = new.contiguous() if isinstance(new, torch.Tensor) else new
    save_file(replace_at(load_file(file), path, new), file)


def weight_cases() -> Iterator[Case]:
    kind, file = "weight files", "weights/tiny/consolidated.00.pth"
    tensors = torch.load(file)
    names = ("tok_embeddings.weight", "norm.weight", "layers.1.attention.wk.weight")
    yield from fields(kind, ("train",), file, {
        (): [*FEW[1:], [1], {1: 2}, {1: tensors[names[0]]}, tensors[names[0]]], ("x",): [tensors[names[0]], 7, {}],
        **{(name,): [*FEW, *wrong_tensors(tensors[name])] for name in names}}, set_torch)
    yield from damage(kind, ("train",), file, False)
    with zipfile.ZipFile(file) as archive:
        directory = archive.start_dir / Path(file).stat().st_size  # type: ignore[attr-defined]  # where it begins
    yield from flips(kind, ("train",), file, 60, directory)
    shard = str(min(Path("weights/hf").glob("*.safetensors")))
    for file, command in (("vit/model.safetensors", "train"), (shard, "hf")):
        name, tensor = next(iter(load_file(file).items()))
        kept = [value for value in wrong_tensors(tensor) if isinstance(value, torch.Tensor)
                and value.layout == torch.strided and value.numel()]
        yield from fields(kind, (command,), file, {(name,): [MISSING, *kept], ("x",): [tensor]}, set_safetensors)
        yield from damage(kind, (command,), file, False)
        header = int.from_bytes(Path(file).read_bytes()[:8], "little") / Path(file).stat().st_size
        yield from (Case(kind, f"{command}: {file} has bit {seed} of its header flipped", command,
                         partial(flip_header, file, header, seed))
                    for seed in range(30))
    yield from damage("tokenizer.model", ("train", "eval"), "weights/tokenizer.model", False)


def flip_header(file: str, fraction: float, seed: int) -> None:
    old, rng = bytearray(Path(file).read_bytes()), Random(seed)
    old[rng.randrange(8 + int(len(old) * fraction))] ^= 1 << rng.randrange(8)
    write(file, bytes(old))


ADAPTER_CONFIG = {"adapter_type": (), "visual_adapter_type": (), "adapter_dim": (), "adapter_scale": REAL_NUMBERS,
                  "temperature": REAL_NUMBERS, "hidden_proj": (), "n_prompt": (), "dropout_prob": (0, MISSING),
                  "dropout_var": (*REAL_NUMBERS, MISSING), "dropout_lim": (0, MISSING)}


def checkpoint_cases() -> Iterator[Case]:
    kind, file = "checkpoints", "run/checkpoint-1.pth"
    saved = torch.load(file, weights_only=True)
    tensor, name = next(iter(saved["model"].values())), next(iter(saved["model"]))
    model: dict[tuple, list] = {(): [[1], None, {}, tensor], ("model",): [*WRONG, {1: tensor}],
             ("model", name): [*FEW, *wrong_tensors(tensor)], ("model", "x"): [tensor],
             ("adapter_config",): wrong(MISSING), ("flags",): wrong(MISSING),
             **{("adapter_config", entry): wrong(*right, values=FEW) for entry, right in ADAPTER_CONFIG.items()}}
    yield from fields(kind, ("eval",), file, model, set_torch)
    yield from fields(kind, ("chat",), file, {path: values[:6] for path, values in model.items()}, set_torch)
    yield from fields(kind, ("eval",), file, {("flags", name): wrong(MISSING, values=FEW) for name in saved["flags"]},
                      set_torch)
    yield from damage(kind, ("eval", "chat"), file, False)
    yield from damage(kind, ("export",), file, False, skip=("is missing",))  # the one before is exported
    yield from flips(kind, ("eval",), file, 50)

    file = "half/checkpoint-0.pth"
    moment = saved["optimizer"]["state"][0]["exp_avg"]
    group = [name for name in saved["optimizer"]["param_groups"][0] if name not in ("lr", "initial_lr")]
    state: dict[tuple, list] = {
        ("epoch",): [*FEW, 7], ("skipped",): wrong(10**30, values=FEW), ("record",): wrong(None, values=FEW),
        ("optimizer", "state", 0, "exp_avg"): [*FEW, *wrong_tensors(moment)],
        ("optimizer", "state", 0, "step"): wrong(-1, 1.5, values=FEW)}
    state |= {path: list(FEW) for path in [
        ("optimizer",), ("scaler",), ("examples",), ("optimizer", "state"), ("optimizer", "state", 0),
        ("optimizer", "param_groups"), ("optimizer", "param_groups", 0),
        *(("optimizer", "param_groups", 0, name) for name in group)]}
    yield from fields(kind, ("go on",), file, state, set_torch)
    yield from damage(kind, ("go on", "resume"), file, False)
    yield from flips(kind, ("go on",), file, 50)
    yield from fields(kind, ("go on mid",), "mid/last.pth", {
        ("record",): wrong(values=FEW), **{("record", name): list(FEW) for name in ("epoch", "skipped", "steps")},
        ("record", "rates"): list(FEW), ("record", "steps", 0): list(FEW)}, set_torch)
    yield from damage(kind, ("go on mid",), "mid/last.pth", False)


SCORED_FLAGS = {"lr_schedule": ("step",), "lr": (1.5, 7, 10**30), "min_lr": (0,), "epochs": (),
                "warmup_epochs": (0, 1.5), "dropout_prob": (0,), "dropout_var": REAL_NUMBERS, "dropout_lim": (0,),
                "batch_size": (7, 10**30), "accum_iter": (7, 10**30)}


READERS = {
    "run/config.json": ("plot", "eval", "chat", "again"), "half/config.json": ("go on",),
    "run/log.txt": ("plot", "again"), "half/log.txt": ("go on",), "run/metrics.jsonl": ("plot",),
    "half/metrics.jsonl": ("go on",), "run/scores.json": ("plot", "eval again"),
    "run/preds.json": ("plot", "eval again"), "run/generations.jsonl": ("plot", "eval again"),
    "run/mme_scores.json": ("mme again",), "run/mme_answers.jsonl": ("mme again",)}


def run_file_cases() -> Iterator[Case]:
    kind, recipe = "run files", json.loads(Path("half/recipe.json").read_text())
    yield from fields(kind, ("resume",), "half/recipe.json", {
        ("flags",): list(WRONG), ("recipe",): list(WRONG),
        **{("flags", name): wrong(values=FEW) for name in recipe["flags"]}})
    yield from fields(kind, ("go on",), "half/recipe.json", {("recipe", name): list(FEW) for name in recipe["recipe"]})
    yield from damage(kind, ("go on", "resume"), "half/recipe.json")
    for file, commands in READERS.items():
        yield from damage(kind, commands, file)
    yield from fields(kind, ("plot",), "run/config.json", {
        ("flags",): list(WRONG), ("world_size",): wrong(7, 10**30), ("n_layers",): wrong(MISSING, 7),
        **{("flags", name): wrong(*right) for name, right in SCORED_FLAGS.items()}})
    yield from fields(kind, ("chat",), "run/config.json", {
        ("flags",): list(FEW), **{("flags", name): list(FEW) for name in ("llm_model", "vision_model", "adapter_dim")}})
    yield from fields(kind, ("plot",), "run/log.txt", {
        (): wrong(MISSING), ("epoch",): wrong(0), ("train_closs",): wrong(None, *REAL_NUMBERS, 0, -1),
        ("skipped_steps",): wrong(MISSING, 0, 7, 10**30)}, set_line)
    yield from fields(kind, ("plot",), "run/metrics.jsonl", {
        (): wrong(MISSING), ("epoch",): wrong(0, 7, 10**30), ("step",): wrong(7, 10**30),
        ("loss",): wrong(None, *REAL_NUMBERS, 0)}, set_line)
    columns = [("Avg",), ("counts",), ("correct",), ("counts", "NAT"), ("correct", "Avg"), ("split",), ("checkpoint",)]
    yield from fields(kind, ("plot",), "run/scores.json", {path: wrong(*TEXTS if path == ("split",) else [],
                                                                       *[MISSING] if path == ("checkpoint",) else [])
                                                           for path in columns})
    yield from fields(kind, ("eval again",), "run/scores.json", {path: list(FEW) for path in columns})
    qid = next(iter(json.loads(Path("run/preds.json").read_text())))
    yield from fields(kind, ("plot", "eval again"), "run/preds.json", {(qid,): list(FEW)})
    yield from fields(kind, ("plot",), "run/generations.jsonl", {
        (): wrong(MISSING), **{(name,): list(WRONG) for name in ("qid", "prediction")}}, set_line)


def picture_cases() -> Iterator[Case]:
    train, test = problem_with_picture("train"), problem_with_picture("test")
    bomb = bytearray(Path(f"data/images/train/{train}/image.png").read_bytes())
    bomb[16:24] = (2**30).to_bytes(4, "big") * 2
    for file, command in ((f"data/images/train/{train}/image.png", "train"), (f"data/{COCO}", "pretrain"),
                          (f"data/images/test/{test}/image.png", "eval"), ("data/mme/count/a.png", "mme")):
        yield from damage("pictures", (command,), file, False)
        yield Case("pictures", f"{command}: {file} says that it is huge", command,
                   partial(write, file, bytes(bomb)))
    pictures = ("nowhere.png", "data", "/proc/self/mem", "run/log.txt", "", "\ud800")
    yield from (Case("pictures", f"chat: /image {name!r}", "chat", lines=(f"/image {name}", *Case.lines))
                for name in pictures)


def mme_cases() -> Iterator[Case]:
    file = "data/mme/count/a.txt"
    yield from damage("MME texts", ("mme",), file, False, skip=("is missing",))
    texts = ("A?\tYes\n", "A?\tYes\nB?\tNo\nC?\tNo\n", "A? Yes\nB? No\n", "A?\tYes\nB?\tmaybe\n", "\tYes\n\tNo\n",
             "A?\tYes\tB?\tNo\n", "\n\n")
    yield from (Case("MME texts", f"mme: {file} is {text!r}", "mme", partial(write, file, text.encode()))
                for text in texts)
    yield Case("MME texts", "mme: no folder", "mme", lambda: os.rename("data/mme", "data/other"))


# --- Flags ---

FLAG_TEXTS = ("nan", "inf", "-1", "0", "1e30", "1e400", "", " ", "x", "²", "1.5", "9" * 5000, "../..", "/proc/x",
              "data/problems.json", "n" * 300)
NEW_FOLDERS = ("output_dir", "out", "log_dir")  # any name that can be written is right
WITH_FLAGS = ("train", "eval", "mme", "plot", "chat", "export")
UNTRIED = ("help", "trained_with", "pictures", "share", "cli")
# flag values that are right although the result is another, or is as slow as it says
RIGHT_FLAGS = {
    **dict.fromkeys(("adapter_scale", "temperature", "clip_grad", "lr", "blr"), ("1.5",)),
    **dict.fromkeys(("dropout_prob", "dropout_lim", "drop_path", "min_lr", "seed", "num_workers"), ("0",)),
    "weight_decay": ("0", "1.5"), "warmup_epochs": ("0", "1.5"), "dropout_var": ("1.5", "1e30"),
    "generation_temperature": ("0", "1.5", "1e30"), "save_every_minutes": ("1.5", "1e30")}


def flags_of(command: str) -> Iterator[argparse.Action]:
    """All flags of train.py and eval.py; of another command, those that it does not share with these."""
    shared = vars(evaluation.get_args_parser().parse_args([])) if command not in ("train", "eval") else ()
    for action in import_module(COMMANDS[command][0]).get_args_parser()._actions:
        if action.option_strings and action.dest not in shared and action.dest not in UNTRIED:
            yield action


def flag_cases() -> Iterator[Case]:
    for command in WITH_FLAGS:
        for action, text in product(flags_of(command), FLAG_TEXTS):
            if not is_right(action, text):
                flag = f"{action.option_strings[0]}={text}"
                yield Case("flags", f"{command}: {flag[:60]!r}", command, argv=(flag,))
    yield from (Case("flags", f"{command}: {' '.join(argv)}", command, argv=argv)
                for command, argv in product(WITH_FLAGS, (("--nonsense",), ("--lr_",), ("--dev", "cpu"), ("--", "x"))))


def is_right(action: argparse.Action, text: str) -> bool:
    """Whether the value is one that the flag may have."""
    if action.dest in NEW_FOLDERS:
        return not text.startswith(("/", "data", "n" * 300))
    return text in (*RIGHT_FLAGS.get(action.dest, ()), *(action.choices or ()))


def other_value(declared: Flag, value: Any) -> tuple:
    """Words of the command line that give the flag another value than this one."""
    if isinstance(value, bool):
        return ()
    if declared.choices:
        return (next(choice for choice in declared.choices if choice != value),)
    if isinstance(value, int | float):
        return (str(value + 1 if isinstance(value, int) else value / 2 or 0.5),)
    return ("0.5" if declared.accepts(0.5) else "nowhere",)


def resume_cases() -> Iterator[Case]:
    """Flags that say something else than the run that they are to go on with, or to score."""
    recorded = json.loads(Path("half/recipe.json").read_text())["flags"]
    for name, declared in TRAIN_FLAGS.items():
        if declared.role in CHANGES_RESULTS or declared.stated_as:
            argv = (f"--{name}", *other_value(declared, recorded[name]))
            commands = ("resume", "go on", *(["eval"] if name in ADAPTER_CONFIG and "dropout" not in name else []))
            yield from (Case("other flags", f"{command}: {' '.join(argv)}", command, argv=argv) for command in commands)
    yield Case("other flags", "resume: --output_dir run", "resume", argv=("--output_dir", "run"))
    for path in ("nowhere", "half/checkpoint-7.pth", "half/log.txt", "data", "half/recipe.json", "/dev/null"):
        yield Case("other flags", f"train: --resume {path}", "train", argv=("--resume", path))


LINES = ("/run", "/run 0", "/run -1", "/run 1 1", "/run 9", "/run ²", "/run x", "/run 1.5", "/compare", "/compare 1",
         "/compare ² 1", "/image", "/image nowhere", "/options", "/options |", "/options A | A", "/options A",
         "/options A | B | C | D | E | F", "/nonsense", "/", "//", "/ run", "\ud800", "\udcff\udcfe", "x" * 20_000,
         "\0", "\x1b[31m", "/context \udcff", "/options \udcff | B", "/new x", "/help x", "/runs x", "é" * 999)


def chat_cases() -> Iterator[Case]:
    for line in LINES:
        yield Case("chat lines", f"chat: {line[:30]!r}", "chat", lines=(line, "/new", *Case.lines))
        yield Case("chat lines", f"chat: {line[:30]!r} and a question", "chat",
                   lines=(line, "Why?", "/new", *Case.lines))


KINDS = (data_cases, config_cases, weight_cases, checkpoint_cases, run_file_cases, picture_cases, mme_cases, flag_cases,
         resume_cases, chat_cases)
