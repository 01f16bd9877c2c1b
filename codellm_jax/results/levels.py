"""What a score is read against: chance, the commonest answer, and the smallest difference that n questions show.

Levels and differences are fractions of 1. Only `level_test` and `accuracy_summary` look at what a system answered.
"""

import collections
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.results.statistics import Interval, check_count, check_questions, right_or_wrong, wilson_interval


class Majority(NamedTuple):
    level: float
    answer: int | str
    questions: int  # of which it is the right answer


class AccuracySummary(NamedTuple):
    """Everything that must stand beside an accuracy."""

    accuracy: float
    n: int
    interval: Interval
    chance: float
    chance_p_value: float
    majority: float
    majority_answer: int | str
    majority_p_value: float
    detectable_from_chance: float | None
    detectable_between: float | None  # from another system of about this accuracy


def chance_level(candidate_counts: Sequence[int]) -> float:
    """The accuracy expected of choosing blindly: the mean of 1 / candidates over questions.

    Raises:
      ValueError: no questions, or one without candidates.
    """
    return float(np.mean(_guessing_probabilities(candidate_counts)))


def majority_level(answers: Sequence[int] | Sequence[str]) -> Majority:
    """The accuracy of always giving the commonest right answer of these questions (its position, or its label).

    Of equally common answers the smallest is named. Known from the answers themselves, it is the best that a system
    which ignores the question can reach.

    Raises:
      ValueError: no questions.
    """
    check_questions(len(answers))
    counts: collections.Counter[Any] = collections.Counter(answers)
    answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return Majority(count / len(answers), answer, count)


def level_test(correct: int, probabilities: Sequence[float] | np.ndarray) -> float:
    """p-value, two-sided and exact, of `correct` right answers if each is right with its own probability.

    The sum of the probabilities of all counts that are no likelier than this one (as R's binom.test), which are
    binomial where all probabilities are equal and Poisson-binomial otherwise. Against chance the probabilities are
    1 / candidates, against the majority's level m they are m, n times.

    Args:
      correct: number of right answers.
      probabilities: [n].

    Raises:
      ValueError: no questions, correct not in 0 ... n, or a probability not in 0 ... 1.
    """
    likelihoods = count_distribution(probabilities)
    check_count(correct, len(likelihoods) - 1)
    as_unlikely = likelihoods <= likelihoods[correct] * (1 + 1e-7)  # equal ones differ by rounding
    return min(1.0, float(likelihoods[as_unlikely].sum()))


def count_distribution(probabilities: Sequence[float] | np.ndarray) -> np.ndarray:
    """[n + 1]: how likely 0 ... n successes are, for independent trials with these probabilities [n] (Poisson, 1837).

    Trials of equal probability are binomial; the sum over groups of them is the convolution of their distributions.
    """
    probabilities = np.asarray(probabilities, np.float64)
    check_questions(len(probabilities))
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError(f"Probabilities lie between 0 and 1: {probabilities.tolist()}")
    total = np.ones(1)
    for probability, count in zip(*np.unique(probabilities, return_counts=True), strict=True):
        total = np.convolve(total, _binomial(int(count), float(probability)))
    return total


