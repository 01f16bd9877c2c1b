"""Writes the rows of a task with many processes, in stages.

  plan      divides each split into shards: consecutive files of about 64 MiB. A split that cannot be divided (a
            third-party SeqIO task, TFDS, data held in Python, a sample of the whole) is one shard. The borders between
            a corpus's splits are also found here, because no shard sees the whole corpus.
  tokenize  turns a shard into a flat array of numbers: tokens, or in tuning whole rows
  pieces    computes each shard's offset from the cumulative sizes; the concatenation is cut into rows at fixed
            offsets, and a piece covers whole files of the cache
  cut       writes the rows of a piece from the one or more shards that it spans
  finish    moves the cache into place

The rows and every file of the cache are identical to those of `rows.cached_rows`, whatever the number of processes and
the order of their work. Each finished shard or piece leaves a file of facts, written last, and is not done again; if
two processes do the same one, both results are valid. Everything stays beside the cache until the cache is complete:

  CACHE_DIR/rows/<task>/<key>.building/plan.json, vocabulary.model
                                       tokens/<split>/<shard>.json and <shard>.<random>/     zarr3 of numbers
                                       pieces/<split>/<piece>.json
                                       cache/                                     on gs:// in <key>/ at once

No process holds more than a few megabytes of a corpus, or its largest document.
"""

import dataclasses
import itertools
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codellm_jax.mixture import rows
from codellm_jax.mixture.checked import row_digests
from codellm_jax.mixture.examples import Found, documents, example_rows
from codellm_jax.mixture.places import Place
from codellm_jax.mixture.roundtrip import Looked, of_whole, warned
from codellm_jax.mixture.rows import (
    ROWS_A_DIGEST,
    RowFormat,
    RowsHash,
    digest,
    finish_cache,
    hash_of_digests,
    row_format,
    summary,
    unit_of,
)
from codellm_jax.mixture.stores import (
    DIGESTS_A_CHUNK,
    create_digests,
    create_numbers,
    create_store,
    digests_path,
    open_store,
    salt_of,
)
from codellm_jax.mixture.tokens import (
    SPLITS,
    Definitions,
    Note,
    added,
    examples,
    find_borders,
    is_divisible,
    open_task,
    sample_of,
    warnings_of,
)
from codellm_jax.vocabulary import Vocabulary

SHARD_BYTES = 64 << 20
ROWS_A_PIECE = DIGESTS_A_CHUNK
NUMBERS_AT_ONCE = 1 << 20
SECONDS_BETWEEN_PARTS = 5.0
# Where a hash divides files into splits, about this fraction goes to each split other than training.
HELD_OUT = 0.02


@dataclasses.dataclass(frozen=True)
class Build:
    """A cache to write for a task, at `place`; the other fields are as for `rows.cached_rows`."""

    task: str
    definitions: Definitions
    vocabulary: Vocabulary
    length: int
    stage: str
    place: Place
    threads: int = 1  # for tokenizing a shard

    @property
    def format(self) -> RowFormat:
        return row_format(self.vocabulary, self.length, self.stage, self.place.loss)

    @property
    def working(self) -> epath.Path:
        return self.place.directory.with_name(f"{self.place.directory.name}.building")


class Shard(NamedTuple):
    """The unit of tokenization for one process: these files of a split, or all of it."""

    split: str
    number: int
    files: list[str] | None
    work: int  # expected bytes of text; 0 if unknown


class Piece(NamedTuple):
    """The unit of cutting for one process: rows of a split from `first` on, read from consecutive array spans."""

    split: str
    number: int
    first: int
    rows: int
    spans: list[tuple[str, int, int]]  # array name, start, stop (exclusive)


class Progress(NamedTuple):
    """Sums over shards."""

    shards: int  # finished
    work: int
    text_bytes: int
    seconds: float  # of processor time


def plan(build: Build) -> list[Shard]:
    """The shards of all splits, planned at the first call and read back afterwards.

    Raises:
      ValueError, OSError: the task does not exist, belongs to another stage, or its files cannot be found.
    """
    file = build.working / "plan.json"
    if not file.exists():
        task = open_task(build.task, build.definitions, build.stage)
        found = [shard for split in SPLITS if split in task.splits
                 for shard in _shards(split, is_divisible(task, split), build.place.key["definition"])]
        build.working.mkdir(parents=True, exist_ok=True)
        # Workers on other machines have no access to the local file.
        (build.working / "vocabulary.model").write_bytes(epath.Path(build.vocabulary.file).read_bytes())
        suffix = f".{uuid.uuid4().hex[:8]}" if build.place.is_remote else ""
        _write(file, {"suffix": suffix, "splits": [s for s in SPLITS if s in task.splits], "shards": found,
                      "borders": find_borders(task) if any(shard.files for shard in found) else None})
    return [Shard(*shard) for shard in json.loads(file.read_text())["shards"]]


