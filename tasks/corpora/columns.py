"""Records of columnar files: Parquet, and Arrow's files and streams. Needs pyarrow (extra `readers`).

Of a file only the columns that are asked for are read, a few megabytes of rows at a time, so that memory does not grow
with a file or its row groups. What is damaged within a file is counted by rows where the file says how many there are;
a file that cannot be read at all is refused by name.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from codellm_jax.contents import UnreadableFile, head, kind, open_binary
from tasks.corpora import fields
from tasks.corpora.files import Lost, library
from tasks.corpora.records import EMPTY_FILE, NOT_UTF8

BYTES_AT_ONCE = 8 << 20  # of uncompressed columns
MOST_ROWS_AT_ONCE = 1024

Record = Mapping[str, Any] | Lost


# ---- Parquet -----------------------------------------------------------------------------------


def require_parquet(file: str) -> None:
    """Raises UnreadableFile or OSError unless a file is whole Parquet by its first bytes and its footer."""
    with _parquet(file):
        pass


def parquet_records(file: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """The rows of a Parquet file, with the fields that a spec asks for, and their places.

    Raises:
      UnreadableFile: it is no Parquet, or its footer is damaged.
      OSError: it cannot be read.
    """
    with _parquet(file) as opened:
        schema, row = opened.schema_arrow, 0
        if lost := fields.lacking(lambda name: _has(schema, name), spec, "text"):
            yield f"{file}, {fields.named(schema.names)}", Lost(lost, opened.metadata.num_rows)
            return
        chosen = [name for name in fields.wanted(spec, "text") if _has(schema, name)]
        for group in range(opened.num_row_groups):
            facts = opened.metadata.row_group(group)
            rows, given = facts.num_rows, 0
            try:
                at_once = BYTES_AT_ONCE * max(1, rows) // max(1, facts.total_byte_size)
                for batch in opened.iter_batches(max(1, min(at_once, MOST_ROWS_AT_ONCE)), [group], chosen):
                    for record in _rows(batch):
                        given += 1
                        yield f"{file}, row {row + given}", record
            except _damages() as error:
                yield f"{file}, row group {group + 1}: {_reason(error)}", Lost(
                    "in a damaged row group", max(1, rows - given))
            row += rows
        if not row:
            yield file, Lost(EMPTY_FILE)


@contextlib.contextmanager
def _parquet(file: str) -> Iterator[Any]:
    pyarrow_parquet = library("pyarrow.parquet", file, "Parquet")
    beginning = head(file)
    if not beginning.startswith(b"PAR1"):
        raise UnreadableFile(f"{file} is {kind(beginning) or 'no Parquet file'}, where Parquet is wanted.")
    with open_binary(file) as stream:
        try:
            # Buffered, so that a column is read piece by piece; checksums are verified where a file has them.
            opened = pyarrow_parquet.ParquetFile(stream, buffer_size=1 << 20, page_checksum_verification=True)
        except _damages() as error:
            raise UnreadableFile(f"{file} is damaged or breaks off, for its footer cannot be read ({_reason(error)}); "
                                 "bring it anew.") from None
        yield opened


def _has(schema: Any, name: str) -> bool:
    """Whether a schema, or the type of a struct, has a field of this name, or one to which its dots lead."""
    import pyarrow

    if schema.get_field_index(name) >= 0:
        return True
    for at in (at for at, letter in enumerate(name) if letter == "."):
        if (index := schema.get_field_index(name[:at])) >= 0:
            inner = schema.field(index).type
            return pyarrow.types.is_struct(inner) and _has(inner, name[at + 1 :])
    return False


# ---- Rows --------------------------------------------------------------------------------------


def _rows(batch: Any) -> Iterator[Record]:
    """The rows of a batch; one by one where some of it is not what it should be."""
    try:
        batch.validate(full=True)
        yield from batch.to_pylist()
        return
    except _damages():
        pass
    for row in range(batch.num_rows):
        try:
            one = batch.slice(row, 1)
            one.validate(full=True)
            record = one.to_pylist()[0]
        except _damages() as error:
            record = Lost(NOT_UTF8 if "UTF" in str(error).upper() else "in a damaged batch")
        yield record


def _damages() -> tuple[type[Exception], ...]:
    """What pyarrow raises of a file that is not what it should be."""
    import pyarrow

    return pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
