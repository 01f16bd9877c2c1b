"""JEC-QA, questions of the Chinese bar examination with four choices, one or more of them right.

Three formats: the official {statement, option_list: {A: ...}, answer: [letters], id}; the study's extract of it, where
the answer is a position and option_list may be a list; and AGIEval's {question, options: ["(A)..."], label:
[letters]}.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import (
    LETTERS,
    NO_ANSWER,
    NO_SUCH_CHOICE,
    SEVERAL_ANSWERS,
    Item,
    choice_item,
    json_items,
)
from tasks.corpora.files import Lost

# JEC-QA has no development set and hides the answers of its test set. File 0 holds knowledge questions, file 1 cases.
FORMS = (
    Form(("jec*qa*/dev.json",)),
    Form(("jec*qa.json",)),
    Form(("jec-qa-kd.json", "jec-qa-ca.json")),
    Form(("jec*qa*/0_train.json", "jec*qa*/1_train.json")),
)
SHOT_FORMS = (Form(("jec*qa*/0_train.json", "jec*qa*/1_train.json")), Form(("jec*qa*/train.json",)))

_LETTERED = re.compile(r"\s*\(([A-Z])\)")
_JOIN = "；"


def read(files: Sequence[str], exact_set: bool = False) -> Iterator[Item | Lost]:
    """Yields the records of JEC-QA's files, in order.

    Args:
      files: paths, of any format, read in this order.
      exact_set: makes every non-empty set of choices a candidate, 15 for four choices: sets of one in order, then sets
        of two, and so on, with their texts joined by "；". A question with several right answers then has exactly one
        right candidate, and all questions are kept. Otherwise the choices are the candidates, and questions with
        several right answers are skipped.
    """
    return json_items(files, functools.partial(_item, exact_set=exact_set))


def _item(record: Mapping[str, Any], exact_set: bool) -> Item | Lost:
    official = "statement" in record
    question = record.get("statement" if official else "question")
    letters, choices = _choices(record.get("option_list" if official else "options"))
    right = _answers(record.get("answer" if official else "label"), letters)
    if isinstance(right, Lost):
        return right
    if len(right) > 1 and not exact_set:
        return Lost(SEVERAL_ANSWERS)
    item = choice_item(record.get("id"), {"question": question}, choices, right[0])
    return _sets(item, choices, right) if exact_set and isinstance(item, Item) else item


def _choices(options: Any) -> tuple[list[str], list[Any]]:
    """The letters and texts of the choices, sorted by letter if they are a mapping."""
    if isinstance(options, dict):
        letters = sorted(options, key=str)
        return letters, [options[letter] for letter in letters]
    if not isinstance(options, list):
        return [], []
    found = [_LETTERED.match(option) if isinstance(option, str) else None for option in options]
    return (
        [match[1] if match else LETTERS[place % len(LETTERS)] for place, match in enumerate(found)],
        [option[match.end():] if match else option for option, match in zip(options, found, strict=True)],
    )


def _answers(answer: Any, letters: Sequence[str]) -> tuple[int, ...] | Lost:
    """Positions of the right choices, in order."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return (answer,) if 0 <= answer < len(letters) else Lost(NO_SUCH_CHOICE)
    if not isinstance(answer, list | str) or not answer:
        return Lost(NO_ANSWER)
    if any(letter not in letters for letter in answer):
        return Lost(NO_SUCH_CHOICE)
    return tuple(sorted({letters.index(letter) for letter in answer}))


def _sets(item: Item, choices: Sequence[str], right: tuple[int, ...]) -> Item:
    sets = [chosen for size in range(1, len(choices) + 1)
            for chosen in itertools.combinations(range(len(choices)), size)]
    candidates = tuple(
        {**item.candidates[0], "letter": "".join(LETTERS[place] for place in chosen),
         "choice": _JOIN.join(choices[place] for place in chosen)}
        for chosen in sets
    )
    return item._replace(candidates=candidates, answer=(sets.index(right),))
