"""Splits texts into words, and indexes word n-grams of questions for which other texts are searched.

Words are defined as in Brown et al. (2020, appendix C), without case and punctuation. In scripts without spaces between
words, each character is a word. An n-gram is `n` consecutive words of one part of a question. A shorter part is one
n-gram as a whole if it has at least `minimum` words (8, as theirs); if no part is long enough, the parts are joined.
A question without an n-gram even then cannot be measured.

Chinese and other scripts without spaces have separate lengths, twice as large, because a word there has about two
characters. Thirteen characters may be a common phrase, such as "Standing Committee of the National People's Congress".
`t5x contamination` and the step `decontaminate` of `t5x prepare` both search with this module and its defaults.

An n-gram shared by more than `most` questions of a task is boilerplate of that task ("which of the following sentences
about ..."), and is not searched for.
"""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A byte that never occurs in UTF-8, and its decoded form. It ends a document, and no n-gram crosses it.
END = b"\xff"
_END_WORD = "\udcff"
# Han, kana, Thai, Lao, Burmese and Khmer letters, without punctuation and digits.
_UNSPACED = ("\u3005\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
             "\U00020000-\U0003ffff\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1780-\u17d3")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|{_END_WORD}")
_OF_UNSPACED = re.compile(f"[{_UNSPACED}]")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # any odd number works, because matches are verified
_FILTER_BITS = (16, 26)


