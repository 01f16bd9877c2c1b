"""Records of columnar files: Parquet, and Arrow's files and streams. Needs pyarrow (extra `readers`).

Only the requested columns of a file are read, a few megabytes of rows at a time, so that memory does not grow with
files or row groups. Damage within a file is counted in rows if the file states their number; a file that cannot be
read at all is refused by name. An Arrow stream without its end mark counts as broken at the end, because it may be
truncated between two batches.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from codellm_jax.contents import BrokenFile, UnreadableFile, content, head, is_file, kind, open_binary, size
from tasks.corpora import fields
from tasks.corpora.files import Lost, library
from tasks.corpora.records import EMPTY_FILE, NOT_UTF8

BYTES_AT_ONCE = 8 << 20  # of uncompressed columns
MOST_ROWS_AT_ONCE = 1024

Record = Mapping[str, Any] | Lost
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


# ---- Parquet -----------------------------------------------------------------------------------


def require_parquet(file: str) -> None:
    """Raises UnreadableFile or OSError unless first bytes and footer show that a file is complete Parquet."""
    with _parquet(file):
        pass


def group_facts(file: str) -> list[tuple[int, int]]:
    """The rows and stored bytes of each row group of a Parquet file; errors are those of `parquet_records`."""
    with _parquet(file) as opened:
        groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
        return [(group.num_rows, sum(group.column(number).total_compressed_size for number in range(group.num_columns)))
                for group in groups]


def parquet_records(
    file: str, spec: Mapping[str, Any] | None, groups: tuple[int, int] | None = None, before: int = 0
) -> Iterator[tuple[str, Record]]:
    """Yields the rows of a Parquet file with the requested fields, and their places.

    Args:
      spec: names the requested fields; None requests all.
      groups: the half-open range of row groups to read, which follow `before` rows; None reads all.

    Raises:
      UnreadableFile: it is not Parquet, or its footer is damaged.
      OSError: it cannot be read.
    """
    with _parquet(file) as opened:
        schema, row = opened.schema_arrow, before
        numbers = range(*(groups or (0, opened.num_row_groups)))
        if spec is not None and (lost := fields.lacking(lambda name: _has(schema, name), spec, "text")):
            rows = sum(opened.metadata.row_group(group).num_rows for group in numbers)
            yield f"{file}, {fields.named(schema.names)}", Lost(lost, rows)
            return
        chosen = None if spec is None else [name for name in fields.wanted(spec, "text") if _has(schema, name)]
        for group in numbers:
            facts = opened.metadata.row_group(group)
            rows, given, reason = facts.num_rows, 0, ""
            try:
                at_once = BYTES_AT_ONCE * max(1, rows) // max(1, facts.total_byte_size)
                for batch in opened.iter_batches(max(1, min(at_once, MOST_ROWS_AT_ONCE)), [group], chosen):
                    for record in _rows(batch, is_trusted=True):
                        given += 1
                        yield f"{file}, row {row + given}", record
            except _damages() as error:
                _require_damage(error, file)
                reason = _reason(error)
            if reason or given < rows:
                yield (f"{file}, row group {group + 1}: {reason or 'fewer rows than it says'}",
                       Lost("in a damaged row group", max(1, rows - given)))
            row += rows
        if not row and groups is None:
            yield file, Lost(EMPTY_FILE)


@contextlib.contextmanager
def _parquet(file: str) -> Iterator[Any]:
    pyarrow_parquet = library("pyarrow.parquet", file, "Parquet")
    beginning = head(file)
    if not beginning.startswith(b"PAR1"):
        raise UnreadableFile(f"{file} is {kind(beginning) or 'not a Parquet file'}; expected Parquet.")
    with open_binary(file) as stream:
        try:
            # Buffered, so that no column of a row group is read whole; checksums are verified if present.
            opened = pyarrow_parquet.ParquetFile(
                stream, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        except _damages() as error:
            _require_damage(error, file)
            raise UnreadableFile(f"{file} is damaged or truncated: its footer cannot be read ({_reason(error)}); copy "
                                 "or download it again.") from None
        yield opened


def _has(schema: Any, name: str) -> bool:
    """Whether a schema or struct type has a field of this name or dotted path."""
    import pyarrow

    if schema.get_field_index(name) >= 0:
        return True
    for at in (at for at, letter in enumerate(name) if letter == "."):
        if (index := schema.get_field_index(name[:at])) >= 0:
            inner = schema.field(index).type
            return pyarrow.types.is_struct(inner) and _has(inner, name[at + 1 :])
    return False


# ---- Arrow -------------------------------------------------------------------------------------


def require_arrow(file: str) -> None:
    """Raises UnreadableFile or OSError unless a file begins like an Arrow file or stream, and a file is complete."""
    with _batches(file):
        pass


def arrow_records(file: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Record]]:
    """Yields the rows of an Arrow file or stream (IPC) with the requested fields, and their places.

    Raises:
      UnreadableFile: it is neither, or damaged as a whole.
      OSError: it cannot be read.
      BrokenFile: a stream is truncated; raised after all readable rows.
    """
    with _batches(file) as (schema, batches):
        if lost := fields.lacking(lambda name: _has(schema, name), spec, "text"):
            # A stream does not state its number of rows.
            rows = sum(1 if isinstance(batch, Lost) else batch.num_rows for batch in batches)
            yield (f"{file}, {fields.named(schema.names)}", Lost(lost, rows)) if rows else (file, Lost(EMPTY_FILE))
            return
        asked = fields.wanted(spec, "text")
        columns = [name for name in schema.names if any(_begins(name, field) for field in asked)]
        row = 0
        for number, batch in enumerate(batches, 1):
            if isinstance(batch, Lost):
                yield f"{file}, record batch {number}", batch
                continue
            for start in range(0, batch.num_rows, MOST_ROWS_AT_ONCE):
                for record in _rows(batch.select(columns).slice(start, MOST_ROWS_AT_ONCE)):
                    row += 1
                    yield f"{file}, row {row}", record
        if not row:
            yield file, Lost(EMPTY_FILE)


def _begins(column: str, field: str) -> bool:
    return field == column or field.startswith(f"{column}.")


@contextlib.contextmanager
def _batches(file: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema of an Arrow file or stream, and its record batches, with a `Lost` for each damaged one of a file."""
    pyarrow = library("pyarrow", file, "Arrow")
    beginning = head(file)
    if not beginning.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        raise UnreadableFile(f"{file} is {kind(beginning) or 'not an Arrow file'}; expected an Arrow file or "
                             "stream.")
    with contextlib.ExitStack() as opened:
        # Memory-mapped, so that large batches need not fit in memory.
        source = opened.enter_context(open_binary(file) if "://" in file else pyarrow.memory_map(file))
        try:
            if beginning.startswith(b"ARROW1"):
                reader = opened.enter_context(pyarrow.ipc.open_file(source))
                batches = _of_file(reader, file)
            else:
                reader = opened.enter_context(pyarrow.ipc.open_stream(source))
                batches = _of_stream(reader, file)
        except _damages() as error:
            _require_damage(error, file)
            raise UnreadableFile(
                f"{file} is damaged or truncated ({_reason(error)}); copy or download it again.") from None
        yield reader.schema, batches


