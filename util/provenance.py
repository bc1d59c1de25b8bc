"""Provenance: the code, the versions and the machine that a run is made with, as config.json holds them."""

import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavin.runtime.files import read_json, write_json
from lavin.runtime.packages import installed_versions
from util.runs import CONFIG

# the files that decide what a run does; other Python files, such as one's own scripts, may lie beside the commands
CODE = ("lavin/*.py", "util/*.py", "tools/*.py", "scripts/methods.json", "train.py", "eval.py", "eval_mme.py",
        "search.py", "demo.py", "plot_results.py")
DIRTY = "-dirty"  # behind the commit of code that was changed since


def git_commit() -> str | None:
    """Returns the commit of the project's code, or None where git does not tell, or tells that of another repository,
    which the project lies in.

    It ends with DIRTY, as `git describe` says it, where a file of `CODE` differs from that commit or is not in it.
    Flags in scripts do not count, since a run records them.
    """
    project = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "--no-optional-locks", *words], cwd=project, capture_output=True, text=True,
                              check=True).stdout
    try:
        repository, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(repository).resolve() != project:
            return None
        return commit + DIRTY * bool(git("status", "--porcelain", "--untracked-files=all", "--", *CODE))
    except (OSError, ValueError, subprocess.CalledProcessError):  # no git, or no repository or commit
        return None


def short_commit(commit: str) -> str:
    """Returns a commit as pages name it: 12 digits, and what `git_commit` adds to them."""
    digits, *dirty = commit.split("-")
    return "-".join([digits[:12], *dirty])


COMMIT = git_commit()  # when this process read its code: a process of many runs may see the files change


def commits_of(config: Mapping[str, Any], scores: Mapping[str, Any] | None = None) -> list[str]:
    """The commits of the code that a run was begun, resumed and scored with, by its config.json and its scores."""
    found = (part.get("git_commit") for part in (config, *config.get("resumed", []), scores or {}))
    return list(dict.fromkeys(commit for commit in found if commit))


def environment(device: torch.device, world: int) -> dict:
    """Returns the machine and the versions that a run is executed with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), **installed_versions(),
                "torch": torch.__version__}  # which names its CUDA version, too
    return {"versions": versions, "git_commit": COMMIT, "device": f"{device.type}: {name}", "world_size": world,
            "threads": torch.get_num_threads(), "host": socket.gethostname()}


def write_config(folder: Path, flags: dict, device: torch.device, world: int, n_layers: int,
                 resumed_at: dict | None, hub_commits: dict[str, str]) -> None:
    """Writes config.json at a run's start, and adds to it where and with what a run is resumed: with which flags, too,
    as far as they differ from those that it began with.

    `n_layers` is the number of LLaMA's layers, needed to recompute the dropout schedule. `resumed_at` is the epoch and
    the step that a run goes on with. `hub_commits` are the commits of models that the flags name as on the hub.
    """
    path, now = folder / CONFIG, environment(device, world)
    if hub_commits:
        now["hub_commits"] = hub_commits
    if resumed_at and path.is_file():
        config = read_json(path)
        changed = {name: value for name, value in flags.items() if config.get("flags", {}).get(name) != value}
        write_json(path, {**config, "resumed": [*config.get("resumed", []), {**resumed_at, "flags": changed, **now}]})
    else:
        write_json(path, {"flags": flags, **now, "n_layers": n_layers})
