"""A run's folder belongs to one recipe; the same command goes on; nothing old goes before something new is whole."""

import errno
import json
import math
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import train
from killed import Killed, stop_after
from lavin.runtime import signals
from lavin.runtime.errors import UserError
from lavin.runtime.files import value_sha256
from tiny_runs import forget_in_checkpoint, load_checkpoint, read_log, run_flags
from user_errors import error_message
from util.runs import LAST, checkpoints
from util.training import run_folder, trainer
from util.training.epoch_record import EpochRecord
from util.training.metrics import drop_metrics
from util.training.recipe import fit_effective_batch
from util.training.resume import take_flags_of_run
from util.training.trainer import Trainer

DROPOUT = ("--dropout_prob", "0.3", "--dropout_lim", "0.3", "--drop_path", "0.2")


def run(*flags) -> None:
    train.main(train.get_args_parser().parse_args([str(flag) for flag in flags]))


def refused(*flags) -> str:
    return error_message(run, *flags)


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file but the hidden ones, which are those of the lock."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def die_at_file(monkeypatch, n: int) -> list:
    """The process dies at the n-th file that is removed or moved, and does nothing more. Returns the files up to it."""
    done: list = []

    def dying(function):
        def call(path, *args, **kwargs):
            if len(done) >= n:
                raise Killed
            done.append(path)
            return function(path, *args, **kwargs)
        return call
    for owner, names in ((Path, ("unlink", "replace", "rename", "rmdir")), (os, ("replace",)), (shutil, ("rmtree",))):
        for name in names:
            monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    return done


@pytest.fixture(scope="module")
def flags(base, scienceqa):
    """The flags of a run of three epochs of three steps, without its folder."""
    return run_flags(base, scienceqa, "unused", *DROPOUT)


def in_folder(flags, folder, *more) -> list:
    return [*flags, "--output_dir", folder, *more]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """A finished run, whose folder is called `run`: checkpoints name it. Read-only."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(*in_folder(flags, folder))
    return folder


@pytest.fixture
def finished(unbroken, tmp_path):
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


def same_tensors(folder: Path, other: Path, name: str = "checkpoint-2.pth") -> bool:
    a, b = ({**load_checkpoint(path / name), "flags": None, "sha256": None} for path in (folder, other))
    return json.dumps(a, default=lambda t: t.tolist()) == json.dumps(b, default=lambda t: t.tolist())


# --- The same command again ---

def test_a_finished_run_is_left_alone(flags, finished, capsys):
    before = contents(finished)
    run(*in_folder(flags, finished))
    assert contents(finished) == before and "finished" in capsys.readouterr().out


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_stopped_run_goes_on_to_the_same_bytes(flags, unbroken, tmp_path, monkeypatch, steps):
    """Stopped at any step of the three epochs. Only the folder's name differs in the checkpoints.

    All processes learn of it a step later; where that is an epoch's last one, the epoch is finished."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped) as stopped:
        stop_after(patched, steps)
        run(*in_folder(flags, folder))
    assert "saved" in str(stopped.value) and str(folder) in str(stopped.value)
    run(*in_folder(flags, folder))
    assert same_tensors(folder, unbroken) and not (folder / LAST).exists()
    for name in ("log.txt", "metrics.jsonl"):
        lines, expected = ([json.loads(line) for line in (path / name).read_text().splitlines()]
                           for path in (folder, unbroken))
        assert [(line["epoch"], line.get("train_closs")) for line in lines] == [
            (line["epoch"], line.get("train_closs")) for line in expected]


def test_a_run_that_is_stopped_in_its_last_step_is_finished(flags, unbroken, tmp_path, monkeypatch):
    stop_after(monkeypatch, 9)
    run(*in_folder(flags, tmp_path / "run"))
    assert same_tensors(tmp_path / "run", unbroken)


