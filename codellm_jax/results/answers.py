"""The contribution of each question to a score, for each seed of an arm; computes scores and their differences from
these.

Scores are fractions of 1, including BLEU but not some of `measures.MEASURES`. A question contributes its credit to an
accuracy: 1, 0, or 1 / k if k candidates tie.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.results.levels import chance_level, detectable_by_error, detectable_paired, majority_level
from codellm_jax.results.measures import MEASURES, UNITS
from codellm_jax.results.measures import values as values_by_measure
from codellm_jax.results.seeds import FromSums, contrast, pseudo_values
from codellm_jax.results.statistics import (
    Interval,
    bootstrap,
    exchanges,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    sign_flips,
    without_rounding,
)

Lines = Sequence[Mapping[str, Any]]
NGRAMS = 4
POWER_QUANTILE = NormalDist().inv_cdf(0.8)
METRICS = {"accuracy": "accuracy", "pass@1": "pass@1", "bleu": "BLEU", "exact_match": "exact match", "f1": "F1"}
# Measures beside an accuracy. With few questions a bootstrap would be too narrow for these: they use Student's test.
BESIDE = {measure.name: measure for measure in MEASURES if measure.name != "accuracy"}


class Estimate(NamedTuple):
    value: float
    interval: Interval | None  # 95%; None where it is unknown
    n: int
    seeds: int


class Compared(NamedTuple):
    """One arm's score minus another's, over the same questions."""

    difference: float
    interval: Interval | None
    p_value: float
    test: str  # one of TESTS
    detectable: float | None  # the smallest difference detectable with these questions and seeds


class Levels(NamedTuple):
    """The reference levels of an accuracy."""

    chance: float
    majority: float


TESTS = {
    "McNemar": "one seed each, right or wrong: McNemar's exact test on the questions that only one of them answers "
               "correctly; the interval is a bootstrap over questions",
    "sign flips": "one seed each, some questions are ties and count 1 / k: a test of the sum of differences against "
                  "random signs; the interval is a bootstrap over questions",
    "exchanges": "one seed each, graded answers: a permutation test that exchanges the two arms' answers at random per "
                 "question; the interval is Student's over questions",
    "questions": "an arm with a single seed, against several or in a measure other than accuracy: Student's test of "
                 "the questions' differences, averaged over seeds; variation between seeds is ignored",
    "seeds": "several seeds each: the variance of the difference is the variance between seed means divided by their "
             "number, plus the variance between question means divided by theirs; the interval is Banerjee's, which "
             "weighs each by its own quantile of Student's distribution and is conservative; seeds of the two arms "
             "that started from the same run are paired",
}


def metrics_of(lines: Lines) -> list[str]:
    """The metrics that a task's lines contain, in printing order."""
    if "correct" in lines[0]:
        return ["accuracy"]
    return [name for name in METRICS if name in lines[0] or f"{name}_counts" in lines[0]]


def ties_of(lines: Lines) -> int:
    """The number of questions for which several candidates share the best score."""
    return sum(bool(line.get("tied")) for line in lines)


def is_measured(lines: Lines) -> bool:
    """False if most questions are ties: such a score reflects the number of candidates, not the model."""
    return 2 * ties_of(lines) <= len(lines)


def values_of(lines: Lines, metric: str) -> np.ndarray:
    """The contribution of each question: [n], or for BLEU [n, 10], the counts from which `corpus_bleu` is computed."""
    name = {"accuracy": "correct", "bleu": "bleu_counts"}.get(metric, metric)
    return np.array([line[name] for line in lines], np.float64)


def levels_of(lines: Lines) -> Levels | None:
    """Chance and majority of questions with candidates; None for generated answers."""
    if "correct" not in lines[0]:
        return None
    return Levels(chance_level([len(line["candidates"]) for line in lines]),
                  majority_level([line["answer"] for line in lines]).level)


def corpus_bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-4 (Papineni et al., 2002) in 0 ... 1, from counts summed over questions, [..., 10] -> [...].

    Counts are the lengths of the prediction and of the reference, then for each order of n-grams the matching and the
    predicted ones. There is no smoothing: without a match of some order the result is 0.
    """
    counts = np.asarray(counts, np.float64)
    matches, possible = counts[..., 2:2 + NGRAMS], counts[..., 2 + NGRAMS:]
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(matches > 0, matches / np.maximum(possible, 1), 0.0)
        brevity = np.minimum(1.0, np.exp(1 - counts[..., 1] / counts[..., 0]))
        geometric = np.exp(np.log(precisions).mean(axis=-1))
    return np.where((matches > 0).all(axis=-1), brevity * geometric, 0.0)


def score_of(values: np.ndarray) -> float:
    """The score from one seed's values."""
    return float(values.mean()) if values.ndim == 1 else float(corpus_bleu(values.sum(axis=0)))


