"""Conversations as tokens, in the form of the vocabulary's chat template, and which of the tokens are answers.

A template is Jinja, as tokenizers of published models have it, and is rendered as transformers renders it, in a
sandbox. What it writes itself may be special tokens; the same words within a message are plain text, whoever wrote
them: while a conversation is rendered, characters for private use stand in their place.

Where a vocabulary has no template, `tasks` gives a conversation's turns as texts (`turns_tokens`).

An answer is what a model would write: all that a conversation's rendering has behind the rendering of the messages
before it, which asks for the answer, up to and with the token that ends the turn. Where the template has
{% generation %} tags, an answer is what they hold.

Some templates write an answer in another way once the conversation goes on: Qwen3's leaves out what was thought. Such a
conversation becomes several examples, so that each answer is learned once, and as it would be written.

The tokens before an answer are those that `prompt_tokens` gives, token by token, also where the template has an answer
follow on text that would be joined to it by the vocabulary: texts are parted there.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from codellm_jax.vocabulary import Vocabulary

# Raise it whenever the same messages and template would give other tokens.
CHAT_VERSION = 1

Message = Mapping[str, str]  # role, content, and other texts that a template may know

# Characters for private use, by which the first and the end of an answer are marked, and an answer itself.
_FIRST, _END, _ANSWER = "\U000f0000", "\U000f0001", "\U000f0002"
_STAND_INS, _LAST = 0xF0003, 0xFFFFD
_PRIVATE = "[\U000f0000-\U000ffffd]"
# What templates that write the day have where there is no clock (Llama 3's): the same tokens on every day.
_TODAY = datetime.datetime(2024, 7, 26)
# What a template's own mistakes are, beside Jinja's errors.
_MISTAKES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)


class Refused(ValueError):
    """Why a template does not take a conversation, such as "refused by the chat template: No system"."""


class Tokens(NamedTuple):
    """An example: its tokens, and which of them are answers."""

    ids: list[int]
    counted: list[bool]


class _Answer(NamedTuple):
    """Where an answer stands in a rendering."""

    first: int
    end: int
    counted: bool


class _Rendered(NamedTuple):
    text: str  # with stand-ins
    answers: list[_Answer]


def conversation_tokens(vocabulary: Vocabulary, messages: Sequence[Message]) -> list[Tokens]:
    """The examples that a conversation is, in most templates one.

    Args:
      vocabulary: one with a chat template.
      messages: the last is the assistant's.

    Raises:
      Refused: the template does not take it, or its renderings do not tell what an answer is.
      ValueError: the template is no Jinja.
    """
    safe, back = _protected(vocabulary, messages)
    return [_tokens(vocabulary, rendered, back) for rendered in _examples(vocabulary, safe)]


def prompt_tokens(vocabulary: Vocabulary, messages: Sequence[Message]) -> list[int]:
    """What a model reads to answer the last message; errors as those of `conversation_tokens`."""
    safe, back = _protected(vocabulary, messages)
    text, tagged = _render(vocabulary, safe, True)
    answers = tagged or [_Answer(first, end, True) for first, end, answered in _turns(vocabulary, safe)
                         if text.startswith(answered[:end])]
    return _tokens(vocabulary, _Rendered(text, answers), back).ids


def prompt_text(vocabulary: Vocabulary, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """The text that the template makes of messages; errors as those of `conversation_tokens`."""
    safe, back = _protected(vocabulary, messages)
    return _restored(_render(vocabulary, safe, add_generation_prompt)[0], back)


def end_of_turn_ids(vocabulary: Vocabulary) -> set[int]:
    """The token that ends an answer, where the template has one."""
    tail = _tail(vocabulary, [{"role": "user", "content": "?"}], {"role": "assistant"})
    found = _special(vocabulary).search(tail)
    return {dict(vocabulary.special_tokens)[found[0]]} if found else set()


def turns_tokens(
    vocabulary: Vocabulary, conversations: Sequence[Sequence[str]], threads: int = 1
) -> list[list[list[int]]]:
    """The token ids of each turn of conversations without a template: prompt, answer, prompt and so on.

    The first prompt begins as documents do, and each answer ends with the end of document, unless it is no token.
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
    """The example of a conversation's turns, of which every second is an answer."""
    return Tokens([token for turn in turns for token in turn],
                  [number % 2 == 1 for number, turn in enumerate(turns) for _ in turn])


