"""Templates define which parts of a question form the prompt, and which are scored.

DESCRIPTIONS lists the named ones. In the first two the choice is in the prompt, and the same text, usually the
question, is scored after each choice. Names in braces are the fields of the benchmark's reader.

In English the scored text begins with the space before it, since tokens include that space.
"""

import difflib
import string
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from tasks.benchmarks.mbpp import BEGIN, DONE
from tasks.benchmarks.questions import Candidate, Item

RELEASED, PAPER, MULTIPLE_CHOICE = "released", "paper", "multiple_choice"
# How the questions of a user's file are answered.
CHOICES, TEXT, NUMBER, PROGRAMS, FUNCTIONS = "choices", "text", "number", "programs", "functions"
DESCRIPTIONS: dict[str, str] = {
    RELEASED: "As in the study's released code.",
    PAPER: "As printed in the paper, which has no template for chains of thought: those use the released one, in "
           "English.",
    MULTIPLE_CHOICE: "Shows the question with all choices, and scores the choice.",
}
DEFAULT = "default"  # in a mapping from tasks to templates, stands for all tasks that are not named


class Template(NamedTuple):
    """Texts with field names in braces.

    Attributes:
      prompt: the text before the scored or written text.
      continuation: the scored text; if the answer is written, the answer of a worked example.
      separator: the end of a worked example.
    """

    prompt: str
    continuation: str
    separator: str = "\n"


_LOGIC_CHOICES = Template("问题：{question}\n{options}\n答案：", "{choice}")
_LOGIC_PAPER = Template("The answer: {choice}, can answer the following questions:", " {question}")
_JECQA = {
    RELEASED: Template("该答案：{choice}，可以回答以下问题：", "{question}"),
    PAPER: _LOGIC_PAPER,
    MULTIPLE_CHOICE: _LOGIC_CHOICES,
}
_SCIENCEQA = {
    RELEASED: Template("Lecture:{lecture}\n anwser：{choice} can answer the following question：", "{question}"),
    PAPER: Template("{lecture}\n anwser: {choice} can answer the following question:", " {question}"),
    MULTIPLE_CHOICE: Template("Lecture: {lecture}\nQuestion: {question}\n{options}\nAnswer:", " {choice}"),
}
_SENTENCES = {
    RELEASED: Template("{sentence1}？{word}，", "{sentence2}"),
    PAPER: Template("{sentence1}? {english_word},", " {sentence2}"),
    MULTIPLE_CHOICE: Template(
        "前提：{sentence1}\n假设：{sentence2}\n问题：假设与前提是什么关系？\n{options}\n答案：", "{choice}"),
}

