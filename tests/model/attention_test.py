"""Attention: every implementation equals the reference, and the mask means what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codellm_jax.model import attention
from codellm_jax.model.attention import IMPLEMENTATIONS, AttentionMask, dot_product_attention

OTHERS = [name for name in IMPLEMENTATIONS if name != "reference"]


def make_inputs(length: int, key_length: int | None = None, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, length, 2, 8)] + [(2, key_length or length, 2, 8)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def documents(length: int) -> jax.Array:
    """Three documents in the first row, one in the second."""
    index_L = np.arange(length)
    return jnp.asarray(np.stack([index_L * 3 // length, np.zeros_like(index_L)]), jnp.int32)


def naive(query_BLHK, key_BMHK, value_BMHK, allowed_BLM) -> np.ndarray:
    """Attention in loops and float64."""
    query_BLHK, key_BMHK, value_BMHK = (np.asarray(a, np.float64) for a in (query_BLHK, key_BMHK, value_BMHK))
    result_BLHK = np.zeros_like(query_BLHK)
    for b, i, h in np.ndindex(query_BLHK.shape[:3]):
        seen = np.flatnonzero(allowed_BLM[b, i])
        scores = key_BMHK[b, seen, h] @ query_BLHK[b, i, h] / np.sqrt(query_BLHK.shape[-1])
        weights = np.exp(scores - scores.max())
        result_BLHK[b, i, h] = (weights / weights.sum()) @ value_BMHK[b, seen, h]
    return result_BLHK


def test_reference_equals_loops() -> None:
    length = 12
    inputs = make_inputs(length)
    segments_BL = documents(length)
    allowed_BLM = np.zeros((2, length, length), bool)
    for b, i, j in np.ndindex(allowed_BLM.shape):
        allowed_BLM[b, i, j] = j <= i and segments_BL[b, i] == segments_BL[b, j]
    result = dot_product_attention(*inputs, AttentionMask(segments_BL, segments_BL), implementation="reference")
    np.testing.assert_allclose(result, naive(*inputs, allowed_BLM), atol=1e-6)


def test_queries_of_a_cache_see_only_what_is_written() -> None:
    query_BLHK, key_BMHK, value_BMHK = make_inputs(2, key_length=7)
    key_segments_BM = jnp.asarray([[0, 0, 1, 1, 1, 0, 0], [0] * 7], jnp.int32)
    mask = AttentionMask(key_segments_BM[:, 3:5], key_segments_BM, jnp.int32(3))
    expected_BLM = np.array([[[0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]], [[1] * 4 + [0] * 3, [1] * 5 + [0] * 2]])
    np.testing.assert_array_equal(mask.dense()[:, 0], expected_BLM.astype(bool))
    for implementation in IMPLEMENTATIONS:
        result = dot_product_attention(query_BLHK, key_BMHK, value_BMHK, mask, implementation=implementation)
        np.testing.assert_allclose(result, naive(query_BLHK, key_BMHK, value_BMHK, expected_BLM), atol=1e-6)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("length", [1, 5, 18])
def test_implementations_equal_the_reference(
    implementation: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 4)  # so that short rows have several blocks, the last one ragged
    inputs = make_inputs(length)
    segments_BL = documents(length)
    mask = AttentionMask(segments_BL, segments_BL)
    upstream = make_inputs(length)[0][::-1]

    def run(name: str, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, backward = jax.vjp(lambda *a: dot_product_attention(*a, mask, implementation=name), *inputs)
        return value, backward(upstream)

    value, gradients = jax.jit(run, static_argnums=0)(implementation, *inputs)
    expected_value, expected_gradients = jax.jit(run, static_argnums=0)("reference", *inputs)
    np.testing.assert_allclose(value, expected_value, atol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_softmax_is_float32_under_bfloat16(implementation: str) -> None:
    """Scores beyond bfloat16's precision: 256 and 257 are the same number there."""
    query_BLHK = jnp.zeros((1, 2, 1, 4), jnp.bfloat16).at[..., :2].set(jnp.asarray([512.0, 2.0], jnp.bfloat16))
    key_BMHK = jnp.zeros((1, 2, 1, 4), jnp.bfloat16).at[..., 0].set(1.0).at[0, 1, 0, 1].set(1.0)
    value_BMHK = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((4,), jnp.bfloat16)
    segments_BL = jnp.zeros((1, 2), jnp.int32)
    mask = AttentionMask(segments_BL, segments_BL)
    result = dot_product_attention(query_BLHK, key_BMHK, value_BMHK, mask, implementation=implementation)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result[0, 1], np.float32), 1 / (1 + np.exp(-1)), atol=5e-3)


def test_unknown_implementation_names_the_nearest() -> None:
    mask = AttentionMask(documents(4), documents(4))
    with pytest.raises(ValueError, match="did you mean 'blocked'"):
        dot_product_attention(*make_inputs(4), mask, implementation="block")
