"""Specs: the mappings that describe corpora, their kinds, options and splits. Reads nothing.

A spec has exactly one kind key and that kind's options. `corpora.sources` describes the kinds of documents,
`instruction_sets.instructions` the kinds of instructions.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tasks.corpora import fields, transforms

SPLITS = ("train", "validation", "test")
DEFAULT_HOLDOUT = 0.01
# A hash that holds out fewer texts than this on average might hold out none.
FEWEST_BY_HASH = 20
# Documents to read for each text that a small corpus may have; a corpus with more is large, even if texts repeat.
COPIES = 10

_SHARED_OPTIONS = ("validation", "holdout", "rate")
_TRANSFORM_OPTIONS = ("transform", "unparsed")
_TEXT_OPTIONS = (*_TRANSFORM_OPTIONS, "sample", *_SHARED_OPTIONS)
_CODE_OPTIONS = ("language", *_TEXT_OPTIONS)
_RECORD_OPTIONS = ("field", "text", "where", *_CODE_OPTIONS)
_DOCUMENT_OPTIONS = {
    "python": (*_TRANSFORM_OPTIONS, "sample", "rate"),
    "json_lines": ("licenses", *_RECORD_OPTIONS),
    "parquet": _RECORD_OPTIONS,
    "arrow": _RECORD_OPTIONS,
    "csv": ("separator", "columns", "quotes", *_RECORD_OPTIONS),
    "webdataset": _RECORD_OPTIONS,
    "warc": ("text", "where", *_TEXT_OPTIONS),
    "array_record": _RECORD_OPTIONS,
    "megatron": ("vocabulary", "end", "sample", *_SHARED_OPTIONS),
    "tokens": ("vocabulary", "dtype", "end", "sample", *_SHARED_OPTIONS),
    "text_files": _CODE_OPTIONS,
    "notebooks": _TEXT_OPTIONS,
    "commits": ("where", *_TEXT_OPTIONS),
    "threads": ("where", *_TEXT_OPTIONS),
    "tfrecords": _RECORD_OPTIONS,
    "tfds": _RECORD_OPTIONS,
}
TOKEN_KINDS = ("megatron", "tokens")
# The field of a record that holds its text, if the spec names none.
TEXT_FIELDS = {"json_lines": "text", "parquet": "text", "arrow": "text", "csv": "text", "webdataset": "txt",
               "warc": "text", "array_record": "text", "tfrecords": "text", "tfds": "text"}
_INSTRUCTION_OPTIONS = {
    "instructions": ("language", "where", "sample", "loss", *_SHARED_OPTIONS),
    "cosqa": ("sample", "loss", *_SHARED_OPTIONS),
    "mbpp": ("keep_sanitized", "loss", "rate"),
    "python_instructions": ("loss", "rate"),
    "official": ("data_dir", "loss", "rate"),
}
# The options of each kind.
OPTIONS: dict[str, tuple[str, ...]] = {**_DOCUMENT_OPTIONS, **_INSTRUCTION_OPTIONS, "task": ("loss", "rate")}
# One line about each kind of corpus.
DESCRIPTIONS: dict[str, str] = {
    "python": "The running Python's standard library: its prose (\"text\") or its source code (\"code\").",
    "json_lines": "JSON lines or JSON lists, a document per record.",
    "parquet": "Parquet, a document per row; only the needed columns are read.",
    "arrow": "Arrow files and streams, and folders of save_to_disk, a document per row.",
    "csv": "CSV and TSV, a document per row.",
    "webdataset": "WebDataset's tars, a document per sample.",
    "warc": "WARC and WET files of a crawl; HTML becomes text.",
    "array_record": "ArrayRecord files, a document per record.",
    "megatron": "Tokenized documents, Megatron's .bin and .idx.",
    "tokens": "Tokenized documents, a flat array or .npy.",
    "text_files": "Text files, a document per file.",
    "notebooks": "Jupyter notebooks, a document per file.",
    "commits": "JSON records of commits: before, after, message.",
    "threads": "JSON records of threads: question, answers.",
    "tfrecords": "TFRecord files of tf.train.Example, a document per record.",
    "tfds": "A data set of TensorFlow Datasets, a document per example.",
    "instructions": "JSON records of instructions {instruction, input, output}, {input, target}, or conversations.",
    "cosqa": "CosQA's training set: does this code answer this query?",
    "mbpp": "MBPP's problems: write the program.",
    "python_instructions": "Instructions made from the running Python's standard library, \"text\" or \"code\".",
    "official": "An instruction set found in DATA_DIR by its publisher's file name.",
    "task": "Another SeqIO task, under this corpus's name.",
}
OF_USE = ("loss", "rate")  # options that change how texts are used, not the texts
DOCUMENT_KINDS = tuple(_DOCUMENT_OPTIONS)
INSTRUCTION_KINDS = tuple(_INSTRUCTION_OPTIONS)
DOCUMENT_FILE_KINDS = tuple(kind for kind in _DOCUMENT_OPTIONS if kind not in ("python", "tfds"))
_KINDS_OF_FILES = (*DOCUMENT_FILE_KINDS, "instructions", "cosqa", "mbpp")

# Specs, without their files, of the corpora that `corpora.official` finds by their publishers' file names.
OFFICIAL: dict[str, dict[str, Any]] = {
    "text.alpaca_gpt4_en": {"instructions": ["alpaca_gpt4_data.json"], "language": "en"},
    "text.alpaca_gpt4_zh": {"instructions": ["alpaca_gpt4_data_zh.json"], "language": "zh"},
    # Either the merged file or its parts, which have the same content.
    "text.pclue": {"instructions": ["pCLUE_train.json", "pCLUE_train_*.json"], "sample": 200_000},
    "code.codealpaca": {"instructions": ["code_alpaca_20k.json"], "language": "en"},
    "code.cosqa": {"cosqa": ["cosqa-train.json"]},
    "code.mbpp": {"mbpp": ["mbpp.jsonl"]},
}


# For options with a specific message, explains an invalid value.
_WRONG = {"where": fields.wrong_where, "text": fields.wrong_template}


def kind_of(spec: Mapping[str, Any]) -> str:
    """The kind of a valid spec, such as "json_lines"."""
    return next(key for key in spec if key in OPTIONS)


def is_divisible(spec: Mapping[str, Any], split: str) -> bool:
    """Whether the files of a split of a valid spec can be read separately with the same result as in sequence."""
    spec = form_of(spec)
    kind = kind_of(spec)
    # Documents are sampled one by one, by hash; a sample of instructions is chosen from all.
    return kind in DOCUMENT_FILE_KINDS or (kind in _KINDS_OF_FILES and not ("sample" in spec and split == "train"))


def splits(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits of a valid spec; () for the kind "task", whose splits are those of the other task."""
    kind = kind_of(spec)
    if kind == "task":
        return ()
    if kind == "official":
        return splits(form_of(spec))
    if kind == "mbpp" or "validation" in spec:
        return ("train", "validation")
    whole = kind in ("python", "python_instructions")
    return SPLITS if whole or spec.get("holdout", DEFAULT_HOLDOUT) else ("train",)


