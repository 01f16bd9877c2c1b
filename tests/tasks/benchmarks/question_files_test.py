"""Benchmarks by files of one's own: what is read, how answers are understood, and what is refused and how."""

import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.benchmarks.judging import Benchmarks
from tasks.benchmarks.loading import BENCHMARKS, load, read_items
from tasks.benchmarks.questions import Prompt, Question
from tasks.benchmarks.templates import TEMPLATES
from tasks.programs import sandbox
from tasks.programs.programs import problem_tests

Write = Callable[..., str]
SKY = {"question": "What is blue?", "choices": ["grass", "sky"], "answer": 1}
SUM = {"question": "3 + 4?", "answer": "3 + 4 = 7\n#### 7"}
HALVE = {"question": "Halve a number.", "code": "def half(x):\n    return x / 2", "tests": ["assert half(3) == 1.5"]}
FUNCTION = {"task_id": "h/7", "prompt": 'def f():\n    """One."""\n', "entry_point": "f",
            "canonical_solution": "    return 1\n", "test": "def check(candidate):\n    assert candidate() == 1\n"}
CITY = {"question": "Capital of France?", "passage": "Paris is large.", "answer": ["Paris", "Paris, France"]}


def json_lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def lines(write: Write) -> Callable[..., str]:
    return lambda *records, name="questions.jsonl": write(name, json_lines(*records))


def questions_of(path: str, *arguments: Any, **options: Any) -> list[Question]:
    found = load(path, None, *arguments, **options).questions
    return [question for question in found if isinstance(question, Question)]


def answers_of(path: str, **spec: Any) -> list[int]:
    found = questions_of("mine", specs={"mine": {"file": path, **spec}}) if spec else questions_of(path)
    return [question.answer[0] for question in found]


# ---- What is read ------------------------------------------------------------------------------


def test_choices(lines: Callable[..., str]) -> None:
    path = lines(SKY | {"id": "a"}, {"question": "Two?", "passage": "One and one.", "choices": ["1", "2", "3"],
                                     "answer": "B"})
    loaded = load(path, "/nowhere")  # the folder of the other benchmarks
    assert (loaded.name, loaded.files, loaded.read, loaded.is_sample) == ("questions", (path,), 2, False)
    first, second = loaded.questions
    assert first == Question("a", (("Question: What is blue?\nAnswer:", " grass"),
                                   ("Question: What is blue?\nAnswer:", " sky")), (1,))
    assert second.id == "1" and isinstance(second, Question) and second.answer == (1,)
    assert second.candidates[2] == ("One and one.\nQuestion: Two?\nAnswer:", " 3")
    [first, _] = questions_of(path, "multiple_choice")
    assert first.candidates[1] == ("Question: What is blue?\nA. grass\nB. sky\nAnswer:", " sky")
    own = {"prompt": "{passage}{question} {letter}", "continuation": "{choice}"}
    assert questions_of(path, own)[1].candidates[0] == ("One and one.Two? A", "1")


@pytest.mark.parametrize("task", ["logic", "jecqa", "scienceqa_text_only", "ekar", "c3"])
@pytest.mark.parametrize("template", ["released", "multiple_choice"])
def test_published_benchmarks_as_files(task: str, template: str, write: Write) -> None:
    """Their questions, written as lines under their templates, are the same questions."""
    records = [{"id": item.id, "question": item.candidates[0]["question"], "passage": item.candidates[0].get("context"),
                "choices": [fields["choice"] for fields in item.candidates], "answer": item.answer[0]}
               for item in read_items(task, None)[0]]
    path = write("copy.jsonl", json_lines(*records))
    own = {key: text.replace("{context}", "{passage}") for key, text in TEMPLATES[task][template]._asdict().items()}
    assert load(path, None, own).questions == load(task, None, template).questions


