"""The share of code as a function of the position in training.

A position is the global number of a row, counted from 0 over the whole run. All rows are full, so a share of rows is
a share of tokens. Shares are exact rationals, linear between the starts of pieces, and their integral is an integer
quota in closed form: whatever the length of the run, a quota never drifts from the share asked for by more than half
a row.

Source of the idea: floor of the integral of a rate is the two-candidate case of the chairman assignment problem
(Tijdeman, 1980).
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

POOLS = ("text", "code")
# Shares become fractions with at most this denominator, so that 0.3333333333 means 1/3 and products with positions stay
# within int64 for runs of up to 4.6e12 rows.
LARGEST_DENOMINATOR = 1_000_000
# A cosine is this many straight pieces. Straight lines between n + 1 points of a function f leave at most
# |f''| / (8 n^2) (here pi^2 / (16 n^2) = 9.4e-6 of the way between the two shares, and 0.5e-6 of rounding the points),
# and |f'| / (12 n^2) of its integral (pi / (24 n^2) = 2.0e-6 of the phase's rows, and 0.5e-6).
COSINE_PIECES = 256

HALF = Fraction(1, 2)
# An example of each kind of phase in MIX_PHASES, and its effect.
FORMS = {
    "'5:3'": "Five tokens of text for three of code, throughout the phase.",
    "'5:5 to 7:3'": "From one ratio to the other linearly, row by row.",
    "'5:5 to 7:3 cosine'": "From one ratio to the other along half a cosine.",
    "{'text.a': 3, 'code.b': 1}": "Sources by weight; those not named have none.",
}
_FORMS = (f"text:code ratios such as {[*FORMS][0]}, ramps such as {[*FORMS][1]} or {[*FORMS][2]}, or tables such as "
          f"{[*FORMS][3]}")

Table = tuple[tuple[str, Fraction], ...]  # sources by name and their shares of all rows, which sum to 1
Phase = str | Mapping[str, float]


class _Parabola(NamedTuple):
    """Over a piece, d rows after `first`, half a row and the integral: (c[0] + c[1] d + c[2] d^2) / denominator."""

    first: int  # the first whole row of the piece
    coefficients: tuple[int, int, int]
    denominator: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A piecewise linear share of code.

    Attributes:
      starts: the row at which each piece begins, rising from 0. (Only `order` makes schedules with fractional starts,
        which are functions of the number of rows drawn, not of the position; everything below applies to them too.)
      shares: of code, at the start of each piece.
      ends: of code, at the end of each piece; by default those at the start. The last piece is constant, without end.
      tables: for each piece the shares of all sources, or None where it gives only the share of code.
      carried: rows of code, at most half of one, asked for before row 0 but not drawn; negative if drawn but not asked
        for.
    """

    starts: tuple[int, ...]
    shares: tuple[Fraction, ...]
    ends: tuple[Fraction, ...] = ()
    tables: tuple[Table | None, ...] = ()
    carried: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", self.ends or self.shares)
        object.__setattr__(self, "tables", self.tables or (None,) * len(self.starts))
        if not len(self.starts) == len(self.shares) == len(self.ends) == len(self.tables):
            raise ValueError(f"A schedule needs one share for each start, found {len(self.starts)} starts, "
                             f"{len(self.shares)} shares, {len(self.ends)} ends, {len(self.tables)} tables.")
        if self.starts[0] != 0 or self.ends[-1] != self.shares[-1]:
            raise ValueError("A schedule starts at row 0 and ends with a constant share, found a start at "
                             f"{self.starts[0]} and a last piece from {self.shares[-1]} to {self.ends[-1]}.")

    def quota(self, positions: np.ndarray) -> np.ndarray:
        """The number of code rows among the first `positions`: the integral of the share plus `carried`, rounded half
        up.

        Args:
          positions: int64 array of numbers of rows, each at least 0.

        Returns:
          int64 array of the same shape. Rising by 0 or 1 from each position to the next.
        """
        positions = np.asarray(positions, dtype=np.int64)
        piece = np.searchsorted(self._firsts, positions, side="right") - 1
        quotas = np.zeros_like(positions)
        for k in np.unique(piece):
            inside = piece == k
            quotas[inside] = _floor(self._parabolas[k], positions[inside])
        return quotas

    def asked(self, position: int) -> Fraction:
        """The exact number of code rows asked for in the first `position` rows: the integral, not rounded."""
        k = bisect.bisect_right(self.starts, position) - 1
        inside = position - self.starts[k]
        return self._before[k] + inside * self.shares[k] + inside * inside * self._slope(k) / 2

    def share_at(self, position: int | Fraction) -> Fraction:
        """The exact share of code asked for at the beginning of row `position`."""
        k = bisect.bisect_right(self.starts, position) - 1
        return self.shares[k] + (position - self.starts[k]) * self._slope(k)

    def quota_of(self, position: int) -> int:
        """The result of `quota` for one number of rows."""
        return math.floor(self.asked(position) + self.carried + HALF)

    def after(self, row: Fraction, carried: Fraction) -> "Schedule":
        """The schedule from a row on, which is its row 0; `carried` as above."""
        first = bisect.bisect_right(self.starts, row) - 1
        return Schedule(
            (0, *(start - row for start in self.starts[first + 1 :])),  # type: ignore[arg-type]
            (self.share_at(row), *self.shares[first + 1 :]), self.ends[first:], self.tables[first:], carried)

    @functools.cached_property
    def phase_starts(self) -> list[int]:
        """The row at which each phase begins; pieces through which the share rises or falls without a jump, such as
        those of a cosine, form one phase.
        """
        change = [end - share for share, end in zip(self.shares, self.ends, strict=True)]
        return [int(start) for k, start in enumerate(self.starts)
                if k == 0 or self.shares[k] != self.ends[k - 1] or change[k] * change[k - 1] <= 0]

    def _slope(self, k: int) -> Fraction:
        """The change of the share from row to row of piece k."""
        if self.ends[k] == self.shares[k]:
            return Fraction(0)
        return (self.ends[k] - self.shares[k]) / (self.starts[k + 1] - self.starts[k])

    @functools.cached_property
    def _before(self) -> list[Fraction]:
        """The integral up to the start of each piece."""
        before = [Fraction(0)]
        for k in range(len(self.starts) - 1):
            before.append(before[-1] + (self.starts[k + 1] - self.starts[k]) * (self.shares[k] + self.ends[k]) / 2)
        return before

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.array([math.ceil(start) for start in self.starts], dtype=np.int64)

    @functools.cached_property
    def _parabolas(self) -> list[_Parabola]:
        parabolas = []
        for k, first in enumerate(self._firsts.tolist()):
            late, slope = first - self.starts[k], self._slope(k)
            terms = (HALF + self.carried + self._before[k] + late * self.shares[k] + late * late * slope / 2,
                     self.shares[k] + late * slope, slope / 2)
            denominator = math.lcm(*(term.denominator for term in terms))
            c0, c1, c2 = (term.numerator * (denominator // term.denominator) for term in terms)
            parabolas.append(_Parabola(first, (c0, c1, c2), denominator))
        return parabolas


def _floor(parabola: _Parabola, positions: np.ndarray) -> np.ndarray:
    """The values of a parabola (above 0, below 2**63) at `positions`, which lie in its piece, rounded down."""
    (c0, c1, c2), denominator = parabola.coefficients, parabola.denominator
    # Expanded about the first of the positions, in Python's integers: those of a batch lie close together, so that
    # what remains fits int64 even where squares of positions are far beyond it.
    first = int(positions.min())
    by = first - parabola.first
    whole, c0 = divmod(c0 + c1 * by + c2 * by * by, denominator)
    c1 += 2 * c2 * by
    offsets = positions - first
    reach = max(1, int(offsets.max()))
    if max(denominator, c0 + abs(c1) * reach + abs(c2) * reach * reach) >= 2**63:
        offsets = offsets.astype(object)  # Python's integers: slower, never overflow
    values = offsets * c1 + c0 if c2 == 0 else (offsets * c2 + c1) * offsets + c0
    return values // denominator + whole


def to_share(value: float | Fraction, name: str) -> Fraction:
    """A share as an exact fraction in 0..1. Raises ValueError, naming `name`, for anything else."""
    try:
        share = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number between 0 and 1, found {value!r}.") from None
    if share in (0, 1) and Fraction(value) != share:
        raise ValueError(f"{name} = {value} is within {1 / LARGEST_DENOMINATOR} of {share}: set it to {share}.0.")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie between 0 (text only) and 1 (code only), found {value}.")
    return share


def constant(share: float | Fraction) -> Schedule:
    """The same share of code from the first row to the last."""
    return Schedule(starts=(0,), shares=(to_share(share, "CODE_RATE"),))


class _Piece(NamedTuple):
    start: int
    share: Fraction
    end: Fraction
    table: Table | None = None


def phases(ratios: Sequence[Phase] | Mapping[float, Phase], rows: int, batch_size: int = 1) -> Schedule:
    """The schedule for a value of MIX_PHASES.

    Args:
      ratios: a list of phases that take equal parts of training, such as the paper's ["5:5", "6:4", "7:3", "7:3"]
        (phase k of n starts at row k * rows // n), or phases by their starts, such as {0: "7:3", 0.9: "7:3 to 0:1"}:
        a float or Fraction below 1 is a part of training, a whole number is a training step. A phase is
          "7:3"                        text:code;
          "5:5 to 7:3"                 the share of code changes from row to row, in a straight line from the phase's
                                       start to its end;
          "5:5 to 7:3 cosine"          the same along half a cosine (see COSINE_PIECES);
          {"text.a": 3, "code.b": 1}   sources of the mixture by weight; those not named have none.
        The share at the end of the last phase applies to any rows beyond the run.
      rows: rows of the whole run.
      batch_size: rows of a training step.

    Raises:
      ValueError: in one line that begins with MIX_PHASES.
    """
    starts, listed = _split(ratios, rows, batch_size)
    pieces: list[_Piece] = []
    for start, end, phase in zip(starts, [*starts[1:], rows], listed, strict=True):
        pieces += [_table(phase, start)] if isinstance(phase, Mapping) else _ramp(phase, start, end)
    if pieces[-1].share != pieces[-1].end:
        pieces.append(_Piece(rows, pieces[-1].end, pieces[-1].end))
    return Schedule(tuple(piece.start for piece in pieces), tuple(piece.share for piece in pieces),
                    tuple(piece.end for piece in pieces), tuple(piece.table for piece in pieces))


def _split(ratios: Any, rows: int, batch_size: int) -> tuple[list[int], list[Phase]]:
    """The first row of each phase, and the phases."""
    if isinstance(ratios, Mapping):
        if any(isinstance(key, str) for key in ratios):
            if not all(isinstance(key, str) and key.startswith(POOLS) for key in ratios):
                raise ValueError("MIX_PHASES must have starts that are numbers without quotes, such as 0.5, found "
                                 f"{', '.join(repr(key) for key in ratios)}.")
            raise ValueError("MIX_PHASES maps starts to phases; put a table for the whole training into a "
                             f"list: [{dict(ratios)}].")
        starts = [_start(key, rows, batch_size) for key in ratios]
        for first, second, row, following in zip(ratios, list(ratios)[1:], starts, starts[1:], strict=False):
            if following <= row:
                raise ValueError(f"MIX_PHASES needs starts that increase by at least one row, found {second} (row "
                                 f"{following}) after {first} (row {row}).")
        if starts and starts[0] != 0:
            raise ValueError(f"MIX_PHASES must start at 0, found {next(iter(ratios))} first: add 0 and a phase.")
        listed = list(ratios.values())
    elif isinstance(ratios, Sequence) and not isinstance(ratios, str):
        listed = list(ratios)
        starts = [k * rows // len(listed) for k in range(len(listed))]
    else:
        raise ValueError("MIX_PHASES must be a list of phases such as ['5:5', '7:3'], or phases by their starts such "
                         f"as {{0: '7:3', 0.9: '7:3 to 0:1'}}, found {ratios!r}.")
    if not listed:
        raise ValueError("MIX_PHASES is empty: list a phase such as '5:3', or set it to None to use CODE_RATE.")
    if rows < len(listed):
        raise ValueError(f"MIX_PHASES needs at least one row for each phase, found {len(listed)} phases, {rows} rows.")
    return starts, listed


def _start(key: Any, rows: int, batch_size: int) -> int:
    """The row for a start in MIX_PHASES."""
    if isinstance(key, bool) or not isinstance(key, int | float | Fraction) or not 0 <= key < math.inf:
        raise ValueError("MIX_PHASES must have starts that are fractions of training from 0 to below 1 (such as 0.5) "
                         f"or training steps (such as 500), found {key!r}.")
    if isinstance(key, int):
        if key * batch_size >= rows:
            raise ValueError(f"MIX_PHASES has a phase that starts at step {key}, but training ends with step "
                             f"{-(-rows // batch_size)}.")
        return key * batch_size
    part = Fraction(key).limit_denominator(LARGEST_DENOMINATOR)
    if part >= 1:
        raise ValueError(f"MIX_PHASES has a phase that starts at {key}: write fractions of training below 1.0 "
                         "and training steps as whole numbers.")
    return part.numerator * rows // part.denominator


def _ratio(text: str, phase: Any) -> Fraction:
    """The share of code in "text:code"."""
    try:
        prose, code = (Fraction(part) for part in text.split(":"))
    except (ValueError, ZeroDivisionError):
        prose = code = Fraction(0)
    if prose < 0 or code < 0 or prose + code == 0:
        raise ValueError(f"MIX_PHASES must list {_FORMS}, found {phase!r}.")
    return to_share(code / (prose + code), "MIX_PHASES")


def _ramp(phase: Any, start: int, end: int) -> list[_Piece]:
    """The pieces of a phase given as a string."""
    if not isinstance(phase, str):
        raise ValueError(f"MIX_PHASES must list {_FORMS}, found {phase!r}.")
    first, arrow, second = (part.strip() for part in phase.partition(" to "))
    share = _ratio(first, phase)
    last = _ratio(second.removesuffix(" cosine"), phase) if arrow else share
    if share == last:
        return [_Piece(start, share, share)]
    if not second.endswith(" cosine"):
        return [_Piece(start, share, last)]
    length = end - start
    count = min(COSINE_PIECES, length)
    offsets = [k * length // count for k in range(count + 1)]
    # Rounded to rationals, which also makes them independent of the math library.
    ways = [Fraction(round((1 - math.cos(math.pi * offset / length)) / 2 * LARGEST_DENOMINATOR), LARGEST_DENOMINATOR)
            for offset in offsets]
    shares = [share + (last - share) * way for way in ways]
    return [_Piece(start + offsets[k], shares[k], shares[k + 1]) for k in range(count)]


def _table(phase: Mapping[Any, Any], start: int) -> _Piece:
    """The piece of a phase that weighs sources."""
    weights: dict[str, Fraction] = {}
    for name, value in phase.items():
        if not isinstance(name, str) or not name.startswith(tuple(f"{pool}." for pool in POOLS)):
            raise ValueError(f"MIX_PHASES has a table with {name!r}; sources are named text.NAME or code.NAME.")
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction) or not 0 <= value < math.inf:
            raise ValueError(f"MIX_PHASES must give {name} a weight of at least 0, found {value!r}.")
        weights[name] = Fraction(value).limit_denominator(LARGEST_DENOMINATOR)
        if weights[name] == 0 != value:
            raise ValueError(f"MIX_PHASES gives {name} the weight {value}, below {1 / LARGEST_DENOMINATOR}: multiply "
                             "the weights of its table.")
    total = sum(weights.values(), Fraction(0))
    if total == 0:
        raise ValueError(f"MIX_PHASES has a table in which no source has a weight: {dict(phase)}.")
    table = tuple((name, weights[name] / total) for name in sorted(weights))
    code = sum((share for name, share in table if name.startswith("code.")), Fraction(0))
    return _Piece(start, code, code, table)