TEMPLATES: dict[str, dict[str, Template]] = {
    "logic": {
        RELEASED: Template("该答案：{choice}，可以回答如下问题：", "{question}。"),
        PAPER: _LOGIC_PAPER,
        MULTIPLE_CHOICE: _LOGIC_CHOICES,
    },
    "jecqa": _JECQA,
    "jecqa_exact_set": _JECQA | {
        MULTIPLE_CHOICE: Template("问题（可能有多个正确选项）：{question}\n{options}\n答案：", "{choice}"),
    },
    "scienceqa": _SCIENCEQA,
    # Without the lecture, which files of text-only questions lack.
    "scienceqa_text_only": {
        RELEASED: Template("anwser：{choice} can answer the following question：", "{question}"),
        PAPER: Template("anwser: {choice} can answer the following question:", " {question}"),
        MULTIPLE_CHOICE: Template("Question: {question}\n{options}\nAnswer:", " {choice}"),
    },
    "scienceqa_all": _SCIENCEQA,
    # Every candidate gets the explanation of the right answer, as in the study.
    "scienceqa_cot": {
        RELEASED: Template("Lecture:{lecture}\n question：{question}\n anwser：{choice}\n "
                           "This answer comes from the following reasoning：", "{solution}"),
        PAPER: Template("{lecture}\n question: {question}\n anwser: {choice}\n "
                        "This answer comes from the following reasoning:", " {solution}"),
        MULTIPLE_CHOICE: Template("Lecture: {lecture}\nQuestion: {question}\n{options}\nReasoning: {solution}\nAnswer:",
                                  " {choice}"),
    },
    "ekar": {
        RELEASED: Template("根据推理关系:{question}\n可以得到类比推理关系为：", "{choice}"),
        PAPER: Template("The reasoning relationship: {question}, the analogy reasoning relationship:", " {choice}"),
        MULTIPLE_CHOICE: Template("问题：哪一项的词语关系与“{question}”最相似？\n{options}\n答案：", "{choice}"),
    },
    "ekar_cot": {
        RELEASED: Template("根据推理关系:{question}\n可以得到类比推理关系为：{choice}\n",
                           "因为{query_explanation},所以{explanation}"),
        PAPER: Template("The reasoning relationship: {question}, the analogy reasoning relationship: {choice}\n",
                        "Because {query_explanation}, so {explanation}"),
        # Only the explanation of the question: a choice's explanation reveals whether it is right.
        MULTIPLE_CHOICE: Template(
            "问题：哪一项的词语关系与“{question}”最相似？\n{options}\n推理：{query_explanation}\n答案：", "{choice}"),
    },
    "cosqa": {
        RELEASED: Template("{doc}? Answered code is {choice}:", "{code}"),
        PAPER: Template("{doc}? Answered code is {choice}:", " {code}"),
        MULTIPLE_CHOICE: Template("Query: {doc}\nCode:\n{code}\nQuestion: Is the code an answer to the query?\n"
                                  "{options}\nAnswer:", " {choice}"),
    },
    "c3": {
        RELEASED: Template("问：{question}\n答：{choice}\n该答案来自对话：", "{context}"),
        PAPER: Template("Question: {question}\n Answer:{choice} comes from the dialogue:", " {context}"),
        MULTIPLE_CHOICE: Template("对话：{context}\n问题：{question}\n{options}\n答案：", "{choice}"),
    },
    "ocnli": _SENTENCES,
    "cmnli": _SENTENCES,
    "mbpp": {
        RELEASED: Template("{text}", "\n{code}", "\n\n"),
        PAPER: Template("{text}\n Code:\n", "{code}", "\n\n"),
    },
    # The prompt of Austin et al., 2021, for which pass@1 is published; the study has none.
    "mbpp_three_shot": {
        RELEASED: Template("You are an expert Python programmer, and here is your task: {text} Your code should pass "
                           f"these tests:\n\n{{tests}}\n{BEGIN}\n", f"{{code}}\n{DONE}", "\n\n"),
    },
    # The study has none; the problem is its own prompt.
    "humaneval": {RELEASED: Template("{prompt}", "{code}", "\n\n")},
    "dureader": {
        RELEASED: Template("阅读文章:{context}\n问：{question}\n答：", "{answer}"),
        PAPER: Template("Read document: {context}\n Question:{question} \n Answer:", " {answer}"),
    },
}

_ANSWER = Template("{passage_line}Question: {question}\nAnswer:", " {answer}", "\n\n")
# For users' files, by how their questions are answered.
OF_FILES: dict[str, dict[str, Template]] = {
    CHOICES: {
        RELEASED: Template("{passage_line}Question: {question}\nAnswer:", " {choice}", "\n\n"),
        MULTIPLE_CHOICE: Template("{passage_line}Question: {question}\n{options}\nAnswer:", " {choice}", "\n\n"),
    },
    TEXT: {RELEASED: _ANSWER},
    NUMBER: {RELEASED: _ANSWER},
    # As mbpp_three_shot.
    PROGRAMS: {
        RELEASED: Template("You are an expert Python programmer, and here is your task: {question} Your code should "
                           f"pass these tests:\n\n{{tests}}\n{BEGIN}\n", f"{{code}}\n{DONE}", "\n\n"),
    },
    FUNCTIONS: TEMPLATES["humaneval"],
}


