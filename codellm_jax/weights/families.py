"""Published configurations: converts a config.json to fields of `DecoderConfig`, and back.

A family is a set of values. Missing entries of a config.json have the default of its family, as in transformers;
features that this decoder does not support are refused by name.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.rotary import SCALINGS, RotaryScaling

OWN = "codellm"
LARGEST_SIZE = 2**31 - 1  # which positions and shapes have room for


@dataclasses.dataclass(frozen=True)
class Family:
    """The names and defaults in a family's config.json.

    Attributes:
      architecture: the transformers class that opens it.
      names: our sizes -> their names in the file.
      defaults: name in the file -> its value if absent.
      fixed: fields of `DecoderConfig` that are the same for all models of the family.
      gated: whether the MLP has a gate, whose activation the file names.
    """

    architecture: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    gated: bool = False


COMMON = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
          "feedforward": "intermediate_size", "vocabulary_size": "vocab_size", "length": "max_position_embeddings",
          "activation": "hidden_act"}
GROUPED = COMMON | {"kv_heads": "num_key_value_heads", "head_size": "head_dim", "norm_epsilon": "rms_norm_eps"}
SIZES = ("layers", "hidden", "heads", "feedforward", "vocabulary_size", "length")
LLAMA = {"norm": "rms", "positions": "rotary"}
QWEN = {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32_768, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28}
PANGU = {"layers": "num_layers", "hidden": "hidden_size", "heads": "num_heads", "feedforward": "intermediate_size",
         "vocabulary_size": "vocab_size", "length": "max_position_embeddings", "activation": "activation_function",
         "norm_epsilon": "layer_norm_epsilon"}

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "feedforward": "n_inner",
         "vocabulary_size": "vocab_size", "length": "n_positions", "activation": "activation_function",
         "norm_epsilon": "layer_norm_epsilon"},
        {"vocab_size": 50_257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
         "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {"positions": "learned", "biases": "all"}),
    "llama": Family(
        "LlamaForCausalLM", GROUPED,
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False},
        LLAMA, gated=True),
    "mistral": Family(
        "MistralForCausalLM", GROUPED,
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "hidden_act": "silu",
         "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 4096},
        LLAMA | {"biases": "none"}, gated=True),
    "qwen2": Family("Qwen2ForCausalLM", GROUPED, QWEN, LLAMA | {"biases": "query_key_value"}, gated=True),
    "qwen3": Family("Qwen3ForCausalLM", GROUPED, QWEN | {"head_dim": 128}, LLAMA | {"query_key_norm": "head"},
                    gated=True),
    "olmo2": Family(
        "Olmo2ForCausalLM", GROUPED,
        {"vocab_size": 50_304, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "max_position_embeddings": 2048, "hidden_act": "silu", "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False},
        LLAMA | {"norm_place": "after", "query_key_norm": "width"}, gated=True),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", GROUPED | {"norm_epsilon": "norm_epsilon"},
        {"vocab_size": 49_152, "hidden_size": 3072, "intermediate_size": 12_288, "num_hidden_layers": 30,
         "num_attention_heads": 24, "num_key_value_heads": 2, "max_position_embeddings": 4096,
         "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {"positions": "rotary"}),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", COMMON | {"norm_epsilon": "layer_norm_eps"},
        {"vocab_size": 50_432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
         "intermediate_size": 24_576, "max_position_embeddings": 2048, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
         "tie_word_embeddings": False},
        {"positions": "rotary"}),
    "gpt_pangu": Family(
        "GPTPanguForCausalLM", PANGU,
        {"vocab_size": 40_000, "max_position_embeddings": 1024, "hidden_size": 2560, "intermediate_size": None,
         "num_layers": 32, "num_heads": 32, "activation_function": "gelu", "layer_norm_epsilon": 1e-5,
         "tie_word_embeddings": True},
        {"positions": "learned", "biases": "all", "query_layer": True}),
}

ACTIVATIONS = {"gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_python_tanh": "gelu",
               "gelu_accurate": "gelu", "gelu": "gelu_exact", "gelu_python": "gelu_exact", "quick_gelu": "fast_gelu"}
GATES = {"silu": "swiglu", "swish": "swiglu"} | {
    name: "geglu" for name, ours in ACTIVATIONS.items() if ours == "gelu"}

# Field -> the values with which it has no effect; other values request an unsupported feature.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "alibi": (False, None), "use_alibi": (False, None), "position_embedding_type": ("absolute", "rope", None),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "logits_soft_cap": (None,),
    "query_pre_attn_scalar": (None,), "clip_qkv": (None,),
    "num_experts": (None, 0), "num_local_experts": (None, 0), "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0), "moe_intermediate_size": (None, 0),
    "scale_attn_weights": (True, None), "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None), "is_encoder_decoder": (False, None),
    "embedding_multiplier": (None, 1), "residual_multiplier": (None, 1), "attention_multiplier": (None,),
    "logits_scaling": (None, 1), "logit_scale": (None, 1),
    "use_qk_norm": (False, None), "qk_layernorm": (False, None),
    "rope_interleaved": (False, None), "rope_interleave": (False, None), "no_rope_layers": (None, []),
    "attention_chunk_size": (None,),
    "norm_type": ("layer_norm", None), "mlp_type": ("default", None),
}

# Fields of a decoder that are not part of a published model.
RUNTIME_FIELDS = ("dtype", "remat", "scan_unroll", "attention")


def decoder_values(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a config.json, as fields of `DecoderConfig`, including `vocabulary_size` and `length`.

    Raises:
      ValueError: with a one-line message: the family is unknown, a value is invalid, or it needs an unsupported
        feature.
    """
    kind = facts.get("model_type")
    if kind != OWN and kind not in list(FAMILIES):
        raise ValueError(f"config.json has model_type = {_short(kind)}{_nearest(kind)}; known: "
                         f"{', '.join(known_types())}.")
    if kind == OWN:
        values = _own_values(facts)
    else:
        for name, harmless in REFUSED.items():
            if name in facts and not any(facts[name] == value for value in harmless):
                raise _refused(name, facts[name])
        values = _values(kind, facts)
    try:
        DecoderConfig(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("config.json does not describe a valid decoder: "
                         f"{str(error).removeprefix('DecoderConfig.')}") from None
    return values


def _own_values(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The values in a config.json of our own family, which has the names of `DecoderConfig`."""
    checks: dict[Any, Callable[[str, Any], Any]] = {
        int: _size, int | None: _size, bool: _truth, float: _fraction, str: _name}
    kinds = typing.get_type_hints(DecoderConfig)
    values = {name: facts[name] for name in kinds if name in facts and name not in RUNTIME_FIELDS}
    for name, value in values.items():
        if kinds[name] in checks:
            checks[kinds[name]](name, value)
        elif not (value is None or isinstance(value, Mapping)):
            raise ValueError(f"config.json has {name} = {_short(value)}: it must be an object.")
    missing = [name for name in SIZES if values.get(name) is None]
    if missing:
        raise ValueError(f"config.json has {missing[0]} = None: it must be a whole number.")
    return values


def known_types() -> list[str]:
    """All supported model_types."""
    return [*FAMILIES, OWN]


def published_facts(config: DecoderConfig, preferred: str | None = None) -> dict[str, Any]:
    """The config.json of a family that matches a decoder: of `preferred` if it matches, else of the first that does,
    else of our own.

    It describes the model fully, but contains no special ids of a vocabulary and no dtype of the tensors.
    """
    meant = _meant(config)
    for kind in dict.fromkeys([*([preferred] if preferred in FAMILIES else []), *FAMILIES]):
        facts = None if kind == "gpt_pangu" else _facts(kind, config)
        if facts is None:
            continue
        try:
            values = decoder_values(facts)
        except ValueError:  # the family lacks a feature
            continue
        if _meant(DecoderConfig(**values)) == meant:
            return facts
    facts = {"model_type": OWN, "architectures": ["CodellmForCausalLM"]}
    facts |= {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
              if field.name not in RUNTIME_FIELDS}
    if isinstance(config.rotary_scaling, RotaryScaling):
        facts["rotary_scaling"] = {name: getattr(config.rotary_scaling, name) for name in (
            "kind", "factor", *(further for names in SCALINGS[config.rotary_scaling.kind] for further in names))}
    return facts


def _meant(config: DecoderConfig) -> dict[str, Any]:
    """All fields of a decoder that its logits depend on."""
    free = (*RUNTIME_FIELDS, "dropout_rate", "initializer_std")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in free}
    return values | {"kv_heads": config.key_heads, "head_size": config.size_of_head}


def _refused(name: str, value: Any, why: str = "a feature that this decoder does not support") -> ValueError:
    return ValueError(f"config.json has {name} = {_short(value)}: {why}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else text[:97] + "..."


def _nearest(kind: Any) -> str:
    near = difflib.get_close_matches(_short(kind), known_types(), n=1, cutoff=0.4)
    return f", which is not supported; nearest: {near[0]}" if near else ", which is not supported"


def _values(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    family = FAMILIES[kind]
    given = dict(family.defaults) | dict(facts)
    values: dict[str, Any] = {"query_layer": False, **family.fixed}
    for ours, theirs in family.names.items():
        if ours in (*SIZES, "kv_heads", "head_size"):
            values[ours] = _size(theirs, given.get(theirs))
    missing = [family.names[name] for name in SIZES if values[name] is None and name != "feedforward"]
    if missing:
        raise ValueError(f"config.json has {missing[0]} = None: it must be a whole number.")
    if values["feedforward"] is None and kind not in ("gpt2", "gpt_pangu"):
        raise ValueError("config.json has intermediate_size = None: it must be a whole number.")
    values["feedforward"] = values["feedforward"] or 4 * values["hidden"]
    if "head_size" in values and values["head_size"] is None:  # transformers rounds down
        values["head_size"] = values["hidden"] // values["heads"]
    values["norm_epsilon"] = _number(family.names["norm_epsilon"], given.get(family.names["norm_epsilon"]))
    values["tied_head"] = _truth("tie_word_embeddings", given.get("tie_word_embeddings"))
    named = given.get(family.names["activation"])
    known = GATES if family.gated else ACTIVATIONS
    if not isinstance(named, str) or named not in known:
        raise _refused(family.names["activation"], named, f"known for {kind}: {', '.join(known)}")
    values["activation"] = known[named]
    values |= _choices(kind, given)
    _require_full_attention(given, values["layers"], values["length"])
    return values | (_rotary(kind, given) if family.fixed["positions"] == "rotary" else {})


def _choices(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The properties that vary within a family: biases and the residual."""

    def has(name: str, default: bool) -> bool:
        return _truth(name, given.get(name, default))

    if kind == "gpt_neox":
        return {"biases": "all" if has("attention_bias", True) else "feedforward",
                "residual": "parallel" if has("use_parallel_residual", True) else "sequential"}
    if kind == "starcoder2":
        return {"biases": "all" if has("use_bias", True) else "none"}
    if kind == "llama":
        both = has("attention_bias", False), has("mlp_bias", False)
        return {"biases": {(True, True): "all", (True, False): "attention", (False, True): "feedforward",
                           (False, False): "none"}[both]}
    if kind in ("qwen3", "olmo2"):
        return {"biases": "attention" if has("attention_bias", False) else "none"}
    return {}


def _require_full_attention(given: Mapping[str, Any], layers: int, length: int) -> None:
    """Raises ValueError if a layer sees less than all earlier tokens; a window at least as long as the rows has no
    effect.
    """
    kinds = given.get("layer_types")
    window = given.get("sliding_window")
    if given.get("use_sliding_window", True) is False:
        window = None
    if kinds is None:
        first = given.get("max_window_layers") if "use_sliding_window" in given else None
        if first is not None and type(first) is not int:
            raise _refused("max_window_layers", first, "it must be a whole number")
        binds = window is not None and (first or 0) < layers
    else:
        if not isinstance(kinds, list) or len(kinds) < layers:
            raise _refused("layer_types", kinds, f"it must name a kind for each of {layers} layers")
        other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
        if other:
            raise _refused("layer_types", other[0])
        binds = "sliding_attention" in kinds and window is not None
    if binds and _number("sliding_window", window) < length:
        raise _refused("sliding_window", window, f"a window shorter than its {length} positions, which this "
                       f"decoder does not support; with max_position_embeddings = {window} it would have no effect")


def _rotary(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Theta, the rotated part of a head and the scaling; from a config.json in the older form or in that of
    transformers 5.
    """
    rope: Any = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if isinstance(rope, Mapping) and isinstance(rope.get("full_attention"), Mapping):  # by kind of layer
        rope = rope["full_attention"]
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise _refused("rope_parameters" if given.get("rope_parameters") else "rope_scaling", rope)

    def told(name: str, *others: Any) -> Any:
        """The value in the scaling, else the first of `others` that is set."""
        return next((value for value in (rope.get(name), *others) if value is not None), None)

    neox = kind == "gpt_neox"
    theta = told("rope_theta", given.get("rotary_emb_base") if neox else given.get("rope_theta"), 10_000.0)
    part = told("partial_rotary_factor", given.get("partial_rotary_factor"),
                given.get("rotary_pct", 0.25) if neox else None, 1.0)
    if not neox and part != 1.0:
        raise _refused("partial_rotary_factor", part)
    values = {"rotary_theta": _number("rope_theta", theta), "rotary_part": _number("rotary_pct", part)}
    named = told("rope_type", rope.get("type"), "default")
    if named == "default":
        if "mrope_section" in rope:
            raise _refused("mrope_section", rope["mrope_section"])
        return values
    if named not in ("linear", "llama3", "yarn"):
        raise _refused("rope_type", named, "known: default, linear, llama3, yarn")
    if rope.get("truncate") is False:
        raise _refused("truncate", False, "a form of yarn that this decoder does not support")
    length = given["max_position_embeddings"]
    original = _size("original_max_position_embeddings", given.get("original_max_position_embeddings")
                     or told("original_max_position_embeddings", length))
    factor = told("factor", length / original if named == "yarn" and original else None)
    if factor is None:
        raise ValueError(f"config.json has a rope_type = {named!r} without a factor.")
    names = {"linear": {}, "llama3": {"slow": "low_freq_factor", "fast": "high_freq_factor"},
             "yarn": {"slow": "beta_slow", "fast": "beta_fast"}}[named]
    scaling = {"kind": named, "factor": _number("factor", factor)}
    if named != "linear":
        scaling["original_length"] = original
    scaling |= {ours: _number(theirs, rope[theirs]) for ours, theirs in names.items() if rope.get(theirs)}
    if named == "yarn":
        scaling["attention_factor"] = _attention_factor(rope, scaling["factor"])
    return values | {"rotary_scaling": scaling}


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """The factor by which yarn multiplies queries and keys: as given, or by the rule of `mscale` and `mscale_all_dim`.
    """

    def scale(of: float) -> float:
        return 0.1 * of * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return _number("attention_factor", rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number("mscale", rope["mscale"])) / scale(_number("mscale_all_dim", rope["mscale_all_dim"]))
    return scale(1.0)


def _size(name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 1 <= value <= LARGEST_SIZE):
        raise ValueError(f"config.json has {name} = {_short(value)}: it must be a whole number from 1 to "
                         f"{LARGEST_SIZE:,}.")
    return value


def _number(name: str, value: Any) -> float:
    # Beyond these bounds a float32 or its square becomes 0 or infinite.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-18 <= value <= 1e18:
        raise ValueError(f"config.json has {name} = {_short(value)}: it must be a number above 0, at most 1e18.")
    return float(value)


def _fraction(name: str, value: Any) -> float:
    return 0.0 if type(value) in (int, float) and value == 0 else _number(name, value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"config.json has {name} = {_short(value)}: it must be true or false.")
    return value


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"config.json has {name} = {_short(value)}: it must be a name.")
    return value


def _facts(kind: str, config: DecoderConfig) -> dict[str, Any] | None:
    """The config.json that a model of the family would have with a decoder's values; None if it has no such activation.
    `decoder_values` decides whether it means the same.
    """
    family = FAMILIES[kind]
    if family.gated != config.is_gated or kind == "llama" and config.hidden % config.heads:  # transformers refuses this
        return None
    named = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "gelu": "gelu_new" if kind == "gpt2" else
             "gelu_pytorch_tanh", "gelu_exact": "gelu", "fast_gelu": "quick_gelu"}[config.activation]
    facts: dict[str, Any] = {"model_type": kind, "architectures": [family.architecture]}
    facts |= {theirs: getattr(config, ours) for ours, theirs in family.names.items() if ours != "activation"}
    facts[family.names["activation"]] = named
    if "kv_heads" in family.names:
        facts |= {"num_key_value_heads": config.key_heads, "head_dim": config.size_of_head}
    facts |= {"tie_word_embeddings": config.tied_head, "initializer_range": config.initializer_std}
    dropouts = {"gpt2": ("resid_pdrop", "embd_pdrop"), "gpt_neox": ("hidden_dropout",),
                "starcoder2": ("residual_dropout", "embedding_dropout")}.get(kind, ())
    facts |= {name: config.dropout_rate for name in dropouts} | ({"attn_pdrop": 0.0} if kind == "gpt2" else {})
    attention = config.biases in ("all", "attention")
    choices: dict[str, dict[str, Any]] = {
        "gpt_neox": {"use_parallel_residual": config.residual == "parallel", "attention_bias": attention},
        "starcoder2": {"use_bias": config.biases == "all", "sliding_window": None},
        "llama": {"attention_bias": attention, "mlp_bias": config.biases in ("all", "feedforward")},
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"attention_bias": attention, "use_sliding_window": False},
        "olmo2": {"attention_bias": attention}}
    facts |= choices.get(kind, {})
    if config.positions == "rotary" and family.fixed["positions"] == "rotary":
        facts |= {"rotary_emb_base": config.rotary_theta, "rotary_pct": config.rotary_part} if kind == "gpt_neox" \
            else {"rope_theta": config.rotary_theta}
        if isinstance(config.rotary_scaling, RotaryScaling):
            facts["rope_scaling"] = _published_scaling(config.rotary_scaling)
    return facts


def _published_scaling(scaling: RotaryScaling) -> dict[str, Any]:
    facts: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        facts |= {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    if scaling.kind == "yarn":
        facts |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast, "attention_factor": scaling.attention_factor}
    if scaling.kind != "linear":
        facts["original_max_position_embeddings"] = scaling.original_length
    return facts
