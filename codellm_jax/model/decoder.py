"""The decoder: PanGu-alpha with its query layer, or the same GPT without it.

Legend of the shape suffixes, here and in the rest of `model/`:

  B  batch, rows                          D  hidden size (width of the model)
  L  length, tokens in a row              F  feed-forward size
  M  keys: L, or the slots of a cache     H  attention heads
  C  positions in a chunk of the loss     K  size of a head, D / H
  N  tokens of B x L or B x C, flattened  V  vocabulary, rows of the token embedding
  P  positions known, `config.length`       I, O  inputs and outputs of a linear layer

The network is the one described in arXiv:2104.12369 (PanGu-alpha) and trained in arXiv:2309.16298. Pre-LayerNorm
blocks with biases everywhere; the last block, the query layer, asks with an embedding of the position instead of the
hidden state. Parameters are float32; `DecoderConfig.dtype` is what is computed in; LayerNorm and softmax are float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from codellm_jax.model.attention import (
    NAMES,
    AttentionMask,
    attended_saveable,
    check_name,
    dot_product_attention,
)
from codellm_jax.model.lookup import look_up_few, look_up_many

LAYER_NORM_EPSILON = 1e-5

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # the tanh form, as in GPT-2
    "fast_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

# What the backward pass may keep of a block's forward pass on the device, each less than the one before; None keeps
# all it wants.
REMAT_POLICIES = {
    "none": None,
    # Kept: what matmuls and attention return. Computed again: attention scores and all that is elementwise. The fastest
    # on CPU too: 0.40 s a step where keeping all takes 0.49, for a scan stacks what it keeps.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("projected", "mixed", "expanded"), attended_saveable),
    # Kept: what attention takes and returns. Computed again: its output projection and the MLP's first matmul, whose
    # output is as large as all that is kept here.
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("projected"), attended_saveable),
    # Kept: a block's input.
    "full": jax.checkpoint_policies.nothing_saveable,
    # The same, in the host's memory: what is sent there and back, a device keeps no longer.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["input"],
        offload_src="device", offload_dst="pinned_host"),
}

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a decoder; checked when made.

    Raises:
      ValueError: in one line, if a size is not positive, the heads do not divide the hidden size, a name is unknown,
        or the dropout rate is outside [0, 1).
    """

    layers: int  # blocks, the query layer counted in
    hidden: int
    heads: int
    feedforward: int
    vocabulary_size: int  # rows of the token embedding, padding rows counted in
    length: int  # learned positions, so the longest document
    query_layer: bool = True  # False: a plain GPT, with a final LayerNorm in its place
    activation: str = "gelu"
    dropout_rate: float = 0.0  # after the embedding, after attention and after the MLP
    dtype: str = "float32"  # of the computation; parameters are always float32
    remat: str = "dots"  # what the backward pass keeps of a block, a key of REMAT_POLICIES
    scan_unroll: int = 1  # blocks compiled out in a row; parameters look the same whatever it is
    attention: str = "auto"  # one of attention.NAMES
    initializer_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "feedforward", "vocabulary_size", "length", "scan_unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.hidden % self.heads:
            raise ValueError(
                f"heads must divide hidden, found {self.heads} heads and hidden {self.hidden}: change either one."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), found {self.dropout_rate}.")
        check_name("activation", self.activation, ACTIVATIONS)
        check_name("remat policy", self.remat, REMAT_POLICIES)
        check_name("dtype", self.dtype, DTYPES)
        check_name("attention implementation", self.attention, NAMES)

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def scanned_layers(self) -> int:
        """Blocks in the scan: all but the query layer."""
        return self.layers - self.query_layer


def _parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """A float32 parameter with logical axes: biases start at zero, all else at normal(0, initializer_std)."""
    is_bias = name.endswith("bias")
    initializer = nn.initializers.zeros if is_bias else nn.initializers.normal(module.config.initializer_std)
    boxed: Any = nn.with_logical_partitioning(initializer, axes)  # unboxed again by `param`
    return module.param(name, boxed, shape, jnp.float32)


def _layer_norm(name: str | None, dtype: str) -> nn.LayerNorm:
    """LayerNorm over D; statistics and scaling in float32, the result in the compute dtype."""
    return nn.LayerNorm(
        epsilon=LAYER_NORM_EPSILON,
        dtype=dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels in float32 when the mean is large
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )


