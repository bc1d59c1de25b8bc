"""The start of programs, before their imports. A torch of one's own stands for all that they import."""

import os
import signal
import subprocess
import sys

import pytest

from forked import in_child
from lavin.runtime.errors import one_line_errors
from lavin.runtime.startup import INSTALL, prepare_imports
from tiny import ROOT

PROGRAMS = [path.relative_to(ROOT) for folder in ("*.py", "util/*.py", "tools/*.py", "benchmarks/*.py")
            for path in sorted(ROOT.glob(folder)) if '__name__ == "__main__"' in path.read_text()]
MEASURED_AS_TRAINING_AND_SCORING = [path for path in PROGRAMS if path.parts[0] == "benchmarks"
                                    and path.name != "chat_latency.py"]  # which is measured as demo.py is
COMMANDS = ["demo", "eval", "eval_mme", "plot_results", "search", "train"]
TORCH = """import os, signal
print(*(os.environ.get(name) for name in {shown}), flush=True)
signal.raise_signal({number})
os._exit(7)
"""


def start(program, folder, number: int, ignored: bool = False, shown: tuple = ("OMP_WAIT_POLICY",),
          **environment: str) -> subprocess.CompletedProcess:
    """The program, which gets a signal while it imports torch; there it ends with status 7, if it goes on.

    It prints the variables `shown` of its environment.
    """
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch" / "__init__.py").write_text(TORCH.format(number=number, shown=shown))
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    name = ".".join(program.with_suffix("").parts)
    return subprocess.run([sys.executable, "-m", name], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=60, preexec_fn=(lambda: signal.signal(number, signal.SIG_IGN)) if ignored else None)


def test_all_programs_are_known():
    assert {str(path) for path in PROGRAMS} >= {*(f"{name}.py" for name in COMMANDS), "util/launch.py",
                                               "tools/export_hf.py", "benchmarks/scaling.py"}


@pytest.mark.parametrize("program", [path for path in PROGRAMS if path.parts[0] != "benchmarks"
                                     and path.name != "launch.py"], ids=str)  # which speaks for torchrun
def test_a_program_ends_with_one_line_where_nobody_reads_its_output(program):
    """`| head` and a full disk are no bugs."""
    assert "one_line_errors(" in (ROOT / program).read_text().rpartition('if __name__ == "__main__":')[2]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_ctrl_c_during_the_imports_ends_a_program_in_silence(tmp_path, program, monkeypatch):
    """It ends by the signal itself, for a shell's script to see. Threads that wait are passive from the start."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    done = start(program, tmp_path, signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "passive\n", "")


@pytest.mark.parametrize("program", MEASURED_AS_TRAINING_AND_SCORING, ids=str)
def test_benchmarks_run_with_the_cuda_settings_of_training_and_scoring(tmp_path, program, monkeypatch):
    shown = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")
    for name in shown:
        monkeypatch.delenv(name, raising=False)
    for path in (program, *(path for path in PROGRAMS if path.name in ("train.py", "eval.py"))):
        assert start(path, tmp_path, signal.SIGINT, shown=shown).stdout == ":4096:8 expandable_segments:True\n", path


def test_other_signals_and_what_is_ignored_stay_as_they_are(tmp_path):
    train = PROGRAMS[[path.name for path in PROGRAMS].index("train.py")]
    assert start(train, tmp_path, signal.SIGTERM).returncode == -signal.SIGTERM
    assert start(train, tmp_path, signal.SIGINT, ignored=True).returncode == 7  # in a shell's background
    assert start(train, tmp_path, signal.SIGINT, OMP_WAIT_POLICY="active").stdout == "active\n"  # the user's own


@pytest.mark.parametrize("numbers, status", [((signal.SIGINT,), 75), ((signal.SIGTERM,), 3)], ids=["stops", "chat"])
def test_ctrl_c_is_handled_once_the_imports_are_done(numbers, status):
    """It stops a program with its line. A chat, which stops an answer at it, gets Python's exception."""
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare_imports()
        with one_line_errors(numbers):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                sys.exit(3)
    assert in_child(work)[:2] == (status, "")


@pytest.mark.parametrize("statement, said", [
    ("import no_such_package", f"a_program.py: error: the package no_such_package is missing: {INSTALL}\n"),
    ("import lavin.no_such_file", "Traceback "), ("1 / 0", "Traceback ")])
def test_a_missing_package_is_told_in_one_line_and_a_bug_keeps_its_traceback(tmp_path, statement, said):
    program = tmp_path / "a_program.py"
    program.write_text(f"from lavin.runtime.startup import prepare_imports\nprepare_imports()\n{statement}\n")
    done = subprocess.run([sys.executable, program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(said) and (done.stderr == said) == ("package" in statement)


def test_an_import_of_a_program_changes_nothing():
    """Another program, or a test, may import its parser."""
    before = signal.getsignal(signal.SIGINT), sys.excepthook
    import train  # noqa: F401
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == before
