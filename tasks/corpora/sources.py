"""Sources of pre-training documents: users' files, and the standard library of every Python.

A *spec* describes a corpus: a mapping with exactly one kind key and that kind's options
(`instruction_sets.instructions` describes instructions, which may be mixed with documents):

  {"python": "text"}                       prose of the running Python's standard library; or "code"
  {"json_lines": PATTERN, "field": "content", "licenses": ["mit"]}    JSON lines, or a list
  {"parquet": PATTERN, "field": "text"}    a document per row; only the requested columns are read
  {"arrow": PATTERN, "field": "text"}      Arrow's files and streams, and folders of `save_to_disk`
  {"csv": PATTERN, "field": "text"}        CSV and TSV; `separator`, `columns` and `quotes` are in `separated`
  {"webdataset": PATTERN, "field": "txt"}  tars; the field is a member, or a field of a JSON member; `archives`
  {"warc": PATTERN}                        describes this kind and the next two
  {"array_record": PATTERN, "field": "text"}
  {"megatron": PATTERN, "vocabulary": V}   tokenized documents; `token_arrays` describes these two
  {"tokens": PATTERN, "vocabulary": V}
  {"text_files": PATTERN}                  one document per file
  {"tfrecords": PATTERN, "field": "text"}  tf.train.Example, plain or compressed by gzip
  {"notebooks": PATTERN}                   Jupyter's, one document per file; `adjacent` has the form of these three
  {"commits": PATTERN}                     JSON records of {before, after, message}
  {"threads": PATTERN}                     JSON records of {question, answers}
  {"tfds": "name:1.0.0", "field": "text"}  TensorFlow Datasets; its split "train"
  {"task": "name"}                         another SeqIO task, under this corpus's name

PATTERN is a glob or a list of globs: local (with `~` and `**`, relative to the current directory), gs://, or
hf://datasets/ORG/NAME[@REVISION]/... on Hugging Face's hub. Each file is read once, even if several links lead to it.
Compression and encoding are detected from its content (`codellm_jax.contents`); a file of another type is refused by
name. For documents from files or TFDS, a stable hash of each text assigns one percent to "validation" and one percent
to "test"; `holdout` sets another fraction. For a small corpus these are the texts with the lowest hashes, at least one
each (`specs.borders_of`). `validation`, a separate pattern (for TFDS a split), leaves all of the main one to "train".
`rate` is the corpus's weight within its pool and does not change which documents are read.

For records, `field` names the text, also nested, as in "meta.text"; `text` joins several fields, and `where` selects
records; `fields` describes both:

  {"parquet": PATTERN, "text": "{title}: {meta.body}", "where": {"language": ["en"], "score": {"at_least": 3}}}

`sample` is the fraction of the documents of any kind to read, chosen by a hash of the text that is independent of that
of splits: a larger sample contains a smaller one, and equal texts are sampled together.

`transform` changes the documents of any kind but "task": a list of names, described in `transforms`, applied in turn:

  "transform": ["strip_comments", {"name": "shuffle_lines", "seed": 1}]

A document's split is that of its original text, so that corpora that differ only in transforms hold out the same
documents. Transforms of code use the option `language`; without it the record's field "language", the file's suffix,
or the notebook's language, and Python for the standard library. Documents that do not parse are left out;
"unparsed": "keep" keeps them untransformed. Both are counted, as are documents that a transform leaves empty, which
are always left out.

Nothing is lost silently: unreadable records are counted and reported in one warning per reading, with the place of the
first of each kind. Importing this module imports neither TensorFlow nor SeqIO.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from codellm_jax.contents import (
    BrokenFile,
    UnreadableFile,
    compression,
    head,
    kind,
    require_text,
    size,
    without_compression,
)
from tasks.corpora import adjacent, fields, transforms
from tasks.corpora.archives import (
    array_records,
    example_record,
    require_array_record,
    require_tar,
    require_warc,
    warc_records,
    webdataset_records,
)
from tasks.corpora.columns import arrow_records, dataset_files, parquet_records, require_arrow, require_parquet
from tasks.corpora.files import Found, Lost, PassedOver, glance, in_name_of, matches, real, require_readable
from tasks.corpora.prepared import prepared
from tasks.corpora.records import EMPTY_FILE, broken_rest, placed_records, require_json, whole
from tasks.corpora.separated import separated_records
from tasks.corpora.specs import (
    DEFAULT_HOLDOUT,
    DOCUMENT_FILE_KINDS,
    DOCUMENT_KINDS,
    OF_USE,
    TEXT_FIELDS,
    TOKEN_KINDS,
    Borders,
    borders_of,
    holdout_of,
    is_sampled,
    kind_of,
    position,
    split_of,
    splits,
    validate,
)
from tasks.corpora.standard_library import python_corpus, python_documents

# Part of every cache key; increase it whenever the same files give different documents.
READER_VERSION = 3


def describe(spec: Mapping[str, Any], name: str = "corpus") -> dict[str, Any]:
    """Identifies a corpus's content without reading it; JSON-able, for cache keys.

    Files are identified by path and size: an edit that keeps a file's size goes unnoticed. `rate` and `loss` are left
    out, since they do not change the documents. A task is identified only by its name; files written by `t5x prepare`
    also by the result of `prepared`.

    Raises:
      ValueError: the spec is malformed, or a pattern names folders.
      OSError: a pattern matches no file, or a broken link.
    """
    validate(spec, name)
    kind = kind_of(spec)
    options = {key: spec[key] for key in sorted(spec) if key not in OF_USE}
    if kind in DOCUMENT_FILE_KINDS or kind == "tfds":
        options.setdefault("holdout", 0 if "validation" in spec else DEFAULT_HOLDOUT)
        if kind in TEXT_FIELDS and "text" not in spec:
            options.setdefault("field", TEXT_FIELDS[kind])
    if "transform" in spec:
        options |= {"transform": transforms.steps_of(spec["transform"]), "unparsed": spec.get("unparsed", "drop")}
    description = {"kind": kind, "options": json.loads(json.dumps(options, sort_keys=True)), "reader": READER_VERSION}
    if kind == "python":
        # Two builds of one version can hold different files.
        description |= {"python": sys.version, "prefix": sys.base_prefix}
    if "transform" in spec:
        description["transforms"] = transforms.TRANSFORMS_VERSION
        if any(step.reads_code for step in transforms.steps_of(spec["transform"])):
            description["grammars"] = transforms.grammars("python" if kind == "python" else spec.get("language"))
    if kind in DOCUMENT_FILE_KINDS:
        for split in ("train", "validation") if "validation" in spec else ("train",):
            description[f"{split}_files"] = [[file, size(file)] for file in files(spec, split, name)]
        if found := prepared(file for file, _ in description["train_files"]):
            description["prepared"] = found
    if kind in TOKEN_KINDS:  # such files keep their size when rewritten with another vocabulary of the same width
        description["contents"] = [
            glance(file) for split in ("train", "validation") for file, _ in description.get(f"{split}_files", ())]
    return description


def documents(
    spec: Mapping[str, Any],
    split: str,
    name: str = "corpus",
    only_files: Sequence[str] | None = None,
    borders: Borders | None = None,
) -> Iterator[str]:
    """Reads a corpus's documents, in the order of its sorted files.

    Args:
      spec: a spec as described above, except of the kind "task", which SeqIO reads.
      split: one of `splits(spec)`.
      name: the corpus's name in messages.
      only_files: for kinds of files, the shard of `files(spec, split)` to read, which may hold no document. Membership
        is not checked: listing many files again for each shard would take longer than reading it.
      borders: the result of `find_borders`, if known; else the first documents are read for it.

    Raises:
      ValueError: the spec is malformed, has no such split, a file is not of its kind, or they hold no document at all.
      OSError: a pattern matches no file, or a file cannot be read.
    """
    validate(spec, name)
    kind = kind_of(spec)
    if kind == "task":
        raise ValueError(f"{name}: the documents of the task {spec['task']!r} are read through SeqIO.")
    if kind not in DOCUMENT_KINDS:
        raise ValueError(f"{name}: {kind!r} holds instructions, which `instruction_sets.instructions` reads.")
    if split not in splits(spec):
        raise ValueError(f"{name}: there is no split {split!r}, only {', '.join(splits(spec))}.")
    if kind in TOKEN_KINDS:
        raise ValueError(f"{name}: {kind!r} holds tokens, which `token_arrays.documents` reads.")
    whole = only_files is None

    def find() -> Borders | None:
        return borders or find_borders(spec, name)

    if kind == "python":
        if "transform" not in spec and "sample" not in spec:
            return python_documents(spec["python"], split)
        held = (Found(each.name, each.text, "python") for each in python_corpus(spec["python"])
                if each.split == split and is_sampled(each.text.encode(), spec))
        if "transform" not in spec:
            return (str(document.content) for document in held)
        return _transformed(held, spec, split, name, whole)
    if kind == "tfds":
        found = usable(tfds_records(spec, split), spec, split, name, find)
    else:
        chosen = files(spec, split, name) if only_files is None else only_files
        _require_languages(kind, spec, chosen, name)
        found = usable(file_records(kind, spec, chosen, name), spec, split, name, find, whole)
    if "transform" in spec:
        return _transformed(found, spec, split, name, whole)
    return (str(document.content) for document in found)


def find_borders(spec: Mapping[str, Any], name: str = "corpus") -> Borders | None:
    """The hash borders that divide the corpus of a valid spec into splits; None if it is not divided by hash.

    Reads as many documents as needed, by default 2,000. Errors are those of `documents`.
    """
    holdout, kind = holdout_of(spec), kind_of(spec)
    if not holdout:
        return None
    records = tfds_records(spec, "train") if kind == "tfds" else file_records(
        kind, spec, files(spec, "train", name), name)
    return borders_of((position(content) for content, _ in texts(records, spec, PassedOver())), holdout)


def files(spec: Mapping[str, Any], split: str, name: str = "corpus") -> list[str]:
    """The files of a split of a corpus, sorted; absolute paths, or gs:// ones.

    Without a `validation` pattern all splits are read from the same files.

    Raises:
      OSError: a pattern matches no file, or a broken link.
      ValueError: a pattern names folders, or a file is matched both by the main pattern and by `validation`.
    """
    def found(patterns: str | Sequence[str]) -> list[str]:
        return matches(patterns, name, dataset_files) if kind_of(spec) == "arrow" else matches(patterns, name)

    main = found(spec[kind_of(spec)])
    if "validation" not in spec:
        return main
    held_out = found(spec["validation"])
    if both := sorted({*map(real, main)} & {*map(real, held_out)}):
        raise ValueError(f"{name}: {both[0]} would be in train and validation; narrow a pattern.")
    return held_out if split == "validation" else main


def usable(
    records: Iterator[Found], spec: Mapping[str, Any], split: str, name: str, find: Callable[[], Borders | None],
    whole: bool = True,
) -> Iterator[Found]:
    """Yields the documents of the split; at the end reports the other records, with places.

    Args:
      find: returns the borders of splits.
      whole: whether these are all records of the split, of which at least one must be a document.
    """
    borders = find()
    lost = PassedOver()
    kept = 0
    try:
        for content, document in texts(records, spec, lost):
            kept += 1
            if borders is None or split_of(content, borders) == split:
                yield document
    finally:
        if lost or not whole:  # also for a part without losses, so that parts add up to the whole
            logging.warning(
                "%s, read for %s: %d records are documents, skipped: %s.",
                name,
                split,
                kept,
                lost,
            )
    if whole and not kept:
        source = spec[kind_of(spec)]
        raise ValueError(f"{name}: no document is left of {source!r} ({lost}).")


def texts(records: Iterator[Found], spec: Mapping[str, Any], lost: PassedOver) -> Iterator[tuple[bytes, Found]]:
    """Yields the records that are documents, as bytes and as text; counts the others, with places."""
    for found in records:
        place, record = found.place, found.content
        if isinstance(record, Lost):
            lost.add(record.reason, place, record.records)
            continue
        try:
            content = record.encode() if isinstance(record, str) else record
            text = record if isinstance(record, str) else content.decode()
        except UnicodeError:
            lost.add("not valid UTF-8", place)
            continue
        if not text or text.isspace():
            lost.add("empty", place)
            continue
        if not is_sampled(content, spec):
            lost.add("outside the sample", place)
            continue
        yield content, found._replace(content=text)


def _require_languages(kind: str, spec: Mapping[str, Any], chosen: Sequence[str], name: str) -> None:
    """Raises if a transform needs the language of a file, and neither an option nor the suffix gives it."""
    steps = transforms.steps_of(spec.get("transform", ()))
    if kind != "text_files" or "language" in spec or not any(step.reads_code for step in steps):
        return
    untold = [file for file in chosen if transforms.language_of_file(without_compression(file)) is None]
    if untold:
        raise ValueError(f"{name}: {len(untold)} of {len(chosen)} files have a suffix that does not identify a "
                         f"language for the transforms; the first is {untold[0]}. Narrow the pattern, or give "
                         "'language', one "
                         f"of {', '.join(transforms.LANGUAGES)}.")


def _transformed(
    documents_of_split: Iterator[Found], spec: Mapping[str, Any], split: str, name: str, whole: bool
) -> Iterator[str]:
    """Yields the documents of a split after the transforms; reports those that failed, with places."""
    steps = transforms.steps_of(spec["transform"])
    reads_code = any(step.reads_code for step in steps)
    not_so, given, kept = PassedOver(), 0, 0
    try:
        for place, text, told, *_ in documents_of_split:
            language = spec.get("language")
            if reads_code and language is None:
                if told is None:
                    raise ValueError(f"{name}: {place} has no field 'language', which the transforms need; give the "
                                     f"corpus one of {', '.join(transforms.LANGUAGES)} as 'language'.")
                language = transforms.language_named(told)
            if reads_code and language and (missing := transforms.missing(language)):
                raise ValueError(f"{name}: {missing}")
            result = transforms.transformed(str(text), language, steps)
            if isinstance(result, Lost):
                is_kept = spec.get("unparsed") == "keep" and not result.reason.startswith(transforms.EMPTY)
                not_so.add(result.reason + ", kept as they were" * is_kept, place)
                if not is_kept:
                    continue
                result, kept = str(text), kept + 1
            given += 1
            yield result
    finally:
        if not_so or not whole:
            logging.warning("%s, read for %s: %d documents are transformed (%s), others not: %s.", name, split,
                            given - kept, ", ".join(step.name for step in steps), not_so)
    if whole and split == "train" and not given:
        raise ValueError(f"{name}: the transforms leave no document to train on ({not_so}).")


def file_records(kind: str, spec: Mapping[str, Any], chosen: Sequence[str], name: str) -> Iterator[Found]:
    """Yields the records of files with their places, such as "a.jsonl, line 3"."""
    read, require = _READERS[kind]
    with in_name_of(name):
        require_readable(chosen, require)
        for file in chosen:
            try:
                yield from read(file, spec)
            except BrokenFile:
                yield Found(file, broken_rest(file))


def _fields_of(read: Callable[..., Iterator[tuple[str, Any]]]) -> Callable[..., Iterator[Found]]:
    """Makes a reader of documents from a reader of records with their places."""
    def documents_of(file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
        default = TEXT_FIELDS[kind_of(spec)]
        return (fields.found(place, record, spec, default) for place, record in read(file, spec))

    return documents_of


def _text_records(file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    content = whole(file)
    yield Found(file, content) if isinstance(content, Lost) else Found(
        file, content, transforms.language_of_file(without_compression(file)))


def _notebooks(file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    content = whole(file)
    found = (content if isinstance(content, Lost) else adjacent.notebook(content) if content.strip() else
             Lost(EMPTY_FILE))
    yield Found(file, found) if isinstance(found, Lost) else Found(file, *found)


def _commits(file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    return _made_of(adjacent.commit, file, spec)


def _threads(file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    return _made_of(adjacent.thread, file, spec)


def _made_of(text: Callable[[Mapping[str, Any]], str | Lost], file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    for place, record in placed_records(file):
        if isinstance(record, Lost):
            yield Found(place, record)
        else:
            yield Found(place, fields.unlike(record, spec.get("where", {})) or text(record))


def _tf_records(file: str, spec: Mapping[str, Any]) -> Iterator[Found]:
    import tensorflow as tf

    by = _require_tfrecords(file)
    number = 0
    try:
        records = tf.data.TFRecordDataset(file, "GZIP" if by else "").as_numpy_iterator()
        for number, content in enumerate(records, 1):
            yield fields.found(f"{file}, record {number}", example_record(content), spec)
    except tf.errors.DataLossError as error:
        if not number:
            raise UnreadableFile(f"{file} is not a TFRecord file, or is damaged from its first record on.") from error
        raise BrokenFile(str(error)) from error
    if not number:
        yield Found(file, Lost(EMPTY_FILE))


def _require_tfrecords(file: str) -> str | None:
    """The compression of a TFRecord file; raises UnreadableFile if its first bytes belong to another type."""
    beginning = head(file)
    by = compression(beginning)
    # A record begins with its length, in 8 bytes.
    what = kind(beginning) or (not by and int.from_bytes(beginning[:8], "little") >= 1 << 40 and "not a TFRecord file")
    if what or by not in (None, "gzip"):
        raise UnreadableFile(f"{file} is {what or f'compressed by {by}'}; TFRecords are read, plain or compressed by "
                             "gzip.")
    return by


def tfds_records(spec: Mapping[str, Any], split: str) -> Iterator[Found]:
    import tensorflow_datasets as tfds

    source = spec.get("validation", "train") if split == "validation" else "train"
    for number, record in enumerate(tfds.as_numpy(tfds.load(spec["tfds"], split=source)), 1):
        yield fields.found(f"{spec['tfds']}, record {number}", record, spec)


# For each kind of files, a reader of documents, and a check that refuses files of another kind.
_READERS: dict[str, tuple[Callable[..., Iterator[Found]], Callable[[str], object]]] = {
    "json_lines": (_fields_of(lambda file, _: placed_records(file)), require_json),
    "parquet": (_fields_of(parquet_records), require_parquet),
    "arrow": (_fields_of(arrow_records), require_arrow),
    "csv": (_fields_of(separated_records), require_text),
    "webdataset": (_fields_of(webdataset_records), require_tar),
    "warc": (_fields_of(warc_records), require_warc),
    "array_record": (_fields_of(array_records), require_array_record),
    "text_files": (_text_records, require_text),
    "notebooks": (_notebooks, require_text),
    "commits": (_commits, require_json),
    "threads": (_threads, require_json),
    "tfrecords": (_tf_records, _require_tfrecords),
}
