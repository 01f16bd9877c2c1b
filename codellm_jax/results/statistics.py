"""The uncertainty of a score and of the difference of two: intervals, paired tests, corrections.

An accuracy, or any other share of questions, gets a Wilson interval; every other score is bootstrapped over questions.
Two systems with answers to the same questions are compared in pairs: by McNemar's test if each question is right or
wrong, by sign flips if one can be partly right, as a tie of k candidates is to 1 / k. Resampling questions does not
show the variation between training seeds.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

# Random indices held at once while resampling: 32 MiB of them, whatever the number of questions.
RESAMPLED_AT_ONCE = 2**22

ROUNDING = 1e-12  # relative: differences that are smaller are none

Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
FromSums = Callable[[np.ndarray], Any]


class Interval(NamedTuple):
    low: float
    high: float


class Bootstrap(NamedTuple):
    estimate: float  # on the questions as they are
    interval: Interval
    standard_error: float


class Difference(NamedTuple):
    difference: float  # first minus second, on the questions as they are
    interval: Interval
    standard_error: float
    p_value: float


class McNemar(NamedTuple):
    only_first: int  # questions that the first system alone has right
    only_second: int
    p_value: float


def wilson_interval(correct: int, n: int, level: float = 0.95) -> Interval:
    """The score interval of a share k / n (Wilson, 1927), without continuity correction.

    With p = k / n and z the normal quantile of (1 + level) / 2:
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Raises:
      ValueError: there are no questions, correct is not in 0 ... n, or level is not between 0 and 1.
    """
    check_count(correct, n)
    return mean_interval(correct / n, n, level)


def mean_interval(mean: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's interval for the mean of n values from 0 to 1, such as credits of ties.

    It assumes the variance mean (1 - mean), that of right and wrong, which values from 0 to 1 cannot exceed, so it is
    never too narrow for that reason.

    Raises:
      ValueError: there are no questions, or the mean or the level is out of its range.
    """
    check_questions(n)
    if not 0 <= mean <= 1:
        raise ValueError(f"A mean of values in 0 ... 1 must also be there, found {mean}")
    z = NormalDist().inv_cdf((1 + _checked_level(level)) / 2)
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At both ends the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if mean == 0 else (centre - half) / scale
    high = 1.0 if mean == 1 else (centre + half) / scale
    return Interval(low, high)


def bootstrap(values: Values, from_sums: FromSums | None = None, *, level: float = 0.95, resamples: int = 10_000,
              seed: int = 0) -> Bootstrap:
    """A percentile interval over questions drawn with replacement (Efron, 1979).

    If all questions have the same value, the interval is that point, which is too narrow: for shares of questions, use
    `wilson_interval`.

    Args:
      values: [n], one value a question, or [n, k], sufficient statistics of each question.
      from_sums: the score as a function of the sums over questions, [..., k] -> [...] (without k for values [n]),
        such as corpus BLEU, or `lambda sums: sums[..., 0] / sums[..., 1]` for a ratio. By default the mean of [n].
      level: of confidence.
      resamples: how often the n questions are drawn.
      seed: of the draws; the same seed draws the same questions for any values of the same n.

    Raises:
      ValueError: no questions, a value or score that is not finite, or a level not between 0 and 1.
    """
    table, score = _score_of(values, from_sums)
    drawn = np.concatenate([score(counts @ table) for counts in _draws(len(table), resamples, seed)])
    estimate = float(score(table.sum(axis=0)))
    return Bootstrap(estimate, *_spread(estimate, drawn, level))


