"""The decoder of `codellm_jax` for transformers: any norm, positions, residual, activation, and the query layer.

An exported folder contains this file and names it as its own code (`trust_remote_code=True`); it needs only torch and
transformers. `config.json` names each part of the model; CodellmConfig documents them.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_exact": F.gelu,
    "fast_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
}
GATED = ("swiglu", "geglu")
BIASES: dict[str, tuple[str, ...]] = {
    "all": ("query", "key", "value", "output", "gate", "up", "down"),
    "attention": ("query", "key", "value", "output"),
    "query_key_value": ("query", "key", "value"),
    "feedforward": ("gate", "up", "down"),
    "none": (),
}
# The name of the cache in outputs, which newer versions of transformers have changed.
CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else \
    "past_key_values"


class CodellmConfig(PretrainedConfig):
    """Sizes and parts of a decoder.

    Args:
      layers, hidden, heads, feedforward: sizes; the query layer is one of the layers.
      vocabulary_size: rows of the embedding.
      length: the longest sequence, and learned positions.
      query_layer: whether the last block uses an embedding of the position as its query; the final norm precedes it.
      activation: "gelu" (tanh), "gelu_exact", "fast_gelu", "swiglu" or "geglu".
      dropout_rate: after the embedding, after attention and after the MLP.
      initializer_std: of new parameters.
      kv_heads: heads of keys and values; None for as many as of queries.
      head_size: None for hidden / heads.
      norm, norm_epsilon: "layer" or "rms".
      norm_place: "before" or "after" a sub-layer.
      residual: "sequential" or "parallel".
      positions: "learned" or "rotary".
      rotary_theta, rotary_part: the inverse of the slowest frequency, and the rotated fraction of each head.
      rotary_scaling: None, or {"kind": "linear", "llama3" or "yarn", "factor": ..., "original_length": ..., ...}.
      query_key_norm: "none", "head" or "width".
      biases: the projections that have biases, a key of BIASES.
      tied_head: whether the token embedding is also the output head.
    """

    model_type = "codellm"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads",
        "intermediate_size": "feedforward", "vocab_size": "vocabulary_size", "max_position_embeddings": "length",
        "initializer_range": "initializer_std", "num_key_value_heads": "kv_heads", "head_dim": "head_size"}

    def __init__(
        self, layers: int = 12, hidden: int = 768, heads: int = 12, feedforward: int = 3072,
        vocabulary_size: int = 8192, length: int = 1024, query_layer: bool = True, activation: str = "gelu",
        dropout_rate: float = 0.0, initializer_std: float = 0.02, kv_heads: int | None = None,
        head_size: int | None = None, norm: str = "layer", norm_epsilon: float = 1e-5, norm_place: str = "before",
        residual: str = "sequential", positions: str = "learned", rotary_theta: float = 10_000.0,
        rotary_part: float = 1.0, rotary_scaling: dict[str, Any] | None = None, query_key_norm: str = "none",
        biases: str = "all", tied_head: bool = True, use_cache: bool = True, **others: Any,
    ) -> None:
        self.layers = layers
        self.hidden = hidden
        self.heads = heads
        self.feedforward = feedforward
        self.vocabulary_size = vocabulary_size
        self.length = length
        self.query_layer = query_layer
        self.activation = activation
        self.dropout_rate = dropout_rate
        self.initializer_std = initializer_std
        self.kv_heads = kv_heads or heads
        self.head_size = head_size or hidden // heads
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.norm_place = norm_place
        self.residual = residual
        self.positions = positions
        self.rotary_theta = rotary_theta
        self.rotary_part = rotary_part
        self.rotary_scaling = rotary_scaling
        self.query_key_norm = query_key_norm
        self.biases = biases
        self.tied_head = tied_head
        self.use_cache = use_cache
        super().__init__(**others | {"tie_word_embeddings": tied_head})


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * self.weight.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def make_norm(config: CodellmConfig) -> nn.Module:
    return {"layer": LayerNorm, "rms": RMSNorm}[config.norm](config.hidden, config.norm_epsilon)


def frequencies(config: CodellmConfig, device: torch.device) -> tuple[Tensor, float]:
    """The rotation in radians of each pair of numbers from one position to the next, float32, and the scale of both."""
    size, theta, scaling = int(config.head_size * config.rotary_part), config.rotary_theta, config.rotary_scaling or {}
    own = [theta ** -(2 * pair / size) for pair in range(size // 2)]
    kind, factor = scaling.get("kind"), scaling.get("factor", 1.0)
    if kind == "linear":
        kept = [0.0] * len(own)
    elif kind == "llama3":
        slow, fast = scaling.get("slow", 1.0), scaling.get("fast", 4.0)
        turns = [scaling["original_length"] * frequency / (2 * math.pi) for frequency in own]
        kept = [min(max((turn - slow) / (fast - slow), 0.0), 1.0) for turn in turns]
    elif kind == "yarn":
        first, last = (
            size * math.log(scaling["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.get("fast", 32.0), scaling.get("slow", 1.0)))
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        width = last - first if last != first else 0.001
        kept = [1 - min(max((pair - first) / width, 0.0), 1.0) for pair in range(len(own))]
    else:
        kept = [1.0] * len(own)
    attention = scaling.get("attention_factor", 0.1 * math.log(factor) + 1) if kind == "yarn" else 1.0
    scaled = [frequency * (part + (1 - part) / factor) for frequency, part in zip(own, kept, strict=True)]
    return torch.tensor(scaled, dtype=torch.float32, device=device), attention


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first numbers of each head [batch, heads, length, size] by halves, in float32; the rest is unchanged.
    """
    cosine, sine = turns
    half = cosine.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


