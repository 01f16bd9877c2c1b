"""The mesh, and the rules that map logical axes of parameters and activations to it.

Mesh axes: `data` replicates parameters and splits the batch; `fsdp` splits both the batch and the parameters; `model`
splits heads, the MLP and the vocabulary (tensor parallelism). Several slices of a pod are joined along `data`, so that
only gradients cross the slower network between them.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axes. The names are those of model/parts.py and model/decoder.py.
AXIS_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("activation_batch", ("data", "fsdp")),
    ("activation_length", None),
    ("activation_embed", None),
    ("activation_heads", "model"),
    ("activation_kv_heads", "model"),  # for keys and values with fewer heads than queries
    ("activation_kv", None),
    ("activation_mlp", "model"),
    ("activation_vocab", "model"),
    ("lookup_batch", "data"),  # during an embedding lookup, whose columns are split over fsdp
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("kv", None),
    ("mlp", "model"),
    ("position", None),
    ("layers", None),
)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis; one of `data`, `fsdp`, `model` may be -1: all remaining devices.

    Attributes:
      data: devices that each take a part of the batch and hold all parameters.
      fsdp: devices that each take a part of the batch and hold a part of the parameters.
      model: devices that each compute a part of each matrix product.
      slices: TPU slices joined along `data`; divides it.
      rules: overrides of AXIS_RULES, each a logical axis and the mesh axis, tuple of mesh axes or None that it maps to.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1
    slices: int = 1
    rules: Sequence[tuple[str, str | tuple[str, ...] | None]] = ()

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.model)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or self.slices < 1:
            raise ValueError(f"Mesh axes must be positive, at most one of them -1; found {self}.")
        known = [name for name, _ in AXIS_RULES]
        for name, _ in self.rules:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"mesh.rules names the unknown axis {name!r}; nearest: {near}.")
        for name, axes in self.rules:
            for axis in [axes] if isinstance(axes, str) else axes or []:
                if axis not in MESH_AXES:
                    raise ValueError(f"mesh.rules lays {name} onto {axis!r}, which is not one of "
                                     f"{', '.join(MESH_AXES)}.")

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The axes' sizes on `devices` devices. Raises ValueError if their product differs."""
        sizes = [self.data, self.fsdp, self.model]
        known = int(np.prod([size for size in sizes if size != -1]))
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if int(np.prod(sizes)) != devices:
            raise ValueError(
                f"The mesh data={self.data}, fsdp={self.fsdp}, model={self.model} does not fit {devices} devices: "
                "the axes must multiply to that number (-1 means the rest). A run that starts from another inherits "
                "its mesh unless mesh.data, mesh.fsdp and mesh.model are set.")
        if sizes[0] % self.slices:
            raise ValueError(f"mesh.slices={self.slices} must divide the data axis, which has {sizes[0]}.")
        return sizes[0], sizes[1], sizes[2]

    def all_rules(self) -> list[tuple[str, str | tuple[str, ...] | None]]:
        """AXIS_RULES with the overrides applied."""
        return list((dict(AXIS_RULES) | dict(self.rules)).items())


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), with the nearest devices along `model`.

    Two mesh axes share an axis of a TPU's torus only if they must, as for 4 x 4 x 4 chips with model=2.

    Axis types are Auto: under Explicit, the default of jax.make_mesh, Flax's partitioned parameters fail.

    For several CPU devices this turns off JAX's persistent compilation cache; see `_compile_anew`.
    """
    devices = jax.devices() if devices is None else devices
    if devices[0].platform == "cpu" and len(devices) > 1:
        _compile_anew()
    data, fsdp, model = shape.sizes(len(devices))
    if shape.slices > 1 and getattr(devices[0], "slice_index", None) is not None:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // shape.slices, fsdp, model), (shape.slices, 1, 1), devices=devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh((data, fsdp, model), devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _compile_anew() -> None:
    """Turns JAX's persistent compilation cache off in this process.

    A program for several CPU devices that jaxlib 0.10.2 reads from the cache has lost the order of its collectives:
    devices wait for each other forever, and XLA aborts the process after 40 seconds. Freshly compiled, it runs.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # makes JAX read the setting again


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [batch, length] array."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))


def require_divisible(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Raises ValueError if the mesh cannot split the batch evenly."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
    if batch_size < 1 or batch_size % shards:
        near = max(1, round(batch_size / shards)) * shards
        raise ValueError(
            f"BATCH_SIZE = {batch_size} cannot be divided by the mesh: data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} x {microbatches} microbatches need a multiple of {shards}, such as {near}.")


def shardings_of(boxed: object, mesh: Mesh, shape: MeshShape) -> object:
    """NamedShardings for a tree of Flax's LogicallyPartitioned values; leaves without a box are replicated.

    The rules determine them, and on TPU then `by_rows`.
    """
    names = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(names, mesh, shape.all_rules())
    if not is_laid_by_rows(mesh):
        return shardings
    return jax.tree.map(by_rows, names, shardings, nn.unbox(boxed))


def is_laid_by_rows(mesh: Mesh) -> bool:
    """Whether `by_rows` applies: on TPU, whose memory is tiled. Elsewhere a kernel's layout does not matter."""
    return mesh.devices.flat[0].platform == "tpu"


def by_rows(names: PartitionSpec, sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Shards an output or down kernel [..., heads or mlp, embed] only by rows, split over all its mesh axes.

    By the rules, `fsdp` splits its columns. Of 2,560 or 5,120, each of 256 devices has 10 or 20, small parts of a tile
    of 128, and each gather of the kernel is followed by a copy to another layout. If the mesh does not divide the rows
    this way, the rules apply. Global shapes and checkpoints do not change.
    """
    if tuple(names)[-2:] not in (("heads", "embed"), ("mlp", "embed")):
        return sharding
    spec = tuple(sharding.spec) + (None,) * (len(leaf.shape) - len(sharding.spec))
    rows, columns = (((axes,) if isinstance(axes, str) else tuple(axes or ())) for axes in spec[-2:])
    if not columns or leaf.shape[-2] % math.prod(sharding.mesh.shape[axis] for axis in rows + columns):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[:-2], rows + columns, None))
