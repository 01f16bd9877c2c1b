"""The benchmarks' templates, to the letter; and templates of one's own."""

import json
import pathlib
from collections.abc import Callable

import pytest

from tasks.benchmarks.judging import Benchmarks
from tasks.benchmarks.loading import BENCHMARKS, GENERATED, load
from tasks.benchmarks.questions import Prompt, Question
from tasks.benchmarks.templates import MULTIPLE_CHOICE, PAPER, RELEASED, TEMPLATES

MBPP = [{"task_id": number, "text": f" Task {number}. ", "code": f"def f{number}():\r\n    pass",
         "test_list": [f"assert f{number}()", f"assert not f{number}()"]} for number in (2, 3, 4, 11)]
SHOWN = "".join(
    f"You are an expert Python programmer, and here is your task: Task {number}. Your code should pass these tests:\n\n"
    f"assert f{number}()\nassert not f{number}()\n[BEGIN]\ndef f{number}():\n    pass\n[DONE]\n\n"
    for number in (2, 3, 4))

# Of the first candidate: what stands before, and what is scored.
GOLDEN = {
    ("logic", RELEASED): ("该答案：甲，可以回答如下问题：", "谁____。"),
    ("logic", PAPER): ("The answer: 甲, can answer the following questions:", " 谁____"),
    ("logic", MULTIPLE_CHOICE): ("问题：谁____\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：", "甲"),
    ("jecqa", RELEASED): ("该答案：甲，可以回答以下问题：", "哪项？"),
    ("jecqa", PAPER): ("The answer: 甲, can answer the following questions:", " 哪项？"),
    ("jecqa", MULTIPLE_CHOICE): ("问题：哪项？\nA. 甲\nB. 乙\n答案：", "甲"),
    ("jecqa_exact_set", RELEASED): ("该答案：甲，可以回答以下问题：", "哪项？"),
    ("jecqa_exact_set", PAPER): ("The answer: 甲, can answer the following questions:", " 哪项？"),
    ("jecqa_exact_set", MULTIPLE_CHOICE): ("问题（可能有多个正确选项）：哪项？\nA. 甲\nB. 乙\n答案：", "甲"),
    ("scienceqa", RELEASED): ("Lecture:Oil floats.\n anwser：oil can answer the following question：", "What floats?"),
    ("scienceqa", PAPER): ("Oil floats.\n anwser: oil can answer the following question:", " What floats?"),
    ("scienceqa", MULTIPLE_CHOICE): (
        "Lecture: Oil floats.\nQuestion: What floats?\nA. oil\nB. lead\nAnswer:", " oil"),
    ("scienceqa_all", RELEASED): (
        "Lecture:Oil floats.\n anwser：oil can answer the following question：", "What floats?"),
    ("scienceqa_all", PAPER): ("Oil floats.\n anwser: oil can answer the following question:", " What floats?"),
    ("scienceqa_all", MULTIPLE_CHOICE): (
        "Lecture: Oil floats.\nQuestion: What floats?\nA. oil\nB. lead\nAnswer:", " oil"),
    ("scienceqa_text_only", RELEASED): ("anwser：oil can answer the following question：", "What floats?"),
    ("scienceqa_text_only", PAPER): ("anwser: oil can answer the following question:", " What floats?"),
    ("scienceqa_text_only", MULTIPLE_CHOICE): ("Question: What floats?\nA. oil\nB. lead\nAnswer:", " oil"),
    ("scienceqa_cot", RELEASED): (
        "Lecture:Oil floats.\n question：What floats?\n anwser：oil\n "
        "This answer comes from the following reasoning：", "So oil."),
    ("scienceqa_cot", PAPER): (
        "Oil floats.\n question: What floats?\n anwser: oil\n This answer comes from the following reasoning:",
        " So oil."),
    ("scienceqa_cot", MULTIPLE_CHOICE): (
        "Lecture: Oil floats.\nQuestion: What floats?\nA. oil\nB. lead\nReasoning: So oil.\nAnswer:", " oil"),
    ("ekar", RELEASED): ("根据推理关系:一:二\n可以得到类比推理关系为：", "三:四"),
    ("ekar", PAPER): ("The reasoning relationship: 一:二, the analogy reasoning relationship:", " 三:四"),
    ("ekar", MULTIPLE_CHOICE): ("问题：哪一项的词语关系与“一:二”最相似？\nA. 三:四\nB. 五:六\n答案：", "三:四"),
    ("ekar_cot", RELEASED): ("根据推理关系:一:二\n可以得到类比推理关系为：三:四\n", "因为源。,所以首。"),
    ("ekar_cot", PAPER): ("The reasoning relationship: 一:二, the analogy reasoning relationship: 三:四\n",
                          "Because 源。, so 首。"),
    ("ekar_cot", MULTIPLE_CHOICE): (
        "问题：哪一项的词语关系与“一:二”最相似？\nA. 三:四\nB. 五:六\n推理：源。\n答案：", "三:四"),
    ("cosqa", RELEASED): ("python sort? Answered code is correct:", "def f():\n    pass"),
    ("cosqa", PAPER): ("python sort? Answered code is correct:", " def f():\n    pass"),
    ("cosqa", MULTIPLE_CHOICE): (
        "Query: python sort\nCode:\ndef f():\n    pass\nQuestion: Is the code an answer to the query?\n"
        "A. correct\nB. wrong\nAnswer:", " correct"),
    ("c3", RELEASED): ("问：谁？\n答：丙\n该答案来自对话：", "男：甲女：乙"),
    ("c3", PAPER): ("Question: 谁？\n Answer:丙 comes from the dialogue:", " 男：甲女：乙"),
    ("c3", MULTIPLE_CHOICE): ("对话：男：甲女：乙\n问题：谁？\nA. 丙\nB. 丁\n答案：", "丙"),
    **{
        (task, template): golden
        for task in ("ocnli", "cmnli")
        for template, golden in {
            RELEASED: ("甲？对，", "乙"),
            PAPER: ("甲? Yes,", " 乙"),
            MULTIPLE_CHOICE: (
                "前提：甲\n假设：乙\n问题：假设与前提是什么关系？\nA. 蕴含\nB. 中立\nC. 矛盾\n答案：", "蕴含"),
        }.items()
    },
    ("mbpp", RELEASED): ("Write f.",),
    ("mbpp", PAPER): ("Write f.\n Code:\n",),
    ("mbpp_three_shot", RELEASED): (
        SHOWN + "You are an expert Python programmer, and here is your task: Task 11. Your code should pass these "
        "tests:\n\nassert f11()\nassert not f11()\n[BEGIN]\n",),
    ("humaneval", RELEASED): ('def f(x):\n    """Twice x."""\n',),
    ("dureader", RELEASED): ("阅读文章:文章\n问：问题\n答：",),
    ("dureader", PAPER): ("Read document: 文章\n Question:问题 \n Answer:",),
}


