"""The process that runs a worker's commands: each is what it is alone, and none is in the way of another."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna")
import eval as evaluation
import search
import train
from forked import Child
from killed import contents
from lavin.runtime import signals
from lavin.runtime.errors import UserError
from tiny_runs import run_flags
from util import shared_base
from util.search import runner
from util.search.errors import CommandFailed, WorkerError
from util.search.folder import RECORD, read_records
from util.search.locks import claim, waiting_for
from util.search.processes import SharedProcess, starting
from util.search.runner import HoursSpent, run_command
from util.series import serve
from util.training.throughput import restart_peak_memory
from util.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
TIMES = {"seconds", "samples_per_s", "tokens_per_s", "peak_memory_gib"}


def run(start, folder: Path, script: str, seconds: float = 60.0) -> str:
    """Runs the script as a command of a trial in the folder; returns what its log holds."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = claim(folder / "lock")
    assert lock is not None
    try:
        run_command(start, ["script.py", script], folder / "log", lock, seconds)
    finally:
        os.close(lock)
    return (folder / "log").read_text()


def pid_of(start, folder: Path) -> str:
    return run(start, folder, "import os; print(os.getpid())").split()[-1]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


# --- A whole search ---

@pytest.fixture
def run_search(base, data, tmp_path, monkeypatch):
    """A function that runs search.py in a folder of this name, with three trials, the second one on another schedule
    than the first; returns the study."""
    space = {"parameters": {"lr": {"kind": "float", "low": 1e-3, "high": 3e-2, "log": True, "default": 1e-2},
                            "lr_schedule": {"kind": "categorical", "choices": ["cosine", "step"], "default": "cosine"}},
             "enqueue": [{}, {"lr_schedule": "step"}, {"lr": 2e-2}]}
    (tmp_path / "space.json").write_text(json.dumps(space))

    def run_in(name: str, *own: str) -> Path:
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path / name)
            search.main(search.get_args_parser().parse_args([
                "--study", "S", "--space", "../space.json", "--trials", "3", "--pruner", "none", "--confirm", "0", *own,
                "--", *base.flags, "--data_root", str(data), "--device", "cpu", "--batch_size", "4", "--epochs", "2",
                "--warmup_epochs", "0.5", "--max_seq_len", "160"]))
        return tmp_path / name / "S"
    return run_in


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A function that returns the processes that have read a base from its files, once for each time."""
    path, load_base = tmp_path / "loaded", shared_base.load_base
    path.touch()

    def load(*args):
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        return load_base(*args)

    monkeypatch.setattr(shared_base, "load_base", load)
    return lambda: list(map(int, path.read_text().split()))


def run_alone(start, words: list[str], log: Path, lock: int, seconds: float) -> None:
    """Stands for `run_command`: it makes each command alone, with a base of its own."""
    module = {"train.py": train, "eval.py": evaluation}[words[0]]
    restart_peak_memory()
    module.main(module.get_args_parser().parse_args(words[1:]))


def without_times(folder: Path) -> dict[Path, object]:
    """The content of a study's runs, by file: without times, memory, and what the commands said."""
    found: dict[Path, object] = {}
    for path, content in contents(folder).items():
        if path.name in ("log.txt", "metrics.jsonl", RECORD):
            found[path] = [{name: value for name, value in json.loads(line).items() if name not in TIMES}
                           for line in (content.splitlines() if path.name != RECORD else [content])]
        elif path.name != "search.log":
            found[path] = content
    return found


def test_a_search_in_one_process_reads_its_base_once_and_finds_what_it_finds_alone(run_search, servers, loaded,
                                                                                   monkeypatch):
    """Each of its two trials is trained and scored twice."""
    own = ("--trials", "2", "--pruner", "median")
    together = run_search("together", *own)
    assert loaded() == [server.pid for server in servers] and len(servers) == 1
    monkeypatch.setattr(runner, "run_command", run_alone)
    alone = run_search("alone", *own)
    assert len(loaded()) == 1 + 8
    found, expected = without_times(together / "trials"), without_times(alone / "trials")
    assert found.keys() == expected.keys() >= {Path(trial) / name for trial in ("000", "001") for name in (
        "checkpoint-1.pth", "metrics.jsonl", RECORD, "rungs/1/generations.jsonl", "rungs/2/scores.json")}
    assert [path for path in found if found[path] != expected[path]] == []


