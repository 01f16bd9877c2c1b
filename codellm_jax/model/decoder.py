"""The decoder: PanGu-alpha with its query layer, the same GPT without it, or another family's parts in their place.

Legend of the shape suffixes, here and in the rest of `model/`:

  B  batch, rows                          D  hidden size (width of the model)
  L  length, tokens in a row              F  feed-forward size
  M  keys: L, or the slots of a cache     H  attention heads
  C  positions in a chunk of the loss     G  heads of keys and values: H, or fewer that divide it
  N  tokens of B x L or B x C, flattened  K  size of a head, D / H by default
  P  positions known, `config.length`     Q  width of several heads, H K or G K
  V  vocabulary, rows of the embedding    I, O  inputs and outputs of a linear layer

The default network is the one described in arXiv:2104.12369 (PanGu-alpha) and trained in arXiv:2309.16298:
pre-LayerNorm blocks with biases everywhere; the last block, the query layer, uses an embedding of the position as its
query instead of the hidden state. `config.py` names the other parts. Parameters are float32; `DecoderConfig.dtype` is
the compute dtype; norms, rotation and softmax are float32.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from codellm_jax.model.attention import AttentionMask
from codellm_jax.model.config import BIASES, REMAT_POLICIES, DecoderConfig
from codellm_jax.model.lookup import look_up_few, look_up_many
from codellm_jax.model.parts import Block, constrain, make_norm, parameter
from codellm_jax.model.rotary import Rotation, rotation


def _look_up(table: jax.Array, ids_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table of positions [P, D], float32 [B, L, D]; `dtype` is the dtype to which they are rounded later.

    A table sharded over its width is gathered first: it is small, and the result is sharded over the batch.
    """
    x_BLD = look_up_few(constrain(table, "position", "activation_embed"), ids_BL, dtype)
    return constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")


