"""The whole train step on one accelerator, compared with its matmul rate and with PyTorch, in one run.

    python -m benchmarks.accelerator --torch
    python -m benchmarks.accelerator "1_3b,BATCH_SIZE=16,model.remat='full'"

A program is a file of gin/models/ with changed settings. Rows come from the cache through the read-ahead pipeline of
`t5x train`, which needs SeqIO only if there is no cache; the vocabulary has 40,000 rows.

  matmul    8192 x 8192 x 8192 in bfloat16, on random numbers, repeated in one program: the rate to compare with
  ours      train_step as `t5x train` runs it, for each program
  torch     with `--torch`, the model of `torch_peer` under torch.compile, for the sizes and rows of each program:
            bfloat16 autocast, fused AdamW, the documents of our first batch, which is reused, by each kind of
            attention. Nothing is recomputed but what torch.compile chooses: compare it with `model.remat='none'`

Both compile at the same time; then ours is measured alone, then PyTorch. Utilization is the rate of model FLOPs, with
causal attention counted as half (in brackets: in full), over the matmul rate.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

UNROLLED = "model.remat='none',model.attention='cudnn',model.scan_unroll"
PROGRAMS = ["1_3b,BATCH_SIZE=16,model.remat='dots'", f"1_3b,BATCH_SIZE=16,{UNROLLED}=16",
            f"llama_1b,BATCH_SIZE=8,{UNROLLED}=16", f"350m,BATCH_SIZE=32,{UNROLLED}=24",
            f"125m,BATCH_SIZE=64,{UNROLLED}=12"]
MEMORY_BESIDE_TORCH = "0.5"  # of the device, for JAX
VOCABULARY = 40_000
WARM_UP, STEPS, TURNS = 3, 5, 5
SIZE = 8192
MATMULS = 20


def timed(step: Callable[[], Any], wait: Callable[[Any], object]) -> list[float]:
    """Seconds per step in each turn; waits for the device at the end of a turn."""
    for _ in range(WARM_UP):
        wait(step())
    seconds = []
    for _ in range(TURNS):
        began = time.perf_counter()
        for _ in range(STEPS):
            last = step()
        wait(last)
        seconds.append((time.perf_counter() - began) / STEPS)
    return seconds


def matmul_rate() -> float:
    """FLOP/s of a plain JAX matmul."""
    import jax
    import jax.numpy as jnp

    a, x = (jax.random.normal(key, (SIZE, SIZE), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    a = a * SIZE**-0.5  # so that products keep their magnitude

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, MATMULS, lambda _, x: a @ x, x)

    seconds = statistics.median(timed(lambda: run(x), jax.block_until_ready))
    return MATMULS * 2 * SIZE**3 / seconds


@dataclasses.dataclass(frozen=True)
class Timing:
    compiling: float  # seconds
    memory: int  # bytes: arguments and temporaries
    seconds: list[float]  # per step, in each turn


def training_of(program: str, settings: list[str]) -> Any:
    """The `Training` of a program such as "1_3b,BATCH_SIZE=16"."""
    from codellm_jax.configuration import build, read_configuration
    from codellm_jax.pods.programs import with_vocabulary_size

    size, *changes = program.split(",")
    files = ["gin/mixed_pretrain.gin", f"gin/models/{size}.gin", *[name for name in settings if name.endswith(".gin")]]
    bindings = [tuple(change.split("=", 1)) for change in [*changes, *settings] if not change.endswith(".gin")]
    return with_vocabulary_size(build(read_configuration(files, bindings), "train"), VOCABULARY)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A train step of ours, and what it takes to run it."""

    training: Any
    plan: Any
    step: Any
    compiling: float  # seconds


CONFIGURING = threading.Lock()  # gin has one configuration


