"""What a plan tells of a run's memory, by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.optimization import adamw
from codellm_jax.runtime.partitioning import MeshShape, make_mesh
from codellm_jax.runtime.state import abstract_state
from codellm_jax.training.plan import memory_parts

PANGU = DecoderConfig(layers=3, hidden=32, heads=4, feedforward=64, vocabulary_size=128, length=16)
GROUPED = dataclasses.replace(PANGU, kv_heads=2, head_size=16, activation="swiglu", biases="none", tied_head=False)


@pytest.mark.parametrize(("config", "remat", "kept"), [
    (PANGU, "full", 32), (PANGU, "attention", 32 + 4 * 32 / 2), (PANGU, "dots", 32 + 2 * 32 + (4 * 32 + 64) / 2),
    # Two widths of 4 heads of 16, two of 2; two outputs of the MLP's first matmuls.
    (GROUPED, "attention", 32 + (2 * 64 + 2 * 32) / 2),
    (GROUPED, "dots", 32 + 2 * 32 + (2 * 64 + 2 * 32 + 2 * 64) / 2),
    (GROUPED, "none", 4 * 32 + 2 * (2 * 32 + (2 * 64 + 2 * 32 + 2 * 64) / 2) + 4 / 2 * 16)])
def test_activations_are_those_that_blocks_keep(config: DecoderConfig, remat: str, kept: float) -> None:
    shape = MeshShape(data=2, fsdp=2, model=2)
    mesh, model = make_mesh(shape), Decoder(dataclasses.replace(config, remat=remat))
    state = abstract_state(model, adamw(lambda step: 1e-3), mesh, shape)
    training: Any = SimpleNamespace(microbatches=1, mixture=SimpleNamespace(length=16))
    plan: Any = SimpleNamespace(model=model, mesh=mesh, rows=8, state=state)
    parts = memory_parts(training, plan)
    assert parts["activations about"] == 3 * 2 * 16 * 4 * kept  # layers, rows of a device, their tokens, bytes
    assert parts["gradients"] > 0 and parts["state"] > 3 * parts["gradients"]
