"""Against scipy and statsmodels, against brute force over all outcomes, and against what the intervals promise."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from codellm_jax.results import statistics
from codellm_jax.results.statistics import (
    bootstrap,
    exchanges,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    sign_flips,
    wilson_interval,
)

p_value_lists = st.lists(st.floats(0, 1), min_size=1, max_size=8)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@st.composite
def counts(draw) -> tuple[int, int]:
    n = draw(st.integers(1, 3000))
    return draw(st.integers(0, n)), n


def binomial(n: int, probability: float) -> np.ndarray:
    return pytest.importorskip("scipy.stats").binom.pmf(np.arange(n + 1), n, probability)


# Wilson

def test_wilson_by_hand():
    # 8 of 22, z = 1.959964: (0.363636 + 0.087306) / 1.174612 = 0.383908, and
    # 1.959964 * sqrt(0.0105184 + 0.0019842) / 1.174612 = 0.186575 to both sides.
    low, high = wilson_interval(8, 22)
    assert (low, high) == (pytest.approx(0.19733, abs=1e-5), pytest.approx(0.57048, abs=1e-5))


@given(counts(), st.floats(0.5, 0.999))
@settings(deadline=None, max_examples=60)
def test_wilson_as_in_statsmodels(count, level):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(*count, alpha=1 - level, method="wilson")
    assert wilson_interval(*count, level) == pytest.approx(expected, abs=1e-12)


@given(counts())
def test_wilson_surrounds_the_share_and_is_symmetric(count):
    correct, n = count
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1 and low < high
    mirrored = wilson_interval(n - correct, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    assert wilson_interval(correct, n, 0.99).low <= low and high <= wilson_interval(correct, n, 0.99).high


def test_wilson_at_the_ends():
    assert wilson_interval(0, 10).low == 0 and wilson_interval(10, 10).high == 1
    assert wilson_interval(0, 10).high == pytest.approx(0.27753, abs=1e-5)
    assert wilson_interval(0, 1) == (0, pytest.approx(0.79346, abs=1e-5))


@pytest.mark.parametrize("n", [22, 100, 335])
def test_wilson_covers_as_it_promises(n):
    """Exactly, over all outcomes, on average over true accuracies."""
    intervals = [wilson_interval(correct, n) for correct in range(n + 1)]
    shares = np.linspace(0.02, 0.98, 97)
    coverage = [sum(chance for chance, (low, high) in zip(binomial(n, share), intervals, strict=True)
                    if low <= share <= high) for share in shares]
    assert 0.945 < np.mean(coverage) < 0.96 and min(coverage) > 0.88


def test_the_interval_of_a_mean_is_wilsons_and_wide_enough_for_credits():
    assert mean_interval(8 / 22, 22) == wilson_interval(8, 22)
    generator, covered = np.random.default_rng(5), 0
    for _ in range(1000):  # 1 with 1/4, 0 with 1/4, else a tie: 1/2
        low, high = mean_interval(generator.choice([0, 0.5, 1], 40, p=[0.25, 0.5, 0.25]).mean(), 40)
        covered += low <= 0.5 <= high
    assert covered / 1000 > 0.98


# Bootstrap

def test_bootstrap_of_a_mean_is_binomial_where_values_are_binary():
    """30 of 100: a resample's number of right answers is Binomial(100, 0.3), whose 2.5% quantiles are 21 and 39."""
    result = bootstrap([1.0] * 30 + [0.0] * 70)
    assert result.estimate == pytest.approx(0.3)
    assert result.interval == pytest.approx((0.21, 0.39), abs=0.011)
    assert result.standard_error == pytest.approx(np.sqrt(0.3 * 0.7 / 100), rel=0.03)


def test_bootstrap_as_in_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).exponential(size=80)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    result = bootstrap(values, resamples=20_000)
    assert result.interval == pytest.approx(tuple(expected.confidence_interval), abs=0.02)
    assert result.standard_error == pytest.approx(expected.standard_error, rel=0.03)