def _shards(split: str, divisible: bool, definition: Mapping[str, Any]) -> Iterator[Shard]:
    files = definition.get(f"{split}_files", definition.get("train_files", []))
    part = 1.0 if f"{split}_files" in definition else HELD_OUT
    if not divisible or not files:
        yield Shard(split, 0, None, round(part * sum(size for _, size in files)))
        return
    some: list[str] = []
    number = bytes_ = 0
    for file, size in files:
        some.append(file)
        bytes_ += size
        if bytes_ >= SHARD_BYTES or file == files[-1][0]:
            yield Shard(split, number, some, round(part * bytes_))
            some, bytes_, number = [], 0, number + 1


def missing(build: Build, planned: Sequence[Shard]) -> list[Shard]:
    """The shards that are not tokenized yet."""
    done = {(split, file.name) for split in SPLITS for file in _files(build.working / "tokens" / split)}
    return [shard for shard in planned if (shard.split, f"{shard.number:06}.json") not in done]


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """The entries of a folder, none if it does not exist. Not a glob, so that names like runs[1] work."""
    return folder.iterdir() if folder.exists() else iter(())


# Collecting a task's warnings and silencing TensorFlow affect the whole process, which may have many threads.
_one_at_a_time = threading.Lock()


def tokenize(build: Build, shard: Shard) -> None:
    """Writes the numbers of a shard, then its facts; does nothing if they exist."""
    with _one_at_a_time:
        facts = build.working / "tokens" / shard.split / f"{shard.number:06}.json"
        if facts.exists():
            return
        facts.parent.mkdir(parents=True, exist_ok=True)
        vocabulary = dataclasses.replace(build.vocabulary, path=str(build.working / "vocabulary.model"))
        task = open_task(build.task, build.definitions, build.stage)
        if shard.files is None and build.definitions.describe(build.task) != build.place.key["definition"]:
            raise ValueError(f"{build.task} differs in the process that reads it: its Python or its modules are not "
                             "those of this machine. Install the same ones.")
        recorded = json.loads((build.working / "plan.json").read_text())
        sample = sample_of(task, shard.split)
        found, own = Found(), f"{shard.number:06}.{uuid.uuid4().hex[:8]}"
        part, told = facts.with_name(f"{own}.part"), time.monotonic()
        began, text_bytes = time.process_time(), 0

        def counted() -> Iterator[Any]:
            nonlocal text_bytes, told
            for example in examples(
                    task, shard.split, vocabulary, shard.files, build.threads, recorded["borders"], sample):
                text_bytes += example.text_bytes
                yield example
                if time.monotonic() - told > SECONDS_BETWEEN_PARTS:
                    told = time.monotonic()
                    part.write_text(json.dumps({"bytes": text_bytes, "seconds": time.process_time() - began}))

        with warnings_of(build.task) as notes:
            numbers = _write_numbers(build, str(facts.with_name(own)), counted(), found)
        _write(facts, {
            "array": own, "numbers": numbers, "found": dataclasses.asdict(found), "notes": notes,
            "looked": sample.looked_at(vocabulary),
            "bytes": text_bytes, "seconds": time.process_time() - began})
        part.unlink(missing_ok=True)


def _write_numbers(build: Build, path: str, tokenized: Iterator[Any], found: Found) -> int:
    """Writes the numbers of examples to an array; returns their count."""
    dtype = build.format.dtype
    store, written = create_numbers(path, dtype), 0
    parts: Iterator[np.ndarray]
    if build.stage == "tuning":
        parts = (block.ravel() for block in example_rows(tokenized, build.length, found))
    else:
        parts = documents(tokenized, build.place.loss, build.vocabulary.end_of_document_id, found)
    waiting: list[np.ndarray] = []
    size = 0
    for part in itertools.chain(parts, [None]):
        if part is not None:
            waiting.append(part)
            size += len(part)
        if size >= NUMBERS_AT_ONCE or part is None:
            joined = np.concatenate([*waiting, np.zeros(0, np.int32)])
            whole = size if part is None else size // NUMBERS_AT_ONCE * NUMBERS_AT_ONCE
            if whole:
                store = store.resize(exclusive_max=[written + whole]).result()
                store[written : written + whole].write(joined[:whole].astype(dtype)).result()
            written += whole
            waiting, size = [joined[whole:]], size - whole
    return written


