"""Searches the training text, decoded from cached rows, for the n-grams of questions.

Only the tokens in cached rows are read: those after the last full row, or beyond the end of a row in tuning, were not
trained on. Documents are rejoined across rows. A source is divided into ranges of rows, each with the documents that
begin in it, so that several processes share one pass, and the result does not depend on their number. At most a few
rows are held as text, however long a document is.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.mixture.examples import WIDTH_BESIDE_TOKENS, ids_of
from codellm_jax.mixture.ngrams import END, NGrams, words
from codellm_jax.mixture.rows import Rows
from codellm_jax.vocabulary import Vocabulary

TOKENS_A_RANGE = 1 << 23
TOKENS_A_BLOCK = 1 << 18  # read at once


class Trained(NamedTuple):
    """A source to search: its training rows, their vocabulary, and the stage, which gives the format of the rows."""

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
    """Finds, for each source and question, the first of the question's n-grams in the source's training text.

    Args:
      sources: searched whole, whatever part of them a run draws.
      ngrams: the n-grams to search for.
      processes: the most to run at a time.
      progress: called with the rows searched so far and in all.

    Returns:
      int64 [sources, questions], indices into `ngrams.start`; -1 where there is none.

    Raises:
      ValueError: rows are damaged.
    """
    ranges = [_Range(number, first, min(first + step, source.rows.count)) for number, source in enumerate(sources)
              for step in [max(1, TOKENS_A_RANGE // source.rows.length)]
              for first in range(0, source.rows.count, step)]
    total, done = sum(source.rows.count for source in sources), 0
    found = np.full((len(sources), len(ngrams.measurable)), -1, np.int64)
    where = np.full(found.shape, len(ranges))  # the range of each match; the lowest wins
    for number, first in _searched(ranges, sources, ngrams, processes):
        one = ranges[number]
        better = (first >= 0) & (number < where[one.source])
        found[one.source, better], where[one.source, better] = first[better], number
        done += one.last - one.first
        progress(done, total)
    return found


def _searched(
    ranges: Sequence[_Range], sources: Sequence[Trained], ngrams: NGrams, processes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each range with the result of `_search_range`, in the order of completion."""
    processes = min(processes, len(ranges))
    if processes < 2:
        for number, one in enumerate(ranges):
            yield number, _search_range(sources[one.source], one, ngrams)
        return
    context = multiprocessing.get_context("spawn")  # a fork would lose the threads of libraries
    waiting = list(reversed(range(len(ranges))))
    idle: list[Any] = []  # connections
    busy: dict[Any, int] = {}
    with contextlib.ExitStack() as workers:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()  # so that recv raises EOFError when the worker ends
            workers.callback(worker.join)
            workers.callback(worker.terminate)  # callbacks run in reverse
            idle.append(ours)
        try:
            for connection in idle:
                connection.send((sources, ngrams))
            while waiting or busy:
                while waiting and idle:
                    connection = idle.pop()
                    busy[connection] = waiting.pop()
                    connection.send(ranges[busy[connection]])
                finished: list[Any] = multiprocessing.connection.wait(list(busy))
                for ready in finished:
                    answer = ready.recv()
                    if isinstance(answer, Exception):
                        raise answer
                    yield busy.pop(ready), answer
                    idle.append(ready)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ChildProcessError("A search process was killed, perhaps for lack of memory; "
                                    "contamination.processes sets their number.") from None


def _serve(asked: Any) -> None:
    """Searches ranges on request until the parent process is gone, be it in the middle of a message; prints no
    traceback then, nor at Ctrl-C.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        # Not arguments of the process: multiprocessing prints a traceback if its parent is killed while it sends them.
        sources, ngrams = asked.recv()
        while True:
            one = asked.recv()
            try:
                asked.send(_search_range(sources[one.source], one, ngrams))
            except (ValueError, OSError) as error:
                asked.send(error)


def _search_range(source: Trained, one: _Range, ngrams: NGrams) -> np.ndarray:
    found = np.full(len(ngrams.measurable), -1, np.int64)
    before = np.zeros(0, np.int64)  # trailing words with which an n-gram may begin
    for text in texts(source, one.first, one.last):
        numbers = np.concatenate([before, ngrams.number(words(text))])
        matched = ngrams.matches(numbers, but=found >= 0)
        question, place = np.unique(ngrams.question[matched], return_index=True)
        found[question] = matched[place]
        before = numbers[max(0, len(numbers) - ngrams.longest + 1) :]
    return found


def texts(source: Trained, first: int, last: int) -> Iterator[str]:
    """The text of the documents or examples that begin in rows first ... last - 1, in pieces that end between words.

    Each document ends with `ngrams.END`.
    """
    rows, vocabulary = source.rows, source.vocabulary
    bytes_of_ids = _bytes_of_ids(vocabulary)
    blocks = _examples(rows, first, last, vocabulary.end_of_document_id) if source.stage == "tuning" else _documents(
        rows, first, last, vocabulary.end_of_document_id)
    waiting: list[bytes] = []  # a word that may continue in the next block
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
    """The tokens of examples, each followed by an end token, even where it was cut."""
    width = rows.length + 1
    step = max(1, TOKENS_A_BLOCK // width)
    for start in range(first, last, step):
        cached = rows.read(np.arange(start, min(start + step, last)))
        ended = np.full((len(cached), width + 1), end, np.int32)
        ended[:, :width] = ids_of(cached[:, :width])
        length = cached[:, width + WIDTH_BESIDE_TOKENS - 1][:, None]
        ended = np.where(np.arange(width + 1) < length, ended, end)
        yield ended[np.arange(width + 1) <= length]


def _documents(rows: Rows, first: int, last: int, end: int) -> Iterator[np.ndarray]:
    """The tokens of the documents that begin in rows first ... last - 1 and may continue beyond them."""
    width = rows.length + 1
    step = max(1, TOKENS_A_BLOCK // width)
    # A document that the previous row leaves unfinished belongs to the previous range.
    inside = first == 0 or ids_of(rows.read(np.array([first - 1])))[0, -1] == end
    start, unfinished = first, False
    while start < last or (unfinished and start < rows.count):
        stop = min(start + step, last if start < last else rows.count)
        tokens = ids_of(rows.read(np.arange(start, stop))).reshape(-1)
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
