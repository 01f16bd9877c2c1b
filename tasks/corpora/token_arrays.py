"""Tokenized documents: Megatron's .bin with its .idx, and flat arrays, as in OLMo and nanoGPT.

  {"megatron": PATTERN, "vocabulary": "gpt2/tokenizer.json"}     the .bin files; each needs its .idx beside it
  {"tokens": PATTERN, "vocabulary": "...", "dtype": "uint16"}    consecutive documents, each ended by a token

`vocabulary` is the vocabulary of the tokens, named as in VOCABULARY; a run must use the same. `end` is the id that ends
a document in these files, if it is not the vocabulary's own. `dtype` ("uint16" or "uint32", little-endian) is by
default the smaller one that holds all ids; a NumPy .npy file declares its own.

Nothing is tokenized: the ids become rows unchanged. The text of each document is decoded, with a table of the bytes of
each id, only because splits and `sample` depend on the hash of the text. A corpus thus has the same splits as text and
as tokens, and the same rows if its ids are the vocabulary's encoding of the text. Ids outside the vocabulary are
refused. The first 8 documents of each file are encoded again: if none gives its own ids, the corpus is refused; if
only some do, a warning states the number.
"""

import dataclasses
import itertools
import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codellm_jax.contents import BrokenFile, UnreadableFile, head, is_file, open_binary, size
from tasks.corpora import sources
from tasks.corpora.files import Found, Lost, PassedOver, in_name_of
from tasks.corpora.records import EMPTY_FILE, broken_rest
from tasks.corpora.specs import Borders, borders_of, holdout_of, kind_of, position, validate

BYTES_AT_ONCE = 1 << 22
LONGEST = 1 << 28  # tokens of a document
ENDLESS = 1 << 22  # tokens within which at least one document must end
CHECKED, CHECKED_TOKENS = 8, 256  # documents of a file that are encoded again, and first tokens of each
_TOO_LONG = "longer than 2**28 tokens"
_MEGATRON = b"MMIDIDX\0\0"
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # by Megatron's codes, without those of floats
DOCUMENTS_AT_ONCE = 1 << 14


@dataclasses.dataclass(frozen=True)
class Known:
    """The vocabulary of the tokens, as far as needed here."""

    name: str
    pieces: int  # upper bound of ids
    end: int
    begin: tuple[int, ...]  # ids that may begin a document, and are dropped
    text: Callable[[np.ndarray], bytes]  # of a document's ids
    encode: Callable[[str], Sequence[int]]


class Document(NamedTuple):
    """The ids of a document, int32 [tokens], without those that mark its beginning and end, and their text."""

    ids: np.ndarray
    text: str


def documents(
    spec: Mapping[str, Any], split: str, name: str, known: Known, only_files: Sequence[str] | None = None,
    borders: Borders | None = None,
) -> Iterator[Document]:
    """Reads a corpus of tokens, in the order of its sorted files; arguments and errors as in `sources.documents`."""
    validate(spec, name)
    whole = only_files is None
    chosen = sources.files(spec, split, name) if only_files is None else only_files
    differing = PassedOver()
    records = _records(spec, chosen, name, known, differing)
    usable = sources.usable(records, spec, split, name, lambda: borders or find_borders(spec, name, known), whole)
    return _told((Document(found.ids, str(found.content)) for found in usable), differing, split, name, whole)


def _told(
    found: Iterator[Document], differing: PassedOver, split: str, name: str, whole: bool
) -> Iterator[Document]:
    """Yields the same documents; reports differing encodings at the end."""
    yield from found
    if differing or not whole:  # also for a part without differences, so that parts add up to the whole
        logging.warning("%s, read for %s: among the first documents of each file, %s.", name, split, differing)


def find_borders(spec: Mapping[str, Any], name: str, known: Known) -> Borders | None:
    """As `sources.find_borders`."""
    holdout = holdout_of(spec)
    if not holdout:
        return None
    records = _records(spec, sources.files(spec, "train", name), name, known)
    return borders_of((position(content) for content, _ in sources.texts(records, spec, PassedOver())), holdout)


