"""How a process ends: which signals stop it, with what exit status, and with which line, said by whom."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import tqdm
from torch.distributed.elastic.multiprocessing.api import PContext

from forked import in_child
from lavin.runtime import console, errors, signals
from lavin.runtime.console import counted, duration, listed, print_rank0, progress_bar, working_on
from lavin.runtime.errors import UsageError, UserError, one_line_errors
from lavin.runtime.signals import STOP_SIGNALS, Stopped
from tiny import ROOT
from util import launch

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
RANK_0 = {**RANK_1, "RANK": "0", "LOCAL_RANK": "0"}


def send(*numbers: int) -> None:
    """Sends signals to this process, which then waits for what they do."""
    for number in numbers:
        os.kill(os.getpid(), number)
    time.sleep(0.05)


# --- Signals ---

@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_ends_the_work_with_status_75_and_its_name(number):
    def work():
        with one_line_errors():
            send(number)
            print("never")
    assert in_child(work) == (75, "", f"main.py: stopped by {number.name}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_what_nohup_and_the_shell_ignore_stays_ignored(number):
    """SIGHUP and SIGINT; a process that its parent made to ignore all signals can still be stopped."""
    def work():
        for ignored in STOP_SIGNALS:
            signal.signal(ignored, signal.SIG_IGN)
        with one_line_errors():
            send(signal.SIGHUP, signal.SIGINT)
            print("goes on")
            send(number)
            print("never")
    assert in_child(work) == (75, "goes on\n", f"main.py: stopped by {number.name}\n")


def test_a_chat_leaves_ctrl_c_alone():
    """It stops an answer, and no period of grace begins."""
    def work():
        signals.GRACE_SECONDS = 0.05
        with one_line_errors((signal.SIGTERM, signal.SIGHUP)):
            try:
                send(signal.SIGINT)
            except KeyboardInterrupt:
                time.sleep(0.3)
            print("goes on")
    assert in_child(work) == (0, "goes on\n", "")


def test_a_second_signal_does_not_disturb_what_the_first_began():
    """A launcher may send one again, and another one after it."""
    def work():
        with one_line_errors():
            try:
                send(signal.SIGUSR1)
            finally:
                send(signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                print("saved")
    assert in_child(work) == (75, "saved\n", "main.py: stopped by SIGUSR1\n")


def test_no_signal_changes_the_launchers_status_once_its_processes_have_ended(monkeypatch):
    """Python replaces handlers of its own by the system's before it ends, but keeps a signal ignored."""
    monkeypatch.setattr(launch, "main", lambda: None)

    def work():
        status = launch.launch()
        print(all(signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS))
        sys.exit(status)
    assert in_child(work) == (0, "True\n", "")


def test_a_signal_that_a_library_swallowed_stops_what_would_begin_next():
    def work():
        with one_line_errors():
            try:
                send(signal.SIGTERM)
            except BaseException:
                print("swallowed")
            with signals.deferred():
                print("never")
    assert in_child(work) == (75, "swallowed\n", "main.py: stopped by SIGTERM\n")


def test_no_handler_of_exceptions_holds_a_signal_up():
    def work():
        with one_line_errors():
            try:
                send(signal.SIGTERM)
            except Exception:
                print("never")
    assert in_child(work) == (75, "", "main.py: stopped by SIGTERM\n")


def test_a_deferred_signal_is_known_and_disturbs_nothing():
    """The first is the one that is told. What ends by itself all the same has not failed."""
    def work():
        with one_line_errors(), signals.deferred():
            print(signals.requested)
            send(signal.SIGUSR1, signal.SIGTERM)
            print(signals.requested)
    assert in_child(work) == (0, "None\nSIGUSR1\n", "")


@pytest.mark.parametrize("error", [None, KeyError])
def test_signals_are_deferred_up_to_the_end_of_the_block(error):
    def work():
        with one_line_errors():
            try:
                with signals.deferred():
                    if error:
                        raise error
            except KeyError:
                print("raised")
            send(signal.SIGTERM)
            print("never")
    assert in_child(work) == (75, "raised\n" if error else "", "main.py: stopped by SIGTERM\n")


