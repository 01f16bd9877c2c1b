"""The parts of a block: norms, projections, attention with its cache, and the MLP, as selected by a `DecoderConfig`.

Shape suffixes are explained at the top of `decoder.py`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from codellm_jax.model.attention import AttentionMask, axes_that_split, dot_product_attention, platform
from codellm_jax.model.config import ACTIVATIONS, BIASES, DecoderConfig
from codellm_jax.model.rotary import Rotation, rotate


def parameter(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    """A float32 parameter with logical axes; biases start at zero, all others at normal(0, initializer_std)."""
    is_bias = name.endswith("bias")
    initializer = nn.initializers.zeros if is_bias else nn.initializers.normal(module.config.initializer_std)
    boxed: Any = nn.with_logical_partitioning(initializer, axes)  # unboxed again by `param`
    return module.param(name, boxed, shape, jnp.float32)


def _bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array | None:
    """The bias of a projection, if the config has one."""
    return parameter(module, f"{name}_bias", shape, axes) if name in BIASES[module.config.biases] else None


def make_norm(config: DecoderConfig, name: str | None) -> nn.LayerNorm | nn.RMSNorm:
    """The config's norm over D; statistics and scaling in float32, the result in the compute dtype."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=config.dtype, scale_init=scale_init, name=name)
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels in float32 when the mean is large
        scale_init=scale_init,
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Names the axes of an activation for the partitioner; has no effect without a mesh."""
    return nn.with_logical_constraint(array, axes)


class Projection(NamedTuple):
    """A kernel, float32 [I, O], and its bias if any, float32 [O] or split into heads."""

    kernel_IO: jax.Array
    bias_O: jax.Array | None


def _side_by_side(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(arrays, axis=1) if len(arrays) > 1 else arrays[0]


def _apart(array: jax.Array, like: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The inverse of `_side_by_side` for arrays as wide as `like`."""
    ends = list(itertools.accumulate(one.shape[1] for one in like))
    return tuple(jnp.split(array, ends[:-1], axis=1))


TILE_ROWS, TILE_COLUMNS = 8, 128  # of a TPU's tile of float32


def gathers_at_once(rows: int) -> bool:
    """Whether attention's kernels, [rows, ...] each, are gathered by one operation.

    This is the case on TPU if the mesh splits only their rows, into parts that are not whole tiles, such as 2,560 over
    256 devices. XLA gathers small parts of this kind by summing arrays of zeros, which sends twice as much. It gathers
    whole tiles, such as 2,560 over 64, directly.
    """
    axes, mesh = axes_that_split("embed"), jax.sharding.get_abstract_mesh()
    return _only_rows_are_split() and rows // math.prod(mesh.shape[axis] for axis in axes) % TILE_ROWS > 0


def _only_rows_are_split() -> bool:
    """Whether the mesh splits attention's kernels by rows alone, on TPU."""
    return platform() == "tpu" and bool(axes_that_split("embed")) and not axes_that_split("heads")


@jax.custom_vjp
def _whole(kernel_IO: jax.Array) -> jax.Array:
    """A kernel named whole, but not its gradient, which may then be reduced and scattered."""
    return constrain(kernel_IO, "activation_embed", None)


_whole.defvjp(lambda kernel_IO: (_whole(kernel_IO), None), lambda _, gradient_IO: (gradient_IO,))


def _gathered(projections: Sequence[Projection], dtype: jnp.dtype, in_heads: bool) -> Sequence[Projection]:
    """Projections with their kernels gathered, at once if that is faster and they have the same number of rows.

    Otherwise each is named whole here, so that both passes use one gather: for heads of whole lanes XLA would merge the
    split into heads with the product, differently in each pass, and gather some of the kernels twice.
    """
    kernels = [projection.kernel_IO for projection in projections]
    if len({len(kernel_IO) for kernel_IO in kernels}) == 1 and gathers_at_once(len(kernels[0])):
        together = _side_by_side([kernel_IO.astype(dtype) for kernel_IO in kernels])
        whole: Sequence[jax.Array] = _apart(constrain(together, "activation_embed", None), kernels)
    elif _only_rows_are_split() and not in_heads:
        whole = [_whole(kernel_IO.astype(dtype)) for kernel_IO in kernels]
    else:
        return projections
    return [Projection(kernel_IO, bias_O) for kernel_IO, (_, bias_O) in zip(whole, projections, strict=True)]


