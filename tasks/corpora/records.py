"""Reads JSON records one by one: from lists or JSON lines, whole or broken.

The content decides the form: a file that begins with "[" is a list, one with an object in a line is JSON lines. Files
are read piece by piece, so that memory grows with the longest record and not with the file. The objects of a broken
file are decoded one by one; after an object that does not parse, reading continues at the next one that does. A file
without any object is refused as not JSON; so is a file where most records beyond ASCII are not UTF-8, because the
others are valid only by chance.
"""

import codecs
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from codellm_jax.contents import (
    LARGEST,
    PIECE,
    READ_IS,
    TOO_LARGE,
    BrokenFile,
    UnreadableFile,
    in_utf8,
    lines,
    require_text,
)
from tasks.corpora.files import Lost

BROKEN_JSON = "broken JSON"
NO_OBJECT = "not a JSON object"
NOT_UTF8 = "not valid UTF-8"
EMPTY_FILE = "empty file"
LONGEST_LINE = 1 << 28  # bytes of a line's record; parsing takes up to seven times as much memory
TOO_LONG = f"longer than {LONGEST_LINE >> 20} MiB"
WITH_ALL_BEHIND = f"{TOO_LONG}, lost with all that follows it in its file"
UNDECIDED = 1 << 22  # first bytes of a file within which JSON lines must have a line that is a record
FOREIGN = 10  # records of invalid UTF-8 that indicate another encoding; fewer may be damage

_BLANK = re.compile(r"\s*")
_BETWEEN_ITEMS = re.compile(r"[\s,\ufeff]*")
_BETWEEN_RECORDS = re.compile(r"[\s,\ufeff\[\]]*")
# Within a string its quotes are escaped, so code in a string does not match.
_RECORD_START = re.compile(r'\{\s*"[^"\\]*"\s*:')
_ESCAPED = re.compile("[\udc80-\udcff]")
_LONGEST_TOKEN = 16  # characters of a JSON token except strings and numbers, or of an escape such as "\\ud83d\\ude00"
_LONGEST_START = 1 << 16  # characters up to the end of a record's first key

Record = dict[str, Any] | Lost


def json_records(file: str) -> Iterator[Record]:
    """Yields the JSON objects of a file, in order, and a `Lost` for each unreadable one.

    Raises:
      OSError: the file cannot be read.
      UnreadableFile: it is not text, or holds no JSON object.
    """
    return (record for _, record in placed_records(file))


def placed_records(file: str) -> Iterator[tuple[str, Record]]:
    """As `json_records`, with the place of each record, such as "a.jsonl, line 3"."""
    found = lost = broken = beyond_ascii = foreign = 0
    for place, record, is_ascii in _records(file):
        found += isinstance(record, dict)
        lost += isinstance(record, Lost) and record.reason in (BROKEN_JSON, NO_OBJECT, NOT_UTF8)
        broken += record == broken_rest(file)
        beyond_ascii += not is_ascii
        foreign += record == Lost(NOT_UTF8)
        yield place, record
    _require_utf8(file, foreign, beyond_ascii)
    if lost and not found and not broken:
        raise UnreadableFile(f"{file} holds no JSON object in UTF-8, neither in a list nor in lines; it begins with "
                             f"{_beginning(file)}")


def records_of_lines(file: str, source: Iterable[bytes], before: int) -> Iterator[tuple[str, Record]]:
    """As `placed_records`, for some lines of a file, each a whole record, after `before` other lines."""
    for number, line in enumerate(lines(file, LONGEST_LINE, source), before + 1):
        if not line:
            yield f"{file}, line {number}", Lost(TOO_LONG)
        elif line.strip():
            yield f"{file}, line {number}", _record_of(_parsed(line))


def whole(file: str) -> bytes | Lost:
    """The content of a file in UTF-8, or a `Lost` if it is too large to be held in memory; errors are those of
    `lines`."""
    parts: list[bytes] = []
    held = 0
    for line in lines(file, LARGEST):
        parts.append(line)
        held += len(line)
        if not line or held > LARGEST:
            return Lost(TOO_LARGE)
    return b"".join(parts)


