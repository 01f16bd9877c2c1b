"""(seed, position) -> (source, epoch, row), in closed form.

The row at global position i is a pure function: there is no iterator to save and nothing to replay. A resume needs only
the position, any number of hosts sees the same global batches, and a run of 10^9 rows can be examined anywhere without
reading a row.

  pool    the schedule's quota decides whether position i is text or code, and how many rows of its pool precede it;
  source  within a pool the sources are the leaves of a binary tree; at every node the same rounded quota sends a
          row left or right, with a share that is constant except where tables of the schedule change it;
  row     the k-th row drawn from a source of n rows is row permutation(k mod n) of epoch k // n, under a permutation
          keyed by seed, source and epoch.

A branch continues another order, that of its trunk, from a position. For every source that both have, it reads on where
the trunk stopped, in the same epoch under the same permutation, and each node of the tree carries over its rounding
remainder. An order that branches from itself is therefore identical to itself, and it too is a closed form: of the
seed, of the trunk's draws up to the branch, and of the position.

Counts of the two pools stay within half a row of the requested share at every position, so a batch is within one row.
With three or more sources, each node adds at most half a row to its share of its parent's deviation: a source with d
nodes above it stays within d / 2 rows at every position. It may start or end by as many rows early or late where a
table changes its weight from or to zero; without weight in any phase it is never drawn.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.mixture.schedules import POOLS, Schedule

# Increase this whenever draw() gives other rows for the same arguments: checkpoints of another version are refused.
ORDER_VERSION = 1
FEISTEL_ROUNDS = 12  # with 6, pairs of the smallest sources were some per cent off uniform


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of rows. Its pool is the part of its name before the first dot."""

    name: str
    rows: int  # in one epoch
    weight: Fraction = Fraction(1)  # relative to the other sources of its pool
    content_hash: str = ""

    @property
    def pool(self) -> str:
        return self.name.split(".")[0]


@dataclasses.dataclass(frozen=True)
class Branch:
    """The state that an order inherits from its trunk's order.

    Attributes:
      position: rows that the trunk and its own trunks had drawn in all; positions continue from there.
      drawn: by source name, (content hash, rows drawn so far, from its first epoch on).
      owed: for each node of the tree by name, (rows that reached it minus rows asked of it; rows asked of its right
        side but not drawn), as exact fractions.
    """

    position: int
    drawn: Mapping[str, tuple[str, int]]
    owed: Mapping[str, tuple[Fraction, Fraction]]

    def to_json(self) -> dict[str, Any]:
        return {"position": self.position, "drawn": {name: list(value) for name, value in self.drawn.items()},
                "owed": {name: [str(part) for part in value] for name, value in self.owed.items()}}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Branch":
        owed = {name: (Fraction(reached), Fraction(right)) for name, (reached, right) in saved["owed"].items()}
        return cls(saved["position"], {name: (hash_, count) for name, (hash_, count) in saved["drawn"].items()}, owed)


class Draw(NamedTuple):
    """The draws at some positions; three int64 arrays of one shape."""

    source: np.ndarray  # index into Order.sources
    epoch: np.ndarray  # from 0
    row: np.ndarray  # within the source


class _Segment(NamedTuple):
    """From row `start` of the run on, the relative weights of the sources of each pool are constant."""

    start: int
    weights: tuple[Fraction, ...]  # of each source
    asked: tuple[Fraction, ...]  # rows of each source up to `start`


class _Node(NamedTuple):
    """A split of the rows that reach it: by `schedule`, row number m goes right (1) or left (0)."""

    schedule: Schedule
    left: "_Node | int"
    right: "_Node | int"
    name: str  # equal for the nodes of a branch and its trunk that split the same sources
    begin: Fraction  # rows that reached it before row 0


