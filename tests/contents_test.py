"""Files of users are what their content says: every encoding and compression gives the same text, or a line of refusal.

Independent truth are the libraries that write: Python's codecs, gzip, bz2, lzma, and zstandard.
"""

import bz2
import codecs
import gzip
import lzma
import pickle
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import zstandard
from hypothesis import strategies as st

from codellm_jax import contents
from codellm_jax.configuration import read_configuration
from codellm_jax.contents import BrokenFile, UnreadableFile

TEXT = "one\r\n\r\n  zwei \u00fc\n\u4e00\u4e2a\u6a21\u578b \U0001f600\n\u2028 end"
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}
# With a mark where the name does not say the order of bytes.
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 marked": lambda text: text.encode("utf-8-sig"),
    "utf-16-le marked": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be marked": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32-le marked": lambda text: codecs.BOM_UTF32_LE + text.encode("utf-32-le"),
    "utf-32-be marked": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
}
every_encoding = pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
every_compression = pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)


def refusal(file: Path) -> str:
    """The line by which a file is refused."""
    with pytest.raises(UnreadableFile) as error:
        list(contents.lines(str(file)))
    told = str(error.value)
    assert told.startswith(f"{file} is ") and "\n" not in told
    return told.removeprefix(f"{file} is ")


@every_encoding
@every_compression
@pytest.mark.parametrize("piece", [1, 3, 1 << 18])
def test_the_same_text_however_it_is_written(tmp_path, monkeypatch, encode, compress, piece):
    """Whatever it is named, and wherever the pieces end in which it is read."""
    monkeypatch.setattr(contents, "PIECE", piece)
    monkeypatch.setattr(contents, "HEAD", 16)
    file = tmp_path / "any.name"
    file.write_bytes(compress(encode(TEXT)))
    assert contents.whole_text(str(file)) == TEXT
    lines = list(contents.lines(str(file)))
    assert lines == [line + b"\n" for line in TEXT.encode().split(b"\n")[:-1]] + ["\u2028 end".encode()]


@hypothesis.settings(deadline=None)  # a busy machine is no fault
@hypothesis.given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff\ufffe")),
                           max_size=4), st.sampled_from(sorted(ENCODINGS)), st.sampled_from(sorted(COMPRESSIONS)))
def test_members_that_follow_one_another(tmp_path_factory, texts, encoding, compression):
    """Each compressed by itself, and each with a mark where it begins a line: as `cat` joins files."""
    file = tmp_path_factory.mktemp("joined") / "x"
    parts = [ENCODINGS[encoding](text + "\n") for text in texts]
    file.write_bytes(b"".join(map(COMPRESSIONS[compression], parts)))
    # Text that begins as another kind of file is taken for that.
    hypothesis.assume(not contents.kind(b"".join(parts)) and not contents.compression(b"".join(parts)))
    assert contents.whole_text(str(file)) == "".join(text + "\n" for text in texts)


def test_zeros_between_members_are_no_text(tmp_path):
    file = tmp_path / "x.gz"
    file.write_bytes(gzip.compress(b"a\n") + bytes(512) + gzip.compress(b"b\n") + bytes(99))
    assert list(contents.lines(str(file))) == [b"a\n", b"b\n"]
    skippable = struct.pack("<II", 0x184D2A50, 3) + b"abc"
    file.write_bytes(skippable + zstandard.compress(b"a\n"))
    assert list(contents.lines(str(file))) == [b"a\n"]


