"""What a step that needs all documents is told of each: written beside the documents, some ten thousand at a time."""

import hashlib
from typing import Any

import numpy as np

from codellm_jax.prepare import ranged
from codellm_jax.prepare.duplicates import band_keys, shingles, signature, text_hash
from codellm_jax.prepare.job import BAND, DRAWN, EQUAL, PART_BITS, Job, signed
from codellm_jax.prepare.steps import Step

RANGES = 4096  # of hashes, by their first bits
DOCUMENTS_A_CHUNK = 1 << 15
SHINGLES_A_CHUNK = 1 << 22  # of documents that are compared by them
BINS = 1 << 20  # that hashes fall into when documents are drawn


def bin_of(sha256: str, seed: int) -> int:
    """Where a document falls when documents are drawn: a number in [0, BINS), by its text and the seed."""
    hashed = hashlib.sha256(f"{seed} {sha256}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") * BINS >> 64


class Keys:
    """Collects what a step wants to know of the documents of a part, and writes it in chunks."""

    def __init__(self, job: Job, stage: int, part: int, step: Step | None) -> None:
        self._job, self._stage, self._part, self._step = job, stage, part, step
        self._found: list[Any] = []
        self._documents = self._chunks = self._shingles = 0

    def add(self, place: int, document: dict[str, Any], size: int) -> None:
        """Takes a document, which is the part's of that number."""
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
                self._shingles += len(hashes)
        self._documents += 1
        if (self._documents >= DOCUMENTS_A_CHUNK or len(self._found) >= 8 * DOCUMENTS_A_CHUNK
                or self._shingles >= SHINGLES_A_CHUNK):
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        if self._found:
            self._write()
        self._found, self._documents, self._shingles = [], 0, 0

    def _write(self) -> None:
        step, found = self._step, self._found
        assert step is not None
        if step.name in ("exact_duplicates", "duplicated_paragraphs"):
            records = np.sort(np.array(found, EQUAL), order=["high", "low"])
            ranges = records["high"]
        elif step.name == "sample":
            drawn = np.array(found, DRAWN)
            bins, at = np.unique(drawn["bin"], return_inverse=True)
            records = np.zeros(len(bins), DRAWN)
            records["bin"] = bins
            np.add.at(records["size"], at, drawn["size"])
            ranges = records["bin"] << np.uint64(64 - 20)
        else:
            signatures = np.array([signed_of for *_, signed_of, _ in found])
            numbers = np.array([number for number, *_ in found], np.uint64)
            # A row for each document from the first to the last, so that one's row follows from its number.
            row = (numbers - numbers[0]).astype(np.int64)
            told = np.zeros(row[-1] + 1, signed(signatures.shape[1]))
            told["place"] = (int(numbers[0]) & (1 << PART_BITS) - 1) + np.arange(len(told))
            for column, name in enumerate(("rank", "bytes"), 1):
                told[name][row] = np.array([each[column] for each in found], np.uint64)
            told["signature"][row] = signatures
            if step.options["similarity"]:
                sets = [hashes for *_, hashes in found]
                ranged.write(self._job.path(self._stage, "shingles", self._part, f"-{self._chunks:05d}.bin"),
                             np.concatenate(sets), np.repeat(row, list(map(len, sets))), len(told))
            ranged.write_bytes(self._job.path(self._stage, "signed", self._part, f"-{self._chunks:05d}.bin"),
                               told.tobytes())
            keys = band_keys(signatures, step.options["bands"], step.options["rows"])
            records = np.zeros(keys.size, BAND)
            records["key"], records["document"] = keys.ravel(), np.repeat(numbers, step.options["bands"])
            records = np.sort(records, order=["key", "document"])
            ranges = records["key"]
        path = self._job.path(self._stage, "keys", self._part, f"-{self._chunks:05d}.bin")
        ranged.write(path, records, (ranges >> np.uint64(64 - 12)).astype(np.int64), RANGES)
        self._chunks += 1
