"""The cache of tokenized rows: written once from a SeqIO task, then read by row number.

In pre-training a row is `length` + 1 consecutive tokens of one source: `length` inputs and, shifted by one, the same
number of targets. Documents end with the end-of-document token and are joined in the task's order; tokens after the
last full row are not trained on, and are recorded. Instructions may also be documents (`examples.py`). In tuning a row
is one example. A cache holds the splits of one task with one vocabulary and length:

  CACHE_DIR/rows/<task>/<key>/<split>/   zarr3 of 16 or 32 bits, signed for instructions, [rows, width], with checksums
  CACHE_DIR/rows/<task>/<key>/<split>.digests/   zarr3 of 32 bits, [rows]: a digest of each row, see `checked`
  CACHE_DIR/rows/<task>/<key>/cache.json the contents; written last, so a cache with this file is complete

A missing cache is written by this process, which suits corpora up to a few gigabytes; `shards.py` writes the same with
many processes. SeqIO and TensorFlow are imported only for writing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import tensorstore
from etils import epath

from codellm_jax.mixture.checked import DamagedRows, recorded_splits, require_rows, require_written, row_digests
from codellm_jax.mixture.examples import WIDTH_BESIDE_TOKENS, Found, documents, example_rows
from codellm_jax.mixture.half_made import half_made
from codellm_jax.mixture.places import Place, cache_place, move_aside, storage_error
from codellm_jax.mixture.roundtrip import warned
from codellm_jax.mixture.stores import (
    BYTES_KEPT,
    BYTES_KEPT_IN_ALL,
    ROWS_A_SHARD,
    create_digests,
    create_store,
    digests_path,
    open_store,
    salt_of,
)
from codellm_jax.mixture.tokens import SPLITS, Definitions, Example, examples, open_task, sample_of, warnings_of
from codellm_jax.mixture.transient import asked_again, is_transient
from codellm_jax.vocabulary import Vocabulary

STAGES = ("pretraining", "tuning")
ROWS_A_DIGEST = 4096
ROWS_HASHED_WHOLE = 1 << 20
LARGE = 2**30  # bytes of files above which many processes are worthwhile


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split of one source, read by row number."""

    name: str
    split: str
    path: str
    count: int
    length: int  # inputs of a row; a row has one token more
    tokens: int  # of all documents or examples, including end tokens
    documents: int  # or examples, whether kept or left out
    content_hash: str  # of the rows in order, computed by `RowsHash`
    cut: int = 0  # examples longer than a row
    left_out: int = 0  # examples of which no target token would be left
    conversations: int = 0  # examples with turns, whether kept or left out
    uncounted: int = 0  # in pre-training, tokens that the loss does not count
    loss: str | None = None  # for instructions in pre-training, the tokens the loss counts: "all" or "answers"
    notes: tuple[str, ...] = ()  # warnings of the task's reader, such as skipped records
    digests: str = ""  # the salt of the rows' digests, see `checked`; empty in caches of versions without digests

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64 [N], in any order, repeats allowed) as int32 [N, width].

        The width is length + 1, plus in tuning the columns that `examples.py` adds.

        Raises:
          ValueError: the cache does not hold the rows that were written.
        """
        return self.begin(numbers)()

    def begin(self, numbers: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts a read and returns a function that waits for the rows, so that several sources are read at once."""
        # Unique and sorted, so that a chunk is fetched once.
        unique, inverse = np.unique(numbers, return_inverse=True)
        try:
            store = _opened(self.path)
            reading = store[unique].read()
            digests = _opened(digests_path(self.path), 4 * self.count)[unique].read() if self.digests else None
        except Exception as error:
            raise _damaged(self.path, error) from error

        def rows() -> np.ndarray:
            try:
                found = reading.result()
                if digests is not None:
                    require_rows(self.digests, unique, found, digests.result())
                return found[inverse].astype(np.int32)
            except Exception as error:
                raise _damaged(self.path, error) from error

        return rows


