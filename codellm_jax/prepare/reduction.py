"""Determines which documents are removed by steps that need all documents: per range of hashes, then jointly."""

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from codellm_jax.prepare import joining, meeting, ranged
from codellm_jax.prepare.job import DRAWN, DROPPED, EDGE, EQUAL, PART_BITS, Job
from codellm_jax.prepare.keys import BINS, RANGES
from codellm_jax.prepare.steps import Step

BYTES_A_BUCKET = 64 << 20  # of keys held in memory at once


def rounds(job: Job, stage: int) -> list[list[str]]:
    """The work after a stage, as texts for `prepare.do`: each list must finish before the next one begins."""
    count = _buckets(job, stage)
    of_buckets = [json.dumps(["bucket", stage, bucket, count]) for bucket in range(count)]
    if not count or _step(job, stage).name != "near_duplicates":
        return [of_buckets]
    brought = [json.dumps(["bring", stage, number, count]) for number in range(len(job.files(stage, "signed")))]
    return [of_buckets, brought, [json.dumps(["compare", stage, bucket, count]) for bucket in range(count)]]


def _buckets(job: Job, stage: int) -> int:
    """The number of buckets, from the number of parts and the keys' size alone, so that a restart repeats it."""
    step = _step(job, stage)
    if step.name == "sample":
        return 0
    size = _size(job.files(stage, "keys"))
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
    """Does one of `count` buckets after a stage, unless it is done; for near duplicates the first round."""
    step = _step(job, stage)
    if step.name == "near_duplicates":
        meeting.meet(job, stage, bucket, count)
        return
    path = job.path(stage, "found", bucket, ".bin")
    if path.exists():
        return
    first, last = bucket * RANGES // count, (bucket + 1) * RANGES // count
    found = np.sort(ranged.read(job.files(stage, "keys"), EQUAL, RANGES, first, last),
                    order=["high", "low", "rank", "document", "place"])
    _write_dropped(job, path, _equal(found, step.name == "exact_duplicates"))


def _equal(found: np.ndarray, whole: bool) -> np.ndarray:
    """Documents, or lines, whose hash equals an earlier one in sorted order; for lines, one of another document."""
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


def finish(job: Job, stage: int, work: Callable[[Sequence[str]], None]) -> None:
    """Completes a stage's reduction after all its buckets: chooses near duplicates and samples.

    Args:
      work: distributes texts for `prepare.do` to workers.
    """
    step = _step(job, stage)
    if step.name == "near_duplicates":
        edges = job.files(stage, "edges")
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


def _join_in_rounds(job: Job, stage: int, count: int, work: Callable[[Sequence[str]], None]) -> None:
    """Joins pairs in rounds of `count` buckets of documents until nothing changes."""
    number, quiet = 0, 0
    while quiet < 2:  # a large star and a small one
        number += 1
        work([json.dumps(["star", stage, number, bucket, count]) for bucket in range(count)])
        told = [path for path in job.files(stage, "star") if path.name.endswith(f"-{number}.json")]
        quiet = 0 if any(json.loads(path.read_text()) for path in told) else quiet + 1
    work([json.dumps(["joined", stage, number, bucket, count]) for bucket in range(count)])


def star(job: Job, stage: int, number: int, bucket: int, count: int) -> None:
    """Does one bucket of a round, unless it is done. Rounds of odd numbers are large stars."""
    told = job.path(stage, "star", bucket, f"-{number}.json")
    if told.exists():
        return
    before = _edges_of_bucket(job, stage, number - 1, bucket, count)
    edges, changed = joining.star(before, large=number % 2 == 1)
    meeting.write_edges(job.path(stage, "star", bucket, f"-{number}.bin"), edges)
    ranged.write_bytes(told, json.dumps(changed).encode())


def drop_joined(job: Job, stage: int, number: int, bucket: int, count: int) -> None:
    """Writes the documents of a bucket that the last round, `number`, removes, unless that is done."""
    path = job.path(stage, "found", bucket, ".bin")
    if not path.exists():
        stars, edges = (_edges_of_bucket(job, stage, each, bucket, count) for each in (number, 0))
        _write_dropped(job, path, joining.dropped_by_stars(stars, edges))


def _edges_of_bucket(job: Job, stage: int, number: int, bucket: int, count: int) -> np.ndarray:
    """The pairs after a round (0: the pairs found) whose first document is in a bucket."""
    paths = [path for path in job.files(stage, "star") if path.name.endswith(f"-{number}.bin")] if number else \
        job.files(stage, "edges")
    return ranged.read(paths, EDGE, RANGES, bucket * RANGES // count, (bucket + 1) * RANGES // count)


def _borders(job: Job, stage: int, step: Step) -> dict[str, int]:
    """For each corpus with a budget, the first bin beyond it."""
    borders = {}
    keys = job.files(stage, "keys")
    for source, budget in step.options["budgets"].items():
        sizes = np.zeros(BINS, np.uint64)
        for path in _of_source(job, keys, source):
            drawn = ranged.read([path], DRAWN, RANGES, 0, RANGES)
            np.add.at(sizes, drawn["bin"].astype(np.int64), drawn["size"])
        borders[source] = int(np.searchsorted(np.cumsum(sizes), np.uint64(budget), "right"))
    return borders


def _of_source(job: Job, paths: Sequence[epath.Path], source: str) -> list[epath.Path]:
    return [path for path in paths if job.parts[int(path.name.split("-")[1])].source == source]
