"""JSON records from files, one by one: a list or JSON lines, whole or broken.

What a file is, its content says: one that begins with "[" is a list, one whose first line is an object is JSON lines.
A broken file is never given up as a whole. Its objects are decoded one after the other; where one does not parse, the
next that does goes on.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from tasks.corpora.files import BROKEN_FILE, Lost, lines

BROKEN_JSON = "broken JSON"
NO_OBJECT = "not a JSON object"

_BETWEEN_RECORDS = re.compile(r"[\s,\[\]]*")
# Within a string its quotes would be escaped, so code in a string does not look like this.
_RECORD_START = re.compile(r'\{\s*"[^"\\]*"\s*:')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_records(file: str) -> Iterator[dict[str, Any] | Lost]:
    """The JSON objects of a plain, .gz or .zst file, in order, and a `Lost` for each that cannot be had.

    Bytes that are no UTF-8 come as lone surrogates in the strings that hold them.
    """
    waiting: list[bytes] = []  # Of a file that is read as a whole.
    is_lines: bool | None = None
    ending: list[Lost] = []
    try:
        for number, line in enumerate(lines(file)):
            if number == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            if is_lines is None:
                # A record spread over several lines is no object by its first line alone.
                is_lines = isinstance(_parsed(line), dict)
            if is_lines:
                yield _record_of(line)
            else:
                waiting.append(line)
    except BROKEN_FILE:
        ending.append(Lost(f"broken rest of {os.path.basename(file)}"))
    if waiting:
        yield from _records_of(b"".join(waiting))
    yield from ending


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="surrogateescape")


def _parsed(line: bytes) -> Any:
    """What a line holds as JSON; a `Lost` where it is none."""
    try:
        return json.loads(_text(line))
    except (ValueError, RecursionError):
        return Lost(BROKEN_JSON)


def _record_of(line: bytes) -> dict[str, Any] | Lost:
    record = _parsed(line)
    return record if isinstance(record, dict | Lost) else Lost(NO_OBJECT)


def _records_of(content: bytes) -> Iterator[dict[str, Any] | Lost]:
    """The objects of a JSON list, or of anything that holds objects one after the other."""
    whole = _parsed(content)
    if isinstance(whole, list):
        yield from (record if isinstance(record, dict) else Lost(NO_OBJECT) for record in whole)
        return
    # A line break within a string, which JSON does not allow, does no harm here.
    decoder = json.JSONDecoder(strict=False)
    text, position = _text(content), 0
    while (position := _end_of_match(_BETWEEN_RECORDS, text, position)) < len(text):
        try:
            record, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield record
            position = end
        else:  # Or a piece of one that is broken.
            yield Lost(BROKEN_JSON)
            start = _RECORD_START.search(text, position + 1)
            position = start.start() if start else len(text)


def _end_of_match(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position
