"""How long the rest of a study takes: from how fast its runs went, what is to do, and the workers at hand."""

from collections.abc import Sequence
from typing import NamedTuple


class Pace:
    """How fast runs went, and so how long others will take."""

    def __init__(self) -> None:
        self._flops = self._seconds = 0.0
        self._evaluations: list[float] = []

    def trained(self, flops: float, seconds: float) -> None:
        self._flops, self._seconds = self._flops + flops, self._seconds + seconds

    def evaluated(self, seconds: float) -> None:
        self._evaluations.append(seconds)

    def seconds(self, flops: float, evaluations: int) -> float | None:
        """Of training with so many FLOPs and as many evaluations; None while it cannot be known."""
        if (flops and not self._flops) or (evaluations and not self._evaluations):
            return None
        return flops * self._seconds / (self._flops or 1.0) + evaluations * sum(self._evaluations) / max(
            1, len(self._evaluations))


class ToDo(NamedTuple):
    """A run that is not done, and what is left of it."""

    name: str
    parent: str | None
    seconds: float | None


def seconds_left(to_do: Sequence[ToDo], workers: int) -> float | None:
    """Seconds until the last of these runs ends, parents first; None where that of one of them cannot be known.

    Whoever is free first takes the first run whose parent is done: of each run, in their order, the end is told by
    those of its parent and of the worker that is free first.
    """
    free, ends = [0.0] * max(1, workers), dict[str, float]()
    for run in to_do:
        if run.seconds is None:
            return None
        first = free.index(min(free))
        free[first] = ends[run.name] = max(free[first], ends.get(run.parent or "", 0.0)) + run.seconds
    return max(ends.values(), default=0.0)