class Visible:
    """The keys that each new token sees: itself, and earlier tokens that are not padding.

    Args:
      attention_mask: None, [batch, tokens so far] with 0 for padding, or [batch, 1, new tokens, keys].
      past: the number of tokens already in the cache.
      new: the number of new tokens.
    """

    def __init__(self, attention_mask: Tensor | None, past: int | Tensor, new: int, device: torch.device) -> None:
        self._given, self._device = attention_mask, device
        self._queries = past + torch.arange(new, device=device)[:, None]
        self._made: Tensor | None = None

    def __call__(self, keys: int) -> Tensor:
        """bool [batch or 1, 1, new tokens, keys]; a cache may have more slots than tokens."""
        if self._made is None:
            slots = torch.arange(keys, device=self._device)[None]
            visible = (slots <= self._queries)[None, None]
            given = self._given
            if given is not None and given.ndim == 4:
                given = given if given.dtype == torch.bool else given == 0
                visible = visible & given[..., :keys]
            elif given is not None:
                visible = visible & F.pad(given.bool(), (0, keys - given.shape[1]))[:, None, None]
            # Padding tokens themselves would see nothing at all, which gives NaN.
            self._made = visible | (slots == self._queries)
        return self._made


class CodellmAttention(nn.Module):
    """Attention from one tensor to another, with grouped heads and the layer's part of the cache."""

    def __init__(self, config: CodellmConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        query, key, has = config.heads * config.head_size, config.kv_heads * config.head_size, BIASES[config.biases]
        self.q_proj = nn.Linear(config.hidden, query, bias="query" in has)
        self.k_proj = nn.Linear(config.hidden, key, bias="key" in has)
        self.v_proj = nn.Linear(config.hidden, key, bias="value" in has)
        self.c_proj = nn.Linear(query, config.hidden, bias="output" in has)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.query_key_norm != "none":
            whole = config.query_key_norm == "width"
            self.q_norm = RMSNorm(query if whole else config.head_size, config.norm_epsilon)
            self.k_norm = RMSNorm(key if whole else config.head_size, config.norm_epsilon)

    def forward(
        self, asked: Tensor, source: Tensor, visible: Visible, turns: tuple[Tensor, Tensor] | None, cache: Any
    ) -> Tensor:
        config = self.config
        query = self._heads(self.q_proj(asked), self.q_norm, turns)
        key = self._heads(self.k_proj(source), self.k_norm, turns)
        value = self._heads(self.v_proj(source), None, None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mask, groups = visible(key.shape[2]), config.heads // config.kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if config._attn_implementation == "eager":
            scores = query @ key.transpose(2, 3) / math.sqrt(config.head_size)
            weights = scores.float().masked_fill(~mask, -math.inf).softmax(-1).to(value.dtype)
            attended = weights @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.c_proj(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, norm: nn.Module | None, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """[batch, length, width] -> [batch, heads, length, size], normalised and rotated."""
        if norm is not None and self.config.query_key_norm == "width":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.config.head_size))
        if norm is not None and self.config.query_key_norm == "head":
            x = norm(x)
        x = x.transpose(1, 2)
        return x if turns is None else rotate(x, turns)


class CodellmMLP(nn.Module):
    """Two projections with an activation between them, or a gate."""

    def __init__(self, config: CodellmConfig) -> None:
        super().__init__()
        has = BIASES[config.biases]
        self.activation = ACTIVATIONS[config.activation]
        self.c_fc = nn.Linear(config.hidden, config.feedforward, bias="up" in has)
        self.c_gate = None
        if config.activation in GATED:
            self.c_gate = nn.Linear(config.hidden, config.feedforward, bias="gate" in has)
        self.c_proj = nn.Linear(config.feedforward, config.hidden, bias="down" in has)

    def forward(self, x: Tensor) -> Tensor:
        up = self.c_fc(x)
        return self.c_proj(self.activation(up) if self.c_gate is None else self.activation(self.c_gate(x)) * up)


class CodellmBlock(nn.Module):
    """Attention and MLP, each added to its input."""

    def __init__(self, config: CodellmConfig, layer: int) -> None:
        super().__init__()
        self.before, self.parallel = config.norm_place == "before", config.residual == "parallel"
        self.ln_1 = make_norm(config)
        self.attn = CodellmAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = CodellmMLP(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, asked: Tensor | None, visible: Visible, turns: tuple[Tensor, Tensor] | None, cache: Any
    ) -> Tensor:
        """`asked` is the input of the queries in the query layer; None for the hidden states."""
        source = self.ln_1(x) if self.before else x
        attended = self.attn(source if asked is None else asked, source, visible, turns, cache)
        both = x + self.dropout(attended if self.before else self.ln_1(attended))
        source = x if self.parallel else both
        expanded = self.mlp(self.ln_2(source) if self.before else source)
        return both + self.dropout(expanded if self.before else self.ln_2(expanded))


class CodellmPreTrainedModel(PreTrainedModel):
    """The facts about both models that transformers needs."""

    config: CodellmConfig
    config_class = CodellmConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["CodellmBlock"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (RMSNorm, LayerNorm)):
            nn.init.ones_(module.weight)
            if isinstance(module, LayerNorm):
                nn.init.zeros_(module.bias)


class CodellmModel(CodellmPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: CodellmConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocabulary_size, config.hidden)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.length, config.hidden)
        if config.query_layer:
            self.wqe = nn.Embedding(config.length, config.hidden)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.h = nn.ModuleList([CodellmBlock(config, layer) for layer in range(config.layers)])
        self.ln_f = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.wte = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, cache: Any = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **others: Any,
    ) -> Any:
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past, new = 0 if cache is None else cache.get_seq_length(), x.shape[1]
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
            else:
                position_ids = (past + torch.arange(new, device=x.device))[None]
        if config.positions == "learned":
            x = x + self.wpe(position_ids)
        turns = None
        if config.positions == "rotary":
            each, scale = frequencies(config, x.device)
            angles = position_ids[:, None, :, None].float() * each  # [batch, 1, length, pairs]
            turns = angles.cos() * scale, angles.sin() * scale
        visible = Visible(attention_mask, past, new, x.device)
        x = self.dropout(x)
        states = [x]
        for layer, block in enumerate(self.h):
            asked = None
            if config.query_layer and layer == config.layers - 1:
                x, asked = self.ln_f(x), self.wqe(position_ids).expand(len(x), -1, -1)
            x = block(x, asked, visible, turns, cache)
            states.append(x)
        if not config.query_layer:
            states[-1] = x = self.ln_f(x)
        hidden = tuple(states) if _asked(output_hidden_states, config.output_hidden_states) else None
        output = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{CACHE: cache})
        return output if _asked(return_dict, getattr(config, "return_dict", True)) else output.to_tuple()


class CodellmForCausalLM(CodellmPreTrainedModel, GenerationMixin):
    """Tokens to logits; with labels, also the mean loss of the next tokens."""

    _tied_weights_keys: Any = {"lm_head.weight": "transformer.wte.weight"} \
        if int(transformers.__version__.split(".")[0]) >= 5 else ["lm_head.weight"]

    def __init__(self, config: CodellmConfig) -> None:
        super().__init__(config)
        self.transformer = CodellmModel(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: Any) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, cache: Any = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> Any:
        output = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache,
            output_hidden_states, return_dict=True)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocabulary_size, **others)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, **{CACHE: getattr(output, CACHE)})
        return output if _asked(return_dict, getattr(self.config, "return_dict", True)) else output.to_tuple()


def _asked(given: Any, default: Any) -> Any:
    return default if given is None else given
