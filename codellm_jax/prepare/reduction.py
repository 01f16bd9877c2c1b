"""Which documents go where that depends on all of them: for ranges of hashes each by itself, then together."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from codellm_jax.prepare import joining, ranged
from codellm_jax.prepare.duplicates import groups, jaccard, similar_pairs
from codellm_jax.prepare.job import BAND, DRAWN, DROPPED, EDGE, EQUAL, PART_BITS, Job, signed
from codellm_jax.prepare.keys import BINS, RANGES
from codellm_jax.prepare.steps import Step

BYTES_A_BUCKET = 64 << 20  # of keys that are held at once
DOCUMENTS_HELD = 1 << 17  # whose signatures are held at once; a group of more is held whole
SETS_HELD = 1 << 10  # of shingles, of documents that are compared
SHINGLE = np.dtype("<u4")


def files(job: Job, stage: int, kind: str) -> list[epath.Path]:
    """The files of a kind in a stage, sorted."""
    folder = epath.Path(job.folder) / f"stage{stage}"
    return sorted(path for path in folder.iterdir() if path.name.startswith(f"{kind}-"))


def buckets(job: Job, stage: int) -> int:
    """Into how many jobs the ranges of hashes are shared out: by the keys' size alone, whatever is killed."""
    step = _step(job, stage)
    if step.name == "sample":
        return 0
    size = _size(files(job, stage, "keys"))
    wanted = max(min(len(job.parts), 16), size // BYTES_A_BUCKET + 1)
    return min(RANGES, 1 << math.ceil(math.log2(wanted)))


def _size(paths: Sequence[epath.Path]) -> int:
    """Bytes of all records of some files."""
    return sum(path.stat().length - ranged.index_bytes(RANGES) for path in paths)


def _step(job: Job, stage: int) -> Step:
    number = job.stages[stage].after
    assert number is not None
    return job.steps[number]


def reduce(job: Job, stage: int, bucket: int, count: int) -> None:
    """Does one of `count` buckets behind a stage, unless it is done."""
    step = _step(job, stage)
    near = step.name == "near_duplicates"
    path = job.path(stage, "edges" if near else "found", bucket, ".bin")
    if path.exists():
        return
    first, last = bucket * RANGES // count, (bucket + 1) * RANGES // count
    keys = files(job, stage, "keys")
    if near:
        bands = np.sort(ranged.read(keys, BAND, RANGES, first, last), order=["key", "document"])
        _write_edges(path, _edges(job, stage, step, bands))
        return
    found = np.sort(ranged.read(keys, EQUAL, RANGES, first, last),
                    order=["high", "low", "rank", "document", "place"])
    _write_dropped(job, path, _equal(found, step.name == "exact_duplicates"))


def _equal(found: np.ndarray, whole: bool) -> np.ndarray:
    """Of sorted hashes the documents, or lines, that are equal to an earlier one; of lines not within one document."""
    same = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
    starts = np.flatnonzero(np.concatenate([[True], ~same])[: len(found)])
    first = np.repeat(starts, np.diff(np.append(starts, len(found))))
    kept = found[first]
    again = np.arange(len(found)) != first
    if not whole:
        again &= found["document"] != kept["document"]
    dropped = np.zeros(int(again.sum()), DROPPED)
    dropped["document"], dropped["place"] = found["document"][again], found["place"][again]
    dropped["copy"], dropped["rank"], dropped["similarity"] = kept["document"][again], kept["rank"][again], 1
    return dropped


def _write_dropped(job: Job, path: epath.Path, dropped: np.ndarray) -> None:
    dropped = np.sort(dropped, order=["document", "place"])
    ranged.write(path, dropped, (dropped["document"] >> np.uint64(PART_BITS)).astype(np.int64), len(job.parts))


# ---- Near duplicates -----------------------------------------------------------------------------


def _edges(job: Job, stage: int, step: Step, bands: np.ndarray) -> np.ndarray:
    """The pairs that agree in a band of some range and are similar."""
    found = groups(bands["key"]) if len(bands) else []
    if not found:
        return np.zeros(0, EDGE)
    ends = np.cumsum(list(map(len, found)))
    slices = np.flatnonzero(np.diff(ends // DOCUMENTS_HELD)) + 1
    return np.concatenate([
        _edges_of(job, stage, step, [bands["document"][group] for group in found[first:last]])
        for first, last in itertools.pairwise([0, *slices.tolist(), len(found)])])


def _edges_of(job: Job, stage: int, step: Step, found: Sequence[np.ndarray]) -> np.ndarray:
    """The similar pairs of groups of documents, by their numbers."""
    numbers = np.unique(np.concatenate(found))
    signatures, sets = _signatures(job, stage, step, numbers)

    @functools.lru_cache(maxsize=1 << 16)
    def exact(first: int, second: int) -> float:
        return jaccard(sets(first), sets(second))

    pairs: dict[tuple[int, int], float] = {}
    for group in found:
        at = np.searchsorted(numbers, np.unique(group))
        at = at[np.argsort(signatures["rank"][at], kind="stable")]  # which are compared depends on the texts alone

        def of_group(first: int, second: int, at: np.ndarray = at) -> float:
            return exact(*sorted((int(at[first]), int(at[second]))))

        for first, second, similarity in similar_pairs(
                signatures["signature"][at], step.options["similarity"], of_group):
            pairs[min(at[first], at[second]), max(at[first], at[second])] = similarity
    edges = np.zeros(len(pairs), EDGE)
    for side, name in enumerate(("first", "second")):
        at = np.fromiter((pair[side] for pair in pairs), np.int64, len(pairs))
        edges[name] = numbers[at]
        edges[f"{name}_bytes"], edges[f"{name}_rank"] = signatures["bytes"][at], signatures["rank"][at]
    edges["similarity"] = list(pairs.values())
    return edges


def _signatures(
    job: Job, stage: int, step: Step, numbers: np.ndarray
) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
    """What is kept of documents, by their numbers, ascending; and what reads the shingles of one by its place there."""
    dtype = signed(step.options["bands"] * step.options["rows"])
    found = np.zeros(len(numbers), dtype)
    paths: list[tuple[epath.Path, int]] = []
    files_of, rows = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), np.int64)
    of_part = (numbers >> np.uint64(PART_BITS)).astype(np.int64)
    for path in files(job, stage, "signed"):
        part = int(path.name.split("-")[1])
        mine = np.flatnonzero(of_part == part)
        if not len(mine):
            continue
        count = path.stat().length // dtype.itemsize
        first = int(ranged.rows(path, dtype, np.zeros(1, np.int64))["place"][0])
        at = (numbers[mine] & np.uint64((1 << PART_BITS) - 1)).astype(np.int64) - first
        here = (at >= 0) & (at < count)
        found[mine[here]] = ranged.rows(path, dtype, at[here])
        files_of[mine[here]], rows[mine[here]] = len(paths), at[here]
        paths.append((path.with_name(path.name.replace("signed", "shingles", 1)), count))

    @functools.lru_cache(maxsize=SETS_HELD)
    def sets(at: int) -> np.ndarray:
        path, count = paths[files_of[at]]
        return ranged.read([path], SHINGLE, count, int(rows[at]), int(rows[at]) + 1)

    return found, sets


def finish(job: Job, stage: int, work: Callable[[Sequence[str]], None]) -> None:
    """What is left once all buckets behind a stage are done; of near duplicates and of samples it is the choice itself.

    Args:
      work: has others do what texts name, as `prepare.do` does it.
    """
    step = _step(job, stage)
    if step.name == "near_duplicates":
        edges = files(job, stage, "edges")
        size = _size(edges)
        if size <= BYTES_A_BUCKET:
            found = ranged.read(edges, EDGE, RANGES, 0, RANGES)
            _write_dropped(job, job.path(stage, "found", 0, ".bin"), joining.joined(found))
        else:
            count = min(RANGES, 1 << math.ceil(math.log2(size // BYTES_A_BUCKET + 1)))
            _join_in_rounds(job, stage, count, work)
    elif step.name == "sample":
        text = json.dumps(_borders(job, stage, step))
        ranged.write_bytes(job.path(stage, "found", 0, ".json"), text.encode())


def _write_edges(path: epath.Path, edges: np.ndarray) -> None:
    """Writes pairs both ways, by ranges of a hash of the first document."""
    edges = joining.both_ways(edges)
    ranges = (joining.hashed(edges) >> np.uint64(64 - 12)).astype(np.int64)
    order = np.argsort(ranges, kind="stable")
    ranged.write(path, edges[order], ranges[order], RANGES)


def _join_in_rounds(job: Job, stage: int, count: int, work: Callable[[Sequence[str]], None]) -> None:
    """Joins pairs by `count` buckets of documents, round after round, until nothing changes."""
    number, quiet = 0, 0
    while quiet < 2:  # a large star and a small one
        number += 1
        work([json.dumps(["star", stage, number, bucket, count]) for bucket in range(count)])
        told = [path for path in files(job, stage, "star") if path.name.endswith(f"-{number}.json")]
        quiet = 0 if any(json.loads(path.read_text()) for path in told) else quiet + 1
    work([json.dumps(["joined", stage, number, bucket, count]) for bucket in range(count)])


def star(job: Job, stage: int, number: int, bucket: int, count: int) -> None:
    """Does one bucket of a round, of which those of odd numbers are large stars, unless it is done."""
    told = job.path(stage, "star", bucket, f"-{number}.json")
    if told.exists():
        return
    before = _edges_of_bucket(job, stage, number - 1, bucket, count)
    edges, changed = joining.star(before, large=number % 2 == 1)
    _write_edges(job.path(stage, "star", bucket, f"-{number}.bin"), edges)
    ranged.write_bytes(told, json.dumps(changed).encode())


def drop_joined(job: Job, stage: int, number: int, bucket: int, count: int) -> None:
    """Of the documents of a bucket, writes those that go by the last round, of that number, unless that is done."""
    path = job.path(stage, "found", bucket, ".bin")
    if not path.exists():
        stars, edges = (_edges_of_bucket(job, stage, each, bucket, count) for each in (number, 0))
        _write_dropped(job, path, joining.dropped_by_stars(stars, edges))


def _edges_of_bucket(job: Job, stage: int, number: int, bucket: int, count: int) -> np.ndarray:
    """The pairs that a round left, of number 0 those that were found, whose first document is in a bucket."""
    paths = [path for path in files(job, stage, "star") if path.name.endswith(f"-{number}.bin")] if number else \
        files(job, stage, "edges")
    return ranged.read(paths, EDGE, RANGES, bucket * RANGES // count, (bucket + 1) * RANGES // count)


def _borders(job: Job, stage: int, step: Step) -> dict[str, int]:
    """For each corpus with a budget the first bin that is beyond it."""
    borders = {}
    keys = files(job, stage, "keys")
    for source, budget in step.options["budgets"].items():
        sizes = np.zeros(BINS, np.uint64)
        for path in _of_source(job, keys, source):
            drawn = ranged.read([path], DRAWN, RANGES, 0, RANGES)
            np.add.at(sizes, drawn["bin"].astype(np.int64), drawn["size"])
        borders[source] = int(np.searchsorted(np.cumsum(sizes), np.uint64(budget), "right"))
    return borders


def _of_source(job: Job, paths: Sequence[epath.Path], source: str) -> list[epath.Path]:
    return [path for path in paths if job.parts[int(path.name.split("-")[1])].source == source]
