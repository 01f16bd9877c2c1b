"""Conversations as tokens in the form of the vocabulary's chat template, with the answer tokens marked.

A template is Jinja, as in the tokenizers of published models, and is rendered in a sandbox, as transformers does, in a
process of its own, since templates of strangers may loop for ever (`tokenizing/apart.py`).
Text that the template writes itself may be special tokens. The same words within a message are always plain text:
private-use characters replace them while a conversation is rendered.

For a vocabulary without a template, `tasks` gives the turns of a conversation as texts (`turns_tokens`).

An answer is what a model would write: everything that follows the rendering of the earlier messages with its generation
prompt, up to and including the token that ends the turn. If the template has {% generation %} tags,
an answer is the text inside them.

Some templates render an answer differently once the conversation continues: Qwen3's drops the reasoning. Such a
conversation becomes several examples, so that each answer is learned once, in the form in which a model writes it.

The tokens before an answer are exactly those of `prompt_tokens`. The text is split there even where the vocabulary
would merge the answer with the text before it.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from codellm_jax.tokenizing import apart
from codellm_jax.tokenizing.templates import END, FIRST
from codellm_jax.vocabulary import Vocabulary

# Increase it whenever the same messages and template give different tokens.
CHAT_VERSION = 1

Message = Mapping[str, str]  # role, content, and other texts that a template may use

# Private-use characters that mark the start and the end of an answer, and an answer itself.
_FIRST, _END, _ANSWER = FIRST, END, "\U000f0002"
_STAND_INS, _LAST = 0xF0003, 0xFFFFD
_PRIVATE = "[\U000f0000-\U000ffffd]"


class Refused(ValueError):
    """Why a template rejects a conversation, such as "refused by the chat template: No system"."""


class Tokens(NamedTuple):
    """The tokens of an example, and which of them are answers."""

    ids: list[int]
    counted: list[bool]


class _Answer(NamedTuple):
    """The position of an answer in a rendering."""

    first: int
    end: int
    counted: bool


class _Rendered(NamedTuple):
    text: str  # with placeholders
    answers: list[_Answer]


def conversation_tokens(vocabulary: Vocabulary, messages: Sequence[Message]) -> list[Tokens]:
    """The examples made from a conversation, with most templates one.

    Args:
      vocabulary: one with a chat template.
      messages: the last is the assistant's.

    Raises:
      Refused: the template rejects it, or its renderings do not show where an answer begins.
      ValueError: the template is not valid Jinja, or takes too long or too much memory.
    """
    safe, back = _protected(vocabulary, messages)
    return [_tokens(vocabulary, rendered, back) for rendered in _examples(vocabulary, safe)]


def prompt_tokens(vocabulary: Vocabulary, messages: Sequence[Message]) -> list[int]:
    """The tokens that a model reads to answer the last message; raises what `conversation_tokens` raises."""
    safe, back = _protected(vocabulary, messages)
    text, tagged = _render(vocabulary, safe, True)
    answers = tagged or [_Answer(first, end, True) for first, end, answered in _turns(vocabulary, safe)
                         if text.startswith(answered[:end])]
    return _tokens(vocabulary, _Rendered(text, answers), back).ids


def prompt_text(vocabulary: Vocabulary, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text that the template makes from messages; raises what `conversation_tokens` raises."""
    safe, back = _protected(vocabulary, messages)
    return _restored(_render(vocabulary, safe, add_generation_prompt)[0], back)


def end_of_turn_ids(vocabulary: Vocabulary) -> set[int]:
    """The token that ends an answer, if the template has one."""
    tail = _tail(vocabulary, [{"role": "user", "content": "?"}], {"role": "assistant"})
    found = _special(vocabulary).search(tail)
    return {dict(vocabulary.special_tokens)[found[0]]} if found else set()


def turns_tokens(
    vocabulary: Vocabulary, conversations: Sequence[Sequence[str]], threads: int = 1
) -> list[list[list[int]]]:
    """The token ids of each turn of conversations without a template: prompt, answer, prompt and so on.

    The first prompt begins as documents do. Each answer ends with the end-of-document token, if the vocabulary has one.
    """
    prompts = iter(vocabulary.encode_all([turn for turns in conversations for turn in turns[::2]], threads))
    answers = iter(vocabulary.encode_all(
        [turn for turns in conversations for turn in turns[1::2]], threads, behind=True))

    def of_turn(number: int) -> list[int]:
        if number % 2 == 0:
            return [*(vocabulary.begin_ids if number == 0 else ()), *next(prompts)]
        ids = next(answers)
        return [*ids, vocabulary.end_of_document_id] if ids else []

    return [[of_turn(number) for number in range(len(turns))] for turns in conversations]


def joined(turns: Sequence[Sequence[int]]) -> Tokens:
    """The example made from a conversation's turns; every second turn is an answer."""
    return Tokens([token for turn in turns for token in turn],
                  [number % 2 == 1 for number, turn in enumerate(turns) for _ in turn])


# ---- Rendering ---------------------------------------------------------------------------------


