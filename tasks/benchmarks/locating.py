"""Finds a benchmark's files in a folder by the names that publishers and repackagers give them."""

import fnmatch
import functools
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from codellm_jax.contents import COMPRESSED, BrokenFile, pieces, require_file, without_compression
from tasks.corpora.files import below, in_name_of
from tasks.corpora.records import json_records

SAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "samples")


class Form(NamedTuple):
    """Names of a benchmark's files; .json also matches .jsonl, and all may be compressed.

    Attributes:
      parts: files that are read in turn; a name may be a glob, and case is ignored. "*ocnli*/dev.json" must be in such
        a folder, or in its sub-folder data, because many benchmarks have a dev.json.
      companions: further files, read if they exist.
      halves: the parts are the halves of a repackaged file; if the first is the official file, it is complete.
    """

    parts: tuple[str, ...]
    companions: tuple[str, ...] = ()
    halves: bool = False


def locate(task: str, forms: Sequence[Form], data_dir: str, purpose: str = "") -> list[str]:
    """Finds the files of the first form that exists.

    Args:
      task: the benchmark's name in messages.
      forms: in the order of preference.
      data_dir: a folder, local or gs://.
      purpose: words that follow the file names in messages; empty for the questions.

    Raises:
      OSError: the folder or the files of every form are missing, or one cannot be read.
      ValueError: a file exists more than once, or is not text.
    """
    names = _names(forms)
    if not isinstance(data_dir, str) or not data_dir.strip():
        raise ValueError(f"{task}: data_dir must be a folder, or None for the package's sample items; found "
                         f"{data_dir!r}.")
    try:
        files = below(data_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{task}: {error}; set DATA_DIR to the one that holds {names}.") from None
    top = data_dir.rstrip("/") if "://" in data_dir else os.path.abspath(os.path.expanduser(data_dir))
    if os.path.realpath(top) != os.path.realpath(SAMPLES):
        files = [file for file in files if not file.startswith(SAMPLES + os.sep)]
    for form in forms:
        found = {part: _named(part, files, top, task) for part in form.parts}
        parts = [file for file in found.values() if file]
        if not parts:
            continue
        with in_name_of(task):
            if form.halves and found[form.parts[0]] and is_official(parts[0]):
                return parts[:1]
        if len(parts) < len(form.parts):
            missing = ", ".join(part for part, file in found.items() if not file)
            logging.warning("%s: %s is missing; only %s is read.", task, missing, ", ".join(parts))
        companions = [_named(companion, files, top, task) for companion in form.companions]
        return parts + [file for file in companions if file]
    raise FileNotFoundError(
        f"{task}: DATA_DIR {data_dir!r} holds no file {names} (nor one with {COMPRESSED}){purpose and ' ' + purpose}."
    )


def is_official(file: str) -> bool:
    """Whether a file's first record is official, not in the repackaged schema text_a, text_b, label."""
    first = next((record for record in json_records(file) if isinstance(record, dict)), {})
    return "text_a" not in first


def file_stem(file: str) -> str:
    """A file's name without folders, compression and type: "jec-qa-kd"."""
    return re.sub(r"\.(jsonl?|csv)$", "", without_compression(os.path.basename(file)), flags=re.IGNORECASE)


def content_hash(files: Sequence[str]) -> str:
    """SHA-256 of the files' content, uncompressed and joined, in hexadecimal; for a broken file, of its readable
    part."""
    digest = hashlib.sha256()
    for file in files:
        try:
            for piece in pieces(file):
                digest.update(piece)
        except BrokenFile:
            digest.update(b"\0broken")
    return digest.hexdigest()


def is_sample(files: Sequence[str]) -> bool:
    """Whether any of the files is one of the package's samples, or a copy of one."""
    return any(content_hash([file]) in _sample_hashes() for file in files)


@functools.cache
def _sample_hashes() -> frozenset[str]:
    return frozenset(content_hash([file]) for file in below(SAMPLES))


def _names(forms: Sequence[Form]) -> str:
    return ", or ".join(" with ".join(form.parts) for form in forms)


def _named(pattern: str, files: Sequence[str], top: str, task: str) -> str | None:
    """The file of this name, an official one rather than a repackaged one; None if there is none."""
    folder, _, base = pattern.lower().rpartition("/")
    found = []
    for file in files:
        parts = [os.path.basename(top), *file[len(top):].strip("/").split("/")]
        name = without_compression(parts[-1].lower())
        above = [part.lower() for part in parts[-3:-1]]
        own_folder = above[0] if above[-1] == "data" else above[-1]
        if fnmatch.fnmatchcase(re.sub(r"\.jsonl$", ".json", name), base) and fnmatch.fnmatchcase(
            own_folder, folder or "*"
        ):
            found.append(file)
    with in_name_of(task):
        for file in found:
            require_file(file)
        official = [file for file in found if is_official(file)] if len(found) > 1 and base.endswith(".json") else []
    if len(found) > 1:
        if len(official) != 1:
            raise ValueError(f"{task}: DATA_DIR holds {pattern} more than once, {' and '.join(found)}; remove one.")
        found = official
    return found[0] if found else None
