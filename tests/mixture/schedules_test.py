"""Quotas against the integral, computed piece by piece with exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.mixture.schedules import Schedule, constant, phases

RATES = [0, 1, 0.5, 1 / 3, 0.001, 0.999, 0.1, 0.9, Fraction(5, 8), Fraction(1, 999_983), Fraction(999_978, 999_979)]
shares = st.one_of(st.sampled_from(RATES), st.floats(0, 1, allow_nan=False)).map(
    lambda value: Fraction(value).limit_denominator(1_000_000))


def integral(schedule: Schedule, position: int) -> Fraction:
    """Row by piece of rows, without any of the module's arithmetic."""
    total = Fraction(0)
    ends = [*schedule.starts[1:], None]
    for start, end, share in zip(schedule.starts, ends, schedule.shares, strict=True):
        last = position if end is None else min(end, position)
        if last > start:
            total += (last - start) * share
    return total


def rounded_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@st.composite
def schedules(draw) -> Schedule:
    gaps = draw(st.lists(st.one_of(st.integers(1, 20), st.integers(1, 10**11)), max_size=6))
    starts = [0]
    for gap in gaps:
        starts.append(starts[-1] + gap)
    return Schedule(tuple(starts), tuple(draw(st.lists(shares, min_size=len(starts), max_size=len(starts)))))


@settings(max_examples=200, deadline=None)
@given(schedule=schedules(), positions=st.lists(st.one_of(st.integers(0, 10**12), st.integers(0, 200)), min_size=1))
def test_quota_is_the_rounded_integral(schedule: Schedule, positions: list[int]):
    edges = [edge + by for edge in schedule.starts for by in (-1, 0, 1) if edge + by >= 0]
    positions = positions + edges
    quotas = schedule.quota(np.array(positions))
    assert quotas.dtype == np.int64
    assert quotas.tolist() == [rounded_half_up(integral(schedule, position)) for position in positions]
    for position in positions:
        assert schedule.asked(position) == integral(schedule, position)
        assert abs(int(schedule.quota(np.array([position]))[0]) - integral(schedule, position)) <= Fraction(1, 2)


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(), first=st.integers(0, 10**12))
def test_quota_steps_by_nothing_or_one(schedule: Schedule, first: int):
    for begin in (first, 0, *schedule.starts):
        begin = max(0, begin - 50)
        steps = np.diff(schedule.quota(np.arange(begin, begin + 101)))
        assert set(steps.tolist()) <= {0, 1}


@pytest.mark.parametrize("rate", RATES)
def test_a_constant_never_drifts(rate):
    schedule = constant(rate)
    exact = Fraction(rate).limit_denominator(1_000_000)
    assert schedule.shares == (exact,) and schedule.starts == (0,)
    positions = np.concatenate([np.arange(3000), np.logspace(4, 12, 200).astype(np.int64), [10**12, 4 * 10**12]])
    deviations = [abs(int(quota) - exact * int(position))
                  for quota, position in zip(schedule.quota(positions), positions, strict=True)]
    assert max(deviations) <= Fraction(1, 2)


def test_a_decimal_third_is_a_third():
    assert constant(0.333333333333).shares == (Fraction(1, 3),)
    assert constant(0.333333333333).quota(np.array([3 * 10**12])).tolist() == [10**12]


def test_beyond_int64():
    # Six pieces of large coprime denominators: products of positions and denominators need far more than 64 bits.
    denominators = [999_983, 999_979, 999_961, 999_959, 999_953, 999_931]
    schedule = Schedule(tuple(k * 10**11 for k in range(6)), tuple(Fraction(d // 3, d) for d in denominators))
    positions = [0, 1, 10**11 - 1, 10**11, 3 * 10**11 + 12345, 5 * 10**11, 10**12, 2**62]
    assert schedule.quota(np.array(positions)).tolist() == [
        rounded_half_up(integral(schedule, position)) for position in positions]


def test_beyond_int64_where_a_piece_begins():
    # The offset is 0 there, so only the multiplier itself passes 2**63.
    odd = [Fraction(1, 7), Fraction(1, 999_983), Fraction(1, 999_979)]
    for share in (Fraction(0), Fraction(999_999, 1_000_000), Fraction(1)):
        schedule = Schedule((0, 1, 2, 3), (*odd, share))
        for position in (3, 4, 5):
            assert schedule.quota(np.array([position])).tolist() == [rounded_half_up(integral(schedule, position))]


def test_phases_of_the_paper():
    schedule = phases(["5:5", "6:4", "7:3", "7:3"], 1000)
    assert schedule == Schedule(
        (0, 250, 500, 750), (Fraction(1, 2), Fraction(2, 5), Fraction(3, 10), Fraction(3, 10)))
    assert schedule.quota(np.array([250, 500, 750, 1000])).tolist() == [125, 225, 300, 375]


def test_phases_of_a_length_they_do_not_divide():
    assert phases(["1:0", "0:1", "1:1"], 11).starts == (0, 3, 7)
    assert phases(["1:0", "0:1", "1:1"], 3).starts == (0, 1, 2)
    assert phases(["2.5:0.5"], 1) == constant(Fraction(1, 6))


@pytest.mark.parametrize("ratio", ["5", "5:3:1", "a:b", "0:0", "-1:2", "5:-3", ":", "", "1/0:1", "nan:1", "inf:1", 5])
def test_a_malformed_ratio_is_named_in_one_line(ratio):
    with pytest.raises(ValueError, match="MIX_PHASES must list text:code ratios") as raised:
        phases(["5:5", ratio], 100)
    assert repr(ratio) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("ratios", "rows"), [([], 10), (["1:1"] * 3, 2)])
def test_a_phase_needs_a_row(ratios, rows):
    with pytest.raises(ValueError, match="needs a row or more for each phase"):
        phases(ratios, rows)


@pytest.mark.parametrize("rate", [-0.1, 1.1, 2, -1, float("nan"), float("inf"), "half", None, [0.5]])
def test_a_rate_outside_is_refused_in_one_line(rate):
    with pytest.raises(ValueError, match="^CODE_RATE must") as raised:
        constant(rate)
    assert "\n" not in str(raised.value)
