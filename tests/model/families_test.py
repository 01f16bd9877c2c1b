"""Published families are values of one decoder: their logits equal those of transformers, kept in tests/model/golden/.

`golden.py` tells how the files are made. A function for each way of naming tensors lays them out as our parameters.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from codellm_jax.evaluation import scoring
from codellm_jax.evaluation.decoding import generate
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.scoring import Request, score
from codellm_jax.model.decoder import Decoder, DecoderConfig, init_cache

FILES = sorted((Path(__file__).resolve().parent / "golden").glob("*.npz"))
Tensors = Mapping[str, np.ndarray]

# From published settings to ours.


def of_gpt2(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"layers": facts["n_layer"], "hidden": facts["n_embd"], "heads": facts["n_head"],
            "feedforward": facts["n_inner"], "vocabulary_size": facts["vocab_size"], "length": facts["n_positions"]}


def of_all_rotary(facts: Mapping[str, Any]) -> dict[str, Any]:
    rope = facts.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10_000.0}
    names = {"rope_type": "kind", "original_max_position_embeddings": "original_length", "low_freq_factor": "slow",
             "high_freq_factor": "fast", "factor": "factor"}
    scaling = {ours: rope[theirs] for theirs, ours in names.items() if theirs in rope}
    return {"layers": facts["num_hidden_layers"], "hidden": facts["hidden_size"],
            "heads": facts["num_attention_heads"], "kv_heads": facts.get("num_key_value_heads"),
            "head_size": facts.get("head_dim"), "feedforward": facts["intermediate_size"],
            "vocabulary_size": facts["vocab_size"], "length": 32, "positions": "rotary",
            "rotary_theta": rope["rope_theta"],
            "rotary_scaling": None if rope["rope_type"] == "default" else scaling,
            "tied_head": facts["tie_word_embeddings"]}


def of_gpt_neox(facts: Mapping[str, Any]) -> dict[str, Any]:
    return of_all_rotary(facts) | {
        "residual": "parallel", "rotary_part": facts["rotary_pct"], "activation": "gelu_exact"}


def of_llama(facts: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    return of_all_rotary(facts) | {
        "norm": "rms", "norm_epsilon": facts.get("rms_norm_eps", 1e-6), "activation": "swiglu",
        "biases": "attention" if facts.get("attention_bias") else "none"} | others


FAMILIES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gpt2": of_gpt2,
    "gpt_neox": of_gpt_neox,
    "llama": of_llama,
    "mistral": of_llama,
    "qwen2": functools.partial(of_llama, biases="query_key_value"),
    "qwen3": functools.partial(of_llama, query_key_norm="head"),
    "olmo2": functools.partial(of_llama, norm_epsilon=1e-5, norm_place="after", query_key_norm="width"),
    "starcoder2": of_all_rotary,
}


# From published tensors to ours.


def split_gpt2(config: DecoderConfig, tensors: Tensors) -> dict[str, np.ndarray]:
    """Fused queries, keys and values, one behind the other; kernels [in, out] already."""
    split = {}
    for name, tensor in tensors.items():
        if ".c_attn." not in name:
            split[name] = tensor
            continue
        for part, piece in zip(("q", "k", "v"), np.split(tensor, 3, axis=-1), strict=True):
            split[name.replace("c_attn", part)] = piece
    return {name: tensor.T if tensor.ndim == 2 and ".h." in name else tensor for name, tensor in split.items()}


def split_gpt_neox(config: DecoderConfig, tensors: Tensors) -> dict[str, np.ndarray]:
    """Fused queries, keys and values, interleaved by head."""
    split = {}
    for name, tensor in tensors.items():
        if "query_key_value" not in name:
            split[name] = tensor
            continue
        by_head = tensor.reshape(config.heads, 3, config.size_of_head, *tensor.shape[1:])
        for index, part in enumerate("qkv"):
            split[name.replace("query_key_value", part)] = by_head[:, index].reshape(-1, *tensor.shape[1:])
    return split


# Where a tensor stands in a block -> its place among ours; kernels are published as [out, in].
IN_BLOCK = {
    "gpt2": {"ln_1": "attention_norm", "ln_2": "feedforward_norm", "attn.q": "attention/query",
             "attn.k": "attention/key", "attn.v": "attention/value", "attn.c_proj": "attention/output",
             "mlp.c_fc": "feedforward/up", "mlp.c_proj": "feedforward/down"},
    "gpt_neox": {"input_layernorm": "attention_norm", "post_attention_layernorm": "feedforward_norm",
                 "attention.q": "attention/query", "attention.k": "attention/key", "attention.v": "attention/value",
                 "attention.dense": "attention/output", "mlp.dense_h_to_4h": "feedforward/up",
                 "mlp.dense_4h_to_h": "feedforward/down"},
    "llama": {"input_layernorm": "attention_norm", "post_attention_layernorm": "feedforward_norm",
              "self_attn.q_proj": "attention/query", "self_attn.k_proj": "attention/key",
              "self_attn.v_proj": "attention/value", "self_attn.o_proj": "attention/output",
              "self_attn.q_norm": "attention/query_norm", "self_attn.k_norm": "attention/key_norm",
              "mlp.gate_proj": "feedforward/gate", "mlp.up_proj": "feedforward/up",
              "mlp.down_proj": "feedforward/down", "mlp.c_fc": "feedforward/up", "mlp.c_proj": "feedforward/down"},
}
IN_BLOCK["olmo2"] = IN_BLOCK["llama"] | {
    "post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "feedforward_norm"}
OUTSIDE = {
    "transformer.wte.weight": "token_embedding", "transformer.wpe.weight": "position_embedding",
    "transformer.ln_f.weight": "final_norm/scale", "transformer.ln_f.bias": "final_norm/bias",
    "gpt_neox.embed_in.weight": "token_embedding", "gpt_neox.final_layer_norm.weight": "final_norm/scale",
    "gpt_neox.final_layer_norm.bias": "final_norm/bias", "model.embed_tokens.weight": "token_embedding",
    "model.norm.weight": "final_norm/scale", "model.norm.bias": "final_norm/bias", "lm_head.weight": "lm_head"}


def lay_out(family: str, config: DecoderConfig, tensors: Tensors) -> Any:
    """Our parameters; every published tensor has its place, and every place its tensor."""
    if family in ("gpt2", "gpt_neox"):
        tensors = {"gpt2": split_gpt2, "gpt_neox": split_gpt_neox}[family](config, tensors)
    places = IN_BLOCK.get(family, IN_BLOCK["llama"])
    flat: dict[str, Any] = {}
    for name, tensor in tensors.items():
        in_block = re.fullmatch(r"[a-z_]+\.(?:h|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        if not in_block:
            flat[OUTSIDE[name]] = tensor
            continue
        layer, part, kind = int(in_block[1]), places[in_block[2]], in_block[3]
        is_norm = part.endswith("norm")
        place = f"{part}{'/' if is_norm else '_'}" + {"weight": "scale" if is_norm else "kernel", "bias": "bias"}[kind]
        flat.setdefault(f"blocks/{place}", {})[layer] = tensor.T
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes, tree = jax.tree_util.tree_flatten_with_path(
        nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, ids, ids)["params"]))
    leaves = []
    for path, leaf in shapes:
        value = flat.pop("/".join(key.key for key in path))
        stacked = np.stack([value[layer] for layer in range(config.layers)]) if isinstance(value, dict) else value
        leaves.append(jnp.asarray(stacked, jnp.float32).reshape(leaf.shape))
    assert not flat
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def read(path: Path) -> tuple[DecoderConfig, Any, np.ndarray, np.ndarray]:
    """Configuration, parameters, tokens and logits of a file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(str(arrays.pop("config")))
    tokens_BL, logits_BLV = arrays.pop("tokens"), arrays.pop("logits")
    config = DecoderConfig(**{"query_layer": False} | FAMILIES[facts["model_type"]](facts))
    return config, lay_out(facts["model_type"], config, arrays), tokens_BL, logits_BLV