def test_the_same_questions_in_other_forms(lines: Callable[..., str], write: Write) -> None:
    plain = lines({"question": "Q", "choices": ["x", "y", "z"], "answer": 2})
    nested = lines({"q": {"stem": "Q", "choices": [{"label": "1", "text": "x"}, {"label": "2", "text": "y"},
                                                  {"label": "3", "text": "z"}]}, "key": "3"}, name="nested.jsonl")
    fields = {"question": "q.stem", "choices": "q.choices.text", "labels": "q.choices.label", "answer": "key"}
    object_ = write("object.json", [{"question": "Q", "choices": {"P": "x", "Q": "y", "R": "z"}, "answer": "R"}])
    packed = write("packed.jsonl.gz", gzip.compress(json_lines({"question": "Q", "choices": ["x", "y", "z"],
                                                                "answer": ["z"]}).encode()))
    marked = write("marked.jsonl", b"\xef\xbb\xbf" + json_lines({"question": "Q", "choices": ["x", "y", "z"],
                                                                 "answer": "c"}).encode())
    found = [load(path, None).questions for path in (plain, object_, packed, marked)]
    found.append(load("nested", None, specs={"nested": {"file": nested, "fields": fields}}).questions)
    several = {"fields": {"choices": ["A", "B", "C", "D"]}}
    separated = write("cells.csv", "question,A,B,C,D,answer\nQ,x,y,z,,C\n")
    tabs = write("cells.tsv.gz", gzip.compress(b"question\tA\tB\tC\tD\tanswer\nQ\tx\ty\tz\t\t2\n"))
    table = pathlib.Path(plain).with_name("table.parquet")
    pq.write_table(pa.table({"question": ["Q"], "choices": [["x", "y", "z"]], "answer": [2]}), table)
    columns = table.with_name("columns.parquet")
    pq.write_table(pa.table({"question": ["Q"], "A": ["x"], "B": ["y"], "C": ["z"], "D": pa.nulls(1, pa.string()),
                             "answer": ["C"]}), columns)
    found += [load("cells", None, specs={"cells": {"file": str(path), **several}}).questions
              for path in (separated, tabs, columns)]
    assert load(str(table), None).name == "table"
    found.append(load(str(table), None).questions)
    assert all(questions == found[0] for questions in found)


def test_what_is_wrong_in_other_forms(write: Write) -> None:
    for content, told in ((b"question,answer\nQ\n", "cells.csv, line 2, 1 instead of 2: with a number of"),
                          (b"question,answer\nQ,3\n\xff,3\n", "cells.csv, line 3: not valid UTF-8"),
                          (gzip.compress(b"question,answer\n" + b"Q,3\n" * 999)[:-9], "damaged or truncated"),
                          (b"question,answer\n", "cells.csv: empty file")):
        with pytest.raises(ValueError, match=told):
            load(write("cells.csv", content), None)
    with pytest.raises(ValueError, match=r"'A, B' must hold text|is empty"):
        load("mine", None, specs={"mine": {"file": write("cells.csv", "question,A,B,answer\nQ,,y,B\n"),
                                           "fields": {"choices": ["A", "B"]}}})
    with pytest.raises(ValueError, match="fields must map this package's names"):
        load("mine", None, specs={"mine": {"file": "x.csv", "fields": {"question": ["a", "b"]}}})


def test_written_answers(lines: Callable[..., str]) -> None:
    loaded = load(lines(CITY | {"answer": ["Paris", "Paris", "Paris, France"]}), None)
    assert loaded.questions == (Prompt("0", "Paris is large.\nQuestion: Capital of France?\nAnswer:",
                                       ("Paris", "Paris, France"), {"match": "text", "stop": ("\n",)}),)
    loaded = load(lines(SUM, {"question": "Half?", "answer": 0.5}), None, few_shot=1)
    assert [question.references for question in loaded.questions if isinstance(question, Prompt)] == [
        ("3 + 4 = 7\n#### 7",), ("0.5",)]
    [_, second] = loaded.questions
    assert isinstance(second, Prompt) and second.extra["match"] == "number"
    assert second.prompt == "Question: 3 + 4?\nAnswer: 3 + 4 = 7\n#### 7\n\nQuestion: Half?\nAnswer:"
    # One answer that is no number makes all of them texts, unless the file's options say otherwise.
    path = lines(SUM | {"answer": "7"}, SUM | {"answer": "seven or 7"})
    for spec, match in (({}, "text"), ({"answers": "number"}, "number")):
        loaded = load("mine", None, specs={"mine": {"file": path, "stop": ["###"], **spec}})
        assert [question.extra for question in loaded.questions if isinstance(question, Prompt)] == [
            {"match": match, "stop": ("###",)}] * 2


