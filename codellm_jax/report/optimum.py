"""The best mixture for a weighted sum of losses, how surely, and which further runs would tell it better.

All of it is read from curves that the runs leave possible (`laws.draws`): the best share of each is its lowest point,
and the interval holds the middle 95% of these.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

GRID = 401  # shares of two sources that are looked at
MIXTURES = 4000  # of more than two
SURE = 0.95
INTERVAL = (0.025, 0.975)
AT_EDGE = 0.01  # of the swept range
TRIED = 25  # shares that a further run is tried at
POSSIBLE = 250  # curves that further runs are tried on
MOST_ARMS = 8  # that are proposed
ENOUGH = 0.25  # of the swept range: an interval as narrow as this is worth its runs


@dataclasses.dataclass(frozen=True)
class Best:
    """The best mixture.

    Attributes:
      shares: [S] with the lowest predicted objective.
      intervals: [S, 2], 95%, of each source's share.
      objective: predicted there; its interval.
      verdict: "interior", "edge" or "cannot tell"; of more than two sources "told" (it is better than the average),
        "edge" (with as much of one source as any run) or "cannot tell".
      edge: the source whose share is at an end of the sweep, and which end, "least" or "most"; None for none.
      edges: how probable it is that the best share is the least that was swept, and the most; of two sources.
      gain: by how much the objective is lower there than at the average of the runs' mixtures, with its 95% interval.
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
    """Further mixtures, [k, S], each of them trained with as many seeds as the study has, and the 95% interval of the
    best share of the second source that they are expected to leave.
    """

    shares: np.ndarray
    seeds: int
    width_now: float
    width_then: float


def mixtures(shares: np.ndarray, seed: int = 0) -> np.ndarray:
    """[m, S] mixtures to choose from: of two sources all between the swept ends, of more such as lie between runs.

    Args:
      shares: [n, S] of the runs.
    """
    if shares.shape[1] == 2:
        second = np.linspace(shares[:, 1].min(), shares[:, 1].max(), GRID)
        return np.stack([1 - second, second], axis=1)
    dice = np.random.default_rng(seed)
    distinct = np.unique(shares.round(4), axis=0)
    parts = [shares[np.sort(np.unique(shares.round(4), axis=0, return_index=True)[1])]]
    for concentration in (0.1, 1.0):  # near single runs, and deep between them
        parts.append(dice.dirichlet(np.full(len(distinct), concentration), MIXTURES // 2) @ parts[0])
    return np.concatenate(parts)


def weigh(objective: Mapping[str, float], losses: Sequence[str], curves: np.ndarray) -> np.ndarray:
    """[...] the weighted sum of losses, of curves [D, ...]."""
    return np.tensordot([objective.get(name, 0.0) for name in losses], curves, axes=1)


def best(shares: np.ndarray, predicted: np.ndarray, curves: np.ndarray, average: int) -> Best:
    """The best of some mixtures.

    Args:
      shares: [m, S], as `mixtures` gives them.
      predicted: [m] the objective.
      curves: [B, m] of it that are possible.
      average: the number of the mixture that gains are counted from.
    """
    lowest = curves.argmin(axis=1)
    place = int(predicted.argmin())
    found = shares[lowest]  # [B, S]
    low, high = np.quantile(found, INTERVAL, axis=0)
    intervals = np.stack([np.minimum(low, shares[place]), np.maximum(high, shares[place])], axis=1)
    gains = curves[:, average] - curves[np.arange(len(curves)), place]
    gain = (float(predicted[average] - predicted[place]), *np.quantile(gains, INTERVAL).tolist())
    least, most = shares.min(axis=0), shares.max(axis=0)
    margin = AT_EDGE * (most - least)
    at_least, at_most = (found <= least + margin).mean(axis=0), (found >= most - margin).mean(axis=0)
    edge = None
    if shares.shape[1] == 2:
        if max(at_least[1], at_most[1]) >= SURE:
            edge = 1, "least" if at_least[1] > at_most[1] else "most"
        inside = intervals[1, 0] > least[1] + margin[1] and intervals[1, 1] < most[1] - margin[1]
        verdict = "edge" if edge else "interior" if inside else "cannot tell"
    else:
        sure = [(float(max(low, high)), source, "least" if low > high else "most")
                for source, (low, high) in enumerate(zip(at_least, at_most, strict=True))]
        top = max((one for one in sure if one[2] == "most"), default=None)
        edge = (top[1], top[2]) if top and top[0] >= SURE else None
        verdict = "edge" if edge else "told" if gain[1] > 0 else "cannot tell"
    low, high = np.quantile(curves[:, place], INTERVAL).tolist()
    return Best(shares[place], intervals, float(predicted[place]), (low, high),
                verdict, edge, (float(at_least[1]), float(at_most[1])), gain)


def design(sources: int, swept: np.ndarray, weights: np.ndarray, noise: np.ndarray, seeds: int,
           curves_at: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Design:
    """The mixtures whose runs are expected to narrow the best share's interval most, one after the other.

    Each possible curve is taken for the truth in turn: runs at a mixture would show its losses and noise, and make
    other curves less likely the farther they are from it. What is made small is the variance of the best share that is
    left on average: Bayesian experimental design (Chaloner and Verdinelli, 1995, section 4) by the draws themselves.

    Args:
      sources: S.
      swept: [n, S] the runs' shares.
      weights: [D] of the losses in the objective.
      noise: [D] the standard deviation of a run.
      seeds: of each mixture.
      curves_at: mixtures [m, S] -> possible losses [D, B, m], the same curves at each call.
    """
    dice = np.random.default_rng(seed)
    space = mixtures(swept)
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
    sides = 2 if sources == 2 else sources  # of the summed variance, to that of one share
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
