"""Reference levels of a score: chance, the commonest answer, and the smallest difference detectable with n questions.

Levels and differences are fractions of 1. Only `level_test` and the summaries use a system's answers. Detectable
differences are those of the tests in use, with their power computed exactly, not approximated.
"""

import collections
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.results.statistics import (
    FromSums,
    Interval,
    Values,
    bootstrap,
    check_count,
    check_questions,
    mean_interval,
)

ROUNDING = 1e-9  # of differences that are detected


class Majority(NamedTuple):
    level: float
    answer: int | str
    questions: int  # for which it is the right answer


class AccuracySummary(NamedTuple):
    """The numbers reported with an accuracy."""

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
    """The expected accuracy of random choice: the mean of 1 / candidates over questions.

    Raises:
      ValueError: no questions, or one without candidates.
    """
    return float(np.mean(_guessing_probabilities(candidate_counts)))


def majority_level(answers: Sequence[int] | Sequence[str]) -> Majority:
    """The accuracy of always giving the commonest right answer of these questions (its position, or its label).

    Among equally common answers the smallest is named. Since it uses the answers themselves, it is the best that a
    system which ignores the question can reach.

    Raises:
      ValueError: no questions.
    """
    check_questions(len(answers))
    counts: collections.Counter[Any] = collections.Counter(answers)
    answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return Majority(count / len(answers), answer, count)


def level_test(correct: int, probabilities: Sequence[float] | np.ndarray) -> float:
    """The exact two-sided p-value of `correct` right answers if each is right with its own probability.

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
        raise ValueError(f"Probabilities must be between 0 and 1: {probabilities.tolist()}")
    total = np.ones(1)
    for probability, count in zip(*np.unique(probabilities, return_counts=True), strict=True):
        total = np.convolve(total, _binomial(int(count), float(probability)))
    return total


def detectable_from_level(n: int, level: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest d such that `level_test` finds a true accuracy of level + d in n questions; None if it finds none.

    "Finds" means: with a probability of at least `power`, computed exactly, the p-value is at most alpha and the
    accuracy is above `level`.

    Raises:
      ValueError: no questions, or level, power or alpha out of their ranges.
    """
    _check_share(level)
    check_questions(n)
    return _detectable_from(np.full(n, level), power, alpha)


