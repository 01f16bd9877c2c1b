"""cuDNN's attention, and the decoder with it, on a GPU: JAX_PLATFORMS=cuda python -m pytest tests/model/gpu_test.py"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codellm_jax.model.attention import AttentionMask, attended_saveable, dot_product_attention
from codellm_jax.model.decoder import Decoder, DecoderConfig, output_head
from codellm_jax.model.losses import cross_entropy
from codellm_jax.runtime.compiler import compiler_options

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU, or JAX_PLATFORMS is not cuda")
LENGTH = 384


def inputs(heads: int, head_size: int, dtype: str, seed: int = 0) -> list[jax.Array]:
    """Queries, keys, values and an upstream gradient, drawn anew for each seed."""
    dice = np.random.default_rng(seed)
    return [jnp.asarray(dice.normal(size=(3, LENGTH, heads, head_size)), dtype) for _ in range(4)]


def masks() -> dict[str, AttentionMask]:
    dice = np.random.default_rng(1)
    whole = jnp.zeros((3, LENGTH), jnp.int32)
    segments = jnp.asarray(np.cumsum(dice.random((3, LENGTH)) < 0.02, axis=1), jnp.int32)
    single = jnp.asarray(np.tile(np.arange(LENGTH), (3, 1)), jnp.int32)
    return {"one document": AttentionMask(whole, whole), "documents": AttentionMask(segments, segments),
            "a token each": AttentionMask(single, single),
            "branches": AttentionMask(segments, segments, shared_segment=0)}


def value_and_gradients(implementation: str, arrays: list[jax.Array], mask: AttentionMask) -> list[jax.Array]:
    def run(upstream: jax.Array, *inputs: jax.Array) -> list[jax.Array]:
        value, backward = jax.vjp(lambda *a: dot_product_attention(*a, mask, implementation=implementation), *inputs)
        return [value, *backward(upstream)]

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(arrays[3], *arrays[:3])


def distance(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(array, np.float64) for array in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


CUDNN = pytest.mark.parametrize("implementation", ["fused", "cudnn"])  # by JAX's calls, and by ours


@CUDNN
@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_cudnn_equals_the_reference_in_float32(head_size: int, kind: str, implementation: str) -> None:
    arrays, mask = inputs(4, head_size, "bfloat16", seed=head_size), masks()[kind]
    text = jax.jit(lambda *a: dot_product_attention(*a, mask, implementation=implementation)).lower(
        *arrays[:3]).as_text()
    assert "fmha" in text  # else XLA's operations would be compared
    expected = value_and_gradients("reference", [array.astype("float32") for array in arrays], mask)
    for found, wanted in zip(value_and_gradients(implementation, arrays, mask), expected, strict=True):
        assert np.isfinite(np.asarray(found, np.float32)).all()
        if np.linalg.norm(wanted) > 1e-3:  # queries and keys of single tokens have no gradient
            assert distance(found, wanted) < 1e-2
        else:
            assert np.abs(np.asarray(found, np.float32)).max() < 1e-2


@CUDNN
def test_cudnn_takes_keys_of_fewer_heads(implementation: str) -> None:
    query, key, value, upstream = inputs(4, 64, "bfloat16")
    arrays, mask = [query, key[:, :, :2], value[:, :, :2], upstream], masks()["documents"]
    text = jax.jit(lambda *a: dot_product_attention(*a, mask, implementation=implementation)).lower(
        *arrays[:3]).as_text()
    assert "fmha" in text
    expected = value_and_gradients("reference", [array.astype("float32") for array in arrays], mask)
    for found, wanted in zip(value_and_gradients(implementation, arrays, mask), expected, strict=True):
        assert distance(found, wanted) < 1e-2


@CUDNN
def test_a_backward_pass_that_keeps_what_attention_returned_attends_once(implementation: str) -> None:
    arrays, mask = inputs(4, 64, "bfloat16"), masks()["documents"]
    attend = jax.checkpoint(
        lambda *a: dot_product_attention(*a, mask, implementation=implementation),
        policy=attended_saveable)
    lowered = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))).lower(*arrays[:3])
    assert lowered.as_text().count('custom_call @__cudnn$fmha') == 2  # forward and backward


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full", "offload"])
def test_loss_and_gradients_of_a_decoder_in_bfloat16_are_near_those_in_float32(remat: str) -> None:
    dice = np.random.default_rng(2)
    config = DecoderConfig(layers=3, hidden=128, heads=2, feedforward=256, vocabulary_size=512, length=LENGTH,
                           dtype="bfloat16", remat=remat)
    tokens_BL, targets_BL = (jnp.asarray(dice.integers(0, 512, (3, LENGTH)), jnp.int32) for _ in range(2))
    segments_BL = masks()["documents"].query_segments_BL
    positions_BL = jnp.tile(jnp.arange(LENGTH), (3, 1))
    params = Decoder(config).init(jax.random.key(0), tokens_BL, positions_BL, segments_BL)["params"]

    def loss(params: Any, config: DecoderConfig) -> jax.Array:
        hidden_BLD: Any = Decoder(config).apply({"params": params}, tokens_BL, positions_BL, segments_BL)
        return cross_entropy(hidden_BLD, output_head(params), targets_BL, jnp.ones((3, LENGTH)))[0]

    exact = dataclasses.replace(config, dtype="float32", attention="reference", remat="none")
    found = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, config)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, exact)
    assert distance(found[0], expected[0]) < 1e-3
    for wanted, gradient in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(found[1]), strict=True):
        if np.linalg.norm(wanted) > 1e-3:
            assert distance(gradient, wanted) < 5e-2


def test_unrolled_layers_give_the_same_gradients_each_time() -> None:
    """XLA is given equal calls of cuDNN's deterministic backward pass, one for each layer."""
    dice = np.random.default_rng(3)
    config = DecoderConfig(layers=5, hidden=128, heads=2, feedforward=256, vocabulary_size=512, length=LENGTH,
                           dtype="bfloat16", attention="cudnn", scan_unroll=5)
    tokens_BL, targets_BL = (jnp.asarray(dice.integers(0, 512, (3, LENGTH)), jnp.int32) for _ in range(2))
    segments_BL, positions_BL = masks()["documents"].query_segments_BL, jnp.tile(jnp.arange(LENGTH), (3, 1))
    params = Decoder(config).init(jax.random.key(0), tokens_BL, positions_BL, segments_BL)["params"]

    def gradients(config: DecoderConfig) -> list[np.ndarray]:
        def loss(params: Any) -> jax.Array:
            hidden_BLD: Any = Decoder(config).apply({"params": params}, tokens_BL, positions_BL, segments_BL)
            return cross_entropy(hidden_BLD, output_head(params), targets_BL, jnp.ones((3, LENGTH)))[0]

        mesh = jax.make_mesh((1,), ("data",))
        compiled = jax.jit(jax.grad(loss), compiler_options=compiler_options(mesh, config)).lower(params).compile()
        return [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(params))]

    first, again = gradients(config), gradients(config)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    looped = gradients(dataclasses.replace(config, attention="fused", scan_unroll=1))
    for one, other in zip(first, looped, strict=True):
        assert np.linalg.norm(other) < 1e-3 or distance(one, other) < 5e-2
