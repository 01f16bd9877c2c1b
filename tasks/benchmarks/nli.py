"""OCNLI and CMNLI: does one Chinese sentence follow from another? Official JSON lines, or a repackaged JSON list.

Official: {sentence1, sentence2, label: entailment, neutral, contradiction, or "-" where annotators disagree}.
Repackaged: {text_a, text_b, label in Chinese}, with CMNLI's development set in two halves.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.benchmarks.locating import Form
from tasks.benchmarks.questions import NO_ANSWER, Item, choice_item, json_items
from tasks.corpora.files import Lost

OCNLI_FORMS = (Form(("*ocnli*/dev.json",)), Form(("ocnli*dev.json",)))
OCNLI_SHOT_FORMS = tuple(Form((name,)) for name in ("*ocnli*/train.50k.json", "*ocnli*/train.json", "ocnli*train.json"))
CMNLI_FORMS = (Form(("*cmnli*/dev.json", "*cmnli*/test.json"), halves=True), Form(("cmnli*dev.json",)))
CMNLI_SHOT_FORMS = (Form(("*cmnli*/train.json",)), Form(("cmnli*train.json",)))

# The words between the sentences in the released system and the paper, in the order of the candidates.
LABELS = ("entailment", "neutral", "contradiction")
CHINESE_LABELS = ("蕴含", "中立", "矛盾")
WORDS = {"word": ("对", "或", "错"), "english_word": ("Yes", "Maybe", "No"), "label": LABELS}


def read(files: Sequence[str]) -> Iterator[Item | Lost]:
    """Yields the records of either format, in order; the candidates are entailment, neutral and contradiction."""
    return json_items(files, _item)


def _item(record: Mapping[str, Any]) -> Item | Lost:
    repackaged = "text_a" in record
    first, second = ("text_a", "text_b") if repackaged else ("sentence1", "sentence2")
    label = record.get("label")
    if label is None or label == "":
        return Lost(NO_ANSWER)
    if label == "-":
        return Lost("labelled '-'")
    labels = next((labels for labels in (LABELS, CHINESE_LABELS) if label in labels), None)
    if labels is None:
        return Lost("with an unknown label")
    shared = {"sentence1": record.get(first), "sentence2": record.get(second)}
    return choice_item(record.get("id"), shared, CHINESE_LABELS, labels.index(label), WORDS)
