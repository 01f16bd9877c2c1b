"""Laws fitted to the lines of a sweep: its runs in cells of one share, size and length, and the laws' predictions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from codellm_jax.report.families import Losses, Points, candidates
from codellm_jax.report.laws import DRAWS, Drawn, Law, curves, draw, fit_law
from codellm_jax.report.noise import Outlier, cells_of, correlation, fit_without_outliers, line_weights
from codellm_jax.report.optimum import INTERVAL
from codellm_jax.report.questions import task_of
from codellm_jax.report.sweeps import Sweep

SAME_SCALE = 0.03  # sizes or lengths with a smaller relative difference count as equal
REPETITION = 15.39  # epochs after which repeated tokens have lost most of their value (Muennighoff et al., 2023)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Laws of every loss for some lines of a sweep, in one set of cells."""

    sweep: Sweep
    cell: np.ndarray  # [n] the cell of each line
    points: Points  # one for each cell
    groups: np.ndarray  # [c] index of each cell's share
    centres: tuple[float, ...]  # geometric means of the scales
    axes: tuple[str, ...]  # "size", "tokens": the scales that the laws model
    laws: Sequence[Law]
    cells: Sequence[Losses]
    outliers: Sequence[Sequence[Outlier]]

    def at(self, shares: np.ndarray, size: float = math.nan, tokens: float = math.nan) -> Points:
        """The points of mixtures [m, S], at a size and a number of tokens where the laws model these."""
        scale = [np.full(len(shares), {"size": size, "tokens": tokens}[axis] / centre)
                 for axis, centre in zip(self.axes, self.centres, strict=True)]
        return Points(shares, np.stack(scale, axis=1) if scale else np.zeros((len(shares), 0)),
                      waste(self.sweep, shares, tokens))

    @functools.cached_property
    def questions(self) -> list[np.ndarray | None]:
        """For each loss [c, q]: how much each of q questions shifts a cell beyond the mean of all, in units of the
        mean's standard error; None where no questions are known.
        """
        found: list[np.ndarray | None] = []
        for place, name in enumerate(self.sweep.losses):
            answers = self.sweep.questions.get(name)
            if answers is None or answers.shape[1] < 2:
                found.append(None)
                continue
            kept = ~np.isnan(self.sweep.values[:, place])
            kept[[outlier.run for outlier in self.outliers[place]]] = False
            cells, number = len(self.points.shares), answers.shape[1]
            sums = np.zeros((cells, number))
            np.add.at(sums, self.cell[kept], answers[kept])
            means = sums / np.maximum(np.bincount(self.cell[kept], minlength=cells), 1)[:, None]
            found.append((means - means.mean(axis=1, keepdims=True)) / math.sqrt(number * (number - 1)))
        return found

    def drawn(self, of_questions: bool = True) -> list[Drawn]:
        """Curves that are consistent with the runs.

        Args:
          of_questions: whether the questions of benchmarks count as a sample, drawn anew for each curve. Measures of
            one benchmark share the draws. A draw is a sum over questions with random normal weights (the multiplier
            bootstrap), divided by a deviation as uncertain as this number of questions makes it: Student's
            distribution.
        """
        moved: list[np.ndarray | None] = []
        for name, questions in zip(self.sweep.losses, self.questions, strict=True):
            if questions is None or not of_questions:
                moved.append(None)
                continue
            number = questions.shape[1]
            dice = np.random.default_rng(list(task_of(name).encode()))
            weights = dice.standard_normal((DRAWS, number)) / np.sqrt(
                dice.chisquare(number - 1, (DRAWS, 1)) / (number - 1))
            moved.append(weights @ questions.T)
        return draw(self.laws, self.correlation, moved=moved)

    def mean(self, points: Points) -> np.ndarray:
        """[D, m] the predicted losses."""
        return np.stack([law.mean(points) for law in self.laws])

    @functools.cached_property
    def correlation(self) -> np.ndarray:
        """[D, D] correlation of the noise within a run."""
        residuals = np.stack([
            (self.sweep.values[:, place] - law.mean(self.points)[self.cell]) / np.sqrt(cells.variance[self.cell])
            for place, (law, cells) in enumerate(zip(self.laws, self.cells, strict=True))], axis=1)
        for place, named in enumerate(self.outliers):
            residuals[[outlier.run for outlier in named], place] = np.nan
        return correlation(residuals, min(law.chosen.degrees for law in self.laws))

    def only(self, losses: Sequence[str]) -> "Fitted":
        """The laws of some of the losses."""
        places = [self.sweep.losses.index(name) for name in losses]
        return dataclasses.replace(
            self, sweep=self.sweep.of(losses), laws=[self.laws[n] for n in places],
            cells=[self.cells[n] for n in places], outliers=[self.outliers[n] for n in places])


