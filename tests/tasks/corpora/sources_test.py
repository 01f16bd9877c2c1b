"""Readers of corpora: what every Python holds, users' files, and what is said of broken ones."""

import bz2
import gzip
import hashlib
import itertools
import json
import logging
import lzma
import os
import pathlib
import subprocess
import sys

import pytest

import tasks
from tasks.corpora import files, sources, specs, standard_library

ROOT = pathlib.Path(__file__).resolve().parents[3]
REAL_BOOKS = ROOT.parent / "shared" / "data" / "corpora" / "en" / "classics_60MB.jsonl.gz"
WHOLE = {"holdout": 0}  # Everything is "train".


# ---- Users' files ------------------------------------------------------------------------------


def _write_lines(file: pathlib.Path, records: list[object]) -> None:
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    content = b"\n".join(lines) + b"\n"
    if file.suffix == ".gz":
        content = gzip.compress(content)
    elif file.suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    elif file.suffix in (".bz2", ".xz"):
        content = (bz2 if file.suffix == ".bz2" else lzma).compress(content)
    file.write_bytes(content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_json_lines(tmp_path: pathlib.Path, suffix: str) -> None:
    texts = [f"document {i}\r\n\u2028\u00e9" for i in range(5)]
    _write_lines(tmp_path / f"b.jsonl{suffix}", [{"text": text} for text in texts[2:]])
    _write_lines(tmp_path / f"a.jsonl{suffix}", [{"text": text} for text in texts[:2]])
    spec = {"json_lines": str(tmp_path / "*.jsonl*"), **WHOLE}
    assert list(sources.documents(spec, "train")) == texts


def test_long_zstd_files(tmp_path: pathlib.Path) -> None:
    """More than one frame, and lines that lie across the borders of what is read at once."""
    zstandard = pytest.importorskip("zstandard")
    texts = [os.urandom(200_000).hex() for _ in range(8)]
    frames = [zstandard.compress(json.dumps({"text": text}).encode() + b"\n") for text in texts]
    file = tmp_path / "long.jsonl.zst"
    file.write_bytes(b"".join(frames))
    spec = {"json_lines": str(file), **WHOLE}
    assert list(sources.documents(spec, "train")) == texts


def test_field_and_licenses(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        {"content": "free", "license": "mit", "repo_name": "a/b", "path": "c.py"},
        {"content": "bound", "license": "gpl-3.0", "repo_name": "a/b", "path": "d.py"},
        {"content": "unknown"},
    ]
    _write_lines(tmp_path / "code.json.gz", records)
    spec = {"json_lines": str(tmp_path / "*.gz"), "field": "content", "licenses": ["mit"], **WHOLE}
    assert list(sources.documents(spec, "train", "code.parrot")) == ["free"]
    assert "code.parrot, read for train: 1 records are documents" in caplog.text
    assert "2 of other licences" in caplog.text


def test_broken_records_are_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"text": "good"},
        b"{broken",
        b'["no object"]',
        b"\xff\xfe\xff",
        {"body": "elsewhere"},
        {"text": 7},
        {"text": " \n"},
        b'{"text": "\\ud800"}',
        b"",
    ]
    _write_lines(tmp_path / "a.jsonl", records)
    spec = {"json_lines": str(tmp_path / "a.jsonl"), **WHOLE}
    with caplog.at_level(logging.WARNING):
        assert list(sources.documents(spec, "train", "text.mine")) == ["good"]
    [line] = [record.getMessage() for record in caplog.records]
    assert "text.mine" in line
    for loss, first in (
        ("1 broken JSON", "line 2"), ("1 not a JSON object", "line 3"), ("2 not valid UTF-8", "line 4"),
        ("2 without text in field 'text'", "line 5, whose fields are 'body'"), ("1 empty", "line 7"),
    ):
        assert f"{loss} (first: {tmp_path}/a.jsonl, {first})" in line


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_files_that_break_off(
    tmp_path: pathlib.Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.jsonl{suffix}"
    _write_lines(good, [{"text": "good"}])
    _write_lines(bad, [{"text": os.urandom(99).hex()} for _ in range(99)])
    bad.write_bytes(bad.read_bytes()[:-99])
    spec = {"json_lines": [str(bad), str(good)], **WHOLE}
    assert "good" in list(sources.documents(spec, "train"))
    assert f"1 broken rest of b.jsonl{suffix}" in caplog.text
    bad.write_bytes(b"nothing compressed")
    with pytest.raises(ValueError, match="b.jsonl.* holds no JSON object .* begins with 'nothing compressed'"):
        list(sources.documents(spec, "train"))


def test_nothing_left(tmp_path: pathlib.Path) -> None:
    _write_lines(tmp_path / "a.jsonl", [{"body": "x"}] * 3)
    spec = {"json_lines": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=r"text.mine: no document is left .*3 without text") as e:
        list(sources.documents(spec, "train", "text.mine"))
    assert "\n" not in str(e.value)


def test_text_files(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("zwei\r\nZeilen \u00fc".encode())
    (tmp_path / "sub" / "a.txt").write_bytes(b"one")
    (tmp_path / "latin.txt").write_bytes(b"\xfc")
    spec = {"text_files": str(tmp_path / "**" / "*.txt"), **WHOLE}
    assert list(sources.documents(spec, "train")) == ["zwei\r\nZeilen \u00fc", "one"]
    assert "1 not valid UTF-8" in caplog.text


def test_patterns(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x[1].txt").write_text("bracket")
    (tmp_path / "y.txt").write_text("plain")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    both = [str(tmp_path / "x[1].txt"), str(tmp_path / "y.txt")]
    assert sources.files({"text_files": "*.txt"}, "train") == both
    assert sources.files({"text_files": ["~/y.txt", "x[1].txt", "*.txt"]}, "train") == both
    with pytest.raises(FileNotFoundError, match=r"code.gone: no file matches '\*.py'"):
        sources.documents({"text_files": ["y.txt", "*.py"]}, "train", "code.gone")


def test_remote_patterns(tmp_path: pathlib.Path) -> None:
    """The way of gs:// paths, tried on local ones."""
    pytest.importorskip("etils.epath")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("one")
    (tmp_path / "a" / "2.txt").write_text("two")
    found = files._remote_matches(f"{tmp_path}/*/?.txt")
    assert sorted(found) == [str(tmp_path / "a" / "1.txt"), str(tmp_path / "a" / "2.txt")]
    assert files._remote_matches(f"{tmp_path}/a/1.txt") == [str(tmp_path / "a" / "1.txt")]
    assert files._remote_matches(f"{tmp_path}/a/3.txt") == []


def test_holdout_divides_by_text(tmp_path: pathlib.Path) -> None:
    texts = [f"document {i}" for i in range(1000)]
    _write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    _write_lines(tmp_path / "b.jsonl", [{"text": text} for text in reversed(texts)])
    found = {}
    for name in ("a", "b"):
        spec = {"json_lines": str(tmp_path / f"{name}.jsonl"), "holdout": 0.1}
        found[name] = {split: set(sources.documents(spec, split)) for split in specs.SPLITS}
    assert found["a"] == found["b"]
    assert set.union(*found["a"].values()) == set(texts)
    assert sum(map(len, found["a"].values())) == len(texts)
    assert all(60 < len(found["a"][split]) < 140 for split in ("validation", "test"))


def _by_hash(texts: list[str]) -> list[str]:
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


@pytest.mark.parametrize("texts, holdout, held_out", [
    (1, 0.01, (0, 0)), (2, 0.01, (1, 0)), (3, 0.01, (1, 1)), (3, 0.49, (1, 1)), (4, 0.49, (1, 1)), (5, 0.49, (2, 2)),
    (143, 0.01, (1, 1)), (250, 0.01, (2, 2)), (1999, 0.01, (20, 20)), (39, 0.5 - 1e-9, (19, 19))])
def test_small_corpora_hold_out_the_texts_of_lowest_hash(
    tmp_path: pathlib.Path, texts: int, holdout: float, held_out: tuple[int, int]
) -> None:
    written = [f"document {number}" for number in range(texts)]
    ordered = _by_hash(written)
    ends = [0, held_out[0], sum(held_out), texts]
    expected = dict(zip(("validation", "test", "train"), itertools.starmap(
        lambda first, last: set(ordered[first:last]), itertools.pairwise(ends)), strict=True))
    for name, order in (("a", written), ("b", written[::-1]), ("twice", written * 2)):
        _write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in order])
        spec = {"json_lines": str(tmp_path / f"{name}.jsonl"), "holdout": holdout}
        found = {split: list(sources.documents(spec, split)) for split in specs.SPLITS}
        assert {split: set(documents) for split, documents in found.items()} == expected
        assert sum(map(len, found.values())) == len(order)


def test_larger_corpora_are_divided_by_the_hash_alone(tmp_path: pathlib.Path) -> None:
    texts = [f"document {number}" for number in range(2000)]  # of which a hash holds out 20 on average
    _write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    _write_lines(tmp_path / "b.jsonl", [{"text": "again"}] * 20_000)  # more than are read to see that it is small
    spec = {"json_lines": str(tmp_path / "a.jsonl")}
    position = {text: int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 for text in texts}
    assert list(sources.documents(spec, "validation")) == [text for text in texts if position[text] < 0.01]
    assert list(sources.documents(spec, "test")) == [text for text in texts if 0.01 <= position[text] < 0.02]
    assert sources.find_borders({"json_lines": str(tmp_path / "b.jsonl")}) == (0.01, 0.02)
    assert sources.find_borders(spec | {"holdout": 0}) is None
    assert sources.find_borders({"python": "text"}) is None


def test_files_read_by_themselves_have_the_splits_of_the_whole(tmp_path: pathlib.Path) -> None:
    for number in range(143):
        (tmp_path / f"{number:03}.txt").write_text(f"a file of a user, {number % 100}")
    spec = {"text_files": str(tmp_path / "*.txt")}
    listed = sources.files(spec, "train")
    borders = sources.find_borders(spec)
    for split in specs.SPLITS:
        whole = list(sources.documents(spec, split))
        assert whole
        for known in (None, borders):
            assert [text for start in range(0, 143, 13) for text in sources.documents(
                spec, split, only_files=listed[start : start + 13], borders=known)] == whole
    held_out = [set(sources.documents(spec, split)) for split in specs.SPLITS]
    assert list(map(len, held_out)) == [98, 1, 1] and len(set.union(*held_out)) == 100


def test_validation_of_its_own(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    spec = {"text_files": str(tmp_path / "[ab].txt"), "validation": str(tmp_path / "c.txt")}
    assert specs.splits(spec) == ("train", "validation")
    assert list(sources.documents(spec, "train")) == ["a", "b"]
    assert list(sources.documents(spec, "validation")) == ["c"]
    with pytest.raises(ValueError, match="there is no split 'test', only train, validation"):
        sources.documents(spec, "test")
    with pytest.raises(ValueError, match="would be in train and validation"):
        sources.documents({**spec, "validation": str(tmp_path / "b.txt")}, "train")


def test_shards_of_a_corpus(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    spec = {"text_files": str(tmp_path / "*.txt"), **WHOLE}
    shards = [
        list(sources.documents(spec, "train", only_files=[file]))
        for file in sources.files(spec, "train")
    ]
    assert shards == [["a"], ["b"]]
    (tmp_path / "b.txt").write_text("")
    assert list(sources.documents(spec, "train", only_files=[str(tmp_path / "b.txt")])) == []


def test_tfrecords(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    tf = pytest.importorskip("tensorflow")

    def example(field: str, *values: bytes) -> bytes:
        value = tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        return tf.train.Example(
            features=tf.train.Features(feature={field: value})
        ).SerializeToString()

    records = [example("text", "gut \u00fc".encode()), example("body", b"x"), b"\xff\xff"]
    for name, options in (("a.tfrecord", None), ("b.tfrecord.gz", "GZIP")):
        with tf.io.TFRecordWriter(str(tmp_path / name), options) as writer:
            for record in records:
                writer.write(record)
    spec = {"tfrecords": str(tmp_path / "*.tfrecord*"), **WHOLE}
    assert list(sources.documents(spec, "train")) == ["gut \u00fc"] * 2
    first = tmp_path / "a.tfrecord"
    assert f"2 broken tf.train.Example (first: {first}, record 3), 2 without text in field 'text' (first: {first}, " \
        "record 2, whose fields are 'body')" in caplog.text
    broken = tmp_path / "a.tfrecord"
    broken.write_bytes(broken.read_bytes()[:-3])
    assert list(sources.documents(spec, "train")) == ["gut \u00fc"] * 2
    assert "1 broken rest of a.tfrecord" in caplog.text


def test_tfds(tmp_path: pathlib.Path) -> None:
    tf = pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")

    folder = tmp_path / "small_corpus" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
    splits = []
    for name, texts in (("train", ["a", "b"]), ("held", ["c"])):
        records = [features.serialize_example({"body": text}) for text in texts]
        with tf.io.TFRecordWriter(
            str(folder / f"small_corpus-{name}.tfrecord-00000-of-00001")
        ) as w:
            for record in records:
                w.write(record)
        splits.append(tfds.core.SplitInfo(name=name, shard_lengths=[len(texts)], num_bytes=9))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=splits)
    tfds.core.add_data_dir(str(tmp_path))
    spec = {"tfds": "small_corpus:1.0.0", "field": "body", "validation": "held"}
    assert list(sources.documents(spec, "train")) == ["a", "b"]
    assert list(sources.documents(spec, "validation")) == ["c"]


def test_python_kind() -> None:
    first = next(sources.documents({"python": "code"}, "test"))
    assert first == next(standard_library.python_documents("code", "test"))


def test_a_real_file() -> None:
    if not REAL_BOOKS.exists():
        pytest.skip(f"the public-domain books are not at {REAL_BOOKS}")
    stream = sources.documents({"json_lines": str(REAL_BOOKS)}, "train", "text.classics")
    first, second = next(stream), next(stream)
    assert len(first) > 1000 and len(second) > 1000 and first != second


# ---- Specs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("*.txt", "a corpus is a mapping"),
        ({}, "exactly one kind .*found none"),
        ({"json_line": "*"}, "found none. Did you mean 'json_lines'"),
        ({"python": "code", "task": "x"}, r"found 2 \(python, task\)"),
        ({"python": "prose"}, "'python' must be 'text' or 'code', found 'prose'"),
        ({"json_lines": "*", "feild": "a"}, "unknown option 'feild'.*Did you mean 'field'"),
        ({"text_files": "*", "field": "a"}, "unknown option 'field' of text_files"),
        ({"text_files": []}, "must be a glob or a list of globs, found \\[\\]"),
        ({"text_files": 3}, "must be a glob"),
        ({"text_files": "*", "rate": 0}, "'rate' must be a positive number, found 0"),
        ({"text_files": "*", "rate": True}, "'rate' must be a positive number"),
        ({"text_files": "*", "rate": float("nan")}, "'rate' must be a positive number"),
        ({"text_files": "*", "holdout": 0.5}, r"'holdout' must be a number in \[0, 0.5\)"),
        ({"text_files": "*", "holdout": 0.1, "validation": "v"}, "nothing to hold out"),
        ({"json_lines": "*", "licenses": "mit"}, "'licenses' must be a list of licences"),
        ({"json_lines": "*", "field": ""}, "'field' must be the name of a field"),
        ({"tfds": "wikipedia"}, "must be a name with its version"),
        ({"task": ""}, "must be the name of a SeqIO task"),
    ],
)
def test_malformed_specs(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^text.mine: .*{message}") as error:
        specs.validate(spec, "text.mine")
    assert "\n" not in str(error.value)


def test_splits() -> None:
    assert specs.splits({"python": "text"}) == specs.SPLITS
    assert specs.splits({"text_files": "*"}) == specs.SPLITS
    assert specs.splits({"text_files": "*", "holdout": 0}) == ("train",)
    assert specs.splits({"task": "x"}) == ()


def test_description_follows_the_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    spec = {"text_files": str(tmp_path / "*.txt")}
    first = sources.describe(spec)
    assert first["train_files"] == [[str(file), 3]]
    assert json.loads(json.dumps(first)) == first
    assert sources.describe({**spec, "rate": 2.0}) == first
    assert sources.describe({**spec, "holdout": 0.01}) == first
    assert sources.describe({**spec, "holdout": 0.02}) != first
    file.write_text("three")
    second = sources.describe(spec)
    (tmp_path / "b.txt").write_text("")
    third = sources.describe(spec)
    assert first != second and second != third


def test_descriptions_of_other_kinds() -> None:
    python = sources.describe({"python": "code"})
    assert python["python"] == sys.version and python["prefix"] == sys.base_prefix
    assert python != sources.describe({"python": "text"})
    assert sources.describe({"tfds": "a:1.0.0"}) != sources.describe({"tfds": "a:2.0.0"})
    assert sources.describe({"task": "a"})["options"] == {"task": "a"}


def test_definitions() -> None:
    assert tasks.Definitions().modules == ("tasks.pretraining",)
    definitions = tasks.Definitions(corpora={"code.own": {"python": "code"}})
    assert definitions.describe("code.own") == sources.describe({"python": "code"})
    other = definitions.describe("text.python")
    assert len(other["modules"]["tasks.pretraining"]) == 64
    alias = tasks.Definitions(corpora={"text.second": {"task": "text.python"}})
    assert alias.describe("text.second")["aliased"] == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": "tasks.pretraining"}, "modules must be a list"),
        ({"corpora": ["text.a"]}, "corpora must map names to specs"),
        ({"corpora": {"prose.a": {"python": "text"}}}, "found 'prose.a'"),
        ({"corpora": {"text.a-b": {"python": "text"}}}, "found 'text.a-b'"),
        ({"corpora": {"text.a": {"python": "prose"}}}, "^text.a: 'python' must be"),
        (
            {"corpora": {"text.a": {"task": "text.b"}, "text.b": {"task": "text.a"}}},
            "text.a -> text.b -> text.a",
        ),
    ],
)
def test_malformed_definitions(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.Definitions(**arguments)


def test_missing_modules() -> None:
    definitions = tasks.Definitions(modules=["tasks.pretraining", "tasks.missing"])
    with pytest.raises(ValueError, match="no module 'tasks.missing' in tasks.modules"):
        definitions.describe("anything")
    with pytest.raises(ValueError, match="no module 'nowhere.at.all'"):
        tasks.Definitions(modules=["nowhere.at.all"]).register()


def test_import_and_description_are_light(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    program = (
        "import sys, tasks; "
        f"d = tasks.Definitions(corpora={{'text.a': {{'text_files': {str(tmp_path / '*')!r}}}}}); "
        "d.describe('text.a'); d.describe('text.python'); "
        "list(tasks.corpora.sources.documents(d.corpora['text.a'], 'train')); "
        "print({'tensorflow', 'seqio', 'jax', 'gin', 'etils', 'numpy', 'tasks.pretraining'}"
        " & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"
