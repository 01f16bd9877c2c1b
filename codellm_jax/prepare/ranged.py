"""Files of fixed-size records, sorted and divided into ranges, each of which can be read without the rest.

A file begins with the offsets of its ranges and the end of the last, uint64 [ranges + 1] in records, followed by the
records. Files are written under a temporary name until they are complete.

On gs:// a range takes two requests, and those for many files are sent together: TensorStore requests exactly the bytes
needed, with 32 requests in flight. TensorFlow's files, which etils opens there, read up to 64 MiB ahead, which suits
only sequential reading.
"""

import contextlib
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from etils import epath

BYTES_A_PIECE, BYTES_AT_ONCE = 8 << 20, 64 << 20  # copied to the local disk
_IN_BUCKET = "gs://"


def index_bytes(count: int) -> int:
    """Bytes before the records of a file with `count` ranges."""
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
    file = Growing(path)
    file.write(begins)
    file.write(records)
    file.close()


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically; several processes may write the same file."""
    file = Growing(path)
    file.write(content)
    file.close()


class Growing:
    """A file written piece by piece, under a temporary name until it is complete."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._building = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self._held = contextlib.ExitStack()  # on gs:// etils opens a context manager
        self._file: Any = self._held.enter_context(self._building.open("wb"))

    def write(self, piece: bytes | np.ndarray) -> None:
        """Appends bytes, or those of an array."""
        self._file.write(piece if isinstance(piece, bytes) else piece.tobytes())

    def close(self) -> None:
        """Completes the file and moves it into place."""
        self._held.close()
        self._building.replace(self._path)

    def discard(self) -> None:
        """Removes the incomplete file."""
        self._held.close()
        self._building.unlink(missing_ok=True)


def read(paths: Sequence[epath.Path], dtype: np.dtype, count: int, first: int, last: int) -> np.ndarray:
    """The records of ranges first ... last - 1 of some files, concatenated in their order."""
    heads = [np.frombuffer(head, np.uint64).astype(np.int64)
             for head in pieces((path, 8 * first, 8 * (last + 1)) for path in paths)]
    behind = index_bytes(count)
    found = pieces((path, behind + int(head[0]) * dtype.itemsize, behind + int(head[-1]) * dtype.itemsize)
                   for path, head in zip(paths, heads, strict=True))
    return np.frombuffer(bytearray().join(found), dtype)  # a bytearray makes it writable


def pieces(wanted: Iterable[tuple[epath.Path, int, int]]) -> list[bytes]:
    """Byte ranges of files, each given as (path, begin, end).

    Raises:
      OSError: a file is missing or too short.
    """
    asked = list(wanted)
    if any(os.fspath(path).startswith(_IN_BUCKET) for path, _, _ in asked):
        return _from_bucket(asked)
    found = []
    for path, begin, end in asked:
        if end > begin:
            with path.open("rb") as file:
                file.seek(begin)
                found.append(file.read(end - begin))
        else:
            found.append(b"")
    return _whole(asked, found)


def _from_bucket(asked: Sequence[tuple[epath.Path, int, int]]) -> list[bytes]:
    futures = []
    for path, begin, end in asked:
        bucket, _, name = os.fspath(path).removeprefix(_IN_BUCKET).partition("/")
        futures.append(_bucket(bucket).read(name, byte_range=slice(begin, end)) if end > begin else None)
    found = []
    for (path, _, _), future in zip(asked, futures, strict=True):
        try:
            answer = None if future is None else future.result()
        except ValueError as error:  # TensorStore raises it for every failure
            raise OSError(f"{path} cannot be read: {error}") from None
        if answer is not None and answer.state != "value":
            raise FileNotFoundError(f"{path} is gone.")
        found.append(b"" if answer is None else answer.value)
    return _whole(asked, found)


@functools.lru_cache
def _bucket(name: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.open({"driver": "gcs", "bucket": name}).result()


def _whole(asked: Sequence[tuple[epath.Path, int, int]], found: list[bytes]) -> list[bytes]:
    for (path, begin, end), piece in zip(asked, found, strict=True):
        if len(piece) != max(0, end - begin):
            raise OSError(f"{path} is shorter than it was written.")
    return found


def copy(wanted: Iterable[tuple[epath.Path, int, int]], to: BinaryIO) -> list[int]:
    """Appends byte ranges of files, given as for `pieces`, to a local file; returns the size of each range."""
    sizes, held, some = [], 0, []
    for path, begin, end in wanted:
        sizes.append(end - begin)
        for at in range(begin, end, BYTES_A_PIECE):
            some.append((path, at, min(at + BYTES_A_PIECE, end)))
            held += some[-1][2] - at
            if held >= BYTES_AT_ONCE:
                to.writelines(pieces(some))
                held, some = 0, []
    to.writelines(pieces(some))
    to.flush()
    return sizes


@contextlib.contextmanager
def on_disk(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for random access; one on gs:// is first copied whole to the local disk."""
    if "://" not in os.fspath(path):
        with open(path, "rb") as own:
            yield own
        return
    with tempfile.TemporaryFile() as here:
        with path.open("rb") as remote:
            shutil.copyfileobj(remote, here, 1 << 20)
        here.seek(0)
        yield here