@every_compression
def test_what_breaks_off_is_read_up_to_there(tmp_path, compress):
    lines = [np.random.default_rng(number).bytes(99).hex().encode() + b"\n" for number in range(9999)]
    file = tmp_path / "x"
    whole = compress(b"".join(lines))
    if compress is bytes:
        return
    for content, most in ((whole[: len(whole) // 2], 9998), (whole + b"no member", 9999)):
        file.write_bytes(content)
        found = []
        with pytest.raises(BrokenFile):
            for line in contents.lines(str(file)):
                found.append(line)
        assert found[:-1] == lines[: len(found) - 1] and 0 < len(found) <= most + 1
        with pytest.raises(UnreadableFile, match=f"^{file} is damaged: "):
            contents.whole_text(str(file))


@pytest.mark.parametrize("text", ["x" * 200, "x\n" * 100])
def test_a_text_that_memory_should_not_hold_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(contents, "LARGEST", 100)
    (tmp_path / "x").write_text(text)
    with pytest.raises(UnreadableFile, match="x is longer than 1 GiB"):
        contents.whole_text(str(tmp_path / "x"))


def test_utf_16_that_breaks_off(tmp_path):
    (tmp_path / "x").write_bytes("one\ntwo".encode("utf-16")[:-1])
    with pytest.raises(UnreadableFile, match="x is damaged: not valid UTF-16: truncated data"):
        contents.whole_text(str(tmp_path / "x"))


@pytest.mark.parametrize("encoding, text, what", [
    ("utf-16-le", TEXT, "UTF-16 without a byte order mark; save it"), ("utf-16-be", TEXT, "UTF-16 without"),
    ("utf-32-le", TEXT, "UTF-32 without a byte order mark; save it"), ("utf-32-be", TEXT, "UTF-32 without"),
    ("utf-16-le", '{"text": "one"}\n', "UTF-16 without"), ("utf-16-be", '{"text": "\u4e00\u4e00"}\n', "UTF-16 without"),
])
@every_compression
def test_wide_text_without_a_mark_is_refused(tmp_path, encoding, text, what, compress):
    (tmp_path / "x.txt").write_bytes(compress(text.encode(encoding)))
    assert refusal(tmp_path / "x.txt").startswith(what)


@pytest.mark.parametrize("encoding, word", [
    ("latin-1", "\u00e9t\u00e9"), ("gbk", "\u6a21\u578b"), ("shift-jis", "\u3042\u3044"), ("cp1251", "\u043c\u0438")])
def test_text_in_another_encoding_is_refused_where_all_of_it_is_wanted(tmp_path, encoding, word):
    (tmp_path / "x.gin").write_bytes(f"SEED = 1\n# {word}\n".encode(encoding))
    with pytest.raises(UnreadableFile, match="x.gin is not UTF-8 text: line 2 holds the byte 0x.*text may be UTF"):
        read_configuration([str(tmp_path / "x.gin")], [])


@every_encoding
@every_compression
def test_gin_files(tmp_path, encode, compress):
    (tmp_path / "x.gin").write_bytes(compress(encode("# \u6a21\u578b\r\nmodel.layers = 3\r\n")))
    assert read_configuration([str(tmp_path / "x.gin")], []).effective["model.layers"].value == "3"


def test_a_few_zeros_are_text(tmp_path):
    (tmp_path / "x").write_bytes(b"a \0 b" + b"c" * 50)
    assert contents.whole_text(str(tmp_path / "x")) == "a \0 b" + "c" * 50


@pytest.mark.parametrize("text", ["ORCHESTRA", "GIF89a is a form", "PAR1 and PAR2", "%PDF- begins so", "GGUF", "BZh91"])
def test_text_that_begins_with_the_letters_of_another_kind(tmp_path, text):
    (tmp_path / "x").write_text(text)
    assert contents.whole_text(str(tmp_path / "x")) == text


def _sqlite(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("create table t (a)")


def _zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")


def _tar(file: Path) -> None:
    inner = file.with_suffix(".inner")
    inner.write_text("a")
    with tarfile.open(file, "w") as archive:
        archive.add(inner)


def _safetensors(file: Path) -> None:
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


KINDS: dict[str, Callable[[Path], object]] = {
    "an SQLite database": _sqlite, "a zip archive": _zip, "a tar archive": _tar, "a safetensors file": _safetensors,
    "a NumPy array": lambda file: np.save(file.open("wb"), np.zeros(3)),
    "a pickled file": lambda file: file.write_bytes(pickle.dumps(["a"])),
    "a Parquet file": lambda file: file.write_bytes(b"PAR1" + bytes(30) + b"PAR1"),
    "an Arrow file": lambda file: file.write_bytes(b"ARROW1\0\0" + bytes(30)),
    "an Arrow stream": lambda file: file.write_bytes(b"\xff\xff\xff\xff" + bytes(30)),
    "a PDF file": lambda file: file.write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
    "compressed twice, with bz2 inside": lambda file: file.write_bytes(gzip.compress(bz2.compress(b"a"))),
    "compressed by LZ4": lambda file: file.write_bytes(b"\x04\x22\x4d\x18" + bytes(30)),
    "not text (it holds zero bytes)": lambda file: file.write_bytes(bytes(4096)),
    "a Git LFS pointer": lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1"),
}


@pytest.mark.parametrize("what", KINDS)
@every_compression
def test_what_is_no_text_is_named(tmp_path, what, compress):
    file = tmp_path / "part.jsonl"
    KINDS[what](file)
    if not what.startswith("compressed twice"):
        file.write_bytes(compress(file.read_bytes()))
    told = refusal(file)
    assert told.startswith(what) and told.endswith(
        "; text may be UTF-8, or UTF-16 or UTF-32 with a byte order mark, plain or compressed by gzip, bz2, xz "
        "or Zstandard.")


def test_what_is_no_file_is_told(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "own").symlink_to(tmp_path / "own")
    for name, kind, told in (
            ("link", FileNotFoundError, f"is a link to {tmp_path}/gone, which does not exist"),
            ("own", FileNotFoundError, f"is a link to {tmp_path}/own, which does not exist"),
            ("none", FileNotFoundError, "There is no file "), ("", UnreadableFile, "is a folder")):
        with pytest.raises(kind, match=told):
            contents.require_file(str(tmp_path / name))
