"""Growth of cost: compilation with depth, start-up with the corpus, memory with the vocabulary, steps with hosts,
scoring with devices.

    python -m benchmarks.growth --records=growth.jsonl --figure=docs/growth.svg

Measured at the width of gin/models/tiny.gin on this machine's processor, in seconds of processor time of all threads,
which other work on the machine hardly affects; steps also in wall-clock seconds. Existing records are not measured
again; `--parts=depth,corpus` selects parts. Prints the tables of docs/growth.md.

  depth       tracing and compiling the train step of 2 to 64 layers; also unrolled, up to 16
  corpus      the computation of the order at a launch and a resume, for 10^6 to 10^12 tokens in rows of 1,024, of which
              only the number is known; with 2 sources and with 100
  vocabulary  the train step's memory by the compiler's analysis, from 8,192 to 262,144 pieces
  hosts       1, 2 and 4 local processes of `t5x train`: 8 rows per step shared by all, and 8 rows for each
  devices     the same 256 choices scored on 1, 2, 4 and 8 devices, all on this machine's processor
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from benchmarks.growth_page import draw, tables

os.environ.setdefault("JAX_PLATFORMS", "cpu")

DEPTHS, UNROLLED = (2, 4, 8, 16, 32, 64), (2, 4, 8, 16)
CORPORA = tuple(10**power for power in range(6, 13))
SOURCES, BATCH, LENGTH = (2, 100), 256, 1024
VOCABULARIES, SHAPES = (8192, 32_768, 131_072, 262_144), ((8, 256), (32, 256), (8, 1024))
PROCESSES, STEPS, ROUNDS = (1, 2, 4), 8, 3
DEVICES, QUESTIONS, CHOICES, STEM = (1, 2, 4, 8), 64, 4, 230
MIB = 2**20


def shipped(**settings: Any) -> Any:
    """The default run with some settings of its gin file changed."""
    from codellm_jax.configuration import build, read_configuration

    overrides = [(name.replace("__", "."), repr(value)) for name, value in settings.items()]
    return build(read_configuration(["gin/mixed_pretrain.gin"], overrides), "train")


def processor_seconds(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """The median processor time of this process's threads over `times` calls, and the last result."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        result = work()
        taken.append(time.process_time() - began)
    return statistics.median(taken), result


