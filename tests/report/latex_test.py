"""Tables in LaTeX: what LaTeX reads of them, cell by cell, by a small reader of its own."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellm_jax.report.latex import LONGEST, escaped, tables
from codellm_jax.report.pages import Heading, Table, Text

READ = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", "{''}": '"',
        r"\ldots{}": "…", r"$\pm$": "±", "$<$": "<", "$>$": ">", "$|$": "|", "$-$": "-", r"\&": "&", r"\%": "%",
        r"\$": "$", r"\#": "#", r"\_": "_", r"\{": "{", r"\}": "}"}


def read(text: str) -> str:
    """The characters that LaTeX sets for escaped text."""
    found, at = "", 0
    while at < len(text):
        written = next((written for written in READ if text.startswith(written, at)), None)
        assert written or text[at] not in "\\{}&%$#_~^", text[at:]
        found += READ[written] if written else text[at]
        at += len(written or "x")
    return found


@settings(deadline=None)
@given(st.text(alphabet='ab1-.%&_$#{}\\~^<>|"±…[]*', max_size=12))
def test_every_character_is_set_as_it_is(text):
    assert read(escaped(text)) == text


def test_numbers_have_a_minus_sign_and_code_its_font():
    assert escaped("-0.5 [-1.2, +3] CC-NC 2-3 1e-5") == "$-$0.5 [$-$1.2, +3] CC-NC 2-3 1e-5"
    assert escaped("set by `CODE_RATE`") == r"set by \texttt{CODE\_RATE}"


def rows_of(text: str) -> list[list[str]]:
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in re.split(r" \\\\\n", body.strip())]


def test_a_table_is_whole():
    table = Table("A & B, by share.", ("Arm", "Loss\nnats"), [["NL_1", "-6.18\n[low, high]"], ["[x]", "5.9"]])
    text = tables("a study", [Heading(2, "The losses"), Text("said"), table, table])
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert r"\caption{A \& B, by share.}\label{tab:the-losses}" in text and r"\label{tab:the-losses-2}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert r"\begin{tabular}{lr}" in text
    first = text.split(r"\end{table}")[0].replace(r"\midrule" + "\n", "")
    assert rows_of(first) == [
        [r"\textbf{Arm}", r"\begin{tabular}[t]{@{}r@{}}Loss \\ nats\end{tabular}"],
        [r"NL\_1", r"\begin{tabular}[t]{@{}r@{}}$-$6.18 \\ {}[low, high]\end{tabular}"], ["{}[x]", "5.9 \\\\"]]


@pytest.mark.parametrize("rows, kind", [(LONGEST, "table"), (LONGEST + 1, "longtable")])
def test_a_long_table_runs_over_pages(rows, kind):
    text = tables("", [Table("Long.", ("a", "b"), [["x", "1"]] * rows)])
    assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") == 1 and "tab:table" in text
