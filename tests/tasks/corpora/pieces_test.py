"""Pieces of a file, one after the other, hold what the whole file holds."""

import bz2
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpora import inputs, pieces
from tasks.corpora.inputs import Inputs
from tasks.corpora.pieces import _between


def both(spec: dict[str, Any], path: Path, at_most: int) -> tuple[list[Any], list[Any], int]:
    """The documents of a file read as a whole and by its pieces, and how many pieces there are."""
    corpora = Inputs({"text.a": spec})
    found = corpora.pieces("text.a", str(path), at_most) or []
    parted, before = [], 0
    for piece in found:
        parted += corpora.documents("text.a", [str(path)], piece, before)
        before += corpora.rows("text.a", str(path), piece)
    return list(corpora.documents("text.a", [str(path)])), parted, len(found)


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"", b"a", b"bb", b"c" * 9]), max_size=9), st.booleans(), st.integers(1, 12),
       st.sampled_from([1, 3, 1 << 18]))
def test_every_line_is_in_one_piece(tmp_path_factory, texts: list[bytes], is_ended: bool, size: int, at_once: int):
    path = tmp_path_factory.getbasetemp() / "lines"
    content = b"\n".join(texts) + b"\n" * is_ended
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", at_once)
        ranges = [(begin, min(begin + size, len(content))) for begin in range(0, len(content), size)]
        parted = [b"".join(_between(str(path), *each)) for each in ranges]
        counted = [pieces.rows(str(path), {"json_lines": ""}, "text.a", each) for each in ranges]
    assert b"".join(parted) == content
    starts = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10)]
    assert counted == [sum(begin <= start < end for start in starts) for begin, end in ranges]
    for (begin, end), found in zip(ranges, parted, strict=True):
        assert found == b"".join(content[start : (content.find(b"\n", start) + 1) or None]
                                 for start in starts if begin <= start < end)


def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "LEAST", 1)
    dice, path = random.Random(0), tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "字" * dice.randrange(1, 60), "license": "mit"}, ensure_ascii=False).encode()
             for _ in range(300)]
    lines[50:53] = [b"", b"{broken", b'{"text": "\xff"}']
    lines[200] = b'{"text": ""}'
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    for at_most in (100, 1000, 5000):
        whole, parted, count = both({"json_lines": str(path)}, path, at_most)
        assert parted == whole and count == -(-path.stat().st_size // at_most)
    assert [each.row for each in whole if each.text is None] == [52, 53, 201]
    path.write_bytes(bz2.compress(path.read_bytes()))
    assert Inputs({"text.a": {"json_lines": str(path)}}).pieces("text.a", str(path), 100) is None
    path.write_text(json.dumps([{"text": "a list"}] * 100))
    assert Inputs({"text.a": {"json_lines": str(path)}}).pieces("text.a", str(path), 100) is None
    path.write_text('{"text":\n "over lines"}\n' * 100)
    assert Inputs({"text.a": {"json_lines": str(path)}}).pieces("text.a", str(path), 100) is None
    path.write_text('{"text": "a line"}\n' * 100, encoding="utf-16")
    assert Inputs({"text.a": {"json_lines": str(path)}}).pieces("text.a", str(path), 100) is None


def test_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in (9, 10, 3)))
    monkeypatch.setattr(inputs, "LARGEST", 9)
    found = Inputs({"text.a": {"json_lines": str(path)}}).documents("text.a", [str(path)])
    assert [(each.row, each.reason) for each in found] == [(1, ""), (2, "longer than 9 characters"), (3, "")]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet"
    texts = [f"text {number} " * (number % 9) for number in range(1000)]
    table = pa.table({"text": texts, "license": ["mit"] * 1000, "score": list(range(1000))})
    pq.write_table(table, path, row_group_size=70)
    spec = {"parquet": str(path), "where": {"score": {"at_least": 100}}}
    assert both(spec, path, 100)[2] == 0  # too small to be parted
    monkeypatch.setattr(pieces, "LEAST", 1)
    for at_most in (1, 2000):
        whole, parted, count = both(spec, path, at_most)
        assert parted == whole and count > 3
    assert whole[-1].row == 1000 and whole[-1].licence == "mit"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\xff" * 40
    path.write_bytes(content)
    whole, parted, _ = both(spec, path, 2000)
    assert parted == whole and any(each.reason == "in a damaged row group" for each in whole)
