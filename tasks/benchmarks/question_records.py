"""Makes items from the records of a question file; `question_files` describes their formats."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import absolute, require_file
from tasks.benchmarks import humaneval, matching
from tasks.benchmarks.mbpp import DONE
from tasks.benchmarks.named_fields import Record, records, shown
from tasks.benchmarks.question_files import QuestionFile
from tasks.benchmarks.questions import Item, is_valid_text
from tasks.benchmarks.right_choices import choice_items
from tasks.benchmarks.templates import CHOICES, FUNCTIONS, NUMBER, PROGRAMS, TEXT
from tasks.corpora.files import Lost, in_name_of
from tasks.programs import assertions
from tasks.programs.programs import program_tests

_STOPS = {TEXT: ("\n",), NUMBER: ("\nQuestion:",), PROGRAMS: (DONE,), FUNCTIONS: humaneval.STOP}


class Read(NamedTuple):
    """The items of a file.

    Attributes:
      items: in the order of their records.
      answers: how they are answered, one of `templates.OF_FILES`.
      answer_is: how answers name a choice; None if they do so in several ways, or if there are no choices.
    """

    items: list[Item]
    answers: str
    answer_is: str | None


def read(of: QuestionFile, path: str, like: Read | None = None) -> Read:
    """Reads the questions of a file.

    Args:
      of: the file's options.
      path: the file itself, or its file of worked examples.
      like: the questions, if `path` holds their worked examples.

    Raises:
      ValueError: the file has an error; one line that names the record.
      OSError: one line; the file does not exist, or cannot be read.
    """
    path = absolute(path)
    with in_name_of(of.name):
        require_file(path, "file of questions")
        found = list(records(of, path))
    answers = of.answers or (like.answers if like else _kind(found))
    of.require_fields_of(answers)
    answer_is = of.answer_is or (like.answer_is if like else None)
    if answers == CHOICES:
        items, answer_is = choice_items(found, answer_is)
    else:
        items = [_MAKERS[answers](record) for record in found]
    places: dict[str, str] = {}
    for number, record in enumerate(found):
        items[number] = item = items[number]._replace(id=record.own_id(number))
        if not is_valid_text(item):
            raise record.fault("not valid UTF-8: it escapes half of a surrogate pair.")
        if (before := places.setdefault(item.id, record.place)) != record.place:
            raise record.fault(f"{before.removeprefix(f'{path}, ')} also has the id {item.id!r}; ids must differ.")
    return Read(items, answers, answer_is)


def _kind(found: Sequence[Record]) -> str:
    """How questions are answered by default: by the fields of the first record, else by all references."""
    for field, answers in (("choices", CHOICES), ("entry_point", FUNCTIONS), ("tests", PROGRAMS)):
        if found[0].get(field) is not None:
            return answers
    return NUMBER if all(matching.is_number(text) for record in found for text in _references(record)) else TEXT


def _references(record: Record) -> tuple[str, ...]:
    answers = record.value("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers:
        raise record.fault("the list of answers is empty.")
    return tuple(dict.fromkeys(record.as_text("answer", answer, numbers=True).strip() for answer in answers))


def _text_item(record: Record, match: str = TEXT) -> Item:
    references = _references(record)
    for reference in references:
        if match == NUMBER and matching.number_in(reference) is None:
            option = "'answers': 'text'"
            raise record.fault(f"the answer {shown(reference)} holds no number; to compare answers as text, set "
                               f"{record.of.setting(option)}.")
    fields = {**record.for_templates(), **record.passage(), "answer": references[0]}
    return Item("", (fields,), (0,), references, {"match": match, "stop": _stop(record, match)})


def _program_item(record: Record) -> Item:
    tests, setup = record.value("tests"), record.optional("setup")
    tests = [_code(record, "tests", test) for test in (tests if isinstance(tests, list) else [tests])]
    code = _code(record, "code", record.value("code"))
    # The form of MBPP's problems; the id is not used.
    problem: dict[str, Any] = {"task_id": 0, "test_list": tuple(tests),
                               "test_setup_code": _code(record, "setup", setup) if setup else ""}
    try:
        program_tests({**problem, "code": code})
    except assertions.Unjudged as error:
        raise record.fault(f"a program cannot be judged by tests {error.reason}.") from None
    except ValueError:
        raise record.fault("the code is not Python.") from None
    fields = {**record.for_templates(), "tests": "\n".join(tests), "code": code}
    return Item("", (fields,), (0,), (code,), {**problem, "stop": _stop(record, PROGRAMS)})


def _function_item(record: Record) -> Item:
    item = humaneval.item(record.values)
    if isinstance(item, Lost):
        raise record.fault(f"a record {item.reason}; HumanEval's form is task_id, prompt, entry_point, "
                           "canonical_solution and test, all of them texts.")
    return item._replace(extra={**item.extra, "stop": _stop(record, FUNCTIONS)})


_MAKERS: dict[str, Callable[[Record], Item]] = {
    TEXT: _text_item, NUMBER: functools.partial(_text_item, match=NUMBER), PROGRAMS: _program_item,
    FUNCTIONS: _function_item}


def _stop(record: Record, answers: str) -> tuple[str, ...]:
    return _STOPS[answers] if record.of.stop is None else tuple(record.of.stop)


def _code(record: Record, field: str, value: Any) -> str:
    return re.sub("\r\n?", "\n", record.as_text(field, value))
