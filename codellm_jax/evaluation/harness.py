"""lm-evaluation-harness on our checkpoints: any of its tasks, by the name codellm_jax.

    python -m codellm_jax.evaluation.harness --model codellm_jax --tasks arc_easy \\
        --model_args checkpoint=runs/mixed_pretrain

This is the harness's own command with one more model, because the harness does not discover models of other packages.
With --apply_chat_template the messages become the prompt of tuning (`t5x infer --instruction`). A model that was tuned
on conversations, or has a chat template, gets them as messages; for other models, a system's text, worked examples and
the question become one instruction. The beginning of an assistant's message follows the prompt's end.

Texts are tokenized as the harness does, prompt and continuation together and then split. Stems are shared as in
`t5x eval`, and texts that are too long are cut, with a warning: a prompt loses its beginning, a continuation its end.
"""

import atexit
import collections
import contextlib
import difflib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from codellm_jax.chat import end_of_turn_ids
from codellm_jax.configuration import build, read_configuration
from codellm_jax.evaluation.prompts import prompt_of, takes_chat_template
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.scoring import DEFAULT_BATCH_TOKENS, Request, Scores, prompt_tokens_cut
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

ARGUMENTS = ("checkpoint", "vocabulary", "batch_tokens", "answers_at_once")
NEW_TOKENS = 256  # for a request that sets no maximum, as in the harness's other models


