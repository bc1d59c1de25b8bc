"""Reading, naming, grouping and comparing runs; the tables."""

import csv
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lavin.runtime.errors import UserError
from util.comparison.comparison import (
    PUBLISHED,
    Comparison,
    Difference,
    Method,
    compare,
    published,
    with_published,
)
from util.comparison.finished_runs import Run, flags_computed_with, read_metrics, read_run
from util.comparison.methods import method_name, named_methods
from util.comparison.statistics import contrast, newcombe, seed_variance, tango
from util.comparison.tables import csv_table, latex_table, markdown_table, text_table, verdicts
from util.evaluation.answers import Answer
from util.evaluation.scoring import COLUMNS
from util.training.recipe import TRAIN_FLAGS

FLAGS = {"llm_model": "toy", "lr_schedule": "cosine", "lr": 0.01, "blr": 0.08, "min_lr": 0.0, "epochs": 2,
         "warmup_epochs": 1, "dropout_prob": 0.1, "dropout_var": 1.0, "dropout_lim": 0.2, "batch_size": 8,
         "accum_iter": 4, "seed": 0}
CYCLICAL = {"lr_schedule": "cyclical", "min_lr": 5e-5}
STEP = {"lr_schedule": "step"}
INCREASING = {"dropout_var": 1.01}


def write_run(folder: Path, right="1111000011", split="test", losses=(1.0, 0.5), files=(), world_size=1,
              scored=None, **flags) -> str:
    """Write a finished run; returns its folder.

    `right` has one character per question: 1 if answered correctly, else 0. All questions are NAT, TXT and G1-6.
    `files` replaces the content of files; None omits a file. `scored`: what scores.json says that was scored, and how,
    which it does since later than the rest.
    """
    folder.mkdir(parents=True)
    predictions = {str(i): 0 if digit == "1" else 1 for i, digit in enumerate(right)}  # the right choice is 0
    n, k = len(right), right.count("1")
    counts = {column: n if column in ("NAT", "TXT", "G1-6", "Avg") else 0 for column in COLUMNS}
    correct = {column: k if counts[column] else 0 for column in COLUMNS}
    scores = {column: 100 * k / n if counts[column] else None for column in COLUMNS}
    generations = [{"qid": qid, "text": "", "prediction": prediction, "parsed": True, "answer": 0}
                   for qid, prediction in predictions.items()]
    log = [{"epoch": epoch, "train_lr": 0.1, "train_closs": loss} for epoch, loss in enumerate(losses)]
    flags = {**FLAGS, "output_dir": str(folder), **flags}
    content = {"config.json": {"flags": flags, "world_size": world_size, "n_layers": 4},
               "scores.json": {**scores, "counts": counts, "correct": correct, "split": split, "questions": n,
                               **(scored or {})},
               "preds.json": predictions, "generations.jsonl": generations, "log.txt": log, **dict(files)}
    for name, value in content.items():
        if value is None:
            continue
        lines = [line if isinstance(line, str) else json.dumps(line)
                 for line in (value if isinstance(value, list) else [value])]
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


# Published results


def test_published_table_has_the_published_digits():
    data = json.loads(PUBLISHED.read_text())
    rows = [line.split(" | ") for line in markdown_table(published()).splitlines()]
    assert [row[0] for row in rows[2:10]] == [f"| {method.name}" for method in named_methods()]
    for method, row in zip(data["methods"].values(), rows[2:10], strict=True):
        assert row[1:10] == [f"{method['scores'][column]:.2f}" for column in COLUMNS]
        assert row[10] == "4,241"
    assert rows[2][11:] == ["87.84 to 89.74", "–", "– |"]
    assert rows[3][11:] == ["85.04 to 87.12", "−2.71", "−4.12 to −1.30 |"]
    assert " | ".join(rows[10][:10]) == (
        "| questions | 2,252 | 889 | 1,100 | 2,046 | 2,017 | 1,435 | 2,724 | 1,517 | 4,241")
    assert "without predictions" in markdown_table(published())


def test_only_the_published_counts_give_the_published_percentages():
    data = json.loads(PUBLISHED.read_text())
    n = np.arange(1, 4242)
    possible = {}  # numbers of questions that give every method's percentage with a whole number of right answers
    for column in COLUMNS:
        percent = np.array([method["scores"][column] for method in data["methods"].values()])[:, None]
        matches = abs(np.round(100 * np.round(percent * n / 100) / n, 2) - percent) < 1e-6
        possible[column] = set(n[matches.all(0)].tolist())
    subjects = [(a, b, 4241 - a - b) for a in possible["NAT"] for b in possible["SOC"]
                if 4241 - a - b in possible["LAN"]]
    grades = [(a, 4241 - a) for a in possible["G1-6"] if 4241 - a in possible["G7-12"]]
    contexts = [(t, i, no) for t in possible["TXT"] for i in possible["IMG"] for no in possible["NO"]
                if max(t, i) + no <= 4241 <= t + i + no]
    assert (subjects, grades, contexts) == ([(2252, 889, 1100)], [(2724, 1517)], [(2046, 2017, 1435)])
    assert list(data["counts"].values()) == [2252, 889, 1100, 2046, 2017, 1435, 2724, 1517, 4241]


def test_published_correct_answers_add_up():
    for method in published().methods:
        correct = method.runs[0].correct
        assert correct["NAT"] + correct["SOC"] + correct["LAN"] == correct["G1-6"] + correct["G7-12"] == correct["Avg"]


def test_published_names_follow_from_the_flags():
    methods = published().methods
    assert [method_name(method.flags, methods[0].flags) for method in methods] == [method.name for method in methods]


def test_published_table_in_assets_is_current():
    assert (PUBLISHED.parent / "published_table.md").read_text() == markdown_table(published())


# Runs


