"""Families both ways: configurations and tensors, without files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.decoder import Decoder
from codellm_jax.weights.layouts import (
    PublishedTensor,
    decoder_values,
    matched,
    published_facts,
    published_tensors,
    stacked_shapes,
)

GOLDEN = sorted((Path(__file__).resolve().parent.parent / "model" / "golden").glob("*.npz"))
SIZES = {"layers": 3, "hidden": 24, "heads": 4, "feedforward": 22, "vocabulary_size": 29, "length": 16}
LLAMA = {"query_layer": False, "norm": "rms", "positions": "rotary", "activation": "swiglu", "biases": "none",
         "tied_head": False}
# Values -> the family that has them; `codellm` where none does.
DECODERS: list[tuple[dict[str, Any], str]] = [
    ({"query_layer": False}, "gpt2"),
    ({"query_layer": False, "activation": "gelu_exact", "tied_head": False}, "gpt2"),
    (LLAMA, "llama"),
    (LLAMA | {"hidden": 18, "head_size": 6}, "mistral"),  # transformers refuses it as a Llama, of 4 heads
    (LLAMA | {"biases": "feedforward", "kv_heads": 1}, "llama"),
    (LLAMA | {"biases": "all", "kv_heads": 2, "head_size": 6}, "llama"),
    (LLAMA | {"biases": "query_key_value", "tied_head": True}, "qwen2"),
    (LLAMA | {"query_key_norm": "head", "kv_heads": 2, "head_size": 2}, "qwen3"),
    (LLAMA | {"query_key_norm": "width", "norm_place": "after", "kv_heads": 2, "head_size": 6}, "olmo2"),
    (LLAMA | {"activation": "geglu", "rotary_scaling": {"kind": "linear", "factor": 2}}, "llama"),
    (LLAMA | {"head_size": 6, "rotary_scaling": {"kind": "llama3", "factor": 8, "original_length": 8}}, "llama"),
    (LLAMA | {"head_size": 6, "rotary_scaling": {
        "kind": "yarn", "factor": 4, "original_length": 8, "attention_factor": 1.25}}, "llama"),
    ({"query_layer": False, "positions": "rotary", "head_size": 6, "kv_heads": 2, "biases": "none"}, "starcoder2"),
    ({"query_layer": False, "positions": "rotary", "hidden": 32, "rotary_part": 0.25, "residual": "parallel",
      "biases": "feedforward", "tied_head": False}, "gpt_neox"),
    ({"query_layer": False, "positions": "rotary", "hidden": 32, "rotary_part": 0.5, "residual": "sequential"},
     "gpt_neox"),
    ({}, "codellm"),
    ({"tied_head": False, "activation": "fast_gelu"}, "codellm"),
    (LLAMA | {"residual": "parallel", "query_key_norm": "head", "head_size": 6}, "codellm"),
    (LLAMA | {"query_layer": True, "rotary_scaling": {"kind": "linear", "factor": 2}, "head_size": 6}, "codellm"),
    ({"query_layer": False, "norm": "rms", "biases": "attention"}, "codellm"),
]


def decoder(values: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig(**SIZES | values)


def shapes_of(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape, as the decoder itself makes them."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, ids, ids)["params"])
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(("values", "family"), DECODERS)
def test_a_decoder_is_published_as_the_family_whose_values_it_has(values: dict[str, Any], family: str) -> None:
    config = decoder(values)
    facts = published_facts(config)
    assert facts["model_type"] == family
    again = DecoderConfig(**decoder_values(json.loads(json.dumps(facts))))
    assert published_facts(again) == facts
    assert again == dataclasses.replace(config, kv_heads=again.kv_heads, head_size=again.head_size)
    assert (again.key_heads, again.size_of_head) == (config.key_heads, config.size_of_head)


@pytest.mark.parametrize(("values", "family"), DECODERS)
def test_tensors_hold_every_parameter_once(values: dict[str, Any], family: str) -> None:
    """Those of the decoder itself, under names that transformers has (the golden files), and back the same."""
    config = decoder(values)
    tensors = published_tensors(published_facts(config), config)
    assert stacked_shapes(tensors) == shapes_of(config)
    for tensor in tensors:
        numbers = np.arange(np.prod(tensor.shape), dtype=np.float32).reshape(tensor.shape)
        places = tensor.read(numbers)
        assert {key: array.shape for key, array in places.items()} == {
            place.key: place.shape for place in tensor.places}
        assert sorted(np.concatenate([array.ravel() for array in places.values()])) == sorted(numbers.ravel())
        np.testing.assert_array_equal(tensor.write(places), numbers)


def test_a_family_that_is_preferred_is_taken_where_it_fits() -> None:
    assert published_facts(decoder(LLAMA), "mistral")["model_type"] == "mistral"
    assert published_facts(decoder(LLAMA), "qwen2")["model_type"] == "llama"
    whole_heads = decoder({"query_layer": False, "positions": "rotary", "hidden": 32})
    assert published_facts(whole_heads)["model_type"] == "starcoder2"
    assert published_facts(whole_heads, "gpt_neox")["model_type"] == "gpt_neox"


def test_queries_keys_and_values_that_are_one_tensor() -> None:
    """By hand: GPT-2 has them one behind the other, GPT-NeoX by head."""
    facts = {"model_type": "gpt_neox", "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
             "intermediate_size": 3, "vocab_size": 5, "max_position_embeddings": 6, "rotary_pct": 1.0}
    config = DecoderConfig(**decoder_values(facts))
    fused = {tensor.name: tensor for tensor in published_tensors(facts, config)}[
        "gpt_neox.layers.0.attention.query_key_value.bias"]
    read = fused.read(np.arange(12))  # of the first head 0, 1 are queries, 2, 3 keys and 4, 5 values
    assert [read[f"blocks/attention/{name}_bias", 0].tolist() for name in ("query", "key", "value")] == [
        [[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    facts = {"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1, "vocab_size": 5, "n_positions": 6}
    config = DecoderConfig(**decoder_values(facts))
    fused = {tensor.name: tensor for tensor in published_tensors(facts, config)}["transformer.h.0.attn.c_attn.bias"]
    assert fused.read(np.arange(12))["blocks/attention/key_bias", 0].tolist() == [[4, 5], [6, 7]]


def of_golden(name: str, **changes: Any) -> dict[str, Any]:
    path = next(path for path in GOLDEN if path.stem == name)
    with np.load(path) as file:
        return json.loads(str(file["config"])) | changes


OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "finetuned": True}


@pytest.mark.parametrize(("name", "changes", "expected"), [
    ("llama", {"rope_parameters": None, "rope_theta": 7e5}, {"rotary_theta": 7e5}),
    ("llama", {"rope_parameters": None, "rope_scaling": OLD_YARN}, {"rotary_theta": 1e4, "rotary_scaling": {
        "kind": "yarn", "factor": 4.0, "original_length": 64, "attention_factor": 1.1386294361119891}}),
    ("llama", {"rope_scaling": OLD_YARN | {"mscale": 2.0, "mscale_all_dim": 1.0, "factor": None}},  # 256 / 64
     {"rotary_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 64,
                         "attention_factor": 1.2772588722239781 / 1.1386294361119891}}),
    ("llama", {"head_dim": None, "hidden_size": 24}, {"head_size": 6}),
    ("qwen2", {"hidden_size": 26}, {"head_size": 6}),  # transformers rounds down
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": True}, {"activation": "geglu", "biases": "feedforward"}),
    ("mistral", {"sliding_window": 256}, {"length": 256}),  # as long as all positions
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, {"length": 256}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}, {}),
    ("gpt2", {"n_inner": None, "activation_function": "gelu"}, {"feedforward": 60, "activation": "gelu_exact"}),
    ("gpt2", {"reorder_and_upcast_attn": True}, {}),
    ("gpt_neox", {"use_parallel_residual": False, "rotary_emb_base": 5e5, "attention_bias": False},
     {"residual": "sequential", "rotary_theta": 5e5, "biases": "feedforward", "rotary_part": 0.25}),
    ("starcoder2", {"use_bias": False, "norm_type": "layer_norm"}, {"biases": "none"}),
])
def test_configurations_as_they_are_published(name: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    values = decoder_values(of_golden(name, **changes))
    assert {key: values[key] for key in expected} == expected


def test_what_a_configuration_leaves_out_is_its_family_s() -> None:
    """As the configuration classes of transformers have it."""
    assert decoder_values({"model_type": "gpt2"}) == {
        "query_layer": False, "positions": "learned", "biases": "all", "layers": 12, "hidden": 768, "heads": 12,
        "feedforward": 3072, "vocabulary_size": 50_257, "length": 1024, "norm_epsilon": 1e-5, "tied_head": True,
        "activation": "gelu"}
    qwen3 = decoder_values({"model_type": "qwen3"})
    assert (qwen3["head_size"], qwen3["kv_heads"], qwen3["length"], qwen3["rotary_theta"]) == (128, 32, 32_768, 1e4)
    assert decoder_values({"model_type": "starcoder2"})["tied_head"]
    assert not decoder_values({"model_type": "gpt_neox"})["tied_head"]


@pytest.mark.parametrize(("name", "changes", "told"), [
    ("llama", {"num_local_experts": 8}, "num_local_experts = 8"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ("llama", {"alibi": True}, "alibi = True"),
    ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),  # gated by the exact form
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    ("llama", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "rope_type = 'longrope'"),
    ("llama", {"rope_scaling": OLD_YARN | {"truncate": False}}, "truncate = False"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "without a factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"hidden_size": "20"}, "hidden_size = '20'"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ("llama", {"num_key_value_heads": 3}, "kv_heads must divide heads"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
    ("mistral", {"sliding_window": 255}, "sliding_window = 255"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window = 8"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8,
               "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window = 8"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types = 'linear_attention'"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2", {"model_type": "gemma2"}, "'gemma2'"),
    ("qwen2", {"model_type": "qwen2_moe"}, "nearest: qwen2"),
    ("gpt2", {"model_type": None}, "model_type = None"),
])
def test_what_is_not_here_is_refused_by_name(name: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        decoder_values(of_golden(name, **changes))
    assert told in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


def shapes_of_golden(name: str) -> tuple[dict[str, Any], DecoderConfig, dict[str, tuple[int, ...]]]:
    facts = of_golden(name)
    config = DecoderConfig(**decoder_values(facts))
    return facts, config, {tensor.name: tensor.shape for tensor in published_tensors(facts, config)}


def test_a_file_of_the_model_without_its_head_is_read() -> None:
    """As the first GPT-2's is; masks and frequencies are no parameters."""
    facts, config, shapes = shapes_of_golden("gpt2")
    bare = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    found = matched(facts, config, bare | {"h.0.attn.bias": (1, 1, 32, 32), "h.1.attn.masked_bias": ()})
    assert [tensor.name for tensor in found] == list(bare)


