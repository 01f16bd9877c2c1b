"""Files of users: found each once, read by their content, and refused by name before the first is read."""

import bz2
import codecs
import gzip
import json
import logging
import lzma
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from tasks.benchmarks.loading import load
from tasks.corpora import files, sources
from tasks.instruction_sets import instructions

ROOT = pathlib.Path(__file__).resolve().parents[3]
WHOLE = {"holdout": 0}
TEXTS = ["a \u00e9 word", "\u4e00\u4e2a\r\n\u6a21\u578b\u2028", " three\n"]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode, "marked": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), "utf-32": lambda text: text.encode("utf-32")}
every_way = [pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS),
             pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS),
             pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".parquet"])]


def in_every_way(test: Callable[..., None]) -> Callable[..., None]:
    for mark in every_way:
        test = mark(test)
    return test


def documents(pattern: object, kind: str = "json_lines", **options: Any) -> list[str]:
    return list(sources.documents({kind: pattern, **WHOLE, **options}, "train", "text.mine"))


def refused(pattern: object, kind: str = "json_lines") -> str:
    """The line that refuses a corpus, without its name."""
    with pytest.raises((ValueError, OSError)) as error:
        documents(pattern, kind)
    told = str(error.value)
    assert told.startswith("text.mine: ") and "\n" not in told
    return told.removeprefix("text.mine: ")


# ---- Content -----------------------------------------------------------------------------------


@in_every_way
def test_the_same_documents_however_they_are_written(
    tmp_path: pathlib.Path, encode: Callable, compress: Callable, suffix: str
) -> None:
    records = [{"text": text} for text in TEXTS]
    for form, content in {
        "lines": "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\r\n",
        "escaped": "\n".join(map(json.dumps, records)), "list": json.dumps(records, ensure_ascii=False),
        "pretty": json.dumps(records, indent=2), "objects": "\n".join(json.dumps(each, indent=1) for each in records),
        "commas": ",\n".join(map(json.dumps, records)),
    }.items():
        (tmp_path / f"{form}.jsonl{suffix}").write_bytes(compress(encode(content)))
        assert documents(str(tmp_path / f"{form}*")) == TEXTS, form
    (tmp_path / f"x.txt{suffix}").write_bytes(compress(encode("".join(TEXTS))))
    assert documents(str(tmp_path / "x.txt*"), "text_files") == ["".join(TEXTS)]


@in_every_way
def test_the_same_instructions_and_questions(
    tmp_path: pathlib.Path, encode: Callable, compress: Callable, suffix: str
) -> None:
    if suffix == ".parquet":
        suffix = ".xz"  # benchmarks are found by their names
    records = [{"input": "\u95ee", "target": text, "doc": "\u95ee", "code": "c", "label": 1} for text in TEXTS]
    dialogue = [["\u7537"], [{"question": "?", "choice": ["\u7532", "\u4e59"], "answer": "\u4e59"}], "7"]
    for name, content in (("cosqa-dev.json", json.dumps(records, ensure_ascii=False)),
                          ("c3-d-dev.json", json.dumps([dialogue], ensure_ascii=False)),
                          ("logic_val.csv", "id,question,A,B,C,D,answer\r\n0,\u95ee,1,2,3,4,C\r\n")):
        (tmp_path / f"{name}{suffix}").write_bytes(compress(encode(content)))
    spec = {"instructions": str(tmp_path / "cosqa*"), **WHOLE}
    assert [pair.targets for pair in instructions.pairs(spec, "train")] == TEXTS
    assert [len(load(task, str(tmp_path)).questions) for task in ("cosqa", "c3", "logic")] == [3, 1, 1]
    assert load("logic", str(tmp_path)).questions[0].answer == (2,)  # type: ignore[union-attr]


def test_marks_where_files_were_joined(tmp_path: pathlib.Path) -> None:
    parts = [json.dumps({"text": text}).encode("utf-8-sig") + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"".join(parts))
    assert documents(str(tmp_path / "a.jsonl")) == TEXTS
    (tmp_path / "a.txt").write_bytes("one\n".encode("utf-8-sig") * 2)
    assert documents(str(tmp_path / "a.txt"), "text_files") == ["one\none\n"]


