"""Readers of the formats in which corpora are published, and what is chosen of them."""

import bz2
import gzip
import hashlib
import io
import json
import logging
import lzma
import pathlib
import random
import sys
import tarfile
import time
import tracemalloc
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from warcio import statusandheaders, warcwriter

from codellm_jax import contents
from tasks.corpora import archives, fields, pages, records, separated, sources, specs

WHOLE = {"holdout": 0}  # Everything is "train".


def _told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def _read(spec: dict[str, Any], split: str = "train") -> list[str]:
    return list(sources.documents(spec, split, "text.mine"))


# ---- Fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("record", "name", "expected"), [
    ({"a": {"b": {"c": 1}}}, "a.b.c", 1),
    ({"a.b": 2, "a": {"b": 3}}, "a.b", 2),  # the whole name comes first
    ({"a.b": {"c": 4}}, "a.b.c", 4),
    ({"a": "text"}, "a.b", None),
    ({"a": {"b": 5}}, "b", None),
])
def test_fields_are_found_by_dots(record: dict[str, Any], name: str, expected: Any) -> None:
    assert fields.value(record, name) == expected


@pytest.mark.parametrize(("condition", "good", "bad"), [
    (["Python", "Go"], ["Python", "Go", ["C", "Go"]], ["python", "", ["C"], []]),
    ("Python", ["Python"], ["Go"]),
    ([3], [3, 3.0, "3", "3.0"], [4, "4", True, "three"]),
    (True, [True, "true"], [False, 1, "1"]),
    ({"at_least": 3}, [3, 4.5, "3"], [2.9, "2", "many", float("nan"), True]),
    ({"at_least": 3, "at_most": 5}, [3, 5], [2, 6]),
    ({"at_least": "2023-06"}, ["2023-07-01"], ["2023-05-31", 2024]),
])
def test_where(condition: Any, good: list[Any], bad: list[Any]) -> None:
    where = {"meta.asked": condition}
    assert fields.wrong_where(where) is None
    for value in good:
        assert fields.unlike({"meta": {"asked": value}}, where) is None, value
    for value in bad:
        assert fields.unlike({"meta": {"asked": value}}, where) is not None, value
    assert "without the field 'meta.asked'" in fields.unlike({"meta": {}}, where).reason  # type: ignore[union-attr]


@pytest.mark.parametrize(("options", "message"), [
    ({"where": ["Python"]}, "'where' must be a mapping from fields to conditions"),
    ({"where": {}}, "'where' must be a mapping"),
    ({"where": {"a": {"least": 3}}}, "has the condition {'least': 3} for 'a'; give 'at_least', 'at_most' or both"),
    ({"where": {"a": {"at_least": [3]}}}, "that is neither a number nor a text"),
    ({"where": {"a": []}}, "that holds more than texts and numbers"),
    ({"where": {"a": None}}, "the condition None"),
    ({"text": "no field"}, "'text' must be a template .* names no field"),
    ({"text": "{a"}, "'text' must be a template"),
    ({"text": "{a!r}"}, "'text' must be a template .* something other than the name"),
    ({"text": "{}"}, "'text' must be a template"),
    ({"text": "{a}", "field": "a"}, "'text' puts several fields together, 'field' names one"),
    ({"sample": 0}, r"'sample' must be the fraction of documents to read, in \(0, 1\], found 0"),
    ({"sample": 2}, "'sample' must be the fraction"),
])
def test_malformed_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^text.mine: .*{message}") as error:
        specs.validate({"parquet": "*", **options}, "text.mine")
    assert "\n" not in str(error.value)


