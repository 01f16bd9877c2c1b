"""Options for XLA, by platform."""

from jax.sharding import Mesh

from codellm_jax.model.decoder import DecoderConfig


def compiler_options(mesh: Mesh, config: DecoderConfig) -> dict[str, bool]:
    """Options of `jax.jit` for a train step or an evaluation.

    On TPU, XLA would otherwise cast the parameters of all layers to bfloat16 before the loop over them, and keep
    both: 1.2 GiB per chip for 2.6B on 4 chips.

    On GPU, it would add in thread order, and choose the matmuls that were fastest in a trial: the same run would give
    different losses each time.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and is_deterministic(mesh, config):
        return {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    return {"xla_jf_bf16_propagation": False} if platform == "tpu" else {}


def is_deterministic(mesh: Mesh, config: DecoderConfig) -> bool:
    """Whether the same run gives the same losses each time.

    On GPU not if layers are unrolled (`scan_unroll`): that needs identical cuDNN calls, which XLA cannot compile; see
    `attention.fused_attention`.
    """
    return mesh.devices.flat[0].platform != "gpu" or config.scan_unroll == 1
