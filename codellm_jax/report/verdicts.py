"""Whether code helps, harms, or has no demonstrable effect: effects of arms on measures, and the rules for conclusions.
"""

from collections.abc import Sequence
from typing import NamedTuple

from codellm_jax.report.asked import Group, Measure
from codellm_jax.report.effects import Effect, Told, told
from codellm_jax.results.statistics import Interval, holm

LEVEL = 0.05  # of a p-value, corrected
HELPS, HARMS, OPEN, UNTOLD = "helps", "harms", "no effect shown", "cannot be told"
TOGETHER = {HELPS: "more together", HARMS: "less together"}


class Judged(NamedTuple):
    """An effect on a measure, in the measure's unit."""

    effect: Effect
    measure: Measure
    told: Told
    corrected: float | None  # by Holm's method
    verdict: str
    why: str  # the reason why there is no verdict; else empty

    @property
    def interval(self) -> Interval | None:
        return scaled(self.told, self.measure)

    @property
    def estimate(self) -> float:
        return self.measure.scale * self.told.estimate


def judge(asked: Sequence[tuple[Group, Sequence[Effect] | None]]) -> list[list[Judged]]:
    """Effects on every measure of each group, corrected for all of them together: the given effects, or, where these
    are None, all that the design of the arms with the measure can estimate.
    """
    found = [[(effect, measure, one) for measure in group.measures
              for effect in (group.design_of(measure.labels).effects if effects is None else effects)
              if (one := told(effect.weights, measure.samples, group.roots)) is not None]
             for group, effects in asked]
    p_values = [one.contrast.p_value for of_group in found for _, _, one in of_group if one.contrast]
    corrected = iter(holm(p_values) if p_values else [])
    return [[_judged(group, effect, measure, one, next(corrected) if one.contrast else None)
             for effect, measure, one in of_group] for (group, _), of_group in zip(asked, found, strict=True)]


def _judged(group: Group, effect: Effect, measure: Measure, one: Told, corrected: float | None) -> Judged:
    reasons = _why_untold(group, list(effect.weights), measure, one)
    if reasons:
        return Judged(effect, measure, one, corrected, UNTOLD, "; ".join(reasons))
    assert corrected is not None
    better = (one.estimate > 0) == (measure.better == "higher")
    verdict = OPEN if corrected >= LEVEL else HELPS if better else HARMS
    return Judged(effect, measure, one, corrected,
                  TOGETHER.get(verdict, verdict) if effect.kind == "together" else verdict, "")


def _why_untold(group: Group, labels: Sequence[str], measure: Measure, one: Told) -> list[str]:
    """The reasons why nothing is concluded whatever the numbers are: the rules of the paper's conclusions."""
    reasons = []
    if one.seeds < 2:
        reasons.append("a single seed")
    elif one.contrast is None:
        reasons.append("its error is unknown")
    if measure.task is not None:
        reasons += group.study.blockers(labels, [measure.task])
        if measure.metric == "accuracy" and _at_baseline(group, labels, measure):
            reasons.append("no arm is above what answering without reading reaches")
    return reasons


def _at_baseline(group: Group, labels: Sequence[str], measure: Measure) -> bool:
    assert measure.task is not None
    levels = group.study.levels(measure.task, clean=True)
    alone = [told({label: 1.0}, measure.samples, group.roots) for label in labels]
    return levels is not None and all(
        one is None or one.contrast is None or one.contrast.interval.low <= max(levels) for one in alone)


def scaled(one: Told, measure: Measure) -> Interval | None:
    return one.contrast and Interval(*(measure.scale * bound for bound in one.contrast.interval))


def bounds(interval: Interval | None) -> str:
    return "no interval" if interval is None else f"{interval.low:+.3g} to {interval.high:+.3g}"


def shown_p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
