"""Attention: every implementation equals the reference, and the mask means what it says."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codellm_jax.model import attention
from codellm_jax.model.attention import IMPLEMENTATIONS, AttentionMask, dot_product_attention, reference_attention
from codellm_jax.pods.topologies import compile_only_devices, has_libtpu, parse_topology
from codellm_jax.runtime.partitioning import AXIS_RULES

OTHERS = [name for name in IMPLEMENTATIONS if name != "reference"]


def make_inputs(
    length: int, key_length: int | None = None, dtype: str = "float32", head_size: int = 8, batch: int = 2
) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(batch, length, 2, head_size)] + [(batch, key_length or length, 2, head_size)] * 2
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
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
def test_heads_of_keys_serve_neighbouring_heads_of_queries(
    implementation: str, heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against keys and values written out for each head; whole rows, branches, and the newest tokens of a cache."""
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 4)
    rng = np.random.default_rng(0)
    query_BLHK = jnp.asarray(rng.normal(size=(2, 10, heads, 8)), jnp.float32)
    key_BMGK, value_BMGK = jnp.asarray(rng.normal(size=(2, 2, 10, key_heads, 8)), jnp.float32)
    segments_BL = documents(10)
    branches_BL = jnp.asarray([[0] * 4 + [1] * 3 + [2] * 3, [0] * 2 + [1] * 4 + [-1] * 4], jnp.int32)
    masks = {"rows": AttentionMask(segments_BL, segments_BL),
             "branches": AttentionMask(branches_BL, branches_BL, shared_segment=0),
             "cache": AttentionMask(segments_BL[:, 6:8], segments_BL, jnp.int32(6))}

    def run(implementation: str, repeated: int) -> dict[str, tuple[jax.Array, tuple[jax.Array, ...]]]:
        found = {}
        for name, mask in masks.items():
            asked_BLHK = query_BLHK[:, 6:8] if name == "cache" else query_BLHK

            def attend(query: jax.Array, *keys: jax.Array, mask: AttentionMask = mask) -> jax.Array:
                keys = tuple(jnp.repeat(array, repeated, axis=2) for array in keys)
                return dot_product_attention(query, *keys, mask, implementation=implementation)

            value, backward = jax.vjp(attend, asked_BLHK, key_BMGK, value_BMGK)
            found[name] = value, backward(asked_BLHK[:, ::-1])
        return found

    found, expected = run(implementation, 1), run("reference", heads // key_heads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def value_and_gradients(
    implementation: str, inputs: list[jax.Array], mask: AttentionMask
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def run(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, backward = jax.vjp(lambda *a: dot_product_attention(*a, mask, implementation=implementation), *inputs)
        return value, backward(inputs[0][:, ::-1])

    return jax.jit(run)(*inputs)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_implementations_equal_the_reference_at_the_shipped_sizes_of_heads(implementation: str, head_size: int) -> None:
    """Rows of two blocks of 128 and a ragged end, cut into three documents."""
    inputs, segments_BL = make_inputs(300, head_size=head_size), documents(300)
    mask = AttentionMask(segments_BL, segments_BL)
    value, gradients = value_and_gradients(implementation, inputs, mask)
    expected_value, expected_gradients = value_and_gradients("reference", inputs, mask)
    np.testing.assert_allclose(value, expected_value, atol=5e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=5e-5)


def test_a_backward_pass_that_keeps_what_is_named_attended_makes_the_weights_only_once_more() -> None:
    inputs, segments_BL = make_inputs(150), documents(150)  # three blocks
    mask = AttentionMask(segments_BL, segments_BL)
    attend = jax.checkpoint(
        lambda *a: dot_product_attention(*a, mask, implementation="blocked"),
        policy=jax.checkpoint_policies.save_only_these_names("attended"))
    lowered = jax.jit(jax.grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))).lower(*inputs)
    assert lowered.as_text().count("stablehlo.exponential") == 2 * 3


@pytest.mark.parametrize("implementation", OTHERS)
def test_branches_see_their_stem_and_no_other_branch(implementation: str) -> None:
    segments_BL = jnp.asarray([[0] * 4 + [1] * 3 + [2] * 3, [0] * 2 + [1] * 4 + [-1] * 4], jnp.int32)
    mask = AttentionMask(segments_BL, segments_BL, shared_segment=0)
    inputs = make_inputs(10)
    np.testing.assert_allclose(dot_product_attention(*inputs, mask, implementation=implementation),
                               dot_product_attention(*inputs, mask, implementation="reference"), atol=1e-6)


