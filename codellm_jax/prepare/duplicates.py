"""Duplicates among texts: exact ones by a hash of the normalised text, near ones by MinHash.

A shingle is `ngram` consecutive words (`mixture.ngrams`: without case and punctuation, each Chinese character a word);
a text with fewer words is one shingle. The signature of a text is, for each of bands x rows hash functions, the least
hash of its shingles (Broder 1997). The share of hashes in which two signatures agree estimates the Jaccard similarity s
of their sets of shingles, with a standard error of sqrt(s (1 - s) / (bands x rows)). Two texts are compared if they
agree in all rows of any band; `chance_to_meet` gives the probability. For 14 x 8, which FineWeb uses, it is 0.77 at
s = 0.75, 0.92 at 0.8, 0.988 at 0.85, 0.9996 at 0.9. Texts that meet are compared by the shingles themselves: of the
pairs at the default similarity, 0.85, 98.8% are found, of more similar ones more, and no pair below it.
"""

import functools
import unicodedata
from collections.abc import Callable

import numpy as np
import xxhash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from codellm_jax.mixture.ngrams import words

_BLOCK = 2048  # shingles hashed at once, so that their hashes fit in a core's cache
_MIX = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """A text in Unicode's compatibility form and lower case, with runs of white space as single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def text_hash(text: str) -> tuple[int, int]:
    """A 128-bit hash of the normalised text, as two 64-bit numbers."""
    return divmod(xxhash.xxh3_128_intdigest(normalised(text).encode()), 1 << 64)


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def shingles(text: str, ngram: int) -> np.ndarray:
    """The hashes of a text's shingles: uint32, one for each position; empty for a text without words."""
    found = words(text)
    if not found:
        return np.zeros(0, np.uint32)
    values = np.fromiter(map(_word_hash, found), np.uint64, len(found))
    n = min(ngram, len(values))
    hashes = values[: len(values) - n + 1].copy()
    for offset in range(1, n):
        hashes *= _MIX
        hashes ^= hashes >> np.uint64(29)
        hashes += values[offset : offset + len(hashes)]
    hashes *= _MIX
    return (hashes >> np.uint64(32)).astype(np.uint32)


@functools.lru_cache
def _functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd multipliers and summands of hash functions: uint32 [count, 1] each."""
    drawn = np.random.default_rng(0).integers(0, 1 << 32, (2, count, 1), np.uint32)
    return drawn[0] | np.uint32(1), drawn[1]


def signature(hashes: np.ndarray, count: int) -> np.ndarray:
    """The minimum of each of `count` hash functions over the hashes of at least one shingle.

    Returns:
      uint32 [count].
    """
    multiplier, summand = _functions(count)
    least = np.full(count, 0xFFFFFFFF, np.uint32)
    hashes = np.unique(hashes) if len(hashes) > _BLOCK else hashes
    for start in range(0, len(hashes), _BLOCK):
        each = multiplier * hashes[None, start : start + _BLOCK]
        each += summand
        # The low bits of a product depend on few bits of its factors, so the high ones are mixed in.
        each ^= each >> np.uint32(15)
        each *= np.uint32(0x2C1B3C6D)
        np.minimum(least, each.min(axis=1), out=least)
    return least


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """A hash of each band: uint64 [documents, bands]; equal values in different bands have different hashes."""
    parts = signatures.reshape(len(signatures), bands, rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64) * _MIX, parts.shape[:2]).copy()
    for row in range(rows):
        keys ^= parts[:, :, row]
        keys *= _MIX
        keys ^= keys >> np.uint64(32)
    keys *= _MIX  # its high bits divide the keys into ranges
    return keys


def chance_to_meet(similarity: float, bands: int, rows: int) -> float:
    """The probability that texts of Jaccard similarity s agree in all rows of any band: 1 - (1 - s^rows)^bands
    (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4).
    """
    return 1 - (1 - similarity**rows) ** bands


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The Jaccard similarity of two sets, given as sorted arrays of distinct numbers."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def similar_pairs(
    signatures: np.ndarray, similarity: float, exact: Callable[[int, int], float]
) -> list[tuple[int, int, float]]:
    """Pairs that connect the similar ones of some documents, each with its Jaccard similarity.

    Documents already connected, directly or through others, are not compared: a thousand copies give 999 pairs. Up to
    1,024 documents are all compared with each other; more are compared only with the first ones, at least 64.

    Args:
      signatures: uint32 [documents, hashes].
      similarity: the minimum; 0 connects all documents, with the similarity that their signatures estimate.
      exact: returns the similarity of two documents, given by index.
    """
    count = len(signatures)
    pairs, label = [], np.arange(count)
    deviation = np.sqrt(similarity * (1 - similarity) / signatures.shape[1])
    for first in range(min(count - 1, max(64, (1 << 20) // count))):
        others = first + 1 + np.flatnonzero(label[first + 1 :] != label[first])
        estimated = (signatures[others] == signatures[first]).mean(axis=1)
        hopeful = estimated >= similarity - 4 * deviation
        for other, value in zip(others[hopeful].tolist(), estimated[hopeful].tolist(), strict=True):
            if label[other] != label[first]:
                value = exact(first, other) if similarity else value
                if value >= similarity:
                    pairs.append((first, other, value))
                    label[label == label[other]] = label[first]
    return pairs


def components(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected components of numbers linked by pairs.

    Args:
      first, second: uint64 [pairs].

    Returns:
      The numbers, ascending, and for each the label of its component: int [numbers].
    """
    numbers, at = np.unique(np.concatenate([first, second]), return_inverse=True)
    count = len(numbers)
    edges = coo_array((np.ones(len(first), np.int8), (at[: len(first)], at[len(first) :])), shape=(count, count))
    return numbers, connected_components(edges, directed=False)[1]
