"""(seed, position) -> (source, epoch, row), in closed form.

Which row stands at global position i is a pure function: there is no iterator to save and nothing to replay. A resume
needs the position alone, any number of hosts sees the same global batches, and a run of 10^9 rows can be examined
anywhere without reading a row.

  pool    the schedule's quota decides whether position i is text or code, and how many of its pool came before;
  source  within a pool the sources stand at the leaves of a binary tree; at every node the same rounded quota, of a
          constant share, sends a row left or right;
  row     the k-th row drawn from a source of n rows is row permutation(k mod n) of epoch k // n, under a permutation
          keyed by seed, source and epoch.

Counts of the two pools stay within half a row of what was asked at every position, so a batch is within one row.
Of three and more sources, each node adds half a row at most to its share of its parent's deviation.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from codellm_jax.mixture.schedules import Schedule

# Raise it whenever draw() gives other rows for the same arguments: checkpoints of another version are refused.
ORDER_VERSION = 1
POOLS = ("text", "code")
FEISTEL_ROUNDS = 12  # with 6, pairs of the smallest sources were some per cent off uniform


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of rows. Its pool is what stands before the first dot of its name."""

    name: str
    rows: int  # in one epoch
    weight: Fraction = Fraction(1)  # relative to the other sources of its pool
    content_hash: str = ""

    @property
    def pool(self) -> str:
        return self.name.split(".")[0]


class Draw(NamedTuple):
    """What stands at some positions; three int64 arrays of one shape."""

    source: np.ndarray  # index into Order.sources
    epoch: np.ndarray  # from 0
    row: np.ndarray  # within the source


