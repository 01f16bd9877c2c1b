"""The time that the rest of a study takes, from the speed of its runs, the remaining work, and the available workers.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Pace:
    """The speed of past runs, and the time of future ones derived from it."""

    def __init__(self) -> None:
        self._flops = self._seconds = 0.0
        self._evaluations: list[float] = []

    def trained(self, flops: float, seconds: float) -> None:
        self._flops, self._seconds = self._flops + flops, self._seconds + seconds

    def evaluated(self, seconds: float) -> None:
        self._evaluations.append(seconds)

    def seconds(self, flops: float, evaluations: int) -> float | None:
        """The seconds that training with this many FLOPs and evaluations takes; None while that is unknown."""
        if (flops and not self._flops) or (evaluations and not self._evaluations):
            return None
        return flops * self._seconds / (self._flops or 1.0) + evaluations * sum(self._evaluations) / max(
            1, len(self._evaluations))


class ToDo(NamedTuple):
    """A run that is not done, and its remaining work."""

    name: str
    parent: str | None
    seconds: float | None


def seconds_left(to_do: Sequence[ToDo], workers: int) -> float | None:
    """The seconds until the last of these runs ends, parents first; None if that of one of them is unknown.

    The worker that is free first takes the first run whose parent is done: the end of each run, in order, follows from
    the end of its parent and from the worker that is free first.
    """
    free, ends = [0.0] * max(1, workers), dict[str, float]()
    for run in to_do:
        if run.seconds is None:
            return None
        first = free.index(min(free))
        free[first] = ends[run.name] = max(free[first], ends.get(run.parent or "", 0.0)) + run.seconds
    return max(ends.values(), default=0.0)
