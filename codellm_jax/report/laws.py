"""Laws of the mixture: a held-out loss as a function of the shares that a run was trained on.

A candidate is a family of curves that are linear except in one or two parameters (`families`). These few lie on a grid;
at each point of the grid the rest is linear least squares in closed form (variable projection; Golub and Pereyra,
1973). A family is thus a set of linear fits weighted by their likelihood, and nothing depends on a starting point.

Families are compared by the log density of each share's losses under the law fitted to all other shares, also in closed
form. They are averaged with the weights that these densities give them under resampled shares (pseudo-BMA+; Yao et al.,
2018, section 3.4). Intervals come from draws of a family, a point of its grid, the noise variance and the coefficients.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg, special, stats

from codellm_jax.report.families import Family, Losses, Points

FINE_ENOUGH = 12.0  # points of a grid that share its weight; with fewer, the grid is refined around them
ZOOMS = 4
LEAST_WEIGHT = 1e-5  # of a point of a grid, over the largest
LEAST_FAMILY = 0.005
FEWEST_DEGREES = 1.0  # of freedom left by a family; with fewer, its noise cannot be estimated
TEMPER = 0.5  # of the densities, so that differences by chance do not separate families
PLAIN = ("constant", "linear")  # the others contain these: averaged with them, intervals would be too narrow
RESAMPLES = 500  # of shares, for the weights of families
DRAWS = 1000
LARGE = 2.0  # times the range of the losses: the prior standard deviation of a coefficient
SINGULAR = 1e-9  # relative to the trace


@dataclasses.dataclass(frozen=True)
class Fit:
    """A family fitted to one loss.

    Attributes:
      thetas: [T, k].
      weights: [T], sum 1.
      coefficients: [T, p].
      factors: [T, p, p], lower Cholesky factors of the precision of the coefficients, without the noise.
      squares: [T], the weighted residual sum of squares, including that within cells.
      degrees: of freedom.
      known: degrees of freedom of the noise about a share; fewer where noise differs between shares.
      densities: [G] log density of each share under the law of the others; NaN where it has no run.
      left_out: [c] the loss of each cell as predicted by the law of the other shares.
    """

    family: Family
    thetas: np.ndarray
    weights: np.ndarray
    coefficients: np.ndarray
    factors: np.ndarray
    squares: np.ndarray
    degrees: float
    known: float
    densities: np.ndarray
    left_out: np.ndarray

    def mean(self, points: Points) -> np.ndarray:
        """[n] the weighted mean of the curves."""
        return np.einsum("t,tnp,tp->n", self.weights, self.family.features(points, self.thetas), self.coefficients)

    @property
    def noise(self) -> float:
        """The variance of one run where `variance` is 1."""
        return float(self.weights @ self.squares / self.degrees)


@dataclasses.dataclass(frozen=True)
class Law:
    """The candidates fitted to one loss.

    Attributes:
      weights: [F] of the candidates.
      points: of the cells to which they were fitted.
      counted: [c] the weight of each cell, its runs over their variance.
    """

    fits: Sequence[Fit]
    weights: np.ndarray
    points: Points
    counted: np.ndarray

    @property
    def chosen(self) -> Fit:
        return self.fits[int(np.argmax([np.nansum(fit.densities) for fit in self.fits]))]

    def mean(self, points: Points) -> np.ndarray:
        """[n] the predicted loss."""
        return np.sum([weight * fit.mean(points) for weight, fit in zip(self.weights, self.fits, strict=True)
                       if weight > 0], axis=0)

    @property
    def left_out(self) -> np.ndarray:
        """[c] the loss of each cell as predicted from the other shares."""
        return np.sum([weight * fit.left_out for weight, fit in zip(self.weights, self.fits, strict=True)], axis=0)

    @property
    def noise(self) -> float:
        return float(self.weights @ [fit.noise for fit in self.fits])


def fit_law(families: Sequence[Family], points: Points, groups: np.ndarray, losses: Losses, seed: int = 0) -> Law:
    """Fits every family to one loss and weights them.

    Raises:
      ValueError: fewer than three shares have a run.
    """
    shares, runs = len(np.unique(groups[losses.runs > 0])), losses.runs.sum()
    fits = [fit for family in families if (fit := fit_family(family, points, groups, losses)) is not None]
    rich = np.array([fit.family.name not in PLAIN for fit in fits])
    if shares < 3:
        raise ValueError(f"a law needs runs at three shares or more, found {shares}.")
    if not rich.any():
        raise ValueError(f"{runs:.1f} runs at {shares} shares are too few for a law.")
    densities = np.stack([fit.densities[~np.isnan(fit.densities)] for fit in fits])  # [F, G]
    resampled = np.random.default_rng(seed).dirichlet(np.ones(densities.shape[1]), RESAMPLES) * densities.shape[1]
    weights = special.softmax(TEMPER * resampled @ densities.T, axis=1).mean(axis=0)
    weights *= rich / (weights @ rich)
    weights[weights < LEAST_FAMILY] = 0.0
    return Law(fits, weights / weights.sum(), points, losses.runs / losses.variance)


def fit_family(family: Family, points: Points, groups: np.ndarray, losses: Losses) -> Fit | None:
    """A family fitted to one loss; None where there are too few runs."""
    if family.mode is not None:
        return _fit(family, family.mode(points, losses), points, groups, losses)
    axes = family.axes
    for _ in range(ZOOMS):
        thetas = np.array(list(itertools.product(*axes)), np.float64)
        fit = _fit(family, thetas, points, groups, losses)
        if fit is None or not axes or family.precision is not None or 1 / (fit.weights**2).sum() >= FINE_ENOUGH:
            return fit
        axes = tuple(_closer(axis, fit.thetas[:, place], fit.weights) for place, axis in enumerate(axes))
    return fit


def _closer(axis: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same number of points between the neighbours of those that have weight."""
    marginal = np.array([weights[values == value].sum() for value in axis])
    held = np.flatnonzero(marginal > 1e-4)
    low, high = axis[max(held[0] - 1, 0)], axis[min(held[-1] + 1, len(axis) - 1)]
    grid = np.linspace(low, high, len(axis))
    return np.where(grid == 0, 1e-6, grid)


