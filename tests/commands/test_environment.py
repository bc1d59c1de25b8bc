"""scripts/environment.sh chooses a PyTorch that the GPUs and their driver can run. nvidia-smi is a stub on PATH."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tiny import ROOT

V100, CUDA12, CUDA11 = (f"requirements/constraints/{name}.txt" for name in ("v100", "cuda12", "cuda11"))
CHOICES = [  # what nvidia-smi says -> the constraints
    ("7.0, 535.54.03", V100), ("6.0, 580.65.06", V100), ("5.0, 525.60.13", V100),
    ("7.0, 470.82.01", CUDA11), ("8.0, 450.36.06", CUDA11), ("9.0, 524.99", CUDA11),
    ("7.5, 525.60.13", CUDA12), ("9.0, 535.54.03", CUDA12), ("10.0, 579.99", CUDA12),
    ("7.5, 580.65.06", None), ("9.0, 580.65.06", None), ("10.0, 610.1", None), ("12.0, 590.44", None),
    ("9.0, 535.54.03\n7.0, 535.54.03\n8.0, 535.54.03", V100),  # the oldest GPU decides
    ("12.0, 580.65.06\n7.0, 580.65.06", V100),  # by number: 12.0 is newer than 7.0
    ("No devices were found", None), ("[N/A], 535.54.03", None), ("", None)]
BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
STUB = '#!/usr/bin/env bash\necho "$*" >> "$CALLS"\n'  # .venv's python: can do everything, and pip installs nothing


class Project:
    """A copy of the script and the requirements. python: what .venv/bin/python is; a stub that logs, if left out."""

    def __init__(self, folder: Path, python: str = STUB):
        self.folder, self.calls, self.bin = folder, folder / "calls", folder / "bin"
        for name in ("scripts", ".venv/bin", "bin"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("environment.sh", "help.sh"):
            shutil.copy(ROOT / "scripts" / name, folder / "scripts")
        shutil.copy(ROOT / "requirements.txt", folder)
        shutil.copytree(ROOT / "requirements", folder / "requirements", dirs_exist_ok=True)
        if python:
            self.stub(folder / ".venv" / "bin" / "python", python)

    @staticmethod
    def stub(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def gpus(self, answer: str, status: int = 0) -> None:
        """Sets the answer of nvidia-smi to --query-gpu=compute_cap,driver_version, and its exit status."""
        self.stub(self.bin / "nvidia-smi", f"#!/usr/bin/env bash\ncat <<'END'\n{answer}\nEND\nexit {status}\n")

    def install(self, code: int = 0, requirements: str = "requirements.txt", **environment: str) -> list[str]:
        """Sources the script as the others do; returns the calls of pip."""
        self.calls.write_text("")
        script = f"set -euo pipefail; source scripts/environment.sh {requirements}; type -p python"
        path = {"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.calls)}
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, capture_output=True, text=True, timeout=60,
                              env={"HOME": os.environ.get("HOME", "/"), **path, **environment})
        self.output, self.errors = done.stdout, done.stderr
        assert done.returncode == code, done.stderr
        assert code or done.stdout.splitlines()[-1] == f"{self.folder}/.venv/bin/python"
        return [call for call in self.calls.read_text().splitlines() if "pip install" in call]


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "a folder")


@pytest.mark.parametrize("answer, constraints", CHOICES, ids=[answer.replace("\n", "; ") for answer, _ in CHOICES])
def test_the_oldest_gpu_and_the_driver_choose(project, answer, constraints):
    project.gpus(answer)
    call, = project.install()
    assert call.endswith("-r requirements.txt" + (f" -c {constraints}" if constraints else ""))
    assert ("PyTorch by" in project.output) == bool(constraints) and project.errors == ""


def test_the_choice_is_told_in_one_line(project):
    project.gpus("9.0, 535.54.03\n7.0, 535.54.03")
    project.install()
    assert project.output.startswith(f"GPU of compute capability 7.0, driver 535: PyTorch by {V100}\n")


@pytest.mark.parametrize("answer, status", [(BROKEN, 9), ("No devices were found", 6)])
def test_nvidia_smi_that_fails_counts_as_none(project, answer, status):
    project.gpus(answer, status)
    assert project.install()[0].endswith("-r requirements.txt") and project.errors == ""


def test_no_nvidia_smi_counts_as_no_gpu(project):
    assert project.install()[0].endswith("-r requirements.txt") and project.errors == ""


@pytest.mark.parametrize("driver, constraints", [("470.82.01", CUDA11), ("390.157", None)])
def test_drivers_that_do_not_know_compute_cap(project, driver, constraints):
    project.stub(project.bin / "nvidia-smi", f"""#!/usr/bin/env bash
