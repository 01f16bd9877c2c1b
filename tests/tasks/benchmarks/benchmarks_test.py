"""The benchmarks' readers: every form of their files, what is broken or mislabelled in them, and how they are found."""

import csv
import gzip
import hashlib
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from tasks.benchmarks.loading import BENCHMARKS, GENERATED, load
from tasks.benchmarks.questions import Prompt, Question
from tasks.benchmarks.templates import MULTIPLE_CHOICE

Write = Callable[..., str]


def json_lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def text_csv(rows: list[list[str]], header: str = "id,question,A,B,C,D,answer") -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows([header.split(","), *rows])
    return stream.getvalue()


JEC = {"statement": "哪项正确？", "option_list": dict(zip("ABCD", "甲乙丙丁", strict=True)), "answer": ["B"], "id": "7"}
AGIEVAL = {"passage": None, "question": "哪项正确？", "options": ["(A)甲", "(B)乙", "(C)丙", "(D)丁"], "label": ["B"]}
EKAR = {"id": "7", "question": "一:二", "choices": {"label": ["A", "B"], "text": ["三:四", "五:六"]}, "answerKey": "B",
        "explanation": ["甲。", "乙。", "丙。"], "relation": []}
REPACKAGED_EKAR = {"id": 7, "text_a": "一:二", "text_b": "A. 三:四\nB. 五:六", "text_c": "", "label": "B. 五:六"}
PROBLEM = {"question": "Which?", "choices": ["one", "two"], "answer": 1, "hint": "", "image": None, "split": "test",
           "lecture": "A lecture.", "solution": "A solution."}
SCIENCE_LINE = {"pid": 7, "split": "test", "question": "Which?", "choices": ["one", "two"], "answer": 1}
PAIR = {"sentence1": "甲", "sentence2": "乙", "label": "neutral", "id": 7}
REPACKAGED_PAIR = {"id": 7, "text_a": "甲", "text_b": "乙", "text_c": "", "label": "中立"}
PARAGRAPH = {"context": " 文章 ", "qas": [{"id": "7", "question": "问题", "answers": [
    {"text": "文", "answer_start": 0}, {"text": "文", "answer_start": 0}]}]}
READING = {"id": 7, "text_a": " 文章 ", "text_b": "问题", "text_c": "", "label": "文"}
PROGRAM = {"task_id": 7, "prompt": "Write f.", "code": "def f():\r\n    pass", "test_imports": [],
           "test_list": ["assert f() is None"]}
FUNCTION = {"task_id": "h/7", "prompt": 'def f():\r\n    """One."""\r\n', "entry_point": "f",
            "canonical_solution": "    return 1\r\n", "test": "def check(candidate):\n    assert candidate() == 1\n"}
C3: list[Any] = [["男：甲", "女：乙"], [{"question": "谁？", "choice": ["丙", "丁"], "answer": "丁"}], "7"]


# ---- Forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task,first,second", [
    ("jecqa", ("jecqa/dev.json", json_lines([JEC])), ("jec-qa-kd.jsonl", json_lines([AGIEVAL]))),
    ("jecqa", ("jecqa/dev.json", [JEC | {"answer": 1, "option_list": ["甲", "乙", "丙", "丁"]}]),
     ("jecqa/dev.jsonl", json_lines([JEC]))),
    ("jecqa_exact_set", ("jecqa/dev.json", json_lines([JEC | {"answer": ["D", "B"]}])),
     ("jec-qa-ca.jsonl", json_lines([AGIEVAL | {"label": ["B", "D"]}]))),
    ("scienceqa_text_only", ("problems.json", {"7": PROBLEM}),
     ("textonly_with_split.jsonl", json_lines([SCIENCE_LINE]))),
    ("ekar", ("ekar_chinese/test.json", json_lines([EKAR])), ("ekar/test.json", [REPACKAGED_EKAR])),
    ("cmnli", ("cmnli_public/dev.json", json_lines([PAIR])), ("cmnli/dev.json", [REPACKAGED_PAIR])),
    ("ocnli", ("OCNLI/data/dev.json", json_lines([PAIR])),
     ("ocnli/dev.json.gz", gzip.compress(json.dumps([PAIR]).encode(), mtime=0))),
    ("dureader", ("dureader_robust-data/dev.json", {"data": [{"paragraphs": [PARAGRAPH]}]}),
     ("dureader/dev.json", [READING])),
    ("c3", ("c3-d-dev.json", [C3]), ("c3_public/d-dev.json", [C3])),
])
@pytest.mark.parametrize("template", ["released", MULTIPLE_CHOICE])
def test_both_forms_are_the_same_questions(
    task: str, first: tuple, second: tuple, template: str, write: Write, tmp_path: pathlib.Path, caplog: Any
) -> None:
    if task in GENERATED:
        template = "released"
    loaded = []
    for name, (path, content) in (("first", first), ("second", second)):
        write(f"{name}/{path}", content)
        [question] = load(task, str(tmp_path / name), template).questions
        loaded.append(question[1:])
    assert loaded[0] == loaded[1]


