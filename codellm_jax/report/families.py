"""The candidates for a law of the mixture: families of curves over shares, sizes and lengths.

A family is linear except in one or two parameters, theta, such as t of c + k exp(t r). Its features are of order one,
so the coefficients are of the order of the differences between losses.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import linalg, optimize

LIMIT = 20.0  # of |t| in exp(t r)
REPEATED = 0.25  # epochs wasted; repetition may matter above this, which is about four epochs


class Points(NamedTuple):
    """The points at which a law is evaluated: shares [n, S] of S sources that sum to 1; `scale` [n, a], parameters and
    tokens divided by their geometric means, for those that vary; `waste` [n], the epochs lost to repetition of the
    scarcest source.
    """

    shares: np.ndarray
    scale: np.ndarray
    waste: np.ndarray


class Losses(NamedTuple):
    """One loss in cells; a cell holds all seeds with the same shares, size and length.

    Attributes:
      mean: [c] over seeds; 0 where there are none.
      runs: [c]; several lengths of one run count as fewer runs to the extent that their noise is alike.
      squares: [c] sums of squares about the mean.
      variance: [c] of the noise of one run, relative to the mean of all cells; 1 where it is the same everywhere.
      degrees: [c] of freedom of the estimate `variance`; infinite where it is the same everywhere.
    """

    mean: np.ndarray
    runs: np.ndarray
    squares: np.ndarray
    variance: np.ndarray
    degrees: np.ndarray


@dataclasses.dataclass(frozen=True)
class Family:
    """Curves sum_p b_p features_p(x; theta).

    Attributes:
      name, formula: shown to readers.
      parameters: the number of parameters of one curve.
      axes: grids of theta.
      features: (points, thetas [T, k]) -> [T, n, p].
      mode: finds the single theta [1, k], where a grid would be too large.
      precision: thetas -> [T, p], the precision of the coefficients' normal prior about 0, relative to the noise's;
        None for no prior.
    """

    name: str
    formula: str
    parameters: int
    axes: tuple[np.ndarray, ...]
    features: Callable[[Points, np.ndarray], np.ndarray]
    precision: Callable[[np.ndarray], np.ndarray] | None = None
    mode: Callable[[Points, Losses], np.ndarray] | None = None


def constant() -> Family:
    return Family("constant", "c", 1, (), lambda points, thetas: np.ones((len(thetas), len(points.shares), 1)))


def linear(sources: int) -> Family:
    return Family("linear", "c + sum_j b_j r_j", sources, (), lambda points, thetas: np.broadcast_to(
        _with_constant(points.shares[:, 1:]), (len(thetas), len(points.shares), sources)))


def exponential() -> Family:
    """c + k exp(t r) of the second of two sources (Ye et al., 2024, equation 1, for two domains)."""
    axis = 2 * np.sinh(np.linspace(-np.arcsinh(LIMIT / 2), np.arcsinh(LIMIT / 2), 60))  # never 0: that is linear

    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        # The feature runs from 0 at r = 0 to 1 at r = 1 for every t, which keeps the fit well conditioned.
        risen = np.expm1(thetas[:, :1] * points.shares[None, :, 1]) / np.expm1(thetas[:, :1])
        return _with_constant(risen[..., None])

    return Family("exponential", "c + k exp(t r)", 3, (axis,), features)


def exponential_of_all(sources: int) -> Family:
    """c + k exp(sum_j t_j r_j) over all sources (Ye et al., 2024, equation 2). Theta is the least-squares (log k, t),
    and the coefficients are those of the tangents there.
    """
    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        free = points.shares[:, 1:]
        curve = np.exp(np.clip(thetas[:, :1] + np.einsum("tk,nk->tn", thetas[:, 1:], free), -50, 50))[..., None]
        return _with_constant(np.concatenate([curve, curve * free], axis=2))

    def mode(points: Points, losses: Losses) -> np.ndarray:
        there = losses.runs > 0
        free, y = points.shares[there, 1:], losses.mean[there]
        root = np.sqrt(losses.runs[there] / losses.variance[there])
        design, span = _with_constant(free), float(np.ptp(y)) or 1.0

        def error(p: np.ndarray) -> np.ndarray:
            return root * (p[0] + np.exp(np.clip(p[1] + free @ p[2:], -50, 50)) - y)

        def slope(p: np.ndarray) -> np.ndarray:
            curve = np.exp(np.clip(p[1] + free @ p[2:], -50, 50))
            return root[:, None] * np.concatenate([np.ones((len(y), 1)), curve[:, None] * design], axis=1)

        found = []
        for below in (0.05, 0.5, 3.0):  # of the span: where the floor may lie
            floor = y.min() - below * span
            line = np.linalg.lstsq(design * root[:, None], np.log(y - floor) * root, rcond=None)[0]
            start = np.concatenate([[floor], line])
            found.append(optimize.least_squares(error, start, slope, method="lm", max_nfev=500))
        return min(found, key=lambda fit: fit.cost).x[None, 1:]

    return Family("exponential", "c + k exp(sum_j t_j r_j)", sources + 1, (), features, mode=mode)


def exponentials(sources: int) -> Family:
    """c + sum_j k_j exp(-t_j r_j) over sources; for more than two, with one t for all."""
    axis = np.geomspace(0.3, 2 * LIMIT, 14 if sources == 2 else 20)
    own = sources == 2

    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        return _with_constant(np.exp(-thetas[:, None, :] * points.shares[None]))

    return Family("sum of exponentials", "c + sum_j k_j exp(-t_j r_j)" if own else "c + sum_j k_j exp(-t r_j)",
                  1 + sources + (sources if own else 1), (axis, axis) if own else (axis,), features)


def power(sources: int, source: int | None = None) -> Family:
    """c + k (r + e)^-a of one source, or c + sum_j k_j (r_j + e)^-a over all; e keeps it finite without the source."""
    axes = np.geomspace(0.003, 0.5, 8), np.linspace(0.1, 1.5, 8)

    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        shares = points.shares if source is None else points.shares[:, [source]]
        least, power = thetas[:, :1, None], -thetas[:, 1:2, None]
        high, low = least**power, (1 + least) ** power  # so that features go from 1 to 0
        return _with_constant(((shares[None] + least) ** power - low) / (high - low))

    name = "power law" if source is None else f"power law of source {source}"
    return Family(name, "c + sum_j k_j (r_j + e)^-a" if source is None else "c + k (r + e)^-a",
                  3 + (sources if source is None else 1), axes, features)


def gaussian_process(shares: np.ndarray, with_linear: bool = True) -> Family:
    """A Gaussian process with a Matern kernel of smoothness 5/2 about a linear mean; theta is (length, amplitude over
    the noise's standard deviation).

    Args:
      shares: [g, S], the support of the process, which must hold all observed shares; between them it is interpolated.
    """
    base = _place(shares)
    length = float(np.median([np.linalg.norm(one - other) for one, other in itertools.combinations(base[:64], 2)]))
    few = len(base) > 150
    axes = length * np.geomspace(0.4, 8, 5 if few else 8), np.geomspace(1, 1000, 6 if few else 10)

    def kernel(points: np.ndarray, length: float) -> np.ndarray:
        distance = np.sqrt(5.0) / length * np.sqrt(np.maximum(
            (points**2).sum(1)[:, None] + (base**2).sum(1) - 2 * points @ base.T, 0))
        return (1 + distance + distance**2 / 3) * np.exp(-distance)

    @functools.lru_cache(maxsize=64)
    def factor(length: float) -> np.ndarray:
        return linalg.cholesky(kernel(base, length) + 1e-8 * np.eye(len(base)), lower=True)

    def mean_of(shares: np.ndarray) -> np.ndarray:
        return _with_constant(shares[:, 1:] if with_linear else shares[:, :0])

    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        place, mean = _place(points.shares), mean_of(points.shares)
        found = {length: np.concatenate([mean, linalg.solve_triangular(
            factor(length), kernel(place, length).T, lower=True).T], axis=1) for length in set(thetas[:, 0])}
        return np.stack([found[length] for length in thetas[:, 0]])

    def precision(thetas: np.ndarray) -> np.ndarray:
        of_process = np.repeat(thetas[:, 1:] ** -2, len(base), axis=1)
        return np.concatenate([np.zeros((len(thetas), mean_of(shares).shape[1])), of_process], axis=1)

    return Family("Gaussian process", "a linear mean and Matern's kernel", mean_of(shares).shape[1] + 1, axes, features,
                  precision)


def with_repetition(family: Family, most: float) -> Family:
    """The family with an added term for the epochs lost to repetition; `most` is the largest loss of any run."""
    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        found = family.features(points, thetas)
        return np.concatenate([found, np.broadcast_to(points.waste[:, None] / most, (*found.shape[:2], 1))], axis=2)

    return dataclasses.replace(family, name=f"{family.name}, repetition", formula=f"{family.formula} + w waste",
                               parameters=family.parameters + 1, features=features)


def with_scale(family: Family, axes: int) -> Family:
    """The family with each coefficient replaced by b + sum_a b_a s_a^-p_a over the scales s: parameters and tokens
    (following Ye et al., 2024, section 4: laws of steps and sizes nested below that of the mixture).
    """
    own = len(family.axes)

    def features(points: Points, thetas: np.ndarray) -> np.ndarray:
        found = family.features(points, thetas[:, :own])
        exponent = -thetas[:, None, own:]
        powers = (points.scale[None] ** exponent - 1) / exponent  # [T, n, a]; nearly log for small exponents
        return np.concatenate([found, *(found * powers[:, :, [a]] for a in range(axes))], axis=2)

    grids = (*(axis[:: max(1, len(axis) // 12)] for axis in family.axes), *[np.linspace(0.05, 1.2, 7)] * axes)
    return dataclasses.replace(family, name=family.name, formula=f"{family.formula}, by scale",
                               parameters=family.parameters * (1 + axes) + axes, axes=grids, features=features)


def _with_constant(features: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((*features.shape[:-1], 1)), features], axis=-1)


def _place(shares: np.ndarray) -> np.ndarray:
    """The position of a mixture for the Gaussian process: a difference of one point moves two mixtures farther apart
    the scarcer the source (as in Hellinger's distance); of two sources, the share itself.
    """
    return shares[:, 1:] if shares.shape[1] == 2 else np.sqrt(np.maximum(shares, 0))


def candidates(points: Points, groups: np.ndarray) -> list[Family]:
    """The families that this many shares can determine: each leaves one share over when another is left out.

    Args:
      points: the points [c] of the cells.
      groups: [c], the index of each cell's share.
    """
    distinct, sources = len(np.unique(groups)), points.shares.shape[1]
    scales = points.scale.shape[1]
    shares = points.shares[np.unique(groups, return_index=True)[1]]
    families = [constant(), linear(sources), exponential() if sources == 2 else exponentials(sources)]
    if not scales:
        families += [power(2, 0), power(2, 1), exponentials(2)] if sources == 2 else [
            exponential_of_all(sources), power(sources)]
        if points.waste.max() > REPEATED and np.ptp(points.waste) > 0:
            most = float(points.waste.max())
            families += [with_repetition(family, most) for family in families[1:]]
        families.append(gaussian_process(_process_points(shares), distinct > sources + 1))
    kept = [family for family in families if family.parameters < distinct or family.name == "constant"]
    return [with_scale(family, scales) for family in kept] if scales else kept


def _process_points(shares: np.ndarray) -> np.ndarray:
    """The observed shares and, for two sources, a grid between them."""
    if shares.shape[1] > 2:
        return shares
    own = shares[:, 1]
    grid = np.linspace(own.min(), own.max(), 21)
    apart = np.abs(grid[:, None] - own).min(axis=1) > 0.2 * (np.ptp(own) / 20)
    second = np.concatenate([own, grid[apart]])
    return np.stack([1 - second, second], axis=1)
