"""JSON records from files, one by one: a list or JSON lines, whole or broken.

The content decides the form: a file that begins with "[" is a list, one with an object in a line is JSON lines.
A broken file is not given up as a whole. Its objects are decoded one by one; after one that does not parse, reading
continues at the next that does. But a file without any object is not JSON and is refused; so is one where most records
beyond ASCII are not UTF-8, because the valid ones are then valid by chance.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from codellm_jax.contents import (
    HEAD,
    LARGEST,
    READ_IS,
    TOO_LARGE,
    BrokenFile,
    UnreadableFile,
    lines,
    require_text,
)
from tasks.corpora.files import Lost

BROKEN_JSON = "broken JSON"
NO_OBJECT = "not a JSON object"
NOT_UTF8 = "not valid UTF-8"
EMPTY_FILE = "empty file"
LONGEST_LINE = 1 << 28  # bytes of a record in a line: parsing takes up to seven times as much memory
TOO_LONG = f"longer than {LONGEST_LINE >> 20} MiB"
FOREIGN = 10  # invalid UTF-8 records that indicate another encoding; fewer may be damage

_BETWEEN_RECORDS = re.compile(r"[\s,\[\]]*")
# Within a string its quotes are escaped, so code in a string does not match.
_RECORD_START = re.compile(r'\{\s*"[^"\\]*"\s*:')
_ESCAPED = re.compile("[\udc80-\udcff]")

Record = dict[str, Any] | Lost


def json_records(file: str) -> Iterator[Record]:
    """The JSON objects of a file, in order, and a `Lost` for each unreadable one.

    Raises:
      OSError: the file cannot be read.
      UnreadableFile: it is not text, or holds no JSON object.
    """
    return (record for _, record in placed_records(file))


def placed_records(file: str) -> Iterator[tuple[str, Record]]:
    """The records of `json_records` with the place of each, such as "a.jsonl, line 3"; raises the same errors."""
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
    """The records of `placed_records` for some lines of a file, each a record by itself, after `before` others."""
    for number, line in enumerate(lines(file, LONGEST_LINE, source), before + 1):
        if not line:
            yield f"{file}, line {number}", Lost(TOO_LONG)
        elif line.strip():
            yield f"{file}, line {number}", _record_of(_parsed(line))


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
    """The lost rest of a truncated file."""
    return Lost(f"broken rest of {os.path.basename(file)}")


def _records(file: str) -> Iterator[tuple[str, Record, bool]]:
    """Records with their places, and whether they are in ASCII."""
    waiting: list[bytes] = []  # of a file that is read as a whole, or may have to be
    opening, is_lines, number, held = b"", False, 0, 0
    ending: list[Lost] = []
    try:
        for number, line in enumerate(lines(file, LARGEST), 1):
            if not line or len(line) > LONGEST_LINE and (opening or line[:HEAD].strip()[:1]) != b"[":
                yield f"{file}, line {number}", Lost(TOO_LONG if line else TOO_LARGE), True
                continue
            is_first, opening = not opening, opening or line.strip()[:1]
            if not is_lines and opening != b"[" and (is_first or line.startswith(b"{")):
                # A record that spans several lines has no line that is itself an unindented object.
                if is_lines := isinstance(_parsed(line), dict):
                    yield from _records_of(file, b"".join(waiting))
                    waiting = []
            if not is_lines:
                waiting.append(line)
                held += len(line)
                if held > LARGEST:
                    raise UnreadableFile(f"{file} is a JSON list, or has records over several lines, and "
                                         f"is {TOO_LARGE}, which would be held in memory at once; write it "
                                         "as JSON lines, one object per line.")
            elif line.strip():
                yield f"{file}, line {number}", _record_of(_parsed(line)), line.isascii()
    except BrokenFile:
        ending.append(broken_rest(file))
    yield from _records_of(file, b"".join(waiting))
    if not number and not ending:
        ending.append(Lost(EMPTY_FILE))
    yield from (("" if lost == broken_rest(file) else file, lost, True) for lost in ending)


def _parsed(line: bytes) -> Any:
    """The JSON object of a line; a `Lost` if it is none."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return Lost(NOT_UTF8)
    except (ValueError, RecursionError):
        return Lost(BROKEN_JSON)


def _record_of(value: Any) -> Record:
    return value if isinstance(value, dict | Lost) else Lost(NO_OBJECT)


def _records_of(file: str, content: bytes) -> Iterator[tuple[str, Record, bool]]:
    """The objects of a JSON list, or of any sequence of objects, as `_records` gives them."""
    whole = _parsed(content)
    if isinstance(whole, list):
        is_ascii = content.isascii()
        for number, record in enumerate(whole, 1):
            yield f"{file}, record {number}", _record_of(record), is_ascii
        return
    # A line break within a string, which JSON forbids, is accepted here.
    decoder = json.JSONDecoder(strict=False)
    # Invalid UTF-8 becomes lone surrogates, which identify the affected records.
    text, position, line, counted = content.decode(errors="surrogateescape"), 0, 1, 0
    while (position := _end_of_match(_BETWEEN_RECORDS, text, position)) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):  # Or a piece of a broken object.
            start = _RECORD_START.search(text, position + 1)
            record, end = Lost(BROKEN_JSON), start.start() if start else len(text)
        if _ESCAPED.search(text, position, end):
            record = Lost(NOT_UTF8)
        yield f"{file}, line {line}", record, text[position:end].isascii()
        position = end


def _end_of_match(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position
