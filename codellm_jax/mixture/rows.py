"""The cache of tokenized rows: written once from a SeqIO task, read by number ever after.

A row is `length` + 1 consecutive tokens of one source: `length` inputs and, shifted by one, as many targets. Documents
end with the end-of-document token and are joined in the task's own order; what is left after the last full row is
not trained on, and is recorded. One cache holds one split of one task under one vocabulary and length:

  CACHE_DIR/rows/<task>/<key>/<split>/   zarr3 of uint16 or uint32 [rows, length + 1], with checksums
  CACHE_DIR/rows/<task>/<key>/cache.json what it holds; written last, so a cache with this file is whole

SeqIO and TensorFlow are imported only to write: reading a cache needs neither.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import tensorstore
from etils import epath

from codellm_jax.vocabulary import Vocabulary

ROWS_VERSION = 1
SPLITS = ("train", "validation", "test")
# A shard is one file; a chunk is what one random read fetches: 16 rows measured as fast as single rows, in fewer
# index entries.
ROWS_A_SHARD = 4096
ROWS_A_CHUNK = 16


class Definitions(Protocol):
    """Where task names come from. `tasks.Definitions` is one."""

    @property
    def corpora(self) -> Mapping[str, Mapping[str, Any]]:
        """Specs of corpora by task name; `rate` in one is its weight within its pool."""
        ...

    def describe(self, name: str) -> Mapping[str, Any]:
        """What identifies the content of a task, as JSON, found without reading it."""
        ...

    def register(self) -> None:
        """Makes the tasks known to SeqIO."""
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split of one source, read by row number."""

    name: str
    split: str
    path: str
    count: int
    length: int  # inputs of a row; a row has one token more
    tokens: int  # of all documents, their end tokens included
    documents: int
    content_hash: str  # of the rows, in order

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64 [N], in any order, repeats allowed) as int32 [N, length + 1].

        Raises:
          ValueError: what lies there is not what was written.
        """
        # Through unique sorted numbers, so that a chunk is fetched once.
        unique, inverse = np.unique(numbers, return_inverse=True)
        try:
            return _open_store(self.path)[unique].read().result()[inverse].astype(np.int32)
        except Exception as error:
            raise _damaged(self.path, error) from error


def cached_rows(
    task: str, definitions: Definitions, vocabulary: Vocabulary, length: int, cache_dir: str,
    report: Callable[[str], None] = print,
) -> dict[str, Rows]:
    """The rows of each split of a SeqIO task, from the cache or written to it now.

    Args:
      task: name of a registered SeqIO task with a feature `targets`.
      definitions: describes the task and, only where rows are to be written, registers it.
      vocabulary: replaces the task's own.
      length: inputs of a row.
      cache_dir: local directory or gs:// address.
      report: called with a line of progress now and then.

    Raises:
      ValueError: no such task, or its training split does not fill one row.
    """
    key = {
        "version": ROWS_VERSION, "task": task, "definition": definitions.describe(task), "length": length,
        "vocabulary": vocabulary.content_hash, "end_of_document_id": vocabulary.end_of_document_id,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    directory = epath.Path(cache_dir).expanduser() / "rows" / task / digest
    if not (directory / "cache.json").exists():
        _write_cache(task, definitions, vocabulary, length, directory, key, report)
    try:
        recorded = json.loads((directory / "cache.json").read_text())["splits"]
        return {split: Rows(name=task, split=split, path=str(directory / split), length=length, **facts)
                for split, facts in recorded.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(str(directory / "cache.json"), error) from error


def _write_cache(
    task: str, definitions: Definitions, vocabulary: Vocabulary, length: int, directory: epath.Path,
    key: Mapping[str, Any], report: Callable[[str], None],
) -> None:
    """Writes all splits beside `directory` and moves them there when whole; on gs:// straight into it."""
    remote = "://" in str(directory)
    mine = f".{directory.name}.{platform.node()}."
    building = directory if remote else directory.parent / f"{mine}{os.getpid()}.{uuid.uuid4().hex[:8]}"
    if not remote:
        for left in directory.parent.glob(f"{mine}*"):  # by a process of this machine that was killed
            if not _is_alive(int(left.name.removeprefix(mine).split(".")[0])):
                shutil.rmtree(left, ignore_errors=True)
    try:
        building.mkdir(parents=True, exist_ok=True)
        splits = {}
        for split, documents in _tokenized_splits(task, definitions, vocabulary).items():
            splits[split] = _write_split(task, split, documents, vocabulary, length, str(building / split), report)
        if not splits.get("train", {}).get("count"):
            tokens = splits.get("train", {}).get("tokens", 0)
            raise ValueError(
                f"{task}: its training split has {tokens} tokens, fewer than the {length + 1} of one row; "
                "give it more data or lower TASK_FEATURE_LENGTHS.")
        (building / "cache.json").write_text(json.dumps({"key": dict(key), "splits": splits}, indent=2) + "\n")
        if not remote:
            try:
                os.rename(building, directory)
            except OSError:
                if not (directory / "cache.json").exists():  # else another process wrote the same cache first
                    raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno or "No space left on device" in str(error):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "No space left on device"
            raise OSError(
                f"Rows cannot be cached in {directory.parent}: {reason}. Mend it or set CACHE_DIR.") from error
        raise
    finally:
        if not remote:
            shutil.rmtree(building, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tokenized_splits(
    task: str, definitions: Definitions, vocabulary: Vocabulary
) -> dict[str, Callable[[], Iterator[np.ndarray]]]:
    """For each split of the task, its documents as int arrays, each with one end-of-document token."""
    with quiet_tensorflow():
        import seqio

        definitions.register()
    require_registered(task)
    original = seqio.TaskRegistry.get(task)
    own_vocabulary = seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=0)

    def documents(split: str) -> Iterator[np.ndarray]:
        with quiet_tensorflow():
            for tokens in task_tokens(original, split, own_vocabulary):
                if len(tokens) and tokens[-1] == own_vocabulary.eos_id:
                    tokens = tokens[:-1]
                if len(tokens):
                    yield np.append(tokens, vocabulary.end_of_document_id)

    return {split: functools.partial(documents, split) for split in SPLITS if split in original.splits}


