"""Published families are values of one decoder: their logits equal those of transformers, kept in tests/model/golden/.

`golden.py` tells how the files are made; `codellm_jax.weights` lays them out as our parameters.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
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
from codellm_jax.weights.families import FAMILIES
from codellm_jax.weights.layouts import decoder_values, matched

FILES = sorted((Path(__file__).resolve().parent / "golden").glob("*.npz"))

def lay_out(facts: Mapping[str, Any], config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> Any:
    """Our parameters; every published tensor has its place, and every place its tensor."""
    flat: dict[str, Any] = {}
    for tensor in matched(facts, config, {name: array.shape for name, array in tensors.items()}):
        for (leaf, layer), array in tensor.read(tensors[tensor.name].astype(np.float32)).items():
            if layer is None:
                flat[leaf] = array
            else:
                flat.setdefault(leaf, {})[layer] = array
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes, tree = jax.tree_util.tree_flatten_with_path(
        nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, ids, ids)["params"]))
    leaves = []
    for path, leaf in shapes:
        value = flat.pop("/".join(key.key for key in path))
        stacked = np.stack([value[layer] for layer in range(config.layers)]) if isinstance(value, dict) else value
        assert stacked.shape == leaf.shape
        leaves.append(jnp.asarray(stacked))
    assert not flat
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def read(path: Path) -> tuple[DecoderConfig, Any, np.ndarray, np.ndarray]:
    """Configuration, parameters, tokens and logits of a file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(str(arrays.pop("config")))
    tokens_BL, logits_BLV = arrays.pop("tokens"), arrays.pop("logits")
    config = DecoderConfig(**decoder_values(facts))
    return config, lay_out(facts, config, arrays), tokens_BL, logits_BLV


def compute_logits(config: DecoderConfig, params: Any, *inputs: Any) -> Any:
    def run(params: Any, *inputs: Any) -> Any:
        hidden_BLD = Decoder(config).apply({"params": params}, *inputs)
        return Decoder(config).apply({"params": params}, hidden_BLD, method="logits")

    return jax.jit(run)(params, *inputs)


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
small = {"atol": 1e-4, "rtol": 0}


def test_every_family_has_its_file() -> None:
    assert set(FAMILIES) - {"gpt_pangu"} <= {path.stem for path in FILES} and len(FILES) == 12
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
