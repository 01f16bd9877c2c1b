"""Quotas against the integral, computed piece by piece, and row by row, with exact fractions."""

import math
import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.mixture.schedules import COSINE_PIECES, Schedule, constant, phases

RATES = [0, 1, 0.5, 1 / 3, 0.001, 0.999, 0.1, 0.9, Fraction(5, 8), Fraction(1, 999_983), Fraction(999_978, 999_979)]
shares = st.one_of(st.sampled_from(RATES), st.floats(0, 1, allow_nan=False)).map(
    lambda value: Fraction(value).limit_denominator(1_000_000))


def integral(schedule: Schedule, position: int) -> Fraction:
    """Row by piece of rows, without any of the module's arithmetic: areas of trapezoids."""
    total = Fraction(0)
    following = [*schedule.starts[1:], None]
    for start, end, share, end_share in zip(schedule.starts, following, schedule.shares, schedule.ends, strict=True):
        last = position if end is None else min(end, position)
        if last > start:
            at_last = share if end is None else share + (end_share - share) * Fraction(last - start) / (end - start)
            total += (last - start) * (share + at_last) / 2
    return total


def rounded_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@st.composite
def schedules(draw) -> Schedule:
    """Constant and sloping pieces; starts are whole, or fractions as at the inner nodes of an order's tree."""
    gaps = draw(st.lists(st.one_of(st.integers(1, 20), st.integers(1, 10**11), st.fractions(
        Fraction(1, 100), 50, max_denominator=10**6)), max_size=6))
    starts = [0]
    for gap in gaps:
        starts.append(starts[-1] + gap)
    begun = draw(st.lists(shares, min_size=len(starts), max_size=len(starts)))
    ends = [draw(st.one_of(st.just(share), shares)) for share in begun[:-1]]
    return Schedule(tuple(starts), tuple(begun), (*ends, begun[-1]))


@settings(max_examples=200, deadline=None)
@given(schedule=schedules(), positions=st.lists(st.one_of(st.integers(0, 10**12), st.integers(0, 200)), min_size=1))
def test_quota_is_the_rounded_integral(schedule: Schedule, positions: list[int]):
    edges = [math.floor(edge) + by for edge in schedule.starts for by in (-1, 0, 1, 2) if edge + by >= 0]
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
        begin = max(0, math.floor(begin) - 50)
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


