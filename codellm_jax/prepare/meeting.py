"""Finds near duplicates: documents that agree in a band meet, and are compared by their shingles.

No document is read alone. Work alternates between buckets, which are ranges of the bands' hashes, and units, the files
of signatures that parts wrote. In each round, a worker reads one range of each file of the previous round:

  MEET     a bucket finds the groups of documents that agree in a band
  BRING    a unit writes the signatures and shingles of its documents to one file, with a range for each bucket
  COMPARE  a bucket compares the documents of each group and writes the similar pairs

The number of reads is therefore units times buckets, however many duplicates there are. Near duplicates often agree in
many bands: of groups with exactly the same documents, only one is compared.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from codellm_jax.prepare import joining, ranged
from codellm_jax.prepare.duplicates import jaccard, similar_pairs
from codellm_jax.prepare.job import BAND, EDGE, PART_BITS, Job, signed
from codellm_jax.prepare.keys import RANGES
from codellm_jax.prepare.steps import Step

MET = np.dtype([("document", "<u8"), ("set", "<u8"), ("bucket", "<u4"), ("group", "<u4")])
BROUGHT = np.dtype([("document", "<u8"), ("rank", "<u8"), ("bytes", "<u8"), ("group", "<u4"), ("shingles", "<u4")])
WORD = np.dtype("<u4")  # the unit of everything brought
SETS_HELD = 1 << 10  # sets of shingles held in memory


class Unit(NamedTuple):
    """A file of signatures: its first document, its path, and the path of its shingles."""

    first: int
    signed: epath.Path
    shingles: epath.Path


def units(job: Job, stage: int) -> list[Unit]:
    """The files of signatures of a stage, sorted by the numbers of their documents."""
    found = []
    for path in job.files(stage, "signed"):
        part, _, place = path.name.removesuffix(".bin").split("-")[1:]
        found.append(Unit(int(part) << PART_BITS | int(place), path,
                          path.with_name(path.name.replace("signed", "shingles", 1))))
    return sorted(found)


def meet(job: Job, stage: int, bucket: int, count: int) -> None:
    """Writes the documents that agree in a band of one of `count` buckets, by unit, unless that is done."""
    path = job.path(stage, "met", bucket, ".bin")
    if path.exists():
        return
    first, last = bucket * RANGES // count, (bucket + 1) * RANGES // count
    bands = ranged.read(job.files(stage, "keys"), BAND, RANGES, first, last)
    starts = np.array([unit.first for unit in units(job, stage)], np.uint64)
    met = groups(bands)
    met["bucket"] = bucket
    ranged.write(path, met, np.searchsorted(starts, met["document"], "right") - 1, len(starts))


def groups(bands: np.ndarray) -> np.ndarray:
    """The groups of documents that share a band.

    Args:
      bands: BAND [N].

    Returns:
      MET, sorted by document; groups are numbered by ascending key, and `set` is a hash of the group's documents.
    """
    bands = bands[np.lexsort((bands["document"], bands["key"]))]
    key, document = bands["key"], bands["document"]
    again = np.zeros(len(bands), bool)
    again[1:] = (key[1:] == key[:-1]) & (document[1:] == document[:-1])
    key, document = key[~again], document[~again]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    sizes = np.diff(np.append(starts, len(key)))
    hashed = np.add.reduceat(_mixed(document), starts) if len(starts) else np.zeros(0, np.uint64)
    several = sizes > 1
    here = np.repeat(several, sizes)
    met = np.zeros(int(here.sum()), MET)
    met["document"] = document[here]
    met["set"] = np.repeat(hashed[several], sizes[several])
    met["group"] = np.repeat(np.arange(int(several.sum())), sizes[several])
    return met[np.lexsort((met["group"], met["document"]))]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A hash of each number, so that sums of hashes identify sets of numbers (Steele et al., 2014, SplitMix64)."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def bring(job: Job, stage: int, number: int, count: int) -> None:
    """Writes the data that each of `count` buckets needs about a unit's documents, unless that is done."""
    path = job.path(stage, "brought", number, ".bin")
    if path.exists():
        return
    everyone = units(job, stage)
    unit, dtype = everyone[number], _signed(_step(job, stage))
    met = _wanted(job, stage, number, count, len(everyone))
    with ranged.on_disk(unit.signed) as signatures:
        # The file may be large; only the requested rows are read.
        rows = np.memmap(signatures, dtype, "r")[(met["document"] - np.uint64(unit.first)).astype(np.int64)]
    brought = np.zeros(len(met), BROUGHT)
    for name in ("document", "group"):
        brought[name] = met[name]
    for name in ("rank", "bytes", "shingles"):
        brought[name] = rows[name]
    borders = np.searchsorted(met["bucket"], np.arange(count + 1))
    words = np.append(0, np.cumsum(brought["shingles"], dtype=np.int64))[borders]
    sizes = np.diff(borders) * (BROUGHT.itemsize + rows.dtype["signature"].itemsize) + np.diff(words) * WORD.itemsize
    file = ranged.Growing(path)
    try:
        # A range holds the number of documents, the documents, their signatures, then their shingles.
        file.write(np.append(0, np.cumsum(sizes + 8)).astype(np.uint64))
        with ranged.on_disk(unit.shingles) if words[-1] else tempfile.TemporaryFile() as shingles:
            of_unit = np.memmap(shingles, WORD, "r") if words[-1] else np.zeros(0, WORD)
            for first, last in itertools.pairwise(borders.tolist()):
                file.write(np.array([last - first], np.uint64))
                file.write(brought[first:last])
                file.write(rows["signature"][first:last])
                for row in rows[first:last]:
                    file.write(of_unit[int(row["begin"]) : int(row["begin"]) + int(row["shingles"])])
    except BaseException:
        file.discard()
        raise
    file.close()