@pytest.mark.parametrize("environment, said", [
    ({}, "\nmain.py: ended 0.1 s after the stop signal, without saving: the same command goes on from the last "
         "checkpoint\n"), (RANK_1, "")], ids=["alone", "rank 1"])
def test_a_process_that_does_not_stop_is_ended_and_rank_0_says_so(environment, said):
    def work():
        signals.DEFERRED_GRACE_SECONDS = 0.1
        with one_line_errors(), signals.deferred():
            send(signal.SIGTERM)
            time.sleep(20)
    assert in_child(work, **environment) == (75, "", said)


def test_a_process_ends_before_torchrun_kills_it():
    seconds = inspect.signature(PContext.close).parameters["timeout"].default
    assert 0 < signals.GRACE_SECONDS < signals.DEFERRED_GRACE_SECONDS < seconds


# --- Exit statuses and lines ---

@pytest.mark.parametrize("error, status, line", [
    (UserError("no file x"), 1, "error: no file x"), (UsageError("no flag y"), 2, "error: no flag y"),
    (UserError("two\nlines"), 1, "error: two lines"), (OSError(28, "No space left", "x"), 1, "error: x: No space left"),
    (Stopped("stopped by SIGTERM, and saved"), 75, "stopped by SIGTERM, and saved"),
    (KeyboardInterrupt(), 75, "stopped by SIGINT")], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("environment", [{}, RANK_0], ids=["alone", "rank 0"])
def test_an_ending_has_its_status_and_one_line(tmp_path, error, status, line, environment):
    """75 only where the same command goes on. What was said before is not lost; torchrun's summary gets the line."""
    def work():
        with one_line_errors():
            print("before")
            raise error
    ended = in_child(work, **environment, TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert ended[:2] == (status, "before\n")
    assert ended.errors.startswith(f"main.py: {line}") and ended.errors.count("\n") == 1
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] + "\n" == ended.errors


def test_a_bug_keeps_its_traceback():
    def work():
        with one_line_errors():
            raise KeyError("bug")
    ended = in_child(work)
    assert ended.status == 1 and "Traceback" in ended.errors and "main.py: " not in ended.errors


def test_another_rank_is_silent_where_it_was_stopped_and_leaves_the_first_word_on_errors_to_rank_0():
    """torchrun stops it meanwhile: by a signal that ends it at once."""
    def stopped():
        errors.time.sleep = lambda seconds: None
        with one_line_errors():
            send(signal.SIGTERM)

    def failed():
        errors.time.sleep = lambda seconds: print(seconds >= 5, flush=True)
        with one_line_errors():
            raise UserError("no file x")

    def stopped_while_it_waits():
        errors.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
        with one_line_errors():
            raise UserError("no file x")
    assert in_child(stopped, **RANK_1) == (75, "", "")
    assert in_child(failed, **RANK_1) == (1, "True\n", "main.py: error: no file x\n")
    assert in_child(stopped_while_it_waits, **RANK_1) == (-signal.SIGTERM, "", "")


def test_a_signal_while_rank_0_tells_its_error_does_not_change_it():
    """torchrun sends SIGTERM to all processes as soon as one has failed."""
    def work():
        tell = errors.tqdm.write
        errors.tqdm.write = lambda *args, **kwargs: send(signal.SIGTERM) or tell(*args, **kwargs)
        with one_line_errors():
            raise UserError("no file x")
    assert in_child(work, **RANK_0) == (1, "", "main.py: error: no file x\n")


@pytest.mark.parametrize("environment, said", [({}, True), (RANK_0, True), (RANK_1, False)], ids=["alone", "0", "1"])
def test_only_rank_0_speaks(environment, said):
    def work():
        print_rank0("epoch", 0)
        with progress_bar(range(3), "steps") as bar:
            print(bar.disable, sum(bar))
    ended = in_child(work, **environment)
    assert ended.out == ("epoch 0\n" if said else "") + f"{not said} 3\n" and ("3 of 3" in ended.errors) == said


def test_progress_in_a_log_has_lines_and_moves_no_cursor(monkeypatch):
    """A line in LINE_SECONDS, one at the end, none of what is over at once; other lines stay whole between them."""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.1)

    def work():
        with progress_bar(range(8), "run, epoch 1", unit="step") as bar:
            for i in bar:
                time.sleep(0.05)
                bar.set_postfix_str(f"loss {i}", refresh=False)
                if i == 4:
                    print_rank0("saved")
        list(progress_bar(range(3), "checksums", delay=5))
    ended = in_child(work)
    lines = ended.errors.splitlines()
    assert ended.out == "saved\n" and not {"\r", "\x1b"} & {*ended.errors} and "checksums" not in ended.errors
    assert 2 <= len(lines) <= 5 and lines[-1].startswith("run, epoch 1: 8 of 8, ") and lines[-1].endswith("loss 7")
    assert all(line.startswith("run, epoch 1: ") and " left, loss " in line for line in lines)


