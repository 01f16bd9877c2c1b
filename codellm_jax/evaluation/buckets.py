"""Ragged sequences in arrays of few shapes, on one device or many; shared by scoring and decoding.

Every shape is compiled once, so shapes come from short lists: lengths from parts of octaves (`length_bucket`), numbers
of rows from powers of two.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SHORTEST = 16  # tokens in the smallest bucket; all lengths below it share its program


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, and at least 1."""
    return 1 << max(0, number - 1).bit_length()


def length_bucket(length: int, longest: int, per_octave: int = 4) -> int:
    """The smallest of 16, 32, 64, 80, 96, 112, 128, 160, ... (four per octave from 64 on) that holds `length`.

    From 64 tokens on, at most 20% of a row is padding. The list ends with `longest`, whatever it is: 19 lengths up to
    1,024, four more for each doubling. With more lengths per octave, all are still multiples of 16.

    Args:
      length: tokens, at most `longest`.
      longest: the longest possible row.
      per_octave: lengths between a power of two and the next, itself a power of two.
    """
    octave = power_of_two(length)
    if octave <= 64:
        return min(max(octave, SHORTEST), longest)
    step = max(SHORTEST, octave // (2 * per_octave))
    return min(round_up(length, step), longest)


def shards_of(sharding: NamedSharding | None) -> int:
    """The number of parts into which a [B, ...] sharding splits the batch axis; B must be a multiple of it."""
    if sharding is None:
        return 1
    return sharding.num_devices // sharding.shard_shape((sharding.num_devices, 1))[0]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """Shards an array [B] or [B, ...], which every process holds whole, over the devices by its batch axis."""
    if sharding is None:
        return jax.numpy.asarray(array)
    spec = PartitionSpec(*tuple(sharding.spec)[:1], *[None] * (array.ndim - 1))
    sharding = NamedSharding(sharding.mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicate(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Gathers a result, under jit, onto every device, so that every process can read it."""
    if sharding is None:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(sharding.mesh, PartitionSpec()))


def unknown_id(ids: Sequence[int], vocabulary_size: int) -> int | None:
    """An id outside [0, vocabulary_size), which the device would not detect; None if there is none."""
    lowest, highest = min(ids, default=0), max(ids, default=0)
    if lowest < 0:
        return lowest
    return highest if highest >= vocabulary_size else None
