"""Dot-product attention: one function, several implementations chosen by name.

All implementations compute the same function, softmax(Q K^T / sqrt(K)) V under one mask, and are tested against
"reference" in values and gradients. There may be fewer heads of keys and values than of queries: each then serves a
group of neighbouring query heads. "auto" chooses by the devices that a program is compiled for: "splash" on TPU,
"fused" on GPU, "blocked" elsewhere; "cudnn" is for GPUs too. Shape suffixes are explained at the top of `decoder.py`.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

# "blocked" cuts the queries into at most MOST_BLOCKS blocks, none smaller than SMALLEST_BLOCK. Measured on 2 CPU cores,
# both passes, before the backward pass was custom: 256 tokens 11 ms against 22 unblocked, 1,024 tokens 240 against 382.
MOST_BLOCKS = 8
SMALLEST_BLOCK = 64

ATTENDED = jax.checkpoint_policies.save_only_these_names("attended")
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"

# A token always sees itself: no row is fully masked, so the lowest finite number works as well as -inf.
LOWEST = float(jnp.finfo(jnp.float32).min)


class AttentionMask(NamedTuple):
    """The mask as a rule rather than an array, so that blockwise kernels can skip masked blocks.

    The query at index i of the row sees the key at index j where j <= i and both belong to the same segment
    (document), or j belongs to the shared segment. Indices count along the row; they are not the position ids, which
    restart at each document.

    Attributes:
      query_segments_BL: int32, the document each query belongs to.
      key_segments_BM: int32, the document each key belongs to.
      query_offset: None if queries and keys are the same tokens; else an int32 scalar, the row index of the first
        query (queries are then the newest tokens of a cache of M slots; slots not yet written lie in the future).
      shared_segment: None, or the id of a segment that all later tokens of the row see, as the branches of a tree see
        its stem.
    """

    query_segments_BL: jax.Array
    key_segments_BM: jax.Array
    query_offset: jax.Array | None = None
    shared_segment: int | None = None

    def dense(self) -> jax.Array:
        """Returns the mask as an array, bool [B, 1, L, M], True where the query may see the key."""
        length, key_length = self.query_segments_BL.shape[1], self.key_segments_BM.shape[1]
        query_index_L = jnp.arange(length)
        if self.query_offset is not None:
            query_index_L = query_index_L + self.query_offset
        causal_LM = query_index_L[:, None] >= jnp.arange(key_length)[None, :]
        same_BLM = self.query_segments_BL[:, :, None] == self.key_segments_BM[:, None, :]
        if self.shared_segment is not None:
            same_BLM |= (self.key_segments_BM == self.shared_segment)[:, None, :]
        return (causal_LM & same_BLM)[:, None]


def _heads_first(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales the queries and swaps tokens with heads.

    The einsums could read the arrays as they come, but XLA on CPU then takes 1.2 times as long. Scaling the queries
    touches L x K numbers, scaling the scores would touch L x M.
    """
    query_BLHK = query_BLHK * (query_BLHK.shape[-1] ** -0.5)
    return query_BLHK.swapaxes(1, 2), key_BMGK.swapaxes(1, 2), value_BMGK.swapaxes(1, 2)


def _grouped(query_BHLK: jax.Array, key_heads: int) -> jax.Array:
    """Queries whose heads share a key head, concatenated, [B, G, H/G x L, K]: their products are then one matmul."""
    batch, _, _, size = query_BHLK.shape
    return query_BHLK.reshape(batch, key_heads, -1, size)


def _attend(query_BHLK: jax.Array, key_BGMK: jax.Array, value_BGMK: jax.Array, mask_B1LM: jax.Array) -> jax.Array:
    """softmax(Q K^T) V of scaled queries under a dense mask, with all scores held in float32."""
    batch, heads, length, _ = query_BHLK.shape
    key_heads, slots = key_BGMK.shape[1:3]
    grouped_BGNK = _grouped(query_BHLK, key_heads)
    scores_BGNM = jnp.einsum("BGNK,BGMK->BGNM", grouped_BGNK, key_BGMK, preferred_element_type=jnp.float32)
    scores_BHLM = jnp.where(mask_B1LM, scores_BGNM.reshape(batch, heads, length, slots), LOWEST)
    weights_BHLM = jax.nn.softmax(scores_BHLM, axis=-1).astype(value_BGMK.dtype)
    attended_BGNK = jnp.einsum("BGNM,BGMK->BGNK", weights_BHLM.reshape(scores_BGNM.shape), value_BGMK)
    return attended_BGNK.reshape(query_BHLK.shape)