def on_mesh(shape: tuple[int, int, int]) -> contextlib.ExitStack:
    """Eight devices under the rules of training."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape),
                                          ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)))
    stack.enter_context(nn.logical_axis_rules(AXIS_RULES))
    return stack


@pytest.mark.parametrize("implementation", ["splash", "fused"])
def test_rows_and_heads_are_split_over_a_mesh(implementation: str) -> None:
    inputs, segments_BL = make_inputs(20, batch=4), jnp.concatenate([documents(20)] * 2)
    expected_value, expected_gradients = value_and_gradients(
        "reference", inputs, AttentionMask(segments_BL, segments_BL))
    with on_mesh((2, 2, 2)):
        spec = PartitionSpec(("data", "fsdp"), None, "model", None)
        assert attention.layout(4, 2) == spec
        inputs = [jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), spec)) for array in inputs]
        value, gradients = value_and_gradients(implementation, inputs, AttentionMask(segments_BL, segments_BL))
        assert value.sharding.shard_shape(value.shape) == (1, 20, 1, 8)
    np.testing.assert_allclose(value, expected_value, atol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_grouped_heads_are_split_over_a_mesh_that_divides_those_of_the_keys(key_heads: int) -> None:
    query_BLHK, key_BLHK, value_BLHK = make_inputs(20, batch=4)
    inputs = [jnp.concatenate([query_BLHK, 1 - query_BLHK], axis=2), key_BLHK[:, :, :key_heads],
              value_BLHK[:, :, :key_heads]]
    segments_BL = jnp.concatenate([documents(20)] * 2)
    mask = AttentionMask(segments_BL, segments_BL)
    expected = value_and_gradients("reference", inputs, mask)
    with on_mesh((2, 2, 2)):
        assert (attention.layout(4, key_heads) is not None) == (key_heads == 2)
        found = value_and_gradients("splash", inputs, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_splash_leaves_what_the_mesh_does_not_divide_to_another() -> None:
    assert attention.layout(3, 5) == PartitionSpec(None, None, None, None)  # outside a mesh
    with on_mesh((2, 2, 2)):
        assert attention.layout(3, 2) is None and attention.layout(4, 3) is None
        with nn.logical_axis_rules([("activation_length", "model")]):
            assert attention.layout(4, 2) is None
        inputs, segments_BL = make_inputs(6, batch=1), documents(6)[:1]
        mask = AttentionMask(segments_BL, segments_BL)
        np.testing.assert_allclose(jax.jit(dot_product_attention, static_argnames="implementation")(
            *inputs, mask, implementation="splash"), reference_attention(*inputs, mask), atol=1e-6)


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.parametrize(("head_size", "key_heads"), [(64, 4), (80, 4), (128, 4), (64, 2)])
def test_splash_compiles_for_tpus_split_over_their_mesh(head_size: int, key_heads: int) -> None:
    devices = np.array(compile_only_devices(parse_topology("v5e-8"))).reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    rows = ("data", "fsdp")
    queries, keys = (jax.ShapeDtypeStruct((8, 1024, heads, head_size), jnp.bfloat16, sharding=NamedSharding(
        mesh, PartitionSpec(rows, None, "model", None))) for heads in (4, key_heads))
    segments_BL = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(rows)))

    def gradients(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        *inputs, segments_BL = inputs
        mask = AttentionMask(segments_BL, segments_BL)
        return jax.grad(lambda *a: jnp.sum(dot_product_attention(*a, mask)).astype(jnp.float32), (0, 1, 2))(*inputs)

    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        text = jax.jit(gradients).lower(queries, keys, keys, segments_BL).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, and the gradients of queries and of keys
    assert "all-gather" not in text and "all-reduce" not in text


def test_auto_is_chosen_by_the_devices_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.platform() == "cpu"
    seen: list[str] = []
    for name in IMPLEMENTATIONS:
        monkeypatch.setitem(IMPLEMENTATIONS, name, lambda query, *_, name=name, **__: seen.append(name) or query)
    segments_BL = documents(4)
    inputs, mask = make_inputs(4), AttentionMask(segments_BL, segments_BL)
    for kind in ("cpu", "gpu", "tpu", "quantum"):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=kind)
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert attention.platform() == kind
            dot_product_attention(*inputs, mask)
    assert seen == ["blocked", "fused", "splash", "blocked"]


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