def cached_rows(
    task: str, definitions: Definitions, vocabulary: Vocabulary, length: int, cache_dir: str,
    report: Callable[[str], None] = print, stage: str = "pretraining",
) -> dict[str, Rows]:
    """The rows of each split of a SeqIO task, from the cache or written to it now.

    Args:
      task: name of a registered SeqIO task with a feature `targets`, and for instructions `inputs`.
      definitions: describes the task; registers it only if rows must be written.
      vocabulary: replaces the task's own.
      length: inputs of a row.
      cache_dir: local directory or gs:// address.
      report: called with a line of progress now and then.
      stage: "pretraining" joins documents or examples and cuts them into rows; "tuning" makes each example a row.

    Raises:
      ValueError: the task is unknown or does not fit the stage, or its training split does not fill one row.
    """
    place = cache_place(task, definitions, vocabulary, length, cache_dir, stage)
    if not place.is_whole():
        _write_cache(task, definitions, vocabulary, length, place, report, stage)
    try:
        return _recorded(place, task, vocabulary, length, stage, report)
    except (ValueError, IsADirectoryError) as error:  # TensorStore has no class of its own for damage
        if is_transient(error):
            raise _damaged(str(place.directory / "cache.json"), error) from error
        reason = _reason(error)
    if place.is_remote:
        (place.directory / "cache.json").unlink()
    else:
        reason += f"; they are kept in {move_aside(place.directory)}"
    report(f"WARNING: the cached rows in {place.directory} are damaged and are written again ({reason}).")
    _write_cache(task, definitions, vocabulary, length, place, report, stage)
    return _recorded(place, task, vocabulary, length, stage, report)


def _recorded(
    place: Place, task: str, vocabulary: Vocabulary, length: int, stage: str, report: Callable[[str], None]
) -> dict[str, Rows]:
    """The rows that cache.json records. Raises ValueError if it or an array is not what was written."""
    read = (place.directory / "cache.json").read_bytes
    suffix, splits = recorded_splits(asked_again(read) if place.is_remote else read(), place.key)
    found = {split: Rows(name=task, split=split, path=str(place.directory / f"{split}{suffix}"), length=length,
                         loss=place.loss, **facts) for split, facts in splits.items()}
    width = row_format(vocabulary, length, stage, place.loss).width
    # Once per process: the check on opening does not cover changes during a run.
    new = [rows for rows in found.values() if (rows.path, rows.content_hash) not in _compared]
    unwatched = [rows.split for rows in new if not _is_compared_whole(rows, width) and not rows.digests]
    _compared.update((rows.path, rows.content_hash) for rows in new)
    if unwatched:
        report(f"{task}: the cached rows of {', '.join(unwatched)} have no digests, for an earlier version wrote them: "
               f"if they change, no run notices. Delete {place.directory} to have them written anew.")
    return found


def _is_compared_whole(rows: Rows, width: int) -> bool:
    """Compares all rows of a small array with their hash and digests; returns whether they were compared.

    Raises:
      DamagedRows, or an error of TensorStore: the array or its digests are not those that were written.
    """
    for path in (rows.path, digests_path(rows.path)):
        _stores.pop(path, None)  # may be of an array that was set aside
    written = _opened(digests_path(rows.path), 4 * rows.count) if rows.digests else None
    if written is not None and written.shape != (rows.count,):
        raise DamagedRows("its digests are not those of its rows")

    def hash_of(blocks: Iterable[np.ndarray]) -> str:
        content, first = RowsHash(), 0
        for block in blocks:
            content.update(block)
            last = first + len(block)
            if written is not None:
                require_rows(rows.digests, np.arange(first, last), block, written[first:last].read().result())
            first = last
        return content.of_all()

    return require_written(open_store(rows.path), rows.count, width, rows.content_hash, hash_of)


def _write_cache(
    task: str, definitions: Definitions, vocabulary: Vocabulary, length: int, place: Place,
    report: Callable[[str], None], stage: str,
) -> None:
    """Writes all splits beside their place and moves them there when complete. On gs:// nothing can be moved: they are
    written in place, under names with a suffix that cache.json records, so that hosts that write at once do not
    overwrite what another reads.
    """
    directory = place.directory
    suffix = f".{uuid.uuid4().hex[:8]}" if place.is_remote else ""
    size = sum(size for _, size in place.key["definition"].get("train_files", ()))
    if size > LARGE:
        report(f"{task} has files of {size / 2**30:.1f} GiB. `t5x cache` with the same gin files and flags writes the "
               "same rows by many processes or machines, and goes on where it was stopped.")
    try:
        with contextlib.nullcontext(directory) if place.is_remote else half_made(directory) as made:
            building, splits = epath.Path(made), {}
            building.mkdir(parents=True, exist_ok=True)
            opened = open_task(task, definitions, stage)
            threads = len(os.sched_getaffinity(0))
            for split in (split for split in SPLITS if split in opened.splits):
                sample = sample_of(opened, split)
                with warnings_of(task) as notes:
                    splits[split] = _write_split(
                        task, split, examples(opened, split, vocabulary, threads=threads, sample=sample), vocabulary,
                        length, str(building / f"{split}{suffix}"), report, stage, place)
                splits[split].notes = [
                    *map(str, notes), *warned(task, split, sample.looked_at(vocabulary), unit_of(stage))]
            finish_cache(task, place, splits, building, suffix, length, stage)
    except Exception as error:
        if of_storage := storage_error(error, directory):
            raise of_storage from error
        raise