def test_answers_of_each_form(write: Write, tmp_path: pathlib.Path) -> None:
    write("logic_val.csv", text_csv([["0", "问____", "甲", "乙", "丙", "丁", "C"]]))
    write("jecqa/dev.json", [JEC])
    write("ekar/test.json", [REPACKAGED_EKAR])
    write("cosqa-dev.json", [{"idx": "x", "doc": "q", "code": "c", "label": label} for label in (1, 0)])
    write("c3-d-dev.json", [C3])
    write("ocnli/dev.json", json_lines([PAIR]))
    write("problems.json", {"7": PROBLEM})
    answers = {task: [question.answer for question in load(task, str(tmp_path)).questions]
               for task in ("logic", "jecqa", "ekar", "cosqa", "c3", "ocnli", "scienceqa")}
    assert answers == {"logic": [(2,)], "jecqa": [(1,)], "ekar": [(1,)], "cosqa": [(0,), (1,)], "c3": [(1,)],
                       "ocnli": [(1,)], "scienceqa": [(1,)]}


def test_exact_sets(write: Write, tmp_path: pathlib.Path) -> None:
    write("jecqa/dev.json", [JEC, JEC | {"id": "8", "answer": ["D", "B"]}])
    one, two = load("jecqa_exact_set", str(tmp_path), {"prompt": "{letter}:{choice}", "continuation": "x"}).questions
    prompts = [candidate.prompt for candidate in two.candidates]
    assert len(prompts) == 15
    assert [prompts[place] for place in (0, 4, 14)] == ["A:甲", "AB:甲；乙", "ABCD:甲；乙；丙；丁"]
    assert prompts[two.answer[0]] == "BD:乙；丁" and one.answer == (1,)
    assert dict(load("jecqa", str(tmp_path)).skipped) == {"with several right answers": 1}


def test_open_questions(write: Write, tmp_path: pathlib.Path) -> None:
    write("sanitized-mbpp.json", [PROGRAM])
    write("dureader/dev.json", {"data": [{"paragraphs": [PARAGRAPH]}]})
    assert load("mbpp", str(tmp_path)).questions == (Prompt("7", "Write f.", ("def f():\n    pass",), {
        "task_id": 7, "split": "prompt", "test_setup_code": "", "test_list": ("assert f() is None",),
        "test_imports": (), "challenge_test_list": ()}),)
    assert load("dureader", str(tmp_path)).questions == (Prompt("7", "阅读文章:文章\n问：问题\n答：", ("文",), {}),)


def test_scienceqa_selections(write: Write, tmp_path: pathlib.Path) -> None:
    problems = {"1": PROBLEM, "2": PROBLEM | {"lecture": ""}, "3": PROBLEM | {"solution": " "},
                "4": PROBLEM | {"image": "image.png"}, "5": PROBLEM | {"split": "train"},
                "6": PROBLEM | {"split": None}}
    write("problems.json", problems)

    def ids(task: str) -> list[str]:
        loaded = load(task, str(tmp_path))
        assert loaded.read == len(problems) == len(loaded.questions) + sum(loaded.skipped.values())
        return [question.id for question in loaded.questions]

    assert ids("scienceqa") == ids("scienceqa_cot") == ["1", "4"]
    assert ids("scienceqa_text_only") == ["1", "2", "3"]
    assert ids("scienceqa_all") == ["1", "2", "3", "4"]
    assert dict(load("scienceqa", str(tmp_path)).skipped) == {
        "without a lecture": 1, "without a solution": 1, "of another split": 1, "of no split": 1}
    # The official list of splits comes before what the problems say.
    write("pid_splits.json", {"train": ["1"], "val": [], "test": ["2", "5", "6"]})
    assert ids("scienceqa_all") == ["2", "3", "4", "5", "6"]
    assert [pathlib.Path(file).name for file in load("scienceqa", str(tmp_path)).files] == [
        "problems.json", "pid_splits.json"]


