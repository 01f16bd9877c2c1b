"""The corpora of `CORPORA` as `t5x prepare` reads them: all documents of all splits, with their places."""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import size
from tasks.corpora import fields, pieces, sources, specs
from tasks.corpora.files import Found, Lost
from tasks.corpora.pieces import Piece
from tasks.corpora.standard_library import python_corpus

_NAME = re.compile(r"(text|code)\.[A-Za-z0-9_]+")
_NUMBER = re.compile(r"(?:line|record|row) (\d+)(?!\d)")
_KINDS = [kind for kind in specs.DOCUMENT_KINDS if kind not in specs.TOKEN_KINDS]
_OF_TRAINING = ("transform", "validation")
LARGEST = 1 << 26  # characters of a document; its words and hashes take many times as much memory


class Input(NamedTuple):
    """A document as read.

    Attributes:
      file: its file, or the publisher's name for it.
      row: its line or record in the file, from 1; counted while reading if the reader gives none.
      text: the document; None if the record holds none.
      reason: why the record holds none; else "".
      records: 1, or the number of records lost to a damage.
      place: a readable place, such as "a.jsonl, line 3, whose fields are 'body', 'id'".
    """

    file: str
    row: int
    text: str | None
    reason: str
    language: str | None
    licence: str | None
    records: int = 1
    place: str = ""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The corpora of a preparation.

    Attributes:
      corpora: corpora of documents by name, text.NAME or code.NAME, each with its kind and options, as
        `corpora.sources` describes them.

    Raises:
      ValueError: a name or a spec is malformed, or a corpus does not hold documents.
    """

    corpora: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if not isinstance(self.corpora, Mapping) or not self.corpora:
            raise ValueError(f"CORPORA must map names to specs, found {self.corpora!r}.")
        for name, spec in self.corpora.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError("A corpus is named text.NAME or code.NAME, NAME of letters, digits and underscores; "
                                 f"found {name!r}.")
            specs.validate(spec, name)
            if (kind := specs.kind_of(spec)) not in _KINDS:
                raise ValueError(f"{name}: t5x prepare reads documents, and {kind!r} is not a kind of documents; "
                                 f"those are {', '.join(_KINDS)}.")
            if found := [option for option in _OF_TRAINING if option in spec]:
                raise ValueError(f"{name}: {found[0]!r} is an option of training: set it where the prepared files are "
                                 "read.")

    def files(self, name: str) -> list[tuple[str, int, int]] | None:
        """The `state` of each file of a corpus, sorted; None if it does not consist of separately readable files.

        Raises:
          OSError: a pattern matches no file, or a broken link.
          ValueError: the name of a file, which is stored with each of its documents, is not UTF-8.
        """
        spec = self.corpora[name]
        if not specs.is_divisible(spec, "train"):
            return None
        found = sources.files(spec, "train", name)
        if foreign := next((file for file in found if not _is_text(file)), None):
            raise ValueError(f"{name}: the name of the file {foreign!r} is not UTF-8; rename it.")
        return [self.state(file) for file in found]

    def pieces(self, name: str, file: str, at_most: int) -> list[Piece] | None:
        """Divides a file of a corpus into pieces of about this many bytes; None if it is read as a whole.

        Raises:
          ValueError, OSError: the file is not of its kind, or cannot be read.
        """
        return pieces.pieces(file, self.corpora[name], name, at_most)

    def rows(self, name: str, file: str, piece: Piece) -> int:
        """The number of lines or rows of a piece of a file."""
        return pieces.rows(file, self.corpora[name], name, piece)

    def documents(
        self, name: str, files: Sequence[str] | None, piece: Piece | None = None, rows_before: int = 0
    ) -> Iterator[Input]:
        """Yields the records of some or all files of a corpus, in order.

        Args:
          files: the files to read; None for all.
          piece: the part to read of a single file; `rows_before` lines or rows precede it.

        Raises:
          ValueError, OSError: a file is not of its kind, or cannot be read.
        """
        row, before = rows_before, files[0] if piece and files else ""
        told = {fields.BESIDE: ["license", "language"]}  # else these columns are not read
        spec = {**self.corpora[name], **told}
        # Texts from pyarrow were valid UTF-8; a text from JSON, or from a template with bytes, may hold half a
        # character.
        is_valid = specs.kind_of(spec) in ("parquet", "arrow") and not {"text", "sample"} & set(spec)
        for found in pieces.records(before, spec, name, piece, rows_before) if piece else _records(spec, name, files):
            file, at = _place(found.place, before, files or ())
            row = row + 1 if file == before else 1
            before = file
            text, reason = _text(found.content, self.corpora[name], is_valid)
            yield Input(file, at or row, text, reason, found.language, found.licence,
                        found.content.records if isinstance(found.content, Lost) else 1, found.place)

    def state(self, file: str) -> tuple[str, int, int]:
        """A file's path, size in bytes, and modification time in nanoseconds (0 on gs://)."""
        return file, size(file), 0 if "://" in file else os.stat(file).st_mtime_ns


def _records(spec: Mapping[str, Any], name: str, files: Sequence[str] | None) -> Iterator[Found]:
    """Yields all records of a corpus, including those without a document."""
    kind = specs.kind_of(spec)
    if kind == "python":
        language = "python" if spec["python"] == "code" else None
        return (Found(each.name, each.text, language) for each in python_corpus(spec["python"]))
    if kind == "tfds":
        return sources.tfds_records(spec, "train")
    return sources.file_records(kind, spec, files or (), name)


def _place(place: str, before: str, files: Iterable[str]) -> tuple[str, int | None]:
    """The file and, if there is one, the number of a reader's place, such as "a.jsonl, line 3".

    `before` is the file of the previous record, usually also of this one; "" for the first record.
    """
    file = before if before and _is_of(place, before) else next((one for one in files if _is_of(place, one)), None)
    if file is None:
        file = place.rpartition(", ")[0] if _NUMBER.fullmatch(place.rpartition(", ")[2]) else place
    found = _NUMBER.match(place[len(file) + 2 :])
    return file, int(found[1]) if found else None


def _is_of(place: str, file: str) -> bool:
    return place.startswith(file) and place[len(file) : len(file) + 2] in ("", ", ", ": ")


def _is_text(name: str) -> bool:
    """Whether a name is valid text; Python reads invalid bytes as lone surrogates."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def _text(content: str | bytes | Lost, spec: Mapping[str, Any], is_valid: bool) -> tuple[str | None, str]:
    """The text of a document, or None and the reason; `is_valid` states that a `str` is known to be valid UTF-8."""
    if isinstance(content, Lost):
        return None, content.reason
    try:
        encoded = content if isinstance(content, bytes) else b"" if is_valid else content.encode()
        text = content if isinstance(content, str) else content.decode()
    except UnicodeError:
        return None, "not valid UTF-8"
    if len(text) > LARGEST:
        return None, f"longer than {LARGEST:,} characters"
    if not text or text.isspace():
        return None, "empty"
    return (text, "") if specs.is_sampled(encoded, spec) else (None, "outside the sample")
