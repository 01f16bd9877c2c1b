"""What was trained on, as text again, searched for the n-grams of questions.

A source is read from its cached rows: what follows the last full row, or stands beyond the end of a row of tuning, was
not trained on and is not read. Documents are whole again across rows. A source is shared out in ranges of rows, each
with the documents that begin in it, so that one pass over all of them can be made by several processes, and what is
found does not depend on their number. No more than a few rows are held as text, however long a document is.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from codellm_jax.mixture.examples import WIDTH_BESIDE_TOKENS
from codellm_jax.mixture.ngrams import END, NGrams, words
from codellm_jax.mixture.rows import Rows
from codellm_jax.vocabulary import Vocabulary

TOKENS_A_RANGE = 1 << 23
TOKENS_A_BLOCK = 1 << 18  # read at once


class Trained(NamedTuple):
    """A source to search: its training rows, what they are tokenized with, and whether they are examples of tuning."""

    rows: Rows
    vocabulary: Vocabulary
    stage: str


class _Range(NamedTuple):
    """The documents that begin in rows first ... last - 1 of a source."""

    source: int
    first: int
    last: int


def search(
    sources: Sequence[Trained], ngrams: NGrams, processes: int, progress: Callable[[int, int], None] = lambda *_: None,
) -> np.ndarray:
    """For each source and question the first of the question's n-grams in the source's training text.

    Args:
      sources: searched whole, whatever part of them a run draws.
      ngrams: what for.
      processes: at most so many at a time.
      progress: told of rows searched so far and in all.

    Returns:
      int64 [sources, questions], places in `ngrams.start`; -1 where there is none.

    Raises:
      ValueError: rows are damaged.
    """
    ranges = [_Range(number, first, min(first + step, source.rows.count)) for number, source in enumerate(sources)
              for step in [max(1, TOKENS_A_RANGE // source.rows.length)]
              for first in range(0, source.rows.count, step)]
    total = sum(source.rows.count for source in sources)
    found = np.full((len(sources), len(ngrams.measurable)), -1, np.int64)
    done = 0
    for one, first in zip(ranges, _searched(ranges, sources, ngrams, processes), strict=True):
        known = found[one.source]
        found[one.source] = np.where(known < 0, first, known)
        done += one.last - one.first
        progress(done, total)
    return found


def _searched(
    ranges: Sequence[_Range], sources: Sequence[Trained], ngrams: NGrams, processes: int
) -> Iterator[np.ndarray]:
    processes = min(processes, len(ranges))
    if processes < 2:
        for one in ranges:
            yield _search_range(sources[one.source], one, ngrams)
        return
    # Not forked: threads of libraries would be lost in the child.
    with concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), _begin, (sources, ngrams)) as pool:
        try:
            yield from pool.map(_search_given, ranges)
        finally:
            pool.shutdown(cancel_futures=True)


_given: list[tuple[Sequence[Trained], NGrams]] = []  # to a process of the pool


def _begin(sources: Sequence[Trained], ngrams: NGrams) -> None:
    """In a process of the pool, which ends with the one that started it, and at Ctrl-C says nothing of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _given.append((sources, ngrams))


def _search_given(one: _Range) -> np.ndarray:
    [(sources, ngrams)] = _given
    return _search_range(sources[one.source], one, ngrams)


def _search_range(source: Trained, one: _Range, ngrams: NGrams) -> np.ndarray:
    found = np.full(len(ngrams.measurable), -1, np.int64)
    before = np.zeros(0, np.int64)  # words that an n-gram may begin with and go on from
    for text in texts(source, one.first, one.last):
        numbers = np.concatenate([before, ngrams.number(words(text))])
        matched = ngrams.matches(numbers, but=found >= 0)
        question, place = np.unique(ngrams.question[matched], return_index=True)
        found[question] = matched[place]
        before = numbers[max(0, len(numbers) - ngrams.longest + 1) :]
    return found


def texts(source: Trained, first: int, last: int) -> Iterator[str]:
    """The text of the documents or examples that begin in rows first ... last - 1, in pieces that end between words.

    Each document ends with what `ngrams.words` takes for its end.
    """
    rows, vocabulary = source.rows, source.vocabulary
    bytes_of_ids = _bytes_of_ids(vocabulary)
    blocks = _examples(rows, first, last, vocabulary.end_of_document_id) if source.stage == "tuning" else _documents(
        rows, first, last, vocabulary.end_of_document_id)
    waiting: list[bytes] = []  # a word that may go on in the next block
    for tokens in blocks:
        text = b"".join(map(bytes_of_ids.__getitem__, tokens.tolist()))
        cut = max(text.rfind(blank) for blank in (b" ", b"\n", b"\t", END)) + 1
        waiting.append(text[:cut])
        if cut:
            yield _decoded(waiting)
            waiting = []
        waiting.append(text[cut:])
    yield _decoded(waiting)


@functools.lru_cache(maxsize=8)
def _bytes_of_ids(vocabulary: Vocabulary) -> list[bytes]:
    found = vocabulary.bytes_of_ids()
    found[vocabulary.end_of_document_id] = END
    return found


def _decoded(parts: Sequence[bytes]) -> str:
    return b"".join(parts).decode("utf-8", "surrogateescape")


def _examples(rows: Rows, first: int, last: int, end: int) -> Iterator[np.ndarray]:
    """The tokens of examples, each of which ends with the end token, cut or not."""
    width = rows.length + 1
    step = max(1, TOKENS_A_BLOCK // width)
    for start in range(first, last, step):
        cached = rows.read(np.arange(start, min(start + step, last)))
        ended = np.full((len(cached), width + 1), end, np.int32)
        ended[:, :width] = cached[:, :width]
        length = cached[:, width + WIDTH_BESIDE_TOKENS - 1][:, None]
        ended = np.where(np.arange(width + 1) < length, ended, end)
        yield ended[np.arange(width + 1) <= length]


def _documents(rows: Rows, first: int, last: int, end: int) -> Iterator[np.ndarray]:
    """The tokens of the documents that begin in rows first ... last - 1, which may go on behind them."""
    width = rows.length + 1
    step = max(1, TOKENS_A_BLOCK // width)
    # What the row before leaves unfinished belongs to the range before.
    inside = first == 0 or rows.read(np.array([first - 1]))[0, -1] == end
    start, unfinished = first, False
    while start < last or (unfinished and start < rows.count):
        stop = min(start + step, last if start < last else rows.count)
        tokens = rows.read(np.arange(start, stop)).reshape(-1)
        ends = np.flatnonzero(tokens == end)
        if start >= last and len(ends):
            yield tokens[: ends[0] + 1]
            return
        start = stop
        if not inside:
            if not len(ends):
                continue
            tokens, inside = tokens[ends[0] + 1 :], True
        yield tokens
        unfinished = len(tokens) > 0 and tokens[-1] != end