def require_json(file: str) -> None:
    """Checks only the beginning of a file; raises the error of `json_records` if that is not JSON."""
    beginning = require_text(file)
    if beginning.lstrip().startswith(b"<"):
        raise UnreadableFile(f"{file} is HTML or XML; expected JSON records; it begins with {_beginning(file)}")
    beyond_ascii = [line for line in beginning.split(b"\n")[:-1] if not line.isascii()]
    _require_utf8(file, sum(not _is_utf8(line) for line in beyond_ascii), len(beyond_ascii))


def _require_utf8(file: str, foreign: int, beyond_ascii: int) -> None:
    if foreign >= FOREIGN and 2 * foreign > beyond_ascii:
        raise UnreadableFile(f"{file} is not UTF-8 text: {foreign} of its {beyond_ascii} records beyond ASCII are not "
                             f"valid UTF-8; {READ_IS}.")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _beginning(file: str) -> str:
    line = next(iter(require_text(file).lstrip().splitlines()), b"")
    return ascii(line[:60].decode(errors="backslashreplace")) + ("..." if len(line) > 60 else ".")


def broken_rest(file: str) -> Lost:
    """The `Lost` for the rest of a truncated file."""
    return Lost(f"broken rest of {os.path.basename(file)}")


def _records(file: str) -> Iterator[tuple[str, Record, bool]]:
    """Yields records with their places, and whether they are in ASCII."""
    broken: list[Lost] = []
    source = _until_broken(file, broken)
    beginning = b""
    for piece in source:
        beginning += piece
        if beginning.strip() or len(beginning) > UNDECIDED:
            break
    whole = itertools.chain([beginning], source)
    if beginning.lstrip().startswith(b"["):
        for number, (_, record, is_ascii) in enumerate(_objects(whole, is_list=True), 1):
            yield f"{file}, record {number}", record, is_ascii
    else:
        for line, record, is_ascii in _of_lines(file, whole):
            yield f"{file}, line {line}", record, is_ascii
    for lost in broken:
        yield file, lost, True
    if not beginning and not broken:
        yield file, Lost(EMPTY_FILE), True


def _until_broken(file: str, broken: list[Lost]) -> Iterator[bytes]:
    """Yields the text of a file up to the first damage, for which a `Lost` is appended to `broken`."""
    try:
        yield from in_utf8(file)
    except BrokenFile:
        broken.append(broken_rest(file))


def _of_lines(file: str, source: Iterable[bytes]) -> Iterator[tuple[int, Record, bool]]:
    """Yields the records of JSON lines, or objects over several lines, with line numbers and whether in ASCII."""
    waiting: list[bytes] = []  # until a line decides between the two
    held, has_begun = 0, False
    numbered = enumerate(lines(file, LONGEST_LINE, source), 1)
    for number, line in numbered:
        if not line and not has_begun:
            yield number, Lost(TOO_LONG), True
        # A record that spans several lines has no line that is itself an unindented object.
        if line.strip() and (not has_begun or line.startswith(b"{")) and isinstance(record := _parsed(line), dict):
            yield from _objects(waiting)
            yield number, record, line.isascii()
            break
        has_begun |= bool(line.strip())
        waiting.append(_part(line) if has_begun else b"\n")
        held += len(line)
        if held > UNDECIDED:
            yield from _objects(itertools.chain(waiting, (_part(line) for _, line in numbered)))
            waiting = []
    else:
        yield from _objects(waiting)
    for number, line in numbered:
        if not line:
            yield number, Lost(TOO_LONG), True
        elif line.strip():
            yield number, _record_of(_parsed(line)), line.isascii()


def _part(line: bytes) -> bytes:
    """A line of a record; one that was too long becomes invalid JSON, so that its record is broken, not shorter."""
    return line or b"\0\n"


