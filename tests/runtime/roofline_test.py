"""A bound on a step's time, by hand."""

import dataclasses

import pytest

from codellm_jax.model.decoder import DecoderConfig, flops_per_token
from codellm_jax.runtime.collectives import Traffic
from codellm_jax.runtime.roofline import recomputed_flops_per_token, roofline
from codellm_jax.runtime.topologies import parse_topology

CONFIG = DecoderConfig(layers=2, hidden=8, heads=2, feedforward=32, vocabulary_size=100, length=16, remat="none")


def test_each_part_by_hand():
    topology = parse_topology("2xv5e-4")
    traffic = [Traffic("all-reduce", ("data",), 1, 200e9), Traffic("all-reduce", ("slices",), 1, 6.2e9)]
    found = roofline(CONFIG, 8_000_000, topology, "TPU v5 lite", 8, 819e9, 0.0, traffic)
    # 6 (2 (4 64 + 2 8 32) + 800) + 6 2 16 8 = 15,552 FLOPs a token
    assert found.computing == pytest.approx(15_552 * 1_000_000 / 197e12)
    assert (found.memory, found.links, found.network) == pytest.approx((2.0, 1.0, 2.0))
    assert found.overlapped == pytest.approx(2.0) and found.in_turn == pytest.approx(5.0 + found.computing)
    assert found.utilization == pytest.approx(found.computing / 2.0)


def test_what_is_computed_again():
    """Under "full" the blocks' forward pass, a third of what they cost; the logits are not in a block."""
    full = dataclasses.replace(CONFIG, remat="full")
    logits = 6 * 100 * 8
    assert recomputed_flops_per_token(full) == pytest.approx((flops_per_token(full, causal=True) - logits) / 3)
    assert recomputed_flops_per_token(dataclasses.replace(CONFIG, remat="dots")) == 16 * 8 * 2
    assert recomputed_flops_per_token(CONFIG) == 0
