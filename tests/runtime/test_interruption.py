"""Stop signals, frozen and leftover processes, locks, full disks: what the operating system does to a run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import train
from lavin.runtime import heartbeat
from lavin.runtime.distributed import LAUNCHER_VARIABLES, launched_as
from lavin.runtime.errors import UserError, one_line_errors
from tiny import ROOT
from tiny_runs import load_checkpoint, run_flags
from util.launch import describe
from util.runs import locked

EPOCHS = 20  # most of which are yet to come when a run is stopped in its second one
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(*command) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- Stop signals ---

@pytest.mark.parametrize("number, launcher, batch", [
    (signal.SIGUSR1, (), 4), (signal.SIGTERM, TORCHRUN, 2)], ids=["one process", "torchrun"])
def test_a_stopped_process_saves_and_the_same_command_goes_on(base, scienceqa, tmp_path, number, launcher, batch):
    """The end is the same, byte for byte, as that of a run that nothing stopped. Dropout depends on the processes."""
    def flags(folder):
        return run_flags(base, scienceqa, folder, "--epochs", EPOCHS, "--batch_size", batch, "--dropout_prob",
                         "0" if launcher else "0.3", "--dropout_lim", "0.3")
    folder = tmp_path / "run"
    with start(*launcher, ROOT / "train.py", *flags(folder)) as process:
        wait_for(folder / "checkpoint-0.pth", process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and f"stopped by {number.name}, and saved" in lines[0] and str(folder) in lines[0]
    if not launcher:
        assert process.returncode == 75 and errors.rstrip().endswith(lines[0])
        train.main(train.get_args_parser().parse_args([str(flag) for flag in flags(tmp_path / "unbroken")]))
    assert process.returncode != 0 and not (folder / f"checkpoint-{EPOCHS - 1}.pth").exists()
    assert not (folder / ".owner.json").exists()
    with start(*launcher, ROOT / "train.py", *flags(folder)) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "goes on from" in out, errors
    if not launcher:
        name = f"checkpoint-{EPOCHS - 1}.pth"
        a, b = ({**load_checkpoint(path / name), "flags": None, "sha256": None}
                for path in (folder, tmp_path / "unbroken"))
        assert json.dumps(a, default=torch.Tensor.tolist) == json.dumps(b, default=torch.Tensor.tolist)


WAITING = """
import os, sys, time
sys.path[:0] = {path!r}
from lavin.runtime import signals
from lavin.runtime.errors import one_line_errors
signals.GRACE_SECONDS, signals.DEFERRED_GRACE_SECONDS = 0.3, 0.6
with one_line_errors():
    {code}