@pytest.fixture
def data_dir(write: Callable[..., str], tmp_path: pathlib.Path) -> str:
    """One item of each benchmark."""
    write("logic_val.csv", "id,question,A,B,C,D,answer\n0,谁____,甲,乙,丙,丁,A\n")
    write("jecqa/dev.json", [{"statement": "哪项？", "option_list": {"A": "甲", "B": "乙"}, "answer": ["A"]}])
    write("problems.json", {"1": {"question": "What floats?", "choices": ["oil", "lead"], "answer": 0, "split": "test",
                                  "lecture": "Oil floats.", "solution": "So oil.", "image": None}})
    write("ekar/test.json", [{"question": "一:二", "choices": {"label": ["A", "B"], "text": ["三:四", "五:六"]},
                              "answerKey": "A", "explanation": ["源。", "首。", "次。"]}])
    write("cosqa-dev.json", [{"doc": "python sort", "code": "def f():\n    pass", "label": 1}])
    write("c3-d-dev.json", [[["男：甲", "女：乙"], [{"question": "谁？", "choice": ["丙", "丁"], "answer": "丙"}], "1"],
                            ])
    for task in ("ocnli", "cmnli"):
        write(f"{task}/dev.json", [{"sentence1": "甲", "sentence2": "乙", "label": "entailment"}])
    write("sanitized-mbpp.json", [{"task_id": 12, "prompt": "Write f.", "code": "def f(): ...",
                                   "test_list": ["assert f()"]}])
    write("mbpp.jsonl", "".join(json.dumps(record) + "\n" for record in MBPP))
    write("human-eval/data/HumanEval.jsonl", json.dumps({
        "task_id": "HumanEval/0", "prompt": 'def f(x):\r\n    """Twice x."""\r\n', "entry_point": "f",
        "canonical_solution": "    return 2 * x\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n"}))
    write("dureader/dev.json", [{"text_a": "文章", "text_b": "问题", "label": "文"}])
    return str(tmp_path)


