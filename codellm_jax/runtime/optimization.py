"""The optimizer and its learning rate, as optax builds them.

An optimizer is a function from a learning-rate schedule to an `optax.GradientTransformation`, so that the rate can be
recorded beside the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

Schedule = Callable[[Any], Any]  # step -> learning rate


def warmup_cosine(peak: float, final: float, warmup_steps: int, decay_steps: int) -> Schedule:
    """Linear from 0 to `peak` over `warmup_steps`, then half a cosine to `final` at `decay_steps` (Table 9)."""
    if decay_steps < 1:
        raise ValueError(f"TRAIN_STEPS must be a whole number from 1, found {decay_steps}.")
    if not 0 <= warmup_steps < decay_steps:
        raise ValueError(
            f"WARMUP_STEPS = {warmup_steps} must be at least 0 and below the {decay_steps} steps of the whole run: "
            "lower it or raise TRAIN_STEPS.")
    if not 0 <= final <= peak:
        raise ValueError(f"LEARNING_RATE = {peak} must be at least FINAL_LEARNING_RATE = {final}, and that at least 0.")
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else peak, peak, warmup_steps, decay_steps, final)


def decayed(params: Any) -> Any:
    """True for the parameters that weight decay applies to: all but biases and LayerNorm's scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(str(getattr(key, "key", key)).endswith(("bias", "scale")) for key in path), params)


def adamw(
    learning_rate: Schedule, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
    clip_norm: float | None = 1.0, mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """The study's optimizer: Adam with decoupled weight decay after clipping to a global norm (None: no clipping).

    The first moment may be kept in bfloat16 (`mu_dtype`), which saves a sixth of the state's 12 bytes a parameter.
    """
    if mu_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"adamw.mu_dtype must be float32 or bfloat16, found {mu_dtype!r}.")
    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed,
                    mu_dtype=mu_dtype),
    )


def chain(
    learning_rate: Schedule, transformations: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Any optax transformations in order, then a step of minus the learning rate."""
    return optax.chain(*transformations, optax.scale_by_learning_rate(learning_rate))
