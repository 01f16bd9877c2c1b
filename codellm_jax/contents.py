"""Reads users' files as lines of UTF-8 text, whatever their compression and encoding.

A file's type is detected from its content, never from its name:

  compression  gzip, bz2, xz and Zstandard; concatenated members are read as one
  encoding     UTF-8 with or without a byte order mark; UTF-16 and UTF-32 with one, which are converted to UTF-8
  no text      Parquet, zip, UTF-16 without a mark and the like are refused with a line that names the file, its type
               and the accepted types

Other bytes that are not UTF-8 are passed on unchanged: a reader of records counts them, `whole_text` refuses them. A
byte order mark at the start of a later line, where files were concatenated, is dropped like the first one.

Needs only the standard library, so every module, including `tasks`, may import it; and etils for gs://, huggingface_hub
for hf://, and zstandard for that compression.
"""

import bz2
import codecs
import contextlib
import io
import itertools
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from codellm_jax import hub

PIECE = 1 << 18  # bytes per read
LARGEST = 1 << 30  # longest line or text, in bytes, that readers of corpora accept
TOO_LARGE = "longer than 1 GiB"
HEAD = 1 << 13  # bytes from which a file's type is detected

READ_IS = ("text may be UTF-8, or UTF-16 or UTF-32 with a byte order mark, plain or compressed by gzip, bz2, xz or "
           "Zstandard")
RECORDS = r"\.(jsonl?|ndjson|csv|tsv|tab|parquet)$"  # file name suffixes of records, by kind
COMPRESSED = ".gz, .bz2, .xz or .zst"  # for messages: the usual suffixes

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MARKS_OF_LINE = re.compile(rb"^(?:\xef\xbb\xbf)+")