case "$*" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;; esac
echo {driver}; echo {driver}
""")
    calls = project.install(code=0 if constraints else 1)
    assert [call.rpartition(" ")[2] for call in calls] == ([constraints] if constraints else [])


@pytest.mark.parametrize("answer", ["3.7, 470.82.01", "7.0, 440.33.01"])
def test_too_old_a_gpu_or_driver_is_told_in_one_line(project, answer):
    project.gpus(answer)
    assert project.install(code=1) == []
    capability, driver = answer.split(", ")
    assert project.errors == (f"GPU of compute capability {capability}, driver {driver[:3]}: PyTorch needs 5.0 and "
                              "driver 450 or newer; for runs on the CPU, set TORCH_CONSTRAINTS= (empty)\n")
    assert len(project.install(TORCH_CONSTRAINTS="")) == 1


def test_the_choice_by_hand_wins(project):
    project.gpus("9.0, 535.54.03")
    assert project.install(TORCH_CONSTRAINTS=V100)[0].endswith(f" -c {V100}")
    assert f"named by TORCH_CONSTRAINTS: PyTorch by {V100}\n" in project.output
    (project.folder / ".venv" / "requirements.txt.installed").unlink()
    assert project.install(TORCH_CONSTRAINTS="")[0].endswith("-r requirements.txt")
    assert project.install(code=1, TORCH_CONSTRAINTS="requirements/v10.txt") == []
    assert project.errors == (f"TORCH_CONSTRAINTS=requirements/v10.txt is no file: take {V100}, or cuda12.txt or "
                              "cuda11.txt of that folder\n")


@pytest.mark.parametrize("new", [V100, CUDA12, CUDA11])
def test_a_name_of_an_earlier_version_is_answered_with_the_new_one(project, new):
    old = f"requirements-{Path(new).name}"
    assert project.install(code=1, TORCH_CONSTRAINTS=old) == []
    assert project.errors == f"TORCH_CONSTRAINTS={old} is no file: it is now {new}\n"


def test_nothing_is_installed_again_where_nothing_changed(project):
    project.gpus("7.0, 535.54.03")
    assert len(project.install()) == 1
    assert project.install() == [] and project.output == f"{project.folder}/.venv/bin/python\n"
    assert len(project.install(requirements="requirements/demo.txt")) == 1  # has a stamp of its own
    with open(project.folder / "requirements.txt", "a") as file:
        file.write("another\n")
    assert len(project.install()) == 1


def test_a_venv_of_a_login_node_is_corrected_on_the_gpu_node(project):
    project.install()
    project.gpus("7.0, 535.54.03")
    assert project.install()[0].endswith(f" -c {V100}")
    (project.bin / "nvidia-smi").unlink()
    assert project.install() == []  # on the login node again, it will do
    project.gpus("7.0, 470.82.01")
    assert project.install()[0].endswith(f" -c {CUDA11}")


def test_a_failed_installation_is_tried_again_and_names_the_way_out(project):
    project.gpus("7.0, 535.54.03")
    project.stub(project.folder / ".venv" / "bin" / "python", f'{STUB}[ "$2" != pip ]\n')
    assert len(project.install(code=1)) == len(project.install(code=1)) == 1
    assert project.errors.endswith(f"no network here? Start it where there is one, with TORCH_CONSTRAINTS={V100}\n")


def test_the_script_by_itself_works_from_any_folder_and_stops_at_an_old_python(project, tmp_path):
    def start(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", project.folder / "scripts" / "environment.sh"], cwd=tmp_path, timeout=60,
                              env={"PATH": "/usr/bin:/bin", "CALLS": str(project.calls), **environment},
                              capture_output=True, text=True)
    assert start().returncode == 0 and project.calls.read_text().endswith("-r requirements.txt\n")
    assert (project.folder / ".venv" / "requirements.txt.installed").is_file()
    shutil.rmtree(project.folder / ".venv")
    project.stub(project.bin / "old", "#!/usr/bin/env bash\necho 'Python 3.10 or newer is needed' >&2\nexit 1\n")
    done = start(PYTHON=str(project.bin / "old"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "Python 3.10 or newer is needed\n")


# --- With pip itself ---

def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_pip_follows_the_constraints(tmp_path):
    """torch alone is replaced, with the torchvision that belongs to it. The folder cu118 stands for PyTorch's index."""
    project = Project(tmp_path, python="")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
    (tmp_path / "requirements.txt").write_text("torch>=2.6,<2.14\ntorchvision\nother\n")
    cuda11 = (tmp_path / CUDA11).read_text()
    assert "\n--extra-index-url https://download.pytorch.org/whl/cu118\n" in cuda11
    (tmp_path / CUDA11).write_text(re.sub("--extra-index-url .*", "--find-links cu118", cuda11))
    (tmp_path / "cu118").mkdir()
    versions = {"2.13.0": "0.28.0", "2.10.0": "0.25.0", "2.7.1": "0.22.1", "2.7.1+cu118": "0.22.1+cu118"}
    for torch, vision in versions.items():
        folder = tmp_path / ("cu118" if "+" in torch else "")
        write_wheel(folder, "torch", torch)
        write_wheel(folder, "torchvision", vision, f"Requires-Dist: torch (=={torch})\n")
    write_wheel(tmp_path, "other", "1.0")

    def installed(gpus: str) -> list[str]:
        project.gpus(gpus)
        project.install(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path), PIP_CONFIG_FILE="/dev/null")
        write_wheel(tmp_path, "other", "2.0")  # newer, and not needed
        return sorted(path.name.removesuffix(".dist-info") for path in tmp_path.glob(".venv/lib/*/site-packages/*-info")
                      if path.name[:3] in ("tor", "oth"))

    for gpus, torch in (("", "2.13.0"), ("8.0, 535.54", "2.10.0"), ("7.0, 535.54", "2.7.1"),
                        ("7.0, 470.82", "2.7.1+cu118"), ("7.0, 535.54", "2.7.1+cu118"), ("", "2.7.1+cu118")):
        assert installed(gpus) == ["other-1.0", f"torch-{torch}", f"torchvision-{versions[torch]}"]