def _look_up_tokens(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of the token embedding, float32 [B, L, D].

    With a table sharded over its width, each device looks up its columns for all rows of the batch and then exchanges
    them: activations cross the network instead of the table, whose gradient is summed in place.
    """
    x_BLD = look_up_many(jnp.asarray(table_VD), constrain(tokens_BL, "lookup_batch", "activation_length"))
    x_BLD = constrain(x_BLD, "lookup_batch", "activation_length", "embed")
    return constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")


def _rematerialized(config: DecoderConfig, prevent_cse: bool) -> type[nn.Module]:
    """Returns `Block`, wrapped so that its backward pass keeps only what the config's policy allows."""
    if config.remat == "none":
        return Block
    return nn.remat(
        Block,
        policy=REMAT_POLICIES[config.remat],
        prevent_cse=prevent_cse,
        static_argnums=(4,),  # deterministic; self is argument 0
    )


class CachedMask(nn.Module):
    """The state shared by the caches of all layers: the segment ids of the tokens held, and their number."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, segment_ids_BL: jax.Array) -> AttentionMask:
        """Appends the segment ids, advances the index, and returns the mask of the new tokens."""
        batch, length = segment_ids_BL.shape
        segment_ids = self.variable("cache", "segment_ids", jnp.zeros, (batch, self.config.length), jnp.int32)
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        slots = segment_ids.value.shape[1]
        if length > slots:
            raise ValueError(f"the cache has {slots} slots, found {length} tokens: make it longer.")
        offset = index.value
        segment_ids.value = jax.lax.dynamic_update_slice_in_dim(segment_ids.value, segment_ids_BL, offset, axis=1)
        index.value = offset + length
        return AttentionMask(segment_ids_BL, segment_ids.value, offset)


class Decoder(nn.Module):
    """Tokens to hidden states, and hidden states to logits; see the top of the file for the network.

    Attributes:
      config: the sizes and the parts.
      apart: blocks are separate modules, `blocks_0`, `blocks_1`, ..., with the parameters from `blocks_apart`, instead
        of a scan over stacked parameters and caches. A step of decoding then copies neither.
    """

    config: DecoderConfig
    apart: bool = False

    def setup(self) -> None:
        config = self.config
        self.token_embedding = parameter(
            self, "token_embedding", (config.vocabulary_size, config.hidden), ("vocab", "embed")
        )
        if config.positions == "learned":
            self.position_embedding = parameter(
                self, "position_embedding", (config.length, config.hidden), ("position", "embed")
            )
        self.dropout = nn.Dropout(config.dropout_rate)
        self.cached_mask = CachedMask(config)
        self.blocks: Any  # modules, or a function over the stack of them
        if self.apart:
            self.blocks = [Block(config) for _ in range(config.scanned_layers)]
        elif config.scanned_layers:
            # A loop keeps XLA from merging the recomputation with the original; fully unrolled, there is no loop.
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
        self.final_norm = make_norm(config, None)
        if config.query_layer:
            self.query_embedding = parameter(
                self, "query_embedding", (config.length, config.hidden), ("position", "embed")
            )
            self.query_block = _rematerialized(config, prevent_cse=True)(config)
        if not config.tied_head:
            self.lm_head = parameter(self, "lm_head", (config.vocabulary_size, config.hidden), ("vocab", "embed"))

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
        """Computes the final hidden states, the input of `logits` and the loss.

        Args:
          tokens_BL: int32 in [0, vocabulary_size).
          positions_BL: int32 in [0, length), restarting at each document. A position beyond that is the caller's
            bug: it cannot be seen here, where positions are traced.
          segment_ids_BL: int32, equal within a document and different between neighbours; any values.
          deterministic: False draws dropout from the rng named "dropout".
          decode: True appends the tokens to the mutable collection "cache" and attends to all that it holds. The
            first call may bring a prompt of any length, later ones one token or several; the caller must not bring
            more tokens in all than the cache has slots (`init_cache`).
          shared_segment: a segment that every later token of its row also sees: the stem of several continuations, each
            a segment of its own with positions that continue the stem's.

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
        if config.positions == "learned":
            x_BLD = x_BLD + _look_up(self.position_embedding, positions_BL, dtype)
        x_BLD = x_BLD.astype(dtype)
        turns = self._rotation(positions_BL)
        x_BLD = self.dropout(x_BLD, deterministic=deterministic)
        if self.apart:
            for block in self.blocks:
                x_BLD, _ = block(x_BLD, None, mask, deterministic, turns)
        elif config.scanned_layers:
            x_BLD, _ = self.blocks(x_BLD, None, mask, deterministic, turns)
        x_BLD = self.final_norm(x_BLD)
        if config.query_layer:
            query_BLD = _look_up(self.query_embedding, positions_BL, dtype).astype(dtype)
            x_BLD, _ = self.query_block(x_BLD, query_BLD, mask, deterministic, turns)
        return x_BLD

    def _rotation(self, positions_BL: jax.Array) -> Rotation | None:
        """The rotation of queries and keys by rotary positions; None for learned positions."""
        config = self.config
        if config.positions == "learned":
            return None
        assert not isinstance(config.rotary_scaling, Mapping)  # the config has converted it
        return rotation(positions_BL, config.rotated_size, config.rotary_theta, config.rotary_scaling)

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Returns logits_BLV, float32: the hidden states times the transposed head."""
        head_VD = self.token_embedding if self.config.tied_head else self.lm_head
        logits_BLV = jnp.einsum(
            "BLD,VD->BLV", hidden_BLD, head_VD.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32
        )
        return constrain(logits_BLV, "activation_batch", "activation_length", "activation_vocab")


def output_head(params: Any) -> jax.Array:
    """Returns the output head for the loss, float32 [V, D], from a decoder's parameters (boxed or not): the token
    embedding, or `lm_head` if the head is not tied.
    """
    return nn.unbox(params["lm_head" if "lm_head" in params else "token_embedding"])


def rounded(params: Any, dtype: str) -> Any:
    """Parameters, not boxed, whose kernels and head are rounded to the compute dtype, as each computation would do.

    A tied head thereby becomes an `lm_head` of its own, because the token embedding is looked up in float32.
    """
    if dtype == "float32":
        return params
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path[-1].key.endswith("_kernel") else leaf, params)
    return kernels | {"lm_head": output_head(params).astype(dtype)}


def blocks_apart(collection: Any) -> Any:
    """The parameters or the cache of `Decoder(config, apart=True)`, from those of `Decoder(config)`: each block is cut
    from the stack. Parameters must not be boxed.
    """
    stacked = collection.get("blocks", {})
    layers = len(next(iter(jax.tree.leaves(stacked)), ()))
    others = {name: part for name, part in collection.items() if name != "blocks"}
    return others | {
        f"blocks_{layer}": jax.tree.map(operator.itemgetter(layer), stacked) for layer in range(layers)}


def init_cache(config: DecoderConfig, batch: int, length: int | None = None) -> Any:
    """Makes the empty "cache" collection for `batch` rows of up to `length` tokens (default: all positions)."""
    config = dataclasses.replace(config, length=length or config.length)
    tokens_BL = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    variables = jax.eval_shape(
        lambda *inputs: Decoder(config).init(jax.random.key(0), *inputs, decode=True), *[tokens_BL] * 3
    )
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables["cache"])


class BlockProducts(NamedTuple):
    """Multiply-adds of a block's matmuls per token, equal to the sizes of their kernels."""

    query: int  # D H K
    key_value: int  # 2 D G K
    output: int  # H K D
    expand: int  # D F, twice if gated
    contract: int  # F D


def products_of_block(config: DecoderConfig) -> BlockProducts:
    """The matmuls of a block, without attention's own two, which take L H K each."""
    hidden, mlp = config.hidden, config.hidden * config.feedforward
    query = hidden * config.query_width
    return BlockProducts(query, 2 * hidden * config.key_width, query, mlp * (2 if config.is_gated else 1), mlp)


def parameter_count(config: DecoderConfig) -> int:
    """Counts the parameters by arithmetic.

    V D, and P D if learned             token and position embeddings
    2 D H K + 2 D G K                   a block's query, output, key and value kernels
    2 D F, or 3 D F if gated            a block's MLP
    H K, 2 G K, D, F (2 F if gated), D  biases of query, of key and value, output, expanding and contracting ones
    4 D, or 2 D if RMS                  a block's two norms
    2 K, or H K + G K over the width    a block's norms of queries and keys, if there are any
    2 D, or D if RMS                    the norm on the stack's output
    P D                                 the query layer's embedding, if there is one
    V D                                 the head, if it is not tied

    With PanGu-alpha's parts and F = 4 D a block has 12 D^2 + 13 D.
    """
    hidden, feedforward = config.hidden, config.feedforward
    sizes = {"query": config.query_width, "key": config.key_width, "value": config.key_width, "output": hidden,
             "gate": feedforward * config.is_gated, "up": feedforward, "down": hidden}
    norm = hidden * (2 if config.norm == "layer" else 1)
    query_key_norm = {"none": 0, "head": 2 * config.size_of_head, "width": config.query_width + config.key_width}
    block = (sum(products_of_block(config)) + sum(sizes[name] for name in BIASES[config.biases]) + 2 * norm
             + query_key_norm[config.query_key_norm])
    tables = config.vocabulary_size * (1 if config.tied_head else 2)
    tables += config.length * ((config.positions == "learned") + config.query_layer)
    return tables * hidden + config.layers * block + norm


def flops_per_token(config: DecoderConfig, causal: bool) -> float:
    """Counts the model FLOPs of a forward and a backward pass, per token of a full row.

    6 (layers (2 D H K + 2 D G K + 2 D F) + V D)  +  12 layers L H K,    3 D F if gated, the last term halved if causal

    Two FLOPs per multiply-add, three products per matmul (one forward, two backward); the logits are a matmul, looking
    up an embedding is not. Attention's two products, Q K^T and weights V, take 2 L H K multiply-adds per token and
    layer if the full matrix counts, and half of that if only the causal part counts (arXiv:2204.02311, appendix B,
    counts the full matrix). Report both. Recomputed FLOPs (remat) are not model FLOPs; nor are elementwise operations
    such as norms and rotation.
    """
    matmul = config.layers * sum(products_of_block(config)) + config.vocabulary_size * config.hidden
    attention = 12 * config.layers * config.length * config.query_width
    return 6.0 * matmul + attention * (0.5 if causal else 1.0)
