"""The shell scripts, run with stub commands on PATH that log their arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny import ROOT
from train import get_args_parser

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("slurm/*.sbatch")])
METHODS = {  # the published flags of each method
    "": "--lr_schedule cosine --min_lr 0 --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2",
    "_cyclical": "--lr_schedule cyclical --min_lr 5e-5 --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2",
    "_step": "--lr_schedule step --min_lr 0 --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2",
    "_exponential": "--lr_schedule exponential --min_lr 0 --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2",
    "_drop_inc": "--lr_schedule cosine --min_lr 0 --dropout_prob 0.1 --dropout_var 1.01 --dropout_lim 0.2",
    "_drop_inc_v2": "--lr_schedule cosine --min_lr 0 --dropout_prob 0.1 --dropout_var 1.03 --dropout_lim 0.2",
    "_drop_dec": "--lr_schedule cosine --min_lr 0 --dropout_prob 0.2 --dropout_var 0.99 --dropout_lim 0.1",
    "_drop_dec_v2": "--lr_schedule cosine --min_lr 0 --dropout_prob 0.2 --dropout_var 0.97 --dropout_lim 0.1",
}
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$0 $*" in *"${FAIL:-never}"*) exit 1 ;; esac
case "$(basename "$0")" in
    srun) while [ "$1" != torchrun ]; do shift; done; "$@" ;;
    sbatch) bash "$@" ;;
    scontrol) echo node7; echo node8 ;;
esac
"""


