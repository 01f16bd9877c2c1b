"""Records of archives: WebDataset's tars, WARC and WET files, and ArrayRecord. All are read sequentially.

WebDataset: members whose names are equal up to the first dot form a record, with the rest of each name as a field; a
repeated field begins a new record. The text is the member `field`, "txt" by default; "json.text" is the field "text"
of the member "json". Only requested members are read; "__key__" is the common part of their names.

WARC (warcio, extra `readers`): a record's headers are its fields, such as "WARC-Identified-Content-Language",
besides "text", "url", "title" and "content_type":

  conversion (WET)     the text unchanged
  response, resource   HTML without its markup (see `pages`), navigation and advertisements included; other types of
                       text unchanged. A response that is an error or not text is counted.
  others               metadata about these, not documents

A file that is truncated within a record or a gzip member counts as broken. So does a record whose content differs from
its stated length. Truncation between two records cannot be detected, because WARC has no end mark: compare sizes with
the publisher's.

ArrayRecord (array_record, extra `readers`): each record is a tf.train.Example or a JSON object, distinguished by its
first byte. A file on gs:// or a hub is copied to a temporary file, because that library reads only local files.
"""

import contextlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from io import BytesIO, StringIO
from typing import Any

from codellm_jax.contents import PIECE, BrokenFile, UnreadableFile, head, kind, open_binary, pieces, require_file
from tasks.corpora import fields, pages
from tasks.corpora.files import Lost, library
from tasks.corpora.records import BROKEN_JSON, EMPTY_FILE, NO_OBJECT

LARGEST = 64 << 20  # bytes of a member or page
RECORDS_AT_ONCE = 64

Record = Mapping[str, Any] | Lost
_TOO_LARGE = f"larger than {LARGEST >> 20} MiB"


class _Stream:
    """The uncompressed bytes of a file as a stream; `last` holds the last bytes read."""

    def __init__(self, file: str) -> None:
        self._pieces, self._waiting, self._at, self.last = pieces(file), b"", 0, b""
        self.position = 0

    def read(self, size: int) -> bytes:
        if self._at == len(self._waiting):
            self._waiting, self._at = next(self._pieces, b""), 0
        found = self._waiting[self._at : self._at + size]
        self._at += len(found)
        self.position += len(found)
        self.last = (self.last + found)[-(1 << 15) :]
        return found


def _beginning(file: str) -> bytes:
    """The first uncompressed bytes of a file; empty if its beginning is damaged."""
    try:
        return next(pieces(file), b"")
    except BrokenFile:
        return b""


# ---- WebDataset --------------------------------------------------------------------------------


