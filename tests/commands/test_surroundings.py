"""The commands in surroundings that they did not choose, each as its own process, and with the published flags."""

import io
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from test_scripts import Sandbox

import eval_mme
from forked import Ended, in_child
from lavin.runtime.errors import UsageError
from tiny import ROOT
from tiny_runs import write_run
from util import provenance

NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
HOMELESS = {"HOME": "/dev/null", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
FOREIGN = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}  # git's own switch: the repository is somebody else's


def python(*arguments: str, stdin: str = "", code: int = 0, prefix: tuple = (), **environment: str) -> tuple[str, str]:
    """Standard output and error of a Python process."""
    done = subprocess.run([*prefix, sys.executable, *arguments], cwd=ROOT, input=stdin.encode(), capture_output=True,
                          timeout=120, env={**os.environ, **environment})
    out, errors = done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    assert done.returncode == code, errors
    assert "Traceback" not in errors
    return out, errors


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "étang 水"
    write_run(folder, base, 1)
    return folder


CHAT_FLAGS = ("--cli", "--device", "cpu", "--max_new_tokens", "3")


def chat(run: Path, *lines: str, prefix: tuple = (), **environment: str) -> str:
    out, _ = python("demo.py", *CHAT_FLAGS, "--runs", str(run),
                    stdin="".join(f"{line}\n" for line in lines), prefix=prefix, **environment)
    return out


# --- The terminal ---

@pytest.mark.parametrize("encoding, name", [("ascii", "?tang ?"), ("latin-1", "étang ?")])
def test_output_in_any_encoding_is_replaced_where_it_must_be(run, encoding, name):
    out = chat(run, "Why?", "/options été | 水", "Which?", PYTHONIOENCODING=encoding, **HOMELESS)
    assert f"{name} answers." in out and len(re.findall(rf"{re.escape(name)}[^\n]*> ", out)) == 4