def _records(
    spec: Mapping[str, Any], chosen: Sequence[str], name: str, known: Known, differing: PassedOver | None = None
) -> Iterator[Found]:
    """Yields the documents of files, as text and ids.

    Args:
      differing: collects, of the first documents of each file, those that are encoded differently; None checks none.
    """
    end = spec.get("end", known.end)
    read = _megatron if kind_of(spec) == "megatron" else _flat
    with in_name_of(name):
        for file in chosen:
            checked = different = 0
            try:
                for place, found in read(file, spec, known, end):
                    if isinstance(found, Lost):
                        yield Found(place, found)
                        continue
                    ids = _bare(found, known, end, place)
                    if not len(ids):
                        continue
                    if differing is not None and checked < CHECKED:
                        checked += 1
                        if not _comes_back(ids, known):
                            different += 1
                            differing.add(
                                f"have tokens other than those that {known.name} gives their text, and are used "
                                f"unchanged",
                                place)
                        if different == CHECKED:
                            raise UnreadableFile(
                                f"{file}: none of its first {CHECKED} documents has the tokens that {known.name} gives "
                                "its text. They were made with another vocabulary: name that one as 'vocabulary'.")
                    yield Found(place, known.text(ids), ids=ids)
            except BrokenFile:
                yield Found(file, broken_rest(file))


def _bare(ids: np.ndarray, known: Known, end: int, place: str) -> np.ndarray:
    """The ids of a document without those that mark its beginning and end; checks that all are in the vocabulary."""
    if len(ids) and ids[-1] == end:
        ids = ids[:-1]
    if known.begin and tuple(ids[: len(known.begin)].tolist()) == known.begin:
        ids = ids[len(known.begin) :]
    if len(ids) and not 0 <= (wrong := ids.max() if ids.min() >= 0 else ids.min()) < known.pieces:
        raise UnreadableFile(f"{place} holds the id {wrong}, but {known.name} has the ids 0 to {known.pieces - 1}: the "
                             "tokens were made with another vocabulary, or have another 'dtype'.")
    return ids.astype(np.int32)


def _comes_back(ids: np.ndarray, known: Known) -> bool:
    """Whether the text of a document's beginning is encoded to the same ids; ignores the last ids if it is cut."""
    some = ids[:CHECKED_TOKENS]
    text = known.text(some).decode(errors="ignore")
    sure = len(some) if len(some) == len(ids) else len(some) * 3 // 4
    return list(known.encode(text))[:sure] == some[:sure].tolist()


# ---- Flat arrays -------------------------------------------------------------------------------


def _flat(file: str, spec: Mapping[str, Any], known: Known, end: int) -> Iterator[tuple[str, np.ndarray | Lost]]:
    with open_binary(file) as stream:
        dtype = _dtype_of(file, stream, spec, known)
        is_empty = True
        for place, tokens in _ended(file, stream, dtype, end):
            is_empty = False
            yield place, tokens
        if is_empty:
            yield file, Lost(EMPTY_FILE)


