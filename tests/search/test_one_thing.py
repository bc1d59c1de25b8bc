"""A study is of one thing: the same data, models and scoring in all of its runs, whoever resumes, joins or reports."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("optuna")
import search
from lavin.runtime.files import read_json, write_json
from simulated_commands import Machine
from user_errors import change_json, error_message
from util.data.datasets import ScienceQA, cluster
from util.evaluation.scienceqa import summarize
from util.search.folder import STUDY, read_records
from util.search.identity import conditions, differences, runs_of_something_else
from util.search.report import markdown
from util.search.summary import StudyReport

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:The reported value")
SPACE = {"parameters": {"lr": {"kind": "float", "low": 1e-3, "high": 3e-2, "log": True, "default": 1e-2}},
         "enqueue": [{}, {"lr": 2e-2}]}
PUT_BACK = "put back what it began with, or search in another folder with --study"


def quality(flags, epochs: int) -> float:
    """The smaller the rate, the better."""
    return 0.5 + 0.02 * epochs - 4 * flags.lr


@pytest.fixture
def started(base, data, tmp_path, monkeypatch):
    """A function that starts search.py on a machine, on data of its own; it returns the study."""
    (tmp_path / "space.json").write_text(json.dumps(SPACE))

    def start(machine: Machine, *own: str, train: tuple[str, ...] = ()) -> Path:
        with monkeypatch.context() as patched:
            machine.install(patched)
            search.main(search.get_args_parser().parse_args([
                "--study", str(tmp_path / "S"), "--space", str(tmp_path / "space.json"), "--trials", "4",
                "--questions", "100", "--pruner", "none", "--confirm", "1", "--seeds", "2", *own, "--", *base.flags,
                "--data_root", str(data), "--device", "cpu", "--batch_size", "4", "--epochs", "3",
                "--warmup_epochs", "0.5", "--max_seq_len", "160", *train]))
        return tmp_path / "S"
    return start


def correct_a_question(data: Path, split: str) -> None:
    """Another answer of the first question of a split."""
    problems, splits = (json.loads((data / name).read_text()) for name in ("problems.json", "pid_splits.json"))
    problem = problems[splits[split][0]]
    problem["answer"] = (problem["answer"] + 1) % len(problem["choices"])
    (data / "problems.json").write_text(json.dumps(problems))


@pytest.fixture
def begun(started, tmp_path):
    """Stopped in its second trial."""
    machine = Machine(quality, kills=[50.0])
    error_message(started, machine)
    study = tmp_path / "S"
    assert [record["state"] for record in read_records(study).values()] == ["COMPLETE", "RUNNING"]
    return study


# --- Another study is refused ---

@pytest.mark.parametrize("split, words", [
    ("val", "other data in the scores of trials and the scores on validation"), ("train", "other data in training"),
    ("test", "other data in the scores on test")])
def test_a_study_of_other_data_is_refused_by_what_differs_and_goes_on_with_its_own(begun, started, data, split, words):
    original = (data / "problems.json").read_bytes()
    correct_a_question(data, split)
    before, machine = read_records(begun), Machine(quality)
    assert error_message(started, machine) == f"{begun} holds a study with {words}: {PUT_BACK}"
    assert not machine.commands and read_records(begun) == before
    (data / "problems.json").write_bytes(original)
    assert (started(machine) / "verdict.json").exists()


def test_a_question_that_no_trial_was_asked_is_told_apart(started, data, tmp_path):
    """The trials were scored on one question of three: another answer of another one changes what follows alone."""
    machine = Machine(quality, kills=[50.0])
    asked = ("--questions", "1")
    error_message(started, machine, *asked)
    original, found = (data / "problems.json").read_text(), set()
    ids = json.loads((data / "pid_splits.json").read_text())["val"]
    for qid in ids:
        problems = json.loads(original)
        problems[qid]["hint"] += "?"
        (data / "problems.json").write_text(json.dumps(problems))
        found.add(error_message(started, machine, *asked).split(" a study with ")[1].split(": ")[0])
    assert found == {"other data in the scores on validation",
                     "other data in the scores of trials and the scores on validation"}


def test_a_study_of_another_base_is_refused(begun, started):
    change_json(begun / STUDY, {"identity": {part: {**entries, "base": "0" * 64} for part, entries in read_json(
        begun / STUDY)["identity"].items()}})
    message = error_message(started, Machine(quality))
    assert message.startswith(f"{begun} holds a study with other base in ") and message.endswith(PUT_BACK)


def test_a_study_goes_on_where_its_data_has_moved(begun, started, data, tmp_path):
    """The content counts, and no path."""
    shutil.move(data, tmp_path / "moved")
    assert (started(Machine(quality), train=("--data_root", str(tmp_path / "moved"))) / "verdict.json").exists()


def test_study_json_says_what_the_study_is_of_and_never_changes(begun, started):
    before = (begun / STUDY).read_bytes()
    identity = json.loads(before)["identity"]
    assert set(identity) == {"train", "trials", "val", "test"}
    assert len({part["data"] for part in identity.values()}) == 3  # all three questions of val are asked
    assert all({"data", "base", "vision"} <= part.keys() for part in identity.values())
    assert (identity["trials"]["decode"], identity["test"]["split"]) == ("score", "test")
    started(Machine(quality))
    assert (begun / STUDY).read_bytes() == before


@pytest.mark.parametrize("questions, n_of_first_lecture, warns", [
    (3, None, True), (2, None, False), (2, 1, True), (2, 2, False), (2, 3, False)])
def test_a_search_that_leaves_no_lecture_to_name_a_winner_on_says_so_when_it_begins(
        started, data, capsys, questions, n_of_first_lecture, warns):
    """Trials are asked all questions of the first of two lectures. One lecture of all questions tells no questions
    apart."""
    first, second = sorted(("One.", "Two."), key=lambda text: hashlib.sha256(
        cluster("", {"lecture": text}).encode()).digest())
    problems, splits = (json.loads((data / name).read_text()) for name in ("problems.json", "pid_splits.json"))
    for i, qid in enumerate(splits["val"] if n_of_first_lecture else []):
        problems[qid]["lecture"] = first if i < n_of_first_lecture else second
    (data / "problems.json").write_text(json.dumps(problems))
    error_message(started, Machine(quality, kills=[1.0]), "--questions", str(questions))
    assert ("no other question is left on which a winner could be named" in capsys.readouterr().out) == warns


# --- Data that changes while the search runs ---

@pytest.mark.parametrize("split, words", [("val", "other data in the scores of trials"),
                                          ("train", "other data in training")])
def test_data_that_changes_while_a_search_runs_ends_it_and_no_trial(started, data, tmp_path, split, words, capsys):
    original, changed = (data / "problems.json").read_bytes(), []

    def changing(flags, epochs: int) -> float:
        if not changed:  # right after the first trial was scored
            changed.append(correct_a_question(data, split))
        return quality(flags, epochs)

    message = error_message(started, Machine(changing))
    trial = tmp_path / "S" / "trials" / ("000" if split == "val" else "001")
    assert message.startswith(f"{trial}/") and f"does not fit its study, since it has {words}: " in message
    fix = PUT_BACK if split == "val" else f"put back what it began with, and remove {trial} to begin the run anew"
    assert message.endswith(fix) and read_records(tmp_path / "S")[trial.name]["state"] == "RUNNING"
    (data / "problems.json").write_bytes(original)
    if split == "train":
        shutil.rmtree(trial)
    study = started(Machine(quality))
    assert all("; best " in line for line in capsys.readouterr().out.splitlines() if "of 4 trials: " in line)
    assert {record["state"] for record in read_records(study).values()} == {"COMPLETE"}
    assert not runs_of_something_else(study, read_json(study / STUDY), "trials")


@pytest.mark.parametrize("content", ["", '{"split": "val", "da', "{}"])
def test_scores_that_are_torn_are_made_again(begun, started, content):
    path = begun / "trials" / "001" / "rungs" / "3" / "scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    study = started(Machine(quality))
    assert read_json(path)["split"] == "val" and read_records(study)["001"]["state"] == "COMPLETE"


def test_a_torn_recipe_ends_no_trial(begun, started):
    path = begun / "trials" / "001" / "recipe.json"
    path.write_text('{"recipe": {')
    assert error_message(started, Machine(quality)) == f"{path} is broken: remove {path.parent} to begin the run anew"
    shutil.rmtree(path.parent)
    assert {record["state"] for record in read_records(started(Machine(quality))).values()} == {"COMPLETE"}


def test_fresh_runs_are_scored_again_where_their_scores_are_of_something_else(started, data, tmp_path):
    """An earlier version left such scores, before it named a winner."""
    study = started(Machine(quality))
    changed = study / "confirm" / "000-seed1" / "val" / "scores.json"
    change_json(changed, {"data": "other"})
    (study / "verdict.json").unlink()
    (study / "confirm" / "000-seed2" / "scores.json").write_text("")
    started(machine := Machine(quality))
    assert [Path(flags.output_dir).relative_to(study / "confirm") for flags in machine.flags_of("eval")] == [
        Path("000-seed1/val"), Path("000-seed2")]
    assert read_json(changed)["data"] != "other"


# --- Studies of earlier versions, which let them in ---

@pytest.fixture
def mixed(started, capsys):
    """An old study: study.json does not say what it is of, and its best trial was scored on other data."""
    study = started(Machine(quality))
    write_json(study / STUDY, {name: value for name, value in read_json(study / STUDY).items() if name != "identity"})
    best = max((record["rungs"][-1]["correct"], name) for name, record in read_records(study).items())[1]
    change_json(study / "trials" / best / "rungs" / "3" / "scores.json", {"data": "other"})
    capsys.readouterr()
    return study, best


def test_trials_of_other_data_are_not_ranked_and_it_is_said(mixed, started, capsys):
    study, best = mixed
    report = StudyReport(study)
    assert report.left_out == {best: "other data in the scores of trials"}
    assert best not in [trial.name for trial in report.ranked] and len(report.ranked) == 3
    text = markdown(report, [])
    assert ("Trials with other data, models or scoring than the study's are not ranked with the others "
            f"({best}: other data in the scores of trials).") in text
    assert f"| {best} |" not in text.split("## Trials")[1].split("## Budget")[0]
    assert "4 of 4 trials" in text  # of which all have cost something
    shutil.rmtree(study / "confirm")
    (study / "verdict.json").unlink()
    started(Machine(quality))
    assert (f"trial {best} is not ranked with the others, since it has other data in the scores of trials"
            in capsys.readouterr().out)
    assert best not in {record["configuration"] for record in read_records(study, "confirm").values()}
    assert len(read_records(study, "confirm")) == 4


def test_the_best_of_the_progress_is_none_of_other_data(mixed, started, capsys):
    study, best = mixed
    change_json(study / STUDY, {"trials": 5})
    started(Machine(quality), "--trials", "5")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "5 of 5 trials" in line]
    assert "best " in line and f"(trial {best})" not in line


def test_an_old_study_whose_runs_say_nothing_goes_by_the_paths(mixed, started, data, tmp_path):
    study, _ = mixed
    for path in (*study.glob("*/*/**/scores.json"), *study.glob("*/*/recipe.json")):
        path.unlink()
    shutil.copytree(data, tmp_path / "copy")
    message = error_message(started, Machine(quality), train=("--data_root", str(tmp_path / "copy")))
    assert f"{study} is a study of other settings (train.py's --data_root {tmp_path / 'copy'}, not {data})" in message


def test_an_old_study_is_resumed_on_the_data_of_most_of_its_trials_alone(mixed, started, data):
    study, _ = mixed
    correct_a_question(data, "val")
    assert error_message(started, Machine(quality)) == (
        f"{study} holds a study with other data in the scores of trials and the scores on validation: "
        f"{PUT_BACK}")


def test_an_old_study_whose_trials_were_asked_other_questions_is_told_so(mixed, started):
    """Another version drew them; nothing can be put back."""
    study, _ = mixed
    for path in study.glob("trials/*/rungs/*/scores.json"):
        change_json(path, {"data": "drawn otherwise"})
    assert error_message(started, Machine(quality)) == (
        f"{study} was begun by an earlier version, which asked its trials other questions of val: finish it with that "
        "version, or search in another folder with --study")


def test_what_new_runs_of_an_old_study_tell_holds_for_the_next_ones(mixed):
    """Most of these runs are of an earlier version, which recorded no pictures."""
    study, _ = mixed
    scores = {name: study / "trials" / name / "rungs" / "3" / "scores.json" for name in read_records(study)}
    for name, pictures in (("001", "of val"), ("002", "of val"), ("003", "exchanged")):
        change_json(scores[name], {"data": "1", "pictures": pictures})
    change_json(scores["000"], {"data": "1"})
    assert runs_of_something_else(study, read_json(study / STUDY), "trials") == {
        "003": "other pictures in the scores of trials"}
    change_json(scores["002"], {"pictures": None})
    assert runs_of_something_else(study, read_json(study / STUDY), "trials") == {
        "003": "other pictures in the scores of trials"}


def test_an_old_study_is_of_what_most_of_its_runs_are_of_though_the_first_one_is_not(started):
    study = started(Machine(quality))
    settings = {name: value for name, value in read_json(study / STUDY).items() if name != "identity"}
    change_json(study / "trials" / "000" / "rungs" / "3" / "scores.json", {"data": "other"})
    assert runs_of_something_else(study, settings, "trials") == {"000": "other data in the scores of trials"}


def test_a_study_whose_scores_say_nothing_is_compared_as_before(mixed):
    """The scores of the first versions had neither checksums nor a way of scoring."""
    study, best = mixed
    change_json(study / "trials" / best / "rungs" / "3" / "scores.json", {"data": None})
    assert StudyReport(study).left_out == {}
    (study / "trials" / best / "rungs" / "3" / "scores.json").unlink()
    assert StudyReport(study).left_out == {}


def test_what_is_searched_is_no_difference(mixed):
    study, _ = mixed
    for name in read_records(study):
        change_json(study / "trials" / name / "rungs" / "3" / "scores.json", {"prompt_format": f"Q{name}"})
    assert "prompt_format" in str(StudyReport(study).left_out)
    content = read_json(study / STUDY)
    content["space"]["parameters"]["prompt_format"] = {"kind": "categorical", "choices": ["QCM-A"], "default": "QCM-A"}
    write_json(study / STUDY, content)
    assert "prompt_format" not in str(StudyReport(study).left_out)


# --- The report's tables of fresh runs ---

def test_fresh_runs_that_are_of_something_else_are_in_no_table_and_it_is_said(started):
    study = started(Machine(quality))
    text = markdown(StudyReport(study), [])
    assert "Runs with other data" not in text
    change_json(study / "confirm" / "000-seed2" / "scores.json", {"split": "val"})
    change_json(study / "confirm" / "000-seed1" / "val" / "scores.json", {"data": "other"})
    report = StudyReport(study)
    assert report.left_out_of_confirmed == {"000-seed1": "other data in the scores on validation",
                                            "000-seed2": "other split in the scores on test"}
    text = markdown(report, [])
    assert ("Runs with other data, models or scoring than the study's are not compared to the others (000-seed1: other "
            "data in the scores on validation; 000-seed2: other split in the scores on test).") in text
    assert "on the test split" not in text and "mean over" not in text  # without the base, nothing is compared


def test_the_table_of_the_test_split_has_the_base_and_the_winner_alone(started):
    """This holds also where somebody has scored another configuration on the test split by hand."""
    study = started(Machine(quality), "--confirm", "2")
    winner, text = read_json(study / "verdict.json")["winner"], markdown(StudyReport(study), [])
    runs = read_records(study, "confirm")
    other = next(name for name, record in runs.items() if record["configuration"] not in ("000", winner))
    assert text.split("on the test split")[1].split("## Trials")[0].count("| ") > 2
    for name in ("scores.json", "generations.jsonl"):
        shutil.copy(study / "confirm" / f"{winner}-seed1" / name, study / "confirm" / other / name)
    assert markdown(StudyReport(study), []) == text


# --- What is compared ---

def test_the_conditions_of_scores_are_all_entries_that_are_no_result_and_not_the_runs_own():
    result = summarize([], ScienceQA(Path(), {}, {}), 0)
    own = {"checkpoint": "checkpoint-2.pth", "checkpoint_sha256": "1", "adapter": {"adapter_dim": 8}}
    asked = {"precision": "bf16", "bits": "16bit", "base": "2", "vision": "3", "prompt_format": "QCM-ALE",
             "max_seq_len": 512, "decode": "score", "split": "val", "data": "4", "pictures": "5", "anything": "new"}
    assert conditions({**result, **own, **asked, "git_commit": "a"}) == asked
    of_own_questions = {"Plants": 50.0, "Avg": 50.0, "counts": {"Plants": 2, "Avg": 2}}
    assert conditions({**result, **own, **asked, **of_own_questions}) == asked


def test_entries_are_compared_where_both_tell_them():
    assert differences({"val": {"data": "1", "new": "2", "none": None}}, {"val": {"data": "1", "none": "3"}}) == []
    assert differences({"val": {"base_sha256": "1", "base": "1"}, "test": {"base": "1"}, "train": {"base": "1"}},
                       {"val": {"base_sha256": "2", "base": "2"}, "test": {"base": "2"}}) == [
        "other base in the scores on test and the scores on validation"]
