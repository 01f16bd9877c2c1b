"""E-KAR, Chinese analogies with four choices: the official JSON lines, or a repackaged JSON list.

Official: {question: "a:b", choices: {label: [A ... D], text: [...]}, answerKey, explanation: [the question's, then one
for each choice], relation}. Repackaged: {text_a: "a:b", text_b: "A. ...\\nB. ...", label: "B. ..."}, without
explanations.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form, is_official
from tasks.benchmarks.questions import (
    NO_ANSWER,
    NO_SUCH_CHOICE,
    Item,
    Lacking,
    choice_item,
    is_blank,
    json_items,
    position_of_letter,
)
from tasks.corpora.files import Lost

_FOLDERS = ("ekar*chinese*", "ekar*", "e-kar*")
FORMS = (*(Form((f"{folder}/test.json",)) for folder in _FOLDERS), Form(("ekar*test.json",)))
SHOT_FORMS = (*(Form((f"{folder}/train.json",)) for folder in _FOLDERS), Form(("ekar*train.json",)))

NO_EXPLANATIONS = "without an explanation of the question and of each choice"

_LETTERED = re.compile(r"\s*([A-Z])\s*[.．、]\s*")


def read(files: Sequence[str], explained: bool = False) -> Iterator[Item | Lost]:
    """Yields the records of E-KAR's files, in order.

    Args:
      files: paths, of either format.
      explained: requires explanations, which become the fields `query_explanation` and `explanation`.

    Raises:
      Lacking: explanations are required, but a file is repackaged.
    """
    if explained and (repackaged := [file for file in files if not is_official(file)]):
        raise Lacking(f"{repackaged[0]} is the repackaged form, which has no explanations; replace it by E-KAR's own "
                      "file, or evaluate ekar.")
    return json_items(files, functools.partial(_item, explained=explained))


def _item(record: Mapping[str, Any], explained: bool) -> Item | Lost:
    if "text_a" in record:
        return _repackaged(record)
    choices = record.get("choices")
    texts, letters = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    if not isinstance(texts, list) or not isinstance(letters, list) or len(texts) != len(letters):
        return Lost("without choices and their letters")
    answer = position_of_letter(record.get("answerKey"), letters)
    shared, of_choice = {"question": record.get("question")}, {}
    if explained:
        explanations = record.get("explanation")
        if not isinstance(explanations, list) or len(explanations) != 1 + len(texts) or is_blank(explanations):
            return Lost(NO_EXPLANATIONS)
        shared["query_explanation"], of_choice["explanation"] = explanations[0], explanations[1:]
    return choice_item(record.get("id"), shared, texts, answer, of_choice)


def _repackaged(record: Mapping[str, Any]) -> Item | Lost:
    label, listed = record.get("label"), record.get("text_b")
    if lost := is_blank([listed]):
        return lost
    lines = [line for line in str(listed).split("\n") if line.strip()]
    if not isinstance(label, str) or not label.strip():
        return Lost(NO_ANSWER)
    answer: int | Lost = lines.index(label) if label in lines else Lost(NO_SUCH_CHOICE)
    texts = [_LETTERED.sub("", line, count=1) for line in lines]
    return choice_item(record.get("id"), {"question": record.get("text_a")}, texts, answer)
