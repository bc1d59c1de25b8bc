"""Confirmation with fresh seeds: what is run again, by whom, and what the runs are said to show."""

import itertools
import json
import os
import threading
import time

import numpy as np
import pytest
import scipy.stats

from lavin.runtime.errors import UserError
from lavin.runtime.files import write_json
from util.search import confirm
from util.search.confirm import dunnett, is_done, plan, read_outcomes, run_all, sentence, verdict
from util.search.folder import begin_record, change_record
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
    """Also one that comes while another computes it."""
    lock = claim(study / ".locks" / "verdict")
    other = threading.Thread(target=confirm.finish, args=(study, None, [], 20))
    other.start()
    other.join(0.2)
    assert other.is_alive()
    write_json(study / confirm.VERDICT, {"winner": "001"})
    os.close(lock)
    other.join(20)
    assert not other.is_alive()


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

@pytest.mark.parametrize("k, n, critical", [(1, 4, 1.94), (1, 6, 1.81), (2, 3, 2.34), (3, 3, 2.42), (4, 3, 2.47),
                                            (5, 3, 2.50), (3, 6, 2.19)])
def test_dunnett_has_the_critical_values_of_his_table(k, n, critical):
    """Dunnett 1955, table 1a: one-sided, 5 %, k configurations, (k + 1)(n - 1) degrees of freedom."""
    spread = np.tile([-1.0, 1.0], n)[:n]
    spread = (spread - spread.mean()) / spread.std(ddof=1)
    values = np.tile(spread, (1 + k, 1))
    values[k] += critical * np.sqrt(2 / n)
    assert dunnett(values) == pytest.approx(0.05, abs=0.0008)


