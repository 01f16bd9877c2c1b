"""Corpora in archives: WebDataset's tars and WARC."""

import gzip
import io
import json
import pathlib
import random
import tarfile
import time
from typing import Any

import pytest
from warcio import statusandheaders, warcwriter

from tasks.corpora import archives, pages, sources

WHOLE = {"holdout": 0}  # Everything is "train".


def _told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def _read(spec: dict[str, Any], split: str = "train") -> list[str]:
    return list(sources.documents(spec, split, "text.mine"))


# ---- WebDataset --------------------------------------------------------------------------------


def _tar(file: pathlib.Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return str(file)


def _samples(count: int) -> list[tuple[str, bytes]]:
    return [member for number in range(count) for member in (
        (f"a/{number:04}.png", bytes(50)), (f"a/{number:04}.txt", f"text {number} é".encode()),
        (f"a/{number:04}.json", json.dumps({"title": f"T{number}", "score": number % 5}).encode()))]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_webdataset(tmp_path: pathlib.Path, mode: str) -> None:
    spec = {"webdataset": _tar(tmp_path / "a.tar", _samples(20), mode), **WHOLE}
    assert _read(spec) == [f"text {number} é" for number in range(20)]
    assert _read({**spec, "field": "json.title", "where": {"json.score": {"at_least": 3}}}) == [
        f"T{number}" for number in range(20) if number % 5 >= 3]
    assert _read({**spec, "text": "{__key__}: {json.title}\n{txt}"})[1] == "a/0001: T1\ntext 1 é"


def test_members_that_are_missing_or_broken_are_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "LARGEST", 100)
    members = [("0.txt", b"good"), ("0.json", b"{}"), ("1.json", b"{}"), ("2.txt", b"a"), ("2.json", b"{"),
               ("._3.txt", b"of another system"), ("4.txt", b"x" * 101), ("4.json", b"{}"), ("5.txt", b"\xff")]
    spec = {"webdataset": _tar(tmp_path / "a.tar", members), "where": {"json.kept": [True]}, **WHOLE}
    with pytest.raises(ValueError, match="1 broken JSON .*1 larger than .*3 without the field 'json.kept' of 'where'"):
        _read(spec)
    del spec["where"]
    assert _read(spec) == ["good", "a"]
    told = _told(caplog)
    assert "1 without text in field 'txt' (first: " in told and "a.tar, 1, whose fields are '__key__', 'json')" in told
    assert "1 not valid UTF-8" in told


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_that_break_off(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    members = [(f"{number:04}.txt", random.Random(number).randbytes(1000).hex().encode()) for number in range(50)]
    whole = pathlib.Path(_tar(tmp_path / "whole.tar", members, mode)).read_bytes()
    texts, file = [content.decode() for _, content in members], tmp_path / "a.tar"
    # Within a member and, of a tar that is not compressed, where one ends: without the zeros behind the last.
    for end in (len(whole) // 2, *([5 * 2560] if mode == "w" else [])):
        file.write_bytes(whole[:end])
        found = _read({"webdataset": str(file), **WHOLE})
        assert found == texts[: len(found)] and len(found) >= 5
        assert "1 broken rest of a.tar" in caplog.records[-1].getMessage()
    damaged = bytearray(whole)
    damaged[5 * 2560 + 150] ^= 1  # the checksum of a header, which alone would end the tar for Python's library
    file.write_bytes(damaged)
    if mode == "w":
        assert _read({"webdataset": str(file), **WHOLE}) == texts[:5]
        assert "1 broken rest of a.tar" in caplog.records[-1].getMessage()


def test_what_is_no_tar_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tar").write_text("text " * 200)
    with pytest.raises(ValueError, match="a.tar is not a tar archive; expected a tar"):
        _read({"webdataset": str(tmp_path / "a.tar")})
    for content in (b"", bytes(10240)):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match="no document is left .*1 empty file"):
            _read({"webdataset": str(tmp_path / "a.tar")})


# ---- WARC --------------------------------------------------------------------------------------


def _warc(file: pathlib.Path, records: list[tuple[str, str, dict[str, str], bytes]], compressed: bool = True) -> str:
    with file.open("wb") as stream:
        writer = warcwriter.WARCWriter(stream, gzip=compressed)
        for kind, address, headers, content in records:
            http, body = None, content
            if kind == "response":
                head, _, body = content.partition(b"\n\n")
                first, *rest = head.decode().split("\n")
                http = statusandheaders.StatusAndHeaders(
                    first.partition(" ")[2], [tuple(line.split(": ")) for line in rest], first.partition(" ")[0])
            writer.write_record(writer.create_warc_record(
                address, kind, payload=io.BytesIO(body), http_headers=http, warc_headers_dict=headers,
                warc_content_type="text/plain" if kind in ("conversion", "resource") else ""))
    return str(file)


HTML = ("<html><head><title>Über &amp; mehr</title><style>p {}</style></head><body><h1>Kopf</h1><p>Eins\n <b>zwei"
        "</b></p><script>if (a < b)</script><ul><li>drei<li>vier</ul></body></html>")


@pytest.mark.parametrize("compressed", [False, True])
def test_wet(tmp_path: pathlib.Path, compressed: bool) -> None:
    records = [("warcinfo", "", {}, b"software: none")] + [
        ("conversion", f"http://{number}.org/", {"WARC-Identified-Content-Language": language},
         f"Text {number} é\n".encode())
        for number, language in enumerate(["eng", "deu", "eng"])]
    spec = {"warc": _warc(tmp_path / "a.wet", records, compressed), **WHOLE}
    assert _read(spec) == [f"Text {number} é\n" for number in range(3)]
    assert _read({**spec, "where": {"WARC-Identified-Content-Language": "eng"}, "text": "{url} {text}"}) == [
        "http://0.org/ Text 0 é\n", "http://2.org/ Text 2 é\n"]


def test_responses(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(head: str, body: bytes) -> tuple[str, str, dict[str, str], bytes]:
        return "response", "http://a.org/", {}, head.encode() + b"\n\n" + body

    def pressed(text: str) -> bytes:
        return gzip.compress(text.encode())

    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"<p>in ", b"parts", b""))
    records = [
        answer("HTTP/1.1 200 OK\nContent-Type: text/html; charset=utf-8", HTML.encode()),
        answer("HTTP/1.1 200 OK\nContent-Type: text/html", b'<meta charset="gb2312"><p>' + "中文".encode("gb18030")),
        answer("HTTP/1.1 200 OK\nContent-Type: text/html\nContent-Encoding: gzip", pressed("<p>small")),
        answer("HTTP/1.1 200 OK\nContent-Type: text/html\nTransfer-Encoding: chunked", chunked),
        answer("HTTP/1.1 200 OK\nContent-Type: text/plain", b"a < b"),
        answer("HTTP/1.1 404 Not Found\nContent-Type: text/html", b"<p>gone"),
        answer("HTTP/1.1 200 OK\nContent-Type: image/png", b"\x89PNG"),
        answer("HTTP/1.1 200 OK\nContent-Type: text/html\nContent-Encoding: br", b"xx"),
        answer("HTTP/1.1 200 OK\nContent-Type: text/html; charset=utf-8", b"<p>\xff\xfe"),
        ("request", "http://a.org/", {}, b"GET / HTTP/1.1\r\n\r\n"),
        ("resource", "file://a", {}, b"of a file"),
    ]
    spec = {"warc": _warc(tmp_path / "a.warc.gz", records), **WHOLE}
    assert _read(spec) == ["Kopf\nEins zwei\ndrei\nvier", "中文", "small", "in parts", "a < b", "of a file"]
    for reason in ("1 responses with the status 404", "1 compressed by br", "1 neither HTML nor other text",
                   "1 not valid in the encoding of the page"):
        assert reason in _told(caplog)
    assert _read({**spec, "text": "{title}|{text}", "where": {"content_type": ["text/html; charset=utf-8"]}}) == [
        "Über & mehr|Kopf\nEins zwei\ndrei\nvier"]


