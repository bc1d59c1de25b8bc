"""Confirmation with fresh seeds: what is run again, by whom, and what the runs are said to show."""

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lavin.runtime.errors import UserError
from lavin.runtime.files import read_json, write_json
from util.comparison.statistics import contrast, mcnemar, seed_variance
from util.data.datasets import ScienceQA, cluster
from util.search import confirm
from util.search.confirm import (
    Confirmation,
    fresh_questions,
    is_current,
    is_done,
    plan,
    questions_of_trials,
    read_confirmation,
    retested,
    run_all,
    sentence,
    verdict,
)
from util.search.folder import VERDICT, begin_record, change_record
from util.search.locks import claim


def trial(study, number: int, state: str, *accuracies: int) -> None:
    """One that was scored on 100 questions after 2, 6 and 20 epochs."""
    rungs = [{"epoch": epoch, "correct": correct, "questions": 100}
             for epoch, correct in zip((2, 6, 20), accuracies, strict=False)]
    folder = study / "trials" / f"{number:03d}"
    begin_record(folder, 1, values={"blr": number / 1000}, params={})
    change_record(folder, state=state, rungs=rungs)


@pytest.fixture
def study(tmp_path):
    """The base is trial 0; trial 4 has failed, and trial 3 was pruned with the highest score of all."""
    for number, state, accuracies in ((0, "COMPLETE", (60, 70, 80)), (1, "COMPLETE", (60, 70, 78)),
                                      (2, "COMPLETE", (60, 70, 82)), (3, "PRUNED", (99,)), (4, "FAIL", (70, 80, 90)),
                                      (5, "PRUNED", (50, 66))):
        trial(tmp_path, number, state, *accuracies)
    return tmp_path


# --- What is run again ---

def test_the_best_and_the_base_run_with_seeds_that_were_not_used(study):
    runs = plan(study, 2, 3, first_seed=8)
    assert [(run.configuration, run.seed) for run in runs] == [(name, seed) for seed in (8, 9, 10)
                                                               for name in ("000", "002", "001")]
    assert runs[1].values == {"blr": 0.002} and runs[1].folder == study / "confirm" / "002-seed8"


def test_the_best_are_so_at_the_end_of_the_schedule_and_not_within_it(tmp_path):
    for number, accuracies in enumerate(((60, 70, 80), (90, 95, 81), (60, 70, 82), (97, 70, 79))):
        trial(tmp_path, number, "COMPLETE", *accuracies)
    assert [run.configuration for run in plan(tmp_path, 2, 1, 1)] == ["000", "002", "001"]


def test_those_that_came_farthest_follow_where_too_few_finished(study):
    assert [run.configuration for run in plan(study, 9, 1, 1)] == ["000", "002", "001", "005", "003"]


def test_without_another_configuration_nothing_is_run(tmp_path):
    trial(tmp_path, 0, "COMPLETE", 60, 70, 80)
    trial(tmp_path, 1, "FAIL", 60)
    assert plan(tmp_path, 3, 3, 1) == []


