"""What is compiled for a GPU, on a machine without one; `gpu_test.py` runs it on a GPU."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax._src.cudnn import fused_attention_stablehlo as of_jax

from codellm_jax.model import attention, parts
from codellm_jax.model.attention import AttentionMask, dot_product_attention
from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.parts import FeedForward

ROWS, LENGTH, HEADS = 2, 64, 4


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if programs were for a GPU, for JAX's checks too."""
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(of_jax, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(of_jax, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(of_jax, "is_cuda_compute_capability_equal", lambda capability: False)


def inputs(dtype: str = "bfloat16", head_size: int = 80, key_heads: int = HEADS, length: int = LENGTH) -> list[Any]:
    """Shapes of queries, keys and values."""
    return [jax.ShapeDtypeStruct((ROWS, length, heads, head_size), dtype) for heads in (HEADS, key_heads, key_heads)]


def masks(length: int = LENGTH) -> dict[str, AttentionMask]:
    segments = jnp.asarray(np.cumsum(np.random.default_rng(0).random((ROWS, length)) < 0.1, axis=1), jnp.int32)
    return {"documents": AttentionMask(segments, segments),
            "newest tokens": AttentionMask(segments, segments, query_offset=jnp.asarray(0)),
            "branches": AttentionMask(segments, segments, shared_segment=0)}


def calls(implementation: str, arrays: list[Any], mask: AttentionMask) -> list[tuple[str, dict[str, Any], str, str]]:
    """For each call of cuDNN in both passes: its target, its settings, and the types of its operands and results."""
    def loss(*arrays: jax.Array) -> jax.Array:
        attended = dot_product_attention(*arrays, mask, implementation=implementation)
        return jnp.sum(attended.astype(jnp.float32) ** 2)

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(
        r'custom_call @(__cudnn\$\w+)\(.*?backend_config = "((?:\\"|\\22|[^"])*)".*? : \((.*?)\) -> (.*)', text)
    return [(target, json.loads(re.sub(r'\\22|\\"', '"', settings))["cudnn_fmha_backend_config"], operands, results)
            for target, settings, operands, results in found]


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize(("dtype", "head_size", "key_heads"), [("bfloat16", 80, 4), ("float16", 64, 4),
                                                               ("bfloat16", 128, 2)])
def test_the_calls_are_those_of_jax(dtype: str, head_size: int, key_heads: int, kind: str) -> None:
    """But that the backward pass is marked as deterministic, and does not compute a gradient of the mask."""
    arrays, mask = inputs(dtype, head_size, key_heads), masks()[kind]
    ours, wanted = calls("cudnn", arrays, mask), calls("fused", arrays, mask)
    assert [target for target, *_ in ours] == [target for target, *_ in wanted] == [
        "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    for (target, found, operands, results), (_, expected, their_operands, their_results) in zip(
            ours, wanted, strict=True):
        assert found.pop("force_deterministic", False) == target.endswith("Backward")
        shape, theirs = found.pop("intermediate_tensor_shape"), expected.pop("intermediate_tensor_shape")
        assert shape == {name: theirs[name] for name in shape if name != "layout"} | {"layout": shape["layout"]}
        assert shape["layout"]["minor_to_major"] == theirs["layout"]["minor_to_major"]
        assert found == expected
        assert operands == their_operands
        of_mask = r"tensor<\d+x1x64x64x\w+>, "
        assert re.sub(of_mask, "", results) == re.sub(of_mask, "", their_results)


def test_what_cudnn_lacks_is_left_to_another() -> None:
    for arrays in (inputs("float32"), inputs(head_size=84), inputs(head_size=136), inputs(length=63)):
        assert not calls("cudnn", arrays, masks(arrays[0].shape[1])["documents"])


def test_a_mesh_calls_it_for_its_own_rows_and_heads() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("activation_batch", "data"), ("activation_heads", "model"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        found = calls("cudnn", inputs(), masks()["documents"])
    assert [re.findall(r"tensor<(\w+)x64x\w+x80xbf16>", operands)[0] for _, _, operands, _ in found] == ["1"] * 2
    assert all("1x64x2x80xbf16" in operands for _, _, operands, _ in found)
    # Two devices do not divide three heads: there is no call, and none by JAX either.
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        arrays = [jax.ShapeDtypeStruct((ROWS, LENGTH, 3, 80), "bfloat16")] * 3
        assert not calls("cudnn", arrays, masks()["documents"])


def test_a_backward_pass_that_keeps_what_attention_returned_attends_once() -> None:
    arrays, mask = inputs(), masks()["documents"]

    def count(policy: Any) -> int:
        attend = jax.checkpoint(lambda *a: dot_product_attention(*a, mask, implementation="cudnn"), policy=policy)
        traced = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @__cudnn$fmha")

    assert count(attention.attended_saveable) == 2  # forward and backward
    assert count(jax.checkpoint_policies.nothing_saveable) == 3


@pytest.mark.parametrize(("activation", "expanded"), [("gelu", 2), ("swiglu", 3)])
def test_the_mlp_keeps_its_products_and_its_activation_alone(
    activation: str, expanded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where everything is kept; and the same gradients as elsewhere."""
    config = DecoderConfig(layers=1, hidden=6, heads=2, feedforward=24, vocabulary_size=16, length=4,
                           activation=activation, remat="none")
    x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6)), jnp.float32)
    module = FeedForward(config)
    params = module.init(jax.random.key(0), x_BLD)

    def both(x_BLD: jax.Array) -> tuple[int, Any]:
        value, backward = jax.vjp(module.apply, params, x_BLD)
        return sum(leaf.size == 2 * 4 * 24 for leaf in jax.tree.leaves(backward)), backward(value)

    kept, wanted = both(x_BLD)
    monkeypatch.setattr(parts, "platform", lambda: "gpu")
    fewer, found = both(x_BLD)
    assert fewer == expanded < kept
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
