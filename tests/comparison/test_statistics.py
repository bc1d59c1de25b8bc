"""Statistics against scipy, statsmodels, published examples, tables, enumerations, loops and simulations."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2, sem, t, ttest_1samp, ttest_ind

from tests.simulated_studies import World, simulate, simulate_effect, simulate_table
from util.comparison.statistics import (
    Estimate,
    accuracy_interval,
    contrast,
    design_effect,
    equal_variances,
    expected_design_effect,
    holm,
    mcnemar,
    newcombe,
    seed_variance,
    standard_error,
    tango,
    two_way,
    wilson,
)

# --- Proportions ---


@pytest.mark.parametrize("correct, n", [(0, 10), (10, 10), (3, 7), (3767, 4241), (1, 300)])
def test_wilson_equals_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_holds_the_proportion_itself():
    """No rounding error may leave it outside, which would be an error bar of negative length."""
    for n in range(1, 4242):
        assert wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1


def test_newcombe_equals_the_published_example():
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # Newcombe 1998, table II, example (a)
    low, high = newcombe(48, 80, 56, 70)
    assert (low, high) == pytest.approx((-0.3339, -0.0524), abs=5e-5)


# --- Clusters ---

@st.composite
def clustered_values(draw):
    """Values [n], and their clusters, of which each has at least one."""
    clusters = draw(st.lists(st.integers(0, 5), min_size=2, max_size=30))
    values = draw(st.lists(st.integers(-2, 2), min_size=len(clusters), max_size=len(clusters)))
    return np.array(values, float), np.unique(clusters, return_inverse=True)[1]


@given(clustered_values())
def test_standard_error_sums_the_products_of_residuals_within_clusters(drawn):
    values, clusters = drawn
    n, g = len(values), clusters.max() + 1
    residuals = values - values.mean()
    total = sum(residuals[i] * residuals[j] for i in range(n) for j in range(n) if clusters[i] == clusters[j])
    assert standard_error(values, clusters) == pytest.approx(np.sqrt(max(0, total) * g / max(1, g - 1)) / n, abs=1e-7)


def test_standard_error_equals_statsmodels():
    """OLS on a constant with cov_type="cluster", statsmodels 0.15."""
    values = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1])
    clusters = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    assert standard_error(values, clusters) == pytest.approx(0.04618802153517005, rel=1e-9)


@given(clustered_values())
def test_a_question_as_its_own_cluster_is_the_plain_case(drawn):
    values, _ = drawn
    alone = np.arange(len(values))
    assert standard_error(values, alone) == standard_error(values) == pytest.approx(sem(values), abs=1e-12)
    assert design_effect(values, alone) == pytest.approx(1)
    run, base = values > 0, values > -1
    assert mcnemar(run, base, alone) == mcnemar(run, base)
    (low, high), (plain_low, plain_high) = tango(run, base, alone), tango(run, base)
    assert low <= plain_low + 1e-9 and plain_high - 1e-9 <= high  # Student's quantile is larger
    rows = np.stack([run, base, run]).astype(int)
    between = seed_variance([rows])
    assert contrast([rows, rows[:2]], (-1, 1), alone, between) == contrast([rows, rows[:2]], (-1, 1), None, between)


def test_design_effect_by_hand():
    clusters = np.repeat(np.arange(10), 4)
    copies = np.repeat([1, 0, 0, 1, 1, 1, 0, 1, 0, 1], 4)  # 40 questions say as much as 10
    assert design_effect(copies, clusters) == pytest.approx(39 / 9)
    assert design_effect(np.ones(40), clusters) == 1
    assert expected_design_effect(40, 3 / 39, 0.2) == pytest.approx(1 + 3 * 0.2)  # Kish's, for clusters of 4


def test_the_interval_of_a_run_by_hand():
    """Wilson's for as many independent answers as determine the accuracy as well, with Student's quantile for the
    number of clusters: 2.262 for 10 of any textbook's table."""
    clusters = np.repeat(np.arange(10), 4)
    copies = np.repeat([1, 0, 0, 1, 1, 1, 0, 1, 0, 1], 4)
    size = 40 / (39 / 9) * (1.959964 / 2.262157) ** 2
    assert accuracy_interval(copies[None], clusters, None) == pytest.approx(wilson(0.6 * size, size), abs=1e-6)
    opposite = np.tile([1, 0], 20)  # no variance between clusters: no more than 40 independent questions
    size = 40 * (1.959964 / 2.262157) ** 2
    assert accuracy_interval(opposite[None], clusters, None) == pytest.approx(wilson(0.5 * size, size), abs=1e-6)
    assert accuracy_interval(copies[None], None, None) == wilson(24, 40)


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("n", [8, 10, 400, 783, 4241])
def test_an_accuracy_of_0_or_100_percent_has_an_interval(right, n):
    rows = np.full((3, n), right)
    for clusters in (None, np.arange(n) // 2):
        for seeds, between in ((1, None), (3, seed_variance([rows, rows], clusters))):
            low, high = accuracy_interval(rows[:seeds], clusters, between)
            assert low <= right <= high and high - low > 1 / n


# --- Two runs ---

def right_answers(only_run: int, only_base: int, both: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of a run and a base, with the number of questions that one or both answered rightly."""
    return (np.array([1] * only_run + [0] * only_base + [1] * both),
            np.array([0] * only_run + [1] * only_base + [1] * both))


def test_mcnemar_by_hand():
    assert mcnemar(*right_answers(1, 5)) == 2 * (1 + 6) / 2**6
    assert mcnemar(*right_answers(0, 0)) == 1
    assert mcnemar(*right_answers(3, 3)) == 1


@pytest.mark.parametrize("only_run, only_base", [(0, 9), (12, 4), (70, 45), (150, 300), (400, 0)])
def test_mcnemar_equals_scipys_binomial_test(only_run, only_base):
    expected = binomtest(only_run, only_run + only_base).pvalue
    assert mcnemar(*right_answers(only_run, only_base)) == pytest.approx(expected, rel=1e-9)


def test_clustered_test_equals_enumerating_the_sign_flips_of_clusters():
    rng = np.random.default_rng(1)
    run, base = (rng.random(40) < 0.8).astype(int), (rng.random(40) < 0.6).astype(int)
    clusters = rng.integers(10, size=40)
    sums = np.array([(run - base)[clusters == c].sum() for c in range(10)])
    flipped = np.array(list(itertools.product([1, -1], repeat=10))) @ sums
    expected = np.mean(abs(flipped) >= abs(sums.sum()))
    assert expected < 0.5
    assert mcnemar(run, base, clusters) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(run, base) != pytest.approx(expected, rel=0.1)


def test_tango_gives_equal_and_opposite_answers_an_interval():
    """The ends that Tango's interval has where McNemar's and Wald's are of no width."""
    ones, zeros = np.ones(400, int), np.zeros(400, int)
    assert tango(ones[:8], ones[:8]) == pytest.approx((-0.324, 0.324), abs=5e-4)
    assert tango(ones, ones) == pytest.approx((-0.0095, 0.0095), abs=5e-5)
    low, high = tango(ones[:10], zeros[:10])
    assert low == pytest.approx(0.445, abs=5e-4) and high == 1


@pytest.mark.parametrize("wins, losses, n", [(5, 1, 20), (0, 3, 30), (40, 20, 200), (7, 7, 14), (9, 0, 10), (0, 0, 25)])
def test_tangos_ends_are_where_the_score_test_has_p_05(wins, losses, n):
    """The score test by its definition, with the likeliest shares of wins and losses found on a grid."""
    run, base = right_answers(wins, losses, n - wins - losses)
    for end in tango(run, base):
        if abs(end) == 1:
            continue
        share = np.linspace(max(0, -end), (1 - end) / 2, 2_000_001)[1:-1]  # of losses; of wins: share + end
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = sum(np.where(count, count * np.log(p), 0) for count, p in (
                (wins, share + end), (losses, share), (n - wins - losses, 1 - 2 * share - end)))
        losing = share[np.argmax(likelihood)]
        variance = n * (2 * losing + end - end**2)
        assert (wins - losses - n * end) ** 2 / variance == pytest.approx(1.959964**2, rel=2e-3)


def test_clusters_widen_tangos_interval_by_their_design_effect_and_students_quantile():
    run, base = right_answers(30, 10, 60)
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(12, size=100))
    effect = design_effect(run - base, clusters)
    assert effect > 2
    low, high = tango(run, base, clusters)
    plain_low, plain_high = tango(run, base)
    assert (high - low) / (plain_high - plain_low) == pytest.approx(np.sqrt(effect) * 2.201 / 1.96, rel=0.06)
    spread = np.arange(100) % 50  # clusters that seem to add information do not: only the quantile is another
    assert design_effect(run - base, spread) < 1
    low, high = tango(run, base, spread)
    assert (high - low) / (plain_high - plain_low) == pytest.approx(2.0096 / 1.96, rel=0.01)


def test_clusters_of_one_runs_answers_do_not_widen_the_interval_of_a_difference():
    """Both runs are right on the same lectures, and each on one question of every lecture that the other misses."""
    run = np.tile([[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]], (10, 1))
    base, lectures = run[:, [5, 1, 2, 3, 4, 0]].ravel(), np.repeat(np.arange(20), 6)
    assert design_effect(run.ravel(), lectures) > 2
    (low, high), (plain_low, plain_high) = tango(run.ravel(), base, lectures), tango(run.ravel(), base)
    assert (high - low) / (plain_high - plain_low) == pytest.approx(2.093 / 1.96, rel=0.01)  # Student's, 20 clusters


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1, 1]
    assert holm([]) == []