def by_indices_of(n: int, statistic, resamples: int, seed: int) -> tuple[float, float, tuple[float, float]]:
    """Slowly: the statistic of the indices of each resample; estimate, standard error, 95% interval."""
    rows = [row for counts in statistics._draws(n, resamples, seed) for row in counts.astype(np.int64)]
    drawn = np.array([statistic(np.repeat(np.arange(n), row)) for row in rows])
    return statistic(np.arange(n)), drawn.std(), tuple(np.quantile(drawn, [0.025, 0.975]))


def test_three_ways_to_say_one_score_draw_the_same_questions():
    rows = np.random.default_rng(0).uniform(1, 2, (50, 2))
    by_sums = bootstrap(rows, lambda sums: sums[..., 0] / sums[..., 1], resamples=500, seed=5)
    estimate, error, interval = by_indices_of(50, lambda drawn: rows[drawn, 0].sum() / rows[drawn, 1].sum(), 500, 5)
    assert by_sums.interval == pytest.approx(interval)
    assert by_sums.estimate == pytest.approx(estimate)
    assert by_sums.standard_error == pytest.approx(error)
    by_mean = bootstrap(rows[:, 0], resamples=500, seed=5)
    assert by_mean.interval == pytest.approx(
        by_indices_of(50, lambda drawn: rows[drawn, 0].mean(), 500, 5)[2])


def test_bootstrap_is_the_same_for_a_seed_and_however_many_are_drawn_at_once(monkeypatch):
    values = np.random.default_rng(1).uniform(size=37)
    first = bootstrap(values, seed=2, resamples=3000)
    assert bootstrap(values, seed=2, resamples=3000) == first != bootstrap(values, seed=3, resamples=3000)
    monkeypatch.setattr("codellm_jax.results.statistics.RESAMPLED_AT_ONCE", 100)
    assert bootstrap(values, seed=2, resamples=3000).interval == pytest.approx(first.interval)


def test_bootstrap_covers_about_as_it_promises():
    generator = np.random.default_rng(7)
    trials, covered = 400, 0
    for seed in range(trials):
        low, high = bootstrap(generator.beta(0.5, 1.5, size=80), resamples=400, seed=seed).interval
        covered += low <= 0.25 <= high
    assert 0.91 < covered / trials < 0.98  # 0.95, less a little for n = 80, within 3 standard errors


def test_bootstrap_of_many_questions_is_quick():
    start = time.perf_counter()
    bootstrap(np.random.default_rng(0).uniform(size=3000), resamples=10_000)
    assert time.perf_counter() - start < 10  # 0.6 s alone on one core


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None, max_examples=40)
def test_bootstrap_stays_within_its_values(values):
    low, high = bootstrap(values, resamples=200).interval
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_all_right_all_wrong_and_one_question():
    assert bootstrap([1.0] * 9).interval == (1, 1) and bootstrap([0.0] * 9).interval == (0, 0)
    assert bootstrap([0.5]) == (0.5, (0.5, 0.5), 0)


# Paired differences

def test_a_paired_difference_has_less_error_than_an_unpaired_one():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(size=200)
    first, second = difficulty + generator.normal(0.15, 0.3, 200), difficulty + generator.normal(0, 0.3, 200)
    result = paired_bootstrap(first, second)
    assert result.difference == pytest.approx(np.mean(first - second))
    assert result.standard_error == pytest.approx(np.std(first - second) / np.sqrt(200), rel=0.05)
    assert result.standard_error < 0.5 * bootstrap(first).standard_error
    assert result.p_value < 0.01 and result.interval.low > 0


@given(st.integers(0, 1000), st.floats(-0.4, 0.4))
@settings(deadline=None, max_examples=40)
def test_a_paired_difference_turns_its_sign_and_agrees_with_its_interval(seed, shift):
    generator = np.random.default_rng(seed)
    first, second = generator.normal(shift, 1, 40), generator.normal(0, 1, 40)
    forth, back = (paired_bootstrap(*systems, resamples=999) for systems in ((first, second), (second, first)))
    assert forth.difference == pytest.approx(-back.difference) and forth.p_value == back.p_value
    assert forth.interval == pytest.approx((-back.interval.high, -back.interval.low))
    if forth.p_value < 0.05 and abs(forth.p_value - 0.05) > 0.01:
        assert not forth.interval.low <= 0 <= forth.interval.high
    if forth.p_value > 0.06:
        assert forth.interval.low <= 0 <= forth.interval.high


