"""The description of a preparation for workers: the places of its files, and the work on each part in each stage.

A part consists of some files of one corpus, or of a piece of a large file. Steps that need all documents separate
stages:

  STAGE 0     each part is read; the rules before the first such step are applied; documents are written, together with
              the data that the step needs about each (a hash, a signature)
  reduction   determines the documents to remove, for one range of hashes at a time
  STAGE 1     each part's documents are read again, without the removed ones; the next rules are applied; and so on

Finished work writes a file of facts, last, and is not repeated. The result does not depend on the order or the number
of processes, since a document is identified by its place: its part, and its index within the part.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from codellm_jax.prepare import ranged
from codellm_jax.prepare.examples import Records
from codellm_jax.prepare.preparation import Inputs
from codellm_jax.prepare.steps import Step
from codellm_jax.vocabulary import Vocabulary

SAMPLES = 5  # removed documents per step and part whose beginnings are kept
SAMPLE_CHARACTERS = 400
REASONS = 1000  # per step and part, counted by name; there may be many licences
BYTES_A_GROUP = 8 << 20  # of text in a row group of Parquet

DOCUMENT = pa.schema([
    ("text", pa.large_string()), ("source", pa.string()), ("file", pa.string()), ("row", pa.int64()),
    ("sha256", pa.string()), ("license", pa.string()), ("language", pa.string()), ("bytes_read", pa.int64()),
    ("tokens", pa.int64()),  # of the final text, with the preparation's vocabulary; null without one
    ("changed_by", pa.list_(pa.string()))])
REMOVED = pa.schema([
    ("source", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("sha256", pa.string()),
    ("number", pa.int64()),  # of the step, from 1; 0 for reading
    ("step", pa.string()), ("reason", pa.string()),
    ("records", pa.int64()),  # 1, or more if a damaged file lost several
    ("bytes", pa.int64()), ("tokens", pa.int64()), ("copy_source", pa.string()), ("copy_sha256", pa.string()),
    ("similarity", pa.float32())])  # the highest with any document that it was joined with


class Part(NamedTuple):
    """Some files of a corpus, with size and modification time; None for a corpus that is read as a whole. Or one file's
    piece, from its first byte or row group to the start of the next piece.
    """

    source: str
    files: tuple[tuple[str, int, int], ...] | None
    piece: tuple[int, int] | None = None


class Stage(NamedTuple):
    """The work between two steps that need all documents: the rules between them, by their indices."""

    before: int | None
    rules: tuple[int, ...]
    after: int | None


@dataclasses.dataclass(frozen=True)
class Job:
    """The data that each worker receives.

    Attributes:
      inputs: reads the corpora.
      steps: all of them.
      parts: in the order of the output.
      folder: holds the files until the end.
      hashes: of the plan, stored in the output's files: {"steps": ..., "inputs": ...}.
      vocabulary: the vocabulary for counting tokens; None for no count.
      format: of the output's documents, one of `preparation.FORMATS`.
    """

    inputs: Inputs
    steps: tuple[Step, ...]
    parts: tuple[Part, ...]
    folder: str
    hashes: Mapping[str, str]
    vocabulary: Vocabulary | None = None
    format: str = "parquet"

    def documents(self, stage: int, part: int) -> "Table | Records":
        """The writer for the documents that remain of a part in a stage; after the last stage, in the output's format.
        """
        path = self.documents_path(stage, part)
        return Table(path, DOCUMENT, self.hashes) if path.suffix == ".parquet" else Records(path)

    def documents_path(self, stage: int, part: int) -> epath.Path:
        """The path of these documents."""
        is_last = self.stages[stage].after is None
        return self.path(stage, "documents", part, f".{self.format if is_last else 'parquet'}")

    def tokens(self, text: str) -> int | None:
        """The number of tokens of a document, including begin and end tokens, as in rows for training."""
        if self.vocabulary is None:
            return None
        return len(self.vocabulary.begin_ids) + len(self.vocabulary.encode(text)) + 1

    @property
    def stages(self) -> list[Stage]:
        """The stages of the steps, one more than there are steps that need all documents."""
        found: list[Stage] = []
        before: int | None = None
        rules: list[int] = []
        for number, step in enumerate(self.steps):
            if step.needs_all:
                found.append(Stage(before, tuple(rules), number))
                before, rules = number, []
            else:
                rules.append(number)
        return [*found, Stage(before, tuple(rules), None)]

    def path(self, stage: int, kind: str, number: int, suffix: str) -> epath.Path:
        """The path of a stage's file, such as stage0/documents-00003.parquet."""
        return epath.Path(self.folder) / f"stage{stage}" / f"{kind}-{number:05d}{suffix}"

    def files(self, stage: int, kind: str) -> list[epath.Path]:
        """The files of a kind in a stage, sorted."""
        folder = epath.Path(self.folder) / f"stage{stage}"
        return sorted(path for path in folder.iterdir() if path.name.startswith(f"{kind}-"))

    def facts(self, stage: int, part: int) -> dict[str, Any] | None:
        """The facts that a finished part wrote; None if it is not done."""
        path = self.path(stage, "facts", part, ".json")
        return json.loads(path.read_text()) if path.exists() else None


