"""What the ledger counts, keeps through JSON, shows and refuses."""

import json
from fractions import Fraction

import numpy as np
import pytest

from codellm_jax.mixture.ledger import Ledger
from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.schedules import constant


def order_of(seed: int = 0, rate=1 / 3, content: str = "x", text_rows: int = 50) -> Order:
    return Order(seed, constant(rate), (
        Source("text.a", text_rows, Fraction(3), content), Source("text.b", 20, Fraction(1)), Source("code.c", 7)))


def ledger_at(order: Order, position: int, batch: int = 8) -> Ledger:
    ledger = Ledger.begin("pretraining", order, "f" * 64, 256)
    for start in range(0, position, batch):
        ledger.add(order, order.draw(np.arange(start, start + batch)).source)
    return ledger


def test_counts_by_hand():
    order = order_of()
    ledger = Ledger.begin("pretraining", order, "hash", 10)
    assert ledger.position == 0 and ledger.rows == {"text.a": 0, "text.b": 0, "code.c": 0}
    ledger.add(order, np.array([0, 2, 0, 1]))
    ledger.add(order, np.array([2, 2, 2, 2]))
    assert ledger.rows == {"text.a": 2, "text.b": 1, "code.c": 5} and ledger.position == 8
    assert ledger.to_json()["tokens"] == {"text.a": 20, "text.b": 10, "code.c": 50}


def test_through_json_and_on():
    order = order_of()
    ledger = ledger_at(order, 48)
    restored = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert restored == ledger
    batch = order.draw(np.arange(48, 56)).source
    ledger.add(order, batch)
    restored.add(order, batch)
    assert restored == ledger == ledger_at(order, 56)


def test_what_was_drawn_passes():
    order = order_of()
    for position in (0, 8, 800):
        ledger_at(order, position).check(order_of(), position)


@pytest.mark.parametrize(("order", "position"), [
    (order_of(seed=1), 80), (order_of(rate=0.5), 80), (order_of(content="y"), 80), (order_of(text_rows=51), 80),
    (order_of(), 72), (order_of(), 88)])
def test_other_data_is_refused_in_one_line(order, position):
    with pytest.raises(ValueError, match="The checkpoint was trained on other data") as raised:
        ledger_at(order_of(), 80).check(order, position)
    assert "\n" not in str(raised.value)


def test_a_changed_count_is_refused():
    order = order_of()
    ledger = ledger_at(order, 80)
    ledger.rows["text.a"] += 1
    ledger.rows["text.b"] -= 1
    with pytest.raises(ValueError, match="trained on other data"):
        ledger.check(order, 80)


def test_sources_that_came_or_went_are_refused():
    order = order_of()
    fewer = Order(0, constant(1 / 3), (order.sources[0], order.sources[2]))
    with pytest.raises(ValueError, match="trained on other data"):
        ledger_at(order, 80).check(fewer, 80)
    with pytest.raises(ValueError, match="trained on other data"):
        ledger_at(fewer, 80).check(order, 80)


def test_table():
    order = order_of()
    ledger = Ledger("pretraining", "", "", 256, {"text.a": 100, "text.b": 33, "code.c": 67})
    lines = [line.split() for line in ledger.table(order).splitlines()]
    assert lines[0] == ["source", "tokens", "epochs", "share", "asked", "realised"]
    assert lines[1:] == [
        ["text.a", "25,600", "2.00", "0.5000", "0.5000"],
        ["text.b", "8,448", "1.65", "0.1667", "0.1650"],
        ["code.c", "17,152", "9.57", "0.3333", "0.3350"]]
    assert "text.a" in Ledger.begin("pretraining", order, "", 256).table(order)  # nothing trained: no division by it
