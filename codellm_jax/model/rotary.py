"""Rotary positions: rotates queries and keys by angles that grow with the position, the same in every layer.

The rotation pairs the two halves of the rotated part: number i of the first half goes with number i of the second.
Shape suffixes are explained at the top of `decoder.py`; R is half of the rotated part of a head.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codellm_jax.model.attention import platform

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [B, L, 1, R]

# Scaling -> its required settings besides the factor, and its optional settings.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "llama3": (("original_length",), ("slow", "fast")),
    "yarn": (("original_length",), ("slow", "fast", "attention_factor")),
}
FAST = {"linear": 0.0, "llama3": 4.0, "yarn": 32.0}


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """The scaling of a model's frequencies beyond the length of its first training.

    Attributes:
      kind: a key of SCALINGS. "linear" divides all frequencies by the factor. "llama3" and "yarn" keep frequencies that
        turn at least `fast` times within the original length, divide those that turn at most `slow` times by the
        factor, and interpolate in between: "llama3" linearly in turns, "yarn" linearly in the index of the pair.
      factor: at least 1.
      original_length: positions in the first training.
      slow, fast: turns within the original length; defaults 1 and 4 ("llama3"), 1 and 32 ("yarn").
      attention_factor: the factor by which "yarn" multiplies queries and keys; default 0.1 log(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int = 0
    slow: float = 1.0
    fast: float = 0.0
    attention_factor: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "RotaryScaling":
        """Reads the value of a setting, such as {'kind': 'linear', 'factor': 2.0}.

        Raises:
          ValueError: with a one-line message; the kind or a name is unknown, a number is missing, or it is out of
            range.
        """
        kind = settings.get("kind")
        if kind not in list(SCALINGS):  # a list, for values that are not hashable
            raise ValueError(f"rotary_scaling must have a 'kind' of {', '.join(SCALINGS)}, found {dict(settings)!r}.")
        needed, further = SCALINGS[kind]
        known = ("kind", "factor", *needed, *further)
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
                raise ValueError(f"rotary_scaling of kind {kind!r} has no {name!r}: did you mean {near!r}? "
                                 f"Known: {', '.join(known)}.")
        for name in ("factor", *needed):
            if name not in settings:
                raise ValueError(f"rotary_scaling of kind {kind!r} needs {name!r}, found {dict(settings)!r}.")
        for name, value in settings.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if name != "kind" and not (number and value > 0 and (name != "factor" or value >= 1)):
                least = "a number from 1" if name == "factor" else "a positive number"
                raise ValueError(f"rotary_scaling's {name} must be {least}, found {value!r}.")
        slow, fast = settings.get("slow", 1.0), settings.get("fast", FAST[kind])
        if kind != "linear" and slow >= fast:
            raise ValueError(f"rotary_scaling's slow must be below fast, found {slow!r} and {fast!r}.")
        attention = settings.get("attention_factor", 0.1 * math.log(settings["factor"]) + 1 if kind == "yarn" else 1.0)
        return cls(kind, settings["factor"], settings.get("original_length", 0), slow, fast, attention)


def frequencies(size: int, theta: float, scaling: RotaryScaling | None) -> np.ndarray:
    """The rotation in radians of each pair of numbers per position, float32 [size / 2], fastest first.

    Args:
      size: of the rotated part of a head, even.
      theta: the slowest pair rotates by about 1 / theta.
      scaling: None for no scaling.
    """
    own_R = theta ** -(np.arange(0, size, 2) / size)
    if scaling is None:
        return own_R.astype(np.float32)
    if scaling.kind == "linear":
        kept_R: Any = 0.0
    elif scaling.kind == "llama3":
        turns_R = scaling.original_length * own_R / (2 * math.pi)
        kept_R = np.clip((turns_R - scaling.slow) / (scaling.fast - scaling.slow), 0, 1)
    else:
        # The indices, as fractional pairs, at which a pair turns fast and slow times within the original length.
        first, last = (size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                       for turns in (scaling.fast, scaling.slow))
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        kept_R = 1 - np.clip((np.arange(size // 2) - first) / (last - first if last != first else 0.001), 0, 1)
    return (own_R * (kept_R + (1 - kept_R) / scaling.factor)).astype(np.float32)


def rotation(positions_BL: jax.Array, size: int, theta: float, scaling: RotaryScaling | None) -> Rotation:
    """Cosines and sines of each position's angles; arguments as for `frequencies`."""
    angles_BL1R = positions_BL[:, :, None, None] * frequencies(size, theta, scaling)
    factor = 1.0 if scaling is None else scaling.attention_factor
    if platform() != "cpu":
        return jnp.cos(angles_BL1R) * factor, jnp.sin(angles_BL1R) * factor

    def one(is_cosine: jax.Array) -> jax.Array:
        return jnp.where(is_cosine, jnp.cos(angles_BL1R), jnp.sin(angles_BL1R)) * factor

    # A loop, because XLA on CPU fuses the angles into the multiplications through any barrier, so layers outside of a
    # loop would recompute them for each head.
    cosine_BL1R, sine_BL1R = jax.lax.map(one, jnp.array([True, False]))
    return cosine_BL1R, sine_BL1R


def rotate(x_BLHK: jax.Array, turns: Rotation) -> jax.Array:
    """Rotates the first 2 R numbers of each head, in float32, and leaves the rest; the dtype is unchanged."""
    cosine_BL1R, sine_BL1R = turns
    half = cosine_BL1R.shape[-1]
    first, second, rest = x_BLHK[..., :half], x_BLHK[..., half : 2 * half], x_BLHK[..., 2 * half :]
    turned = first * cosine_BL1R - second * sine_BL1R, second * cosine_BL1R + first * sine_BL1R
    return jnp.concatenate([*(part.astype(x_BLHK.dtype) for part in turned), rest], axis=-1)