def test_read_run(tmp_path):
    log = [{"epoch": 0, "train_closs": 2.0}, {"epoch": 1, "train_closs": 1.5}, {"epoch": 1, "train_closs": None},
           {"epoch": 0, "train_closs": 1.0}]
    run = read_run(Path(write_run(tmp_path / "a", "110", files={"log.txt": log}, world_size=2)))
    assert run.losses[0] == 1.0 and np.isnan(run.losses[1])
    assert (run.counts["Avg"], run.correct["Avg"], run.counts["IMG"]) == (3, 2, 0)
    assert run.answers == [Answer("0", 0, 0), Answer("1", 0, 0), Answer("2", 1, 0)] and run.predictions == {}
    assert (run.flags["effective_batch"], run.n_layers) == (64, 4)


METRICS_LINE = {"epoch": 0, "step": 10, "loss": 1.5}
SCORES = {**dict.fromkeys(COLUMNS, 50.0), "counts": dict.fromkeys(COLUMNS, 10),
          "correct": dict.fromkeys(COLUMNS, 5), "split": "test"}
BROKEN = {
    "unfinished, 1 of 2 epochs": {"log.txt": [{"epoch": 1, "train_closs": 1.0}]},
    "unfinished, 0 of 2 epochs": {"log.txt": []},
    "log.txt is missing: if the run is unfinished, train.py --resume ": {"log.txt": None},
    "log.txt, line 1: train_closs: is missing": {"log.txt": [{"epoch": 1}]},
    "scores.json (No such file or directory): run eval.py": {"scores.json": None},
    "preds.json (No such file or directory): run eval.py": {"preds.json": None, "generations.jsonl": None},
    "preds.json is not valid JSON": {"preds.json": ['{"0": 1, '], "generations.jsonl": None},
    "preds.json: should be a valid dictionary, not 7": {"preds.json": ["7"], "generations.jsonl": None},
    "scores.json: counts: is missing": {"scores.json": {"Avg": 50}},
    "scores.json: correct: lacks G7-12": {"scores.json": {**SCORES, "correct": dict.fromkeys(list(COLUMNS)[:-2], 5)}},
    "Avg 70.0 is not 5 of 10": {"scores.json": {**SCORES, "Avg": 70.0}},
    "IMG None is not 5 of 10": {"scores.json": {**SCORES, "IMG": None}},
    "10 questions, 3 in preds.json": {"preds.json": {"0": 0, "1": 0, "2": 0}, "scores.json": SCORES,
                                      "generations.jsonl": None},
    "does not count the answers of generations.jsonl": {"scores.json": SCORES},
    "10 questions, 1 in generations.jsonl": {"generations.jsonl": [{"qid": "0", "prediction": 1, "answer": 0}]},
    "10 questions, 0 in generations.jsonl": {"generations.jsonl": []},
    "10 questions, 0 in preds.json": {"generations.jsonl": None, "preds.json": {}},
    "generations.jsonl answers question 0 twice": {
        "generations.jsonl": [{"qid": str(max(0, i - 1)), "prediction": 0, "answer": 0} for i in range(10)]},
    "generations.jsonl, line 1: qid: is missing": {"generations.jsonl": [{"prediction": 1, "answer": 0}]},
    "metrics.jsonl, line 1: loss: should be a valid number, not 'x'": {
        "metrics.jsonl": [{"epoch": 0, "step": 1, "loss": "x"}]},
    "metrics.jsonl, line 1 is not valid JSON": {"metrics.jsonl": ['{"epoch": 0, "st', METRICS_LINE]},
    "config.json (No such file or directory): train.py writes it": {"config.json": None},
    "config.json: flags: is missing": {"config.json": {}},
    "config.json: flags.epochs: should be a valid integer, not '2'": {
        "config.json": {"flags": {**FLAGS, "epochs": "2"}, "world_size": 1}},
    "config.json: flags.epochs: should be a valid integer, not 2.5": {
        "config.json": {"flags": {**FLAGS, "epochs": 2.5}, "world_size": 1}},
    "config.json: n_layers: should be greater than or equal to 1, not 0": {
        "config.json": {"flags": FLAGS, "world_size": 1, "n_layers": 0}},
    "config.json: flags.lr_schedule: should be 'cosine', 'cyclical', 'step' or 'exponential', not 'linear'": {
        "config.json": {"flags": {**FLAGS, "lr_schedule": "linear"}, "world_size": 1}},
    "config.json: --warmup_epochs 2.0 must lie at or above 0, and below --epochs 2": {
        "config.json": {"flags": {**FLAGS, "warmup_epochs": 2}, "world_size": 1}},
    "dropout_lim 0.05": {"config.json": {"flags": {**FLAGS, "dropout_var": 1.1, "dropout_lim": 0.05}, "world_size": 1}},
}


@pytest.mark.parametrize("reason, files", BROKEN.items())
def test_broken_runs_are_named_and_excluded(tmp_path, reason, files):
    bad = write_run(tmp_path / "bad", files=files)
    with pytest.raises(UserError) as error:
        compare([bad])
    assert reason in str(error.value) and "bad" in str(error.value) and "\n" not in str(error.value)
    comparison = compare([write_run(tmp_path / "good"), bad])
    assert [run.folder for method in comparison.methods for run in method.runs] == [str(tmp_path / "good")]
    assert len(comparison.excluded) == 1 and reason in comparison.excluded[0]
    assert f"Excluded: {bad}: " in text_table(comparison)


@pytest.mark.parametrize("name", flags_computed_with())
def test_flags_that_are_missing_or_out_of_range_are_named(tmp_path, name):
    for value, reason in ((-1, f"flags.{name}: should be "), (None, f"flags.{name}: is missing")):
        flags = {flag: value if flag == name else kept for flag, kept in FLAGS.items() if value or flag != name}
        folder = write_run(tmp_path / str(value), files={"config.json": {"flags": flags, "world_size": 1}})
        with pytest.raises(UserError, match=re.escape(reason)):
            read_run(Path(folder))


def test_the_answers_count_and_not_the_predictions_that_were_written_of_them(tmp_path):
    for name, predictions in (("gone", None), ("others", dict.fromkeys(map(str, range(10)), 3))):
        run = read_run(Path(write_run(tmp_path / name, files={"preds.json": predictions})))
        assert sum(answer.correct for answer in run.answers) == run.correct["Avg"] == 6


