"""Measures of each question besides right or wrong, which change long before a small model's accuracy does.

All are computed from the log-likelihoods in TASK.jsonl, so older results have them too. For a question with candidates,
with the scores s that choose (by default the mean log-likelihood per token):

  accuracy       1, 0, or 1 / k where k candidates tie
  bits_per_byte  -log-likelihood of the scored text of the right candidate / ln 2 / its UTF-8 bytes
  margin         s of the right candidate minus the highest s of a wrong one: not negative if the answer is right
  probability    of the right candidate: exp(s) over the sum of exp(s) of all candidates

A score is a mean over questions. The template determines which text of a candidate is scored: its own, or the question
after it. A truncated candidate counts as scored, in nats and in bytes. Compare runs with different vocabularies by bits
per byte: scores per token depend on the vocabulary.

Bits per byte of the right answer are the task loss of Bhagia et al. (2024, "Establishing Task Scaling Laws via
Compute-Efficient Model Ladders"); margin and probability are after Magnusson et al. (2025, "DataDecide"), where the
margin is one of probabilities, and the probability among the candidates is "norm correct prob".
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Lines = Sequence[Mapping[str, Any]]
# The unit of a score for each kind of scoring.
UNITS = {"per_token": "nats per token", "sum": "nats", "per_byte": "nats per byte", "released": "nats per token"}
# For generated answers: the first of these in a line is the question's contribution to the result's own score.
WRITTEN = ("pass@1", "f1")


class Measure(NamedTuple):
    """The description of a measure."""

    name: str
    title: str
    unit: str  # "" of fractions of 1; of margins that under the default scoring, see UNITS
    better: str  # "higher" or "lower"
    lowest: float
    highest: float


MEASURES = (
    Measure("accuracy", "accuracy", "", "higher", 0.0, 1.0),
    Measure("bits_per_byte", "right answer, bits per byte", "bits per byte", "lower", 0.0, np.inf),
    Measure("margin", "margin over the best wrong answer", UNITS["per_token"], "higher", -np.inf, np.inf),
    Measure("probability", "probability of choosing right", "", "higher", 0.0, 1.0),
)


def values(lines: Lines, scoring: str = "per_token") -> dict[str, np.ndarray]:
    """The contribution of each question under each measure, by name: float64 [n].

    NaN if a question does not have the measure: a margin without a wrong candidate, and for generated answers
    everything except the accuracy, which is pass@1 or F1.

    Args:
      lines: of a result, without the header.
      scoring: the rule that chooses, "scoring" in the result's settings; see UNITS.
    """
    found = {measure.name: np.full(len(lines), np.nan) for measure in MEASURES}
    for place, line in enumerate(lines):
        if "candidates" not in line:
            found["accuracy"][place] = next((line[name] for name in WRITTEN if name in line), np.nan)
            continue
        found["accuracy"][place] = line["correct"]
        candidates, right = line["candidates"], line["answer"]
        found["bits_per_byte"][place] = -candidates[right]["log_likelihood"] / np.log(2) / candidates[right]["bytes"]
        scores = np.array([score(candidate, scoring) for candidate in candidates])
        shares = np.exp(scores - scores.max())
        found["probability"][place] = shares[right] / shares.sum()
        if len(scores) > 1:
            found["margin"][place] = scores[right] - np.delete(scores, right).max()
    return found


def score(candidate: Mapping[str, Any], scoring: str) -> float:
    """The score in a candidate's line, in UNITS: the highest is chosen."""
    if scoring == "released":
        return candidate["released"] / candidate["released_tokens"]
    return candidate["log_likelihood"] / {"per_token": candidate["tokens"], "per_byte": candidate["bytes"],
                                          "sum": 1}[scoring]


class Separation(NamedTuple):
    """How well a measure distinguishes arms, given their seeds."""

    measure: str
    arms: tuple[str, str]  # those whose means lie farthest apart, the higher first
    signal: float  # the difference of these two means, in the measure's unit
    noise: float  # standard deviation between the seeds of an arm, pooled over arms
    ratio: float  # signal over noise; NaN where no two seeds of an arm differ
    by_chance: float  # the ratio that arms without any difference exceed once in 20


def signal_over_noise(arms: Mapping[str, Sequence[Mapping[str, np.ndarray]]]) -> list[Separation]:
    """How well each measure distinguishes arms: a row for each, the highest ratio first and those without one last.

    After Heineman et al. (2025, "Signal and Noise: A Framework for Reducing Uncertainty in Language Model
    Evaluation"): the largest difference of two means over the noise, which there is taken between the last checkpoints
    of a run and here between seeds. Of many arms some lie apart by chance, so that a ratio is read against
    `by_chance`, Tukey's studentized range with Kramer's correction for unequal numbers of seeds.

    Args:
      arms: for each arm its seeds, for each of them [n] by measure, as returned by `values` for one task; [1] for a
        held-out loss. Questions with NaN are left out, as are measures that an arm does not have.

    Returns:
      Nothing if there are fewer than two arms, or no arm has two seeds.
    """
    degrees = sum(len(seeds) - 1 for seeds in arms.values())
    if len(arms) < 2 or degrees < 1 or not all(arms.values()):
        return []
    every = [seed for seeds in arms.values() for seed in seeds]
    names = [name for name in every[0] if all(name in seed and np.isfinite(seed[name]).any() for seed in every)]
    rows = [_separation(name, {arm: np.array([np.nanmean(seed[name]) for seed in seeds])
                               for arm, seeds in arms.items()}, degrees) for name in names]
    return sorted(rows, key=lambda row: -row.ratio if np.isfinite(row.ratio) else np.inf)


def _separation(measure: str, scores: Mapping[str, np.ndarray], degrees: int) -> Separation:
    """Of an arm's scores, [seeds] each."""
    means = {arm: float(of_seeds.mean()) for arm, of_seeds in scores.items()}
    high, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    if high == low:  # all means are equal
        high, low = list(means)[:2]
    signal = means[high] - means[low]
    noise = math.sqrt(sum(((of_seeds - of_seeds.mean()) ** 2).sum() for of_seeds in scores.values()) / degrees)
    unequal = math.sqrt((1 / len(scores[high]) + 1 / len(scores[low])) / 2)
    return Separation(measure, (high, low), signal, noise, signal / noise if noise > 1e-12 else np.nan,
                      _studentized_range(len(scores), degrees) * unequal)


@functools.lru_cache(maxsize=256)
def _studentized_range(arms: int, degrees: int) -> float:
    """Its quantile of 95%, which takes a tenth of a second."""
    from scipy import stats

    return float(stats.studentized_range.ppf(0.95, arms, degrees))
