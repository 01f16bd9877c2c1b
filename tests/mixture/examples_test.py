"""Examples as rows and rows as batches: by hand, against plain Python, and packed against unpacked."""

import functools
from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.mixture.batches import example_batch, held_out_batches, rows_of_packed_steps
from codellm_jax.mixture.examples import (
    Found,
    arrays_of_examples,
    example_rows,
    example_sizes,
    pack,
    sizes_drawn,
    unpacked,
)
from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.rows import Rows
from codellm_jax.mixture.schedules import constant
from codellm_jax.mixture.tokens import Example
from codellm_jax.model.decoder import Decoder, DecoderConfig, output_head
from codellm_jax.model.losses import cross_entropy
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh

LENGTH = 20
END = 1


class InMemory(Rows):
    """Examples drawn from a seed: prompts of 1 to 6 tokens, targets of 1 to 7 with their end."""

    @functools.cached_property
    def _all(self) -> np.ndarray:
        dice = np.random.default_rng(int(self.name[-1]))
        examples = []
        for _ in range(self.count):
            prompt, target = (dice.integers(2, 90, dice.integers(1, most)) for most in (7, 7))
            examples.append(Example(prompt, np.append(target, END), 0))
        [rows] = example_rows(examples, self.length, Found())
        return rows

    def begin(self, numbers: np.ndarray) -> Callable[[], np.ndarray]:
        self.__dict__.setdefault("asked_for", []).extend(np.asarray(numbers).tolist())
        return lambda: self._all[numbers]


def in_memory() -> tuple[Order, list[InMemory]]:
    sources = (Source("text.n1", 20, Fraction(2)), Source("text.n2", 13, Fraction(1)), Source("code.n3", 11))
    rows = [InMemory(s.name, "train", "", s.rows, LENGTH, 0, s.rows, "") for s in sources]
    return Order(3, constant(0.375), sources), rows


def sharding_over(devices: int, shape: MeshShape | None = None) -> jax.sharding.NamedSharding:
    return batch_sharding(make_mesh(shape or MeshShape(), jax.devices()[:devices]))


def of_lengths(*pairs: tuple[int, int]) -> list[Example]:
    return [Example(np.arange(10, 10 + a), np.arange(50, 50 + b), 0) for a, b in pairs]


def test_rows_by_hand():
    found = Found()
    # Whole; exactly full; cut; one target token left; none left; an empty target; an empty prompt.
    [rows] = example_rows(of_lengths((2, 2), (2, 3), (2, 9), (4, 3), (5, 3), (2, 0), (0, 2)), 4, found)
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [10, 11, 50, 51, 0, 2, 4], [10, 11, 50, 51, 52, 2, 5], [10, 11, 50, 51, 52, 2, 5], [10, 11, 12, 13, 50, 4, 5],
        [50, 51, 0, 0, 0, 0, 2]]
    assert (found.documents, found.cut, found.left_out) == (7, 2, 2)
    assert found.tokens == 4 + 5 + 11 + 7 + 8 + 2 + 2
    assert list(example_rows(of_lengths((9, 1)), 4, Found())) == []


def test_a_batch_by_hand():
    [examples] = example_rows(of_lengths((2, 2), (1, 2), (3, 1)), 6, Found())
    # The second example stands behind the first; the third has a row of its own, behind a gap.
    arrays = arrays_of_examples(examples, np.array([2, 0, 1]), np.array([0, 0, 2]), np.array([0, 3, 1]), (3, 6))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "inputs": [[10, 11, 50, 10, 50, 0], [0] * 6, [0, 10, 11, 12, 0, 0]],
        "targets": [[11, 50, 51, 50, 51, 0], [0] * 6, [0, 11, 12, 50, 0, 0]],
        "positions": [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 0, 1, 2, 0, 0]],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [0] * 6, [0, 1, 1, 1, 0, 0]],
        # Targets alone: 50 and 51 of the first, 50 and 51 of the second, 50 of the third.
        "weights": [[0, 1, 1, 1, 1, 0], [0] * 6, [0, 0, 0, 1, 0, 0]],
        "sources": [[2, 2, 2, 0, 0, 0], [0] * 6, [0, 1, 1, 1, 0, 0]]}
    assert {name: array.dtype.name for name, array in arrays.items()} == dict.fromkeys(arrays, "int32") | {
        "weights": "float32"}