def progress(build: Build, shards: Sequence[Shard]) -> Progress:
    """The progress of the shards, including those being tokenized."""
    done, work, text_bytes, seconds = 0, 0.0, 0, 0.0
    for split, of_split in itertools.groupby(shards, key=lambda shard: shard.split):
        folder = build.working / "tokens" / split
        parts: dict[str, list[epath.Path]] = {}
        for file in _files(folder):
            if file.suffix in (".json", ".part") and not file.name.startswith("."):
                parts.setdefault(file.name[:6], []).append(file)
        for shard in of_split:
            files = parts.get(f"{shard.number:06}", [])
            whole = [file for file in files if file.suffix == ".json"]
            done += bool(whole)
            newest = sorted(files, key=lambda file: file.stat().mtime)[-1:] if len(files) > 1 else files
            for file in whole or newest:
                try:
                    facts = _facts_of(file)
                except (ValueError, OSError):  # a .part file may be deleted by now or half written
                    continue
                text_bytes, seconds = text_bytes + facts["bytes"], seconds + facts["seconds"]
                work += shard.work if whole else min(shard.work, facts["bytes"])
    return Progress(done, round(work), text_bytes, seconds)


# Facts of finished shards never change.
_known_facts: dict[str, dict[str, Any]] = {}


def _facts_of(file: epath.Path) -> dict[str, Any]:
    if str(file) in _known_facts:
        return _known_facts[str(file)]
    facts = json.loads(file.read_text())
    if file.suffix == ".json":
        _known_facts[str(file)] = facts
    return facts


def pieces(build: Build, shards: Sequence[Shard]) -> list[Piece]:
    """The pieces to cut from tokenized shards; creates the arrays that receive them."""
    width, found = build.format.width, []
    for split, of_split in itertools.groupby(shards, key=lambda shard: shard.split):
        facts = [_facts_of(build.working / "tokens" / split / f"{shard.number:06}.json") for shard in of_split]
        ends = np.cumsum([fact["numbers"] for fact in facts])
        total = int(ends[-1]) // width
        create_store(_array_of_rows(build, split), *build.format, rows=total)
        create_digests(_array_of_rows(build, split), total)
        for number, first in enumerate(range(0, total, ROWS_A_PIECE)):
            count = min(ROWS_A_PIECE, total - first)
            begin, end = first * width, (first + count) * width
            spans = []
            for k in range(int(np.searchsorted(ends, begin, side="right")), len(facts)):
                start = int(ends[k]) - facts[k]["numbers"]
                if start >= end:
                    break
                if facts[k]["numbers"]:
                    spans.append((facts[k]["array"], max(0, begin - start), min(facts[k]["numbers"], end - start)))
            found.append(Piece(split, number, first, count, spans))
    return found


def is_cut(build: Build, piece: Piece) -> bool:
    return _facts_of_piece(build, piece).exists()


def _facts_of_piece(build: Build, piece: Piece) -> epath.Path:
    return build.working / "pieces" / piece.split / f"{piece.number:06}.json"


def cut(build: Build, piece: Piece) -> None:
    """Writes the rows of a piece, then its facts; does nothing if they exist."""
    facts = _facts_of_piece(build, piece)
    if facts.exists():
        return
    facts.parent.mkdir(parents=True, exist_ok=True)
    width = build.format.width
    store = open_store(_array_of_rows(build, piece.split), write=True)
    digests: list[str] = []
    of_rows: list[np.ndarray] = []
    row = piece.first
    for numbers in _joined(build, piece, ROWS_A_DIGEST * width):
        block = numbers.reshape(-1, width)
        store[row : row + len(block)].write(block).result()
        digests.append(digest(block).hex())
        of_rows.append(row_digests(salt_of(build.place, piece.split), range(row, row + len(block)), block))
        row += len(block)
    if row != piece.first + piece.rows:
        raise ValueError(f"{build.working} holds fewer tokens than it declares: delete it and run the command again.")
    if of_rows:
        open_store(digests_path(_array_of_rows(build, piece.split)), write=True)[piece.first : row].write(
            np.concatenate(of_rows)).result()
    _write(facts, digests)