def _wanted(job: Job, stage: int, number: int, count: int, among: int) -> np.ndarray:
    """The documents of one of `among` units that meet others: MET, sorted by bucket, group and document."""
    paths = [job.path(stage, "met", bucket, ".bin") for bucket in range(count)]
    met = ranged.read(paths, MET, among, number, number + 1)
    # Of a document's groups with identical documents keep the first, which is the same group for each of them.
    met = met[np.lexsort((met["group"], met["bucket"], met["set"], met["document"]))]
    first = np.ones(len(met), bool)
    first[1:] = (met["document"][1:] != met["document"][:-1]) | (met["set"][1:] != met["set"][:-1])
    met = met[first]
    return met[np.lexsort((met["document"], met["group"], met["bucket"]))]


def compare(job: Job, stage: int, bucket: int, count: int) -> None:
    """Writes the similar pairs among the documents that meet in one of `count` buckets, unless that is done."""
    path = job.path(stage, "edges", bucket, ".bin")
    if path.exists():
        return
    paths = [job.path(stage, "brought", number, ".bin") for number in range(len(units(job, stage)))]
    begins = [np.frombuffer(head, np.uint64).astype(np.int64) + ranged.index_bytes(count) for head in ranged.pieces(
        (path, 8 * bucket, 8 * (bucket + 2)) for path in paths)]
    with tempfile.TemporaryFile() as file:
        sizes = ranged.copy(zip(paths, *np.array(begins).reshape(-1, 2).T.tolist(), strict=True), file)
        words = np.memmap(file, WORD, "r") if sum(sizes) else np.zeros(0, WORD)
        edges = _edges(_step(job, stage), words, sizes)
    write_edges(path, edges)


def _edges(step: Step, words: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The similar pairs among the documents that units brought, EDGE.

    Args:
      words: WORD, the data brought, unit by unit.
      sizes: bytes brought by each unit.
    """
    hashes, similarity = step.options["bands"] * step.options["rows"], step.options["similarity"]
    brought, signatures, begins = _parsed(words, sizes, hashes)
    order = np.argsort(brought["document"], kind="stable")
    numbers, first = np.unique(brought["document"][order], return_index=True)
    row_of = order[first]  # all rows of a document have the same shingles

    @functools.lru_cache(maxsize=SETS_HELD)
    def shingles(at: int) -> np.ndarray:
        row = row_of[at]
        return np.array(words[begins[row] : begins[row] + int(brought["shingles"][row])])

    @functools.lru_cache(maxsize=1 << 16)
    def exact(one: int, other: int) -> float:
        return jaccard(shingles(one), shingles(other))

    pairs: dict[tuple[int, int], float] = {}
    for rows in _by_group(brought):
        at = np.searchsorted(numbers, brought["document"][rows]).tolist()

        def of_group(one: int, other: int, at: list[int] = at) -> float:
            return exact(*sorted((at[one], at[other])))

        of_rows = words[signatures[rows][:, None] + np.arange(hashes)]
        for one, other, value in similar_pairs(of_rows, similarity, of_group):
            pairs[min(at[one], at[other]), max(at[one], at[other])] = value
    edges = np.zeros(len(pairs), EDGE)
    for side, name in enumerate(("first", "second")):
        rows = row_of[np.fromiter((pair[side] for pair in pairs), np.int64, len(pairs))]
        edges[name] = brought["document"][rows]
        edges[f"{name}_bytes"], edges[f"{name}_rank"] = brought["bytes"][rows], brought["rank"][rows]
    edges["similarity"] = list(pairs.values())
    return edges


def _parsed(words: np.ndarray, sizes: Sequence[int], hashes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents brought, and for each the offsets in `words` of its signature and its shingles."""
    found: list[Any] = [(np.zeros(0, BROUGHT), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    at = 0
    for size in sizes:
        count = int(words[at : at + 2].view(np.uint64)[0])
        signature = at + 2 + count * BROUGHT.itemsize // WORD.itemsize
        brought = words[at + 2 : signature].view(BROUGHT)
        lengths = brought["shingles"].astype(np.int64)
        found.append((np.array(brought), signature + np.arange(count) * hashes,
                      signature + count * hashes + np.cumsum(lengths) - lengths))
        at += size // WORD.itemsize
    brought, signatures, shingles = (np.concatenate(each) for each in zip(*found, strict=True))
    return brought, signatures, shingles


def _by_group(brought: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each group, in an order that depends only on the texts."""
    order = np.lexsort((brought["document"], brought["rank"], brought["group"]))
    borders = np.flatnonzero(np.diff(brought["group"][order])) + 1
    yield from (rows for rows in np.split(order, borders) if len(rows))


def write_edges(path: epath.Path, edges: np.ndarray) -> None:
    """Writes pairs in both directions, in ranges of the hash of the first document."""
    edges = joining.both_ways(edges)
    ranges = (joining.hashed(edges) >> np.uint64(64 - 12)).astype(np.int64)
    order = np.argsort(ranges, kind="stable")
    ranged.write(path, edges[order], ranges[order], RANGES)


def _step(job: Job, stage: int) -> Step:
    number = job.stages[stage].after
    assert number is not None
    return job.steps[number]


def _signed(step: Step) -> np.dtype:
    return signed(step.options["bands"] * step.options["rows"])
