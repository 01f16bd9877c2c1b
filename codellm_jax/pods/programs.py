"""A run's programs, compiled for TPUs that are not attached.

    outcome = compile_train_step(training, parse_topology("v4-128"))

The train step is that of `train.py` itself, with the run's layout, donation and optimization. No data is opened: shapes
follow from the settings alone, so in tuning a step has BATCH_SIZE rows, the most that it can need.
"""

import dataclasses
import functools
import math
import os
import re
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from codellm_jax.evaluation import decoding, scoring
from codellm_jax.evaluation.sampling import PAPER_SAMPLING
from codellm_jax.mixture.batches import Batch
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.pods.collectives import Part, Program, Traffic, read_program
from codellm_jax.pods.topologies import Topology, compile_only_devices
from codellm_jax.runtime.compiler import compiler_options
from codellm_jax.runtime.partitioning import batch_sharding, make_mesh, require_divisible
from codellm_jax.runtime.state import abstract_state
from codellm_jax.training.plan import GIB, Layout, Training, memory_parts
from codellm_jax.training.train import jit_train_step

SOURCES = 2  # of the mixture; only two small results of a step depend on the number


class Memory(NamedTuple):
    """The bytes of a device while a program runs, according to the compiler.

    The peak, the largest amount live at one time, decides whether a program fits. The temporaries include more than is
    ever live at once, so the total can exceed the memory of a chip on which the program runs.
    """

    arguments: int  # state and batch
    temporaries: int
    results: int  # without those that reuse arguments
    peak: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.results


class Outcome(NamedTuple):
    """The result of compiling one program.

    Attributes:
      program: "train step", "scoring" or "decoding".
      memory: None if it does not fit.
      refusal: the reason why it does not fit.
      traffic, unknown_loops, parts, has_kernels: see `collectives.read_program`; traffic across slices is along
        "slices".
      seconds: the compile time.
    """

    program: str
    training: Training
    topology: Topology
    mesh: Mesh
    config: DecoderConfig
    rows: int
    memory: Memory | None
    refusal: str
    traffic: list[Traffic]
    unknown_loops: int
    seconds: float
    parts: tuple[Part, ...] = ()
    has_kernels: bool = False


def with_slices(training: Training, topology: Topology) -> Training:
    """The run on that topology; if slices are joined and the mesh does not say how, they are joined along `data`."""
    mesh = training.mesh
    if topology.slices == 1 or mesh.slices == topology.slices:
        return training
    data = topology.slices if mesh.data == 1 else mesh.data
    return dataclasses.replace(training, mesh=dataclasses.replace(mesh, data=data, slices=topology.slices))


