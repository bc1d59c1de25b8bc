"""--report_to: runs in experiment trackers. The libraries themselves are asked where they are installed."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import eval as eval_command
import train
from killed import stop_after
from lavin.runtime import signals
from lavin.runtime.errors import UsageError
from tiny import ROOT
from tiny_runs import run_flags
from user_errors import error_message
from util import trackers
from util.runs import TRACKERS
from util.trackers import MLflow, show_figures


class Fake:
    """A tracker in memory. runs: place -> what it was told."""

    runs: dict = {}
    fails_at = None

    def __init__(self, folder, config, place, first_step):
        self.fail("begin")
        self.place = place or {"id": len(self.runs)}
        self.told = self.runs.setdefault(self.place["id"], {"name": folder.name, "config": dict(config), "log": [],
                                                            "summary": {}, "figures": [], "first": [], "failed": []})
        self.told["first"].append(first_step)

    def fail(self, where):
        if self.fails_at == where:
            raise ConnectionError(f"no network at {where}")

    def log(self, numbers, step):
        self.fail("log")
        self.told["log"].append((step, dict(numbers)))

    def summarize(self, numbers):
        self.fail("summarize")
        self.told["summary"].update(numbers)

    def show(self, figure):
        self.told["figures"].append(figure.name)

    def close(self, failed):
        self.fail("close")
        self.told["failed"].append(failed)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setitem(trackers.KNOWN, "wandb", Fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(Fake, "runs", {})
    monkeypatch.setattr(Fake, "fails_at", None)


def run(base, scienceqa, folder, *flags):
    flags = [*run_flags(base, scienceqa, folder), "--batch_size", "2", "--accum_iter", "1", "--epochs", "2",
             "--report_to", "wandb", *flags]
    train.main(train.get_args_parser().parse_args([*map(str, flags)]))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers_of(line):
    return {name: value for name, value in line.items() if name not in ("epoch", "step") and value is not None}


def test_every_logged_number_and_the_scores_are_in_one_run(base, scienceqa, tmp_path, monkeypatch):
    """The run was stopped, and went on in another process."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        stop_after(patched, 8)
        run(base, scienceqa, folder)
    run(base, scienceqa, folder)
    eval_command.main(eval_command.get_args_parser().parse_args(["--adapter_path", str(folder), "--device", "cpu"]))
    (told,) = Fake.runs.values()
    assert told["name"] == "run" and told["config"]["epochs"] == 2 and told["config"]["lr_schedule"] == "cosine"
    assert dict(told["log"]) == {6 * line["epoch"] + line["step"]: numbers_of(line) for line in lines(folder)}
    scores = json.loads((folder / "scores.json").read_text())
    assert told["summary"]["scores/Avg"] == scores["Avg"] and "scores/base" not in told["summary"]
    assert told["first"] == [0, 9, None]  # the scores are added by a process that makes no step again
    assert told["failed"] == [False, False]  # nothing said so of the process that was stopped, whose run went on
    assert json.loads((folder / TRACKERS).read_text()) == {"wandb": {"id": 0}}


def test_a_run_that_replaces_another_is_a_run_of_its_own(base, scienceqa, tmp_path):
    for seed in ("0", "1"):
        run(base, scienceqa, tmp_path / "run", "--seed", seed, "--overwrite")
    assert [told["config"]["seed"] for told in Fake.runs.values()] == [0, 1]
    assert json.loads((tmp_path / "run" / TRACKERS).read_text()) == {"wandb": {"id": 1}}


@pytest.mark.parametrize("where", ["begin", "log", "close"])
def test_a_tracker_that_fails_stops_nothing(base, scienceqa, tmp_path, monkeypatch, capsys, where):
    run(base, scienceqa, tmp_path / "plain", "--report_to", "")
    monkeypatch.setattr(Fake, "fails_at", where)
    run(base, scienceqa, tmp_path / "tracked")
    assert capsys.readouterr().out.count(f"warning: wandb is left out from now on (no network at {where})") == 1
    assert (tmp_path / "tracked" / "checkpoint-1.pth").is_file()
    plain, tracked = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "tracked"))
    assert tracked == plain