def _dtype_of(file: str, stream: Any, spec: Mapping[str, Any], known: Known) -> np.dtype:
    """The type of a file's numbers; leaves the stream at the first number."""
    beginning = head(file)
    if beginning.startswith(b"\x93NUMPY"):
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
        except ValueError as error:
            raise UnreadableFile(f"{file} has a damaged header ({error}); copy or download it again.") from None
        if len(shape) != 1 or dtype.kind not in "ui" or dtype.byteorder == ">":
            raise UnreadableFile(f"{file} is an array of {dtype} with the shape {shape}; expected one "
                                 "dimension of little-endian integers.")
        return dtype
    dtype = np.dtype(spec.get("dtype", "uint16" if known.pieces <= 1 << 16 else "uint32")).newbyteorder("<")
    some = np.frombuffer(beginning[: len(beginning) // 4 * 4], "<u2")
    if dtype.itemsize == 2 and len(some) > 64 and not some[1::2].any() and some[::2].any():
        raise UnreadableFile(f"every second number of {file} is 0, as with numbers of 32 bits: give 'dtype': "
                             "'uint32'.")
    return dtype


def _ended(file: str, stream: Any, dtype: np.dtype, end: int) -> Iterator[tuple[str, np.ndarray | Lost]]:
    """Yields the documents in an array of ids, split at the end id, with the start of each; omits empty ones."""
    waiting: list[np.ndarray] = []  # parts of a document that has not ended
    begin = held = at = 0
    has_end = False
    rest = b""
    while True:
        piece = rest + stream.read(BYTES_AT_ONCE)
        if not len(piece) // dtype.itemsize:
            break
        whole = len(piece) // dtype.itemsize * dtype.itemsize
        block, rest = np.frombuffer(piece[:whole], dtype), piece[whole:]
        start = 0
        for stop in np.flatnonzero(block == end):
            has_end = True
            found, length = [*waiting, block[start:stop]], held + int(stop) - start
            if length:
                yield f"{file}, token {begin}", np.concatenate(found) if length <= LONGEST else Lost(_TOO_LONG)
            start, waiting, held, begin = int(stop) + 1, [], 0, at + int(stop) + 1
        held += len(block) - start
        if held <= LONGEST:
            waiting.append(block[start:])
        else:
            waiting = []
        at += len(block)
        if not has_end and at >= ENDLESS:
            raise UnreadableFile(f"the first {at} numbers of {file} hold no id {end}, which should end documents: give "
                                 "the right id as 'end', or the right 'vocabulary' or 'dtype'.")
    if held:
        yield f"{file}, token {begin}", np.concatenate(waiting) if held <= LONGEST else Lost(_TOO_LONG)
    if rest:
        raise BrokenFile(f"{len(rest)} bytes are left after the last whole number")


# ---- Megatron ----------------------------------------------------------------------------------


class _Index(NamedTuple):
    """The layout of an .idx; its arrays are sizes int32 [sequences], offsets int64 [sequences], documents int64 [D]."""

    dtype: np.dtype
    sequences: int
    documents: int  # numbers that divide the sequences into documents, the first 0
    sizes_at: int

    @property
    def offsets_at(self) -> int:
        return self.sizes_at + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        return self.offsets_at + 8 * self.sequences


def _index_of(file: str) -> str:
    return f"{file.removesuffix('.bin')}.idx"


def _read_index(file: str) -> _Index:
    if not file.endswith(".bin"):
        raise UnreadableFile(f"{file} is not a .bin file; name Megatron's .bin files, whose .idx must be in the same "
                             f"folder.")
    index = _index_of(file)
    if not is_file(index):
        raise FileNotFoundError(f"{file} has no {index} beside it, which holds the document boundaries.")
    beginning = head(index)
    if not beginning.startswith(_MEGATRON) or len(beginning) < 34:
        raise UnreadableFile(f"{index} is not a Megatron index (its first bytes are {beginning[:9]!r}, not "
                             f"{_MEGATRON!r}).")
    version, code, sequences, documents = struct.unpack("<QBQQ", beginning[9:34])
    if version != 1 or code not in _TYPES:
        raise UnreadableFile(f"{index} has version {version} and number type {code}; only version 1 with integers "
                             "is read.")
    found = _Index(np.dtype(_TYPES[code]), sequences, documents, 34)
    if size(index) < found.documents_at + 8 * documents:
        raise UnreadableFile(f"{index} is truncated: it has {size(index)} bytes, "
                             f"but needs {found.documents_at + 8 * documents} for its {sequences} sequences and "
                             f"{documents} documents; copy or download it again.")
    return found


def _megatron(file: str, spec: Mapping[str, Any], known: Known, end: int) -> Iterator[tuple[str, np.ndarray | Lost]]:
    index, length = _read_index(file), size(file)
    with open_binary(_index_of(file)) as numbers, open_binary(file) as stream:

        def read(at: int, dtype: str, first: int, count: int) -> np.ndarray:
            width = np.dtype(dtype).itemsize
            numbers.seek(at + first * width)
            return np.frombuffer(numbers.read(count * width), dtype)

        for first in range(0, index.documents - 1, DOCUMENTS_AT_ONCE):
            bounds = read(index.documents_at, "<i8", first, min(DOCUMENTS_AT_ONCE + 1, index.documents - first))
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > index.sequences:
                raise UnreadableFile(f"{_index_of(file)} is damaged: documents from sequence {first} on have missing "
                                     "sequences; copy or download it again.")
            start, count = int(bounds[0]), int(bounds[-1] - bounds[0])
            sizes, offsets = (read(*where, start, count).tolist() for where in (
                (index.sizes_at, "<i4"), (index.offsets_at, "<i8")))
            for number, (begin, stop) in enumerate(itertools.pairwise((bounds - start).tolist()), first + 1):
                yield f"{file}, document {number}", _sequences(
                    stream, index.dtype, sizes[begin:stop], offsets[begin:stop], length)
        if index.documents < 2:
            yield file, Lost(EMPTY_FILE)


def _sequences(
    stream: Any, dtype: np.dtype, sizes: Iterable[int], offsets: Iterable[int], length: int
) -> np.ndarray | Lost:
    """The joined tokens of some sequences; `length` is that of the file, in bytes."""
    found = [np.zeros(0, dtype)]
    for tokens, offset in zip(sizes, offsets, strict=True):
        if tokens < 0 or offset < 0 or offset + tokens * dtype.itemsize > length:
            return Lost("beyond the end of the .bin file")
        if tokens > LONGEST:
            return Lost(_TOO_LONG)
        if stream.tell() != offset:
            stream.seek(offset)
        found.append(np.frombuffer(stream.read(tokens * dtype.itemsize), dtype))
    return np.concatenate(found)