@jax.custom_vjp
def _products(x_NI: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Products with several kernels [I, O], for CPU; under differentiation they are one product with all of them.

    A kernel's gradient, x^T g, copies x^T: XLA on CPU uses both cores for a product of matrices in memory order, but
    hardly for one that transposes. For a kernel longer than wide it is computed as (g^T x)^T, because a longer left
    matrix takes 1.5 times as long. The barriers keep XLA from reverting this.
    """
    return tuple(x_NI @ kernel_IO for kernel_IO in kernels)


def _products_forward(x_NI: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    return _apart(x_NI @ _side_by_side(kernels), kernels), (x_NI, kernels)


def _products_backward(kept: Any, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x_NI, kernels = kept
    kernel_IO, gradient_NO, barrier = _side_by_side(kernels), _side_by_side(gradients), jax.lax.optimization_barrier
    if kernel_IO.shape[0] > kernel_IO.shape[1]:
        kernel_gradient_IO = barrier(barrier(gradient_NO.T) @ x_NI).T
    else:
        kernel_gradient_IO = barrier(x_NI.T) @ gradient_NO
    return gradient_NO @ kernel_IO.T, _apart(kernel_gradient_IO, kernels)


_products.defvjp(_products_forward, _products_backward)


def _linear(x_BLI: jax.Array, projections: Sequence[Projection], name: str) -> list[jax.Array]:
    """Each projection's product [B, L, O], with its bias; named `name` for `jax.checkpoint`.

    Tokens are flattened to one axis for the product: otherwise its gradient would contract two axes, for which XLA on
    CPU copies both operands transposed (33 ms against 40 for an MLP). The batch axis may be sharded; under a sharded
    length the flattening would gather. On TPU the two axes stay: to a flattened product XLA fuses neither the
    activation behind it nor the sum with the block's input. The bias is added first, because XLA on GPU then fuses it
    into the matmul.
    """
    dtype = x_BLI.dtype
    x_NI = x_BLI if platform() == "tpu" else x_BLI.reshape(-1, x_BLI.shape[-1])
    kernels = tuple(projection.kernel_IO.astype(dtype) for projection in projections)
    if platform() != "cpu":
        products: Sequence[jax.Array] = [x_NI @ kernel_IO for kernel_IO in kernels]
    elif jax.sharding.get_abstract_mesh().size > 1:  # kernels that are split over devices stay separate
        products = [_products(x_NI, (kernel_IO,))[0] for kernel_IO in kernels]
    else:
        products = _products(x_NI, kernels)
    found = []
    for y_NO, (_, bias_O) in zip(products, projections, strict=True):
        y_NO = y_NO if bias_O is None else y_NO + bias_O.reshape(-1).astype(dtype)
        found.append(checkpoint_name(y_NO, name).reshape(*x_BLI.shape[:-1], -1))
    return found


def _into_heads(x_BLI: jax.Array, projection: Projection, heads: int) -> jax.Array:
    """The product with a kernel [I, Q] and its bias, split into heads, [B, L, heads, K].

    For TPU, if heads are not whole lanes: XLA then writes the tokens of each head together, as attention's kernel reads
    them. It would copy a product [B, L, Q] twice for this, with tokens along the lanes in between, and likewise the
    gradient. Heads of 128 or 256 take one copy, and the product is faster without them.
    """
    kernel_IO, bias_O = projection
    kernel_IHK = kernel_IO.astype(x_BLI.dtype).reshape(len(kernel_IO), heads, -1)
    y_BLHK = jnp.einsum("BLI,IHK->BLHK", x_BLI, kernel_IHK)
    y_BLHK = y_BLHK if bias_O is None else y_BLHK + bias_O.astype(x_BLI.dtype)
    return checkpoint_name(y_BLHK, "projected")


def _out_of_heads(x_BLHK: jax.Array, projection: Projection) -> jax.Array:
    """The product of all heads with a kernel [Q, O] and its bias, [B, L, O]; see `_into_heads`."""
    kernel_IO, bias_O = projection
    kernel_HKO = kernel_IO.astype(x_BLHK.dtype).reshape(*x_BLHK.shape[2:], -1)
    y_BLO = jnp.einsum("BLHK,HKO->BLO", x_BLHK, kernel_HKO)
    y_BLO = y_BLO if bias_O is None else y_BLO + bias_O.astype(x_BLHK.dtype)
    return checkpoint_name(y_BLO, "mixed")


class Attention(nn.Module):
    """Multi-head attention, and a cache of keys and values for decoding."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, query_BLD: jax.Array, source_BLD: jax.Array, mask: AttentionMask, rotation: Rotation | None
    ) -> jax.Array:
        """Attends from projections of `query_BLD` to keys and values of `source_BLD`; returns [B, L, D]."""
        config = self.config
        query, key, value = (self._projection(name) for name in ("query", "key", "value"))
        kernel_QD = parameter(self, "output_kernel", (config.query_width, config.hidden), ("heads", "embed"))
        output = Projection(kernel_QD, _bias(self, "output", (config.hidden,), ("embed",)))
        in_heads = platform() == "tpu" and config.size_of_head % TILE_COLUMNS > 0
        query, key, value, output = _gathered((query, key, value, output), source_BLD.dtype, in_heads)
        if in_heads:
            projected = [_into_heads(query_BLD if name == "query" else source_BLD, projection, self._sizes(name)[0])
                         for name, projection in (("query", query), ("key", key), ("value", value))]
        elif query_BLD is source_BLD:
            projected = _linear(source_BLD, (query, key, value), "projected")
        else:
            projected = _linear(query_BLD, (query,), "projected") + _linear(source_BLD, (key, value), "projected")
        query_BLHK, key_BMGK, value_BMGK = (
            self._heads(name, projected_BLQ, rotation)
            for name, projected_BLQ in zip(("query", "key", "value"), projected, strict=True))
        if mask.query_offset is not None:
            key_BMGK = self._cached("cached_key", key_BMGK, mask)
            value_BMGK = self._cached("cached_value", value_BMGK, mask)
        attended_BLHK = dot_product_attention(
            query_BLHK, key_BMGK, value_BMGK, mask, implementation=config.attention,
            is_query_layer=query_BLD is not source_BLD)
        if in_heads:
            return _out_of_heads(attended_BLHK, output)
        attended_BLQ = attended_BLHK.reshape(*query_BLD.shape[:2], config.query_width)
        return _linear(attended_BLQ, (output,), "mixed")[0]

    def _sizes(self, name: str) -> tuple[int, str]:
        """The number of query, key or value heads, and their logical axis."""
        config = self.config
        return (config.heads, "heads") if name == "query" else (config.key_heads, config.key_axis)

    def _projection(self, name: str) -> Projection:
        (heads, axis), config, size = self._sizes(name), self.config, self.config.size_of_head
        # All heads in one axis of the kernel: TPUs would pad heads of 80 to 128 each.
        kernel_DQ = parameter(self, f"{name}_kernel", (config.hidden, heads * size), ("embed", axis))
        return Projection(kernel_DQ, _bias(self, name, (heads, size), (axis, "kv")))

    def _heads(self, name: str, projected_BLQ: jax.Array, rotation: Rotation | None) -> jax.Array:
        """A projection's heads, [B, L, heads, K]; queries and keys are then normalised and rotated if configured."""
        (heads, axis), config = self._sizes(name), self.config
        x_BLHK = projected_BLQ.reshape(*projected_BLQ.shape[:2], heads, config.size_of_head)
        x_BLHK = constrain(x_BLHK, "activation_batch", "activation_length", f"activation_{axis}", "activation_kv")
        if name != "value" and config.query_key_norm != "none":
            axes, names = {"head": ((-1,), ("kv",)), "width": ((-2, -1), (axis, "kv"))}[config.query_key_norm]
            x_BLHK = nn.RMSNorm(
                epsilon=config.norm_epsilon, dtype=config.dtype, reduction_axes=axes, feature_axes=axes,
                scale_init=nn.with_logical_partitioning(nn.initializers.ones, names), name=f"{name}_norm")(x_BLHK)
        return x_BLHK if rotation is None or name == "value" else rotate(x_BLHK, rotation)

    def _cached(self, name: str, new_BLGK: jax.Array, mask: AttentionMask) -> jax.Array:
        """Writes the new tokens into the cache at the mask's offset and returns the whole cache, [B, M, G, K].

        Its layout is [B, G, M, K], the one that attention computes with; another layout would be copied at each step.
        """
        slots = mask.key_segments_BM.shape[1]
        batch, _, heads, size = new_BLGK.shape
        cache = self.variable("cache", name, jnp.zeros, (batch, heads, slots, size), new_BLGK.dtype)
        assert mask.query_offset is not None
        new_BGLK = new_BLGK.swapaxes(1, 2)
        cache_BGMK = jax.lax.dynamic_update_slice_in_dim(cache.value, new_BGLK, mask.query_offset, axis=2)
        cache.value = constrain(
            cache_BGMK, "activation_batch", f"activation_{self.config.key_axis}", "activation_length", "activation_kv"
        )
        return cache.value.swapaxes(1, 2)


