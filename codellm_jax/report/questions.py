"""The contribution of each question of a benchmark to the measures of the runs evaluated on it."""

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from codellm_jax.report.runs import Result
from codellm_jax.results import measures
from codellm_jax.results.answers import METRICS, linear, metrics_of, score_of, values_of

TITLES = {"bits_per_byte": "bits per byte of the right answer"}
Key = TypeVar("Key")


class Asked(NamedTuple, Generic[Key]):
    """A benchmark under one metric or measure.

    Attributes:
      metric: the metric, or the measure's name in `measures.MEASURES`.
      title: the name shown to readers.
      unit: "" for fractions of 1.
      better: "higher" or "lower".
      scores: by run.
      values: [n] by run, the contribution of each question; their mean is the score.
    """

    metric: str
    title: str
    unit: str
    better: str
    scores: Mapping[Key, float]
    values: Mapping[Key, np.ndarray]


def task_of(name: str) -> str:
    """The benchmark in a measure's name as laws use it, "TASK/MEASURE"; empty for held-out losses."""
    return name.rpartition("/")[0]


def asked(results: Mapping[Key, Result], overlapping: frozenset[str]) -> list[Asked[Key]]:
    """The metrics and measures of one benchmark, for the runs that were measured on it.

    Args:
      results: by run, on the same questions; the metrics of the first run are those of all.
      overlapping: ids of questions to leave out because training sources contain them.
    """
    results = {key: result for key, result in results.items() if result.measured}
    if not results:
        return []
    first = next(iter(results.values()))
    kept = np.array([id_ not in overlapping for id_ in first.ids])
    if kept.sum() < 2:
        return []
    found: list[Asked[Key]] = []
    for metric in metrics_of(first.lines):
        values = {key: values_of(result.lines, metric)[kept] for key, result in results.items()}
        found.append(Asked(metric, METRICS[metric], "", "higher", {key: score_of(one) for key, one in values.items()},
                           {key: linear([one])[0] for key, one in values.items()}))
    if "candidates" not in first.lines[0]:
        return found
    scoring = str(first.result["settings"].get("scoring", "per_token"))
    by_measure = {key: measures.values(result.lines, scoring) for key, result in results.items()}
    for measure in measures.MEASURES:
        if measure.name == "accuracy":
            continue
        whole = kept & np.isfinite([one[measure.name] for one in by_measure.values()]).all(axis=0)
        if whole.sum() > 1:
            own = {key: one[measure.name][whole] for key, one in by_measure.items()}
            found.append(Asked(
                measure.name, TITLES.get(measure.name, measure.title),
                measures.UNITS[scoring] if measure.name == "margin" else measure.unit, measure.better,
                {key: float(one.mean()) for key, one in own.items()}, own))
    return found