def test_the_last_line_of_progress_has_the_rate_of_the_whole_and_comes_once():
    def work():
        now = 0.0
        tqdm.std.time = lambda: now  # the clock of progress
        for name, seconds in (("slow", (10, 30, 10, 10)), ("even", (20, 20))):
            with progress_bar(None, name, total=len(seconds)) as bar:
                for step in seconds:
                    now += step
                    bar.update()
    assert in_child(work).errors.splitlines() == [
        "slow: 2 of 4, 20.00s/it, 00:40 left", "slow: 4 of 4, 15.00s/it, 00:00 left",
        "even: 2 of 2, 20.00s/it, 00:00 left"]


def test_progress_names_the_run_which_tells_jobs_side_by_side_apart():
    def work():
        with working_on("LaVIN-7B-step"):
            list(progress_bar(range(3), "questions", unit="question"))
        list(progress_bar(range(3), "others"))
    first, second = in_child(work).errors.splitlines()
    assert re.match(r"LaVIN-7B-step, questions: 3 of 3, +[\d.,]+question/s, 00:00 left$", first)
    assert second.startswith("others: 3 of 3, ")


def test_counts_lists_and_durations_in_words():
    assert [listed([9]), listed([2, 6, 20]), listed("ab", "or")] == ["9", "2, 6 and 20", "a or b"]
    assert [counted(n, "old turn") for n in (0, 1, 2, 3000)] == ["0 old turns", "1 old turn", "2 old turns",
                                                                 "3,000 old turns"]
    assert [counted(n, "process") for n in (1, 2)] == ["1 process", "2 processes"]
    assert [duration(seconds) for seconds in (20, 3540, 3600, 7500)] == ["1 min", "59 min", "1 h 00 min", "2 h 05 min"]


def test_an_error_is_the_last_line_of_a_log_with_progress(monkeypatch):
    """Progress that was not closed is not drawn again below the error, with cursor movements."""
    monkeypatch.setattr(console, "LINE_SECONDS", 0)

    def work():
        bar = progress_bar(range(3), "steps")
        bar.update()
        with one_line_errors():
            raise UserError("no file x")
    ended = in_child(work)
    assert ended.status == 1 and not {"\r", "\x1b"} & {*ended.errors}
    assert "main.py: error: no file x" in ended.errors.splitlines()[-1]


def test_all_progress_is_that_of_the_console():
    """A bar of tqdm's own would fill a log with carriage returns."""
    sources = [path for folder in ("lavin", "util", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if re.search(r"\btqdm\(|trange\(", path.read_text())] == ["console.py"]


def test_a_line_is_in_the_log_when_it_is_written(tmp_path):
    """A line such as the page's address or a warning is not kept until the program ends, which may be hours later."""
    program = "import sys; from lavin.runtime import console; console.setup(); print('a line'); sys.stdin.readline()"
    with open(tmp_path / "log", "w") as log, subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=log,
                                                              stdin=subprocess.PIPE) as child:
        end = time.monotonic() + 20
        while not (tmp_path / "log").read_text() and time.monotonic() < end:
            time.sleep(0.05)
        assert child.poll() is None and (tmp_path / "log").read_text() == "a line\n"
        child.communicate(b"\n")
