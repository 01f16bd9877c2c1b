"""Dot-product attention: one function, several implementations chosen by name.

All implementations compute the same thing, softmax(Q K^T / sqrt(K)) V under one mask, and are tested against
"reference" in values and gradients. "auto" takes the one of the devices that a program is compiled for: "splash" on
TPU, "fused" on GPU, "blocked" elsewhere. Shape suffixes are explained at the top of `decoder.py`.
"""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# "blocked" cuts the queries into at most so many blocks, none smaller than so many queries. Measured on 2 CPU cores,
# both passes, before the backward one was its own: 256 tokens 11 ms against 22 unblocked, 1,024 tokens 240 against 382.
MOST_BLOCKS = 8
SMALLEST_BLOCK = 64

ATTENDED = jax.checkpoint_policies.save_only_these_names("attended")
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"

# A token always sees itself: no row is masked whole, and the lowest finite number is as good as -inf.
LOWEST = float(jnp.finfo(jnp.float32).min)


class AttentionMask(NamedTuple):
    """Who may attend to whom, as a rule rather than an array, so that blockwise kernels can skip what is masked.

    The query at index i of the row sees the key at index j where j <= i and both belong to the same segment
    (document), or j belongs to the shared segment. Indices count along the row; they are not the position ids, which
    restart at each document.

    Attributes:
      query_segments_BL: int32, the document each query belongs to.
      key_segments_BM: int32, the document each key belongs to.
      query_offset: None if queries and keys are the same tokens; else an int32 scalar, the row index of the first
        query (queries are then the newest tokens of a cache of M slots; slots not yet written lie in the future).
      shared_segment: None, or the id of a segment that all later tokens of the row see, as the branches of a tree
        see its stem.
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
    query_BLHK: jax.Array, key_BMHK: jax.Array, value_BMHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales the queries and swaps tokens with heads.

    The einsums could read the arrays as they come, but XLA on CPU then takes 1.2 times as long. Scaling the queries
    touches L x K numbers, scaling the scores would touch L x M.
    """
    query_BLHK = query_BLHK * (query_BLHK.shape[-1] ** -0.5)
    return query_BLHK.swapaxes(1, 2), key_BMHK.swapaxes(1, 2), value_BMHK.swapaxes(1, 2)


def _attend(query_BHLK: jax.Array, key_BHMK: jax.Array, value_BHMK: jax.Array, mask_B1LM: jax.Array) -> jax.Array:
    """softmax(Q K^T) V of scaled queries under a dense mask, all scores held and in float32."""
    scores_BHLM = jnp.einsum("BHLK,BHMK->BHLM", query_BHLK, key_BHMK, preferred_element_type=jnp.float32)
    scores_BHLM = jnp.where(mask_B1LM, scores_BHLM, LOWEST)
    weights_BHLM = jax.nn.softmax(scores_BHLM, axis=-1).astype(value_BHMK.dtype)
    return jnp.einsum("BHLM,BHMK->BHLK", weights_BHLM, value_BHMK)