@pytest.mark.parametrize("compressed", [False, True])
def test_warc_that_breaks_off(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, compressed: bool) -> None:
    texts = [random.Random(number).randbytes(1000).hex() for number in range(20)]
    file = pathlib.Path(_warc(tmp_path / "a.wet", [
        ("conversion", f"http://{number}.org/", {}, text.encode()) for number, text in enumerate(texts)], compressed))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 + 500])  # well within a record: a file that ends with one is whole
    found = _read({"warc": str(file), **WHOLE})
    assert found == texts[: len(found)] and 5 < len(found) < 15
    assert "1 broken rest of a.wet" in _told(caplog)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 3000] = b"x" * 3000
    file.write_bytes(damaged)
    found = _read({"warc": str(file), **WHOLE})
    assert "1 broken rest of a.wet" in caplog.records[-1].getMessage()
    file.write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="a.wet is not a WARC file; expected WARC or WET"):
        _read({"warc": str(file)})


def test_pages_end_in_time() -> None:
    for piece in ("<!--", "<", "<a ", "<a b='", "<div>", "<script>", "</", "<![CDATA[", "&"):
        start = time.monotonic()
        pages.title_and_text(piece * 200_000)
        assert time.monotonic() - start < 20, piece
    assert pages.title_and_text("<p>" + "<div>" * 1000 + "deep") == ("", "deep")
    assert pages.title_and_text("<p>" + "<div>" * 10_000 + "deep") is None
    assert pages.title_and_text("a\0b<pre>x\n  y</pre>c") == ("", "a b\nx\n  y\nc")


