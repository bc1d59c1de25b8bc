"""eval.py: scores name what was scored and land where it belongs, no answer is lost, and a failing model is named."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import demo
import eval as evaluation
import eval_mme
import train
from forked import in_processes
from lavin.runtime.errors import UsageError
from lavin.runtime.files import read_whole_lines
from lavin.tokenizer import Tokenizer
from tiny import ROOT
from tiny_runs import run_flags, write_run
from user_errors import error_message
from util.data.datasets import load_scienceqa
from util.data.prompts import fit_prompt
from util.evaluation import answering, evaluate, mme, scienceqa
from util.evaluation import results as outcomes
from util.runs import PARTIAL_SUFFIX, lock_folder

RESULTS = ("generations.jsonl", "preds.json", "scores.json")


def run_train(base, data, folder, *flags) -> None:
    train.main(train.get_args_parser().parse_args(run_flags(base, data, folder, "--epochs", "2", *flags)))


def run_eval(*flags) -> None:
    evaluation.main(evaluation.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)]))


def refusal(*flags) -> str:
    return error_message(run_eval, *flags)


def results(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


def scores_of(folder) -> dict:
    return json.loads((folder / "scores.json").read_text())


def partial_files(folder) -> list[str]:
    return sorted(path.name for path in folder.glob(f"*{PARTIAL_SUFFIX}"))


@pytest.fixture(scope="module")
def finished(base, scienceqa, tmp_path_factory):
    """A run of two epochs, evaluated on the test split. Read-only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_train(base, scienceqa, folder)
    run_eval("--adapter_path", folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def unscored(run):
    for name in RESULTS:
        (run / name).unlink()
    return run


# --- What was scored, and where its scores go ---

def test_scores_name_what_was_scored(finished, scienceqa, base, tmp_path):
    scores = scores_of(finished)
    sha256 = hashlib.sha256((finished / "checkpoint-1.pth").read_bytes()).hexdigest()
    assert (scores["checkpoint"], scores["checkpoint_sha256"]) == ("checkpoint-1.pth", sha256)
    assert scores["data"] == load_scienceqa(str(scienceqa), "test").fingerprint
    expected = {"prompt_format": "QCM-ALE", "decode": "generate", "split": "test", "precision": "fp32",
                "bits": "16bit", "max_seq_len": 160}
    assert expected.items() <= scores.items() and not {"seed", "top_p"} & scores.keys()
    run_eval(*base.flags, "--data_root", scienceqa, "--output_dir", tmp_path, "--generation_temperature", "0.5",
             "--seed", "7", "--precision", "bf16")
    scores = scores_of(tmp_path)
    assert scores["checkpoint"] is scores["checkpoint_sha256"] is None and scores["precision"] == "bf16"
    assert (scores["generation_temperature"], scores["top_p"], scores["seed"]) == (0.5, 0.75, 7)


def test_an_early_checkpoint_is_scored_into_a_folder_of_its_own(run, capsys):
    before = results(run)
    run_eval("--adapter_path", run / "checkpoint-0.pth")
    assert results(run) == before and scores_of(run / "checkpoint-0")["checkpoint"] == "checkpoint-0.pth"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith(f"scores: {run / 'checkpoint-0' / 'scores.json'} (checkpoint-0.pth is not the run's")
    run_eval("--adapter_path", run / "checkpoint-1.pth")
    assert capsys.readouterr().out.splitlines()[-1] == f"scores: {run / 'scores.json'}"


def test_an_unfinished_run_is_scored_into_its_checkpoints_folder(unscored):
    (unscored / "checkpoint-1.pth").rename(unscored / "last.pth")
    run_eval("--adapter_path", unscored)
    run_eval("--adapter_path", unscored / "last.pth")
    assert scores_of(unscored / "checkpoint-0")["questions"] == scores_of(unscored / "last")["questions"] == 6
    assert not (unscored / "scores.json").exists()


def test_nothing_else_is_scored_into_a_runs_folder(run, base, scienceqa, tmp_path):
    before = results(run)
    message = refusal(*base.flags, "--data_root", scienceqa, "--output_dir", run)
    assert f"--output_dir {run} is the folder of a run, and the untuned base is not of that run" in message
    shutil.copytree(run, tmp_path / "other")
    assert "other is not of that run" in refusal("--adapter_path", tmp_path / "other", "--output_dir", run).replace(
        "/checkpoint-1.pth", "")
    assert results(run) == before


def test_other_settings_replace_the_scores_and_say_so(run, capsys):
    run_eval("--adapter_path", run, "--decode", "score", "--split", "train")
    assert f"{run / 'scores.json'} holds scores of another decode, split, data, pictures: they will be replaced" in \
        capsys.readouterr().out
    scores = scores_of(run)
    assert (scores["decode"], scores["split"], scores["questions"]) == ("score", "train", 12)


def test_a_part_of_the_questions_is_always_the_same_and_known_as_such(run, tmp_path):
    flags = ("--adapter_path", run / "checkpoint-0.pth", "--decode", "score", "--split", "train")
    asked = {}
    for n in (5, 7, 99):
        run_eval(*flags, "--questions", n, "--output_dir", tmp_path / str(n))
        asked[n] = set(json.loads((tmp_path / str(n) / "preds.json").read_text()))
    assert [len(qids) for qids in asked.values()] == [5, 7, 12] and asked[5] < asked[7] < asked[99]
    assert asked[5] != set(sorted(asked[99])[:5])  # drawn, and not the first ones
    run_eval(*flags, "--output_dir", tmp_path / "all")
    assert len({scores_of(tmp_path / name)["data"] for name in ("5", "7", "99", "all")}) == 3


def test_scores_of_an_earlier_version_are_replaced(run, capsys):
    old = {name: value for name, value in scores_of(run).items() if name not in ("checkpoint_sha256", "data")}
    (run / "scores.json").write_text(json.dumps(old))
    (run / "recipe.json").unlink()
    run_eval("--adapter_path", run)
    assert "another checkpoint, data: they will be replaced" in capsys.readouterr().out
    assert "checkpoint_sha256" in scores_of(run)


def test_the_same_evaluation_again_is_not_repeated(run, monkeypatch, capsys):
    before = results(run)
    run_eval("--adapter_path", run, "--decode", "score")
    run_eval("--adapter_path", run)
    assert results(run) == before
    monkeypatch.setattr(evaluate, "load_model", None)
    capsys.readouterr()
    run_eval("--adapter_path", run, "--max_batch_size", "3")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("scored before") and printed[2].startswith("-----")
    assert printed[-1] == f"scores: {run / 'scores.json'}"


def test_scores_by_other_code_are_told(run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COMMIT", "a" * 40)
    monkeypatch.setattr(outcomes, "COMMIT", "a" * 40)
    run_eval("--adapter_path", run, "--decode", "score")
    run_eval("--adapter_path", run)
    scores = scores_of(run)
    assert scores["git_commit"] == "a" * 40
    monkeypatch.setattr(evaluate, "load_model", None)
    for recorded, now, note in (
            ("a" * 40, "a" * 40, ""), ("a" * 40, None, ""), (None, "a" * 40, ""),
            (f"{'b' * 40}-dirty", "a" * 40,
             f" but by the code of commit {12 * 'b'}-dirty (to score again, remove {run / 'scores.json'})")):
        (run / "scores.json").write_text(json.dumps(scores | {"git_commit": recorded}))
        monkeypatch.setattr(outcomes, "COMMIT", now)
        capsys.readouterr()
        run_eval("--adapter_path", run)
        assert capsys.readouterr().out.splitlines()[0] == f"scored before, with the same settings{note}:"


def test_the_number_of_bad_pictures_is_read_by_its_earlier_name(run, monkeypatch, capsys):
    run_eval("--adapter_path", run)
    scores = scores_of(run)
    earlier = {"skipped" if name == "bad_pictures" else name: value for name, value in scores.items()}
    (run / "scores.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(evaluate, "load_model", None)
    capsys.readouterr()
    run_eval("--adapter_path", run)
    printed = capsys.readouterr().out
    assert printed.startswith("scored before") and "0 problems dropped for a bad picture" in printed
    assert scores_of(run) == earlier and "skipped" not in scores


def test_scores_of_an_earlier_version_get_what_guessing_would_reach(run, monkeypatch, capsys):
    run_eval("--adapter_path", run)
    scores = scores_of(run)
    (run / "scores.json").write_text(json.dumps({name: value for name, value in scores.items() if name != "chance"}))
    monkeypatch.setattr(evaluate, "load_model", None)
    capsys.readouterr()
    run_eval("--adapter_path", run)
    assert capsys.readouterr().out.startswith("scored before") and scores_of(run) == scores


@pytest.mark.parametrize("name, change", [
    ("scores.json", lambda scores: {**scores, "chance": {**scores["chance"], "Avg": 10.0}}),
    ("scores.json", lambda scores: {**scores, "Avg": 99.0}), ("scores.json", lambda scores: {**scores, "counts": None}),
    ("scores.json", lambda scores: {**scores, "correct": {**scores["correct"], "NAT": 0.5}}),
    ("preds.json", lambda predictions: dict.fromkeys(predictions, 0)), ("preds.json", lambda predictions: {}),
    ("generations.jsonl", lambda lines: [])])
def test_results_that_were_changed_since_are_replaced(run, capsys, name, change):
    run_eval("--adapter_path", run)
    before, path = results(run), run / name
    path.write_text(json.dumps(change({} if name == "generations.jsonl" else json.loads(path.read_text()))))
    run_eval("--adapter_path", run)
    assert "they will be replaced" in capsys.readouterr().out and results(run) == before


def test_a_folder_in_use_is_refused(run):
    lock = lock_folder(run)
    try:
        assert f"{run} is in use by process {os.getpid()}" in refusal("--adapter_path", run)
    finally:
        lock.release()


def test_trained_with_takes_the_flags_of_train(base, scienceqa, finished, tmp_path, capsys):
    flags = run_flags(base, scienceqa, finished, "--epochs", "2")
    run_eval("--split", "test", "--trained_with", *flags)
    assert capsys.readouterr().out.startswith("scored before")
    run_eval("--trained_with", "--resume", finished)
    assert capsys.readouterr().out.startswith("scored before")
    for epochs in (3, 20):
        assert refusal("--trained_with", *flags, "--epochs", epochs) == \
            f"{finished} is unfinished (2 of {epochs} epochs): train it first"
    assert "nowhere is unfinished (0 of 20 epochs)" in refusal("--trained_with", "--output_dir", "nowhere")
    assert "leave one out" in refusal("--adapter_path", finished, "--trained_with")
    with pytest.raises(UsageError, match="--no_flag"):
        run_eval("--trained_with", "--no_flag")


# --- No answer is lost ---

SLOW_EVAL = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import eval as evaluation
from util.evaluation import answering
torch.set_num_threads(1)
generate_batch = answering.generate_batch
answering.generate_batch = lambda *args: time.sleep(0.2) or generate_batch(*args)
evaluation.main(evaluation.get_args_parser().parse_args(sys.argv[2:]))
"""


def test_an_evaluation_that_was_killed_goes_on(finished, unscored, monkeypatch):
    command = [sys.executable, "-c", SLOW_EVAL, str(ROOT), "--device", "cpu", "--adapter_path", str(unscored)]
    with subprocess.Popen([*command, "--max_batch_size", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                          ) as process:
        path = unscored / f"answers.0{PARTIAL_SUFFIX}"
        while process.poll() is None and not (path.is_file() and len(read_whole_lines(path)) > 1):
            time.sleep(0.01)
        time.sleep(random.random() * 0.7)
        process.send_signal(signal.SIGKILL)
    n_answered = len(read_whole_lines(path)) - 1
    assert process.returncode == -signal.SIGKILL and 0 < n_answered < 6
    answered = record_answered(monkeypatch)
    run_eval("--adapter_path", unscored)
    assert len(answered) == 6 - n_answered
    assert results(unscored) == results(finished) and partial_files(unscored) == []


def record_answered(monkeypatch) -> list[str]:
    """The ids of the questions that the model is asked from now on."""
    qids, generate_batch = [], answering.generate_batch
    monkeypatch.setattr(answering, "generate_batch", lambda model, tokenizer, batch, *settings: qids.extend(
        question.qid for question in batch) or generate_batch(model, tokenizer, batch, *settings))
    return qids


@pytest.mark.parametrize("broken_function", ["scienceqa.score", "scienceqa.write_answers", "scienceqa.write_json",
                                             "evaluate.write_json"])
def test_a_fault_in_scoring_loses_no_answer(finished, unscored, monkeypatch, broken_function):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(f"util.evaluation.{broken_function}", lambda *args: 1 / 0)
        run_eval("--adapter_path", unscored)
    assert partial_files(unscored) == [f"answers.0{PARTIAL_SUFFIX}"] and not (unscored / "scores.json").exists()
    answered = record_answered(monkeypatch)
    run_eval("--adapter_path", unscored)
    assert answered == [] and results(unscored) == results(finished) and partial_files(unscored) == []


def test_half_written_results_are_not_taken_for_the_old_ones(finished, run, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(scienceqa, "write_json", lambda *args: 1 / 0)
        run_eval("--adapter_path", run, "--decode", "score")
    run_eval("--adapter_path", run)
    assert results(run) == results(finished)


def write_partial(folder, rank: int, identity: dict, answers: list[dict], torn: str = "") -> None:
    lines = [identity, *([answer["qid"], answer] for answer in answers)]
    path = folder / f"answers.{rank}{PARTIAL_SUFFIX}"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def test_answers_of_all_processes_are_used_and_torn_lines_are_not(finished, unscored, monkeypatch):
    scores = scores_of(finished)
    identity = {name: scores[name] for name in list(scores)[list(scores).index("prompts_cut") + 1:-1]}  # no commit
    answers = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    torn = json.dumps([answers[2]["qid"], answers[2]])[:-20]
    write_partial(unscored, 0, identity, answers[:2], torn)
    write_partial(unscored, 3, identity, answers[4:5])
    write_partial(unscored, 5, {**identity, "decode": "score"}, answers[5:])
    (unscored / f"answers.6{PARTIAL_SUFFIX}").write_text("")
    answered = record_answered(monkeypatch)
    run_eval("--adapter_path", unscored)
    assert answered == [answers[i]["qid"] for i in (2, 3, 5)]
    assert results(unscored) == results(finished) and partial_files(unscored) == []


def test_two_processes_share_the_rest_and_agree(finished, unscored):
    answers = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    scores = scores_of(finished)
    identity = {name: scores[name] for name in list(scores)[list(scores).index("prompts_cut") + 1:-1]}  # no commit
    write_partial(unscored, 4, identity, answers[1:2])

    def evaluate() -> tuple[str, str]:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            run_eval("--adapter_path", unscored)
        return out.getvalue(), errors.getvalue()
    for word in ("answered before: 1 of 6;", "scored before"):
        (out, errors), (nothing, _) = in_processes(evaluate, 2)
        assert word in out and out.count("scores: ") == 1 and nothing == ""
        assert ("3 of 3" in errors) == (word != "scored before")  # rank 0's part of five questions
        assert results(unscored) == results(finished) and partial_files(unscored) == []


def test_mme_answers_are_kept_too(base, tmp_path, monkeypatch):
    from PIL import Image
    write_run(tmp_path / "run", base, 1)
    folder = tmp_path / "mme" / "color"
    folder.mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (9, 9), name == "a" and "red" or "blue").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")

    def run_mme():
        eval_mme.main(eval_mme.get_args_parser().parse_args([
            "--adapter_path", str(tmp_path / "run"), "--device", "cpu", "--mme_root", str(tmp_path / "mme"),
            "--max_batch_size", "2"]))

    asked, answer_batch = [], mme.answer_batch
    monkeypatch.setattr(mme, "answer_batch", lambda *args: asked.append(args[2][0].name) or answer_batch(*args))
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(mme, "score", lambda *args: 1 / 0)
        run_mme()
    run_mme()
    run_mme()
    assert asked == ["color/a.png", "color/b.png", "color/c.png"] and partial_files(tmp_path / "run") == []
    scores = json.loads((tmp_path / "run" / "mme_scores.json").read_text())
    assert {"checkpoint_sha256", "precision", "data"} <= scores.keys() and scores["checkpoint"] == "checkpoint-3.pth"
    (folder / "a.txt").write_text("Is it green?\tNo\nIs it red?\tYes\n")
    run_mme()
    assert len(asked) == 6
    (folder / "a.txt").write_text("Is it green?\tYes\nIs it red?\tNo\n")  # the right answers were corrected
    run_mme()
    assert len(asked) == 9


# --- Models that fail, prompts that are too long, flags ---

@pytest.mark.parametrize("flags", [[], ["--decode", "score"], ["--generation_temperature", "1"]])
def test_a_model_that_gives_nan_is_refused(unscored, monkeypatch, flags):
    load_model = evaluate.load_model

    def load_broken(*args):
        model, *rest = load_model(*args)
        model.llama.norm.weight.data[0] = torch.nan
        return model, *rest
    monkeypatch.setattr(evaluate, "load_model", load_broken)
    message = refusal("--adapter_path", unscored, "--max_batch_size", "2", *flags)
    assert message == "the model gives NaN for question 112, question 117: the weights or the adapters are broken"
    assert not (unscored / "scores.json").exists()


def test_a_prompt_that_is_too_long_loses_words_in_its_middle(tokenizer: Tokenizer):
    words = [f"word{i}" for i in range(2000)]
    prompt = "Question: Which pond? " + " ".join(words) + " Options: (A) old (B) new\nResponse:"
    cut = fit_prompt(tokenizer, prompt, None, 6, 100)
    n = len(tokenizer.example(cut, None).ids)
    assert 90 < n < 100 and cut.startswith("Question: Which pond? word0") and cut.endswith("(A) old (B) new\nResponse:")
    assert fit_prompt(tokenizer, cut, None, 6, n + 1) == cut  # with the modality token
    assert fit_prompt(tokenizer, cut, None, 6, n) != cut
    assert fit_prompt(tokenizer, 5000 * "a", None, 6, 100) == ""


def test_cut_prompts_are_counted(finished, tmp_path, capsys):
    run_eval("--adapter_path", finished, "--output_dir", tmp_path, "--max_seq_len", "70")
    scores = scores_of(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert scores["prompts_cut"] == sum(line.get("cut", False) for line in lines) > 0
    line = f"words in the middle of {scores['prompts_cut']} prompts are left out, since --max_seq_len is 70\n"
    assert line in capsys.readouterr().out
    assert scores_of(finished)["prompts_cut"] == 0


@pytest.mark.parametrize("flag, values", {
    "--max_batch_size": ["0", "-1", "x"], "--generation_temperature": ["nan", "-1", "inf"],
    "--top_p": ["0", "-1", "nan", "1.1"], "--seed": ["-1", "35184372088832"], "--max_new_tokens": ["0"],
    "--port": ["0", "70000"]}.items())
def test_flags_out_of_range_are_refused(flag, values):
    parsers = [command.get_args_parser() for command in (evaluation, eval_mme, demo)]
    parsers = [parser for parser in parsers if flag in parser._option_string_actions]
    assert parsers
    for parser in parsers:
        for value in values:
            with pytest.raises(UsageError, match=flag):
                parser.parse_args([f"{flag}={value}"])