@pytest.mark.parametrize("environment", [
    {**NOTEBOOK, **HOMELESS, "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["notebook", "C locale"])
def test_results_are_plotted(tmp_path, environment):
    folder = tmp_path / "été 水"
    out, errors = python("plot_results.py", "--out", str(folder), **environment)
    assert len(list(folder.glob("*.png"))) >= 5 and "published_table.md" in out
    assert "error" not in errors.lower()


def test_a_name_that_is_no_text_is_printed(tmp_path):
    """A file name in latin-1, on a terminal in UTF-8."""
    code = r"import os; from lavin.runtime import console; console.setup(); print(os.fsdecode(b'runs/\xe9t\xe9'))"
    out, _ = python("-c", code, PYTHONIOENCODING="utf-8")
    assert out == "runs/?t?\n"


def test_closed_output_loses_what_is_said_and_no_more(tmp_path):
    python("-m", "tools.make_mini_scienceqa", "--out", str(tmp_path / "data"),
           prefix=("bash", "-c", 'exec "$@" >&- 2>&-', "bash"))
    assert (tmp_path / "data" / "problems.json").exists()


def in_optimized_child(script: str, *flags: str, stdin: str = "") -> Ended:
    """Runs a script as with PYTHONOPTIMIZE=2: without the docstrings and assertions of this project."""
    def work() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in ("lavin", "util", "tools")]:
            del sys.modules[name]
        SourceFileLoader.get_code = lambda loader, _: compile(loader.get_data(loader.path), loader.path, "exec",
                                                              dont_inherit=True, optimize=2)
        sys.argv, sys.stdin = [script, *flags], io.StringIO(stdin)
        code = compile((ROOT / script).read_bytes(), script, "exec", dont_inherit=True, optimize=2)
        exec(code, {"__name__": "__main__", "__file__": str(ROOT / script), "__doc__": None})
    return in_child(work)


def test_the_chat_without_docstrings_and_assertions(run):
    ended = in_optimized_child("demo.py", *CHAT_FLAGS, "--runs", str(run), stdin="Why?\n")
    assert ended.status == 0 and "answers." in ended.out, ended.errors


@pytest.mark.parametrize("script", ["train.py", "eval.py", "eval_mme.py", "search.py", "demo.py", "plot_results.py",
                                    "tools/export_hf.py", "tools/make_toy_base.py"])
def test_help_without_docstrings(script):
    ended = in_optimized_child(script, "--help")
    assert ended.status == 0 and ended.out.startswith("usage: "), ended.errors


def test_a_path_of_two_lines_is_told_in_one():
    _, errors = python("train.py", "--data_root", "/a\nb", "--llama_model_path", "/c\nd", code=1)
    assert errors.count("\n") == 1 and "/c d" in errors


def test_a_folder_whose_name_is_no_text(base, tmp_path):
    folder = os.fsencode(tmp_path) + b"/mod\xe8le"
    shutil.copytree(os.fsencode(base.weights), folder)
    code = "import sys; from lavin.tokenizer import Tokenizer; print(Tokenizer(sys.argv[1]).n_words)"
    done = subprocess.run([sys.executable, "-c", code, folder + b"/tokenizer.model"], cwd=ROOT, capture_output=True)
    assert done.stdout == b"480\n", done.stderr


UNUSABLE = {"OMP_NUM_THREADS": "abc", "TMPDIR": "/nonexistent", "COLUMNS": "0", "TERM": "dumb", "HF_HOME": "/dev/null",
            "MPLCONFIGDIR": "/dev/null/x", "CUDA_VISIBLE_DEVICES": "abc", "GIT_DIR": "/nonexistent", "LC_ALL": "xx_YY"}


def test_variables_that_make_no_sense(run):
    assert "answers." in chat(run, "Why?", prefix=("bash", "-c", 'umask 077; exec "$@"', "bash"), **UNUSABLE)


def test_packages_of_the_same_names_elsewhere(run, tmp_path):
    for name in ("util", "lavin"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    assert "answers." in chat(run, "Why?", PYTHONPATH=str(tmp_path))


# --- The machine ---

def test_the_chat_needs_no_network(run):
    offline = ("unshare", "--map-root-user", "--net")
    if not shutil.which("unshare") or subprocess.run([*offline, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces")
    assert "answers." in chat(run, "Why?", prefix=offline, **HOMELESS)


COMMIT = ("-c", "from util.provenance import git_commit; print(git_commit())")


def test_the_commit_is_known_where_git_tells_it():
    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?\n", python(*COMMIT)[0])


@pytest.mark.parametrize("environment", [{"PATH": "/nonexistent"}, FOREIGN], ids=["no git", "somebody else's"])
def test_without_the_commit_it_is_null(environment):
    assert python(*COMMIT, **environment) == ("None\n", "")


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True,
                          capture_output=True, text=True).stdout.strip()


RECORDED = """import torch
import util.series.serve
from util.provenance import environment
print("began", flush=True)
input()
print(environment(torch.device("cpu"), 1)["git_commit"])
"""


def test_a_run_is_of_the_commit_that_its_process_began_with(tmp_path):
    """The process of a search's worker makes runs for days, and the project may get new files meanwhile."""
    if not shutil.which("git"):
        pytest.skip("no git")
    for name in ("lavin", "util"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")

    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "old")
    process = subprocess.Popen([sys.executable, "-c", RECORDED], cwd=tmp_path, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "began\n"
    old = git(tmp_path, "rev-parse", "HEAD")
    git(tmp_path, "commit", "--allow-empty", "-m", "new")
    assert process.communicate("\n", timeout=120)[0].strip() == old != git(tmp_path, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A repository of a few files, with `git_commit` in it."""
    if not shutil.which("git"):
        pytest.skip("no git")
    for name in ("util/provenance.py", "scripts/methods.json", "scripts/train.sh", "train.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "old")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "util" / "provenance.py"))
    return tmp_path


@pytest.mark.parametrize("name, is_code", [
    ("util/provenance.py", True), ("train.py", True), ("scripts/methods.json", True), ("util/new/new.py", True),
    ("scripts/train.sh", False), ("analysis.py", False), ("runs/a/copy.py", False), ("util/notes.txt", False)])
def test_changed_code_is_told_and_changed_flags_are_not(repository, name, is_code):
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.git_commit() == commit
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("new")
    assert provenance.git_commit() == commit + "-dirty" * is_code


def test_a_removed_file_is_told(repository):
    (repository / "train.py").unlink()
    assert provenance.git_commit() == git(repository, "rev-parse", "HEAD") + "-dirty"


def test_the_commit_of_a_repository_around_the_project_is_not_the_projects(repository, monkeypatch):
    inner = repository / "lavin" / "util" / "provenance.py"
    inner.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(inner))
    assert provenance.git_commit() is None


# --- A half-made .venv ---

@pytest.fixture
def project(tmp_path) -> Path:
    """A project whose environment needs no packages."""
    (tmp_path / "a folder" / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "a folder" / "scripts")
    (tmp_path / "a folder" / "requirements.txt").touch()
    shutil.copytree(ROOT / "requirements", tmp_path / "a folder" / "requirements")
    return tmp_path / "a folder"


def make_venv(project: Path, *flags: str) -> Path:
    subprocess.run([sys.executable, "-m", "venv", *flags, project / ".venv"], check=True)
    return project / ".venv"


def install(project: Path) -> subprocess.CompletedProcess:
    script = "set -euo pipefail; source scripts/environment.sh requirements.txt; python -c 'import pip'; type -p python"
    return subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "TORCH_CONSTRAINTS": ""})


def assert_installed(done: subprocess.CompletedProcess, project: Path) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{project}/.venv/bin/python"


def test_a_venv_that_was_interrupted_before_pip_is_finished(project):
    make_venv(project, "--without-pip")
    done = install(project)
    assert_installed(done, project)
    assert "finishing .venv, which was interrupted" in done.stdout
    assert install(project).stdout == f"{project}/.venv/bin/python\n"  # and stays as it is

    (project / "requirements.txt").write_text("no-such-package-of-lavin\n")
    done = install(project)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pip could not install requirements.txt (above: why)")
    (project / "requirements.txt").write_text("")
    assert_installed(install(project), project)


@pytest.mark.parametrize("damage", ["dangling python", "no pyvenv.cfg"])
def test_a_venv_that_cannot_run_is_made_again(project, damage):
    venv = make_venv(project, "--without-pip")
    if damage == "no pyvenv.cfg":
        (venv / "pyvenv.cfg").unlink()
    else:
        for python in (venv / "bin").glob("python*"):
            python.unlink()
            python.symlink_to("/nonexistent/python")
    done = install(project)
    assert_installed(done, project)
    assert "making .venv" in done.stdout


def test_half_a_pip_is_told_in_one_line(project):
    packages = next(make_venv(project, "--without-pip").glob("lib/*/site-packages"))
    (packages / "pip-99.dist-info").mkdir()  # so ensurepip finds a pip
    (packages / "pip-99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pip\nVersion: 99\n")
    done = install(project)
    assert done.returncode == 1
    assert done.stderr == ".venv is half made: remove it (rm -r .venv), and start again\n"


# --- Published flags ---

PUBLISHED_MME = """--ckpt_dir ../data/weights/ --llm_model 7B --tokenizer_path ../data/weights/tokenizer.model
    --data_root ../data --caption_file ../data/captions.json --adapter_path ./15-eph-pretrain.pth --adapter_type attn
    --adapter_dim 8 --adapter_scale 1 --prompt_format QCM-ALE --max_batch_size 16 --max_seq_len 512 --split test
    --n_prompt 6 --temperature 5. --visual_adapter_type router"""


def test_flags_of_the_published_mme_script_are_accepted():
    more = "--root_dir_ ../data/mme --options A B C --generation_temperature 0.1 --top_p 0.75 --hidden_proj 128"
    args = eval_mme.get_args_parser().parse_args([*PUBLISHED_MME.split(), *more.split(), "--use_vicuna"])
    assert (args.adapter_path, args.mme_root, args.temperature) == ("./15-eph-pretrain.pth", "../data/mme", 5)


def test_flags_that_mean_nothing_to_mme_are_refused():
    for words in (["--questions", "2"], ["--decode", "score"]):
        with pytest.raises(UsageError, match=words[0]):
            eval_mme.get_args_parser().parse_args(words)


def test_scripts_take_a_checkpoint_by_its_flag(tmp_path):
    sandbox = Sandbox(tmp_path)
    score, = sandbox.run("scripts/eval_mme_benchmark.sh", *PUBLISHED_MME.split(), GPUS="1")
    assert score.startswith("python eval_mme.py --mme_root ../data/mme ") and score.count("--adapter_path") == 1
    sandbox.install()
    for flag in (["--adapter_path", "a.pth"], ["--adapter_path=a.pth"], ["--cli", "--runs", "b"]):
        assert sandbox.run("scripts/demo.sh", *flag)[-1].endswith(" ".join(flag))  # without runs of the quickstart