@register_model("codellm_jax")
class CodellmJax(TemplateLM):
    """A checkpoint as a model of the harness.

    Args:
      checkpoint: a run directory; its newest checkpoint is used.
      vocabulary: the vocabulary's file, if it has moved since the run.
      batch_tokens: tokens scored at once.
      answers_at_once: texts written at once.
      batch_size, max_batch_size, device: passed by the harness to every model, and unused: batches change only the
        speed, and JAX chooses its devices (JAX_PLATFORMS).
    """

    def __init__(
        self, checkpoint: str | None = None, vocabulary: str | None = None,
        batch_tokens: int | str = DEFAULT_BATCH_TOKENS, answers_at_once: int | str = 16,
        batch_size: int | str | None = None, max_batch_size: int | None = None, device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            raise ValueError(f"--model_args: codellm_jax does not know {name!r}, only {', '.join(ARGUMENTS)}"
                             f"{f'; nearest: {near[0]}' if near else ''}.")
        if checkpoint is None:
            raise ValueError("--model_args: codellm_jax needs checkpoint=FOLDER, a run directory.")
        self._batch_tokens = _whole_number("batch_tokens", batch_tokens)
        self._answers_at_once = _whole_number("answers_at_once", answers_at_once)
        overrides = [("CHECKPOINT_PATH", str(checkpoint)), ("infer.template", "@instruction_prompt"),
                     *([("VOCABULARY", str(vocabulary))] if vocabulary else [])]
        chosen = build(read_configuration(["gin/infer.gin"], overrides), "infer")
        self._instruction_prompt, self._turns = chosen.template, chosen.turns
        self._prompts: dict[str, list[int]] = {}  # token ids of messages, by their texts
        self._open = contextlib.ExitStack()  # the mesh stays set for the life of the process
        self._model, record = self._open.enter_context(trained_model(chosen.checkpoint))
        atexit.register(self._open.close)
        self._name = f"{checkpoint}, step {record['step']}"
        self._by_template = takes_chat_template(self._model.vocabulary, record)
        self._takes_messages = self._by_template or record["ledger"].get("conversations", False)

    @property
    def eot_token_id(self) -> int:
        return self._model.vocabulary.end_of_document_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a prompt."""
        return self._model.vocabulary.begin_ids[-1] if self._model.vocabulary.begin_ids else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self._model.config.length

    @property
    def tokenizer_name(self) -> str:
        return self._model.vocabulary.content_hash

    def get_model_info(self) -> dict[str, Any]:
        """The harness's record of the model."""
        return {"model": self._name}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids, beginning with the vocabulary's begin token, if any, unless `add_special_tokens` is False.

        A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD.
        """
        text, vocabulary = _valid(string), self._model.vocabulary
        return vocabulary.encode(text) if add_special_tokens is False else vocabulary.encode_prompt(text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template, or the prompt of instructions, for the harness's records.

        Raises:
          ValueError: a template is requested by name.
        """
        if isinstance(chat_template, str):
            raise ValueError(f"--apply_chat_template: there is no template {chat_template!r}; codellm_jax has only "
                             "one, the prompt of tuning, without a name.")
        if not chat_template:
            return None
        return self._model.vocabulary.chat_template if self._by_template else self._instruction_prompt("{instruction}")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for the text after the last message."""
        begun = ""
        if not add_generation_prompt:
            *chat_history, last = chat_history
            begun = last["content"]
        if not self._takes_messages:
            return self._instruction_prompt("\n\n".join(message["content"] for message in chat_history)) + begun
        messages = [{name: _valid(message[name]) for name in ("role", "content")} for message in chat_history]
        prompt = prompt_of(self._model.vocabulary, messages, self._by_template, self._turns)
        text = prompt.text + begun
        self._prompts[text] = [*prompt.ids, *self._model.vocabulary.encode_after(prompt.ids, _valid(begun))]
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context not in self._prompts:
            return super()._encode_pair(context, continuation)
        prompt = self._prompts[context]
        return prompt, self._model.vocabulary.encode_after(prompt, _valid(continuation))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (prompt, continuation) the log-likelihood in nats, and whether greedy decoding would produce it.

        An empty prompt becomes the begin token, or else an end of document. A continuation without a token after the
        split is tokenized and scored alone; an empty one has log-likelihood 0.
        """
        encoded = []
        for request in requests:
            prompt, continuation = request.args
            alone = self.tok_encode(continuation, add_special_tokens=False)
            tokens, scored = self._encode_pair(prompt, continuation) if prompt else ([], alone)
            encoded.append(((prompt, continuation), tokens, scored or alone))
        return self._loglikelihood_tokens(encoded)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        # Candidates of a question share its prompt, which is then computed once.
        groups: dict[str, int] = {}
        asked = [Request(groups.setdefault(texts[0], len(groups)), prompt or [self.prefix_token_id],
                         continuation[: self.max_length]) for texts, prompt, continuation in requests]
        beyond = sum(len(continuation) > self.max_length for _, _, continuation in requests)
        if cut := sum(prompt_tokens_cut(request, self.max_length) > 0 for request in asked):
            logging.warning("%d of %d prompts are truncated at the beginning: with their continuations they are too "
                            "long for a model of %d positions.", cut, len(asked), self.max_length)
        if beyond:
            logging.warning("%d of %d continuations are truncated at the end: they are too long for a model of %d "
                            "positions.", beyond, len(asked), self.max_length)
        scored = iter(self._model.score([request for request in asked if request.continuation], self._batch_tokens))
        found = (next(scored) if request.continuation else None for request in asked)
        return [(_sum(scores), bool(scores.greedy.all())) if scores else (0.0, True) for scores in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows that overlap by one token."""
        parts = []
        for number, request in enumerate(requests):
            windows: Iterator[Any] = get_rolling_token_windows(
                self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1)
            parts += [(number, *make_disjoint_window(window)) for window in windows]
        # Windows of a text have no common beginning, so each is a separate group.
        scored = self._model.score(
            [Request(part, prompt, continuation) for part, (_, prompt, continuation) in enumerate(parts)],
            self._batch_tokens)
        totals = [0.0] * len(requests)
        for (number, _, _), scores in zip(parts, scored, strict=True):
            totals[number] += _sum(scores)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues the prompts, each up to the first of its stop strings.

        Draws depend on the request and on how often it occurred before, not on other requests.
        """
        answers = [""] * len(requests)
        alike: dict[Sampling, list[int]] = {}
        draws = _draws([request.args for request in requests])
        stops = [_stops(request.args[1]) for request in requests]
        for number, request in enumerate(requests):
            alike.setdefault(_sampling(request.args[1]), []).append(number)
        vocabulary = self._model.vocabulary
        end_ids = end_of_turn_ids(vocabulary) if self._prompts and self._by_template else ()
        for sampling, numbers in alike.items():
            texts = [requests[number].args[0] for number in numbers]
            prompts = [self._prompts.get(text) or self.tok_encode(text) or [self.prefix_token_id] for text in texts]
            written = self._model.write(prompts, [stops[number] for number in numbers], sampling, 0,
                                        numbers=[draws[number] for number in numbers], end_ids=end_ids,
                                        batch_size=self._answers_at_once)
            if cut := sum(answer.prompt_tokens_cut > 0 for answer in written):
                logging.warning(
                    "%d of %d prompts are truncated at the beginning: they are too long for a model of %d positions, "
                    "of which %d are for the answer.", cut, len(prompts), self.max_length, self._model.room(sampling))
            for number, prompt, answer in zip(numbers, prompts, written, strict=True):
                text = vocabulary.decode_after(prompt, answer.ids)
                ends = [text.find(stop) for stop in stops[number] if stop in text]
                answers[number] = text[: min(ends)] if ends else text
        return answers


def _valid(text: str) -> str:
    """A text with lone surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sum(scores: Scores) -> float:
    return float(scores.log_likelihoods.sum(dtype=np.float64))


def _draws(requests: Sequence[tuple[str, dict[str, Any]]]) -> list[int]:
    """The number that seeds each request: 32 bits of a hash of its text and of how often it occurred before."""
    before: collections.Counter[str] = collections.Counter()
    found = []
    for text, options in requests:
        whole = json.dumps([text, options], sort_keys=True)
        found.append(int.from_bytes(hashlib.sha256(json.dumps([text, before[whole]]).encode()).digest()[:4]))
        before[whole] += 1
    return found


def _whole_number(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != value and not isinstance(value, str):
        raise ValueError(f"--model_args: {name} must be a whole number, at least 1, found {value!r}.")
    return number


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


def main() -> None:
    """The harness's own command; a user's mistake is one line on stderr, and status 1."""
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"codellm_jax harness: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
