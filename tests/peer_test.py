"""The PyTorch model of `benchmarks.accelerator` computes our loss; skipped where PyTorch is absent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from codellm_jax.model.decoder import Decoder, DecoderConfig, output_head
from codellm_jax.model.losses import cross_entropy

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
ROWS, LENGTH, VOCABULARY = 2, 128, 256
GPT = DecoderConfig(layers=2, hidden=64, heads=4, feedforward=96, vocabulary_size=VOCABULARY, length=LENGTH,
                    query_layer=False)
LLAMA = DecoderConfig(layers=2, hidden=64, heads=4, feedforward=96, vocabulary_size=VOCABULARY, length=LENGTH,
                      query_layer=False, kv_heads=2, norm="rms", positions="rotary", activation="swiglu",
                      biases="none", tied_head=False)


def batch_of_documents() -> dict[str, np.ndarray]:
    dice = np.random.default_rng(0)
    begins = dice.random((ROWS, LENGTH)) < 0.05
    begins[:, 0] = True
    index = np.broadcast_to(np.arange(LENGTH), begins.shape)
    tokens = dice.integers(0, VOCABULARY, (2, ROWS, LENGTH))
    return {"inputs": tokens[0], "targets": tokens[1], "segment_ids": np.cumsum(begins, axis=1),
            "positions": index - np.maximum.accumulate(np.where(begins, index, 0), axis=1),
            "weights": (dice.random((ROWS, LENGTH)) < 0.9).astype(np.float32)}


def weights_of(params: Any, config: DecoderConfig) -> dict[str, Any]:
    """Our parameters by the names of the peer's."""
    blocks = params["blocks"]
    found = {"tokens.weight": params["token_embedding"], "norm.weight": params["final_norm"]["scale"],
             "norm.bias": params["final_norm"].get("bias"), "head.weight": output_head(params),
             "positions.weight": params.get("position_embedding")}
    for layer in range(config.layers):
        def leaf(part: str, name: str, layer: int = layer) -> Any:
            return None if name not in blocks[part] else np.asarray(blocks[part][name][layer])

        qkv = [leaf("attention", f"{part}_kernel").T for part in ("query", "key", "value")]
        biases = [leaf("attention", f"{part}_bias") for part in ("query", "key", "value")]
        found |= {f"blocks.{layer}.{name}": value for name, value in {
            "norm1.weight": leaf("attention_norm", "scale"), "norm1.bias": leaf("attention_norm", "bias"),
            "norm2.weight": leaf("feedforward_norm", "scale"), "norm2.bias": leaf("feedforward_norm", "bias"),
            "qkv.weight": np.concatenate(qkv),
            "qkv.bias": None if biases[0] is None else np.concatenate([bias.ravel() for bias in biases]),
            "out.weight": leaf("attention", "output_kernel").T, "out.bias": leaf("attention", "output_bias")}.items()}
        for name in ("gate", "up", "down"):
            kernel = leaf("feedforward", f"{name}_kernel")
            found |= {f"blocks.{layer}.{name}.weight": None if kernel is None else kernel.T,
                      f"blocks.{layer}.{name}.bias": leaf("feedforward", f"{name}_bias")}
    return {name: torch.tensor(np.asarray(value)) for name, value in found.items() if value is not None}


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_the_peer_computes_our_loss(config: DecoderConfig) -> None:
    from benchmarks.torch_peer import Model, attention_of

    batch = batch_of_documents()
    tokens, targets, positions, segments = (
        jnp.asarray(batch[name], jnp.int32) for name in ("inputs", "targets", "positions", "segment_ids"))
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens, positions, segments)["params"])
    params = jax.tree.map(lambda leaf: leaf * 3, params)  # so that attention is far from uniform
    hidden: Any = Decoder(config).apply({"params": params}, tokens, positions, segments)
    total, _ = cross_entropy(hidden, output_head(params), targets, jnp.asarray(batch["weights"]))
    model = Model(config)
    model.load_state_dict(weights_of(params, config))
    given = {name: torch.tensor(value) for name, value in batch.items()}
    found = {}
    with torch.inference_mode():
        for kind in ("dense", "flex"):
            found[kind] = float(model(given, attention_of(kind, given["segment_ids"])))
        alone = float(model(given, attention_of("dense", torch.ones_like(given["segment_ids"]))))
    assert found == pytest.approx(dict.fromkeys(found, float(total) / batch["weights"].sum()), rel=1e-5)
    assert alone != pytest.approx(found["dense"], rel=1e-3)  # documents do matter
