"""Chance against brute force over all ways of guessing; detectable differences against the power they promise."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.results.levels import (
    accuracy_summary,
    chance_level,
    count_distribution,
    detectable_by_error,
    detectable_from_level,
    detectable_independent,
    detectable_paired,
    level_test,
    majority_level,
    score_summary,
)
from codellm_jax.results.statistics import bootstrap, mcnemar, wilson_interval

candidate_counts = st.lists(st.integers(1, 5), min_size=1, max_size=7)
probability_lists = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_chance_and_majority_by_hand():
    assert chance_level([4] * 22) == 0.25 and chance_level([2, 4]) == 0.375
    assert majority_level([3, 0, 3, 1]) == (0.5, 3, 2)
    assert majority_level(["neutral", "entailment", "neutral"]) == (2 / 3, "neutral", 2)
    assert majority_level([2, 1, 1, 2]) == majority_level([1, 2, 2, 1]) == (0.5, 1, 2)


@given(st.lists(st.integers(0, 4), min_size=1), st.randoms(use_true_random=False))
def test_the_majority_knows_no_order_and_no_answer_beats_it(answers, random):
    majority = majority_level(answers)
    assert all(answers.count(answer) / len(answers) <= majority.level for answer in answers)
    random.shuffle(answers)
    assert majority_level(answers) == majority


@given(candidate_counts)
@settings(deadline=None, max_examples=50)
def test_guessing_over_all_ways_to_guess(candidates):
    """Candidate 0 is right everywhere; every tuple of guesses is equally likely."""
    right = [guesses.count(0) for guesses in itertools.product(*(range(count) for count in candidates))]
    expected = np.bincount(right, minlength=len(candidates) + 1) / len(right)
    assert count_distribution([1 / count for count in candidates]) == pytest.approx(expected, abs=1e-12)
    assert chance_level(candidates) == pytest.approx(np.mean(right) / len(candidates))
    for correct, chance in enumerate(expected):
        p_value = expected[expected <= chance * (1 + 1e-7)].sum()
        assert level_test(correct, [1 / count for count in candidates]) == pytest.approx(p_value, abs=1e-12)


@given(probability_lists)
def test_counts_over_all_subsets(probabilities):
    expected = np.zeros(len(probabilities) + 1)
    for outcome in itertools.product((0, 1), repeat=len(probabilities)):
        expected[sum(outcome)] += math.prod(p if right else 1 - p
                                            for p, right in zip(probabilities, outcome, strict=True))
    assert count_distribution(probabilities) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n,probability", [(22, 0.25), (604, 0.5), (2950, 1 / 3), (12545, 0.35), (7, 0.0), (7, 1.0)])
def test_level_test_as_in_scipy(n, probability):
    stats = pytest.importorskip("scipy.stats")
    mean, error = n * probability, math.sqrt(n * probability * (1 - probability))
    for correct in {0, n, *(min(n, max(0, round(mean + z * error))) for z in (-4, -2, -1, 0, 0.5, 2, 3))}:
        expected = stats.binomtest(correct, n, probability).pvalue
        assert level_test(correct, [probability] * n) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_count_distribution_as_in_scipy():
    stats = pytest.importorskip("scipy.stats")
    if not hasattr(stats, "poisson_binom"):
        pytest.skip("this scipy has no Poisson-binomial distribution")
    probabilities = 1 / np.random.default_rng(0).integers(2, 6, 400)
    expected = stats.poisson_binom.pmf(np.arange(401), probabilities)
    assert count_distribution(probabilities) == pytest.approx(expected, abs=1e-12)
    assert count_distribution(np.full(20_000, 0.25)).sum() == pytest.approx(1)


def test_the_level_test_seldom_calls_guessing_different():
    """Exactly, over all outcomes: at most 5 of 100, as the test is exact."""
    for candidates in ([4] * 22, [2, 3, 4, 5] * 30):
        probabilities = [1 / count for count in candidates]
        likelihoods = count_distribution(probabilities)
        called = [level_test(correct, probabilities) <= 0.05 for correct in range(len(candidates) + 1)]
        assert 0.02 < likelihoods[called].sum() <= 0.05


# Detectable differences

def test_detectable_by_hand():
    # 9 coins: 8 or 9 heads have p = 20 / 512 = 0.039, 7 have 0.18; P(8 or 9) = 9 q^8 - 8 q^9 = 0.8 at q = 0.9074.
    d = detectable_from_level(9, 0.5)
    q = 0.5 + d
    assert 9 * q**8 - 8 * q**9 == pytest.approx(0.8, abs=1e-7) and d == pytest.approx(0.4074, abs=1e-4)
    # All 6 of 6 questions differ: only 6 to 0 has p below 0.05, 2 / 64, which takes q^6 = 0.8.
    assert detectable_paired(6, 1.0) == pytest.approx(2 * 0.8 ** (1 / 6) - 1)
    assert detectable_by_error(1.5) == pytest.approx(1.5 * 2.8015852181)


@pytest.mark.parametrize("n,level", [(9, 0.5), (22, 0.25), (335, 0.25), (604, 0.5), (2950, 1 / 3), (2224, 0.441)])
def test_a_detectable_accuracy_is_found_four_times_in_five(n, level):
    """By scipy's test and distribution, over all outcomes; one a little smaller is not."""
    stats = pytest.importorskip("scipy.stats")
    d = detectable_from_level(n, level)
    above = range(math.floor(n * level) + 1, n + 1)
    found = [correct for correct in above if correct > n * (level + d) + 6 * math.sqrt(n)  # which is plain
             or stats.binomtest(correct, n, level).pvalue <= 0.05]
    assert 0.8 <= stats.binom.pmf(found, n, level + d).sum() <= 0.8 + 1e-6
    assert stats.binom.pmf(found, n, level + 0.99 * d).sum() < 0.8


