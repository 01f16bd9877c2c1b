"""The tables of a report in LaTeX, for use in a paper: each is a float with a caption and a label."""

import re
from collections.abc import Sequence

from codellm_jax.report.pages import Block, Heading, Table, is_words

HEAD = r"""% Tables of {title}. In the preamble: \usepackage{{booktabs,graphicx,longtable}}
% Copy single tables, or \input this file. Names in scripts other than Latin need XeLaTeX or LuaLaTeX.
"""
LONGEST = 40  # rows that fit on a page; longer tables span several
SPECIAL = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
           "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "…": r"\ldots{}",
           "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "{''}", "\N{MINUS SIGN}": "$-$"}


def tables(title: str, blocks: Sequence[Block]) -> str:
    """Every table among the blocks; a label combines the heading above and the table's number below it."""
    parts, heading, number = [HEAD.format(title=title.replace("\n", " "))], "table", 0
    for block in blocks:
        if isinstance(block, Heading):
            heading, number = re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-") or "table", 0
        elif isinstance(block, Table):
            number += 1
            parts.append(_table(block, f"tab:{heading}" + f"-{number}" * (number > 1)))
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Text escaped for LaTeX; `code` in backticks becomes \\texttt, and negative numbers get a minus sign."""
    def plain(part: str) -> str:
        return "".join(SPECIAL.get(character, character) for character in re.sub(
            r"(?<![\w.)-])-(?=\d)", "\N{MINUS SIGN}", part))

    return "".join(rf"\texttt{{{plain(part[1:-1])}}}" if part.startswith("`") and part.endswith("`") and len(part) > 2
                   else plain(part) for part in re.split(r"(`[^`]+`)", text))


def _table(table: Table, label: str) -> str:
    columns = "".join("l" if is_words(table, column) else "r" for column in range(len(table.columns)))
    head = _row([rf"\textbf{{{_cell(table, number, name)}}}" if "\n" not in name else _cell(table, number, name)
                        for number, name in enumerate(table.columns)])
    rows = [_row([_cell(table, number, cell) for number, cell in enumerate(row)]) for row in table.rows]
    caption = rf"\caption{{{escaped(table.caption)}}}\label{{{label}}}"
    if len(rows) > LONGEST:
        return "\n".join([rf"\begin{{longtable}}{{{columns}}}", rf"{caption}\\", r"\toprule", head, r"\midrule",
                          r"\endhead", *rows, r"\bottomrule", r"\end{longtable}", ""])
    # No wider than the page; a table that fits keeps its size.
    return "\n".join([
        r"\begin{table}[htbp]", r"\centering\small", caption,
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%", rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(table: Table, column: int, text: str) -> str:
    """A cell with its lines stacked."""
    # After \\, LaTeX reads a bracket or a star as its argument.
    lines = [("{}" if line[:1] in ("[", "*") else "") + escaped(line) for line in text.split("\n")]
    side = "l" if is_words(table, column) else "r"
    if len(lines) == 1:
        return lines[0]
    return rf"\begin{{tabular}}[t]{{@{{}}{side}@{{}}}}" + r" \\ ".join(lines) + r"\end{tabular}"