def waste(sweep: Sweep, shares: np.ndarray, tokens: float = math.nan) -> np.ndarray:
    """[m] the number of epochs of the most repeated source that are as good as lost: e - 1 - R (1 - exp(-(e - 1) / R))
    of e epochs (Muennighoff et al., 2023, section 3.1); 0 where the epochs are unknown.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        per_share = np.nan_to_num(np.where(sweep.shares > 0.01, sweep.epochs / sweep.shares, np.nan))
    longest = np.nanmax(sweep.tokens) if np.isfinite(sweep.tokens).any() else math.nan
    factor = tokens / longest if math.isfinite(tokens / longest) else 1.0
    extra = np.maximum((shares * per_share.max(axis=0) * factor).max(axis=1) - 1, 0)
    return extra - REPETITION * -np.expm1(-extra / REPETITION)


def fit_sweep(sweep: Sweep, axes: Sequence[str], told: Callable[[str], None]) -> Fitted:
    """Laws of each loss over the lines of a sweep; `axes` are the scales that they model, among "size" and "tokens"."""
    groups = sweep.groups
    facts = {"size": sweep.parameters, "tokens": sweep.tokens}
    labels = [groups, *(clusters(facts[axis]) for axis in axes)]
    _, first, cell = np.unique(np.stack(labels, axis=1), axis=0, return_index=True, return_inverse=True)
    cell = cell.reshape(-1)
    centres = tuple(float(np.exp(np.log(facts[axis][first]).mean())) for axis in axes)
    scale = [facts[axis][first] / centre for axis, centre in zip(axes, centres, strict=True)]
    wasted = np.array([waste(sweep, sweep.shares[[line]], float(sweep.tokens[line]))[0] for line in first])
    # Seeds of an arm draw the same rows except for one or two: their mean represents them.
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


def clusters(values: np.ndarray) -> np.ndarray:
    """[n] indices of groups of nearly equal values."""
    order = np.argsort(values, kind="stable")
    jumps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > SAME_SCALE
    found = np.empty(len(values), int)
    found[order] = np.cumsum(jumps)
    return found


def scales(sweep: Sweep) -> tuple[str, ...]:
    """The scales that have several values at one share of a sweep, so their effect is distinguishable from the share's.
    """
    groups = sweep.groups
    return tuple(axis for axis, values in (("size", sweep.parameters), ("tokens", sweep.tokens))
                 if np.isfinite(values).all() and any(np.ptp(clusters(values)[groups == group]) > 0
                                                      for group in range(groups.max() + 1)))


def predict(fitted: Fitted, points: Points, widen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted losses [D, m], their 95% intervals, and the intervals of one further run, both [D, m, 2]. `widen` [D]
    is the standard deviation added by extrapolation. A further run is asked the same questions; the law covers all
    questions that might be asked.
    """
    dice = np.random.default_rng(1)
    possible = curves(fitted.drawn(), points)
    added = widen[:, None, None] * dice.standard_normal((*possible.shape[:2], 1))
    intervals = np.moveaxis(np.quantile(possible + added, INTERVAL, axis=1), 0, -1)
    noise = np.stack([np.sqrt(law.noise * _variance(cells, fitted, points)) for law, cells in zip(
        fitted.laws, fitted.cells, strict=True)])
    if any(questions is not None for questions in fitted.questions):
        possible = curves(fitted.drawn(of_questions=False), points)
    runs = possible + added + noise[:, None] * dice.standard_normal(possible.shape)
    return fitted.mean(points), intervals, np.moveaxis(np.quantile(runs, INTERVAL, axis=1), 0, -1)


def _variance(cells: Losses, fitted: Fitted, points: Points) -> np.ndarray:
    """[m] the variance of a run relative to the mean of all, taken from the nearest share that was swept."""
    distance = np.abs(points.shares[:, None] - fitted.points.shares[None]).sum(axis=2)
    return cells.variance[distance.argmin(axis=1)]