def paired_bootstrap(first: Values, second: Values, from_sums: FromSums | None = None, *, level: float = 0.95,
                     resamples: int = 10_000, seed: int = 0) -> Difference:
    """The difference of two systems' scores, first minus second, over the same questions drawn for both.

    The p-value is two-sided, that of the percentile interval: with R resamples and b the smaller of the numbers of
    differences <= 0 and >= 0, it is 2 (b + 1) / (R + 1), at most 1 (Davison and Hinkley, 1997, for the
    ones added). It is below 1 - level where the interval excludes 0, but for the ones added.

    Args:
      first, second: [n] or [n, k] as in `bootstrap`, row i of both for the same question.

    Raises:
      ValueError: as `bootstrap`, or the systems did not answer equally many questions.
    """
    table, score = _score_of(first, from_sums)
    other, _ = _score_of(second, from_sums)
    if table.shape != other.shape:
        raise ValueError(f"Paired questions are needed: the first system has {table.shape}, the second {other.shape}")

    def difference(first_sums: np.ndarray, second_sums: np.ndarray) -> np.ndarray:
        ours, theirs = score(first_sums), score(second_sums)
        # Rounding must not tell equal scores apart: they would count as evidence.
        equal = np.abs(ours - theirs) <= ROUNDING * np.maximum(np.abs(ours), np.abs(theirs))
        return np.where(equal, 0.0, ours - theirs)

    drawn = np.concatenate([difference(counts @ table, counts @ other)
                            for counts in _draws(len(table), resamples, seed)])
    estimate = float(difference(table.sum(axis=0), other.sum(axis=0)))
    interval, error = _spread(estimate, drawn, level)
    fewer = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return Difference(estimate, interval, error, min(1.0, 2 * (int(fewer) + 1) / (resamples + 1)))


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> McNemar:
    """Whether two systems are right equally often on the same questions: the exact test (McNemar, 1947).

    Given that b + c questions are right in one system alone, b is Binomial(b + c, 1/2) if the systems are equal;
    the two-sided p-value is twice the smaller tail, min(b, c) included, and at most 1. It is 1 without such questions.

    Args:
      first, second: [n] right or wrong, entry i of both for the same question.

    Raises:
      ValueError: no questions, not equally many, or values other than 0 and 1.
    """
    ours, theirs = right_or_wrong(first), right_or_wrong(second)
    if len(ours) != len(theirs):
        raise ValueError(f"Paired questions are needed: the first system has {len(ours)}, the second {len(theirs)}")
    only_first, only_second = int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))
    n = only_first + only_second
    term = tail = 1  # binomial coefficients, as whole numbers: exact however many questions there are
    for k in range(1, min(only_first, only_second) + 1):
        term = term * (n - k + 1) // k
        tail += term
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**n))


