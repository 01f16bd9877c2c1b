"""The texts of questions: ids as an evaluation has them, and no words but the record's."""

import pytest

from tasks.benchmarks.loading import BENCHMARKS, load, read_items
from tasks.benchmarks.questions import Prompt
from tasks.benchmarks.texts import PARTS, read_texts


def test_every_task_has_its_parts() -> None:
    assert PARTS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("task", BENCHMARKS)
def test_ids_and_answers_are_those_of_the_questions(task: str) -> None:
    texts, loaded = read_texts(task, None), load(task, None)
    assert list(texts.parts) == [question.id for question in loaded.questions]
    assert (texts.name, texts.is_sample) == (task, True)
    for question, item in zip(loaded.questions, read_items(task, None)[0], strict=True):
        parts = texts.parts[question.id]
        assert all(part.strip() for part in parts)
        assert set(parts) <= set(item.candidates[item.answer[0]].values())
        if isinstance(question, Prompt):
            assert question.references[0] in parts


def test_what_belongs_to_a_question() -> None:
    [logic, *_] = read_items("logic", None)[0]
    parts = read_texts("logic", None).parts[logic.id]
    assert parts == (logic.candidates[0]["question"], logic.candidates[logic.answer[0]]["choice"])
    assert len({fields["choice"] for fields in logic.candidates}) == 4
    [explained, *_] = read_items("ekar_cot", None)[0]
    right = explained.candidates[explained.answer[0]]
    assert read_texts("ekar_cot", None).parts[explained.id] == (
        right["question"], right["choice"], right["query_explanation"], right["explanation"])
    assert not any({"correct", "wrong", "蕴含", "中立", "矛盾"} & set(parts)
                   for task in ("cosqa", "ocnli") for parts in read_texts(task, None).parts.values())


def test_slips() -> None:
    with pytest.raises(ValueError, match="There is no benchmark 'logik', only .* Did you mean 'logic'"):
        read_texts("logik", None)
    with pytest.raises(FileNotFoundError, match="set DATA_DIR"):
        read_texts("logic", "/nowhere")
