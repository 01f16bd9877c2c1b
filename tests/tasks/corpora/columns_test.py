"""Corpora in files of columns: Parquet, Arrow, CSV."""

import gzip
import hashlib
import logging
import pathlib
import random
import sys
import tracemalloc
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tasks.corpora import separated, sources, specs

WHOLE = {"holdout": 0}  # Everything is "train".


def _told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def _read(spec: dict[str, Any], split: str = "train") -> list[str]:
    return list(sources.documents(spec, split, "text.mine"))


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


def test_columns_of_one_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("text,id,id\nfirst,1,2\n")
    assert _read({"csv": str(tmp_path / "a.csv"), **WHOLE}) == ["first"]
    with pytest.raises(ValueError, match="a.csv has 2 columns named 'id'; rename all but one"):
        _read({"csv": str(tmp_path / "a.csv"), "field": "id", **WHOLE})