def task_tokens(task: Any, split: str, vocabulary: Any) -> Iterator[np.ndarray]:
    """The `targets` of a SeqIO task, tokenized with a SeqIO vocabulary in the place of the task's own."""
    feature = dataclasses.replace(task.output_features["targets"], vocabulary=vocabulary)
    swapped = task.replace(output_features={**task.output_features, "targets": feature})
    import tensorflow as tf

    try:
        for example in swapped.get_dataset(sequence_length=None, split=split, shuffle=False).as_numpy_iterator():
            yield example["targets"]
    except tf.errors.OpError as error:
        # TensorFlow wraps what a reader raised into a page of its own; the reader's line is what helps.
        own = re.findall(r"^.*?\b(?:\w+Error): (.+)$", error.message, flags=re.MULTILINE)
        raise ValueError(own[-1] if own else f"{task.name}: {error.message.splitlines()[0]}") from error


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keeps TensorFlow off accelerators, and its C++ log off the terminal; what Python writes to stderr still shows."""
    if getattr(sys.stderr, "name", None) == "<stderr>" and sys.stderr.fileno() == 2:
        # Python's own way to the terminal, kept for good: logging handlers made inside hold on to it, and those made
        # before are given it.
        before, sys.stderr = sys.stderr, os.fdopen(os.dup(2), "w", buffering=1)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
    saved = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _write_split(
    task: str, split: str, documents: Callable[[], Iterator[np.ndarray]], vocabulary: Vocabulary, length: int,
    path: str, report: Callable[[str], None],
) -> dict[str, Any]:
    """Cuts documents into rows and writes them shard by shard; returns the facts of `Rows`."""
    dtype = np.uint16 if vocabulary.size <= 2**16 else np.uint32
    store = _create_store(path, length + 1, np.dtype(dtype).name)
    content = hashlib.sha256()
    waiting: list[np.ndarray] = []  # documents not yet written, the rest of the last block first
    waiting_tokens = 0
    count = tokens = number = 0
    start = last_report = time.monotonic()

    def flush(rows: int) -> None:
        nonlocal store, waiting, waiting_tokens, count
        joined = np.concatenate(waiting) if waiting else np.zeros(0, dtype)
        block = joined[: rows * (length + 1)].reshape(rows, length + 1)
        if rows:
            store = store.resize(exclusive_max=[count + rows, length + 1]).result()
            store[count : count + rows].write(block).result()
            content.update(block.astype("<u4").tobytes())
        waiting, waiting_tokens = [joined[rows * (length + 1) :]], len(joined) - rows * (length + 1)
        count += rows

    for document in documents():
        if not number:  # the first comes once libraries are imported, which is not the tokenizer's time
            start = last_report = time.monotonic()
        waiting.append(document.astype(dtype))
        waiting_tokens += len(document)
        tokens += len(document)
        number += 1
        while waiting_tokens >= ROWS_A_SHARD * (length + 1):
            flush(ROWS_A_SHARD)
        if time.monotonic() - last_report > 5:
            last_report = time.monotonic()
            report(f"tokenizing {task} {split}: {tokens / 1e6:.1f}M tokens, {tokens / (last_report - start):,.0f}/s")
    while waiting_tokens >= length + 1:
        flush(min(ROWS_A_SHARD, waiting_tokens // (length + 1)))
    if tokens:
        report(f"tokenized {task} {split}: {number:,} documents, {tokens:,} tokens, {count:,} rows of {length}; "
               f"{tokens - count * (length + 1):,} tokens after the last full row are left out")
    return {"count": count, "tokens": tokens, "documents": number, "content_hash": content.hexdigest()}


def _damaged(path: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return ValueError(f"The cached rows in {path} are damaged ({reason}): delete {path.rsplit('/', 1)[0]} and give the "
                      "same command again; it writes the same rows anew.")


def require_registered(name: str) -> None:
    """Raises ValueError with the nearest names where SeqIO knows neither a task nor a mixture of this name."""
    import seqio

    known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)[:8]
        raise ValueError(
            f"No SeqIO task or mixture is named {name!r}; nearest: {', '.join(near)}. "
            "Modules that register others are listed in TASK_MODULES.")


def _kvstore(path: str) -> str | dict[str, str]:
    return path if "://" in path else {"driver": "file", "path": path}


def _create_store(path: str, width: int, data_type: str) -> tensorstore.TensorStore:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [ROWS_A_CHUNK, width],
        "codecs": [little_endian, {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
    }
    return tensorstore.open({
        "driver": "zarr3", "kvstore": _kvstore(path), "create": True, "delete_existing": True,
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [0, width], "data_type": data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS_A_SHARD, width]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }).result()


_stores: dict[str, tensorstore.TensorStore] = {}


def _open_store(path: str) -> tensorstore.TensorStore:
    """Opened once a process: opening costs far more than reading a batch."""
    if path not in _stores:
        _stores[path] = tensorstore.open(
            # A shard that is gone is an error, not rows of zeros.
            {"driver": "zarr3", "kvstore": _kvstore(path), "fill_missing_data_reads": False}, read=True,
            context=tensorstore.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})).result()
    return _stores[path]
