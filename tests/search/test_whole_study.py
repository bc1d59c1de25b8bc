"""search.py as its user sees it, with commands that take no time: what they are given, what they cost, what remains."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("optuna")
import search
from lavin.runtime import signals
from lavin.runtime.errors import UserError, describe
from lavin.runtime.files import read_json, write_json
from simulated_commands import EPOCH_SECONDS, STOP_SECONDS, Machine
from user_errors import error_message
from util.search import command
from util.search.folder import all_records, begin_record, change_record, gpu_seconds, read_records

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:The reported value")
SPACE = {"parameters": {"lr": {"kind": "float", "low": 1e-3, "high": 3e-2, "log": True, "default": 1e-2},
                        "lr_schedule": {"kind": "categorical", "choices": ["cosine", "step"], "default": "cosine"}},
         "enqueue": [{}, {"lr_schedule": "step"}]}
POLL_SECONDS = 1.0  # after which a search looks at its commands at the latest


def quality(flags, epochs: int) -> float:
    """The smaller the rate, the better, a little worse with a larger seed; it rises with the epochs."""
    return 0.5 + 0.02 * epochs - 4 * flags.lr + 0.02 * (flags.lr_schedule == "step") - 0.002 * flags.seed


@pytest.fixture
def started(base, data, tmp_path, monkeypatch):
    """A function that starts `search.py` on a machine, with flags of its own and of train.py; it returns the study."""
    (tmp_path / "space.json").write_text(json.dumps(SPACE))

    def start(machine: Machine, *own: str, train: tuple[str, ...] = (), study: str = "S") -> Path:
        with monkeypatch.context() as patched:
            machine.install(patched)
            search.main(search.get_args_parser().parse_args([
                "--study", str(tmp_path / study), "--space", str(tmp_path / "space.json"), "--trials", "8",
                "--questions", "100", "--confirm", "2", "--seeds", "2", *own, "--", *base.flags,
                "--data_root", str(data), "--device", "cpu", "--batch_size", "4", "--epochs", "9",
                "--warmup_epochs", "1", "--max_seq_len", "160", *train]))
        return tmp_path / study
    return start


def states(study: Path) -> list[str]:
    return [record["state"] for record in read_records(study).values()]


def part_of(flags) -> str:
    """The part of the study's folder in which a command of train.py writes, or from which eval.py reads a
    checkpoint."""
    folder = Path(flags.output_dir if hasattr(flags, "epochs") else flags.adapter_path)
    return "confirm" if "confirm" in folder.parts else "trials"


# --- What is trained and scored ---

def test_trials_are_scored_on_the_questions_asked_for_and_fresh_runs_on_all_of_validation_and_last_on_test(started):
    machine = Machine(quality)
    study = started(machine)
    scored = machine.flags_of("eval")
    asked = [(part_of(flags), flags.split, flags.decode, flags.questions) for flags in scored]
    n_trials = sum(len(record["rungs"]) for record in read_records(study).values())
    assert asked == [("trials", "val", "score", 100)] * n_trials + [("confirm", "val", "score", None)] * 6 + [
        ("confirm", "test", "generate", None)] * 4
    winner = read_json(study / "verdict.json")["winner"]
    assert {Path(flags.output_dir).name for flags in scored[-4:]} == {
        f"{name}-seed{seed}" for name in ("000", winner) for seed in (1, 2)}


def test_the_best_are_confirmed_by_what_they_scored_at_the_end(started):
    study = started(Machine(quality))
    finished = {name: record["rungs"][-1]["correct"] for name, record in read_records(study).items()
                if record["state"] == "COMPLETE" and name != "000"}
    best = sorted(finished, key=lambda name: finished[name], reverse=True)[:2]
    confirmed = read_records(study, "confirm")
    assert len(best) == 2 and set(confirmed) == {f"{name}-seed{seed}" for name in ("000", *best) for seed in (1, 2)}
    for name, record in confirmed.items():  # the whole schedule, of the same flags
        assert record["values"] == read_records(study)[name[:3]]["values"]
        assert [rung["epoch"] for rung in record["rungs"]] == [9] and record["rungs"][0]["questions"] == 200


@pytest.mark.parametrize("seed", [0, 5])
def test_all_trials_train_with_the_seed_given_and_fresh_runs_with_those_after_it(started, seed):
    """The base has the same seeds: no configuration is compared to another one under other seeds."""
    machine = Machine(quality)
    study = started(machine, train=("--seed", str(seed)))
    trained = [(part_of(flags), flags.seed) for flags in machine.flags_of("train")]
    assert {used for part, used in trained if part == "trials"} == {seed}
    assert sorted(used for part, used in trained if part == "confirm") == [seed + 1] * 3 + [seed + 2] * 3
    by_configuration = {}
    for name, record in read_records(study, "confirm").items():
        by_configuration.setdefault(name[:3], set()).add(record["seed"])
        assert name.endswith(f"seed{record['seed']}")
    assert len(by_configuration) == 3 and set(map(frozenset, by_configuration.values())) == {
        frozenset({seed + 1, seed + 2})}


def test_a_late_worker_repeats_nothing_and_leaves_the_verdict_as_it_was_given(started):
    study = started(machine := Machine(quality))
    n_commands, given = len(machine.commands), {**read_json(study / "verdict.json"), "found": "as it was given"}
    write_json(study / "verdict.json", given)
    started(machine)
    assert len(machine.commands) == n_commands and read_json(study / "verdict.json") == given


def test_a_search_repeats_itself(started):
    first, second = (started(Machine(quality), study=name) for name in ("S", "T"))
    assert read_records(first) == read_records(second)
    assert read_json(first / "verdict.json") == read_json(second / "verdict.json")


def test_flags_that_are_given_hold_for_all_commands_and_are_not_searched(started):
    machine = Machine(quality)
    study = started(machine, train=("--lr_schedule", "step", "--weight_decay", "0.3", "--bits", "16bit"))
    for flags in machine.flags_of("train"):
        assert (flags.lr_schedule, flags.weight_decay, flags.epochs) == ("step", 0.3, 9)
    assert all(set(record["values"]) == {"lr"} for record in read_records(study).values())
    assert {flags.device for flags in machine.flags_of("eval")} == {"cpu"}


def test_each_trial_trains_with_the_flags_that_its_record_names(started):
    machine = Machine(quality)
    records = read_records(started(machine))
    for flags in machine.flags_of("train"):
        assert {"lr": flags.lr, "lr_schedule": flags.lr_schedule} == records[Path(flags.output_dir).name[:3]]["values"]


def test_a_trials_log_keeps_what_all_of_its_commands_said(started):
    study = started(machine := Machine(quality))
    said = [line for path in study.glob("*/*/search.log") for line in path.read_text().splitlines()]
    assert sorted(said) == sorted(f"{program} begins" for program, *_ in machine.commands)


def test_the_scores_are_those_of_the_checkpoints(started):
    """A rung has the score after as many epochs as it states, and not the best or the first score of its trial."""
    def falling(flags, epochs: int) -> float:
        return 0.9 - 0.02 * epochs - 4 * flags.lr

    for record in read_records(started(Machine(falling), "--confirm", "0")).values():
        for rung in record["rungs"]:
            assert rung["correct"] == pytest.approx(100 * falling(SimpleNamespace(**record["values"]), rung["epoch"]),
                                                    abs=1)


# --- Stops and failures ---

def outcome(study: Path) -> dict:
    """All that a study has found, without what it has cost."""
    records = {part: {name: {key: record[key] for key in ("state", "values", "rungs")}
                      for name, record in read_records(study, part).items()} for part in ("trials", "confirm")}
    return {**records, "verdict": read_json(study / "verdict.json")}


@pytest.mark.parametrize("every", [17.0, 61.0])
def test_a_study_that_is_stopped_again_and_again_ends_as_one_that_was_not(started, every):
    """The same trials with the same scores, and no epoch is made twice."""
    whole, stopped = Machine(quality), Machine(quality, stops=[every * i for i in range(1, 500)])
    expected, n_stops = outcome(started(whole, study="whole")), 0
    while True:
        try:
            study = started(stopped)
            break
        except signals.Stopped:
            n_stops += 1
    assert outcome(study) == expected and n_stops >= 5
    assert stopped.epochs_made == whole.epochs_made
    assert all(epochs == list(range(len(epochs))) for epochs in stopped.epochs_made.values())
    assert gpu_seconds(all_records(study)) == pytest.approx(stopped.gpu_seconds)


def test_trials_that_fail_are_of_the_number_asked_for_and_never_among_the_best(started):
    """The smallest rates would score best, but training with them fails."""
    machine = Machine(quality, fails=lambda flags: flags.lr < 6e-3)
    study = started(machine, "--trials", "12")
    records, found = read_records(study), states(study)
    assert len(found) == 12 and found.count("FAIL") >= 3 and "RUNNING" not in found
    for record in records.values():
        assert (record["state"] == "FAIL") == (record["values"]["lr"] < 6e-3)
        assert record.get("message") == ("the loss is not finite" if record["state"] == "FAIL" else None)
        assert record["state"] != "FAIL" or record["seconds"] == EPOCH_SECONDS  # the GPU was in use
    assert all(record["values"]["lr"] >= 6e-3 for record in read_records(study, "confirm").values())


def test_a_command_that_is_killed_is_begun_again_by_the_same_search_and_no_trial_is_lost(started):
    """Each time, the search ends with an error: what was killed for want of memory would be killed again."""
    whole, killed = Machine(quality), Machine(quality, kills=[95.0 * i for i in range(1, 500)])
    expected, n_kills = outcome(started(whole, study="whole")), 0
    while n_kills < 100:
        try:
            study = started(killed)
            break
        except UserError as error:
            assert "was killed (SIGKILL)" in str(error) and describe(error) and error.exit_status == 1
            n_kills += 1
    assert outcome(study) == expected and n_kills >= 5


def test_a_full_disk_ends_the_search_and_no_trial(started):
    machine = Machine(quality)
    machine.full = True
    message = error_message(started, machine)
    assert message.endswith("checkpoint-0.pth: No space left on device: free some space, and the same command goes on")
    assert len(machine.commands) == 1
    machine.full = False
    assert "FAIL" not in states(started(machine)) and len(states(started(machine))) == 8


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_there_are_as_many_trials_as_asked_for(started, trials):
    study = started(Machine(quality), "--trials", str(trials))
    assert states(study).count("COMPLETE") + states(study).count("PRUNED") == trials
    started(machine := Machine(quality), "--trials", str(trials))  # a late worker
    assert len(states(study)) == trials and not machine.commands


# --- GPU-hours ---

@pytest.mark.parametrize("gpus", [1, 2])
def test_gpu_hours_are_those_of_all_commands_on_all_of_their_gpus(started, gpus):
    machine = Machine(quality)
    study = started(machine, "--gpus", str(gpus))
    assert {n for _, _, n in machine.commands} == {gpus}
    assert gpu_seconds(all_records(study)) == pytest.approx(machine.gpu_seconds)
    assert {record["gpus"] for record in all_records(study)} == {gpus}


@pytest.mark.parametrize("limit, gpus", [(30.0, 1), (400.0, 2), (1100.0, 1)])  # the last one: in the fresh runs
def test_a_study_ends_when_its_gpu_hours_are_spent_and_goes_on_with_more(started, limit, gpus, capsys):
    machine = Machine(quality)
    own = ("--gpus", str(gpus), "--gpu_hours")
    study = started(machine, *own, str(limit / 3600))
    assert " are spent; the same command with more goes on" in capsys.readouterr().out
    assert not (study / "verdict.json").exists()
    assert limit <= machine.gpu_seconds <= limit + gpus * (POLL_SECONDS + STOP_SECONDS)
    assert gpu_seconds(all_records(study)) == pytest.approx(machine.gpu_seconds)
    n_commands = len(machine.commands)
    started(machine, *own, str(limit / 3600))
    assert len(machine.commands) == n_commands  # nothing is left to spend
    started(machine, *own, "9")
    assert (study / "verdict.json").exists()
    assert all(epochs == list(range(len(epochs))) for epochs in machine.epochs_made.values())
    assert states(study).count("COMPLETE") + states(study).count("PRUNED") == 8


def test_what_is_left_of_the_hours_is_shared_by_the_trials_that_run(tmp_path):
    """Trials use (600 + 200) x 2 of 7,200 GPU-seconds, and a fresh run 300 x 4: 4,400 are left for two trials on two
    GPUs each."""
    for name, state, seconds, gpus in (("trials/000", "COMPLETE", 600, 2), ("trials/001", "RUNNING", 200, 2),
                                       ("trials/002", "RUNNING", 0, 2), ("confirm/000-seed1", "COMPLETE", 300, 4)):
        begin_record(tmp_path / name, gpus, values={})
        change_record(tmp_path / name, state=state, seconds=seconds)
    args = SimpleNamespace(study=tmp_path, gpus=2, gpu_hours=2.0)
    assert command.seconds_left(args) == 4400 / 2 / 2
    args.gpu_hours = None
    assert command.seconds_left(args) == float("inf")


def test_a_clock_that_was_wrong_spends_no_hours(started):
    """A command was killed, and the date of its log lies 400 days ahead."""
    machine = Machine(quality, kills=[15.0])
    error_message(started, machine, "--gpu_hours", "100")
    log = Path(machine.commands[0][1].output_dir) / "search.log"
    now = time.time()
    change_record(log.parent, since=now)
    os.utime(log, (now + 400 * 86_400, now + 400 * 86_400))
    study = started(machine, "--gpu_hours", "100")
    assert (study / "verdict.json").exists()


def test_hours_that_a_wrong_clock_has_spent_are_named_with_the_way_out(started, capsys):
    """The clock was 400 days behind when the command began that was killed."""
    machine = Machine(quality, kills=[15.0])
    error_message(started, machine, "--gpu_hours", "100")
    log = Path(machine.commands[0][1].output_dir) / "search.log"
    change_record(log.parent, since=time.time() - 400 * 86_400)
    started(machine, "--gpu_hours", "100")
    assert (f"the hours on a CPU of --gpu_hours 100 are spent (9,600 of them by a command in {log.parent} that was "
            f"killed: if a clock was wrong, remove {log}); ") in capsys.readouterr().out
    log.unlink()
    assert (started(machine, "--gpu_hours", "100") / "verdict.json").exists()
    assert "were spent" not in capsys.readouterr().out


# --- Workers ---

OTHERS = [
    (("--trials", "9"), (), "--trials 9, not 8"), (("--questions", "99"), (), "--questions 99, not 100"),
    (("--confirm", "1"), (), "--confirm 1, not 2"), (("--seeds", "3"), (), "--seeds 3, not 2"),
    (("--pruner", "median"), (), "--pruner median, not asha"), ((), ("--seed", "3"), "train.py's --seed 3, not 0"),
    ((), ("--epochs", "10"), "train.py's --epochs 10, not 9"), ((), ("--lr", "0.01"), "other --space"),
    (("--gpus", "2"), (), "train.py's effective batch (--batch_size x --accum_iter x processes) 8, not 4"),
    ((), ("--loss_norm", "microbatch"), "train.py's --loss_norm microbatch, not batch")]


def test_a_worker_that_would_search_something_else_does_not_join(started):
    study = started(machine := Machine(quality), "--gpu_hours", "0.01")
    before, n_commands = read_records(study), len(machine.commands)
    for own, train, words in OTHERS:
        assert words in error_message(started, machine, *own, train=train)
    assert len(machine.commands) == n_commands and read_records(study) == before


def test_a_worker_with_other_micro_batches_does_not_join_where_the_loss_depends_on_them(started):
    published = ("--loss_norm", "microbatch")
    started(machine := Machine(quality), "--gpu_hours", "0.01", train=published)
    message = error_message(started, machine, train=(*published, "--batch_size", "2", "--accum_iter", "2"))
    assert "(train.py's --batch_size 2, not 4)" in message


def test_a_worker_with_more_gpus_joins_with_a_smaller_batch_on_each(started):
    study = started(machine := Machine(quality), "--gpu_hours", "0.1")
    started(machine, "--gpus", "2", train=("--batch_size", "2"))
    assert "RUNNING" not in states(study) and {record["gpus"] for record in read_records(study).values()} == {1, 2}
    assert gpu_seconds(all_records(study)) == pytest.approx(machine.gpu_seconds)
