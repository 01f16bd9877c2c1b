"""What the ledger counts, keeps through JSON, shows and refuses."""

import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from codellm_jax.mixture.ledger import Ledger, arm
from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.schedules import constant, phases


def order_of(seed: int = 0, rate=1 / 3, content: str = "x", text_rows: int = 50) -> Order:
    return Order(seed, constant(rate), (
        Source("text.a", text_rows, Fraction(3), content), Source("text.b", 20, Fraction(1)), Source("code.c", 7)))


def ledger_at(order: Order, position: int, batch: int = 8) -> Ledger:
    ledger = Ledger.begin("pretraining", order, "f" * 64, 256)
    for start in range(0, position, batch):
        ledger.add(order, order.draw(np.arange(start, start + batch)).source, np.full(batch, 256))
    return ledger


def test_counts_by_hand():
    order = order_of()
    ledger = Ledger.begin("pretraining", order, "hash", 10)
    assert ledger.position == 0 and ledger.rows == {"text.a": 0, "text.b": 0, "code.c": 0}
    ledger.add(order, np.array([0, 2, 0, 1]), np.array([7, 8, 9, 10]))
    ledger.add(order, np.array([2, 2, 2, 2]), np.array([1, 2, 3, 4]))
    assert ledger.rows == {"text.a": 2, "text.b": 1, "code.c": 5} and ledger.position == 8
    assert ledger.to_json()["tokens"] == {"text.a": 16, "text.b": 10, "code.c": 18}
    assert ledger.to_json()["epoch_rows"] == {source.name: source.rows for source in order.sources}


def test_through_json_and_on():
    order = order_of()
    ledger = ledger_at(order, 48)
    restored = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert restored == ledger
    batch = order.draw(np.arange(48, 56)).source
    ledger.add(order, batch, np.arange(8))
    restored.add(order, batch, np.arange(8))
    assert restored == ledger and ledger.rows == ledger_at(order, 56).rows


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
    ledger = Ledger("pretraining", "", "", 256, {"text.a": 100, "text.b": 33, "code.c": 67},
                    {"text.a": 25600, "text.b": 8448, "code.c": 17152})
    lines = [line.split() for line in ledger.table(order).splitlines()]
    assert lines[0] == ["source", "tokens", "epochs", "share", "asked", "realised"]
    assert lines[1:] == [
        ["text.a", "25,600", "2.00", "0.5000", "0.5000"],
        ["text.b", "8,448", "1.65", "0.1667", "0.1650"],
        ["code.c", "17,152", "9.57", "0.3333", "0.3350"]]
    assert "text.a" in Ledger.begin("pretraining", order, "", 256).table(order)  # nothing trained: no division by it


def test_examples_are_told_in_tuning():
    ledger = Ledger("tuning", "", "", 256, {"text.a": 100, "text.b": 33, "code.c": 67},
                    {"text.a": 900, "text.b": 20, "code.c": 5000})
    lines = [line.split() for line in ledger.table(order_of()).splitlines()]
    assert lines[0][:3] == ["source", "examples", "tokens"]
    assert lines[3] == ["code.c", "67", "5,000", "9.57", "0.3333", "0.3350"]


@pytest.mark.parametrize("batch", [8, 7, 50])
def test_phases_are_counted_by_themselves(batch):
    """By the position of each row, also where a change falls inside a batch."""
    mix_phases = {0: "5:5", 0.3: "7:3 to 1:9", 0.6: "1:9 to 7:3 cosine", 0.9: "1:0"}
    order = dataclasses.replace(order_of(), schedule=phases(mix_phases, 200))
    ledger = Ledger.begin("tuning", order, "", 8)
    drawn = order.draw(np.arange(200)).source
    for start in range(0, 200, batch):
        part = drawn[start : start + batch]
        ledger.add(order, part, np.full(len(part), 3))
    assert [phase["start"] for phase in ledger.phases] == [0, 60, 120, 180]
    for phase, end in zip(ledger.phases, [60, 120, 180, 200], strict=True):
        counts = np.bincount(drawn[phase["start"] : end], minlength=3).tolist()
        assert list(phase["rows"].values()) == counts
    lines = [line.split() for line in ledger.table_of_phases(order).splitlines()]
    assert lines[1] == ["0", "60", "0.5000", "0.5000"] and lines[4] == ["180", "20", "0.0000", "0.0000"]
    assert len(lines) == 5 and Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_stages_are_chained_and_name_the_arm():
    order, text_only = order_of(), order_of(rate=0)

    def trained(stage: str, order: Order, parent=None) -> dict:
        ledger = Ledger.begin(stage, order, "", 8, parent)
        ledger.add(order, order.draw(np.arange(32)).source, np.full(32, 8))
        return json.loads(json.dumps(ledger.to_json()))

    natural, code = trained("pretraining", text_only), trained("pretraining", order)
    assert (arm(natural), arm(code)) == ("NL", "CODE")
    arms = {(first, second): arm(trained("tuning", tuned, parent | {"model_dir": "run", "step": 4}))
            for first, parent in (("N", natural), ("C", code)) for second, tuned in (("N", text_only), ("C", order))}
    assert arms == {("N", "N"): "NN", ("N", "C"): "NC", ("C", "N"): "CN", ("C", "C"): "CC"}
    assert arm(trained("tuning", order)) == "none, because it was tuned from new parameters"
    twice = Ledger.from_json(trained("tuning", text_only, trained("tuning", order, code)))
    assert arm(twice.to_json()) == "CC-N"
    assert [stage["stage"] for stage in twice.before] == ["pretraining", "tuning"]
    assert all("before" not in stage for stage in twice.before)