# --- Several seeds ---

def drawn(rng, seeds: int, n: int, spread: float = 0.05, p: float = 0.7) -> np.ndarray:
    return (rng.random((seeds, n)) < p + spread * rng.standard_normal((seeds, 1))).astype(int)


def test_seed_variance_is_pooled_over_all_methods():
    rng = np.random.default_rng(0)
    rows = [drawn(rng, seeds, 300) for seeds in (2, 5, 1, 3)]
    found = seed_variance(rows)
    several = [row.mean(1) for row in rows if len(row) > 1]
    assert found.freedom == 7
    assert found.accuracies == pytest.approx(sum((len(a) - 1) * a.var(ddof=1) for a in several) / 7)
    assert seed_variance([rows[2]]) is None
    # all of the variance of answers that do not depend on the seed but by chance
    coins = [drawn(rng, 40, 500, spread=0) for _ in range(3)]
    assert seed_variance(coins).answers == pytest.approx(0.7 * 0.3 / 500, rel=0.03)
    assert seed_variance(coins).accuracies == pytest.approx(0.7 * 0.3 / 500, rel=0.3)
    copies, clusters = [np.repeat(coin, 4, axis=1) for coin in coins], np.repeat(np.arange(500), 4)
    assert seed_variance(copies, clusters).answers == pytest.approx(seed_variance(coins).answers)
    assert seed_variance(copies).answers == pytest.approx(seed_variance(coins).answers / 4, rel=0.01)