def test_a_trial_that_fails_takes_no_other_with_it(run_search, servers, loaded, monkeypatch):
    """The process ends with its trial, and another one runs the commands of the next trial."""
    step = Trainer.train_step

    def fails(self, *args):
        if self.settings.schedule.lr_schedule == "step":
            raise UserError("training diverged")
        step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", fails)
    records = read_records(run_search("study"))
    assert [record["state"] for record in records.values()] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert records["001"]["message"] == "training diverged"
    assert [server.wait() for server in servers] == [1, 0] and loaded() == [server.pid for server in servers]


# --- Commands one after another ---

def test_each_command_writes_to_its_own_log(shared_process, servers, tmp_path):
    """So does a library in C, and a program that the command starts."""
    script = "import ctypes, subprocess, sys; from lavin.runtime.console import print_rank0\n" \
             "ctypes.CDLL(None).puts(b'{0} in C'); print('{0} without an end', end='', file=sys.stderr)\n" \
             "subprocess.run(['echo', '{0} elsewhere']); print_rank0('{0} in Python')"
    for name in ("first", "second"):
        run(shared_process, tmp_path / name, script.format(name))
    assert len(servers) == 1
    for name in ("first", "second"):
        said = (tmp_path / name / "log").read_text()
        for where in ("in C", "without an end", "elsewhere", "in Python"):
            assert said.count(f"{name} {where}") == said.count(where) == 1


def test_a_command_gets_the_words_that_the_worker_gives(shared_process, tmp_path):
    words = ["données", "\udcff", "a\nb\0", "", "x" * 500_000]
    code = f"import json; from pathlib import Path; Path({str(tmp_path / 'words')!r}).write_text(json.dumps(flags[1:]))"
    run_command(shared_process, ["script.py", code, *words], tmp_path / "log", 0, 60)
    assert json.loads((tmp_path / "words").read_text()) == words


def test_an_idle_process_holds_no_lock_and_no_log(shared_process, servers, tmp_path):
    run(shared_process, tmp_path / "trial", "")
    assert servers[0].poll() is None
    os.close(claim(tmp_path / "trial" / "lock"))
    opened = [os.readlink(path) for path in Path(f"/proc/{servers[0].pid}/fd").iterdir()]
    assert "/dev/null" in opened and not any(str(tmp_path) in path for path in opened)


@pytest.mark.parametrize("script, error, words", [
    ("import sys; print('train.py: error: no data', file=sys.stderr); sys.exit(1)", CommandFailed, "^no data$"),
    ("raise RuntimeError('a bug')", CommandFailed, "^RuntimeError: a bug$"),
    ("import os; os.kill(os.getpid(), 9)", WorkerError, r"was killed \(SIGKILL\)"),
    ("import os; os.kill(os.getpid(), 15)", signals.Stopped, "was stopped by a signal"),
    ("raise MemoryError", WorkerError, "not enough memory on this machine"),
    ("import os; print('x'); os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('y')", WorkerError,
     "No space left on device")])
def test_a_command_that_fails_after_others_is_told_as_ever_and_the_next_one_has_a_process_of_its_own(
        shared_process, servers, tmp_path, script, error, words):
    first = pid_of(shared_process, tmp_path / "a")
    with pytest.raises(error, match=words):
        run(shared_process, tmp_path / "b", script)
    assert pid_of(shared_process, tmp_path / "c") != first and len(servers) == 2
    os.close(claim(tmp_path / "b" / "lock"))