# ---- Archives that are not as they should be ---------------------------------------------------


def test_tars_that_are_joined_or_repeat_a_name(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    first = pathlib.Path(_tar(tmp_path / "a.tar", [("a.txt", b"one"), ("a.txt", b"two"), ("/etc/b.txt", b"three")]))
    assert _read({"webdataset": str(first), **WHOLE}) == ["one", "two", "three"]
    whole = first.read_bytes()
    for behind in (whole, b"rest"):  # `cat a.tar b.tar`, of which Python's library reads the first one
        first.write_bytes(whole + behind)
        assert _read({"webdataset": str(first), **WHOLE}) == ["one", "two", "three"]
        assert "1 broken rest of a.tar" in caplog.records[-1].getMessage()
    first.write_bytes(whole[:300])
    with pytest.raises(ValueError, match="a.tar is a tar whose first header is damaged or truncated"):
        _read({"webdataset": str(first), **WHOLE})


@pytest.mark.parametrize(("length", "left"), [(1, [0, 2, 3]), (30, [0, 2, 3]), (500, [0])])
def test_warc_of_wrong_lengths(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], length: int,
    left: list[int]
) -> None:
    texts = [f"text {number} " + "x" * 70 for number in range(4)]
    file = pathlib.Path(_warc(tmp_path / "a.wet", [
        ("conversion", f"http://{number}.org/", {}, text.encode()) for number, text in enumerate(texts)], False))
    before, given, after = file.read_bytes().rpartition(b"Content-Length: 77\r\n\r\ntext 1")
    file.write_bytes(before + given.replace(b"77", b"%d" % length) + after)
    assert _read({"warc": str(file), **WHOLE}) == [texts[number] for number in left]
    assert "1 with a length that is not that of their content (first: " in _told(caplog)
    assert not capfd.readouterr().err
    file.write_bytes(b"WARC/1.0\r\n" + bytes(range(128, 255)) * 20)
    with pytest.raises(ValueError, match="no document is left .*1 broken rest of a.wet"):
        _read({"warc": str(file), **WHOLE})