def _render(
    vocabulary: Vocabulary, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, list[_Answer]]:
    """The text of messages, and the answers that the template's tags mark, if any."""
    template = f"The chat template of vocabulary {vocabulary.path}"
    try:
        rendered = apart.render(vocabulary.chat_template or "", messages, dict(vocabulary.template_tokens),
                                add_generation_prompt)
    except apart.Ended as error:  # the next conversation would take as long
        raise ValueError(f"{template} {error} for a conversation: it is damaged or hostile.") from None
    if "invalid" in rendered:
        raise ValueError(f"{template} is not a valid Jinja template: {rendered['invalid']}.")
    if "refused" in rendered:
        raise Refused(rendered["refused"])
    parts = re.split(f"([{_FIRST}{_END}])", rendered["text"])
    text, answers, first = "", [], 0
    for part in parts:
        if part == _FIRST:
            first = len(text)
        elif part == _END:
            answers.append(_Answer(first, len(text), True))
        else:
            text += part
    return text, answers


# ---- Answers -----------------------------------------------------------------------------------


def _examples(vocabulary: Vocabulary, messages: Sequence[Message]) -> list[_Rendered]:
    """The renderings of a conversation, such that each of its answers counts once."""
    whole, tagged = _render(vocabulary, messages, False)
    if tagged:
        return [_Rendered(whole, tagged)]
    turns = list(_turns(vocabulary, messages))
    waiting, examples = set(range(len(turns))), []
    while waiting:
        text = turns[max(waiting)][2]
        there = {number for number, (_, end, answered) in enumerate(turns) if text.startswith(answered[:end])}
        examples.append(_Rendered(text, [
            _Answer(*turns[number][:2], number in waiting) for number in sorted(there)]))
        waiting -= there
    return examples[::-1]


def _turns(vocabulary: Vocabulary, messages: Sequence[Message]) -> Iterator[tuple[int, int, str]]:
    """For each answer, its start and end in the rendering of the messages up to it, and that rendering."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:number]
        prompt, _ = _render(vocabulary, before, True)
        answered, _ = _render(vocabulary, [*before, message], False)
        if not answered.startswith(prompt):
            raise Refused("whose answers do not begin with the chat template's generation prompt")
        tail, end = _tail(vocabulary, before, message), len(answered)
        if answered.endswith(tail):
            special = _special(vocabulary).search(tail)
            end += (special.end() if special else len(tail.rstrip()) or len(tail)) - len(tail)
        yield len(prompt), end, answered


def _tail(vocabulary: Vocabulary, before: Sequence[Message], answer: Message) -> str:
    """The text after an answer: the end of the turn, perhaps followed by a line end or the end of the document."""
    text, _ = _render(vocabulary, [*before, {**answer, "content": _ANSWER}], False)
    return text[text.rfind(_ANSWER) + 1 :] if _ANSWER in text else ""


# ---- Tokens ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _special(vocabulary: Vocabulary) -> re.Pattern[str]:
    """Finds special tokens; of several with the same beginning, the longest."""
    texts = sorted((text for text, _ in vocabulary.special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _protected(vocabulary: Vocabulary, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """Messages with a placeholder for each special token and each placeholder character, and the replaced texts."""
    stand_ins: dict[str, str] = {}
    pattern = re.compile(f"{_special(vocabulary).pattern}|{_PRIVATE}")

    def stand_in(found: re.Match[str]) -> str:
        return stand_ins.setdefault(found[0], chr(_STAND_INS + len(stand_ins)))

    safe: list[Message] = [{name: pattern.sub(stand_in, text) for name, text in message.items()}
                           for message in messages]
    if len(stand_ins) > _LAST - _STAND_INS + 1:
        raise Refused("with too many different private-use characters")
    return safe, {character: text for text, character in stand_ins.items()}


def _restored(text: str, back: Mapping[str, str]) -> str:
    return re.sub(_PRIVATE, lambda found: back.get(found[0], found[0]), text) if back else text


def _tokens(vocabulary: Vocabulary, rendered: _Rendered, back: Mapping[str, str]) -> Tokens:
    text, tokens = rendered.text, Tokens([], [])
    specials = [found.span() for found in _special(vocabulary).finditer(text)]

    def add(first: int, end: int, counted: bool) -> None:
        # Tokens never span a special token, so only the text after the last one matters.
        lead = text[max((begin for begin, last in specials if last <= first), default=0) : first]
        before, both = (_encoded(vocabulary, part, back) for part in (lead, lead + text[first:end]))
        ids = both[len(before) :]
        if both[: len(before)] != before:  # a token would span the boundary
            ids = _encoded(vocabulary, text[first:end], back, before)
        tokens.ids.extend(ids)
        tokens.counted.extend([counted] * len(ids))

    done = 0
    for answer in rendered.answers:
        add(done, answer.first, False)
        add(answer.first, answer.end, answer.counted)
        done = answer.end
    add(done, len(text), False)
    return tokens


def _encoded(
    vocabulary: Vocabulary, text: str, back: Mapping[str, str], context: Sequence[int] | None = None
) -> list[int]:
    """Token ids of a rendering, or of a part of it that follows `context`; messages are plain text."""
    if context is None and not re.search(_PRIVATE, text):
        return vocabulary.encode_with_special(text)
    ids, done, ids_of = list(context or ()), 0, dict(vocabulary.special_tokens)
    for found in [*_special(vocabulary).finditer(text), None]:
        if plain := text[done : found.start() if found else len(text)]:
            ids += vocabulary.encode_after(ids, _restored(plain, back))
        if found:
            ids.append(ids_of[found[0]])
            done = found.end()
    return ids[len(context or ()) :]