def require_tar(file: str) -> None:
    """Raises UnreadableFile or OSError unless a file is empty or begins like a tar, compressed or not."""
    beginning = _beginning(file)
    try:
        if beginning.strip(b"\0"):
            tarfile.TarInfo.frombuf(beginning[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = kind(beginning)
        if what == "a tar archive":
            raise UnreadableFile(f"{file} is a tar whose first header is damaged or truncated ({error}); copy or "
                                 "download it again.") from None
        raise UnreadableFile(f"{file} is {what or 'not a tar archive'}; expected a tar.") from None


def webdataset_records(file: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """Yields the records of a tar with the requested members, and their places.

    Raises:
      OSError: it cannot be read.
      BrokenFile: it is truncated or damaged; raised after all readable records.
    """
    asked = fields.wanted(spec, "txt")
    record: dict[str, Any] = {}
    lost: Lost | None = None
    broken: BrokenFile | None = None
    members = _members(file, lambda suffix: any(f"{field}.".startswith(f"{suffix}.") for field in asked))
    while True:
        try:
            name, content = next(members, ("", None))
        except BrokenFile as error:
            name, content, broken = "", None, error
        folder, _, base = name.rpartition("/")
        if base.startswith("."):
            continue
        first, _, suffix = base.partition(".")
        key = f"{folder}/{first}".lstrip("./")
        if not name or key != record.get("__key__") or suffix in record:
            if record:
                yield f"{file}, {record['__key__']}", lost or record
            elif not name and not broken:
                yield file, Lost(EMPTY_FILE)
            record, lost = {"__key__": key}, None
        if broken:
            raise broken
        if not name:
            return
        record[suffix] = None if isinstance(content, Lost) else content
        if isinstance(content, Lost):
            lost = content
        elif content is not None and suffix.rpartition(".")[2] == "json":
            try:
                record[suffix] = json.loads(content)
            except (ValueError, RecursionError):
                lost = Lost(BROKEN_JSON)


def _members(file: str, is_asked: Any) -> Iterator[tuple[str, bytes | Lost | None]]:
    """Yields the names of a tar's files, with the content of those whose suffix is requested."""
    stream = _Stream(file)
    try:
        archive = tarfile.open(fileobj=stream, mode="r|", errors="surrogateescape")  # type: ignore[call-overload]
    except tarfile.ReadError as error:
        if not stream.last.strip(b"\0"):  # no member, or no byte at all
            return
        raise BrokenFile(str(error)) from error
    with archive:
        while True:
            try:
                member = archive.next()
                archive.members.clear()  # type: ignore[attr-defined]  # otherwise kept until the archive is closed
                if member is None:
                    break
                content: bytes | Lost | None = None
                if not member.isreg():
                    continue
                if is_asked(member.name.rpartition("/")[2].partition(".")[2]):
                    opened = archive.extractfile(member)
                    content = Lost(_TOO_LARGE) if member.size > LARGEST or opened is None else opened.read()
            except (tarfile.TarError, ValueError) as error:
                raise BrokenFile(str(error)) from error
            yield member.name, content
        # A tar ends at a block of zeros; tarfile also stops at an invalid header, which is damage.
        begin = archive.offset - (stream.position - len(stream.last))  # type: ignore[attr-defined]
        block = stream.last[begin : begin + 512] if begin >= 0 else b"?"
        if len(block) < 512 or block.strip(b"\0"):
            raise BrokenFile("it lacks the zeros that end a tar")
        behind = stream.last[begin:]
        while behind and not behind.strip(b"\0"):
            behind = stream.read(PIECE)
        if behind:
            raise BrokenFile("it goes on behind the zeros that end a tar")


# ---- WARC --------------------------------------------------------------------------------------


def require_warc(file: str) -> None:
    """Raises UnreadableFile or OSError unless a file is empty or begins like WARC, compressed or not."""
    library("warcio", file, "WARC")
    beginning = _beginning(file)
    if beginning.strip() and not beginning.lstrip().startswith(b"WARC/"):
        raise UnreadableFile(f"{file} is {kind(beginning) or 'not a WARC file'}; expected WARC or WET.")


def warc_records(file: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """Yields the documents of a WARC or WET file as records, with their places.

    Raises:
      OSError: it cannot be read.
      BrokenFile: it is truncated or damaged; raised after all readable records.
    """
    from warcio.archiveiterator import WARCIterator
    from warcio.exceptions import ArchiveLoadFailed

    stream, number = _Stream(file), 0
    records = WARCIterator(stream, no_record_parse=True)
    while True:
        wrong_lengths = records.err_count
        try:
            record = next(records, None)
        except (ArchiveLoadFailed, ValueError) as error:
            raise BrokenFile(str(error)) from error
        if record is None:
            break
        number += 1
        if record.rec_type is None:
            raise BrokenFile(f"record {number} has no type")
        if record.length is None or not record.rec_headers.get_header("Content-Length", "").strip().isdigit():
            raise BrokenFile(f"record {number} has no length")
        place = f"{file}, record {number}"
        content = record.raw_stream.read(LARGEST + 1)
        if len(content) < min(record.length, LARGEST + 1):
            raise BrokenFile("the last record is truncated")
        with contextlib.redirect_stderr(StringIO()):  # warcio prints there the errors that `err_count` counts
            records.read_to_end()
        if records.err_count > wrong_lengths or not (records.next_line or b"WARC/").startswith(b"WARC/"):
            yield place, Lost("with a length that is not that of their content")
        elif record.rec_type in ("conversion", "response", "resource"):
            yield place, Lost(_TOO_LARGE) if len(content) > LARGEST else _page(record, content)
    if not number:
        yield file, Lost(EMPTY_FILE)


def _page(record: Any, content: bytes) -> Record:
    """The fields of a WARC record, or why it is not a document."""
    has: dict[str, Any] = dict(record.rec_headers.headers)
    has |= {"url": has.get("WARC-Target-URI"), "content_type": has.get("Content-Type", "")}
    if record.rec_type == "conversion":
        return has | {"text": content}
    if record.rec_type == "response":
        answer = _http(content)
        if isinstance(answer, Lost):
            return answer
        has["content_type"], content = answer
    of_type = str(has["content_type"]).partition(";")[0].strip().lower()
    if of_type not in pages.HTML and not of_type.startswith("text/"):
        return Lost("neither HTML nor other text")
    text = pages.decoded(content, str(has["content_type"]))
    if text is None:
        return Lost("not valid in the encoding of the page")
    if of_type not in pages.HTML:
        return has | {"text": text}
    page = pages.title_and_text(text)
    return Lost("HTML nested too deeply") if page is None else has | {"title": page[0], "text": page[1]}


def _http(content: bytes) -> tuple[str, bytes] | Lost:
    """The content type and body of an HTTP response, or why it is not a document."""
    from warcio.recordloader import ArcWarcRecord
    from warcio.statusandheaders import StatusAndHeadersParser, StatusAndHeadersParserException

    stream = BytesIO(content)
    try:
        headers = StatusAndHeadersParser(["HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/3"]).parse(stream)
    except (StatusAndHeadersParserException, EOFError):
        return Lost("not an HTTP response")
    if not headers.get_statuscode().startswith("2"):
        return Lost(f"responses with the status {headers.get_statuscode()[:3]}")
    encoding = (headers.get_header("Content-Encoding") or "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        return Lost(f"compressed by {encoding[:20]}")
    answer = ArcWarcRecord("warc", "response", None, stream, headers, None, len(content))
    body = answer.content_stream().read(LARGEST + 1)
    return Lost(_TOO_LARGE) if len(body) > LARGEST else (headers.get_header("Content-Type") or "", body)


# ---- ArrayRecord -------------------------------------------------------------------------------


def require_array_record(file: str) -> None:
    """Raises UnreadableFile or OSError unless a file's first bytes are those of Riegeli, as in ArrayRecord."""
    beginning = head(file)
    if what := kind(beginning) or (not beginning.startswith(_RIEGELI) and "not an ArrayRecord file"):
        raise UnreadableFile(f"{file} is {what}; expected ArrayRecord.")


_RIEGELI = bytes.fromhex("83af70d10d884a3f")


def array_records(file: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """Yields the records of an ArrayRecord file, and their places.

    Raises:
      UnreadableFile: it is not one, or damaged as a whole.
      OSError: it cannot be read.
    """
    module = library("array_record.python.array_record_module", file, "ArrayRecord")
    with _local(file) as local:
        try:
            reader = module.ArrayRecordReader(local, "readahead_buffer_size:0,max_parallelism:0")
            if not reader.ok():
                reader.close()  # which raises the error
            count = reader.num_records()
        except (RuntimeError, ValueError, OSError) as error:
            raise UnreadableFile(f"{file} is damaged or truncated ({_first_line(error)}); copy or download it "
                                 f"again.") from None
        for start in range(0, count, RECORDS_AT_ONCE):
            end = min(start + RECORDS_AT_ONCE, count)
            try:
                contents = reader.read(start, end)
            except (RuntimeError, ValueError, OSError, IndexError) as error:
                yield f"{file}, record {start + 1}: {_first_line(error)}", Lost("in a damaged chunk", end - start)
                continue
            for number, content in enumerate(contents, start + 1):
                yield f"{file}, record {number}", _record(content)
        if not count:
            yield file, Lost(EMPTY_FILE)
        if reader.ok():  # else closing raises an error that is already counted
            reader.close()


def _record(content: bytes) -> Record:
    if not content.lstrip().startswith(b"{"):
        return example_record(content)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return Lost(BROKEN_JSON)
    return found if isinstance(found, dict) else Lost(NO_OBJECT)


def example_record(content: bytes) -> Record:
    """The features of a serialized tf.train.Example; each is a list unless it has exactly one value."""
    import tensorflow as tf
    from google.protobuf import message

    try:
        features = tf.train.Example.FromString(content).features.feature
    except message.DecodeError:
        return Lost("broken tf.train.Example")
    record = {}
    for name, feature in features.items():
        values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
        record[name] = values[0] if len(values) == 1 else list(values)
    return record


@contextlib.contextmanager
def _local(file: str) -> Iterator[str]:
    """A local path of a file, or of its temporary copy if it is remote."""
    require_file(file)
    if "://" not in file:
        yield file
        return
    with tempfile.NamedTemporaryFile(prefix="codellm_jax.", suffix=".array_record") as copy:
        with open_binary(file) as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield copy.name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