def test_a_run_that_fails_is_told_to_have_failed(base, scienceqa, tmp_path):
    assert "training diverged" in error_message(run, base, scienceqa, tmp_path / "run", "--lr", "1e30")
    (told,) = Fake.runs.values()
    assert told["failed"] == [True]


def test_figures(tmp_path):
    show_figures("wandb", tmp_path, [tmp_path / "overview.png", tmp_path / "curves.png"])
    assert [told["figures"] for told in Fake.runs.values()] == [["overview.png", "curves.png"]]


def test_names(base, scienceqa, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--report_to 'comet' is none of tensorboard, wandb, mlflow"):
        run(base, scienceqa, tmp_path / "run", "--report_to", "wandb,comet")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert "--report_to wandb: the package is not installed: pip install wandb" in error_message(
        run, base, scienceqa, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- The libraries ---

REAL = """
import sys, train, eval
train.main(train.get_args_parser().parse_args(sys.argv[1:]))
folder = sys.argv[sys.argv.index("--output_dir") + 1]
eval.main(eval.get_args_parser().parse_args(["--adapter_path", folder, "--device", "cpu"]))
"""


def run_for_real(base, scienceqa, folder, tracker, **environment):
    flags = [*run_flags(base, scienceqa, folder), "--epochs", "2", "--report_to", tracker]
    done = subprocess.run([sys.executable, "-c", REAL, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout, done.stdout


def test_tensorboard_shows_the_steps_once_and_the_scores(base, scienceqa, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "runs" / "a"
    run_for_real(base, scienceqa, folder, "tensorboard")
    shown = accumulators.EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [(point.step, point.value) for point in shown.Scalars("loss")]
    assert losses == [(3 * line["epoch"] + line["step"], pytest.approx(line["loss"])) for line in lines(folder)]
    scores = json.loads((folder / "scores.json").read_text())
    assert [point.value for point in shown.Scalars("scores/Avg")] == [pytest.approx(scores["Avg"])]


def test_mlflow_gets_only_names_that_it_takes():
    """MLflow says: "Names may only contain alphanumerics, underscores, dashes, periods, spaces, and slashes"."""
    tracker, names = MLflow.__new__(MLflow), []
    tracker.id, tracker.client = "1", SimpleNamespace(log_metric=lambda run, name, value: names.append(name))
    tracker.summarize(dict.fromkeys(("scores/G1-6", "scores/C# & C+", "scores/100 %: 植物", "scores/Land & sea"), 1.0))
    assert names[0] == "scores.G1-6" and all(re.fullmatch(r"[/\w.\- ]*", name) for name in names)


def test_mlflow_on_a_local_store(base, scienceqa, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri, folder = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "runs" / "a"
    run_for_real(base, scienceqa, folder, "mlflow", MLFLOW_TRACKING_URI=uri)
    client = mlflow.MlflowClient(uri)
    found, = client.search_runs([client.get_experiment_by_name("lavin").experiment_id])
    assert found.info.run_name == "a" and found.data.tags["group"] == "runs" and found.info.status == "FINISHED"
    losses = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")]
    assert losses == [(3 * line["epoch"] + line["step"], line["loss"]) for line in lines(folder)]
    assert found.data.metrics["scores.Avg"] == json.loads((folder / "scores.json").read_text())["Avg"]


def test_wandb_offline(base, scienceqa, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "runs" / "a"
    run_for_real(base, scienceqa, folder, "wandb", WANDB_MODE="offline")
    identity = json.loads((folder / TRACKERS).read_text())["wandb"]["id"]
    offline = sorted((folder / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(offline) == 2  # of training, and of the scores, under one id
    content = b"".join(path.read_bytes() for path in offline)
    assert b"grad_norm" in content and b"scores/Avg" in content