def test_scores_that_were_raised_are_refused(tmp_path):
    """This holds also where all percentages are those of their counts."""
    folder = Path(write_run(tmp_path / "run"))
    scores = json.loads((folder / "scores.json").read_text())
    columns = [column for column, n in scores["counts"].items() if n]
    raised = {**scores, **dict.fromkeys(columns, 70.0), "correct": {**scores["correct"], **dict.fromkeys(columns, 7)}}
    read_run(folder)
    (folder / "scores.json").write_text(json.dumps(raised))
    with pytest.raises(UserError, match="scores.json does not count the answers of generations.jsonl"):
        read_run(folder)


CHECKPOINT = b"the adapters after the second epoch"
OWN = {"checkpoint": "checkpoint-1.pth", "checkpoint_sha256": hashlib.sha256(CHECKPOINT).hexdigest(),
       "prompt_format": "QCM-ALE", "decode": "generate", "precision": "bf16", "bits": "16bit", "data": "0123456789",
       "pictures": "abcd"}
STRANGE = {
    "its scores are of checkpoint-0.pth, not of checkpoint-1.pth": {"checkpoint": "checkpoint-0.pth"},
    "its scores are of the untuned base, not of": {"checkpoint": None, "checkpoint_sha256": None},
    "its scores are of another checkpoint-1.pth than the one there": {"checkpoint_sha256": 64 * "0"},
    "scored with --prompt_format QCM-LEA, trained with QCM-ALE": {"prompt_format": "QCM-LEA"},
    "scored with --bits 4bit, trained with 16bit": {"bits": "4bit"},
    "scored with --decode score, not generate": {"decode": "score"},
    "scored with --precision fp32, not bf16 or fp16": {"precision": "fp32"},
    "scored with data of checksum 9876543210, not 0123456789": {"data": "9876543210"},
    "scored with pictures of checksum fedc, not abcd": {"pictures": "fedc"},
}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("reason, scored", STRANGE.items())
def test_scores_of_something_else_are_excluded(tmp_path, reason, scored, with_base):
    trained = {"prompt_format": "QCM-ALE", "bits": "16bit"}
    for name, flags in (("a", STEP), ("b", {} if with_base else INCREASING), ("c", CYCLICAL)):
        write_run(tmp_path / name, scored={**OWN, **(scored if name == "a" else {})}, **trained, **flags)
        (tmp_path / name / "checkpoint-1.pth").write_bytes(CHECKPOINT)
    comparison = compare([str(tmp_path)])
    assert len(comparison.methods) == 2 and not comparison.notes
    (line,) = comparison.excluded
    assert line.startswith(f"{tmp_path / 'a'}: {reason}")


INPUTS = {"data": "d", "pictures": "p", "base": "b", "base_sha256": "c", "vision": "v", "vision_sha256": "w",
          "lr": 0.01}


@pytest.mark.parametrize("changes, words", [
    ({"pictures": "x"}, "other pictures of --data_root"), ({"base_sha256": "x"}, "other files of --llm_model"),
    ({"base": "x", "base_sha256": "x"}, "other files of --llm_model"),
    ({"vision": "x"}, "other files of --vision_model"),
    ({"data": "x", "pictures": "x"}, "other training data of --data_root, other pictures of --data_root"),
    ({"lr": 0.5}, None), ({"vision_sha256": None}, None)])
def test_runs_that_were_trained_on_something_else_are_told(tmp_path, changes, words):
    """An entry that earlier versions did not record is compared where both runs have it."""
    for name, recipe, flags in (("a", INPUTS, {}), ("b", {**INPUTS, **changes}, STEP),
                                ("c", {"data": "d", "base": "b", "vision": "v"}, CYCLICAL), ("d", {}, INCREASING)):
        write_run(tmp_path / name, scored=OWN, **flags)
        if recipe:
            (tmp_path / name / "recipe.json").write_text(json.dumps({"recipe": recipe, "flags": {}}))
    comparison = compare([str(tmp_path)])
    assert not comparison.excluded and len(comparison.methods) == 4
    assert comparison.notes == ([f"{tmp_path / 'b'}: was trained on {words} than {tmp_path / 'a'}"] if words else [])


@pytest.mark.parametrize("scored, words", [
    ({}, None), ({"base": "b", "base_sha256": "c", "vision": "v"}, None), ({"vision_sha256": None}, None),
    ({"base": "x"}, "other files of --llm_model"), ({"base": "b", "base_sha256": "x"}, "other files of --llm_model"),
    ({"vision": "x"}, "other files of --vision_model")])
def test_a_run_that_was_scored_on_another_base_than_it_was_trained_on_is_told(tmp_path, scored, words):
    """eval.py warns of it once; the base may only be stored in another format, so that the run is compared."""
    for name, more, flags in (("a", {}, {}), ("b", scored, STEP)):
        write_run(tmp_path / name, scored={**OWN, **more}, **flags)
        (tmp_path / name / "recipe.json").write_text(json.dumps({"recipe": INPUTS, "flags": {}}))
    comparison = compare([str(tmp_path)])
    assert not comparison.excluded and len(comparison.methods) == 2
    assert comparison.notes == ([f"{tmp_path / 'b'}: was scored on {words} than it was trained on"] if words else [])


def test_captions_make_other_data_of_a_method(tmp_path):
    write_run(tmp_path / "a", scored=OWN, use_caption=False)
    write_run(tmp_path / "b", scored=OWN, use_caption=True)
    for name in "ab":
        (tmp_path / name / "recipe.json").write_text(json.dumps({"recipe": {"data": name}}))
    assert not compare([str(tmp_path)], str(tmp_path / "a")).notes


def test_scores_that_belong_together_though_they_differ(tmp_path):
    """bf16 and fp16; a method trained, and so scored, with captions; old runs; a run without its checkpoint."""
    write_run(tmp_path / "a", scored={**OWN, "checkpoint_sha256": 64 * "0"}, use_caption=False)
    write_run(tmp_path / "b", scored={**OWN, "precision": "fp16"}, **STEP)
    write_run(tmp_path / "c", scored={**OWN, "data": "9876543210"}, use_caption=True)
    write_run(tmp_path / "d", **INCREASING)
    write_run(tmp_path / "e", **CYCLICAL)
    comparison = compare([str(tmp_path)], str(tmp_path / "a"))
    assert len(comparison.methods) == 5 and not comparison.excluded
    (note,) = comparison.notes
    assert note.startswith(f"{tmp_path / 'e'}, {tmp_path / 'd'}: scored by an earlier version")
    assert f"Note: {note}." in text_table(comparison).splitlines()


