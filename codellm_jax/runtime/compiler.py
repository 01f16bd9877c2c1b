"""Options for XLA, by platform."""

from jax.sharding import Mesh

from codellm_jax.model.decoder import DecoderConfig

FUSION = "xla_tpu_enable_async_collective_fusion"
# Collectives beside computation, by the kind of device. On v4 XLA gathers while it multiplies; with multiple_steps and
# overlap_compute_collective_tc as well, the compilation of this step does not end in an hour. On v5e gathers are
# asynchronous by default, and here also the sums of gradients, each by itself: XLA would combine those of attention's
# four kernels into one at the end of the layer, where nothing is left to compute. There, fusions also get twice the
# default of 16 of 128 MiB fast memory. docs/precompile.md has the estimated effect.
_V4: dict[str, bool | int] = {
    "xla_enable_async_all_gather": True, FUSION: True, f"{FUSION}_fuse_all_gather": True}
_V5E: dict[str, bool | int] = {
    "xla_enable_async_all_reduce": True, FUSION: True, f"{FUSION}_fuse_all_reduce": True,
    f"{FUSION}_multiple_steps": True, "xla_tpu_overlap_compute_collective_tc": True,
    "xla_jf_crs_combiner_threshold_in_bytes": 1_000_000, "xla_tpu_scoped_vmem_limit_kib": 32_768}
OVERLAP: dict[str, dict[str, bool | int]] = {"TPU v4": _V4, "TPU v5 lite": _V5E, "TPU v5e": _V5E}


def compiler_options(mesh: Mesh, config: DecoderConfig) -> dict[str, bool | int]:
    """Options of `jax.jit` for a train step or an evaluation.

    On TPU, XLA would otherwise cast the parameters of all layers to bfloat16 before the loop over them, and keep
    both: 1.2 GiB per chip for 2.6B on 4 chips. For OVERLAP, see there.

    On GPU, it would add in thread order, and choose the matmuls that were fastest in a trial: the same run would give
    different losses each time.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        return {"xla_jf_bf16_propagation": False} | OVERLAP.get(mesh.devices.flat[0].device_kind, {})
    if platform == "gpu" and is_deterministic(mesh, config):
        return {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    return {}


def is_deterministic(mesh: Mesh, config: DecoderConfig) -> bool:
    """Whether the same run gives the same losses each time.

    On GPU not if layers are unrolled (`scan_unroll`) with JAX's calls of cuDNN, of which XLA confuses equal ones; see
    `attention.fused_attention` and `cudnn.py`.
    """
    return mesh.devices.flat[0].platform != "gpu" or config.scan_unroll == 1 or config.attention == "cudnn"