def test_equal_systems_differ_by_nothing():
    values = [0.1, 0.7, 0.3, 1.0]
    assert paired_bootstrap(values, values) == (0, (0, 0), 0, 1)
    # The same scores on other questions: equal but for rounding, which must not count as evidence.
    first, second = [0.1, 0.2, 0.3] * 5, [0.3 - 0.2, 0.1 + 0.1, 0.1 + 0.2] * 5
    assert first != second and paired_bootstrap(first, second).p_value == 1


def test_a_paired_bootstrap_of_equal_systems_seldom_finds_a_difference():
    generator = np.random.default_rng(11)
    found = sum(paired_bootstrap(*generator.uniform(size=(2, 60)), resamples=400, seed=seed).p_value <= 0.05
                for seed in range(400))
    assert 0.02 < found / 400 < 0.09


def test_exchanges_of_a_mean_are_sign_flips_and_few_questions_prove_nothing():
    generator = np.random.default_rng(12)
    first, second = generator.uniform(size=(2, 40))
    assert exchanges(first, second) == pytest.approx(sign_flips(first, second), abs=0.02)
    # Five questions, all better: 2 of the 2^5 ways to exchange them are as far apart. A bootstrap would call it sure.
    better, worse = np.array([0.5, 0.6, 0.7, 0.8, 0.9]), np.array([0.1, 0.3, 0.2, 0.5, 0.6])
    assert exchanges(better, worse) == pytest.approx(2 / 32, abs=0.01)
    assert paired_bootstrap(better, worse).p_value < 0.001
    # A ratio of sums, by all 2^4 exchanges.
    ours, theirs = generator.uniform(1, 2, (2, 4, 2))

    def ratio(sums):
        return sums[..., 0] / sums[..., 1]

    def apart(signs):
        change = np.array(signs)[:, None] == 1
        return abs(ratio(np.where(change, theirs, ours).sum(0)) - ratio(np.where(change, ours, theirs).sum(0)))

    ways = [apart(signs) for signs in itertools.product((0, 1), repeat=4)]
    exact = np.mean([way >= ways[0] - 1e-12 for way in ways])
    assert exchanges(ours, theirs, ratio) == pytest.approx(exact, abs=0.02)


# McNemar

def outcomes(only_first: int, only_second: int, both: int = 3) -> tuple[list[bool], list[bool]]:
    return ([True] * only_first + [False] * only_second + [True] * both,
            [False] * only_first + [True] * only_second + [True] * both)


def test_mcnemar_by_hand():
    # 2 against 8: twice (1 + 10 + 45) / 1024.
    assert mcnemar(*outcomes(2, 8)) == (2, 8, 2 * 56 / 1024)
    assert mcnemar(*outcomes(5, 5)).p_value == 1 and mcnemar(*outcomes(0, 0)).p_value == 1
    assert mcnemar(*outcomes(0, 6)).p_value == 2 / 64


@pytest.mark.parametrize("n", range(1, 11))
def test_mcnemar_over_all_outcomes(n):
    """The share of all 2^n equally likely splits at least as far from even as this one."""
    splits = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
    for only_first in range(n + 1):
        as_far = np.mean([abs(2 * split - n) >= abs(2 * only_first - n) for split in splits])
        assert mcnemar(*outcomes(only_first, n - only_first)).p_value == pytest.approx(as_far, abs=1e-15)


@pytest.mark.parametrize("only_first,only_second", [(3, 9), (40, 71), (700, 801), (2000, 2600), (0, 1500)])
def test_mcnemar_as_in_statsmodels(only_first, only_second):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[3, only_first], [only_second, 0]], exact=True).pvalue
    assert mcnemar(*outcomes(only_first, only_second)).p_value == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(pairs, st.randoms(use_true_random=False))
def test_mcnemar_is_symmetric_and_knows_no_order(answers, random):
    first, second = zip(*answers, strict=True)
    result = mcnemar(first, second)
    random.shuffle(answers)
    assert mcnemar(*zip(*answers, strict=True)) == result
    assert mcnemar(second, first) == (result.only_second, result.only_first, result.p_value)
    assert 0 < result.p_value <= 1