def _constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Names the axes of an activation for the partitioner; does nothing outside a mesh."""
    return nn.with_logical_constraint(array, axes)


def _look_up(table: jax.Array, ids_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table of positions [P, D], float32 [B, L, D]; `dtype` is what they are rounded to later.

    Sharded over its width, the table is gathered first: it is small, and what is looked up is sharded over the batch.
    """
    x_BLD = look_up_few(_constrain(table, "position", "activation_embed"), ids_BL, dtype)
    return _constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")


def _look_up_tokens(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of the token embedding, float32 [B, L, D].

    Sharded over its width, each device looks up its columns for all rows of the batch, and then hands on what others'
    rows need: activations cross the network instead of the table, whose gradient is summed where it lies.
    """
    x_BLD = look_up_many(jnp.asarray(table_VD), _constrain(tokens_BL, "lookup_batch", "activation_length"))
    x_BLD = _constrain(x_BLD, "lookup_batch", "activation_length", "embed")
    return _constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")


def _linear(x_BLI: jax.Array, kernel_IO: jax.Array, bias_O: jax.Array, name: str) -> jax.Array:
    """The product [B, L, O] with a kernel, and its bias; named `name` for `jax.checkpoint`.

    Tokens are flattened to one axis for the product: its gradient would else contract two axes, for which XLA on CPU
    transposes both operands by a copy (33 ms against 40 for an MLP). The batch axis may be sharded; under a sharded
    length the flattening would gather. The bias is added before anything else is done, as XLA on GPU then has the
    matmul add it.
    """
    dtype = x_BLI.dtype
    y_NO = x_BLI.reshape(-1, x_BLI.shape[-1]) @ kernel_IO.astype(dtype)
    y_NO = checkpoint_name(y_NO + bias_O.astype(dtype), name)
    return y_NO.reshape(*x_BLI.shape[:-1], -1)


class Attention(nn.Module):
    """Multi-head attention with biases on all four projections, and a cache of keys and values for decoding."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, query_BLD: jax.Array, source_BLD: jax.Array, mask: AttentionMask) -> jax.Array:
        """Attends from projections of `query_BLD` to keys and values of `source_BLD`; returns [B, L, D]."""
        config = self.config
        heads, head_size = config.heads, config.head_size

        def project(name: str, x_BLD: jax.Array) -> jax.Array:
            # All heads in one axis of the kernel: TPUs would pad heads of 80 to 128 each.
            kernel_DD = _parameter(self, f"{name}_kernel", (config.hidden, config.hidden), ("embed", "heads"))
            bias_HK = _parameter(self, f"{name}_bias", (heads, head_size), ("heads", "kv"))
            projected_BLD = _linear(x_BLD, kernel_DD, bias_HK.reshape(-1), "projected")
            projected_BLHK = projected_BLD.reshape(*x_BLD.shape[:2], heads, head_size)
            return _constrain(
                projected_BLHK, "activation_batch", "activation_length", "activation_heads", "activation_kv")

        query_BLHK = project("query", query_BLD)
        key_BMHK = project("key", source_BLD)
        value_BMHK = project("value", source_BLD)
        if mask.query_offset is not None:
            key_BMHK = self._cached("cached_key", key_BMHK, mask)
            value_BMHK = self._cached("cached_value", value_BMHK, mask)
        attended_BLHK = dot_product_attention(
            query_BLHK, key_BMHK, value_BMHK, mask, implementation=config.attention,
            is_query_layer=query_BLD is not source_BLD)
        kernel_DD = _parameter(self, "output_kernel", (config.hidden, config.hidden), ("heads", "embed"))
        bias_D = _parameter(self, "output_bias", (config.hidden,), ("embed",))
        attended_BLD = attended_BLHK.reshape(query_BLD.shape)
        return _linear(attended_BLD, kernel_DD, bias_D, "mixed")

    def _cached(self, name: str, new_BLHK: jax.Array, mask: AttentionMask) -> jax.Array:
        """Writes the new tokens into the cache at the mask's offset and returns the whole cache, [B, M, H, K].

        It is kept as [B, H, M, K], which attention computes with: kept otherwise, it would be copied at each step.
        """
        slots = mask.key_segments_BM.shape[1]
        batch, _, heads, head_size = new_BLHK.shape
        cache = self.variable("cache", name, jnp.zeros, (batch, heads, slots, head_size), new_BLHK.dtype)
        assert mask.query_offset is not None
        new_BHLK = new_BLHK.swapaxes(1, 2)
        cache_BHMK = jax.lax.dynamic_update_slice_in_dim(cache.value, new_BHLK, mask.query_offset, axis=2)
        cache.value = _constrain(
            cache_BHMK, "activation_batch", "activation_heads", "activation_length", "activation_kv"
        )
        return cache.value.swapaxes(1, 2)


class FeedForward(nn.Module):
    """Two projections with biases and an activation between them."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        config = self.config
        up_kernel_DF = _parameter(self, "up_kernel", (config.hidden, config.feedforward), ("embed", "mlp"))
        up_bias_F = _parameter(self, "up_bias", (config.feedforward,), ("mlp",))
        x_BLF = _linear(x_BLD, up_kernel_DF, up_bias_F, "expanded")
        x_BLF = _constrain(x_BLF, "activation_batch", "activation_length", "activation_mlp")
        x_BLF = ACTIVATIONS[config.activation](x_BLF)
        down_kernel_FD = _parameter(self, "down_kernel", (config.feedforward, config.hidden), ("mlp", "embed"))
        down_bias_D = _parameter(self, "down_bias", (config.hidden,), ("embed",))
        return _linear(x_BLF, down_kernel_FD, down_bias_D, "contracted")


class Block(nn.Module):
    """One pre-LayerNorm block; with `query_BLD` given it is the query layer."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, query_BLD: jax.Array | None, mask: AttentionMask, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Returns the new hidden states and None, the shape of answer that a scan wants."""
        config = self.config
        dropout = nn.Dropout(config.dropout_rate, deterministic=deterministic)
        x_BLD = _constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")
        x_BLD = checkpoint_name(x_BLD, "input")
        normed_BLD = _layer_norm("attention_norm", config.dtype)(x_BLD)
        asked_BLD = normed_BLD if query_BLD is None else query_BLD
        x_BLD = x_BLD + dropout(Attention(config, name="attention")(asked_BLD, normed_BLD, mask))
        normed_BLD = _layer_norm("feedforward_norm", config.dtype)(x_BLD)
        x_BLD = x_BLD + dropout(FeedForward(config, name="feedforward")(normed_BLD))
        return _constrain(x_BLD, "activation_batch", "activation_length", "activation_embed"), None


def _rematerialized(config: DecoderConfig, prevent_cse: bool) -> type[nn.Module]:
    """Returns `Block`, wrapped so that its backward pass keeps only what the config's policy says."""
    if config.remat == "none":
        return Block
    return nn.remat(
        Block,
        policy=REMAT_POLICIES[config.remat],
        prevent_cse=prevent_cse,
        static_argnums=(4,),  # deterministic; self is argument 0
    )


class CachedMask(nn.Module):
    """What all layers' caches share: the segment ids of the tokens held, and how many they are."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, segment_ids_BL: jax.Array) -> AttentionMask:
        """Appends the segment ids, advances the index, and returns the mask of the new tokens."""
        batch, length = segment_ids_BL.shape
        segment_ids = self.variable("cache", "segment_ids", jnp.zeros, (batch, self.config.length), jnp.int32)
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        slots = segment_ids.value.shape[1]
        if length > slots:
            raise ValueError(f"the cache has {slots} slots, found {length} tokens: make a longer one.")
        offset = index.value
        segment_ids.value = jax.lax.dynamic_update_slice_in_dim(segment_ids.value, segment_ids_BL, offset, axis=1)
        index.value = offset + length
        return AttentionMask(segment_ids_BL, segment_ids.value, offset)


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits; see the top of the file for the network."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.token_embedding = _parameter(
            self, "token_embedding", (config.vocabulary_size, config.hidden), ("vocab", "embed")
        )
        self.position_embedding = _parameter(
            self, "position_embedding", (config.length, config.hidden), ("position", "embed")
        )
        self.dropout = nn.Dropout(config.dropout_rate)
        self.cached_mask = CachedMask(config)
        if config.scanned_layers:
            # A loop keeps XLA from merging the second computation with the first; compiled out whole, it is no loop.
            block = _rematerialized(config, prevent_cse=config.scan_unroll >= config.scanned_layers)
            self.blocks = nn.scan(
                block,
                variable_axes={"params": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.scanned_layers,
                unroll=config.scan_unroll,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config)
        self.final_norm = _layer_norm(None, config.dtype)
        if config.query_layer:
            self.query_embedding = _parameter(
                self, "query_embedding", (config.length, config.hidden), ("position", "embed")
            )
            self.query_block = _rematerialized(config, prevent_cse=True)(config)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        *,
        deterministic: bool = True,
        decode: bool = False,
        shared_segment: int | None = None,
    ) -> jax.Array:
        """Computes the final hidden states, the ones that `logits` or the loss takes.

        Args:
          tokens_BL: int32 in [0, vocabulary_size).
          positions_BL: int32 in [0, length), restarting at each document. A position beyond that is the caller's
            bug: it cannot be seen here, where positions are traced.
          segment_ids_BL: int32, equal within a document and different between neighbours; any values.
          deterministic: False draws dropout from the rng named "dropout".
          decode: True appends the tokens to the mutable collection "cache" and attends to all that it holds. The
            first call may bring a prompt of any length, later ones one token or several; the caller must not bring
            more tokens in all than the cache has slots (`init_cache`).
          shared_segment: a segment that every later token of its row sees too: the stem of several continuations,
            each a segment of its own with positions that go on from the stem's.

        Returns:
          hidden_BLD in the compute dtype.

        Raises:
          ValueError: if a row is longer than the positions, or than the cache.
        """
        config = self.config
        length = tokens_BL.shape[1]
        if length > config.length:
            raise ValueError(
                f"rows must be at most {config.length} tokens, found {length}: shorten them or raise `length`."
            )
        dtype = jnp.dtype(config.dtype)
        mask = AttentionMask(segment_ids_BL, segment_ids_BL)
        if decode:
            mask = self.cached_mask(segment_ids_BL)
        mask = mask._replace(shared_segment=shared_segment)
        x_BLD = _look_up_tokens(self.token_embedding, tokens_BL)
        x_BLD = (x_BLD + _look_up(self.position_embedding, positions_BL, dtype)).astype(dtype)
        x_BLD = self.dropout(x_BLD, deterministic=deterministic)
        if config.scanned_layers:
            x_BLD, _ = self.blocks(x_BLD, None, mask, deterministic)
        x_BLD = self.final_norm(x_BLD)
        if config.query_layer:
            query_BLD = _look_up(self.query_embedding, positions_BL, dtype).astype(dtype)
            x_BLD, _ = self.query_block(x_BLD, query_BLD, mask, deterministic)
        return x_BLD

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Returns logits_BLV, float32: the hidden states times the transposed token embedding."""
        logits_BLV = jnp.einsum(
            "BLD,VD->BLV", hidden_BLD, self.token_embedding.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32
        )
        return _constrain(logits_BLV, "activation_batch", "activation_length", "activation_vocab")


def token_embedding(params: Any) -> jax.Array:
    """Returns the token embedding, float32 [V, D], of a decoder's parameters (boxed or not), for the loss."""
    return nn.unbox(params["token_embedding"])


def init_cache(config: DecoderConfig, batch: int, length: int | None = None) -> Any:
    """Makes the empty "cache" collection for `batch` rows of up to `length` tokens (default: all positions)."""
    config = dataclasses.replace(config, length=length or config.length)
    tokens_BL = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    variables = jax.eval_shape(
        lambda *inputs: Decoder(config).init(jax.random.key(0), *inputs, decode=True), *[tokens_BL] * 3
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["cache"])


def parameter_count(config: DecoderConfig) -> int:
    """Counts the parameters by arithmetic.

    V D + P D                 token and position embeddings
    4 (D^2 + D)               a block's query, key, value and output projections
    2 D F + F + D             a block's MLP
    4 D                       a block's two LayerNorms
    2 D                       the LayerNorm on the stack's output
    P D                       the query layer's embedding, if there is one

    With F = 4 D a block has 12 D^2 + 13 D.
    """
    hidden, feedforward = config.hidden, config.feedforward
    block = 4 * (hidden**2 + hidden) + 2 * hidden * feedforward + feedforward + hidden + 4 * hidden
    tables = config.vocabulary_size + config.length * (2 if config.query_layer else 1)
    return tables * hidden + config.layers * block + 2 * hidden


def flops_per_token(config: DecoderConfig, causal: bool) -> float:
    """Counts the model FLOPs of a forward and a backward pass, per token of a full row.

    6 (layers (4 D^2 + 2 D F) + V D)  +  12 layers L D,    the last term halved if causal

    Two FLOPs a multiply-add, three products a matmul (one forward, two backward); the logits are a matmul, looking
    up an embedding is not. Attention's two products, Q K^T and weights V, take 2 L D multiply-adds a token and layer
    if the whole square is counted and half of that if only what causality allows (arXiv:2204.02311, appendix B, counts
    the square). Report both. Recomputed FLOPs (remat) are not model FLOPs.
    """
    hidden = config.hidden
    matmul = config.layers * (4 * hidden**2 + 2 * hidden * config.feedforward) + config.vocabulary_size * hidden
    attention = 12 * config.layers * config.length * hidden
    return 6.0 * matmul + attention * (0.5 if causal else 1.0)
