"""Rows read per second, compared with those consumed by steps, and text tokenized per second, compared with the
tokenizer's library alone; in one run.

    python -m benchmarks.rows        `t5x cache` also needs Beam: pip install '.[beam]'
    python -m benchmarks.rows --text                            only tokenization
    python -m benchmarks.rows --vocabulary tokenizer.json       only tokenization, with this vocabulary

  draw     order.draw alone: the choice of a batch's rows
  read     the rows of a batch from the cache, in their drawn order
  batch    the whole batch: draw, read, positions and segments, placed on the device; one thread, no read-ahead
  ahead    the same, read ahead as in the training loop; `slow` from a store that answers each request after 50 ms,
           without keeping any of it in memory
  consumed by the step of benchmarks.step in the same minutes; and, computed, by a host of 8 v5e chips at half of
           197 TFLOP/s each

  encode   encodes documents with SentencePiece, one after the other, or with `tokenizers` all at once; in one thread
  shard    the work of a worker of `t5x cache`: read JSON lines, encode, write tokens; cut those into rows
  parquet  the same, from Parquet
  cache    the whole command with one worker, including the start of Beam and TensorFlow
"""

import argparse
import contextlib
import dataclasses
import functools
import http.server
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from benchmarks.step import BATCH, LENGTH, ours
from codellm_jax.configuration import build, read_configuration
from codellm_jax.mixture import rows as rows_module
from codellm_jax.mixture import shards
from codellm_jax.mixture.batches import global_batch, read_ahead
from codellm_jax.mixture.mixture import Mixture, OpenMixture, open_mixture
from codellm_jax.mixture.order import Draw
from codellm_jax.mixture.places import cache_place
from codellm_jax.model.decoder import flops_per_token
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.vocabulary import Vocabulary, load_vocabulary
from tasks import Definitions
from tasks.corpora.sources import documents

SECONDS_TO_ANSWER = 0.05
V5E_FLOPS = 8 * 197e12 * 0.5
COPIES = 4  # of the standard library's source files, 28 MB in this many files


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


class SlowFiles(http.server.BaseHTTPRequestHandler):
    """Serves ranges of the files of a folder, each after a delay."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_GET(self) -> None:
        time.sleep(SECONDS_TO_ANSWER)
        file = self.folder / self.path.split("?")[0].lstrip("/")
        whole = file.read_bytes() if file.is_file() else b""
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        start = int(first) if first else len(whole) - int(last or len(whole))
        content = whole[start:int(last) + 1 if first and last else None]
        self.send_response((206 if asked else 200) if file.is_file() else 404)
        self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Logs nothing, since there are thousands of requests."""


def serve(folder: str, port: Connection) -> None:
    class Server(http.server.ThreadingHTTPServer):
        request_queue_size, daemon_threads = 1024, True

    with Server(("127.0.0.1", 0), type("Handler", (SlowFiles,), {"folder": Path(folder)})) as server:
        port.send(server.server_port)
        server.serve_forever()


@contextlib.contextmanager
def served_slowly(opened: OpenMixture, cache: str) -> Iterator[OpenMixture]:
    """The same mixture, with its rows read through a slow server and none of them kept in memory."""
    spawn, (here, there) = multiprocessing.get_context("spawn"), multiprocessing.Pipe()
    server = spawn.Process(target=serve, args=(cache, there), daemon=True)
    server.start()
    kept, rows_module.BYTES_KEPT = rows_module.BYTES_KEPT, 0
    try:
        address = f"http://127.0.0.1:{here.recv()}"
        slow = [dataclasses.replace(rows, path=rows.path.replace(cache, address)) for rows in opened.training]
        yield OpenMixture(opened.order, slow, opened.validation, opened.stage)
    finally:
        rows_module.BYTES_KEPT = kept
        server.terminate()
        server.join()


def reading(cache: str, vocabulary: Vocabulary, rounds: int) -> dict[str, list[float]]:
    sharding = batch_sharding(make_mesh(MeshShape()))
    figures: dict[str, list[float]] = {}
    for length in (LENGTH, 1024):
        opened = open_mixture(
            Mixture("python_text_code", Definitions(), {"targets": length}, 1 / 3, cache_dir=cache),
            vocabulary, seed=0, total_rows=10**6, report=lambda _: None)
        for batch_size in (BATCH, 256):

            def batches_of(mixture: OpenMixture, batch_size: int = batch_size) -> Callable[[int], Any]:
                return functools.partial(
                    global_batch, batch_size=batch_size, order=mixture.order, rows=mixture.training,
                    end_of_document_id=vocabulary.end_of_document_id, sharding=sharding)

            parts: dict[str, Callable[[int], object]] = {
                "draw": functools.partial(draw, opened, batch_size),
                "read": functools.partial(read, opened, batch_size), "batch": batches_of(opened)}
            with served_slowly(opened, cache) as slow:
                ahead = {"ahead": read_ahead(batches_of(opened), 0, 10**6), "ahead, slow":
                         read_ahead(batches_of(slow), 0, 10**6)}
                for name, batches in ahead.items():
                    parts[name] = functools.partial(lambda batches, _: next(batches), batches)
                for name, work in parts.items():
                    for step in range(6):
                        work(step)
                    figures[f"{name}, {batch_size} x {length}"] = [
                        rows_a_second(work, batch_size, 0.5) for _ in range(rounds)]
                for batches in ahead.values():
                    batches.close()
    return figures