@dataclasses.dataclass(frozen=True)
class Order:
    """The order in which the rows of `sources` are trained on.

    Positions count over the whole run. An order that branches from another begins at its position, and counts only its
    own draws.

    Raises:
      ValueError: a pool is asked for but has no source, a source has no row, a weight is not positive, or a table of
        the schedule names an unknown source.
    """

    seed: int
    schedule: Schedule  # over all positions, including those before a branch
    sources: tuple[Source, ...]
    branch: Branch | None = None

    @property
    def begin(self) -> int:
        """The first position."""
        return self.branch.position if self.branch else 0

    @property
    def phase_starts(self) -> list[int]:
        """The position at which each phase of the schedule begins in this order."""
        later = [start for start in self.schedule.phase_starts if start > self.begin]
        return [self.begin, *later]

    @functools.cached_property
    def drawn_before(self) -> np.ndarray:
        """Rows of each source drawn before the first position: int64 [sources]; 0 for a source that the trunk lacks or
        has with other content.
        """
        drawn = self.branch.drawn if self.branch else {}
        return np.array([drawn[source.name][1] if drawn.get(source.name, ("", 0))[0] == source.content_hash
                         and source.name in drawn else 0 for source in self.sources], np.int64)

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.pool not in POOLS:
                raise ValueError(f"Source {source.name!r} belongs to no pool: name it text.NAME or code.NAME.")
            if source.rows < 1:
                raise ValueError(f"Source {source.name} has no row to train on.")
            if source.weight <= 0:
                raise ValueError(f"Source {source.name} has weight {source.weight}; weights must be positive.")
        names = [source.name for source in self.sources]
        for name in (name for table in self.schedule.tables if table for name, _ in table):
            if name not in names:
                near = difflib.get_close_matches(name, names, n=2, cutoff=0.4) or names
                raise ValueError(f"MIX_PHASES names {name}, which is not a source of the mixture; nearest: "
                                 f"{', '.join(near)}.")
        pools = {source.pool for source in self.sources}
        shares = self.schedule.shares + self.schedule.ends
        if "code" not in pools and any(share > 0 for share in shares):
            raise ValueError("The mixture has no code source: set CODE_RATE = 0.0 (with MIX_PHASES, use '1:0' there) "
                             "or add one named code.NAME.")
        if "text" not in pools and any(share < 1 for share in shares):
            raise ValueError("The mixture has no text source: set CODE_RATE = 1.0 (with MIX_PHASES, use '0:1' there) "
                             "or add one named text.NAME.")

    @functools.cached_property
    def _root(self) -> "_Node | int":
        trees = []
        for pool in POOLS:
            members = [k for k, source in enumerate(self.sources) if source.pool == pool]
            trees.append(self._balanced_tree(members) if members else None)
        text, code = trees
        if text is None or code is None:
            return code if text is None else text  # type: ignore[return-value]
        return self._node(self.schedule, text, code, "|".join(POOLS), Fraction(self.begin))

    def _node(self, schedule: Schedule, left: "_Node | int", right: "_Node | int", name: str, asked: Fraction) -> _Node:
        """A node of this order, given its schedule over all positions and the rows asked of it before the first."""
        if self.branch is None:
            return _Node(schedule, left, right, name, Fraction(0))
        reached, owed = self.branch.owed.get(name, (Fraction(0), Fraction(0)))
        begin = max(Fraction(0), asked + reached)
        return _Node(schedule.after(begin, owed), left, right, name, begin)

    def _balanced_tree(self, members: Sequence[int]) -> "_Node | int":
        """A binary tree whose nodes halve the weight as evenly as taking the heaviest first allows.

        Its shape follows the sources' own weights, not those of tables.
        """
        if len(members) == 1:
            return members[0]
        halves: tuple[list[int], list[int]] = ([], [])
        weights = [Fraction(0), Fraction(0)]
        for member in sorted(members, key=lambda k: (-self.sources[k].weight, self.sources[k].name)):
            lighter = 0 if weights[0] <= weights[1] else 1
            halves[lighter].append(member)
            weights[lighter] += self.sources[member].weight
        names = "|".join(",".join(sorted(self.sources[k].name for k in half)) for half in halves)
        return self._node(self._split(*halves), self._balanced_tree(halves[0]), self._balanced_tree(halves[1]), names,
                          self._asked_of(members, self.begin))

    def _asked_of(self, members: Sequence[int], position: int) -> Fraction:
        """Rows asked of some sources together in the first `position` rows of this schedule."""
        asked = self._asked(self._segment(position), position)
        return sum((asked[k] for k in members), Fraction(0))

    def _split(self, left: Sequence[int], right: Sequence[int]) -> Schedule:
        """The share of `right` as a function of the number of rows drawn from both.

        It changes at the exact number of rows asked of both up to each segment's start. The number drawn by then
        differs by the node's deviation, which therefore does not grow from segment to segment.
        """
        starts: list[Fraction] = []
        shares: list[Fraction] = []
        for segment in self._segments:
            weight = sum((segment.weights[k] for k in right), Fraction(0))
            both = weight + sum(segment.weights[k] for k in left)
            if not both or (shares and shares[-1] == weight / both):
                continue  # nothing asked of either, or no change
            start = sum((segment.asked[k] for k in (*left, *right)), Fraction(0))
            if starts and starts[-1] == start:  # no row asked of either in the previous segment
                del starts[-1], shares[-1]
            starts.append(start)
            # Exact: constant() would round to a denominator and so drift, or lose a small source altogether.
            shares.append(weight / both)
        if not starts:  # nothing asked, so the node is never reached
            return Schedule((0,), (Fraction(0),))
        return Schedule(tuple(starts), tuple(shares))  # type: ignore[arg-type]

    @functools.cached_property
    def _segments(self) -> list[_Segment]:
        """Runs of pieces of the schedule with the same weights: without a table, the sources' own."""
        segments = [_Segment(0, self._weights(0), (Fraction(0),) * len(self.sources))]
        for k, start in enumerate(self.schedule.starts):
            weights = self._weights(k)
            if weights != segments[-1].weights:
                segments.append(_Segment(start, weights, tuple(self._asked(segments[-1], start))))
        return segments

    def _weights(self, piece: int) -> tuple[Fraction, ...]:
        """The sources' weights in a piece of the schedule."""
        table = self.schedule.tables[piece]
        if table is None:
            return tuple(source.weight for source in self.sources)
        return tuple(dict(table).get(source.name, Fraction(0)) for source in self.sources)

    def _asked(self, segment: _Segment, position: int) -> list[Fraction]:
        """Rows asked of each source in the first `position` rows, which end within `segment`."""
        code = self.schedule.asked(position) - self.schedule.asked(segment.start)
        rows = {"code": code, "text": position - segment.start - code}
        totals = dict.fromkeys(POOLS, Fraction(0))
        for source, weight in zip(self.sources, segment.weights, strict=True):
            totals[source.pool] += weight
        # No row is asked of a pool without any weight in a segment.
        return [before + rows[source.pool] * weight / (totals[source.pool] or 1)
                for source, weight, before in zip(self.sources, segment.weights, segment.asked, strict=True)]

    def draw(self, positions: np.ndarray) -> Draw:
        """The source, epoch and row at each of `positions` (int64 [N])."""
        source, ordinal = self.locate(positions)
        sizes = np.array([s.rows for s in self.sources], dtype=np.int64)[source]
        epoch, within = ordinal // sizes, ordinal % sizes
        # All sources at once: with hundreds of them, a batch holds few rows of each.
        epochs, inverse = np.unique(epoch * len(self.sources) + source, return_inverse=True)
        keys = [permutation_key(self.seed, self.sources[pair % len(self.sources)].name, pair // len(self.sources))
                for pair in epochs.tolist()]
        row = permutation(within, sizes, np.array(keys, dtype=np.uint64)[inverse])
        return Draw(source, epoch, row)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each of `positions` (int64 [N]), and the number of rows drawn from it before, including the
        trunk's.
        """
        positions = np.asarray(positions, dtype=np.int64)
        source = np.zeros(positions.shape, dtype=np.int64)
        ordinal = np.zeros(positions.shape, dtype=np.int64)
        self._descend(self._root, np.arange(len(positions)), positions - self.begin, source, ordinal)
        return source, ordinal + self.drawn_before[source]

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
        """Rows drawn from each source up to a position: int64 [sources]."""
        counts = np.zeros(len(self.sources), dtype=np.int64)
        for node, rows in self._reached(position):
            if not isinstance(node, _Node):
                counts[node] = rows
        return counts

    def _reached(self, position: int) -> Iterator[tuple["_Node | int", int]]:
        """Each node and leaf with the number of rows that reach it up to a position, parents first."""
        waiting = [(self._root, position - self.begin)]
        while waiting:
            node, rows = waiting.pop()
            yield node, rows
            if isinstance(node, _Node):
                right = node.schedule.quota_of(rows)
                waiting += [(node.right, right), (node.left, rows - right)]

    def branch_at(self, position: int) -> Branch:
        """The state that an order inherits which branches from this one at a position."""
        owed: dict[str, tuple[Fraction, Fraction]] = {}
        for node, rows in self._reached(position):
            if isinstance(node, _Node):
                asked = Fraction(position) if node.name == "|".join(POOLS) else self._asked_of(
                    self._leaves(node), position)
                right = node.schedule.asked(rows) + node.schedule.carried - node.schedule.quota_of(rows)
                owed[node.name] = node.begin + rows - asked, right
        drawn = (self.drawn_before + self.counts(position)).tolist()
        before = dict(self.branch.drawn) if self.branch else {}  # so that sources that return later continue too
        return Branch(position, before | {source.name: (source.content_hash, count)
                                          for source, count in zip(self.sources, drawn, strict=True)}, owed)

    def _leaves(self, node: "_Node | int") -> list[int]:
        return [*self._leaves(node.left), *self._leaves(node.right)] if isinstance(node, _Node) else [node]

    def asked(self, position: int) -> list[Fraction]:
        """The exact numbers of rows asked of each source up to a position, not rounded."""
        before = self._asked(self._segment(self.begin), self.begin)
        asked = self._asked(self._segment(position), position)
        return [one - other for one, other in zip(asked, before, strict=True)]

    def _segment(self, position: int) -> _Segment:
        return [segment for segment in self._segments if segment.start <= position][-1]

    def exhausted_at(self, max_epochs: int, rows: int) -> tuple[int, Source] | None:
        """The first position below `rows` that would begin epoch `max_epochs` (from 0) of a source, and that source;
        the trunk's epochs count.
        """

        def beyond(position: int) -> list[Source]:
            """The sources of which more than `max_epochs` epochs are drawn up to a position."""
            own = self.counts(position)
            return [source for source, drawn, more in zip(
                self.sources, (self.drawn_before + own).tolist(), own.tolist(), strict=True)
                if more and drawn > max_epochs * source.rows]

        if not beyond(rows):
            return None
        low, high = self.begin, rows
        while high - low > 1:  # invariant: beyond(low) is empty, beyond(high) is not
            middle = (low + high) // 2
            low, high = (low, middle) if beyond(middle) else (middle, high)
        return low, beyond(high)[0]

    def fingerprint(self) -> str:
        """A hash of everything the order depends on, and of a sample of its draws.

        Two orders of equal fingerprint draw the same rows with the same content. The sample guards against a change
        of the code without an increase of ORDER_VERSION.
        """
        definition: dict[str, Any] = {
            "version": ORDER_VERSION, "seed": self.seed, "starts": self.schedule.starts,
            "shares": [str(share) for share in self.schedule.shares],
            "sources": [[s.name, s.rows, str(s.weight), s.content_hash] for s in self.sources],
        }
        # Only if present, so that the fingerprints of orders without them still match older checkpoints.
        if self.schedule.ends != self.schedule.shares:
            definition["ends"] = [str(share) for share in self.schedule.ends]
        if any(self.schedule.tables):
            definition["tables"] = [table and [[name, str(share)] for name, share in table if share]
                                    for table in self.schedule.tables]
        if self.branch:
            definition["branch"] = self.branch.to_json()
        positions = self.begin + np.concatenate([np.arange(512), np.logspace(3, 9, 512).astype(np.int64)])
        digest = hashlib.sha256(json.dumps(definition).encode())
        digest.update(np.stack(self.draw(positions)).astype("<i8").tobytes())
        return digest.hexdigest()


def permutation_key(seed: int, source: str, epoch: int) -> int:
    """64 bits that depend on all three, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=8).digest(), "little")


def permutation(index: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0..size-1, evaluated at `index` (int64 [N]) under `keys` (uint64 [N]) without a table;
    `size` is one for all or int64 [N].

    A Feistel network over the smallest even number of bits that holds `size`, walking along its cycle until the
    value falls below `size` (Black and Rogaway, 2002, "cycle walking"): four passes at most on average.
    """
    sizes, inverse = np.unique(np.broadcast_to(size, np.shape(index)), return_inverse=True)
    half = np.array([-(-max(2, (one - 1).bit_length()) // 2) for one in sizes.tolist()], dtype=np.uint64)[inverse]
    limit = sizes.astype(np.uint64)[inverse]
    values = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        shift, key = half[outside], keys[outside]
        mask = (np.uint64(1) << shift) - np.uint64(1)
        left, right = values[outside] >> shift, values[outside] & mask
        for k in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(k))) & mask)
        values[outside] = (left << shift) | right
        outside = outside[values[outside] >= limit[outside]]
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on uint64, wrapping."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