def words(text: str) -> list[str]:
    """The words of a text, in Unicode's compatibility form and lower case; an underscore separates."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class Question(NamedTuple):
    """A question to search for; n-grams do not cross its parts."""

    task: str
    id: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NGrams:
    """The n-grams of questions, made by `index`.

    Attributes:
      known: the words of all questions, numbered from 1; any other word is 0.
      numbers: int64 [W], the words of all questions, concatenated.
      start, length, question: int64 [N], each n-gram's span in `numbers` and its question, in the order of `hashes`.
      prefix: the length of the shortest n-gram in words; the hash covers so many.
      hashes: uint64 [N], ascending, of the first `prefix` words of each.
      values: uint64 [1 + words], the value of each word in hashes.
      maybe: bool [2**b], whether any hash begins with these b bits; filters lookups in `hashes`.
      measurable: bool [questions], those with an n-gram.
      boilerplate: for each task, the number of distinct n-grams left out because too many questions share them.
    """

    known: dict[str, int]
    numbers: np.ndarray
    start: np.ndarray
    length: np.ndarray
    question: np.ndarray
    prefix: int
    hashes: np.ndarray
    values: np.ndarray
    maybe: np.ndarray
    measurable: np.ndarray
    boilerplate: dict[str, int]

    @property
    def longest(self) -> int:
        """Words of the longest n-gram; 0 if there is none."""
        return int(self.length.max(initial=0))

    def texts(self, ngrams: Sequence[int]) -> list[str]:
        """The words of some n-grams."""
        names = ["", *self.known]
        spans = [slice(self.start[ngram], self.start[ngram] + self.length[ngram]) for ngram in ngrams]
        return [" ".join(names[number] for number in self.numbers[span]) for span in spans]

    def number(self, found: Sequence[str]) -> np.ndarray:
        """The numbers of words, int64."""
        return np.fromiter(map(self.known.get, found, itertools.repeat(0)), np.int64, len(found))

    def matches(self, text: np.ndarray, but: np.ndarray) -> np.ndarray:
        """The n-grams that occur in a text, in the text's order: int64, indices into `start`.

        Args:
          text: int64, numbers of its words.
          but: bool [questions], questions to exclude.
        """
        if not len(self.start) or len(text) < self.prefix:
            return np.zeros(0, np.int64)
        hashes = _window_hashes(self.values[text], self.prefix)
        position = np.flatnonzero(self.maybe[hashes >> _shift(self.maybe)])
        first = np.searchsorted(self.hashes, hashes[position], "left")
        count = np.searchsorted(self.hashes, hashes[position], "right") - first
        position = np.repeat(position, count)
        ngram = np.repeat(first + count - np.cumsum(count), count) + np.arange(len(position))
        good = ~but[self.question[ngram]] & (position + self.length[ngram] <= len(text))
        position, ngram = position[good], ngram[good]
        for offset in range(self.longest):  # hashes may collide
            length, start = self.length[ngram], self.start[ngram]
            within = np.minimum(offset, length - 1)
            good = text[position + within] == self.numbers[start + within]
            position, ngram = position[good], ngram[good]
        return ngram


class Lengths(NamedTuple):
    """The words of an n-gram, and the fewest words with which a shorter part of a question is one n-gram."""

    n: int
    minimum: int


WORDS, CHARACTERS = Lengths(13, 8), Lengths(26, 16)  # the latter for scripts without spaces
MOST = 10  # questions of a task that may share an n-gram


def index(
    questions: Sequence[Question], spaced: Lengths = WORDS, unspaced: Lengths = CHARACTERS, most: int = MOST
) -> NGrams:
    """Indexes the n-grams of questions, except those that more than `most` questions of one task share.

    Args:
      questions: the questions to index.
      spaced: the lengths of n-grams.
      unspaced: the lengths for parts of which more than half of the words are characters of scripts without spaces.
        Where no part is long enough, the joined parts need `spaced.minimum` words in any script.
      most: questions of one task that may share an n-gram.
    """
    known: dict[str, int] = {}
    numbers: list[int] = []
    spans: list[tuple[int, int, int, int]] = []  # question, start, words, words of an n-gram
    for number, asked in enumerate(questions):
        begin, parts, of_whole = len(numbers), [], 0
        for part in asked.parts:
            before, found = len(numbers), words(part)
            numbers += [known.setdefault(word, len(known) + 1) for word in found]
            of_part = sum(map(_is_unspaced, found))
            of_whole += of_part
            lengths = unspaced if 2 * of_part > len(found) else spaced
            if len(found) >= min(lengths):
                parts.append((number, before, len(found), lengths.n))
        whole = len(numbers) - begin
        if not parts and whole >= min(spaced):
            parts = [(number, begin, whole, (unspaced if 2 * of_whole > whole else spaced).n)]
        spans += parts
    all_numbers = np.array(numbers, np.int64)
    owner, start, size, most_words = np.array(spans, np.int64).reshape(-1, 4).T
    count = np.maximum(size - most_words, 0) + 1  # n-grams of each part
    question = np.repeat(owner, count)
    start = np.repeat(start + count - np.cumsum(count), count) + np.arange(int(count.sum()))
    length = np.repeat(np.minimum(size, most_words), count)
    values = np.random.default_rng(0).integers(0, 2**64, len(known) + 1, np.uint64)
    hashed = values[all_numbers]
    kept, boilerplate = _rare(questions, hashed, start, length, question, most)
    start, length, question = start[kept], length[kept], question[kept]
    prefix = int(length.min(initial=max(spaced.n, unspaced.n)))
    hashes = _window_hashes(hashed, prefix)[start]
    order = np.argsort(hashes, kind="stable")
    bits = int(np.clip(np.ceil(np.log2(32 * max(1, len(start)))), *_FILTER_BITS))
    maybe = np.zeros(1 << bits, bool)
    maybe[hashes >> _shift(maybe)] = True
    measurable = np.zeros(len(questions), bool)
    measurable[question] = True
    return NGrams(known, all_numbers, start[order], length[order], question[order], prefix, hashes[order], values,
                  maybe, measurable, boilerplate)


def _is_unspaced(word: str) -> bool:
    return len(word) == 1 and _OF_UNSPACED.match(word) is not None


def _rare(
    questions: Sequence[Question], hashed: np.ndarray, start: np.ndarray, length: np.ndarray, question: np.ndarray,
    most: int,
) -> tuple[np.ndarray, dict[str, int]]:
    """Marks the n-grams that at most `most` questions of their task have, bool [N], and counts the others by task.

    N-grams are compared by a 64-bit hash; among a hundred million, the chance of any collision is 1 in 3,700.
    """
    tasks = {name: number for number, name in enumerate(dict.fromkeys(one.task for one in questions))}
    task = np.array([tasks[one.task] for one in questions], np.int64)[question]
    whole = np.zeros(len(start), np.uint64)
    for words_of in np.unique(length):
        here = length == words_of
        whole[here] = _window_hashes(hashed, int(words_of))[start[here]]
    order = np.lexsort((question, whole, length, task))
    same = np.stack([task, length, whole.view(np.int64)])[:, order]
    new = np.append(True, (np.diff(same, axis=1) != 0).any(axis=0))[: len(order)]
    group = np.cumsum(new) - 1
    another = new | np.append(True, np.diff(question[order]) != 0)[: len(order)]
    often = np.bincount(group, another, minlength=1) > most
    kept = np.ones(len(start), bool)
    kept[order] = ~often[group]
    dropped = np.unique(np.stack([task[order], group])[:, often[group]], axis=1)[0]
    return kept, {name: int((dropped == number).sum()) for name, number in tasks.items()}


def _window_hashes(values: np.ndarray, length: int) -> np.ndarray:
    """A hash of each window of `length` consecutive values: uint64 [N - length + 1], empty if N is smaller."""
    count = max(0, len(values) - length + 1)
    hashes = values[:count].copy()
    for offset in range(1, length):
        hashes *= _MULTIPLIER
        hashes += values[offset : offset + count]
    return hashes


def _shift(maybe: np.ndarray) -> np.uint64:
    return np.uint64(64 - (len(maybe).bit_length() - 1))
