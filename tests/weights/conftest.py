"""Run directories of small random models, saved as by training.

A test that takes `decoder` runs for each of DECODERS, one that takes `own_decoder` for those of no published family.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.checkpoints import Checkpoints
from codellm_jax.vocabulary import Vocabulary, load_vocabulary

LLAMA: dict[str, Any] = {
    "norm": "rms", "positions": "rotary", "activation": "swiglu", "biases": "none", "query_layer": False,
    "tied_head": False, "head_size": 6, "kv_heads": 1}
NEOX: dict[str, Any] = {
    "positions": "rotary", "rotary_part": 0.25, "residual": "parallel", "activation": "gelu_exact",
    "tied_head": False, "query_layer": False, "hidden": 32}

# Maps names to the family as which the model is written, and the configuration.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"query_layer": False, "hidden": 15, "heads": 3}),
    "gpt2_fast_gelu": ("gpt2", {"query_layer": False, "activation": "fast_gelu", "tied_head": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox_sequential": ("gpt_neox", NEOX | {"residual": "sequential", "rotary_part": 0.5}),
    "llama": ("llama", LLAMA),
    "llama_tied_one_layer": ("llama", LLAMA | {"tied_head": True, "kv_heads": 2, "layers": 1}),
    "llama_biased": ("llama", LLAMA | {"biases": "all", "norm_epsilon": 1e-6}),
    "llama_linear": ("llama", LLAMA | {"rotary_scaling": {"kind": "linear", "factor": 3.0}}),
    "llama_llama3": ("llama", LLAMA | {"rotary_scaling": {"kind": "llama3", "factor": 8.0, "original_length": 16}}),
    "llama_yarn": ("llama", LLAMA | {"head_size": 10, "rotary_scaling": {
        "kind": "yarn", "factor": 4.0, "original_length": 8}}),
    "qwen2": ("qwen2", LLAMA | {"biases": "query_key_value", "head_size": None, "hidden": 24, "tied_head": True}),
    "qwen3": ("qwen3", LLAMA | {"query_key_norm": "head", "head_size": 8, "rotary_theta": 1e6}),
    "olmo2": ("olmo2", LLAMA | {"query_key_norm": "width", "norm_place": "after", "head_size": None, "hidden": 24}),
    "starcoder2": ("starcoder2", {"positions": "rotary", "kv_heads": 2, "query_layer": False, "hidden": 24}),
    "pangu": ("codellm", {}),
    "query_layer_alone": ("codellm", {"layers": 1, "activation": "fast_gelu"}),
    "query_layer_llama": ("codellm", LLAMA | {"query_layer": True, "layers": 3, "query_key_norm": "width"}),
    "parallel_rms": ("codellm", LLAMA | {"residual": "parallel", "activation": "geglu", "rotary_part": 0.67,
                                         "head_size": 9, "biases": "feedforward"}),
    "after_layer": ("codellm", {"norm_place": "after", "positions": "rotary", "kv_heads": 2, "head_size": 2,
                                "query_key_norm": "head", "biases": "attention", "rotary_scaling": {
                                    "kind": "yarn", "factor": 4.0, "original_length": 8, "attention_factor": 1.2}}),
    "gated_learned": ("codellm", {"query_layer": False, "activation": "geglu", "norm": "rms", "biases": "all",
                                  "kv_heads": 1, "head_size": 7, "query_key_norm": "width"}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = {name: decoder for name, decoder in DECODERS.items() if decoder[0] == "codellm"}
    for name, decoders in (("decoder", DECODERS), ("own_decoder", own)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, decoders.values(), ids=decoders)


def random_parameters(config: DecoderConfig, seed: int = 0) -> Any:
    """Random parameters, including biases and norms, so that no error stays hidden."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, ids, ids)["params"])
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    return jax.tree.unflatten(tree, [leaf + 1 if path[-1].key == "scale" else leaf
                                     for path, leaf in zip(paths, drawn, strict=True)])


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """The shipped vocabulary, with more rows than ids."""
    return load_vocabulary("python_8k", multiple=200)


@pytest.fixture
def save_run(tmp_path: Path, vocabulary: Vocabulary) -> Callable[..., tuple[Path, DecoderConfig, Any]]:
    """Saves a run of a decoder with the shipped vocabulary; returns its directory, the decoder and the newest
    checkpoint's parameters. `ledger` adds to or replaces fields of its ledger.
    """

    def save(
        values: dict[str, Any], name: str = "run", steps: tuple[int, ...] = (3,), ledger: dict[str, Any] | None = None,
    ) -> tuple[Path, DecoderConfig, Any]:
        config = DecoderConfig(**{
            "layers": 2, "hidden": 20, "heads": 4, "feedforward": 22, "length": 32, "vocabulary_size": vocabulary.size,
        } | values)
        settings = {f"model.{field.name}": repr(values.get(field.name, getattr(config, field.name)))
                    for field in dataclasses.fields(config) if field.name not in ("vocabulary_size", "length")}
        settings |= {"vocabulary.path": "'python_8k'", "vocabulary.multiple": "200", "SEED": "7",
                     "LEARNING_RATE": "0.5"}
        record = {"settings": settings,
                  "ledger": {"stage": "pretraining", "order_fingerprint": "f" * 64, "length": config.length,
                             "vocabulary_hash": vocabulary.content_hash, "rows": {"text.a": 30, "code.b": 10},
                             "tokens": {"text.a": 960, "code.b": 320}, "before": [], "phases": [],
                             "epoch_rows": {"text.a": 40, "code.b": 4}} | (ledger or {})}
        run = tmp_path / name
        with Checkpoints(str(run / "checkpoints"), keep_last=len(steps)) as checkpoints:
            for step in steps:
                params = random_parameters(config, step)
                checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, record)
                checkpoints.wait()
        return run, config, params

    return save
