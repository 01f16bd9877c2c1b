"""Splash attention: JAX's Pallas kernel for TPU, which stores no scores and skips causally masked blocks.

The kernel handles one device and one row. Rows are mapped over here, and devices by `shard_map`, which takes the layout
from the rules of the logical axes. On a CPU the kernel is interpreted, for tests. Shape suffixes are explained at the
top of `decoder.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernel
from jax.sharding import PartitionSpec

LANES = 128  # rows are padded to a multiple of this, and blocks are multiples of it
# Queries and keys in a block: the largest of these that divides the padded length. 512 x 512 float32 scores are 1 MiB
# of a core's 16 MiB of fast memory.
BLOCKS = (512, 256, 128)


def attend(
    query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array, spec: PartitionSpec,
    interpret: bool,
) -> jax.Array:
    """Causal attention within segments, of whole rows.

    Args:
      query_BLHK: queries, scaled.
      key_BLGK, value_BLGK: of the same tokens.
      segments_BL: int32, the document each token belongs to.
      spec: the layout of the first three on the mesh (`attention.layout`).
      interpret: runs the kernel in JAX, anywhere, slowly.

    Returns:
      [B, L, H, K] in the dtype of the values. The values that a backward pass needs are named "attended" for
      `jax.checkpoint`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _on_one_device(query_BLHK, key_BLGK, value_BLGK, segments_BL, interpret)
    return jax.shard_map(
        functools.partial(_on_one_device, interpret=interpret),
        in_specs=(spec, spec, spec, PartitionSpec(spec[0], None)),
        out_specs=spec, check_vma=False)(query_BLHK, key_BLGK, value_BLGK, segments_BL)


def _on_one_device(
    query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array, interpret: bool
) -> jax.Array:
    """The kernel, over the rows and heads of this device."""
    length, heads = query_BLHK.shape[1:3]
    padding = -length % LANES  # after the row, where causality hides it
    query_BHLK, key_BGLK, value_BGLK = (
        jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for array in (query_BLHK, key_BLGK, value_BLGK))
    segments_BL = jnp.pad(segments_BL, ((0, 0), (0, padding)))
    padded = length + padding
    block = next(size for size in BLOCKS if padded % size == 0)
    attention = kernel.make_splash_mha_single_device(
        kernel.MultiHeadMask([kernel.CausalMask((padded, padded))] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block),
        residual_checkpoint_name="attended", interpret=interpret)
    attended_BHLK = jax.vmap(attention)(
        query_BHLK, key_BGLK, value_BGLK, kernel.SegmentIds(segments_BL, segments_BL))
    return attended_BHLK[:, :, :length].swapaxes(1, 2)
