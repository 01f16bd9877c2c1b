"""The keys of documents for a step that needs all documents, written beside the documents of a part.

A part has one file of keys, or several of about `BYTES_A_FILE`, as for a corpus that is read as a whole.
"""

import hashlib
from typing import Any

import numpy as np
from etils import epath

from codellm_jax.prepare import ranged
from codellm_jax.prepare.duplicates import band_keys, shingles, signature, text_hash
from codellm_jax.prepare.job import BAND, DRAWN, EQUAL, PART_BITS, Job, signed
from codellm_jax.prepare.steps import Step

RANGES = 4096  # of hashes, by their first bits
BYTES_A_FILE = 64 << 20  # of keys, held until they are sorted and written
DOCUMENTS_AT_ONCE = 1 << 11  # converted to arrays together
BINS = 1 << 20  # of hashes for sampling documents


def bin_of(sha256: str, seed: int) -> int:
    """The bin of a document for sampling: a number in [0, BINS), from its text's hash and the seed."""
    hashed = hashlib.sha256(f"{seed} {sha256}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") * BINS >> 64


class Keys:
    """Collects and writes the keys that a step needs of the documents of a part."""

    def __init__(self, job: Job, stage: int, part: int, step: Step | None) -> None:
        self._job, self._stage, self._part, self._step = job, stage, part, step
        self._found: list[Any] = []
        self._keys: list[np.ndarray] = []
        self._bytes = self._files = 0
        self._signed: ranged.Growing | None = None
        self._shingles: ranged.Growing | None = None
        self._next = self._begin = 0  # document of the next signature; offset of the next shingles
        self._first = ""

    def add(self, place: int, document: dict[str, Any], size: int) -> None:
        """Adds document number `place` of the part."""
        step = self._step
        if step is None:
            return
        number = (self._part << PART_BITS) | place
        rank = int(document["sha256"][:16], 16)
        if step.name == "exact_duplicates":
            self._found.append((*text_hash(document["text"]), rank, number, 0))
        elif step.name == "duplicated_paragraphs":
            for line_number, line in enumerate(document["text"].split("\n")):
                if len(line.strip()) >= step.options["characters"]:
                    self._found.append((*text_hash(line), rank, number, line_number))
        elif step.name == "sample":
            if document["source"] in step.options["budgets"]:
                drawn = document["tokens"] if step.options["unit"] == "tokens" else size
                self._found.append((bin_of(document["sha256"], step.options["seed"]), drawn))
        else:
            hashes = np.unique(shingles(document["text"], step.options["ngram"]))
            if len(hashes):
                count = step.options["bands"] * step.options["rows"]
                self._found.append((number, rank, size, signature(hashes, count), hashes))
        if len(self._found) >= DOCUMENTS_AT_ONCE:
            self._gather()

    def close(self) -> None:
        """Writes the remaining keys."""
        self._gather()
        self._write()

    def discard(self) -> None:
        """Removes incomplete files."""
        for file in (self._signed, self._shingles):
            if file is not None:
                file.discard()

    def _path(self, kind: str, first: str = "") -> epath.Path:
        return self._job.path(self._stage, kind, self._part, f"-{self._files:05d}{first}.bin")

    def _gather(self) -> None:
        """Converts the collected keys to an array."""
        step, found = self._step, self._found
        if not found:
            return
        assert step is not None
        if step.name in ("exact_duplicates", "duplicated_paragraphs"):
            keys = np.array(found, EQUAL)
        elif step.name == "sample":
            keys = np.array(found, DRAWN)
        else:
            keys = self._sign(step, found)
        self._found = []
        self._keys.append(keys)
        self._bytes += keys.nbytes
        if self._bytes >= BYTES_A_FILE:
            self._write()

    def _sign(self, step: Step, found: list[Any]) -> np.ndarray:
        """Writes signatures and shingles of documents; returns the keys of their bands."""
        numbers = np.array([number for number, *_ in found], np.uint64)
        signatures = np.array([of_document for *_, of_document, _ in found])
        if self._signed is None:
            self._next, self._begin = int(numbers[0]), 0
            self._first = f"-{self._next & (1 << PART_BITS) - 1}"  # in the names, so that files need not be opened
            self._signed = ranged.Growing(self._path("signed", self._first))
        # A row for every number from the first to the last, so that a document's row follows from its number.
        row = numbers.astype(np.int64) - self._next
        told = np.zeros(row[-1] + 1, signed(signatures.shape[1]))
        told["place"] = (self._next & (1 << PART_BITS) - 1) + np.arange(len(told))
        told["rank"][row] = np.array([each[1] for each in found], np.uint64)
        told["bytes"][row] = np.array([each[2] for each in found], np.uint64)
        told["signature"][row] = signatures
        if step.options["similarity"]:
            if self._shingles is None:
                self._shingles = ranged.Growing(self._path("shingles", self._first))
            lengths = np.array([len(hashes) for *_, hashes in found])
            told["shingles"][row], told["begin"][row] = lengths, self._begin + np.cumsum(lengths) - lengths
            self._shingles.write(np.concatenate([hashes for *_, hashes in found]))
            self._begin += int(lengths.sum())
        self._signed.write(told)
        self._next += len(told)
        bands = band_keys(signatures, step.options["bands"], step.options["rows"])
        keys = np.zeros(bands.size, BAND)
        keys["key"], keys["document"] = bands.ravel(), np.repeat(numbers, step.options["bands"])
        return keys

    def _write(self) -> None:
        """Sorts and writes all keys held in memory."""
        if not self._keys:
            return
        assert self._step is not None
        for file in (self._signed, self._shingles):
            if file is not None:
                file.close()
        self._signed = self._shingles = None
        keys = np.concatenate(self._keys)
        if self._step.name == "sample":
            bins, at = np.unique(keys["bin"], return_inverse=True)
            sizes = np.zeros(len(bins), np.uint64)
            np.add.at(sizes, at, keys["size"])
            keys = np.zeros(len(bins), DRAWN)
            keys["bin"], keys["size"] = bins, sizes
            ranges = keys["bin"] << np.uint64(64 - 20)
        else:
            by = ["key", "document"] if self._step.name == "near_duplicates" else ["high", "low"]
            keys = keys[np.lexsort([keys[name] for name in reversed(by)])]
            ranges = keys[by[0]]
        ranged.write(self._path("keys"), keys, (ranges >> np.uint64(64 - 12)).astype(np.int64), RANGES)
        self._keys, self._bytes = [], 0
        self._files += 1
