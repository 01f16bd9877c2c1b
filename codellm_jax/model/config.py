"""The configuration of a decoder: sizes, and a choice for each part. A family of models is a set of values.

The defaults are PanGu-alpha's. Llama's, for one, are norm='rms', norm_epsilon=1e-5, positions='rotary',
activation='swiglu', biases='none', tied_head=False and query_layer=False, with kv_heads from its sizes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from codellm_jax.model.attention import NAMES, attended_saveable, check_name
from codellm_jax.model.rotary import RotaryScaling

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # the tanh form, as in GPT-2
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "fast_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}
GATED = ("swiglu", "geglu")  # the activation of one projection is multiplied with another

# Name -> the projections that have biases.
BIASES: dict[str, tuple[str, ...]] = {
    "all": ("query", "key", "value", "output", "gate", "up", "down"),
    "attention": ("query", "key", "value", "output"),
    "query_key_value": ("query", "key", "value"),
    "feedforward": ("gate", "up", "down"),
    "none": (),
}

# The activations of a block that the backward pass may keep on the device, in decreasing order; None keeps everything.
REMAT_POLICIES = {
    "none": None,
    # Kept: outputs of matmuls and attention. Recomputed: attention scores and elementwise operations. Also the fastest
    # on CPU: 0.40 s per step against 0.49 if everything is kept, because a scan stacks what it keeps.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("projected", "mixed", "expanded"), attended_saveable),
    # Kept: inputs and outputs of attention. Recomputed: its output projection and the MLP's first matmul, whose output
    # is as large as everything kept here.
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("projected"), attended_saveable),
    # Kept: a block's input.
    "full": jax.checkpoint_policies.nothing_saveable,
    # The same, in the host's memory: the device frees what it sends there.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["input"],
        offload_src="device", offload_dst="pinned_host"),
}

DTYPES = ("float32", "bfloat16", "float16")

# Field -> its names.
NAMES_OF: dict[str, tuple[str, ...]] = {
    "norm": ("layer", "rms"),
    "norm_place": ("before", "after"),
    "residual": ("sequential", "parallel"),
    "positions": ("learned", "rotary"),
    "query_key_norm": ("none", "head", "width"),
    "biases": tuple(BIASES),
    "activation": tuple(ACTIVATIONS),
    "dtype": DTYPES,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of a decoder; checked when made.

    Attributes:
      layers: number of blocks, including the query layer.
      hidden: width of the model.
      heads: attention heads of queries.
      feedforward: width of the MLP.
      vocabulary_size: rows of the token embedding, including padding rows; set from the vocabulary.
      length: the longest row in tokens, and the number of learned positions; set from the data.
      query_layer: whether the last block is PanGu-alpha's query layer; False is a plain GPT, with a final norm there.
      activation: of the MLP: gelu (tanh form), gelu_exact, fast_gelu, or gated swiglu, geglu.
      dropout_rate: probability of dropout after the embedding, after attention and after the MLP.
      dtype: of the computation: float32, bfloat16 or float16. Parameters are always float32.
      remat: what the backward pass keeps of a block instead of computing it again: none (everything is kept), dots,
        attention, full (only the input) or offload (the input, in the host's memory).
      scan_unroll: number of blocks compiled in sequence within the loop; the form of the parameters does not depend on
        it.
      attention: implementation of attention: auto, or one of `attention.NAMES`.
      initializer_std: standard deviation of new parameters.
      kv_heads: heads of keys and values, each shared by a group of queries' heads; None for as many as `heads`.
      head_size: width of a head; None for hidden / heads.
      norm: kind of norm in the blocks and at the end: layer (LayerNorm) or rms (RMSNorm).
      norm_epsilon: added to the variance that a norm divides by.
      norm_place: place of a block's norms: before each sub-layer, or after it and before the sum.
      residual: order of the sub-layers: sequential (the MLP reads the sum with attention's output) or parallel (both
        read the same input).
      positions: kind of positions: learned (an embedding) or rotary (queries and keys are rotated).
      rotary_theta: base of the rotary frequencies.
      rotary_part: the part of each head that is rotated, from its beginning.
      rotary_scaling: changes rotary frequencies for longer rows, such as {'kind': 'yarn', 'factor': 4.0,
        'original_length': 32768}; see `rotary.RotaryScaling`.
      query_key_norm: RMSNorm on queries and keys: none, head (of each head) or width (of all heads as one).
      biases: which projections have biases: all, attention, query_key_value, feedforward or none.
      tied_head: whether logits use the token embedding; False gives them a parameter of their own.

    Raises:
      ValueError: with a one-line message, if a size is not positive, the heads do not divide the hidden size or the key
        heads do not divide the heads, a name is unknown, or a number is out of range.
    """

    layers: int
    hidden: int
    heads: int
    feedforward: int
    vocabulary_size: int
    length: int
    query_layer: bool = True
    activation: str = "gelu"
    dropout_rate: float = 0.0
    dtype: str = "float32"
    remat: str = "dots"
    scan_unroll: int = 1
    attention: str = "auto"
    initializer_std: float = 0.02
    kv_heads: int | None = None
    head_size: int | None = None
    norm: str = "layer"
    norm_epsilon: float = 1e-5
    norm_place: str = "before"
    residual: str = "sequential"
    positions: str = "learned"
    rotary_theta: float = 10_000.0
    rotary_part: float = 1.0
    rotary_scaling: Mapping[str, Any] | RotaryScaling | None = None
    query_key_norm: str = "none"
    biases: str = "all"
    tied_head: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "feedforward", "vocabulary_size", "length", "scan_unroll",
                     "kv_heads", "head_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}.")
        if self.head_size is None and self.hidden % self.heads:
            raise ValueError(
                f"heads must divide hidden, found {self.heads} heads and hidden {self.hidden}: change either one, or "
                "set head_size."
            )
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads must divide heads, found {self.kv_heads} and {self.heads}: change either one.")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), found {self.dropout_rate}.")
        if not self.norm_epsilon > 0.0:
            raise ValueError(f"norm_epsilon must be above 0, found {self.norm_epsilon}.")
        for name, known in NAMES_OF.items():
            check_name(name, getattr(self, name), known)
        check_name("remat policy", self.remat, REMAT_POLICIES)
        check_name("attention implementation", self.attention, NAMES)
        if isinstance(self.rotary_scaling, Mapping):
            object.__setattr__(self, "rotary_scaling", RotaryScaling.of(self.rotary_scaling))
        self._require_rotary()

    def _require_rotary(self) -> None:
        rotary = {"rotary_theta": 10_000.0, "rotary_part": 1.0, "rotary_scaling": None}
        for name, default in rotary.items():
            if self.positions != "rotary" and getattr(self, name) != default:
                raise ValueError(f"{name} is set, but positions are {self.positions!r}: set positions = 'rotary'.")
        if not self.rotary_theta > 1.0:
            raise ValueError(f"rotary_theta must be above 1, found {self.rotary_theta}.")
        if not 0.0 < self.rotary_part <= 1.0:
            raise ValueError(f"rotary_part must be above 0 and at most 1, found {self.rotary_part}.")
        if self.positions == "rotary" and (self.rotated_size % 2 or not self.rotated_size):
            raise ValueError(f"Rotary positions rotate pairs: rotary_part = {self.rotary_part} of heads of size "
                             f"{self.size_of_head} is {self.rotated_size} numbers, which must be even and not 0.")

    @property
    def size_of_head(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def query_width(self) -> int:
        """The total width of the query heads, and of the attention output."""
        return self.heads * self.size_of_head

    @property
    def key_width(self) -> int:
        """The total width of the key heads, and of the value heads."""
        return self.key_heads * self.size_of_head

    @property
    def key_axis(self) -> str:
        """The logical axis of the heads of keys and values: a separate one if they are fewer."""
        return "heads" if self.key_heads == self.heads else "kv_heads"

    @property
    def rotated_size(self) -> int:
        """The numbers of a head that rotary positions rotate."""
        return int(self.size_of_head * self.rotary_part)

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED

    @property
    def scanned_layers(self) -> int:
        """Blocks in the scan: all but the query layer."""
        return self.layers - self.query_layer