@pytest.mark.parametrize("task,file,content,hint", [
    ("scienceqa", "textonly_with_split.jsonl", json_lines([SCIENCE_LINE]), "evaluate scienceqa_text_only.$"),
    ("scienceqa_cot", "textonly_with_split.jsonl", json_lines([SCIENCE_LINE]), "holds no lectures and solutions"),
    ("scienceqa_all", "textonly_with_split.jsonl", json_lines([SCIENCE_LINE]), "no questions with an image"),
    ("ekar_cot", "ekar/test.json", [REPACKAGED_EKAR], "no explanations; replace it by E-KAR's own file, or evaluate "
                                                      "ekar.$"),
])
def test_what_a_repackaged_form_lacks(
    task: str, file: str, content: Any, hint: str, write: Write, tmp_path: pathlib.Path
) -> None:
    write(file, content)
    with pytest.raises(ValueError, match=f"^{task}: .*{hint}") as error:
        load(task, str(tmp_path))
    assert "\n" not in str(error.value)


# ---- Broken and mislabelled --------------------------------------------------------------------


NO_ANSWER, NO_CHOICE = "without an answer", "whose right answer is not a choice"
NO_TEXT = "with a value that is not text"
BROKEN: dict[str, tuple[str, Any, dict[str, int]]] = {
    "logic": (
        "logic_val.csv",
        text_csv([[str(number), *row] for number, row in enumerate([
            ["问", *"甲乙丙丁", "A"], ["", *"甲乙丙丁", "A"], ["问", *"甲乙丙丁", ""], ["问", *"甲乙丙丁", "E"],
            ["问", *"甲乙"], ["问", *"甲乙丙丁", "A", "太多"]])]) + '6,"no end\n',
        {"empty": 1, NO_ANSWER: 2, NO_CHOICE: 1, "with too many columns": 1, "broken CSV": 1}),
    "jecqa": (
        "jecqa/dev.json",
        json_lines([JEC, JEC | {"answer": []}, JEC | {"answer": ["E"]}, JEC | {"statement": " "}, JEC | {"answer": 4},
                    JEC | {"option_list": {"A": "甲"}, "answer": "A"}, JEC | {"option_list": None}, ["no object"],
                    ]) + "{broken\n",
        {NO_ANSWER: 1, NO_CHOICE: 3, "empty": 1, "with fewer than two choices": 1, "not a JSON object": 1,
         "broken JSON": 1}),
    "scienceqa_text_only": (
        "problems.json",
        {"1": PROBLEM, "2": PROBLEM | {"answer": 2}, "3": PROBLEM | {"answer": None}, "4": "no problem",
         "5": PROBLEM | {"choices": ["one"]}, "6": PROBLEM | {"choices": ["one", 2]}, "7": PROBLEM | {"answer": True}},
        {NO_CHOICE: 2, NO_ANSWER: 1, "not a JSON object": 1, "with fewer than two choices": 1, NO_TEXT: 1}),
    "ekar": (
        "ekar/test.json",
        [REPACKAGED_EKAR, REPACKAGED_EKAR | {"label": "C. 七:八"}, REPACKAGED_EKAR | {"label": ""},
         REPACKAGED_EKAR | {"text_b": None}],
        {NO_CHOICE: 1, NO_ANSWER: 1, "empty": 1}),
    "ekar_cot": (
        "ekar/test.json",
        json_lines([EKAR, EKAR | {"explanation": ["甲。"]}, EKAR | {"answerKey": None}, EKAR | {"choices": {}}]),
        {"without an explanation of the question and of each choice": 1, NO_ANSWER: 1,
         "without choices and their letters": 1}),
    "cosqa": (
        "cosqa-dev.json", [{"doc": "q", "code": "c", "label": label} for label in (0, 2, True, "1", None)],
        {"without label 0 or 1": 4}),
    "ocnli": (
        "ocnli/dev.json",
        json_lines([PAIR, PAIR | {"label": "-"}, PAIR | {"label": "maybe"}, PAIR | {"sentence2": ""},
                    {"sentence1": "甲", "sentence2": "乙"}, PAIR | {"sentence1": "\ud800"}]),
        {"labelled '-'": 1, "with an unknown label": 1, "empty": 1, NO_ANSWER: 1, "not valid UTF-8": 1}),
    "c3": (
        "c3-d-dev.json",
        [C3, [["男：甲"], [C3[1][0] | {"answer": "戊"}, C3[1][0]], "8"], {}, [[], []]],
        {NO_CHOICE: 1, "that are not a dialogue with questions": 2}),
    "dureader": (
        "dureader/dev.json",
        {"data": [{"paragraphs": [PARAGRAPH, PARAGRAPH | {"context": ""},
                                  {"context": "x", "qas": [{"question": "?", "answers": []}]}]}]},
        {"empty": 1, NO_ANSWER: 1}),
    "mbpp": (
        "sanitized-mbpp.json",
        [PROGRAM, PROGRAM | {"test_list": []}, PROGRAM | {"code": ""}, PROGRAM | {"task_id": None},
         PROGRAM | {"test_list": [1]},
         # What no program can be judged by, which must not be found out when all programs are written.
         PROGRAM | {"test_list": ["assert f(1 == 2"]}, PROGRAM | {"test_setup_code": "return 1"},
         PROGRAM | {"test_list": ["for i in (1, 2):\n    assert f(i)"]}, PROGRAM | {"test_list": ["f()"]},
         PROGRAM | {"test_list": [f"assert {'(' * 500}{')' * 500}"]}, PROGRAM | {"test_list": ["assert f('\ud800')"]},
         PROGRAM | {"test_list": ["from math import *", "assert f()"]}, PROGRAM | {"code": "print 'Python 2'"}],
        {"without tests": 1, NO_ANSWER: 1, "without task_id": 1, NO_TEXT: 1, "with tests that are not Python": 4,
         "with tests that have an assert within another statement": 1,
         "with tests that hold no assert, and thus pass anything": 1,
         "with tests that import unnamed names": 1, "whose solution is not Python": 1}),
    "humaneval": (
        "HumanEval.jsonl.gz",
        gzip.compress(json_lines([
            FUNCTION, FUNCTION | {"canonical_solution": ""}, FUNCTION | {"prompt": " "}, FUNCTION | {"test": None},
            FUNCTION | {"entry_point": "f(); g"}, FUNCTION | {"test": "def check(candidate):\n    candidate()"},
            FUNCTION | {"test": "assert f()"}, FUNCTION | {"prompt": "def f("}, {"task_id": 1}]).encode(), mtime=0),
        {NO_ANSWER: 2, "empty": 2, "whose entry_point is not the name of a function": 1, "whose solution is not "
                                                                                         "Python": 1,
         "with tests that define no function check(candidate)": 1,
         "with tests that assert nothing about the program, and thus pass anything": 1}),
}


