"""Random models of every family beside transformers: logits, greedy text and the gradients of a training step.

Each configuration is drawn from its number. transformers makes the model and saves it; it is read as `t5x import` does.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published import write_tokenizer

from codellm_jax.evaluation.decoding import generate
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.mixture.batches import Batch
from codellm_jax.model.decoder import Decoder
from codellm_jax.runtime.partitioning import MeshShape, make_mesh
from codellm_jax.runtime.state import TrainState, abstract_state
from codellm_jax.training.train import train_step
from codellm_jax.weights.importing import Source, open_source, parameters_on_mesh

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "olmo2", "starcoder2")
MODELS = 20  # two or three of each family
LENGTH, VOCABULARY, NEW = 24, 61, 8
SCALINGS = ("default", "linear", "llama3", "yarn")


def draw_settings(number: int) -> dict[str, Any]:
    """A config.json: odd sizes, one head of keys or several, each scaling, tied heads and others."""
    dice = np.random.default_rng(number)

    def choose(*options: Any) -> Any:
        return options[dice.integers(len(options))]

    family = FAMILIES[number % len(FAMILIES)]
    heads = choose(1, 2, 3, 4, 6)
    keys = choose(*(count for count in range(1, heads + 1) if heads % count == 0))
    size = choose(6, 10, 14, 18)
    common = {"model_type": family, "vocab_size": VOCABULARY, "tie_word_embeddings": choose(True, False),
              "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    layers, wide, epsilon = choose(1, 2, 3), choose(17, 33, 50), choose(1e-5, 1e-6)
    if family == "gpt2":
        return common | {"n_positions": choose(40, 57), "n_embd": heads * choose(5, 7, 8), "n_layer": layers,
                         "n_head": heads, "n_inner": choose(None, wide), "layer_norm_epsilon": epsilon,
                         "activation_function": choose("gelu_new", "gelu")}
    common |= {"num_hidden_layers": layers, "hidden_size": heads * size, "num_attention_heads": heads,
               "intermediate_size": wide, "max_position_embeddings": 64}
    theta = choose(10_000.0, 500_000.0)
    if family == "gpt_neox":
        return common | {
            "layer_norm_eps": epsilon, "hidden_act": choose("gelu", "gelu_new"), "attention_bias": choose(True, False),
            "use_parallel_residual": choose(True, False),
            "rope_parameters": {"rope_type": "default", "rope_theta": theta,
                                "partial_rotary_factor": choose(2, 4, size) / size}}
    kind = SCALINGS[(number // len(FAMILIES) + number) % len(SCALINGS)]
    rope = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = choose(2.0, 3.5)
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 16
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": choose(3.0, 4.0)}
    if kind == "yarn":
        rope |= choose({}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"attention_factor": 1.25})
    common |= {"num_key_value_heads": keys, "rope_parameters": rope}
    if family == "starcoder2":
        return common | {"norm_epsilon": epsilon, "use_bias": choose(True, False), "sliding_window": None,
                         "hidden_act": choose("gelu_pytorch_tanh", "gelu")}
    common |= {"rms_norm_eps": epsilon, "hidden_act": choose("silu", "gelu_pytorch_tanh")}
    if family in ("llama", "mistral", "qwen3") and choose(True, False):  # heads are not D / H
        common["head_dim"] = size + 2
    if family in ("llama", "qwen3", "olmo2"):
        common["attention_bias"] = choose(True, False)
    if family == "llama":
        common["mlp_bias"] = choose(True, False)
    return common | ({"sliding_window": None} if family == "mistral" else {})


def test_what_is_drawn() -> None:
    drawn = [draw_settings(number) for number in range(MODELS)]
    assert {settings["model_type"] for settings in drawn} == set(FAMILIES)
    assert {settings["tie_word_embeddings"] for settings in drawn} == {True, False}
    assert {settings["rope_parameters"]["rope_type"] for settings in drawn if "rope_parameters" in settings} == set(
        SCALINGS)
    heads = {(settings["num_key_value_heads"] == 1, settings["num_attention_heads"] > settings["num_key_value_heads"])
             for settings in drawn if "num_key_value_heads" in settings}
    assert {(True, True), (False, True), (False, False)} <= heads
    assert any("head_dim" in settings for settings in drawn)


class Pair(NamedTuple):
    """A model in transformers, the same read from its files, our parameters, and a generator for what is asked."""

    theirs: Any
    source: Source
    params: Any
    dice: np.random.Generator


@pytest.fixture(scope="module", params=range(MODELS), ids=lambda number: f"{number}-{FAMILIES[number % 8]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.for_model(**draw_settings(request.param))
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(request.param)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            scale_of_norm = parameter.ndim == 1 and name.endswith("weight")
            # Logits of about 1: a tolerance of 1e-4 is then some hundred roundings of float32.
            spread = 0.2 if parameter.ndim == 1 else 1.0 / math.sqrt(parameter.shape[-1])
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator) + scale_of_norm)
    theirs.eval()
    theirs.save_pretrained(folder, max_shard_size=["5GB", "20KB"][request.param % 2])
    write_tokenizer(folder)
    source = open_source(str(folder))
    shape = MeshShape(data=1)
    mesh = make_mesh(shape, jax.devices()[:1])
    abstract = abstract_state(Decoder(source.config), optax.identity(), mesh, shape).params
    yield Pair(theirs, source, parameters_on_mesh(source, abstract), np.random.default_rng(request.param))


def test_logits_are_equal(pair: Pair) -> None:
    model = Decoder(pair.source.config)
    tokens_BL = pair.dice.integers(0, VOCABULARY, (3, LENGTH)).astype(np.int32)
    positions_BL = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))

    @jax.jit
    def compute(params: Any) -> Any:
        hidden_BLD = model.apply({"params": params}, tokens_BL, positions_BL, jnp.zeros_like(tokens_BL))
        return model.apply({"params": params}, hidden_BLD, method="logits")

    with torch.no_grad():
        expected_BLV = pair.theirs(torch.from_numpy(tokens_BL).long()).logits.numpy()
    assert np.abs(expected_BLV).max() > 0.3
    np.testing.assert_allclose(compute(pair.params), expected_BLV, atol=1e-4, rtol=0)


def test_greedy_text_is_equal(pair: Pair) -> None:
    """Both with a cache of keys and values."""
    prompts = pair.dice.integers(0, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = pair.theirs.generate(
            torch.from_numpy(prompts), attention_mask=torch.ones(2, 9, dtype=torch.long), do_sample=False,
            max_new_tokens=NEW, min_new_tokens=NEW, use_cache=True)
    found = generate(pair.params, pair.source.config, prompts.tolist(), Sampling(temperature=0.0, max_new_tokens=NEW),
                     turn=4)
    assert [answer.ids for answer in found] == expected[:, 9:].tolist()


def test_gradients_of_a_training_step_are_equal(pair: Pair) -> None:
    """Two documents a row in ours, a row each in theirs; tied weights and fused ones are compared as published."""
    half = LENGTH // 2
    tokens_BL, targets_BL = (pair.dice.integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32) for _ in range(2))
    weights_BL = (pair.dice.random((2, LENGTH)) < 0.8).astype(np.float32)
    positions_BL = np.tile(np.arange(LENGTH, dtype=np.int32) % half, (2, 1))
    segments_BL = np.tile(1 + np.arange(LENGTH, dtype=np.int32) // half, (2, 1))
    batch = Batch(tokens_BL, targets_BL, positions_BL, segments_BL, weights_BL, np.zeros_like(tokens_BL))
    # An optimizer whose state is the gradient.
    keep = optax.GradientTransformation(lambda params: params, lambda gradients, _, params: (params, gradients))
    step = jax.jit(functools.partial(train_step, model=Decoder(pair.source.config), optimizer=keep, sources=1))
    rng = jax.random.key_data(jax.random.key(0))
    state, metrics = step(TrainState(jnp.zeros((), jnp.int32), pair.params, pair.params, rng), batch)

    pair.theirs.zero_grad()
    logits = pair.theirs(torch.from_numpy(tokens_BL.reshape(4, half)).long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), torch.from_numpy(targets_BL.ravel()).long(), reduction="none")
    loss = (losses * torch.from_numpy(weights_BL.ravel())).sum() / float(weights_BL.sum())
    loss.backward()
    assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-5)

    leaves = {"/".join(key.key for key in path): np.asarray(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    expected = {name: parameter.grad.numpy() for name, parameter in pair.theirs.named_parameters()}
    if "embed_out.weight" in pair.source.tensors.shapes:  # as it is saved
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    assert {tensor.name for tensor in pair.source.published} == set(expected)
    for tensor in pair.source.published:
        found = tensor.write({place.key: leaves[place.leaf] if place.layer is None else leaves[place.leaf][place.layer]
                              for place in tensor.places})
        scale = np.abs(expected[tensor.name]).max()
        assert scale > 1e-6, tensor.name
        np.testing.assert_allclose(found, expected[tensor.name], atol=1e-4 * scale, rtol=0, err_msg=tensor.name)
