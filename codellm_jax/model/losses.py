"""Cross-entropy that never holds all logits.

With a vocabulary of 130,344 the float32 logits of one row of 1,024 tokens take 0.5 GiB, and the standard computation
holds them two or three times. Here chunks of positions are processed one by one: a chunk's logits give its losses and
immediately its part of both gradients, and are then dropped. This takes three matmuls, where recomputing the logits in
the backward pass (`jax.checkpoint`) takes four. Shape suffixes are explained at the top of `decoder.py`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from codellm_jax.model.attention import axes_that_split, platform

# Positions in a chunk: B x C x V x 4 bytes of logits are live at a time. Measured on 2 CPU cores at 8 x 256 tokens,
# width 256, vocabulary 8,192, gradients included: 111 ms for 32, 104 for 64; 145 for all logits at once.
DEFAULT_CHUNK = 64
LOGITS = 2**28  # bytes of a chunk's logits on a device
LOGITS_ON_GPU = 2**30  # each chunk reads and writes the embedding's whole gradient
PARTS = 4  # in which the embedding's gradient is summed over devices
TILE_COLUMNS = 128  # of a TPU
FLOATS_OF_LINE = 16  # of a processor's cache


class _Gradients(NamedTuple):
    """Gradients of the weighted sum of losses, for an upstream gradient of 1."""

    hidden_BLD: jax.Array
    embedding_VD: jax.Array


def chunk_of(rows: int, vocabulary_size: int, *, gradients: bool) -> int:
    """Positions in a chunk for `rows` rows, which are distributed over all devices of the mesh (one device without a
    mesh).

    This is DEFAULT_CHUNK, or fewer if their logits would exceed LOGITS on a device. For gradients over several devices
    or on a GPU, however, where many small chunks are slow, a chunk is as large as LOGITS (or LOGITS_ON_GPU) allows
    (all positions, if each device has few rows); over several devices it is never smaller than DEFAULT_CHUNK.
    """
    devices, on_gpu = max(1, jax.sharding.get_abstract_mesh().size), gradients and platform() == "gpu"
    most = max(1, (LOGITS_ON_GPU if on_gpu else LOGITS) * devices // (4 * rows * vocabulary_size))
    if gradients and devices > 1:
        return max(DEFAULT_CHUNK, most)
    return most if on_gpu else min(DEFAULT_CHUNK, most)


def cross_entropy(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    chunk: int = DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted sum of -log softmax(hidden embedding^T)[target], chunk by chunk along the length.

    The length is cut, not the batch, so that a batch axis sharded over devices stays sharded. Products run in the
    dtype of `hidden_BLD` and accumulate in float32; everything else is float32.

    Args:
      hidden_BLD: final hidden states.
      embedding_VD: the tied token embedding, float32; its gradient comes back in its own dtype.
      targets_BL: int32 in [0, V), also where the weight is 0.
      weights_BL: float32, 0 for a token that does not count. A constant: no gradient flows to it.
      chunk: positions in a chunk. A length that it does not divide is cut into as many, evenly smaller chunks.

    Returns:
      The scalar float32 sum of weight x loss, differentiable once, in reverse, with respect to `hidden_BLD` and
      `embedding_VD`; and negative_log_likelihood_BL, float32, unweighted, a value that passes no gradient.

    Raises:
      ValueError: if chunk is below 1 or the shapes do not fit together.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, found {chunk}.")
    shapes = hidden_BLD.shape, embedding_VD.shape, targets_BL.shape, weights_BL.shape
    if not (shapes[0][:2] == shapes[2] == shapes[3] and shapes[0][2] == shapes[1][1]):
        raise ValueError(
            f"hidden, embedding, targets and weights must be [B, L, D], [V, D], [B, L] and [B, L], found {shapes}."
        )
    length = hidden_BLD.shape[1]
    chunks = -(-length // chunk)
    chunk = -(-length // chunks)
    padding = chunks * chunk - length  # less than one position a chunk
    if padding:
        # Outside the custom gradient, so that the gradient of the padding is JAX's own slice.
        hidden_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, padding), (0, 0)))
        targets_BL, weights_BL = (jnp.pad(a, ((0, 0), (0, padding))) for a in (targets_BL, weights_BL))
    weights_BL = jax.lax.stop_gradient(weights_BL.astype(jnp.float32))
    loss_sum, loss_BL = _chunked(hidden_BLD, embedding_VD, targets_BL, weights_BL, chunk)
    return loss_sum, jax.lax.stop_gradient(loss_BL[:, :length])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(
    hidden_BLD: jax.Array, embedding_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """The forward pass alone, used without differentiation."""
    loss_BL, _ = _scan(hidden_BLD, embedding_VD, targets_BL, weights_BL, chunk, False)
    return jnp.sum(loss_BL * weights_BL), loss_BL


def _chunked_forward(
    hidden_BLD: jax.Array, embedding_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, chunk: int
) -> tuple[tuple[jax.Array, jax.Array], _Gradients]:
    """The forward pass under differentiation: it computes the gradients, and keeps only them."""
    loss_BL, gradients = _scan(hidden_BLD, embedding_VD, targets_BL, weights_BL, chunk, True)
    assert gradients is not None
    return (jnp.sum(loss_BL * weights_BL), loss_BL), gradients


def _chunked_backward(
    chunk: int, gradients: _Gradients, upstream: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    """Scales the kept gradients; the upstream gradient of the losses per token is zero, since `cross_entropy` stops it.
    """
    scale = upstream[0]
    hidden_BLD, embedding_VD = ((scale * gradient).astype(gradient.dtype) for gradient in gradients)
    return hidden_BLD, embedding_VD, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _scan(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk: int,
    with_gradients: bool,
) -> tuple[jax.Array, _Gradients | None]:
    """Passes over the chunks; returns loss_BL and, if asked for, the gradients of the weighted sum of losses."""
    # Named so that an embedding sharded over its width is gathered once, before the loop; without a mesh the names have
    # no effect. The barrier keeps XLA from gathering it in float32.
    compute_embedding_VD = nn.with_logical_constraint(
        jax.lax.optimization_barrier(embedding_VD.astype(hidden_BLD.dtype)), ("activation_vocab", "activation_embed")
    )
    loop: Callable[..., Any] = functools.partial(_loop, chunk=chunk, with_gradients=with_gradients)
    if with_gradients and (axes := _axes_of_rows(len(hidden_BLD))):
        loop = _summed_once(loop, *axes)
    loss_BL, gradients = loop(hidden_BLD, compute_embedding_VD, targets_BL, weights_BL)
    if gradients is None:
        return loss_BL, None
    return loss_BL, gradients._replace(embedding_VD=gradients.embedding_VD.astype(embedding_VD.dtype))


def _axes_of_rows(rows: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The axes of the mesh that split the batch, and those that split the embedding's width; None unless the former are
    several devices, all of the mesh, and divide the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, width = axes_that_split("activation_batch"), axes_that_split("embed")
    of_batch = math.prod(mesh.shape[axis] for axis in batch)
    fits = of_batch == mesh.size > 1 and set(width) <= set(batch) and rows % of_batch == 0
    return (batch, width) if fits else None


def _summed_once(loop: Callable[..., Any], batch: tuple[str, ...], width: tuple[str, ...]) -> Callable[..., Any]:
    """The loop on the rows of each device, with one sum of the embedding's gradient over the devices.

    The partitioner would add a sum to each iteration. The gradient is summed in the compute dtype, like those of all
    kernels, and sharded over its width like the embedding.
    """
    rows, whole, columns = (PartitionSpec(*axes) for axes in ((batch,), (), (None, width)))
    results: Any = rows, _Gradients(rows, columns)  # type: ignore[arg-type]
    others = tuple(axis for axis in batch if axis not in width)

    def on_one_device(*arrays: jax.Array) -> tuple[jax.Array, _Gradients]:
        dtype = arrays[0].dtype

        def summed(part_VD: jax.Array) -> jax.Array:
            part_VD = part_VD.astype(dtype)
            if width:
                part_VD = jax.lax.psum_scatter(part_VD, width, scatter_dimension=1, tiled=True)
            return jax.lax.psum(part_VD, others) if others else part_VD

        with nn.logical_axis_rules(()):  # its constraints are for the partitioner, which is not at work here
            return loop(*arrays, summed=summed)

    return jax.shard_map(on_one_device, in_specs=(rows, whole, rows, rows), out_specs=results, check_vma=False)


def _loop(
    hidden_BLD: jax.Array, compute_embedding_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, *,
    chunk: int, with_gradients: bool, summed: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, _Gradients | None]:
    """`_scan` with an embedding in the compute dtype.

    The embedding's gradient is float32, unless `summed` sums parts of it over devices: [V', D] float32 to its result.
    """
    batch, length, width = hidden_BLD.shape
    dtype, vocabulary_size = hidden_BLD.dtype, compute_embedding_VD.shape[0]
    # On CPU the embedding's gradient is summed as [D, V], from a transposed copy: see `parts._products`.
    turned = platform() == "cpu"

    def one_chunk(start: jax.Array) -> tuple[jax.Array, Any, Any]:
        """loss_BC; and if asked for, hidden_gradient_BCD and the factors of the embedding's gradient."""
        # Flattened to N: with two contracted axes, XLA on CPU would transpose the logits by a copy.
        hidden_ND, target_N, weight_N = (
            jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=1).reshape(-1, *array.shape[2:])
            for array in (hidden_BLD, targets_BL, weights_BL)
        )
        logits_NV = jnp.einsum("ND,VD->NV", hidden_ND, compute_embedding_VD, preferred_element_type=jnp.float32)
        logits_NV = nn.with_logical_constraint(logits_NV, ("activation_batch", "activation_vocab"))
        # Computing the target's logit from a row of the embedding saves a pass over the logits.
        target_logit_N = jnp.einsum(
            "ND,ND->N", hidden_ND, compute_embedding_VD[target_N], preferred_element_type=jnp.float32
        )
        highest_N = jnp.max(logits_NV, axis=-1)
        exponential_NV = jnp.exp(logits_NV - highest_N[:, None])
        partition_N = jnp.sum(exponential_NV, axis=-1)
        loss_BC = (jnp.log(partition_N) + highest_N - target_logit_N).reshape(batch, chunk)
        if not with_gradients:
            return loss_BC, None, None
        # d loss / d logits = weight x (softmax - one-hot of the target)
        is_target_NV = target_N[:, None] == jnp.arange(vocabulary_size)
        logits_gradient_NV = exponential_NV * (weight_N / partition_N)[:, None]
        logits_gradient_NV -= jnp.where(is_target_NV, weight_N[:, None], 0.0)
        logits_gradient_NV = logits_gradient_NV.astype(dtype)
        hidden_gradient_ND = logits_gradient_NV @ compute_embedding_VD
        return loss_BC, hidden_gradient_ND.reshape(batch, chunk, width), (hidden_ND, logits_gradient_NV)

    def product(hidden_ND: jax.Array, logits_gradient_NV: jax.Array) -> jax.Array:
        """Their part of the embedding's gradient, [V, D] or on CPU [D, V]."""
        factors = (("DN,NV->DV", jax.lax.optimization_barrier(hidden_ND.T), logits_gradient_NV) if turned else
                   ("NV,ND->VD", logits_gradient_NV, hidden_ND))
        return jnp.einsum(*factors, preferred_element_type=jnp.float32)

    def in_order(gradient: jax.Array) -> jax.Array:
        return _transposed(gradient) if turned else gradient

    def added(embedding_gradient: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        loss_BC, hidden_gradient_BCD, factors = one_chunk(start)
        embedding_gradient = nn.with_logical_constraint(
            embedding_gradient + product(*factors), ("embed", "vocab") if turned else ("vocab", "embed"))
        return embedding_gradient, (loss_BC, hidden_gradient_BCD)

    def along_length(chunks: jax.Array) -> jax.Array:
        """[chunks, B, C, ...] to [B, L, ...]."""
        return jnp.moveaxis(chunks, 0, 1).reshape(batch, length, *chunks.shape[3:])

    starts = jnp.arange(0, length, chunk)
    if not with_gradients:
        return along_length(jax.lax.map(lambda start: one_chunk(start)[0], starts)), None
    if summed is not None and batch * length <= 2 * width:
        # All gradients of logits, in the compute dtype, take no more memory than the embedding's in float32.
        losses, hidden_gradients, factors = jax.lax.map(one_chunk, starts)
        hidden_ND, logits_gradient_NV = (array.reshape(-1, array.shape[-1]) for array in factors)
        gradient_VD = _by_parts(lambda part, array: summed(in_order(product(hidden_ND, array[:, part]))),
                                logits_gradient_NV, vocabulary_size)
    else:
        shape = compute_embedding_VD.shape[::-1] if turned else compute_embedding_VD.shape
        gradient, (losses, hidden_gradients) = jax.lax.scan(added, jnp.zeros(shape, jnp.float32), starts)
        gradient_VD = in_order(gradient)
        if summed is not None:
            gradient_VD = _by_parts(lambda part, array: summed(array[part]), gradient_VD, vocabulary_size)
    return along_length(losses), _Gradients(along_length(hidden_gradients), gradient_VD)


def _by_parts(of_part: Callable[[slice, jax.Array], jax.Array], array: jax.Array, rows: int) -> jax.Array:
    """Computes PARTS of [rows, D] one after another, from `array`: the memory of a part is free before the next."""
    size = -(-rows // (PARTS * TILE_COLUMNS)) * TILE_COLUMNS
    parts = []
    for start in range(0, rows, size):
        # The barrier gives the parts an order; otherwise XLA combines their sums over devices, and holds them all.
        array, part = jax.lax.optimization_barrier((array, of_part(slice(start, start + size), array)))
        parts.append(part)
    return jnp.concatenate(parts)


def _transposed(array_DV: jax.Array) -> jax.Array:
    """[V, D] by two copies, each of which reads and writes whole cache lines; a single copy would read a line for each
    number.
    """
    width, vocabulary_size = array_DV.shape
    if vocabulary_size % FLOATS_OF_LINE:
        return array_DV.T
    lines = array_DV.reshape(width, -1, FLOATS_OF_LINE).swapaxes(0, 1)
    return jax.lax.optimization_barrier(lines).swapaxes(1, 2).reshape(vocabulary_size, width)