class Count:
    """The effect of a step on the documents of a part."""

    def __init__(self) -> None:
        self.documents = self.bytes = self.removed = self.removed_bytes = self.changed = self.bytes_dropped = 0
        self.tokens = self.removed_tokens = self.tokens_dropped = 0
        self.reasons: dict[str, int] = {}
        self.copies: dict[str, int] = {}
        self.samples: list[tuple[str, dict[str, Any]]] = []

    def see(self, size: int, tokens: int | None) -> None:
        """Counts a document to which the step applies, with its bytes and tokens."""
        self.documents += 1
        self.bytes += size
        self.tokens += tokens or 0

    def change(self, dropped: int, tokens_dropped: int) -> None:
        """Counts a changed document, by the bytes and tokens that it lost."""
        self.changed += 1
        self.bytes_dropped += dropped
        self.tokens_dropped += tokens_dropped

    def remove(self, reason: str, size: int, tokens: int | None, sample: dict[str, Any]) -> None:
        """Counts a removed document; keeps the samples with the lowest hashes."""
        self.removed += 1
        self.removed_bytes += size
        self.removed_tokens += tokens or 0
        counted = reason if reason in self.reasons or len(self.reasons) < REASONS else "others"
        self.reasons[counted] = self.reasons.get(counted, 0) + 1
        if "copy_source" in sample:
            self.copies[sample["copy_source"]] = self.copies.get(sample["copy_source"], 0) + 1
        key = f"{sample['sha256']} {sample['file']} {sample['row']:012d}"
        if len(self.samples) < SAMPLES or key < self.samples[-1][0]:
            sample |= {"reason": reason, "text": sample["text"][:SAMPLE_CHARACTERS]}
            self.samples = sorted([*self.samples, (key, sample)], key=lambda each: each[0])[:SAMPLES]

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens, "removed": self.removed,
                "removed_bytes": self.removed_bytes, "removed_tokens": self.removed_tokens, "changed": self.changed,
                "bytes_dropped": self.bytes_dropped, "tokens_dropped": self.tokens_dropped,
                "reasons": dict(sorted(self.reasons.items())), "copies": dict(sorted(self.copies.items())),
                "samples": [sample for _, sample in self.samples]}


class Table:
    """A Parquet file that is written by row groups, under a temporary name until it is complete."""

    def __init__(self, path: epath.Path, schema: pa.Schema, hashes: Mapping[str, str]) -> None:
        self._path, self._schema = path, schema.with_metadata({f"codellm_jax.{key}": value
                                                               for key, value in hashes.items()})
        self._building = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        # Parquet's library cannot write to etils' files on gs://: there it goes through a local file.
        self._is_remote = "://" in os.fspath(path)
        self._file: Any = tempfile.TemporaryFile() if self._is_remote else open(self._building, "wb")
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._bytes = self.count = self.bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        """Adds a row; `size` is the size of its text in bytes."""
        self._rows.append(row)
        self._bytes += size + 200
        self.bytes += size
        self.count += 1
        if self._bytes >= BYTES_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        """Completes the file and moves it to its place."""
        self._flush()
        self._writer.close()
        if self._is_remote:
            self._file.seek(0)
            with self._building.open("wb") as file:
                shutil.copyfileobj(self._file, file, 1 << 20)
        self._file.close()
        self._building.replace(self._path)

    def discard(self) -> None:
        """Removes an incomplete file."""
        with contextlib.suppress(OSError):  # the file is discarded anyway
            self._writer.close()
        self._file.close()
        self._building.unlink(missing_ok=True)


def read_rows(path: epath.Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a few at a time in memory."""
    with ranged.on_disk(path) as file:
        reader = pq.ParquetFile(file)
        for group in range(reader.num_row_groups):
            yield from reader.read_row_group(group).to_pylist()


DROPPED = np.dtype([("document", "<u8"), ("place", "<u4"), ("copy", "<u8"), ("rank", "<u8"), ("similarity", "<f4")])
EQUAL = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<u8"), ("document", "<u8"), ("place", "<u4")])
BAND = np.dtype([("key", "<u8"), ("document", "<u8")])
EDGE = np.dtype([("first", "<u8"), ("second", "<u8"), ("similarity", "<f4"), ("first_bytes", "<u8"),
                 ("first_rank", "<u8"), ("second_bytes", "<u8"), ("second_rank", "<u8")])
DRAWN = np.dtype([("bin", "<u8"), ("size", "<u8")])
PART_BITS = 32  # of a document's number, below those of its part


def signed(count: int) -> np.dtype:
    """The data for comparing a document: its number in its part, the first 8 bytes of its hash, its length in bytes,
    the offset and number of its shingles in their file, and its signature of `count` hashes.
    """
    return np.dtype([("place", "<u8"), ("rank", "<u8"), ("bytes", "<u8"), ("begin", "<u8"), ("shingles", "<u4"),
                     ("signature", "<u4", (count,))])