def detectable_independent(n: int, accuracy: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest improvement d over `accuracy` that McNemar's exact test finds in n questions on which two systems
    err independently, as `detectable_paired` does; None if it finds none.

    It applies while only one system is known: systems with similar errors show smaller differences.
    """
    _check_share(accuracy)

    def discordant(d: float) -> float:
        return accuracy * (1 - accuracy - d) + (1 - accuracy) * (accuracy + d)

    return _smallest(1 - accuracy, power, lambda d: _power_of_mcnemar(n, discordant(d), d, alpha), n, alpha)


def detectable_paired(n: int, discordant: float, power: float = 0.8, alpha: float = 0.05) -> float | None:
    """The smallest difference d of two accuracies that McNemar's exact test finds in n questions; None if there is
    none.

    "Finds" is as in `detectable_from_level`. `discordant` is the share of questions that exactly one of the systems
    has right; d cannot exceed it.

    Raises:
      ValueError: no questions, or discordant, power or alpha out of their ranges.
    """
    _check_share(discordant)
    return _smallest(discordant, power, lambda d: _power_of_mcnemar(n, discordant, d, alpha), n, alpha)


def detectable_by_error(standard_error: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest difference that is detectable at this standard error: (z_a + z_b) standard_error.

    For scores that are not shares of questions: the error is that of `bootstrap` (against a fixed level) or of
    `paired_bootstrap` (between two systems), in the unit of the score.
    """
    return standard_error * sum(_quantiles(power, alpha))


def accuracy_summary(credits: Sequence[float] | np.ndarray, candidate_counts: Sequence[int],
                     answers: Sequence[int] | Sequence[str], level: float = 0.95) -> AccuracySummary:
    """What must stand beside an accuracy; all arguments have one entry a question.

    The p-values say whether the accuracy differs from that of blind choice and from the majority's level. Credits of
    ties vary less than right and wrong do; where their sum is no whole number, the tests take the next one on the
    side of the level, so that they find too little and never too much.

    Args:
      credits: 1 for right, 0 for wrong, 1 / k for a tie of k candidates of which one is right.
      candidate_counts: how many candidates there are.
      answers: the right ones.
      level: of confidence.

    Raises:
      ValueError: no questions, a credit that is not in 0 ... 1, or lengths that differ.
    """
    values = np.asarray(credits, np.float64)
    n = len(values)
    if not n == len(candidate_counts) == len(answers):
        raise ValueError(f"{n} results, {len(candidate_counts)} numbers of candidates, {len(answers)} answers")
    if not ((values >= 0) & (values <= 1)).all():  # which NaN is not
        raise ValueError("A question's credit must be in 0 ... 1")
    majority = majority_level(answers)
    guessing = _guessing_probabilities(candidate_counts)
    chance, total = float(guessing.mean()), math.fsum(values)
    accuracy = min(1.0, total / n)
    return AccuracySummary(
        accuracy=accuracy, n=n, interval=mean_interval(accuracy, n, level),
        chance=chance, chance_p_value=_credit_test(total, guessing),
        majority=majority.level, majority_answer=majority.answer,
        majority_p_value=_credit_test(total, np.full(n, majority.level)),
        detectable_from_chance=_detectable_from(guessing, 0.8, 0.05),
        detectable_between=detectable_independent(n, accuracy))


def score_summary(values: Values, from_sums: FromSums | None = None) -> dict[str, Any]:
    """What stands beside a score of written answers, as JSON: value, interval, smallest detectable difference.

    Shares of questions get Wilson's interval and the power of McNemar's test, others a bootstrap; arguments are its.
    """
    table = np.asarray(values, np.float64)
    if table.ndim == 1 and np.isin(table, (0, 1)).all():
        n, share = len(table), float(table.mean())
        interval: Interval | None = mean_interval(share, n)
        between = detectable_independent(n, share)
    else:
        found = bootstrap(values, from_sums)
        share, interval, between = found.estimate, None, None
        if found.standard_error:  # else every question adds the same: a bootstrap would be certain
            interval, between = found.interval, detectable_by_error(2**0.5 * found.standard_error)
    return {"value": share, "interval": interval and list(interval),
            "smallest_detectable_difference": {"between_runs": between}}


def _credit_test(total: float, probabilities: np.ndarray) -> float:
    """`level_test` of a sum of credits. One that is no whole number counts as the next one towards what is expected."""
    count = round(total)
    if abs(total - count) > 1e-9:  # thirds do not add up exactly
        expected = float(probabilities.sum())
        count = math.floor(total) if total > expected else math.ceil(total)
        if (count - expected) * (total - expected) <= 0:  # none lies between
            return 1.0
    return level_test(count, probabilities)


def _binomial(n: int, probability: float) -> np.ndarray:
    """[n + 1], from logarithms of factorials, so that no term overflows."""
    if probability in (0.0, 1.0):
        return (np.arange(n + 1) == n * probability).astype(np.float64)
    factorials = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    k = np.arange(n + 1)
    return np.exp(factorials[n] - factorials - factorials[::-1] + k * math.log(probability)
                  + (n - k) * math.log1p(-probability))


def _detectable_from(probabilities: np.ndarray, power: float, alpha: float) -> float | None:
    """`detectable_from_level`, of questions that are each right with its own probability, [n], at that level. A system
    of a higher accuracy is taken to be equally often right on all questions, which varies most (Hoeffding, 1956).
    """
    from scipy import special

    _quantiles(power, alpha)
    n, level = len(probabilities), float(np.mean(probabilities))
    p_values = _p_values(count_distribution(probabilities))
    above = (p_values <= alpha) & (np.arange(n + 1) > n * level)  # p falls from the level on: these are the last ones
    least = n + 1 - int(above.sum())
    if least > n:
        return None
    # The share p with P(Binomial(n, p) >= least) = power is a quantile of the beta distribution.
    share = float(special.betaincinv(least, n - least + 1, power)) + ROUNDING
    return min(share, 1.0) - level


def _p_values(likelihoods: np.ndarray) -> np.ndarray:
    """[n + 1]: that of `level_test` for each count."""
    ascending = np.sort(likelihoods)
    as_unlikely = np.searchsorted(ascending, likelihoods * (1 + 1e-7), side="right")
    return np.minimum(1.0, np.cumsum(ascending)[as_unlikely - 1])


def _power_of_mcnemar(n: int, discordant: float, difference: float, alpha: float) -> float:
    """How likely McNemar's exact test of n questions finds the better of two systems whose accuracies differ so."""
    from scipy import special, stats

    if discordant < ROUNDING:  # where scipy overflows, and nothing is found
        return 0.0
    # The number of discordant questions is binomial; what lies beyond 9 standard deviations adds nothing.
    spread = 9 * math.sqrt(n * discordant * (1 - discordant)) + 9
    numbers = np.arange(max(1, math.floor(n * discordant - spread)), min(n, math.ceil(n * discordant + spread)) + 1)
    wins = stats.binom.isf(alpha / 2, numbers, 0.5) + 1  # the fewest that make p at most alpha
    enough = wins <= numbers
    numbers, wins = numbers[enough], wins[enough]
    share = min(1.0, (discordant + difference) / (2 * discordant))
    return float(stats.binom.pmf(numbers, n, discordant) @ special.betainc(wins, numbers - wins + 1, share))


def _smallest(
    largest: float, power: float, power_of: Callable[[float], float], n: int, alpha: float
) -> float | None:
    """The smallest d in 0 ... largest from which on `power_of`, which rises, is at least `power`; None if none is."""
    check_questions(n)
    _quantiles(power, alpha)
    if largest <= 0 or power_of(largest) < power:
        return None
    low, high = 0.0, largest
    while high - low > ROUNDING:
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high


def _quantiles(power: float, alpha: float) -> tuple[float, float]:
    """z_a, of the two-sided test, and z_b, of its power."""
    if not (0.5 <= power < 1 and 0 < alpha < 1):
        raise ValueError(f"Power must be in 0.5 ... 1 and alpha in 0 ... 1, both below 1; found {power} and {alpha}")
    return NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)


def _guessing_probabilities(candidate_counts: Sequence[int]) -> np.ndarray:
    counts = np.asarray(candidate_counts)
    check_questions(len(counts))
    if (counts < 1).any():
        raise ValueError(f"Question {int(np.argmax(counts < 1))} has no candidates")
    return 1 / counts


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"A share must be in 0 ... 1, found {share}")
