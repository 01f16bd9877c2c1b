"""lm-evaluation-harness on our checkpoints: any of its tasks, by the name codellm_jax.

    python -m codellm_jax.evaluation.harness --model codellm_jax --tasks arc_easy \\
        --model_args checkpoint=runs/mixed_pretrain

That is the harness's own command with one model more. A harness that finds models by entry points knows it without:
`lm_eval --model codellm_jax --model_args checkpoint=runs/mixed_pretrain --tasks arc_easy`.

Texts become tokens as the harness has it, prompt and continuation together and then parted; stems are shared as in
`t5x eval`.
"""

import atexit
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from codellm_jax.configuration import build, read_configuration
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.scoring import DEFAULT_BATCH_TOKENS, Request
from codellm_jax.evaluation.trained import trained_model

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    package = str(error.name).split(".")[0]
    sys.exit(f"codellm_jax harness: error: {package} is not installed: pip install '.[harness]'.")

NEW_TOKENS = 256  # written to a request that does not say how many, as by the harness's other models


@register_model("codellm_jax")
class CodellmJax(TemplateLM):
    """A checkpoint as the harness asks it.

    Args:
      checkpoint: a run directory; its newest checkpoint is asked.
      vocabulary: the vocabulary's file, where it is no longer where the run had it.
      batch_tokens: tokens scored at once.
      answers_at_once: texts written at once.
      batch_size, max_batch_size, device: what the harness gives every model, and not used: batches change speed alone,
        and JAX chooses its devices by itself (JAX_PLATFORMS).
    """

    def __init__(
        self, checkpoint: str, vocabulary: str | None = None, batch_tokens: int = DEFAULT_BATCH_TOKENS,
        answers_at_once: int = 16, batch_size: int | str | None = None, max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        overrides = [("CHECKPOINT_PATH", str(checkpoint)), *([("VOCABULARY", vocabulary)] if vocabulary else [])]
        chosen = build(read_configuration(["gin/eval.gin"], overrides), "checkpoint")
        self._open = contextlib.ExitStack()  # the mesh holds as long as the process
        self._model, record = self._open.enter_context(trained_model(chosen))
        atexit.register(self._open.close)
        self._name = f"{checkpoint}, step {record['step']}"
        self._batch_tokens = int(batch_tokens)
        self._answers_at_once = int(answers_at_once)

    @property
    def eot_token_id(self) -> int:
        return self._model.vocabulary.end_of_document_id

    @property
    def max_length(self) -> int:
        return self._model.config.length

    @property
    def tokenizer_name(self) -> str:
        return self._model.vocabulary.content_hash

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down of the model."""
        return {"model": self._name}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; nothing is ever put before them."""
        return self._model.vocabulary.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        # Candidates of a question have its prompt in common, which is then computed once.
        groups: dict[str, int] = {}
        scored = self._model.score(
            [Request(groups.setdefault(texts[0], len(groups)), prompt, continuation)
             for texts, prompt, continuation in requests], self._batch_tokens)
        return [(float(scores.log_likelihoods.sum()), bool(scores.greedy.all())) for scores in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that overlap by one token."""
        parts = []
        for number, request in enumerate(requests):
            windows: Iterator[Any] = get_rolling_token_windows(
                self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1)
            parts += [(number, *make_disjoint_window(window)) for window in windows]
        # No two windows of a text begin alike: they are groups of their own.
        scored = self._model.score(
            [Request(part, prompt, continuation) for part, (_, prompt, continuation) in enumerate(parts)],
            self._batch_tokens)
        totals = [0.0] * len(requests)
        for (number, _, _), scores in zip(parts, scored, strict=True):
            totals[number] += float(scores.log_likelihoods.sum())
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from the prompts, each up to the first of its stop strings."""
        answers = [""] * len(requests)
        alike: dict[Sampling, list[int]] = {}
        stops = [_stops(request.args[1]) for request in requests]
        for number, request in enumerate(requests):
            alike.setdefault(_sampling(request.args[1]), []).append(number)
        vocabulary = self._model.vocabulary
        for sampling, numbers in alike.items():
            prompts = [self.tok_encode(requests[number].args[0]) or [self.eot_token_id] for number in numbers]
            written = self._model.write(prompts, [stops[number] for number in numbers], sampling, 0, numbers=numbers,
                                        batch_size=self._answers_at_once)
            if cut := sum(answer.prompt_tokens_cut > 0 for answer in written):
                logging.warning(
                    "%d of %d prompts lose their beginning: they are too long for a model of %d positions, of which %d "
                    "are for the answer.", cut, len(prompts), self.max_length, self._model.room(sampling))
            for number, prompt, answer in zip(numbers, prompts, written, strict=True):
                text = vocabulary.decode_after(prompt, answer.ids)
                ends = [text.find(stop) for stop in stops[number] if stop in text]
                answers[number] = text[: min(ends)] if ends else text
        return answers


def _stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def _sampling(options: dict[str, Any]) -> Sampling:
    """A task's generation_kwargs; greedy unless they ask for sampling."""
    lengths = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    known = {"until", "do_sample", "temperature", "top_k", "top_p", *lengths}
    if unknown := {name for name in options.keys() - known if (name, options[name]) != ("num_beams", 1)}:
        raise ValueError(f"codellm_jax does not know the generation_kwargs {', '.join(sorted(unknown))}, only "
                         f"{', '.join(sorted(known))}.")
    most = next((int(options[name]) for name in lengths if name in options), NEW_TOKENS)
    temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
    if not options.get("do_sample", temperature > 0) or temperature == 0:
        return Sampling(temperature=0.0, max_new_tokens=most)
    return Sampling(temperature=temperature, top_k=options.get("top_k"), top_p=float(options.get("top_p", 1.0)),
                    max_new_tokens=most)


if __name__ == "__main__":
    cli_evaluate()