def test_a_conversation_by_hand():
    """A prompt of two, an answer of two, two that do not count, and an answer, in rows that cut it at each place."""
    example = Example(np.array([10, 11]), np.array([50, 51, ~12, ~0, 52]), 0, is_conversation=True)
    for length, counted in ((2, [50]), (3, [50, 51]), (5, [50, 51]), (6, [50, 51, 52]), (9, [50, 51, 52])):
        found = Found()
        [examples] = example_rows([example, *of_lengths((1, 2))], length, found)
        assert (found.conversations, found.cut) == (1, (length < 6) + (length < 2))
        rows = Rows("text.n1", "train", "", 2, length, 0, 2, "")
        object.__setattr__(rows, "begin", lambda numbers, examples=examples: lambda: examples[numbers])
        assert example_sizes.__wrapped__(rows).counted.tolist() == [len(counted), 2]
        arrays = arrays_of_examples(examples, np.zeros(2, int), np.arange(2), np.zeros(2, int), (2, length))
        size = min(7, length + 1)
        tokens = [10, 11, 50, 51, 12, 0, 52][:size]
        assert arrays["inputs"][0][: size - 1].tolist() == tokens[:-1]
        assert arrays["targets"][0][: size - 1].tolist() == tokens[1:]
        assert arrays["targets"][0][arrays["weights"][0] == 1].tolist() == counted
        assert arrays["targets"][1][arrays["weights"][1] == 1].tolist() == [50, 51]


def test_sizes_are_those_of_the_batch():
    order, rows = in_memory()
    draw = order.draw(np.arange(64))
    sizes = sizes_drawn(rows, draw.source, draw.row)
    for source, row, positions, counted in zip(draw.source, draw.row, *sizes, strict=True):
        *_, prompt, tokens = rows[source].read(np.array([row]))[0]
        assert positions == tokens - 1 and counted == tokens - prompt
    batch, _ = example_batch(0, 64, order, rows, 64, False, sharding_over(1))
    assert np.asarray(batch.weights).sum(axis=1).tolist() == sizes.counted.tolist()
    assert (np.asarray(batch.segment_ids) > 0).sum(axis=1).tolist() == sizes.positions.tolist()
    assert example_sizes(rows[0]).counted.shape == (20,)


def first_fit_decreasing(positions: list[int], length: int) -> list[tuple[int, int]]:
    """Row and column of each example, one after the other."""
    used: list[int] = []
    places = {}
    for index in sorted(range(len(positions)), key=lambda k: (-positions[k], k)):
        row = next((row for row, filled in enumerate(used) if filled + positions[index] <= length), len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += positions[index]
    return [places[index] for index in range(len(positions))]


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 40), data=st.data())
def test_packing_is_first_fit_decreasing(length, data):
    steps, examples = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    row = st.lists(st.integers(1, length), min_size=examples, max_size=examples)
    positions = np.array(data.draw(st.lists(row, min_size=steps, max_size=steps)))
    places = pack(positions, length)
    for step in range(steps):
        wanted = first_fit_decreasing(positions[step].tolist(), length)
        assert list(zip(places.row[step].tolist(), places.column[step].tolist(), strict=True)) == wanted
        assert places.rows[step] == 1 + max(row for row, _ in wanted)
        alone = pack(positions[step : step + 1], length)  # one step does not depend on the others
        assert alone.row[0].tolist() == places.row[step].tolist()


def test_unpacked_has_a_row_each():
    places = unpacked(np.array([[3, 1], [2, 2]]))
    assert (places.row.tolist(), places.column.tolist(), places.rows.tolist()) == ([[0, 1]] * 2, [[0, 0]] * 2, [2, 2])


def pieces(batch) -> list[tuple]:
    """What stands in the documents of a batch, in no order: inputs, targets, positions, weights, source."""
    found = []
    arrays = [np.asarray(field) for field in batch]
    for row in range(arrays[0].shape[0]):
        inputs, targets, positions, segments, weights, sources = (array[row].tolist() for array in arrays)
        for segment in sorted(set(segments) - {0}):
            here = [k for k, found_segment in enumerate(segments) if found_segment == segment]
            assert here == list(range(here[0], here[-1] + 1))
            found.append(tuple(tuple(values[k] for k in here) for values in (
                inputs, targets, positions, weights, sources)))
    return sorted(found)


@pytest.mark.parametrize("step", [0, 3, 1000])
def test_packed_and_unpacked_hold_the_same_examples(step):
    order, rows = in_memory()
    needed, positions = rows_of_packed_steps(order, rows, 16, 40)
    assert 4 < needed < 11 and positions == sizes_drawn(
        rows, *(order.draw(np.arange(40 * 16))[k] for k in (0, 2))).positions.sum()
    packed, drawn = example_batch(step, 16, order, rows, 12, True, sharding_over(1))
    alone, drawn_alone = example_batch(step, 16, order, rows, 16, False, sharding_over(1))
    assert pieces(packed) == pieces(alone) and len(pieces(alone)) == 16
    np.testing.assert_array_equal(drawn.source, drawn_alone.source)
    assert packed.inputs.shape == (12, LENGTH)