def of_task(
    task: str, template: str | Mapping[str, Any], others: Collection[str] = ()
) -> str | Mapping[str, str]:
    """The template of a task: the template for all tasks, or its entry in a mapping, where "default" covers the rest.

    Args:
      task: the task's name.
      template: the user's setting.
      others: names of tasks other than those of `TEMPLATES`.

    Raises:
      ValueError: one line; the mapping names an unknown task.
    """
    if not isinstance(template, Mapping) or not template or template.keys() & set(Template._fields):
        return template
    for name in template:
        if name not in TEMPLATES and name not in others and name != DEFAULT:
            raise ValueError(f"TEMPLATE names {name!r}, which is neither a benchmark, nor {DEFAULT!r}, nor one of a "
                             f"template's parts, {', '.join(Template._fields)}."
                             f"{nearest(str(name), [*TEMPLATES, *others])}")
    return template.get(task, template.get(DEFAULT, RELEASED))


def resolve(task: str, template: str | Mapping[str, str], named: Mapping[str, Template]) -> Template:
    """Resolves a name to its template, or checks the user's own template.

    Args:
      task: the task's name, for messages.
      named: the task's named templates.
      template: a name, or {"prompt": ..., "continuation": ...} and optionally "separator". If the answer is written,
        only worked examples use the continuation.

    Raises:
      ValueError: one line; there is no such template, or the mapping is malformed.
    """
    if isinstance(template, str):
        if template in named:
            return named[template]
        raise ValueError(f"{task}: there is no template {template!r}, only {', '.join(named)}; or give your own as "
                         f"{{'prompt': ..., 'continuation': ...}}.{nearest(template, named)}")
    if not isinstance(template, Mapping):
        raise ValueError(f"{task}: a template is a name or a mapping, found {template!r}.")
    for key, value in template.items():
        if key not in Template._fields:
            raise ValueError(f"{task}: a template has prompt, continuation and separator, found {key!r}."
                             f"{nearest(str(key), Template._fields)}")
        if not isinstance(value, str):
            raise ValueError(f"{task}: a template's {key} must be a text, found {value!r}.")
    for key in ("prompt", "continuation"):
        if key not in template:
            raise ValueError(f"{task}: the template lacks its {key}, such as '{{question}}'.")
    made = Template(**template)
    for key, text in made._asdict().items():
        if key != "separator":
            _fields(task, key, text)
    return made


def render(task: str, template: Template, fields: Mapping[str, str]) -> Candidate:
    """Fills a template with an item's fields.

    Raises:
      ValueError: one line; the template names a field that the item lacks.
    """
    for key in ("prompt", "continuation"):
        for field in _fields(task, key, getattr(template, key)):
            if field not in fields:
                raise ValueError(f"{task}: there is no field {field!r} for a template's {key}, only "
                                 f"{', '.join(sorted(fields))}.{nearest(field, fields)}")
    return Candidate(template.prompt.format_map(fields), template.continuation.format_map(fields))


def worked_example(task: str, template: Template, item: Item) -> str:
    """An item with its right answer and the separator; errors are those of `render`."""
    return "".join(render(task, template, item.candidates[item.answer[0]])) + template.separator


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint for the end of a message; empty if no name is similar."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _fields(task: str, key: str, text: str) -> list[str]:
    """The fields that a text names; only plain names are valid, so that no attributes are accessed."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{task}: a template's {key} is malformed ({error}); write {{{{ for a brace.") from None
    found = [(field, form or conversion) for _, field, form, conversion in parsed if field is not None]
    for field, form in found:
        if form or not field.isidentifier():
            raise ValueError(f"{task}: a template's {key} may hold plain field names in braces, found {{{field}}} "
                             f"in {text!r}; write {{{{ for a brace.")
    return [field for field, _ in found]
