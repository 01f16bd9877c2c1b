"""The training state, its abstract form, and its initial value."""

import functools
import math
import os
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.decoder import Decoder
from codellm_jax.runtime.partitioning import MeshShape, shardings_of


class TrainState(flax.struct.PyTreeNode):
    """Step (int32 scalar), float32 parameters, the optimizer's state, and the key for dropout."""

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array  # raw key data, uint32; constant: each step folds in its number


def _initial_parameters(model: Decoder, rng: jax.Array) -> Any:
    """The initial parameters, in Flax's partitioning boxes."""
    tokens = jnp.zeros((1, min(8, model.config.length)), jnp.int32)
    return model.init(rng, tokens, tokens, tokens)["params"]


@functools.lru_cache(maxsize=16)  # tracing takes most of a plan's time, and a study has few models
def _abstract_parameters(model: Decoder) -> Any:
    """The shapes and dtypes of `_initial_parameters`."""
    return jax.eval_shape(lambda: _initial_parameters(model, jax.random.key(0)))


def _with_optimizer(params: Any, optimizer: optax.GradientTransformation, dropout_rng: jax.Array) -> TrainState:
    """The initial state for some parameters, whose boxes the optimizer's moments inherit.

    Moments of another shape, such as Adafactor's rows and columns, have no box and so are replicated.
    """
    def of_its_shape(box: Any) -> Any:
        boxed = isinstance(box, nn.Partitioned)
        return box.value if boxed and (len(box.names) != box.value.ndim or box.value.size == 1) else box

    moments = jax.tree.map(of_its_shape, optimizer.init(params), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return TrainState(jnp.zeros((), jnp.int32), params, moments, jax.random.key_data(dropout_rng))


def abstract_state(
    model: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, shape: MeshShape
) -> TrainState:
    """The state as jax.ShapeDtypeStructs with shardings: nothing is allocated. Call outside jax.set_mesh.

    Raises:
      ValueError: the mesh does not divide a parameter, or the heads.
    """
    _require_whole_heads(model.config, mesh, shape)
    boxed = jax.eval_shape(
        lambda params: _with_optimizer(params, optimizer, jax.random.key(0)), _abstract_parameters(model))
    shardings = shardings_of(boxed, mesh, shape)
    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or replicated),
        nn.unbox(boxed), shardings)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        try:
            leaf.sharding.shard_shape(leaf.shape)
        except ValueError:
            name = "/".join(str(getattr(key, "key", key)) for key in path)
            raise ValueError(
                f"The mesh {dict(mesh.shape)} cannot divide the parameter {name} of shape {leaf.shape}, laid out as "
                f"{leaf.sharding.spec}: choose mesh.fsdp and mesh.model that divide the model's sizes.") from None
    return state


def _require_whole_heads(config: DecoderConfig, mesh: Mesh, shape: MeshShape) -> None:
    """Raises ValueError if a head would be split: kernels have all heads in one axis, which the mesh might divide
    nevertheless."""
    for name, heads, axis in (("heads", config.heads, "heads"), ("kv_heads", config.key_heads, config.key_axis)):
        axes = dict(shape.all_rules())[f"activation_{axis}"]
        parts = math.prod(mesh.shape[one] for one in ((axes,) if isinstance(axes, str) else axes or ()))
        if heads % parts:
            whole = ", or keep keys and values whole on each device with --gin.mesh.rules=" \
                "\"[('kv_heads', None), ('activation_kv_heads', None)]\"" if axis == "kv_heads" else ""
            raise ValueError(f"The mesh {dict(mesh.shape)} cannot divide the parameter model.{name} = {heads} into "
                             f"{parts}: choose a mesh.model that does{whole}.")


def initial_state(
    model: Decoder, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
    """The initial state, created on its devices; the same numbers on any mesh, up to float32 rounding."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_cpu = shardings.step.mesh.devices.flat[0].platform == "cpu"

    def first(seed: jax.Array) -> TrainState:
        init_rng, dropout_rng = jax.random.split(jax.random.key(seed))
        return nn.unbox(_with_optimizer(_initial_parameters(model, init_rng), optimizer, dropout_rng))

    make = jax.jit(
        first, out_shardings=shardings,
        # It runs only once, so compile time matters more: the same bits, compiled in half the time.
        compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None)
    return make(jnp.uint32(seed))


def memory_per_device() -> int:
    """Bytes of memory of one of this process's devices; for a CPU device, its share of the host's or container's."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        has = min(has, int(text))
    return has // jax.local_device_count()


def require_memory(abstract: Any, what: str) -> None:
    """Raises ValueError if a device of this process cannot hold its part of an abstract tree of arrays."""
    needed, has, gib = bytes_per_device(abstract), memory_per_device(), 2**30
    if needed > has:
        raise ValueError(f"{what} need {needed / gib:.2f} GiB per device, but a device here has {has / gib:.2f} GiB: "
                         "choose a smaller model, or shard it over more devices (mesh.fsdp).")


def bytes_per_device(abstract: Any) -> int:
    """Bytes of an abstract state, or part of one, that one device holds."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(abstract))