def test_a_tied_head_that_is_stored_too_stands_last() -> None:
    facts, config, shapes = shapes_of_golden("qwen3")
    assert "lm_head.weight" not in shapes
    found = matched(facts, config, {"lm_head.weight": shapes["model.embed_tokens.weight"]} | shapes)
    assert found[-1].name == "lm_head.weight" and found[-1].places[0].leaf == "token_embedding"


def test_tensors_of_another_model_are_listed() -> None:
    facts, config, shapes = shapes_of_golden("qwen2")
    del shapes["model.norm.weight"]
    shapes |= {"model.layers.0.mlp.up_proj.weight": (24, 22), "model.layers.0.self_attn.q_norm.weight": (6,),
               **{f"model.layers.{number}.mlp.experts.weight": (2, 2) for number in range(5)}}
    with pytest.raises(ValueError) as error:
        matched(facts, config, shapes)
    assert "model.norm.weight [24] is missing" in str(error.value)
    assert "mlp.up_proj.weight [24, 22] instead of [22, 24] is of another shape" in str(error.value)
    assert "q_norm.weight [6], " in str(error.value) and "and 3 more are left over" in str(error.value)


def test_more_layers_than_there_are_tensors_take_no_time() -> None:
    facts, _, shapes = shapes_of_golden("llama")
    facts |= {"num_hidden_layers": 10**9}
    with pytest.raises(ValueError, match="1000000000 layers, but there are 21 tensors"):
        matched(facts, DecoderConfig(**decoder_values(facts)), shapes)


def test_gpt_pangu_is_the_decoder_with_the_query_layer() -> None:
    """Its last block, with a query embedding, behind the final norm; the head is the token embedding."""
    facts = {"model_type": "gpt_pangu", "hidden_size": 8, "num_layers": 3, "num_heads": 2, "vocab_size": 11,
             "max_position_embeddings": 5}
    config = DecoderConfig(**decoder_values(facts))
    assert config.query_layer and config.tied_head and config.feedforward == 32
    tensors: dict[str, PublishedTensor] = {tensor.name: tensor for tensor in published_tensors(facts, config)}
    assert tensors["transformer.wqe.weight"].places[0].leaf == "query_embedding"
    assert tensors["transformer.h.1.mlp.c_fc.weight"].places[0].key == ("blocks/feedforward/up_kernel", 1)
    assert tensors["transformer.h.2.attn.q_proj.weight"].places[0].key == ("query_block/attention/query_kernel", None)
    assert tensors["lm_head.weight"].places[0].leaf == "token_embedding"
    assert {tensor.name for tensor in published_tensors({"model_type": "codellm"}, config)} == set(tensors)