# Files with these bytes at this offset that are not UTF-8 without zeros.
_KINDS = (
    (0, b"PAR1", "a Parquet file"), (0, b"ARROW1", "an Arrow file"), (0, b"\xff\xff\xff\xff", "an Arrow stream"),
    (0, b"FEA1", "a Feather file"), (0, b"ORC", "an ORC file"), (0, b"Obj\x01", "an Avro file"),
    (0, b"PK\x03\x04", "a zip archive"), (0, b"PK\x05\x06", "a zip archive"), (257, b"ustar", "a tar archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (0, b"Rar!\x1a\x07", "a RAR archive"),
    (0, b"\x04\x22\x4d\x18", "compressed by LZ4"), (0, b"\xff\x06\x00\x00sNaPpY", "compressed by Snappy"),
    (0, b"\x1f\x9d", "compressed by compress"), (0, b"SQLite format 3\0", "an SQLite database"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file"), (0, b"\x93NUMPY", "a NumPy array"), (0, b"GGUF", "a GGUF model"),
    *((0, bytes([0x80, version]), "a pickled file") for version in range(2, 6)),
    (0, b"%PDF-", "a PDF file"), (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a file of Microsoft Office"),
    (0, b"\x89PNG", "a PNG image"), (0, b"\xff\xd8\xff", "a JPEG image"), (0, b"GIF8", "a GIF image"),
    (0, b"\x7fELF", "a program"),
)
# Text that is a placeholder for the real file.
_POINTERS = (
    (0, b"version https://git-lfs", "a Git LFS pointer instead of the file (`git lfs pull` downloads it)"),
    (0, b"/annex/objects/", "a git-annex pointer instead of the file (`git annex get` downloads it)"),
)


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()


# By name: the first bytes, a factory of decompressors of one member, and the bytes given to one at a time:
# gzip expands them at most 1,000 times and Zstandard 30,000 times; the others return their output in pieces.
_COMPRESSIONS: dict[str, tuple[bytes, Callable[[], Any], int]] = {
    "gzip": (rb"\x1f\x8b", lambda: zlib.decompressobj(31), 1 << 14),
    "bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor, PIECE),
    "xz": (rb"\xfd7zXZ\x00", lzma.LZMADecompressor, PIECE),
    "Zstandard": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstd, 1 << 10),
}


class UnreadableFile(ValueError):
    """A file of a type that is not read here; one line that names it."""


class BrokenFile(Exception):
    """A file is truncated, or damaged from some point on; everything read before is good."""


def without_compression(name: str) -> str:
    """A file's name without the suffix of a compression."""
    return re.sub(r"\.(gz|gzip|bz2|xz|zst|zstd)$", "", name, flags=re.IGNORECASE)


def word_of(file: str) -> str:
    """A file's name as one plain word: without folders and suffixes, "_" for other characters."""
    name = without_compression(file.rpartition("/")[2])
    return re.sub(r"[\W_]+", "_", re.sub(RECORDS, "", name, flags=re.IGNORECASE)).strip("_")


def absolute(file: str) -> str:
    """An absolute path; addresses such as gs:// stay unchanged."""
    return file if "://" in file else os.path.abspath(os.path.expanduser(file))


def require_file(file: str, what: str = "file") -> None:
    """Raises OSError or UnreadableFile, in one line, unless the file exists, local or gs://.

    Args:
      file: its address.
      what: its name in the message, such as "vocabulary file".
    """
    if "://" in file:
        try:
            is_folder, is_there = remote(file).is_dir(), remote(file).exists()
        except Exception as error:  # storage services have their own errors
            raise cannot_be_read(file, error) from error
        if is_folder:
            raise UnreadableFile(f"{file} is a folder; give a file.")
        if not is_there:
            raise FileNotFoundError(f"There is no {what} {file}.")
        return
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        if os.path.islink(file) and not isinstance(error, PermissionError):
            raise FileNotFoundError(f"{file} is a link to {os.readlink(file)}, which does not exist; restore it, or "
                                    "remove the link.") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise FileNotFoundError(f"There is no {what} {file}.") from None
        raise cannot_be_read(file, error) from error
    if stat.S_ISDIR(mode):
        raise UnreadableFile(f"{file} is a folder; give a file.")
    if not stat.S_ISREG(mode):
        raise UnreadableFile(f"{file} is a pipe, a socket or a device; write its content to a file.")


def is_file(file: str) -> bool:
    """Whether the file exists, local or remote."""
    return remote(file).exists() if "://" in file else os.path.isfile(file)


def cannot_be_read(file: str, error: Exception) -> OSError:
    """The error of a file system or storage service as one line that names the file."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    # Without an errno it is not mistaken for an error of the disk being written to.
    return (type(error) if isinstance(error, OSError) else OSError)(f"{file} cannot be read: {reason}.")


def size(file: str) -> int:
    """The stored size of a file in bytes, compressed or not."""
    return remote(file).stat().length if "://" in file else os.path.getsize(file)


def compression(head: bytes) -> str | None:
    """The compression of a file, from its first bytes; None if it has none that is read here."""
    return next((name for name, (magic, *_) in _COMPRESSIONS.items() if re.match(magic, head, re.DOTALL)), None)


def kind(head: bytes) -> str | None:
    """The type of a file, from its first bytes, such as "a Parquet file"; None if unknown."""
    if 0 < int.from_bytes(head[:8], "little") < 1 << 40 and head[8:10] == b'{"':
        return "a safetensors file"
    # A text may begin with the magic letters of some.
    is_text = b"\0" not in head and _decodes(head, "utf-8")
    return next((what for start, magic, what in (_POINTERS if is_text else _KINDS) if head.startswith(magic, start)),
                None)


def _no_text(head: bytes) -> str | None:
    """The type of a file from its first uncompressed bytes; None if it may be text.

    Text may hold a few zeros; in wide encodings they are at regular positions.
    """
    if inner := compression(head):
        return f"compressed twice, with {inner} inside"
    if any(head.startswith(mark) for mark, _ in _MARKS) or b"\0" not in head:
        return kind(head)
    if what := kind(head):
        return what
    even, odd = head[::2].count(0), head[1::2].count(0)
    if _decodes(head, "utf-8") and 8 * (even + odd) < len(head):
        return None
    if head.strip(b"\0") and (_decodes(head, "utf-32-le") or _decodes(head, "utf-32-be")):
        return "UTF-32 without a byte order mark; save it with one, or as UTF-8"
    if max(even, odd) > 2 * min(even, odd) and (_decodes(head, "utf-16-le") or _decodes(head, "utf-16-be")):
        return "UTF-16 without a byte order mark; save it with one, or as UTF-8"
    return "not text (it holds zero bytes)"


def _decodes(head: bytes, encoding: str) -> bool:
    """Whether bytes are valid in an encoding; they may end within a character."""
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def pieces(file: str) -> Iterator[bytes]:
    """The bytes of a file, uncompressed.

    Raises:
      OSError: the file cannot be read.
      BrokenFile: it is truncated or damaged; raised after all readable data.
    """
    whole = _from_head(_raw(file))
    head = next(whole)
    whole = itertools.chain([head], whole)
    name = compression(head)
    yield from _uncompressed(whole, *_COMPRESSIONS[name][1:]) if name else whole


def lines(file: str, longest: int | None = None, source: Iterable[bytes] | None = None) -> Iterator[bytes]:
    """The lines of a file with their ends, in UTF-8 if its bytes are valid.

    Args:
      longest: maximum bytes of a line; a longer one is returned as b"". None sets no maximum.
      source: a part of its bytes, in UTF-8, to read instead.

    Raises:
      OSError: the file cannot be read.
      UnreadableFile: it is not text.
      BrokenFile: it is truncated or damaged; raised after all readable data.
    """
    waiting: list[bytes] = []  # parts of a line without its end
    held, is_longer = 0, False
    broken = None
    try:
        for piece in in_utf8(file) if source is None else source:
            ended, end, rest = piece.rpartition(b"\n")
            if end:
                for line in b"".join([*waiting, ended]).split(b"\n"):
                    is_longer |= longest is not None and len(line) > longest
                    yield b"" if is_longer else _MARKS_OF_LINE.sub(b"", line) + b"\n"
                    is_longer = False
                waiting, held = [], 0
            if not is_longer:
                waiting.append(rest)
                held += len(rest)
                if longest is not None and held > longest:
                    waiting, held, is_longer = [], 0, True
    except BrokenFile as error:
        broken = error
    if is_longer:
        yield b""
    elif line := _MARKS_OF_LINE.sub(b"", b"".join(waiting)):
        yield line
    if broken:
        raise broken


def whole_text(file: str, source: Iterable[bytes] | None = None) -> str:
    """The whole text of a file; of `source`, as for `lines`, if it is given.

    Raises:
      OSError: the file cannot be read.
      UnreadableFile: it is not text, is truncated, is not valid UTF-8, or is too large to be held in memory.
    """
    found, held = list[str](), 0
    try:
        for number, line in enumerate(lines(file, LARGEST, source), 1):
            if not line or (held := held + len(line)) > LARGEST:
                raise UnreadableFile(f"{file} is {TOO_LARGE}.")
            try:
                found.append(line.decode())
            except UnicodeDecodeError as error:
                raise UnreadableFile(f"{file} is not UTF-8 text: line {number} holds the byte "
                                     f"0x{line[error.start]:02x}; {READ_IS}.") from None
    except BrokenFile as error:
        raise UnreadableFile(f"{file} is damaged: {error}; copy or download it again.") from None
    return "".join(found)


def require_text(file: str) -> bytes:
    """The first bytes of a file's text; raises OSError and UnreadableFile as `lines` does."""
    try:
        return next(in_utf8(file), b"")
    except BrokenFile:  # reported when it is read
        return b""


def head(file: str) -> bytes:
    """The first stored bytes of a file; raises OSError."""
    return next(_from_head(_raw(file)))


@contextlib.contextmanager
def open_binary(file: str) -> Iterator[Any]:
    """A seekable binary stream of the stored bytes of a local or remote file; all methods raise OSError."""
    if "://" not in file:
        try:
            stream = open(file, "rb")
        except OSError as error:
            raise cannot_be_read(file, error) from error
        with stream:
            yield stream
        return
    with _RemoteStream(file) as remote_stream:
        yield remote_stream


class _RemoteStream(io.RawIOBase):
    """A remote file as a Python stream, with one-line errors whatever the service."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._held = contextlib.ExitStack()  # for gs:// the opener is a context manager, not a stream
        self._stream = self._done(lambda: self._held.enter_context(remote(file).open("rb")))

    def _done(self, does: Callable[[], Any]) -> Any:
        try:
            return does()
        except Exception as error:  # each service has its own errors
            raise cannot_be_read(self._file, error) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return bytes(self._done(lambda: self._stream.read(size)))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._done(lambda: self._stream.seek(offset, whence))
        return self.tell()

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._held.close()
        super().close()


def content(file: str) -> bytes:
    """All stored bytes of a file; raises OSError."""
    return b"".join(_raw(file))


def _raw(file: str) -> Iterator[bytes]:
    with open_binary(file) as stream:
        try:
            while piece := stream.read(PIECE):
                yield piece
        except OSError as error:
            if "://" in file:
                raise
            raise cannot_be_read(file, error) from error


def _from_head(found: Iterator[bytes]) -> Iterator[bytes]:
    """Regroups the bytes so that the first piece suffices to detect the type, or is everything, perhaps empty."""
    head, broken = b"", None
    try:
        while len(head) < HEAD and (piece := next(found, b"")):
            head += piece
    except BrokenFile as error:
        broken = error
    yield head
    if broken:
        raise broken
    yield from found


def _uncompressed(whole: Iterable[bytes], new: Callable[[], Any], at_once: int) -> Iterator[bytes]:
    """The content of concatenated members, perhaps with zeros between, as on tapes."""
    member, held, size = None, list[bytes](), 0
    small = (piece[start : start + at_once] for piece in whole for start in range(0, len(piece), at_once))
    try:
        for piece in small:
            while piece := piece if member else piece.lstrip(b"\0"):
                member = member or new()
                for found in _of_member(member, piece):
                    held.append(found)
                    size += len(found)
                    if size >= PIECE:
                        yield b"".join(held)
                        held, size = [], 0
                piece, member = (member.unused_data, None) if member.eof else (b"", member)
        if member:
            raise BrokenFile("the compressed file is truncated")
    except BrokenFile:
        if size:
            yield b"".join(held)
        raise
    if size:
        yield b"".join(held)


def _of_member(member: Any, piece: bytes) -> Iterator[bytes]:
    """A few bytes of a member decompressed, piece by piece if its library can do that."""
    try:
        if not hasattr(member, "needs_input"):
            yield member.decompress(piece)
            return
        yield member.decompress(piece, PIECE)
        while not member.eof and not member.needs_input:
            yield member.decompress(b"", PIECE)
    except MemoryError:
        raise
    except Exception as error:  # each library has its own errors
        raise BrokenFile(" ".join(str(error).split())) from error


def in_utf8(file: str) -> Iterator[bytes]:
    """The bytes of a file's text as UTF-8, without a byte order mark; raises the errors of `lines`."""
    found = _from_head(pieces(file))
    head = next(found)
    if what := _no_text(head[:HEAD]):
        raise UnreadableFile(f"{file} is {what}; {READ_IS}.")
    mark, encoding = next((pair for pair in _MARKS if head.startswith(pair[0])), (b"", "utf-8"))
    if encoding == "utf-8":
        yield head.removeprefix(mark)
        yield from found
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    for piece in itertools.chain([head], found, [b""]):
        try:
            decoded = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise BrokenFile(f"not valid {encoding.upper()}: {error.reason}") from None
        if "\ufffe" in decoded:
            raise UnreadableFile(f"{file} mixes both byte orders of {encoding.upper()}; {READ_IS}.")
        yield decoded.encode("utf-8", "surrogatepass")


def remote(file: str) -> Any:
    """A remote file or folder, gs:// or hf://datasets/, with the reading methods of etils' paths."""
    if hub.is_hub_name(file):
        return hub.DatasetFile(file)
    from etils import epath

    return epath.Path(file)


def pinned(pattern: str) -> str:
    """A pattern of remote files with fixed content: for hf:// with the current commit of its branch.

    Raises:
      UnreadableFile, OSError: the hub refuses it.
    """
    try:
        return hub.pinned(pattern) if hub.is_hub_name(pattern) else pattern
    except ValueError as error:
        raise UnreadableFile(str(error)) from error