class Sandbox:
    """A copy of the scripts, with stubs for all commands that they call."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        for name in ("scripts", "slurm"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "bin").mkdir()
        for name in ("python", "torchrun", "srun", "sbatch", "scontrol", "nvidia-smi"):
            stub = folder / "bin" / name
            stub.write_text(STUB)
            stub.chmod(0o755)

    def run(self, *command: str, code: int = 0, **environment: str) -> list[str]:
        """Run a script; returns all logged calls."""
        env = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CALLS": str(self.calls), **environment}
        done = subprocess.run(["bash", *command], cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        self.errors = done.stderr
        return self.calls.read_text().splitlines()


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-e", "SC1091", "-s", "bash", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_trained_with_its_flags_and_evaluated(sandbox, method):
    train, score = sandbox.run(f"scripts/finetuning_sqa_7b{method}.sh", "--epochs", "5", "--seed", "1")
    assert train.startswith("torchrun --standalone --nproc_per_node 4 train.py --llm_model 7B "
                            "--llama_model_path ../data/weights --data_root ../data ")
    assert "--batch_size 2 --accum_iter 4 " in train and "--blr 9e-3" in train  # 2 x 4 x 4 GPUs = 32
    assert train.endswith(f"{METHODS[method]} --epochs 5 --seed 1")  # the user's flags come last and take precedence
    folder = train.split("--output_dir ")[1].split()[0]
    assert folder == f"./LaVIN-7B-{method.removeprefix('_') or 'base'}"
    assert score == f"torchrun --standalone --nproc_per_node 4 eval.py --adapter_path {folder} --split test"


@pytest.mark.parametrize("script, model, method, flags", [
    ("7b_lite", "7B", "lite", "--bits 4bit --gradient_checkpointing"),
    ("13b_lite", "13B", "lite", "--temperature 5 --bits 4bit --gradient_checkpointing"),
    ("13b", "13B", "base", "--temperature 5"),
    ("vicuna_7b", "7B", "vicuna", "--use_vicuna"),
    ("vicuna_13b", "13B", "vicuna", "--temperature 5 --use_vicuna")])
def test_other_base_models_use_the_base_method(sandbox, script, model, method, flags):
    train, score = sandbox.run(f"scripts/finetuning_sqa_{script}.sh", "--seed", "1")
    assert f"train.py --llm_model {model} " in train and train.endswith(f"{flags} {METHODS['']} --seed 1")
    assert f"eval.py --adapter_path ./LaVIN-{model}-{method} " in score
    flags = get_args_parser().parse_args(train.split("train.py ")[1].split())
    assert flags.temperature == (5 if model == "13B" else 10)


@pytest.mark.parametrize("gpus, accum", [(1, 16), (2, 8), (8, 2), (16, 1)])
def test_effective_batch_size_is_constant(sandbox, gpus, accum):
    train, _ = sandbox.run("scripts/finetuning_sqa_7b.sh", GPUS=str(gpus))
    assert f"--batch_size 2 --accum_iter {accum} " in train
    assert train.startswith("python " if gpus == 1 else f"torchrun --standalone --nproc_per_node {gpus} ")


def test_environment_variables_and_output_dir(sandbox):
    train, score = sandbox.run("scripts/finetuning_sqa_7b.sh", "--output_dir", "here", GPUS="1", DATA_ROOT="d",
                               WEIGHTS="w", MODEL="13B")
    assert "--llm_model 13B --llama_model_path w --data_root d" in train and train.endswith("--output_dir here")
    assert score == "python eval.py --adapter_path here --split test"


def test_failed_training_is_not_evaluated(sandbox):
    calls = sandbox.run("scripts/finetuning_sqa_7b.sh", code=1, FAIL="train.py")
    assert len(calls) == 1


def test_run_all_variants_skips_finished_runs_and_continues_after_a_failure(sandbox):
    finished = sandbox.folder / "out" / "LaVIN-7B-step-seed0"
    finished.mkdir(parents=True)
    (finished / "scores.json").write_text("{}")
    calls = sandbox.run("scripts/run_all_variants.sh", "--epochs", "5", code=1, OUTPUT_ROOT="out", GPUS="1",
                        FAIL="train.py --llm_model 7B --llama_model_path ../data/weights --data_root ../data "
                             "--output_dir out/LaVIN-7B-base-seed0")
    trained = [call.split("--output_dir ")[-1].split()[0] for call in calls if "train.py" in call]
    names = ["base", "cyclical", "exponential", "drop_inc", "drop_dec", "drop_inc_v2", "drop_dec_v2"]
    assert trained == [f"out/LaVIN-7B-{name}-seed0" for name in names]
    assert "failed: out/LaVIN-7B-base-seed0" in sandbox.errors
    plot = calls[-1]
    assert plot.startswith("python plot_results.py ") and "LaVIN-7B-step-seed0" in plot and "base" not in plot


def test_seeds_run_every_method_once_each(sandbox):
    calls = sandbox.run("scripts/run_all_variants.sh", SEEDS="0 1 2", GPUS="1")
    assert sum("train.py" in call for call in calls) == 24
    assert sum("--seed 2 --output_dir ./LaVIN-7B-" in call for call in calls) == 8


def test_slurm_one_node(sandbox):
    calls = sandbox.run("bin/sbatch", "slurm/one_node.sbatch", "scripts/finetuning_sqa_7b.sh", "--epochs", "5",
                        SLURM_SUBMIT_DIR=str(sandbox.folder), SLURM_NNODES="1")
    assert calls[1].startswith("torchrun --standalone --nproc_per_node 4 train.py") and calls[1].endswith("--epochs 5")


def test_slurm_several_nodes_use_the_first_as_rendezvous(sandbox):
    calls = sandbox.run("slurm/several_nodes.sbatch", "scripts/finetuning_sqa_7b.sh", SLURM_NNODES="2",
                        SLURM_SUBMIT_DIR=str(sandbox.folder), SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[7-8]")
    srun = next(call for call in calls if call.startswith("srun"))
    assert ("torchrun --nnodes 2 --nproc_per_node 4 --rdzv_id 42 --rdzv_backend c10d "
            "--rdzv_endpoint node7:29500 train.py") in srun
    assert "--batch_size 2 --accum_iter 2 " in srun


def test_requeued_job_resumes_from_its_checkpoint(sandbox):
    run, script = sandbox.folder / "LaVIN-7B-base", "scripts/finetuning_sqa_7b.sh"
    run.mkdir()
    assert "--resume" not in sandbox.run(script, SLURM_RESTART_COUNT="1")[0]  # no checkpoint yet
    (run / "checkpoint-0.pth").touch()
    assert "--resume" not in sandbox.run(script)[2]  # not requeued: a new run
    assert sandbox.run(script, SLURM_RESTART_COUNT="1")[4].endswith("--resume ./LaVIN-7B-base")


@pytest.mark.parametrize("script, model", [("vl_instruction_tuning_13b", "13B"),
                                           ("vl_instruction_tuning_vicuna_13b", "vicuna_13B")])
def test_instruction_tuning_uses_the_published_recipe(sandbox, script, model):
    train, = sandbox.run(f"scripts/{script}.sh", "--seed", "1", GPUS="8")
    assert train.startswith(f"torchrun --standalone --nproc_per_node 8 train.py --llm_model {model} "
                            "--llama_model_path ../data/weights --data_root ../data "
                            f"--output_dir ./LaVIN-{model}-VLIT ")
    assert "--batch_size 2 --accum_iter 2 " in train and "--blr 9e-3" in train  # 2 x 2 x 8 GPUs = 32
    assert train.endswith("--do_pretrain --epochs 15 --warmup_epochs 0.2 --temperature 5 --seed 1")


def test_mme_evaluates_the_given_run(sandbox):
    score, = sandbox.run("scripts/eval_mme_benchmark.sh", "LaVIN-13B-VLIT", "--seed", "1", DATA_ROOT="d")
    assert score == ("torchrun --standalone --nproc_per_node 4 eval_mme.py --adapter_path LaVIN-13B-VLIT "
                     "--mme_root d/mme --max_batch_size 16 --seed 1")
    sandbox.run("scripts/eval_mme_benchmark.sh", code=1)
    assert "name a run" in sandbox.errors


def test_demo_uses_the_quickstart_runs_or_those_of_the_environment(sandbox):
    (sandbox.folder / "calls").touch()
    sandbox.run("scripts/demo.sh", code=1)
    assert "run 'bash scripts/quickstart.sh' first" in sandbox.errors
    (sandbox.folder / "requirements-demo.txt").touch()
    (sandbox.folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(sandbox.folder / "bin" / "python", sandbox.folder / ".venv" / "bin" / "python")
    for run in ("runs/quickstart/LaVIN-toy-base-seed0", "LaVIN-7B-base"):
        (sandbox.folder / run).mkdir(parents=True)
        (sandbox.folder / run / "checkpoint-0.pth").touch()
    assert sandbox.run("scripts/demo.sh", "--cli")[-1] == (
        "python demo.py --runs runs/quickstart --llama_model_path weights --llm_model toy --data_root data/mini --cli")
    assert sandbox.run("scripts/demo.sh", MODEL="7B")[-1] == (
        "python demo.py --runs . --llama_model_path ../data/weights --llm_model 7B --data_root ../data")
