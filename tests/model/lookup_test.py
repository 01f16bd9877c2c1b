"""Look-ups whose gradients have one order of sums equal XLA's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codellm_jax.model import lookup
from codellm_jax.model.decoder import Decoder, DecoderConfig


def slow_sums(ids_N: np.ndarray, values_ND: np.ndarray, rows: int) -> np.ndarray:
    sums = np.zeros((rows, values_ND.shape[1]))
    for number, value in zip(ids_N, values_ND, strict=True):
        sums[number] += value
    return sums


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_sums_of_equal_ids_equal_those_of_a_loop(tokens: int, rows: int) -> None:
    dice = np.random.default_rng(tokens * rows)
    ids_N, values_ND = dice.integers(0, rows, tokens), dice.normal(size=(tokens, 5)).astype(np.float32)
    found = jax.jit(lookup.sum_of_equal, static_argnums=2)(jnp.asarray(ids_N), jnp.asarray(values_ND), rows)
    np.testing.assert_allclose(found, slow_sums(ids_N, values_ND, rows), atol=1e-5)


@pytest.mark.parametrize("name", ["few", "many"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_and_gradients_are_those_of_indexing(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "platform", lambda: "gpu")
    dice = np.random.default_rng(0)
    table = jnp.asarray(dice.normal(size=(11, 6)), jnp.float32)
    ids_BL = jnp.asarray(dice.integers(0, 11, (3, 20)), jnp.int32)
    upstream = jnp.asarray(dice.normal(size=(3, 20, 6)), dtype)

    def own(table: jax.Array) -> jax.Array:
        rows = lookup.look_up_few(table, ids_BL, jnp.dtype(dtype)) if name == "few" else \
            lookup.look_up_many(table, ids_BL)
        return rows.astype(dtype)

    found, backward = jax.vjp(own, table)
    expected, expected_backward = jax.vjp(lambda table: table[ids_BL].astype(dtype), table)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(backward(upstream)[0], expected_backward(upstream)[0], atol=1e-5)


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_a_decoders_gradient_scatters_no_sums_on_a_gpu(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "platform", lambda: platform)
    config = DecoderConfig(layers=2, hidden=8, heads=2, feedforward=8, vocabulary_size=16, length=4)
    ids_BL = jnp.zeros((1, 4), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), ids_BL, ids_BL, ids_BL)["params"]

    def loss(params: Any) -> jax.Array:
        hidden_BLD: Any = Decoder(config).apply({"params": params}, ids_BL, ids_BL, ids_BL)
        return jnp.sum(hidden_BLD)

    assert ("scatter-add" in str(jax.make_jaxpr(jax.grad(loss))(params))) == (platform == "cpu")
