"""Checks that cached rows are the rows that were written.

TensorStore's checksums show that a chunk is intact, but not that it is the right chunk: files swapped within a cache or
between caches, and overwritten rows, are read without an error. Two digests detect this:

  content_hash   of all rows. Small arrays are read whole and compared when a run opens them.
  row_digests    one for each row, in an array beside the rows. Every row is compared each time it is read.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore

from codellm_jax.mixture.examples import Found
from codellm_jax.mixture.tokens import SPLITS

try:
    from isal.isal_zlib import crc32  # the same values in a third of the time
except ImportError:  # not available for this processor
    from zlib import crc32

BYTES_READ_WHOLE = 32 << 20
ROWS_AT_ONCE = 4096


class DamagedRows(ValueError):
    """The content of a cache is not what was written; the message names the difference."""


def row_digests(salt: str, numbers: Iterable[int], rows: np.ndarray) -> np.ndarray:
    """A CRC-32 of each row, its number and the name of the array: uint32 [N].

    It detects accidents, not tampering: whoever rewrites rows on purpose can rewrite the digests too.

    Args:
      salt: names the array, so that the same rows in another array have other digests.
      numbers: of the rows.
      rows: [N, width], of the type in which they are stored.
    """
    start = crc32(salt.encode())
    stored = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    return np.fromiter((crc32(row, crc32(b"%d " % number, start))
                        for number, row in zip(numbers, stored, strict=True)), np.uint32, len(stored))


def require_rows(salt: str, numbers: np.ndarray, rows: np.ndarray, written: np.ndarray) -> None:
    """Raises DamagedRows if the digests of rows differ from those written; arguments as for `row_digests`."""
    other = row_digests(salt, numbers.tolist(), rows) != written
    if other.any():
        raise DamagedRows(f"row {numbers[other][0]} is another than was written")


def require_written(
    store: tensorstore.TensorStore, count: int, width: int, content_hash: str,
    hash_of: Callable[[Iterable[np.ndarray]], str],
) -> bool:
    """Checks the shape and, for a small array, all rows; returns whether the rows were compared.

    Args:
      store: the array.
      count, width: its expected shape.
      content_hash: of its rows, as computed by `hash_of`.

    Raises:
      DamagedRows: the shape or the rows differ.
    """
    if tuple(store.shape) != (count, width):
        raise DamagedRows(f"the array has the shape {tuple(store.shape)} instead of {(count, width)}")
    if count * width * store.dtype.numpy_dtype.itemsize > BYTES_READ_WHOLE:
        return False
    blocks = (store[first : min(count, first + ROWS_AT_ONCE)].read().result()
              for first in range(0, count, ROWS_AT_ONCE))
    if hash_of(blocks) != content_hash:
        raise DamagedRows("its rows differ from those written")
    return True


def recorded_splits(content: bytes, key: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Parses a cache.json: the suffix of its arrays' names, and the facts of each split as fields of `rows.Rows`.

    Raises:
      DamagedRows: it is not JSON, or not what `rows.finish_cache` wrote for this key.
    """
    try:
        recorded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedRows(f"its cache.json is not JSON: {error}") from None
    if not isinstance(recorded, dict) or recorded.get("key") != json.loads(json.dumps(key)):
        raise DamagedRows("its cache.json belongs to other rows")
    suffix, splits = recorded.get("suffix", ""), recorded.get("splits")
    if not isinstance(suffix, str) or not re.fullmatch(r"(\.[0-9a-f]{8})?", suffix):  # it becomes part of a path
        raise DamagedRows(f"its cache.json names arrays {suffix!r}")
    if not isinstance(splits, dict) or "train" not in splits:
        raise DamagedRows("its cache.json has no training split")
    return suffix, {split: _facts(split, facts) for split, facts in splits.items()}


def _facts(split: str, facts: Any) -> dict[str, Any]:
    fields = dataclasses.fields(Found)
    if isinstance(facts, dict):
        facts = {name: value for name, value in facts.items() if name != "heads"}  # from an earlier version
    if split not in SPLITS or not isinstance(facts, dict) or not facts.keys() <= {field.name for field in fields}:
        raise DamagedRows(f"its cache.json has unknown facts about {split!r}")
    default, found = Found(), dict[str, Any]()
    for field in fields:
        expected = getattr(default, field.name)
        value = facts.get(field.name, expected)
        if type(value) is not type(expected) or isinstance(value, int) and value < 0 or isinstance(value, list) and any(
                not isinstance(each, str) for each in value):
            raise DamagedRows(f"its cache.json says {field.name} = {value!r} of {split}")
        found[field.name] = tuple(value) if isinstance(value, list) else value
    return found
