"""The decoder equals a naive NumPy reading of its specification, with a cache as without, and counts itself rightly."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from codellm_jax.model import parts
from codellm_jax.model.decoder import (
    Decoder,
    DecoderConfig,
    flops_per_token,
    init_cache,
    output_head,
    parameter_count,
)
from codellm_jax.model.losses import cross_entropy
from codellm_jax.model.parts import FeedForward, Projection, _linear

TINY = DecoderConfig(layers=3, hidden=12, heads=3, feedforward=20, vocabulary_size=17, length=11)
ARCHITECTURES = {
    "query layer": TINY,
    "gpt": dataclasses.replace(TINY, query_layer=False),
    "rotary query layer": dataclasses.replace(
        TINY, positions="rotary", kv_heads=1, head_size=6, norm="rms", activation="swiglu", biases="none",
        query_key_norm="head", tied_head=False),
    "parallel": dataclasses.replace(
        TINY, query_layer=False, positions="rotary", rotary_part=0.5, residual="parallel", biases="query_key_value",
        activation="gelu_exact", norm_place="after", query_key_norm="width"),
}

Inputs = tuple[jax.Array, jax.Array, jax.Array]

IN_BLOCK = {
    "attention/query_kernel": (16, 16), "attention/key_kernel": (16, 16), "attention/value_kernel": (16, 16),
    "attention/output_kernel": (16, 16), "attention/query_bias": (2, 8), "attention/key_bias": (2, 8),
    "attention/value_bias": (2, 8), "attention/output_bias": (16,), "attention_norm/scale": (16,),
    "attention_norm/bias": (16,), "feedforward/up_kernel": (16, 24), "feedforward/up_bias": (24,),
    "feedforward/down_kernel": (24, 16), "feedforward/down_bias": (16,), "feedforward_norm/scale": (16,),
    "feedforward_norm/bias": (16,)}
RECORDED_SHAPES = {
    "token_embedding": (23, 16), "position_embedding": (12, 16), "query_embedding": (12, 16),
    "final_norm/scale": (16,), "final_norm/bias": (16,),
    **{f"blocks/{name}": (2, *shape) for name, shape in IN_BLOCK.items()},
    **{f"query_block/{name}": shape for name, shape in IN_BLOCK.items()}}
RECORDED_VALUES = [-0.011796936392784119, 0.019002465531229973, -0.00448083970695734, 8.314356091432273e-05,
                   -0.011567083187401295]
RECORDED_LOSS = 70.70612335205078


def make_inputs(config: DecoderConfig, starts: tuple[tuple[int, ...], ...] = ((0, 4, 9), (0, 7))) -> Inputs:
    """Random tokens with documents starting at the given indices of each row; positions restart there."""
    tokens_BL = np.random.default_rng(0).integers(config.vocabulary_size, size=(len(starts), config.length))
    index_L = np.arange(config.length)
    segments_BL = np.stack([np.searchsorted(row, index_L, side="right") for row in starts])
    positions_BL = np.stack([index_L - np.asarray(row)[s - 1] for row, s in zip(starts, segments_BL, strict=True)])
    return tuple(jnp.asarray(array, jnp.int32) for array in (tokens_BL, positions_BL, segments_BL))


@functools.cache
def make_params(config: DecoderConfig) -> Any:
    """Parameters that hide nothing: biases and LayerNorms drawn too, matrices large enough to matter."""
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), *make_inputs(config))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32), nn.unbox(boxed))


def compute_logits(config: DecoderConfig, params: Any, inputs: Inputs, **options: Any) -> jax.Array:
    def run(params: Any, *inputs: jax.Array) -> jax.Array:
        hidden_BLD = Decoder(config).apply({"params": params}, *inputs, **options)
        return Decoder(config).apply({"params": params}, hidden_BLD, method="logits")

    return jax.jit(run)(params, *inputs)


# The specification in NumPy, one token and one head at a time, in float64.


def naive_norm(x_D: np.ndarray, p: Any) -> np.ndarray:
    return (x_D - x_D.mean()) / np.sqrt(((x_D - x_D.mean()) ** 2).mean() + 1e-5) * p["scale"] + p["bias"]


def naive_block(config: DecoderConfig, p: Any, x_LD: np.ndarray, query_LD: Any, segments_L: np.ndarray) -> np.ndarray:
    attention, feedforward, size = p["attention"], p["feedforward"], config.size_of_head
    normed_LD = np.stack([naive_norm(x_D, p["attention_norm"]) for x_D in x_LD])
    asked_LD = normed_LD if query_LD is None else query_LD
    result_LD = np.zeros_like(x_LD)
    for i in range(len(x_LD)):
        x_D = x_LD[i] + attention["output_bias"]
        for h in range(config.heads):

            def project(name: str, y_D: np.ndarray, h: int = h) -> np.ndarray:
                return y_D @ attention[f"{name}_kernel"][:, h * size:(h + 1) * size] + attention[f"{name}_bias"][h]

            query_K = project("query", asked_LD[i])
            seen = [j for j in range(i + 1) if segments_L[j] == segments_L[i]]
            scores = [query_K @ project("key", normed_LD[j]) / np.sqrt(config.size_of_head) for j in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            attended_K = sum(w * project("value", normed_LD[j]) for w, j in zip(weights, seen, strict=True))
            x_D = x_D + attended_K @ attention["output_kernel"][h * size:(h + 1) * size]
        up_F = naive_norm(x_D, p["feedforward_norm"]) @ feedforward["up_kernel"] + feedforward["up_bias"]
        if config.activation == "gelu":
            up_F = up_F * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up_F + 0.044715 * up_F**3)))
        else:
            up_F = up_F / (1 + np.exp(-1.702 * up_F))
        result_LD[i] = x_D + up_F @ feedforward["down_kernel"] + feedforward["down_bias"]
    return result_LD


def naive_logits(config: DecoderConfig, params: Any, inputs: Inputs) -> np.ndarray:
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = []
    for tokens_L, positions_L, segments_L in zip(*map(np.asarray, inputs), strict=True):
        x_LD = p["token_embedding"][tokens_L] + p["position_embedding"][positions_L]
        for layer in range(config.layers - config.query_layer):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
            x_LD = naive_block(config, block, x_LD, None, segments_L)
        x_LD = np.stack([naive_norm(x_D, p["final_norm"]) for x_D in x_LD])
        if config.query_layer:
            x_LD = naive_block(config, p["query_block"], x_LD, p["query_embedding"][positions_L], segments_L)
        rows.append(x_LD @ p["token_embedding"].T)
    return np.stack(rows)


@pytest.mark.parametrize("change", [{}, {"query_layer": False}, {"activation": "fast_gelu"}, {"layers": 1}], ids=str)
def test_equals_the_specification(change: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **change)
    params, inputs = make_params(config), make_inputs(config)
    logits_BLV = compute_logits(config, params, inputs)
    assert logits_BLV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BLV, naive_logits(config, params, inputs), atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_documents_do_not_leak(architecture: str) -> None:
    """In one row: neither an earlier document nor a later token changes a token's logits, nor does its place."""
    config = ARCHITECTURES[architecture]
    params, inputs = make_params(config), make_inputs(config, ((0, 4),))
    tokens_BL, positions_BL, segments_BL = inputs
    logits = jax.jit(functools.partial(compute_logits, config))
    base_BLV = logits(params, inputs)
    other_first = logits(params, ((tokens_BL + 1).at[:, 4:].set(tokens_BL[:, 4:]) % 17, positions_BL, segments_BL))
    np.testing.assert_array_equal(other_first[:, 4:], base_BLV[:, 4:])
    assert not np.allclose(other_first[:, :4], base_BLV[:, :4])
    other_last = logits(params, (tokens_BL.at[:, -1].add(1) % 17, positions_BL, segments_BL))
    np.testing.assert_array_equal(other_last[:, :-1], base_BLV[:, :-1])
    alone = compute_logits(config, params, tuple(array[:, 4:] for array in inputs))
    np.testing.assert_allclose(alone, base_BLV[:, 4:], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_equals_the_whole_row(architecture: str) -> None:
    """Prompts of every length, then one token at a time; several documents in a row."""
    config = dataclasses.replace(ARCHITECTURES[architecture], length=7)
    decoder, params, inputs = Decoder(config), make_params(config), make_inputs(config, ((0, 3, 5), (0, 4)))
    expected_BLV = compute_logits(config, params, inputs)

    @jax.jit
    def step(cache: Any, *inputs: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "cache": cache}
        hidden_BLD, changed = decoder.apply(variables, *inputs, decode=True, mutable=["cache"])
        return decoder.apply(variables, hidden_BLD, method="logits"), changed["cache"]

    for prompt in range(1, config.length + 1):
        cache = init_cache(config, batch=2)
        logits_BLV, cache = step(cache, *(array[:, :prompt] for array in inputs))
        np.testing.assert_allclose(logits_BLV, expected_BLV[:, :prompt], atol=1e-5)
        for i in range(prompt, config.length):
            logits_BLV, cache = step(cache, *(array[:, i : i + 1] for array in inputs))
            np.testing.assert_allclose(logits_BLV[:, 0], expected_BLV[:, i], atol=1e-5)
    assert cache["cached_mask"]["index"] == config.length

    # Several tokens at a time, in a cache no longer than they need, with the prompt's state used twice.
    cache = init_cache(config, batch=2, length=6)
    _, prompted = step(cache, *(array[:, :4] for array in inputs))
    for shift in (1, 0):
        continuation = ((inputs[0] + shift) % 17)[:, 4:6], *(array[:, 4:6] for array in inputs[1:])
        logits_BLV, _ = step(prompted, *continuation)
    np.testing.assert_allclose(logits_BLV, expected_BLV[:, 4:6], atol=1e-5)


def test_left_padding_serves_prompts_of_different_lengths() -> None:
    """Padding before a prompt, in a segment of its own, changes nothing."""
    config = TINY
    params, inputs = make_params(config), make_inputs(config, ((0, 3),))
    padded_BLV = compute_logits(config, params, inputs)
    alone_BLV = compute_logits(config, params, tuple(array[:, 3:] for array in inputs))
    np.testing.assert_allclose(padded_BLV[:, 3:], alone_BLV, atol=1e-5)


def loss_gradients(config: DecoderConfig, params: Any, inputs: Inputs) -> Any:
    def loss(params: Any) -> jax.Array:
        hidden_BLD = Decoder(config).apply(
            {"params": params}, *inputs, deterministic=False, rngs={"dropout": jax.random.key(3)}
        )
        return jnp.sum(jnp.sin(hidden_BLD))

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_on_tpu_are_the_same_decoder(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There attention's kernels are multiplied as [D, H, K] and [H, K, D], and rows stay apart: same logits and
    gradients.
    """
    config = ARCHITECTURES[architecture]
    params, inputs = make_params(config), make_inputs(config)

    def found() -> tuple[Any, Any, str]:
        traced = str(jax.make_jaxpr(functools.partial(Decoder(config).apply, {"params": params}))(*inputs))
        return compute_logits(config, params, inputs), loss_gradients(config, params, inputs), traced

    *expected, before = found()
    monkeypatch.setattr(parts, "platform", lambda: "tpu")
    *same, after = found()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), same, expected)
    product = f"3,{config.size_of_head}] = dot_general"
    assert after.count(product) > before.count(product)


@pytest.mark.slow
def test_remat_and_unrolling_change_no_gradient() -> None:
    """With dropout, whose draws must come out the same the second time."""
    config = dataclasses.replace(TINY, dropout_rate=0.3, remat="none")
    params, inputs = make_params(TINY), make_inputs(TINY)
    expected = loss_gradients(config, params, inputs)
    assert all(leaf.any() for leaf in jax.tree.leaves(expected))
    same_gradients(config, params, inputs, expected)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["rotary query layer", "parallel"])
def test_remat_changes_no_gradient_of_other_parts(architecture: str) -> None:
    config = dataclasses.replace(ARCHITECTURES[architecture], dropout_rate=0.3, remat="none")
    params, inputs = make_params(ARCHITECTURES[architecture]), make_inputs(TINY)
    expected = loss_gradients(config, params, inputs)
    unused = {"lm_head"} & set(expected)  # which the loss here does not take
    assert all(leaf.any() for name in set(expected) - unused for leaf in jax.tree.leaves(expected[name]))
    same_gradients(config, params, inputs, expected)


def same_gradients(config: DecoderConfig, params: Any, inputs: Inputs, expected: Any) -> None:
    for change in (
        {"remat": "dots"}, {"remat": "attention"}, {"remat": "full", "scan_unroll": 2}, {"remat": "offload"},
    ):
        gradients = loss_gradients(dataclasses.replace(config, **change), params, inputs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradients, expected)


def test_dropout_differs_by_rng_and_is_reproducible() -> None:
    config = dataclasses.replace(TINY, dropout_rate=0.5)
    params, inputs = make_params(TINY), make_inputs(TINY)

    @jax.jit
    def run(seed: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return Decoder(config).apply({"params": params}, *inputs, deterministic=False, rngs=rngs)

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.allclose(run(0), run(1))
    np.testing.assert_array_equal(compute_logits(config, params, inputs), compute_logits(TINY, params, inputs))


def test_bfloat16_computes_so_and_keeps_float32_parameters() -> None:
    config = dataclasses.replace(TINY, dtype="bfloat16")
    inputs = make_inputs(config)
    fresh = jax.eval_shape(Decoder(config).init, jax.random.key(0), *inputs)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    assert jax.eval_shape(Decoder(config).apply, {"params": fresh}, *inputs).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(init_cache(config, 1)["blocks"])} == {jnp.dtype("bfloat16")}
    params = jax.tree.map(lambda leaf: leaf / 2, make_params(TINY))
    logits_BLV = compute_logits(config, params, inputs)
    assert logits_BLV.dtype == jnp.float32
    np.testing.assert_allclose(logits_BLV, naive_logits(TINY, params, inputs), atol=0.03)


def test_initial_parameters() -> None:
    """normal(0.02), biases zero, LayerNorms one and zero; blocks differ; every parameter has logical axes."""
    config = dataclasses.replace(TINY, hidden=48, feedforward=96, vocabulary_size=64)
    boxed = jax.jit(Decoder(config).init)(jax.random.key(0), *make_inputs(config))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)):
        name = path[-1].key
        if name == "scale":
            assert (leaf == 1).all()
        elif name.endswith("bias"):
            assert (leaf == 0).all()
        else:
            assert abs(leaf.std() / 0.02 - 1) < 0.1, path
    query_kernel = boxed["blocks"]["attention"]["query_kernel"]
    assert query_kernel.names == ("layers", "embed", "heads")
    assert not np.allclose(query_kernel.value[0], query_kernel.value[1])
    np.testing.assert_array_equal(output_head(boxed), output_head(nn.unbox(boxed)))
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert isinstance(leaf, nn.LogicallyPartitioned) and None not in leaf.names


def test_initial_parameters_and_loss_are_those_of_before() -> None:
    """Recorded before a decoder's parts could be chosen: checkpoints and seeds of then mean the same."""
    config = DecoderConfig(layers=3, hidden=16, heads=2, feedforward=24, vocabulary_size=23, length=12)
    tokens_BL = (jnp.arange(24).reshape(2, 12) * 7) % 23
    inputs = tokens_BL, jnp.tile(jnp.arange(12), (2, 1)), jnp.zeros((2, 12), jnp.int32)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), *inputs)["params"])
    shapes = {"/".join(key.key for key in path): leaf.shape
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert shapes == RECORDED_SHAPES
    found = [params["token_embedding"][3, 5], params["position_embedding"][2, 1], params["query_embedding"][11, 15],
             params["blocks"]["attention"]["value_kernel"][1, 2, 3],
             params["query_block"]["feedforward"]["down_kernel"][23, 0]]
    np.testing.assert_allclose(found, RECORDED_VALUES, rtol=1e-5)
    hidden_BLD = Decoder(config).apply({"params": params}, *inputs)
    loss = cross_entropy(hidden_BLD, output_head(params), tokens_BL, jnp.ones((2, 12)))[0]
    np.testing.assert_allclose(loss, RECORDED_LOSS, rtol=1e-6)


def test_a_head_of_its_own_makes_the_logits_and_learns() -> None:
    config = ARCHITECTURES["rotary query layer"]
    params, inputs = make_params(config), make_inputs(config)
    assert params["lm_head"].shape == (17, 12) and "position_embedding" not in params
    hidden_BLD = Decoder(config).apply({"params": params}, *inputs)
    np.testing.assert_allclose(compute_logits(config, params, inputs), hidden_BLD @ params["lm_head"].T, atol=1e-5)
    boxed = jax.eval_shape(Decoder(config).init, jax.random.key(0), *inputs)["params"]
    assert boxed["lm_head"].names == boxed["token_embedding"].names == ("vocab", "embed")

    def loss(params: Any) -> jax.Array:
        return cross_entropy(hidden_BLD, output_head(params), inputs[0], jnp.ones(inputs[0].shape))[0]

    gradients = jax.grad(loss)(params)
    assert gradients["lm_head"].any() and not gradients["token_embedding"].any()


def test_a_gated_mlp_by_hand() -> None:
    config = dataclasses.replace(TINY, activation="geglu", biases="feedforward")
    x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 12)), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(FeedForward(config).init, jax.random.key(0), x_BLD))["params"]
    rng = np.random.default_rng(1)
    p = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    gate_BLF, up_BLF = (x_BLD @ p[f"{name}_kernel"] + p[f"{name}_bias"] for name in ("gate", "up"))
    gate_BLF = gate_BLF * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate_BLF + 0.044715 * gate_BLF**3)))
    expected_BLD = (gate_BLF * up_BLF) @ p["down_kernel"] + p["down_bias"]
    np.testing.assert_allclose(FeedForward(config).apply({"params": p}, x_BLD), expected_BLD, atol=1e-4)