def with_vocabulary_size(training: Training, pieces: int, multiple: int = 128) -> Training:
    """The run with a vocabulary of this many pieces, padded as by `load_vocabulary`."""
    vocabulary = dataclasses.replace(training.vocabulary, pieces=pieces, size=-(-pieces // multiple) * multiple)
    return dataclasses.replace(training, vocabulary=vocabulary)


def compile_train_step(training: Training, topology: Topology) -> Outcome:
    """Compiles the train step.

    Raises:
      ValueError: with a one-line message, if the settings do not fit together or do not fit the topology.
    """
    mesh, model, state, rows = layout = lay_out(training, topology)
    optimizer = training.optimizer(training.learning_rate)
    shape = rows, training.mixture.length
    batch = Batch(*(jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32,
                                         sharding=batch_sharding(mesh)) for name in Batch._fields))
    step = jit_train_step(model, optimizer, state, SOURCES, training.microbatches)
    return _compile("train step", training, topology, mesh, model.config, rows, lambda: step.lower(state, batch),
                    sum(memory_parts(training, layout).values()))


def compile_scoring(training: Training, topology: Topology) -> Outcome:
    """Compiles the scoring of a full batch of the longest rows."""
    mesh, model, state, _ = lay_out(training, topology)
    sharding = batch_sharding(mesh)
    lower = functools.partial(scoring.lower_largest, state.params, model.config, sharding=sharding)
    return _compile("scoring", training, topology, mesh, model.config, 0, lower)


def compile_decoding(training: Training, topology: Topology) -> Outcome:
    """Compiles one step of decoding after prompts as long as the model allows, with the paper's sampling."""
    mesh, model, state, _ = lay_out(training, topology)
    sharding = batch_sharding(mesh)
    lower = functools.partial(decoding.lower_largest, state.params, model.config, PAPER_SAMPLING, sharding=sharding)
    return _compile("decoding", training, topology, mesh, model.config, 0, lower)


def lay_out(training: Training, topology: Topology) -> Layout:
    """The mesh, the model, the abstract state, and the rows of a step."""
    mesh = make_mesh(training.mesh, compile_only_devices(topology))
    packed = training.mixture.stage == "tuning" and training.mixture.packing
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * training.microbatches
    if not packed:
        require_divisible(training.batch_size, training.microbatches, mesh)
    model = Decoder(training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length))
    state = abstract_state(model, training.optimizer(training.learning_rate), mesh, training.mesh)
    return Layout(mesh, model, state, -(-training.batch_size // shards) * shards)


def _compile(
    program: str, training: Training, topology: Topology, mesh: Mesh, config: DecoderConfig, rows: int,
    lower: Callable[[], jax.stages.Lowered], needed: int | None = None,
) -> Outcome:
    """Compiles a program; for GPUs, `needed` bytes decide whether it fits, or else XLA's total."""
    start = time.monotonic()
    compiled, refusal, memory = None, "", None
    found = Program([], 0, [], False)
    # Not stored in JAX's compilation cache: programs for absent devices cannot be read back.
    config_of_jax: Any = jax.config
    kept_from = config_of_jax.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        with jax.set_mesh(mesh), nn.logical_axis_rules(training.mesh.all_rules()):
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = _refusal(str(error))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept_from)
    if compiled is not None:
        sizes: Any = compiled.memory_analysis()
        memory = Memory(sizes.argument_size_in_bytes, sizes.temp_size_in_bytes,
                        sizes.output_size_in_bytes - sizes.alias_size_in_bytes, sizes.peak_memory_in_bytes)
        axes = dict(mesh.shape)
        if training.mesh.slices > 1:  # joined along `data`, slice after slice
            axes = {"slices": training.mesh.slices} | axes | {"data": axes["data"] // training.mesh.slices}
        found = read_program(compiled.as_text() or "", axes)
        if topology.generation == "gpu":  # the CPU compiler reports no peak and refuses nothing
            peak, has = needed or memory.total, topology.chip.memory_gib
            memory = memory._replace(peak=peak) if peak <= has * GIB else None
            refusal = "" if memory else f"it takes about {peak / GIB:.2f} of {has:.2f} GiB"
    return Outcome(program, training, topology, mesh, config, rows, memory, refusal, found.traffic,
                   found.unknown_loops, time.monotonic() - start, tuple(found.parts), found.has_kernels)


def compiled_with(outcome: Outcome) -> str:
    """The versions and options of the compiler: what the run passes to XLA, and what the environment adds."""
    options = [f"{name}={str(value).lower() if isinstance(value, bool) else value}"
               for name, value in compiler_options(outcome.mesh, outcome.config).items()]
    options += [f"{name}={os.environ[name]!r}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") if os.environ.get(name)]
    releases = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "libtpu") if find_spec(name)]
    return f"{', '.join(releases)}; " + (f"options {' '.join(options)}" if options else "no options")


def _refusal(message: str) -> str:
    """The compiler's message without the table of allocations that some releases of libtpu add."""
    words = " ".join(message.split()).removeprefix("RESOURCE_EXHAUSTED: ")
    sentences = re.split(r"Total hbm usage|Program hbm requirement|Largest program allocations", words)[0]
    return textwrap.shorten(sentences, 300, placeholder=" ...").rstrip(".")


def replicated_leaves(training: Training, topology: Topology) -> list[tuple[str, tuple[int, ...], str, int, int]]:
    """Leaves of parameters and optimizer that are replicated along a mesh axis that divides one of their sizes.

    Returns:
      For each parameter array and its optimizer state: name, shape, the axes, the number of such leaves (itself,
      moments), and their bytes on a device; most bytes first. `data` replicates by design.
    """
    mesh, _, state, _ = lay_out(training, topology)
    found: dict[tuple[str, tuple[int, ...], str], tuple[int, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": state.params, "optimizer": state.opt_state}):
        used = {axis for part in leaf.sharding.spec for axis in ((part,) if isinstance(part, str) else part or ())}
        shard = leaf.sharding.shard_shape(leaf.shape)
        idle = [axis for axis in ("fsdp", "model") if mesh.shape[axis] > 1 and axis not in used
                and any(size % mesh.shape[axis] == 0 and size >= mesh.shape[axis] for size in shard)]
        if not idle:
            continue
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        name = "/".join(names[1 + max(index for index, part in enumerate(names)
                                      if part in ("params", "optimizer", "mu", "nu") or not index):])
        key = name, leaf.shape, ", ".join(idle)
        count, size = found.get(key, (0, 0))
        found[key] = count + 1, size + math.prod(shard) * leaf.dtype.itemsize
    return sorted(((*key, *value) for key, value in found.items()), key=lambda row: -row[4])