"""


@pytest.mark.parametrize("code, words", [
    ("print('ready', flush=True); time.sleep(30)", "stopped by SIGTERM"),
    # a main thread that no Python handler can interrupt, as when it waits for the GPU
    ("import ctypes; mutex = ctypes.create_string_buffer(64); lock = ctypes.CDLL(None).pthread_mutex_lock; "
     "lock(mutex); print('ready', flush=True); lock(mutex)", "without saving"),
    ("\n    with signals.deferred():\n        print('ready', flush=True)\n        while True: time.sleep(1)",
     "ended 0.6 s after the stop signal")])
def test_a_process_ends_within_its_grace_period(tmp_path, code, words):
    (tmp_path / "main.py").write_text(WAITING.format(path=sys.path, code=code))
    with start(tmp_path / "main.py") as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # until it waits
        process.terminate()
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 75 and words in errors and "Traceback" not in errors


def test_a_signal_after_the_work_is_done_does_not_make_it_a_failure(tmp_path):
    """While Python ends, which takes a while with torch."""
    script = WAITING.format(path=sys.path, code="pass") + "print('ready', flush=True)\ntime.sleep(0.5)\n"
    (tmp_path / "main.py").write_text(script)
    with start(tmp_path / "main.py") as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 0 and errors == ""


# --- Errors ---

@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device", "/run/log.txt"),
     "/run/log.txt: No space left on device: free some space, and the same command goes on"),
    (OSError(27, "File too large", "/run/log.txt"), "raise the limit of file sizes (ulimit -f)"),
    (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"), (MemoryError(), "not enough memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                  "99 bytes"), "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), "not enough GPU memory"),
    (BrokenPipeError(32, "Broken pipe"), "has ended")])
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, error, words):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    monkeypatch.setattr("lavin.runtime.signals.install", lambda numbers: None)
    monkeypatch.setattr("lavin.runtime.signals.finish", lambda action: None)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and len(lines) == 1
    assert lines[0].startswith("train.py: error: ") and words in lines[0]


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_output_that_cannot_be_written_is_one_line(tmp_path, target):
    (tmp_path / "main.py").write_text(WAITING.format(path=sys.path, code="print('x' * 99)"))
    if target == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY)
    done = subprocess.run([sys.executable, str(tmp_path / "main.py")], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_torchrun_prints_our_line_first_and_once_and_what_failed_last(base, scienceqa, tmp_path):
    flags = run_flags(base, scienceqa, tmp_path / "run", "--data_root", tmp_path / "nowhere")
    with start(*TORCHRUN, ROOT / "train.py", *flags) as process:
        _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if line]
    ours = [i for i, line in enumerate(lines) if line.startswith("train.py: error: ")]
    assert len(ours) == 1 and "nowhere/problems.json" in lines[ours[0]]
    assert all(line.startswith(("W", "[W", "*")) for line in lines[:ours[0]])  # torchrun's warnings
    assert any("traceback : train.py: error: cannot read" in line for line in lines[-4:])
    assert any("rank" in line and ": 0" in line for line in lines[-6:])


# --- The launcher's variables ---

@pytest.mark.parametrize("variables", [
    {"RANK": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "4"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_variables_that_a_launcher_left_over_are_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset RANK"):
        launched_as()


@pytest.mark.parametrize("port", ["tcp://10.43.0.9:29500", "", "-1", "65536"])
def test_a_port_that_is_none_is_named(monkeypatch, port):
    """Kubernetes gives a container the address of each service: of one named master, in MASTER_PORT."""
    monkeypatch.setenv("MASTER_PORT", port)
    assert launched_as() == (0, 1, 0)  # which needs none
    for name, value in zip(LAUNCHER_VARIABLES, ("3", "4", "1", "h", port), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^MASTER_PORT={port} is no port .*: set it to a number"):
        launched_as()


def test_complete_variables_are_taken(monkeypatch):
    assert launched_as() == (0, 1, 0)
    for name, value in zip(LAUNCHER_VARIABLES, ("3", "4", "1", "h", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert launched_as() == (3, 4, 1)


# --- Frozen processes ---

class Store(dict):
    """A store such as torch's, which maps keys to bytes."""

    def set(self, key, value):
        self[key] = value if isinstance(value, bytes) else value.encode()

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.mark.parametrize("end", ["frozen", "finished"])
def test_a_process_that_stops_answering_is_named_by_the_others(monkeypatch, end):
    """Three of them; the second freezes, or finishes."""
    store, reports, frozen = Store(), [], threading.Event()
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat, "LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(heartbeat, "report", lambda other, value, first: reports.append((other, first)) or
                        (_ for _ in ()).throw(RuntimeError))
    store_set = store.set
    monkeypatch.setattr(store, "set", lambda key, value: None if key == "beat/1" and frozen.is_set()
                        else store_set(key, value), raising=False)
    heartbeat._stopping.clear()
    threads = [threading.Thread(target=heartbeat.beat, args=(store, rank, 3)) for rank in (0, 1, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert not reports
    if end == "finished":
        store_set("beat/1", heartbeat.GONE)
    frozen.set()
    time.sleep(0.6)
    heartbeat._stopping.set()
    for thread in threads:
        thread.join()
    heartbeat._stopping.clear()
    assert {report for report in reports if report[0] == 1} == (
        {(1, True), (1, False)} if end == "frozen" else set())


# --- Locks ---

HOLDER = """
import sys, time
sys.path[:0] = {path!r}
from util.runs import locked
with locked({folder!r}):
    print('ready', flush=True)
    time.sleep(60)
"""


def test_a_second_process_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    (tmp_path / "holder.py").write_text(HOLDER.format(path=sys.path, folder=str(tmp_path / "run")))
    with start(tmp_path / "holder.py") as holder:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {os.uname().nodename}"), \
                locked(tmp_path / "run"):
            pass
        holder.kill()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".owner.json").read_text())["process_id"] == os.getpid()
    with locked(tmp_path / "run"):  # and again
        pass