def test_programs_are_judged_as_those_of_mbpp(lines: Callable[..., str]) -> None:
    path = lines(HALVE | {"id": 7}, {
        "question": "Twice.", "code": "def twice(x):\r\n    return 2 * x", "setup": "y = 3",
        "tests": "assert twice(y) == 6\nassert twice(0) == 0"})
    loaded = Benchmarks(unconfined=True).load(path)
    first, second = loaded.questions
    assert isinstance(first, Prompt) and isinstance(second, Prompt) and [first.id, second.id] == ["7", "1"]
    assert first.prompt == ("You are an expert Python programmer, and here is your task: Halve a number. Your code "
                            "should pass these tests:\n\nassert half(3) == 1.5\n[BEGIN]\n")
    assert first.extra["stop"] == ("[DONE]",)
    tests = [problem_tests({**question.extra, "code": question.references[0]}) for question in (first, second)]
    programs = [test.of(source) for test, source in zip(tests, (HALVE["code"], "def twice(x): return 6"), strict=True)]
    outcomes = sandbox.run_programs(programs, insist=True)
    assert [outcome.verdict for outcome in outcomes] == ["passed", "failed"], outcomes


def test_functions_of_humanevals_form(lines: Callable[..., str]) -> None:
    path = lines(FUNCTION, FUNCTION | {"task_id": "h/8"}, name="functions.jsonl")
    loaded = load(path, None)
    assert [question.id for question in loaded.questions] == ["h/7", "h/8"] and loaded.name == "functions"
    [first, _] = loaded.questions
    assert isinstance(first, Prompt) and first.prompt == FUNCTION["prompt"] and "\ndef" in first.extra["stop"]


def test_samples_of_humaneval_are_judged_by_pass_at_k() -> None:
    benchmarks = Benchmarks(unconfined=True)
    loaded = benchmarks.load("humaneval")
    answers = [[question.references[0], "    return None\n"] for question in loaded.questions
               if isinstance(question, Prompt)]
    judged = benchmarks.judge(loaded, answers, lambda text: [ord(letter) for letter in text])
    assert judged.values == {"pass@1": [0.5] * 5} and not judged.rule
    assert all(right == "passed" and wrong.startswith("failed: ") for right, wrong in judged.notes)


def test_judged_by_the_rule(lines: Callable[..., str]) -> None:
    numbers = Benchmarks().load(lines(SUM, SUM | {"id": "b"}))
    judged = Benchmarks().judge(numbers, [["so 7.0", "8"], ["none", "#### 7 then 9"]], lambda text: [])
    assert judged.values == {"exact_match": [0.5, 0.5]} and "####" in judged.rule
    assert judged.notes == [["read as 7.0", "read as 8"], ["no number", "read as 7"]]
    texts = Benchmarks().load(lines(CITY))
    judged = Benchmarks().judge(texts, [["The paris!"]], lambda text: [])
    assert judged.values == {"exact_match": [1.0]} and "SQuAD" in judged.rule
    judged = Benchmarks().judge(texts, [["Lyon"]], lambda text: [])
    assert judged.values == {"exact_match": [0.0]}