# Sign flips

@given(st.lists(st.tuples(*[st.sampled_from([0, 1, 0.5, 0.25, 1 / 3])] * 2), min_size=1, max_size=9))
@settings(deadline=None, max_examples=40)
def test_sign_flips_over_all_signs(answers):
    """The share of all 2^n choices of signs whose sum is at least as far from 0."""
    first, second = map(np.array, zip(*answers, strict=True))
    sums = [np.dot(signs, first - second) for signs in itertools.product((-1, 1), repeat=len(first))]
    expected = np.mean(np.abs(sums) >= abs((first - second).sum()) - 1e-9)
    assert sign_flips(first, second) == pytest.approx(expected, abs=4 * 0.5 / 100)
    assert sign_flips(second, first) == sign_flips(first, second)


def test_sign_flips_of_right_and_wrong_is_mcnemar():
    for pair in ((2, 8), (0, 6), (40, 71)):
        first, second = outcomes(*pair)
        assert sign_flips(first, second) == pytest.approx(mcnemar(first, second).p_value, abs=0.02)
    assert sign_flips([0.5] * 5, [0.25] * 5) == pytest.approx(2 / 32, abs=0.01)  # a bootstrap would be sure


# Holm

def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5]) == [0.5] and holm([0.6, 0.9]) == [1, 1] and holm([0.02, 0.02]) == [0.04, 0.04]


@given(p_value_lists, st.floats(0.001, 0.999))
def test_holm_rejects_what_its_steps_reject(p_values, alpha):
    """Step down as published: go on while p_(i) <= alpha / (m - i + 1)."""
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - step) > alpha:
            break
        rejected.add(index)
    assert {index for index, adjusted in enumerate(holm(p_values)) if adjusted <= alpha} == rejected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_all_subsets(p_values):
    """Adjusted p = the largest, over all sets that contain it, of Bonferroni's p of that set (Marcus et al., 1976)."""
    m = len(p_values)
    for index, adjusted in enumerate(holm(p_values)):
        subsets = [subset for size in range(1, m + 1) for subset in itertools.combinations(range(m), size)
                   if index in subset]
        expected = max(min(1, len(subset) * min(p_values[member] for member in subset)) for subset in subsets)
        assert adjusted == pytest.approx(expected)


@given(p_value_lists)
@settings(deadline=None, max_examples=15)  # statsmodels takes up to a second for each
def test_holm_as_in_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


@given(p_value_lists)
def test_holm_raises_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    by_p_value = [adjusted[index] for index in np.argsort(p_values, kind="stable")]
    assert by_p_value == sorted(by_p_value)


# What is refused

@pytest.mark.parametrize("call", [
    lambda: wilson_interval(0, 0), lambda: wilson_interval(3, 2), lambda: wilson_interval(-1, 2),
    lambda: wilson_interval(1, 2, 95), lambda: wilson_interval(0.5, 2), lambda: bootstrap([]),
    lambda: bootstrap([0.1, float("nan")]), lambda: bootstrap([[1, 2]]), lambda: bootstrap([1.0], resamples=0),
    lambda: bootstrap([1.0], level=1), lambda: bootstrap([[1, 0], [1, 1]], lambda s: s[..., 0] / s[..., 1]),
    lambda: paired_bootstrap([1.0], [1.0, 2.0]), lambda: mcnemar([], []),
    lambda: sign_flips([], []), lambda: sign_flips([1.0], [1.0, 0.5]), lambda: mean_interval(1.5, 2),
    lambda: mean_interval(0.5, 0),
    lambda: mcnemar([True], [True, False]), lambda: mcnemar([2], [1]), lambda: holm([]), lambda: holm([1.5]),
    lambda: holm([float("nan")]),
])
def test_nonsense_is_refused_in_one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_room_needs_numpy_alone():
    script = ("import sys, codellm_jax.results.levels; "
              "print({'jax', 'gin', 'scipy', 'statsmodels', 'tensorflow', 'seqio'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