def test_stopping_after_an_epoch_changes_nothing_about_the_run(flags, unbroken, tmp_path, capsys):
    """The schedule is that of all epochs. --resume does not take the stop from the run."""
    folder = tmp_path / "run"
    run(*in_folder(flags, folder, "--stop_after_epoch", "1"))
    assert list(checkpoints(folder)) == [0] and same_tensors(folder, unbroken, "checkpoint-0.pth")
    assert "run, 1 of 3 epochs: the same command" in capsys.readouterr().out
    run(*in_folder(flags, folder, "--stop_after_epoch", "2"))
    assert list(checkpoints(folder)) == [0, 1]
    run("--resume", folder, "--device", "cpu")
    assert same_tensors(folder, unbroken)


def test_a_stop_behind_the_last_epoch_is_that_of_the_schedule(flags, unbroken, tmp_path):
    run(*in_folder(flags, tmp_path / "run", "--stop_after_epoch", "5"))
    assert list(checkpoints(tmp_path / "run")) == [0, 1, 2] and same_tensors(tmp_path / "run", unbroken)


def test_a_run_that_trains_on_drops_the_results_of_its_former_checkpoint(flags, tmp_path):
    folder = tmp_path / "run"
    run(*in_folder(flags, folder, "--stop_after_epoch", "1"))
    results = [folder / name for name in ("preds.json", "generations.jsonl", "scores.json", "mme_answers.jsonl",
                                          "mme_scores.json", "answers.0.partial.jsonl", "mme_answers.1.partial.jsonl")]
    for path in results:
        path.write_text("{}")
    run(*in_folder(flags, folder, "--stop_after_epoch", "2"))
    assert not [path.name for path in results if path.exists()]


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_a_killed_run_goes_on_from_its_last_save(flags, unbroken, tmp_path, monkeypatch, steps):
    """The run saves a checkpoint after each step."""
    folder, often = tmp_path / "run", ("--save_every_minutes", "1e-9")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(patched, steps, Killed)
        run(*in_folder(flags, folder, *often))
    assert (folder / LAST).exists() == (steps not in (4, 7))
    run(*in_folder(flags, folder))
    assert same_tensors(folder, unbroken)


def test_an_interrupted_save_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    run, path = run_folder.RunFolder(tmp_path, recipe={}, epochs=2), tmp_path / "checkpoint-0.pth"
    run.save(b"the first content", 0, {"epoch": 0})

    def broken_write(path, content):
        with open(path, "wb") as file:
            file.write(content[:9])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", broken_write)
    with pytest.raises(OSError):
        run.save(b"the second content", 0, {"epoch": 0})
    assert path.read_bytes() == b"the first content" and read_log(tmp_path) == [{"epoch": 0}]


def test_another_recipe_is_refused_by_its_flags(flags, finished, scienceqa_copy):
    before = contents(finished)
    message = refused(*in_folder(flags, finished, "--lr", "0.5", "--seed", "7"))
    assert "--lr 0.5, not 0.01" in message and "--seed 7, not 0" in message and "--overwrite" in message
    assert "effective batch" in refused(*in_folder(flags, finished, "--batch_size", "2"))
    assert "--epochs 4, not 3" in refused(*in_folder(flags, finished, "--epochs", "4"))
    problems = json.loads((scienceqa_copy / "problems.json").read_text())
    problems["100"]["hint"] = "Another hint."
    (scienceqa_copy / "problems.json").write_text(json.dumps(problems))
    assert "data" in refused(*in_folder(flags, finished, "--data_root", scienceqa_copy))
    assert contents(finished) == before


@pytest.mark.parametrize("more, words", [(("--lr", "2e-2"), "--lr 0.02, not 0.01"), (("--use_caption",), "")])
def test_a_checkpoint_of_another_run_is_refused(flags, finished, tmp_path, more, words):
    """It was copied into the folder. With captions, the data are others too."""
    run(*in_folder(flags, tmp_path / "other", *more, "--stop_after_epoch", "1"))
    (finished / "checkpoint-1.pth").unlink()
    (tmp_path / "other" / "checkpoint-0.pth").replace(finished / "checkpoint-2.pth")
    before = contents(finished)
    message = refused(*in_folder(flags, finished))
    assert message.startswith(f"{finished / 'checkpoint-2.pth'} was written by a run of another recipe (") and (
        words or "other training data of --data_root") in message
    assert contents(finished) == before
    (finished / "checkpoint-2.pth").unlink()
    run(*in_folder(flags, finished))