def tokenizing(folder: Path, vocabulary: Vocabulary, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Megabytes of text, and MB/s per core of each contender."""
    texts = list(documents({"python": "code"}, "train"))
    for copy in range(COPIES):
        (folder / f"{copy}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        pq.write_table(pa.table({"text": texts}), folder / f"{copy}.parquet", compression="zstd")
    size = COPIES * sum(len(text.encode()) for text in texts) / 1e6
    if not vocabulary.is_sentence_pieces:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        library = tokenizers.Tokenizer.from_file(vocabulary.file)
    definitions = Definitions(corpora={"code.copies": {"json_lines": str(folder / "*.jsonl"), "holdout": 0},
                                       "code.columns": {"parquet": str(folder / "*.parquet"), "holdout": 0}})

    def encode(_: int) -> None:
        for _copy in range(COPIES):
            if vocabulary.is_sentence_pieces:
                for text in texts:
                    vocabulary.encode(text)
            else:
                _ = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]

    def shard(turn: int, corpus: str = "code.copies") -> None:
        place = cache_place(corpus, definitions, vocabulary, 1024, str(folder / f"s{turn}"), "pretraining")
        made = shards.Build(corpus, definitions, vocabulary, 1024, "pretraining", place)
        planned = shards.plan(made)
        for each in planned:
            shards.tokenize(made, each)
        pieces = shards.pieces(made, planned)
        for piece in pieces:
            shards.cut(made, piece)
        shards.finish(made, planned, pieces)

    def cache(turn: int) -> None:
        from codellm_jax.training.cache import cache as command

        mixture = Mixture("code.copies", definitions, {"targets": 1024}, 1.0, cache_dir=str(folder / f"c{turn}"))
        with contextlib.redirect_stdout(None):
            command(mixture, vocabulary, options=["--direct_running_mode=in_memory", "--direct_num_workers=1"],
                    report=lambda _: None)

    contenders = {"encode": encode, "shard": shard, "parquet": functools.partial(shard, corpus="code.columns")} | (
        {"cache": cache} if importlib.util.find_spec("apache_beam") else {})
    shard(-1)  # imports TensorFlow
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, work in contenders.items():
            began = time.process_time()
            work(turn)
            figures[name].append(size / (time.process_time() - began))
    return size, figures


def consumed(size: str) -> float:
    """Rows of 1024 per second that 8 v5e chips train on; vocabulary 8,192, causal attention counted as half."""
    configuration = read_configuration(["gin/mixed_pretrain.gin", f"gin/models/{size}.gin"], [])
    config = build(configuration, "train").model(vocabulary_size=8192, length=1024)
    return V5E_FLOPS / (flops_per_token(config, causal=True) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", help="a tokenizer.json")
    parser.add_argument("--text", action="store_true", help="measure what is tokenized alone")
    flags = parser.parse_args()
    vocabulary = load_vocabulary(*filter(None, [flags.vocabulary]))
    if not (flags.vocabulary or flags.text):
        rows(vocabulary, flags.rounds)
    with tempfile.TemporaryDirectory() as folder:
        megabytes, speeds = tokenizing(Path(folder), vocabulary, flags.rounds)
    print(f"\n{megabytes:.1f} MB of text")
    for name, rates in speeds.items():
        ratios = [mine / theirs for mine, theirs in zip(rates, speeds["encode"], strict=True)]
        print(f"{name:<26}{statistics.median(rates):>12.2f} MB/s per core, {statistics.median(ratios):.2f} of encode "
              f"({min(ratios):.2f}-{max(ratios):.2f})")


def rows(vocabulary: Vocabulary, rounds: int) -> None:
    """Prints the rates at which rows are read and consumed."""
    with tempfile.TemporaryDirectory() as folder:
        step = ours(folder)
        step()
        figures = reading(folder, vocabulary, rounds)
        figures[f"consumed, {BATCH} x {LENGTH}"] = [
            rows_a_second(lambda _: step(), BATCH, 3.0) for _ in range(rounds)]
    for name, rates in figures.items():
        print(f"{name:<26}{statistics.median(rates):>12,.0f} rows/s   {min(rates):,.0f}-{max(rates):,.0f}")
    for size in ("125m", "2_6b"):
        print(f"{f'consumed by 8 v5e, {size}':<26}{consumed(size):>12,.0f} rows/s of 1024")


if __name__ == "__main__":
    main()
