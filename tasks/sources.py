"""Where the documents of pre-training come from: users' files, and what every Python holds.

A corpus is described by a *spec*, a mapping with exactly one kind key and that kind's options:

  {"python": "text"}                       prose of the running Python's standard library; or "code"
  {"json_lines": PATTERN, "field": "content", "licenses": ["mit"]}    plain, .gz or .zst
  {"text_files": PATTERN}                  one document a file
  {"tfrecords": PATTERN, "field": "text"}  tf.train.Example
  {"tfds": "name:1.0.0", "field": "text"}  TensorFlow Datasets; its split "train"
  {"task": "name"}                         another SeqIO task, under this corpus's name

PATTERN is a glob or a list of globs, local (`~` and `**` work; relative ones start at the current
directory) or gs://. Where documents come from files or TFDS, a stable hash of each text puts a
hundredth of them into "validation" and a hundredth into "test"; `holdout` sets another fraction.
`validation`, a pattern (for TFDS a split) of its own, leaves the main one wholly to "train". `rate`
is the corpus's weight within its pool and does not change what is read.

Nothing is lost silently: what cannot be read is counted, and reported in one warning a reading.
Importing this module imports neither TensorFlow nor SeqIO.
"""

import collections
import difflib
import glob
import gzip
import hashlib
import json
import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from tasks.standard_library import python_documents

SPLITS = ("train", "validation", "test")
FILE_KINDS = ("json_lines", "text_files", "tfrecords")
DEFAULT_HOLDOUT = 0.01

# Part of every cache key; raise it whenever the same files would give other documents.
READER_VERSION = 1

_SHARED_OPTIONS = ("validation", "holdout", "rate")
_OPTIONS = {
    "python": ("rate",),
    "json_lines": ("field", "licenses", *_SHARED_OPTIONS),
    "text_files": _SHARED_OPTIONS,
    "tfrecords": ("field", *_SHARED_OPTIONS),
    "tfds": ("field", *_SHARED_OPTIONS),
    "task": ("rate",),
}


# ---- Specs -------------------------------------------------------------------------------------


def kind_of(spec: Mapping[str, Any]) -> str:
    """The kind of a valid spec, such as "json_lines"."""
    return next(key for key in spec if key in _OPTIONS)


