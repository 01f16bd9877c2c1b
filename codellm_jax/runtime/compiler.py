"""What XLA is told besides, by the platform it compiles for."""

from jax.sharding import Mesh

from codellm_jax.model.decoder import DecoderConfig


def compiler_options(mesh: Mesh, config: DecoderConfig) -> dict[str, bool]:
    """Options of `jax.jit` for a train step or an evaluation.

    On TPU XLA would else cast the parameters of all layers to bfloat16 ahead of the loop over them, and keep both:
    1.2 GiB a chip in 2.6B on 4 chips.

    On GPU it would add in whatever order threads come, and take the matmuls that were the fastest when it tried them:
    the same run would give other losses each time.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and is_deterministic(mesh, config):
        return {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    return {"xla_jf_bf16_propagation": False} if platform == "tpu" else {}


def is_deterministic(mesh: Mesh, config: DecoderConfig) -> bool:
    """Whether the same run gives the same losses each time.

    On GPU not where layers are out of their loop (`scan_unroll`): its calls of cuDNN would be alike, which XLA cannot
    do; see `attention.fused_attention`.
    """
    return mesh.devices.flat[0].platform != "gpu" or config.scan_unroll == 1