def estimate(seeds: Sequence[np.ndarray], metric: str) -> Estimate:
    """The mean score of an arm's seeds; of each `values_of`, or what `measures.values` has and is not NaN, of the same
    questions and this metric or measure.

    For one seed, accuracies and other shares of questions get Wilson's interval, measures beside an accuracy Student's,
    and others a bootstrap interval over questions; for several seeds it is that of `contrast`, over seeds and
    questions.
    """
    n, value = len(seeds[0]), float(np.mean([score_of(values) for values in seeds]))
    low, high = (BESIDE[metric].lowest, BESIDE[metric].highest) if metric in BESIDE else (0.0, 1.0)
    shares = metric not in BESIDE and (metric == "accuracy" or all(_all_or_nothing(values) for values in seeds))
    interval = None
    if n > 1 and (len(seeds) > 1 or metric in BESIDE):
        found = contrast([linear(seeds)], estimate=value, seeds=len(seeds) > 1)
        interval = found.interval if found.standard_error else None
    elif len(seeds) == 1 and not shares and metric not in BESIDE:
        drawn = bootstrap(seeds[0], _from_sums(seeds[0]))
        interval = drawn.interval if drawn.standard_error else None
    if interval is None and shares:  # Wilson's interval is never a point
        interval = mean_interval(value, n)
    return Estimate(value, interval and Interval(max(low, interval.low), min(high, interval.high)), n, len(seeds))


def summaries(lines: Lines, scoring: str) -> dict[str, dict[str, Any]]:
    """What stands beside the accuracy of a result, as JSON by the name of each measure that it has: value, interval,
    the number of questions that have it, and its unit. `scoring` as for `measures.values`.
    """
    found, by_measure = {}, values_by_measure(lines, scoring)
    for measure in MEASURES:
        values = by_measure[measure.name][np.isfinite(by_measure[measure.name])]
        if measure.name not in BESIDE or not len(values):
            continue
        one = estimate([values], measure.name)
        found[measure.name] = {"value": one.value, "n": one.n, "interval": one.interval and list(one.interval),
                               "unit": UNITS[scoring] if measure.name == "margin" else measure.unit}
    return found


def compared(first: Sequence[np.ndarray], second: Sequence[np.ndarray], metric: str, paired: bool) -> Compared:
    """The first arm's score minus the second's; of each seed of either what `estimate` takes, of the same questions.

    `paired`: both arms have the same seeds, in the same order.
    """
    ours, theirs, n = first[0], second[0], len(first[0])
    means = [float(np.mean([score_of(values) for values in arm])) for arm in (first, second)]
    difference = without_rounding(means[0] - means[1], max(map(abs, means)))
    if len(first) == len(second) == 1 and metric not in BESIDE:
        drawn = paired_bootstrap(ours, theirs, _from_sums(ours))
        interval = drawn.interval if drawn.standard_error else None
        if _all_or_nothing(ours) and _all_or_nothing(theirs):
            test = mcnemar(ours, theirs)
            return Compared(difference, interval, test.p_value, "McNemar",
                            detectable_paired(n, (test.only_first + test.only_second) / n))
        detectable = detectable_by_error(drawn.standard_error) if drawn.standard_error else None
        if metric == "accuracy":
            return Compared(difference, interval, sign_flips(ours, theirs), "sign flips", detectable)
        student = contrast([linear(first)], [linear(second)], seeds=False, estimate=difference) if n > 1 else None
        return Compared(difference, student.interval if student and student.standard_error else None,
                        exchanges(ours, theirs, _from_sums(ours)), "exchanges", detectable)
    if n < 2:
        return Compared(difference, None, 1.0, "seeds", None)
    seeds = min(len(first), len(second)) > 1
    found = contrast([linear(first)], [linear(second)], paired=paired and seeds, seeds=seeds, estimate=difference)
    half = found.interval.high - found.estimate
    return Compared(difference, found.interval if found.standard_error else None, found.p_value,
                    "seeds" if seeds else "questions",
                    half + POWER_QUANTILE * found.standard_error if found.standard_error else None)


def linear(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """[S, n] values whose means stand for the scores; see `pseudo_values`."""
    return np.stack([pseudo_values(values, _from_sums(values)) for values in seeds])


def _from_sums(values: np.ndarray) -> FromSums | None:
    return None if values.ndim == 1 else corpus_bleu


def _all_or_nothing(values: np.ndarray) -> bool:
    return values.ndim == 1 and set(values.tolist()) <= {0.0, 1.0}