def test_a_command_that_is_done_when_the_signal_comes_is_done_and_its_process_ends(shared_process, servers, tmp_path):
    """A signal that comes in the last step of training is only noted. A process that was asked to stop begins nothing
    more."""
    script = "import os; from lavin.runtime import signals\nwith signals.deferred(): os.kill(os.getpid(), 15)\nprint(1)"
    assert run(shared_process, tmp_path / "a", script) == "1\n"
    assert run(shared_process, tmp_path / "b", "print(2)") == "2\n"
    assert [server.poll() for server in servers] == [0, None]


@pytest.mark.parametrize("number", [*signals.STOP_SIGNALS, signal.SIGKILL])
def test_an_idle_process_that_is_ended_leaves_no_word_and_the_next_command_begins_another(shared_process, servers,
                                                                                          tmp_path, number):
    assert run(shared_process, tmp_path / "a", "print(1)") == "1\n"
    os.kill(servers[0].pid, number)
    assert servers[0].wait() == (75 if number in signals.STOP_SIGNALS else -number)
    assert run(shared_process, tmp_path / "b", "print(2)") == "2\n" and (tmp_path / "a" / "log").read_text() == "1\n"


def test_a_process_that_ends_before_it_has_read_its_command_is_told_by_its_end(shared_process, servers, tmp_path):
    run(shared_process, tmp_path / "a", "")
    servers[0].poll = lambda: None  # it ends just after the worker has looked
    servers[0].kill()
    os.waitpid(servers[0].pid, 0)
    servers[0].wait = lambda _: -signal.SIGKILL
    with pytest.raises(WorkerError, match=r"was killed \(SIGKILL\)"):
        run(shared_process, tmp_path / "b", "")
    del servers[0].poll, servers[0].wait
    servers[0].returncode = -signal.SIGKILL
    assert run(shared_process, tmp_path / "b", "print(2)") == "2\n"


def test_a_process_that_is_killed_with_its_command_unread_is_told_by_its_end(shared_process, servers, tmp_path):
    run(shared_process, tmp_path / "a", "")
    os.kill(servers[0].pid, signal.SIGSTOP)
    with open(tmp_path / "log", "ab") as log:
        process = shared_process(["script.py", ""], log, 0)
    servers[0].kill()
    assert process.wait(30) == -signal.SIGKILL


def test_a_command_whose_process_is_long_in_ending_is_still_watched(shared_process, servers, tmp_path):
    """An experiment tracker may upload what is left. The end of the socket is not that of the process."""
    script = ("import os, time\nfor name in os.listdir('/proc/self/fd'):\n"
              "    path = f'/proc/self/fd/{name}'\n"
              "    if os.path.islink(path) and os.readlink(path).startswith('socket'): os.close(int(name))\n"
              "time.sleep(60)")
    with pytest.raises(HoursSpent):
        run(shared_process, tmp_path / "a", script, seconds=1)
    assert servers[0].returncode not in (None, -signal.SIGKILL)


# --- The end of the worker ---

@pytest.mark.parametrize("error", [None, UserError("of a trial"), signals.Stopped("stopped by SIGTERM")])
def test_no_process_is_left_behind(servers, tmp_path, error):
    begun = []
    with pytest.raises(type(error)) if error else starting(tmp_path, 1):
        with starting(tmp_path, 1) as start:
            run(start, tmp_path / "a", "print(1)")
            begun.append(servers[0].poll())
            if error:
                raise error
    assert begun == [None] and servers[0].returncode == 0 and (tmp_path / "a" / "log").read_text() == "1\n"


def hold(path: Path) -> str:
    """Code that holds a lock until the process ends."""
    return f"from pathlib import Path; from util.search.locks import claim; assert claim(Path({str(path)!r}))"


def test_an_idle_process_ends_in_silence_when_its_worker_is_killed(servers, tmp_path):
    def work():
        with starting(tmp_path, 1) as start:
            run(start, tmp_path / "trial", hold(tmp_path / "process"))
            (tmp_path / "idle").touch()
            time.sleep(60)

    worker = Child(work, 1, 2, {})
    wait_for(tmp_path / "idle")
    assert claim(tmp_path / "process") is None
    worker.kill()
    worker.wait()
    with waiting_for(tmp_path / "process"):
        assert (tmp_path / "trial" / "log").read_text() == ""


