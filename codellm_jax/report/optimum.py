"""The best mixture for a weighted sum of losses, its uncertainty, and the further runs that would reduce it.

Everything is derived from curves that are consistent with the runs (`laws.draw`): the best mixture of each curve is its
lowest point between the runs' own mixtures, and the interval holds the middle 95% of these.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize

GRID = 401  # shares of two sources that are evaluated
STARTS = 1500  # initial mixtures of a search over more than two sources
ROUNDS, MOVES = 20, 150  # of the search, and how many moves of each kind it tries in a round
STEPS = (0.5, 0.01)  # fraction of the way to another mixture, in the first and the last round
APART = 0.005  # of a share: a mixture this close to the convex hull of the runs counts as inside
SURE = 0.95
INTERVAL = (0.025, 0.975)
AT_EDGE = 0.01  # of the swept range
TRIED = 25  # shares tried for a further run
POSSIBLE = 250  # curves on which further runs are tried
MOST_ARMS = 8  # the most arms proposed
CurvesAt = Callable[[np.ndarray], np.ndarray]
ENOUGH = 0.25  # of the swept range: no further runs are proposed once an interval is this narrow


@dataclasses.dataclass(frozen=True)
class Best:
    """The best mixture.

    Attributes:
      shares: [S] with the lowest predicted objective.
      intervals: [S, 2], the 95% interval of each source's share.
      objective: predicted there, with its interval.
      verdict: "interior", "edge" or "cannot tell"; for more than two sources "told" (it is better than the average),
        "edge" (with as much of one source as any run) or "cannot tell".
      edge: the source whose share is at an end of the sweep, and which end, "least" or "most"; None for none.
      edges: the probabilities that the best share is the smallest that was swept, and the largest; for two sources.
      gain: how much lower the objective is there than at the average of the runs' mixtures, with its 95% interval.
    """

    shares: np.ndarray
    intervals: np.ndarray
    objective: float
    objective_interval: tuple[float, float]
    verdict: str
    edge: tuple[int, str] | None
    edges: tuple[float, float]
    gain: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Design:
    """Further mixtures, [k, S], each trained with as many seeds as the study has, and the expected 95% interval of the
    best share of the second source after these runs.
    """

    shares: np.ndarray
    seeds: int
    width_now: float
    width_then: float


def mixtures(shares: np.ndarray, number: int, dice: np.random.Generator) -> np.ndarray:
    """[m, S] mixtures between the given ones: for two sources a grid from end to end, for more the given ones and about
    `number` random ones.

    Args:
      shares: [n, S].
    """
    if shares.shape[1] == 2:
        second = np.linspace(shares[:, 1].min(), shares[:, 1].max(), GRID)
        return np.stack([1 - second, second], axis=1)
    distinct = _distinct(shares)
    return np.concatenate([np.eye(len(distinct)), _random(len(distinct), number, dice)]) @ distinct


def _distinct(shares: np.ndarray) -> np.ndarray:
    return shares[np.sort(np.unique(shares.round(4), axis=0, return_index=True)[1])]


def _random(corners: int, number: int, dice: np.random.Generator) -> np.ndarray:
    """[number, corners] weights of random mixtures, half of them near single corners, half between all."""
    return np.concatenate([dice.dirichlet(np.full(corners, size), number // 2) for size in (0.1, 1.0)])


def weigh(objective: Mapping[str, float], losses: Sequence[str], curves: np.ndarray) -> np.ndarray:
    """[...] the weighted sum of losses, for curves [D, ...]."""
    return np.tensordot([objective.get(name, 0.0) for name in losses], curves, axes=1)


def lowest(corners: np.ndarray, curves_at: CurvesAt, seed: int = 0) -> np.ndarray:
    """[B, S] the mixture between `corners` at which each curve is lowest.

    For two sources, all shares of a grid are evaluated. For more, mixtures are weights of the corners, and a random
    search moves from the lowest point of every curve so far: towards other mixtures, in shorter and shorter steps; by
    moving some of one corner's weight to another; and by the difference of two other curves' lowest points, which lies
    along the face that they are on (differential evolution; Storn and Price, 1997). Each curve also tries the points
    found for the others.

    Args:
      corners: [n, S].
      curves_at: mixtures [m, S] -> objective [B, m], the same curves at each call.
    """
    dice = np.random.default_rng(seed)
    if corners.shape[1] == 2:
        tried = mixtures(corners, 0, dice)
        return tried[curves_at(tried).argmin(axis=1)]
    corners = _distinct(corners)
    number = len(corners)

    def lower(weights: np.ndarray, found: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = curves_at(weights @ corners)
        places = values.argmin(axis=1)
        own = values[np.arange(len(values)), places]
        return np.where((own < least)[:, None], weights[places], found), np.minimum(own, least)

    curves = len(curves_at(corners[:1]))
    found, least = lower(np.concatenate([np.eye(number), _random(number, STARTS, dice)]),
                         np.zeros((curves, number)), np.full(curves, np.inf))
    for step in np.geomspace(*STEPS, ROUNDS):
        first, second, third, fourth = (found[dice.choice(curves, MOVES)] for _ in range(4))
        towards = np.concatenate([np.eye(number), _random(number, MOVES, dice)])
        towards = towards[dice.choice(len(towards), MOVES, replace=False)]
        giving, taking = (np.array([dice.choice(number, p=own) for own in weights]) for weights in (
            first, 0.7 * second + 0.3 / number))
        given = first.copy()
        each = np.arange(MOVES)
        part = dice.random(MOVES) ** 3 * first[each, giving]
        given[each, giving] -= part
        given[each, taking] += part
        along = np.maximum(first + dice.random((MOVES, 1)) * (third - fourth), 0)
        found, least = lower(np.concatenate([
            first + step * (towards - first), given, along / along.sum(axis=1, keepdims=True)]), found, least)
    return found @ corners


def best(swept: np.ndarray, corners: np.ndarray, average: np.ndarray, curves_at: CurvesAt) -> Best:
    """The best mixture between the given ones.

    Args:
      swept: [n, S] the runs' mixtures.
      corners: [k, S], the mixtures between which to search: the runs' own, or beyond them.
      average: [S] the mixture relative to which gains are computed.
      curves_at: mixtures [m, S] -> objective [1 + B, m], the same at each call; the first is the prediction, the others
        are possible curves.
    """
    found = lowest(corners, curves_at)
    place, found = found[0], found[1:]
    low, high = np.quantile(found, INTERVAL, axis=0)
    intervals = np.stack([np.minimum(low, place), np.maximum(high, place)], axis=1)
    here, there = np.moveaxis(curves_at(np.stack([place, average])), -1, 0)  # [1 + B]
    gain = (float(there[0] - here[0]), *np.quantile((there - here)[1:], INTERVAL).tolist())
    least, most = swept.min(axis=0), swept.max(axis=0)
    margin = AT_EDGE * (most - least)
    at_least, at_most = (found <= least + margin).mean(axis=0), (found >= most - margin).mean(axis=0)
    edge = None
    if swept.shape[1] == 2:
        if max(at_least[1], at_most[1]) >= SURE:
            edge = 1, "least" if at_least[1] > at_most[1] else "most"
        inside = intervals[1, 0] > least[1] + margin[1] and intervals[1, 1] < most[1] - margin[1]
        verdict = "edge" if edge else "interior" if inside else "cannot tell"
    else:
        surest = int(at_most.argmax())
        edge = (surest, "most") if at_most[surest] >= SURE else None
        verdict = "edge" if edge else "told" if gain[1] > 0 else "cannot tell"
    low, high = np.quantile(here[1:], INTERVAL).tolist()
    return Best(place, intervals, float(here[0]), (low, high), verdict, edge,
                (float(at_least[1]), float(at_most[1])), gain)


def between(shares: np.ndarray, mixture: np.ndarray) -> bool:
    """Whether a mixture [S] lies in the convex hull of others [n, S], to within `APART`."""
    weights, _ = optimize.nnls(np.concatenate([shares.T, np.ones((1, len(shares)))]), np.append(mixture, 1.0))
    return bool(np.abs(weights @ shares - mixture).max() < APART)


def design(swept: np.ndarray, weights: np.ndarray, noise: np.ndarray, seeds: int,
           curves_at: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Design:
    """The mixtures whose runs are expected to narrow the interval of the best share most, chosen one after the other.

    Each possible curve in turn is assumed to be true: runs at a mixture would then show its losses plus noise, and make
    other curves less likely the farther they are from it. The choice minimises the expected remaining variance of the
    best share: Bayesian experimental design (Chaloner and Verdinelli, 1995, section 4) on the draws themselves.

    Args:
      swept: [n, S] the runs' shares.
      weights: [D] of the losses in the objective.
      noise: [D] the standard deviation of a run.
      seeds: of each mixture.
      curves_at: mixtures [m, S] -> possible losses [D, B, m], the same curves at each call.
    """
    dice, sources = np.random.default_rng(seed), swept.shape[1]
    space = mixtures(swept, STARTS, dice)
    low, high = swept[:, 1].min(), swept[:, 1].max()
    if sources == 2:
        second = np.unique(np.linspace(low, high, TRIED).round(2))
        second = second[[np.abs(swept[:, 1] - share).min() > 0.004 for share in second]]
        tried = np.stack([1 - second, second], axis=1)
    else:
        tried = space[dice.choice(len(space), TRIED, replace=False)]
    curves = curves_at(np.concatenate([space, tried]))[:, :POSSIBLE]
    objective = np.tensordot(weights, curves, axes=1)[:, :len(space)]
    best_shares = space[objective.argmin(axis=1)]  # [B, S]
    at_tried = curves[:, :, len(space):]
    used = np.flatnonzero(weights)
    spread = noise / np.sqrt(seeds)

    def squares_left(log: np.ndarray) -> float:
        weight = np.exp(log - log.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        mean = weight @ best_shares
        return float((weight @ best_shares**2 - mean**2).sum(axis=1).mean())

    log = np.zeros((curves.shape[1], curves.shape[1]))
    chosen: list[int] = []
    now = squares_left(log)
    then = now
    goal = (ENOUGH * (high - low) / 4) ** 2 * (2 if sources == 2 else sources)
    while len(chosen) < min(MOST_ARMS, len(tried)) and then > goal:
        options = []
        for place in range(len(tried)):
            if place in chosen:
                continue
            more = log.copy()
            for loss in used:
                seen = at_tried[loss, :, place]
                error = np.random.default_rng([seed, place, int(loss)]).standard_normal(len(seen)) * spread[loss]
                more -= ((seen + error)[:, None] - seen) ** 2 / (2 * spread[loss] ** 2)
            options.append((squares_left(more), place, more))
        if not options:
            break
        then, place, log = min(options, key=lambda option: option[:2])
        chosen.append(place)
    sides = 2 if sources == 2 else sources  # converts the summed variance to that of one share
    return Design(tried[sorted(chosen, key=lambda place: tuple(tried[place]))], seeds, 4 * float(np.sqrt(now / sides)),
                  4 * float(np.sqrt(then / sides)))


def lines_to_paste(found: Design, sources: Sequence[str], seeds: Sequence[int | None]) -> str:
    """The further runs as lines of a study's gin file."""
    if list(sources) == ["text", "code"]:
        rates = [round(float(share), 4) for share in found.shares[:, 1]]
        arms: dict[str, Any] = {"MORE": {"sweep": {"CODE_RATE": rates}}}
        lines = f"MORE_ARMS = {arms}"
    else:
        arms = {f"MORE-{number}": {"MIX_PHASES": [{source: round(float(share), 4) for source, share in zip(
            sources, mixture, strict=True) if share >= 0.00005}]} for number, mixture in enumerate(found.shares, 1)}
        lines = "MORE_ARMS = {\n" + "".join(f"    {name!r}: {arm!r},\n" for name, arm in arms.items()) + "}"
    known = sorted({seed for seed in seeds if seed is not None})
    return f"SEEDS = {known or [0]}\n{lines}"