def compute_logits(config: DecoderConfig, params: Any, *inputs: Any) -> Any:
    def run(params: Any, *inputs: Any) -> Any:
        hidden_BLD = Decoder(config).apply({"params": params}, *inputs)
        return Decoder(config).apply({"params": params}, hidden_BLD, method="logits")

    return jax.jit(run)(params, *inputs)


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
small = {"atol": 1e-4, "rtol": 0}


def test_every_family_has_its_file() -> None:
    assert set(FAMILIES) <= {path.stem for path in FILES} and len(FILES) == 12
    assert sum(path.stat().st_size for path in FILES) < 300_000


@every_file
def test_logits_equal_those_of_transformers(path: Path) -> None:
    """In one row beside another document, too, which neither sees."""
    config, params, tokens_BL, expected_BLV = read(path)
    length = tokens_BL.shape[1]
    positions_BL = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    np.testing.assert_allclose(
        compute_logits(config, params, tokens_BL, positions_BL, np.zeros_like(tokens_BL)), expected_BLV, **small)
    both = (np.concatenate(list(array))[None] for array in (
        tokens_BL, positions_BL, np.repeat([[0], [1]], length, axis=1).astype(np.int32)))
    found_1LV = compute_logits(config, params, *both)
    np.testing.assert_allclose(found_1LV.reshape(expected_BLV.shape), expected_BLV, **small)


