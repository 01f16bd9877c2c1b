"""Checks on a sample, while rows are made, that a vocabulary decodes texts to what was encoded.

The sample is the beginnings of the texts with the smallest hashes. It therefore does not depend on the order of the
texts, and the samples of a split's parts combine to that of the split.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from codellm_jax.vocabulary import Vocabulary

SAMPLED = 64  # texts per split
LOOKED_AT = 500  # characters of each text: ten milliseconds in all
SHOWN = 30  # characters before and after the first difference


class Looked(NamedTuple):
    """A text that was checked; if it differs, an excerpt before and after, else "" for both."""

    hash: int
    before: str
    after: str


class Sample:
    """A sample of the texts of a split, or of a part of it."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[str, ...]] = {}
        self._largest = 0

    def add(self, texts: Iterable[str]) -> None:
        """Adds a document, or the prompt and answer of an example, if its hash is small enough."""
        parts = tuple(map(_beginning, texts))
        hash_ = int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big")
        if len(self._texts) == SAMPLED and hash_ >= self._largest:
            return
        self._texts[hash_] = parts
        if len(self._texts) > SAMPLED:
            del self._texts[max(self._texts)]
        self._largest = max(self._texts)

    def looked_at(self, vocabulary: Vocabulary) -> list[Looked]:
        """Each text of the sample, by its hash, encoded and decoded."""
        return [Looked(hash_, *_difference(parts, vocabulary)) for hash_, parts in sorted(self._texts.items())]


def _beginning(text: str) -> str:
    # Some vocabularies lose a blank at the end of a text; a cut must not add one.
    return text if len(text) <= LOOKED_AT else text[:LOOKED_AT].rstrip()


def _difference(parts: Sequence[str], vocabulary: Vocabulary) -> tuple[str, str]:
    """Excerpts before and after at the first difference of the first part that differs; "" for both if none does."""
    context: list[int] = []
    for part in parts:
        ids = vocabulary.encode_after(context, part)
        back = vocabulary.decode_after(context, ids)
        # A vocabulary that collapses blanks may decode one between prompt and answer, which belongs to neither.
        if back != part and not (context and back == f" {part}"):
            first = len(os.path.commonprefix([part, back]))
            shown = slice(max(0, first - SHOWN), first + SHOWN)
            return part[shown], back[shown]
        context = ids
    return "", ""


def of_whole(parts: Iterable[Looked]) -> list[Looked]:
    """The sample of a split, merged from those of its parts."""
    return sorted(set(parts))[:SAMPLED]


def warned(task: str, split: str, looked: Sequence[Looked], unit: str) -> list[str]:
    """A warning with the first example if texts of the sample differ; else empty."""
    differing = [one for one in looked if one.before != one.after]
    if not differing:
        return []
    before, after = differing[0].before, differing[0].after
    return [f"WARNING: {task}, {split}: {len(differing)} of {len(looked)} {unit} checked are changed by encoding and "
            f"decoding: {before!r} becomes {after!r}. Lost text is not learned: choose another VOCABULARY, such as "
            "'python_8k', or train one with `t5x vocabulary`."]