@pytest.mark.parametrize("encoding", ["gbk", "shift-jis", "utf-16-le", "utf-16-be"])
def test_a_file_in_another_encoding_is_refused(tmp_path: pathlib.Path, encoding: str) -> None:
    """Be there whole ones beside it or not."""
    # Of the first word the bytes in GBK happen to be UTF-8 of another.
    records = [json.dumps({"text": f"{word} {number}"}, ensure_ascii=False)
               for number in range(9) for word in ("\u5b66", "\u4eca\u65e5", "\u9038\u8a71", "ASCII")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good"}))
    for content in ("\n".join(records), f"[{', '.join(records)}]", "\n".join(records * 2000)):
        (tmp_path / "b.jsonl").write_bytes(content.encode(encoding))
        for pattern in ("b.jsonl", "*.jsonl"):
            assert refused(str(tmp_path / pattern)).startswith(f"{tmp_path}/b.jsonl is ")


def test_some_records_in_another_encoding_are_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = b'{"text": "plain"}\n' + '{"text": "caf\u00e9"}\n'.encode("latin-1")
    (tmp_path / "a.jsonl").write_bytes(content)
    assert documents(str(tmp_path / "a.jsonl")) == ["plain"]
    assert f"1 not valid UTF-8 (first: {tmp_path}/a.jsonl, line 2)" in caplog.text
    (tmp_path / "b.json").write_bytes(b"[" + content.replace(b"\n{", b",\n{") + b"]")
    assert documents(str(tmp_path / "b.json")) == ["plain"]
    assert f"1 not valid UTF-8 (first: {tmp_path}/b.json, record 2)" in caplog.text
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "b.txt").write_text("good")
    assert documents(str(tmp_path / "*.txt"), "text_files") == ["good"]
    assert f"1 not valid UTF-8 (first: {tmp_path}/a.txt)" in caplog.text


@pytest.mark.parametrize("kind, content, what", [
    ("json_lines", b"PAR1" + bytes(99), "a Parquet file"), ("text_files", b"PK\x03\x04" + bytes(99), "a zip archive"),
    ("json_lines", b"<!DOCTYPE html>\n<p>404</p>", "HTML or XML"), ("json_lines", b"\n <a/>", "HTML or XML"),
    ("tfrecords", b'{"text": "x"}\n', "not a TFRecord file"), ("tfrecords", bz2.compress(b"x"), "compressed by bz2"),
    ("tfrecords", b"PAR1" + bytes(99), "a Parquet file"),
])
def test_all_that_is_something_else_is_named_before_anything_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes, what: str
) -> None:
    for name in "bcd":
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a").write_text('{"text": "good"}' if kind != "tfrecords" else "")
    monkeypatch.setattr(sources, "placed_records", lambda *_: pytest.fail("a file is read"))
    monkeypatch.setattr(sources, "_text_records", lambda *_: pytest.fail("a file is read"))
    told = refused(str(tmp_path / "*"), kind)
    assert told.startswith(f"{tmp_path}/b is {what}")
    assert told.endswith(f" Others that cannot be read: {tmp_path}/c, {tmp_path}/d.")


