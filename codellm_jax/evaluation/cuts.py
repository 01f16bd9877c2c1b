"""What of a question too long for the model is left out: last of all what tells its candidates apart.

    kept = fitted([(prompt, continuation), ...], length)  # token ids of each candidate

A question that fits is left as it is. Of one that does not, every candidate loses the same from what all have in
common, so that their scores stay comparable. In this order, until the longest candidate fits:

  1. the common beginning of the prompts, from its beginning;
  2. the common end of the prompts, behind what differs, from its beginning too: what stands next to the continuation
     stays. One token of a prompt always stays, for it predicts the continuation's first.
  3. where prompts differ, the end of the continuations: each keeps as many tokens as the longest prompt leaves. Where
     they do not, candidates differ in their continuations: the common beginning of these, then their common end;
  4. what differs, where it is too long by itself: the beginning of a prompt, the end of a continuation.
"""

from collections.abc import Sequence
from typing import NamedTuple

Tokens = Sequence[int]


class Fitted(NamedTuple):
    """A candidate as the model can take it: token ids, together at most its positions and one."""

    prompt: Tokens
    continuation: Tokens
    prompt_tokens_cut: int
    continuation_tokens_cut: int


def fitted(candidates: Sequence[tuple[Tokens, Tokens]], length: int) -> list[Fitted]:
    """The candidates of one question, (prompt, continuation) each, as a model of `length` positions can take them.

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
    """A prompt without `count` tokens of its common parts, of those at its end no more than the beginning lacks."""
    first, behind = min(count, beginning), len(prompt) - end
    return prompt[first:behind] + prompt[behind + count - first :]


def _excess(prompts: list[list[int]], continuations: list[list[int]], room: int) -> int:
    """By how many tokens the longest candidate is too long; 0 or less where all fit."""
    return max(len(prompt) + len(continuation) for prompt, continuation in zip(
        prompts, continuations, strict=True)) - room


def _common(texts: list[list[int]]) -> tuple[int, int]:
    """Tokens that all have in common at the beginning, and behind these at the end."""
    shortest, first = min(map(len, texts)), texts[0]
    beginning = next((i for i in range(shortest) if any(text[i] != first[i] for text in texts)), shortest)
    end = next((i for i in range(shortest - beginning) if any(text[-1 - i] != first[-1 - i] for text in texts)),
               shortest - beginning)
    return beginning, end


def _needed(texts: list[list[int]], common: int) -> int:
    """Common tokens that must stay, so that every text keeps one."""
    return min(common, int(min(map(len, texts)) == common))


def _alike(texts: list[list[int]]) -> bool:
    return all(text == texts[0] for text in texts)