def _parsed(line: bytes) -> Any:
    """The JSON object of a line, or a `Lost`."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return Lost(NOT_UTF8)
    except (ValueError, RecursionError):
        return Lost(BROKEN_JSON)


def _record_of(value: Any) -> Record:
    return value if isinstance(value, dict | Lost) else Lost(NO_OBJECT)


class _Window:
    """A window on a stream of text; what is still to be read begins at `position` in `text`."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        # Invalid UTF-8 becomes lone surrogates, which identify the affected records.
        self._decoded = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        # A line break within a string, which JSON forbids, is accepted here.
        self._decoder = json.JSONDecoder(strict=False)
        self.text, self.position, self.is_end = "", 0, False
        self._line, self._counted = 1, 0

    def read_on(self) -> None:
        """Drops the text before the position, and reads as much again as is left, at least a piece."""
        self.line()
        parts, size = [self.text[self.position :]], 0
        while size < max(PIECE, len(parts[0])) and not self.is_end:
            piece = next(self._pieces, None)
            self.is_end = piece is None
            parts.append(self._decoded(piece or b"", final=self.is_end))
            size += len(parts[-1])
        self.text, self.position, self._counted = "".join(parts), 0, 0

    def line(self) -> int:
        """The line number of the position."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Moves past all that a pattern matches; returns the character there, "" at the end."""
        while True:
            found = pattern.match(self.text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self.text) or self.is_end:
                return self.text[self.position : self.position + 1]
            self.read_on()

    def value(self) -> tuple[Any, int]:
        """The JSON value at the position, or a `Lost`, and where it ends."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.position)
                is_whole = isinstance(value, dict) or end < len(self.text)  # a number may continue
            except (ValueError, RecursionError) as error:
                value, end = Lost(BROKEN_JSON), self.position
                is_whole = not str(error).startswith("Unterminated string") and (
                    getattr(error, "pos", 0) < len(self.text) - _LONGEST_TOKEN)
            if is_whole or self.is_end:
                return value, end
            if len(self.text) - self.position > LONGEST_LINE:
                return Lost(WITH_ALL_BEHIND), end
            self.read_on()

    def to_next_record(self) -> tuple[bool, bool]:
        """Moves to the next record, or to the end; returns whether the skipped text is UTF-8, and whether ASCII."""
        is_utf8 = is_ascii = True
        while True:
            start = _RECORD_START.search(self.text, self.position + 1)
            end = start.start() if start else len(self.text)
            is_utf8 &= not _ESCAPED.search(self.text, self.position, end)
            is_ascii &= self.text[self.position : end].isascii()
            if start or self.is_end:
                self.position = end
                return is_utf8, is_ascii
            self.position = max(self.position, end - _LONGEST_START)
            self.read_on()


def _objects(pieces: Iterable[bytes], is_list: bool = False) -> Iterator[tuple[int, Record, bool]]:
    """Yields the objects of a JSON list, or of any sequence of objects, with line numbers and whether in ASCII."""
    window = _Window(pieces)
    if is_list:
        window.skip(_BETWEEN_ITEMS)
        window.position += 1
    while letter := window.skip(_BETWEEN_ITEMS if is_list else _BETWEEN_RECORDS):
        if is_list and letter == "]":
            is_list = False  # another list may follow, or text that is not JSON
            continue
        line = window.line()
        value, end = window.value()
        if value == Lost(WITH_ALL_BEHIND):
            yield line, value, True
            return
        if isinstance(value, dict):
            is_ascii = window.text.isascii() or window.text[window.position : end].isascii()
            is_utf8 = is_ascii or not _ESCAPED.search(window.text, window.position, end)
            window.position = end
            yield line, value if is_utf8 else Lost(NOT_UTF8), is_ascii
            continue
        if is_list and not isinstance(value, Lost):
            window.position = end
            if window.skip(_BLANK) in (",", "]", "{"):
                yield line, Lost(NO_OBJECT), True
                continue
        is_list = False
        is_utf8, is_ascii = window.to_next_record()  # past the rest of a broken record
        yield line, Lost(BROKEN_JSON if is_utf8 else NOT_UTF8), is_ascii
