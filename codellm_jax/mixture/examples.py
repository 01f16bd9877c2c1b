"""Instruction examples as rows, and their batches for tuning; and examples as documents, which pre-training joins and
cuts.

An example is a prompt (`inputs`) followed by its answer (`targets`) and the end token; the loss counts only the answer
and the end token. In a conversation, the loss also counts the later answers, but not the text between them. An example
longer than a row of `length` + 1 tokens is cut there, as in the study's released system; one whose prompt alone fills
the row has no training signal and is left out. Both are counted.

A cached row holds the tokens, zeros up to length + 1, then two numbers: the token counts of the first prompt and of the
whole example. A token after the first prompt that the loss does not count is stored as its complement, ~id, which is
negative.

A step trains on BATCH_SIZE examples. Unpacked, each has its own row; packed, the same examples share fewer rows, each
with its own positions and attention. Packing therefore changes only the cost of a step: its examples, its loss and its
gradient are the same to float32 rounding.

As a document, an example is prompt, answer and end token. The loss counts all of it or, if the corpus says so, the same
tokens as in tuning; tokens that it does not count are complements. An end token within an example, such as after each
answer of a conversation, does not end the document: `WITHIN` is added to it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

# Increase this whenever the same tokens would give other rows.
EXAMPLES_VERSION = 2
# The same for examples as documents.
DOCUMENTS_VERSION = 1
WIDTH_BESIDE_TOKENS = 2
WITHIN = 1 << 30  # above any id
EXAMPLES_A_BLOCK = 4096


@dataclasses.dataclass
class Found:
    """Counts collected while a split is written; the fields of `rows.Rows` with the same names."""

    count: int = 0
    tokens: int = 0
    documents: int = 0
    content_hash: str = ""
    cut: int = 0
    left_out: int = 0
    conversations: int = 0
    uncounted: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    digests: str = ""


class Tokens(Protocol):
    """The part of `tokens.Example` that is needed here."""

    @property
    def inputs(self) -> np.ndarray: ...

    @property
    def targets(self) -> np.ndarray: ...

    @property
    def is_conversation(self) -> bool: ...


class Readable(Protocol):
    """The part of `rows.Rows` that is needed here."""

    @property
    def count(self) -> int: ...

    @property
    def length(self) -> int: ...

    def read(self, numbers: np.ndarray) -> np.ndarray: ...


def example_rows(examples: Iterable[Tokens], length: int, found: Found) -> Iterator[np.ndarray]:
    """Examples as blocks of rows, int32 [rows, length + 3]."""
    width = length + 1
    block: list[np.ndarray] = []
    for example in examples:
        inputs, targets = example.inputs, example.targets
        found.documents += 1
        found.tokens += len(inputs) + len(targets)
        found.conversations += example.is_conversation
        if not len(targets) or max(1, len(inputs)) >= width:
            found.left_out += 1
            continue
        tokens = np.concatenate([inputs, targets])[:width]
        found.cut += len(inputs) + len(targets) > width
        row = np.zeros(width + WIDTH_BESIDE_TOKENS, np.int32)
        row[: len(tokens)] = tokens
        row[width:] = len(inputs), len(tokens)
        block.append(row)
        if len(block) == EXAMPLES_A_BLOCK:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def documents(examples: Iterable[Tokens], loss: str | None, end: int, found: Found) -> Iterator[np.ndarray]:
    """The tokens of each document of pre-training; counts them in `found`.

    Args:
      loss: None for documents; for instruction examples the tokens that the loss counts, "all" or "answers".
      end: the end-of-document token.
    """
    for example in examples:
        tokens = example.targets if loss is None else as_document(example, loss, end)
        found.documents += loss is not None or len(tokens) > 0
        found.left_out += loss is not None and not len(tokens)
        found.tokens += len(tokens)
        found.uncounted += int(np.count_nonzero(tokens < 0))
        found.conversations += example.is_conversation
        yield tokens


def as_document(example: Tokens, loss: str, end: int) -> np.ndarray:
    """An example as one document, int32; empty where it has no answer. `loss` and `end` as for `documents`.

    The text of a chat template after the last answer is dropped. If the answer does not end with the end token itself,
    it is added, and is not counted as part of the answer.
    """
    answers = np.flatnonzero(example.targets >= 0)
    if not len(answers):
        return np.zeros(0, np.int32)
    targets = example.targets[: answers[-1] + 1]
    tokens = np.concatenate([~example.inputs, targets] if targets[-1] == end else [~example.inputs, targets, [~end]])
    # ~(id + WITHIN) is ~id without the bit.
    tokens[:-1] ^= np.where(ids_of(tokens[:-1]) == end, WITHIN, 0)
    return (tokens if loss == "answers" else marked_ids(tokens)).astype(np.int32)


class Sizes(NamedTuple):
    """For some examples, two int64 arrays of one shape."""

    positions: np.ndarray  # columns taken: all tokens except the last, which is only predicted
    counted: np.ndarray  # tokens that the loss counts


@functools.lru_cache(maxsize=256)
def example_sizes(examples: Readable) -> Sizes:
    """The sizes of all examples of a split, [count]; read once per process, as packing needs those of whole batches."""
    parts = [np.zeros((0, 3), np.int64)]
    for start in range(0, examples.count, 1 << 16):
        rows = examples.read(np.arange(start, min(start + (1 << 16), examples.count)))
        parts.append(np.column_stack([rows[:, -WIDTH_BESIDE_TOKENS:], np.count_nonzero(rows < 0, axis=1)]))
    prompts, tokens, between = np.concatenate(parts).astype(np.int64).T
    # Nothing precedes the first token, so it is never predicted.
    return Sizes(tokens - 1, tokens - np.maximum(prompts, 1) - between)


def marked_ids(tokens: np.ndarray) -> np.ndarray:
    """Like `ids_of`, but end tokens within an example keep `WITHIN`."""
    return np.where(tokens < 0, ~tokens, tokens)


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """The ids of cached tokens, whether the loss counts them or not."""
    return marked_ids(tokens) & (WITHIN - 1)


def sizes_drawn(examples: Sequence[Readable], source: np.ndarray, row: np.ndarray) -> Sizes:
    """The sizes of the examples `row` of the sources `source` (int64 arrays of one shape)."""
    positions, counted = np.zeros_like(source), np.zeros_like(source)
    for index in np.unique(source):
        here = source == index
        sizes = example_sizes(examples[index])
        positions[here], counted[here] = sizes.positions[row[here]], sizes.counted[row[here]]
    return Sizes(positions, counted)


class Places(NamedTuple):
    """The places of examples: two int64 arrays [steps, examples], and the rows that each step needs, int64 [steps]."""

    row: np.ndarray
    column: np.ndarray
    rows: np.ndarray


def pack(positions: np.ndarray, length: int) -> Places:
    """Packs the examples of each step into rows of `length` by first-fit decreasing.

    The longest example is placed first, each in the first row with enough room: never more than 11/9 of the minimum
    number of rows plus one (Johnson, 1973).

    Args:
      positions: int64 [steps, examples], each in 1..length.
    """
    steps, examples = positions.shape
    order = np.argsort(-positions, axis=1, kind="stable")
    row, column = np.zeros_like(positions), np.zeros_like(positions)
    free = np.full((steps, examples), length, np.int64)
    every = np.arange(steps)
    used = 0  # rows that any step has opened; those beyond are all empty
    for k in range(examples):
        example = order[:, k]
        size = positions[every, example]
        chosen = np.argmax(free[:, : used + 1] >= size[:, None], axis=1)
        row[every, example], column[every, example] = chosen, length - free[every, chosen]
        free[every, chosen] -= size
        used = min(examples - 1, max(used, int(chosen.max()) + 1))
    return Places(row, column, row.max(axis=1) + 1)


def unpacked(positions: np.ndarray) -> Places:
    """Places each example in a separate row; `positions` as for `pack`."""
    steps, examples = positions.shape
    row = np.broadcast_to(np.arange(examples), positions.shape)
    return Places(row, np.zeros_like(positions), np.full(steps, examples))


def arrays_of_examples(
    examples: np.ndarray, source: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]
) -> dict[str, Any]:
    """The arrays of a batch, [rows, length] each, from examples and their places.

    Args:
      examples: int32 [N, length + 3], as they are cached.
      source: int [N], their sources.
      row, column: int [N], where each begins.
      shape: of the batch.

    Returns:
      The fields of `batches.Batch` by name. Unused columns have segment 0 and weight 0.
    """
    prompts, tokens = examples[:, -2].astype(np.int64), examples[:, -1].astype(np.int64)
    positions = tokens - 1
    ends = np.cumsum(positions)
    of = np.repeat(np.arange(len(examples)), positions)  # the example of each column that is used
    within = np.arange(len(of)) - np.repeat(ends - positions, positions)
    where = row[of], column[of] + within
    targets = examples[of, within + 1]
    # The documents of a row are numbered from left to right.
    order = np.lexsort((column, row))
    first = np.concatenate([[0], np.flatnonzero(np.diff(row[order])) + 1]) if len(order) else np.zeros(0, np.int64)
    segment = np.empty(len(order), np.int64)
    segment[order] = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)])) + 1

    def filled(values: np.ndarray, dtype: str = "int32") -> np.ndarray:
        array = np.zeros(shape, np.dtype(dtype))
        array[where] = values
        return array

    return {
        "inputs": filled(ids_of(examples[of, within])),
        "targets": filled(ids_of(targets)),
        "positions": filled(within),
        "segment_ids": filled(segment[of]),
        "weights": filled((within + 1 >= prompts[of]) & (targets >= 0), "float32"),
        "sources": filled(source[of]),
    }