def _of_file(reader: Any, file: str) -> Iterator[Any]:
    for number in range(reader.num_record_batches):
        try:
            yield reader.get_batch(number)
        except _damages() as error:
            _require_damage(error, file)
            yield Lost("damaged record batches")


def _of_stream(reader: Any, file: str) -> Iterator[Any]:
    try:
        yield from reader
    except _damages() as error:
        _require_damage(error, file)
        raise BrokenFile(_reason(error)) from error
    # A stream truncated between two batches lacks only the end mark.
    with open_binary(file) as stream:
        stream.seek(max(0, size(file) - len(_END_OF_STREAM)))
        if stream.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise BrokenFile("it lacks the end mark of a stream")


def dataset_files(folder: str) -> list[str] | None:
    """The files of a folder written by Hugging Face's `Dataset.save_to_disk`; None for any other folder.

    Only files listed in its state.json count; others may be left from an earlier dataset.

    Raises:
      UnreadableFile: it holds several datasets, one per split, or its state.json is damaged.
    """
    state, splits = (_json_in(folder, name) for name in ("state.json", "dataset_dict.json"))
    if splits is not None:
        named = ", ".join(map(str, splits.get("splits", []))) if isinstance(splits, dict) else ""
        raise UnreadableFile(f"{folder} holds a dataset for each of the splits {named or '(none)'}; name one of these "
                             "folders, and give another one as 'validation' to hold it out.")
    if state is None:
        return None
    listed = state.get("_data_files") if isinstance(state, dict) else None
    names = [each.get("filename") if isinstance(each, dict) else None for each in listed or ()]
    if not names or not all(isinstance(name, str) and name and "/" not in name for name in names):
        raise UnreadableFile(f"{folder}/state.json lists no files of the dataset ('_data_files'); save it again.")
    if isinstance(state, dict) and state.get("_indices_data_files"):
        raise UnreadableFile(f"{folder} holds a dataset with indices into its files; save its `flatten_indices()`.")
    return [f"{folder.rstrip('/')}/{name}" for name in names]


def _json_in(folder: str, name: str) -> Any:
    """The JSON content of a file of a folder; None if there is no such file."""
    file = f"{folder.rstrip('/')}/{name}"
    if not is_file(file):
        return None
    try:
        return json.loads(content(file))
    except ValueError:
        raise UnreadableFile(f"{file} is not JSON; save the dataset again.") from None


# ---- Rows --------------------------------------------------------------------------------------


def _rows(batch: Any, is_trusted: bool = False) -> Iterator[Record]:
    """Yields the rows of a batch; one by one if part of it is damaged.

    The offsets of a trusted batch, as from Parquet, are made by pyarrow, which reports invalid UTF-8 as it makes them.
    """
    try:
        batch.validate(full=not is_trusted)
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
    """The errors that pyarrow raises for a damaged file."""
    import pyarrow

    return pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError


def _require_damage(error: Exception, file: str) -> None:
    """Re-raises an error that comes from a disk or a connection, not from a file's content."""
    if isinstance(error, OSError) and (error.errno is not None or str(error).startswith(f"{file} cannot be read")):
        raise error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