def lowered_train_step(training: Any) -> Any:
    """The train step of a run, traced."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from codellm_jax.mixture.batches import Batch
    from codellm_jax.model.decoder import Decoder
    from codellm_jax.runtime.partitioning import batch_sharding, make_mesh
    from codellm_jax.runtime.state import abstract_state
    from codellm_jax.training.train import jit_train_step

    mesh = make_mesh(training.mesh)
    model = Decoder(training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length))
    optimizer = training.optimizer(training.learning_rate)
    state = abstract_state(model, optimizer, mesh, training.mesh)
    batch = Batch(*(jax.ShapeDtypeStruct(
        (training.batch_size, training.mixture.length), jnp.float32 if name == "weights" else jnp.int32,
        sharding=batch_sharding(mesh)) for name in Batch._fields))
    with jax.set_mesh(mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        return jit_train_step(model, optimizer, state, 2, training.microbatches).lower(state, batch)


def depth(done: set[str]) -> Iterator[dict[str, Any]]:
    import jax

    for unrolled in (False, True):
        for layers in UNROLLED if unrolled else DEPTHS:
            if f"{layers} {unrolled}" in done:
                continue
            jax.clear_caches()
            training = shipped(model__layers=layers, model__scan_unroll=layers if unrolled else 1)
            tracing, lowered = processor_seconds(lambda training=training: lowered_train_step(training))
            compiling, _ = processor_seconds(lowered.compile)
            yield {"key": f"{layers} {unrolled}", "layers": layers, "unrolled": unrolled, "tracing": tracing,
                   "compiling": compiling}


def corpus(done: set[str]) -> Iterator[dict[str, Any]]:
    import dataclasses

    import numpy as np

    from codellm_jax.mixture.ledger import Ledger
    from codellm_jax.mixture.mixture import OpenMixture
    from codellm_jax.mixture.order import Order, Source
    from codellm_jax.mixture.rows import Rows
    from codellm_jax.mixture.schedules import phases
    from codellm_jax.training.plan import describe, make_plan

    training = shipped(BATCH_SIZE=BATCH, TASK_FEATURE_LENGTHS={"targets": LENGTH})
    plan = make_plan(training, report=lambda line: None)
    for sources in SOURCES:
        for tokens in CORPORA:
            if f"{sources} {tokens}" in done:
                continue
            total = tokens // LENGTH
            names = [f"{('text', 'code')[k % 2]}.{k:03}" for k in range(sources)]
            rows = [Rows(name, "train", "", max(1, total // sources + k), LENGTH, 0, 0, "")
                    for k, name in enumerate(names)]
            schedule = phases(["7:3", "5:5 to 3:7 cosine"], total)

            def opened(rows: Sequence[Rows] = rows, schedule: Any = schedule) -> Order:
                return Order(0, schedule, tuple(
                    Source(one.name, one.count, Fraction(one.count), one.content_hash) for one in rows))

            order, middle = opened(), np.arange(total // 2, total // 2 + BATCH)
            steps = max(1, total // BATCH)
            simulated = dataclasses.replace(
                plan, last_step=steps, mixture=OpenMixture(order, rows, [None] * sources, "pretraining"))
            run = dataclasses.replace(training, train_steps=steps)
            ledger = Ledger.begin("pretraining", order, "", LENGTH)
            ledger.rows = dict(zip(names, order.counts(total // 2).tolist(), strict=True))
            work: dict[str, Callable[[], Any]] = {
                "order and its fingerprint": lambda opened=opened: opened().fingerprint(),
                "first batch": lambda opened=opened: opened().draw(np.arange(BATCH)),
                "a later batch": lambda order=order, middle=middle: order.draw(middle),
                "the plan's page": lambda run=run, simulated=simulated: describe(run, simulated),
                "MAX_EPOCHS foreseen": lambda order=order, total=total: order.exhausted_at(1, 3 * total),
                "the check of a resume": lambda ledger=ledger, order=order, half=total // 2: ledger.check(order, half),
            }
            yield {"key": f"{sources} {tokens}", "sources": sources, "tokens": tokens,
                   "seconds": {name: processor_seconds(one, 5)[0] for name, one in work.items()}}


def vocabulary(done: set[str]) -> Iterator[dict[str, Any]]:
    import jax

    from codellm_jax.model.decoder import parameter_count
    from codellm_jax.pods.programs import with_vocabulary_size

    for batch, length in SHAPES:
        for size in VOCABULARIES:
            if f"{batch} {length} {size}" in done:
                continue
            jax.clear_caches()
            training = with_vocabulary_size(
                shipped(BATCH_SIZE=batch, TASK_FEATURE_LENGTHS={"targets": length}), size)
            parameters = 4 * parameter_count(training.model(vocabulary_size=size, length=length))
            memory = lowered_train_step(training).compile().memory_analysis()
            yield {"key": f"{batch} {length} {size}", "batch": batch, "length": length, "vocabulary": size,
                   "parameters": parameters, "temporaries": memory.temp_size_in_bytes,
                   "logits": 4 * batch * length * size}


def hosts(done: set[str]) -> Iterator[dict[str, Any]]:
    for turn in range(ROUNDS):
        for processes in PROCESSES:
            for batch in sorted({8, 8 * processes}):
                if f"{turn} {processes} {batch}" not in done:
                    passed, processor = seconds_a_step(processes, batch)
                    yield {"key": f"{turn} {processes} {batch}", "turn": turn, "processes": processes, "batch": batch,
                           "step_seconds": passed, "processor_seconds": processor}


def seconds_a_step(processes: int, batch: int) -> tuple[float, float]:
    """The wall-clock time of a step of the default run, and the processor time of all its processes.

    Measured from the record of the second step, when everything is compiled, to that of the last but one.
    """
    first, last = 2, STEPS - STEPS % 2
    with tempfile.TemporaryDirectory() as run:
        started = subprocess.Popen(
            [sys.executable, "-m", "codellm_jax.cli", "train", "--gin_file=gin/mixed_pretrain.gin",
             f"--gin.TRAIN_STEPS={last + 1}", "--gin.WARMUP_STEPS=2", "--gin.LOG_PERIOD=2", "--gin.train.eval_rows=8",
             f"--gin.BATCH_SIZE={batch}", f"--gin.MODEL_DIR={run}",
             *([f"--local_processes={processes}"] if processes > 1 else [])], stdout=subprocess.DEVNULL)
        try:
            seen = [_at_record(started, Path(run) / "metrics.jsonl", step) for step in (first, last)]
            if started.wait():
                sys.exit("A run failed; its error is above.")
        finally:
            started.terminate()
            started.wait()
    return tuple((after - before) / (last - first)  # type: ignore[return-value]
                 for before, after in zip(*seen, strict=True))


def _at_record(started: subprocess.Popen[bytes], records: Path, step: int) -> tuple[float, float]:
    """The time, and the processor time of a process and its descendants, as soon as a step is recorded."""
    while not (records.exists() and f'"step": {step}, "split": "train"' in records.read_text()):
        if started.poll() is not None:
            sys.exit("A run ended before its steps; its error is above.")
        time.sleep(0.01)
    taken: dict[int, tuple[int, float]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # the process has ended
            continue
        taken[int(stat.parent.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def belongs(process: int) -> bool:
        return process == started.pid or (process in taken and belongs(taken[process][0]))

    return time.monotonic(), sum(seconds for process, (_, seconds) in taken.items() if belongs(process))


def devices(done: set[str]) -> Iterator[dict[str, Any]]:
    for turn in range(ROUNDS):
        for count in DEVICES:
            if f"{turn} {count}" not in done:
                with multiprocessing.get_context("spawn").Pool(1) as child:
                    found = child.apply(seconds_to_score, (count,))
                yield {"key": f"{turn} {count}", "turn": turn, "devices": count, "processor_seconds": found}


def seconds_to_score(count: int) -> float:
    """Processor seconds for all choices in a new process, with programs already compiled."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    import jax
    import numpy as np
    from flax import linen as nn

    from codellm_jax.evaluation.scoring import Request, score
    from codellm_jax.model.decoder import Decoder
    from codellm_jax.runtime.partitioning import batch_sharding, make_mesh
    from codellm_jax.runtime.state import abstract_state, initial_state

    training = shipped()
    mesh, dice = make_mesh(training.mesh), np.random.default_rng(0)
    model = Decoder(training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length))
    optimizer = training.optimizer(training.learning_rate)
    abstract = abstract_state(model, optimizer, mesh, training.mesh)
    requests = []
    for group in range(QUESTIONS):
        stem = dice.integers(1, model.config.vocabulary_size, STEM).tolist()
        requests += [Request(group, stem, dice.integers(1, model.config.vocabulary_size, 6).tolist())
                     for _ in range(CHOICES)]
    taken = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        params = initial_state(model, optimizer, abstract, seed=0).params
        for _ in range(4):
            began = time.process_time()
            score(params, model.config, requests, sharding=batch_sharding(mesh))
            taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


PARTS: dict[str, Callable[[set[str]], Iterator[dict[str, Any]]]] = {
    "depth": depth, "corpus": corpus, "vocabulary": vocabulary, "hosts": hosts,
    "devices": devices}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", default="growth.jsonl", help="a line for each measurement (default: %(default)s)")
    parser.add_argument("--figure", help="also draw all of it into this file, .svg or .png")
    parser.add_argument("--parts", default=",".join(PARTS), help="of what is measured (default: %(default)s)")
    flags = parser.parse_args()
    path = Path(flags.records)
    records: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for line in path.read_text().splitlines() if path.exists() else []:
        records[json.loads(line)["part"]].append(json.loads(line))
    for part in flags.parts.split(","):
        for found in PARTS[part]({line["key"] for line in records[part]}):
            line = {"part": part} | found
            records[part].append(line)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    if all(records.values()):
        print("\n" + tables(records))
        if flags.figure:
            draw(records, flags.figure)


if __name__ == "__main__":
    main()