def reference_attention(
    query_BLHK: jax.Array, key_BMHK: jax.Array, value_BMHK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """Attention with the whole square of scores, [B, H, L, M]; the definition the others are tested against."""
    query_BHLK, key_BHMK, value_BHMK = _heads_first(query_BLHK, key_BMHK, value_BMHK)
    return _attend(query_BHLK, key_BHMK, value_BHMK, mask.dense()).swapaxes(1, 2)


def blocked_attention(
    query_BLHK: jax.Array, key_BMHK: jax.Array, value_BMHK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """Blocks of queries, each against the keys up to its own end only: nearly half of the square is never computed.

    The backward pass keeps what attention returned and the logarithm of each row's sum of exponentials, both named
    "attended", and makes the weights again from them (arXiv:2205.14135, section 3.1).

    With a cache, where the queries' place in the row is known only at run time, it is the reference; but queries as
    many as the cache has slots can only be the whole row.
    """
    if mask.query_offset is not None and query_BLHK.shape[1] != key_BMHK.shape[1]:
        return reference_attention(query_BLHK, key_BMHK, value_BMHK, mask)
    return _blocked(query_BLHK, key_BMHK, value_BMHK, mask.dense().swapaxes(2, 3))


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first query of each block, and the one behind its last."""
    size = max(SMALLEST_BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(query_BHLK: jax.Array, key_BHMK: jax.Array, mask_B1ML: jax.Array) -> jax.Array:
    """Masked scores, float32 [B, H, M, L]: of the two orders the one whose sums over the keys XLA on CPU vectorizes."""
    scores_BHML = jnp.einsum("BHMK,BHLK->BHML", key_BHMK, query_BHLK, preferred_element_type=jnp.float32)
    return jnp.where(mask_B1ML, scores_BHML, LOWEST)


@jax.custom_vjp
def _blocked(query_BLHK: jax.Array, key_BLHK: jax.Array, value_BLHK: jax.Array, mask_B1ML: jax.Array) -> jax.Array:
    return _blocked_forward(query_BLHK, key_BLHK, value_BLHK, mask_B1ML)[0]


def _blocked_forward(
    query_BLHK: jax.Array, key_BLHK: jax.Array, value_BLHK: jax.Array, mask_B1ML: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Attends block by block; returns [B, L, H, K], and what the backward pass takes."""
    query_BHLK, key_BHLK, value_BHLK = _heads_first(query_BLHK, key_BLHK, value_BLHK)
    attended, logarithms = [], []
    for start, stop in _blocks(query_BHLK.shape[2]):
        key_BHMK, value_BHMK = key_BHLK[:, :, :stop], value_BHLK[:, :, :stop]
        scores_BHML = _scores(query_BHLK[:, :, start:stop], key_BHMK, mask_B1ML[:, :, :stop, start:stop])
        highest_BHL = jnp.max(scores_BHML, axis=2)
        exponential_BHML = jnp.exp(scores_BHML - highest_BHL[:, :, None])
        total_BHL = jnp.sum(exponential_BHML, axis=2)
        sum_BHLK = jnp.einsum("BHML,BHMK->BHLK", exponential_BHML.astype(value_BHMK.dtype), value_BHMK,
                              preferred_element_type=jnp.float32)
        attended.append((sum_BHLK / total_BHL[..., None]).astype(value_BHMK.dtype))
        logarithms.append(highest_BHL + jnp.log(total_BHL))
    attended_BLHK = checkpoint_name(jnp.concatenate(attended, axis=2).swapaxes(1, 2), "attended")
    logarithm_BHL = checkpoint_name(jnp.concatenate(logarithms, axis=2), "attended")
    return attended_BLHK, (query_BLHK, key_BLHK, value_BLHK, mask_B1ML, attended_BLHK, logarithm_BHL)


def _blocked_backward(
    kept: tuple[jax.Array, ...], gradient_BLHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of queries, keys and values; d loss / d score = weight (d loss / d weight - sum over the keys of
    weight x that), and the sum is the product of what attention returned with its gradient."""
    query_BLHK, key_BLHK, value_BLHK, mask_B1ML, attended_BLHK, logarithm_BHL = kept
    dtype, length = query_BLHK.dtype, query_BLHK.shape[1]
    query_BHLK, key_BHLK, value_BHLK = _heads_first(query_BLHK, key_BLHK, value_BLHK)
    gradient_BHLK = gradient_BLHK.swapaxes(1, 2)
    shared_BHL = jnp.einsum("BLHK,BLHK->BHL", gradient_BLHK, attended_BLHK, preferred_element_type=jnp.float32)
    query_gradients: list[jax.Array] = []
    key_gradient_BHLK = value_gradient_BHLK = jnp.zeros(key_BHLK.shape, jnp.float32)
    for start, stop in _blocks(length):
        block = slice(start, stop)
        key_BHMK = key_BHLK[:, :, :stop]
        scores_BHML = _scores(query_BHLK[:, :, block], key_BHMK, mask_B1ML[:, :, :stop, block])
        weights_BHML = jnp.exp(scores_BHML - logarithm_BHL[:, :, None, block])
        weights_gradient_BHML = jnp.einsum("BHMK,BHLK->BHML", value_BHLK[:, :, :stop], gradient_BHLK[:, :, block],
                                           preferred_element_type=jnp.float32)
        scores_gradient_BHML = (weights_BHML * (weights_gradient_BHML - shared_BHL[:, :, None, block])).astype(dtype)
        query_gradients.append(jnp.einsum("BHML,BHMK->BHLK", scores_gradient_BHML, key_BHMK))
        behind = ((0, 0), (0, 0), (0, length - stop), (0, 0))
        key_gradient_BHLK += jnp.pad(jnp.einsum(
            "BHML,BHLK->BHMK", scores_gradient_BHML, query_BHLK[:, :, block],
            preferred_element_type=jnp.float32), behind)
        value_gradient_BHLK += jnp.pad(jnp.einsum(
            "BHML,BHLK->BHMK", weights_BHML.astype(dtype), gradient_BHLK[:, :, block],
            preferred_element_type=jnp.float32), behind)
    query_gradient_BHLK = jnp.concatenate(query_gradients, axis=2) * query_BHLK.shape[-1] ** -0.5
    query_gradient_BLHK, key_gradient_BLHK, value_gradient_BLHK = (
        gradient.astype(dtype).swapaxes(1, 2)
        for gradient in (query_gradient_BHLK, key_gradient_BHLK, value_gradient_BHLK))
    return query_gradient_BLHK, key_gradient_BLHK, value_gradient_BLHK, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def fused_attention(
    query_BLHK: jax.Array, key_BMHK: jax.Array, value_BMHK: jax.Array, mask: AttentionMask, prescaled: bool = False
) -> jax.Array:
    """`jax.nn.dot_product_attention`: cuDNN's flash attention on a GPU where it can, else XLA's operations.

    cuDNN takes float16 and bfloat16, sizes of a head that 8 divides up to 128, and even lengths. Segments, stems and
    caches go to it as a dense mask, [B, 1, L, M] in the compute dtype, beside which it skips what causality masks.

    `prescaled` has the queries scaled before, to the same effect. XLA mixes up the equal ones among its calls of
    cuDNN's deterministic backward pass (openxla/xla#46500), so those of a program have to differ.
    """
    can = query_BLHK.dtype in (jnp.float16, jnp.bfloat16) and query_BLHK.shape[-1] % 8 == 0 \
        and query_BLHK.shape[-1] <= 128 and query_BLHK.shape[1] % 2 == key_BMHK.shape[1] % 2 == 0
    scale = query_BLHK.shape[-1] ** -0.5
    if prescaled:
        query_BLHK, scale = query_BLHK * scale, 1.0
    attend = functools.partial(
        jax.nn.dot_product_attention, mask=mask.dense(), is_causal=mask.query_offset is None, scale=scale)
    if can and platform() == "gpu":
        return attend(query_BLHK, key_BMHK, value_BMHK, implementation="cudnn")
    return checkpoint_name(attend(query_BLHK, key_BMHK, value_BMHK, implementation="xla"), "attended")


def attended_saveable(primitive: Any, *inputs: Any, **parameters: Any) -> Any:
    """A policy for `jax.checkpoint` that keeps what attention returns, and the sums that its backward pass takes.

    Implementations name both "attended", but for JAX's cuDNN kernel, which names nothing and is known by its primitive.
    """
    return primitive.name == CUDNN_FORWARD or ATTENDED(primitive, *inputs, **parameters)


def splash_attention(
    query_BLHK: jax.Array, key_BMHK: jax.Array, value_BMHK: jax.Array, mask: AttentionMask
) -> jax.Array:
    """The Pallas kernel of `splash.py`; of what it cannot do the rest falls to "blocked".

    That is a shared segment (scoring's stems), queries that are the newest tokens of a cache, and rows or heads that
    the mesh does not divide or that are sharded along the length.
    """
    from codellm_jax.model import splash  # Pallas is imported by those who use it

    spec = splash.layout(query_BLHK.shape[0], query_BLHK.shape[2])
    whole_rows = mask.query_offset is None or query_BLHK.shape[1] == key_BMHK.shape[1]
    if spec is None or not whole_rows or mask.shared_segment is not None:
        return blocked_attention(query_BLHK, key_BMHK, value_BMHK, mask)
    return splash.attend(query_BLHK * (query_BLHK.shape[-1] ** -0.5), key_BMHK, value_BMHK, mask.query_segments_BL,
                         spec, interpret=platform() != "tpu")


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference_attention, "blocked": blocked_attention, "fused": fused_attention,
    "splash": splash_attention}
BY_PLATFORM = {"tpu": "splash", "gpu": "fused", "cpu": "blocked"}
NAMES = ("auto", *IMPLEMENTATIONS)


def platform() -> str:
    """Where the program under way will run: the mesh's devices tell, which may be none of this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_name(what: str, found: str, known: Iterable[str]) -> None:
    """Raises a one-line ValueError that gives the nearest known name if `found` is not among `known`."""
    known = list(known)
    if found not in known:
        nearest = difflib.get_close_matches(str(found), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{what} {found!r} is unknown: did you mean {nearest!r}? Known: {', '.join(known)}.")


def dot_product_attention(
    query_BLHK: jax.Array,
    key_BMHK: jax.Array,
    value_BMHK: jax.Array,
    mask: AttentionMask,
    *,
    implementation: str = "auto",
    is_query_layer: bool = False,
) -> jax.Array:
    """Attends causally within each segment.

    Args:
      query_BLHK: queries, in the compute dtype.
      key_BMHK: keys, same dtype.
      value_BMHK: values, same dtype.
      mask: who may see whom.
      implementation: one of `NAMES`.
      is_query_layer: tells the call of the query layer from that in the loop over the other layers.

    Returns:
      [B, L, H, K] in the dtype of the values; scores and softmax are float32 inside. What a backward pass needs of it
      is kept under `attended_saveable`.

    Raises:
      ValueError: if the implementation is unknown.
    """
    check_name("attention implementation", implementation, NAMES)
    if implementation == "auto":
        implementation = BY_PLATFORM.get(platform(), "blocked")
    attend = IMPLEMENTATIONS[implementation]
    if implementation == "fused":
        attend = functools.partial(attend, prescaled=is_query_layer)
    return attend(query_BLHK, key_BMHK, value_BMHK, mask)
