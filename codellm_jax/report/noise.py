"""The noise of runs: its variation between shares, outliers among the runs, and the cells that laws are fitted to."""

from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

from codellm_jax.report.families import Family, Losses, Points
from codellm_jax.report.laws import Law, fit_law

LEVEL = 0.01  # probability of reporting an outlier in one loss of a study without outliers
TEST_LEVEL = 0.05  # of the tests that noise differs between shares
MOST_OUTLIERS = 0.1  # of a loss's runs
FEWEST = 4  # runs; with so few, none is called an outlier
SUSPICIOUS = 3.5  # times the median distance from the law; runs beyond this are tested
SUSPECTS = 3  # runs that are tested at a time


class Outlier(NamedTuple):
    """A run whose loss the law of all other runs does not explain; `deviation` is its loss minus the law's prediction.
    """

    run: int
    loss: float
    deviation: float
    p_value: float  # Bonferroni-corrected over the runs


def cells_of(values: np.ndarray, cell: np.ndarray, shares: np.ndarray, weights: np.ndarray) -> Losses:
    """The losses in cells.

    Args:
      values: [n]; NaN where there is none.
      cell: [n] the cell of each line.
      shares: [c, S] of each cell.
      weights: [n] of each line, as returned by `line_weights`.
    """
    number, there = len(shares), ~np.isnan(values)
    lines = np.bincount(cell[there], minlength=number)
    mean = np.bincount(cell[there], values[there], number) / np.maximum(lines, 1)
    squares = (values[there] - mean[cell[there]]) ** 2
    variance, degrees = moderated(np.bincount(cell[there], squares, number), lines - 1, shares)
    return Losses(mean, np.bincount(cell[there], weights[there], number),
                  np.bincount(cell[there], weights[there] * squares, number), variance, degrees)


