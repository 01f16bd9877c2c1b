"""Scoring and generation compared with lm-evaluation-harness and Hugging Face, with the same weights in the same run.

    python -m benchmarks.evaluation      also needs torch and transformers: pip install torch 'lm-eval[hf]'

A GPT of 4 layers x 256, 4 heads, feed-forward 1024, vocabulary 8192, 512 positions, float32, with random weights,
converted to Hugging Face's GPT-2. Both receive token ids, and all their work is measured.

  choices    400 questions with four choices of 4 to 16 tokens after stems of 245: lm-evaluation-harness's own scoring
             (its model "hf", the best of batches of 2 to 16) and ours
  channel    100 questions whose four choices precede a scored question of 245 tokens, as in the study's templates:
             no prefix is shared
  generate   64 tokens after a prompt of 64, greedily, for 1 prompt and for 16: `generate` of Hugging Face and ours

Before the timing, all scores must agree to 1e-3 nats, and all generated tokens must be the same.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import linen as nn
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from codellm_jax.evaluation.decoding import generate
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.scoring import Request, score
from codellm_jax.model.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(layers=4, hidden=256, heads=4, feedforward=1024, vocabulary_size=8192, length=512,
                       query_layer=False)
STEM, PROMPT, NEW = 245, 64, 64
AGREEMENT = 1e-3  # nats


def our_params() -> Any:
    tokens = np.zeros((1, 8), np.int32)
    params = nn.unbox(jax.jit(Decoder(CONFIG).init)(jax.random.key(0), tokens, tokens, tokens)["params"])
    return jax.tree.map(lambda leaf: leaf * 2, params)  # so that likelihoods differ by far more than rounding


def as_gpt2(params: Any) -> GPT2LMHeadModel:
    """The same weights in Hugging Face's GPT-2, which keeps query, key and value in one matrix."""
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=CONFIG.vocabulary_size, n_positions=CONFIG.length, n_embd=CONFIG.hidden, n_layer=CONFIG.layers,
        n_head=CONFIG.heads, n_inner=CONFIG.feedforward, activation_function="gelu_new", bos_token_id=0,
        eos_token_id=None, pad_token_id=0)).eval()
    blocks = params["blocks"]
    attention, feedforward = blocks["attention"], blocks["feedforward"]
    state = {"transformer.wte.weight": params["token_embedding"], "lm_head.weight": params["token_embedding"],
             "transformer.wpe.weight": params["position_embedding"],
             "transformer.ln_f.weight": params["final_norm"]["scale"],
             "transformer.ln_f.bias": params["final_norm"]["bias"]}
    for layer in range(CONFIG.layers):
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


def questions(count: int, channel: bool) -> list[Request]:
    """Requests for questions of four candidates, each question a group."""
    dice = np.random.default_rng(channel)

    def draw(length: int) -> list[int]:
        return dice.integers(1, CONFIG.vocabulary_size, length).tolist()

    requests = []
    for group in range(count):
        stem = draw(STEM)
        choices = [draw(int(dice.integers(4, 17))) for _ in range(4)]
        requests += [Request(group, choice, stem) if channel else Request(group, stem, choice) for choice in choices]
    return requests


def harness(model: GPT2LMHeadModel) -> Callable[[list[Request], int], list[float]]:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), eos_token="<e>", pad_token="<p>")
    asked = HFLM(pretrained=model, tokenizer=words, max_length=CONFIG.length)

    def run(requests: list[Request], batch_size: int) -> list[float]:
        asked.batch_size_per_gpu = batch_size
        given = [((str(request.group), str(number)), list(request.prompt), list(request.continuation))
                 for number, request in enumerate(requests)]
        return [value for value, _ in asked._loglikelihood_tokens(given, disable_tqdm=True)]

    return run


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def report(name: str, unit: str, count: int, ours: list[float], theirs: list[float]) -> None:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(f"{name:<22} ours {count / statistics.median(ours):>8,.1f} {unit}/s  theirs "
          f"{count / statistics.median(theirs):>8,.1f}  ratio {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=400)
    flags = parser.parse_args()
    params = our_params()
    model = as_gpt2(params)
    ask = harness(model)
    for name, count, channel in (("choices", flags.questions, False), ("channel", max(1, flags.questions // 4), True)):
        requests = questions(count, channel)
        cold = timed(lambda requests=requests: score(params, CONFIG, requests))
        found = [float(values.sum()) for values in score(params, CONFIG, requests)]
        by_size = {}
        for size in (2, 4, 8, 16):
            began = time.perf_counter()
            wanted = ask(requests, size)
            by_size[size] = time.perf_counter() - began
        difference = float(np.abs(np.array(found) - wanted).max())
        if not difference <= AGREEMENT:
            raise SystemExit(f"{name}: scores differ by up to {difference:.2g} nats.")
        best = min(by_size, key=lambda size: by_size[size])
        print(f"{name}: {len(requests):,} scores agree to {difference:.1e} nats; the first run of ours, compiling "
              f"included, took {cold:.1f} s; theirs is fastest in batches of {best}")
        ours, theirs = [], []
        for _ in range(flags.rounds):
            ours.append(timed(lambda requests=requests: score(params, CONFIG, requests)))
            theirs.append(timed(lambda requests=requests, best=best: ask(requests, best)))
        report(name, "questions", count, ours, theirs)
    dice, greedy = np.random.default_rng(2), Sampling(temperature=0.0, max_new_tokens=NEW)
    for batch in (1, 16):
        prompts = dice.integers(1, CONFIG.vocabulary_size, (batch, PROMPT)).tolist()

        def write_ours(prompts: list[list[int]] = prompts) -> list[list[int]]:
            return [answer.ids for answer in generate(params, CONFIG, prompts, greedy, batch_size=len(prompts))]

        def write_theirs(prompts: list[list[int]] = prompts) -> list[list[int]]:
            with torch.inference_mode():
                given = torch.tensor(prompts)
                return model.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                                      max_new_tokens=NEW)[:, PROMPT:].tolist()

        if write_ours() != write_theirs():
            raise SystemExit(f"generation in a batch of {batch}: the tokens differ.")
        ours, theirs = [], []
        for _ in range(flags.rounds):
            ours.append(timed(write_ours))
            theirs.append(timed(write_theirs))
        report(f"generate, batch {batch}", "tokens", batch * NEW, ours, theirs)


if __name__ == "__main__":
    main()
