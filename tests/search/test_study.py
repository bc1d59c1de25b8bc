"""The trials of a study: none is lost, none is run twice, none stays RUNNING, whichever worker is killed where."""

import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna")
from forked import Child
from lavin.runtime.errors import UserError
from user_errors import error_message
from util.search import study as study_module
from util.search.folder import Settings, add_rung, add_seconds, read_records, read_settings
from util.search.locks import claim, waiting_for
from util.search.pruning import longest_warmup, make_pruner, parameters_of_schedule, rungs
from util.search.runner import run_command
from util.search.space import Space
from util.search.storage import storage_errors
from util.search.study import COMPLETE, FAIL, PRUNED, Study, Trial, run_trial

SPACE = Space({"blr": {"kind": "float", "low": 0.0, "high": 1.0, "default": 0.5},
               "dropout_prob": {"kind": "float", "low": 0.0, "high": 0.9, "default": 0.1}},
              [{}, {"blr": 0.25}], "space.json")
SETTINGS = {"trials": 6, "pruner": "asha", "questions": 100, "confirm": 1, "seeds": 2, "steps_per_epoch": 10,
            "identity": {"train": {"data": "1"}}, "flags": {"epochs": 9, "seed": 0},
            "space": {"parameters": SPACE.parameters, "enqueue": SPACE.enqueue}}
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:The reported value")
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Killed(BaseException):
    """Stands for a worker that ends at once: the operating system releases its lock."""