class _Node(NamedTuple):
    """A split of the rows that reach it: by `schedule`, row number m goes right (1) or left (0)."""

    schedule: Schedule
    left: "_Node | int"
    right: "_Node | int"


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which the rows of `sources` are trained on.

    Raises:
      ValueError: a pool is asked for but has no source, a source has no row, or a weight is not positive.
    """

    seed: int
    schedule: Schedule
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.pool not in POOLS:
                raise ValueError(f"Source {source.name!r} belongs to no pool: name it text.NAME or code.NAME.")
            if source.rows < 1:
                raise ValueError(f"Source {source.name} has no row to train on.")
            if source.weight <= 0:
                raise ValueError(f"Source {source.name} has weight {source.weight}; weights must be positive.")
        pools = {source.pool for source in self.sources}
        if "code" not in pools and any(share > 0 for share in self.schedule.shares):
            raise ValueError("The mixture has no code source: set CODE_RATE = 0.0 or add one named code.NAME.")
        if "text" not in pools and any(share < 1 for share in self.schedule.shares):
            raise ValueError("The mixture has no text source: set CODE_RATE = 1.0 or add one named text.NAME.")

    @functools.cached_property
    def _root(self) -> "_Node | int":
        trees = []
        for pool in POOLS:
            members = [k for k, source in enumerate(self.sources) if source.pool == pool]
            trees.append(_balanced_tree(members, self.sources) if members else None)
        text, code = trees
        if text is None or code is None:
            return code if text is None else text  # type: ignore[return-value]
        return _Node(self.schedule, text, code)

    def draw(self, positions: np.ndarray) -> Draw:
        """The source, epoch and row at each of `positions` (int64 [N])."""
        positions = np.asarray(positions, dtype=np.int64)
        source = np.zeros(positions.shape, dtype=np.int64)
        ordinal = np.zeros(positions.shape, dtype=np.int64)  # rows drawn from that source before
        self._descend(self._root, np.arange(len(positions)), positions, source, ordinal)
        sizes = np.array([s.rows for s in self.sources], dtype=np.int64)[source]
        epoch, within = ordinal // sizes, ordinal % sizes
        row = np.empty_like(within)
        for index in np.unique(source):
            here = source == index
            epochs, inverse = np.unique(epoch[here], return_inverse=True)
            keys = [permutation_key(self.seed, self.sources[index].name, int(e)) for e in epochs]
            row[here] = permutation(within[here], self.sources[index].rows, np.array(keys, dtype=np.uint64)[inverse])
        return Draw(source, epoch, row)

    def _descend(self, node: "_Node | int", where: np.ndarray, ordinals: np.ndarray, source: np.ndarray,
                 ordinal: np.ndarray) -> None:
        if not isinstance(node, _Node):
            source[where], ordinal[where] = node, ordinals
            return
        quota = node.schedule.quota(ordinals)
        right = node.schedule.quota(ordinals + 1) > quota
        self._descend(node.left, where[~right], (ordinals - quota)[~right], source, ordinal)
        self._descend(node.right, where[right], quota[right], source, ordinal)

    def counts(self, position: int) -> np.ndarray:
        """Rows drawn from each source in the first `position` rows: int64 [sources]."""
        counts = np.zeros(len(self.sources), dtype=np.int64)

        def descend(node: "_Node | int", rows: int) -> None:
            if not isinstance(node, _Node):
                counts[node] = rows
                return
            quota = int(node.schedule.quota(np.array([rows]))[0])
            descend(node.left, rows - quota)
            descend(node.right, quota)

        descend(self._root, position)
        return counts

    def asked(self, position: int) -> list[Fraction]:
        """The exact numbers of rows asked of each source in the first `position` rows, not rounded."""
        code = self.schedule.asked(position)
        pools = {source.pool for source in self.sources}
        in_pool = {"code": code if "text" in pools else Fraction(position), "text": position - code}
        weights = {pool: sum(s.weight for s in self.sources if s.pool == pool) for pool in pools}
        return [in_pool[s.pool] * s.weight / weights[s.pool] for s in self.sources]

    def exhausted_at(self, max_epochs: int, rows: int) -> tuple[int, Source] | None:
        """The first position below `rows` that would begin epoch `max_epochs` (from 0) of a source, and that source."""
        first: tuple[int, Source] | None = None
        for index, source in enumerate(self.sources):
            limit = max_epochs * source.rows
            low, high = 0, rows  # counts(low) <= limit; bisect for the first position after which more were drawn
            if self.counts(rows)[index] <= limit:
                continue
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.counts(middle)[index] <= limit else (low, middle)
            if first is None or low < first[0]:
                first = (low, source)
        return first

    def fingerprint(self) -> str:
        """A hash of everything the order depends on, and of a sample of what it draws.

        Two orders of equal fingerprint draw the same rows with the same content. The sample guards against a change
        of the code that forgot to raise ORDER_VERSION.
        """
        definition = {
            "version": ORDER_VERSION, "seed": self.seed, "starts": self.schedule.starts,
            "shares": [str(share) for share in self.schedule.shares],
            "sources": [[s.name, s.rows, str(s.weight), s.content_hash] for s in self.sources],
        }
        positions = np.concatenate([np.arange(512), np.logspace(3, 9, 512).astype(np.int64)])
        digest = hashlib.sha256(json.dumps(definition).encode())
        digest.update(np.stack(self.draw(positions)).astype("<i8").tobytes())
        return digest.hexdigest()


def _balanced_tree(members: Sequence[int], sources: Sequence[Source]) -> "_Node | int":
    """A binary tree whose nodes halve the weight as evenly as taking the heaviest first allows."""
    if len(members) == 1:
        return members[0]
    halves: tuple[list[int], list[int]] = ([], [])
    weights = [Fraction(0), Fraction(0)]
    for member in sorted(members, key=lambda k: (-sources[k].weight, sources[k].name)):
        lighter = 0 if weights[0] <= weights[1] else 1
        halves[lighter].append(member)
        weights[lighter] += sources[member].weight
    share = weights[1] / (weights[0] + weights[1])
    # Exact, where constant() would round to a denominator and so drift, or lose a small source altogether.
    return _Node(Schedule((0,), (share,)), _balanced_tree(halves[0], sources), _balanced_tree(halves[1], sources))


def permutation_key(seed: int, source: str, epoch: int) -> int:
    """64 bits that depend on all three, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=8).digest(), "little")


def permutation(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0..size-1, evaluated at `index` (int64 [N]) under `keys` (uint64 [N]) without a table.

    A Feistel network over the smallest even number of bits that holds `size`, walking along its cycle until the
    value falls below `size` (Black and Rogaway, 2002, "cycle walking"): four passes at most on average.
    """
    half = np.uint64(-(-max(2, (size - 1).bit_length()) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & mask
        for k in range(FEISTEL_ROUNDS):
            round_key = keys[outside] + np.uint64(k)
            left, right = right, left ^ (_mix(right ^ _mix(round_key)) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on uint64, wrapping."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