@pytest.mark.parametrize("content", [b"", b'{"host": ', bytes(60), b"[]", b"\xff", None])
def test_a_second_process_is_refused_whatever_the_file_of_the_owner_holds(tmp_path, content):
    owner = tmp_path / "run" / ".owner.json"
    with locked(tmp_path / "run"):
        owner.unlink()
        os.mkfifo(owner) if content is None else owner.write_bytes(content)
        with pytest.raises(UserError, match="in use by process"), locked(tmp_path / "run"):
            pass


@pytest.mark.parametrize("folder", ["file", "file/inside", "x" * 300, "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to --output_dir"), locked(tmp_path / folder):
        pass


@pytest.mark.parametrize("code, status, last", [
    ("raise UserError('no file x')", 1, "failed first: main.py: error: no file x"), ("os._exit(75)", 75, None),
    ("os.kill(os.getpid(), 9)", 1, r"failed first: Signal 9 \(SIGKILL\) received by PID \d+")])
def test_the_launcher_says_last_what_failed(tmp_path, code, status, last):
    """In one line, and nothing where the processes were only stopped."""
    code = f"from lavin.runtime.errors import UserError; {code}"
    (tmp_path / "main.py").write_text(WAITING.format(path=sys.path, code=code))
    with start("-m", "util.launch", *TORCHRUN[2:], tmp_path / "main.py") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors and "Root Cause" not in errors
    if last:
        assert re.fullmatch(rf"rank [01] on {re.escape(socket.gethostname())} {last}", errors.splitlines()[-1])
    assert ("failed first" in errors) == bool(last)


def test_the_launcher_names_a_process_that_ended_without_a_word():
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=3, error_file="")
    assert describe(ChildFailedError("main.py", {1: failure})) == (
        f"rank 1 on {socket.gethostname()} failed first: exit status 3, for the reason above")


def test_the_launcher_stops_its_processes_at_the_signal_that_srun_passes_on(tmp_path):
    """SIGUSR1: at SIGTERM, srun would kill all processes at once."""
    code = "print('ready', flush=True); time.sleep(30)"
    (tmp_path / "main.py").write_text(WAITING.format(path=sys.path, code=code))
    with start("-m", "util.launch", *TORCHRUN[2:4], "1", tmp_path / "main.py") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "main.py: stopped by SIGTERM" in errors


def test_ctrl_c_stops_an_answer_of_the_chat_and_not_the_chat(tmp_path):
    """The process handles signals as demo.py does, and goes on for longer than the grace period."""
    code = ("\n    for _ in range(2):\n        try:\n            print('ready', flush=True); time.sleep(30)\n"
            "        except KeyboardInterrupt:\n            time.sleep(0.5)\n    print('still here')")
    script = WAITING.format(path=sys.path, code=code).replace("one_line_errors()", "one_line_errors((15, 1))")
    (tmp_path / "main.py").write_text(script)
    assert "one_line_errors((signal.SIGTERM, signal.SIGHUP))" in (ROOT / "demo.py").read_text()
    with start(tmp_path / "main.py") as process:
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=10)
    assert process.returncode == 0 and out == "still here\n" and errors == ""
