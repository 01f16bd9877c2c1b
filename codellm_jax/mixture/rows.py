"""The cache of tokenized rows: written once from a SeqIO task, read by number ever after.

In pre-training a row is `length` + 1 consecutive tokens of one source: `length` inputs and, shifted by one, as many
targets. Documents end with the end-of-document token and are joined in the task's own order; what is left after the
last full row is not trained on, and is recorded. In tuning a row is one example (`examples.py`). One cache holds one
split of one task under one vocabulary and length:

  CACHE_DIR/rows/<task>/<key>/<split>/   zarr3 of uint16 or uint32 [rows, width], with checksums
  CACHE_DIR/rows/<task>/<key>/cache.json what it holds; written last, so a cache with this file is whole

SeqIO and TensorFlow are imported only to write: reading a cache needs neither.
"""

import contextlib
import dataclasses
import difflib
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

from codellm_jax.mixture.examples import EXAMPLES_VERSION, WIDTH_BESIDE_TOKENS, Found, example_rows
from codellm_jax.vocabulary import Vocabulary

STAGES = ("pretraining", "tuning")
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
    tokens: int  # of all documents or examples, their end tokens included
    documents: int  # or examples, whether kept or left out
    content_hash: str  # of the rows, in order
    cut: int = 0  # examples longer than a row
    left_out: int = 0  # examples of which no target token would be left
    notes: tuple[str, ...] = ()  # what the task's reader warned of, such as records passed over

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of these numbers (int64 [N], in any order, repeats allowed) as int32 [N, width].

        The width is length + 1, and in tuning what `examples.py` adds.

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
    report: Callable[[str], None] = print, stage: str = "pretraining",
) -> dict[str, Rows]:
    """The rows of each split of a SeqIO task, from the cache or written to it now.

    Args:
      task: name of a registered SeqIO task with a feature `targets`, and for tuning `inputs`.
      definitions: describes the task and, only where rows are to be written, registers it.
      vocabulary: replaces the task's own.
      length: inputs of a row.
      cache_dir: local directory or gs:// address.
      report: called with a line of progress now and then.
      stage: "pretraining" joins documents and cuts them into rows; "tuning" makes each example a row.

    Raises:
      ValueError: no such task, or it is one of the other stage, or its training split does not fill one row.
    """
    key = {
        "version": ROWS_VERSION, "task": task, "definition": definitions.describe(task), "length": length,
        "vocabulary": vocabulary.content_hash, "end_of_document_id": vocabulary.end_of_document_id,
    } | ({"examples": EXAMPLES_VERSION} if stage == "tuning" else {})
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    directory = epath.Path(cache_dir).expanduser() / "rows" / task / digest
    if not (directory / "cache.json").exists():
        _write_cache(task, definitions, vocabulary, length, directory, key, report, stage)
    try:
        recorded = json.loads((directory / "cache.json").read_text())
        return {split: Rows(name=task, split=split, path=str(directory / f"{split}{recorded.get('suffix', '')}"),
                            length=length, **facts | {"notes": tuple(facts.get("notes", ()))})
                for split, facts in recorded["splits"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(str(directory / "cache.json"), error) from error


def _write_cache(
    task: str, definitions: Definitions, vocabulary: Vocabulary, length: int, directory: epath.Path,
    key: Mapping[str, Any], report: Callable[[str], None], stage: str,
) -> None:
    """Writes all splits beside `directory` and moves them there when whole. On gs:// nothing can be moved: they are
    written straight into it, under names that cache.json completes, so that of many hosts that do so at once none
    takes away what another reads.
    """
    remote = "://" in str(directory)
    mine = f".{directory.name}.{platform.node()}."
    own = uuid.uuid4().hex[:8]
    suffix = f".{own}" if remote else ""
    building = directory if remote else directory.parent / f"{mine}{os.getpid()}.{own}"
    if not remote:
        for left in directory.parent.glob(f"{mine}*"):  # by a process of this machine that was killed
            if not _is_alive(int(left.name.removeprefix(mine).split(".")[0])):
                shutil.rmtree(left, ignore_errors=True)
    try:
        building.mkdir(parents=True, exist_ok=True)
        splits = {}
        for split, examples in _tokenized_splits(task, definitions, vocabulary, stage).items():
            with _warnings_of(task) as notes:
                splits[split] = _write_split(
                    task, split, examples, vocabulary, length, str(building / f"{split}{suffix}"), report, stage)
            splits[split].notes = notes
        train = splits.get("train")
        if train is None or not train.count:
            train = train or Found()
            raise ValueError(f"{task}: " + (
                f"no example of its training split is left to train on: of {train.documents:,} none has a token of its "
                f"target within {length + 1} tokens; mend them or raise TASK_FEATURE_LENGTHS." if stage == "tuning" else
                f"its training split has {train.tokens} tokens, fewer than the {length + 1} of one row; give it more "
                "data or lower TASK_FEATURE_LENGTHS."))
        facts = {split: dataclasses.asdict(found) for split, found in splits.items()}
        cache = {"key": dict(key), "splits": facts, "suffix": suffix}
        (building / "cache.json").write_text(json.dumps(cache, indent=2) + "\n")
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


@contextlib.contextmanager
def _warnings_of(task: str) -> Iterator[list[str]]:
    """Collects what is warned of a task, in messages that begin with its name, in the place of the log."""
    notes: list[str] = []

    def is_of_another(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        of_task = message.startswith((f"{task},", f"{task}:"))
        if of_task and message not in notes:
            notes.append(message)
        return not of_task

    logging.getLogger().addFilter(is_of_another)
    try:
        yield notes
    finally:
        logging.getLogger().removeFilter(is_of_another)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _tokenized_splits(
    task: str, definitions: Definitions, vocabulary: Vocabulary, stage: str
) -> dict[str, Iterator[dict[str, np.ndarray]]]:
    """For each split of the task, its examples as int arrays by feature; targets end with the end token."""
    with quiet_tensorflow():
        import seqio

        definitions.register()
    require_registered(task)
    original = seqio.TaskRegistry.get(task)
    if ("inputs" in original.output_features) != (stage == "tuning"):
        raise ValueError(
            f"{task} is a task of documents, without inputs to answer: train on it with gin/mixed_pretrain.gin, or "
            "name instruction tasks in MIXTURE_OR_TASK_NAME." if stage == "tuning" else
            f"{task} is a task of instructions: train on it with gin/tune_mixed.gin, or name tasks of documents in "
            "MIXTURE_OR_TASK_NAME.")
    own_vocabulary = seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=0)

    def examples(split: str) -> Iterator[dict[str, np.ndarray]]:
        with quiet_tensorflow():
            for example in task_tokens(original, split, own_vocabulary):
                targets = example["targets"]
                if len(targets) and targets[-1] == own_vocabulary.eos_id:
                    targets = targets[:-1]
                if len(targets):
                    targets = np.append(targets, vocabulary.end_of_document_id)
                yield example | {"targets": targets}

    return {split: examples(split) for split in SPLITS if split in original.splits}


def task_tokens(task: Any, split: str, vocabulary: Any) -> Iterator[dict[str, np.ndarray]]:
    """The features of a SeqIO task's examples, tokenized with a SeqIO vocabulary in the place of the task's own."""
    swapped = task.replace(output_features={
        name: dataclasses.replace(feature, vocabulary=vocabulary) for name, feature in task.output_features.items()})
    import tensorflow as tf

    try:
        for example in swapped.get_dataset(sequence_length=None, split=split, shuffle=False).as_numpy_iterator():
            yield {name: example[name] for name in ("inputs", "targets") if name in task.output_features}
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
    task: str, split: str, examples: Iterator[dict[str, np.ndarray]], vocabulary: Vocabulary, length: int, path: str,
    report: Callable[[str], None], stage: str,
) -> Found:
    """Writes the rows of a split shard by shard."""
    tuning = stage == "tuning"
    width = length + 1 + (WIDTH_BESIDE_TOKENS if tuning else 0)
    dtype = np.uint16 if max(vocabulary.size, width) <= 2**16 else np.uint32
    # A row of tuning is mostly padding, which compresses to nothing; tokens would hardly compress at all.
    store = _create_store(path, width, np.dtype(dtype).name, compressed=tuning)
    content = hashlib.sha256()
    found = Found()
    start = last_report = time.monotonic()
    rows = example_rows(examples, length, found) if tuning else document_rows(examples, length, found)
    for block in rows:
        if not found.count:  # the first comes once libraries are imported, which is not the tokenizer's time
            start = last_report = time.monotonic()
        store = store.resize(exclusive_max=[found.count + len(block), width]).result()
        store[found.count : found.count + len(block)].write(block.astype(dtype)).result()
        content.update(block.astype("<u4").tobytes())
        found.count += len(block)
        if time.monotonic() - last_report > 5:
            last_report = time.monotonic()
            report(f"tokenizing {task} {split}: {found.tokens / 1e6:.1f}M tokens, "
                   f"{found.tokens / (last_report - start):,.0f}/s")
    if found.documents and tuning:
        report(f"tokenized {task} {split}: {found.documents:,} examples, {found.tokens:,} tokens; {found.cut:,} are "
               f"cut to {length + 1} tokens, {found.left_out:,} left out, as no token of their target is left")
    elif found.tokens:
        rest = found.tokens - found.count * (length + 1)
        report(f"tokenized {task} {split}: {found.documents:,} documents, {found.tokens:,} tokens, {found.count:,} "
               f"rows of {length}; {rest:,} tokens after the last full row are left out")
    found.content_hash = content.hexdigest()
    return found


def document_rows(examples: Iterator[dict[str, np.ndarray]], length: int, found: Found) -> Iterator[np.ndarray]:
    """Joins the targets of `examples` and cuts them into blocks of rows, int32 [rows, length + 1]."""
    width = length + 1
    waiting: list[np.ndarray] = []  # documents not yet cut, the rest of the last block first
    tokens = 0  # in them

    def cut(rows: int) -> np.ndarray:
        nonlocal waiting, tokens
        joined = np.concatenate(waiting)
        waiting, tokens = [joined[rows * width :]], len(joined) - rows * width
        return joined[: rows * width].reshape(rows, width)

    for example in examples:
        document = example["targets"]
        found.documents += bool(len(document))
        found.tokens += len(document)
        tokens += len(document)
        waiting.append(document)
        while tokens >= ROWS_A_SHARD * width:
            yield cut(ROWS_A_SHARD)
    while tokens >= width:
        yield cut(min(ROWS_A_SHARD, tokens // width))


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


def _create_store(path: str, width: int, data_type: str, compressed: bool = False) -> tensorstore.TensorStore:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    compression = [{"name": "zstd", "configuration": {"level": 1}}] if compressed else []
    sharding = {
        "chunk_shape": [ROWS_A_CHUNK, width],
        "codecs": [little_endian, *compression, {"name": "crc32c"}],
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
