"""Ranks that share a model count once, lost contact is told, and a frozen process is noticed in time."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from test_interruption import TORCHRUN, Store

from lavin.runtime import distributed, heartbeat, signals
from lavin.runtime.distributed import LAUNCHER_VARIABLES
from lavin.runtime.errors import UserError
from tiny import ROOT


@pytest.fixture
def group(monkeypatch):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


KEPT_GROUP = """
import os
from lavin.runtime import distributed
distributed.init()
import torch.distributed.nn.functional  # as torch._dynamo does
distributed.all_gather_object(1)
distributed.close()
print({open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")})
"""


def test_no_thread_of_a_group_outlives_it(tmp_path):
    """A process with such threads ended with SIGABRT now and then."""
    (tmp_path / "program.py").write_text(KEPT_GROUP)
    done = subprocess.run([sys.executable, *TORCHRUN, str(tmp_path / "program.py")], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.count("{") == 2, done.stderr
    assert "gloo" not in done.stdout


# --- Ranks ---

@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_share_a_model_count_once_in_the_sum(group, monkeypatch, size):
    """Gradients and numbers; the parameter without a gradient gets zeros."""
    monkeypatch.setattr(distributed, "model_parallel_size", size)
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1, 2))
    p.grad = torch.tensor([4.0, 8.0])
    numbers = distributed.all_reduce_gradients([p, q], torch.tensor([16.0, 0.0]))
    assert numbers.tolist() == [16 / size, 0] and p.grad.tolist() == [4 / size, 8 / size]
    assert q.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("size, rank, expected", [(1, 3, (3, 4, 1)), (2, 3, (1, 2, 1)), (2, 1, (0, 2, 1)),
                                                  (4, 3, (0, 1, 1))])
def test_consecutive_ranks_share_a_model(monkeypatch, size, rank, expected):
    for name, value in zip(LAUNCHER_VARIABLES, (str(rank), "4", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "model_parallel_size", size)
    assert distributed.init(size) == expected


def test_values_are_those_of_the_first_of_the_ranks_that_share_a_model(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: ["a", "a", "b", "b"])
    monkeypatch.setattr(distributed, "model_parallel_size", 2)
    assert distributed.gather_data_parallel("a") == ["a", "b"]
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value, 3.0, 7.0, 5.0])
    assert distributed.all_min(4.0) == 3.0
    monkeypatch.setattr(distributed, "model_parallel_size", 1)
    assert distributed.all_min(4.0) == 4.0  # where each has a model of its own, none waits for the others


def test_what_rank_0_makes_is_made_there_only(group, monkeypatch):
    assert distributed.from_rank_0(lambda: "made") == "made"
    monkeypatch.setenv("RANK", "1")
    assert distributed.from_rank_0(lambda: 1 / 0) is None


def test_lost_contact_is_an_error_unless_this_process_was_stopped_too(monkeypatch):
    def lose():
        with distributed.lost_contact():
            raise RuntimeError("Connection closed by peer\nmore")
    with pytest.raises(UserError, match=r"lost contact with another process \(Connection closed by peer\): the log"):
        lose()
    monkeypatch.setattr(signals, "requested", "SIGTERM")
    with pytest.raises(signals.Stopped, match="stopped by SIGTERM"):
        lose()


# --- Frozen processes ---

class Ended(Exception):
    """Stands for the end of the process."""


class Clock:
    """Stands for the event that ends the heartbeat's thread: waiting takes no time, and moves the clock.

    ends: the time of each other process's last beat, and its last words. until: when this process has finished."""

    def __init__(self, store: Store, ends: dict[int, tuple[float, bytes]], until: float):
        self.now, self.store, self.ends, self.until = 0.0, store, ends, until
        self.waited: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        self.now += seconds
        for other, (end, last) in self.ends.items():
            self.store.set(f"beat/{other}", f"{self.now} process {other}" if self.now < end else last)
        return self.now >= self.until


@pytest.fixture
def watch(monkeypatch, capsys):
    """Returns a function that lets rank 0 of three processes watch the others; it returns when it has ended, and what
    it has said."""
    def watched(ends: dict[int, tuple[float, bytes]], until: float = 1e4, rank: int = 0) -> tuple[float, str, Clock]:
        clock = Clock(Store(), ends, until)
        monkeypatch.setattr(heartbeat, "_stopping", clock)
        monkeypatch.setattr("time.monotonic", lambda: clock.now)
        monkeypatch.setattr("time.sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))

        def end(status):
            assert status == 1
            raise Ended
        monkeypatch.setattr("os._exit", end)
        try:
            heartbeat.beat(clock.store, rank, 3)
        except Ended:
            pass
        return clock.now, capsys.readouterr().err, clock
    return watched


ALIVE = (1e9, b"")


def test_a_process_is_called_frozen_after_two_minutes_without_an_answer_and_not_before(watch):
    frozen = (300.0, b"290.0 process 1 (on node7, process id 9)")
    ended, said, _ = watch({1: frozen, 2: ALIVE})
    assert 290 + 120 < ended <= 300 + 120 + 20
    assert said.count("\n") == 1 and "process 1 (on node7, process id 9) has not answered for 120 s" in said
    later, said, _ = watch({0: ALIVE, 1: frozen}, rank=2)
    assert ended < later and "process 1" in said  # so that one process says it before torchrun ends the others


def test_a_process_that_never_answered_is_called_frozen_too(watch):
    ended, said, _ = watch({1: (0.0, b""), 2: ALIVE})
    assert 120 < ended <= 150 and "error: process 1 has not answered" in said


def test_a_process_that_has_finished_or_pauses_is_not_called_frozen(watch):
    """The longest pause that is allowed is the limit itself."""
    ended, said, clock = watch({1: (50.0, heartbeat.GONE), 2: ALIVE}, until=1000)
    assert (ended, said) == (1000, "") and clock.store["beat/0"] == heartbeat.GONE
    assert watch({1: (50.0, b"pauses"), 2: ALIVE}, until=50 + 120)[:2] == (170, "")


def test_a_process_answers_at_once_and_often_enough_to_be_heard_within_the_limit(watch):
    _, _, clock = watch({1: ALIVE, 2: ALIVE}, until=100)
    assert clock.waited[0] == 0 and 0 < max(clock.waited) <= heartbeat.LIMIT_SECONDS / 4