def test_worked_examples(lines: Callable[..., str]) -> None:
    records = [SKY | {"question": f"Q{number}", "answer": "AB"[number % 2]} for number in range(6)]
    path = lines(*records)
    for question in questions_of(path, few_shot=3):
        context = question.candidates[0].prompt
        shown = re.findall(r"Question: (Q\d)", context)
        assert len(set(shown)) == 4 and shown[-1] == f"Q{question.id}"
        assert f"Question: {shown[0]}\nAnswer: {SKY['choices'][int(shown[0][1]) % 2]}\n\n" in context
    with pytest.raises(ValueError, match="^questions: few_shot asks for 6 worked examples for question 0, but there"):
        load(path, None, few_shot=6)
    # Of their own file, whose few answers alone would not tell whether they are letters or texts.
    shots = lines({"question": "Shown", "choices": ["B", "A"], "answer": "B"}, name="shots.jsonl")
    loaded = load("mine", None, few_shot=1, specs={"mine": {"file": path, "worked_examples": shots}})
    first = loaded.questions[0]
    assert isinstance(first, Question) and first.candidates[0].prompt.startswith("Question: Shown\nAnswer: A\n\nQ")
    assert loaded.files == (path, shots) and loaded.worked_examples == 1
    assert load(path, None).sha256 != loaded.sha256


def test_fields_of_the_files_own(lines: Callable[..., str]) -> None:
    specs = {"mine": {"file": lines(SKY | {"topic": "nature"}), "fields": {"subject": "topic"}}}
    own = {"prompt": "{subject}: {question}", "continuation": " {choice}"}
    [question] = Benchmarks(template={"mine": own}, specs=specs).load("mine").questions
    assert isinstance(question, Question) and question.candidates[1] == ("nature: What is blue?", " sky")
    with pytest.raises(ValueError, match=r"line 1: there is no 'topic', only 'question', 'choices', 'answer'; if "):
        load("mine", None, specs={"mine": specs["mine"] | {"file": lines(SKY)}})


def test_a_template_by_the_name_in_tasks(lines: Callable[..., str]) -> None:
    path = lines(SKY)
    own = {"prompt": "{question}", "continuation": "{choice}"}
    benchmarks = Benchmarks(template={path: own, "default": "multiple_choice"})
    assert benchmarks.load(path).questions == load(path, None, own).questions
    assert benchmarks.settings("questions")["template"] == own
    assert benchmarks.load("logic").questions == load("logic", None, "multiple_choice").questions
    with pytest.raises(ValueError, match="^TEMPLATE names 'question', which is neither .* Did you mean 'questions'"):
        Benchmarks(template={"question": own}, specs={"questions": {"file": path}}).load("questions")
    with pytest.raises(ValueError, match="^questions: there is no template 'paper', only released, multiple_choice;"):
        Benchmarks(template="paper").load(path)


def test_texts_for_contamination(lines: Callable[..., str]) -> None:
    texts = Benchmarks().texts(lines(SKY | {"passage": "The sky.", "id": "s"}, SKY))
    assert (texts.name, texts.is_sample) == ("questions", False)
    assert texts.parts == {"s": ("The sky.", "What is blue?", "sky"), "1": ("What is blue?", "sky")}
    assert texts.sha256 == load(lines(SKY | {"passage": "The sky.", "id": "s"}, SKY), None).sha256
    assert Benchmarks().texts(lines(CITY)).parts["0"] == ("Paris is large.", "Capital of France?", "Paris")
    assert Benchmarks().texts(lines(HALVE)).parts["0"] == (HALVE["question"], HALVE["code"])
    assert Benchmarks().texts(lines(FUNCTION)).parts["h/7"] == (FUNCTION["prompt"], FUNCTION["canonical_solution"])


# ---- Right choices -----------------------------------------------------------------------------


def choice(answer: Any, *choices: Any) -> dict[str, Any]:
    return {"question": "Q", "choices": list(choices or ("one", "two", "three")), "answer": answer}


@pytest.mark.parametrize("answers,positions", [
    ((0, 2), [0, 2]), (("0", "2"), [0, 2]), (("A", "c"), [0, 2]), (("three", "one"), [2, 0]), ((" B ", "A"), [1, 0]),
    ((1, "C", "one"), [1, 2, 0]), ((["B"], ["C"]), [1, 2])])
def test_an_index_a_letter_or_the_text(answers: Any, positions: list[int], lines: Callable[..., str]) -> None:
    assert answers_of(lines(*map(choice, answers))) == positions


