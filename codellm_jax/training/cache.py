"""`t5x cache`: the rows of a run, tokenized by many processes with Apache Beam before the run needs them.

Beam distributes short texts that each name a shard or a piece (`mixture/shards.py`); tokens go straight into
CACHE_DIR, which also shows what is done. The rows thus do not depend on the runner, its workers or its bundles; a
worker that dies or repeats its work does no harm; and the same command continues where it was stopped, under any
runner.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from codellm_jax.mixture import shards
from codellm_jax.mixture.mixture import Mixture, rates_of
from codellm_jax.mixture.places import cache_place
from codellm_jax.mixture.rows import storage_error
from codellm_jax.mixture.shards import Build, Shard
from codellm_jax.mixture.tokens import quiet_tensorflow
from codellm_jax.runtime.beam import LOCAL, require_beam, run
from codellm_jax.runtime.process import alone_in
from codellm_jax.runtime.progress import StatusLine, duration
from codellm_jax.vocabulary import Vocabulary

SECONDS_BETWEEN_LOOKS = 2.0  # at a CACHE_DIR on disk; at one in gs:// ten times as long


def cache(
    mixture: Mixture, vocabulary: Vocabulary, runner: str = LOCAL, options: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> None:
    """Writes the rows of each source of a mixture that are not cached yet.

    Args:
      mixture, vocabulary: of the run that will use the rows.
      runner: Beam's runner: DirectRunner, DataflowRunner, SparkRunner, FlinkRunner, PortableRunner.
      options: Beam's own, as on its command lines: ["--direct_num_workers=8"].
      report: called with one line at a time.

    Raises:
      ValueError: Beam is not installed, a setting is wrong, or a source has nothing to train on.
      OSError: a file cannot be read or written.
    """
    require_beam("t5x cache needs Apache Beam, which is not installed: pip install '.[beam]'. Without it, t5x train "
                 "writes the same rows with one process.")
    tasks = list(rates_of(mixture))
    places = {task: cache_place(task, mixture.definitions, vocabulary, mixture.length, mixture.cache_dir, mixture.stage)
              for task in tasks}
    for task, place in places.items():
        _require_reach(runner, task, place.key["definition"], mixture.cache_dir)
    builds = []
    for task, place in places.items():
        if place.is_whole():
            report(f"{task} is already cached in {place.directory}")
        else:
            builds.append(Build(task, mixture.definitions, vocabulary, mixture.length, mixture.stage, place))
    if not builds:
        return
    with contextlib.ExitStack() as held:
        for build in builds:
            held.enter_context(alone_in(str(build.working), "CACHE_DIR", "caching rows"))
        _write(builds, runner, options, report)


def _write(builds: list[Build], runner: str, options: Sequence[str], report: Callable[[str], None]) -> None:
    planned = [shards.plan(build) for build in builds]
    todo = [shards.as_text(index, shard) for index, (build, of_task) in enumerate(zip(builds, planned, strict=True))
            for shard in shards.missing(build, of_task)]
    count = sum(map(len, planned))
    if len(todo) < count:
        report(f"{count - len(todo):,} of {count:,} shards are already tokenized; continuing.")
    if runner == LOCAL and todo:  # with few files, cores would be idle
        threads = max(1, len(os.sched_getaffinity(0)) // len(todo))
        builds = [dataclasses.replace(build, threads=threads) for build in builds]
    sent = [shards.for_workers(build, of_task) for build, of_task in zip(builds, planned, strict=True)]
    with _watched(builds, planned):
        _run(sent, todo, runner, options)
    cuts = [shards.pieces(build, of_task) for build, of_task in zip(builds, planned, strict=True)]
    todo = [shards.as_text(index, piece) for index, (build, of_task) in enumerate(zip(builds, cuts, strict=True))
            for piece in of_task if not shards.is_cut(build, piece)]
    if todo:
        report(f"cutting rows, {len(todo):,} pieces")
    _run(sent, todo, runner, options)
    for build, of_task, cut in zip(builds, planned, cuts, strict=True):
        for line in shards.finish(build, of_task, cut):
            report(line)


def _require_reach(runner: str, task: str, definition: dict[str, Any], cache_dir: str) -> None:
    """Raises ValueError if Dataflow's workers would need local files."""
    if not runner.lower().startswith("dataflow"):
        return
    files = [file for split in ("train_files", "validation_files") for file, _ in definition.get(split, ())]
    local = [name for name in files if "://" not in name]
    if "://" not in cache_dir:
        raise ValueError(f"Dataflow's workers do not see this machine's disk: set CACHE_DIR to gs://, not {cache_dir}.")
    if local:
        raise ValueError(f"{task} has files on this machine's disk, {local[0]} first, which Dataflow's workers do not "
                         "see: copy them to gs://.")


def _run(builds: Sequence[Build], todo: Sequence[str], runner: str, options: Sequence[str]) -> None:
    """Does the work named by texts with a Beam runner; storage errors become one line."""
    try:
        with quiet_tensorflow() if runner == LOCAL else contextlib.nullcontext():
            run(functools.partial(shards.do, builds), todo, runner, options)
    except Exception as error:
        if told := storage_error(error, builds[0].place.directory):
            raise told from error
        raise


@contextlib.contextmanager
def _watched(builds: Sequence[Build], planned: Sequence[Sequence[Shard]]) -> Iterator[None]:
    """Shows the progress of tokenization, read from CACHE_DIR."""
    total, count = sum(shard.work for of_task in planned for shard in of_task), sum(map(len, planned))
    pause = SECONDS_BETWEEN_LOOKS * (10 if any(build.place.is_remote for build in builds) else 1)
    status = StatusLine(0, count, active=bool(count), unit="shard")
    ended, began, first, done = threading.Event(), time.monotonic(), None, 0

    def look() -> None:
        nonlocal first, done
        found = [shards.progress(build, of_task) for build, of_task in zip(builds, planned, strict=True)]
        done, work, text_bytes, seconds = map(sum, zip(*found, strict=True))
        first = work if first is None else first
        parts = [f"{text_bytes / 1e6:,.1f} MB of text"]
        if text_bytes and seconds:
            parts.append(f"{text_bytes / 1e6 / seconds:.1f} MB/s per core")
        if first < work < total:
            parts.append(f"{duration((time.monotonic() - began) / (work - first) * (total - work))} left")
        status.show(done, ", ".join(parts))

    def keep_looking() -> None:
        while not ended.wait(pause):
            try:
                look()
            except Exception as error:  # must not stop the work
                status.say(f"Progress can no longer be shown: {error}")
                return
            if done == count:
                return

    look()
    thread = threading.Thread(target=keep_looking, name="progress", daemon=True)
    thread.start()
    try:
        yield
        ended.set()
        thread.join()
        look()
    finally:
        ended.set()
        thread.join()
        status.close()