@pytest.mark.parametrize("task", BROKEN)
def test_what_is_no_question_is_counted(task: str, write: Write, tmp_path: pathlib.Path) -> None:
    file, content, skipped = BROKEN[task]
    write(file, content)
    loaded = load(task, str(tmp_path))
    assert dict(loaded.skipped) == skipped
    assert len(loaded.questions) == (2 if task == "c3" else 1)
    assert loaded.read == len(loaded.questions) + sum(skipped.values())


def test_broken_c3_goes_on_after_the_break(write: Write, tmp_path: pathlib.Path) -> None:
    text = json.dumps([C3, [["男：丙"], "broken", "8"], C3[:2] + ["9"], C3[:2] + ["10"]], ensure_ascii=False)
    write("c3-d-dev.json", text.replace('"broken"', "broken")[:-15])
    loaded = load("c3", str(tmp_path))
    assert [question.id for question in loaded.questions] == ["7/0", "9/0"]
    assert dict(loaded.skipped) == {"broken JSON": 2}


@pytest.mark.parametrize("content", ["", "[]", "{broken", b"\xff\xfe", gzip.compress(b"[" * 99, mtime=0)[:-9]])
@pytest.mark.parametrize("task,file", [
    ("logic", "logic_val.csv"), ("jecqa", "jecqa/dev.json"), ("scienceqa", "problems.json"), ("ekar", "ekar/test.json"),
    ("cosqa", "cosqa-dev.json"), ("mbpp", "sanitized-mbpp.json"), ("c3", "c3-d-dev.json"), ("cmnli", "cmnli/dev.json"),
    ("dureader", "dureader/dev.json"), ("mbpp_three_shot", "mbpp.jsonl")])
