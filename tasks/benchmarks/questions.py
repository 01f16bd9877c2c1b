"""What a benchmark becomes: questions with candidates to be scored, or prompts to be answered; and how they are made.

A reader turns each record of a file into an `Item`, the fields that templates name, or into a `Lost` that says why
not. A template turns items into questions.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import UnreadableFile
from tasks.benchmarks.locating import file_stem
from tasks.corpora.files import Lost
from tasks.corpora.records import json_records

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Reasons why a record is no question; each goes on after a number.
EMPTY = "empty"
NO_TEXT = "with a value that is no text"
NO_ANSWER = "without an answer"
NO_SUCH_CHOICE = "whose right answer is no choice"
FEW_CHOICES = "with fewer than two choices"
SEVERAL_ANSWERS = "with several right answers"
OTHER_SPLIT = "of another split"
BAD_TEXT = "not valid UTF-8"


class Candidate(NamedTuple):
    """One of a question's candidates: the text before what is scored, and the text scored."""

    prompt: str
    continuation: str


class Question(NamedTuple):
    """A question whose answer is the candidate with the lowest perplexity.

    Attributes:
      id: unique within the benchmark; the file's own where it has one.
      candidates: two or more, in the file's order.
      answer: positions of the right candidates; in all of our tasks there is one.
    """

    id: str
    candidates: tuple[Candidate, ...]
    answer: tuple[int, ...]


class Prompt(NamedTuple):
    """A question that is answered by writing.

    Attributes:
      id: unique within the benchmark; the file's own where it has one.
      prompt: what is gone on from.
      references: right answers, one or more.
      extra: what a metric or a report needs beside them, such as MBPP's tests.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    extra: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A benchmark as read, and everything that its result must say of its data.

    Attributes:
      name: the task's name.
      questions: all `Question` or all `Prompt`.
      sha256: of the files' content, uncompressed and joined in order, in hexadecimal.
      read: records that the files hold; the questions and those skipped.
      skipped: how many records are no question, by reason, which goes on after the number: "labelled '-'".
      is_sample: whether any file is one of our own sample files; a result must then say "sample".
      files: the files read, in order; those of worked examples last.
      worked_examples: how many records the worked examples of few-shot prompts are drawn from; 0 without.
      worked_examples_skipped: how many records of those files are none, by reason.
    """

    name: str
    questions: tuple[Question, ...] | tuple[Prompt, ...]
    sha256: str
    read: int
    skipped: Mapping[str, int]
    is_sample: bool
    files: tuple[str, ...]
    worked_examples: int = 0
    worked_examples_skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Item(NamedTuple):
    """A record in the words of templates.

    Attributes:
      id: the file's own name for it, or "" where it has none.
      candidates: the fields, once for each candidate; once alone where the answer is written.
      answer: positions of the right candidates; (0,) where the answer is written.
      references: as in `Prompt`; empty for questions with candidates.
      extra: as in `Prompt`.
    """

    id: str
    candidates: tuple[dict[str, str], ...]
    answer: tuple[int, ...]
    references: tuple[str, ...] = ()
    extra: Mapping[str, Any] = {}


class Lacking(UnreadableFile):
    """A file's form has no place for what a task needs; one line that says so, and what to do."""


def json_items(
    files: Sequence[str], make: Callable[[Mapping[str, Any]], Item | Lost]
) -> Iterator[Item | Lost]:
    """The records of JSON files through a function, in order; each item gets an id.

    It is the record's own, or else its number in its file. Of several files it begins with the file's name, because
    the same numbers begin again in each.
    """
    for file in files:
        stem = f"{file_stem(file)}-" if len(files) > 1 else ""
        for number, record in enumerate(json_records(file)):
            item = record if isinstance(record, Lost) else make(record)
            yield item if isinstance(item, Lost) else item._replace(id=f"{stem}{item.id or number}")


def own_id(value: Any) -> str:
    """A record's own id as text; "" if it has none that could serve."""
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""


def is_blank(values: Iterable[Any]) -> Lost | None:
    """What is wrong with values that must all be texts with something in them; None if nothing is."""
    for value in values:
        if value is None or (isinstance(value, str) and not value.strip()):
            return Lost(EMPTY)
        if not isinstance(value, str):
            return Lost(NO_TEXT)
    return None


def is_valid_text(item: Item) -> bool:
    """Whether every text of an item can be written as UTF-8; bytes that were none are lone surrogates."""
    fields = itertools.chain.from_iterable(fields.values() for fields in item.candidates)
    try:
        "".join((item.id, *fields, *item.references)).encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_number(value: Any) -> int | Lost:
    """An answer that is given as the position of the right choice."""
    if value is None:
        return Lost(NO_ANSWER)
    return value if isinstance(value, int) and not isinstance(value, bool) else Lost(NO_SUCH_CHOICE)


def position_of_letter(letter: Any, letters: Sequence[Any]) -> int | Lost:
    """Where a label such as "B" stands among those of the choices."""
    if letter is None or letter == "":
        return Lost(NO_ANSWER)
    return letters.index(letter) if letter in letters else Lost(NO_SUCH_CHOICE)


def choice_item(
    own: Any, shared: Mapping[str, Any], choices: Any, answer: int | Lost,
    of_choice: Mapping[str, Sequence[str]] | None = None,
) -> Item | Lost:
    """An item with a candidate for each choice.

    Args:
      own: the record's id, of whatever type.
      shared: fields that all candidates have, of which none may be blank.
      choices: the choices' texts; they become the field `choice`, beside `letter`, and `options`, all of them with
        their letters.
      answer: position of the right one, or why there is none.
      of_choice: more fields, each with a value for every choice.
    """
    if isinstance(answer, Lost):
        return answer
    if not isinstance(choices, list | tuple) or len(choices) < 2 or len(choices) > len(LETTERS):
        return Lost(FEW_CHOICES)
    if lost := is_blank([*shared.values(), *choices]):
        return lost
    if not 0 <= answer < len(choices):
        return Lost(NO_SUCH_CHOICE)
    common = {**shared, "options": lettered(choices)}
    more = of_choice or {}
    candidates = tuple(
        {**common, "letter": LETTERS[position], "choice": choice,
         **{field: values[position] for field, values in more.items()}}
        for position, choice in enumerate(choices)
    )
    return Item(own_id(own), candidates, (answer,))


def lettered(choices: Sequence[str]) -> str:
    """Choices as lines "A. ..."."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
