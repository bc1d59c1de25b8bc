"""Every script has a --help that is true, and that does nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tiny import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("scripts/*.sh"))
JOBS = sorted(path.name for path in ROOT.glob("slurm/*.sbatch"))
DEFAULT = re.compile(r"^(?:export )?([A-Z_]+)=\$\{\1:-([^}]*)\}$", re.M)  # a variable that a script reads


@pytest.fixture
def folder(tmp_path):
    """A folder of the scripts and jobs alone, and in bin the one command that they may call."""
    for name in ("scripts", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / "a folder" / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(shutil.which("dirname"))
    return tmp_path / "a folder"


def help_of(folder: Path, script: str | Path, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """Returns the text that a script prints, in an environment that has nothing else."""
    done = subprocess.run([shutil.which("bash"), script, *arguments], cwd=cwd or folder, capture_output=True, text=True,
                          env={"PATH": str(folder.parent / "bin"), **environment}, stdin=subprocess.DEVNULL, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_printed_and_nothing_else_happens(folder, name):
    before, folders = files(folder), sorted(folder.rglob("*"))
    text = help_of(folder, f"scripts/{name}", "--help")
    assert max(map(len, text.splitlines())) <= 80 and "#" not in text
    assert text.endswith("\n\nRelative paths begin at the project's folder, wherever a script is started.\n")
    for arguments in (["-h"], ["--epochs", "5", "--help"], ["--", "-h", "x"]):
        assert help_of(folder, f"scripts/{name}", *arguments) == text
    assert help_of(folder, name, "-h", cwd=folder / "scripts") == text
    assert files(folder) == before and sorted(folder.rglob("*")) == folders


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_how_the_script_is_used(folder, name):
    text = help_of(folder, f"scripts/{name}", "--help")
    example = re.search(r"^Examples?:\n((?:  .*\n?)+)", text, re.M)
    if name in ("gpus.sh", "help.sh", "signals.sh", "smollm2.sh", "toy.sh"):
        assert "ourced" in text and not example
    else:
        name = "finetuning_" if name.startswith("finetuning") or name == "common.sh" else name
        assert f"bash scripts/{name}" in example[1]


@pytest.mark.parametrize("name", JOBS)
def test_the_help_of_a_job(folder, name):
    """It is asked for before a job is submitted. In a job, Slurm runs a copy of the file, which lies elsewhere."""
    before, folders = files(folder), sorted(folder.rglob("*"))
    text = help_of(folder, f"slurm/{name}", "--help")
    assert "SBATCH" not in text and "Submit it from the project's folder." in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80 and re.search(rf"^Examples?:\n  sbatch slurm/{name} ", text, re.M)
    spool = folder.parent / "spool" / "job00042"
    spool.mkdir(parents=True)
    shutil.copy(folder / "slurm" / name, spool / "slurm_script")
    assert text == help_of(folder, name, "-h", cwd=folder / "slurm") == help_of(
        folder, spool / "slurm_script", "-h", SLURM_SUBMIT_DIR=str(folder))
    assert files(folder) == before and sorted(folder.rglob("*")) == folders


@pytest.mark.parametrize("name", [name for name in JOBS if name != "search.sbatch"])
def test_the_help_behind_a_job_s_script_is_that_of_the_script(folder, name):
    (folder.parent / "bin" / "bash").symlink_to(shutil.which("bash"))
    text = help_of(folder, "scripts/finetuning_sqa_7b.sh", "--help")
    spool = folder.parent / "slurm_script"
    shutil.copy(folder / "slurm" / name, spool)
    assert text == help_of(folder, spool, "scripts/finetuning_sqa_7b.sh", "--help", SLURM_SUBMIT_DIR=str(folder),
                           SLURM_JOB_ID="42")


def test_the_file_that_jobs_source_says_so(folder):
    assert "ource this file" in help_of(folder, "slurm/run.sh")


@pytest.mark.parametrize("name", ["common.sh", "gpus.sh", "help.sh", "signals.sh", "smollm2.sh", "toy.sh"])
def test_a_file_that_is_only_sourced_says_so(folder, name):
    assert help_of(folder, f"scripts/{name}") == help_of(folder, f"scripts/{name}", "--help")


def test_a_copied_script_has_help_of_its_own(folder):
    copy = (folder / "scripts" / "finetuning_sqa_7b.sh").read_text().replace("Base:", "Mine:")
    (folder / "scripts" / "finetuning_sqa_7b_mine.sh").write_text(copy)
    assert help_of(folder, "scripts/finetuning_sqa_7b_mine.sh", "-h").startswith("Mine: ")


def stated(text: str) -> dict[str, str]:
    """The defaults of variables that a help states."""
    return dict(re.findall(r"^  ([A-Z_]+)=([^\s\"]+)(?:  |$)", text, re.M))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_states_the_defaults_of_the_variables(folder, name):
    code, text = (ROOT / "scripts" / name).read_text(), help_of(folder, f"scripts/{name}", "--help")
    for variable, default in DEFAULT.findall(code):
        if name == "demo.sh" or "13b" in name:  # by the runs that there are; of the other file, in words
            assert f"  {variable}=" in text
        elif default.startswith("$(") or default == "$KNOWN":  # in words
            assert f"  {variable} " in text
        elif " " in default:
            assert f"{variable} by default: {default}" in " ".join(text.split())
        else:
            expanded = re.sub(r"\$([A-Z_]+)", lambda name: stated(text)[name[1]], default)
            assert stated(text)[variable] in (expanded, default.replace("$", ""))


def test_the_table_of_docs_has_the_defaults_that_the_help_states(folder):
    known = stated("".join(help_of(folder, f"scripts/{name}", "-h") for name in ("common.sh", "run_all_variants.sh")))
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \|", (ROOT / "docs" / "cluster.md").read_text(), re.M)
    table = {}
    for names, defaults in rows:
        names = re.findall(r"`([A-Z_]+)`", names)
        table |= dict(zip(names, defaults.replace("`", "").split(", ") if len(names) > 1 else [defaults], strict=True))
    assert {name: re.match(r"[^ ;]+", table[name].strip("`"))[0].strip("`") for name in known} == known
