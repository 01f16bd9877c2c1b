"""Chance against brute force over all ways of guessing; detectable differences against the power they promise."""

import itertools
import math

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
    detectable_paired,
    detectable_unpaired,
    level_test,
    majority_level,
)
from codellm_jax.results.statistics import mcnemar, wilson_interval

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
    # The equations hold at the solution.
    z_a, z_b = 1.9599639845, 0.8416212336
    d = detectable_from_level(335, 0.25)
    assert d * math.sqrt(335) == pytest.approx(z_a * math.sqrt(0.1875) + z_b * math.sqrt((0.25 + d) * (0.75 - d)))
    d = detectable_unpaired(1000, 0.27)
    m, p = 0.27 + d / 2, 0.27 + d
    assert d * math.sqrt(1000) == pytest.approx(
        z_a * math.sqrt(2 * m * (1 - m)) + z_b * math.sqrt(0.27 * 0.73 + p * (1 - p)))
    d = detectable_paired(604, 0.2)
    assert d * math.sqrt(604) == pytest.approx(z_a * math.sqrt(0.2) + z_b * math.sqrt(0.2 - d * d))
    assert detectable_by_error(1.5) == pytest.approx(1.5 * 2.8015852181)


@pytest.mark.parametrize("n,level", [(335, 0.25), (604, 0.5), (2950, 1 / 3), (2224, 0.441)])
def test_a_detectable_accuracy_is_found_four_times_in_five(n, level):
    truth = level + detectable_from_level(n, level)
    found = [level_test(correct, [level] * n) <= 0.05 for correct in range(n + 1)]
    assert count_distribution([truth] * n)[found].sum() == pytest.approx(0.8, abs=0.03)


def test_a_detectable_paired_difference_is_found_four_times_in_five():
    n, discordant = 600, 0.25
    d = detectable_paired(n, discordant)
    generator, found = np.random.default_rng(0), 0
    for _ in range(600):
        kind = generator.choice(3, n, p=[(discordant + d) / 2, (discordant - d) / 2, 1 - discordant])
        found += mcnemar(kind == 0, kind == 1).p_value <= 0.05
    assert found / 600 == pytest.approx(0.78, abs=0.06)  # the exact test is a little timid


def test_a_detectable_unpaired_difference_is_that_of_independent_errors_in_pairs():
    accuracy = 0.4
    d = detectable_unpaired(2000, accuracy)
    independent = accuracy * (1 - accuracy - d) + (1 - accuracy) * (accuracy + d)
    assert detectable_paired(2000, independent) == pytest.approx(d, rel=0.02)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from(
    [detectable_from_level, detectable_unpaired, detectable_paired]))
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
    assert detectable_unpaired(10, 1) is None


# All together

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
    lambda: accuracy_summary([True], [4, 4], [0]),
])
def test_nonsense_is_refused_in_one_line(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