def compiled_of(program: str, settings: list[str]) -> Compiled:
    import jax
    from flax import linen as nn

    from codellm_jax.training.plan import make_plan
    from codellm_jax.training.train import batch_of_step, jit_train_step

    with CONFIGURING:
        training = training_of(program, settings)
        plan = make_plan(training, lambda line: print(line, flush=True))
    began = time.perf_counter()
    with jax.set_mesh(plan.mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        step_fn = jit_train_step(plan.model, plan.optimizer, plan.state, len(plan.mixture.order.sources),
                                 training.microbatches)
        step = step_fn.lower(plan.state, batch_of_step(training, plan, 0)[0]).compile()
    return Compiled(training, plan, step, time.perf_counter() - began)


def ours(found: Compiled, trace: str | None) -> Timing:
    import jax
    from flax import linen as nn

    from codellm_jax.mixture.batches import read_ahead
    from codellm_jax.runtime.state import initial_state
    from codellm_jax.training.train import batch_of_step

    training, plan, compiled = found.training, found.plan, found.step
    with jax.set_mesh(plan.mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        batches = read_ahead(functools.partial(batch_of_step, training, plan), 0, plan.last_step)
        state = initial_state(plan.model, plan.optimizer, plan.state, 0)
        memory = compiled.memory_analysis()

        def step() -> Any:
            nonlocal state
            state, metrics = compiled(state, next(batches)[0])
            return metrics

        seconds = timed(step, jax.device_get)
        if trace:
            with jax.profiler.trace(trace):
                for _ in range(3):
                    metrics = step()
                jax.device_get(metrics)
            (Path(trace) / "program.txt").write_text(compiled.as_text())
    return Timing(found.compiling, memory.argument_size_in_bytes + memory.temp_size_in_bytes, seconds)


Given = tuple[str, Any, dict[str, Any]]  # the name of a program, its DecoderConfig, and the arrays of its first batch


def peer(given: list[Given], connection: Connection) -> None:
    """Compiles PyTorch's steps in a process of their own, then waits until ours are measured, and measures them."""
    import torch

    from benchmarks.torch_peer import ATTENTION, TrainStep

    steps = {}
    for name, config, batch in given:
        for kind in ATTENTION:
            began = time.perf_counter()
            try:
                steps[name, kind] = TrainStep(config, batch, kind)
                steps[name, kind].gradients().item()
            except Exception as error:  # a kind that this release or this device lacks
                steps.pop((name, kind), None)
                print(f"torch {name} {kind} does not run: {type(error).__name__}: {str(error)[:500]}", flush=True)
                continue
            steps[name, kind].optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"torch {name} {kind}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
            connection.send((name, kind, time.perf_counter() - began))
    connection.send(None)
    connection.recv()
    while steps:
        (name, kind), step = steps.popitem()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = timed(step, lambda loss: loss.item())
            connection.send((name, kind, torch.cuda.max_memory_allocated(), seconds))
        except torch.cuda.OutOfMemoryError as error:
            print(f"torch {name} {kind} does not run: {str(error)[:500]}", flush=True)
        del step
        torch.cuda.empty_cache()
    connection.send(None)


def received(connection: Connection) -> Iterator[Any]:
    """The peer's messages until it sends None, or until its process ends with an error, which is on the terminal."""
    try:
        while (message := connection.recv()) is not None:
            yield message
    except EOFError:
        print("PyTorch's process has ended before its time.", flush=True)


def first_batches(programs: list[str], settings: list[str]) -> list[Given]:
    """One for each model and number of rows."""
    import jax
    import numpy as np

    from codellm_jax.training.plan import make_plan
    from codellm_jax.training.train import batch_of_step

    found = {}
    for program in programs:
        name = ",".join(part for part in program.split(",") if not part.startswith("model."))
        if name not in found:
            training = training_of(program, settings)
            plan = make_plan(training, lambda line: None)
            with jax.set_mesh(plan.mesh):
                batch = batch_of_step(training, plan, 0)[0]
            arrays = {key: np.asarray(value) for key, value in batch._asdict().items() if key != "sources"}
            found[name] = (name, training.model(vocabulary_size=VOCABULARY, length=training.mixture.length), arrays)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", default=PROGRAMS)
    parser.add_argument("--torch", action="store_true", help="also PyTorch, for the sizes and rows of each program")
    parser.add_argument("--settings", nargs="*", default=[], help="gin files, and settings, of all programs")
    parser.add_argument("--trace", help="a folder for a trace of three steps of each program, and its compiled text")
    flags = parser.parse_args()
    if flags.torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_BESIDE_TORCH)
    import jax

    from codellm_jax.model.decoder import flops_per_token
    from codellm_jax.runtime.progress import peak_flops

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    if flags.torch:
        given = first_batches(flags.programs, flags.settings)
        context.Process(target=peer, args=(given, there), daemon=True).start()
        there.close()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        steps = [pool.submit(compiled_of, program, flags.settings) for program in flags.programs]
    if flags.torch:
        compiling = {(name, kind): seconds for name, kind, seconds in received(here)}
    timings: list[tuple[str, Any, Timing | None]] = []
    before = matmul_rate()
    for number, program in enumerate(flags.programs):
        trace = f"{flags.trace}/{number}" if flags.trace else None
        try:
            found = steps[number].result()
            timings.append((f"ours {program}", found.training, ours(found, trace)))
        except Exception as error:  # too little memory, or a call that this device lacks; the others are measured
            timings.append((f"ours {program}", None, None))
            print(f"ours {program} does not run: {type(error).__name__}: {str(error)[:1000]}", flush=True)
        print(f"ours {program}: {timings[-1][2]}", flush=True)
    after = matmul_rate()
    if flags.torch:
        trainings = {name: training_of(name, flags.settings) for name, *_ in given}
        with contextlib.suppress(BrokenPipeError):  # of a peer that has ended
            here.send("go")
        for name, kind, memory, seconds in received(here):
            timing = Timing(compiling[name, kind], memory, seconds)
            print(f"torch {name} {kind}: {timing}", flush=True)
            timings.append((f"torch {name} {kind}", trainings[name], timing))
    rate = statistics.median([before, after])
    peak = peak_flops()
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}: matmul {before / 1e12:.0f} TFLOP/s before, "
          f"{after / 1e12:.0f} after, " + (f"{rate / peak:.2f} of the vendor's {peak / 1e12:.0f}" if peak else ""))
    print("| program | compiling, s | GiB | step, ms | tokens/s | of the matmul's rate | of the vendor's peak |\n"
          "|---|---|---|---|---|---|---|")
    for title, training, timing in timings:
        if timing is None:
            print(f"| {title} | does not run here | | | | | |")
            continue
        config = training.model(vocabulary_size=VOCABULARY, length=training.mixture.length)
        tokens = training.batch_size * config.length
        median, low, high = statistics.median(timing.seconds), min(timing.seconds), max(timing.seconds)
        causal, full = (flops_per_token(config, causal=causal) * tokens / median for causal in (True, False))
        print(f"| {title} | {timing.compiling:.0f} | {timing.memory / 2**30:.1f} | {1e3 * median:.1f} "
              f"({1e3 * low:.1f}-{1e3 * high:.1f}) | {tokens / median:,.0f} | {causal / rate:.1%} ({full / rate:.1%}) "
              f"| {causal / peak if peak else float('nan'):.1%} |")


if __name__ == "__main__":
    main()
