"""Questions with choices from a user's file; an answer names the right choice by its index, letter or text."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.benchmarks.named_fields import Record, shown
from tasks.benchmarks.question_files import INDEX, LETTER, ORDINAL
from tasks.benchmarks.questions import LETTERS, Item, choice_item
from tasks.benchmarks.templates import TEXT
from tasks.corpora.files import Lost

# Tried in this order unless 'answer_is' is set; counting from 1 must be set explicitly.
_TRIED = (LETTER, INDEX, TEXT)


class _Asked(NamedTuple):
    """A question; `readings` maps each reading of its answer to the position of the choice that it names."""

    record: Record
    choices: list[str]
    labels: list[str]
    answer: Any
    readings: dict[str, int]

    def told(self, reading: str) -> str:
        position = self.readings[reading]
        return f"the {reading} of choice {LETTERS[position]}, {shown(self.choices[position])}"


def choice_items(records: Sequence[Record], answer_is: str | None) -> tuple[list[Item], str | None]:
    """Makes items with a candidate for each choice; also returns how answers name the right choice.

    Args:
      records: one or more records of a file.
      answer_is: one of `question_files.READINGS`; None for the reading that fits all records. If none does, each record
        is read as it fits, and None is returned.

    Raises:
      ValueError: one line; a record's choices are malformed, or its answer names none of them or more than one.
    """
    asked = [_asked(record) for record in records]
    if answer_is is None:
        answer_is = LETTER if "labels" in records[0].of.fields else _common_reading(asked)
    items = []
    for one in asked:
        [position] = _positions(one, [answer_is] if answer_is else _TRIED, answer_is)
        item = choice_item("", one.record.for_templates(), one.choices, position)
        if isinstance(item, Lost):
            raise one.record.fault(f"a record {item.reason}.")
        passage = one.record.passage()
        items.append(item._replace(candidates=tuple({**fields, **passage} for fields in item.candidates)))
    return items, answer_is


def _asked(record: Record) -> _Asked:
    choices, labels = record.value("choices"), record.optional("labels")
    if isinstance(choices, Mapping):
        labels, choices = list(choices), list(choices.values())
    if not isinstance(choices, list):
        raise record.fault(f"the choices must be a list of texts, found {shown(choices)}.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise record.fault(f"a question must have 2 to {len(LETTERS)} choices, found {len(choices)}.")
    if labels is None:
        labels = list(LETTERS[:len(choices)])
    if not isinstance(labels, list) or len(labels) != len(choices):
        raise record.fault(f"there must be a label for each of the {len(choices)} choices, found {shown(labels)}.")
    choices = [record.as_text("choices", choice, numbers=True) for choice in choices]
    labels = [record.as_text("labels", label, numbers=True) for label in labels]
    answer = record.value("answer")
    if isinstance(answer, list):
        if len(answer) != 1:
            raise record.fault(f"a question must have one right choice, found {shown(answer)}.")
        [answer] = answer
    return _Asked(record, choices, labels, answer, _readings(answer, choices, labels))


def _readings(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Maps each reading under which an answer names a choice to the position of that choice."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return {}
    text = str(answer).strip()
    found: dict[str, int] = {}
    if re.fullmatch("[0-9]{1,3}", text):
        found |= {INDEX: int(text), ORDINAL: int(text) - 1}
    names = [label.strip().casefold() for label in labels]
    if names.count(text.casefold()) == 1:
        found[LETTER] = names.index(text.casefold())
    texts = [choice.strip() for choice in choices]
    if texts.count(text) == 1:
        found[TEXT] = texts.index(text)
    return {reading: position for reading, position in found.items() if 0 <= position < len(choices)}


def _common_reading(asked: Sequence[_Asked]) -> str | None:
    """The reading that fits the answers of all records; None if there is none."""
    possible = [reading for reading in _TRIED if all(reading in one.readings for one in asked)]
    if not possible:
        return None
    for one in asked:
        _positions(one, possible, None)
    unsure = [one for one in asked
              if len({position for reading, position in one.readings.items() if reading in _TRIED}) > 1]
    if unsure:
        logging.warning("%s: each answer is read as the %s of a choice, which fits all %d records; %d of them have "
                        "another reading. Set the option 'answer_is' to choose.",
                        unsure[0].record.of.name, possible[0], len(asked), len(unsure))
    return possible[0]


def _positions(one: _Asked, readings: Sequence[str], answer_is: str | None) -> set[int]:
    """The position of the choice that an answer names under these readings; raises unless there is exactly one."""
    here = [reading for reading in readings if reading in one.readings]
    positions = {one.readings[reading] for reading in here}
    if not positions:
        raise one.record.fault(_outside(one, answer_is))
    if len(positions) > 1:
        other = next(reading for reading in here if one.readings[reading] != one.readings[here[0]])
        option = f"'answer_is': {here[0]!r}"
        raise one.record.fault(
            f"the answer {one.answer!r} may be {one.told(here[0])}, or {one.told(other)}; say which: "
            f"{one.record.of.setting(option)}, or {other!r}.")
    return positions


def _outside(one: _Asked, answer_is: str | None) -> str:
    count = len(one.choices)
    first, last = (label if label.isalnum() else shown(label) for label in (one.labels[0], one.labels[-1]))
    ways = {INDEX: f"an index from 0 to {count - 1}", ORDINAL: f"a number from 1 to {count}",
            LETTER: f"a letter from {first} to {last}", TEXT: "the text of one"}
    wanted = ways[answer_is] if answer_is else f"{ways[INDEX]}, {ways[LETTER]} or {ways[TEXT]}"
    option = "'answer_is': 'ordinal'"
    hint = (f" If the file counts from 1, set {one.record.of.setting(option)}."
            if answer_is in (None, INDEX) and str(one.answer).strip() == str(count) else "")
    return f"the answer {shown(one.answer)} is not one of the {count} choices; it must be {wanted}.{hint}"
