"""Builds the global batches of training steps from rows, sharded over a mesh and read ahead."""

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from codellm_jax.mixture.examples import (
    WIDTH_BESIDE_TOKENS,
    arrays_of_examples,
    ids_of,
    marked_ids,
    pack,
    sizes_drawn,
    unpacked,
)
from codellm_jax.mixture.order import Draw, Order
from codellm_jax.mixture.rows import Rows
from codellm_jax.vocabulary import Vocabulary

# Examples whose packing is computed at once: a few megabytes.
EXAMPLES_AT_ONCE = 1 << 17
ROWS_COUNTED_AT_ONCE = 256  # held-out ones

Item = TypeVar("Item")
Array: TypeAlias = Any  # np.ndarray on the host before it is placed, jax.Array on devices after


class Batch(NamedTuple):
    """Arrays of shape [batch, length], in host memory or on devices; int32, `weights` float32."""

    inputs: Array
    targets: Array
    positions: Array  # restart at 0 after each end-of-document token
    segment_ids: Array  # number of the document in its row, from 1; 0 is padding
    weights: Array  # 1 where the loss counts the target, else 0
    sources: Array  # index into Order.sources


def batch_of_rows(rows: np.ndarray, sources: np.ndarray, end_of_document_id: int) -> Batch:
    """A batch in host memory from rows (int32 [B, L + 1]) and the source of each (int [B]).

    An end-of-document token belongs to the document it ends: positions and attention restart after it. Rows of
    instructions are encoded as in `examples.as_document`.
    """
    ids = ids_of(rows)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    begins = np.zeros_like(inputs)
    begins[:, 1:] = marked_ids(rows[:, :-2]) == end_of_document_id
    index = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    return Batch(
        inputs=inputs,
        targets=targets,
        positions=index - np.maximum.accumulate(np.where(begins, index, 0), axis=1),
        segment_ids=np.cumsum(begins, axis=1, dtype=np.int32) + 1,
        weights=(rows[:, 1:] >= 0).astype(np.float32),
        sources=np.broadcast_to(sources.astype(np.int32)[:, None], inputs.shape),
    )


def global_batch(
    step: int, batch_size: int, order: Order, rows: Sequence[Rows], end_of_document_id: int,
    sharding: jax.sharding.NamedSharding,
) -> tuple[Batch, Draw]:
    """The batch of one step: `batch_size` rows from position `step` * `batch_size`; a process reads only its own.

    Args:
      step: counted from 0.
      sharding: of a [batch, length] array; splits only the batch axis.

    Returns:
      The batch, and its draw with arrays of shape [batch].
    """
    draw = order.draw(np.arange(step * batch_size, (step + 1) * batch_size))
    length = rows[0].length

    def read(local: slice) -> Batch:
        tokens = read_drawn(rows, draw.source[local], draw.row[local], length + 1)
        return batch_of_rows(tokens, draw.source[local], end_of_document_id)

    return place(read, (batch_size, length), sharding), draw


def example_batch(
    step: int, batch_size: int, order: Order, examples: Sequence[Rows], rows: int, packing: bool,
    sharding: jax.sharding.NamedSharding,
) -> tuple[Batch, Draw]:
    """The batch of one tuning step: `batch_size` examples from position `step` * `batch_size`, each process its own.

    Args:
      step: counted from 0.
      batch_size: examples per step.
      rows: of the batch; without packing `batch_size`, with it at least the result of `rows_of_packed_steps`.
      sharding: of a [rows, length] array; splits only the batch axis.

    Returns:
      The batch, and its draw with arrays of shape [batch_size].
    """
    draw = order.draw(np.arange(step * batch_size, (step + 1) * batch_size))
    length = examples[0].length
    positions = sizes_drawn(examples, draw.source, draw.row).positions[None]
    places = pack(positions, length) if packing else unpacked(positions)
    row, column = places.row[0], places.column[0]

    def read(local: slice) -> Batch:
        first, last, _ = local.indices(rows)
        here = (first <= row) & (row < last)
        return _batch_of_examples(examples, draw.source[here], draw.row[here], row[here] - first, column[here],
                                  (last - first, length))

    return place(read, (rows, length), sharding), draw


