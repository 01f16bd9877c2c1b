"""Rotary positions: queries and keys are turned by angles that grow with the position, the same in every layer.

Halves are rotated, not pairs: the number at i of the rotated part goes with the one half of the part behind it. Shape
suffixes are explained at the top of `decoder.py`; R is half of the rotated part of a head.
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

# Scaling -> what it must be told beside its factor, and what it may be told.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "llama3": (("original_length",), ("slow", "fast")),
    "yarn": (("original_length",), ("slow", "fast", "attention_factor")),
}
FAST = {"linear": 0.0, "llama3": 4.0, "yarn": 32.0}


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How a model's frequencies are stretched beyond the length that it was first trained on.

    Attributes:
      kind: a key of SCALINGS. "linear" divides all frequencies by the factor. "llama3" and "yarn" leave those alone
        that turn `fast` times and more within the original length, divide those by the factor that turn `slow` times
        and fewer, and pass from one to the other in between: "llama3" evenly by turns, "yarn" by place in the head.
      factor: at least 1.
      original_length: positions of the first training.
      slow, fast: turns within the original length; defaults 1 and 4 ("llama3"), 1 and 32 ("yarn").
      attention_factor: that "yarn" multiplies queries and keys by; default 0.1 log(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int = 0
    slow: float = 1.0
    fast: float = 0.0
    attention_factor: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "RotaryScaling":
        """Reads what a gin file says, such as {'kind': 'linear', 'factor': 2.0}.

        Raises:
          ValueError: in one line; the kind or a name is unknown, a number is missing, or it is out of its range.
        """
        kind = settings.get("kind")
        if kind not in list(SCALINGS):  # a list, for what cannot be hashed
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
    """Radians that each pair of numbers turns by from one position to the next, float32 [size / 2], fastest first.

    Args:
      size: of the rotated part of a head, even.
      theta: the slowest turns by about 1 / theta.
      scaling: None for theta alone.
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
        # The places, as fractions of pairs, where a pair turns fast and slow times within the original length.
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

    # A loop: layers that have none around them would else compute them again for each of their heads, as XLA on CPU
    # fuses them into what they are multiplied with, through any barrier.
    cosine_BL1R, sine_BL1R = jax.lax.map(one, jnp.array([True, False]))
    return cosine_BL1R, sine_BL1R


def rotate(x_BLHK: jax.Array, turns: Rotation) -> jax.Array:
    """Turns the first 2 R numbers of each head, in float32, and leaves the rest; the dtype stays."""
    cosine_BL1R, sine_BL1R = turns
    half = cosine_BL1R.shape[-1]
    first, second, rest = x_BLHK[..., :half], x_BLHK[..., half : 2 * half], x_BLHK[..., 2 * half :]
    turned = first * cosine_BL1R - second * sine_BL1R, second * cosine_BL1R + first * sine_BL1R
    return jnp.concatenate([*(part.astype(x_BLHK.dtype) for part in turned), rest], axis=-1)
