"""Whether cached rows are those that were written.

TensorStore's checksums tell that a chunk is whole, and not that it is this chunk: files that change places with others,
of this cache or another one, are read without a word. Two digests tell:

  content_hash   of all rows. What is small is read whole when a run opens it, and compared.
  heads          of the first rows of each file. Where all is not read at first, the first read of a file reads its
                 head too, and compares: 16 rows of 4,096.
"""

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore

from codellm_jax.mixture.examples import Found
from codellm_jax.mixture.tokens import SPLITS

ROWS_A_FILE = 4096  # as `rows` writes them
ROWS_OF_HEAD = 16  # one chunk
BYTES_READ_WHOLE = 32 << 20
FILES_AT_ONCE = 256
# Errors of TensorFlow's, Google's and Python's clients of remote storage.
OF_STORAGE = frozenset((
    "UnavailableError", "DeadlineExceededError", "ResourceExhaustedError", "AbortedError", "PermissionDeniedError",
    "ServerError", "TooManyRequests", "RetryError", "ConnectionError", "TimeoutError", "PermissionError",
    "TransportError"))


class DamagedRows(ValueError):
    """What lies in a cache is not what was written; the message says in what it differs."""


def heads_of(store: tensorstore.TensorStore, count: int) -> list[str]:
    """A digest of the first rows of each file of an array of `count` rows."""
    found: list[str] = []
    files = range(-(-count // ROWS_A_FILE))
    for first in files[::FILES_AT_ONCE]:
        found += heads_begun(store, count, files[first : first + FILES_AT_ONCE])()
    return found


def heads_begun(store: tensorstore.TensorStore, count: int, files: Sequence[int]) -> Callable[[], list[str]]:
    """Begins to read the heads of some files, and gives what waits for them and returns their digests."""
    parts = [np.arange(number * ROWS_A_FILE, min(number * ROWS_A_FILE + ROWS_OF_HEAD, count)) for number in files]
    if not parts:
        return list
    reading, ends = store[np.concatenate(parts)].read(), np.cumsum([len(part) for part in parts])[:-1]
    return lambda: [hashlib.sha256(head.astype("<u4").tobytes()).hexdigest()[:16]
                    for head in np.split(reading.result(), ends)]


class Heads:
    """The heads of one array, each compared once a process."""

    def __init__(self, expected: Sequence[str]) -> None:
        self._expected = expected
        self._checked = np.zeros(len(expected), bool)
        self._lock = threading.Lock()

    def begin(self, store: tensorstore.TensorStore, count: int, numbers: np.ndarray) -> Callable[[], None]:
        """Begins to read the heads of the files that rows of these sorted numbers lie in, where they are not compared
        yet; gives what waits for them.

        Raises:
          DamagedRows, by what is given: a file is not the one that was written.
        """
        with self._lock:
            files = np.unique(numbers // ROWS_A_FILE)
            files = files[files < len(self._expected)]
            new: list[int] = files[~self._checked[files]].tolist()
            self._checked[new] = True
        digests = heads_begun(store, count, new)

        def compare() -> None:
            for number, digest in zip(new, digests(), strict=True):
                if digest != self._expected[number]:
                    raise DamagedRows(f"rows {number * ROWS_A_FILE} to {(number + 1) * ROWS_A_FILE - 1} are others "
                                      "than were written")

        return compare


def require_written(
    store: tensorstore.TensorStore, count: int, width: int, content_hash: str,
    hash_of: Callable[[Iterable[np.ndarray]], str],
) -> bool:
    """Whether all rows were compared, which those of a small array are.

    Args:
      store: the array.
      count, width: what its shape should be.
      content_hash: of its rows, as `hash_of` takes it.

    Raises:
      DamagedRows: the array has another shape, or other rows.
    """
    if tuple(store.shape) != (count, width):
        raise DamagedRows(f"the array has the shape {tuple(store.shape)} instead of {(count, width)}")
    if count * width * store.dtype.numpy_dtype.itemsize > BYTES_READ_WHOLE:
        return False
    blocks = (store[first : min(count, first + ROWS_A_FILE)].read().result() for first in range(0, count, ROWS_A_FILE))
    if hash_of(blocks) != content_hash:
        raise DamagedRows("its rows differ from those written")
    return True


def recorded_splits(content: bytes, key: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """What a cache.json tells: how names of its arrays end, and the facts of each split, as fields of `rows.Rows`.

    Raises:
      DamagedRows: it is no JSON, or not what `rows.finish_cache` wrote for this key.
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


def is_transient(error: Exception) -> bool:
    """Whether storage could not be read just now, which says nothing of what lies there."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & OF_STORAGE) or any(word in str(error) for word in (
        "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "CANCELLED"))