def finish_cache(
    task: str, place: Place, splits: Mapping[str, Found], building: epath.Path, suffix: str, length: int, stage: str
) -> None:
    """Writes cache.json beside the splits in `building`, and on disk moves everything into place.

    Raises:
      ValueError: there is nothing to train on.
    """
    train = splits.get("train") or Found()
    if not train.count:
        held_out = {split: found.documents for split, found in splits.items() if split != "train" and found.documents}
        listed = ", ".join(f"{count:,} in {split}" for split, count in held_out.items())
        if not train.documents and held_out:
            reason = (f"all of its {unit_of(stage)} are held out ({listed}), and none is left to train on; "
                      "in its CORPORA line set 'holdout': 0, or name other files as 'validation'.")
        elif stage == "tuning":
            reason = "no example of its training split is left to train on" + (
                f": of {train.documents:,} none has a token of its target within {length + 1} tokens; mend them or "
                "raise TASK_FEATURE_LENGTHS." if train.documents else ".")
        elif train.left_out == train.documents > 0:
            reason = f"none of its {train.documents:,} examples has a token of an answer; correct them."
        else:
            reason = (f"its training split has {train.tokens} tokens, fewer than the {length + 1} of one row; add data "
                      "or lower TASK_FEATURE_LENGTHS."
                      + f" Held out are {listed}, which 'holdout': 0 would train on." * bool(held_out))
        raise ValueError(f"{task}: {reason}" + f" ({'; '.join(train.notes)})" * bool(train.notes))
    facts = {split: dataclasses.asdict(found) for split, found in splits.items()}
    cache = {"key": place.key, "splits": facts, "suffix": suffix}
    (building / "cache.json").write_text(json.dumps(cache, indent=2) + "\n")
    if not place.is_remote:
        try:
            os.rename(building, place.directory)
        except OSError:
            if place.is_whole():  # another process wrote the same cache first
                return
            move_aside(place.directory)  # without cache.json it is never read
            os.rename(building, place.directory)


def _write_split(
    task: str, split: str, examples: Iterator[Example], vocabulary: Vocabulary, length: int, path: str,
    report: Callable[[str], None], stage: str, place: Place,
) -> Found:
    """Writes the rows of a split shard by shard."""
    width, dtype, compressed = row_format(vocabulary, length, stage, place.loss)
    store = create_store(path, width, dtype, compressed)
    content = RowsHash()
    found = Found(digests=salt_of(place, split))
    waiting: list[np.ndarray] = []  # digests
    start = last_report = time.monotonic()
    blocks = example_rows(examples, length, found) if stage == "tuning" else document_rows(
        documents(examples, place.loss, vocabulary.end_of_document_id, found), length)
    for block in blocks:
        if not found.count:  # excludes the import of libraries from the tokenizer's speed
            start = last_report = time.monotonic()
        store = store.resize(exclusive_max=[found.count + len(block), width]).result()
        stored = block.astype(dtype)
        store[found.count : found.count + len(block)].write(stored).result()
        waiting.append(row_digests(found.digests, range(found.count, found.count + len(block)), stored))
        content.update(block)
        found.count += len(block)
        if time.monotonic() - last_report > 5:
            last_report = time.monotonic()
            report(f"tokenizing {task} {split}: {found.tokens / 1e6:.1f}M tokens, "
                   f"{found.tokens / (last_report - start):,.0f}/s")
    if line := summary(task, split, found, length, stage):
        report(line)
    digests = create_digests(path, found.count)
    if waiting:
        digests.write(np.concatenate(waiting)).result()
    found.content_hash = content.of_all()
    return found


def summary(task: str, split: str, found: Found, length: int, stage: str) -> str:
    """A line that summarizes a split; empty if it has no tokens."""
    if found.documents and stage == "tuning":
        return (f"tokenized {task} {split}: {found.documents:,} examples, {found.tokens:,} tokens; {found.cut:,} are "
                f"cut to {length + 1} tokens, {found.left_out:,} left out, since no token of their target remains")
    if not found.tokens:
        return ""
    rest = found.tokens - found.count * (length + 1)
    return (f"tokenized {task} {split}: {found.documents:,} documents, {found.tokens:,} tokens, {found.count:,} "
            f"rows of {length}; {rest:,} tokens after the last full row are left out"
            + f"; {found.left_out:,} examples without an answer are left out" * bool(found.left_out))