def test_every_template_is_written_out_here() -> None:
    assert set(GOLDEN) == {(task, template) for task, named in TEMPLATES.items() for template in named}
    assert set(TEMPLATES) == set(BENCHMARKS)


@pytest.mark.parametrize("task,template", GOLDEN)
def test_golden(task: str, template: str, data_dir: str) -> None:
    [question] = load(task, data_dir, template).questions
    if isinstance(question, Prompt):
        assert task in GENERATED
        assert (question.prompt,) == GOLDEN[task, template]
    else:
        assert question.candidates[0] == GOLDEN[task, template] and question.answer == (0,)


def test_the_other_candidates(data_dir: str) -> None:
    def all_of(task: str, template: str = RELEASED) -> list[str]:
        [question] = load(task, data_dir, template).questions
        assert isinstance(question, Question)
        return ["".join(candidate) for candidate in question.candidates]

    assert all_of("ocnli") == ["甲？对，乙", "甲？或，乙", "甲？错，乙"]
    assert all_of("cmnli", PAPER) == ["甲? Yes, 乙", "甲? Maybe, 乙", "甲? No, 乙"]
    assert [text[-2:] for text in all_of("ocnli", MULTIPLE_CHOICE)] == ["蕴含", "中立", "矛盾"]
    assert all_of("cosqa")[1] == "python sort? Answered code is wrong:def f():\n    pass"
    assert all_of("ekar_cot")[1] == "根据推理关系:一:二\n可以得到类比推理关系为：五:六\n因为源。,所以次。"
    # The same explanation for each.
    assert [text.split("：")[-2:] for text in all_of("scienceqa_cot")] == [
        ["oil\n This answer comes from the following reasoning", "So oil."],
        ["lead\n This answer comes from the following reasoning", "So oil."]]


def test_the_same_text_is_scored_under_each_choice_but_in_ekar(data_dir: str) -> None:
    for task in set(BENCHMARKS) - GENERATED:
        [question] = load(task, data_dir).questions
        assert isinstance(question, Question)
        scored = {candidate.continuation for candidate in question.candidates}
        prompts = {candidate.prompt for candidate in question.candidates}
        assert (len(scored) == 1) == (task not in ("ekar", "ekar_cot")), task
        assert (len(prompts) == 1) == (task == "ekar"), task
        # In multiple choice the choice is scored after one prompt, which is computed once.
        if task != "jecqa_exact_set":
            [question] = load(task, data_dir, MULTIPLE_CHOICE).questions
            assert isinstance(question, Question) and len({candidate.prompt for candidate in question.candidates}) == 1


def test_a_template_of_ones_own(data_dir: str) -> None:
    own = {"prompt": "{{{letter}}} {lecture}|{hint}|", "continuation": "{choice}"}
    [question] = load("scienceqa", data_dir, own).questions
    assert isinstance(question, Question)
    assert question.candidates == (("{A} Oil floats.||", "oil"), ("{B} Oil floats.||", "lead"))
    [question] = load("ekar_cot", data_dir, {"prompt": "{question}", "continuation": "{explanation}"}).questions
    assert isinstance(question, Question) and [text for _, text in question.candidates] == ["首。", "次。"]