def test_no_step_of_a_run_needs_more_rows(monkeypatch):
    order, rows = in_memory()
    needed = max(int(np.asarray(example_batch(step, 16, order, rows, 16, True, sharding_over(1))[0].segment_ids)
                     .any(axis=1).sum()) for step in range(40))
    assert rows_of_packed_steps(order, rows, 16, 40)[0] == needed
    monkeypatch.setattr("codellm_jax.mixture.batches.EXAMPLES_AT_ONCE", 50)  # in parts, the same
    assert rows_of_packed_steps(order, rows, 16, 40)[0] == needed


@pytest.mark.parametrize("packing", [True, False])
def test_the_same_batch_on_every_mesh(packing):
    order, rows = in_memory()
    one, _ = example_batch(2, 16, order, rows, 16, packing, sharding_over(1))
    many, _ = example_batch(2, 16, order, rows, 16, packing, sharding_over(8, MeshShape(data=2, fsdp=4)))
    for found, wanted in zip(many, one, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert {shard.data.shape for shard in found.addressable_shards} == {(2, LENGTH)}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_own_examples_alone(packing, hosts, monkeypatch, of_one_host):
    whole, _ = example_batch(2, 16, *in_memory(), 16, packing, sharding_over(8))
    sharding, devices = sharding_over(8), jax.devices()
    collected, read = np.full((16, LENGTH), -1, np.int32), []
    for host in range(hosts):
        order, rows = in_memory()
        for source in rows:
            example_sizes(source)  # which every host knows of all examples
            source.__dict__["asked_for"] = []
        monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, shard: [
            (index, shard(index)) for index in sharding.addressable_devices_indices_map(shape).values()])
        own = set(devices[host * 8 // hosts : (host + 1) * 8 // hosts])
        part, draw = example_batch(2, 16, order, rows, 16, packing, of_one_host(sharding, own))
        monkeypatch.undo()
        read += [(source, row) for source, each in enumerate(rows) for row in each.__dict__["asked_for"]]
        assert len(draw.source) == 16  # every host counts the whole batch in its ledger
        for index, data in part.inputs:
            collected[index] = data
    np.testing.assert_array_equal(collected, whole.inputs)
    assert sorted(read) == sorted(zip(draw.source.tolist(), draw.row.tolist(), strict=True))  # each once, by one host


@pytest.mark.parametrize("query_layer", [True, False])
def test_packed_and_unpacked_give_the_same_loss_for_each_token(query_layer):
    order, rows = in_memory()
    config = DecoderConfig(layers=3, hidden=32, heads=4, feedforward=64, vocabulary_size=128, length=LENGTH,
                           query_layer=query_layer)
    model = Decoder(config)
    losses, params = [], None
    for packing, height in ((True, 12), (False, 16)):
        batch, _ = example_batch(1, 16, order, rows, height, packing, sharding_over(1))
        if params is None:
            params = model.init(jax.random.key(0), batch.inputs, batch.positions, batch.segment_ids)["params"]
        hidden = model.apply({"params": params}, batch.inputs, batch.positions, batch.segment_ids)
        total, losses_BL = cross_entropy(hidden, output_head(params), batch.targets, batch.weights)
        by_example = {}
        arrays = [np.asarray(a) for a in (batch.inputs, batch.targets, batch.segment_ids, batch.weights, losses_BL)]
        for inputs, targets, segments, weights, values in zip(*arrays, strict=True):
            for segment in set(segments.tolist()) - {0}:
                here = segments == segment
                key = (tuple(inputs[here].tolist()), tuple(targets[here].tolist()))
                by_example.setdefault(key, []).append(values[here] * weights[here])
        losses.append((float(total), by_example))
    (packed_sum, packed), (alone_sum, alone) = losses
    assert packed_sum == pytest.approx(alone_sum, rel=1e-5)
    assert packed.keys() == alone.keys() and sum(map(len, alone.values())) == 16
    for key, values in alone.items():
        np.testing.assert_allclose(packed[key], values, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_held_out_examples_come_once_each_in_order(batch_size):
    _, rows = in_memory()
    batches = list(held_out_batches(rows[2], 9, batch_size, 5, END, sharding_over(2), "tuning"))
    counted = sum(float(np.asarray(batch.weights).sum()) for batch in batches)
    assert counted == example_sizes(rows[2]).counted[:9].sum()
    inputs = [row[row > 0].tolist() for batch in batches for row in np.asarray(batch.inputs)]
    expected = [row[: row[-1] - 1].tolist() for row in rows[2].read(np.arange(9))]
    assert [row for row in inputs if row] == expected
    assert {batch.inputs.shape for batch in batches} == {(batch_size, LENGTH)}
    assert all((np.asarray(batch.sources) == 5).all() for batch in batches)
