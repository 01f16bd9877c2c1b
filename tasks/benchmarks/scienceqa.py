"""ScienceQA, English school questions with two to five choices: the official problems.json, or JSON lines.

A split has three selections: the questions with a lecture and a solution, as the released system uses them; those
without an image; and all. The JSON lines in circulation hold only the questions without an image, and no lectures or
solutions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import OTHER_SPLIT, Item, Lacking, choice_item, whole_number
from tasks.corpora.files import Lost
from tasks.corpora.records import NO_OBJECT, json_records

FORMS = (
    Form(("problems.json",), companions=("pid_splits.json",)),
    Form(("textonly_with_split.json",)),
)

EXPLAINED, TEXT_ONLY, ALL = "explained", "text_only", "all"


def read(files: Sequence[str], selection: str, split: str = "test") -> Iterator[Item | Lost]:
    """Yields the questions of one split, in the file's order.

    Args:
      files: the problems and, if present, pid_splits.json, which then assigns the splits.
      selection: EXPLAINED, TEXT_ONLY or ALL.
      split: "test", "val" or "train".

    Raises:
      Lacking: the file has no lectures, but the selection needs the official file, which has them.
    """
    records = list(_records(files[0]))
    found = [record for record in records if not isinstance(record, Lost)]
    if selection != TEXT_ONLY and found and not any("lecture" in record for record in found):
        wanted = "lectures and solutions" if selection == EXPLAINED else "questions with an image and lectures"
        raise Lacking(f"{files[0]} holds no {wanted}; put ScienceQA's own problems.json into DATA_DIR, or evaluate "
                      "scienceqa_text_only.")
    splits = _splits(files[1]) if len(files) > 1 else {}
    for number, record in enumerate(records):
        if isinstance(record, Lost):
            yield record
            continue
        of = splits.get(str(record.get("pid"))) or record.get("split")
        item = _item(record, selection) if of == split else Lost(OTHER_SPLIT if of else "of no split")
        yield item if isinstance(item, Lost) else item._replace(id=item.id or str(number))


def _item(record: Mapping[str, Any], selection: str) -> Item | Lost:
    notes = {}
    for key in ("lecture", "solution", "hint"):
        value = record.get(key)
        notes[key] = value if isinstance(value, str) else ""
        if selection == EXPLAINED and key != "hint" and not notes[key].strip():
            return Lost(f"without a {key}")
    if selection == TEXT_ONLY and record.get("image"):
        return Lost("with an image")
    item = choice_item(record.get("pid"), {"question": record.get("question")}, record.get("choices"),
                       whole_number(record.get("answer")))
    if isinstance(item, Lost):
        return item
    # Added after the check for blanks, since they may be empty.
    return item._replace(candidates=tuple({**fields, **notes} for fields in item.candidates))


def _records(file: str) -> Iterator[dict[str, Any] | Lost]:
    """Problems with their `pid`; problems.json is one object of all problems by id."""
    for record in json_records(file):
        if isinstance(record, Lost) or "question" in record or "choices" in record:
            yield record
            continue
        for pid, problem in record.items():
            yield {**problem, "pid": pid} if isinstance(problem, dict) else Lost(NO_OBJECT)


def _splits(file: str) -> dict[str, str]:
    """The split of each problem by its id, from pid_splits.json."""
    lists = next((record for record in json_records(file) if isinstance(record, dict)), {})
    return {str(pid): split for split in ("train", "val", "test") for pid in lists.get(split) or ()}
