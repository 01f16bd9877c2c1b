"""Files of records of fixed size, sorted and parted into ranges, one of which is read without the rest.

A file begins with where each range begins and the last one ends, uint64 [ranges + 1] in records, and has the records
behind. Files are written whole, under another name until they are.
"""

import os
import uuid
from collections.abc import Iterable

import numpy as np
from etils import epath


def index_bytes(count: int) -> int:
    """Bytes that a file of so many ranges has before its records."""
    return 8 * (count + 1)


def write(path: epath.Path, records: np.ndarray, ranges: np.ndarray, count: int) -> None:
    """Writes records.

    Args:
      path: of the file.
      records: structured [N], sorted by range.
      ranges: int [N], the range of each, ascending.
      count: of ranges.
    """
    begins = np.searchsorted(ranges, np.arange(count + 1)).astype(np.uint64)
    write_bytes(path, begins.tobytes() + records.tobytes())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all; several may write the same."""
    building = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    building.write_bytes(content)
    building.replace(path)


def read(paths: Iterable[epath.Path], dtype: np.dtype, count: int, first: int, last: int) -> np.ndarray:
    """The records of ranges first ... last - 1 of some files, one file after the other."""
    found = [np.zeros(0, dtype)]
    for path in paths:
        with path.open("rb") as file:
            file.seek(8 * first)
            head = np.frombuffer(file.read(8 * (last - first + 1)), np.uint64)
            file.seek(index_bytes(count) + int(head[0]) * dtype.itemsize)
            found.append(np.frombuffer(file.read(int(head[-1] - head[0]) * dtype.itemsize), dtype))
    return np.concatenate(found)


def rows(path: epath.Path, dtype: np.dtype, numbers: np.ndarray) -> np.ndarray:
    """Some records of a file without ranges, by their numbers. On a disk no others are read."""
    if "://" in os.fspath(path):
        return np.frombuffer(path.read_bytes(), dtype)[numbers]
    return np.memmap(path, dtype, "r")[numbers]


def column(path: epath.Path, dtype: np.dtype, name: str) -> np.ndarray:
    """One field of all records of a file without ranges."""
    if "://" in os.fspath(path):
        return np.frombuffer(path.read_bytes(), dtype)[name]
    return np.array(np.memmap(path, dtype, "r")[name])