def test_a_file_without_questions(task: str, file: str, content: str, write: Write, tmp_path: pathlib.Path) -> None:
    write(file + (".gz" if isinstance(content, bytes) and len(content) > 2 else ""), content)
    told = f"no questions are left of .*{file}"
    if content == "{broken" and task not in ("logic", "c3"):
        told = f".*{file} holds no JSON object in UTF-8, .* begins with '{{broken'"
    with pytest.raises(ValueError, match=f"^{task}: {told}") as error:
        load(task, str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_same_id_twice(write: Write, tmp_path: pathlib.Path) -> None:
    write("cosqa-dev.json", [{"idx": "x", "doc": "q", "code": "c", "label": 0}] * 3)
    assert [question.id for question in load("cosqa", str(tmp_path)).questions] == ["x", "x (2)", "x (3)"]


# ---- Finding -----------------------------------------------------------------------------------


def test_halves_are_joined_and_the_official_file_is_the_whole(
    write: Write, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = write("data/cmnli/dev.json", [REPACKAGED_PAIR])
    assert [question.id for question in load("cmnli", str(tmp_path)).questions] == ["7"]
    assert "cmnli*/test.json is missing; only" in caplog.text
    second = write("data/cmnli/test.json", [REPACKAGED_PAIR | {"label": "矛盾"}])
    loaded = load("cmnli", str(tmp_path))
    assert [(question.id, question.answer) for question in loaded.questions] == [("dev-7", (1,)), ("test-7", (2,))]
    assert loaded.files == (first, second)
    content = b"".join(pathlib.Path(file).read_bytes() for file in loaded.files)
    assert loaded.sha256 == hashlib.sha256(content).hexdigest() and not loaded.is_sample
    # Another folder's official file, whose test.json has no labels.
    official = write("official/cmnli/dev.json", json_lines([PAIR]))
    write("official/cmnli/test.json", json_lines([{"sentence1": "甲", "sentence2": "乙"}]))
    assert load("cmnli", str(tmp_path / "official")).files == (official,)


def test_the_folder_that_tells_benchmarks_apart(write: Write, tmp_path: pathlib.Path) -> None:
    """Many have a dev.json; neither a folder far above nor part of another word tells whose it is."""
    write("my_ocnli_project/jec/dev.json", [JEC])
    for task in ("ocnli", "jecqa"):
        with pytest.raises(FileNotFoundError):
            load(task, str(tmp_path))
    assert load("ocnli", write("ocnli/data/dev.json", json_lines([PAIR])).removesuffix("/data/dev.json")).questions
    write("ocnli/cmnli/dev.json", json_lines([PAIR]))
    assert load("ocnli", str(tmp_path)).files == (str(tmp_path / "ocnli/data/dev.json"),)


def test_parts_in_their_order(write: Write, tmp_path: pathlib.Path) -> None:
    write("a/jec-qa-ca.jsonl", json_lines([AGIEVAL]))
    write("b/jec-qa-kd.jsonl", json_lines([AGIEVAL]))
    assert [question.id for question in load("jecqa", str(tmp_path)).questions] == ["jec-qa-kd-0", "jec-qa-ca-0"]


def test_compressed_files_have_the_hash_of_their_content(write: Write, tmp_path: pathlib.Path) -> None:
    content = json.dumps([C3]).encode()
    write("c3-d-dev.json.gz", gzip.compress(content))
    assert load("c3", str(tmp_path)).sha256 == hashlib.sha256(content).hexdigest()


def test_an_official_and_a_repackaged_file_of_one_name(write: Write, tmp_path: pathlib.Path) -> None:
    write("a/ekar/test.json", [REPACKAGED_EKAR])
    official = write("b/ekar/test.json", json_lines([EKAR]))
    assert load("ekar", str(tmp_path)).files == (official,)
    write("c/ekar/test.json", json_lines([EKAR]))
    with pytest.raises(ValueError, match="^ekar: DATA_DIR holds .* more than once, .*; remove one.$"):
        load("ekar", str(tmp_path))


def test_missing_files(tmp_path: pathlib.Path) -> None:
    for task in BENCHMARKS:
        with pytest.raises(FileNotFoundError, match=f"^{task}: DATA_DIR .* holds no file .*json|csv") as error:
            load(task, str(tmp_path))
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="^logic: there is no folder .*nowhere'; set DATA_DIR .* logic_val.csv"):
        load("logic", str(tmp_path / "nowhere"))


def test_unknown_names(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="There is no benchmark 'sciencqa', only logic, .* Did you mean 'scienceqa'"):
        load("sciencqa", None)
    with pytest.raises(ValueError, match="^logic: data_dir must be a folder"):
        load("logic", " ")


# ---- Worked examples ---------------------------------------------------------------------------


def _few_shot_folder(write: Write, tmp_path: pathlib.Path) -> str:
    pairs = [{"idx": f"t{number}", "doc": f"q{number}", "code": f"c{number}", "label": number % 2}
             for number in range(9)]
    write("cosqa-train.json", pairs)
    write("cosqa-dev.json", pairs[:3] + [{"idx": "other", "doc": "q", "code": "c", "label": 1}])
    return str(tmp_path)


def test_worked_examples(write: Write, tmp_path: pathlib.Path) -> None:
    folder = _few_shot_folder(write, tmp_path)
    zero, two = load("cosqa", folder), load("cosqa", folder, few_shot=2)
    assert load("cosqa", folder, few_shot=2) == two != load("cosqa", folder, few_shot=2, seed=1)
    assert two.worked_examples == 9 and len(two.files) == 2 and two.sha256 != zero.sha256
    shown = {f"q{number}? Answered code is {'correct' if number % 2 else 'wrong'}:c{number}\n" for number in range(9)}
    for plain, question in zip(zero.questions, two.questions, strict=True):
        assert isinstance(plain, Question) and isinstance(question, Question)
        contexts = {candidate.prompt.removesuffix(own.prompt)
                    for own, candidate in zip(plain.candidates, question.candidates, strict=True)}
        [context] = contexts
        examples = context.splitlines(keepends=True)
        assert len(set(examples)) == 2 and set(examples) <= shown
        # Whatever its id is there.
        assert not any(example.startswith(plain.candidates[0].prompt.split("?")[0] + "?") for example in examples)
    # Each question's own draw, whatever other questions there are.
    write("cosqa-dev.json", [{"idx": "other", "doc": "q", "code": "c", "label": 1}])
    assert load("cosqa", folder, few_shot=2).questions[0] == two.questions[3]


def test_all_worked_examples_but_the_question(write: Write, tmp_path: pathlib.Path) -> None:
    folder = _few_shot_folder(write, tmp_path)
    prompt = load("cosqa", folder, few_shot=8).questions[0].candidates[0].prompt
    assert all(prompt.count(f"q{number}?") == 1 for number in range(9))
    with pytest.raises(ValueError, match="^cosqa: few_shot asks for 9 worked examples for question t0, .* there are "
                                         "only 8"):
        load("cosqa", folder, few_shot=9)


def test_no_worked_examples(write: Write, tmp_path: pathlib.Path) -> None:
    write("c3-d-dev.json", [C3])
    with pytest.raises(FileNotFoundError, match="c3-d-train.json.* for worked examples; set few_shot to 0.$"):
        load("c3", str(tmp_path), few_shot=1)
    write("mbpp.jsonl", json_lines([PROGRAM | {"task_id": number} for number in (2, 3, 11)]))
    with pytest.raises(ValueError, match="^mbpp_three_shot: .*mbpp.jsonl holds 2 of the 3 problems"):
        load("mbpp_three_shot", str(tmp_path))
    with pytest.raises(ValueError, match="^mbpp_three_shot: its prompt shows 3 solved problems of its own"):
        load("mbpp_three_shot", str(tmp_path), few_shot=1)
    for few_shot in (-1, True, 1.0):
        with pytest.raises(ValueError, match="^c3: few_shot must be a whole number"):
            load("c3", str(tmp_path), few_shot=few_shot)
    write("jec-qa/0_train.json", json_lines([JEC]))
    with pytest.raises(ValueError, match="^jecqa: .*holds the questions, and there is no other file"):
        load("jecqa", str(tmp_path), few_shot=1)


def test_worked_programs_are_no_questions(write: Write, tmp_path: pathlib.Path) -> None:
    write("sanitized-mbpp.json", [PROGRAM])
    write("mbpp.jsonl", json_lines([
        {**PROGRAM, "task_id": number, "code": f"program {number}"} for number in (7, 601, 602, 609)]))
    loaded = load("mbpp", str(tmp_path), few_shot=2)
    assert loaded.worked_examples == 2
    assert dict(loaded.worked_examples_skipped) == {"of another split": 1, "that are questions of the sanitized set": 1}
    [question] = loaded.questions
    assert isinstance(question, Prompt) and question.prompt.endswith("\n\nWrite f.")
    assert sorted(question.prompt.split("\n")[1::3]) == ["program 601", "program 609"]


def test_humaneval_has_no_worked_examples() -> None:
    with pytest.raises(ValueError, match="^humaneval has no worked examples; set few_shot to 0.$"):
        load("humaneval", None, few_shot=1)
