"""Orders that branch from others: nothing is repeated before its epoch ends, nothing lost, and nothing drifts."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.mixture.order import Branch, Order, Source
from codellm_jax.mixture.schedules import constant, phases

ROWS = 600
SOURCES = (Source("text.a", 37, Fraction(3), "a"), Source("text.b", 11, Fraction(1), "b"),
           Source("text.c", 90, Fraction(2), "c"), Source("code.d", 23, Fraction(5), "d"),
           Source("code.e", 64, Fraction(4), "e"))
MIXES = [
    constant(1 / 3), constant(0.0), constant(1.0), phases(["5:5", "6:4", "7:3", "7:3"], ROWS),
    phases(["5:5 to 7:3"], ROWS), phases({0: "7:3", 0.6: "7:3 to 0:1 cosine"}, ROWS),
    phases([{"text.a": 3, "code.d": 1}, {"text.c": 1, "code.e": 1, "text.b": 2}, {"text.b": 1, "code.d": 3}], ROWS)]


def through_json(branch: Branch) -> Branch:
    return Branch.from_json(json.loads(json.dumps(branch.to_json())))


def rows_of(order: Order, first: int, last: int) -> list[tuple[str, int, int]]:
    draw = order.draw(np.arange(first, last))
    return [(order.sources[source].name, epoch, row)
            for source, epoch, row in zip(*(part.tolist() for part in draw), strict=True)]


@given(mix=st.sampled_from(MIXES), seed=st.integers(0, 5), ats=st.lists(st.integers(0, ROWS), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_an_order_that_branches_from_itself_is_itself(mix, seed, ats):
    """Also where it branches again from the branch."""
    whole = Order(seed, mix, SOURCES)
    order = whole
    for at in sorted(ats):
        order = Order(seed, mix, SOURCES, through_json(order.branch_at(at)))
        assert rows_of(order, at, ROWS + 50) == rows_of(whole, at, ROWS + 50)
        np.testing.assert_array_equal(order.counts(ROWS), whole.counts(ROWS) - whole.counts(at))
        assert order.asked(ROWS) == [
            all_ - before for all_, before in zip(whole.asked(ROWS), whole.asked(at), strict=True)]
    assert order.branch_at(ROWS).owed == whole.branch_at(ROWS).owed


@given(trunk=st.sampled_from(MIXES), branch=st.sampled_from(MIXES), at=st.integers(1, ROWS - 1),
       kept=st.sets(st.sampled_from(range(5)), min_size=2).filter(lambda kept: {k < 3 for k in kept} == {True, False}))
@settings(max_examples=150, deadline=None)
def test_of_every_source_a_branch_reads_on_where_its_trunk_stopped(trunk, branch, at, kept):
    """An independent reader goes through the rows: each source's epochs come one after the other, each row once."""
    first = Order(3, trunk, SOURCES)
    known = tuple(SOURCES[k] for k in sorted(kept)) if not any(branch.tables) else SOURCES
    second = Order(3, branch, (*known, Source("text.new", 8, Fraction(1), "n")), first.branch_at(at))
    seen: dict[str, list[tuple[int, int]]] = {}
    for name, epoch, row in [*rows_of(first, 0, at), *rows_of(second, at, ROWS)]:
        seen.setdefault(name, []).append((epoch, row))
    sizes = {source.name: source.rows for source in second.sources} | {source.name: source.rows for source in SOURCES}
    for name, drawn in seen.items():
        for start in range(0, len(drawn), sizes[name]):
            epoch = drawn[start : start + sizes[name]]
            assert {number for number, _ in epoch} == {start // sizes[name]}, name
            assert len({row for _, row in epoch}) == len(epoch), name
    # And the counts follow what the branch asks for.
    text, code = (sum(count for source, count in zip(second.sources, second.counts(ROWS), strict=True)
                      if source.pool == pool) for pool in ("text", "code"))
    assert text + code == ROWS - at and abs(code - (branch.asked(ROWS) - branch.asked(at))) <= 1
    for asked, count in zip(second.asked(ROWS), second.counts(ROWS).tolist(), strict=True):
        assert abs(count - asked) <= 4


def test_a_source_of_other_content_begins_anew():
    first = Order(3, constant(0.5), SOURCES)
    changed = tuple(Source(source.name, source.rows, source.weight, "other" if source.name == "text.a" else
                           source.content_hash) for source in SOURCES)
    second = Order(3, constant(0.5), changed, first.branch_at(300))
    before = dict(zip((source.name for source in SOURCES), first.counts(300).tolist(), strict=True))
    assert second.drawn_before.tolist() == [0 if name == "text.a" else count for name, count in before.items()]
    name, epoch, _ = next(row for row in rows_of(second, 300, 400) if row[0] == "text.a")
    assert (name, epoch) == ("text.a", 0)


def test_a_source_that_a_branch_left_out_goes_on_in_the_next():
    first = Order(3, constant(0.5), SOURCES)
    second = Order(3, constant(0.5), (SOURCES[0], SOURCES[3]), first.branch_at(200))
    third = Order(3, constant(0.5), SOURCES, second.branch_at(300))
    assert third.drawn_before[1] == first.counts(200)[1] and third.drawn_before[0] > first.counts(200)[0]


def test_epochs_of_the_trunk_count():
    first = Order(3, constant(0.5), SOURCES)
    at, source = first.exhausted_at(2, ROWS)
    second = Order(3, constant(0.5), SOURCES, first.branch_at(at - 5))
    assert second.exhausted_at(2, ROWS) == (at, source)


def test_the_fingerprint_tells_where_an_order_branched():
    first = Order(3, constant(0.5), SOURCES)
    prints = {Order(3, constant(0.5), SOURCES, branch).fingerprint()
              for branch in (None, first.branch_at(200), first.branch_at(201))}
    assert len(prints) == 3
    again = Order(3, constant(0.5), SOURCES, through_json(first.branch_at(200)))
    assert again.fingerprint() in prints


@pytest.mark.parametrize("position", [0, 1, 599, 10**9])
def test_what_a_branch_takes_over_is_small(position):
    branch = Order(3, MIXES[-1], SOURCES).branch_at(position)
    assert all(abs(reached) <= 2 and abs(right) <= Fraction(1, 2) for reached, right in branch.owed.values())
    assert len(json.dumps(branch.to_json())) < 2000