def test_without_variance_between_questions_it_is_the_t_test_on_accuracies():
    """Every seed answers all questions rightly or none: two-sample t-test with the pooled variance (scipy)."""
    base, method = np.array([1, 0, 0, 1, 0, 0]), np.array([1, 1, 0, 1, 1, 1])
    rows = [np.tile(seeds[:, None], (1, 20_000)) for seeds in (base, method)]
    estimate = contrast(rows, (-1, 1), None, seed_variance(rows))
    expected = ttest_ind(method, base)
    assert estimate.centre == pytest.approx(method.mean() - base.mean(), rel=1e-3)
    assert estimate.freedom == pytest.approx(10, abs=0.01) and estimate.p == pytest.approx(expected.pvalue, rel=2e-3)


def test_without_variance_between_seeds_it_is_the_t_test_on_questions():
    rng = np.random.default_rng(0)
    rows = [np.tile(drawn(rng, 1, 900), (3, 1)) for _ in range(2)]
    estimate = contrast(rows, (-1, 1), None, seed_variance(rows))
    expected = ttest_1samp(np.append((rows[1] - rows[0])[0], [1, -1]), 0)
    assert estimate.p == pytest.approx(expected.pvalue) and estimate.freedom == pytest.approx(901)
    low, high = expected.confidence_interval()
    assert estimate.interval() == pytest.approx((low, high))


