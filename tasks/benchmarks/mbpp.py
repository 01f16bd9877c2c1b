"""MBPP: write a Python function. The sanitized set, zero-shot, as in the study; or the full set, as in the literature.

Sanitized: a JSON list of {task_id, prompt, code, test_imports, test_list}. Full: JSON lines of {task_id, text, code,
test_setup_code, test_list, challenge_test_list}.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import NO_ANSWER, NO_TEXT, OTHER_SPLIT, Item, is_blank, json_items
from tasks.corpora.files import Lost
from tasks.corpora.mbpp import official_split, sanitized_ids
from tasks.programs import assertions
from tasks.programs.programs import program_tests

SANITIZED_FORMS = (Form(("sanitized-mbpp.json",)),)
FULL_FORMS = (Form(("mbpp.json",)),)

# Ids of the solved problems in the literature's prompt.
SHOWN = (2, 3, 4)
BEGIN, DONE = "[BEGIN]", "[DONE]"


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields all problems of a file whose tests can judge a program, from all official splits, in order."""
    return map(_judged, json_items(files, _item))


def read_test(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields problems 11 to 510; their `extra` holds the stop sequence of generated programs."""
    for item in map(_judged, json_items(files, functools.partial(_of_split, split="test"))):
        yield item if isinstance(item, Lost) else item._replace(extra={**item.extra, "stop": (DONE,)})


def read_shown(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields problems 2, 3 and 4."""
    return json_items(files, lambda record: _item(record) if record.get("task_id") in SHOWN else Lost(OTHER_SPLIT))


def read_train(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields problems 601 to 974 without those of the sanitized set, which are the questions."""
    return json_items(files, functools.partial(_of_split, split="train", without=sanitized_ids()))


def _of_split(record: Mapping[str, Any], split: str, without: frozenset[int] = frozenset()) -> Item | Lost:
    number = record.get("task_id")
    if not isinstance(number, int) or official_split(number) != split:
        return Lost(OTHER_SPLIT)
    return Lost("that are questions of the sanitized set") if number in without else _item(record)


def _judged(item: Item | Lost) -> Item | Lost:
    """The item, or a `Lost` if its tests cannot judge a program; checked before any program is generated."""
    if isinstance(item, Lost):
        return item
    try:
        program_tests({**item.extra, "code": item.references[0]})
    except assertions.Unjudged as error:
        return Lost(f"with tests {error.reason}")
    except ValueError:
        return Lost("whose solution is not Python")
    return item


def _item(record: Mapping[str, Any]) -> Item | Lost:
    number = record.get("task_id")
    if not isinstance(number, int) or isinstance(number, bool):
        return Lost("without task_id")
    text, code = record.get("prompt", record.get("text")), record.get("code")
    if code is None or code == "":
        return Lost(NO_ANSWER)
    if lost := is_blank([text, code]):
        return lost
    lists = {key: record.get(key) or [] for key in ("test_list", "test_imports", "challenge_test_list")}
    if not all(isinstance(value, list) and all(isinstance(line, str) for line in value) for value in lists.values()):
        return Lost(NO_TEXT)
    setup = record.get("test_setup_code") or ""
    if not isinstance(setup, str):
        return Lost(NO_TEXT)
    if not lists["test_list"]:
        return Lost("without tests")
    program = _with_newlines(str(code))
    tests = {key: tuple(map(_with_newlines, value)) for key, value in lists.items()}
    extra: dict[str, Any] = {
        "task_id": number,
        "split": official_split(number),
        "test_setup_code": _with_newlines(setup),
        **tests,
    }
    fields = {"text": str(text).strip(), "tests": "\n".join(tests["test_list"]), "code": program}
    return Item(str(number), (fields,), (0,), (program,), extra)


def _with_newlines(code: str) -> str:
    return re.sub("\r\n?", "\n", code)