def test_scores_that_were_copied_from_another_method_are_excluded(tmp_path):
    """The checkpoints are not there, as in an archive, so that only the adapters' settings tell the runs apart."""
    for name, flags in (("a", {}), ("b", INCREASING)):
        adapter = {flag: {**FLAGS, **flags}[flag] for flag in ("dropout_prob", "dropout_var", "dropout_lim")}
        write_run(tmp_path / name, scored={**OWN, "adapter": {**adapter, "adapter_dim": 8}}, **flags)
    assert len(compare([str(tmp_path)]).methods) == 2
    (tmp_path / "b" / "scores.json").write_bytes((tmp_path / "a" / "scores.json").read_bytes())
    comparison = compare([str(tmp_path)])
    assert len(comparison.methods) == 1 and not comparison.notes
    (line,) = comparison.excluded
    assert line.startswith(f"{tmp_path / 'b'}: its scores are of adapters with --dropout_var 1.0, and it was trained "
                           "with 1.01: run eval.py")


@pytest.mark.parametrize("unparsed, noted", [(0, False), (2, False), (3, True), (200, True)])
def test_answers_that_name_no_option_are_noted(unparsed, noted, tmp_path):
    lines = [{"qid": str(i), "text": "", "prediction": 0, "parsed": i >= unparsed, "answer": 0} for i in range(200)]
    write_run(tmp_path / "a", "1" * 200, scored=OWN, files={"generations.jsonl": lines})
    comparison = compare([str(tmp_path)])
    note = f"{tmp_path / 'a'}: {unparsed} of 200 answers named no option, so that the most likely one counts"
    assert [line.partition(":")[0] for line in comparison.notes] == [str(tmp_path / "a")] * noted
    assert (note in text_table(comparison)) == noted


def test_scores_without_written_answers_are_noted(tmp_path):
    write_run(tmp_path / "a", scored={**OWN, "decode": "score"})
    assert compare([str(tmp_path)]).notes == [
        f"{tmp_path / 'a'}: scored with --decode score, which compares the options' letters: answers written out may "
        "differ"]


@pytest.mark.parametrize("name", ["skipped_steps", "steps_left_out"])  # the second is that of earlier versions
def test_skipped_steps_are_noted(tmp_path, name):
    log = [{"epoch": 0, "train_closs": 1.0, name: 2}, {"epoch": 1, "train_closs": 1.0, name: 1}]
    metrics = [{"epoch": 0, "step": 1000, "loss": 1.0}, {"epoch": 0, "step": 1100, "loss": None}]
    write_run(tmp_path / "a", files={"log.txt": log, "metrics.jsonl": metrics}, scored=OWN)
    write_run(tmp_path / "b", files={"log.txt": log}, scored=OWN, **STEP)
    first, second = compare([str(tmp_path)]).notes
    assert first.startswith(f"{tmp_path / 'a'}: 3 steps of 2,200 skipped for gradients that were not finite")
    assert second.startswith(f"{tmp_path / 'b'}: 3 steps skipped for gradients")


def test_metrics_become_losses_by_epoch_without_a_torn_line(tmp_path):
    lines = [{"epoch": epoch, "step": step, "loss": loss}
             for epoch, step, loss in [(1, 2, 0.5), (0, 2, 9.0), (0, 4, 2.0), (0, 2, 3.0), (1, 4, None)]]
    lines.append('{"epoch": 1, "step": 4, "lo')
    run = read_run(Path(write_run(tmp_path / "a", files={"metrics.jsonl": lines})))
    assert run.step_losses == [(0.5, 3.0), (1.0, 2.0), (1.5, 0.5)]


def test_lines_of_metrics_are_read_one_at_a_time(tmp_path, monkeypatch):
    """A long run has a million, which would fill the memory."""
    write_run(tmp_path / "a", files={"metrics.jsonl": [METRICS_LINE] * 9 + [{**METRICS_LINE, "step": 20}]})
    events = []

    def parse(text):
        events.append("parse")
        return json.loads(text)

    def check(line, *_):
        events.append("check")
        return line
    monkeypatch.setattr("lavin.runtime.files.parse_json", parse)
    monkeypatch.setattr("util.comparison.finished_runs.validate", check)
    assert read_metrics(tmp_path / "a" / "metrics.jsonl") == {(0, 10): 1.5, (0, 20): 1.5}
    assert events == ["parse", "check"] * 10


def test_flags_of_execution_do_not_make_a_method():
    changes = {"overwrite": True, "save_every_minutes": 3.0, "keep_last": 2, "model_parallel_size": 2, "num_workers": 9}
    reference = {**FLAGS, "overwrite": False, "save_every_minutes": 10.0, "keep_last": None, "model_parallel_size": 1,
                 "num_workers": 4}
    assert method_name({**reference, **changes}, reference) == "Base"
    assert method_name({**FLAGS, "llm_model": "13B"}, FLAGS) == "Base + llm_model 13B"


def test_a_schedule_without_a_display_name_has_its_own():
    assert method_name({**FLAGS, "lr_schedule": "polynomial"}, FLAGS) == "polynomial"


def test_runs_on_different_questions_are_excluded(tmp_path):
    write_run(tmp_path / "val", split="val", **STEP)
    write_run(tmp_path / "short", "110", **STEP)
    other = {"generations.jsonl": [{"qid": str(i), "prediction": 1, "answer": 1} for i in range(10)],
             "preds.json": {str(i): 1 for i in range(10)},
             "scores.json": {**SCORES, **dict.fromkeys(COLUMNS, 100.0), "correct": dict.fromkeys(COLUMNS, 10)}}
    write_run(tmp_path / "answers", files=other, **STEP)
    write_run(tmp_path / "zbase")
    comparison = compare([str(tmp_path)])
    assert [method.name for method in comparison.methods] == ["Base"]
    reasons = "\n".join(sorted(comparison.excluded))
    assert "answers: its questions have other right answers" in reasons
    assert "short: its 3 questions and the others' 10 differ" in reasons
    assert "val: of split val, not test" in reasons