def test_a_text_of_several_fields(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"title": "One", "meta": {"body": "first", "year": 1999}}, {"title": None, "meta": {"body": "second"}},
               {"title": "Three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    template = "# {title} ({meta.year})\n\n{meta.body} {{braces}}"
    assert _read({"json_lines": str(tmp_path / "*"), "text": template, **WHOLE}) == [
        "# One (1999)\n\nfirst {braces}"]
    assert "1 without text in field 'meta.year'" in _told(caplog)
    assert "1 without text in field 'title'" in _told(caplog)


def test_a_sample_is_chosen_by_text_and_not_by_the_hash_of_splits(tmp_path: pathlib.Path) -> None:
    texts = [f"document {number}" for number in range(4000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spec = {"json_lines": str(tmp_path / "*"), "holdout": 0.1}
    whole = {split: set(_read(spec, split)) for split in specs.SPLITS}
    for fraction in (0.5, 0.1):
        found = {split: set(_read({**spec, "sample": fraction}, split)) for split in specs.SPLITS}
        chosen = {text for text in texts
                  if int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16], "big") < fraction * 2**64}
        assert set.union(*found.values()) == chosen
        assert abs(len(chosen) / len(texts) - fraction) < 0.03
        for split in specs.SPLITS:
            assert found[split] <= whole[split]
            assert abs(len(found[split]) / len(whole[split]) - fraction) < 0.1
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    assert set(_read({**spec, "sample": 0.1})) == found["train"]


def test_a_sample_of_what_python_holds() -> None:
    whole, half = ({text for split in specs.SPLITS for text in _read({"python": "text", **options}, split)}
                   for options in ({}, {"sample": 0.5}))
    assert half < whole
    assert 0.4 < len(half) / len(whole) < 0.6


def test_options_are_part_of_a_caches_key(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    spec = {"json_lines": str(tmp_path / "a.jsonl")}
    kinds: list[dict[str, Any]] = [
        {}, {"where": {"a": [1]}}, {"where": {"a": [2]}}, {"sample": 0.5}, {"text": "{text}"}, {"field": "other"}]
    keys = [json.dumps(sources.describe({**spec, **options})) for options in kinds]
    assert len(set(keys)) == len(keys)
    # As it was before these options: no cache that is there is made anew.
    assert sources.describe(spec) == {
        "kind": "json_lines", "options": {"field": "text", "holdout": 0.01, "json_lines": str(tmp_path / "a.jsonl")},
        "reader": 3, "train_files": [[str(tmp_path / "a.jsonl"), 14]]}


# ---- Parquet -----------------------------------------------------------------------------------


def _rows(count: int = 50) -> list[dict[str, Any]]:
    dice = random.Random(3)
    return [{"text": f"text {number} é", "meta": {"language": dice.choice(["Python", "Go"]), "score": number % 7},
             "unused": "x" * 100} for number in range(count)]


def _parquet(file: pathlib.Path, rows: list[dict[str, Any]], group: int = 7, **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group, **options)
    return str(file)


def test_parquet(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows()
    _parquet(tmp_path / "a.parquet", rows[:30])
    _parquet(tmp_path / "b.parquet", rows[30:], compression="zstd")
    spec = {"parquet": str(tmp_path / "*.parquet"), **WHOLE}
    assert _read(spec) == [row["text"] for row in rows]
    where = {"meta.language": ["Python"], "meta.score": {"at_least": 3, "at_most": 5}}
    expected = [row for row in rows if row["meta"]["language"] == "Python" and 3 <= row["meta"]["score"] <= 5]
    assert _read({**spec, "where": where}) == [row["text"] for row in expected]
    of_language = sum(row["meta"]["language"] == "Go" for row in rows)
    assert f"{of_language} not matching 'where' in field 'meta.language'" in _told(caplog)
    assert f"{50 - len(expected) - of_language} not matching 'where' in field 'meta.score'" in _told(caplog)
    assert _read({**spec, "text": "{meta.language}: {text}"})[0] == f"{rows[0]['meta']['language']}: text 0 é"


def test_parquet_reads_the_asked_columns_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def seen(self: Any, rows: int, groups: list[int], columns: list[str]) -> Any:
        asked.append(columns)
        return whole(self, rows, groups, columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", seen)
    _read({"parquet": _parquet(tmp_path / "a", _rows()), "field": "meta.language", "where": {"text": ["text 3 é"]},
           **WHOLE})
    assert asked[0] == ["meta.language", "text"]


def test_memory_does_not_grow_with_a_row_group(tmp_path: pathlib.Path) -> None:
    dice = random.Random(3)
    rows = [{"text": dice.randbytes(5000).hex()} for _ in range(4000)]
    file = _parquet(tmp_path / "a", rows, 4000, use_dictionary=False)
    del rows
    size = pathlib.Path(file).stat().st_size
    tracemalloc.start()
    before = pyarrow.default_memory_pool().max_memory()
    assert sum(1 for _ in sources.documents({"parquet": file, **WHOLE}, "train")) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Of Python's own bytes, and, where writing the file took no more already, of pyarrow's.
    assert peak < 24 << 20 < size and pyarrow.default_memory_pool().max_memory() - before < size // 2


def test_a_column_that_is_not_there(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    file = _parquet(tmp_path / "a.parquet", _rows())
    with pytest.raises(ValueError, match="no document is left .*50 without text in field 'body'.*a.parquet, whose "
                                         "fields are 'text', 'meta', 'unused'"):
        _read({"parquet": file, "field": "body", **WHOLE})
    with pytest.raises(ValueError, match="50 without the field 'meta.size' of 'where'"):
        _read({"parquet": file, "where": {"meta.size": [1]}, **WHOLE})


def test_nulls_and_other_types_are_counted(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": " ", "n": 3}]
    file = _parquet(tmp_path / "a.parquet", rows)
    assert _read({"parquet": file, **WHOLE}) == ["a"]
    assert "1 empty (first: " in _told(caplog) and "a.parquet, row 3)" in _told(caplog)
    assert "1 without text in field 'text'" in _told(caplog)
    with pytest.raises(ValueError, match="3 without text in field 'n'"):
        _read({"parquet": file, "field": "n", **WHOLE})


def test_a_damaged_row_group_is_counted_by_its_rows(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": hashlib.sha256(str(number).encode()).hexdigest() * 20} for number in range(40)]
    file = tmp_path / "a.parquet"
    _parquet(file, rows, group=10, write_page_checksum=True, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    end = column.data_page_offset + column.total_compressed_size  # of the page, which statistics come before
    content[end - 60 : end - 20] = bytes(40)
    file.write_bytes(content)
    assert _read({"parquet": str(file), **WHOLE}) == [row["text"] for row in rows[:10] + rows[20:]]
    assert "30 records are documents, skipped: 10 in a damaged row group" in _told(caplog)
    assert "a.parquet, row group 2" in _told(caplog)


def test_text_that_is_no_utf8_is_counted(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    values = pyarrow.array([b"good", b"\xff\xfe", b"too"], pyarrow.binary())
    for name, column in (("a", values.view(pyarrow.string())), ("b", values)):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / name)
    assert _read({"parquet": str(tmp_path / "*"), **WHOLE}) == ["good", "too"] * 2
    assert "2 not valid UTF-8" in _told(caplog)


@pytest.mark.parametrize(("content", "message"), [
    (b'{"text": "a"}\n', "a.parquet is not a Parquet file; expected Parquet"),
    (b"", "a.parquet is not a Parquet file"),
    (b"PAR1", "damaged or truncated: its footer cannot be read"),
    (b"PK\x03\x04aaaa\0", "a.parquet is a zip archive; expected Parquet"),
])
def test_what_is_no_parquet_is_refused(tmp_path: pathlib.Path, content: bytes, message: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        _read({"parquet": str(tmp_path / "*"), **WHOLE})
    assert "\n" not in str(error.value)


def test_parquet_that_breaks_off_is_refused(tmp_path: pathlib.Path) -> None:
    file = pathlib.Path(_parquet(tmp_path / "a.parquet", _rows()))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"text.mine: .*a.parquet is damaged or truncated: .* download it again\.$"):
        _read({"parquet": str(file), **WHOLE})


def test_a_missing_library_is_named_with_its_extra(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _parquet(tmp_path / "a.parquet", _rows())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"Parquet is read by pyarrow: pip install 'codellm_jax\[readers\]'"):
        _read({"parquet": file, **WHOLE})


def test_files_of_parquet_read_by_themselves_have_the_splits_of_the_whole(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = _rows()
    names = [_parquet(tmp_path / f"{letter}.parquet", rows[start : start + 10]) for letter, start in
             zip("abcde", range(0, 50, 10), strict=True)]
    spec = {"parquet": str(tmp_path / "*.parquet"), "holdout": 0.1, "sample": 0.8}
    assert specs.is_divisible(spec, "train")
    borders = sources.find_borders(spec)
    for split in specs.SPLITS:
        parts = [text for name in names for text in sources.documents(spec, split, "text.mine", [name], borders)]
        assert parts == _read(spec, split) and parts
    caplog.set_level(logging.WARNING)


# ---- Arrow -------------------------------------------------------------------------------------


def _arrow(file: pathlib.Path, rows: list[dict[str, Any]], stream: bool = False, batch: int = 7) -> str:
    table = pyarrow.Table.from_pylist(rows)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return str(file)


@pytest.mark.parametrize("stream", [False, True])
def test_arrow(tmp_path: pathlib.Path, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows()
    _arrow(tmp_path / "a.arrow", rows[:30], stream)
    _arrow(tmp_path / "b.arrow", rows[30:], stream)
    spec = {"arrow": str(tmp_path / "*.arrow"), **WHOLE}
    assert _read(spec) == [row["text"] for row in rows]
    assert _read({**spec, "where": {"meta.score": {"at_least": 6}}, "text": "{meta.language} {text}"}) == [
        f"{row['meta']['language']} {row['text']}" for row in rows if row["meta"]["score"] >= 6]
    with pytest.raises(ValueError, match=r"50 without text in field 'meta.body' \(first: .*/a.arrow, whose fields are"):
        _read({**spec, "field": "meta.body"})


def test_an_arrow_stream_that_is_cut_between_two_batches(tmp_path: pathlib.Path, caplog) -> None:
    path = tmp_path / "a.arrow"
    _arrow(path, [{"text": f"text {number}"} for number in range(4)], stream=True)
    assert path.read_bytes().endswith(b"\xff" * 4 + b"\0" * 4)
    assert _read({"arrow": str(path), **WHOLE}) == [f"text {number}" for number in range(4)] and not caplog.text
    path.write_bytes(path.read_bytes()[:-8])
    assert len(_read({"arrow": str(path), **WHOLE})) == 4 and "1 broken rest of a.arrow" in caplog.text


def test_a_folder_of_save_to_disk(tmp_path: pathlib.Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = _rows()
    folder = tmp_path / "saved"
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(str(folder), num_shards=3)
    _arrow(folder / "data-00003-of-00004.arrow", [{"text": "of a dataset that was here before"}], stream=True)
    assert _read({"arrow": str(folder), **WHOLE}) == [row["text"] for row in rows]
    assert _read({"arrow": f"{tmp_path}/sav*", **WHOLE}) == [row["text"] for row in rows]
    assert [pathlib.Path(file).name for file, _ in sources.describe({"arrow": str(folder)})["train_files"]] == [
        f"data-0000{number}-of-00003.arrow" for number in range(3)]

    both = datasets.DatasetDict({"train": whole.select(range(40)), "test": whole.select(range(40, 50))})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match="both holds a dataset for each of the splits train, test; name one"):
        _read({"arrow": str(tmp_path / "both")})
    spec = {"arrow": str(tmp_path / "both" / "train"), "validation": str(tmp_path / "both" / "test")}
    assert _read(spec) == [row["text"] for row in rows[:40]]
    assert _read(spec, "validation") == [row["text"] for row in rows[40:]]

    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*data-00001-of-00003.arrow"):
        _read({"arrow": str(folder), **WHOLE})
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="saved/state.json lists no files"):
        _read({"arrow": str(folder), **WHOLE})
    (folder / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved/state.json is not JSON"):
        _read({"arrow": str(folder), **WHOLE})


def test_arrow_that_breaks_off(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"text {number} " * 99} for number in range(70)]
    file = pathlib.Path(_arrow(tmp_path / "a", rows, stream=True))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found = _read({"arrow": str(file), **WHOLE})
    assert 20 < len(found) < 40 and found == [row["text"] for row in rows[: len(found)]]
    assert "1 broken rest of a" in _told(caplog)
    _arrow(file, rows)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="a is damaged or truncated .* copy or download it again"):
        _read({"arrow": str(file), **WHOLE})
    file.write_bytes(b"PAR1\xff\0")
    with pytest.raises(ValueError, match="a is a Parquet file; expected an Arrow file or stream"):
        _read({"arrow": str(file), **WHOLE})


def test_damage_within_arrow_ends_no_process(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lengths of texts that lead beyond their buffer would be followed by a library that trusts them."""
    rows = [{"text": f"text {number}"} for number in range(21)]
    file = pathlib.Path(_arrow(tmp_path / "a", rows))
    content = bytearray(file.read_bytes())
    offsets = b"".join(int(each).to_bytes(4, "little") for each in (0, 6, 12))
    at = content.find(offsets, content.find(b"text 0"))  # of the second batch
    content[at + 8 : at + 12] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(content)
    found = _read({"arrow": str(file), **WHOLE})
    assert set(found) < {row["text"] for row in rows} and len(found) == 19
    assert "2 in a damaged batch" in _told(caplog)


# ---- CSV ---------------------------------------------------------------------------------------


def test_csv(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfid,text,score\r\n1,\"two\r\nlines, \"\"quoted\"\"\",5\r\n\r\n2,short\r\n"
                     b"3,\xff,9\r\n4,last,1")
    assert _read({"csv": str(file), **WHOLE}) == ['two\r\nlines, "quoted"', "last"]
    assert "1 not valid UTF-8 (first: " in _told(caplog)
    assert f"1 with a number of cells that differs from the header's (first: {file}, line 5, 2 instead of 3)" in _told(
        caplog)
    assert _read({"csv": str(file), "where": {"score": {"at_least": 5}, "id": [1]}, "text": "{id}", **WHOLE}) == ["1"]


def test_tsv(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.tsv.gz"
    file.write_bytes(gzip.compress(b'7\t"open quote\n8\tno "quote"\n'))
    assert _read({"csv": str(file), "columns": ["id", "title"], "quotes": False, "field": "title", **WHOLE}) == [
        '"open quote', 'no "quote"']
    (tmp_path / "b.txt").write_text("a;b\n1;2\n")
    assert _read({"csv": str(tmp_path / "b.txt"), "separator": ";", "field": "b", **WHOLE}) == ["2"]


def test_a_quote_that_is_not_closed_takes_no_more_than_a_cell(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(separated, "LONGEST_CELL", 100)
    (tmp_path / "a.csv").write_text('text\ngood\n"open\n' + "row\n" * 200 + "last\n")
    found = _read({"csv": str(tmp_path / "a.csv"), **WHOLE})
    assert found[0] == "good" and found[-1] == "last"
    assert "1 broken rows" in _told(caplog)


def test_empty_csv(tmp_path: pathlib.Path) -> None:
    for content in ("", "text\n"):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(ValueError, match="no document is left .*1 empty file"):
            _read({"csv": str(tmp_path / "a.csv"), **WHOLE})


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


# ---- ArrayRecord -------------------------------------------------------------------------------


def _array_record(file: pathlib.Path, records: list[bytes]) -> str:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(file), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)


def test_array_record(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [json.dumps({"text": f"text {number}", "score": number}).encode() for number in range(150)]
    file = _array_record(tmp_path / "a.array_record", [*records, b"{broken"])
    assert _read({"array_record": file, "where": {"score": {"at_least": 100}}, **WHOLE}) == [
        f"text {number}" for number in range(100, 150)]
    assert "1 broken JSON (first: " in _told(caplog) and "a.array_record, record 151)" in _told(caplog)
    whole = pathlib.Path(file).read_bytes()
    pathlib.Path(file).write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="a.array_record is damaged or truncated"):
        _read({"array_record": file, **WHOLE})
    pathlib.Path(file).write_text("text")
    with pytest.raises(ValueError, match="a.array_record is not an ArrayRecord file"):
        _read({"array_record": file, **WHOLE})


def test_array_records_of_examples(tmp_path: pathlib.Path) -> None:
    tf = pytest.importorskip("tensorflow")

    def feature(**values: Any) -> Any:
        return tf.train.Feature(**{kind: getattr(tf.train, name)(value=[value]) for kind, name, value in (
            ("bytes_list", "BytesList", values.get("text")), ("int64_list", "Int64List", values.get("number")))
            if value is not None})

    records = [tf.train.Example(features=tf.train.Features(feature={
        "text": feature(text=f"text {number} é".encode()), "score": feature(number=number)})).SerializeToString()
        for number in range(10)]
    with tf.io.TFRecordWriter(str(tmp_path / "b")) as writer:
        for record in records:
            writer.write(record)
    for of_kind in ({"array_record": _array_record(tmp_path / "a", records)}, {"tfrecords": str(tmp_path / "b")}):
        spec = {**of_kind, "where": {"score": {"at_most": 3}}, **WHOLE}
        assert _read(spec) == [f"text {number} é" for number in range(4)]
        assert _read({**spec, "text": "{score}: {text}"})[3] == "3: text 3 é"


# ---- Lines that are too long -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_a_line_that_is_too_long_is_counted_in_bounded_memory(
    tmp_path: pathlib.Path, suffix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 20)
    content = b'{"text": "good"}\n{"text": "' + b"x" * (1 << 27) + b'"}\n{"text": "too"}\n'
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
                ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content))
    del content
    tracemalloc.start()
    found = _read({"json_lines": str(tmp_path / "*"), **WHOLE})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["good", "too"] and peak < 1 << 27
    assert f"1 longer than 256 MiB (first: {tmp_path}/a.jsonl{suffix}, line 2)" in _told(caplog)


def test_a_record_that_is_too_long_is_not_parsed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Parsing would take many times as much memory. A list in one line is read up to such a record."""
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 22)
    long = "x" * (1 << 23)
    (tmp_path / "a").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("good", long, "too")))
    (tmp_path / "first").write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "third")))
    (tmp_path / "list").write_text(json.dumps([{"text": "of a list"}, {"text": long}, {"text": "behind"}]))
    tracemalloc.start()
    found = _read({"json_lines": str(tmp_path / "[af]*"), **WHOLE})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["good", "too", "third"] and peak < 4 * len(long)
    assert f"2 longer than 256 MiB (first: {tmp_path}/a, line 2)" in _told(caplog)
    assert _read({"json_lines": str(tmp_path / "list"), **WHOLE}) == ["of a list"]
    assert f"1 longer than 256 MiB, lost with all that follows it in its file (first: {tmp_path}/list, record 2)" in (
        _told(caplog))


def test_what_is_held_at_once_is_bounded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module, name in ((records, "LONGEST_LINE"), (records, "LARGEST"), (separated, "LARGEST")):
        monkeypatch.setattr(module, name, 1 << 19)
    text = "x" * (1 << 20)
    for content in (text, json.dumps([{"text": text}])):
        (tmp_path / "a").write_text(content)
        for kind in ("json_lines", "text_files", "csv"):
            with pytest.raises(ValueError, match="no document is left of .* longer than (1 G|256 M)iB"):
                _read({kind: str(tmp_path / "a"), **WHOLE})


@pytest.mark.parametrize("form", ["one line", "a line for each", "objects over several lines"])
def test_memory_does_not_grow_with_a_list(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(records, "UNDECIDED", 1 << 20)
    texts = [f"{number} é " + "x" * (1 << 14) for number in range(600)]
    given = [{"text": text} for text in texts]
    (tmp_path / "a").write_text({
        "one line": lambda: json.dumps(given), "a line for each": lambda: json.dumps(given, indent=0),
        "objects over several lines": lambda: "\n".join(json.dumps(one, indent=1) for one in given)}[form]())
    tracemalloc.start()
    count = 0
    for count, record in enumerate(records.json_records(str(tmp_path / "a")), 1):
        assert record == given[count - 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(texts) and peak < 4 << 20


def test_records_are_the_same_wherever_pieces_end(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [{"text": 'é "quoted\\" \U0001f600', "number": -12.5e3, "of": [{"text": "inner"}, [], None]}, 17, "x", True,
             {"a": {}}, [{"b": 1}], 123456]
    items = [json.dumps(item, ensure_ascii=number % 2 > 0) for number, item in enumerate(whole)]
    damaged = [items[0], '{"text": "unclosed', '{"text": 1}', '{"a" 1}', items[4], "17"]
    for content in ("[" + ", ".join(items) + "]", "\ufeff[" + ",".join(items[:3]) + "]\n[" + ",".join(items[4:]) + "]",
                    "[" + ",\n".join(damaged) + "]", "\n".join(json.dumps(one, indent=2) for one in whole[::4])):
        (tmp_path / "a").write_text(content)
        found = []
        for size in (1 << 18, 1, 7):
            monkeypatch.setattr(records, "PIECE", size)
            monkeypatch.setattr(contents, "PIECE", size)
            monkeypatch.setattr(contents, "HEAD", max(3, size))
            found.append(list(records.placed_records(str(tmp_path / "a"))))
        assert found[1] == found[0] and found[2] == found[0] and len(found[0]) > 1


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


def test_columns_of_one_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("text,id,id\nfirst,1,2\n")
    assert _read({"csv": str(tmp_path / "a.csv"), **WHOLE}) == ["first"]
    with pytest.raises(ValueError, match="a.csv has 2 columns named 'id'; rename all but one"):
        _read({"csv": str(tmp_path / "a.csv"), "field": "id", **WHOLE})
