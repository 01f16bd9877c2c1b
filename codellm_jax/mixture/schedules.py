"""The share of code as a function of the position in training.

A position is the global number of a row, counted from 0 over the whole run. All rows are full, so a share of rows is
a share of tokens. Shares are exact rationals and their integral is an integer quota in closed form: whatever the
length of the run, a quota never drifts from the share asked for by more than half a row.

Source of the idea: floor of the integral of a rate is the two-candidate case of the chairman assignment problem
(Tijdeman, 1980).
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Shares become fractions with denominators up to this one, so that 0.3333333333 means 1/3 and products with
# positions stay within int64 for runs of up to 4.6e12 rows.
LARGEST_DENOMINATOR = 1_000_000


class Schedule(NamedTuple):
    """A piecewise constant share of code: `shares[k]` holds from row `starts[k]` to `starts[k + 1]`."""

    starts: tuple[int, ...]
    shares: tuple[Fraction, ...]

    def quota(self, positions: np.ndarray) -> np.ndarray:
        """How many of the first `positions` rows are code: the integral of the share, rounded half up.

        Args:
          positions: int64 array of numbers of rows, each at least 0.

        Returns:
          int64 array of the same shape. Rising by 0 or 1 from each position to the next.
        """
        positions = np.asarray(positions, dtype=np.int64)
        piece = np.searchsorted(np.asarray(self.starts, dtype=np.int64), positions, side="right") - 1
        quotas = np.zeros_like(positions)
        before = Fraction(1, 2)  # the integral up to the piece's start, and the half of rounding
        for k, (start, share) in enumerate(zip(self.starts, self.shares, strict=True)):
            inside = piece == k
            if inside.any():
                offsets = positions[inside] - start
                denominator = before.denominator * share.denominator
                step, carry = share.numerator * before.denominator, before.numerator * share.denominator
                if max(int(offsets.max()) * step + carry, step, denominator) >= 2**63:
                    offsets = offsets.astype(object)  # Python's integers: slower, never overflow
                quotas[inside] = (offsets * step + carry) // denominator
            if k + 1 < len(self.starts):
                before += (self.starts[k + 1] - start) * share
        return quotas

    def asked(self, position: int) -> Fraction:
        """The exact number of code rows asked for in the first `position` rows: the integral, not rounded."""
        total = Fraction(0)
        for k, (start, share) in enumerate(zip(self.starts, self.shares, strict=True)):
            end = self.starts[k + 1] if k + 1 < len(self.starts) else position
            total += max(0, min(end, position) - start) * share
        return total


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


def phases(ratios: Sequence[str], rows: int) -> Schedule:
    """Equal parts of training, each with its own ratio (the paper's Table 5).

    Args:
      ratios: "text:code" for each phase, such as ["5:5", "6:4", "7:3", "7:3"].
      rows: rows of the whole run; phase k of n starts at row k * rows // n.
    """
    shares = []
    for ratio in ratios:
        try:
            text, code = (Fraction(part) for part in ratio.split(":"))
        except (AttributeError, ValueError, ZeroDivisionError):
            text = code = Fraction(0)
        if text < 0 or code < 0 or text + code == 0:
            raise ValueError(f"MIX_PHASES must list text:code ratios such as '5:3', found {ratio!r}.")
        shares.append(to_share(code / (text + code), "MIX_PHASES"))
    if not shares or rows < len(shares):
        raise ValueError(f"MIX_PHASES needs a row or more for each phase, found {len(shares)} phases, {rows} rows.")
    return Schedule(tuple(k * rows // len(shares) for k in range(len(shares))), tuple(shares))