def test_choices_that_are_numbers(lines: Callable[..., str]) -> None:
    assert answers_of(lines(choice(7, 5, 6, 7), choice("2.5", 2.5, 3))) == [2, 0]
    assert answers_of(lines(choice(1, "1", "0"), choice(1, "5", "6")), answer_is="index") == [1, 1]


def test_what_fits_all_records_decides(lines: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    assert answers_of(lines(choice("A", "B", "A"), choice("B", "x", "y"))) == [0, 1]
    assert "questions: each answer is read as the letter of a choice, which fits all 2 records; 1" in caplog.text
    caplog.clear()
    assert answers_of(lines(choice("A", "B", "A"), choice("y", "x", "y")), answer_is="text") == [1, 1]
    assert answers_of(lines(choice(1), choice(3)), answer_is="ordinal") == [0, 2]
    assert not caplog.text


WAYS = "it must be an index from 0 to 2, a letter from A to C or the text of one."
FIELDS = "set BENCHMARKS = {'questions': {'file': 'FILE', 'fields': {'answer': ...}}}."


@pytest.mark.parametrize("record,told", [
    (choice("A", "B", "A"), "the answer 'A' may be the letter of choice A, 'B', or the text of choice B, 'A'; say "
     "which: BENCHMARKS = {'questions': {'file': 'FILE', 'answer_is': 'letter'}}, or 'text'."),
    (choice(1, "1", "0"), "the answer 1 may be the index of choice B, '0', or the text of choice A, '1'; say which: "
     "BENCHMARKS = {'questions': {'file': 'FILE', 'answer_is': 'index'}}, or 'text'."),
    (choice("four"), f"the answer 'four' is not one of the 3 choices; {WAYS}"),
    (choice(3), f"the answer 3 is not one of the 3 choices; {WAYS} If the file counts from 1, set BENCHMARKS = "
     "{'questions': {'file': 'FILE', 'answer_is': 'ordinal'}}."),
    (choice(-1), f"the answer -1 is not one of the 3 choices; {WAYS}"),
    (choice(True), f"the answer True is not one of the 3 choices; {WAYS}"),
    (choice("same", "same", "same", "other"), f"the answer 'same' is not one of the 3 choices; {WAYS}"),
    (SKY | {"choices": {"A": "x", "B\b": "y"}, "answer": "C"},
     "the answer 'C' is not one of the 2 choices; it must be an index from 0 to 1, a letter from A to 'B\\x08' or the "
     "text of one."),
    (choice(["A", "B"]), "a question must have one right choice, found ['A', 'B']."),
    (choice(0, "one"), "a question must have 2 to 26 choices, found 1."),
    (choice(0, *map(str, range(27))), "a question must have 2 to 26 choices, found 27."),
    (choice(0, "one", None), "'choices' must hold text, found None."),
    (choice(0, "one", " "), "'choices' is empty."),
    (SKY | {"choices": "AB"}, "the choices must be a list of texts, found 'AB'."),
    (SKY | {"question": 3}, "'question' must hold text, found 3."),
    (SKY | {"question": ""}, "'question' is empty."),
    (SKY | {"passage": 3}, "'passage' must hold text, found 3."),
    (SKY | {"id": [1]}, "'id' must hold text, found [1]."),
    ({"question": "Q", "choices": ["a", "b"], "label": 0},
     f"there is no 'answer', only 'question', 'choices', 'label'; if the answer has another name, {FIELDS}"),
    (SKY | {"question": "\ud800"}, "not valid UTF-8: it escapes half of a surrogate pair."),
    ({"question": "Q", "answer": []}, "the list of answers is empty."),
    ({"question": "Q", "answer": {"text": "x"}}, "'answer' must hold text, found {'text': 'x'}."),
    ({"question": "Q"}, f"there is no 'answer', only 'question'; if the answer has another name, {FIELDS}"),
    (HALVE | {"tests": "half(3)"}, "a program cannot be judged by tests that hold no assert, and thus pass anything."),
    (HALVE | {"tests": [3]}, "'tests' must hold text, found 3."),
    (HALVE | {"code": "def"}, "the code is not Python."),
    (FUNCTION | {"entry_point": "f()"}, "a record whose entry_point is not the name of a function; HumanEval's form is "
     "task_id, prompt, entry_point, canonical_solution and test, all of them texts."),
])
def test_what_is_wrong_with_one_record(record: dict, told: str, write: Write) -> None:
    """It is said in one line, with the record's own, and before anything else is done."""
    path = write("questions.jsonl", json.dumps(record) + "\n")
    with pytest.raises(ValueError) as error:
        load(path, None)
    assert str(error.value) == f"{path}, line 1: {told.replace('FILE', path)}"


NAMES = ("id", "question", "passage", "choices", "answer", "tests", "code", "setup", "entry_point", "test", "prompt")
PLAIN = (st.none() | st.booleans() | st.integers(-3, 30) | st.floats() | st.text(max_size=3)
         | st.sampled_from(["", " ", "A", "b", "0", "x", "#### 7"]))
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["A", "text", "label"]) | st.text(max_size=2), inner, max_size=3), max_leaves=6)
BROKEN = st.tuples(st.sampled_from([SKY, SUM, HALVE, FUNCTION, CITY]), st.sampled_from(NAMES), JSON)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JSON)) | BROKEN.map(
    lambda changed: {**changed[0], changed[1]: changed[2]}), max_size=3))