def row_by_row(value: Any, rows: int, batch_size: int, position: int) -> Fraction:
    """The integral of what MIX_PHASES says, summed over the middles of rows; a cosine must have a knot at each row."""
    listed = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        starts = [key * batch_size if isinstance(key, int) else math.floor(Fraction(str(key)) * rows) for key in value]
    else:
        starts = [k * rows // len(listed) for k in range(len(listed))]
    total = Fraction(0)
    for row in range(position):
        k = max(k for k in range(len(starts)) if starts[k] <= row)
        begin, end, phase = starts[k], [*starts[1:], rows][k], listed[k]
        if isinstance(phase, Mapping):
            weights = {name: Fraction(weight) for name, weight in phase.items()}
            total += sum(weight for name, weight in weights.items() if name[:5] == "code.") / sum(weights.values())
            continue
        first, _, rest = phase.partition(" to ")
        last, _, curve = (rest or first).partition(" ")
        first, last = (Fraction(int(ratio.split(":")[1]), sum(map(int, ratio.split(":")))) for ratio in (first, last))
        for edge in (row, row + 1):
            way = Fraction(edge - begin, end - begin) if row < rows else Fraction(1)
            if curve:
                way = Fraction(round(500_000 - 500_000 * math.cos(math.pi * float(way))), 1_000_000)
            total += (first + (last - first) * way) / 2
    return total


ratios_ = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(any).map(lambda pair: f"{pair[0]}:{pair[1]}")
phases_ = st.one_of(
    ratios_, st.builds("{} to {}".format, ratios_, ratios_), st.builds("{} to {} cosine".format, ratios_, ratios_),
    st.dictionaries(st.sampled_from(["text.a", "text.b", "code.c", "code.d"]), st.integers(0, 5)).filter(
        lambda table: any(table.values())))


@st.composite
def mix_phases(draw, rows: int, batch_size: int):
    listed = draw(st.lists(phases_, min_size=1, max_size=5))
    if draw(st.booleans()):
        return listed
    # 50 steps or more: hundredths and steps that differ by more than that begin at rows of their own.
    starts = sorted(draw(st.sets(st.integers(1, 49), min_size=len(listed) - 1, max_size=len(listed) - 1)))
    steps = [start * (rows // batch_size) // 50 for start in starts]
    return dict(zip([0, *(step if draw(st.booleans()) else start / 50 for step, start in zip(steps, starts, strict=True)
                          )], listed, strict=True))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), steps=st.sampled_from([50, 100, 150]), batch_size=st.sampled_from([1, 2]))
def test_every_form_is_what_a_sum_over_rows_gives(data, steps: int, batch_size: int):
    rows = min(steps * batch_size, 240)
    if rows // batch_size < 50:
        return
    value = data.draw(mix_phases(rows, batch_size))
    schedule = phases(value, rows, batch_size)
    edges = {edge + by for edge in schedule.starts for by in (-1, 0, 1) if edge + by >= 0}
    positions = sorted({*data.draw(st.lists(st.integers(0, rows + 20), min_size=1, max_size=4)), rows,
                        *list(edges)[:4]})
    wanted = [row_by_row(value, rows, batch_size, position) for position in positions]
    assert [schedule.asked(position) for position in positions] == wanted
    assert schedule.quota(np.array(positions)).tolist() == [rounded_half_up(asked) for asked in wanted]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(50, 4 * 10**12))
def test_long_runs_never_drift(data, rows: int):
    schedule = phases(data.draw(mix_phases(rows, 1)), rows)
    positions = data.draw(st.lists(st.integers(0, 5 * 10**12), min_size=1, max_size=10)) + [10**12, rows, rows - 1]
    quotas = schedule.quota(np.array(positions))
    for position, quota in zip(positions, quotas.tolist(), strict=True):
        wanted = integral(schedule, position)
        assert quota == rounded_half_up(wanted) and schedule.asked(position) == wanted
        begin = max(0, position - 30)
        assert set(np.diff(schedule.quota(np.arange(begin, begin + 61))).tolist()) <= {0, 1}
        one_by_one = [int(schedule.quota(np.array([at]))[0]) for at in range(begin, begin + 5)]
        assert one_by_one == schedule.quota(np.arange(begin, begin + 5)).tolist()


def test_a_ramp():
    schedule = phases({0: "7:3", 0.9: "7:3 to 0:1"}, 1000)
    assert schedule == Schedule(
        (0, 900, 1000), (Fraction(3, 10), Fraction(3, 10), Fraction(1)), (Fraction(3, 10), Fraction(1), Fraction(1)))
    assert [schedule.asked(position) for position in (900, 950, 1000, 1100)] == [
        270, 270 + Fraction(950 - 900) * Fraction(3 + Fraction(13, 2), 20), 335, 435]
    assert [schedule.share_at(position) for position in (0, 899, 900, 950, 1000, 10**9)] == [
        Fraction(3, 10), Fraction(3, 10), Fraction(3, 10), Fraction(13, 20), 1, 1]


def test_a_ramp_that_stays_is_a_constant():
    assert phases(["5:5 to 1:1", "6:4 to 3:2 cosine"], 100) == phases(["5:5", "6:4"], 100)


