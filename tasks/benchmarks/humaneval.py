"""HumanEval (Chen et al., 2021): complete a Python function from its signature and docstring.

JSON lines of {task_id, prompt, entry_point, canonical_solution, test}, where `test` defines `check(candidate)`. A
program is the prompt and its completion, up to the first line that starts another top-level statement.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import NO_ANSWER, Item, is_blank, json_items
from tasks.corpora.files import Lost
from tasks.programs import assertions
from tasks.programs.programs import check_tests

FORMS = (Form(("humaneval.json",)),)

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al., 2021, section 3.2
_KEYS = ("prompt", "entry_point", "test")


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields the problems of HumanEval's file, in order."""
    return json_items(files, item)


def item(record: Mapping[str, Any]) -> Item | Lost:
    """Converts a record to an item, or to the reason why it is not a question."""
    code = record.get("canonical_solution")
    if not code:
        return Lost(NO_ANSWER)
    if lost := is_blank([code, *(record.get(key) for key in _KEYS)]):
        return lost
    if not record["entry_point"].isidentifier():
        return Lost("whose entry_point is not the name of a function")
    code, *texts = (re.sub("\r\n?", "\n", text) for text in (code, *(record[key] for key in _KEYS)))
    own = str(record.get("task_id", ""))
    extra: dict[str, Any] = {"task_id": own, **dict(zip(_KEYS, texts, strict=True)), "stop": STOP}
    try:
        check_tests({**extra, "code": code})
    except assertions.Unjudged as error:
        return Lost(f"with tests {error.reason}")
    except ValueError:
        return Lost("whose solution is not Python")
    return Item(own, ({"prompt": extra["prompt"], "code": code},), (0,), (code,), extra)
