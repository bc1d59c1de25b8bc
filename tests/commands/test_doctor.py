"""scripts/check.sh and tools/doctor.py: a complete world passes, and each thing that is missing has its line."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lavin.fast.speed_up import FastPaths
from lavin.runtime.errors import UserError
from lavin.runtime.startup import INSTALL
from tiny import ROOT
from tools import doctor


@pytest.fixture
def world(base, scienceqa_copy, tmp_path, monkeypatch):
    """Data and a base of its own that a test may damage."""
    shutil.copytree(base.weights, tmp_path / "weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(doctor.subprocess, "run", no_nvidia_smi)
    flags = ["--llama_model_path", str(tmp_path / "weights"), "--llm_model", "tiny", "--vision_model",
             str(base.vision), "--data_root", str(scienceqa_copy), "--output_dir", str(tmp_path / "runs" / "a"),
             "--device", "cpu"]
    return SimpleNamespace(root=tmp_path, flags=flags)


def no_nvidia_smi(*args, **kwargs):
    raise FileNotFoundError("nvidia-smi")


@pytest.fixture
def check(world, capsys):
    """Runs the program; returns its lines, and those that begin with `!`. The exit status must agree."""
    def run(*flags: str) -> tuple[list[str], list[str]]:
        status = doctor.main([*world.flags, *flags])
        lines = capsys.readouterr().out.splitlines()
        problems = [line for line in lines if line.startswith("!")]
        assert status == (1 if problems else 0)
        end = "== what would fail" if problems else "== nothing found that would stop a run"
        assert lines[-1 - len(problems)] == end
        return lines, problems
    return run


def assert_one(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems


def find(lines: list[str], label: str) -> str:
    """Returns the text that stands beside a label, in the second of two aligned columns."""
    text, = (line[22:] for line in lines if line[:22].strip() == label)
    return text


# --- What there is ---

def test_a_complete_world_passes(check, world):
    lines, problems = check()
    assert problems == []
    assert find(lines, "CUDA of torch").startswith(torch.version.cuda or "-; it sees 0 GPUs; for older GPUs")
    assert find(lines, "device") == "CPU" and find(lines, "precision").startswith("torch.float32 (")
    assert find(lines, "attention") == "padded_attention"
    assert [find(lines, label) for label in ("fused", "compiled", "captured")] == ["no"] * 3
    assert find(lines, "train split") == "12 problems, 6 pictures"
    assert find(lines, "test split") == "6 problems, 3 pictures"
    assert find(lines, "consolidated.00.pth").endswith(" in ~/weights/tiny") and "bytes" in find(lines, "params.json")
    assert find(lines, "torch") == torch.__version__ and find(lines, "timm")
    assert str(world.root) not in "\n".join(lines)  # the home folder names a user
    assert not (world.root / "runs").exists()


def test_gpus_are_listed_as_nvidia_smi_tells(check, monkeypatch):
    def says(text: str, status: int):
        monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, status, text, ""))
        return check()[0]
    lines = says("Tesla V100-SXM2-32GB, 7.0, 32768 MiB, 535.54.03\nTesla T4, 7.5, 15360 MiB, 535.54.03\n", 0)
    assert find(lines, "GPU 0") == "Tesla V100-SXM2-32GB, 7.0, 32768 MiB, 535.54.03"
    assert find(lines, "GPU 1").startswith("Tesla T4, 7.5")
    assert find(says("NVIDIA-SMI has failed\n", 9), "nvidia-smi") == "NVIDIA-SMI has failed"


def on_gpu(monkeypatch, capability=(7, 0), paths=None):
    """Lets this machine look like one with a GPU. paths: the answer of choose_fast_paths."""
    monkeypatch.setattr(doctor, "choose_device", lambda name, local_rank: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for module in ("tools.doctor", "lavin.attention", "lavin.runtime.device", "lavin.kernels.fp8"):
        monkeypatch.setattr(f"{module}.compute_capability", lambda device: capability)
    paths = paths or FastPaths(fused=True, compiled=True, captured=True)
    monkeypatch.setattr(doctor, "choose_fast_paths", lambda *args: paths)


def test_what_a_run_uses_is_what_speed_up_chooses(check, monkeypatch):
    note = "the model runs without torch.compile, which does not work on this GPU: no C compiler"
    on_gpu(monkeypatch, (8, 0), FastPaths(fused=True, compiled=False, captured=True, note=note))
    lines, problems = check()
    assert problems == []
    assert find(lines, "device") == "Tesla V100" and find(lines, "precision").startswith("torch.bfloat16 (")
    assert find(lines, "attention") == "efficient_varlen_attention"
    assert [find(lines, label) for label in ("fused", "compiled", "captured")] == ["yes", "no", "yes"]
    assert find(lines, "") == note
    for flags, captured in (("--model_parallel_size 2", "no"), ("--bits 8bit", "no"), ("--bits 4bit", "yes")):
        lines, _ = check(*flags.split())
        assert [find(lines, label) for label in ("fused", "compiled", "captured")] == [captured, "no", captured]


def test_the_choice_gets_the_flags(check, monkeypatch):
    calls = []
    monkeypatch.setattr(doctor, "choose_fast_paths", lambda *args: calls.append(args) or FastPaths(
        fused=False, compiled=False, captured=False))
    check("--compile", "off", "--bits", "fp8", "--precision", "bf16")
    assert calls == [(torch.device("cpu"), torch.bfloat16, "fp8", "off", "auto")]


# --- What is missing ---

@pytest.mark.parametrize("name", ["train", "test"])
def test_missing_split(check, world, name):
    path = world.root / "data" / "pid_splits.json"
    splits = json.loads(path.read_text())
    del splits[name]
    path.write_text(json.dumps(splits))
    lines, problems = check()
    assert_one(problems, f"--split {name}", "pid_splits.json has ")
    assert find(lines, "test split" if name == "train" else "train split")  # the other is checked all the same


@pytest.mark.parametrize("name", ["problems.json", "pid_splits.json"])
def test_missing_data_file(check, world, name):
    (world.root / "data" / name).unlink()
    lines, problems = check()
    assert find(lines, name) == "not in ~/data"
    assert_one(problems, name, "put ScienceQA's files there, or name their folder with --data_root")


def test_missing_pictures(check, world):
    shutil.rmtree(world.root / "data" / "images" / "test")
    assert_one(check()[1], "split test lacks 3 pictures, the first is ", "~/data/images/test/", "--skip_bad")
    assert check("--skip_bad")[1] == []


def test_captions_are_needed_with_their_flag_only(check, world):
    (world.root / "data" / "captions.json").unlink()
    lines, problems = check()
    assert problems == [] and find(lines, "captions.json") == "not in ~/data, for --use_caption"
    assert_one(check("--use_caption")[1], "captions.json", "--caption_file")


def test_missing_instructions(check):
    assert_one(check("--do_pretrain")[1], "all_data.json", "python -m tools.data_processing")


@pytest.mark.parametrize("name", ["tiny/consolidated.00.pth", "tiny/params.json", "tokenizer.model"])
def test_missing_base_file(check, world, name):
    (world.root / "weights" / name).unlink()
    assert_one(check()[1], f"missing ~/weights/{name}: put LLaMA's ", "--llama_model_path and --llm_model")


def test_base_file_that_is_cut_short(check, world):
    path = world.root / "weights" / "tiny" / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:-2000])
    assert_one(check()[1], "consolidated.00.pth cannot be read as weights", "fetch or copy it again")


def test_missing_vision_model(check, world, monkeypatch):
    assert_one(check("--vision_model", "./no/folder")[1], "--vision_model ./no/folder does not exist",
               "python -m tools.download clip")

    def not_cached(repository):
        raise OSError
    monkeypatch.setattr(doctor, "require_cached", not_cached)
    name = "vit_large_patch14_clip_quickgelu_224.openai"
    for network in (True, False):
        monkeypatch.setattr(doctor, "is_offline", lambda network=network: not network)
        lines, problems = check("--vision_model", name)
        assert find(lines, "vision model") == f"{name}, to be downloaded" and len(problems) == (not network)
    assert_one(problems, f"--vision_model {name}: no network, and it is not in the cache: fetch CLIP ViT-L/14 by ")
    monkeypatch.setattr(doctor, "require_cached", lambda repository: None)
    lines, problems = check("--vision_model", name)
    assert problems == [] and find(lines, "vision model") == f"{name}, in the cache"


def test_no_disk_space(check, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert_one(check()[1], "only 1.0 GiB are free in ~/runs/a", "take up to 2.0 GiB", "--keep_last", "--output_dir")
    assert check("--keep_last", "1")[1] == []


def test_output_folder_that_cannot_be_written(check, world, monkeypatch):
    (world.root / "runs").touch()
    assert_one(check()[1], "--output_dir ~/runs/a: ~/runs is no folder to write to")
    (world.root / "runs").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_one(check()[1], "--output_dir ~/runs/a: ~ is no folder to write to")


@pytest.mark.parametrize("bits, capability, works", [
    ("4bit", (5, 2), False), ("4bit", (6, 0), True), ("8bit", (7, 0), False), ("8bit", (7, 5), True),
    ("fp8", (8, 0), False), ("fp8", (8, 9), True)])
def test_bits_that_the_gpu_has_not(check, monkeypatch, bits, capability, works):
    on_gpu(monkeypatch, capability)
    monkeypatch.setitem(doctor.INSTALLED, "bitsandbytes", "0.50")
    lines, problems = check("--bits", bits)
    assert find(lines, f"--bits {bits}").startswith("possible" if works else "needs ")
    assert problems == [] if works else f"! --bits {bits} needs compute capability " in problems[0]
    assert check()[1] == []  # only what was asked for


def test_bits_without_bitsandbytes(check, monkeypatch):
    monkeypatch.delitem(doctor.INSTALLED, "bitsandbytes", raising=False)
    assert_one(check("--bits", "4bit")[1], "--bits 4bit needs", "pip install -r requirements/lite.txt")
    assert check("--bits", "fp8")[1] == []


@pytest.mark.parametrize("function, what", [("choose_device", "no kernels for Tesla V100: pip install -c"),
                                            ("choose_fast_paths", "--compile on does not work on this GPU: leave it")])
def test_what_train_py_refuses_is_told(check, monkeypatch, function, what):
    def refuse(*args):
        raise UserError(what)
    monkeypatch.setattr(doctor, function, refuse)
    lines, problems = check()
    assert problems == [f"! {what}"] and find(lines, "train split")  # the other sections follow


def test_wrong_flags(check):
    assert_one(check("--bits", "3bit")[1], "--bits", "3bit", "python train.py --help")
    assert_one(check("--no_such_flag")[1], "--no_such_flag")
    assert_one(check("--resume", "no run")[1], "--resume: no checkpoint no run")
    assert_one(check("--bits", "fp8", "--model_parallel_size", "2")[1], "--model_parallel_size 2 works with 16-bit")


def test_one_epoch_is_no_mistake(check):
    """train.py shortens the default warm-up, which is longer."""
    assert not [problem for problem in check("--epochs", "1")[1] if "warmup" in problem]


def test_a_bug_is_a_line_too(check, monkeypatch):
    monkeypatch.setattr(doctor, "choose_dtype", lambda *args: 1 / 0)
    assert_one(check()[1], "ZeroDivisionError('division by zero') (a bug: please report it)")


# --- Packages ---

def test_version_that_does_not_fit(check, monkeypatch):
    monkeypatch.setitem(doctor.INSTALLED, "torch", "2.5.1+cu118")
    lines, problems = check()
    assert_one(problems, "torch 2.5.1+cu118 is not >=2.6,<2.14, which requirements.txt asks for: ", "pip install -r")
    monkeypatch.setitem(doctor.INSTALLED, "torch", "2.13.0a0+nv26.1")  # of NVIDIA's containers
    assert check()[1] == []


def test_package_that_does_not_work(check, monkeypatch):
    monkeypatch.setattr(doctor, "import_error", OSError("libcudart.so.12: cannot open\nshared object"))
    assert_one(check()[1], "a package does not work (OSError('libcudart.so.12: cannot open", "rm -r .venv")


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("libtorch_cpu.so: cannot open shared object file")
sys.meta_path.insert(0, NoTorch())
from tools import doctor
sys.exit(doctor.main([]))
"""


