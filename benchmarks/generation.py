"""Generation compared with Hugging Face's, with the same weights in the same run.

    python -m benchmarks.generation            also needs torch and transformers
    python -m benchmarks.generation 1_3b       with the sizes of gin/models/1_3b.gin, on a GPU if there is one

64 tokens after a prompt of 64, greedily, for 1 prompt and for 16: `generate` of Hugging Face (GPT-2) and ours. The
weights are random, without a query layer. By default the model has 4 layers x 256, 4 heads, feed-forward 1024,
vocabulary 8192, 512 positions, float32, and all tokens must be the same. In bfloat16, where rounding decides between
near candidates, each of our tokens must be the best by Hugging Face's logits, or within NEAR of it.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as nn
from transformers import GPT2Config, GPT2LMHeadModel

from codellm_jax.evaluation.decoding import generate
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.model.decoder import Decoder, DecoderConfig

SMALL = DecoderConfig(layers=4, hidden=256, heads=4, feedforward=1024, vocabulary_size=8192, length=512,
                      query_layer=False)
VOCABULARY, PROMPT, NEW = 40_000, 64, 64
NEAR = 0.5  # standard deviations of the logits


def config_of(size: str | None) -> DecoderConfig:
    """The sizes of a file of gin/models/, as a GPT of VOCABULARY tokens; SMALL without one."""
    if size is None:
        return SMALL
    from benchmarks.accelerator import training_of

    training = training_of(size, [])
    config = training.model(vocabulary_size=VOCABULARY, length=PROMPT + NEW)
    return dataclasses.replace(config, query_layer=False, attention="auto", scan_unroll=1)


def random_params(config: DecoderConfig) -> Any:
    tokens = np.zeros((1, 8), np.int32)
    params = nn.unbox(jax.jit(Decoder(config).init)(jax.random.key(0), tokens, tokens, tokens)["params"])
    return jax.tree.map(lambda leaf: leaf * 2, params)  # so that likelihoods differ by far more than rounding


def as_gpt2(params: Any, config: DecoderConfig) -> GPT2LMHeadModel:
    """The same weights in Hugging Face's GPT-2, which keeps query, key and value in one matrix."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocabulary_size, n_positions=config.length, n_embd=config.hidden, n_layer=config.layers,
        n_head=config.heads, n_inner=config.feedforward, activation_function="gelu_new", bos_token_id=0,
        eos_token_id=None, pad_token_id=0)).eval()
    blocks = jax.tree.map(np.asarray, params["blocks"])
    attention, feedforward = blocks["attention"], blocks["feedforward"]
    state = {"transformer.wte.weight": params["token_embedding"], "lm_head.weight": params["token_embedding"],
             "transformer.wpe.weight": params["position_embedding"],
             "transformer.ln_f.weight": params["final_norm"]["scale"],
             "transformer.ln_f.bias": params["final_norm"]["bias"]}
    for layer in range(config.layers):
        name = f"transformer.h.{layer}"
        parts = [(attention[f"{part}_kernel"][layer], attention[f"{part}_bias"][layer].ravel())
                 for part in ("query", "key", "value")]
        state |= {
            f"{name}.attn.c_attn.weight": np.concatenate([kernel for kernel, _ in parts], axis=1),
            f"{name}.attn.c_attn.bias": np.concatenate([bias for _, bias in parts]),
            f"{name}.attn.c_proj.weight": attention["output_kernel"][layer],
            f"{name}.attn.c_proj.bias": attention["output_bias"][layer],
            f"{name}.mlp.c_fc.weight": feedforward["up_kernel"][layer],
            f"{name}.mlp.c_fc.bias": feedforward["up_bias"][layer],
            f"{name}.mlp.c_proj.weight": feedforward["down_kernel"][layer],
            f"{name}.mlp.c_proj.bias": feedforward["down_bias"][layer]}
        for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "feedforward_norm")):
            state |= {f"{name}.{theirs}.weight": blocks[ours]["scale"][layer],
                      f"{name}.{theirs}.bias": blocks[ours]["bias"][layer]}
    model.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()})
    return model


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def report(name: str, unit: str, count: int, ours: list[float], theirs: list[float]) -> None:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(f"{name:<22} ours {count / statistics.median(ours):>8,.1f} {unit}/s  theirs "
          f"{count / statistics.median(theirs):>8,.1f}  ratio {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f})", flush=True)


def shortfall(model: GPT2LMHeadModel, prompts: list[list[int]], written: list[list[int]]) -> float:
    """The most by which a written token's logit is below the best, in standard deviations of the logits."""
    rows = torch.tensor([prompt + tokens for prompt, tokens in zip(prompts, written, strict=True)], device=model.device)
    with torch.inference_mode():
        logits = model(rows[:, :-1]).logits[:, PROMPT - 1:].float()
    chosen = logits.gather(2, rows[:, PROMPT:, None])[..., 0]
    return float(((logits.amax(2) - chosen) / logits.std(2)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", help="the name of a file of gin/models/")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # of a GPU, which both use
    config = config_of(flags.size)
    params = random_params(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = as_gpt2(params, config).to(device, getattr(torch, config.dtype))
    dice, greedy = np.random.default_rng(2), Sampling(temperature=0.0, max_new_tokens=NEW)
    for batch in (1, 16):
        prompts = dice.integers(1, config.vocabulary_size, (batch, PROMPT)).tolist()

        def write_ours(prompts: list[list[int]] = prompts) -> list[list[int]]:
            return [answer.ids for answer in generate(params, config, prompts, greedy, batch_size=len(prompts))]

        def write_theirs(prompts: list[list[int]] = prompts) -> list[list[int]]:
            with torch.inference_mode():
                given = torch.tensor(prompts, device=device)
                return model.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                      max_new_tokens=NEW)[:, PROMPT:].tolist()

        written, wanted = write_ours(), write_theirs()
        if config.dtype == "float32" and written != wanted:
            raise SystemExit(f"generation in a batch of {batch}: the tokens differ.")
        if not (found := shortfall(model, prompts, written)) <= NEAR:
            raise SystemExit(f"generation in a batch of {batch}: a token is {found:.2g} standard deviations below the "
                             "best.")
        ours, theirs = [], []
        for _ in range(flags.rounds):
            ours.append(timed(write_ours))
            theirs.append(timed(write_theirs))
        report(f"generate, batch {batch}", "tokens", batch * NEW, ours, theirs)


if __name__ == "__main__":
    main()
