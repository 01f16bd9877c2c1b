"""Logic, a subject of C-Eval: Chinese questions with four choices, CSV with id, question, A, B, C, D and answer."""

import csv
from collections.abc import Iterator, Sequence

from codellm_jax.contents import BrokenFile, lines
from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import Item, choice_item, position_of_letter
from tasks.corpora.files import Lost
from tasks.corpora.records import broken_rest

FORMS = (Form(("logic_val.csv",)),)
# C-Eval's worked examples.
SHOT_FORMS = (Form(("logic_dev.csv",)),)

_LETTERS = ("A", "B", "C", "D")


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """The records of C-Eval's CSV files, in order."""
    for file in files:
        for row in _rows(file):
            yield row if isinstance(row, Lost) else _item(row)


def _item(row: dict[str, str]) -> Item | Lost:
    answer = position_of_letter((row.get("answer") or "").strip(), _LETTERS)
    return choice_item(row.get("id"), {"question": row.get("question")}, [row.get(key) for key in _LETTERS], answer)


def _rows(file: str) -> Iterator[dict[str, str] | Lost]:
    broken: list[Lost] = []

    def text() -> Iterator[str]:
        try:
            for line in lines(file):
                yield line.decode(errors="surrogateescape")
        except BrokenFile:
            broken.append(broken_rest(file))

    # Strict, so that an unclosed quote is an error and not a text of a thousand lines.
    rows = csv.DictReader(text(), strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error:
            yield Lost("broken CSV")
            continue
        yield Lost("with too many columns") if None in row else row
    yield from broken