def test_a_detectable_accuracy_where_questions_have_different_numbers_of_candidates():
    summary = accuracy_summary([1.0] * 20 + [0.0] * 60, [2, 3, 4, 5] * 20, [0, 1] * 40)
    probabilities = [1 / 2, 1 / 3, 1 / 4, 1 / 5] * 20
    found = [correct for correct in range(26, 81) if level_test(correct, probabilities) <= 0.05]
    truth = count_distribution([summary.chance + summary.detectable_from_chance] * 80)
    assert truth[found].sum() == pytest.approx(0.8)


def power_by_enumeration(n: int, only_first: float, only_second: float) -> float:
    """Of McNemar's exact test in favour of the second, over all (b, c) of the trinomial distribution."""
    total = 0.0
    for b in range(n + 1):
        for c in range(b + 1, n - b + 1):
            tail = sum(math.comb(b + c, k) for k in range(b + 1))
            if 2 * tail <= 0.05 * 2 ** (b + c):
                ways = math.comb(n, b) * math.comb(n - b, c)
                total += ways * only_first**b * only_second**c * (1 - only_first - only_second) ** (n - b - c)
    return total


@pytest.mark.parametrize("n, discordant", [(6, 1.0), (14, 0.9), (30, 0.5), (60, 0.3)])
def test_a_detectable_paired_difference_is_found_four_times_in_five(n, discordant):
    d = detectable_paired(n, discordant)
    for smaller, enough in ((0, True), (0.01 * d, False)):
        of_second = (discordant + d - smaller) / 2
        power = power_by_enumeration(n, discordant - of_second, of_second)
        assert power == pytest.approx(0.8, abs=0.03) and (power >= 0.8 - 1e-9) == enough


@pytest.mark.parametrize("n, accuracy", [(12, 0.1), (30, 0.4), (60, 0.7)])
def test_a_detectable_difference_of_independent_errors_is_found_four_times_in_five(n, accuracy):
    d = detectable_independent(n, accuracy)
    for better, enough in ((accuracy + d, True), (accuracy + 0.99 * d, False)):
        power = power_by_enumeration(n, accuracy * (1 - better), (1 - accuracy) * better)
        assert power == pytest.approx(0.8, abs=0.03) and (power >= 0.8 - 1e-9) == enough


def test_a_detectable_paired_difference_is_found_in_simulated_answers():
    n, discordant, trials = 600, 0.25, 1000
    d = detectable_paired(n, discordant)
    generator, found = np.random.default_rng(0), 0
    for _ in range(trials):
        kind = generator.choice(3, n, p=[(discordant + d) / 2, (discordant - d) / 2, 1 - discordant])
        found += mcnemar(kind == 0, kind == 1).p_value <= 0.05
    assert found / trials == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / trials))


def test_detectable_differences_of_many_questions_are_quick():
    start = time.perf_counter()
    ds = [detectable_from_level(20_000, 0.25), detectable_paired(20_000, 0.3), detectable_independent(20_000, 0.4)]
    assert time.perf_counter() - start < 20  # 1.2 s alone on one core
    # Far from the ends the normal approximation is near: (z_a + z_b) standard errors.
    errors = [math.sqrt(variance / 20_000) for variance in (0.1875, 0.3, 2 * 0.24)]
    assert ds == pytest.approx([2.8015852181 * error for error in errors], rel=0.02)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from(
    [detectable_from_level, detectable_independent, detectable_paired]))
@settings(deadline=None, max_examples=60)
def test_more_questions_show_smaller_differences(n, share, detectable):
    smaller, d = detectable(4 * n, share), detectable(n, share)
    if d is not None:
        assert 0 < d <= (share if detectable is detectable_paired else 1 - share)
        assert smaller is not None and smaller <= d
        stricter = detectable(n, share, power=0.9)
        assert stricter is None or stricter >= d