@pytest.mark.parametrize("name", ["gpt_neox", "llama_yarn", "olmo2"])
def test_bfloat16_is_close(name: str) -> None:
    config, params, tokens_BL, expected_BLV = read(FILES[0].with_stem(name))
    positions_BL = np.tile(np.arange(tokens_BL.shape[1], dtype=np.int32), (2, 1))
    config = dataclasses.replace(config, dtype="bfloat16", attention="reference")
    logits_BLV = compute_logits(config, params, tokens_BL, positions_BL, np.zeros_like(tokens_BL))
    assert logits_BLV.dtype == jnp.float32
    assert 1e-4 < np.abs(logits_BLV - expected_BLV).max() < 0.1


@every_file
def test_the_cache_equals_the_whole_row(path: Path) -> None:
    config, params, tokens_BL, expected_BLV = read(path)
    positions_BL = np.tile(np.arange(tokens_BL.shape[1], dtype=np.int32), (2, 1))
    decoder = Decoder(config)

    @jax.jit
    def step(cache: Any, *inputs: Any) -> tuple[Any, Any]:
        variables = {"params": params, "cache": cache}
        hidden_BLD, changed = decoder.apply(variables, *inputs, decode=True, mutable=["cache"])
        return decoder.apply(variables, hidden_BLD, method="logits"), changed["cache"]

    cache = init_cache(config, batch=2, length=tokens_BL.shape[1])
    held = {leaf.shape for leaf in jax.tree.leaves(cache["blocks"])}
    assert held == {(config.layers, 2, config.key_heads, tokens_BL.shape[1], config.size_of_head)}
    for part in (slice(0, 4), slice(4, 7), *(slice(i, i + 1) for i in range(7, tokens_BL.shape[1]))):
        logits_BLV, cache = step(cache, tokens_BL[:, part], positions_BL[:, part], np.zeros_like(tokens_BL[:, part]))
        np.testing.assert_allclose(logits_BLV, expected_BLV[:, part], **small)


@every_file
def test_branches_of_a_scoring_tree_equal_rows_of_their_own(path: Path) -> None:
    """Two continuations behind one stem, the one as it stands in the file."""
    config, params, tokens_BL, expected_BLV = read(path)
    row = tokens_BL[0].tolist()
    other = [*row[7:9], (row[9] + 1) % config.vocabulary_size, row[10]]
    branches = [Request(0, row[:7], row[7:]), Request(0, row[:7], other)]
    assert len(scoring._plan_rows(config, branches)) == 1
    log_probabilities_LV = np.asarray(jax.nn.log_softmax(expected_BLV[0].astype(np.float64)))
    found, of_other = score(params, config, branches)
    np.testing.assert_allclose(found, log_probabilities_LV[np.arange(6, len(row) - 1), row[7:]], **small)
    np.testing.assert_allclose(of_other[:2], found[:2], **small)
    np.testing.assert_allclose(of_other, score(params, config, branches[1:])[0], **small)


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "qwen3"])
def test_decoding_goes_on_greedily(name: str) -> None:
    """Prompts of two lengths in a batch, each token the likeliest of the whole row."""
    config, params, tokens_BL, _ = read(FILES[0].with_stem(name))
    prompts = [tokens_BL[0, :5].tolist(), tokens_BL[1, :8].tolist()]
    found = generate(params, config, prompts, Sampling(max_new_tokens=4, temperature=0.0), turn=2)
    for prompt, generation in zip(prompts, found, strict=True):
        row = [*prompt, *generation.ids]
        tokens_1L, positions_1L = np.asarray([row], np.int32), np.arange(len(row), dtype=np.int32)[None]
        logits_1LV = compute_logits(config, params, tokens_1L, positions_1L, np.zeros_like(tokens_1L))
        assert np.argmax(logits_1LV[0, len(prompt) - 1 : -1], axis=-1).tolist() == generation.ids
        assert len(generation.ids) == 4
