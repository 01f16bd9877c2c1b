"""DuReader-robust: answer a Chinese question from a text. SQuAD's format, or a repackaged JSON list in two halves.

Official: data[].paragraphs[].{context, qas[].{id, question, answers[].text}}. Repackaged: {text_a: context, text_b:
question, label: one answer}.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form, file_stem
from tasks.benchmarks.questions import NO_ANSWER, Item, is_blank, own_id
from tasks.corpora.files import Lost
from tasks.corpora.records import json_records

FORMS = (Form(("*dureader*/dev.json", "*dureader*/test.json"), halves=True), Form(("dureader*dev.json",)))
SHOT_FORMS = (Form(("*dureader*/train.json",)), Form(("dureader*train.json",)))


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields the questions of either format, in order."""
    for file in files:
        stem = f"{file_stem(file)}-" if len(files) > 1 else ""
        questions = (question for record in json_records(file) for question in _questions(record))
        for number, item in enumerate(questions):
            yield item if isinstance(item, Lost) else item._replace(id=f"{stem}{item.id or number}")


def _questions(record: Any, context: Any = None) -> Iterator[Item | Lost]:
    """Yields the questions of a repackaged record, or of any level of SQuAD's format, as found in broken files."""
    if isinstance(record, Lost):
        yield record
    elif not isinstance(record, dict):
        yield Lost("not a JSON object")
    elif "text_a" in record:
        yield _item(record.get("id"), record["text_a"], record.get("text_b"), [record.get("label")])
    elif "question" in record:
        yield _official(record, context)
    else:
        level = next((level for level in ("data", "paragraphs", "qas") if isinstance(record.get(level), list)), None)
        if level is None:
            yield Lost("without context, question and answers")
            return
        for below in record[level]:
            yield from _questions(below, record.get("context"))


def _official(question: Mapping[str, Any], context: Any) -> Item | Lost:
    answers = question.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        return Lost(NO_ANSWER)
    return _item(question.get("id"), context, question.get("question"), [answer.get("text") for answer in answers])


def _item(own: Any, context: Any, question: Any, answers: Sequence[Any]) -> Item | Lost:
    given = [answer for answer in answers if answer is not None and answer != ""]
    if not given:
        return Lost(NO_ANSWER)
    if lost := is_blank([context, question, *given]):
        return lost
    right = list(dict.fromkeys(given))
    fields = {"context": context.strip(), "question": question.strip(), "answer": right[0]}
    return Item(own_id(own), (fields,), (0,), tuple(right))