def test_without_a_base_the_majority_decides_which_questions(tmp_path):
    write_run(tmp_path / "a", "110", **STEP)
    write_run(tmp_path / "b", **STEP)
    write_run(tmp_path / "c", **INCREASING)
    comparison = compare([str(tmp_path)])
    assert [method.name for method in comparison.methods] == ["Step Decay", "Inc. Drop. Prob"]
    assert comparison.differences == {} and "choose one with --base" in text_table(comparison)


def test_each_folder_is_read_once(tmp_path):
    write_run(tmp_path / "runs" / "b", **STEP)
    a = write_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "plots").mkdir()
    comparison = compare([a, str(tmp_path / "runs"), str(tmp_path / "runs" / ".." / "runs" / "a")])
    assert [method.name for method in comparison.methods] == ["Base", "Step Decay"] and not comparison.excluded
    for path, reason in ((tmp_path / "none", "no folder"), (tmp_path / "runs" / "plots", "holds no run")):
        with pytest.raises(UserError, match=reason):
            compare([str(path)])


# Names, seeds, the base


@pytest.mark.parametrize("flags, name", [
    ({}, "Base"), (CYCLICAL, "Cyclical LR"), (STEP, "Step Decay"), ({"lr_schedule": "exponential"}, "Exp. Decay"),
    (INCREASING, "Inc. Drop. Prob"),
    ({"dropout_prob": 0.2, "dropout_var": 0.97, "dropout_lim": 0.1}, "Dec. Drop. Prob V2"),
    ({**CYCLICAL, **INCREASING}, "Cyclical LR + Inc. Drop. Prob"),
    ({**CYCLICAL, "min_lr": 0.0}, "Cyclical LR + min_lr 0"),
    ({"min_lr": 1e-6}, "Base + min_lr 1e-06"), ({**STEP, "min_lr": 1e-6}, "Step Decay"),
    ({"dropout_var": 1.02, "dropout_lim": 0.3}, "Inc. Drop. Prob 0.1 x 1.02 to 0.3"),
    ({"dropout_prob": 0.3, "dropout_var": 0.9, "dropout_lim": 0.0}, "Dec. Drop. Prob 0.3 x 0.9 to 0"),
    ({"dropout_prob": 0.2}, "dropout 0.2"), ({"dropout_lim": 0.7}, "Base"),
    ({"lr": 0.002, "blr": 0.3, "batch_size": 4, "effective_batch": 16, "warmup_epochs": 0},
     "Base + lr 0.002 + warmup_epochs 0 + effective_batch 16"),
    ({**CYCLICAL, "warmup_epochs": 0}, "Cyclical LR"), ({"seed": 7, "device": "cuda", "output_dir": "x"}, "Base"),
])
def test_method_names_list_the_differing_flags(flags, name):
    reference = {**FLAGS, "effective_batch": 32}
    assert method_name({**reference, **flags}, reference) == name


def test_seeds_are_averaged_with_a_standard_deviation(tmp_path):
    write_run(tmp_path / "s0", "1111111100", **STEP)
    write_run(tmp_path / "s1", "1111111000", seed=1, **STEP)
    write_run(tmp_path / "s2", "1111110000", seed=2, batch_size=4, accum_iter=4, world_size=2, **STEP)
    write_run(tmp_path / "s2again", "1111110000", seed=2, **STEP)
    write_run(tmp_path / "base", "1111100000")
    comparison = compare([str(tmp_path)])
    base, step = comparison.methods
    assert [run.flags["seed"] for run in step.runs] == [0, 1, 2]
    assert "s2again: has the flags and the seed of" in comparison.excluded[0]
    assert step.accuracy("Avg") == pytest.approx(70) and step.deviation("Avg") == pytest.approx(10)
    assert step.accuracy("IMG") is None and step.deviation("IMG") is None and base.deviation("Avg") is None
    assert "70.00 ± 10.00" in text_table(comparison) and "seeds" in text_table(comparison).splitlines()[0]


def test_runs_with_other_micro_batches_are_seeds_of_one_method_only_where_the_loss_does_not_depend_on_them(tmp_path):
    two, four = {"batch_size": 2, "accum_iter": 16}, {"batch_size": 4, "accum_iter": 8}
    for loss_norm, names in (("batch", ["Base"]), ("microbatch", ["Base", "Base + micro_batch 4"])):
        write_run(tmp_path / loss_norm / "two", loss_norm=loss_norm, **two)
        write_run(tmp_path / loss_norm / "four", seed=1, loss_norm=loss_norm, **four)
        comparison = compare([str(tmp_path / loss_norm)], str(tmp_path / loss_norm / "two"))
        assert [method.name for method in comparison.methods] == names


def test_differences_are_paired_by_question(tmp_path):
    base, step, inc = "1111100000", "1111111111", "0111110000"
    for name, right, flags in (("base", base, {}), ("step", step, STEP), ("inc", inc, INCREASING)):
        write_run(tmp_path / name, right, **flags)
    comparison = compare([str(tmp_path)])
    assert [method.name for method in comparison.methods] == ["Base", "Step Decay", "Inc. Drop. Prob"]
    assert list(comparison.differences) == ["Step Decay", "Inc. Drop. Prob"]
    to_step, to_inc = comparison.differences.values()
    assert to_step.points == pytest.approx(50) and to_inc.points == 0
    assert (to_step.p, to_step.holm) == (2 / 2**5, 2 * 2 / 2**5)  # discordant questions: 0 and 5
    assert (to_inc.p, to_inc.holm) == (1, 1)  # discordant questions: 1 and 1
    expected = tango(*(np.array([int(digit) for digit in right]) for right in (step, base)))
    assert (to_step.low, to_step.high) == pytest.approx([100 * end for end in expected])
    assert not to_step.is_of_methods and "one run against another" in text_table(comparison)
    assert "they do not tell whether one method is better" in text_table(comparison) and verdicts(comparison) == []


