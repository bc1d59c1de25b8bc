"""A checkpoint says what it was trained on: other files of the base are told, other normalisation is refused."""

import json
import shutil

import pytest
import torch

import demo
import eval as evaluation
import train
from lavin.runtime.errors import UserError
from lavin.runtime.files import value_sha256
from lavin.tokenizer import TOKENIZATION, Example, Tokenizer
from tiny_runs import load_checkpoint, run_flags, write_run
from tiny_tokenizers import qwen, write_json
from user_errors import error_message
from util.chat.chatbot import Chatbot, find_runs
from util.chat.command import load_chatbot
from util.fingerprint import fingerprints
from util.trained_model import image_statistics, load_model, read_trained, warn_of_other_base

WARNING = "was trained on other files of"


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the base, whose files a test may change."""
    shutil.copytree(base.weights, tmp_path / "weights")
    shutil.copytree(base.vision, tmp_path / "vit")
    return type(base)(tmp_path / "weights", tmp_path / "vit")


def args_of(run, *flags):
    return evaluation.get_args_parser().parse_args(["--adapter_path", str(run), "--device", "cpu", *map(str, flags)])


def change_checkpoint(run, **entries) -> None:
    path = run / "checkpoint-3.pth"
    content = {name: value for name, value in load_checkpoint(path).items() if name != "sha256"}
    torch.save({**content, **entries}, path)


@pytest.fixture
def run(copy, tmp_path):
    """A run that says what it was trained on: the copy."""
    write_run(tmp_path / "run", copy, 0)
    args = args_of(tmp_path / "run")
    read_trained(args)
    change_checkpoint(tmp_path / "run", **fingerprints(args), image_mean=[0.485, 0.456, 0.406],
                      image_std=[0.229, 0.224, 0.225])
    return tmp_path / "run"


def change_bytes(path) -> None:
    tensors = torch.load(path, weights_only=True)
    tensors["norm.weight"] += 0.5
    torch.save(tensors, path)


def test_train_writes_what_the_recipe_says(base, scienceqa, tmp_path, capsys):
    flags = run_flags(base, scienceqa, tmp_path / "run", "--epochs", "1", "--warmup_epochs", "0")
    train.main(train.get_args_parser().parse_args(flags))
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-0.pth")
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert {name: checkpoint[name] for name in ("base", "vision")} == {name: written[name]
                                                                      for name in ("base", "vision")}
    capsys.readouterr()
    args = args_of(tmp_path / "run")
    model, *_ = load_model(args)
    assert {name: checkpoint[name] for name in ("image_mean", "image_std")} == image_statistics(model)
    assert "warning" not in capsys.readouterr().out
    assert fingerprints(args).items() <= written.items()


def test_the_same_base_and_old_checkpoints_say_nothing(run, copy, tmp_path, capsys):
    load_model(args_of(run))
    write_run(tmp_path / "old", copy, 0)
    change_bytes(copy.weights / "tiny" / "consolidated.00.pth")
    load_model(args_of(tmp_path / "old"))
    assert "warning" not in capsys.readouterr().out


def test_another_base_of_the_same_shape_is_told(run, copy, capsys):
    change_bytes(copy.weights / "tiny" / "consolidated.00.pth")
    load_model(args_of(run))
    lines = [line for line in capsys.readouterr().out.splitlines() if WARNING in line]
    assert len(lines) == 1 and "--llm_model" in lines[0] and "checkpoint-3.pth" in lines[0]


def test_another_vit_is_told_where_it_can_be_compared(run, copy, capsys):
    from safetensors.torch import load_file, save_file
    tensors = load_file(copy.vision / "model.safetensors")
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, copy.vision / "model.safetensors")
    read_trained(args_of(run))
    assert f"{WARNING} --vision_model" in capsys.readouterr().out
    change_checkpoint(run, vision="vit_large_patch14_clip_224.openai")  # a name: timm has fetched it from somewhere
    read_trained(args_of(run))
    assert WARNING not in capsys.readouterr().out
    warn_of_other_base(run, {"vision": "vit_base_patch16_224"},
                       {"base": "", "vision": "vit_large_patch14_clip_224", "base_sha256": "", "vision_sha256": None})
    assert f"{WARNING} --vision_model" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_another_normalisation_of_pixels_is_refused(run, name):
    change_checkpoint(run, **{name: [0.5, 0.5, 0.5]})
    with pytest.raises(UserError, match=f"checkpoint-3.pth was trained with {name} .*, and this --vision_model has"):
        load_model(args_of(run))


@pytest.mark.parametrize("entry", [{"image_mean": [0.5]}, {"image_std": "x"}, {"base": 7}])
def test_error_names_the_entry(run, entry):
    change_checkpoint(run, **entry)
    with pytest.raises(UserError, match=f"checkpoint-3.pth: {next(iter(entry))}"):
        read_trained(args_of(run))


def test_the_chat_leaves_out_runs_of_another_base(run, base, copy, tmp_path):
    known = {name: load_checkpoint(run / "checkpoint-3.pth")[name] for name in ("base", "base_sha256")}
    for i, entries in enumerate(({}, known, {"base": known["base"]}, {"base": "0" * 64},
                                 {**known, "base_sha256": "0" * 64})):
        write_run(tmp_path / f"run{i}", copy, i)
        change_checkpoint(tmp_path / f"run{i}", **entries)
    runs, left_out = find_runs(str(tmp_path))
    assert set(runs) == {"run", "run0", "run1", "run2"}
    for i in (3, 4):
        assert [line for line in left_out
                if f"run{i} is left out: it was trained with other files of --llm_model" in line]


def test_the_chat_refuses_a_run_of_another_normalisation(run, tokenizer):
    model, tokenizer, _ = load_model(args_of(run))
    bot = Chatbot(model, tokenizer, {"run": run}, 200)
    bot.load_run("run")
    change_checkpoint(run, image_std=[0.5, 0.5, 0.5])
    with pytest.raises(UserError, match="image_std"):
        bot.load_run("run")


def test_numbers_are_compared_as_numbers(run):
    """Float32 and decimal spellings of one value."""
    change_checkpoint(run, image_mean=torch.tensor([0.485, 0.456, 0.406]).tolist())
    model, *_ = load_model(args_of(run))
    assert image_statistics(model)["image_mean"] == [0.485, 0.456, 0.406]


# --- Prompt and answer, which earlier versions tokenized together ---

TOGETHER = "was trained by an earlier version, which tokenized prompt and answer together"


def state(path, **tokenization) -> None:
    """Rewrites a checkpoint with this statement; as an earlier version wrote it, without any."""
    content = {name: value for name, value in load_checkpoint(path).items() if name not in ("tokenization", "sha256")}
    content |= tokenization
    torch.save({**content, "sha256": value_sha256(content)}, path)


def use_joining_tokenizer(copy) -> None:
    """Gives the base a tokenizer with a token `:The`, and with fewer tokens than the base has."""
    tokenizer, path = Tokenizer(write_json(copy.weights / "tiny", qwen())), copy.weights / "tiny" / "params.json"
    assert tokenizer.joins("Response:", "The answer is A.")
    n_words = Tokenizer(copy.weights / "tokenizer.model").n_words
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": n_words}))


def example_of_earlier_versions(self, prompt, answer=None, image=None, n_prompt=6, max_seq_len=None, history=()):
    prefix, together = self.prefix(0 if image is None else n_prompt), self.encode(prompt + (answer or ""))
    alone = self.encode(prompt)
    ids = [*prefix, *together, *([] if answer is None else [self.eos_id])][:max_seq_len and max_seq_len - 1]
    start = next((i for i, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b), len(alone))
    return Example(ids, min(len(prefix) + start, len(ids)), image)


def begin_with_earlier_version(flags, folder, monkeypatch, tmp_path) -> None:
    """Trains one of two epochs."""
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "example", example_of_earlier_versions)
        patch.setenv("LAVIN_CACHE", str(tmp_path / "cache"))  # its key is that of this version's code
        train.main(train.get_args_parser().parse_args([*flags, "--stop_after_epoch", "1"]))
    assert load_checkpoint(folder / "checkpoint-0.pth")["tokenization"] == TOKENIZATION
    state(folder / "checkpoint-0.pth")


def two_epochs(copy, scienceqa, folder) -> list[str]:
    return run_flags(copy, scienceqa, folder, "--epochs", "2", "--warmup_epochs", "0")


def test_a_run_of_llama_that_an_earlier_version_began_goes_on(copy, scienceqa, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    flags = two_epochs(copy, scienceqa, folder)
    begin_with_earlier_version(flags, folder, monkeypatch, tmp_path)
    train.main(train.get_args_parser().parse_args(flags))
    load_model(args_of(folder))
    assert (folder / "checkpoint-1.pth").exists() and "earlier version" not in capsys.readouterr().out


def test_a_run_whose_ids_have_changed_says_why_it_cannot_go_on(copy, scienceqa, tmp_path, monkeypatch):
    use_joining_tokenizer(copy)
    folder = tmp_path / "run"
    flags = two_epochs(copy, scienceqa, folder)
    begin_with_earlier_version(flags, folder, monkeypatch, tmp_path)

    def resume() -> None:
        train.main(train.get_args_parser().parse_args(flags))
    message = error_message(resume)
    assert f"checkpoint-0.pth {TOGETHER}" in message and "--overwrite" in message
    state(folder / "checkpoint-0.pth", tokenization=TOKENIZATION)
    assert "other examples" in error_message(resume)  # something else has changed


@pytest.mark.parametrize("joining, states, told", [
    (True, False, True), (True, True, False), (False, False, False), (False, True, False)])
def test_a_run_of_an_earlier_version_is_told_where_its_ids_have_changed(copy, tmp_path, capsys, joining, states, told):
    if joining:
        use_joining_tokenizer(copy)
    runs = tmp_path / "runs"
    runs.mkdir()
    for i, name in enumerate("ab"):
        write_run(runs / name, copy, i)
        if states:
            change_checkpoint(runs / name, tokenization=TOKENIZATION)
    load_model(args_of(runs / "a"))
    lines = [line for line in capsys.readouterr().out.splitlines() if TOGETHER in line]
    assert len(lines) == told and all(f"{runs / 'a' / 'checkpoint-3.pth'}" in line for line in lines)
    load_chatbot(demo.get_args_parser().parse_args(["--runs", str(runs), "--device", "cpu"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if TOGETHER in line]
    assert [name for name in "ab" for line in lines if f"{runs / name}/" in line] == list("ab") * told