def splits(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that a valid spec has; for the kind "task" they are the other task's, here ()."""
    kind = kind_of(spec)
    if kind == "task":
        return ()
    if "validation" in spec:
        return ("train", "validation")
    return SPLITS if kind == "python" or spec.get("holdout", DEFAULT_HOLDOUT) else ("train",)


def validate(spec: Mapping[str, Any], name: str = "corpus") -> None:
    """Checks a spec's form; reads nothing.

    Raises:
      ValueError: one line that names the corpus, what is wrong with it, and what is allowed.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"{name}: a corpus is a mapping such as {{'text_files': '~/*.txt'}}, found {spec!r}."
        )
    kinds = [key for key in spec if key in _OPTIONS]
    if len(kinds) != 1:
        found = f"{len(kinds)} ({', '.join(kinds)})" if kinds else "none"
        hint = "".join(_nearest(str(key), _OPTIONS) for key in spec)
        raise ValueError(
            f"{name}: give exactly one kind of {', '.join(_OPTIONS)}; found {found}.{hint}"
        )
    kind = kinds[0]
    for key in spec:
        if key != kind and key not in _OPTIONS[kind]:
            allowed = ", ".join(_OPTIONS[kind])
            hint = _nearest(str(key), _OPTIONS[kind])
            raise ValueError(f"{name}: unknown option {key!r} of {kind}; it has {allowed}.{hint}")
    for key, value in spec.items():
        is_good, wanted = _wanted(kind, key)
        if not is_good(value):
            raise ValueError(f"{name}: {key!r} must be {wanted}, found {value!r}.")
    if "validation" in spec and "holdout" in spec:
        raise ValueError(f"{name}: 'validation' leaves nothing to hold out; drop it or 'holdout'.")


def _wanted(kind: str, key: str) -> tuple[Callable[[Any], bool], str]:
    """A test of an option's value, and what to call a good one."""
    checks = {
        "python": (lambda v: v in ("text", "code"), "'text' or 'code'"),
        "tfds": (
            lambda v: _is_text(v) and re.fullmatch(r"[^:]+:[\d.]+", v) is not None,
            "a name with its version, such as 'wikipedia/20230601.en:1.0.0'",
        ),
        "task": (_is_text, "the name of a SeqIO task"),
        "field": (_is_text, "the name of a field"),
        "licenses": (lambda v: not isinstance(v, str) and _is_pattern(v), "a list of licences"),
        "rate": (lambda v: _is_number(v) and 0 < v < math.inf, "a positive number"),
        "holdout": (lambda v: _is_number(v) and 0 <= v < 0.5, "a number in [0, 0.5)"),
    }
    if kind == "tfds" and key == "validation":
        return _is_text, "the name of a split, such as 'test' or 'train[99%:]'"
    return checks.get(key, (_is_pattern, "a glob or a list of globs"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_text, value))
    return _is_text(value)


def _nearest(word: str, words: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def describe(spec: Mapping[str, Any], name: str = "corpus") -> dict[str, Any]:
    """What identifies a corpus's content, found without reading it; JSON-able, for cache keys.

    Files are identified by path and size: an edit that keeps a file's size goes unnoticed. A rate
    is no part of it, as it does not change the documents. Of a task it holds the name alone.

    Raises:
      ValueError: the spec is malformed.
      FileNotFoundError: a pattern matches no file.
    """
    validate(spec, name)
    kind = kind_of(spec)
    options = {key: spec[key] for key in sorted(spec) if key != "rate"}
    if kind in FILE_KINDS or kind == "tfds":
        options.setdefault("holdout", 0 if "validation" in spec else DEFAULT_HOLDOUT)
        if kind != "text_files":
            options.setdefault("field", "text")
    description = {
        "kind": kind,
        "options": json.loads(json.dumps(options, sort_keys=True)),
        "reader": READER_VERSION,
    }
    if kind == "python":
        # Two builds of one version can hold different files.
        description |= {"python": sys.version, "prefix": sys.base_prefix}
    if kind in FILE_KINDS:
        for split in ("train", "validation") if "validation" in spec else ("train",):
            description[f"{split}_files"] = [
                [file, _size(file)] for file in files(spec, split, name)
            ]
    return description


# ---- Reading -----------------------------------------------------------------------------------


class _Lost(NamedTuple):
    """What a reader yields in place of a document that it cannot give."""

    reason: str


def documents(
    spec: Mapping[str, Any],
    split: str,
    name: str = "corpus",
    only_files: Sequence[str] | None = None,
) -> Iterator[str]:
    """Reads a corpus's documents, in the order of its sorted files.

    Args:
      spec: as the module describes; not of the kind "task", which SeqIO reads.
      split: one of `splits(spec)`.
      name: what to call the corpus in messages.
      only_files: for kinds of files, read these of `files(spec, split)` alone: one shard of many.

    Raises:
      ValueError: the spec is malformed, has no such split, or its files hold no document at all.
      FileNotFoundError: a pattern matches no file.
    """
    validate(spec, name)
    kind = kind_of(spec)
    if kind == "task":
        raise ValueError(
            f"{name}: the documents of the task {spec['task']!r} are read through SeqIO."
        )
    if split not in splits(spec):
        raise ValueError(f"{name}: there is no split {split!r}, only {', '.join(splits(spec))}.")
    if kind == "python":
        return python_documents(spec["python"], split)
    if kind == "tfds":
        return _usable(_tfds_records(spec, split), spec, split, name)
    chosen = files(spec, split, name)
    if only_files is not None:
        if strangers := sorted(set(only_files) - set(chosen)):
            raise ValueError(f"{name}: {strangers[0]} is none of the files of its split {split!r}.")
        chosen = list(only_files)
    return _usable(_file_records(kind, spec, chosen), spec, split, name, whole=only_files is None)


def files(spec: Mapping[str, Any], split: str, name: str = "corpus") -> list[str]:
    """The files that a split of a corpus is read from, sorted; absolute paths, or gs:// ones.

    Without a `validation` pattern all splits are read from the same files.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ValueError: a file is matched both by the main pattern and by `validation`.
    """
    main = _matches(spec[kind_of(spec)], name)
    if "validation" not in spec:
        return main
    held_out = _matches(spec["validation"], name)
    if both := sorted(set(main) & set(held_out)):
        raise ValueError(f"{name}: {both[0]} would be in train and validation; narrow a pattern.")
    return held_out if split == "validation" else main


def _usable(
    records: Iterator[str | bytes | _Lost],
    spec: Mapping[str, Any],
    split: str,
    name: str,
    whole: bool = True,
) -> Iterator[str]:
    """The records that are documents of the split; reports the others when reading ends."""
    holdout = 0 if "validation" in spec else spec.get("holdout", DEFAULT_HOLDOUT)
    lost: collections.Counter[str] = collections.Counter()
    kept = 0
    try:
        for record in records:
            if isinstance(record, _Lost):
                lost[record.reason] += 1
                continue
            try:
                content = record.encode() if isinstance(record, str) else record
                text = content.decode()
            except UnicodeError:
                lost["not valid UTF-8"] += 1
                continue
            if not text.strip():
                lost["empty"] += 1
                continue
            kept += 1
            if not holdout or _split_of(content, holdout) == split:
                yield text
    finally:
        if lost:
            logging.warning(
                "%s, read for %s: %d records are documents, passed over: %s.",
                name,
                split,
                kept,
                _counts(lost),
            )
    if whole and not kept:
        source = spec[kind_of(spec)]
        raise ValueError(f"{name}: no document is left of {source!r} ({_counts(lost)}).")


def _counts(lost: collections.Counter[str]) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items()))
    return told or "there are no records"