def test_too_few_questions_show_nothing():
    assert detectable_from_level(1, 0.25) is None and detectable_from_level(1000, 1) is None
    assert detectable_paired(100, 0) is None and detectable_paired(5, 0.5) is None
    assert detectable_independent(10, 1) is None


# All together

def exact_credits(ties: list[tuple[int, int]]) -> dict[float, float]:
    """How likely each sum of credits is by blind choice: of each (k, m) the answer is among k that tie of m."""
    sums = {0.0: 1.0}
    for k, m in ties:
        added: dict[float, float] = {}
        for total, chance in sums.items():
            for credit, share in ((1 / k, k / m), (0.0, 1 - k / m)):
                key = round(total + credit, 9)
                added[key] = added.get(key, 0.0) + chance * share
        sums = added
    return sums


@given(st.lists(st.sampled_from([(k, m) for m in (2, 3, 4) for k in range(1, m + 1)]), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60)
def test_the_test_of_chance_is_right_with_ties(ties):
    """Blind choice is called different at most as often as the level says, exactly, over all outcomes."""
    counts = [m for _, m in ties]
    credits = [[1 / k for k, _ in ties[:right]] + [0.0] * (len(ties) - right) for right in range(len(ties) + 1)]
    for one in credits:  # the summary sees the sum alone
        assert accuracy_summary(one, counts, [0] * len(ties)).accuracy == pytest.approx(np.mean(one))
    sums = exact_credits(ties)
    p_values = [accuracy_summary([total / len(ties)] * len(ties), counts, [0] * len(ties)).chance_p_value
                for total in sums]
    for alpha in (0.01, 0.05, 0.1, 0.3):
        assert sum(chance for chance, p in zip(sums.values(), p_values, strict=True) if p <= alpha) <= alpha + 1e-9


def test_where_all_candidates_tie_nothing_is_told_from_chance():
    summary = accuracy_summary([0.25] * 12, [4] * 12, [0] * 12)
    assert summary.accuracy == summary.chance == 0.25 and summary.chance_p_value == 1
    assert summary.interval == wilson_interval(3, 12)
    odd = accuracy_summary([1 / 3] * 10, [3] * 10, [0, 1] * 5)
    assert odd.chance_p_value == 1 and odd.interval.low < 1 / 3 < odd.interval.high


def test_a_score_of_written_answers():
    shares = score_summary([1.0, 0.0, 1.0, 1.0])
    assert (shares["value"], shares["interval"]) == (0.75, list(wilson_interval(3, 4)))
    assert shares["smallest_detectable_difference"] == {"between_runs": detectable_independent(4, 0.75)}
    parts = [0.5, 0.25, 1.0, 0.0, 0.75]
    drawn = bootstrap(parts)
    assert score_summary(parts) == {"value": drawn.estimate, "interval": list(drawn.interval),
                                    "smallest_detectable_difference": {
                                        "between_runs": detectable_by_error(math.sqrt(2) * drawn.standard_error)}}
    assert score_summary([0.5, 0.5])["interval"] is None


def test_logic_of_the_paper():
    """NL (2.6B) on Logic, 8 of 22 with D the commonest answer: nothing is to be concluded from it."""
    answers = [3] * 8 + [0] * 5 + [1] * 5 + [2] * 4
    correct = [answer == 3 for answer in answers]
    summary = accuracy_summary(correct, [4] * 22, answers)
    assert summary.accuracy == summary.majority == 8 / 22 and summary.majority_answer == 3
    assert summary.interval == wilson_interval(8, 22) and summary.chance == 0.25 and summary.n == 22
    assert summary.chance_p_value == pytest.approx(0.2222, abs=5e-4)
    assert summary.majority_p_value == pytest.approx(1)
    assert summary.detectable_from_chance > 0.25 and summary.detectable_between > 0.38


def test_all_right_and_all_wrong():
    right = accuracy_summary([True] * 30, [4] * 30, [0, 1, 2] * 10)
    wrong = accuracy_summary([False] * 30, [4] * 30, [0, 1, 2] * 10)
    assert right.interval.high == 1 and right.detectable_between is None and right.chance_p_value < 1e-12
    assert wrong.interval.low == 0 and wrong.chance_p_value < 0.01


@pytest.mark.parametrize("call", [
    lambda: chance_level([]), lambda: chance_level([4, 0]), lambda: majority_level([]), lambda: level_test(0, []),
    lambda: level_test(3, [0.5] * 2), lambda: level_test(0, [1.5]), lambda: detectable_from_level(0, 0.25),
    lambda: detectable_from_level(9, 25), lambda: detectable_paired(9, 0.5, power=1),
    lambda: detectable_by_error(1, alpha=0), lambda: accuracy_summary([], [], []),
    lambda: accuracy_summary([True], [4, 4], [0]), lambda: accuracy_summary([1.5], [4], [0]),
    lambda: accuracy_summary([float("nan")], [4], [0]), lambda: detectable_independent(9, -0.5),
])
def test_nonsense_is_refused_in_one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