# ---- Rendering ---------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} holds an answer."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        return f"{_FIRST}{caller()}{_END}"


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson  # Jinja's own writes for HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _TODAY.strftime}
    return environment.from_string(template)


def _render(
    vocabulary: Vocabulary, messages: Sequence[Message], add_generation_prompt: bool
) -> tuple[str, list[_Answer]]:
    """The text of messages, and the answers that the template's tags mark, if it has any."""
    try:
        template = _compiled(vocabulary.chat_template or "")
    except (jinja2.TemplateError, RecursionError) as error:
        where = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"The chat template of vocabulary {vocabulary.path} is no Jinja template: {where}"
                         f"{_line(error)}.") from error
    try:
        marked = template.render(messages=messages, tools=None, documents=None,
                                 add_generation_prompt=add_generation_prompt, **dict(vocabulary.template_tokens))
    except jinja2.TemplateError as error:
        raise Refused(f"refused by the chat template: {_line(error)}") from error
    except _MISTAKES as error:
        raise Refused(f"with which the chat template fails: {_line(error)}") from error
    parts = re.split(f"([{_FIRST}{_END}])", marked)
    text, answers, first = "", [], 0
    for part in parts:
        if part == _FIRST:
            first = len(text)
        elif part == _END:
            answers.append(_Answer(first, len(text), True))
        else:
            text += part
    return text, answers


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__}"[:200].rstrip(".")


# ---- Answers -----------------------------------------------------------------------------------


def _examples(vocabulary: Vocabulary, messages: Sequence[Message]) -> list[_Rendered]:
    """The renderings of a conversation in which each of its answers counts once."""
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
    """Of each answer where it begins and ends in the rendering of the messages up to it, and that rendering."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:number]
        prompt, _ = _render(vocabulary, before, True)
        answered, _ = _render(vocabulary, [*before, message], False)
        if not answered.startswith(prompt):
            raise Refused("whose answers do not begin as the chat template asks for them")
        tail, end = _tail(vocabulary, before, message), len(answered)
        if answered.endswith(tail):
            special = _special(vocabulary).search(tail)
            end += (special.end() if special else len(tail.rstrip()) or len(tail)) - len(tail)
        yield len(prompt), end, answered


def _tail(vocabulary: Vocabulary, before: Sequence[Message], answer: Message) -> str:
    """What follows the text of an answer: the end of the turn, and perhaps a line end, or an end of all."""
    text, _ = _render(vocabulary, [*before, {**answer, "content": _ANSWER}], False)
    return text[text.rfind(_ANSWER) + 1 :] if _ANSWER in text else ""


# ---- Tokens ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _special(vocabulary: Vocabulary) -> re.Pattern[str]:
    """Finds special tokens, of those that begin alike the longest."""
    texts = sorted((text for text, _ in vocabulary.special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _protected(vocabulary: Vocabulary, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
    """Messages with a character for each special token, and for each character that is used so; and what they were."""
    stand_ins: dict[str, str] = {}
    pattern = re.compile(f"{_special(vocabulary).pattern}|{_PRIVATE}")

    def stand_in(found: re.Match[str]) -> str:
        return stand_ins.setdefault(found[0], chr(_STAND_INS + len(stand_ins)))

    safe: list[Message] = [{name: pattern.sub(stand_in, text) for name, text in message.items()}
                           for message in messages]
    if len(stand_ins) > _LAST - _STAND_INS + 1:
        raise Refused("with more characters for private use than can be told apart")
    return safe, {character: text for text, character in stand_ins.items()}


def _restored(text: str, back: Mapping[str, str]) -> str:
    return re.sub(_PRIVATE, lambda found: back.get(found[0], found[0]), text) if back else text


def _tokens(vocabulary: Vocabulary, rendered: _Rendered, back: Mapping[str, str]) -> Tokens:
    text, tokens = rendered.text, Tokens([], [])
    specials = [found.span() for found in _special(vocabulary).finditer(text)]

    def add(first: int, end: int, counted: bool) -> None:
        # Tokens do not reach across a special one, so that what stands before the last one need not be looked at.
        lead = text[max((begin for begin, last in specials if last <= first), default=0) : first]
        before, both = (_encoded(vocabulary, part, back) for part in (lead, lead + text[first:end]))
        ids = both[len(before) :]
        if both[: len(before)] != before:  # a token would reach across the border
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
    """Token ids of a rendering, or of a part of it behind `context`; what stands in a message is plain text."""
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
