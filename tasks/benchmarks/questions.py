"""Questions with candidates to score, prompts to answer, and the items from which both are made.

A reader turns each record of a file into an `Item`, which holds the fields that templates name, or into a `Lost` with
the reason. A template turns items into questions.
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

# Reasons why a record is not a question; in messages each follows a number.
EMPTY = "empty"
NO_TEXT = "with a value that is not text"
NO_ANSWER = "without an answer"
NO_SUCH_CHOICE = "whose right answer is not a choice"
FEW_CHOICES = "with fewer than two choices"
SEVERAL_ANSWERS = "with several right answers"
OTHER_SPLIT = "of another split"
BAD_TEXT = "not valid UTF-8"


class Candidate(NamedTuple):
    """A candidate of a question: the text before the scored text, and the scored text."""

    prompt: str
    continuation: str


class Question(NamedTuple):
    """A question whose answer is the candidate with the lowest perplexity.

    Attributes:
      id: unique within the benchmark; the file's own if it has one.
      candidates: two or more, in the file's order.
      answer: positions of the right candidates; all shipped tasks have one.
    """

    id: str
    candidates: tuple[Candidate, ...]
    answer: tuple[int, ...]


class Prompt(NamedTuple):
    """A question that the model answers by writing.

    Attributes:
      id: unique within the benchmark; the file's own if it has one.
      prompt: the text to continue.
      references: right answers, one or more.
      extra: further data for metrics and reports, such as MBPP's tests.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    extra: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded benchmark, and everything that its result must record about its data.

    Attributes:
      name: the task's name.
      questions: all `Question` or all `Prompt`.
      sha256: of the files' content, uncompressed and joined in order, in hexadecimal.
      read: number of records in the files, questions and skipped ones.
      skipped: number of skipped records by reason, such as "labelled '-'".
      is_sample: whether any file is one of the package's sample files; a result must then say "sample".
      files: the files read, in order; those of worked examples last.
      worked_examples: number of records from which the worked examples of few-shot prompts are drawn; 0 if none are.
      worked_examples_skipped: number of skipped records of those files, by reason.
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
    """A record as fields for templates.

    Attributes:
      id: the file's own id, or "" if it has none.
      candidates: the fields of each candidate; a single entry if the answer is written.
      answer: positions of the right candidates; (0,) if the answer is written.
      references: as in `Prompt`; empty for questions with candidates.
      extra: as in `Prompt`.
    """

    id: str
    candidates: tuple[dict[str, str], ...]
    answer: tuple[int, ...]
    references: tuple[str, ...] = ()
    extra: Mapping[str, Any] = {}


class Lacking(UnreadableFile):
    """A file's form lacks data that a task needs; one line with the remedy."""


def json_items(
    files: Sequence[str], make: Callable[[Mapping[str, Any]], Item | Lost]
) -> Iterator[Item | Lost]:
    """Applies a function to the records of JSON files, in order; each item gets an id.

    The id is the record's own, else its number in its file. With several files it begins with the file's name, because
    numbers restart in each.
    """
    for file in files:
        stem = f"{file_stem(file)}-" if len(files) > 1 else ""
        for number, record in enumerate(json_records(file)):
            item = record if isinstance(record, Lost) else make(record)
            yield item if isinstance(item, Lost) else item._replace(id=f"{stem}{item.id or number}")


def own_id(value: Any) -> str:
    """A record's own id as text; "" if it has no usable id."""
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""


def is_blank(values: Iterable[Any]) -> Lost | None:
    """Why values are not all non-blank texts; None if they are."""
    for value in values:
        if value is None or (isinstance(value, str) and not value.strip()):
            return Lost(EMPTY)
        if not isinstance(value, str):
            return Lost(NO_TEXT)
    return None


def is_valid_text(item: Item) -> bool:
    """Whether every text of an item is valid UTF-8; invalid bytes are lone surrogates."""
    fields = itertools.chain.from_iterable(fields.values() for fields in item.candidates)
    try:
        "".join((item.id, *fields, *item.references)).encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_number(value: Any) -> int | Lost:
    """An answer given as the position of the right choice."""
    if value is None:
        return Lost(NO_ANSWER)
    return value if isinstance(value, int) and not isinstance(value, bool) else Lost(NO_SUCH_CHOICE)


def position_of_letter(letter: Any, letters: Sequence[Any]) -> int | Lost:
    """The position of a label such as "B" among those of the choices."""
    if letter is None or letter == "":
        return Lost(NO_ANSWER)
    return letters.index(letter) if letter in letters else Lost(NO_SUCH_CHOICE)


def choice_item(
    own: Any, shared: Mapping[str, Any], choices: Any, answer: int | Lost,
    of_choice: Mapping[str, Sequence[str]] | None = None,
) -> Item | Lost:
    """An item with a candidate for each choice.

    Args:
      own: the record's own id, of any type.
      shared: fields of all candidates; none may be blank.
      choices: the choices' texts; they become the fields `choice`, `letter`, and `options`, which lists all with
        their letters.
      answer: position of the right choice, or why there is none.
      of_choice: further fields, each with a value for every choice.
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