@pytest.mark.parametrize(("width", "widths"), [(40, (24,)), (24, (40,)), (24, (12, 6, 6)), (40, (12, 6, 6))],
                         ids=["long", "wide", "three", "three_long"])
def test_projections_have_the_gradients_of_products(width: int, widths: tuple[int, ...]) -> None:
    dice = np.random.default_rng(0)
    x_BLI = dice.normal(size=(2, 9, width)).astype(np.float32)
    kernels, upstream = ([dice.normal(size=(*sizes, one)).astype(np.float32) for one in widths]
                         for sizes in ((width,), (2, 9)))
    values, backward = jax.vjp(
        lambda x, kernels: _linear(x, [Projection(kernel, None) for kernel in kernels], "projected"), x_BLI, kernels)
    x_gradient, kernel_gradients = jax.jit(backward)(upstream)
    np.testing.assert_allclose(x_gradient, sum(g @ k.T for g, k in zip(upstream, kernels, strict=True)), atol=1e-4)
    for value, kernel, gradient, above in zip(values, kernels, kernel_gradients, upstream, strict=True):
        np.testing.assert_allclose(value, x_BLI @ kernel, atol=1e-4)
        np.testing.assert_allclose(gradient, np.einsum("BLI,BLO->IO", x_BLI, above), atol=1e-4)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("change", [
    {}, {"query_layer": False}, {"norm": "rms", "kv_heads": 1, "activation": "geglu", "biases": "none"},
    {"head_size": 7, "biases": "attention", "query_key_norm": "width", "kv_heads": 1, "tied_head": False},
    {"positions": "rotary", "biases": "query_key_value", "query_key_norm": "head", "query_layer": False},
    {"biases": "feedforward", "activation": "swiglu", "norm_place": "after", "residual": "parallel"}], ids=str)
