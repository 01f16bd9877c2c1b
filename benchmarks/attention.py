"""Attention on a GPU, both passes, by the ways to separate documents, in one run.

    python -m benchmarks.attention

Rows of 1,024 tokens with 32 heads of 80 (1_3b), and of 2,048 with 32 heads of 64 on 8 of keys (llama_1b), bfloat16,
with about 2.5 documents in 1,024 tokens. Each kind runs twice on the same numbers, whose results must be the same bit
for bit, and is compared with attention in float32.

  whole      causal, no documents: computes something else, and shows what the mask costs
  fused      `jax.nn.dot_product_attention` with a mask of the documents
  cudnn      our calls of cuDNN with the same mask (`model/cudnn.py`)
  packed N   cuDNN's variable lengths: documents as rows of their own, at most N per row on average
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import timed
from codellm_jax.model import cudnn
from codellm_jax.model.attention import AttentionMask, dot_product_attention

SHAPES = {"1_3b": (16, 1024, 32, 32, 80), "llama_1b": (8, 2048, 32, 8, 64)}  # rows, length, heads, heads of keys, size
PACKED = (8, 16, 64)
REPEATED = 20  # before the device is waited for
OPTIONS = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
DENSITY = 2.5 / 1024  # documents per token


def packed_documents(segments_BL: jax.Array, per_row: int) -> tuple[jax.Array, jax.Array]:
    """Lengths of all documents, int32 [B, per_row], 0 after the last; and their first tokens, [B, per_row + 1], counted
    through the batch, B L after the last.
    """
    batch, length = segments_BL.shape
    begins = jnp.ones_like(segments_BL, bool).at[:, 1:].set(segments_BL[:, 1:] != segments_BL[:, :-1])
    starts = jnp.nonzero(begins.ravel(), size=batch * per_row, fill_value=batch * length)[0].astype(jnp.int32)
    starts = jnp.pad(starts, (0, batch), constant_values=batch * length)
    lengths = jnp.diff(starts[:batch * per_row + 1])
    return lengths.reshape(batch, per_row), starts.reshape(batch, per_row + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def packed(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, starts: jax.Array, per_row: int
) -> jax.Array:
    return packed_forward(query, key, value, lengths, starts, per_row)[0]


def settings_of(per_row: int) -> dict[str, Any]:
    return {"mask_type": "PADDING_CAUSAL", "max_seg_per_batch": per_row}


def places(query: jax.Array, key: jax.Array, lengths: jax.Array, starts: jax.Array) -> tuple[jax.Array, ...]:
    """The lengths of queries and of keys, and where they begin, in numbers."""
    return (lengths, lengths, starts * query.shape[2] * query.shape[3], starts * key.shape[2] * key.shape[3])


def packed_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, starts: jax.Array, per_row: int
) -> tuple[jax.Array, Any]:
    sums = jax.ShapeDtypeStruct((query.shape[0] * per_row, query.shape[2], query.shape[1]), jnp.float32)
    attended, sums, _ = cudnn.call(
        "__cudnn$fmhaSoftmax", (query, key, value, *places(query, key, lengths, starts)),
        [cudnn.heads_first(query), sums, cudnn.WORKSPACE], query, key, True, cudnn.FORWARD, settings_of(per_row))
    attended = attended.transpose(cudnn.HEADS_FIRST)
    return attended, (query, key, value, lengths, starts, sums, attended)


def packed_backward(per_row: int, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, lengths, starts, sums, attended = kept
    *gradients, _ = cudnn.call(
        "__cudnn$fmhaSoftmaxBackward",
        (query, key, value, sums, gradient, attended, *places(query, key, lengths, starts)),
        [*map(cudnn.heads_first, (query, key, value)), cudnn.WORKSPACE], query, key, True, cudnn.BACKWARD,
        settings_of(per_row) | {"force_deterministic": True})
    return (*(one.transpose(cudnn.HEADS_FIRST) for one in gradients), None, None)


packed.defvjp(packed_forward, packed_backward)


def kinds(segments_BL: jax.Array) -> dict[str, Callable[..., jax.Array]]:
    """Functions of queries, keys and values."""
    mask = AttentionMask(segments_BL, segments_BL)

    def without_documents(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    def by_packing(query: jax.Array, key: jax.Array, value: jax.Array, per_row: int) -> jax.Array:
        return packed(query, key, value, *packed_documents(segments_BL, per_row), per_row)

    return {"whole": without_documents} | {
        name: functools.partial(dot_product_attention, mask=mask, implementation=name) for name in ("fused", "cudnn")
    } | {f"packed {count}": functools.partial(by_packing, per_row=count) for count in PACKED}


def both_passes(attend: Callable[..., jax.Array], upstream: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    attended, backward = jax.vjp(attend, *arrays)
    return [attended, *backward(upstream)]


def measure(attend: Callable[..., jax.Array], arrays: list[jax.Array], wanted: list[jax.Array]) -> str:
    """Times both passes on the upstream gradient, queries, keys and values; a line about them."""
    once = jax.jit(functools.partial(both_passes, attend), compiler_options=OPTIONS)
    first, again = once(*arrays), once(*arrays)
    same = all(bool((one == other).all()) for one, other in zip(first, again, strict=True))
    errors = [float(jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel()))
              for one, other in zip(first, wanted, strict=True)]
    seconds = timed(lambda: [once(*arrays) for _ in range(REPEATED)][-1], jax.block_until_ready)
    median, low, high = (1e3 * value / REPEATED for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return (f"{median:.3f} ms ({low:.3f}-{high:.3f}), {'the same' if same else 'OTHER'} bits twice, distance "
            + " ".join(f"{error:.1e}" for error in errors))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, (batch, length, heads, key_heads, size) in SHAPES.items():
        dice = np.random.default_rng(0)
        arrays = [jnp.asarray(dice.normal(size=(batch, length, count, size)), jnp.bfloat16)
                  for count in (heads, heads, key_heads, key_heads)]
        segments = jnp.asarray(np.cumsum(dice.random((batch, length)) < DENSITY, axis=1), jnp.int32)
        exact = functools.partial(dot_product_attention, mask=AttentionMask(segments, segments),
                                  implementation="blocked")
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(functools.partial(both_passes, exact))(*(array.astype(jnp.float32) for array in arrays))
        for kind, attend in kinds(segments).items():
            try:
                line = measure(attend, arrays, wanted)
            except Exception as error:  # a kind that this device lacks; the others are measured
                line = f"does not run: {type(error).__name__}: {str(error)[:500]}"
            print(f"{name:<9} {kind:<10} {line}", flush=True)


if __name__ == "__main__":
    main()