def form_of(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The given valid spec; for the kind "official", the spec by which its files are read, without the files."""
    return OFFICIAL[spec["official"]] if kind_of(spec) == "official" else spec


def holdout_of(spec: Mapping[str, Any]) -> float:
    """The fraction of a valid spec's texts that a hash assigns to validation, and the same to test; 0 for none."""
    spec = form_of(spec)
    by_hash = "holdout" in OPTIONS[kind_of(spec)] and "validation" not in spec
    return spec.get("holdout", DEFAULT_HOLDOUT) if by_hash else 0


class Borders(NamedTuple):
    """Texts with `position` below the first border are validation, others below the second are test."""

    validation: float
    test: float


def position(content: bytes) -> float:
    """The hash of a text, a number in [0, 1]."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def is_sampled(content: bytes, spec: Mapping[str, Any]) -> bool:
    """Whether a text is in the sample of a spec of documents, by a part of its hash that `position` does not use.

    Thus equal texts are sampled together, a larger sample contains a smaller one, and all splits are sampled alike.
    """
    if "sample" not in spec:
        return True
    return int.from_bytes(hashlib.sha256(content).digest()[8:16], "big") < spec["sample"] * 2**64


def borders_of(positions: Iterable[float], holdout: float) -> Borders:
    """The borders that divide a corpus into splits, from the positions of its texts in any order.

    The fraction `holdout` of all hashes is validation, and the same fraction test. For a small corpus, where a hash
    would hold out fewer than 20 texts, it is instead this fraction of the texts, those with the lowest hashes, at least
    one each: of two texts one is validation, of a single text none. Equal texts count as one, and are in one split.

    Args:
      positions: the positions of all documents of the corpus; only as many as needed are read.
      holdout: in (0, 0.5).
    """
    enough = math.ceil(FEWEST_BY_HASH / holdout)
    found: set[float] = set()
    for number, each in enumerate(positions, 1):
        found.add(each)
        if len(found) >= enough or number >= COPIES * enough:
            return Borders(holdout, 2 * holdout)
    if len(found) < 2:
        return Borders(0.0, 0.0)
    ordered = sorted(found)
    held_out = min(max(1, round(len(found) * holdout)), max(1, (len(found) - 1) // 2))
    return Borders(ordered[held_out], ordered[min(2 * held_out, len(found) - 1)])


def split_of(content: bytes, borders: Borders) -> str:
    """The split of a text."""
    here = position(content)
    return "validation" if here < borders.validation else "test" if here < borders.test else "train"


def validate(spec: Mapping[str, Any], name: str = "corpus") -> None:
    """Checks a spec's form; reads nothing.

    Raises:
      ValueError: one line with the corpus's name, the fault, and the valid values.
    """
    if not isinstance(spec, Mapping):
        raise ValueError(f"{name}: a corpus is a mapping such as {{'text_files': '~/*.txt'}}, found {spec!r}.")
    kinds = [key for key in spec if key in OPTIONS]
    if len(kinds) != 1:
        found = f"{len(kinds)} ({', '.join(kinds)})" if kinds else "none"
        hint = "".join(_nearest(str(key), OPTIONS) for key in spec)
        raise ValueError(f"{name}: give exactly one kind of {', '.join(OPTIONS)}; found {found}.{hint}")
    kind = kinds[0]
    for key in spec:
        if key != kind and key not in OPTIONS[kind]:
            allowed = ", ".join(OPTIONS[kind])
            hint = _nearest(str(key), OPTIONS[kind])
            raise ValueError(f"{name}: unknown option {key!r} of {kind}; it has {allowed}.{hint}")
    for key, value in spec.items():
        if wrong := _WRONG[key](value) if key in _WRONG else None:
            raise ValueError(f"{name}: {key!r} {wrong}.")
        is_good, wanted = _wanted(kind, key)
        if not is_good(value):
            hint = _nearest(value, OFFICIAL) if key == "official" and isinstance(value, str) else ""
            raise ValueError(f"{name}: {key!r} must be {wanted}, found {value!r}.{hint}")
    if "validation" in spec and "holdout" in spec:
        raise ValueError(f"{name}: 'validation' leaves nothing to hold out; drop it or 'holdout'.")
    if "field" in spec and "text" in spec:
        raise ValueError(f"{name}: 'text' puts several fields together, 'field' names one; drop one of the two.")
    if wrong := _wrong_transform(kind, spec):
        raise ValueError(f"{name}: {wrong}")
    if kind in TOKEN_KINDS and "vocabulary" not in spec:
        raise ValueError(f"{name}: {kind!r} needs 'vocabulary', the one with which its tokens were made, named as in "
                         "VOCABULARY.")
    if kind == "official" and "data_dir" not in spec:
        raise ValueError(f"{name}: official corpora need 'data_dir', the folder to look in.")


def _wrong_transform(kind: str, spec: Mapping[str, Any]) -> str | None:
    """Why the transforms of a spec, whose other options are valid, are invalid; None if they are valid."""
    if "transform" not in spec:
        alone = next((key for key in ("unparsed", "language") if key in spec and kind in _DOCUMENT_OPTIONS), None)
        return alone and f"{alone!r} is an option of 'transform', which is missing; add it or drop {alone!r}."
    if wrong := transforms.malformed(spec["transform"]):
        return f"'transform' {wrong}"
    steps = transforms.steps_of(spec["transform"])
    of_code = [step.name for step in steps if step.reads_code]
    if of_notebooks := [step.name for step in steps if step.name in transforms.OF_NOTEBOOKS and kind != "notebooks"]:
        return f"{of_notebooks[0]!r} reads 'notebooks', not {kind!r}."
    if of_code and kind in ("commits", "threads", "warc"):
        return f"{of_code[0]!r} reads code, but {kind!r} holds text."
    if of_code and kind in ("tfrecords", "tfds") and "language" not in spec:
        return f"{of_code[0]!r} needs a 'language', one of {', '.join(transforms.LANGUAGES)}."
    return None


def _wanted(kind: str, key: str) -> tuple[Callable[[Any], bool], str]:
    """A test of an option's value, and a description of valid ones."""
    python = (lambda v: v in ("text", "code"), "'text' or 'code'")
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "python": python,
        "python_instructions": python,
        "tfds": (
            lambda v: _is_text(v) and re.fullmatch(r"[^:]+:[\d.]+", v) is not None,
            "a name with its version, such as 'wikipedia/20230601.en:1.0.0'",
        ),
        "task": (_is_text, "the name of a SeqIO task"),
        "official": (lambda v: isinstance(v, str) and v in OFFICIAL, f"one of {', '.join(OFFICIAL)}"),
        "data_dir": (_is_text, "a folder"),
        "field": (_is_text, "the name of a field"),
        "vocabulary": (_is_text, "the name or path of a vocabulary, as in VOCABULARY"),
        "dtype": (lambda v: v in ("uint16", "uint32"), "'uint16' or 'uint32'"),
        "end": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "the id that ends a document"),
        "separator": (lambda v: isinstance(v, str) and len(v) == 1 and v not in "\r\n\"",
                      "one character, such as '\\t'"),
        "columns": (lambda v: not isinstance(v, str) and _is_pattern(v) and len(set(v)) == len(v),
                    "a list of names, each once"),
        "quotes": (lambda v: isinstance(v, bool), "True or False"),
        "language": (
            (lambda v: v in transforms.LANGUAGES, f"one of {', '.join(transforms.LANGUAGES)}")
            if kind in _DOCUMENT_OPTIONS else (lambda v: v in ("en", "zh"), "'en' or 'zh'")),
        "transform": (lambda v: True, ""),  # `_wrong_transform` checks further
        "unparsed": (lambda v: v in ("drop", "keep"), "'drop' or 'keep'"),
        "loss": (lambda v: v in ("all", "answers"), "'all' or 'answers'"),
        "where": (lambda v: True, ""),  # `_WRONG` checks further
        "text": (lambda v: True, ""),
        "sample": (
            (lambda v: _is_number(v) and 0 < v <= 1, "the fraction of documents to read, in (0, 1]")
            if kind in _DOCUMENT_OPTIONS else
            (lambda v: _is_number(v) and isinstance(v, int) and v > 0, "a positive whole number")),
        "keep_sanitized": (lambda v: isinstance(v, bool), "True or False"),
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
