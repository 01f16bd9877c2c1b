"""Regenerates the files of tests/model/golden/: small random models of published families, with inputs and logits.

    pip install torch transformers
    python tests/model/golden.py

Each file holds the tensors under their published names (exact in float16), the configuration as JSON, tokens int32
[2, L] and the logits float32 [2, L, V] that transformers computes in float32. `families_test.py` compares the decoder
with them, and needs neither library.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).resolve().parent / "golden"
LENGTH, VOCABULARY = 12, 29

ROTARY = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 256, "hidden_size": 20,
          "intermediate_size": 22, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None,
          "bos_token_id": None, "eos_token_id": None}
LLAMA = {"model_type": "llama", **ROTARY, "head_dim": 6, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 15, "n_layer": 2, "n_head": 3,
             "n_inner": 22, "bos_token_id": None, "eos_token_id": None},
    "gpt_neox": {"model_type": "gpt_neox", "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2,
                 "num_attention_heads": 2, "intermediate_size": 22, "max_position_embeddings": 32, "rotary_pct": 0.25,
                 "use_parallel_residual": True, "tie_word_embeddings": False},
    # A single head of keys, and a head size other than D / H.
    "llama": LLAMA | {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "llama_llama3": LLAMA | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "llama_linear": LLAMA | {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}},
    "llama_yarn": LLAMA | {"head_dim": 10, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama_biased": LLAMA | {"attention_bias": True},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": None, "rms_norm_eps": 1e-6},
    "qwen2": {"model_type": "qwen2", **ROTARY, "hidden_size": 24, "tie_word_embeddings": True,
              "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", **ROTARY, "head_dim": 8, "tie_word_embeddings": True, "use_sliding_window": False},
    "olmo2": {"model_type": "olmo2", **ROTARY, "hidden_size": 24, "tie_word_embeddings": False},
    "starcoder2": {"model_type": "starcoder2", **ROTARY, "hidden_size": 24, "sliding_window": None,
                   "tie_word_embeddings": True, "embedding_dropout": 0.0},
}


def make(name: str, settings: dict[str, Any]) -> None:
    """Writes a model with all parameters random, including biases and norms, so that no error stays hidden."""
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = 0.25 * torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and key.endswith("weight")
            parameter.copy_((drawn + 1.0 if is_norm else drawn).to(torch.float16).to(torch.float32))
        tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
        logits = model(tokens).logits
    # A tied head has two names but is stored once.
    tensors = {key: parameter.detach().numpy().astype(np.float16) for key, parameter in model.named_parameters()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(
        FOLDER / f"{name}.npz", **tensors, config=np.asarray(json.dumps(settings)),
        tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    for name, settings in MODELS.items():
        make(name, settings)
    print(sum(path.stat().st_size for path in FOLDER.iterdir()), "bytes in", FOLDER)
