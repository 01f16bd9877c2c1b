"""What XLA is told besides."""

import types
from typing import Any

import numpy as np
import pytest

from codellm_jax.model.decoder import DecoderConfig
from codellm_jax.runtime.compiler import compiler_options, is_deterministic

ONE_ORDER = {"xla_gpu_deterministic_ops", "xla_gpu_enable_triton_gemm"}


@pytest.mark.parametrize(("platform", "scan_unroll", "attention", "options", "deterministic"), [
    ("cpu", 1, "auto", set(), True), ("cpu", 2, "auto", set(), True),
    ("tpu", 2, "auto", {"xla_jf_bf16_propagation"}, True), ("gpu", 1, "auto", ONE_ORDER, True),
    ("gpu", 2, "auto", set(), False), ("gpu", 2, "cudnn", ONE_ORDER, True)])
def test_a_gpu_adds_in_one_order_unless_layers_are_out_of_their_loop(
    platform: str, scan_unroll: int, attention: str, options: set[str], deterministic: bool
) -> None:
    device = types.SimpleNamespace(platform=platform, device_kind="TPU v3")
    mesh: Any = types.SimpleNamespace(devices=np.array([device], object))
    config = DecoderConfig(layers=3, hidden=8, heads=2, feedforward=8, vocabulary_size=16, length=4,
                           scan_unroll=scan_unroll, attention=attention)
    assert set(compiler_options(mesh, config)) == options
    assert is_deterministic(mesh, config) == deterministic


@pytest.mark.parametrize(("kind", "overlapped"), [
    ("TPU v4", {"all_gather"}), ("TPU v5 lite", {"all_reduce"}), ("TPU v5e", {"all_reduce"}), ("TPU v5p", set()),
    ("TPU v3", set())])
def test_collectives_that_run_beside_computation_by_kind_of_tpu(kind: str, overlapped: set[str]) -> None:
    device = types.SimpleNamespace(platform="tpu", device_kind=kind)
    mesh: Any = types.SimpleNamespace(devices=np.array([device], object))
    config = DecoderConfig(layers=1, hidden=8, heads=2, feedforward=8, vocabulary_size=16, length=4)
    options = compiler_options(mesh, config)
    assert options["xla_jf_bf16_propagation"] is False
    assert {name for name in ("all_gather", "all_reduce") if options.get(f"xla_enable_async_{name}")} == overlapped
