"""Rows to global batches: what one step trains on, spread over the devices of a mesh, read ahead of the step."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from codellm_jax.mixture.order import Draw, Order
from codellm_jax.mixture.rows import Rows

Item = TypeVar("Item")
Array: TypeAlias = Any  # np.ndarray on the host before it is placed, jax.Array on devices after


class Batch(NamedTuple):
    """Arrays of shape [batch, length], in host memory or on devices; int32, `weights` float32."""

    inputs: Array
    targets: Array
    positions: Array  # restart at 0 after each end-of-document token
    segment_ids: Array  # which document of the row, from 1; 0 is padding
    weights: Array  # 1 where the loss counts the target, else 0
    sources: Array  # index into Order.sources


def batch_of_rows(rows: np.ndarray, sources: np.ndarray, end_of_document_id: int) -> Batch:
    """A batch in host memory from rows (int32 [B, L + 1]) and the source of each (int [B]).

    An end-of-document token belongs to the document it ends: positions and attention restart after it.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    begins = np.zeros_like(inputs)
    begins[:, 1:] = inputs[:, :-1] == end_of_document_id
    index = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return Batch(
        inputs=inputs,
        targets=targets,
        positions=index - np.maximum.accumulate(np.where(begins, index, 0), axis=1),
        segment_ids=np.cumsum(begins, axis=1, dtype=np.int32) + 1,
        weights=np.ones(inputs.shape, np.float32),
        sources=np.broadcast_to(sources.astype(np.int32)[:, None], inputs.shape),
    )


def global_batch(
    step: int, batch_size: int, order: Order, rows: Sequence[Rows], end_of_document_id: int,
    sharding: jax.sharding.NamedSharding,
) -> tuple[Batch, Draw]:
    """The batch of one step: rows `step` * `batch_size` and on, of which only this process's own are read.

    Args:
      step: counted from 0.
      sharding: of a [batch, length] array; splits the batch axis alone.

    Returns:
      The batch, and what was drawn for it, all [batch].
    """
    draw = order.draw(np.arange(step * batch_size, (step + 1) * batch_size))
    length = rows[0].length

    def read(local: slice) -> Batch:
        tokens = np.empty((len(draw.row[local]), length + 1), np.int32)
        for source in np.unique(draw.source[local]):
            here = draw.source[local] == source
            tokens[here] = rows[source].read(draw.row[local][here])
        return batch_of_rows(tokens, draw.source[local], end_of_document_id)

    return place(read, (batch_size, length), sharding), draw


def place(read: Callable[[slice], Batch], shape: tuple[int, int], sharding: jax.sharding.NamedSharding) -> Batch:
    """A global batch of `shape` from `read`, called once for each slice of the batch axis that this process holds."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    slices = {index[0].indices(shape[0]): index[0] for index in indices if index is not None}
    parts = {bounds: read(local) for bounds, local in slices.items()}

    def array(field: int) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return np.asarray(parts[index[0].indices(shape[0])][field])

        return jax.make_array_from_callback(shape, sharding, shard)

    return Batch(*map(array, range(len(Batch._fields))))


def held_out_batches(
    rows: Rows, limit: int, batch_size: int, source: int, end_of_document_id: int,
    sharding: jax.sharding.NamedSharding,
) -> Iterator[Batch]:
    """The first `limit` rows of a split in order; the last batch is filled up with rows of weight 0."""
    count = min(limit, rows.count)
    for start in range(0, count, batch_size):

        def read(local: slice, start: int = start) -> Batch:
            numbers = start + np.arange(*local.indices(batch_size))
            tokens = rows.read(np.minimum(numbers, count - 1))
            batch = batch_of_rows(tokens, np.full(len(numbers), source), end_of_document_id)
            return batch._replace(weights=batch.weights * (numbers < count)[:, None].astype(np.float32))

        yield place(read, (batch_size, rows.length), sharding)


def read_ahead(make: Callable[[int], Item], first: int, last: int, depth: int = 2) -> Generator[Item, None, None]:
    """Yields make(first) ... make(last - 1), made by a thread that stays up to `depth` items ahead.

    An exception of `make` is raised where its item would have been. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def offer(item: Item | None, error: BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for number in range(first, last):
                if not offer(make(number), None):
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            offer(None, error)

    thread = threading.Thread(target=work, name="read_ahead", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