def test_balanced_data_have_the_standard_error_of_a_mixed_model():
    """The oracle is statsmodels 0.15: MixedLM by REML, `correct ~ method` with question, question x method and seed as
    random effects, on these outcomes (seed 3), gives `method` a standard error of 0.033024."""
    rng = np.random.default_rng(3)
    question = rng.standard_normal(150)
    rows = [(question + 0.6 * rng.standard_normal(150) + 0.7 * rng.standard_normal((4, 150))
             + 0.15 * rng.standard_normal((4, 1)) < threshold).astype(int) for threshold in (0.9, 1.1)]
    between = seed_variance(rows)
    differences = rows[1].mean(0) - rows[0].mean(0)
    variance, _ = two_way(standard_error(differences) ** 2, 149, between.accuracies / 2, between.answers / 2, 6)
    assert np.sqrt(variance) == pytest.approx(0.033024, rel=1e-4)


@given(st.floats(1e-9, 1), st.integers(1, 500), st.floats(1e-9, 1), st.floats(0, 1), st.integers(1, 50))
def test_the_variance_is_at_least_that_of_questions_and_of_seeds(questions, f, seeds, share, g):
    answers = share * min(questions, seeds)
    variance, freedom = two_way(questions, f, seeds, answers, g)
    assert variance >= max(questions, seeds) and variance == pytest.approx(questions + seeds - answers)
    assert min(f, g) * 0.24 < freedom <= (f + g) * 1.01