def test_whatever_stands_in_a_file(records: list[dict[str, Any]]) -> None:
    """It is read, or refused in one line that can be printed."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        try:
            assert len(load("mine", None, specs={"mine": {"file": file.name}}).questions) == len(records)
        except ValueError as error:
            assert file.name in str(error) and str(error).isprintable()


# ---- Files -------------------------------------------------------------------------------------


WANTED = "; a file of questions holds a JSON object in each line, in UTF-8."


@pytest.mark.parametrize("content,told", [
    ("", f"FILE: empty file{WANTED}"), ("\n \n", "FILE holds no questions."), ("[]", "FILE holds no questions."),
    (json_lines(SKY) + "{broken\n", f"FILE, line 2: broken JSON{WANTED}"),
    (json_lines(SKY, [1]), f"FILE, line 2: not a JSON object{WANTED}"),
    (json_lines(SKY, SKY).encode() + b'{"question": "\xe9"}\n', f"FILE, line 3: not valid UTF-8{WANTED}"),
    ("[" + json.dumps(SKY) + ", 3]", f"FILE, record 2: not a JSON object{WANTED}"),
    (json_lines(SKY | {"id": "x"}, SKY, SKY | {"id": "x"}), "FILE, line 3: line 1 also has the id 'x'; ids must d"),
    (json_lines(SKY | {"id": 1}, SKY), "FILE, line 2: line 1 also has the id '1'; ids must differ."),
    (json_lines(SKY, SKY | {"answer": 5}), "FILE, line 2: the answer 5 is not one of the 2 choices; it must be "),
    (gzip.compress(json_lines(*[SKY] * 99).encode())[:-9], f"FILE: broken rest of questions.jsonl{WANTED}"),
    (b"PAR1" + b"\0" * 99, "questions: FILE is damaged or truncated: its footer cannot be read"),
    (b"ARROW1\0\0" + b"\0" * 99, "questions: FILE is an Arrow file; text may be UTF-8"),
])
def test_what_is_wrong_with_a_file(content: str | bytes, told: str, write: Write) -> None:
    path = write("questions.jsonl", content)
    with pytest.raises(ValueError) as error:
        load(path, None)
    assert str(error.value).startswith(told.replace("FILE", path)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^questions: There is no file of questions {tmp_path}/questions.j"):
        load(f"{tmp_path}/questions.jsonl", None)
    with pytest.raises(ValueError, match=f"^folder: {tmp_path} is a folder; give a file.$"):
        load("folder", None, specs={"folder": {"file": str(tmp_path)}})


# ---- Names and options -------------------------------------------------------------------------


@pytest.mark.parametrize("file,name", [
    ("questions.jsonl", "questions"), ("My questions (v2).json.gz", "My_questions_v2"), ("a-b.c.ndjson", "a_b_c"),
    ("题目.jsonl", "题目"), ("__x__y.jsonl.zst", "x_y")])
def test_the_name_is_a_word(file: str, name: str, write: Write) -> None:
    assert load(write(file, json_lines(SKY)), None).name == name


@pytest.mark.parametrize("file", ["logic.jsonl", "Logic.json", "HumanEval.jsonl.gz", "mbpp_sample.jsonl", "--.jsonl"])
def test_a_name_that_is_taken(file: str, write: Write) -> None:
    path = write(file, json_lines(SKY))
    with pytest.raises(ValueError) as error:
        load(path, None)
    assert f"; set TASKS = ['mine'] and BENCHMARKS = {{'mine': {{'file': '{path}'}}}}." in str(error.value)
    assert load("mine", None, specs={"mine": {"file": path}}).name == "mine"


def test_a_file_and_its_line_of_benchmarks(write: Write) -> None:
    path = write("mine.jsonl", json_lines({"stem": "Q", "choices": ["a", "b"], "answer": 0}))
    specs = {"mine": {"file": path, "fields": {"question": "stem"}}}
    assert load(path, None, specs=specs) == load("mine", None, specs=specs)
    other = write("other/mine.jsonl", json_lines(SKY))
    with pytest.raises(ValueError, match=f"^The results of '{other}' would be stored under 'mine', the name of "
                                         f"another ben"):
        load(other, None, specs=specs)


@pytest.mark.parametrize("specs,told", [
    ([], r"^BENCHMARKS must map names to options such as {'file': 'questions.jsonl'}, found \[\]"),
    ({"a b": {"file": "x"}}, "a name is a word .* found 'a b'"),
    ({"logic": {"file": "x"}}, "'logic' is a benchmark of this"),
    ({"mine": "x.jsonl"}, "^mine: BENCHMARKS must give at least a file"), ({"mine": {}}, "must give at least a file"),
    ({"mine": {"file": "x", "field": {}}}, "has no option 'field', only file, answers, .* Did you mean 'fields'"),
    ({"mine": {"file": 3}}, "file must be the path of a file, found 3"),
    ({"mine": {"file": "hf://a/b/c.jsonl"}}, "file must be a local path or an address of gs://, found 'hf://a/b/c"),
    ({"mine": {"file": "x", "worked_examples": ""}}, "worked_examples must be the path of a file"),
    ({"mine": {"file": "x", "answers": "choice"}}, "answers must be one of choices, .* Did you mean 'choices'"),
    ({"mine": {"file": "x", "answer_is": "number"}}, "answer_is must be one of index, ordinal, letter, text"),
    ({"mine": {"file": "x", "fields": {"question": 3}}}, "fields must map this package's names"),
    ({"mine": {"file": "x", "fields": {"choice": "c"}}}, "fields cannot set 'choice', which is made from other fields"),
    ({"mine": {"file": "x", "stop": "\n"}}, "stop must be a list of texts"),
])
def test_malformed_options(specs: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        Benchmarks(specs=specs)
    assert "\n" not in str(error.value)


def test_fields_of_another_kind(lines: Callable[..., str]) -> None:
    for path, field in ((lines(SUM), "choices"), (lines(FUNCTION, name="f.jsonl"), "question")):
        with pytest.raises(ValueError, match=f"^mine: fields names '{field}', but the fields of "):
            load("mine", None, specs={"mine": {"file": path, "fields": {field: "x"}, "answers": "text"
                                               if field == "choices" else "functions"}})


def test_what_is_neither_a_benchmark_nor_a_file() -> None:
    with pytest.raises(ValueError, match=f"only {', '.join(BENCHMARKS)}, mine, or a file such as .* mean 'mine'"):
        load("mien", None, specs={"mine": {"file": "x.jsonl"}})