def unit_of(stage: str) -> str:
    """The plural noun for the items of a split."""
    return "examples" if stage == "tuning" else "documents"


class RowFormat(NamedTuple):
    width: int  # numbers of a row
    dtype: np.dtype
    compressed: bool


def row_format(vocabulary: Vocabulary, length: int, stage: str, loss: str | None) -> RowFormat:
    """The storage format of rows; `loss` as in `Place`."""
    if stage == "tuning":  # signed, see `examples`; mostly padding, which compresses well
        width = length + 1 + WIDTH_BESIDE_TOKENS
        return RowFormat(width, np.dtype(np.int16 if max(vocabulary.size, width) <= 2**15 else np.int32), True)
    if loss:  # signed, with marks above the ids; the unused bytes compress
        return RowFormat(length + 1, np.dtype(np.int32), True)
    # Ids would hardly compress at all.
    return RowFormat(length + 1, np.dtype(np.uint16 if max(vocabulary.size, length + 1) <= 2**16 else np.uint32), False)


class RowsHash:
    """A hash of rows that does not depend on their division into blocks.

    Up to 2**20 rows it is their SHA-256. Beyond that it is the SHA-256 of the SHA-256 of each 4,096 rows, so that many
    processes can share the work.
    """

    def __init__(self) -> None:
        self._whole, self._open, self._rows = hashlib.sha256(), hashlib.sha256(), 0
        self._digests: list[bytes] = []

    def update(self, rows: np.ndarray) -> None:
        """Adds rows, [rows, width] of any integer type."""
        while len(rows):
            part, rows = np.split(rows, [ROWS_A_DIGEST - self._rows % ROWS_A_DIGEST])
            content = part.astype("<u4").tobytes()
            self._open.update(content)
            self._rows += len(part)
            if self._rows <= ROWS_HASHED_WHOLE:
                self._whole.update(content)
            if self._rows % ROWS_A_DIGEST == 0:
                self._digests.append(self._open.digest())
                self._open = hashlib.sha256()

    def of_all(self) -> str:
        """The hash of all rows so far, in hexadecimal."""
        if self._rows <= ROWS_HASHED_WHOLE:
            return self._whole.hexdigest()
        return hash_of_digests([*self._digests, *([self._open.digest()] if self._rows % ROWS_A_DIGEST else [])])


def digest(rows: np.ndarray) -> bytes:
    """The SHA-256 of a block of up to 4,096 rows, an input of `hash_of_digests`."""
    return hashlib.sha256(rows.astype("<u4").tobytes()).digest()


def hash_of_digests(digests: Iterable[bytes]) -> str:
    """The hash of more rows than ROWS_HASHED_WHOLE, from the digests of their blocks."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def document_rows(each_document: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Joins the tokens of documents and cuts them into blocks of rows, int32 [rows, length + 1]."""
    width = length + 1
    waiting: list[np.ndarray] = []  # documents not yet cut, after the rest of the last block
    tokens = 0  # in `waiting`

    def cut(rows: int) -> np.ndarray:
        nonlocal waiting, tokens
        joined = np.concatenate(waiting)
        waiting, tokens = [joined[rows * width :]], len(joined) - rows * width
        return joined[: rows * width].reshape(rows, width)

    for document in each_document:
        tokens += len(document)
        waiting.append(document)
        while tokens >= ROWS_A_SHARD * width:
            yield cut(ROWS_A_SHARD)
    while tokens >= width:
        yield cut(min(ROWS_A_SHARD, tokens // width))


def _damaged(path: str, error: Exception) -> ValueError:
    if is_transient(error):
        return ValueError(f"The cached rows in {path} cannot be read now ({_reason(error)}): run the same command "
                          "again once they can.")
    return ValueError(f"The cached rows in {path} are damaged ({_reason(error)}): delete {path.rsplit('/', 1)[0]} and "
                      "run the same command again; it writes the same rows again.")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_stores: dict[str, tensorstore.TensorStore] = {}
_compared: set[tuple[str, str]] = set()  # arrays that were opened, with the hashes of their rows


def _opened(path: str, kept: int = 0) -> tensorstore.TensorStore:
    """An array, opened once per process because opening costs more than a batch; caches at least `kept` bytes."""
    if path not in _stores:
        of_source = min(BYTES_KEPT, BYTES_KEPT_IN_ALL // (1 + len(_stores)))  # bounds memory for many sources
        _stores[path] = open_store(path, kept=max(kept, of_source))
    return _stores[path]
