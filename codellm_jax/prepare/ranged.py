"""Files of records of fixed size, sorted and parted into ranges, one of which is read without the rest.

A file begins with where each range begins and the last one ends, uint64 [ranges + 1] in records, and has the records
behind. Files are written whole, under another name until they are.
"""

import uuid
from collections.abc import Iterable

import numpy as np
from etils import epath

BYTES_BETWEEN = 64 << 10  # of records that nobody wants: reading them takes less than asking once more


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
    """Some records of a file without ranges, by their numbers, ascending; no more than what lies between neighbours is
    read besides.
    """
    found = np.zeros(len(numbers), dtype)
    apart = np.flatnonzero(np.diff(numbers) * dtype.itemsize > BYTES_BETWEEN) + 1
    with path.open("rb") as file:
        for those in np.split(np.arange(len(numbers)), apart):
            if len(those):
                first, last = int(numbers[those[0]]), int(numbers[those[-1]])
                file.seek(first * dtype.itemsize)
                read_here = np.frombuffer(file.read((last - first + 1) * dtype.itemsize), dtype)
                found[those] = read_here[numbers[those] - first]
    return found
