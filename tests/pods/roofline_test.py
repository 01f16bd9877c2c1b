"""A bound on a step's time, by hand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from codellm_jax.model.config import REMAT_POLICIES
from codellm_jax.model.decoder import Decoder, DecoderConfig, flops_per_token
from codellm_jax.pods.collectives import Part, Traffic
from codellm_jax.pods.roofline import estimate, recomputed_flops_per_token, roofline
from codellm_jax.pods.topologies import parse_topology
from codellm_jax.runtime.progress import PEAK_FLOPS

CONFIG = DecoderConfig(layers=2, hidden=8, heads=2, feedforward=32, vocabulary_size=100, length=16, remat="none")


def test_each_part_by_hand():
    topology = parse_topology("2xv5e-4")
    traffic = [Traffic("all-reduce", ("data",), 1, 200e9), Traffic("all-reduce", ("slices",), 1, 6.2e9)]
    found = roofline(CONFIG, 8_000_000, topology, "TPU v5 lite", 8, 819e9, 0.0, traffic)
    # 6 (2 (4 64 + 2 8 32) + 800) + 6 2 16 8 = 15,552 FLOPs a token, and 2 16 8 for scores made again
    assert found.computing == pytest.approx((15_552 + 256) * 1_000_000 / 197e12)
    assert (found.memory, found.links, found.network) == pytest.approx((2.0, 1.0, 2.0))
    assert found.overlapped == pytest.approx(2.0) and found.in_turn == pytest.approx(5.0 + found.computing)
    assert found.utilization == pytest.approx(15_552 * 1_000_000 / 197e12 / 2.0)


def test_an_estimate_by_hand():
    """A v5e has 1.5e9 cycles, 200e9 bytes of links and 3.1e9 of network a second."""
    parts = [Part(1, 3e9, 20e9, 100e9, 0.0), Part(4, 1.5e9, 40e9, 300e9, 9.3e9)]
    found = estimate(CONFIG, 8_000_000, parse_topology("2xv5e-4"), "TPU v5 lite", 8, parts, has_kernels=True)
    assert found.computing == pytest.approx(2.0 + 4 * 1.0)
    # 7 2 16 8 FLOPs a token, heads of 4 padded to 128, at half the peak
    assert found.attention == pytest.approx(7 * 2 * 16 * 8 * 32 * 1_000_000 / 197e12 * 2)
    assert found.waiting == pytest.approx(0.1 + 4 * 0.2)
    assert found.uncovered == pytest.approx(4 * (3.0 - 1.0))  # of the network; the links take half a second
    assert found.step == pytest.approx(found.computing + found.attention + 0.9 + 8.0)
    assert found.utilization == pytest.approx(15_552 * 1_000_000 / 197e12 / found.step)
    again = dataclasses.replace(CONFIG, remat="full")
    twice = estimate(again, 8_000_000, parse_topology("2xv5e-4"), "TPU v5 lite", 8, parts, has_kernels=True)
    assert twice.attention == pytest.approx(found.attention * 9 / 7)
    without = estimate(CONFIG, 8_000_000, parse_topology("2xv5e-4"), "TPU v5 lite", 8, parts, has_kernels=False)
    assert without.attention == 0.0


@pytest.mark.parametrize(("name", "kind", "a_cycle"), [
    ("v2-8", "TPU v2", 2 * 128**2), ("v3-8", "TPU v3", 2 * 2 * 128**2), ("v4-8", "TPU v4", 2 * 8 * 128**2),
    ("v5e-4", "TPU v5 lite", 2 * 4 * 128**2), ("v5p-8", "TPU v5", 2 * 8 * 128**2)])
def test_clocks_give_the_peaks(name, kind, a_cycle):
    """Matrix units of 128 x 128: one of a core in v2, two in v3, four from v4 on, where a device has two cores but for
    v5e."""
    assert parse_topology(name).chip.clock * a_cycle == pytest.approx(PEAK_FLOPS[kind], rel=0.03)


PARTS = [
    {"query_layer": False}, {"query_layer": True},
    {"kv_heads": 1, "head_size": 6, "positions": "rotary", "activation": "swiglu", "biases": "none", "norm": "rms",
     "tied_head": False},
    {"norm_place": "after", "query_key_norm": "width", "kv_heads": 1},
    {"residual": "parallel", "query_layer": False, "activation": "geglu"},
    {"residual": "parallel", "norm_place": "after", "query_key_norm": "head"},
]


def matmul_flops(jaxpr: Any, times: int = 1, with_attention: bool = False) -> int:
    """FLOPs of all matmuls, those with batch axes (attention's) if asked for, loops turned as often as they do."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            if with_attention or not batched:
                total += 2 * times * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        turns = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        total += sum(matmul_flops(inner, turns, with_attention) for inner in jaxprs_in_params(equation.params))
    return total


def traced_gradient(config: DecoderConfig) -> tuple[Any, int]:
    """The traced gradient of a decoder, without its logits, and the tokens that go in."""
    ids = jnp.zeros((3, config.length), jnp.int32)
    model = Decoder(config)
    params = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids)["params"]
    gradient = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, ids, ids, ids) ** 2))
    return jax.make_jaxpr(gradient)(params).jaxpr, ids.size


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_model_flops_are_those_of_the_program(parts):
    """The whole square of attention counted, nothing computed again, and the logits by hand."""
    config = dataclasses.replace(CONFIG, layers=3, attention="reference", **parts)
    jaxpr, tokens = traced_gradient(config)
    assert flops_per_token(config, causal=False) == matmul_flops(jaxpr, with_attention=True) / tokens + 6 * 100 * 8


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_what_is_computed_again_is_what_the_programs_say(parts):
    """Counted in the traced gradient of the decoder, beside the one that keeps all."""
    counted, said = {}, {}
    for remat in REMAT_POLICIES:
        config = dataclasses.replace(CONFIG, layers=3, remat=remat, **parts)
        jaxpr, tokens = traced_gradient(config)
        counted[remat] = matmul_flops(jaxpr) / tokens
        attention = 3 * 16 * 2 * config.size_of_head * (3 if remat in ("full", "offload") else 1)
        said[remat] = recomputed_flops_per_token(config) - attention
    assert said == {remat: flops - counted["none"] for remat, flops in counted.items()}
    assert said["none"] == said["dots"] == 0 < said["attention"] < said["full"] == said["offload"]
    if parts in PARTS[:2]:
        assert said["full"] == 3 * 2 * (4 * 64 + 8 * 32)
