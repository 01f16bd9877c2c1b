"""C3, questions on Chinese dialogues: a JSON list of [[lines], [{question, choice: [...], answer: text}, ...], id]."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from codellm_jax.contents import BrokenFile, lines
from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import EMPTY, NO_ANSWER, NO_SUCH_CHOICE, Item, choice_item, own_id
from tasks.corpora.files import Lost
from tasks.corpora.records import BROKEN_JSON, broken_rest

# The publisher's names, and those of CLUE, which republished it.
FORMS = (Form(("c3-d-dev.json",)), Form(("*c3*/d-dev.json",)))
SHOT_FORMS = (Form(("c3-d-train.json",)), Form(("*c3*/d-train.json",)))

_NOT_A_DIALOGUE = "that are not a dialogue with questions"
_BETWEEN = re.compile(r"[\s,]*")
# A dialogue begins with a list of lines.
_DIALOGUE = re.compile(r'\[\s*\[\s*"')


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields the questions of C3's files, in order; an unreadable dialogue counts as one record."""
    for file in files:
        for number, dialogue in enumerate(_dialogues(file)):
            yield from [dialogue] if isinstance(dialogue, Lost) else _items(dialogue, number)


def _items(dialogue: Any, number: int) -> Iterator[Item | Lost]:
    match dialogue:
        case [list(said), list(questions), *rest] if questions:
            own = own_id(rest[0]) if rest else ""
        case _:
            yield Lost(_NOT_A_DIALOGUE)
            return
    context = "".join(said) if all(isinstance(line, str) for line in said) else None
    for place, question in enumerate(questions):
        yield _item(question, context, f"{own or number}/{place}")


def _item(question: Any, context: str | None, own: str) -> Item | Lost:
    if not isinstance(question, dict) or context is None:
        return Lost(_NOT_A_DIALOGUE)
    if not context.strip():
        return Lost(EMPTY)
    choices, answer = question.get("choice"), question.get("answer")
    if not answer:
        return Lost(NO_ANSWER)
    place = choices.index(answer) if isinstance(choices, list) and answer in choices else Lost(NO_SUCH_CHOICE)
    return choice_item(own, {"question": question.get("question"), "context": context}, choices, place)


def _dialogues(file: str) -> Iterator[Any]:
    """Yields the entries of the list, and a `Lost` for each broken one; continues at the next readable entry."""
    content: list[bytes] = []
    broken = False
    try:
        content.extend(lines(file))
    except BrokenFile:
        broken = True
    text = b"".join(content).decode(errors="surrogateescape")
    try:
        whole = json.loads(text)
        yield from whole if isinstance(whole, list) else [Lost(_NOT_A_DIALOGUE)]
    except (ValueError, RecursionError):
        if text.strip():
            yield from _salvaged(text)
    if broken:
        yield broken_rest(file)


def _salvaged(text: str) -> Iterator[Any]:
    decoder, position = json.JSONDecoder(strict=False), _start(text, 0)
    if position == len(text):
        yield Lost(BROKEN_JSON)
    while position < len(text):
        try:
            dialogue, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            yield Lost(BROKEN_JSON)
            position = _start(text, position + 1)
            continue
        yield dialogue
        between = _BETWEEN.match(text, end)
        position = between.end() if between else end
        if text[position : position + 1] == "]":
            return


def _start(text: str, position: int) -> int:
    found = _DIALOGUE.search(text, position)
    return found.start() if found else len(text)