@pytest.mark.parametrize("rows", [1, 2, 7, 255, 256, 257, 1000, 123_457, 10**9 + 7, 4 * 10**12])
@pytest.mark.parametrize("ratios", ["5:5 to 7:3", "1:0 to 0:1"])
def test_a_cosine_is_one(rows: int, ratios: str):
    schedule = phases({0: f"{ratios} cosine"}, rows)
    first, last = phases([ratios], rows).shares[0], phases([ratios], rows).shares[-1]
    assert len(schedule.starts) == min(COSINE_PIECES, rows) + 1
    assert (schedule.shares[0], schedule.ends[-2], schedule.shares[-1]) == (first, last, last)
    assert schedule.ends[:-1] == schedule.shares[1:]
    worst_share = worst_integral = 0.0
    for position in {k * rows // 3001 for k in range(3002)}:
        angle = math.pi * position / rows
        share = float(first) + float(last - first) * (1 - math.cos(angle)) / 2
        true = float(first) * position + float(last - first) * (position - rows * math.sin(angle) / math.pi) / 2
        worst_share = max(worst_share, abs(float(schedule.share_at(position)) - share))
        worst_integral = max(worst_integral, abs(float(schedule.asked(position)) - true) / rows)
    between = float(abs(last - first))
    if rows >= COSINE_PIECES:  # with fewer each row is a piece, and the share at its edges the cosine's
        # Knots at whole rows may be a row further apart than rows / 256.
        bound = (1 + COSINE_PIECES / rows) ** 2
        assert worst_share <= bound * math.pi**2 / 16 / COSINE_PIECES**2 * between + 0.51e-6
        assert worst_integral <= bound * math.pi / 24 / COSINE_PIECES**2 * between + 0.51e-6
        assert (1 + 1e-3) * math.pi**2 / 16 / COSINE_PIECES**2 < 1e-5
    else:
        assert worst_share <= 0.51e-6


def test_a_table_and_its_shares():
    schedule = phases([{"text.alpaca": 3, "code.mbpp": 0.5, "text.pclue": 1.5}, "1:1"], 10)
    assert schedule.shares == (Fraction(1, 10), Fraction(1, 2))
    assert schedule.tables == (
        (("code.mbpp", Fraction(1, 10)), ("text.alpaca", Fraction(3, 5)), ("text.pclue", Fraction(3, 10))), None)


def test_starts_are_parts_or_steps():
    listed = {0: "1:0", 0.25: "0:1", 30: "1:1", Fraction(2, 3): "1:2", 99: "2:1"}
    assert phases(listed, 800, batch_size=8).starts == (0, 200, 240, 533, 792)
    assert phases({0.0: "1:1", 1 / 3: "1:0"}, 99).starts == (0, 33)
    equal = ["5:5", "6:4", "7:3", "7:3"]
    assert phases({k / 4: ratio for k, ratio in enumerate(equal)}, 1001) == phases(equal, 1001)


@pytest.mark.parametrize("rows", [10**5, 10**9, 4 * 10**12])
def test_a_cosine_is_quick(rows: int):
    schedule = phases(["5:5 to 7:3 cosine", "7:3 to 5:5 cosine"], rows)
    positions = np.arange(rows // 3, rows // 3 + 512)
    schedule.quota(positions)
    began = time.perf_counter()
    for _ in range(20):
        schedule.quota(positions)
    assert (time.perf_counter() - began) / 20 < 2e-3  # found 0.02e-3 to 0.05e-3


@pytest.mark.parametrize(("value", "message"), [
    ("5:5", "must be a list of phases such as"),
    (5, "must be a list of phases such as"),
    ({}, "is empty"),
    ({"text.a": 1, "code.b": 2}, r"put a table .* into a list: \[\{'text.a': 1, 'code.b': 2\}\]"),
    ({0.5: "1:1"}, "must start at 0, found 0.5 first"),
    ({1: "1:1"}, "must start at 0, found 1 first"),
    ({0: "1:1", 0.5: "1:0", 0.25: "0:1"}, r"increase by at least one row, found 0.25 \(row 25\) after 0.5 \(row 50\)"),
    ({0: "1:1", 0.5: "1:0", 25: "0:1"}, r"found 25 \(row 50\) after 0.5 \(row 50\)"),
    ({0: "1:1", 0.5: "1:0", 0.501: "0:1"}, "increase by at least one row"),
    ({0: "1:1", 50: "1:0"}, "a phase that starts at step 50, but training ends with step 50"),
    ({0: "1:1", 10**9: "1:0"}, "step 1000000000"),
    ({0: "1:1", 1.0: "1:0"}, "starts at 1.0: write fractions of training below 1.0"),
    ({0: "1:1", 12.5: "1:0"}, "starts at 12.5"),
    ({0: "1:1", -1: "1:0"}, "must have starts .* found -1"),
    ({0: "1:1", -0.5: "1:0"}, "must have starts .* found -0.5"),
    ({0: "1:1", float("nan"): "1:0"}, "must have starts .* found nan"),
    ({0: "1:1", float("inf"): "1:0"}, "must have starts .* found inf"),
    ({False: "1:1"}, "must have starts .* found False"),
    ({0: "1:1", True: "1:0"}, "must have starts .* found True"),
    ({None: "1:1"}, "must have starts .* found None"),
    ({0: ["1:1"]}, "must list text:code ratios"),
    ([{}], "table in which no source has a weight"),
    ([{"text.a": 0, "code.b": 0.0}], "table in which no source has a weight"),
    ([{"prose.a": 1}], "a table with 'prose.a'; sources are named text.NAME or code.NAME"),
    ([{0: "1:1"}], "a table with 0"),
    ([{"text.a": -1}], "must give text.a a weight of at least 0, found -1"),
    ([{"text.a": float("nan")}], "found nan"),
    ([{"text.a": float("inf")}], "found inf"),
    ([{"text.a": True}], "found True"),
    ([{"text.a": "3"}], "found '3'"),
    ([{"text.a": 1e-9, "code.b": 1}], "gives text.a the weight 1e-09"),
    (["9999999:1"], "within 1e-06 of 0"),
])
def test_malformed_phases_are_told_in_one_line(value, message):
    with pytest.raises(ValueError, match=f"^MIX_PHASES.*{message}") as raised:
        phases(value, 100, batch_size=2)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("parts", [
    {"starts": (0, 5)}, {"starts": (1,)}, {"ends": (Fraction(1),)}, {"tables": (None,) * 2}])
def test_a_schedule_is_well_formed(parts):
    with pytest.raises(ValueError, match="^A schedule"):
        Schedule(**({"starts": (0,), "shares": (Fraction(1, 2),)} | parts))


@pytest.mark.parametrize("ratio", [
    "5", "5:3:1", "a:b", "0:0", "-1:2", "5:-3", ":", "", "1/0:1", "nan:1", "inf:1", 5, None, True, "5:5 to", "to 5:5",
    "5:5 to 7", "5:5 to 7:3 sine", "5:5 cosine", "5:5 to 7:3 cosine cosine", "5:5 to 6:4 to 7:3", "5:5 to cosine"])
def test_a_malformed_ratio_is_named_in_one_line(ratio):
    with pytest.raises(ValueError, match="MIX_PHASES must list text:code ratios") as raised:
        phases(["5:5", ratio], 100)
    assert repr(ratio) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("ratios", "rows"), [(["1:1"] * 3, 2)])
def test_a_phase_needs_a_row(ratios, rows):
    with pytest.raises(ValueError, match="needs at least one row for each phase"):
        phases(ratios, rows)


@pytest.mark.parametrize("rate", [-0.1, 1.1, 2, -1, float("nan"), float("inf"), "half", None, [0.5]])
def test_a_rate_outside_is_refused_in_one_line(rate):
    with pytest.raises(ValueError, match="^CODE_RATE must") as raised:
        constant(rate)
    assert "\n" not in str(raised.value)