@pytest.mark.parametrize("turned", ["generations.jsonl", "preds.json"])
def test_questions_are_matched_by_their_id_whatever_their_order_in_the_files(turned, tmp_path):
    for order in ("the same", "turned round"):
        write_run(tmp_path / order / "base", "1111100000")
        write_run(tmp_path / order / "step", "1111000111", **STEP)
        if turned == "preds.json":  # all that is left of the answers
            (tmp_path / order / "step" / "generations.jsonl").unlink()
    path = tmp_path / "turned round" / "step" / turned
    if turned == "preds.json":
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    else:
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    straight, other = (compare([str(tmp_path / order)]).differences for order in ("the same", "turned round"))
    assert straight == other and straight["Step Decay"].p == 10 / 2**4  # of four questions, one or three are lost


def test_several_seeds_compare_methods_by_one_estimate(tmp_path):
    rights = {"base": ("1111100000", "1111000000", "1111110000"), "step": ("1111111100", "1101111000"),
              "inc": ("1111110011", "1011110011")}
    for name, flags in (("base", {}), ("step", STEP), ("inc", INCREASING)):
        for seed, right in enumerate(rights[name]):
            write_run(tmp_path / f"{name}{seed}", right, seed=seed, **flags)
    comparison = compare([str(tmp_path)])
    rows = [np.array([[int(digit) for digit in right] for right in rights[name]]) for name in ("base", "step", "inc")]
    assert list(comparison.differences) == ["Step Decay", "Inc. Drop. Prob"]
    for difference, method in zip(comparison.differences.values(), rows[1:], strict=True):
        estimate = contrast([rows[0], method], (-1, 1), None, seed_variance(rows))  # the seeds of all methods
        assert difference.is_of_methods
        assert (difference.low, difference.high) == pytest.approx([100 * end for end in estimate.interval()])
        assert difference.p == estimate.p and difference.detectable == 100 * estimate.detectable(2)
        assert difference.points == pytest.approx(100 * (method.mean() - rows[0].mean()))
    assert max(d.holm for d in comparison.differences.values()) == pytest.approx(
        min(1, max(2 * min(d.p for d in comparison.differences.values()),
                   max(d.p for d in comparison.differences.values()))))
    text = text_table(comparison)
    assert "count questions and seeds as samples" in text
    assert "one run against another" not in text and "One seed:" not in text


@pytest.mark.parametrize("seeds, tested", [({"base": 1, "step": 3, "inc": 2}, []),
                                           ({"base": 2, "step": 1, "inc": 1}, []),
                                           ({"base": 2, "step": 1, "inc": 2}, ["Inc. Drop. Prob"])])
def test_a_method_with_one_seed_is_not_tested_where_others_have_several(seeds, tested, tmp_path):
    """The seeds of the base hardly differ, by luck: a variance taken from them would make any difference significant.
    """
    rights = {"base": ("1" * 20 + "0" * 20,) * 2, "step": ("1" * 40,) * 3, "inc": ("1" * 40, "1" * 39 + "0")}
    for name, flags in (("base", {}), ("step", STEP), ("inc", INCREASING)):
        for seed, right in enumerate(rights[name][:seeds[name]]):
            write_run(tmp_path / f"{name}{seed}", right, seed=seed, **flags)
    comparison = compare([str(tmp_path)])
    assert [name for name, difference in comparison.differences.items() if difference.is_of_methods] == tested
    for name, difference in comparison.differences.items():
        if name in tested:
            assert difference.holm == difference.p < 0.05  # adjusted for the tested ones alone
        else:
            assert 45 < difference.points <= 50
            assert {difference.low, difference.high, difference.p, difference.holm, difference.detectable} == {None}
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(csv_table(comparison)))}
    for name in comparison.differences.keys() - set(tested):
        assert float(rows[name]["difference"]) > 45
        assert {rows[name][column] for column in ("difference_low", "difference_high", "p", "p_holm",
                                                  "difference_detectable")} == {""}
    single = [method.name for method in comparison.methods if len(method.runs) == 1]
    for table in (text_table, markdown_table, latex_table):
        assert f"One seed: {', '.join(single)}. It may be" in " ".join(table(comparison).split())
    named = " ".join(verdicts(comparison))
    assert [name for name in comparison.differences if name in named] == tested


def test_without_right_answers_differences_are_unpaired(tmp_path):
    for name, flags in (("base", {}), ("step", STEP)):
        write_run(tmp_path / name, files={"generations.jsonl": None}, **flags)
    comparison = compare([str(tmp_path)])
    difference = comparison.differences["Step Decay"]
    assert difference.p is None and difference.low == pytest.approx(100 * newcombe(6, 10, 6, 10)[0])
    assert "No run kept generations.jsonl" in text_table(comparison)


def test_right_answers_of_one_run_are_used_for_all(tmp_path):
    write_run(tmp_path / "base", "1111100000", files={"generations.jsonl": None})
    write_run(tmp_path / "step", "1111111111", **STEP)
    assert compare([str(tmp_path)]).differences["Step Decay"].p == 2 / 2**5


def test_choice_of_the_base(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=0.002)
    step = write_run(tmp_path / "step", **STEP)
    with pytest.raises(UserError, match=r"one \(Base\) or .*two \(Base \+ lr 0.002\): choose with --base"):
        compare([one, two, step])
    chosen = compare([one, two, step], two)
    assert [m.name for m in chosen.methods] == ["Base", "Base + lr 0.01", "Step Decay + lr 0.01"]
    assert [m.name for m in compare([one, step], step).methods] == ["Step Decay", "Base"]
    with pytest.raises(UserError, match="--base .*elsewhere is none of the runs"):
        compare([one], str(tmp_path / "elsewhere"))
    dropout = write_run(tmp_path / "dropout", dropout_prob=0.05)
    assert [m.name for m in compare([dropout, one, step]).methods] == ["Base", "Step Decay", "dropout 0.05"]
    assert [m.name for m in compare([dropout, step]).methods] == ["dropout 0.05", "Step Decay"]
    unfinished = write_run(tmp_path / "unfinished", losses=[1.0])
    with pytest.raises(UserError, match="--base: unfinished, 1 of 2"):
        compare([one, unfinished], unfinished)