def detectable_from_level(n: int, level: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest d such that a true accuracy of level + d is told from `level` on n questions; None if none is.

    Solves d sqrt(n) = z_a sqrt(p q) + z_b sqrt(p' q') with p = level, p' = p + d, z_a the normal quantile of
    1 - alpha / 2 and z_b that of `power`: the one-sample test of a share (Fleiss, Levin and Paik, 2003).

    Raises:
      ValueError: no questions, or level, power or alpha out of their ranges.
    """
    _check_share(level)
    return _smallest(1 - level, n, power, alpha, lambda d: (level * (1 - level), _variance(level + d)))


def detectable_unpaired(n: int, accuracy: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest improvement d over `accuracy` that two systems of n questions each show; None if none is.

    Solves d sqrt(n) = z_a sqrt(2 m (1 - m)) + z_b sqrt(p q + p' q') with p = accuracy, p' = p + d, m = p + d / 2:
    the test of two independent shares (Fleiss, Levin and Paik, 2003). It also holds, closely, for paired
    questions on which the systems err independently, so it is the one to state while only one system is known.
    """
    _check_share(accuracy)
    return _smallest(1 - accuracy, n, power, alpha, lambda d: (
        2 * _variance(accuracy + d / 2), _variance(accuracy) + _variance(accuracy + d)))


def detectable_paired(n: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest difference d of two accuracies that McNemar's test finds in n questions; None if none is.

    Solves d sqrt(n) = z_a sqrt(s) + z_b sqrt(s - d^2), where s, `discordant`, is the share of questions that exactly
    one of the systems has right (Connor, 1987). d cannot exceed s.
    """
    _check_share(discordant)
    return _smallest(discordant, n, power, alpha, lambda d: (discordant, discordant - d * d))


def detectable_by_error(standard_error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest difference that a score with this standard error shows: (z_a + z_b) standard_error.

    For scores that are not shares of questions: the error is that of `bootstrap` (against a fixed level) or of
    `paired_bootstrap` (between two systems), in the unit of the score.
    """
    return standard_error * sum(_quantiles(power, alpha))


def accuracy_summary(correct: Sequence[bool] | np.ndarray, candidate_counts: Sequence[int],
                     answers: Sequence[int] | Sequence[str], level: float = 0.95) -> AccuracySummary:
    """What must stand beside an accuracy; all arguments have one entry a question.

    The p-values say whether the accuracy differs from that of blind choice and from the majority's level.

    Raises:
      ValueError: no questions, or lengths that differ.
    """
    right = right_or_wrong(correct)
    n, count = len(right), int(right.sum())
    if not n == len(candidate_counts) == len(answers):
        raise ValueError(f"{n} results, {len(candidate_counts)} numbers of candidates, {len(answers)} answers")
    majority = majority_level(answers)
    chance = chance_level(candidate_counts)
    return AccuracySummary(
        accuracy=count / n, n=n, interval=wilson_interval(count, n, level),
        chance=chance, chance_p_value=level_test(count, _guessing_probabilities(candidate_counts)),
        majority=majority.level, majority_answer=majority.answer,
        majority_p_value=level_test(count, np.full(n, majority.level)),
        detectable_from_chance=detectable_from_level(n, chance), detectable_between=detectable_unpaired(n, count / n))


def _binomial(n: int, probability: float) -> np.ndarray:
    """[n + 1], from logarithms of factorials, so that no term overflows."""
    if probability in (0.0, 1.0):
        return (np.arange(n + 1) == n * probability).astype(np.float64)
    factorials = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    k = np.arange(n + 1)
    return np.exp(factorials[n] - factorials - factorials[::-1] + k * math.log(probability)
                  + (n - k) * math.log1p(-probability))


def _smallest(largest: float, n: int, power: float, alpha: float,
              variances: Callable[[float], tuple[float, float]]) -> float | None:
    """Solves d sqrt(n) = z_a sqrt(v0) + z_b sqrt(v1) for d in 0 ... largest, where variances(d) = (v0, v1)."""
    check_questions(n)
    of_test, of_power = _quantiles(power, alpha)

    def excess(d: float) -> float:
        of_null, of_truth = variances(d)
        return d * math.sqrt(n) - of_test * math.sqrt(of_null) - of_power * math.sqrt(max(0.0, of_truth))

    # The square roots are concave in d, so the excess is convex, and not positive at 0: it crosses 0 once at most.
    if largest <= 0 or excess(largest) < 0:
        return None
    low, high = 0.0, largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) >= 0 else (middle, high)
    return high


def _variance(share: float) -> float:
    return max(0.0, share * (1 - share))


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    """z_a, of the two-sided test, and z_b, of its power."""
    if not (0.5 <= power < 1 and 0 < alpha < 1):
        raise ValueError(f"Power lies in 0.5 ... 1 and alpha in 0 ... 1, both below 1; not {power} and {alpha}")
    return NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)


def _guessing_probabilities(candidate_counts: Sequence[int]) -> np.ndarray:
    counts = np.asarray(candidate_counts)
    check_questions(len(counts))
    if (counts < 1).any():
        raise ValueError(f"Question {int(np.argmax(counts < 1))} has no candidates")
    return 1 / counts


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"A share lies in 0 ... 1, not {share}")
