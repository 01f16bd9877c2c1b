"""Batches worked out by hand, and the same global batches whatever the mesh and the hosts."""

import threading
import time
from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np
import pytest

from codellm_jax.mixture.batches import (
    Batch,
    batch_of_rows,
    global_batch,
    held_out_batches,
    place,
    read_ahead,
)
from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.rows import Rows
from codellm_jax.mixture.schedules import constant
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh

END = 1


class Numbered(Rows):
    """Rows in memory: token k of row n of a source is 1000 * source + 10 * n + k, with ends where a test puts them."""

    def begin(self, numbers: np.ndarray) -> Callable[[], np.ndarray]:
        self.__dict__.setdefault("asked_for", []).extend(np.asarray(numbers).tolist())
        assert (np.asarray(numbers) < self.count).all()
        rows = int(self.name[-1]) * 1000 + 10 * np.asarray(numbers)[:, None] + np.arange(self.length + 1)
        return lambda: rows.astype(np.int32)


def numbered(source: int, count: int, length: int = 4) -> Numbered:
    return Numbered(f"text.n{source}", "train", "", count, length, count * (length + 1), 1, "")


def in_memory() -> tuple[Order, list[Numbered]]:
    sources = (Source("text.n1", 20, Fraction(2)), Source("text.n2", 13, Fraction(1)), Source("code.n3", 11))
    return Order(3, constant(0.4), sources), [numbered(1, 20), numbered(2, 13), numbered(3, 11)]


def sharding_over(devices: int, shape: MeshShape | None = None) -> jax.sharding.NamedSharding:
    return batch_sharding(make_mesh(shape or MeshShape(), jax.devices()[:devices]))