def rows_of_packed_steps(
    order: Order, examples: Sequence[Rows], batch_size: int, steps: int, first_step: int = 0
) -> tuple[int, int]:
    """The most rows that any step needs when its examples are packed, and the columns that all steps fill.

    Counts steps `first_step` ... `steps` - 1.
    """
    most = filled = 0
    at_once = max(1, EXAMPLES_AT_ONCE // batch_size)
    for first in range(first_step, steps, at_once):
        last = min(first + at_once, steps)
        draw = order.draw(np.arange(first * batch_size, last * batch_size))
        positions = sizes_drawn(examples, draw.source, draw.row).positions.reshape(-1, batch_size)
        most = max(most, int(pack(positions, examples[0].length).rows.max()))
        filled += int(positions.sum())
    return most, filled


def _batch_of_examples(
    examples: Sequence[Rows], source: np.ndarray, number: np.ndarray, row: np.ndarray, column: np.ndarray,
    shape: tuple[int, int],
) -> Batch:
    """Reads the examples `number` of the sources `source` and places them at `row` and `column`, all int64 [N]."""
    cached = read_drawn(examples, source, number, shape[1] + 1 + WIDTH_BESIDE_TOKENS)
    return Batch(**arrays_of_examples(cached, source, row, column, shape))


def read_drawn(rows: Sequence[Rows], source: np.ndarray, number: np.ndarray, width: int) -> np.ndarray:
    """The rows `number` of the sources `source` (int64 [N]) as int32 [N, width]."""
    read = np.empty((len(source), width), np.int32)
    begun = [(source == index, rows[index].begin(number[source == index])) for index in np.unique(source)]
    for here, rows_of_source in begun:
        read[here] = rows_of_source()
    return read


def place(read: Callable[[slice], Batch], shape: tuple[int, int], sharding: jax.sharding.NamedSharding) -> Batch:
    """A global batch of `shape`; calls `read` once for each slice of the batch axis that this process holds."""
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
    sharding: jax.sharding.NamedSharding, stage: str = "pretraining",
) -> Iterator[Batch]:
    """The first `limit` rows of a split in order (in tuning, one example per row); rows of weight 0 pad the last."""
    count = min(limit, rows.count)
    for start in range(0, count, batch_size):

        def read(local: slice, start: int = start) -> Batch:
            numbers = start + np.arange(*local.indices(batch_size))
            if stage == "tuning":
                numbers = numbers[numbers < count]
                batch = _batch_of_examples(
                    [rows], np.zeros_like(numbers), numbers, np.arange(len(numbers)), np.zeros_like(numbers),
                    (len(range(*local.indices(batch_size))), rows.length))
                return batch._replace(sources=np.full_like(batch.sources, source))
            tokens = rows.read(np.minimum(numbers, count - 1))
            batch = batch_of_rows(tokens, np.full(len(numbers), source), end_of_document_id)
            return batch._replace(weights=batch.weights * (numbers < count)[:, None].astype(np.float32))

        yield place(read, (batch_size, rows.length), sharding)


@functools.lru_cache(maxsize=256)
def held_out_bytes(rows: Rows, limit: int, vocabulary: Vocabulary, stage: str = "pretraining") -> int:
    """UTF-8 bytes of the tokens that the loss counts in `held_out_batches` of these rows; read once per process.

    Tokens that are not text, such as the end of a document, count in the loss and have no bytes.
    """
    total = 0
    for start in range(0, min(limit, rows.count), ROWS_COUNTED_AT_ONCE):
        numbers = np.arange(start, min(start + ROWS_COUNTED_AT_ONCE, limit, rows.count))
        source = np.zeros_like(numbers)
        if stage == "tuning":
            shape = len(numbers), rows.length
            batch = _batch_of_examples([rows], source, numbers, np.arange(len(numbers)), source, shape)
        else:
            batch = batch_of_rows(rows.read(numbers), source, vocabulary.end_of_document_id)
        counted = batch.weights > 0
        total += int(vocabulary.bytes_behind(batch.inputs[counted], batch.targets[counted]).sum())
    return total


def read_ahead(
    make: Callable[[int], Item], first: int, last: int, depth: int = 4, threads: int = 4
) -> Generator[Item, None, None]:
    """Yields make(first) ... make(last - 1), computed by threads that stay up to `depth` items ahead.

    Reading a batch from a remote cache is mostly waiting, so several threads help: four keep up with a store whose
    latency is four steps.

    An exception of `make` is raised in place of its item. Closing the iterator ends the threads.
    """
    numbers = iter(range(first, last))
    ahead: collections.deque[concurrent.futures.Future[Item]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(min(threads, depth), thread_name_prefix="read_ahead")
    try:
        for number in itertools.islice(numbers, depth):
            ahead.append(pool.submit(make, number))
        while ahead:
            item = ahead.popleft().result()
            for number in itertools.islice(numbers, 1):
                ahead.append(pool.submit(make, number))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