def test_parameter_count_equals_the_real_one(layers: int, change: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, layers=layers, **change)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), *make_inputs(config))["params"]
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("layers", "hidden", "heads"), [(16, 2560, 32), (32, 2560, 32), (40, 5120, 40)])
def test_parameter_count_of_the_published_sizes(layers: int, hidden: int, heads: int) -> None:
    config = DecoderConfig(layers, hidden, heads, 4 * hidden, vocabulary_size=40_000, length=1024)
    by_hand = {
        # (V + 2 P) D       layers x (12 D^2 + 13 D)         2 D
        (16, 2560): 42_048 * 2560 + 16 * (78_643_200 + 33_280) + 5_120,
        (32, 2560): 42_048 * 2560 + 32 * (78_643_200 + 33_280) + 5_120,
        (40, 5120): 42_048 * 5120 + 40 * (314_572_800 + 66_560) + 10_240,
    }[layers, hidden]
    assert parameter_count(config) == by_hand
    assert by_hand == {16: 1_366_471_680, 32: 2_625_295_360, 40: 12_800_870_400}[layers]


def test_flops_per_token() -> None:
    """2.6B by hand: matmul parameters 32 x 12 D^2 + 40,000 D; attention 12 x 32 x 1024 x D."""
    config = DecoderConfig(32, 2560, 32, 10_240, vocabulary_size=40_000, length=1024)
    matmul = 6 * (2_516_582_400 + 102_400_000)
    assert flops_per_token(config, causal=False) == matmul + 1_006_632_960
    assert flops_per_token(config, causal=True) == matmul + 503_316_480


