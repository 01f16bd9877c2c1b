"""What a question adds beside right or wrong: measures that move long before the accuracy of a small model does.

All are computed from the log-likelihoods that TASK.jsonl holds, so that results of any age have them. Of a question
with candidates, whose scores s are those that choose (by default the mean log-likelihood of a token):

  accuracy       1, 0, or 1 / k where k candidates tie
  bits_per_byte  -log-likelihood of what is scored of the right candidate, over ln 2, over its bytes of UTF-8
  margin         s of the right candidate minus the highest s of a wrong one: positive where the answer is right
  probability    of the right candidate: exp(s) over the sum of exp(s) of all candidates

What is scored of a candidate depends on the template: its own text, or the question behind it. A candidate that is cut
counts as it was scored, in nats and in bytes. DataDecide (Magnusson et al., 2025, section 3.4) finds that such measures
rank models of 150M parameters as accuracy ranks large ones; there the probability is "norm correct prob".

How well a measure tells arms apart is its signal over its noise (Heineman et al., 2025, "Signal and Noise", section 3):
how far the arms' means lie apart, in standard deviations between seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Lines = Sequence[Mapping[str, Any]]
# Of each scoring what a score is in.
UNITS = {"per_token": "nats per token", "sum": "nats", "per_byte": "nats per byte", "released": "nats per token"}
# Of answers that are written: the first that a line has is what the question adds.
WRITTEN = ("pass@1", "exact_match", "f1")


class Measure(NamedTuple):
    """What is told of a measure; its values are fractions where its unit is ""."""

    name: str
    title: str
    unit: str  # of margins under the default scoring; see UNITS
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
    """What each question adds under each measure, by its name: float64 [n].

    NaN where a question does not have it: a margin where there is no wrong candidate, and all but the accuracy of
    answers that are written, of which accuracy is pass@1, exact match or F1.

    Args:
      lines: of a result, without the header.
      scoring: what chose, "scoring" of the result's settings; see UNITS.
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
        found["probability"][place] = 1 / np.exp(scores - scores[right]).sum()
        if len(scores) > 1:
            found["margin"][place] = scores[right] - np.delete(scores, right).max()
    return found


def score(candidate: Mapping[str, Any], scoring: str) -> float:
    """The score of a candidate's line, in UNITS: the highest is chosen."""
    if scoring == "released":
        return candidate["released"] / candidate["released_tokens"]
    return candidate["log_likelihood"] / {"per_token": candidate["tokens"], "per_byte": candidate["bytes"],
                                          "sum": 1}[scoring]
