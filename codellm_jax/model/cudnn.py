"""cuDNN's attention on NVIDIA GPUs, by the custom calls of XLA that `jax.nn.dot_product_attention` makes too.

The backward pass is marked as deterministic here. Otherwise XLA up to 0.12 marks only the first of several equal calls
of a program and does not find the others (openxla/xla#46500), so that layers could not be unrolled. No card is needed
to compile these calls. Shape suffixes are explained at the top of `decoder.py`.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

# Numbers for hidden keys, finite in the dtype; cuDNN does not subtract larger ones correctly, says JAX.
HIDDEN = {"bfloat16": -(2.0 ** 41), "float16": -(2.0 ** 15)}
TYPES = {"bfloat16": "BF16", "float16": "F16"}
HEADS_FIRST = (0, 2, 1, 3)  # results are described as [B, H, L, K], and lie in memory as [B, L, H, K]
WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA sets its size

# For each product, by XLA's name: the contracted axes of both operands, then their batch axes.
FORWARD = {"bmm1": (3, 3, (0, 2), (0, 2)), "bmm2": (3, 1, (0, 1), (0, 2))}
BACKWARD = {
    "bmm1_grad_gemm1": (2, 1, (0, 1), (0, 2)), "bmm1_grad_gemm2": (3, 1, (0, 1), (0, 2)),
    "bmm2_grad_gemm1": (2, 1, (0, 1), (0, 2)), "bmm2_grad_gemm2": (3, 3, (0, 2), (0, 2))}


def attend(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, visible_B1LM: jax.Array, causal: bool,
    spec: PartitionSpec,
) -> jax.Array:
    """Attention under a mask.

    Args:
      query_BLHK, key_BMGK, value_BMGK: bfloat16 or float16; K is a multiple of 8 up to 128, L and M are even.
      visible_B1LM: bool, whether the query sees the key.
      causal: whether no query sees keys behind it in the row, so that their blocks can be skipped.
      spec: the layout of the first three on the mesh (`attention.layout`).

    Returns:
      [B, L, H, K] in the dtype of the values. The values that a backward pass needs are named "attended" for
      `jax.checkpoint`.
    """
    bias_B1LM = jnp.where(visible_B1LM, 0, HIDDEN[str(query_BLHK.dtype)]).astype(query_BLHK.dtype)
    if jax.sharding.get_abstract_mesh().empty:
        return _attend(query_BLHK, key_BMGK, value_BMGK, bias_B1LM, causal)
    return jax.shard_map(
        functools.partial(_attend, causal=causal), in_specs=(spec, spec, spec, PartitionSpec(spec[0])),
        out_specs=spec, check_vma=False)(query_BLHK, key_BMGK, value_BMGK, bias_B1LM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, bias_B1LM: jax.Array, causal: bool
) -> jax.Array:
    return _forward(query_BLHK, key_BMGK, value_BMGK, bias_B1LM, causal)[0]


def _forward(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, bias_B1LM: jax.Array, causal: bool
) -> tuple[jax.Array, Any]:
    batch, length, heads, _ = query_BLHK.shape
    sums = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    attended, sums_BHL, _ = call(
        "__cudnn$fmhaScaleBiasSoftmax", (query_BLHK, key_BMGK, value_BMGK, bias_B1LM),
        [heads_first(query_BLHK), sums, WORKSPACE], query_BLHK, key_BMGK, causal, FORWARD, {})
    attended_BLHK, sums_BHL = (
        checkpoint_name(array, "attended") for array in (attended.transpose(HEADS_FIRST), sums_BHL))
    return attended_BLHK, (query_BLHK, key_BMGK, value_BMGK, bias_B1LM, sums_BHL, attended_BLHK)


def _backward(causal: bool, kept: Any, gradient_BLHK: jax.Array) -> tuple[Any, ...]:
    query_BLHK, key_BMGK, value_BMGK, bias_B1LM, sums_BHL, attended_BLHK = kept
    *gradients, _ = call(
        "__cudnn$fmhaScaleBiasSoftmaxBackward",
        (query_BLHK, key_BMGK, value_BMGK, sums_BHL, gradient_BLHK, bias_B1LM, attended_BLHK),
        [*map(heads_first, (query_BLHK, key_BMGK, value_BMGK)), WORKSPACE], query_BLHK, key_BMGK, causal, BACKWARD,
        {"force_deterministic": True})
    return (*(gradient.transpose(HEADS_FIRST) for gradient in gradients), None)


_attend.defvjp(_forward, _backward)


def heads_first(array_BLHK: jax.Array) -> jax.ShapeDtypeStruct:
    batch, length, heads, size = array_BLHK.shape
    return jax.ShapeDtypeStruct((batch, heads, length, size), array_BLHK.dtype)


def call(
    target: str, operands: Sequence[jax.Array], results: Sequence[jax.ShapeDtypeStruct], query_BLHK: jax.Array,
    key_BMGK: jax.Array, causal: bool, products: dict[str, Any], more: dict[str, Any],
) -> Sequence[jax.Array]:
    """A call of cuDNN, which XLA configures by `CudnnfMHABackendConfig` (xla/service/gpu/backend_configs.proto).

    Args:
      target: XLA's name of the pass.
      results: shapes; those of four axes are described with heads before tokens.
      products: FORWARD or BACKWARD.
      more: settings beside or instead of the usual ones.
    """
    batch, length, heads, size = query_BLHK.shape
    scores = [batch, heads, length, key_BMGK.shape[1]]
    settings = {
        "fmha_scale": size ** -0.5, "mask_type": "CAUSAL" if causal else "NO_MASK", "is_flash_attention": True,
        "dropout_rate": 0.0, "seed": 42, "sliding_window_length": 0, "max_seg_per_batch": 1,
        "is_paged_attention": False,
        "algorithm": {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
                      "is_cudnn_frontend": True, "workspace_size": "0"},
        "intermediate_tensor_shape": {
            "element_type": TYPES[str(query_BLHK.dtype)], "dimensions": [str(axis) for axis in scores],
            "is_dynamic_dimension": [False] * 4, "layout": {"minor_to_major": ["3", "2", "1", "0"]}}} | more
    for name, (left, right, left_batch, right_batch) in products.items():
        settings[f"{name}_dot_dimension_numbers"] = {
            "lhs_contracting_dimensions": [str(left)], "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": [str(axis) for axis in left_batch],
            "rhs_batch_dimensions": [str(axis) for axis in right_batch]}
    return jax.ffi.ffi_call(
        target, results, output_layouts=[HEADS_FIRST if len(result.shape) == 4 else None for result in results],
        custom_call_api_version=2, vmap_method="sequential",
        legacy_backend_config=json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": settings}),
    )(*operands)
