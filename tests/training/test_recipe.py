"""Every flag of train.py either changes what a run is, so that its folder refuses another value, or may differ."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from lavin.tokenizer import Example
from tiny_runs import load_checkpoint, run_flags
from user_errors import error_message
from util.data.examples import examples_sha256
from util.training.recipe import differences

# another value of each flag that changes a run's result; empty: a flag without a value
CHANGES = {
    "bits": "fp8", "precision": "bf16", "use_caption": "", "skip_bad": "", "prompt_format": "QCM-A",
    "max_seq_len": "80", "adapter_type": "block", "visual_adapter_type": "normal", "adapter_dim": "4",
    "adapter_scale": "2", "temperature": "5", "hidden_proj": "64", "n_prompt": "3", "drop_path": "0.1",
    "dropout_prob": "0.15", "dropout_var": "1.5", "dropout_lim": "0.25", "batch_size": "2", "accum_iter": "2",
    "epochs": "4", "lr_schedule": "step", "warmup_epochs": "0.5", "lr": "0.02", "min_lr": "0.001",
    "weight_decay": "0.5", "clip_grad": "0.1", "loss_norm": "microbatch", "seed": "7"}
# of these, those without effect on a CPU, without a bad picture, with one dropout for all layers, and with answers of
# one length
NO_EFFECT = {"bits", "skip_bad", "dropout_lim", "loss_norm"}
# flags that may differ from one command to the next on the same run, with another value where it works on a CPU
FREE = {"compile": "off", "cuda_graphs": "off", "num_workers": "2", "cpu_load": "", "gradient_checkpointing": "",
        "save_every_minutes": "3", "keep_last": "3", "device": "cpu", "stop_after_epoch": "3", "overwrite": "",
        "model_parallel_size": "1"}
# flags of places: what lies there counts (tests of other bases and data are in test_run_folder.py)
PLACES = {"llm_model", "llama_model_path", "vision_model", "data_root", "data_path", "caption_file", "output_dir",
          "log_dir", "report_to", "resume"}
# flags that state others in another form, or ask for other data altogether (test_data_processing.py)
OTHERS = {"blr", "do_pretrain", "use_vicuna", "help"}


def run(*flags) -> None:
    train.main(train.get_args_parser().parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def flags(base, scienceqa, tmp_path_factory):
    """The flags of a finished run, its folder included. Read-only."""
    flags = run_flags(base, scienceqa, tmp_path_factory.mktemp("recipe") / "run", "--epochs", "2")
    run(*flags)
    return flags


def test_every_flag_is_in_one_of_the_lists_above():
    lists = [CHANGES, FREE, PLACES, OTHERS]
    known = {action.dest for action in train.get_args_parser()._actions}
    assert set().union(*lists) == known and sum(map(len, lists)) == len(known)


@pytest.mark.parametrize("name, value", CHANGES.items())
def test_a_folder_refuses_another_value_of_a_flag_that_changes_results(flags, name, value):
    message = error_message(run, *flags, f"--{name}", *[value] * bool(value))
    assert "belongs to another recipe" in message and f"--{name}" in message


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - NO_EFFECT))
def test_a_flag_that_changes_results_reaches_the_training(flags, tmp_path, name):
    """Two epochs with another value give other adapters."""
    run(*flags, "--output_dir", tmp_path / "run", "--stop_after_epoch", "2", f"--{name}",
        *filter(None, [CHANGES[name]]))
    usual, other = (load_checkpoint(Path(folder) / "checkpoint-1.pth")["model"]
                    for folder in (flags[flags.index("--output_dir") + 1], tmp_path / "run"))
    assert usual.keys() != other.keys() or not all(torch.equal(usual[name], other[name]) for name in usual)


@pytest.mark.parametrize("name, value", FREE.items())
def test_a_finished_run_stays_finished_with_other_flags_of_execution(flags, capsys, name, value):
    run(*flags, f"--{name}", *[value] * bool(value))
    assert "is finished" in capsys.readouterr().out


def test_with_the_published_loss_the_micro_batch_belongs_to_the_recipe(base, scienceqa, tmp_path, capsys):
    """It is a mean over micro-batches; the mean over the step does not depend on how the step is cut."""
    flags = run_flags(base, scienceqa, tmp_path / "run", "--epochs", "1", "--warmup_epochs", "0", "--loss_norm",
                      "microbatch")
    run(*flags)
    before = (tmp_path / "run" / "checkpoint-0.pth").read_bytes()
    message = error_message(run, *flags, "--batch_size", "2", "--accum_iter", "2")
    assert "--batch_size 2, not 4" in message
    assert (tmp_path / "run" / "checkpoint-0.pth").read_bytes() == before


def test_resume_takes_the_flags_that_change_results_from_the_run(flags, tmp_path):
    """They are in its config.json afterwards as they were, whatever the defaults are."""
    folder = Path(flags[flags.index("--output_dir") + 1])
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1.pth").unlink()
    run("--resume", tmp_path / "run")
    before, after = (json.loads((path / "config.json").read_text())["flags"] for path in (folder, tmp_path / "run"))
    assert {name: after[name] for name in CHANGES} == {name: before[name] for name in CHANGES}


def test_the_checksum_of_examples_sees_every_part_of_each():
    def checksum(**changes) -> str:
        example = {"ids": [1, 5, 6, 7], "answer_start": 2, "image": None, **changes}
        return examples_sha256({"a": Example(**example), "b": Example([1, 2], 1)})
    values = [checksum(), checksum(ids=[1, 5, 6, 8]), checksum(answer_start=3), checksum(image=torch.zeros(3, 1, 1)),
              examples_sha256({"a": Example([1, 5, 6, 7], 2)}),
              examples_sha256({"b": Example([1, 2], 1), "a": Example([1, 5, 6, 7], 2)}),
              examples_sha256({"c": Example([1, 5, 6, 7], 2), "b": Example([1, 2], 1)})]
    assert len(set(values)) == len(values) and checksum() == values[0]


def test_a_recipe_of_a_version_without_a_flag_has_its_default():
    assert differences({"drop_path": 0.0, "clip_grad": None, "data": "a"}, {"data": "a"}) == []
    assert differences({"data": "a"}, {"drop_path": 0.1, "data": "a"}) == ["--drop_path 0.0, not 0.1"]
    assert differences({"batch_size": 4}, {}) == ["--batch_size 4, not None"]  # it belongs only to some recipes