RECIPE = {"lr": 9e-3 * 32 / 256, "bits": "16bit", "loss_norm": "microbatch", "temperature": 10.0, "batch_size": 2,
          "accum_iter": 16}


@pytest.mark.parametrize("flag, value, name", [
    ("dropout_prob", 0.05, "dropout 0.05"), ("dropout_var", 1.02, "Inc. Drop. Prob 0.1 x 1.02 to 0.2"),
    ("lr_schedule", "step", "Step Decay"), ("min_lr", 1e-5, "Base + min_lr 1e-05"), ("lr", 5e-4, "Base + lr 0.0005"),
    ("epochs", 5, "Base + epochs 5"), ("warmup_epochs", 1.0, "Base + warmup_epochs 1"),
    ("weight_decay", 0.1, "Base + weight_decay 0.1"), ("loss_norm", "batch", "Base + loss_norm batch"),
    ("adapter_dim", 16, "Base + adapter_dim 16"), ("adapter_type", "block", "Base + adapter_type block"),
    ("temperature", 5.0, "Base + temperature 5"), ("bits", "4bit", "Base + bits 4bit"),
    ("accum_iter", 8, "Base + effective_batch 16"), ("prompt_format", "QCM-A", "Base + prompt_format QCM-A"),
    ("clip_grad", 1.0, "Base + clip_grad 1"),
    ("use_vicuna", True, "Base + use_vicuna True")])
def test_a_variant_of_ones_own_is_named_by_what_differs_from_the_published_recipe(tmp_path, flag, value, name):
    """Whatever flag it is, in whatever order the runs are named."""
    recipe = {name: TRAIN_FLAGS[name].default for name in (
        "epochs", "warmup_epochs", "weight_decay", "adapter_dim", "adapter_type", "prompt_format", "clip_grad",
        "use_vicuna")} | RECIPE
    losses = [1.0, 0.9] + [0.5] * 18
    base = write_run(tmp_path / "one", losses=losses, **recipe)
    again = write_run(tmp_path / "again", losses=losses, **recipe, seed=1)
    variant = write_run(tmp_path / "another", losses=losses[:value if flag == "epochs" else 20],
                        **{**recipe, flag: value})
    for runs in ([base, variant], [variant, base], [variant, again, base]):
        comparison = compare(runs)
        assert [method.name for method in comparison.methods] == ["Base", name] and not comparison.excluded
        assert list(comparison.differences) == [name]


def test_several_variants_of_the_lite_script_are_compared_to_it(tmp_path):
    lite = {**RECIPE, "bits": "4bit"}
    runs = [write_run(tmp_path / name, **{**lite, **flags}) for name, flags in (
        ("rate", {"lr": 5e-4}), ("both", {"lr": 5e-4, "dropout_prob": 0.05}), ("lite", {}),
        ("dropout", {"dropout_prob": 0.05}))]
    names = ["Base", "Base + lr 0.0005", "dropout 0.05 + lr 0.0005", "dropout 0.05"]
    assert [method.name for method in compare(runs).methods] == names
    whole = write_run(tmp_path / "base", **RECIPE)
    assert [method.name for method in compare([*runs, whole]).methods][0] == "Base"
    assert set(compare([*runs, whole]).differences) == {
        "Base + bits 4bit", *(f"{name} + bits 4bit" if " + " not in name else f"{name.split(' + ')[0]} + "
                              "lr 0.0005 + bits 4bit" for name in names[1:])}


def test_13b_has_a_router_temperature_of_its_own(tmp_path):
    runs = [write_run(tmp_path / str(value), **{**RECIPE, "llm_model": "13B", "temperature": value})
            for value in (10.0, 5.0)]
    assert [method.name for method in compare(runs).methods] == ["Base", "Base + temperature 10"]


def test_where_no_run_is_published_the_base_is_what_its_script_writes(tmp_path):
    """The runs are of the quickstart's toy, whose rate is its own: METHODS="base base+blr=0.08", with two seeds."""
    runs = [write_run(tmp_path / f"LaVIN-toy-{name}-seed{seed}", lr=lr, seed=seed) for seed in (0, 1)
            for name, lr in (("base+blr=0.08", 0.01), ("base", 0.02))]
    assert [method.name for method in compare(runs).methods] == ["Base", "Base + lr 0.01"]


# Tables, and comparison with the published runs


@pytest.mark.parametrize("width", [80, 100, 130, 200, 400])
def test_the_text_fits_the_terminal(tmp_path, width):
    """The text has the most telling columns, and long names over several lines; the published table fits, too."""
    for seed in range(2):
        write_run(tmp_path / f"base{seed}", "1111100000", seed=seed)
        write_run(tmp_path / f"long{seed}", "1111111110", seed=seed, warmup_epochs=0, lr=0.0123, adapter_dim=32,
                  adapter_scale=0.25, visual_adapter_type="router_block", **STEP)
    for comparison in (compare([str(tmp_path)]), published()):
        lines = text_table(comparison, width).splitlines()
        assert max(map(len, lines)) <= width and {"Method", "Avg", "vs."} <= {*lines[0].split()}
        everything = lines[0].split("  ")[0] and len(lines[0]) == len(text_table(comparison).splitlines()[0])
        assert everything != any("in a wider terminal, and in table.md" in line for line in lines)
    narrow = text_table(compare([str(tmp_path)]), 80).splitlines()
    assert "verdict" in narrow[0] and "NAT" not in narrow[0]
    assert narrow[3].startswith("Step Decay + warmup_epochs") and narrow[4] == "0 + lr 0.0123"