def spans(points: Points) -> float:
    """The range of the share that varies most, of 1."""
    return float(np.ptp(points.shares, axis=0).max())


def _fit(family: Family, thetas: np.ndarray, points: Points, groups: np.ndarray, losses: Losses) -> Fit | None:
    there = losses.runs > 0
    root = np.sqrt(losses.runs / losses.variance)[there]
    within = losses.squares[there] / losses.variance[there]
    runs = losses.runs[there]
    level = float(np.average(losses.mean[there], weights=root**2))
    y = root * (losses.mean[there] - level)
    x = family.features(points, thetas)[:, there] * root[:, None]  # [T, c, p]
    width = x.shape[2]
    known = family.precision is not None
    prior = family.precision(thetas) if family.precision else np.zeros((len(thetas), width))
    degrees = float(runs.sum() - (prior[0] == 0).sum())
    told = degrees if known else degrees - len(family.axes)
    if not known and told < FEWEST_DEGREES:
        return None
    gram = np.einsum("tcp,tcq->tpq", x, x, optimize=True)
    moments = np.einsum("tcp,c->tp", x, y)
    smallest = 1e-14 * float(y @ y) + 1e-24
    diagonal = np.arange(width)
    gram[:, diagonal, diagonal] += SINGULAR * np.trace(gram, axis1=1, axis2=2)[:, None] / width
    if not known:  # coefficients far beyond the observed range are unlikely
        left = y @ y - np.einsum("tp,tp->t", moments, np.linalg.solve(gram, moments[..., None])[..., 0])
        noise = (np.maximum(left.min(), smallest) + within.sum()) / max(degrees, 1.0)
        prior[:, 1:] = noise / (LARGE * np.ptp(losses.mean[there]) / spans(points)) ** 2
    gram[:, diagonal, diagonal] += prior
    factors = np.linalg.cholesky(gram)
    coefficients = np.linalg.solve(gram, moments[..., None])[..., 0]
    error = y - np.einsum("tcp,tp->tc", x, coefficients)
    squares = (error**2).sum(axis=1) + (prior * coefficients**2).sum(axis=1) + within.sum() + smallest
    half = np.linalg.solve(factors, np.swapaxes(x, 1, 2))  # [T, p, c]
    volume = -np.log(factors[:, diagonal, diagonal]).sum(axis=1) + 0.5 * np.log(np.where(prior > 0, prior, 1)).sum(
        axis=1) if known else np.zeros(len(thetas))
    weights = special.softmax(volume - degrees / 2 * np.log(squares))
    # Leave out each share in turn, with all its cells.
    of_cells = groups[there]
    densities, left_out = np.full(int(groups.max()) + 1, np.nan), np.full(len(groups), np.nan)
    for group in np.unique(of_cells):
        here = np.flatnonzero(of_cells == group)
        left = degrees - runs[here].sum()
        if left < 0.5:
            return None
        hat = np.einsum("tpc,tpd->tcd", half[:, :, here], half[:, :, here])
        rest = np.eye(len(here)) - hat
        rest[:, np.arange(len(here)), np.arange(len(here))] += 1e-10
        off = np.linalg.solve(rest, error[:, here][..., None])[..., 0]  # predicted minus observed, in weighted units
        explained = (error[:, here] * off).sum(axis=1)
        others = np.maximum(squares - explained - within[here].sum(), smallest)
        determinant = np.linalg.slogdet(rest)[1]
        of_others = volume * known - 0.5 * determinant * known - left / 2 * np.log(others)
        of_others = of_others - special.logsumexp(of_others)
        # Student's density in as many dimensions as cells; `rest` is the inverse of its shape matrix.
        size = len(here)
        density = (special.gammaln((left + size) / 2) - special.gammaln(left / 2) - size / 2 * np.log(np.pi * others)
                   + 0.5 * determinant - (left + size) / 2 * np.log1p(explained / others))
        densities[group] = special.logsumexp(of_others + density) + np.log(root[here]).sum()
        predicted = level + (y[here] - off) / root[here]
        left_out[np.flatnonzero(there)[here]] = np.exp(of_others) @ predicted
    coefficients[:, 0] += level
    keep = weights > LEAST_WEIGHT * weights.max()
    return Fit(family, thetas[keep], weights[keep] / weights[keep].sum(), coefficients[keep], factors[keep],
               squares[keep], told, min(told, float(np.average(losses.degrees[there], weights=runs))), densities,
               left_out)


