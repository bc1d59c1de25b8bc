"""The shell scripts, run with stub commands on PATH that log their arguments."""

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiny import ROOT
from train import get_args_parser
from util.comparison.methods import named_methods, published_value
from util.lr_sched import check_schedule, derive_learning_rate

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("slurm/*")])
METHODS = {method.key: method.flags for method in named_methods()}
# the methods that run_factorial.sh crosses: each schedule with five dropouts
N_CROSSED = 5 * sum(flags.keys() <= {"lr_schedule", "min_lr"} for flags in METHODS.values())
BASE = "--lr_schedule cosine --min_lr 0 --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2"
STUB = """#!/usr/bin/env bash
name=$(basename "$0")
[[ "$*" != "-c "*scripts/methods.json* ]] || exec "$PYTHON" "$@"
[[ "$*" != "-c "*torch* ]] || exit "${NO_TORCH:-0}"
if [ "$name" = nvidia-smi ]; then
    echo "$*" >> "$CALLS.gpus"
    for ((i = 0; i < ${HERE:-16}; i++)); do echo "GPU $i: NVIDIA"; done
    exit "${BROKEN:-0}"
fi
if [[ "$*" = *"-m util.series "* ]]; then # its commands are called, with what stands before it
    echo "$name $*" >> "$CALLS.series"
    [ "${FAIL:-never}" != util.series ] || exit 1
    before=()
    while [ "$1 $2" != "-m util.series" ]; do before+=("$1"); shift; done
    shift 2
    trap 'kill -TERM $command' TERM
    for file; do
        while read -r line <&3; do
            [[ $line != "#"* ]] || continue
            eval "words=($line)"
            "$0" "${before[@]}" "${words[@]}" &
            command=$!
            while kill -0 $command 2> /dev/null; do wait $command || true; done
            wait $command || exit
        done 3< "$file"
        rm "$file"
    done
    exit
fi
stop() { # at the first signal alone, since bash handles a second one before it exits
    trap '' TERM USR1
    echo "$1" >> "$CALLS"
    exit "${STATUS:-75}"
}
if [[ "$name $*" = *"${HANG:-never}"* ]]; then # before the call is logged, since a signal may follow at once
    for signal in TERM USR1; do trap "stop $signal" $signal; done
fi
echo "$name $*" >> "$CALLS"
case "$name $*" in
    *"${FAIL:-never}"*) exit "${STATUS:-1}" ;;
    *"${HANG:-never}"*) while :; do sleep 0.02; done ;;
esac
case "$name" in
    srun) while [ "$1" != python ]; do shift; done; exec "$@" ;;
    sbatch) bash "$@" ;;
    scontrol) echo node7; sleep 0.05; echo node8 ;;
esac
"""