def test_csv_has_one_number_per_cell(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"base{seed}", "1111100000" * 4, seed=seed)
    for seed, right in enumerate(("1111111110" * 4, "1111111100" * 4, "1111111110" * 2 + "1111111100" * 2)):
        write_run(tmp_path / f"step{seed}", right, seed=seed, **STEP)
    comparison = compare([str(tmp_path)])
    base, step = csv.DictReader(io.StringIO(csv_table(comparison)))
    assert (base["method"], base["seeds"], base["n"], base["Avg"], base["IMG"], base["difference"]) == (
        "Base", "2", "40", "50.0000", "", "")
    assert (step["Avg"], step["Avg_sd"], step["difference"]) == ("85.0000", "5.0000", "35.0000")
    methods, difference = comparison.methods, comparison.differences["Step Decay"]
    assert [step["Avg_low"], step["Avg_high"]] == [f"{end:.4f}" for end in methods[1].interval("Avg")]
    assert step["p"] == step["p_holm"] == f"{difference.p:.6g}"
    assert step["difference_detectable"] == f"{difference.detectable:.4f}" and base["difference_detectable"] == ""


@pytest.mark.parametrize("first, percentage", [({"parse_failures": 0}, "25.0000"), ({}, "")])
def test_csv_has_the_percentage_of_parse_failures_where_all_seeds_tell_it(tmp_path, first, percentage):
    write_run(tmp_path / "0", scored=first)
    write_run(tmp_path / "1", scored={"parse_failures": 5}, seed=1)
    (row,) = csv.DictReader(io.StringIO(csv_table(compare([str(tmp_path)]))))
    assert row["parse_failures"] == percentage


def test_csv_has_p_and_the_adjusted_p(tmp_path):
    write_run(tmp_path / "base", "1111100000")
    write_run(tmp_path / "step", "1111111110", **STEP)
    write_run(tmp_path / "cyclical", "1111110000", **CYCLICAL)
    comparison = compare([str(tmp_path)])
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(csv_table(comparison)))}
    for name, difference in comparison.differences.items():
        assert [rows[name]["p"], rows[name]["p_holm"]] == [f"{difference.p:.6g}", f"{difference.holm:.6g}"]
    assert rows["Step Decay"]["p"] != rows["Step Decay"]["p_holm"]


def test_latex_is_escaped_and_has_equal_rows(tmp_path):
    write_run(tmp_path / "base", "1111100000")
    write_run(tmp_path / "step", "1111111110", warmup_epochs=0, **STEP)
    text = latex_table(compare([str(tmp_path)]))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4 and {row.count(" & ") for row in rows} == {text.splitlines()[3].count("r") - 4 + 3}
    assert r"Step Decay + warmup\_epochs 0 & 90.00" in text
    assert "%" not in text.replace(r"\%", "").replace("{!}{%", "") and "−" not in text


def test_the_base_alone_beside_the_published_runs_has_no_design_effect_of_differences(tmp_path):
    write_run(tmp_path / "base", "1111100000")
    comparison = compare([str(tmp_path)])
    of_published = published()
    comparison = replace(comparison, methods=[*comparison.methods, *of_published.methods],
                         differences=of_published.differences, clusters=np.arange(10) // 2)
    text = text_table(comparison)
    assert "nan" not in text and "5 clusters of 2 to 2 questions" in text and "for accuracies (means" in text


def test_with_published(tmp_path):
    write_run(tmp_path / "few")
    with pytest.raises(UserError, match="--published: .* 4,241 questions .* 10 others"):
        with_published(compare([str(tmp_path / "few")]))
    counts, correct = published().counts, published().methods[0].runs[0].correct
    n, k = counts["Avg"], correct["Avg"]
    scores = {column: 100 * correct[column] / counts[column] for column in COLUMNS}
    files = {"scores.json": {**scores, "counts": counts, "correct": correct, "split": "test"}}
    write_run(tmp_path / "full" / "a", "1" * k + "0" * (n - k), files=files)
    write_run(tmp_path / "full" / "b", "0" * (n - k) + "1" * k, files=files, **STEP)
    comparison = with_published(compare([str(tmp_path / "full")]))
    assert [method.name for method in comparison.methods[:5]] == [
        "Base", "Base (published)", "Cyclical LR (published)", "Step Decay", "Step Decay (published)"]
    assert comparison.differences["Step Decay"].points == 0 and comparison.differences["Step Decay"].p == 1
    assert comparison.differences["Step Decay (published)"].p is None
    text = text_table(comparison)
    assert "exact McNemar" in text and "come without predictions" in text and "questions share lectures" in text


# What is told of differences that were not found


def test_no_difference_is_told_from_too_few_to_tell():
    methods = [Method(name, [Run("", FLAGS, [], {"Avg": 1}, {"Avg": 1})]) for name in "abcdef"]
    differences = {"b": Difference(0.1, -0.3, 0.5, 0.4, 0.9, 0.6), "c": Difference(-0.5, -3.25, 2.25, 0.6, 0.9, 4),
                   "d": Difference(3, 1, 5, 0.01, 0.049, 3), "e": Difference(3, 0.1, 5.9, 0.04, 0.051, 3),
                   "f": Difference(3, 1, 5, 0.001, 0.001)}  # of two runs, which say nothing about methods
    differ, none, too_few = verdicts(Comparison(methods, differences, []))
    assert differ.startswith("Differs from the base: d (+3.00). In brackets, the difference in points")
    assert none.startswith("No difference above 1 point: b (0.50). In brackets, the largest difference that the int")
    assert too_few.startswith("Too few questions or seeds to tell: c (3.25), e (5.90).")


def test_a_few_equal_answers_do_not_show_that_there_is_no_difference(tmp_path):
    for name, flags in (("base", {}), ("step", STEP)):
        for seed in range(3):
            write_run(tmp_path / f"{name}{seed}", "11111111", seed=seed, **flags)
    comparison = compare([str(tmp_path)])
    difference = comparison.differences["Step Decay"]
    assert difference.points == 0 and 30 < difference.high < 40
    assert [line.split(":")[0] for line in verdicts(comparison)] == ["Too few questions or seeds to tell"]


def test_the_published_table_says_what_it_is_worth():
    text = markdown_table(published())
    assert "are of these runs, unpaired (Newcombe's interval) and untested. Another seed may give others" in text
    assert verdicts(published()) == []  # one seed each
    assert "with probability 0.0102" in text and round(114 / (150 * 149 / 2), 4) == 0.0102
    assert "design effect 1.4, 3.2 or 5.3" in text  # 1 + 4240 * 0.0102 * 0.01, 0.05, 0.1
