"""Rows read a second, beside what the train step consumes, in one run.

    python -m benchmarks.rows

  draw     order.draw alone: which rows a batch is made of
  read     the rows of a batch from the cache, in their drawn order
  batch    all of it: draw, read, positions and segments, placed on the device; one thread, no read-ahead
  consumed what the step of benchmarks.step takes in the same minutes
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.step import BATCH, LENGTH, ours
from codellm_jax.mixture.batches import global_batch
from codellm_jax.mixture.mixture import Mixture, OpenMixture, open_mixture
from codellm_jax.mixture.order import Draw
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.vocabulary import load_vocabulary
from tasks import Definitions


def draw(opened: OpenMixture, batch_size: int, step: int) -> Draw:
    return opened.order.draw(np.arange(step * batch_size, (step + 1) * batch_size))


def read(opened: OpenMixture, batch_size: int, step: int) -> None:
    drawn = draw(opened, batch_size, step)
    for source in np.unique(drawn.source):
        opened.training[source].read(drawn.row[drawn.source == source])


def rows_a_second(work: Callable[[int], object], batch_size: int, seconds: float = 1.0) -> float:
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        work(done)
        done += 1
    return done * batch_size / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    vocabulary, sharding = load_vocabulary(), batch_sharding(make_mesh(MeshShape()))
    with tempfile.TemporaryDirectory() as cache:
        step = ours(cache)
        step()
        figures: dict[str, list[float]] = {}
        for length in (LENGTH, 1024):
            opened = open_mixture(
                Mixture("python_text_code", Definitions(), {"targets": length}, 1 / 3, cache_dir=cache),
                vocabulary, seed=0, total_rows=10**6, report=lambda _: None)
            for batch_size in (BATCH, 256):
                batch = functools.partial(
                    global_batch, batch_size=batch_size, order=opened.order, rows=opened.training,
                    end_of_document_id=vocabulary.end_of_document_id, sharding=sharding)
                parts: dict[str, Callable[[int], object]] = {
                    "draw": functools.partial(draw, opened, batch_size),
                    "read": functools.partial(read, opened, batch_size), "batch": batch}
                for name, work in parts.items():
                    work(0)
                    figures[f"{name}, {batch_size} x {length}"] = [
                        rows_a_second(work, batch_size, 0.5) for _ in range(flags.rounds)]
        figures[f"consumed, {BATCH} x {LENGTH}"] = [
            rows_a_second(lambda _: step(), BATCH, 3.0) for _ in range(flags.rounds)]
    for name, rates in figures.items():
        print(f"{name:<24}{statistics.median(rates):>12,.0f} rows/s   {min(rates):,.0f}-{max(rates):,.0f}")


if __name__ == "__main__":
    main()
