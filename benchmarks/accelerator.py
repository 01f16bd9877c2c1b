"""The whole train step on one accelerator, compared with its matmul rate and with PyTorch, in one run.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator "1_3b,BATCH_SIZE=16,model.remat='full'" --torch 1_3b,BATCH_SIZE=16

A program is a file of gin/models/ with changed settings. Rows of 1,024 tokens come from the cache through the
read-ahead pipeline of `t5x train`, which needs SeqIO only if there is no cache; the vocabulary has 40,000 rows.

  matmul    8192 x 8192 x 8192 in bfloat16, on random numbers, repeated in one program: the rate to compare with
  ours      train_step as `t5x train` runs it, for each program
  torch     with `--torch`, a minimal GPT under torch.compile of each program's sizes and rows: bfloat16 autocast, fused
            AdamW, scaled_dot_product_attention without document boundaries, one batch reused, nothing recomputed

Utilization is the rate of model FLOPs, with causal attention counted as half (in brackets: in full), over the matmul
rate.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROGRAMS = ["125m,BATCH_SIZE=64,model.remat='dots'", "350m,BATCH_SIZE=32", "1_3b,BATCH_SIZE=16,model.remat='dots'"]
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


def ours(training: Any, trace: str | None) -> Timing:
    import jax
    from flax import linen as nn

    from codellm_jax.mixture.batches import read_ahead
    from codellm_jax.runtime.state import initial_state
    from codellm_jax.training.plan import make_plan
    from codellm_jax.training.train import batch_of_step, jit_train_step

    plan = make_plan(training, print)
    with jax.set_mesh(plan.mesh), nn.logical_axis_rules(training.mesh.all_rules()):
        step_fn = jit_train_step(plan.model, plan.optimizer, plan.state, len(plan.mixture.order.sources),
                                 training.microbatches)
        batches = read_ahead(functools.partial(batch_of_step, training, plan), 0, plan.last_step)
        state, (batch, _) = initial_state(plan.model, plan.optimizer, plan.state, 0), next(batches)
        began = time.perf_counter()
        compiled = step_fn.lower(state, batch).compile()
        compiling = time.perf_counter() - began
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
    return Timing(compiling, memory.argument_size_in_bytes + memory.temp_size_in_bytes, seconds)


def torch_step(training: Any) -> Callable[[], Any]:
    """A PyTorch step of the same sizes; returns the loss as a tensor on the device."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    config = training.model(vocabulary_size=VOCABULARY, length=training.mixture.length)
    hidden, length, batch = config.hidden, config.length, training.batch_size
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
            self.up, self.down = nn.Linear(hidden, config.feedforward), nn.Linear(config.feedforward, hidden)

        def forward(self, x):
            q, k, v = (part.view(batch, length, config.heads, -1).transpose(1, 2)
                       for part in self.qkv(self.norm1(x)).split(hidden, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, hidden))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, hidden), nn.Embedding(length, hidden)
            self.blocks, self.norm = nn.ModuleList([Block() for _ in range(config.layers)]), nn.LayerNorm(hidden)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.tokens.weight.T
            return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))

    gpt = GPT().cuda()
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCABULARY, (batch, length + 1), device="cuda")
    compiled = torch.compile(gpt)

    def step() -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def peer(program: str, settings: list[str], connection: Connection) -> None:
    """Measures PyTorch in a separate process, whose memory is free when it ends."""
    import torch

    began = time.perf_counter()
    step = torch_step(training_of(program, settings))
    step().item()
    compiling = time.perf_counter() - began
    seconds = timed(step, lambda loss: loss.item())
    connection.send(Timing(compiling, torch.cuda.max_memory_allocated(), seconds))


def peers(programs: list[str], settings: list[str]) -> Iterator[tuple[str, Timing | None]]:
    context = multiprocessing.get_context("spawn")
    for program in programs:
        here, there = context.Pipe()
        process = context.Process(target=peer, args=(program, settings, there), daemon=True)
        process.start()
        there.close()
        try:
            timing = here.recv()
        except EOFError:
            timing = None  # its error is on the terminal
        process.join()  # before JAX, which takes three quarters of the memory at its first use
        yield program, timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", default=PROGRAMS)
    parser.add_argument("--torch", nargs="*", default=[], help="programs that PyTorch runs too", metavar="PROGRAM")
    parser.add_argument("--settings", nargs="*", default=[], help="gin files, and settings, of all programs")
    parser.add_argument("--trace", help="a folder for a trace of three steps of each program, and its compiled text")
    flags = parser.parse_args()
    timings = [(f"torch {program}", program, timing) for program, timing in peers(flags.torch, flags.settings)]
    for _, program, timing in timings:
        print(f"torch {program}: {timing}", flush=True)

    import jax

    from codellm_jax.model.decoder import flops_per_token
    from codellm_jax.runtime.progress import peak_flops

    before = matmul_rate()
    for number, program in enumerate(flags.programs):
        trace = f"{flags.trace}/{number}" if flags.trace else None
        try:
            timing = ours(training_of(program, flags.settings), trace)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            timing = None
        print(f"ours {program}: {timing}", flush=True)
        timings.append((f"ours {program}", program, timing))
    rate = statistics.median([before, after := matmul_rate()])
    peak = peak_flops()
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}: matmul {before / 1e12:.0f} TFLOP/s before, "
          f"{after / 1e12:.0f} after, " + (f"{rate / peak:.2f} of the vendor's {peak / 1e12:.0f}" if peak else ""))
    print("| program | compiling, s | GiB | step, ms | tokens/s | of the matmul's rate | of the vendor's peak |\n"
          "|---|---|---|---|---|---|---|")
    for name, program, timing in timings:
        if timing is None:
            print(f"| {name} | does not run here | | | | | |")
            continue
        training = training_of(program, flags.settings)
        config = training.model(vocabulary_size=VOCABULARY, length=training.mixture.length)
        tokens = training.batch_size * config.length
        median, low, high = statistics.median(timing.seconds), min(timing.seconds), max(timing.seconds)
        causal, full = (flops_per_token(config, causal=causal) * tokens / median for causal in (True, False))
        print(f"| {name} | {timing.compiling:.0f} | {timing.memory / 2**30:.1f} | {1e3 * median:.1f} "
              f"({1e3 * low:.1f}-{1e3 * high:.1f}) | {tokens / median:,.0f} | {causal / rate:.1%} ({full / rate:.1%}) "
              f"| {causal / peak if peak else float('nan'):.1%} |")


if __name__ == "__main__":
    main()