def test_a_checkpoint_of_an_earlier_version_is_read():
    saved = ledger_at(order_of(), 48).to_json()
    del saved["before"], saved["phases"]
    restored = Ledger.from_json(saved)
    restored.add(order_of(), order_of().draw(np.arange(48, 56)).source, np.full(8, 256))
    assert restored.rows == ledger_at(order_of(), 56).rows and restored.phases == []


def chain(*stages: str) -> dict:
    """A ledger after these stages: kind and rows of code, of 8 or others, as in "N", "tune C4" or "branch C8/20"."""
    before: list[dict] = []
    for stage in stages:
        *kind, rows = stage.split()
        code, _, total = rows.removeprefix("N").removeprefix("C").partition("/")
        counts = {"text.a": int(total or 8) - int(code or 0), "code.c": int(code or 0)}
        before.append({
            "stage": "imported" if "imported" in kind else "tuning" if "tune" in kind else "pretraining",
            "rows": {} if "imported" in kind else counts, "branch": {"step": 1} if "branch" in kind else None})
    return before[-1] | {"before": before[:-1]}


@pytest.mark.parametrize(("stages", "name"), [
    (("N",), "NL"), (("C4",), "CODE"), (("N", "tune N"), "NN"), (("C4", "tune C4"), "CC"),
    # More stages on documents: a letter for each, and never a name of the paper's.
    (("N", "C4"), "NL-CODE"), (("N", "C4", "tune C4"), "NCC"), (("C4", "N", "C1/8", "tune N"), "CNCN"),
    (("N", "branch C4"), "NL-CODE"), (("N", "branch C4", "tune N"), "NCN"),
    (("N", "N", "tune C4"), "NNC"), (("C4", "C2/8"), "CODE-CODE"),
    # A branch that has its trunk's share of code goes on as the trunk.
    (("N", "branch N"), "NL"), (("N", "branch N", "tune C4"), "NC"), (("C40/100", "branch C80/200"), "CODE"),
    (("C40/100", "branch C81/200"), "CODE"), (("C40/100", "branch C120/200"), "CODE-CODE"),
    (("C40/100", "branch C8/20", "branch C1/20", "tune C2/8"), "CCC"), (("N", "branch C1/200"), "NL-CODE"),
    # What follows a tuning stands behind a hyphen.
    (("N", "tune C4", "tune C4"), "NC-C"), (("N", "tune C4", "N"), "NC-NL"), (("N", "C4", "tune N", "C4"), "NCN-CODE"),
    (("imported N",), "imported"), (("imported N", "tune C4"), "imported-C"), (("imported N", "N"), "imported-NL"),
    (("imported N", "N", "tune C4"), "imported-NC"), (("imported N", "N", "C4"), "imported-NL-CODE"),
    (("imported N", "tune N", "tune C4"), "imported-N-C"),
    (("tune C4",), "none, because it was tuned from new parameters"),
    (("tune C4", "N"), "none, because it was tuned from new parameters"),
])
def test_arms_of_any_stages(stages, name):
    assert arm(chain(*stages)) == name


def test_only_the_papers_two_stages_have_its_names():
    """Of all lines of up to four stages, started from new parameters or from each other."""
    paper = {("N",): "NL", ("C4",): "CODE", ("N", "tune N"): "NN", ("N", "tune C4"): "NC", ("C4", "tune N"): "CN",
             ("C4", "tune C4"): "CC"}
    for length in range(1, 5):
        for stages in itertools.product(("N", "C4", "tune N", "tune C4"), repeat=length):
            assert (arm(chain(*stages)) in paper.values()) == (stages in paper), stages


def test_letters_of_the_orders_own_branches():
    """Drawn by orders: a branch under its trunk's share is the trunk's arm, wherever it branches."""
    for rate, at in itertools.product((0.0, 0.1, 0.37), (3, 8, 17, 100)):
        trunk = order_of(rate=rate)
        for other, same in ((rate, True), (min(1.0, rate + 0.4), False)):
            going_on = Order(0, constant(other), trunk.sources, trunk.branch_at(at))
            ledgers = []
            for order, first, last in ((trunk, 0, at), (going_on, at, at + 50)):
                ledger = Ledger.begin("pretraining", order, "", 8, ledgers[-1] if ledgers else None,
                                      branch={"step": at} if ledgers else None)
                drawn = order.draw(np.arange(first, last)).source
                ledger.add(order, drawn, np.full(len(drawn), 8))
                ledgers.append(json.loads(json.dumps(ledger.to_json())))
            assert ("-" not in arm(ledgers[-1])) == same or at == 3, (rate, at, other, arm(ledgers[-1]))