def drawn_p(values: np.ndarray, draws: int = 200_000) -> float:
    """Dunnett's p-value by its definition: how often k equal configurations have a difference as large by chance."""
    k, n = len(values) - 1, values.shape[1]
    rng, degrees = np.random.default_rng(0), (k + 1) * (n - 1)
    means = rng.standard_normal((draws, k + 1)) / np.sqrt(n)
    largest = (means[:, 1:].max(1) - means[:, 0]) / np.sqrt(rng.chisquare(degrees, draws) / degrees)
    found = (values[1:].mean(1) - values[0].mean()).max() / np.sqrt(values.var(1, ddof=1).mean())
    return float((largest >= found).mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k, n", [(1, 3), (3, 3), (3, 2), (5, 4)])
def test_dunnett_agrees_with_draws(k, n, seed):
    values = np.random.default_rng(seed).normal(size=(1 + k, n)) + 0.8 * seed * np.eye(1 + k)[-1:].T
    assert dunnett(values) == dunnett(values) == pytest.approx(drawn_p(values), abs=0.004)
    assert dunnett(7 + 3 * values) == pytest.approx(dunnett(values))  # no units


def test_dunnett_without_any_spread():
    assert dunnett(np.ones((3, 2))) == dunnett(np.array([[2.0, 2], [1, 1]])) == 1
    assert dunnett(np.array([[1.0, 1], [2, 2]])) == dunnett(np.array([[1.0, 1], [0, 0], [2, 2]])) == 0


def outcomes(rng, accuracies, seeds: int = 3, n: int = 400, spread: float = 0.0) -> dict[str, np.ndarray]:
    difficulty = rng.random(n)
    return {f"{i:03d}": np.array([difficulty < p + spread * rng.normal() for _ in range(seeds)], int)
            for i, p in enumerate(accuracies)}


def test_a_clearly_better_configuration_is_found_and_named():
    found = verdict(outcomes(np.random.default_rng(0), (0.70, 0.72, 0.85, 0.60), spread=0.005))
    assert found.winner == "002" and found.found and found.low < 15 < found.high + 1
    assert sentence(vars(found)).startswith("Trial 002 is better than the base: +1")


def test_a_difference_that_seeds_alone_make_is_not_found():
    """Significant over the questions, but no larger than the spread between the seeds."""
    rows = outcomes(np.random.default_rng(0), (0.7, 0.7))
    rows["000"] = np.array([[1] * 280 + [0] * 120, [1] * 240 + [0] * 160, [1] * 320 + [0] * 80])
    rows["001"] = np.array([[1] * 350 + [0] * 50, [1] * 290 + [0] * 110, [1] * 320 + [0] * 80])
    result = verdict(rows)
    assert result.p_questions < 0.01 and result.p_seeds > 0.1 and not result.found
    assert sentence(vars(result)).startswith("Nothing better than the base was found.")


def test_a_difference_on_too_few_questions_is_not_found():
    """The same answers with every seed, three of them better than the base's."""
    rows = {"000": np.array([[1, 0, 0, 0, 1, 1]] * 3), "001": np.array([[1, 1, 1, 1, 1, 1]] * 3)}
    result = verdict(rows)
    assert result.p_seeds < 0.001 and result.p_questions == 0.25 and not result.found


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_worse_winner_is_never_found(seeds):
    result = verdict(outcomes(np.random.default_rng(0), (0.9, 0.5, 0.6), seeds))
    assert result.winner == "002" and result.difference < -20 and not result.found


# --- Several comparisons ---

def one_seed(gained: int, lost: int, k: int) -> dict[str, np.ndarray]:
    """The base, a configuration that answers `gained` questions more than it and `lost` others not, and k - 1 that
    answer as the base does."""
    same = [1, 0] * 20
    base = np.array([[0] * gained + [1] * lost + same])
    return {"000": base, "001": np.array([[1] * gained + [0] * lost + same]),
            **{f"{i:03d}": base for i in range(2, k + 1)}}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("gained, lost", [(8, 1), (12, 2), (9, 6)])
def test_the_p_over_questions_is_the_binomial_tests_times_the_number_of_configurations(k, gained, lost):
    result = verdict(one_seed(gained, lost, k))
    single = scipy.stats.binomtest(gained, gained + lost).pvalue
    assert result.winner == "001" and result.n_configurations == k
    assert result.p_questions == pytest.approx(min(1, k * single))
    assert result.found == (k * single < 0.05)
    assert f"p = {min(1, k * single):.3f} over questions" in sentence(vars(result))
    assert (f"adjusted for {k} configurations" in sentence(vars(result))) == (k > 1)


@pytest.mark.parametrize("k", [1, 3])
def test_the_p_over_questions_of_several_seeds_counts_the_signs_of_their_sums_times_the_configurations(k):
    """All of the 2^8 signs of eight questions' differences, one after another."""
    rng = np.random.default_rng(0)
    base, better = (rng.random((3, 8)) < [[0.3]]).astype(int), (rng.random((3, 8)) < [[0.8]]).astype(int)
    result = verdict({"000": base, "001": better, **{f"{i:03d}": base for i in range(2, k + 1)}})
    differences = better.sum(0) - base.sum(0)
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    single = (abs(signs @ abs(differences)) >= abs(differences.sum())).mean()
    assert 0 < single < 0.3 and result.p_questions == pytest.approx(min(1, k * single))


@pytest.mark.parametrize("n_rivals", [1, 3])
def test_the_p_over_seeds_is_dunnetts_over_all_configurations(n_rivals):
    """With the spread of all of them: not only of the winner's and the base's."""
    rng = np.random.default_rng(5)
    rows = outcomes(rng, [0.7, 0.74, *[0.69] * n_rivals], seeds=3, spread=0.02)
    expected = drawn_p(np.array([row.mean(1) for row in rows.values()]))
    assert 0.01 < expected < 0.9 and verdict(rows).p_seeds == pytest.approx(expected, abs=0.004)


def rows_of(*accuracies: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Of 1,000 questions, of which each run answers the easiest; accuracies in tenths of a percent, by seed."""
    return {f"{i:03d}": np.array([[1] * correct + [0] * (1000 - correct) for correct in seeds])
            for i, seeds in enumerate(accuracies)}


def test_a_p_over_seeds_between_5_and_10_percent_finds_nothing():
    result = verdict(rows_of((700, 720, 740), (730, 750, 770)))
    assert result.p_questions < 1e-6 and 0.05 < result.p_seeds < 0.1 and not result.found


def test_the_winner_is_the_best_by_the_mean_of_all_seeds():
    result = verdict(rows_of((500, 510, 520), (900, 510, 520), (700, 710, 690), (600, 600, 800)))
    assert result.winner == "002" and result.difference == pytest.approx(19)
    assert result.low < 19 < result.high


def test_the_sentence_says_each_number_where_it_belongs():
    said = sentence({"winner": "007", "n_configurations": 3, "seeds": 2, "difference": 1.25, "low": -0.5, "high": 2.75,
                     "p_seeds": 0.0123, "p_questions": 0.0456, "found": True})
    assert said == ("Trial 007 is better than the base: +1.25 points on validation with 2 fresh seeds (95 % interval "
                    "−0.50 to +2.75; p = 0.012 over seeds and p = 0.046 over questions, adjusted for 3 "
                    "configurations).")


def test_with_one_seed_the_seeds_are_in_no_test():
    result = verdict(outcomes(np.random.default_rng(0), (0.5, 0.9), seeds=1))
    assert result.p_seeds is None and result.found and "over seeds" not in sentence(vars(result))
    assert "1 fresh seed (" in sentence(vars(result))


def test_equal_configurations_are_rarely_found_different(monkeypatch):
    """The promise is 5 %; of 200 studies, 18 or more would have a chance of 2 %."""
    monkeypatch.setattr(confirm, "paired_bootstrap", lambda *_: (0.0, 0.0))  # slow, and not what decides
    rng = np.random.default_rng(1)
    results = [verdict(outcomes(rng, [0.8] * 4, n=300, spread=0.02)) for _ in range(200)]
    assert sum(result.found for result in results) < 18


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_order_of_the_configurations_does_not_matter(k):
    rows = outcomes(np.random.default_rng(k), [0.7 + 0.01 * i for i in range(k)], n=60)
    shuffled = dict(reversed(rows.items()))
    assert verdict(shuffled).p_questions == verdict(rows).p_questions
    assert verdict(shuffled).difference == verdict(rows).difference


def test_questions_are_matched_by_their_id(tmp_path):
    lines = [{"qid": "b", "prediction": 1, "answer": 1}, {"qid": "a", "prediction": 0, "answer": 1}]
    for name, order in (("x", lines), ("y", lines[::-1])):
        (tmp_path / name / "val").mkdir(parents=True)
        (tmp_path / name / "val" / "generations.jsonl").write_text("\n".join(map(json.dumps, order)) + "\n")
    read = read_outcomes([("000", tmp_path / "x"), ("000", tmp_path / "y")])
    assert read["000"].tolist() == [[0, 1], [0, 1]]
    (tmp_path / "y" / "val" / "generations.jsonl").write_text('{"qid": "a", "answer": 1}\n')
    with pytest.raises(UserError, match="generations.jsonl, line 1: prediction: is missing"):
        read_outcomes([("000", tmp_path / "y")])