def test_torch_that_cannot_be_imported():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True, timeout=60)
    problem = done.stdout.splitlines()[-1]
    assert done.returncode == 1 and done.stderr == ""
    assert problem.startswith("! a package does not work (ImportError('libtorch_cpu.so: cannot open")


@pytest.fixture
def project(tmp_path):
    """The project without .venv, and a Python without packages on PATH."""
    for name in ("scripts/check.sh", "scripts/help.sh", "tools/__init__.py", "tools/doctor.py", "requirements.txt",
                 "lavin/__init__.py", *(f"lavin/runtime/{name}.py" for name in ("__init__", "packages", "startup"))):
        (tmp_path / "a folder" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "a folder" / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path / "a folder"


def run_script(project, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    env = {"PATH": f"{project.parent}/bare/bin:/usr/bin:/bin", **environment}
    return subprocess.run(["bash", project / "scripts" / "check.sh", *flags], env=env, capture_output=True, text=True,
                          timeout=60)


def test_the_script_needs_no_venv_and_no_packages(project):
    done = run_script(project)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert find(lines, "Python").endswith(f"{project.parent}/bare/bin/python3") and find(lines, "torch") == "-"
    assert lines[-1].startswith("! missing: torch, fairscale, ") and INSTALL in lines[-1]


def test_the_script_takes_venv_where_there_is_one(project):
    shutil.copytree(project.parent / "bare", project / ".venv", symlinks=True)
    assert find(run_script(project).stdout.splitlines(), "Python").endswith(".venv/bin/python")


def test_the_script_refuses_an_old_python(project):
    old = project.parent / "bare" / "bin" / "old"
    old.write_text("#!/usr/bin/env bash\necho 'Python 3.10 or newer is needed' >&2\nexit 1\n")
    old.chmod(0o755)
    done = run_script(project, PYTHON=str(old))
    assert done.returncode == 1 and done.stdout == ""


def test_the_script_reads_the_variables_of_the_experiment_scripts(project):
    """Only those that are set and not empty; the flags behind them win."""
    stub = project.parent / "bare" / "bin" / "stub"
    stub.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    said = run_script(project, "--data_root", "mine", PYTHON=str(stub), DATA_ROOT="my data", WEIGHTS="w", MODEL="13B",
                      OUTPUT_ROOT="runs").stdout
    assert said.splitlines() == ["-m", "tools.doctor", "--data_root", "my data", "--llama_model_path", "w",
                                 "--llm_model", "13B", "--output_dir", "runs", "--data_root", "mine"]
    assert run_script(project, PYTHON=str(stub), MODEL="").stdout.splitlines() == ["-m", "tools.doctor"]


def test_flags_that_train_py_refuses_are_told(check):
    _, problems = check("--dropout_var", "2", "--dropout_lim", "0.05")
    assert problems == ["! --dropout_lim 0.05 must lie at or above --dropout_prob 0.1 where --dropout_var is 2.0"]