@pytest.mark.parametrize("template,message", [
    ("papers", "^logic: there is no template 'papers', only released, paper, multiple_choice; .* Did you mean 'paper'"),
    ({"prompt": "{problem}", "continuation": "x"}, "no field 'problem' for a template's prompt, only choice, l"),
    ({"prompt": "x", "continuation": "{questio}"}, "'questio' for a template's continuation.* Did you mean 'question'"),
    ({"prompt": "x"}, "lacks its continuation"),
    ({"prompt": "x", "continuation": ""}, "^logic: the template leaves nothing to score for question 0.$"),
    ({"prompt": "{", "continuation": "x"}, "prompt is malformed"),
    ({"prompt": "{question.__class__}", "continuation": "x"}, "may hold plain field names in braces"),
    ({"prompt": "{question:>9}", "continuation": "x"}, "may hold plain field names in braces"),
    ({"prompt": "{}", "continuation": "x"}, "may hold plain field names in braces"),
    ({"prompt": 3, "continuation": "x"}, "prompt must be a text, found 3"),
    ({"promt": "x", "continuation": "x"}, "found 'promt'. Did you mean 'prompt'"),
    (7, "is a name or a mapping, found 7"),
])
def test_a_malformed_template(template: object, message: str, data_dir: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load("logic", data_dir, template)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and str(error.value).startswith("logic: ")


def test_a_template_for_each_task(data_dir: str) -> None:
    named = {"mbpp": PAPER, "default": MULTIPLE_CHOICE, "dureader": RELEASED}
    benchmarks = Benchmarks(data_dir, named, unconfined=True)
    assert [benchmarks.settings(task)["template"] for task in ("mbpp", "ekar", "dureader")] == [
        PAPER, MULTIPLE_CHOICE, RELEASED]
    for task in ("mbpp", "ekar", "dureader"):
        assert benchmarks.load(task).questions == load(task, data_dir, benchmarks.settings(task)["template"]).questions
    own = {"prompt": "{question}", "continuation": "{choice}"}
    assert Benchmarks(data_dir, {"ekar": own}).load("ekar").questions == load("ekar", data_dir, own).questions
    assert Benchmarks(data_dir, {"mbpp": PAPER}).settings("ekar")["template"] == RELEASED
    with pytest.raises(ValueError, match="^TEMPLATE names 'eka', which is neither a benchmark.* Did you mean 'ekar'"):
        Benchmarks(data_dir, {"eka": PAPER}).load("ekar")


def test_a_template_that_a_task_has_not(data_dir: str) -> None:
    with pytest.raises(ValueError, match="^mbpp: there is no template 'multiple_choice', only released, paper;"):
        load("mbpp", data_dir, MULTIPLE_CHOICE)


def test_worked_examples_in_the_same_template(data_dir: str, write: Callable[..., str]) -> None:
    write("dureader/train.json", [{"text_a": "书", "text_b": "谁", "label": "他"}])
    [prompt] = load("dureader", data_dir, few_shot=1).questions
    assert isinstance(prompt, Prompt) and prompt.prompt == "阅读文章:书\n问：谁\n答：他\n阅读文章:文章\n问：问题\n答："
    # A model that goes on with another example has ended its answer.
    assert prompt.extra["stop"] == ("\n",) and "stop" not in load("dureader", data_dir).questions[0].extra
    write("mbpp.jsonl", "".join(json.dumps({**MBPP[0], "task_id": number}) + "\n" for number in (601, 602)))
    [prompt] = load("mbpp", data_dir, few_shot=1).questions
    assert isinstance(prompt, Prompt) and prompt.extra["stop"] == ("\n\nWrite ",)
    assert "stop" not in load("mbpp", data_dir).questions[0].extra
    write("ocnli/train.json", [{"sentence1": "丙", "sentence2": "丁", "label": "contradiction"}])
    [question] = load("ocnli", data_dir, few_shot=1).questions
    assert isinstance(question, Question) and question.candidates[1] == ("丙？错，丁\n甲？或，", "乙")
    own = {"prompt": "{sentence1} {label}: ", "continuation": "{sentence2}", "separator": " / "}
    [question] = load("ocnli", data_dir, own, few_shot=1).questions
    assert isinstance(question, Question) and question.candidates[1] == ("丙 contradiction: 丁 / 甲 neutral: ", "乙")