@given(st.floats(-0.5, 0.5), st.floats(1e-8, 0.1), st.floats(2, 1000))
def test_interval_p_and_detectable_agree(centre, variance, freedom):
    estimate = Estimate(centre, variance, freedom, largest=100)
    low, high = estimate.interval()
    if abs(estimate.p - 0.05) > 1e-6 and -1 < low and high < 1:
        assert (low <= 0 <= high) == (estimate.p > 0.05)
    assert estimate.p == pytest.approx(2 * min(estimate.p_greater, 1 - estimate.p_greater))
    assert estimate.detectable() == pytest.approx(
        (t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * np.sqrt(variance))
    assert estimate.detectable(7) > estimate.detectable() and estimate.interval(7)[0] <= low


def test_a_contrast_of_four_methods_by_hand():
    """The interaction of two factors: (d - c) - (b - a), of which each method has its own number of seeds."""
    rng = np.random.default_rng(1)
    a, b, c, d = rows = [drawn(rng, seeds, 200) for seeds in (2, 3, 4, 2)]
    between = seed_variance(rows)
    estimate = contrast(rows, (1, -1, -1, 1), None, between)
    values = np.append(d.mean(0) - c.mean(0) - b.mean(0) + a.mean(0), [2, -2])
    assert estimate.centre == pytest.approx(values.mean())
    per_run = 1 / 2 + 1 / 3 + 1 / 4 + 1 / 2
    expected = max(sem(values) ** 2 + per_run * (between.accuracies - between.answers), sem(values) ** 2,
                   per_run * between.accuracies)
    assert estimate.variance == pytest.approx(expected)


def test_the_variance_between_seeds_counts_the_squares_of_weights():
    """A main effect over two levels of the other factor, of seeds that answer all questions rightly or none: half the
    variance of one of the two differences."""
    seeds = np.array([1, 0, 0, 1])
    rows = [np.tile(seeds[:, None], (1, 20_000))] * 4
    main_effect, pair = (contrast(rows[:len(weights)], weights, None, seed_variance(rows)).variance
                         for weights in ((-0.5, 0.5, -0.5, 0.5), (-1, 1)))
    assert pair == pytest.approx(2 * seeds.var(ddof=1) / 4) and main_effect == pytest.approx(pair / 2)


def test_satterthwaites_degrees_of_freedom_by_hand():
    """All of the variance between seeds counts, that of single answers too."""
    variance, freedom = two_way(2.0, 10, 3.0, 1.0, 4)
    assert variance == 4 and freedom == pytest.approx(4**2 / (2**2 / 10 + 3**2 / 4))


def test_the_interval_of_several_seeds_by_hand():
    """The mean of four seeds that answer all questions alike, but for their number: its variance is a quarter of the
    seeds', with Student's quantile for their three degrees of freedom, 3.182."""
    rows = (np.arange(10_000) < np.array([[5000], [6000], [7000], [6000]])).astype(int)
    variance = (0.1**2 + 0.1**2) / 3 / 4
    size = 0.6 * 0.4 / variance * (1.959964 / 3.182446) ** 2
    found = accuracy_interval(rows, None, seed_variance([rows]))
    assert found == pytest.approx(wilson(0.6 * size, size), abs=2e-3)


def test_equal_answers_have_an_interval_of_some_width():
    rows = [np.ones((3, 8), int)] * 2
    low, high = contrast(rows, (-1, 1), None, seed_variance(rows)).interval()
    assert low == -high and 0.3 < high < 0.4  # Tango's is 0.324
    rows = [np.ones((3, 400), int)] * 2
    assert 0.005 < contrast(rows, (-1, 1), None, seed_variance(rows)).interval()[1] < 0.0095


# --- What is printed of simulated studies; tests/simulated_studies.py has the whole table ---

@pytest.mark.parametrize("seeds, deviation, lectures", [(3, 0.5, True), (5, 1.0, False)])
def test_intervals_hold_the_truth_and_equal_methods_rarely_differ(seeds, deviation, lectures):
    """300 studies: the error of a rate near 5 % is 1.3 points."""
    size, coverage = simulate(World(seeds, deviation, lectures, n=1000), 0.0, 300)
    assert size < 0.09 and coverage > 0.91
    _, coverage = simulate(World(seeds, deviation, lectures, n=1000), 2.0, 300)
    assert coverage > 0.91


def test_p_holm_keeps_5_percent_over_a_table_of_equal_methods():
    assert simulate_table(World(3, 0.5, False, methods=8, n=600), 200) < 0.09


def test_a_main_effect_of_runs_that_share_seeds_is_rarely_found_where_there_is_none():
    """Where a seed suits a schedule with every dropout. Runs that are taken as independent find it far too often."""
    world = World(3, 1.0, True, n=600)
    size, coverage = simulate_effect(world, 1.0, True, 300)
    assert size < 0.1 and coverage > 0.9
    assert simulate_effect(world, 1.0, False, 300)[0] > 0.15


# --- Are the variances between seeds equal? ---

def test_equal_variances_equals_the_published_example():
    """The diameters of ten batches of ten gears in NIST's handbook (section 1.3.5.7): T = 20.78580."""
    def batch(text: str) -> np.ndarray:
        return np.array(list(map(float, text.split())))
    batches = list(map(batch, [
        "1.006 0.996 0.998 1.000 0.992 0.993 1.002 0.999 0.994 1.000",
        "0.998 1.006 1.000 1.002 0.997 0.998 0.996 1.000 1.006 0.988",
        "0.991 0.987 0.997 0.999 0.995 0.994 1.000 0.999 0.996 0.996",
        "1.005 1.002 0.994 1.000 0.995 0.994 0.998 0.996 1.002 0.996",
        "0.998 0.998 0.982 0.990 1.002 0.984 0.996 0.993 0.980 0.996",
        "1.009 1.013 1.009 0.997 0.988 1.002 0.995 0.998 0.981 0.996",
        "0.990 1.004 0.996 1.001 0.998 1.000 1.018 1.010 0.996 1.002",
        "0.998 1.000 1.006 1.000 1.002 0.996 0.998 0.996 1.002 1.006",
        "1.002 0.998 0.996 0.995 0.996 1.004 1.004 0.998 0.999 0.991",
        "0.991 0.995 0.984 0.994 0.997 0.997 0.991 0.998 1.004 0.997"]))
    assert equal_variances(batches) == pytest.approx(chi2.sf(20.7858, 9), rel=1e-4)


@pytest.mark.parametrize("seeds", [[[80.0, 82.0], [70.0, 90.0]], [[80.0, 82.0, 83.0], [81.0]],
                                   [[80.0, 80.0, 80.0], [80.0, 82.0, 83.0]]])
def test_variances_of_few_or_equal_accuracies_tell_nothing(seeds):
    assert equal_variances(list(map(np.array, seeds))) is None