class Sandbox:
    """A copy of the scripts, with stubs for all commands that they call: FAIL names the call that fails with STATUS,
    HANG the one that ends with STATUS only at a SIGTERM, HERE the number of GPUs that there are."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, folder / "calls"
        for name in ("scripts", "slurm"):
            shutil.copytree(ROOT / name, folder / name)
        self.calls.touch()
        (folder / "bin").mkdir()
        for name in ("python", "srun", "sbatch", "scontrol", "nvidia-smi"):
            stub = folder / "bin" / name
            stub.write_text(STUB)
            stub.chmod(0o755)

    def install(self) -> None:
        """An environment for scripts/environment.sh, in which python is a stub, too."""
        shutil.copy(ROOT / "requirements.txt", self.folder)
        shutil.copytree(ROOT / "requirements", self.folder / "requirements")
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(self.folder / "bin" / "python", self.folder / ".venv" / "bin")

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start a script as the leader of its own process group, as a terminal does."""
        env = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CALLS": str(self.calls), "PYTHON": sys.executable,
               **environment}
        return subprocess.Popen(["bash", *command], cwd=self.folder, env=env, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, script: subprocess.Popen, code: int) -> list[str]:
        """Wait for a script; returns all calls logged so far."""
        self.output, self.errors = script.communicate(timeout=60)
        assert script.returncode == code, self.errors
        return self.calls.read_text().splitlines()

    def run(self, *command: str, code: int = 0, **environment: str) -> list[str]:
        """Run a script; returns all logged calls."""
        return self.finish(self.start(*command, **environment), code)

    def stop(self, *command: str, signals=(signal.SIGUSR1,), kill=os.kill, code: int = 75, n: int = 1,
             **environment: str) -> list[str]:
        """Start a script, and send it signals once n calls of train.py hang; returns the calls logged by then and
        after."""
        self.calls.write_text("")
        script = self.start(*command, **{"HANG": "train.py", **environment})
        try:
            wait_until(lambda: self.calls.read_text().count(environment.get("HANG", "train.py")) >= n)
            for number in signals:
                kill(script.pid, number)
            start = time.monotonic()
            calls = self.finish(script, code)
            assert time.monotonic() - start < 5
            return calls
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def sandbox(tmp_path):
    (tmp_path / "a folder").mkdir()  # names with spaces are allowed
    return Sandbox(tmp_path / "a folder")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        # files that are sourced are not given here, and set variables for others
        subprocess.run(["shellcheck", "-x", "-e", "SC1091,SC2034", "-s", "bash", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("epochs, warmup", [("20", 2), ("1", 0.1)])
def test_epochs_need_no_other_warmup(sandbox, epochs, warmup):
    command, _ = sandbox.run("scripts/finetuning_sqa_7b.sh", "--epochs", epochs)
    args = get_args_parser().parse_args([*command.split("train.py ")[1].split(), "--lr", "0.1"])
    derive_learning_rate(args, 32)
    check_schedule(args)
    assert args.warmup_epochs == warmup


def given(words: str) -> dict:
    """The flags of train.py that are given, by name."""
    args = get_args_parser().parse_args(words.split())
    return {flag: getattr(args, flag) for flag in args.given}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_trained_with_its_flags_and_evaluated(sandbox, method):
    script = f"scripts/finetuning_sqa_7b_{method}.sh".replace("_base", "")
    train, score = sandbox.run(script, "--epochs", "5", "--seed", "1")
    assert train.startswith("python -m util.launch --standalone --nproc_per_node 4 train.py --llm_model 7B "
                            "--llama_model_path ../data/weights --data_root ../data ")
    assert "--batch_size 2 --accum_iter 4 " in train and "--blr 9e-3" in train  # 2 x 4 x 4 GPUs = 32
    folder = train.split("--output_dir ")[1].split()[0]
    assert folder == f"./LaVIN-7B-{method}"
    flags = train.split("train.py ")[1]
    of_method, of_user = flags.split(" --visual_adapter_type router ")[1].split(" --epochs ")
    assert of_user == "5 --seed 1"  # the user's flags come last and take precedence
    assert given(of_method) == given(BASE) | METHODS[method]
    assert score == f"python -m util.launch --standalone --nproc_per_node 4 eval.py --split test --trained_with {flags}"


@pytest.mark.parametrize("script, model, method, flags", [
    ("7b_lite", "7B", "lite", "--bits 4bit"),
    ("13b_lite", "13B", "lite", "--temperature 5 --bits 4bit"),
    ("13b", "13B", "base", "--temperature 5"),
    ("vicuna_7b", "7B", "vicuna", "--use_vicuna"),
    ("vicuna_13b", "13B", "vicuna", "--temperature 5 --use_vicuna")])
def test_other_base_models_use_the_base_method(sandbox, script, model, method, flags):
    train, score = sandbox.run(f"scripts/finetuning_sqa_{script}.sh", "--seed", "1")
    assert f"train.py --llm_model {model} " in train and train.endswith(f"{flags} {BASE} --seed 1")
    assert f"--output_dir ./LaVIN-{model}-{method} " in score
    flags = get_args_parser().parse_args(train.split("train.py ")[1].split())
    assert flags.temperature == published_value("temperature", SimpleNamespace(flags=vars(flags)))


@pytest.mark.parametrize("gpus, accum", [(1, 16), (2, 8), (8, 2), (16, 1)])
def test_effective_batch_size_is_constant(sandbox, gpus, accum):
    train, _ = sandbox.run("scripts/finetuning_sqa_7b.sh", GPUS=str(gpus))
    assert f"--loss_norm microbatch --batch_size 2 --accum_iter {accum} " in train
    assert train.startswith("python " if gpus == 1 else f"python -m util.launch --standalone --nproc_per_node {gpus} ")


def test_environment_variables_and_output_dir(sandbox):
    train, score = sandbox.run("scripts/finetuning_sqa_7b.sh", "--output_dir", "here", GPUS="1", DATA_ROOT="d",
                               WEIGHTS="w", MODEL="13B")
    assert "--llm_model 13B --llama_model_path w --data_root d" in train and train.endswith("--output_dir here")
    assert score.endswith("--output_dir here")  # eval.py reads it as train.py does


def test_failed_training_is_not_evaluated(sandbox):
    calls = sandbox.run("scripts/finetuning_sqa_7b.sh", code=1, FAIL="train.py")
    assert len(calls) == 1


@pytest.mark.parametrize("name, values", [
    ("GPUS", ("0", "-1", "3", "32", "08", "1.5", "two", " ", "18446744073709551617")),
    ("JOBS", ("0", "-1", "08", "1.5", "two", " ", "18446744073709551617")),
    ("SEEDS", ("-1", "0 08", "1.5", "0,1", "one", " ", "*"))])
def test_wrong_numbers_are_refused_in_one_line(sandbox, name, values):
    for value in values:
        assert sandbox.run("scripts/run_all_variants.sh", code=1, **{name: value}) == []
        assert sandbox.errors.startswith(f"run_all_variants.sh: {name}=") and sandbox.errors.count("\n") == 1


def test_gpus_of_all_nodes_are_counted(sandbox):
    assert sandbox.run("scripts/finetuning_sqa_7b.sh", code=1, GPUS="4", SLURM_NNODES="3") == []
    assert sandbox.errors == ("finetuning_sqa_7b.sh: GPUS=4 on each of 3 nodes gives no effective batch of 32: "
                              "choose 1, 2, 4, 8 or 16 in all\n")


def test_more_gpus_than_the_node_has_are_refused_at_once(sandbox):
    line = ("{}: GPUS={} (4 where it is not set) is more than the visible GPUs of this node, {}: set GPUS to at most "
            "{}\n")
    for script, environment, words in (("finetuning_sqa_7b.sh", {"HERE": "2"}, (4, 2, 2)),
                                       ("run_all_variants.sh", {"HERE": "4", "GPUS": "8"}, (8, 4, 4)),
                                       ("search_sqa_7b.sh", {"HERE": "8", "CUDA_VISIBLE_DEVICES": "3"}, (4, 1, 1))):
        assert sandbox.run(f"scripts/{script}", code=1, **environment) == []
        assert sandbox.errors == line.format(script, *words)
    for i, environment in enumerate(({"HERE": "8"}, {"BROKEN": "9"}, {"HERE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,7"},
                                     {"HERE": "0", "CUDA_VISIBLE_DEVICES": "0"}), 1):
        assert len(sandbox.run("scripts/finetuning_sqa_7b.sh", **environment)) == 2 * i


@pytest.mark.parametrize("environment", [
    {"HERE": "0"}, {"BROKEN": "9", "HERE": "0"}, {"HERE": "4", "CUDA_VISIBLE_DEVICES": ""},
    {"HERE": "4", "CUDA_VISIBLE_DEVICES": "-1"}, {"HERE": "4", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}])
def test_a_machine_without_a_gpu_counts_as_one(sandbox, environment):
    """A login node has the program nvidia-smi, but no GPU; CUDA and Slurm hide GPUs by these values."""
    train, _ = sandbox.run("scripts/finetuning_sqa_7b.sh", **environment)
    assert train.startswith("python train.py ")
    sandbox.calls.write_text("")
    calls = sandbox.run("scripts/run_all_variants.sh", METHODS="base", **environment)
    assert calls[0].startswith("python train.py ") and "--accum_iter 16 " in calls[0]
    sandbox.run("scripts/run_all_variants.sh", JOBS="auto", **environment)
    assert runs_of_processes(sandbox)[1:] == [len(METHODS)]


def test_empty_variables_count_as_unset(sandbox):
    calls = sandbox.run("scripts/run_all_variants.sh", GPUS="", JOBS="", SEEDS="", MODEL="", OUTPUT_ROOT="")
    assert sum("nproc_per_node 4 train.py --llm_model 7B" in call for call in calls) == len(METHODS)


def test_wrong_flags_of_run_all_variants_are_said_once(tmp_path):
    script = ["bash", "scripts/run_all_variants.sh", "--epohcs", "5"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, env={
        **os.environ, "DATA_ROOT": str(tmp_path / "none"), "OUTPUT_ROOT": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("train.py: error: unrecognized arguments")
    assert "==" not in done.stdout  # no method was started


def test_run_all_variants_continues_after_a_failure(sandbox):
    check, *calls, plot = sandbox.run(
        "scripts/run_all_variants.sh", "--epochs", "5", code=1, OUTPUT_ROOT="my runs", GPUS="1",
        FAIL="train.py --llm_model 7B --llama_model_path ../data/weights --data_root ../data "
             "--output_dir my runs/LaVIN-7B-step ")
    assert check == "python - --epochs 5"
    trained = [call.split("--output_dir ")[-1] for call in calls if "train.py" in call]
    assert trained == [f"my runs/LaVIN-7B-{name}-seed0 --epochs 5" for name in METHODS]
    assert sum("eval.py" in call for call in calls) == len(METHODS) - 1
    assert sandbox.errors == "failed: my runs/LaVIN-7B-step-seed0\n"
    assert plot.startswith("python plot_results.py my runs/LaVIN-7B-base-seed0 ") and "step" not in plot
    assert plot.endswith("--out my runs/plots")


def test_seeds_run_every_method_once_each(sandbox):
    calls = sandbox.run("scripts/run_all_variants.sh", SEEDS="0 1 2", GPUS="1")
    trained = [call for call in calls if "train.py" in call]
    assert len(trained) == 3 * len(METHODS)
    assert sum("--seed 2 --output_dir ./LaVIN-7B-" in call for call in trained) == len(METHODS)


def test_methods_can_be_chosen(sandbox):
    calls = sandbox.run("scripts/run_all_variants.sh", METHODS="base drop_dec_v2", GPUS="1")
    trained = [call.split("--output_dir ")[-1] for call in calls if "train.py" in call]
    assert trained == ["./LaVIN-7B-base-seed0", "./LaVIN-7B-drop_dec_v2-seed0"]


def test_the_comparison_has_the_untuned_base_where_it_was_scored(sandbox):
    run = partial(sandbox.run, "scripts/run_all_variants.sh", METHODS="base", GPUS="1", OUTPUT_ROOT="runs")
    assert run()[-1].endswith("plot_results.py runs/LaVIN-7B-base-seed0 --out runs/plots")
    (sandbox.folder / "runs" / "untuned").mkdir(parents=True)
    (sandbox.folder / "runs" / "untuned" / "scores.json").touch()
    assert run()[-1].endswith("plot_results.py runs/LaVIN-7B-base-seed0 runs/untuned --out runs/plots")


def flags_given(call: str) -> dict[str, str]:
    """The value of each flag of a call; the last one counts."""
    words = call.split()
    return {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}


def test_methods_can_be_combined_and_changed_by_a_flag(sandbox):
    calls = sandbox.run("scripts/run_all_variants.sh", METHODS="step+drop_dec base+dropout_prob=0.05", GPUS="1")
    combined, changed = (flags_given(call) for call in calls if "train.py" in call)
    assert {flag: combined[f"--{flag}"] for flag in ("lr_schedule", "dropout_prob", "dropout_var", "dropout_lim")} == {
        "lr_schedule": "step", "dropout_prob": "0.2", "dropout_var": "0.99", "dropout_lim": "0.1"}
    assert combined["--output_dir"] == "./LaVIN-7B-step+drop_dec-seed0"
    assert (changed["--lr_schedule"], changed["--dropout_prob"], changed["--dropout_var"]) == ("cosine", "0.05", "1")
    assert sandbox.run("scripts/run_all_variants.sh", code=1, METHODS="base step+drop_up", GPUS="1") == calls
    assert "METHODS=step+drop_up: 'drop_up' is neither a method nor a flag=value" in sandbox.errors


def test_a_factorial_runs_every_schedule_with_every_dropout(sandbox):
    calls = sandbox.run("scripts/run_factorial.sh", SEEDS="0 1", GPUS="1", SCHEDULES="base step",
                        DROPOUTS="base drop_inc dropout_prob=0.158")
    trained = [call for call in calls if "train.py" in call]
    found = {(flags["--lr_schedule"], flags["--dropout_prob"], flags["--dropout_var"], flags["--seed"])
             for flags in map(flags_given, trained)}
    assert len(trained) == 12 and found == {
        (schedule, *dropout, seed) for schedule in ("cosine", "step") for seed in "01"
        for dropout in (("0.1", "1"), ("0.1", "1.01"), ("0.158", "1"))}
    plotted = calls[-1]
    assert "plot_results.py" in plotted and plotted.count("LaVIN-7B-") == 12
    calls = sandbox.run("scripts/run_factorial.sh", GPUS="1")
    assert sum("train.py" in call for call in calls) == 12 + N_CROSSED


def test_a_factorial_takes_the_runs_of_all_methods_over(sandbox):
    """base+drop_inc is drop_inc. Where an earlier version has trained a run under the longer name, it goes on there."""
    def trained(script: str, **environment: str) -> list[str]:
        sandbox.calls.write_text("")
        calls = sandbox.run(f"scripts/{script}.sh", GPUS="1", **environment)
        return [call.split("--output_dir ")[-1] for call in calls if "train.py" in call]

    for method in METHODS.keys() - {"base"}:
        alone = sandbox.run("scripts/run_all_variants.sh", GPUS="1", METHODS=method)[0]
        sandbox.calls.write_text("")
        combined = sandbox.run("scripts/run_all_variants.sh", GPUS="1", METHODS=f"base+{method}")[0]
        sandbox.calls.write_text("")
        assert combined == alone
    crossed = {"SCHEDULES": "base step", "DROPOUTS": "base drop_inc dropout_prob=0.158"}
    names = ["base", "drop_inc", "base+dropout_prob=0.158", "step", "step+drop_inc", "step+dropout_prob=0.158"]
    assert trained("run_factorial", **crossed) == [f"./LaVIN-7B-{name}-seed0" for name in names]
    assert trained("run_all_variants", METHODS="step drop_inc base+drop_inc step") == [
        "./LaVIN-7B-step-seed0", "./LaVIN-7B-drop_inc-seed0"]
    (sandbox.folder / "LaVIN-7B-base+drop_inc-seed1").mkdir()
    assert trained("run_factorial", SEEDS="0 1", SCHEDULES="base", DROPOUTS="drop_inc") == [
        "./LaVIN-7B-drop_inc-seed0", "./LaVIN-7B-base+drop_inc-seed1"]


@pytest.mark.parametrize("jobs", ["3", "20"])
def test_jobs_share_the_runs(sandbox, jobs):
    calls = sandbox.run("scripts/run_all_variants.sh", SEEDS=" 0 1", GPUS="1", JOBS=jobs)
    runs = [call.split("--output_dir ")[-1] for call in calls if "train.py" in call]
    assert len(runs) == len(set(runs)) == 2 * len(METHODS) == sum("eval.py" in call for call in calls)


def stub(sandbox, name: str, script: str) -> None:
    path = sandbox.folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("mebibytes, gpus, cores, jobs", [
    ("100", 1, 16, 8), ("100", 1, 64, 8), ("100", 1, 6, 3), ("100", 1, 1, 1), ("100", 2, 16, 8), ("2000", 1, 16, 1),
    ("2000", 2, 16, 2), (None, 2, 16, 2)])
def test_jobs_auto_is_a_run_a_gpu_and_more_of_a_small_base(sandbox, mebibytes, gpus, cores, jobs):
    assert jobs_of_auto(sandbox, mebibytes, gpus, cores) == jobs


@pytest.mark.parametrize("mebibytes, jobs", [("94", 8), ("255", 8), ("256", 1), ("700", 1), (None, 1)])
def test_jobs_auto_counts_a_gguf_file_as_what_it_is_in_memory(sandbox, mebibytes, jobs):
    """A file of 4 bits a weight is dequantized to 16."""
    assert jobs_of_auto(sandbox, mebibytes, 1, 16, MODEL="smollm2.gguf") == jobs


def jobs_of_auto(sandbox, mebibytes: str | None, gpus: int, cores: int, **environment: str) -> int:
    """The runs at once of a base of this size; None: it is not there."""
    stub(sandbox, "nproc", f"echo {cores}")
    stub(sandbox, "du", f"printf '{mebibytes}\\t%s' $2" if mebibytes else "exit 1")
    sandbox.run("scripts/run_all_variants.sh", SEEDS="0 1", GPUS=str(gpus), JOBS="auto", HERE=str(gpus), **environment)
    return len(runs_of_processes(sandbox))


def test_jobs_auto_without_a_gpu_is_one_run(sandbox):
    stub(sandbox, "du", "printf '100\\tweights'")
    sandbox.run("scripts/run_all_variants.sh", GPUS="1", JOBS="auto", HERE="0")
    assert runs_of_processes(sandbox) == [len(METHODS)]


def test_several_nodes_make_one_run_at_a_time(sandbox):
    """Each run has all their GPUs, and the job has one rendezvous."""
    stub(sandbox, "du", "printf '100\\tweights'")
    sandbox.run("scripts/run_all_variants.sh", JOBS="auto", **slurm(sandbox, "2"))
    assert runs_of_processes(sandbox) == [len(METHODS)]
    sandbox.calls.write_text("")
    for jobs in ("2", "4"):
        assert sandbox.run("scripts/run_all_variants.sh", code=1, JOBS=jobs, **slurm(sandbox, "2")) == []
        assert sandbox.errors == (
            f"run_all_variants.sh: JOBS={jobs}: 2 nodes make one run at a time: leave JOBS out, or take one node "
            "(slurm/one_node.sbatch)\n")
    sandbox.run("scripts/run_all_variants.sh", JOBS="1", **slurm(sandbox, "2"))


def test_the_gpus_are_listed_once_for_all_runs(sandbox):
    """nvidia-smi takes a second where no process keeps the driver loaded."""
    sandbox.run("scripts/run_all_variants.sh", GPUS="1", HERE="1")
    assert (sandbox.folder / "calls.gpus").read_text() == "-L\n"


def processes_of_runs(sandbox) -> list[str]:
    """The calls of util.series since the last time."""
    path = sandbox.folder / "calls.series"
    calls = path.read_text().splitlines()
    path.unlink()
    return calls


def runs_of_processes(sandbox) -> list[int]:
    """The number of runs that each process was to make."""
    return [len(re.findall(r"/\d+-\d{4}\b", call)) for call in processes_of_runs(sandbox)]


def test_the_runs_of_a_slot_share_a_process_up_to_one_that_fails(sandbox):
    sandbox.run("scripts/run_all_variants.sh", GPUS="1", JOBS="2")
    assert runs_of_processes(sandbox) == [len(METHODS) // 2] * 2
    sandbox.run("scripts/run_all_variants.sh", GPUS="4")  # all of them train together
    assert runs_of_processes(sandbox) == [len(METHODS)]
    sandbox.calls.write_text("")
    calls = sandbox.run("scripts/run_all_variants.sh", GPUS="1", FAIL="--output_dir ./LaVIN-7B-cyclical-seed0", code=1)
    assert runs_of_processes(sandbox) == [len(METHODS), len(METHODS) - 2]
    assert sandbox.errors == "failed: ./LaVIN-7B-cyclical-seed0\n"
    assert sum("train.py" in call for call in calls) == len(METHODS)


def test_a_process_that_ends_before_its_runs_fails_each_of_them(sandbox):
    """The process has lost its GPU, for instance: nothing is tried without end."""
    sandbox.run("scripts/run_all_variants.sh", GPUS="1", METHODS="base step", FAIL="util.series", code=1)
    assert sandbox.errors == "failed: ./LaVIN-7B-base-seed0 ./LaVIN-7B-step-seed0\n"
    assert not list(sandbox.folder.glob(".runs*"))


@pytest.mark.parametrize("methods, script", [
    ("base stepp step", "finetuning_sqa_7b_stepp.sh"), ("base,step", "finetuning_sqa_7b,step.sh"),
    ("step stepp+drop_dec", "finetuning_sqa_7b_stepp.sh")])
def test_a_method_without_a_script_is_refused_before_any_run(sandbox, methods, script):
    assert sandbox.run("scripts/run_all_variants.sh", GPUS="1", METHODS=methods, code=1) == []
    assert sandbox.errors.startswith(f'run_all_variants.sh: METHODS="{methods}": there is no scripts/{script}: give')
    assert sandbox.errors.count("\n") == 1


def test_several_nodes_find_the_commands_in_the_projects_folder(sandbox):
    sandbox.run("scripts/run_all_variants.sh", METHODS="base", **slurm(sandbox, "2"))
    command, = processes_of_runs(sandbox)
    assert command.startswith("srun --nodes 2 ") and f" -m util.series {sandbox.folder}/.runs." in command
    assert not list(sandbox.folder.glob(".runs*"))


def devices(calls: list[str]) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each training."""
    return [call.split()[0].removeprefix("gpus=") for call in calls if "train.py" in call or "search.py" in call]


SHOWING_GPUS = STUB.replace('echo "$name $*"', 'echo "gpus=${CUDA_VISIBLE_DEVICES-all} $name $*"')


@pytest.mark.parametrize("gpus, jobs, visible, shares", [
    ("4", "4", "", ["0", "1", "2", "3"]), ("4", "2", "", ["0,1", "2,3"]), ("2", "4", "5,7", ["5", "7"]),
    ("4", "1", "", ["all"]), ("1", "2", "", ["all"]), ("4", "4", "GPU-a,GPU-b,GPU-c,GPU-d", ["GPU-a", "GPU-b",
                                                                                        "GPU-c", "GPU-d"])])
def test_jobs_share_the_gpus_of_a_node(sandbox, gpus, jobs, visible, shares):
    """Processes do not communicate where each job has one GPU; the effective batch stays 32."""
    (sandbox.folder / "bin" / "python").write_text(SHOWING_GPUS)
    environment = {"GPUS": gpus, "JOBS": jobs, **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}
    calls = sandbox.run("scripts/run_all_variants.sh", **environment)
    assert len(devices(calls)) == len(METHODS) and set(devices(calls)) == set(shares)
    n = int(gpus) if jobs == "1" else len(shares[0].split(",")) if shares != ["all"] else 1
    assert all(f"--accum_iter {16 // n} " in call and ("--nproc_per_node" in call) == (n > 1)
               for call in calls if "train.py" in call)


@pytest.mark.parametrize("environment, shares, gpus", [
    ({"GPUS": "4"}, ["0", "1", "2", "3"], 1), ({"GPUS": "4", "JOBS": "1"}, ["all"], 4), ({"GPUS": "1"}, ["all"], 1),
    ({"GPUS": "2", "JOBS": "4"}, ["0", "0", "1", "1"], 1)])
def test_a_search_has_a_worker_for_each_share(sandbox, environment, shares, gpus):
    (sandbox.folder / "bin" / "python").write_text(SHOWING_GPUS)
    *workers, last = sandbox.run("scripts/search_sqa_7b.sh", "--trials", "5", "--", "--seed", "1", **environment)
    workers, plots = ([*workers, last], []) if len(shares) == 1 else (workers, [last])
    assert sorted(devices(workers)) == shares
    for worker in workers:
        assert f"python search.py --study ./search-7B --gpus {gpus} --trials 5 -- --llm_model 7B" in worker
        assert f"--accum_iter {16 // gpus} " in worker and worker.endswith(" --seed 1")
        assert "--blr" not in worker  # nothing that is searched is fixed
    assert all(plot.endswith("plot_results.py ./search-7B --out ./search-7B/report") for plot in plots)


def test_a_search_that_fails_or_is_stopped_says_so(sandbox):
    calls = sandbox.run("scripts/search_sqa_7b.sh", GPUS="2", FAIL="search.py", STATUS="3", code=3)
    assert "plot_results" not in str(calls)
    calls = sandbox.stop("scripts/search_sqa_7b.sh", GPUS="2", HANG="search.py", n=2)
    assert calls[-2:] == ["TERM", "TERM"]
    assert sandbox.run("scripts/search_sqa_7b.sh", SLURM_NNODES="2", code=1) == calls
    assert "sbatch slurm/search.sbatch" in sandbox.errors and sandbox.errors.count("\n") == 1


# --- stopping ---

@pytest.mark.parametrize("gpus", ["1", "4"])
@pytest.mark.parametrize("signals", [(signal.SIGUSR1,), (signal.SIGTERM, signal.SIGUSR1), (signal.SIGHUP,)])
def test_stop_signals_reach_the_program_as_sigterm(sandbox, signals, gpus):
    train, *terms = sandbox.stop("scripts/finetuning_sqa_7b.sh", signals=signals, GPUS=gpus)
    assert "train.py" in train and terms and set(terms) == {"TERM"}  # the rest: eval.py is not started


@pytest.mark.parametrize("script", ["signals", "common"])
def test_a_signal_after_a_program_has_ended_does_not_replace_its_status(sandbox, script):
    """It ends bash's `wait` with 138, even where there is nothing left to wait for."""
    call = {"signals": "run bash -c 'exit 75'", "common": "work() { return 75; }; JOBS=1; in_parallel"}[script]
    interrupted = """wait() {
        if ! kill -0 "$1" 2> /dev/null && [ -z "${late:-}" ]; then late=1; return 138; fi
        builtin wait "$@"
    }"""
    sandbox.run("-c", f"source scripts/{script}.sh; set +e; {interrupted}; {call}", code=75)


def test_ctrl_c_at_a_terminal(sandbox):
    for script in ("finetuning_sqa_7b", "run_all_variants"):
        _, term = sandbox.stop(f"scripts/{script}.sh", signals=[signal.SIGINT], kill=os.killpg)
        assert term == "TERM"


def test_training_that_ends_while_it_is_stopped_is_not_evaluated(sandbox):
    assert len(sandbox.stop("scripts/finetuning_sqa_7b.sh", STATUS="0")) == 2


def test_stopped_evaluation_keeps_its_status(sandbox):
    calls = sandbox.stop("scripts/finetuning_sqa_7b.sh", HANG="eval.py", STATUS="3", code=3)
    assert len(calls) == 3 and calls[-1] == "TERM"


@pytest.mark.parametrize("jobs", [1, 2])
def test_stopped_variants_go_on_with_the_same_command(sandbox, jobs):
    command = {"GPUS": "1", "JOBS": str(jobs), "n": jobs}
    calls = sandbox.stop("scripts/run_all_variants.sh", "--epochs", "5", **command)
    assert len(calls) == 1 + 2 * jobs and calls[-jobs:] == ["TERM"] * jobs
    assert sandbox.errors == "stopped: the same command goes on\n"
    calls = sandbox.stop("scripts/run_all_variants.sh", HANG="-seed1", SEEDS="0 1", **command)
    assert sum("train.py" in call for call in calls) == len(METHODS) + jobs and calls[-jobs:] == ["TERM"] * jobs
    assert sandbox.errors == "stopped: the same command goes on\n"


def test_variants_end_where_one_was_stopped_by_itself(sandbox):
    calls = sandbox.run("scripts/run_all_variants.sh", GPUS="1", FAIL="eval.py", STATUS="75", code=75)
    assert len(calls) == 2


# --- Slurm ---

JOB = ("slurm/one_node.sbatch", "scripts/finetuning_sqa_7b.sh")


def slurm(sandbox, nodes: str = "1", job: str = "42") -> dict:
    return {"SLURM_SUBMIT_DIR": str(sandbox.folder), "SLURM_NNODES": nodes, "SLURM_JOB_ID": job,
            "SLURM_JOB_NODELIST": "node[7-8]"}


def test_slurm_one_node(sandbox):
    calls = sandbox.run("bin/sbatch", *JOB, "--epochs", "5", **slurm(sandbox))
    assert calls[1].startswith("python -m util.launch --standalone --nproc_per_node 4 train.py")
    assert calls[1].endswith("--epochs 5")
    sandbox.run("slurm/one_node.sbatch", code=1, **slurm(sandbox))
    assert sandbox.errors.startswith("name a script: sbatch ")


def test_slurm_search_is_an_array_of_workers(sandbox):
    calls = sandbox.run("bin/sbatch", "slurm/search.sbatch", "--trials", "5", GPUS="1", **slurm(sandbox))
    assert calls[1].startswith("python search.py --study ./search-7B --gpus 1 --trials 5 -- --llm_model 7B")
    assert "#SBATCH --array=" in (sandbox.folder / "slurm" / "search.sbatch").read_text()


@pytest.mark.parametrize("job, port", [("42", 10042), ("1234567", 44567)])  # jobs that share a node
def test_slurm_several_nodes_use_the_first_as_rendezvous(sandbox, job, port):
    calls = sandbox.run("slurm/several_nodes.sbatch", "scripts/finetuning_sqa_7b.sh", **slurm(sandbox, "2", job))
    srun = next(call for call in calls if call.startswith("srun"))
    assert (f"python -m util.launch --nnodes 2 --nproc_per_node 4 --rdzv_id {job} --rdzv_backend c10d "
            f"--rdzv_endpoint node7:{port} train.py") in srun
    assert "--batch_size 2 --accum_iter 2 " in srun


@pytest.mark.parametrize("cpus, flags", [("16", "--ntasks-per-node 1 --cpus-per-task 16 python "),
                                         ("", "--ntasks-per-node 1 python ")])
def test_srun_is_told_the_cpus_of_a_task(sandbox, cpus, flags):
    """Slurm 22.05 to 23.02 does not tell it, and gives the task one CPU; a job may have no such number."""
    command = ("slurm/several_nodes.sbatch", "scripts/finetuning_sqa_7b.sh")
    calls = sandbox.run(*command, SLURM_CPUS_PER_TASK=cpus, **slurm(sandbox, "2"))
    sruns = [call for call in calls if call.startswith("srun")]
    assert len(sruns) == 2 and all(flags in call for call in sruns)
    assert "#SBATCH --cpus-per-task=" in (sandbox.folder / "slurm/several_nodes.sbatch").read_text()


@pytest.mark.parametrize("job", ["one_node", "several_nodes"])
def test_job_is_requeued_at_its_time_limit(sandbox, job):
    assert "#SBATCH --signal=B:USR1@" in (sandbox.folder / f"slurm/{job}.sbatch").read_text()
    nodes = slurm(sandbox, "1" if job == "one_node" else "2")
    command = (f"slurm/{job}.sbatch", JOB[1])
    calls = sandbox.stop(*command, HANG="util.launch --", **nodes)
    # at SIGTERM, srun would kill its processes before they have saved
    assert calls[-2:] == ["TERM" if job == "one_node" else "USR1", "scontrol requeue 42"]
    assert "eval.py" not in str(calls)
    assert "submit" not in sandbox.output
    sandbox.stop(*command, HANG="util.launch --", FAIL="requeue", **nodes)
    assert sandbox.output.endswith("submit the same command again to go on\n") and sandbox.errors == ""


def test_a_task_of_an_array_requeues_itself_alone(sandbox):
    """Slurm gives the last task the array's own number as SLURM_JOB_ID: `scontrol requeue 42` would stop all tasks."""
    array = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "2", "GPUS": "1"}
    calls = sandbox.stop("slurm/search.sbatch", HANG="search.py", **slurm(sandbox), **array)
    assert calls[-1] == "scontrol requeue 42_2"


def test_a_job_trains_on_the_gpus_that_it_was_given(sandbox):
    for environment, n in (({"SLURM_GPUS_ON_NODE": "2"}, 2), ({"SLURM_GPUS_ON_NODE": "2", "GPUS": "8"}, 8), ({}, 4)):
        assert f"--nproc_per_node {n} train.py" in sandbox.run("bin/sbatch", *JOB, **slurm(sandbox), **environment)[-2]


def test_job_that_ends_otherwise_is_not_requeued(sandbox):
    """Slurm itself requeues preempted jobs after a SIGTERM, and cancelled jobs must not come back."""
    calls = sandbox.stop(*JOB, signals=[signal.SIGTERM], **slurm(sandbox))
    assert calls[-1] == "TERM"
    calls = sandbox.stop("slurm/one_node.sbatch", "scripts/vl_instruction_tuning_13b.sh", STATUS="0", code=0,
                         **slurm(sandbox))  # it was done
    assert calls[-1] == "TERM"
    assert "requeue" not in str(sandbox.run(*JOB, FAIL="train.py", code=1, **slurm(sandbox)))


@pytest.mark.parametrize("script, model", [("vl_instruction_tuning_13b", "13B"),
                                           ("vl_instruction_tuning_vicuna_13b", "vicuna_13B")])
def test_instruction_tuning_uses_the_published_recipe(sandbox, script, model):
    train, = sandbox.run(f"scripts/{script}.sh", "--seed", "1", GPUS="8")
    assert train.startswith(f"python -m util.launch --standalone --nproc_per_node 8 train.py --llm_model {model} "
                            "--llama_model_path ../data/weights --data_root ../data "
                            f"--output_dir ./LaVIN-{model}-VLIT ")
    assert train.endswith("--do_pretrain --batch_size 4 --accum_iter 1 --epochs 15 --warmup_epochs 0.2 --temperature 5 "
                          "--seed 1")  # 4 x 1 x 8 GPUs = 32
    assert "--loss_norm microbatch " in train and "--blr 9e-3" in train
    sandbox.run(f"scripts/{script}.sh", GPUS="16", code=1)
    assert "GPUS=16 cannot share micro-batches of 4: choose 1, 2, 4 or 8 in all" in sandbox.errors


def test_mme_evaluates_the_given_run(sandbox):
    score, = sandbox.run("scripts/eval_mme_benchmark.sh", "LaVIN-13B-VLIT", "--seed", "1", DATA_ROOT="d")
    assert score == ("python -m util.launch --standalone --nproc_per_node 4 eval_mme.py --adapter_path LaVIN-13B-VLIT "
                     "--mme_root d/mme --max_batch_size 16 --seed 1")
    sandbox.run("scripts/eval_mme_benchmark.sh", code=1)
    assert "name a run" in sandbox.errors


def test_a_python_without_packages_is_told_in_one_line_before_any_run(sandbox):
    line = ("{}: no python with PyTorch here: bash scripts/environment.sh requirements.txt makes .venv with all "
            "packages\n")
    for name in ("finetuning_sqa_7b_step.sh", "run_all_variants.sh", "search_sqa_7b.sh"):
        assert sandbox.run(f"scripts/{name}", code=1, NO_TORCH="1") == [] and sandbox.errors == line.format(name)
    (sandbox.folder / "bin" / "python").unlink()
    for name in ("bash", "dirname", "basename"):
        (sandbox.folder / "bin" / name).symlink_to(shutil.which(name))
    assert sandbox.run("scripts/finetuning_sqa_7b.sh", code=1, PATH=f"{sandbox.folder}/bin") == []
    assert sandbox.errors == line.format("finetuning_sqa_7b.sh")


def test_the_demo_installs_gradio_for_the_page_alone_and_runs_on_any_number_of_gpus(sandbox):
    sandbox.install()
    (sandbox.folder / "run").mkdir()
    (sandbox.folder / "run" / "checkpoint-0.pth").touch()
    for arguments, requirements in ((["--cli"], "requirements.txt"), ([], "requirements/demo.txt")):
        *_, install, demo = sandbox.run("scripts/demo.sh", *arguments, MODEL="7B", OUTPUT_ROOT="run", HERE="1")
        assert install.endswith(f"-r {requirements}") and "demo.py --runs run" in demo


def test_demo_uses_runs_of_smollm2_or_of_quickstart_or_of_the_environment(sandbox):
    sandbox.run("scripts/demo.sh", code=1)
    assert "run 'bash scripts/quickstart.sh' first" in sandbox.errors
    sandbox.install()
    for run in ("runs/quickstart/LaVIN-toy-base-seed0", "LaVIN-7B-base"):
        (sandbox.folder / run).mkdir(parents=True)
        (sandbox.folder / run / "checkpoint-0.pth").touch()
    assert sandbox.run("scripts/demo.sh", "--cli")[-1] == (
        "python demo.py --runs runs/quickstart --llama_model_path weights --llm_model toy --data_root data/mini --cli")
    of_7b = "python demo.py --runs . --llama_model_path ../data/weights --llm_model 7B --data_root ../data"
    assert sandbox.run("scripts/demo.sh", MODEL="7B")[-1] == of_7b
    smollm2 = sandbox.folder / "runs" / "smollm2" / "LaVIN-smollm2.gguf-base-seed0"
    smollm2.mkdir(parents=True)
    (smollm2 / "checkpoint-0.pth").touch()
    assert sandbox.run("scripts/demo.sh")[-1] == (
        "python demo.py --runs runs/smollm2 --llama_model_path weights --llm_model smollm2.gguf "
        "--data_root data/easy_vqa")
    assert sandbox.run("scripts/demo.sh", MODEL="7B")[-1] == of_7b
    for arguments, environment in ((["--runs", "x"], {}), ([], {"MODEL": "toy"}),
                                   ([], {"OUTPUT_ROOT": "runs/quickstart"})):
        assert " --llm_model toy --data_root data/mini" in sandbox.run("scripts/demo.sh", *arguments, **environment)[-1]


RUNS_OF_SMOLLM2 = [f"runs/smollm2/LaVIN-smollm2.gguf-{name}-seed0" for name in ("base", "cyclical", "drop_dec_v2")]


def score(sandbox, *runs: str) -> None:
    """Puts scores into the folders, as the stub does not."""
    for run in runs:
        (sandbox.folder / run).mkdir(parents=True, exist_ok=True)
        (sandbox.folder / run / "scores.json").touch()


def test_quickstart_smollm2_scores_untuned_tuned_and_with_exchanged_pictures(sandbox):
    sandbox.install()
    score(sandbox, *RUNS_OF_SMOLLM2)
    calls = sandbox.run("scripts/quickstart_smollm2.sh", SEEDS="1 2")  # all its runs have seed 0
    names = re.findall(r"^python (?:-m )?(tools\.\w+|\w+\.py) ", "\n".join(calls), re.MULTILINE)
    assert names[:3] == ["tools.make_easy_vqa", "tools.make_toy_base", "eval.py"]
    assert sorted(names[3:9]) == ["eval.py"] * 3 + ["train.py"] * 3  # two at once
    assert names[9:] == ["plot_results.py", *["eval.py"] * 3, "tools.topic_scores"]
    trained = [call for call in calls if " train.py " in call]
    assert sorted(call.split("--output_dir ")[-1].split()[0] for call in trained) == RUNS_OF_SMOLLM2
    flags = [get_args_parser().parse_args(call.split("train.py ")[1].split()) for call in trained]
    assert {(of.llm_model, of.data_root, of.prompt_format, of.epochs) for of in flags} == {
        ("smollm2.gguf", "data/easy_vqa", "QCM-EA", 2)}
    shuffled = [call for call in calls if "--split shuffled" in call]
    assert [call.split("--adapter_path ")[1].split()[0] for call in shuffled] == RUNS_OF_SMOLLM2
    assert all(run in calls[-1] for run in RUNS_OF_SMOLLM2)


@pytest.mark.parametrize("script", ["quickstart.sh", "quickstart_smollm2.sh"])
def test_the_flags_of_a_quickstart_go_to_every_run(sandbox, script):
    sandbox.install()
    score(sandbox, *RUNS_OF_SMOLLM2)
    trained = [call for call in sandbox.run(f"scripts/{script}", "--epochs", "1") if " train.py " in call]
    assert len(trained) >= 3 and all(call.endswith(" --epochs 1") for call in trained)


def test_a_job_that_bash_starts_is_told_to_go_to_slurm(sandbox):
    for path in sorted(ROOT.glob("slurm/*.sbatch")):
        assert sandbox.run(f"slurm/{path.name}", "scripts/finetuning_sqa_7b.sh", code=1) == []
        assert sandbox.errors.endswith("start this file with sbatch\n") and sandbox.errors.count("\n") == 1


def test_quickstart_smollm2_goes_on_past_a_failure_but_not_past_a_stop(sandbox):
    sandbox.install()
    base, cyclical, decreasing = RUNS_OF_SMOLLM2
    score(sandbox, base, decreasing)

    def compared(**environment: str) -> list[str]:
        """The folders whose accuracies by topic are printed."""
        sandbox.calls.write_text("")
        *_, last = sandbox.run("scripts/quickstart_smollm2.sh", code=1, **environment)
        return last.split("data/easy_vqa ")[1].split()

    assert compared(FAIL=f"--output_dir {cyclical} ") == [
        "runs/smollm2/untuned", base, "runs/smollm2/base-shuffled", decreasing, "runs/smollm2/drop_dec_v2-shuffled"]
    assert sandbox.errors.splitlines() == [f"failed: {cyclical}"] * 2  # behind the table of runs, and at the end
    score(sandbox, cyclical)
    assert compared(FAIL="--output_dir runs/smollm2/base-shuffled") == [
        "runs/smollm2/untuned", base, cyclical, "runs/smollm2/cyclical-shuffled", decreasing,
        "runs/smollm2/drop_dec_v2-shuffled"]
    assert sandbox.errors == "failed: runs/smollm2/base-shuffled\n"
    assert len(compared(FAIL="plot_results.py")) == 7
    assert sandbox.errors == "failed: plot_results.py\n"
    for step in ("train.py", "--split shuffled"):
        sandbox.calls.write_text("")
        calls = sandbox.run("scripts/quickstart_smollm2.sh", FAIL=step, STATUS="75", code=75)
        assert step in calls[-1]


def test_the_study_of_smollm2_has_all_methods_and_crossings_and_two_tables(sandbox):
    sandbox.install()
    calls = sandbox.run("scripts/study_smollm2.sh", "--epochs", "3", SEEDS="0 1")
    trained = [call.split("train.py ")[1].split() for call in calls if " train.py " in call]
    tables = [call for call in calls if "plot_results.py" in call]
    assert [table.split("--out ")[1].split()[0] for table in tables] == [
        "runs/study_smollm2/crossed", "runs/study_smollm2/plots"]
    assert [len(re.findall(r"/LaVIN-\S+-seed\d ", table)) for table in tables] == [2 * N_CROSSED, 2 * len(METHODS)]
    of = [get_args_parser().parse_args(words) for words in trained]
    assert len({run.output_dir for run in of}) == 2 * (N_CROSSED + 2)  # all methods but two are among the crossed ones
    assert {(run.epochs, run.blr, run.data_root, run.batch_size * run.accum_iter) for run in of} == {
        (3, 0.06, "data/easy_vqa_80", 16)}
    assert any("make_easy_vqa --out data/easy_vqa_80 --train 80 --test 800" in call for call in calls)


@pytest.mark.parametrize("gpus", ["0", "1"])
def test_the_study_of_smollm2_runs_on_the_cpu_where_there_is_no_gpu(sandbox, gpus):
    sandbox.install()
    calls = [call for call in sandbox.run("scripts/study_smollm2.sh", SEEDS="0", HERE=gpus)
             if " train.py " in call or " eval.py --ckpt_dir " in call]
    assert {("--device cpu --precision " in call) for call in calls} == {gpus == "0"} and len(calls) > 8


def test_the_study_of_smollm2_goes_on_past_a_failed_run_but_not_past_a_stop(sandbox):
    sandbox.install()
    calls = sandbox.run("scripts/study_smollm2.sh", SEEDS="0", FAIL="-step+drop_dec_v2-seed0", code=1)
    tables = [call for call in calls if "plot_results.py" in call]
    assert [len(re.findall(r"/LaVIN-\S+-seed\d ", table)) for table in tables] == [N_CROSSED - 1, len(METHODS)]
    assert sandbox.errors == "failed: runs/study_smollm2/LaVIN-smollm2.gguf-step+drop_dec_v2-seed0\n"
    sandbox.calls.write_text("")
    calls = sandbox.run("scripts/study_smollm2.sh", SEEDS="0", FAIL="-step+drop_dec_v2-seed0", STATUS="75", code=75)
    assert not any("plot_results.py" in call or "-drop_inc-seed0" in call for call in calls)
    sandbox.calls.write_text("")
    calls = sandbox.run("scripts/study_smollm2.sh", "--epohcs", "3", FAIL="python - ", STATUS="2", code=2)
    assert sum("--epohcs" in call for call in calls) == 1  # wrong flags are said once
    calls = sandbox.stop("scripts/study_smollm2.sh", SEEDS="0", JOBS="1")
    assert calls[-1] == "TERM" and sum(" train.py " in call for call in calls) == 1


@pytest.mark.parametrize("script, step", [
    *(("quickstart_smollm2.sh", step)
      for step in ("make_easy_vqa", "make_toy_base", "eval.py --ckpt_dir", "train.py", "--split shuffled")),
    *(("quickstart.sh", step)
      for step in ("make_mini_scienceqa", "make_toy_base", "eval.py --ckpt_dir", "train.py")),
    ("search_quickstart.sh", "make_toy_base")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_quickstart_that_is_stopped_leaves_no_process_and_goes_on(sandbox, script, step, number):
    """This holds also for a step that knows nothing of exit status 75."""
    sandbox.install()
    score(sandbox, *RUNS_OF_SMOLLM2)
    status = "75" if step == "train.py" else "143"
    calls = sandbox.stop(f"scripts/{script}", HANG=step, signals=(number,), STATUS=status)
    assert calls[-1] == "TERM" and sum(step in call for call in calls) <= 2 and "goes on" in sandbox.errors
    assert any(step in call for call in sandbox.run(f"scripts/{script}"))