@pytest.fixture(scope="module")
def postgres():
    """The address of a server of its own, which refuses to run as root."""
    pytest.importorskip("psycopg")
    if not POSTGRES or (os.getuid() == 0 and not shutil.which("setpriv")):
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    as_user = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"] if os.getuid() == 0 else []
    if as_user:
        shutil.chown(folder, "nobody", "nogroup")

    def run(program, *arguments):
        subprocess.run([*as_user, POSTGRES[-1] / program, *arguments], check=True, cwd=folder, timeout=60,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    run("initdb", "--pgdata", folder / "data", "--username", "lavin", "--auth", "trust", "--no-sync")
    run("pg_ctl", "start", "--wait", "--pgdata", folder / "data", "--log", folder / "log", "--options",
        f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off")
    yield f"postgresql+psycopg://lavin@/postgres?host={folder}"
    run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", folder / "data")
    shutil.rmtree(folder)


@pytest.fixture(params=["journal", "postgresql"])
def storage(request):
    return request.getfixturevalue("postgres") if request.param == "postgresql" else None


def open_study(folder: Path, url: str | None = None, **changes) -> Study:
    return Study(folder, SPACE, {**SETTINGS, **changes}, url)


def quality(trial: Trial) -> int:
    """The number of 100 questions that are answered: the more, the nearer blr is to 0.25."""
    return round(90 - 80 * abs(trial.values["blr"] - 0.25))


def fake_reach(counts: Counter, rng=None, kill: float = 0.0):
    """Counts the epochs of each trial, and is killed with a probability before or after it writes its score."""
    def reach(trial: Trial, epochs: int) -> float:
        path = trial.folder / "epochs"
        done = int(path.read_text()) if path.is_file() else 0
        if rng and rng.random() < kill:
            raise Killed
        counts[trial.number] += max(0, epochs - done)
        path.write_text(str(max(done, epochs)))
        add_seconds(trial.folder, max(0, epochs - done))
        accuracy = add_rung(trial.folder, epochs, {"correct": {"Avg": quality(trial)}, "counts": {"Avg": 100}})
        if rng and rng.random() < kill:
            raise Killed
        return accuracy
    return reach


def all_numbers(study: Study) -> list[int]:
    return sorted(trial.number for trial in study.trials())


# --- Taking, resuming, ending ---

def test_a_killed_workers_trial_is_resumed_and_the_budget_is_kept(storage, tmp_path):
    """The first worker is killed at each place where that matters, many times; a new one takes over each time."""
    rng, counts, kills = random.Random(0), Counter(), 0
    study = open_study(tmp_path, storage)
    while not study.all_ended():
        study = open_study(tmp_path, storage)  # another process would open it anew
        try:
            run_trial(study, study.take(), fake_reach(counts, rng, kill=0.3))
        except Killed:
            kills += 1
    records = read_records(tmp_path)
    assert kills >= 4 and list(records) == [f"{i:03d}" for i in range(6)] and all_numbers(study) == list(range(6))
    for trial in study.trials():
        record = records[f"{trial.number:03d}"]
        assert record["state"] == trial.state.name in ("COMPLETE", "PRUNED")
        # no epoch is lost or made twice
        last = record["rungs"][-1]["epoch"]
        assert counts[trial.number] == record["seconds"] == last == max(trial.intermediate_values)
        assert [rung["epoch"] for rung in record["rungs"]] == [epoch for epoch in (1, 3, 9) if epoch <= last]
    assert study.take() is None


def test_an_abandoned_trial_comes_before_a_new_one_and_is_the_same(tmp_path):
    study = open_study(tmp_path)
    with pytest.raises(Killed):
        run_trial(study, study.take(), lambda trial, epochs: (_ for _ in ()).throw(Killed()))
    busy = study.take()  # resumes 0
    assert (busy.number, busy.resumed) == (0, True) and busy.values == {"blr": 0.5, "dropout_prob": 0.1}
    other = open_study(tmp_path)
    second, third = other.take(), other.take()
    assert [(trial.number, trial.resumed) for trial in (second, third)] == [(1, False), (2, False)]
    assert second.values == {"blr": 0.25, "dropout_prob": 0.1}  # the second set that is tried first
    os.close(third.lock)  # killed
    again = study.take()
    assert (again.number, again.resumed, again.values) == (2, True, third.values)
    assert again.optuna.params == third.optuna.params


def test_a_worker_killed_while_it_asks_leaves_a_trial_that_is_completed(tmp_path, monkeypatch):
    """The worker is killed after the trial has its number, and after it has one of its two parameters."""
    for number, n_params in enumerate((0, 1)):
        study, locks = open_study(tmp_path), []
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(study_module, "claim", lambda path, locks=locks: locks.append(claim(path)) or locks[-1])
            patched.setattr(Space, "suggest", lambda self, trial, n=n_params: (
                [trial.suggest_float(name, 0.0, high) for name, high in (("blr", 1.0), ("dropout_prob", 0.9))[:n]],
                (_ for _ in ()).throw(Killed())))
            study.take()
        os.close(locks[-1])  # as the operating system does
        trial = open_study(tmp_path).take()
        assert (trial.number, trial.resumed, len(trial.values)) == (number, True, 2)
        run_trial(study, trial, fake_reach(Counter()))


def test_a_trial_killed_between_its_folder_and_the_storage_is_ended_again(tmp_path, monkeypatch):
    study = open_study(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(study.optuna, "tell", lambda *_: (_ for _ in ()).throw(Killed()))
        run_trial(study, study.take(), fake_reach(Counter()))
    assert read_records(tmp_path)["000"]["state"] == "COMPLETE"  # else its folder would stay RUNNING for ever
    counts = Counter()
    assert run_trial(study, study.take(), fake_reach(counts)) == (COMPLETE, "")
    assert counts[0] == 0 and study.trials()[0].state == COMPLETE and read_records(tmp_path)["000"]["seconds"] == 9


def test_a_trial_that_has_ended_in_the_storage_has_ended_in_its_folder(tmp_path, monkeypatch):
    """This holds also where the worker is killed right after it has told the storage: nobody would take the trial
    again."""
    study = open_study(tmp_path)
    tell = study.optuna.tell
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(study.optuna, "tell", lambda *args: (tell(*args), (_ for _ in ()).throw(Killed())))
        run_trial(study, study.take(), fake_reach(Counter()))
    assert study.trials()[0].state == COMPLETE and read_records(tmp_path)["000"]["state"] == "COMPLETE"


def test_workers_at_once_share_the_budget(storage, tmp_path):
    """Eight threads, each with a study of its own, ask for six trials; none is given twice."""
    open_study(tmp_path, storage)
    taken, barrier = [], threading.Barrier(8)

    def work():
        study = open_study(tmp_path, storage)
        barrier.wait()
        while (trial := study.take()) is not None:
            taken.append(trial.number)
            run_trial(study, trial, fake_reach(Counter()))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == list(range(6)) == all_numbers(open_study(tmp_path, storage))


def test_a_trial_that_ends_while_another_worker_looks_for_work_is_not_made_again(tmp_path, monkeypatch):
    study, other = open_study(tmp_path), open_study(tmp_path)
    held = [study.take()]

    def claim_late(path: Path) -> int | None:
        if held:
            run_trial(study, held.pop(), fake_reach(Counter()))
        return claim(path)
    monkeypatch.setattr(study_module, "claim", claim_late)
    assert other.take().number == 1 and [trial.number for trial in other.trials(COMPLETE)] == [0]


def test_a_failed_trial_is_told_with_its_line_and_the_study_goes_on(tmp_path):
    study = open_study(tmp_path)

    def fails(trial, epochs):
        raise UserError("training diverged")

    assert run_trial(study, study.take(), fails) == (FAIL, "training diverged")
    assert read_records(tmp_path)["000"]["message"] == "training diverged"
    assert study.take().number == 1 and study.trials(FAIL)[0].number == 0


def test_an_error_of_the_machine_fails_no_trial(tmp_path):
    """A full disk says nothing about the flags: the trial is left to be resumed, by whoever comes next."""
    study = open_study(tmp_path)

    def breaks(trial, epochs):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        run_trial(study, study.take(), breaks)
    assert read_records(tmp_path)["000"]["state"] == "RUNNING" and not study.trials(FAIL)
    again = study.take()
    assert (again.number, again.resumed) == (0, True)


def test_a_failed_trial_is_one_of_the_number_asked_for(tmp_path):
    study, numbers = open_study(tmp_path), []

    def fails(trial, epochs):
        raise UserError("training diverged")

    while (trial := study.take()) is not None:
        numbers.append(trial.number)
        run_trial(study, trial, fails if trial.number in (1, 4) else fake_reach(Counter()))
    assert numbers == list(range(6)) and study.all_ended()


# --- Pruning ---

def test_rungs_lie_within_the_full_schedule():
    assert rungs(20, "asha") == [2, 6, 20] and rungs(9, "median") == [1, 3, 9] and rungs(27, "asha") == [3, 9, 27]
    assert rungs(3, "asha") == [1, 3] and rungs(2, "asha") == [1, 2] and rungs(1, "asha") == [1]
    assert rungs(20, "none") == [20]


def test_no_rung_lies_within_a_warm_up_that_is_searched():
    assert rungs(20, "asha", 5) == [6, 20] and rungs(20, "asha", 6) == [20] and rungs(20, "median", 1.5) == [2, 6, 20]
    settings = {"space": {"parameters": {"blr": {"high": 9}, "warmup_epochs": {"high": 5}}}, "flags": {}}
    assert longest_warmup(settings) == 5
    settings["space"]["parameters"] = {"long": {"flag": "warmup_epochs", "choices": [1, 7]},
                                       "short": {"flag": "warmup_epochs", "high": "epochs"}}
    assert longest_warmup(settings) == 7
    assert longest_warmup({"space": {"parameters": {}}, "flags": {"warmup_epochs": 2.5}}) == 2.5


@pytest.mark.parametrize("name", ["lr_schedule", "shape"])
@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_trial_is_compared_to_those_of_its_schedule(pruner, name):
    """A schedule that rises late would end at the first rung beside the others."""
    import optuna
    study = optuna.create_study(direction="maximize", pruner=make_pruner(pruner, 6, parameters_of_schedule(
        {"space": {"parameters": {"blr": {}, name: {"flag": "lr_schedule"}}}})))
    pruned = {}
    for number in range(36):
        study.enqueue_trial({name: ("cosine", "cyclical")[number % 2]})  # a sampler would draw them at random
        trial = study.ask()
        schedule = trial.suggest_categorical(name, ["cosine", "cyclical"])
        trial.report(80 + number % 7 - 5 * (schedule == "cyclical"), 6)
        pruned.setdefault(schedule, []).append(trial.should_prune())
        study.tell(trial, 80.0)
    assert all(0.2 < np.mean(of_schedule[6:]) < 0.9 for of_schedule in pruned.values()) and len(pruned) == 2


def test_asha_promotes_a_third_and_only_the_best(tmp_path):
    study, counts = open_study(tmp_path, trials=24), Counter()
    while (trial := study.take()) is not None:
        run_trial(study, trial, fake_reach(counts))
    states = Counter(trial.state for trial in study.trials())
    assert states[COMPLETE] + states[PRUNED] == 24
    assert sum(counts.values()) < 0.5 * 24 * 9
    finished, pruned = ([abs(trial.params["blr"] - 0.25) for trial in study.trials(state)]
                        for state in (COMPLETE, PRUNED))
    assert 2 * len(finished) < len(pruned) and min(finished) < min(pruned)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_equal_trials_do_not_all_pass(tmp_path, pruner):
    study = open_study(tmp_path, trials=24, pruner=pruner)
    while (trial := study.take()) is not None:
        run_trial(study, trial, lambda trial, epochs: 40.0)
    assert len(study.trials(COMPLETE)) <= 10 and study.trials()[0].value == 40.0


def expected_lengths(pruner: str, scores: list[list[int]]) -> list[int]:
    """The number of rungs that each trial reaches by the rules alone, where they run one after another. scores: the
    scores of each trial after 1, 3 and 9 epochs; of equal ones the earlier counts as better.

    asha goes on with a trial that is among the best third of those that were scored after as many epochs, itself
    included, or the best of them (Li et al. 2020, arXiv 1810.05934). median ends one whose best score so far lies below
    the median of the finished trials after as many epochs, once there are five (Golovin et al. 2017).
    """
    curves: list[list[float]] = []
    for number, row in enumerate(scores):
        curve: list[float] = []
        for i, score in enumerate(row):
            curve.append(score - 1e-6 * number)
            others = [other[i] for other in curves if len(other) > i]
            finished = [other[i] for other in curves if len(other) == 3]
            if pruner == "asha" and sum(other > curve[i] for other in others) >= max(1, (len(others) + 1) // 3):
                break
            if pruner == "median" and len(finished) >= 5 and max(curve) < np.median(finished):
                break
        curves.append(curve)
    return [len(curve) for curve in curves]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_a_trial_ends_early_by_the_scores_of_those_that_came_as_far(tmp_path, pruner, seed):
    """Curves rise, fall, cross and meet."""
    rng, n = random.Random(seed), 18
    scores = [[rng.randrange(40, 60) for _ in range(3)] for _ in range(n)]
    study = open_study(tmp_path, trials=n, pruner=pruner)
    while (trial := study.take()) is not None:
        run_trial(study, trial, lambda trial, epochs: add_rung(trial.folder, epochs, {
            "correct": {"Avg": scores[trial.number][(1, 3, 9).index(epochs)]}, "counts": {"Avg": 100}}))
    expected = [row[:n] for row, n in zip(scores, expected_lengths(pruner, scores), strict=True)]
    records = list(read_records(tmp_path).values())
    assert [[rung["correct"] for rung in record["rungs"]] for record in records] == expected
    for trial, record, curve in zip(study.trials(), records, expected, strict=True):
        assert record["state"] == trial.state.name == ("COMPLETE" if len(curve) == 3 else "PRUNED")
        assert trial.state == PRUNED or trial.value == curve[-1]


def test_a_rung_is_met_once_in_a_schedule_of_any_length(tmp_path):
    """The first rung of 27 epochs is the third epoch: a trial is compared there once, and a third of them goes on."""
    scores = [random.Random(i).randrange(40, 60) for i in range(18)]
    study = open_study(tmp_path, trials=18, flags={"epochs": 27, "seed": 0})
    while (trial := study.take()) is not None:
        run_trial(study, trial, lambda trial, epochs: float(scores[trial.number]))
    assert [len(trial.intermediate_values) for trial in study.trials()] == expected_lengths(
        "asha", [[score] * 3 for score in scores])


def test_one_question_of_many_decides_between_trials(tmp_path):
    """Each trial is better than all before it by one question of 20,000, so that each one goes on."""
    study = open_study(tmp_path, trials=18)
    while (trial := study.take()) is not None:
        run_trial(study, trial, lambda trial, epochs: 50 + trial.number * 100 / 20_000)
    assert len(study.trials(COMPLETE)) == 18


def test_a_worse_last_score_counts_and_not_the_best_one(tmp_path):
    study = open_study(tmp_path, trials=1)
    run_trial(study, study.take(), lambda trial, epochs: {1: 70.0, 3: 80.0, 9: 60.0}[epochs])
    assert study.trials()[0].value == 60


def test_some_trials_are_drawn_whatever_the_scores_and_later_ones_by_them(tmp_path):
    """A quarter of 24 trials, after the two sets that are tried first; the others follow what has scored well."""
    drawn = {}
    for best in (0.0, 1.0):
        study = open_study(tmp_path / str(best), trials=24, pruner="none")
        for _ in range(16):
            trial = study.take()
            run_trial(study, trial, lambda trial, epochs, best=best: 90 - 80 * abs(trial.values["blr"] - best))
        drawn[best] = [trial.params["blr"] for trial in study.trials()]
    assert drawn[0.0][:8] == drawn[1.0][:8]
    low, high = drawn[0.0][8:], drawn[1.0][8:]
    assert not set(low) & set(high) and np.mean(low) < 0.4 < 0.6 < np.mean(high)


def test_a_trial_keeps_what_the_sampler_drew_for_the_importance_of_parameters(tmp_path):
    study = open_study(tmp_path)
    for _ in range(4):
        run_trial(study, study.take(), fake_reach(Counter()))
    for record in read_records(tmp_path).values():
        assert {name: stored["value"] for name, stored in record["params"].items()} == pytest.approx(
            record["values"], rel=1e-3)


def test_without_a_pruner_every_trial_finishes(tmp_path):
    study, counts = open_study(tmp_path, pruner="none"), Counter()
    while (trial := study.take()) is not None:
        run_trial(study, trial, fake_reach(counts))
    assert set(counts.values()) == {9} and len(study.trials(COMPLETE)) == 6


def test_a_study_of_one_worker_can_be_repeated(tmp_path):
    values = []
    for name in ("a", "b"):
        study = open_study(tmp_path / name, trials=12, pruner="none")
        while (trial := study.take()) is not None:
            run_trial(study, trial, fake_reach(Counter()))
        values.append([trial.params for trial in study.trials()])
    assert values[0] == values[1] and len({json.dumps(params) for params in values[0]}) == 12


# --- What the study is ---

@pytest.mark.parametrize("changes, words", [
    ({"trials": 7}, "--trials 7, not 6"), ({"pruner": "none"}, "--pruner none, not asha"),
    ({"flags": {"epochs": 9, "seed": 3}}, "train.py's --seed 3, not 0"),
    ({"space": {"parameters": {}, "enqueue": []}}, "other --space")])
def test_a_worker_with_other_settings_is_refused_by_what_differs(tmp_path, changes, words):
    open_study(tmp_path)
    assert f"{tmp_path} is a study of other settings ({words})" in error_message(open_study, tmp_path, None, **changes)
    assert open_study(tmp_path).n_trials == 6  # the same settings are no others
    settings = read_settings(tmp_path)
    assert set(Settings.__annotations__) <= settings.keys()


def test_the_effective_batch_of_an_earlier_version_is_read(tmp_path):
    """It stood in study.json with a blank in its name."""
    flags = {"epochs": 9, "seed": 0}
    open_study(tmp_path, flags={**flags, "effective batch": 32})
    assert open_study(tmp_path, flags={**flags, "effective_batch": 32}).n_trials == 6
    assert read_settings(tmp_path)["flags"]["effective_batch"] == 32
    message = error_message(open_study, tmp_path, None, flags={**flags, "effective_batch": 16})
    assert "train.py's effective batch (--batch_size x --accum_iter x processes) 16, not 32" in message


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("space", "flags", "identity")])
def test_each_setting_is_the_same_for_all_workers(tmp_path, name):
    """The steps of an epoch are one of these settings, and so is the number of questions that are trained on."""
    open_study(tmp_path)
    other = "median" if name == "pruner" else SETTINGS[name] + 1
    assert f"--{name} {other}, not {SETTINGS[name]}" in error_message(open_study, tmp_path, None, **{name: other})


def test_a_database_that_is_lost_in_the_middle_is_one_line(tmp_path):
    database = tmp_path / "lost.db"
    study = open_study(tmp_path, f"sqlite:///{database}")
    database.write_bytes(b"")
    with pytest.raises(UserError, match="--storage no longer answers .*: once it does, the same command goes on"), \
            storage_errors():
        study.take()


def test_a_study_stays_in_its_storage(tmp_path, postgres):
    open_study(tmp_path / "file")
    open_study(tmp_path / "database", postgres)
    assert "journal.log: leave --storage out" in error_message(open_study, tmp_path / "file", postgres)
    assert "a database: name it with --storage" in error_message(open_study, tmp_path / "database")
    assert "does not know the study" in error_message(open_study, tmp_path / "database",
                                                      f"sqlite:///{tmp_path}/other.db")
    open_study(tmp_path / "again" / "database", postgres)  # studies of one name do not meet
    assert len(open_study(tmp_path / "again" / "database", postgres).trials()) == 2
    for url in ("nonsense", "postgresql+psycopg://lavin@/none?host=/nowhere", "unknown://x"):
        assert "--storage cannot be used" in error_message(open_study, tmp_path / "new", url)


def test_a_study_killed_while_it_begins_is_begun_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(study_module, "write_json", lambda *_: (_ for _ in ()).throw(Killed()))
        open_study(tmp_path)
    assert len(open_study(tmp_path).trials()) == 2


# --- Locks ---

def test_a_command_that_outlives_its_worker_keeps_the_lock(start, tmp_path):
    """A command that a killed worker had started is not started again before it has ended."""
    script = (f"import time; from pathlib import Path; Path({str(tmp_path / 'up')!r}).touch()\n"
              f"while not Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.05)\n"
              "print('done')")
    worker = Child(lambda: run_command(start, ["script.py", script], tmp_path / "log", claim(tmp_path / "lock"), 60), 1,
                   2, {})
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
        assert worker.poll() is None
    worker.kill()
    worker.wait()
    assert claim(tmp_path / "lock") is None
    (tmp_path / "go").touch()
    with waiting_for(tmp_path / "lock"):  # it has ended
        assert claim(tmp_path / "lock") is None and (tmp_path / "log").read_text() == "done\n"
    os.close(claim(tmp_path / "lock"))
