"""The optimizer and its learning rate.

An optimizer is a function from a learning-rate schedule to an `optax.GradientTransformation`, so that the rate can be
recorded beside the loss. A schedule is a pure function of the step, counted from 0: step s is trained at schedule(s).
All schedules rise linearly from 0 to the peak at step `warmup_steps` and differ only afterwards. `train_steps` are
those of the whole run. With `begin_step` they start there, as if it were step 0: a branch that warms up again sets it
to %BRANCH_STEP.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], Any]  # step -> learning rate, float32

# Shape of a decay -> remaining fraction of the way from peak to final rate, at each fraction of the decay.
DECAYS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda part: 1 - part,
    "one_minus_sqrt": lambda part: 1 - jnp.sqrt(part),  # arXiv:2405.18392, section 4
    "cosine": lambda part: (1 + jnp.cos(jnp.pi * part)) / 2,
}


def warmup_cosine(
    peak: float, final: float, warmup_steps: int, decay_steps: int, begin_step: int = 0
) -> Schedule:
    """After the warm-up, half a cosine to `final` at `decay_steps` (Table 9).

    Args:
      peak: the learning rate at the end of the warm-up.
      final: the learning rate at the end of the decay.
      warmup_steps: steps of the warm-up.
      decay_steps: the step at which the decay ends.
      begin_step: the step at which the schedule begins, as if it were step 0; %BRANCH_STEP for a branch.

    Raises:
      ValueError: in one line; a number is out of range.
    """
    steps = decay_steps - begin_step
    _require(peak, final, warmup_steps, steps)
    return _begun(begin_step, optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, steps, final))


def warmup_linear(
    peak: float, final: float, warmup_steps: int, train_steps: int, begin_step: int = 0
) -> Schedule:
    """After the warm-up, a linear decay to `final`, often 0, at the end of the run.

    Args:
      peak: the learning rate at the end of the warm-up.
      final: the learning rate at the end of the run.
      warmup_steps: steps of the warm-up.
      train_steps: steps of the run.
      begin_step: the step at which the schedule begins, as if it were step 0; %BRANCH_STEP for a branch.

    Raises:
      ValueError: in one line; a number is out of range.
    """
    decay_steps = train_steps - begin_step - warmup_steps
    return warmup_stable_decay(peak, final, warmup_steps, train_steps, decay_steps, begin_step=begin_step)


def warmup_stable_decay(
    peak: float, final: float, warmup_steps: int, train_steps: int, decay_steps: int | float = 0.1,
    decay: str = "linear", begin_step: int = 0,
) -> Schedule:
    """After the warm-up, the peak, and at the end of the run a decay to `final` (arXiv:2404.06395, arXiv:2405.18392).

    Args:
      peak: the learning rate between warm-up and decay.
      final: the learning rate at the end of the run.
      warmup_steps: steps of the warm-up.
      train_steps: steps of the run.
      decay_steps: length of the decay, which ends with the run: a whole number of steps, or a fraction of the run, such
        as 0.1.
      decay: shape of the decay: "linear", "one_minus_sqrt" or "cosine".
      begin_step: the step at which the schedule begins, as if it were step 0; %BRANCH_STEP for a branch. A
        fraction counts all steps of the run.

    Raises:
      ValueError: in one line; a number is out of range, or the shape is unknown.
    """
    steps = train_steps - begin_step
    _require(peak, final, warmup_steps, steps)
    length = round(decay_steps * train_steps) if isinstance(decay_steps, float) else decay_steps
    if isinstance(decay_steps, float) and not 0 <= decay_steps <= 1:
        raise ValueError(f"warmup_stable_decay.decay_steps = {decay_steps} must be a whole number of steps, or a "
                         "fraction of the run from 0.0 to 1.0.")
    if not 0 <= length <= steps - warmup_steps:
        raise ValueError(f"warmup_stable_decay.decay_steps = {decay_steps} must be at least 0 and at most the "
                         f"{steps - warmup_steps} steps of the run after the warm-up.")
    if decay not in DECAYS:
        raise ValueError(f"warmup_stable_decay.decay must be one of {', '.join(DECAYS)}, found {decay!r}.")

    def after(step: Any) -> Any:
        part = jnp.clip((step - (steps - length)) / max(1, length), 0.0, 1.0)
        return final + (peak - final) * DECAYS[decay](part)

    return _begun(begin_step, _warmed_up(peak, warmup_steps, after))


def inverse_square_root(peak: float, warmup_steps: int, begin_step: int = 0) -> Schedule:
    """After the warm-up, `peak` times the square root of warmup_steps / step (T5X's default), independent of the run's
    length.

    Args:
      peak: the learning rate at the end of the warm-up.
      warmup_steps: steps of the warm-up, at least 1.
      begin_step: the step at which the schedule begins, as if it were step 0; %BRANCH_STEP for a branch.

    Raises:
      ValueError: in one line; a number is out of range.
    """
    if warmup_steps < 1:
        raise ValueError(f"WARMUP_STEPS = {warmup_steps} must be at least 1, because the rate decays with its square "
                         "root.")
    _require(peak, 0.0, warmup_steps, warmup_steps + 1)
    return _begun(begin_step, _warmed_up(
        peak, warmup_steps, lambda step: peak * jnp.sqrt(warmup_steps / jnp.maximum(step, 1))))


def warmup_constant(peak: float, warmup_steps: int, begin_step: int = 0) -> Schedule:
    """After the warm-up, the peak.

    Args:
      peak: the learning rate from the end of the warm-up on.
      warmup_steps: steps of the warm-up.
      begin_step: the step at which the schedule begins, as if it were step 0; %BRANCH_STEP for a branch.

    Raises:
      ValueError: in one line; a number is out of range.
    """
    _require(peak, 0.0, warmup_steps, warmup_steps + 1)
    return _begun(begin_step, _warmed_up(peak, warmup_steps, lambda step: jnp.float32(peak)))


def _begun(step: int, schedule: Schedule) -> Schedule:
    """A schedule whose step 0 is `step`."""
    return (lambda at: schedule(at - step)) if step else schedule


def _warmed_up(peak: float, warmup_steps: int, after: Schedule) -> Schedule:
    return lambda step: jnp.float32(jnp.where(step < warmup_steps, peak * step / max(1, warmup_steps), after(step)))


def _require(peak: float, final: float, warmup_steps: int, train_steps: int) -> None:
    """Raises ValueError if a rate or a number of steps is out of range."""
    if train_steps < 1:
        raise ValueError(f"TRAIN_STEPS must be a whole number of at least 1, found {train_steps}.")
    if not 0 <= warmup_steps < train_steps:
        raise ValueError(
            f"WARMUP_STEPS = {warmup_steps} must be at least 0 and below the {train_steps} steps of the whole run: "
            "lower it or raise TRAIN_STEPS.")
    if not 0 <= final <= peak:
        raise ValueError(f"LEARNING_RATE = {peak} must be at least FINAL_LEARNING_RATE = {final}, which must be at "
                         "least 0.")


def decayed(params: Any) -> Any:
    """True for the parameters to which weight decay applies: all except biases and LayerNorm's scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(str(getattr(key, "key", key)).endswith(("bias", "scale")) for key in path), params)


def adamw(
    learning_rate: Schedule, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1,
    clip_norm: float | None = 1.0, mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """The study's optimizer: Adam with decoupled weight decay after clipping to a global norm.

    Args:
      learning_rate: the schedule, from `train.learning_rate`.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      weight_decay: of all parameters except biases and the scales of norms.
      clip_norm: global norm to which gradients are clipped; None for no clipping.
      mu_dtype: of the first moment, "float32" or "bfloat16"; the latter saves a sixth of the state's 12 bytes
        per parameter.
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
    """Any optax transformations in order, then multiplication by minus the learning rate.

    Args:
      learning_rate: the schedule, from `train.learning_rate`.
      transformations: optax's, such as @optax.clip_by_global_norm() and @optax.scale_by_lion().
    """
    return optax.chain(*transformations, optax.scale_by_learning_rate(learning_rate))
