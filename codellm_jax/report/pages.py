"""A report as blocks, rendered as Markdown and as one self-contained HTML page."""

import base64
import csv
import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --paper: #fff; --quiet: #595959; --rule: #ddd; --line: #333;
  --link: #0058a3; --notice: #fdf3ec; --edge: #D55E00; --done: #0072B2; --work: #E69F00; --bad: #D55E00;
  --c0: #0072B2; --c1: #D55E00; --c2: #009E73; --c3: #CC79A7; --c4: #56B4E9; --c5: #E69F00; --c6: #000; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --paper: #16181b; --quiet: #a8a8a8; --rule: #3a3d42;
  --line: #bbb; --link: #7ab8ff; --notice: #33231a; --done: #56B4E9; --c0: #56B4E9; --c4: #9ecbff; --c6: #fff; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--text);
  background: var(--paper); margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 76rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .5rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: break-word; }
code { font: .87em ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.notice { border-left: 5px solid var(--edge); background: var(--notice); padding: .75rem 1rem; max-width: none; }
.wide { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.4; font-variant-numeric: tabular-nums;
  border-top: 2px solid var(--line); border-bottom: 2px solid var(--line); }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { border-bottom: 1px solid var(--line); vertical-align: bottom; font-weight: 600; }
tbody tr + tr { border-top: 1px solid var(--rule); }
th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; min-width: 4.5rem; max-width: 26rem; } td:first-child { min-width: 8.5rem; }
td code { white-space: nowrap; overflow-wrap: normal; }
td .second { color: var(--quiet); } th .second { font-weight: 400; }
figure { margin: 1rem 0 1.75rem; }
figure img { max-width: 100%; height: auto; background: #fff; }
figcaption, .caption { color: var(--quiet); font-size: .9rem; max-width: 46rem; }
.caption { margin-bottom: -.5rem; break-after: avoid; }
nav { font-size: .9rem; } nav a { display: inline-block; margin-right: 1rem; }
a { color: var(--link); }
@media (max-width: 40rem) { body { padding: .75rem .75rem 3rem; } h1 { font-size: 1.35rem; } table { font-size: .8rem; }
  th, td { padding: .25rem .4rem; } td:first-child { min-width: 6rem; } td.text { min-width: 5rem; }
  figure { overflow-x: auto; } figure img { max-width: none; width: 36rem; } }
@media (prefers-color-scheme: dark) { figure img { padding: .5rem; border-radius: 4px; } }
@page { size: A4 landscape; margin: 12mm; }
@media print { :root { color-scheme: light; --text: #000; --paper: #fff; --quiet: #444; --rule: #ccc; --line: #000; }
  body { max-width: none; font-size: 10pt; padding: 0; } .wide { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .35rem; } figure, tr { break-inside: avoid; }
  figure img { max-height: 165mm; width: auto; }
  h2, h3 { break-after: avoid; } nav { display: none; } }
"""


class Heading(NamedTuple):
    level: int  # 2 or 3
    text: str


class Text(NamedTuple):
    """A paragraph; `code` in backticks."""

    text: str


class Notice(NamedTuple):
    """A paragraph that readers must not miss."""

    text: str


class Items(NamedTuple):
    texts: Sequence[str]


class Table(NamedTuple):
    """Cells are text; lines of a cell after its first are set apart. Columns of words are aligned to the left."""

    caption: str  # one or more sentences that say what the table shows and how to read it
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()  # indices of columns of words; the first column always is one


class Figure(NamedTuple):
    """A plot, as NAME.svg, NAME.pdf and NAME.png."""

    name: str
    caption: str
    png: bytes
    svg: bytes
    pdf: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """Its content by file name."""
        return {f"{self.name}.png": self.png, f"{self.name}.svg": self.svg, f"{self.name}.pdf": self.pdf}


Block = Heading | Text | Notice | Items | Table | Figure


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown, with its plots in files beside it. A leading notice stands above the title."""
    parts = [_markdown(block) for block in blocks]
    at = 1 if blocks and isinstance(blocks[0], Notice) else 0
    return "\n\n".join([*parts[:at], f"# {_plain(title)}", *parts[at:]]) + "\n"


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML with embedded styles and plots; it loads nothing."""
    parts = [_html(block) for block in blocks]
    at = 1 if blocks and isinstance(blocks[0], Notice) else 0
    links = "".join(f'<a href="#{_anchor(block.text)}">{_inline(block.text)}</a> '
                    for block in blocks if isinstance(block, Heading) and block.level == 2)
    body = "\n".join([*parts[:at], f"<h1>{_inline(title)}</h1>", f"<nav>{links}</nav>", *parts[at:]])
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n")


def fragment(blocks: Sequence[Block]) -> str:
    """Blocks as HTML for use inside another page."""
    return "\n".join(_html(block) for block in blocks)


def comma_separated(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as CSV, with numbers in full and None as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *(["" if value is None else value for value in row] for row in rows)])
    return text.getvalue()


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Text):
        return _plain(block.text)
    if isinstance(block, Notice):
        return f"**{_plain(block.text)}**"
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(text)}" for text in block.texts)
    if isinstance(block, Figure):
        return f"![{block.name}]({block.name}.png)\n\n{_plain(block.caption)}"
    align = [" --- " if is_words(block, column) else " ---: " for column in range(len(block.columns))]
    lines = [block.columns, *block.rows]
    cells = [" | ".join(_plain(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line) for line in lines]
    caption = [_plain(block.caption), ""] if block.caption else []
    return "\n".join([*caption, f"| {cells[0]} |", f"|{'|'.join(align)}|", *(f"| {line} |" for line in cells[1:])])


def _plain(text: str) -> str:
    """Text of Markdown without any HTML: names of runs and answers of models are data. Code contains none anyway."""
    return "".join(part if part.startswith("`") else re.sub("<(?=[A-Za-z/!?])", r"\\<", part)
                   for part in re.split(r"(`[^`]+`)", text))


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{_anchor(block.text)}">{_inline(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Notice):
        return f'<p class="notice" role="note"><strong>{_inline(block.text)}</strong></p>'
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in block.texts) + "</ul>"
    if isinstance(block, Figure):
        image = base64.b64encode(block.svg).decode()
        return (f'<figure><img alt="{html.escape(block.caption)}" src="data:image/svg+xml;base64,{image}">'
                f"<figcaption>{_inline(block.caption)}</figcaption></figure>")
    classes = [' class="text"' if is_words(block, column) else "" for column in range(len(block.columns))]
    head = "".join(f'<th scope="col"{kind}>{_cell(name)}</th>'
                   for name, kind in zip(block.columns, classes, strict=True))
    rows = "".join("<tr>" + "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
                   + "</tr>\n" for row in block.rows)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'
    # Outside the table, which scrolls where it is wider than the page.
    return f'<p class="caption">{_inline(block.caption)}</p>{table}' if block.caption else table


def is_words(table: Table, column: int) -> bool:
    """Whether a column holds words, which are aligned to the left."""
    return column == 0 or column in table.words


def _cell(text: str) -> str:
    first, *others = text.split("\n")
    return "<br>".join([_inline(first), *(f'<span class="second">{_inline(other)}</span>' for other in others)])


def _inline(text: str) -> str:
    """Text as HTML; outside code, numbers are set as in print: a minus sign, and a dash between the ends of a range."""
    def plain(part: str) -> str:
        return re.sub(r"(?<![\w.)-])-(?=\d)", "\N{MINUS SIGN}", re.sub(r"(?<=\d) - (?=\d)", "\N{EN DASH}", part))

    return "".join(f"<code>{html.escape(part[1:-1], quote=False)}</code>" if re.fullmatch("`[^`]+`", part) else
                   plain(html.escape(part, quote=False)) for part in re.split(r"(`[^`]+`)", text))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
