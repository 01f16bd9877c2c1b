"""The uncertainty of a score for an arm with several seeds: both seeds and questions are samples.

Another seed would give other answers, and so would other questions. The variance of a mean over S seeds and n questions
is taken as

    between seeds: v(the seeds' means) / S   +   between questions: v(the questions' means over seeds) / n

each v with its unbiased denominator. In the crossed design seeds x questions both terms contain the variance of a
single answer, which is thus counted twice, as in min F' (Clark, 1973). Over several tasks, with different questions but
the same seeds, the seeds' means are taken over the tasks first, and each task has its own term. Seeds of two unrelated
arms are assumed to vary equally.

The terms v have few degrees of freedom if there are few seeds, and may be small by luck. The interval is therefore
Banerjee's (1960), estimate +- sqrt(sum of t^2 v) with each term's own quantile t of Student's distribution, which has
at least the nominal coverage, however large each term is. The p-value is that of the interval that just reaches 0.

A score that is not a mean over questions, such as corpus BLEU, is represented by its pseudo-values (Tukey's jackknife).
If all questions agree, one more that carries no information is added, since no sample is certain.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from codellm_jax.results.statistics import Interval

FromSums = Callable[[np.ndarray], np.ndarray]
LEAST_P_VALUE = 1e-12  # smaller ones are not distinguished


class Contrast(NamedTuple):
    """A mean, or a difference of means."""

    estimate: float
    interval: Interval
    standard_error: float
    p_value: float  # two-sided, of being 0


def pseudo_values(values: np.ndarray, from_sums: FromSums | None = None) -> np.ndarray:
    """[n] values whose mean represents the score: the values themselves, or n T - (n - 1) T without question i.

    Args:
      values: [n], or [n, k] with `from_sums`, the score as a function of the sums [..., k] -> [...].
    """
    if from_sums is None:
        return np.asarray(values, np.float64)
    table = np.asarray(values, np.float64)
    n, sums = len(table), table.sum(axis=0)
    whole = float(from_sums(sums))
    if n < 2:
        return np.array([whole])
    return n * whole - (n - 1) * np.asarray(from_sums(sums - table), np.float64)


def contrast(first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None = None, *, paired: bool = False,
             seeds: bool = True, estimate: float | None = None, level: float = 0.95) -> Contrast:
    """The mean of `first`, or its difference from `second`, over tasks that count equally.

    Args:
      first: for each task [S, n]: what each seed adds on each question.
      second: likewise of another arm, [T, n] with the same questions; None for none.
      paired: row s of both belongs to the same seed, which they have in common.
      seeds: False ignores the variance between seeds, for arms with a single seed: the result then holds for these
        parameters, not for others trained in the same way.
      estimate: replaces the mean, if the values are pseudo-values of another score.
      level: of confidence.

    Raises:
      ValueError: no tasks, an arm with fewer than two seeds or a task with fewer than two questions, or shapes that
        do not fit.
    """
    arms = [[np.asarray(task, np.float64) for task in arm] for arm in ([first] if second is None else [first, second])]
    if not arms[0] or any(task.ndim != 2 or len(task) < 1 + seeds or task.shape[1] < 2 for arm in arms for task in arm):
        raise ValueError(f"{'Two seeds' if seeds else 'One seed'} or more of each arm are needed, and two questions or "
                         f"more of each task, found {[task.shape for arm in arms for task in arm]}")
    if paired:
        if [task.shape for task in arms[0]] != [task.shape for task in arms[-1]]:
            raise ValueError("Seeds can be paired only if both arms have the same")
        arms = [[one - other for one, other in zip(*arms, strict=True)]]
    differences = [one.mean(axis=0) - (arms[1][place].mean(axis=0) if len(arms) > 1 else 0)
                   for place, one in enumerate(arms[0])]  # of each task [n]
    parts = [_between_seeds([np.mean([task.mean(axis=1) for task in arm], axis=0) for arm in arms])] if seeds else []
    sampled = [task if task.std() > 1e-12 else np.append(task, 0.0) for task in differences]
    parts += [(task.var(ddof=1) / len(task) / len(differences) ** 2, len(task) - 1) for task in sampled]
    centre = float(np.mean([task.mean() for task in differences])) if estimate is None else estimate
    return by_parts(centre, parts, level)


def by_parts(estimate: float, parts: Sequence[tuple[float, float]], level: float = 0.95) -> Contrast:
    """An estimate whose variance is a sum of independent parts, each (variance, degrees of freedom). Where all answers
    are 0 there is no variance: the interval is that point and p is 1.
    """
    from scipy import optimize, stats

    variances, degrees = np.array(parts, np.float64).T
    if variances.sum() <= 1e-24:
        return Contrast(estimate, Interval(estimate, estimate), 0.0, 1.0)

    def half_squared(p_value: float) -> float:
        return float((variances * stats.t.isf(p_value / 2, degrees) ** 2).sum())

    def beyond(logarithm: float) -> float:
        return half_squared(np.exp(logarithm)) - estimate**2

    half = half_squared(1 - level) ** 0.5
    least = np.log(LEAST_P_VALUE)
    p_value = 1.0 if estimate == 0 else LEAST_P_VALUE if beyond(least) < 0 else float(
        np.exp(optimize.brentq(beyond, least, 0.0)))
    return Contrast(estimate, Interval(estimate - half, estimate + half), float(variances.sum() ** 0.5), p_value)


def _between_seeds(means: Sequence[np.ndarray]) -> tuple[float, float]:
    """The variance between seeds of the mean of one arm, [S], or of the difference of two, [S] and [T], and its degrees
    of freedom; that of two is pooled.
    """
    degrees = sum(len(of_arm) - 1 for of_arm in means)
    pooled = sum(float(((of_arm - of_arm.mean()) ** 2).sum()) for of_arm in means) / degrees
    return pooled * sum(1 / len(of_arm) for of_arm in means), degrees