def moderated(squares: np.ndarray, degrees: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The variance of a run in each cell, relative to their mean over runs, and its degrees of freedom, both [c].

    A few seeds estimate a variance badly, and weights from such variances would do harm. Each is therefore shrunk
    towards a common variance, or towards a trend in the shares where a test finds one. The shrinkage depends on how far
    the variances together differ by more than chance (Smyth, 2004, section 6): if they are all equal, the results are
    identical.

    Args:
      squares: [c] sums of squares about the cells' means.
      degrees: [c] of freedom; cells without any get the common variance.
      shares: [c, S].
    """
    known = (degrees > 0) & (squares > 0)
    if known.sum() < 3:
        return np.ones(len(squares)), np.full(len(squares), np.inf)
    half = degrees[known] / 2
    logarithm = np.log(squares[known] / degrees[known]) - special.digamma(half) + np.log(half)
    spread = special.polygamma(1, half)  # of the logarithm, by chance alone
    design = np.ones((len(squares), 1))
    with_trend = np.concatenate([design, shares[:, 1:]], axis=1)
    if known.sum() >= with_trend.shape[1] + 2:
        gain = _left(design[known], logarithm, spread) - _left(with_trend[known], logarithm, spread)
        if gain > stats.chi2.isf(TEST_LEVEL, with_trend.shape[1] - 1):
            design = with_trend
    root = 1 / np.sqrt(spread)
    line = np.linalg.lstsq(design[known] * root[:, None], logarithm * root, rcond=None)[0]
    common = np.exp(np.clip(design @ line, logarithm.min() - 1, logarithm.max() + 1))
    free, prior = int(known.sum()) - design.shape[1], np.inf
    excess = ((logarithm - design[known] @ line) ** 2).sum() / free - spread.mean()
    if excess > 0 and _bartlett(squares[known] / common[known], degrees[known]) < TEST_LEVEL:
        # The prior's degrees of freedom d, from trigamma(d / 2) = excess.
        prior = 2 * np.exp(optimize.brentq(lambda half: special.polygamma(1, np.exp(half)) - excess, -15, 30))
        common = common * np.exp(special.digamma(prior / 2) - np.log(prior / 2))
        common = (prior * common + squares) / (prior + np.maximum(degrees, 0))
    return common / np.average(common, weights=degrees + 1), prior + np.maximum(degrees, 0)


def _bartlett(squares: np.ndarray, degrees: np.ndarray) -> float:
    """The p-value of Bartlett's test (1937) that all variances are equal."""
    total, number = degrees.sum(), len(degrees)
    statistic = total * np.log(squares.sum() / total) - (degrees * np.log(squares / degrees)).sum()
    correction = 1 + ((1 / degrees).sum() - 1 / total) / (3 * (number - 1))
    return float(stats.chi2.sf(statistic / correction, number - 1))


def _left(design: np.ndarray, values: np.ndarray, variances: np.ndarray) -> float:
    root = 1 / np.sqrt(variances)
    line = np.linalg.lstsq(design * root[:, None], values * root, rcond=None)[0]
    return float((((values - design @ line) * root) ** 2).sum())


def fit_without_outliers(
    families: list[Family], points: Points, groups: np.ndarray, cell: np.ndarray, values: np.ndarray,
    weights: np.ndarray,
) -> tuple[Law, Losses, list[Outlier]]:
    """Fits a law of one loss without its outliers, which are returned too.

    The most deviant runs are left out in turn. The one that is least likely under the law of the others is an outlier
    if its p-value, multiplied by the number of runs, is below `LEVEL`. Then the search continues.

    Args:
      families: the candidates.
      points, groups: of the cells.
      cell: [n] the cell of each run.
      values: [n] the losses; NaN where there is none.
      weights: [n] of each line, as returned by `line_weights`.
    """
    def fitted(values: np.ndarray) -> tuple[Law, Losses]:
        losses = cells_of(values, cell, points.shares, weights)
        return fit_law(families, points, groups, losses), losses

    found: list[Outlier] = []
    values = values.copy()
    law, losses = fitted(values)
    runs = int((~np.isnan(values)).sum())
    while len(found) < max(1, int(MOST_OUTLIERS * runs)) and runs - len(found) > FEWEST:
        best: tuple[float, int, float, Law, Losses] | None = None
        for run in _suspects(law, losses, points, cell, values):
            without = np.where(np.arange(len(values)) == run, np.nan, values)
            if len(np.unique(groups[cell[~np.isnan(without)]])) < 3:
                continue
            other, others = fitted(without)
            deviation, p_value = _unlikely(other, others, points, cell[run], values[run],
                                          int((~np.isnan(without)).sum()))
            if best is None or p_value < best[0]:
                best = p_value, run, deviation, other, others
        if best is None or best[0] * runs > LEVEL:
            break
        p_value, run, deviation, law, losses = best
        found.append(Outlier(run, float(values[run]), deviation, min(1.0, p_value * runs)))
        values[run] = np.nan
    return law, losses, found


def line_weights(law: Law, points: Points, cell: np.ndarray, values: np.ndarray, run: np.ndarray) -> np.ndarray:
    """[n] the weight of each line among the lines of its run, whose noise is correlated: 1 / (1 + (m - 1) rho) for m
    lines with correlation rho, estimated by an analysis of variance (Kish, 1965, on the effect of clusters).

    Args:
      law: fitted to all lines as if they came from different runs.
      run: [n] the index of each line's run.
    """
    there = ~np.isnan(values)
    residuals = np.where(there, values - law.mean(points)[cell], 0.0)
    lines = np.bincount(run[there], minlength=run.max() + 1)
    means = np.bincount(run, residuals) / np.maximum(lines, 1)
    runs, several = int((lines > 0).sum()), float(lines[lines > 0].mean())
    if several < 1.5:
        return np.ones(len(values))
    within = ((residuals - means[run])[there] ** 2).sum() / max(int(lines.sum()) - runs, 1)
    # The part that the law has fitted is missing between runs.
    between = (lines * means**2).sum() / max(runs - law.chosen.coefficients.shape[1], 1)
    alike = float(np.clip((between - within) / (between + (several - 1) * within), 0, 1))
    return 1 / (1 + (np.maximum(lines[run], 1) - 1) * alike)


def _suspects(law: Law, losses: Losses, points: Points, cell: np.ndarray, values: np.ndarray) -> list[int]:
    """The runs farthest from the others of their cell, or, if alone in it, from the law of the other shares."""
    lines = np.bincount(cell[~np.isnan(values)], minlength=len(losses.mean))[cell]
    others = np.where(lines > 1, (lines * losses.mean[cell] - values) / np.maximum(lines - 1, 1), law.left_out[cell])
    fitted = law.mean(points)[cell]
    off = np.abs(values - others) + np.abs(values - fitted)
    off = np.where(np.isnan(off), 0.0, off)
    least = SUSPICIOUS * np.median(off[~np.isnan(values)])
    return [int(run) for run in np.argsort(-off, kind="stable")[:SUSPECTS] if off[run] > least]


def _unlikely(law: Law, losses: Losses, points: Points, cell: int, value: float, lines: int) -> tuple[float, float]:
    """The distance of a further line of a cell from the law, and the probability of a distance at least as large. Here
    all `lines` that the law was fitted to count one by one, even those of one run: the search is for a line that
    differs.
    """
    point = Points(*(part[[cell]] for part in points))
    tail, mean = 0.0, float(law.mean(point)[0])
    of_run = lines / losses.runs.sum()
    for weight, fit in zip(law.weights, law.fits, strict=True):
        if weight == 0:
            continue
        features = fit.family.features(point, fit.thetas)[:, 0]  # [T, p]
        centre = (features * fit.coefficients).sum(axis=1)
        half = np.linalg.solve(fit.factors, features[..., None])[..., 0]
        degrees = lines - (losses.runs.sum() - fit.degrees)
        scale = np.sqrt(fit.squares * of_run / degrees * (losses.variance[cell] + (half**2).sum(axis=1) / of_run))
        degrees = min(degrees, losses.degrees[cell])
        tail += weight * float(fit.weights @ stats.t.sf(np.abs(value - centre) / scale, degrees))
    return value - mean, 2 * tail


def correlation(residuals: np.ndarray, degrees: float) -> np.ndarray:
    """[D, D] of the losses' noise within a run, shrunk towards zero as far as there are too few runs to estimate it.

    Args:
      residuals: [n, D] of each run in units of its noise; NaN where there is none.
      degrees: of freedom in the residuals.
    """
    known = np.nan_to_num(residuals)
    squares = known.T @ known
    scale = np.sqrt(np.maximum(np.diag(squares), 1e-30))
    found = squares / np.outer(scale, scale) * max(0.0, 1 - 2 / max(degrees, 2.0))
    np.fill_diagonal(found, 1.0)
    values, vectors = np.linalg.eigh(found)
    whole = vectors * np.maximum(values, 1e-6) @ vectors.T
    return whole / np.sqrt(np.outer(np.diag(whole), np.diag(whole)))