def _joined(build: Build, piece: Piece, size: int) -> Iterator[np.ndarray]:
    """The numbers of a piece in arrays of `size`, the last one with the remainder."""
    waiting: list[np.ndarray] = []
    missing = size
    for name, start, stop in piece.spans:
        array = open_store(str(build.working / "tokens" / piece.split / name))
        while start < stop:
            end = min(stop, start + missing)
            waiting.append(array[start:end].read().result())
            missing, start = missing - (end - start), end
            if not missing:
                yield np.concatenate(waiting)
                waiting, missing = [], size
    if waiting:
        yield np.concatenate(waiting)


def _array_of_rows(build: Build, split: str) -> str:
    recorded = json.loads((build.working / "plan.json").read_text())
    return str(_cache(build) / f"{split}{recorded['suffix']}")


def _cache(build: Build) -> epath.Path:
    return build.place.directory if build.place.is_remote else build.working / "cache"


def finish(build: Build, shards: Sequence[Shard], cut_pieces: Sequence[Piece]) -> list[str]:
    """Moves the cache into place once everything is cut, and removes the working files; returns lines to report.

    Raises:
      ValueError: there is nothing to train on.
    """
    splits: dict[str, Found] = {}
    lines: list[str] = []
    for split, of_split in itertools.groupby(shards, key=lambda shard: shard.split):
        facts = [_facts_of(build.working / "tokens" / split / f"{shard.number:06}.json") for shard in of_split]
        total = {name: sum(fact["found"][name] for fact in facts)
                 for name in ("tokens", "documents", "cut", "left_out", "conversations", "uncounted")}
        of_pieces = [_facts_of_piece(build, piece) for piece in cut_pieces if piece.split == split]
        count = sum(fact["numbers"] for fact in facts) // build.format.width
        notes = added(Note(template, tuple(values)) for fact in facts for template, values in fact["notes"])
        looked = of_whole(Looked(*one) for fact in facts for one in fact["looked"])
        splits[split] = Found(
            count=count, notes=[*map(str, notes), *warned(build.task, split, looked, unit_of(build.stage))], **total,
            content_hash=_hash_of_rows(_array_of_rows(build, split), count, of_pieces),
            digests=salt_of(build.place, split))
        lines += [summary(build.task, split, splits[split], build.length, build.stage), *splits[split].notes]
    recorded = json.loads((build.working / "plan.json").read_text())
    finish_cache(build.task, build.place, splits, _cache(build), recorded["suffix"], build.length, build.stage)
    build.working.rmtree(missing_ok=True)
    _known_facts.clear()
    return [line for line in lines if line]


def _hash_of_rows(array: str, count: int, of_pieces: Sequence[epath.Path]) -> str:
    if count > rows.ROWS_HASHED_WHOLE:
        return hash_of_digests(bytes.fromhex(each) for file in of_pieces for each in json.loads(file.read_text()))
    store, content = open_store(array), RowsHash()
    for first in range(0, count, ROWS_A_DIGEST):
        content.update(store[first : min(count, first + ROWS_A_DIGEST)].read().result())
    return content.of_all()


def for_workers(build: Build, planned: Sequence[Shard]) -> Build:
    """The build without the list of all files, which may be too large for a runner."""
    needed = {"definition": build.place.key["definition"]} if any(shard.files is None for shard in planned) else {}
    return dataclasses.replace(build, place=build.place._replace(key=needed))


def as_text(build: int, what: Shard | Piece) -> str:
    """A shard or piece of build number `build`, for `do`; a shard's files are read from the plan."""
    return json.dumps([build, what[:2] if isinstance(what, Shard) else what])


def do(builds: Sequence[Build], text: str) -> None:
    """Tokenizes or cuts the shard or piece that `as_text` wrote."""
    number, what = json.loads(text)
    build = builds[number]
    if len(what) > 2:
        cut(build, Piece(*what))
    else:
        tokenize(build, next(shard for shard in plan(build) if [*shard[:2]] == what))


def _write(file: epath.Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    building = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    building.write_text(json.dumps(value))
    building.replace(file)

