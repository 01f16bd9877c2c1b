"""Cuts questions that are too long for the model, keeping the differences between candidates as long as possible.

    kept = fitted([(prompt, continuation), ...], length)  # token ids of each candidate

A question that fits is unchanged. Of one that does not, every candidate loses the same tokens from the parts that all
share, so that their scores stay comparable. These are cut in order, until the longest candidate fits:

  1. the common beginning of the prompts, from its start;
  2. the common end of the prompts, also from its start, so that the text next to the continuation stays. One token of
     a prompt always stays, because it predicts the continuation's first.
  3. if prompts differ, the end of the continuations: each keeps as many tokens as the longest prompt leaves. If they
     do not, candidates differ in their continuations: the common beginning of these, then their common end;
  4. the differing parts, if they alone are too long: the beginning of a prompt, the end of a continuation.
"""

from collections.abc import Sequence
from typing import NamedTuple

Tokens = Sequence[int]


class Fitted(NamedTuple):
    """A candidate that fits the model: token ids, in all at most its positions plus one."""

    prompt: Tokens
    continuation: Tokens
    prompt_tokens_cut: int
    continuation_tokens_cut: int


def fitted(candidates: Sequence[tuple[Tokens, Tokens]], length: int) -> list[Fitted]:
    """Cuts the candidates of one question, (prompt, continuation) each, to fit a model of `length` positions.

    The last token of a continuation is only predicted, so prompt and continuation have room for length + 1 tokens.
    """
    prompts, continuations = ([list(texts) for texts in of_all] for of_all in zip(*candidates, strict=True))
    room = length + 1
    if _excess(prompts, continuations, room) > 0:
        prompts, continuations = _cut(prompts, continuations, room)
    return [Fitted(prompt, continuation, len(whole[0]) - len(prompt), len(whole[1]) - len(continuation))
            for whole, prompt, continuation in zip(candidates, prompts, continuations, strict=True)]


def _cut(prompts: list[list[int]], continuations: list[list[int]], room: int) -> tuple[list[list[int]], ...]:
    beginning, end = _common(prompts)
    count = min(_excess(prompts, continuations, room), beginning + end - _needed(prompts, beginning + end))
    prompts = [_without(prompt, beginning, end, count) for prompt in prompts]
    if _alike(prompts) and not _alike(continuations):
        beginning, end = _common(continuations)
        needed = _needed(continuations, beginning + end)
        first = min(_excess(prompts, continuations, room), max(0, beginning - needed))
        continuations = [continuation[first:] for continuation in continuations]
        last = min(_excess(prompts, continuations, room), end, beginning - first + end - needed)
        continuations = [continuation[: len(continuation) - last] for continuation in continuations]
    left = min((room - len(prompt) for prompt, continuation in zip(prompts, continuations, strict=True)
                if len(prompt) + len(continuation) > room), default=room)
    continuations = [continuation[: max(1, left)] for continuation in continuations]
    return [prompt[-max(1, room - len(continuation)) :] for prompt, continuation in zip(
        prompts, continuations, strict=True)], continuations


def _without(prompt: list[int], beginning: int, end: int, count: int) -> list[int]:
    """A prompt without `count` tokens of its common parts, taken from the beginning first, then from the end."""
    first, behind = min(count, beginning), len(prompt) - end
    return prompt[first:behind] + prompt[behind + count - first :]


def _excess(prompts: list[list[int]], continuations: list[list[int]], room: int) -> int:
    """The number of tokens by which the longest candidate is too long; 0 or less if all fit."""
    return max(len(prompt) + len(continuation) for prompt, continuation in zip(
        prompts, continuations, strict=True)) - room


def _common(texts: list[list[int]]) -> tuple[int, int]:
    """The number of tokens common to all at the beginning, and of the rest at the end."""
    shortest, first = min(map(len, texts)), texts[0]
    beginning = next((i for i in range(shortest) if any(text[i] != first[i] for text in texts)), shortest)
    end = next((i for i in range(shortest - beginning) if any(text[-1 - i] != first[-1 - i] for text in texts)),
               shortest - beginning)
    return beginning, end


def _needed(texts: list[list[int]], common: int) -> int:
    """The number of common tokens that must stay, so that every text keeps at least one."""
    return min(common, int(min(map(len, texts)) == common))


def _alike(texts: list[list[int]]) -> bool:
    return all(text == texts[0] for text in texts)
