"""Data for a search, and the processes of its commands, forked from this one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from forked import Child
from lavin.runtime import signals
from lavin.runtime.errors import one_line_errors
from util.search import processes
from util.search.processes import ROOT, SharedProcess, start_torchrun
from util.series import commands, serve


@pytest.fixture
def data(scienceqa_copy) -> Path:
    """ScienceQA with three questions to validate on."""
    path = scienceqa_copy / "pid_splits.json"
    splits = json.loads(path.read_text())
    path.write_text(json.dumps({**splits, "val": splits["train"][9:], "train": splits["train"][:9]}))
    return scienceqa_copy


@pytest.fixture
def servers(monkeypatch) -> Iterator[list[Child]]:
    """The processes that are begun to run commands (util/series/serve.py), in which the patches of a test hold. One
    more program, script.py, runs its first flag as Python."""
    begun = []

    def run_server(descriptor: int) -> None:
        for begin, end in ((3, descriptor), (descriptor + 1, 256)):  # as subprocess.Popen closes them
            os.closerange(begin, end)
        signals._deferred = False  # as it is here while a worker runs a command
        with one_line_errors():
            serve.main(str(descriptor), os.getcwd())

    def start_server(descriptor: int, log, environment) -> Child:
        begun.append(Child(lambda: run_server(descriptor), log.fileno(), log.fileno(), environment))
        return begun[-1]

    monkeypatch.setattr(processes, "start_server", start_server)
    monkeypatch.setitem(commands.PROGRAMS, "script.py", (
        lambda: SimpleNamespace(parse_args=list), lambda flags, shared: exec(flags[0], {"flags": flags})))
    yield begun
    for server in begun:
        if server.poll() is None:
            server.kill()
            server.wait()


@pytest.fixture
def shared_process(servers):
    """A function that starts commands in one process."""
    shared = SharedProcess(dict(os.environ))
    yield shared.start
    shared.close()


@pytest.fixture(params=["shared", "torchrun"])
def start(request, monkeypatch):
    """A function that starts commands, script.py among them, in one process, or in a process each where Python stands
    for torchrun."""
    if request.param == "shared":
        return request.getfixturevalue("shared_process")

    def start_python(words: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", *words[words.index(str(ROOT / "script.py")) + 1:]], **options)

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=start_python, DEVNULL=subprocess.DEVNULL))
    return partial(start_torchrun, 2, dict(os.environ))