def test_a_file_without_a_record_is_refused(tmp_path: pathlib.Path) -> None:
    for content, beginning in (("id,text\n0,one\n", "'id,text'."), ("{'text': 'one'}\n" * 9, "\"{'text': 'one'}\"."),
                               ("[1, 2]", "'[1, 2]'."), ("x" * 70, f"'{'x' * 60}'...")):
        (tmp_path / "b").write_text(content)
        (tmp_path / "a").write_text('{"text": "good"}')
        assert refused(str(tmp_path / "*")) == (
            f"{tmp_path}/b holds no JSON object in UTF-8, neither in a list nor in lines; it begins with {beginning}")


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_conversations_without_an_answer_are_counted(tmp_path: pathlib.Path, key: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", key: [{"from": "human", "value": "hi"}]}] * 3))
    with pytest.raises(ValueError, match=r"text.mine: .*a.json'? \(3 conversations without an answer of the "
                       r"assistant \(first: .*a.json, record 1\)"):
        list(instructions.pairs({"instructions": str(tmp_path / "a.json")}, "train", "text.mine"))
    assert refused(str(tmp_path / "a.json")).endswith(
        f"(3 without text in field 'text' (first: {tmp_path}/a.json, record 1, whose fields are 'id', '{key}')).")


def test_empty_files_are_named(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    assert documents(str(tmp_path / "*")) == ["good"]
    assert f"2 empty file (first: {tmp_path}/b.jsonl)" in caplog.text


def test_a_file_that_cannot_be_opened_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}')

    def denied(path: str, *_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("codellm_jax.contents.open", denied, raising=False)
    assert refused(str(tmp_path / "a.jsonl")) == f"{tmp_path}/a.jsonl cannot be read: Permission denied."


# ---- Finding -----------------------------------------------------------------------------------


def names(pattern: object, folder: pathlib.Path) -> list[str]:
    return [os.path.relpath(file, folder) for file in files.matches(pattern, "text.mine")]  # type: ignore[arg-type]


def made(folder: pathlib.Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def test_links_in_a_circle(tmp_path: pathlib.Path) -> None:
    """Two of them have more ways through each other than can be gone."""
    made(tmp_path, "a.py", "sub/b.py", "sub/.hidden/c.py")
    for name in ("loop", "other", "sub/up"):
        (tmp_path / name).symlink_to(tmp_path)
    for pattern in ("**/*.py", "**/**/*.py", "**/**/**/*.py"):
        assert names(f"{tmp_path}/{pattern}", tmp_path) == ["a.py", "sub/b.py"]
    assert names(f"{tmp_path}/**", tmp_path) == ["a.py", "sub/b.py"]
    assert files.below(str(tmp_path)) == [f"{tmp_path}/a.py", f"{tmp_path}/sub/b.py"]


def test_a_file_of_several_names_is_read_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, "real/a.txt", "real/b.txt")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "c.txt").symlink_to("real/a.txt")
    patterns = [f"{tmp_path}/{pattern}" for pattern in ("*/*.txt", "c.txt", "real/a.txt", "**/a.txt")]
    for _ in range(2):
        assert names(patterns, tmp_path) == ["c.txt", "link/b.txt"]
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line == ("text.mine: 3 of 5 names are links to files that other names also reach; each file is read "
                    f"once. The first is {tmp_path}/link/a.txt.")
    with pytest.raises(ValueError, match="text.mine: .*real/a.txt would be in train and validation"):
        sources.files({"text_files": f"{tmp_path}/c.txt", "validation": f"{tmp_path}/real/*"}, "train", "text.mine")


def test_what_a_pattern_matches(tmp_path: pathlib.Path) -> None:
    """As the standard library's glob does, where there are no links and no brackets in names."""
    import glob

    made(tmp_path, "a.txt", "b.txt", "sub/a.txt", "sub/deep/c.md", ".hidden.txt", ".folder/x.txt", "sub/.y.txt")
    for pattern in ("*.txt", "?.txt", "[ab].txt", "[!a].txt", "**/*.txt", "**/*", "**", "sub/**/*", "*/a.txt", ".*.txt",
                    "**/.y.txt", "**/sub/*.txt", "./*.txt", "sub/../*.txt", "**/deep/**/*.md", "s*/d*/*", "./a.txt"):
        expected = {os.path.normpath(file) for file in glob.glob(f"{tmp_path}/{pattern}", recursive=True)
                    if os.path.isfile(file)}
        assert set(files.matches(f"{tmp_path}/{pattern}", "x")) == expected, pattern


def test_brackets_in_names(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "lr[1]/x[2].txt", "lr[1]/y.txt", "lr1/z.txt")
    for pattern in ("lr[1]/*.txt", "*1]/*", "lr[[]1]/*.txt"):
        assert names(f"{tmp_path}/{pattern}", tmp_path) == ["lr[1]/x[2].txt", "lr[1]/y.txt"]
    assert names(f"{tmp_path}/lr[1]/x[2].txt", tmp_path) == ["lr[1]/x[2].txt"]
    monkeypatch.chdir(tmp_path / "lr[1]")
    monkeypatch.setenv("HOME", str(tmp_path / "lr[1]"))
    assert names(["*.txt", "~/y.txt", "../lr1/*"], tmp_path) == ["lr1/z.txt", "lr[1]/x[2].txt", "lr[1]/y.txt"]
    assert "A literal bracket is written [[]." in refused("x[2]*.txt")


def test_links_that_lead_nowhere(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, "part-0.jsonl", "deep/part-2.jsonl")
    (tmp_path / "part-1.jsonl").symlink_to("/gone/blobs/abc")
    for pattern in ("*.jsonl", "**/*.jsonl", "part-1.jsonl", "part-[01].jsonl"):
        assert refused(f"{tmp_path}/{pattern}") == (
            f"{tmp_path}/part-1.jsonl is a link to /gone/blobs/abc, which does not exist; restore it, or remove "
            "the link.")
    (tmp_path / "deep" / "more").symlink_to("/gone/folder")
    assert names(f"{tmp_path}/deep/**/*.jsonl", tmp_path) == ["deep/part-2.jsonl"]
    assert f"{tmp_path}/deep/more is a link to /gone/folder, which does not exist; if that was a folder" in caplog.text


def test_links_that_lead_nowhere_in_a_data_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cosqa-dev.json").symlink_to("/gone/a")
    (tmp_path / "mbpp.jsonl").symlink_to("/gone/b")
    with pytest.raises(FileNotFoundError, match="^cosqa: .*cosqa-dev.json is a link to /gone/a, which does not exist"):
        load("cosqa", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="^code.mbpp: .*mbpp.jsonl is a link to /gone/b, which does not exist"):
        instructions.describe({"official": "code.mbpp", "data_dir": str(tmp_path)}, "code.mbpp")


def test_a_folder_in_the_place_of_a_pattern(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "books/a.jsonl.gz", "books/b.jsonl.gz", "books/README.md", "deep/er/a.txt")
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refused("books/") == "'books/' is a folder; write such as 'books/*.jsonl.gz'."
    assert refused(f"{tmp_path}/deep") == f"'{tmp_path}/deep' is a folder; write such as '{tmp_path}/deep/**/*.txt'."
    assert refused("b*") == "'b*' matches only folders; write such as 'b*/*.jsonl.gz'."
    assert refused("none") == f"'none' is a folder; there is no file in {tmp_path}/none."
    assert names("books/*.jsonl.gz", tmp_path) == ["books/a.jsonl.gz", "books/b.jsonl.gz"]


def test_what_is_neither_file_nor_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    told = " is a pipe, a socket or a device; write its content to a file."
    assert refused(f"{tmp_path}/*.jsonl") == f"{tmp_path}/a.jsonl{told}"
    assert refused("/dev/null") == f"/dev/null{told}"
    monkeypatch.chdir(tmp_path)  # for an address of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("b.sock")
        assert refused("*.sock") == f"{tmp_path}/b.sock{told}"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "a/x.txt", "b/y.txt")
    real = os.listdir

    def listed(folder: str) -> list[str]:
        if folder.endswith("/b"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "listdir", listed)
    for pattern in ("*/*.txt", "**/*.txt"):
        assert refused(f"{tmp_path}/{pattern}", "text_files") == f"{tmp_path}/b cannot be read: Permission denied."


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path: pathlib.Path) -> None:
    """By the command itself; what fails is not the disk that rows are written to."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    script = ("import sys; from codellm_jax import cli, contents\n"
              "def denied(path, mode):\n"
              "    if path.endswith('a.jsonl'): raise PermissionError(13, 'Permission denied', path)\n"
              "    return open(path, mode)\n"
              "contents.open = denied\n"
              "sys.exit(cli.main(sys.argv[1:]))")
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "--gin_file=gin/mixed_pretrain.gin", "--dry_run",
         f"--gin.CACHE_DIR={tmp_path}/cache", "--gin.CODE_RATE=0.0", "--gin.MIXTURE_OR_TASK_NAME=['text.a']",
         "--gin.VOCABULARY='python_8k'", f"--gin.CORPORA={{'text.a': {{'json_lines': '{tmp_path}/a.jsonl'}}}}"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "CACHE_DIR" not in done.stderr
    assert done.stderr.endswith(f"{tmp_path}/a.jsonl cannot be read: Permission denied.\n"), done.stderr
