"""CosQA: does this Python function answer this query? A JSON list of {idx, doc, code, label: 0 or 1}."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import Item, choice_item, json_items
from tasks.corpora.files import Lost

FORMS = (Form(("cosqa-dev.json",)),)
SHOT_FORMS = (Form(("cosqa-train.json",)),)

VERDICTS = ("correct", "wrong")


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields the records of CosQA's files, in order; the candidates are "correct" and "wrong"."""
    return json_items(files, _item)


def _item(record: Mapping[str, Any]) -> Item | Lost:
    label = record.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label not in (0, 1):
        return Lost("without label 0 or 1")
    shared = {"doc": record.get("doc"), "code": record.get("code")}
    return choice_item(record.get("idx"), shared, VERDICTS, 0 if label else 1)
