"""Finding and opening corpus files, local or gs://, plain or compressed; and what is said of what they lose."""

import collections
import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

# What `lines` raises in a file that is broken or breaks off.
BROKEN_FILE = (EOFError, zlib.error, gzip.BadGzipFile)


class Lost(NamedTuple):
    """What a reader yields in place of a record that it cannot give."""

    reason: str


class Counts(collections.Counter[str]):
    """How many records were lost for which reason; told as a line of text."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.items())) or "there are no records"


def matches(patterns: str | Sequence[str], name: str) -> list[str]:
    """The files that a glob or several match, sorted; absolute paths, or gs:// ones.

    Raises:
      FileNotFoundError: one of the patterns matches no file.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found: set[str] = set()
    for pattern in patterns:
        files = found_by(pattern)
        if not files:
            raise FileNotFoundError(f"{name}: no file matches {pattern!r} (seen from {os.getcwd()}).")
        found.update(files)
    return sorted(found)


def found_by(pattern: str) -> list[str]:
    """The files that one glob matches, in no order; none is no error."""
    return _remote_matches(pattern) if "://" in pattern else _local_matches(pattern)


def _local_matches(pattern: str) -> list[str]:
    pattern = os.path.abspath(os.path.expanduser(pattern))
    # A file's own name may hold what a glob would read as a wildcard.
    candidates = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return [file for file in candidates if os.path.isfile(file)]


def _remote_matches(pattern: str) -> list[str]:
    from etils import epath

    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    root = epath.Path("/".join(parts[:fixed]))
    if fixed == len(parts):
        return [os.fspath(root)] if root.exists() else []
    return [os.fspath(file) for file in root.glob("/".join(parts[fixed:])) if not file.is_dir()]


def below(folder: str) -> list[str]:
    """All files in a folder and the folders below it, sorted; hidden folders are left out, links are followed.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if "://" in folder:
        from etils import epath

        walk = ((os.fspath(root), folders, names) for root, folders, names in epath.Path(folder).walk())
        files = [f"{root.rstrip('/')}/{name}" for root, _, names in walk for name in names]
        files = [file for file in files if "/." not in file.removeprefix(folder)]
        if not files and not epath.Path(folder).exists():
            raise FileNotFoundError(f"there is no folder {folder!r}")
        return sorted(files)
    top = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isdir(top):
        raise FileNotFoundError(f"there is no folder {top!r}")
    files, visited = [], set()
    for root, folders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(root)
        # A link may lead to a folder that is walked anyway, or in a circle.
        folders[:] = [] if real in visited else sorted(name for name in folders if not name.startswith("."))
        files += [] if real in visited else [os.path.join(root, name) for name in names]
        visited.add(real)
    return sorted(file for file in files if os.path.isfile(file))


def _open(file: str) -> BinaryIO:
    if "://" not in file:
        return open(file, "rb")
    from etils import epath

    return epath.Path(file).open("rb")


def size(file: str) -> int:
    """Bytes of a file as it lies there, compressed or not."""
    if "://" not in file:
        return os.path.getsize(file)
    from etils import epath

    return epath.Path(file).stat().length


def lines(file: str) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file, with their line ends.

    Raises:
      EOFError, zlib.error or gzip.BadGzipFile: the file is broken or breaks off.
    """
    with _open(file) as raw:
        if file.endswith(".gz"):
            yield from gzip.open(raw)
        elif file.endswith(".zst"):
            yield from _lines_of_zstd(raw)
        else:
            yield from raw


def _lines_of_zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd stream; the library's own reader does not notice one that breaks off."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Reading .zst files needs zstandard: pip install zstandard.") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = None, b""
    while chunk := raw.read(1 << 20):
        while chunk:
            frame = frame or decompressor.decompressobj()
            try:
                rest += frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        *whole, rest = rest.split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest
    if frame is not None:
        raise EOFError("The zstd stream breaks off.")