def test_a_run_within_its_first_epoch_is_not_replaced_by_another_recipe(flags, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(patched, 2, Killed)
        run(*in_folder(flags, folder, "--save_every_minutes", "1e-9"))
    before = contents(folder)
    assert (folder / LAST).exists() and not checkpoints(folder)
    assert "--lr 0.5, not 0.01" in refused(*in_folder(flags, folder, "--lr", "0.5"))
    assert contents(folder) == before


def test_the_recipe_does_not_depend_on_paths_and_processes(flags, finished, scienceqa_copy, base, tmp_path):
    """A copy of the data and the base elsewhere, and other micro-batches."""
    shutil.copytree(base.weights, tmp_path / "weights")
    run(*in_folder(flags, finished, "--data_root", scienceqa_copy, "--llama_model_path", tmp_path / "weights",
                   "--batch_size", "1", "--accum_iter", "4", "--gradient_checkpointing", "--compile", "off",
                   "--cuda_graphs", "off"))


def test_other_base_weights_are_another_recipe(flags, finished, base, tmp_path):
    shutil.copytree(base.weights, tmp_path / "weights")
    path = tmp_path / "weights" / "tiny" / "consolidated.00.pth"
    weights = torch.load(path)
    weights["norm.weight"] += 1
    torch.save(weights, path)
    assert "--llm_model" in refused(*in_folder(flags, finished, "--llama_model_path", tmp_path / "weights"))


@pytest.mark.parametrize("name", ["scores.json", "checkpoint-0.pth", "config.json"])
def test_a_folder_with_files_of_something_else_is_refused(flags, tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert name in refused(*in_folder(flags, tmp_path)) and (tmp_path / name).read_text() == "{}"


# --- Overwriting ---

def test_overwriting_keeps_the_old_run_until_a_new_checkpoint_is_whole(flags, finished, monkeypatch):
    before = contents(finished)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(patched, 2, Killed)
        run(*in_folder(flags, finished, "--overwrite", "--seed", "1"))
    assert {name: (finished / name).read_bytes() for name in before} == before
    run(*in_folder(flags, finished))  # the old run is still whole, and finished
    (finished / "scores.json").write_text("{}")
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stop_after(patched, 1)
        run(*in_folder(flags, finished, "--overwrite", "--seed", "1"))
    assert sorted(contents(finished)) == ["config.json", LAST, "recipe.json"]
    run(*in_folder(flags, finished, "--overwrite", "--seed", "1"))  # the same command again goes on
    assert [line["epoch"] for line in read_log(finished)] == [0, 1, 2]
    assert json.loads((finished / "config.json").read_text())["resumed"][0]["step"] > 0


@pytest.mark.parametrize("n", range(12))
def test_an_interrupted_replacement_is_completed(flags, finished, tmp_path, monkeypatch, n):
    """The process dies at the n-th file that is removed or moved."""
    staging = Path(shutil.copytree(finished, finished / run_folder.STAGING))
    for path in (staging / "checkpoint-0.pth", staging / "checkpoint-1.pth", staging / "checkpoint-2.pth"):
        path.rename(staging / LAST)
    (staging / "recipe.json").write_text("new")
    (finished / "scores.json").write_text("old")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        die_at_file(patched, n)
        run_folder.promote(finished, None)
    run_folder.recover_promotion(finished)
    assert sorted(contents(finished)) == ["config.json", LAST, "log.txt", "metrics.jsonl", "recipe.json"]
    assert (finished / "recipe.json").read_text() == "new" and not list(finished.glob(".p*"))


# --- --resume ---

def test_resume_takes_everything_from_the_run(flags, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stop_after(patched, 4)
        run(*in_folder(flags, folder))
    monkeypatch.chdir(tmp_path)
    run("--resume", folder)
    assert same_tensors(folder, unbroken) and not (tmp_path / "output_dir").exists()


@pytest.mark.parametrize("given, words", [
    (["--lr", "0.5"], "--lr 0.5 contradicts"), (["--lr_schedule", "step"], "--lr_schedule step contradicts"),
    (["--seed", "3"], "--seed 3 contradicts"), (["--epochs", "9"], "--epochs 9 contradicts"),
    (["--adapter_dim", "4"], "--adapter_dim 4 contradicts"), (["--use_caption"], "--use_caption True contradicts"),
    (["--blr", "0.5"], "--blr 0.5 contradicts"), (["--prompt_format", "QCM-A"], "--prompt_format QCM-A contradicts"),
    (["--output_dir", "elsewhere"], "--output_dir elsewhere contradicts"), (["--batch_size", "3"], "effective batch 4"),
    (["--accum_iter", "2"], "effective batch 4"),
    (["--precision", "bf16"], "--precision bf16"), (["--data_root", "elsewhere"], "elsewhere/problems.json")])
def test_flags_that_contradict_the_resumed_run_are_refused(finished, given, words):
    before = contents(finished)
    assert words in refused("--resume", finished, *given)
    assert contents(finished) == before


def test_resume_does_not_replace_a_run_that_once_replaced_another(flags, finished, scienceqa_copy):
    """--overwrite is a word of one command, not a flag of the run."""
    run(*in_folder(flags, finished, "--seed", "5", "--overwrite"))
    (finished / "checkpoint-2.pth").unlink()
    before = contents(finished)
    problems = json.loads((scienceqa_copy / "problems.json").read_text())
    problems["100"]["hint"] = "Another hint."
    (scienceqa_copy / "problems.json").write_text(json.dumps(problems))
    assert "belongs to another recipe" in refused("--resume", finished, "--data_root", scienceqa_copy)
    assert contents(finished) == before


def test_going_back_drops_what_came_later_once_a_new_checkpoint_is_whole(flags, finished, unbroken, monkeypatch):
    (finished / "scores.json").write_text("{}")
    back, before = ("--resume", finished / "checkpoint-0.pth"), contents(finished)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        stop_after(patched, 1, Killed)
        run(*back)
    shutil.copytree(finished / run_folder.STAGING, finished.parent / "left over")
    shutil.rmtree(finished / run_folder.STAGING)
    assert contents(finished) == before
    shutil.move(finished.parent / "left over", finished / run_folder.STAGING)
    run("--resume", finished)  # is finished, whatever is left over
    assert list(checkpoints(finished)) == [0, 1, 2] and (finished / "scores.json").exists()
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stop_after(patched, 1)
        run(*back)
    assert list(checkpoints(finished)) == [0] and not (finished / "scores.json").exists()
    start = run_folder.RunFolder(finished, {}, epochs=3)
    run_folder.find_start(start, str(finished / LAST))  # as --resume RUN: it stays known where training went back to
    assert (start.checkpoint.path, start.went_back_to, start.staged) == (finished / LAST, 0, False)
    made = []
    monkeypatch.setattr(Trainer, "train_step", lambda self, *args, step=Trainer.train_step: made.append(1) or
                        step(self, *args))
    run(*back)  # the same command again does not go back a second time
    assert len(made) < 6 and same_tensors(finished, unbroken, "checkpoint-1.pth") is False  # it says where it went back
    assert [line["epoch"] for line in read_log(finished)] == [0, 1, 2]
    for name, tensor in load_checkpoint(unbroken / "checkpoint-2.pth")["model"].items():
        assert torch.equal(load_checkpoint(finished / "checkpoint-2.pth")["model"][name], tensor)


def go_back(folder: Path, content: bytes) -> None:
    """Goes back as train.py --resume FOLDER/checkpoint-0.pth does, up to its first checkpoint."""
    checkpoint = run_folder.Checkpoint.read(folder / "checkpoint-0.pth")
    run = run_folder.RunFolder(folder, {}, 3, checkpoint=checkpoint, went_back_to=0, staged=True)
    run.begin({})
    drop_metrics(run.path, 1, 0)
    run.save(content, 1, {"epoch": 1, "train_closs": 7.0})


def state(folder: Path) -> tuple:
    """The checkpoint where the next command goes on, and what the folder says after the first thing that this command
    does."""
    take_flags_of_run(train.get_args_parser().parse_args(["--resume", str(folder)]), train.get_args_parser())
    run_folder.recover_promotion(folder)
    run = run_folder.RunFolder(folder, {}, epochs=3)
    run_folder.find_start(run, "")
    metrics = (folder / "metrics.jsonl").read_text().count("\n")
    return run.checkpoint.path.name, (*checkpoints(folder),), (*(line["epoch"] for line in read_log(folder)),), metrics


def test_going_back_may_be_killed_at_any_file(finished, tmp_path, monkeypatch):
    """Afterwards the folder is that of the finished run, or that of the run that has gone back."""
    (finished / "scores.json").write_text("{}")
    saved = {**load_checkpoint(finished / "checkpoint-1.pth"), "went_back_to": 0}
    del saved["sha256"]
    torch.save({**saved, "sha256": value_sha256(saved)}, tmp_path / "new.pth")
    content, before = (tmp_path / "new.pth").read_bytes(), state(finished)
    states = []
    for n in range(99):
        folder = Path(shutil.copytree(finished, tmp_path / f"killed{n}"))
        with monkeypatch.context() as patched:
            done = die_at_file(patched, n)
            with suppress(Killed):
                go_back(folder, content)
        states.append(state(folder))
        if len(done) < n:
            break
    after = ("checkpoint-1.pth", (0, 1), (0, 1), 1)
    assert 6 < n < 99 and before[:3] == ("checkpoint-2.pth", (0, 1, 2), (0, 1, 2))
    assert states[0] == before and states[-1] == after and set(states) == {before, after}


@pytest.mark.parametrize("batch, accum, world, expected", [(8, 4, 2, (8, 2)), (8, 4, 4, (8, 1)), (8, 4, 8, (4, 1)),
                                                          (8, 1, 3, None), (6, 1, 4, None)])
def test_another_number_of_processes_keeps_the_effective_batch_or_is_refused(batch, accum, world, expected):
    args = train.get_args_parser().parse_args(["--resume", "run"])
    args.batch_size, args.accum_iter = batch, accum
    if expected is None:
        with pytest.raises(UserError, match=f"{world} processes cannot make its effective batch {batch * accum}"):
            fit_effective_batch(args, batch * accum, world)
    else:
        fit_effective_batch(args, batch * accum, world)
        assert (args.batch_size, args.accum_iter) == expected


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no zip"])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(flags, finished, unbroken, capsys, damage):
    path = finished / "checkpoint-2.pth"
    content = bytearray(path.read_bytes())
    tensor = next(iter(load_checkpoint(path)["model"].values()))
    content[content.index(tensor.numpy().tobytes())] ^= 1
    half = content[:len(content) // 2]
    path.write_bytes({"cut": half, "empty": b"", "flipped": content, "no zip": b"x" * 999}[damage])
    run(*in_folder(flags, finished))
    assert f"{path} is broken" in capsys.readouterr().out and same_tensors(finished, unbroken)


@pytest.mark.parametrize("change", [
    lambda c: c.update(epoch=7), lambda c: c.update(skipped="x"), lambda c: c["optimizer"].update(state={}),
    lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),  # PyTorch would read beyond it
    lambda c: c["optimizer"]["param_groups"][0].update(eps=0.1),
    lambda c: c["adapter_config"].update(adapter_scale=2.0), lambda c: c.update(record=[]),
    lambda c: next(iter(c["model"].values())).add_(1e-3)])
def test_a_checkpoint_that_was_changed_is_not_used(flags, finished, unbroken, capsys, change):
    path = finished / "checkpoint-2.pth"
    checkpoint = load_checkpoint(path)
    change(checkpoint)
    torch.save(checkpoint, path)
    run(*in_folder(flags, finished))
    assert "was changed after it was written" in capsys.readouterr().out and same_tensors(finished, unbroken)


def test_a_checkpoint_without_its_checksum_is_refused(flags, finished):
    (finished / "checkpoint-2.pth").unlink()
    checkpoint = load_checkpoint(finished / "checkpoint-1.pth")
    del checkpoint["sha256"]
    torch.save(checkpoint, finished / "checkpoint-1.pth")
    assert "is not as train.py writes it" in refused(*in_folder(flags, finished))


@pytest.mark.parametrize("name, value", [
    ("lr", "x"), ("epochs", None), ("epochs", 10**30), ("dropout_prob", 2), ("batch_size", 1e30), ("keep_last", "x"),
    ("device", 3), ("precision", "x"), ("llm_model", None), ("skip_bad", 1), ("seed", True), ("vision_model", "a\0b")])
def test_flags_of_a_run_that_the_command_line_could_not_give_are_refused(finished, name, value):
    content = json.loads((finished / "recipe.json").read_text())
    content["flags"][name] = value
    (finished / "recipe.json").write_text(json.dumps(content))
    assert f"recipe.json: --{name} cannot be" in refused("--resume", finished)


def test_other_examples_than_before_are_refused(flags, finished, scienceqa_copy):
    """A picture that --skip_bad leaves out later leaves no trace in the recipe of a version that recorded none."""
    (finished / "checkpoint-2.pth").unlink()
    skipping = in_folder(flags, finished, "--data_root", scienceqa_copy, "--skip_bad")
    run(*skipping, "--overwrite")
    (finished / "checkpoint-2.pth").unlink()
    (scienceqa_copy / "images" / "train" / "101" / "image.png").unlink()
    assert "other pictures of --data_root" in refused(*skipping)
    content = json.loads((finished / "recipe.json").read_text())
    del content["recipe"]["pictures"]
    (finished / "recipe.json").write_text(json.dumps(content))
    forget_in_checkpoint(finished / "checkpoint-1.pth", "pictures")
    assert "other examples" in refused(*skipping)


def test_other_micro_batches_than_before_are_refused(flags, tmp_path):
    """Earlier versions made other micro-batches of a step; with --loss_norm batch they do not matter."""
    for loss_norm in ("batch", "microbatch"):
        folder = tmp_path / loss_norm
        command = in_folder(flags, folder, "--loss_norm", loss_norm)
        run(*command, "--stop_after_epoch", "1")
        path = folder / "checkpoint-0.pth"
        forget_in_checkpoint(path, "tokenization")
        if loss_norm == "batch":
            run(*command)
            assert list(checkpoints(folder)) == [0, 1, 2]
        else:
            assert "an earlier version with --loss_norm microbatch, whose micro-batches were other" in refused(*command)


# --- Checkpoints ---

@pytest.mark.parametrize("named, read", [
    ("", ["checkpoint-1.pth"]), ("checkpoint-0.pth", ["checkpoint-1.pth", "checkpoint-0.pth"])])
def test_a_command_reads_each_checkpoint_once(finished, monkeypatch, named, read):
    """Reading it once is enough to look for damage, for the epoch that training went back to, and to go on from
    there."""
    (finished / "checkpoint-2.pth").unlink()
    paths, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: paths.append(Path(path)) or load(path, **options))
    run("--resume", finished / named)
    assert [path.name for path in paths if path.parent == finished] == read


def test_only_the_last_checkpoints_are_kept(flags, unbroken, tmp_path):
    folder = tmp_path / "run"
    run(*in_folder(flags, folder, "--keep_last", "2"))
    assert list(checkpoints(folder)) == [1, 2] and same_tensors(folder, unbroken)


def test_checkpoints_are_kept_by_their_epochs_and_not_by_their_names(tmp_path):
    folder = run_folder.RunFolder(tmp_path, recipe={}, epochs=20, keep_last=2)
    for epoch in (8, 9, 10, 11):
        folder.save(b"", epoch, {"epoch": epoch})
    assert list(checkpoints(tmp_path)) == [10, 11]


def test_the_checkpoint_that_a_command_names_is_kept(flags, finished):
    """The same command, submitted again, would not find it otherwise."""
    back = ("--resume", finished / "checkpoint-0.pth", "--keep_last", "1")
    run(*back)
    assert list(checkpoints(finished)) == [0, 2]
    run(*back)
    assert list(checkpoints(finished)) == [0, 2]


@pytest.mark.parametrize("name, make", [("log.txt", os.mkdir), ("metrics.jsonl", os.mkfifo), (LAST, os.mkdir)])
def test_what_is_no_file_is_refused_at_once(flags, finished, name, make):
    (finished / name).unlink(missing_ok=True)
    make(finished / name)
    assert f"{finished / name} is no file: remove it" in refused(*in_folder(flags, finished))


def test_stray_files_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-².pth", "checkpoint-1.pth.part", "checkpoint--1.pth", "checkpoint-7.pth"):
        (tmp_path / name).touch()
    assert list(checkpoints(tmp_path)) == [7]


def test_a_full_disk_does_not_count_the_epoch_as_done(flags, unbroken, tmp_path, monkeypatch):
    folder, write_bytes = tmp_path / "run", Path.write_bytes

    def full(path, content):
        write_bytes(path, content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, "write_bytes", full)
        run(*in_folder(flags, folder))
    assert sorted(contents(folder)) == ["config.json", "metrics.jsonl", "recipe.json"]
    run(*in_folder(flags, folder))
    assert same_tensors(folder, unbroken)


# --- Not finite ---

def diverge_from(monkeypatch, first: int) -> None:
    steps, accumulate = [], trainer.accumulate_with_oom_retry

    def broken(*args):
        steps.append(1)
        loss, max_tokens = accumulate(*args)
        return loss * (float("nan") if len(steps) >= first else 1), max_tokens

    def nan_gradients(optimizer, scaler, parameters, *args, step=trainer.optimizer_step, **kwargs):
        if len(steps) >= first:
            parameters[0].grad.fill_(float("nan"))
        return step(optimizer, scaler, parameters, *args, **kwargs)
    monkeypatch.setattr(trainer, "accumulate_with_oom_retry", broken)
    monkeypatch.setattr(trainer, "optimizer_step", nan_gradients)


def test_ten_steps_in_a_row_that_are_not_finite_end_training(flags, tmp_path, monkeypatch):
    """Across epochs: each of five has twelve steps, of which the last three of the first are not finite."""
    diverge_from(monkeypatch, 10)
    message = refused(*in_folder(flags, tmp_path, "--batch_size", "1", "--epochs", "5"))
    assert "10 steps in a row" in message and "epoch 1, step 7" in message and "loss nan" in message
    assert message.split("questions ")[1].split(")")[0] in [str(i) for i in range(100, 112)]
    assert read_log(tmp_path)[0]["skipped_steps"] == 3 and list(checkpoints(tmp_path)) == [0]


def test_an_epoch_without_a_finite_step_ends_training(flags, tmp_path, monkeypatch):
    diverge_from(monkeypatch, 1)
    assert "3 steps in a row" in refused(*in_folder(flags, tmp_path)) and not checkpoints(tmp_path)


def test_adapters_that_are_not_finite_are_not_saved(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(EpochRecord, "_read", lambda self, numbers: numbers and self.steps.append([1.0, 1.0, 1.0]))
    message = refused(*in_folder(flags, tmp_path, "--lr", "3e38", "--warmup_epochs", "0"))
    assert "diverged" in message and "not finite" in message and not checkpoints(tmp_path)


# --- The record ---

def test_metrics_have_a_line_every_ten_steps_and_at_the_end_of_an_epoch(flags, tmp_path):
    run(*in_folder(flags, tmp_path, "--batch_size", "1", "--epochs", "2"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 10), (0, 12), (1, 10), (1, 12)]
    for epoch, entry in enumerate(read_log(tmp_path)):
        first, last = lines[2 * epoch:2 * epoch + 2]
        assert (10 * first["loss"] + 2 * last["loss"]) / 12 == pytest.approx(entry["train_closs"])
        assert first["skipped_steps"] == 0 and first["grad_norm"] > 0 and first["mfu"] is None
        assert first["tokens_per_s"] > first["samples_per_s"] > 0
    assert lines[0]["lr"] == pytest.approx(1e-2 * 9 / 12)


def test_tensorboard_gets_the_same_numbers(flags, tmp_path, monkeypatch):
    writers = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.purge_step, self.scalars = purge_step, []
            writers.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def flush(self):
            pass
    monkeypatch.setattr("util.training.command.require_trackers", lambda names: None)
    monkeypatch.setattr("util.trackers.summary_writer", lambda: Writer)
    logging = in_folder(flags, tmp_path / "run", "--log_dir", tmp_path / "events")
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stop_after(patched, 4)
        run(*logging)
    run(*logging)
    assert [writer.purge_step for writer in writers] == [1, 6]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scalars = [scalar for writer in writers for scalar in writer.scalars if scalar[0] in ("loss", "lr")]
    assert scalars == [(name, line[name], 3 * line["epoch"] + line["step"]) for line in lines
                       for name in ("loss", "lr")]


def test_log_dir_without_tensorboard_is_refused_before_anything_is_written(flags, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = contents(finished)
    assert "pip install tensorboard" in refused(*in_folder(flags, finished, "--log_dir", "events", "--seed", "4"))
    assert contents(finished) == before


def test_the_epochs_of_different_machines_are_recorded(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stop_after(patched, 4)
        run(*in_folder(flags, tmp_path))
    monkeypatch.setattr("socket.gethostname", lambda: "other")
    run(*in_folder(flags, tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    resumed, = config["resumed"]
    assert (resumed["epoch"], resumed["host"]) == (1, "other") != (0, config["host"])
    assert config["threads"] == torch.get_num_threads()


def test_a_run_that_goes_on_between_two_epochs_is_recorded_too(flags, tmp_path, monkeypatch):
    run(*in_folder(flags, tmp_path, "--stop_after_epoch", "1"))
    first = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr("socket.gethostname", lambda: "other")
    run(*in_folder(flags, tmp_path))
    resumed, = (config := json.loads((tmp_path / "config.json").read_text())).pop("resumed")
    assert config == first and (resumed["epoch"], resumed["step"], resumed["host"]) == (1, 0, "other")


@pytest.mark.parametrize("size, accum", [(5, 1), (1, 5)])
def test_the_rate_within_an_epoch_goes_by_the_share_of_its_samples(flags, tmp_path, size, accum):
    """Two steps of five of the twelve samples: the second step begins after 5/12 of the epoch, not after a half."""
    run(*in_folder(flags, tmp_path, "--batch_size", size, "--accum_iter", accum, "--epochs", "2"))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (2, 2)
    assert first["lr"] == pytest.approx(1e-2 * 5 / 12)  # warm-up over one epoch
    assert second["lr"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 5 / 12)) / 2)


def test_the_last_checkpoint_is_the_same_file_byte_for_byte(flags, tmp_path, monkeypatch):
    """The folders have the same name, since a checkpoint holds its run's flags."""
    contents = []
    for name, steps in (("unbroken", 99), ("stopped", 4)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with monkeypatch.context() as patched, suppress(signals.Stopped):
            stop_after(patched, steps)
            run(*in_folder(flags, "run"))
        run(*in_folder(flags, "run"))
        contents.append(Path("run", "checkpoint-2.pth").read_bytes())
    assert contents[0] == contents[1]
