"""The laws of a sweep: each loss against shares, sizes and lengths, the best mixture, and what cannot be told."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from codellm_jax.report.families import Losses, Points, candidates
from codellm_jax.report.laws import Law, draws, fit_law
from codellm_jax.report.noise import Outlier, cells_of, correlation, fit_without_outliers, line_weights
from codellm_jax.report.optimum import INTERVAL, Best, Design, best, design, mixtures, weigh
from codellm_jax.report.sweeps import POOLS, Sweep

SAME_SCALE = 0.03  # sizes or lengths that differ by less, relatively, are one
REPETITION = 15.39  # epochs after which repeated tokens have lost most of their worth (Muennighoff et al., 2023)
Told = Callable[[int, int, str], None]


class Miss(NamedTuple):
    """How far a law of all smaller sizes, or shorter runs, is from the largest that was left out."""

    axis: str  # "size" or "tokens"
    left_out: float
    factor: float  # left out over the largest that stayed
    misses: np.ndarray  # [D] root mean square over shares, nats
    coverage: float  # part of the left-out losses within their 95% intervals


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Laws of every loss of some lines of a sweep, in one set of cells."""

    sweep: Sweep
    cell: np.ndarray  # [n] of each line
    points: Points  # of the cells
    groups: np.ndarray  # [c] their shares
    centres: tuple[float, ...]  # geometric means of the scales
    axes: tuple[str, ...]  # "size", "tokens": those that the laws know
    laws: Sequence[Law]
    cells: Sequence[Losses]
    outliers: Sequence[Sequence[Outlier]]

    def at(self, shares: np.ndarray, size: float = math.nan, tokens: float = math.nan) -> Points:
        """Points of these mixtures [m, S], at a size and a number of tokens where the laws know these."""
        scale = [np.full(len(shares), {"size": size, "tokens": tokens}[axis] / centre)
                 for axis, centre in zip(self.axes, self.centres, strict=True)]
        return Points(shares, np.stack(scale, axis=1) if scale else np.zeros((len(shares), 0)),
                      waste(self.sweep, shares, tokens))

    @functools.cached_property
    def correlation(self) -> np.ndarray:
        """[D, D] of the noise within a run."""
        residuals = np.stack([
            (self.sweep.values[:, place] - law.mean(self.points)[self.cell]) / np.sqrt(cells.variance[self.cell])
            for place, (law, cells) in enumerate(zip(self.laws, self.cells, strict=True))], axis=1)
        for place, named in enumerate(self.outliers):
            residuals[[outlier.run for outlier in named], place] = np.nan
        return correlation(residuals, min(law.chosen.degrees for law in self.laws))

    def curves(self, points: Points, scatter: bool = True) -> np.ndarray:
        """[D, B, m] that the runs leave possible."""
        return draws(self.laws, points, self.correlation, scatter=scatter)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Attributes:
      sweep: all of it.
      fitted: the laws that answer.
      lines: [n] those that they are fitted to, where these are of one size and length; else none.
      size, tokens: of what is answered; NaN where nothing tells them.
      extrapolated: what lies beyond all runs, as "size" and "tokens"; both may be.
      objective: weights by the names of losses.
      shares: [m, S] mixtures that predictions are of; of two sources a fine grid.
      predicted, intervals, run_intervals: [D, m], [D, m, 2] of the law, and of one further run.
      best: for the objective.
      design: further runs, where the best mixture is not told well; None where it is.
      misses: of laws of size and length, where there are some.
      outliers: (loss, line of the sweep, outlier); left out of the laws.
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
    design: Design | None
    misses: Sequence[Miss]
    outliers: Sequence[tuple[str, int, Outlier]]

    def predict(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The predicted losses [D, m] of mixtures [m, S], their 95% intervals, and those of one further run."""
        return predict(self.fitted, self.fitted.at(shares, self.size, self.tokens), _widening(
            self.misses, self.extrapolated, self.fitted, self.size, self.tokens))


def parse_objective(text: str | None, losses: Sequence[str]) -> dict[str, float]:
    """Weights of losses of "text:0.5,code:0.5"; without a text, as much of each pool, else of each loss.

    Raises:
      ValueError: in one line, for a loss that is not there or a weight that is no number.
    """
    if text is None:
        names = [name for name in losses if name in POOLS] or list(losses)
        return {name: 1 / len(names) for name in names}
    found: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon:
            raise ValueError(f"--objective={text}: {part.strip()!r} must be a loss and its weight, as text:0.5.")
        if name not in losses:
            raise ValueError(f"--objective={text}: there is no loss {name}; these are there: {', '.join(losses)}.")
        try:
            found[name] = float(weight)
        except ValueError:
            found[name] = math.nan
        if not (math.isfinite(found[name]) and found[name] >= 0):
            raise ValueError(f"--objective={text}: the weight of {name} must be a number of 0 or more, found "
                             f"{weight!r}.")
    if not sum(found.values()):
        raise ValueError(f"--objective={text}: one weight or more must be above 0.")
    return found


def waste(sweep: Sweep, shares: np.ndarray, tokens: float = math.nan) -> np.ndarray:
    """[m] how many epochs of the source that is repeated most are as good as lost: e - 1 - R (1 - exp(-(e - 1) / R))
    of e epochs (Muennighoff et al., 2023, section 3.1); 0 where nothing tells epochs.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        per_share = np.nan_to_num(np.where(sweep.shares > 0.01, sweep.epochs / sweep.shares, np.nan))
    longest = np.nanmax(sweep.tokens) if np.isfinite(sweep.tokens).any() else math.nan
    factor = tokens / longest if math.isfinite(tokens / longest) else 1.0
    extra = np.maximum((shares * per_share.max(axis=0) * factor).max(axis=1) - 1, 0)
    return extra - REPETITION * -np.expm1(-extra / REPETITION)


def fit_sweep(sweep: Sweep, axes: Sequence[str], told: Callable[[str], None]) -> Fitted:
    """Laws of each loss over the lines of a sweep; `axes` are the scales that they know, of "size" and "tokens"."""
    groups = sweep.groups
    facts = {"size": sweep.parameters, "tokens": sweep.tokens}
    labels = [groups, *(_clusters(facts[axis]) for axis in axes)]
    _, first, cell = np.unique(np.stack(labels, axis=1), axis=0, return_index=True, return_inverse=True)
    cell = cell.reshape(-1)
    centres = tuple(float(np.exp(np.log(facts[axis][first]).mean())) for axis in axes)
    scale = [facts[axis][first] / centre for axis, centre in zip(axes, centres, strict=True)]
    wasted = np.array([waste(sweep, sweep.shares[[line]], float(sweep.tokens[line]))[0] for line in first])
    # Seeds of an arm draw the same rows but for one or two: their mean stands for them.
    of_group = np.stack([sweep.shares[groups == group].mean(axis=0) for group in range(groups.max() + 1)])
    points = Points(of_group[groups[first]], np.stack(scale, axis=1) if axes else np.zeros((len(first), 0)), wasted)
    families = candidates(points, groups[first])
    of_run = np.unique(np.array(sweep.runs), return_inverse=True)[1]
    laws, cells, outliers = [], [], []
    for place, name in enumerate(sweep.losses):
        told(name)
        try:
            values, weights = sweep.values[:, place], np.ones(len(sweep.runs))
            if axes:
                apart = fit_law(families, points, groups[first], cells_of(values, cell, points.shares, weights))
                weights = line_weights(apart, points, cell, values, of_run)
            law, losses, named = fit_without_outliers(families, points, groups[first], cell, values, weights)
        except ValueError as error:
            raise ValueError(f"the loss of {name}: {error}") from None
        laws.append(law)
        cells.append(losses)
        outliers.append(named)
    return Fitted(sweep, cell, points, groups[first], centres, tuple(axes), laws, cells, outliers)


def _clusters(values: np.ndarray) -> np.ndarray:
    """[n] numbers of groups of values that are nearly the same."""
    order = np.argsort(values, kind="stable")
    jumps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > SAME_SCALE
    found = np.empty(len(values), int)
    found[order] = np.cumsum(jumps)
    return found


def scales(sweep: Sweep) -> tuple[str, ...]:
    """The scales of which a sweep has several values at one share, and so can tell them from the share."""
    groups = sweep.groups
    return tuple(axis for axis, values in (("size", sweep.parameters), ("tokens", sweep.tokens))
                 if np.isfinite(values).all() and any(np.ptp(_clusters(values)[groups == group]) > 0
                                                      for group in range(groups.max() + 1)))


def headline(sweep: Sweep, size: float, tokens: float) -> np.ndarray:
    """[n] the lines of one size and length: those asked for, else the largest size at its runs' ends."""
    lines = np.ones(len(sweep.runs), bool)
    if np.isfinite(sweep.parameters).all():
        asked = size if math.isfinite(size) else sweep.parameters.max()
        lines &= np.abs(np.log(sweep.parameters / asked)) < SAME_SCALE
    if math.isfinite(tokens) and np.isfinite(sweep.tokens).all():
        return lines & (np.abs(np.log(sweep.tokens / tokens)) < SAME_SCALE)
    lines &= sweep.final
    if lines.any() and np.isfinite(sweep.tokens).all():
        numbers, groups = _clusters(sweep.tokens), sweep.groups
        shares = [len(set(groups[lines & (numbers == number)])) for number in range(numbers.max() + 1)]
        most = max(shares)
        # Where length goes with the share (a data-matched study) there is nothing to choose.
        if most >= 3 or most == len(set(groups[lines])):
            lines &= numbers == max(number for number, count in enumerate(shares) if count == most)
    return lines


def predict(fitted: Fitted, points: Points, widen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted losses [D, m], their 95% intervals and those of one further run, both [D, m, 2]; `widen` [D] is the
    standard deviation of what extrapolation adds.
    """
    curves = fitted.curves(points)
    dice = np.random.default_rng(1)
    curves += widen[:, None, None] * dice.standard_normal((*curves.shape[:2], 1))
    predicted = np.stack([law.mean(points) for law in fitted.laws])
    intervals = np.moveaxis(np.quantile(curves, INTERVAL, axis=1), 0, -1)
    noise = np.stack([np.sqrt(law.noise * _variance(cells, fitted, points)) for law, cells in zip(
        fitted.laws, fitted.cells, strict=True)])
    curves += noise[:, None] * dice.standard_normal(curves.shape)
    return predicted, intervals, np.moveaxis(np.quantile(curves, INTERVAL, axis=1), 0, -1)


def _variance(cells: Losses, fitted: Fitted, points: Points) -> np.ndarray:
    """[m] the variance of a run relative to the mean of all, as at the nearest share that was swept."""
    distance = np.abs(points.shares[:, None] - fitted.points.shares[None]).sum(axis=2)
    return cells.variance[distance.argmin(axis=1)]


def _widening(misses: Sequence[Miss], extrapolated: Sequence[str], fitted: Fitted, size: float,
              tokens: float) -> np.ndarray:
    """[D] the misses of what was left out, growing with the logarithm of how far is extrapolated."""
    total = np.zeros(len(fitted.laws))
    for miss in misses:
        if miss.axis in extrapolated:
            values = fitted.sweep.parameters if miss.axis == "size" else fitted.sweep.tokens
            asked = {"size": size, "tokens": tokens}[miss.axis]
            beyond = max(math.log(asked / values.max()), math.log(values.min() / asked))
            total += (miss.misses * max(1.0, beyond / math.log(miss.factor))) ** 2
    return np.sqrt(total)


def left_out(fitted: Fitted, told: Callable[[str], None]) -> list[Miss]:
    """Of each scale of three values or more, the largest left out: how far the laws of the others miss it."""
    found = []
    sweep = fitted.sweep
    for axis in fitted.axes:
        values = sweep.parameters if axis == "size" else sweep.tokens
        numbers = _clusters(values)
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
                          np.sqrt(np.nanmean(error**2, axis=1)), float(np.concatenate(inside).mean())))
    return found


def analyse(sweep: Sweep, objective: Mapping[str, float], size: float = math.nan, tokens: float = math.nan,
            told: Told = lambda done, of, text: None) -> Analysis:
    """Everything that is said of a sweep.

    Args:
      size, tokens: to answer for; NaN for the largest size and its runs' ends.
      told: of progress.

    Raises:
      ValueError: in one line; a size or length is asked for that the sweep cannot tell.
    """
    axes, done = scales(sweep), 0
    total = len(sweep.losses) * (1 + bool(axes)) + len(axes) + 2

    def progress(text: str) -> None:
        nonlocal done
        told(min(done, total - 2), total, text)
        done += 1

    lines = headline(sweep, size, tokens)
    direct = len(np.unique(sweep.groups[lines])) >= 3
    asked = [axis for axis, value in (("size", size), ("tokens", tokens)) if math.isfinite(value)]
    if not direct and (missing := [axis for axis in asked if axis not in axes]):
        known = sweep.parameters if missing[0] == "size" else sweep.tokens
        what = "size" if missing[0] == "size" else "number of tokens"
        raise ValueError(f"--{missing[0]} asks for another {what} than the runs have, {_span(known)}: that takes runs "
                         "of several.")
    values = sweep.values.copy()
    without = dataclasses.replace(sweep, values=values)
    outliers: list[tuple[str, int, Outlier]] = []

    def leave_out(found: Fitted, numbers: np.ndarray, whole_runs: bool) -> bool:
        """Leaves out the outliers of laws of these lines; whether there are some."""
        more = [(name, int(numbers[outlier.run]), outlier) for name, named in zip(
            sweep.losses, found.outliers, strict=True) for outlier in named]
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
            joint = fit_sweep(without, axes, lambda name: progress(f"{name}, by {' and '.join(axes)}"))
        except ValueError as error:
            if not direct:
                raise
            note = f"There are no laws of {' and '.join(axes)}: {error}"
            sweep = dataclasses.replace(sweep, notes=[*sweep.notes, note])
        # What stands out among all sizes and lengths is left out of the laws at one of them, too.
        if joint and leave_out(joint, np.arange(len(sweep.runs)), whole_runs=False) and direct:
            fitted = fit_sweep(without.only(lines), (), lambda name: None)
            leave_out(fitted, np.flatnonzero(lines), whole_runs=False)
        if joint and not direct:
            fitted = joint
    misses = left_out(dataclasses.replace(joint, sweep=without), progress) if joint else []
    known_size, known_tokens = (float(np.max(values[lines])) if lines.any() else math.nan
                                for values in (sweep.parameters, sweep.tokens))
    size = size if math.isfinite(size) else known_size if math.isfinite(known_size) else float(sweep.parameters.max())
    tokens = tokens if math.isfinite(tokens) else known_tokens if math.isfinite(known_tokens) else float(
        sweep.tokens.max())
    extrapolated = [] if direct else [
        axis for axis, value, values in (("size", size, sweep.parameters), ("tokens", tokens, sweep.tokens))
        if axis in axes and not values.min() / 1.03 <= value <= values.max() * 1.03]
    told(total - 2, total, "the best mixture")
    space = mixtures(fitted.points.shares)
    average = int(np.abs(space - fitted.points.shares.mean(axis=0)).sum(axis=1).argmin())
    points = fitted.at(space, size, tokens)
    curves = weigh(objective, sweep.losses, fitted.curves(points, scatter=False))
    means = np.stack([law.mean(points) for law in fitted.laws])
    found = best(space, weigh(objective, sweep.losses, means), curves, average)
    more = None
    told(total - 1, total, "further runs")
    if found.verdict == "cannot tell":
        seeds = max(1, round(len(fitted.sweep.runs) / len(np.unique(fitted.groups))))
        more = design(len(sweep.sources), fitted.points.shares, np.array([objective.get(name, 0.0)
                                                                         for name in sweep.losses]),
                      np.sqrt([law.noise for law in fitted.laws]), seeds,
                      lambda shares: fitted.curves(fitted.at(shares, size, tokens), scatter=False))
    shown = space[::4] if len(sweep.sources) == 2 else np.unique(fitted.points.shares, axis=0)
    widen = _widening(misses, extrapolated, fitted, size, tokens)
    predicted = predict(fitted, fitted.at(shown, size, tokens), widen)
    told(total, total, "done")
    return Analysis(sweep, fitted, lines & (not fitted.axes), size, tokens, extrapolated, objective, shown, *predicted,
                    found, more, misses, outliers)


def _span(values: np.ndarray) -> str:
    if not np.isfinite(values).all():
        return "which nothing tells"
    return f"{values.min():.4g}" if values.min() == values.max() else f"{values.min():.4g} to {values.max():.4g}"
