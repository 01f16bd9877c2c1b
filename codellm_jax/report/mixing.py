"""The laws of a sweep: each loss against shares, sizes and lengths, the best mixture, and what remains undetermined."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codellm_jax.report.fitted import SAME_SCALE, Fitted, clusters, fit_sweep, predict, scales
from codellm_jax.report.laws import curves
from codellm_jax.report.noise import Outlier
from codellm_jax.report.optimum import Best, CurvesAt, Design, best, between, design, weigh
from codellm_jax.report.questions import task_of
from codellm_jax.report.sweeps import POOLS, Sweep

SHOWN = 101  # shares of two sources at which to predict
Told = Callable[[int, int, str], None]


class Miss(NamedTuple):
    """The error of a law of all smaller sizes, or shorter runs, on the largest, which was left out."""

    axis: str  # "size" or "tokens"
    left_out: float
    factor: float  # the value left out over the largest kept
    misses: Mapping[str, float]  # by loss, root mean square over shares
    coverage: float  # the fraction of left-out losses within their 95% intervals


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Attributes:
      sweep: the whole sweep.
      fitted: the laws that the answers come from.
      lines: [n] the lines to which they are fitted, where these have one size and length; else none.
      size, tokens: the size and length of the answers; NaN where unknown.
      extrapolated: the scales beyond all runs: "size", "tokens" or both.
      objective: weights by the names of losses.
      shares: [m, S] the mixtures of the predictions; for two sources, a fine grid.
      predicted, intervals, run_intervals: [D, m], [D, m, 2] of the law, and of one further run.
      best: the best mixture for the objective, between the runs' mixtures.
      beyond: the best of all mixtures, where it lies beyond the runs'; else None.
      design: further runs, where the best mixture is poorly determined; else None.
      misses: the errors of the laws of size and length, where there are such laws.
      outliers: (loss, line of the sweep, outlier); excluded from the laws.
    """

    sweep: Sweep
    fitted: Fitted
    lines: np.ndarray
    size: float
    tokens: float
    extrapolated: Sequence[str]
    objective: Mapping[str, float]
    shares: np.ndarray
    predicted: np.ndarray
    intervals: np.ndarray
    run_intervals: np.ndarray
    best: Best
    beyond: Best | None
    design: Design | None
    misses: Sequence[Miss]
    outliers: Sequence[tuple[str, int, Outlier]]

    def predict(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The predicted losses [D, m] of mixtures [m, S], their 95% intervals, and those of one further run."""
        return predict(self.fitted, self.fitted.at(shares, self.size, self.tokens), _widening(
            self.misses, self.extrapolated, self.fitted, self.size, self.tokens))


def parse_objective(text: str | None, sweep: Sweep) -> dict[str, float]:
    """The weights in "text:0.5,code:0.5"; without a text, equal weights for all pools, or else for all losses. A
    measure where higher is better gets a negative weight, so a lower objective is always better.

    Raises:
      ValueError: with a one-line message, for an unknown loss or a weight that is not a number.
    """
    losses = sweep.losses
    if text is None:
        held_out = [name for name in losses if not task_of(name)] or list(losses)
        names = [name for name in held_out if name in POOLS] or held_out
        return {name: (-1 if name in sweep.more_is_better else 1) / len(names) for name in names}
    found: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon:
            raise ValueError(f"--objective={text}: {part.strip()!r} must be a loss and its weight, such as text:0.5.")
        if name not in losses:
            raise ValueError(f"--objective={text}: there is no loss {name}; the losses are {', '.join(losses)}.")
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = math.nan
        if not (math.isfinite(found[name]) and found[name] >= 0):
            raise ValueError(f"--objective={text}: the weight of {name} must be a number of 0 or more, found "
                             f"{weight!r}.")
    if not sum(found.values()):
        raise ValueError(f"--objective={text}: at least one weight must be above 0.")
    return {name: -weight if name in sweep.more_is_better else weight for name, weight in found.items()}


def headline(sweep: Sweep, size: float, tokens: float) -> np.ndarray:
    """[n] the lines of one size and length: the size and length asked for, else the largest size at its runs' ends."""
    lines = np.ones(len(sweep.runs), bool)
    if np.isfinite(sweep.parameters).all():
        asked = size if math.isfinite(size) else sweep.parameters.max()
        lines &= np.abs(np.log(sweep.parameters / asked)) < SAME_SCALE
    if math.isfinite(tokens) and np.isfinite(sweep.tokens).all():
        return lines & (np.abs(np.log(sweep.tokens / tokens)) < SAME_SCALE)
    lines &= sweep.final
    if lines.any() and np.isfinite(sweep.tokens).all():
        numbers, groups = clusters(sweep.tokens), sweep.groups
        shares = [len(set(groups[lines & (numbers == number)])) for number in range(numbers.max() + 1)]
        most = max(shares)
        # Where length varies with the share (a data-matched study) there is nothing to choose.
        if most >= 3 or most == len(set(groups[lines])):
            lines &= numbers == max(number for number, count in enumerate(shares) if count == most)
    return lines


def _widening(misses: Sequence[Miss], extrapolated: Sequence[str], fitted: Fitted, size: float,
              tokens: float) -> np.ndarray:
    """[D] the errors on the values left out, growing with the logarithm of the distance of extrapolation."""
    total = np.zeros(len(fitted.laws))
    for miss in misses:
        if miss.axis in extrapolated:
            values = fitted.sweep.parameters if miss.axis == "size" else fitted.sweep.tokens
            asked = {"size": size, "tokens": tokens}[miss.axis]
            beyond = max(math.log(asked / values.max()), math.log(values.min() / asked))
            factor = max(1.0, beyond / math.log(miss.factor))
            total += (np.array([miss.misses[name] for name in fitted.sweep.losses]) * factor) ** 2
    return np.sqrt(total)


def left_out(fitted: Fitted, told: Callable[[str], None]) -> list[Miss]:
    """For each scale with three or more values, leaves out the largest and measures the error of the others' law on it.
    """
    found = []
    sweep = fitted.sweep
    for axis in fitted.axes:
        values = sweep.parameters if axis == "size" else sweep.tokens
        numbers = clusters(values)
        if numbers.max() < 2:
            continue
        last = numbers == numbers.max()
        rest = sweep.only(~last)
        if len(np.unique(rest.groups)) < 3:
            continue
        told(f"the largest {axis} left out")
        others = fit_sweep(rest, tuple(name for name in fitted.axes if name in scales(rest)), lambda name: None)
        errors, inside = [], []
        facts = np.nan_to_num(np.stack([sweep.parameters, sweep.tokens], axis=1))
        for size, tokens in np.unique(facts[last], axis=0):
            here = last & (facts == (size, tokens)).all(axis=1)
            predicted, _, intervals = predict(others, others.at(sweep.shares[here], size, tokens),
                                              np.zeros(len(sweep.losses)))
            seen = sweep.values[here].T
            errors.append(predicted - seen)
            inside.append(((intervals[..., 0] <= seen) & (seen <= intervals[..., 1]))[~np.isnan(seen)])
        error = np.concatenate(errors, axis=1)
        found.append(Miss(axis, float(values[last].max()), float(values[last].max() / values[~last].max()),
                          dict(zip(sweep.losses, np.sqrt(np.nanmean(error**2, axis=1)).tolist(), strict=True)),
                          float(np.concatenate(inside).mean())))
    return found


def objective_at(fitted: Fitted, objective: Mapping[str, float], size: float = math.nan, tokens: float = math.nan,
                 scatter: bool = False) -> CurvesAt:
    """A function of mixtures [m, S] -> [1 + B, m]: the predicted objective, and B possible ones."""
    used = fitted.only([name for name in fitted.sweep.losses if objective.get(name)])
    drawn = used.drawn()

    def at(shares: np.ndarray) -> np.ndarray:
        points = used.at(shares, size, tokens)
        every = np.concatenate([used.mean(points)[:, None], curves(drawn, points, scatter)], axis=1)
        return weigh(objective, used.sweep.losses, every)

    return at


def best_of_all(fitted: Fitted, curves_at: CurvesAt) -> Best | None:
    """The best of all mixtures; None where it lies between the runs', or the runs span all mixtures."""
    swept, corners = fitted.points.shares, np.eye(fitted.points.shares.shape[1])
    if all(between(swept, corner) for corner in corners):
        return None
    found = best(swept, corners, swept.mean(axis=0), curves_at)
    return None if between(swept, found.shares) else found


def chosen_losses(sweep: Sweep, objective: Mapping[str, float]) -> Sweep:
    """The sweep of the losses to fit laws to: held-out losses, the objective's losses, and for each benchmark the bits
    per byte of the right answer, where they are known at three shares.
    """
    def enough(name: str) -> bool:
        known = ~np.isnan(sweep.values[:, sweep.losses.index(name)])
        return len(np.unique(sweep.groups[known])) >= 3

    return sweep.of([name for name in sweep.losses if name in objective or not task_of(name)
                     or name.endswith("/bits_per_byte") and enough(name)])


def analyse(sweep: Sweep, objective: Mapping[str, float], size: float = math.nan, tokens: float = math.nan,
            told: Told = lambda done, of, text: None) -> Analysis:
    """The whole analysis of a sweep.

    Args:
      size, tokens: to predict for; NaN for the largest size and its runs' ends.
      told: called with progress messages.

    Raises:
      ValueError: with a one-line message; the size or length asked for cannot be determined from the sweep.
    """
    sweep = chosen_losses(sweep, objective)
    axes, done = scales(sweep), 0
    total = len(sweep.losses) * (1 + bool(axes)) + len(axes) + 3

    def progress(text: str) -> None:
        nonlocal done
        told(min(done, total - 3), total, text)
        done += 1

    lines = headline(sweep, size, tokens)
    direct = len(np.unique(sweep.groups[lines])) >= 3
    asked = [axis for axis, value in (("size", size), ("tokens", tokens)) if math.isfinite(value)]
    if not direct and (missing := [axis for axis in asked if axis not in axes]):
        known = sweep.parameters if missing[0] == "size" else sweep.tokens
        what = "size" if missing[0] == "size" else "number of tokens"
        raise ValueError(f"--{missing[0]} asks for another {what} than the runs have, {_span(known)}: that needs runs "
                         "of several.")
    if not direct:
        sweep = _of_scales(sweep, axes, objective)
    values = sweep.values.copy()
    without = dataclasses.replace(sweep, values=values)
    outliers: list[tuple[str, int, Outlier]] = []

    def leave_out(found: Fitted, numbers: np.ndarray, whole_runs: bool) -> bool:
        """Leaves out the outliers of laws of these lines; returns whether there are any."""
        more = [(name, int(numbers[outlier.run]), outlier) for name, named in zip(
            found.sweep.losses, found.outliers, strict=True) for outlier in named]
        for name, line, _ in more:
            of_run = np.array([run == sweep.runs[line] for run in sweep.runs])
            values[of_run if whole_runs else line, sweep.losses.index(name)] = np.nan
        outliers.extend(more)
        return any(lines[line] for _, line, _ in more)

    joint = None
    if direct or not axes:
        fitted = fit_sweep(without.only(lines), (), progress)
        leave_out(fitted, np.flatnonzero(lines), whole_runs=True)
    if axes:
        try:
            of_scales = without.of([name for name in sweep.losses if not direct or _has_scales(sweep, name, axes)])
            joint = fit_sweep(of_scales, axes, lambda name: progress(f"{name}, by {' and '.join(axes)}"))
        except ValueError as error:
            if not direct:
                raise
            note = f"There are no laws of {' and '.join(axes)}: {error}"
            sweep = dataclasses.replace(sweep, notes=[*sweep.notes, note])
        # Outliers among all sizes and lengths are also left out of the laws at one of them.
        if joint and leave_out(joint, np.arange(len(sweep.runs)), whole_runs=False) and direct:
            fitted = fit_sweep(without.only(lines), (), lambda name: None)
            leave_out(fitted, np.flatnonzero(lines), whole_runs=False)
        if joint and not direct:
            fitted = joint
    misses = left_out(dataclasses.replace(joint, sweep=without.of(joint.sweep.losses)), progress) if joint else []
    known_size, known_tokens = (float(np.max(values[lines])) if lines.any() else math.nan
                                for values in (sweep.parameters, sweep.tokens))
    size = size if math.isfinite(size) else known_size if math.isfinite(known_size) else float(sweep.parameters.max())
    tokens = tokens if math.isfinite(tokens) else known_tokens if math.isfinite(known_tokens) else float(
        sweep.tokens.max())
    extrapolated = [] if direct else [
        axis for axis, value, values in (("size", size, sweep.parameters), ("tokens", tokens, sweep.tokens))
        if axis in axes and not values.min() / 1.03 <= value <= values.max() * 1.03]
    told(total - 3, total, "the best mixture")
    swept = fitted.points.shares
    curves_at = objective_at(fitted, objective, size, tokens)
    found = best(swept, swept, swept.mean(axis=0), curves_at)
    told(total - 2, total, "beyond the runs")
    beyond = best_of_all(fitted, curves_at)
    more = None
    told(total - 1, total, "further runs")
    if found.verdict == "cannot tell":
        seeds = max(1, round(len(fitted.sweep.runs) / len(np.unique(fitted.groups))))
        drawn = fitted.drawn()
        more = design(swept, np.array([objective.get(name, 0.0) for name in sweep.losses]),
                      np.sqrt([law.noise for law in fitted.laws]), seeds,
                      lambda shares: curves(drawn, fitted.at(shares, size, tokens), scatter=False))
    ends = swept[:, 1].min(), swept[:, 1].max()
    shown = np.unique(swept, axis=0) if swept.shape[1] > 2 else np.stack(
        [1 - (second := np.linspace(*ends, SHOWN)), second], axis=1)
    widen = _widening(misses, extrapolated, fitted, size, tokens)
    predicted = predict(fitted, fitted.at(shown, size, tokens), widen)
    told(total, total, "done")
    return Analysis(sweep, fitted, lines & (not fitted.axes), size, tokens, extrapolated, objective, shown, *predicted,
                    found, beyond, more, misses, outliers)


def _has_scales(sweep: Sweep, name: str, axes: Sequence[str]) -> bool:
    """Whether a loss is known at several values of each scale: a benchmark may be evaluated at runs' ends alone."""
    known = ~np.isnan(sweep.values[:, sweep.losses.index(name)])
    return set(axes) <= set(scales(sweep.only(known)))


def _of_scales(sweep: Sweep, axes: Sequence[str], objective: Mapping[str, float]) -> Sweep:
    """The sweep of the losses that are known at several of these scales.

    Raises:
      ValueError: with a one-line message, where the objective asks for another loss.
    """
    names = [name for name in sweep.losses if _has_scales(sweep, name, axes)]
    if untold := [name for name in objective if name not in names]:
        raise ValueError(f"{untold[0]} is not known at several values of {' and '.join(axes)}: leave it out of the "
                         "objective, or ask for a size and length that were trained.")
    return sweep.of(names)


def _span(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return "which nothing tells"
    return f"{values.min():.4g}" if values.min() == values.max() else f"{values.min():.4g} to {values.max():.4g}"
