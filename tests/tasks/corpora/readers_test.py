"""Readers of the formats in which corpora are published, and what is chosen of them."""

import bz2
import gzip
import hashlib
import json
import lzma
import pathlib
import tracemalloc
from typing import Any

import pytest
import zstandard

from codellm_jax import contents
from tasks.corpora import fields, records, separated, sources, specs

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