def test_workers_share_the_runs_and_none_is_done_twice(study, monkeypatch):
    monkeypatch.setattr(confirm, "WAIT_SECONDS", 0.01)
    runs, executed = plan(study, 2, 3, 1), []

    def execute(run, lock):
        executed.append(run.folder.name)
        begin_record(run.folder, 1)
        time.sleep(0.01)
        change_record(run.folder, state="COMPLETE")

    workers = [threading.Thread(target=run_all, args=(study, runs, execute)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert sorted(executed) == sorted(run.folder.name for run in runs) and all(map(is_done, runs))


def test_all_workers_end_with_the_verdict(study):
    """A worker that comes while another one computes the verdict ends with it, too."""
    lock = claim(study / ".locks" / "verdict")
    written, returned = {"winner": "001", "p": 0.5}, []
    other = threading.Thread(target=lambda: returned.append(confirm.finish(study, None, [], 20)))
    other.start()
    other.join(0.2)
    assert other.is_alive()
    write_json(study / VERDICT, written)
    os.close(lock)
    other.join(20)
    assert returned == [written] and read_json(study / VERDICT) == written


def test_a_run_whose_worker_was_killed_is_taken_up(study):
    runs, executed = plan(study, 1, 1, 1), []

    def killed(run, lock):
        begin_record(run.folder, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(study, runs, killed)
    run_all(study, runs, lambda run, lock: executed.append(run) or write_json(
        run.folder / "trial.json", {"state": "COMPLETE"}))
    assert executed == runs


# --- What they show ---

def outcomes(rng, accuracies, seeds: int = 3, n: int = 400, spread: float = 0.0) -> dict[str, np.ndarray]:
    difficulty = rng.random(n)
    return {f"{i:03d}": np.array([difficulty < p + spread * rng.normal() for _ in range(seeds)], int)
            for i, p in enumerate(accuracies)}


def rows_of(*accuracies: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Outcomes on 1,000 questions, of which each run answers the easiest. accuracies: the accuracies by seed, in tenths
    of a percent."""
    return {f"{i:03d}": np.array([[1] * correct + [0] * (1000 - correct) for correct in seeds])
            for i, seeds in enumerate(accuracies)}


def test_a_clearly_better_configuration_is_found_and_named():
    found = verdict(Confirmation(outcomes(np.random.default_rng(0), (0.70, 0.72, 0.85, 0.60), spread=0.005)))
    assert found.winner == "002" and found.found and found.low < 15 < found.high + 1
    assert sentence(vars(found)).startswith("Trial 002 is better than the base: +1")


def test_a_difference_that_seeds_alone_make_is_not_found():
    """Significant over the questions, but no larger than the spread between the seeds."""
    rows = rows_of((700, 600, 800), (875, 725, 800))
    assert mcnemar(rows["001"][0], rows["000"][0]) < 1e-6
    result = verdict(Confirmation(rows))
    assert result.p > 0.1 and not result.found
    assert sentence(vars(result)).startswith("Nothing better than the base was found.")


def test_a_difference_on_too_few_questions_is_not_found():
    """The same answers with every seed, three of them better than the base's."""
    result = verdict(Confirmation({"000": np.array([[1, 0, 0, 0, 1, 1]] * 3), "001": np.array([[1] * 6] * 3)}))
    assert result.difference == 50 and result.p > 0.05 and not result.found


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_worse_winner_is_never_found(seeds):
    result = verdict(Confirmation(outcomes(np.random.default_rng(0), (0.9, 0.5, 0.6), seeds)))
    assert result.winner == "002" and result.difference < -20 and not result.found


@pytest.mark.parametrize("k", [1, 3])
def test_p_and_interval_are_of_the_one_estimate_over_all_configurations(k):
    rows = outcomes(np.random.default_rng(5), [0.7, 0.74, *[0.69] * (k - 1)], spread=0.02)
    clusters = np.arange(400) // 4
    result = verdict(Confirmation(rows, clusters))
    estimate = contrast([rows["000"], rows["001"]], (-1, 1), clusters, seed_variance(list(rows.values()), clusters))
    assert result.winner == "001" and (result.n_configurations, result.seeds, result.questions) == (k, 3, 400)
    assert result.p == min(1, k * estimate.p_greater) and 0.001 < estimate.p_greater < 0.4
    assert (result.low, result.high) == tuple(100 * end for end in estimate.interval(k))
    assert (f"adjusted for {k} configurations" in sentence(vars(result))) == (k > 1)
    assert f"; one-sided p = {result.p:.3f}" in sentence(vars(result))


def test_the_winner_is_the_best_by_the_mean_of_all_seeds():
    result = verdict(Confirmation(rows_of((500, 510, 520), (900, 510, 520), (700, 710, 690), (600, 600, 800))))
    assert result.winner == "002" and result.difference == pytest.approx(19)
    assert result.low < 19 < result.high


def test_the_sentence_says_each_number_where_it_belongs():
    said = sentence({"winner": "007", "n_configurations": 3, "seeds": 2, "questions": 3241, "difference": 1.25,
                     "low": -0.5, "high": 2.75, "p": 0.0123, "found": True})
    assert said == ("Trial 007 is better than the base: +1.25 points on 3,241 validation questions with 2 fresh seeds "
                    "(95 % interval −0.50 to +2.75; one-sided p = 0.012, adjusted for 3 configurations).")


def test_one_seed_names_no_winner():
    result = verdict(Confirmation(outcomes(np.random.default_rng(0), (0.5, 0.9), seeds=1)))
    assert result.p is None and not result.found
    assert sentence(vars(result)).startswith("No winner is named, since one fresh seed each tells nothing about conf")


def test_questions_that_chose_the_configurations_name_no_winner():
    rows = outcomes(np.random.default_rng(0), (0.5, 0.9))
    assert verdict(Confirmation(rows)).found
    result = verdict(Confirmation(rows, fresh=False))
    assert result.p is None and not result.found and "give at most half of them with --questions" in sentence(
        vars(result))


def test_equal_configurations_are_rarely_found_different():
    """The promise is 5 %; of 200 studies, 18 or more would have a chance of 2 %. (tests/faults/search_proof.py)"""
    rng = np.random.default_rng(1)
    results = [verdict(Confirmation(outcomes(rng, [0.8] * 4, n=300, spread=0.02))) for _ in range(200)]
    assert sum(result.found for result in results) < 18


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_order_of_the_configurations_does_not_matter(k):
    rows = outcomes(np.random.default_rng(k), [0.7 + 0.01 * i for i in range(k)], n=60)
    shuffled = dict(reversed(rows.items()))
    assert verdict(Confirmation(shuffled)).p == pytest.approx(verdict(Confirmation(rows)).p)
    assert verdict(Confirmation(shuffled)).difference == verdict(Confirmation(rows)).difference


def write_answers(folder: Path, right: dict[str, int], clusters: dict[str, str] | None = None) -> Path:
    """The answers of a run on validation, in this order; 1: correct."""
    (folder / "val").mkdir(parents=True)
    (folder / "val" / "generations.jsonl").write_text("".join(json.dumps(
        {"qid": qid, "prediction": digit, "answer": 1, **({"cluster": clusters[qid]} if clusters else {})}) + "\n"
        for qid, digit in right.items()))
    return folder


def test_questions_are_matched_by_their_id(tmp_path):
    runs = [("000", write_answers(tmp_path / "x", {"b": 1, "a": 0})),
            ("000", write_answers(tmp_path / "y", {"a": 0, "b": 1}))]
    assert read_confirmation(runs, ()).outcomes["000"].tolist() == [[0, 1], [0, 1]]
    (tmp_path / "y" / "val" / "generations.jsonl").write_text('{"qid": "a", "answer": 1}\n')
    with pytest.raises(UserError, match="generations.jsonl, line 1: prediction: is missing"):
        read_confirmation([("000", tmp_path / "y")], ())


def test_questions_that_trials_were_scored_on_do_not_confirm(tmp_path):
    """A configuration answers the lectures of the questions that eval.py --questions asks, and no other ones."""
    problems = {str(i): {"lecture": f"Lecture {i % 5}."} for i in range(30)}
    data = ScienceQA(tmp_path, problems, {})
    searched = data.sample(10).problems
    lectures = {problem["lecture"] for problem in searched.values()}
    assert len(searched) == 10 and len(lectures) == 2  # one of six questions, and four of another
    right = {qid: int(problem["lecture"] in lectures) for qid, problem in problems.items()}
    runs = [("000", write_answers(tmp_path / "x", right, {qid: cluster(qid, p) for qid, p in problems.items()}))]
    found = read_confirmation(runs, searched)
    assert found.fresh and found.outcomes["000"].tolist() == [[0] * 18]
    assert np.bincount(found.clusters).tolist() == [6, 6, 6]
    for nothing_is_fresh in (data.sample(25).problems, ()):
        everything = read_confirmation(runs, nothing_is_fresh)
        assert not everything.fresh and everything.outcomes["000"].sum() == 12 and everything.base.shape == (1, 30)


@pytest.mark.parametrize("clusters", [dict.fromkeys("abc", "the only topic"), dict.fromkeys("abc")])
def test_questions_are_fresh_one_by_one_where_clusters_tell_none_apart(clusters):
    assert fresh_questions(clusters, {"a", "another split's"}) == {"b", "c"}


def test_the_questions_of_trials_are_those_in_their_folders(study, tmp_path):
    """An earlier version drew them from all lectures, so that the number alone does not tell them."""
    for name, qids in (("000", "a"), ("001", "ab"), ("002", "b")):
        folder = write_answers(study / "trials" / name / "rungs", dict.fromkeys(qids, 1))
        (folder / "val").rename(folder / "2")
    assert questions_of_trials(study) == {"a", "b"}


def test_a_verdict_of_an_earlier_version_is_tested_anew(tmp_path):
    """Its winner stays, since the test split has been scored for it."""
    found = Confirmation(outcomes(np.random.default_rng(0), (0.5, 0.7, 0.9)))
    known = {"winner": "001", "p_seeds": 0.01, "p_questions": 0.01, "found": True, "difference": 3.0}
    anew = retested(known, found)
    assert not is_current(known) and anew["winner"] == "001" and anew["difference"] == pytest.approx(20, abs=5)
    assert anew["p"] == min(1, 2 * found.estimate("001").p_greater)
    assert retested({"winner": "001", "p": 0.5}, found) == {"winner": "001", "p": 0.5}
    of_something_else = retested({**known, "winner": "009"}, found)  # whose runs are left out
    assert of_something_else == asdict(verdict(found)) and of_something_else["winner"] == "002"