def _activation(config: DecoderConfig) -> Callable[..., jax.Array]:
    """The activation of the first projection, or its product with the activation of the second.

    On GPU the backward pass computes it again if everything is kept: XLA would also keep what the derivative shares
    with it, such as the tanh of "gelu", and write and read as much as for the activation itself.
    """
    function = ACTIVATIONS[config.activation]

    def activate(up_BLF: jax.Array, *gate: jax.Array) -> jax.Array:
        return function(gate[0]) * up_BLF if gate else function(up_BLF)

    return jax.checkpoint(activate) if platform() == "gpu" and config.remat == "none" else activate


class FeedForward(nn.Module):
    """Two projections with an activation between them; if gated, the activation of a third is multiplied with the
    first.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        config = self.config
        expanded = [self._expand(name, x_BLD) for name in (("up", "gate") if config.is_gated else ("up",))]
        x_BLF = _activation(config)(*expanded)
        kernel_FD = parameter(self, "down_kernel", (config.feedforward, config.hidden), ("mlp", "embed"))
        bias_D = _bias(self, "down", (config.hidden,), ("embed",))
        # Only the gradient of a norm after it uses its output: then it is kept like attention's.
        named = "mixed" if config.norm_place == "after" else "contracted"
        return _linear(x_BLF, (Projection(kernel_FD, bias_D),), named)[0]

    def _expand(self, name: str, x_BLD: jax.Array) -> jax.Array:
        """Projects to the feed-forward size."""
        config = self.config
        kernel_DF = parameter(self, f"{name}_kernel", (config.hidden, config.feedforward), ("embed", "mlp"))
        bias_F = _bias(self, name, (config.feedforward,), ("mlp",))
        expanded_BLF = _linear(x_BLD, (Projection(kernel_DF, bias_F),), "expanded")[0]
        return constrain(expanded_BLF, "activation_batch", "activation_length", "activation_mlp")


class Block(nn.Module):
    """Attention and an MLP, each added to its input; with `query_BLD` it is the query layer."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, query_BLD: jax.Array | None, mask: AttentionMask, deterministic: bool,
        rotation: Rotation | None,
    ) -> tuple[jax.Array, None]:
        """Returns the new hidden states and None, as a scan requires."""
        config = self.config
        dropout = nn.Dropout(config.dropout_rate, deterministic=deterministic)
        x_BLD = constrain(x_BLD, "activation_batch", "activation_length", "activation_embed")
        x_BLD = checkpoint_name(x_BLD, "input")

        def attend(source_BLD: jax.Array) -> jax.Array:
            asked_BLD = source_BLD if query_BLD is None else query_BLD
            return Attention(config, name="attention")(asked_BLD, source_BLD, mask, rotation)

        def normed(name: str, layer: Callable[[jax.Array], jax.Array], x_BLD: jax.Array) -> jax.Array:
            norm = make_norm(config, f"{name}_norm")
            return dropout(layer(norm(x_BLD)) if config.norm_place == "before" else norm(layer(x_BLD)))

        attended_BLD = x_BLD + normed("attention", attend, x_BLD)
        source_BLD = attended_BLD if config.residual == "sequential" else x_BLD
        x_BLD = attended_BLD + normed("feedforward", FeedForward(config, name="feedforward"), source_BLD)
        return constrain(x_BLD, "activation_batch", "activation_length", "activation_embed"), None