def test_documents_within_rows_by_hand():
    rows = np.array([
        [7, 8, END, 9, 5, END],  # ends inside, and as the last target
        [END, 7, 8, 9, 5, 6],  # ends at the first column
        [7, END, END, 9, END, 3],  # an empty document; ends at the last input
        [7, 8, 9, 4, 5, 6],  # no end
        [END, END, END, END, END, END],
    ], np.int32)
    batch = batch_of_rows(rows, np.array([2, 0, 1, 1, 0]), END)
    assert batch.inputs.tolist() == [
        [7, 8, 1, 9, 5], [1, 7, 8, 9, 5], [7, 1, 1, 9, 1], [7, 8, 9, 4, 5], [1, 1, 1, 1, 1]]
    assert batch.targets.tolist() == [
        [8, 1, 9, 5, 1], [7, 8, 9, 5, 6], [1, 1, 9, 1, 3], [8, 9, 4, 5, 6], [1, 1, 1, 1, 1]]
    assert batch.positions.tolist() == [
        [0, 1, 2, 0, 1], [0, 0, 1, 2, 3], [0, 1, 0, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [
        [1, 1, 1, 2, 2], [1, 2, 2, 2, 2], [1, 1, 2, 3, 3], [1, 1, 1, 1, 1], [1, 2, 3, 4, 5]]
    assert batch.weights.tolist() == [[1.0] * 5] * 5
    assert batch.sources.tolist() == [[2] * 5, [0] * 5, [1] * 5, [1] * 5, [0] * 5]
    assert [np.asarray(field).dtype.name for field in batch] == ["int32"] * 4 + ["float32", "int32"]


def test_a_batch_holds_the_rows_of_the_order():
    order, rows = in_memory()
    for step in (0, 1, 7, 10**9):
        batch, draw = global_batch(step, 8, order, rows, END, sharding_over(2))
        expected = order.draw(np.arange(8 * step, 8 * step + 8))
        for found, wanted in zip(draw, expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        for position in range(8):
            first = 1000 * (expected.source[position] + 1) + 10 * expected.row[position]
            assert batch.inputs[position].tolist() == [first, first + 1, first + 2, first + 3]
            assert batch.targets[position].tolist() == [first + 1, first + 2, first + 3, first + 4]
            assert batch.sources[position].tolist() == [expected.source[position]] * 4


def test_two_batches_of_half_the_size_are_the_same_rows():
    order, rows = in_memory()
    large = [global_batch(step, 16, order, rows, END, sharding_over(1))[0] for step in range(2)]
    small = [global_batch(step, 8, order, rows, END, sharding_over(1))[0] for step in range(4)]
    for whole, parts in zip(zip(*large, strict=True), zip(*small, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(whole), np.concatenate(parts))


@pytest.mark.parametrize(("devices", "shape"), [
    (2, None), (8, None), (8, MeshShape(data=2, fsdp=4)), (8, MeshShape(data=2, fsdp=2, model=2)),
    (4, MeshShape(data=1, model=4))])
def test_the_same_global_batch_on_every_mesh(devices, shape):
    order, rows = in_memory()
    one, _ = global_batch(5, 8, order, rows, END, sharding_over(1))
    sharding = sharding_over(devices, shape)
    many, _ = global_batch(5, 8, order, rows, END, sharding)
    shards = sharding.mesh.shape["data"] * sharding.mesh.shape["fsdp"]
    for found, wanted in zip(many, one, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert {shard.data.shape for shard in found.addressable_shards} == {(8 // shards, 4)}


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_read_their_own_rows_alone(hosts, monkeypatch, of_one_host):
    whole, _ = global_batch(2, 16, *in_memory(), END, sharding_over(8))
    sharding, devices = sharding_over(8), jax.devices()
    collected = np.zeros((16, 4), np.int32)
    for host in range(hosts):
        own = set(devices[host * 8 // hosts : (host + 1) * 8 // hosts])
        monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, shard: [
            (index, shard(index)) for index in sharding.addressable_devices_indices_map(shape).values()])
        order, rows = in_memory()
        part, draw = global_batch(2, 16, order, rows, END, of_one_host(sharding, own))
        monkeypatch.undo()
        read = [(source, row) for source, each in enumerate(rows) for row in each.__dict__.get("asked_for", [])]
        first = host * 16 // hosts
        mine = slice(first, first + 16 // hosts)
        assert sorted(read) == sorted(zip(draw.source[mine].tolist(), draw.row[mine].tolist(), strict=True))
        assert len(draw.source) == 16  # every host counts the whole batch in its ledger
        for index, data in part.inputs:
            collected[index] = data
    np.testing.assert_array_equal(collected, whole.inputs)


def test_replicas_of_a_slice_are_read_once():
    calls = []

    def read(local: slice) -> Batch:
        calls.append(local.indices(8))
        return batch_of_rows(np.zeros((len(range(*local.indices(8))), 5), np.int32), np.zeros(2, np.int32)[:1], END)

    place(read, (8, 4), sharding_over(8, MeshShape(data=2, model=4)))
    assert sorted(calls) == [(0, 4, 1), (4, 8, 1)]


@pytest.mark.parametrize(("limit", "batch_size", "devices"), [(7, 4, 1), (8, 4, 2), (100, 8, 8), (1, 8, 4), (3, 4, 2)])
def test_held_out_rows_are_each_covered_once(limit, batch_size, devices):
    rows = numbered(2, 11)
    batches = list(held_out_batches(rows, limit, batch_size, 5, END, sharding_over(devices)))
    count = min(limit, 11)
    assert len(batches) == -(-count // batch_size)
    seen = []
    for batch in batches:
        assert batch.inputs.shape == (batch_size, 4) and (np.asarray(batch.sources) == 5).all()
        for inputs, weights in zip(np.asarray(batch.inputs), np.asarray(batch.weights), strict=True):
            assert set(weights.tolist()) in ({0.0}, {1.0})
            if weights[0]:
                seen.append(int(inputs[0] - 2000) // 10)
    assert seen == list(range(count))


def test_no_held_out_row():
    assert list(held_out_batches(numbered(1, 0), 8, 4, 0, END, sharding_over(1))) == []


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_read_ahead_keeps_the_order_and_stays_a_few_ahead():
    made = []

    def make(number: int) -> int:
        made.append(number)
        return number * number

    items = read_ahead(make, 3, 60, depth=2)
    assert next(items) == 9
    time.sleep(0.3)
    assert len(made) == 1 + 2  # taken, and waiting
    assert list(items) == [number * number for number in range(4, 60)]
    assert sorted(made) == list(range(3, 60)) and not reading_threads()
    assert list(read_ahead(make, 5, 5)) == []
    assert list(read_ahead(make, 6, 5)) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_read_ahead_raises_where_the_item_would_have_been(depth):
    def make(number: int) -> int:
        if number == 4:
            raise OSError("a disk is gone")
        return number

    items = read_ahead(make, 0, 100, depth)
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="a disk is gone"):
        next(items)
    assert not reading_threads()
    with pytest.raises(StopIteration):
        next(items)


def test_read_ahead_hands_over_even_an_interrupt():
    def make(number: int) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(read_ahead(make, 0, 2))
    assert not reading_threads()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_ends_the_thread(taken):
    items = read_ahead(lambda number: number, 0, 10**9, depth=2)
    for _ in range(taken):
        next(items)
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 2 and not reading_threads()


def test_an_abandoned_iterator_ends_the_thread():
    items = read_ahead(lambda number: number, 0, 10**9)
    next(items)
    assert reading_threads()
    del items
    assert not reading_threads()


def test_several_items_are_made_at_the_same_time_and_come_in_order():
    """As batches out of a store that takes longer to answer than a step takes."""
    together = threading.Barrier(4, timeout=20)  # lets none through until four are there

    def make(number: int) -> int:
        together.wait()
        return number

    assert list(read_ahead(make, 0, 16, depth=8, threads=4)) == list(range(16))


def test_reading_overlaps_with_what_the_consumer_does():
    def make(number: int) -> int:
        time.sleep(0.03)
        return number

    items = read_ahead(make, 0, 12)
    waited = 0.0
    for _ in range(12):
        began = time.monotonic()
        next(items)
        waited += time.monotonic() - began
        time.sleep(0.05)
    assert waited < 0.2  # 0.36 if nothing were made ahead
