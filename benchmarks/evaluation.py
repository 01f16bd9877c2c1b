"""Scoring compared with lm-evaluation-harness, with the same weights in the same run; see `generation` for writing.

    python -m benchmarks.evaluation      also needs torch and transformers: pip install torch 'lm-eval[hf]'

A GPT of 4 layers x 256, 4 heads, feed-forward 1024, vocabulary 8192, 512 positions, float32, with random weights,
converted to Hugging Face's GPT-2. Both receive token ids, and all their work is measured.

  choices    400 questions with four choices of 4 to 16 tokens after stems of 245: lm-evaluation-harness's own scoring
             (its model "hf", the best of batches of 2 to 16) and ours
  channel    100 questions whose four choices precede a scored question of 245 tokens, as in the study's templates:
             no prefix is shared

Before the timing, all scores must agree to 1e-3 nats.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.generation import SMALL as CONFIG
from benchmarks.generation import as_gpt2, random_params, report, timed
from codellm_jax.evaluation.scoring import Request, score

STEM = 245
AGREEMENT = 1e-3  # nats


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=400)
    flags = parser.parse_args()
    params = random_params(CONFIG)
    model = as_gpt2(params, CONFIG)
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


if __name__ == "__main__":
    main()
