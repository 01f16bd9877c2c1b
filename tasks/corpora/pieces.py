"""Large files read in pieces, so that several workers share one: JSON lines by byte ranges, Parquet by row groups.

Together the pieces of a file give exactly the records and places of the whole file. Errors for which a whole file is
refused, such as mostly invalid UTF-8 or no JSON at all, are only counted in pieces.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from codellm_jax.contents import PIECE, BrokenFile, cannot_be_read, compression, head, lines, open_binary, size
from tasks.corpora import fields
from tasks.corpora.columns import group_facts, parquet_records, require_parquet
from tasks.corpora.files import Found, in_name_of
from tasks.corpora.records import records_of_lines, require_json
from tasks.corpora.specs import TEXT_FIELDS, kind_of

LEAST = 1 << 20  # bytes of a piece; smaller pieces take longer to open than to read

Piece = tuple[int, int]  # begin and end, in bytes or row groups


def pieces(file: str, spec: Mapping[str, Any], name: str, at_most: int) -> list[Piece] | None:
    """Divides a file into pieces of about this many bytes; None if it is read as a whole.

    Raises:
      ValueError, OSError: the file is not of its kind, or cannot be read.
    """
    length, at_most = size(file), max(at_most, LEAST)
    if length <= at_most or kind_of(spec) not in ("json_lines", "parquet"):
        return None
    with in_name_of(name):
        if kind_of(spec) == "parquet":
            require_parquet(file)
            return _joined(group_facts(file), at_most)
        require_json(file)
        if not _is_of_lines(file):
            return None
    return [(begin, min(begin + at_most, length)) for begin in range(0, length, at_most)]


def _joined(groups: list[tuple[int, int]], at_most: int) -> list[Piece] | None:
    """Joins consecutive row groups up to a size."""
    found, begin, held = [], 0, 0
    for number, (_, group_bytes) in enumerate(groups):
        if number > begin and held + group_bytes > at_most:
            found.append((begin, number))
            begin, held = number, 0
        held += group_bytes
    found.append((begin, len(groups)))
    return found if len(found) > 1 else None


def _is_of_lines(file: str) -> bool:
    """Whether a file is uncompressed, with a record in each line."""
    beginning = head(file)
    if compression(beginning) or beginning.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return False
    try:
        first = next(lines(file, 64 * PIECE), b"")
        return isinstance(json.loads(first.decode()), dict)
    except (BrokenFile, ValueError, RecursionError):
        return False


def rows(file: str, spec: Mapping[str, Any], name: str, piece: Piece) -> int:
    """The number of lines or rows of a piece."""
    with in_name_of(name):
        if kind_of(spec) == "parquet":
            return sum(count for count, _ in group_facts(file)[slice(*piece)])
        begin, end = piece
        found, left = int(begin == 0), end - max(begin, 1)  # counts line ends from the byte before the piece
        for read in _bytes_from(file, max(begin - 1, 0)):
            found += read.count(b"\n", 0, left)
            left -= len(read)
            if left <= 0:
                break
        return found


def records(file: str, spec: Mapping[str, Any], name: str, piece: Piece, before: int) -> Iterator[Found]:
    """Yields the records of a piece with their places; `before` lines or rows of the file precede it.

    Raises:
      ValueError, OSError: the file is not of its kind, or cannot be read.
    """
    kind = kind_of(spec)
    with in_name_of(name):
        found = parquet_records(file, spec, piece, before) if kind == "parquet" else records_of_lines(
            file, _between(file, *piece), before)
        for place, record in found:
            yield fields.found(place, record, spec, TEXT_FIELDS[kind])


def _between(file: str, begin: int, end: int) -> Iterator[bytes]:
    """Yields the bytes of the lines of a file that begin in [begin, end)."""
    at, is_within = max(begin - 1, 0), begin == 0  # position of the next bytes; whether a line has begun
    for read in _bytes_from(file, at):
        if not is_within:
            newline = read.find(b"\n")
            if newline < 0 and at + len(read) < end - 1:
                at += len(read)
                continue
            if newline < 0 or at + newline + 1 >= end:
                return
            read, at, is_within = read[newline + 1 :], at + newline + 1, True
        last = read.find(b"\n", max(0, end - 1 - at)) if at + len(read) >= end else -1
        if last >= 0:
            yield read[: last + 1]
            return
        at += len(read)
        yield read


def _bytes_from(file: str, begin: int) -> Iterator[bytes]:
    with open_binary(file) as stream:
        try:
            stream.seek(begin)
            while read := stream.read(PIECE):
                yield read
        except OSError as error:
            if "://" in file:
                raise
            raise cannot_be_read(file, error) from error