def scaled(scaling: dict[str, Any]) -> dict[str, Any]:
    return {"positions": "rotary", "rotary_scaling": scaling}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads must divide hidden, found 5 heads and hidden 12"),
        ({"layers": 0}, "layers must be at least 1, found 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), found 1.0"),
        ({"activation": "fastgelu"}, "activation 'fastgelu' is unknown: did you mean 'fast_gelu'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"attention": "references"}, "did you mean 'reference'"),
        ({"norm": "rmsnorm"}, "norm 'rmsnorm' is unknown: did you mean 'rms'"),
        ({"norm_place": "behind"}, "norm_place 'behind' is unknown"),
        ({"residual": "paralel"}, "did you mean 'parallel'"),
        ({"positions": "rope"}, "positions 'rope' is unknown"),
        ({"biases": "qkv"}, "biases 'qkv' is unknown"),
        ({"query_key_norm": "heads"}, "did you mean 'head'"),
        ({"kv_heads": 2}, "kv_heads must divide heads, found 2 and 3"),
        ({"kv_heads": 0}, "kv_heads must be at least 1, found 0"),
        ({"head_size": -1}, "head_size must be at least 1, found -1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be above 0"),
        ({"rotary_theta": 5e5}, "rotary_theta is set, but positions are 'learned': set positions = 'rotary'"),
        ({"positions": "rotary", "rotary_theta": 1.0}, "rotary_theta must be above 1"),
        ({"positions": "rotary", "rotary_part": 1.5}, "rotary_part must be above 0 and at most 1"),
        ({"positions": "rotary", "head_size": 5}, "heads of size 5 is 5 numbers, which must be even"),
        ({"positions": "rotary", "rotary_part": 0.2}, "is 0 numbers, which must be even and not 0"),
        (scaled({}), "'kind' of linear, llama3, yarn, found {}"),
        (scaled({"kind": ["linear"]}), "'kind' of linear, llama3, yarn"),
        (scaled({"kind": "dynamic"}), "found {'kind': 'dynamic'}"),
        (scaled({"kind": "linear"}), "of kind 'linear' needs 'factor'"),
        (scaled({"kind": "yarn", "factor": 2.0}), "needs 'original_length'"),
        (scaled({"kind": "linear", "factor": 2.0, "fast": 3}), "of kind 'linear' has no 'fast': did you mean 'factor'"),
        (scaled({"kind": "linear", "factor": 0.5}), "factor must be a number from 1, found 0.5"),
        (scaled({"kind": "linear", "factor": "2"}), "factor must be a number from 1, found '2'"),
        (scaled({"kind": "yarn", "factor": 2, "original_length": 0}), "original_length must be a positive number"),
        (scaled({"kind": "llama3", "factor": 2, "original_length": 8, "slow": 4}), "slow must be below fast, found 4"),
    ],
)
def test_errors_say_what_was_found(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(caught.value)


def test_rows_too_long_are_refused() -> None:
    inputs = [jnp.zeros((1, TINY.length + 1), jnp.int32)] * 3
    with pytest.raises(ValueError, match="at most 11 tokens, found 12"):
        Decoder(TINY).apply({"params": make_params(TINY)}, *inputs)
    variables = {"params": make_params(TINY), "cache": init_cache(TINY, 1, length=2)}
    with pytest.raises(ValueError, match="2 slots, found 3 tokens"):
        Decoder(TINY).apply(variables, *(a[:, :3] for a in inputs), decode=True, mutable=["cache"])