def exchanges(first: Values, second: Values, from_sums: FromSums | None = None, *, resamples: int = 10_000,
              seed: int = 0) -> float:
    """p-value, two-sided, that two systems score alike, where a score is a function of sums over questions: of each
    question the systems' answers change places at random (approximate randomization; Noreen, 1989, chapter 2). Counted
    and valid as `sign_flips`, which it is for a mean.

    Args:
      first, second, from_sums: as in `paired_bootstrap`.
      resamples: R.
      seed: of the draws.
    """
    table, score = _score_of(first, from_sums)
    other, _ = _score_of(second, from_sums)
    if table.shape != other.shape:
        raise ValueError(f"Paired questions are needed: the first system has {table.shape}, the second {other.shape}")
    both, half = (table + other).sum(axis=0) / 2, (table - other) / 2
    generator = np.random.default_rng(seed)
    seen = abs(float(score(both + half.sum(axis=0)) - score(both - half.sum(axis=0))))
    as_far, height = 0, max(1, RESAMPLED_AT_ONCE // len(table))
    for start in range(0, resamples, height):
        signs = 2.0 * generator.integers(2, size=(min(height, resamples - start), len(table))) - 1
        moved = signs @ half
        as_far += int(np.count_nonzero(np.abs(score(both + moved) - score(both - moved)) >= seen - 1e-9))
    return (as_far + 1) / (resamples + 1)


def sign_flips(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, *, resamples: int = 10_000,
               seed: int = 0) -> float:
    """p-value, two-sided, that two systems score alike on the same questions (Fisher's randomization test, 1935).

    If they do, each question's difference might as well have the other sign. Of R random choices of signs, b give a
    sum of differences at least as far from 0 as theirs is: p = (b + 1) / (R + 1), which is valid for any values and
    any n (Phipson and Smyth, 2010). For right and wrong it is McNemar's exact test, but for the draws.

    Args:
      first, second: [n], what each question adds, entry i of both for the same question.
      resamples: R.
      seed: of the draws.

    Raises:
      ValueError: no questions, or not equally many.
    """
    ours, theirs = np.asarray(first, np.float64), np.asarray(second, np.float64)
    check_questions(len(ours))
    if ours.shape != theirs.shape:
        raise ValueError(f"Paired questions are needed: the first system has {ours.shape}, the second {theirs.shape}")
    # Differences of one size are drawn together: how many of them are positive is binomial.
    sizes, counts = np.unique(np.round(np.abs(ours - theirs), 12), return_counts=True)
    positive = np.random.default_rng(seed).binomial(counts, 0.5, (resamples, len(sizes)))
    drawn = np.abs((2 * positive - counts) @ sizes)
    as_far = np.count_nonzero(drawn >= abs((ours - theirs).sum()) - 1e-9)  # equal sums differ by rounding
    return (int(as_far) + 1) / (resamples + 1)


def without_rounding(value: float, size: float) -> float:
    """A difference of numbers of this size, or 0 where nothing but rounding makes it one."""
    return 0.0 if abs(value) <= ROUNDING * size else value


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, by steps down (Holm, 1979), in the order given.

    Of m p-values sorted upwards, the i-th becomes max over j <= i of min(1, (m - j + 1) p_j). Those below alpha can
    be called significant with a chance of at most alpha that any of them is wrong, however they depend on each other.

    Raises:
      ValueError: no p-values, or one not in 0 ... 1.
    """
    values = np.asarray(p_values, np.float64)
    check_questions(len(values), "p-values")
    if not ((values >= 0) & (values <= 1)).all():  # which NaN is not
        raise ValueError(f"p-values must be between 0 and 1: {list(p_values)}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    steps = np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps * values[order]))
    return adjusted.tolist()


def _score_of(values: Values, from_sums: FromSums | None) -> tuple[np.ndarray, FromSums]:
    """Values as [n, k], and the score as a function of their sums [..., k]."""
    table = np.asarray(values, np.float64)
    check_questions(len(table))
    if not np.isfinite(table).all():
        raise ValueError("A question's value is not finite")
    n = len(table)
    if table.ndim > 2 or table.ndim == 2 and from_sums is None:
        raise ValueError(f"Values of shape {table.shape}: give [n], or [n, k] with the score as a function of sums")
    of_sums = from_sums or (lambda sums: sums / n)
    single = table.ndim == 1

    def score(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # `_spread` refuses what comes of it
            return np.asarray(of_sums(sums[..., 0] if single else sums), np.float64)

    return table.reshape(n, -1), score


def _draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each question is drawn, [some resamples, n], until there are enough."""
    if resamples < 1:
        raise ValueError(f"At least one resample is needed, not {resamples}")
    generator = np.random.default_rng(seed)
    rows = max(1, RESAMPLED_AT_ONCE // n)
    for start in range(0, resamples, rows):
        height = min(rows, resamples - start)
        indices = generator.integers(n, size=(height, n))
        indices += np.arange(height)[:, None] * n
        yield np.bincount(indices.ravel(), minlength=height * n).reshape(height, n).astype(np.float64)


def _spread(estimate: float, drawn: np.ndarray, level: float) -> tuple[Interval, float]:
    tail = (1 - _checked_level(level)) / 2
    bad = np.count_nonzero(~np.isfinite(drawn))
    if bad or not math.isfinite(estimate):
        raise ValueError(f"The score is not finite on {bad} of {len(drawn)} resamples")
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high)), float(drawn.std())


def right_or_wrong(values: Sequence[bool] | np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    check_questions(len(array))
    if not np.isin(array, (0, 1)).all():
        raise ValueError("Right and wrong must be given as 1 and 0, or True and False")
    return array.astype(bool)


def _checked_level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"A confidence level must be between 0 and 1, such as 0.95; found {level}")
    return level


def check_count(correct: int, n: int) -> None:
    check_questions(n)
    if correct != int(correct) or not 0 <= correct <= n:
        raise ValueError(f"{correct} right answers of {n} questions")


def check_questions(n: int, what: str = "questions") -> None:
    if n < 1:
        raise ValueError(f"There are no {what}")