def test_a_worker_that_was_killed_before_it_read_the_answer_gives_no_more_commands():
    worker, own = socket.socketpair()
    with own:
        own.sendall(b"\n")
        worker.close()
        assert serve.receive(own) is None


def test_a_busy_process_ends_after_its_command_when_its_worker_is_killed(servers, tmp_path):
    """Until then it keeps the trial's lock."""
    script = (f"{hold(tmp_path / 'process')}; import time; Path({str(tmp_path / 'busy')!r}).touch()\n"
              f"while not Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)\nprint('done')")

    def work():
        with starting(tmp_path, 1) as start:
            run(start, tmp_path / "before", "")
            run(start, tmp_path / "trial", script)

    worker = Child(work, 1, 2, {})
    wait_for(tmp_path / "busy")
    worker.kill()
    worker.wait()
    assert claim(tmp_path / "trial" / "lock") is None
    os.close(claim(tmp_path / "before" / "lock"))
    (tmp_path / "go").touch()
    with waiting_for(tmp_path / "trial" / "lock"), waiting_for(tmp_path / "process"):
        assert (tmp_path / "trial" / "log").read_text() == "done\n"


def test_a_command_that_has_not_begun_when_its_worker_ends_holds_the_lock_all_the_same(servers, tmp_path):
    """Its process may still be busy with imports. Here it is halted."""
    shared, log, lock = SharedProcess(dict(os.environ)), tmp_path / "log", claim(tmp_path / "lock")
    run(shared.start, tmp_path / "before", "")
    os.kill(servers[0].pid, signal.SIGSTOP)
    with open(log, "ab") as output:
        shared.start(["script.py", "print('done')"], output, lock)
    os.close(lock)
    shared.close()
    assert claim(tmp_path / "lock") is None
    os.kill(servers[0].pid, signal.SIGCONT)
    assert servers[0].wait() == 0 and log.read_text() == "done\n"
    os.close(claim(tmp_path / "lock"))


def test_a_worker_that_fails_during_a_command_does_not_wait_for_it(servers, tmp_path, monkeypatch):
    """The command goes on, and keeps the lock."""
    def fails(log):
        raise OSError(116, os.strerror(116))

    monkeypatch.setattr(runner, "sign_of_life", fails)
    script = ("import time; from pathlib import Path\n"
              f"while not Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)")
    with pytest.raises(OSError, match="Stale file handle"), starting(tmp_path, 1) as start:
        run(start, tmp_path / "trial", script)
    assert servers[0].poll() is None and claim(tmp_path / "trial" / "lock") is None
    (tmp_path / "go").touch()
    assert servers[0].wait() == 0
    os.close(claim(tmp_path / "trial" / "lock"))


# --- The process itself ---

def test_the_process_begins_in_any_folder_and_commands_run_in_that_of_the_worker(base, scienceqa, tmp_path,
                                                                                 monkeypatch):
    """No part of it is replaced here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "__init__.py").write_text("raise SystemExit('a package of the user')")
    lock, shared = claim(tmp_path / "lock"), SharedProcess({**os.environ, "LAVIN_CACHE": str(tmp_path / "cache")})
    try:
        for words in (["train.py", *run_flags(base, scienceqa, "run", "--stop_after_epoch", "1")],
                      ["eval.py", "--adapter_path", "run", "--device", "cpu", "--output_dir", "scores"]):
            run_command(shared.start, words, tmp_path / "log", lock, 60)
        assert (tmp_path / "run" / "checkpoint-0.pth").is_file() and (tmp_path / "scores" / "scores.json").is_file()
        assert (tmp_path / "cache").is_dir()
        with pytest.raises(CommandFailed, match="^--epochs 0"):
            run_command(shared.start, ["train.py", "--epochs", "0"], tmp_path / "log", lock, 60)
    finally:
        shared.close()
        os.close(lock)