def reference_attention(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """Attention with the full matrix of scores, [B, H, L, M]; the definition that the others are tested against."""
    query_BHLK, key_BGMK, value_BGMK = _heads_first(query_BLHK, key_BMGK, value_BMGK)
    return _attend(query_BHLK, key_BGMK, value_BGMK, mask.dense()).swapaxes(1, 2)


def blocked_attention(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """Blocks of queries, each against the keys up to its own end only: nearly half of the matrix is never computed.

    The backward pass keeps the attention output and the logarithm of each row's sum of exponentials, both named
    "attended", and recomputes the weights from them (arXiv:2205.14135, section 3.1).

    With a cache, where the position of the queries is only known at run time, it uses the reference; but if there are
    as many queries as the cache has slots, they are the whole row.
    """
    if mask.query_offset is not None and query_BLHK.shape[1] != key_BMGK.shape[1]:
        return reference_attention(query_BLHK, key_BMGK, value_BMGK, mask)
    return _blocked(query_BLHK, key_BMGK, value_BMGK, mask.dense().swapaxes(2, 3))


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first query of each block, and the index after its last."""
    size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(query_BGNK: jax.Array, key_BGMK: jax.Array, mask_B1ML: jax.Array) -> jax.Array:
    """Masked scores of grouped queries, float32 [B, G, M, N]. XLA on CPU vectorizes the sums over the keys in this
    order of the axes.
    """
    scores_BGMN = jnp.einsum("BGMK,BGNK->BGMN", key_BGMK, query_BGNK, preferred_element_type=jnp.float32)
    in_group = query_BGNK.shape[2] // mask_B1ML.shape[3]
    return jnp.where(jnp.tile(mask_B1ML, in_group) if in_group > 1 else mask_B1ML, scores_BGMN, LOWEST)


@jax.custom_vjp
def _blocked(query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, mask_B1ML: jax.Array) -> jax.Array:
    return _blocked_forward(query_BLHK, key_BLGK, value_BLGK, mask_B1ML)[0]


def _blocked_forward(
    query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, mask_B1ML: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Attends block by block; returns [B, L, H, K], and the inputs of the backward pass."""
    query_BHLK, key_BGLK, value_BGLK = _heads_first(query_BLHK, key_BLGK, value_BLGK)
    batch, heads, length, size = query_BHLK.shape
    attended, logarithms = [], []
    for start, stop in _blocks(length):
        key_BGMK, value_BGMK = key_BGLK[:, :, :stop], value_BGLK[:, :, :stop]
        block_BGNK = _grouped(query_BHLK[:, :, start:stop], key_BGLK.shape[1])
        scores_BGMN = _scores(block_BGNK, key_BGMK, mask_B1ML[:, :, :stop, start:stop])
        highest_BGN = jnp.max(scores_BGMN, axis=2)
        exponential_BGMN = jnp.exp(scores_BGMN - highest_BGN[:, :, None])
        total_BGN = jnp.sum(exponential_BGMN, axis=2)
        sum_BGNK = jnp.einsum("BGMN,BGMK->BGNK", exponential_BGMN.astype(value_BGMK.dtype), value_BGMK,
                              preferred_element_type=jnp.float32)
        attended_BGNK = (sum_BGNK / total_BGN[..., None]).astype(value_BGMK.dtype)
        attended.append(attended_BGNK.reshape(batch, heads, stop - start, size))
        logarithms.append((highest_BGN + jnp.log(total_BGN)).reshape(batch, heads, stop - start))
    attended_BLHK = checkpoint_name(jnp.concatenate(attended, axis=2).swapaxes(1, 2), "attended")
    logarithm_BHL = checkpoint_name(jnp.concatenate(logarithms, axis=2), "attended")
    return attended_BLHK, (query_BLHK, key_BLGK, value_BLGK, mask_B1ML, attended_BLHK, logarithm_BHL)


def _blocked_backward(
    kept: tuple[jax.Array, ...], gradient_BLHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of queries, keys and values. d loss / d score = weight (d loss / d weight - sum over the keys of weight
    x d loss / d weight), and this sum is the product of the attention output with its gradient.
    """
    query_BLHK, key_BLGK, value_BLGK, mask_B1ML, attended_BLHK, logarithm_BHL = kept
    dtype, length = query_BLHK.dtype, query_BLHK.shape[1]
    query_BHLK, key_BGLK, value_BGLK = _heads_first(query_BLHK, key_BLGK, value_BLGK)
    batch, key_heads = key_BGLK.shape[:2]
    gradient_BHLK = gradient_BLHK.swapaxes(1, 2)
    shared_BHL = jnp.einsum("BLHK,BLHK->BHL", gradient_BLHK, attended_BLHK, preferred_element_type=jnp.float32)
    query_gradients: list[jax.Array] = []
    key_gradient_BGLK = value_gradient_BGLK = jnp.zeros(key_BGLK.shape, jnp.float32)
    for start, stop in _blocks(length):
        block = slice(start, stop)
        query_BGNK, gradient_BGNK = (
            _grouped(array[:, :, block], key_heads) for array in (query_BHLK, gradient_BHLK))
        logarithm_BG1N, shared_BG1N = (
            array[:, :, block].reshape(batch, key_heads, 1, -1) for array in (logarithm_BHL, shared_BHL))
        key_BGMK = key_BGLK[:, :, :stop]
        scores_BGMN = _scores(query_BGNK, key_BGMK, mask_B1ML[:, :, :stop, block])
        weights_BGMN = jnp.exp(scores_BGMN - logarithm_BG1N)
        weights_gradient_BGMN = jnp.einsum("BGMK,BGNK->BGMN", value_BGLK[:, :, :stop], gradient_BGNK,
                                           preferred_element_type=jnp.float32)
        scores_gradient_BGMN = (weights_BGMN * (weights_gradient_BGMN - shared_BG1N)).astype(dtype)
        query_gradient_BGNK = jnp.einsum("BGMN,BGMK->BGNK", scores_gradient_BGMN, key_BGMK)
        query_gradients.append(query_gradient_BGNK.reshape(*query_BHLK.shape[:2], stop - start, -1))
        behind = ((0, 0), (0, 0), (0, length - stop), (0, 0))
        key_gradient_BGLK += jnp.pad(jnp.einsum(
            "BGMN,BGNK->BGMK", scores_gradient_BGMN, query_BGNK, preferred_element_type=jnp.float32), behind)
        value_gradient_BGLK += jnp.pad(jnp.einsum(
            "BGMN,BGNK->BGMK", weights_BGMN.astype(dtype), gradient_BGNK, preferred_element_type=jnp.float32), behind)
    query_gradient_BHLK = jnp.concatenate(query_gradients, axis=2) * query_BLHK.shape[-1] ** -0.5
    query_gradient_BLHK, key_gradient_BLGK, value_gradient_BLGK = (
        gradient.astype(dtype).swapaxes(1, 2)
        for gradient in (query_gradient_BHLK, key_gradient_BGLK, value_gradient_BGLK))
    return query_gradient_BLHK, key_gradient_BLGK, value_gradient_BLGK, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def fused_attention(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, mask: AttentionMask, prescaled: bool = False
) -> jax.Array:
    """`jax.nn.dot_product_attention`: cuDNN's flash attention on a GPU if supported, else XLA's operations.

    cuDNN supports float16 and bfloat16, head sizes up to 128 divisible by 8, and even lengths. Segments, stems and
    caches are passed as a dense mask, [B, 1, L, M] in the compute dtype; causally masked blocks are skipped in
    addition.

    With `prescaled`, the queries are already scaled, which gives the same result. XLA confuses equal calls of cuDNN's
    deterministic backward pass (openxla/xla#46500), so the calls of one program must differ.
    """
    scale = query_BLHK.shape[-1] ** -0.5
    if prescaled:
        query_BLHK, scale = query_BLHK * scale, 1.0
    attend = functools.partial(
        jax.nn.dot_product_attention, mask=mask.dense(), is_causal=mask.query_offset is None, scale=scale)
    if _cudnn_supports(query_BLHK, key_BMGK):
        return attend(query_BLHK, key_BMGK, value_BMGK, implementation="cudnn")
    return checkpoint_name(attend(query_BLHK, key_BMGK, value_BMGK, implementation="xla"), "attended")


def _cudnn_supports(query_BLHK: jax.Array, key_BMGK: jax.Array) -> bool:
    """Whether cuDNN has a kernel for these arrays, on the devices of the current program."""
    return platform() == "gpu" and query_BLHK.dtype in (jnp.float16, jnp.bfloat16) and query_BLHK.shape[-1] % 8 == 0 \
        and query_BLHK.shape[-1] <= 128 and query_BLHK.shape[1] % 2 == key_BMGK.shape[1] % 2 == 0


def cudnn_attention(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """cuDNN's kernel by the calls of `cudnn.py`, which may be equal; "blocked" for what it does not support, and for
    rows or heads that the mesh does not divide: "fused" could make equal calls that XLA confuses.
    """
    spec = layout(query_BLHK.shape[0], key_BMGK.shape[2])
    if spec is None or not _cudnn_supports(query_BLHK, key_BMGK):
        return blocked_attention(query_BLHK, key_BMGK, value_BMGK, mask)
    from codellm_jax.model import cudnn

    return cudnn.attend(query_BLHK, key_BMGK, value_BMGK, mask.dense(), mask.query_offset is None, spec)


def attended_saveable(primitive: Any, *inputs: Any, **parameters: Any) -> Any:
    """A policy for `jax.checkpoint` that keeps attention outputs and the sums that the backward pass needs.

    Implementations name both "attended"; JAX's cuDNN kernel names nothing and is recognised by its primitive.
    """
    return primitive.name == CUDNN_FORWARD or ATTENDED(primitive, *inputs, **parameters)


def splash_attention(
    query_BLHK: jax.Array, key_BMGK: jax.Array, value_BMGK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """The Pallas kernel of `splash.py`; cases that it does not support use "blocked".

    These are a shared segment (scoring's stems), queries that are the newest tokens of a cache, and rows or heads that
    the mesh does not divide or that are sharded along the length.
    """
    from codellm_jax.model import splash  # import Pallas only when it is used

    spec = layout(query_BLHK.shape[0], key_BMGK.shape[2])
    whole_rows = mask.query_offset is None or query_BLHK.shape[1] == key_BMGK.shape[1]
    if spec is None or not whole_rows or mask.shared_segment is not None:
        return blocked_attention(query_BLHK, key_BMGK, value_BMGK, mask)
    return splash.attend(query_BLHK * (query_BLHK.shape[-1] ** -0.5), key_BMGK, value_BMGK, mask.query_segments_BL,
                         spec, interpret=platform() != "tpu")


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference_attention, "blocked": blocked_attention, "fused": fused_attention,
    "splash": splash_attention, "cudnn": cudnn_attention}
BY_PLATFORM = {"tpu": "splash", "gpu": "fused", "cpu": "blocked"}
NAMES = ("auto", *IMPLEMENTATIONS)


def platform() -> str:
    """The platform that the current program will run on: that of the mesh's devices, which may be absent from this
    machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def axes_that_split(name: str) -> tuple[str, ...]:
    """The axes of the mesh, of several devices each, that split a logical axis; none without a mesh or a rule for it.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules()).get(name)
    named = (axes,) if isinstance(axes, str) else axes or ()
    return () if mesh.empty else tuple(axis for axis in named if mesh.shape[axis] > 1)


def layout(batch: int, key_heads: int) -> PartitionSpec | None:
    """The layout of [B, L, H, K] on the mesh; None if a kernel for single rows and heads cannot work on it.

    This is the case if the length or the head size is sharded, or if the mesh does not divide the batch or the key
    heads, each of which stays with its query heads. Without a mesh, or without rules for the logical axes, everything
    is on one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = ("activation_batch", "activation_length", "activation_heads", "activation_kv")
    spec = PartitionSpec() if mesh.empty else nn.logical_to_mesh_axes(names) or PartitionSpec()
    axes = [*spec, *[None] * (4 - len(spec))]

    def parts(axis: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))

    fits = parts(axes[1]) == parts(axes[3]) == 1 and batch % parts(axes[0]) == 0 and key_heads % parts(axes[2]) == 0
    return PartitionSpec(axes[0], None, axes[2], None) if fits else None


def check_name(what: str, found: str, known: Iterable[str]) -> None:
    """Raises ValueError with a one-line message that suggests the nearest known name if `found` is not among `known`.
    """
    known = list(known)
    if found not in known:
        nearest = difflib.get_close_matches(str(found), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{what} {found!r} is unknown: did you mean {nearest!r}? Known: {', '.join(known)}.")


def dot_product_attention(
    query_BLHK: jax.Array,
    key_BMGK: jax.Array,
    value_BMGK: jax.Array,
    mask: AttentionMask,
    *,
    implementation: str = "auto",
    is_query_layer: bool = False,
) -> jax.Array:
    """Attends causally within each segment.

    Args:
      query_BLHK: queries, in the compute dtype.
      key_BMGK: keys, same dtype; G heads, which divide H.
      value_BMGK: values, likewise.
      mask: who may see whom.
      implementation: one of `NAMES`.
      is_query_layer: distinguishes the query layer's call from the one in the loop over the other layers.

    Returns:
      [B, L, H, K] in the dtype of the values; scores and softmax are float32 inside. `attended_saveable` keeps the
      values that a backward pass needs.

    Raises:
      ValueError: if the implementation is unknown.
    """
    check_name("attention implementation", implementation, NAMES)
    if implementation == "auto":
        implementation = BY_PLATFORM.get(platform(), "blocked")
    attend = IMPLEMENTATIONS[implementation]
    if implementation == "fused":
        attend = functools.partial(attend, prescaled=is_query_layer)
    return attend(query_BLHK, key_BMGK, value_BMGK, mask)