def _split_of(content: bytes, holdout: float) -> str:
    """The split of a text, by its hash: `holdout` each for validation and test."""
    position = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    return "validation" if position < holdout else "test" if position < 2 * holdout else "train"


def _file_records(
    kind: str, spec: Mapping[str, Any], chosen: Sequence[str]
) -> Iterator[str | bytes | _Lost]:
    readers = {"json_lines": _json_records, "text_files": _text_records, "tfrecords": _tf_records}
    for file in chosen:
        try:
            yield from readers[kind](file, spec)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield _Lost(f"broken rest of {os.path.basename(file)}")


def _json_records(file: str, spec: Mapping[str, Any]) -> Iterator[str | _Lost]:
    field = spec.get("field", "text")
    for line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            yield _Lost("broken JSON")
        elif "licenses" in spec and record.get("license") not in spec["licenses"]:
            yield _Lost("of other licences")
        elif not isinstance(record.get(field), str):
            yield _Lost(f"without text in field {field!r}")
        else:
            yield record[field]


def _text_records(file: str, spec: Mapping[str, Any]) -> Iterator[bytes]:
    yield b"".join(_lines(file))


def _tf_records(file: str, spec: Mapping[str, Any]) -> Iterator[bytes | _Lost]:
    import tensorflow as tf
    from google.protobuf import message

    field = spec.get("field", "text")
    compression = "GZIP" if file.endswith(".gz") else ""
    try:
        for content in tf.data.TFRecordDataset(file, compression).as_numpy_iterator():
            try:
                features = tf.train.Example.FromString(content).features.feature
            except message.DecodeError:
                yield _Lost("broken tf.train.Example")
                continue
            values = features[field].bytes_list.value if field in features else []
            yield values[0] if len(values) == 1 else _Lost(f"without text in field {field!r}")
    except tf.errors.DataLossError as error:
        raise EOFError(str(error)) from error


def _tfds_records(spec: Mapping[str, Any], split: str) -> Iterator[bytes | _Lost]:
    import tensorflow_datasets as tfds

    field = spec.get("field", "text")
    source = spec.get("validation", "train") if split == "validation" else "train"
    for record in tfds.as_numpy(tfds.load(spec["tfds"], split=source)):
        value = record.get(field)
        yield value if isinstance(value, bytes) else _Lost(f"without text in field {field!r}")


def _lines(file: str) -> Iterator[bytes]:
    """Lines of a plain, .gz or .zst file, with their line ends.

    Raises:
      EOFError, zlib.error or gzip.BadGzipFile: the file is broken or breaks off.
    """
    with _open(file) as raw:
        if file.endswith(".gz"):
            yield from gzip.open(raw)
        elif file.endswith(".zst"):
            yield from _lines_of_zstd(raw)
        else:
            yield from raw


def _lines_of_zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd stream; the library's own reader does not notice one that breaks off."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Reading .zst files needs zstandard: pip install zstandard."
        ) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, rest = None, b""
    while chunk := raw.read(1 << 20):
        while chunk:
            frame = frame or decompressor.decompressobj()
            try:
                rest += frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        *lines, rest = rest.split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest
    if frame is not None:
        raise EOFError("The zstd stream breaks off.")


def _matches(patterns: str | Sequence[str], name: str) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found: set[str] = set()
    for pattern in patterns:
        matches = _remote_matches(pattern) if "://" in pattern else _local_matches(pattern)
        if not matches:
            raise FileNotFoundError(
                f"{name}: no file matches {pattern!r} (seen from {os.getcwd()})."
            )
        found.update(matches)
    return sorted(found)


def _local_matches(pattern: str) -> list[str]:
    pattern = os.path.abspath(os.path.expanduser(pattern))
    # A file's own name may hold what a glob would read as a wildcard.
    candidates = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return [file for file in candidates if os.path.isfile(file)]


def _remote_matches(pattern: str) -> list[str]:
    from etils import epath

    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    root = epath.Path("/".join(parts[:fixed]))
    if fixed == len(parts):
        return [os.fspath(root)] if root.exists() else []
    return [os.fspath(file) for file in root.glob("/".join(parts[fixed:])) if not file.is_dir()]


def _open(file: str) -> BinaryIO:
    if "://" not in file:
        return open(file, "rb")
    from etils import epath

    return epath.Path(file).open("rb")


def _size(file: str) -> int:
    if "://" not in file:
        return os.path.getsize(file)
    from etils import epath

    return epath.Path(file).stat().length