class Drawn(NamedTuple):
    """Curves of one loss that are consistent with the runs: those of one family and theta."""

    loss: int  # its index
    rows: np.ndarray  # indices of the curves
    fit: Fit
    theta: int  # its index
    coefficients: np.ndarray  # [p, rows]
    deviation: np.ndarray  # [rows] of the noise of a run whose `variance` is 1


def draw(laws: Sequence[Law], correlation: np.ndarray | None = None, count: int = DRAWS, seed: int = 0,
         moved: Sequence[np.ndarray | None] | None = None) -> list[Drawn]:
    """Curves that are consistent with the runs, `count` for each loss; curves of equal index belong together.

    Args:
      laws: of each of D losses.
      laws: one for each of D losses.
      correlation: [D, D] of the losses' noise within a run; None for none.
        moved: For each loss, [count, c], the shift of each cell's mean for each curve, such as under other questions;
          None for no shift. The curve moves as its least-squares fit does.
      """
    dice = np.random.default_rng(seed)
    widths = [max(fit.coefficients.shape[1] for fit in law.fits) for law in laws]
    mix = np.eye(len(laws)) if correlation is None else linalg.cholesky(
        correlation + 1e-9 * np.eye(len(laws)), lower=True)
    normal = np.einsum("de,ebp->dbp", mix, dice.standard_normal((len(laws), count, max(widths))))
    uniform = stats.norm.cdf(dice.standard_normal(count))
    found = []
    for place, law in enumerate(laws):
        shift = moved[place] if moved else None
        which = dice.choice(len(law.fits), count, p=law.weights)
        for number in np.unique(which):
            fit, mine = law.fits[number], np.flatnonzero(which == number)
            theta = dice.choice(len(fit.thetas), len(mine), p=fit.weights)
            width = fit.coefficients.shape[1]
            for one in np.unique(theta):
                rows = mine[theta == one]
                variance = fit.squares[one] / fit.degrees * fit.known / stats.chi2.isf(uniform[rows], fit.known)
                deviation = np.sqrt(variance)
                factor = fit.factors[one]
                off = linalg.solve_triangular(factor.T, normal[place, rows, :width].T, lower=False)
                coefficients = fit.coefficients[one][:, None] + deviation * off
                if shift is not None:
                    design = fit.family.features(law.points, fit.thetas[[one]])[0]
                    coefficients += linalg.cho_solve((factor, True), design.T @ (law.counted * shift[rows]).T)
                found.append(Drawn(place, rows, fit, int(one), coefficients, deviation))
    return found


def curves(drawn: Sequence[Drawn], points: Points, scatter: bool = True, seed: int = 0) -> np.ndarray:
    """[D, count, n] drawn curves at points.

    Args:
      scatter: adds, independently at each point, the uncertainty of a Gaussian process between the shares it has seen.
    """
    dice = np.random.default_rng(seed)
    losses, count = (1 + max(int(np.max(part)) for part in parts) for parts in (
        [one.loss for one in drawn], [one.rows for one in drawn]))
    found = np.empty((losses, count, len(points.shares)))
    for one in drawn:
        thetas = one.fit.thetas[[one.theta]]
        features = one.fit.family.features(points, thetas)[0]
        values = features @ one.coefficients
        if scatter and one.fit.family.precision is not None:
            prior = one.fit.family.precision(thetas)[0]
            unknown = np.sqrt(np.maximum(1 - (features[:, prior > 0] ** 2).sum(axis=1), 0) / prior[-1])
            values += unknown[:, None] * one.deviation * dice.standard_normal(values.shape)
        found[one.loss, one.rows] = values.T
    return found
