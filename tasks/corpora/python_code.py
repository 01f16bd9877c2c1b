"""Transforms of Python code with Python's own tokenizer and syntax tree, in the grammar of the running Python.

Each function takes the text of a file and returns its text after a transform (described in `transforms`). All
raise SyntaxError if this Python cannot read the file. Line ends become "\\n", as in Python's own reader.
"""

import ast
import inspect
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from tasks.corpora import python_names
from tasks.corpora.python_names import name_spans
from tasks.corpora.renaming import Naming
from tasks.corpora.standard_library import docstrings_of, parse, split_docstrings
from tasks.corpora.words import keyword_in_words, operator_in_words

_LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
# Since Python 3.12 a formatted string is several tokens; these are the first and the last.
_FORMATTED = {name: getattr(tokenize, name) for name in ("FSTRING_START", "FSTRING_END", "TSTRING_START", "TSTRING_END")
              if hasattr(tokenize, name)}


class _Token(NamedTuple):
    type: int
    text: str
    line: int  # from 1
    column: int  # characters


def normalized(source: str) -> str:
    """A file's text with normalized line ends, as in Python's own reader."""
    return re.sub("\r\n?", "\n", source.removeprefix("\ufeff"))


def strip_comments(source: str) -> str:
    """Removes comments and docstrings; a body that holds nothing else gets `pass`.

    A string that thereby becomes a docstring is also removed. A line with only a comment is removed entirely.
    """
    code = normalized(source)
    while (without := split_docstrings(code)[0]) != code:
        code = without
    comments = {token.line: token.column for token in _tokens(code) if token.type == tokenize.COMMENT}
    kept: list[str] = []
    for number, line in enumerate(code.split("\n"), 1):
        if number not in comments:
            kept.append(line)
            continue
        before = line[: comments[number]].rstrip()
        # A statement that continues in this line ends with it.
        if before or (number - 1 not in comments and kept and kept[-1].endswith("\\")):
            kept.append(before)
    code = "\n".join(kept).lstrip("\n")
    parse(code)
    return code


def comments_only(source: str) -> str:
    """Comments, and docstrings as comments, in order, without indentation."""
    code = normalized(source)
    found = [(token.line, token.column, [token.text]) for token in _tokens(code) if token.type == tokenize.COMMENT]
    for line, column, docstring in docstrings_of(parse(code)):
        text = inspect.cleandoc(docstring).replace("\0", "")
        found.append((line, column, [f"# {each}" for each in text.splitlines()] if text.strip() else []))
    lines = [line.rstrip() for _, _, lines in sorted(found) for line in lines]
    return "".join(f"{line}\n" for line in lines)


def renamed(source: str, naming: Naming) -> str:
    """Renames the file's own names where `python_names` allows it."""
    code = normalized(source)
    tree = parse(code)
    spans = name_spans(code)
    ours = python_names.renameable(tree, code, spans)
    chosen = [span for span in spans if span.name in ours]
    taken = {span.name for span in spans} - ours
    new = naming([span.name for span in chosen], taken)
    pieces, end = [], 0
    for span, name in zip(chosen, new, strict=True):
        pieces += [code[end : span.begin], name]
        end = span.end
    result = "".join([*pieces, code[end:]])
    if not _alike(tree, parse(result), ours):
        raise SyntaxError("the tokenizer and the syntax tree disagree on the position of names")
    return result


def _alike(before: ast.AST, after: ast.AST, renamed: set[str]) -> bool:
    """Whether two trees are the same except for renamed names."""
    pending: list[tuple[object, object]] = [(before, after)]
    while pending:
        one, other = pending.pop()
        if type(one) is not type(other):
            return False
        if isinstance(one, ast.AST):
            pending += [(getattr(one, field, None), getattr(other, field, None)) for field in one._fields
                        if field != "kind"]
        elif isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return False
            pending += zip(one, other, strict=True)
        elif one != other and not (isinstance(one, str) and one in renamed):
            return False
    return True


def pseudocode(source: str) -> str:
    """Writes a line for each statement, with four blanks for each block level; `words` has the vocabulary."""
    code = normalized(source)
    parse(code)
    lines: list[str] = []
    words: list[str] = []
    depth, ends_operand = 0, False
    for token in _tokens(code):
        match token.type:
            case tokenize.INDENT:
                depth += 1
            case tokenize.DEDENT:
                depth -= 1
            case tokenize.OP if token.text in ("*", "**") and not ends_operand:
                words.append(token.text)  # arguments or the rest of a list
            case tokenize.OP:
                words.append(operator_in_words(token.text))
            case tokenize.NAME:
                words.append(keyword_in_words(token.text) if keyword.iskeyword(token.text) else token.text)
            case kind if kind not in _LAYOUT:
                words.append(token.text)
        # Within brackets, too, a comment ends a line.
        if words and token.type in (tokenize.NEWLINE, tokenize.COMMENT, tokenize.ENDMARKER):
            lines.append("    " * depth + " ".join(words))
            words = []
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            ends_operand = token.type in (tokenize.NUMBER, tokenize.STRING) or token.text in (")", "]", "}") or (
                token.type == tokenize.NAME and not keyword.iskeyword(token.text))
    return "".join(f"{line}\n" for line in lines)


def _tokens(code: str) -> Iterator[_Token]:
    """Yields the tokens of a valid file; a formatted string is one token."""
    lines = code.split("\n")
    formatted: list[tuple[int, int]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type in (_FORMATTED.get("FSTRING_START"), _FORMATTED.get("TSTRING_START")):
                formatted.append(token.start)
            elif token.type in (_FORMATTED.get("FSTRING_END"), _FORMATTED.get("TSTRING_END")):
                (first, begin), (last, end) = formatted.pop(), token.end
                if not formatted:
                    text = "\n".join(lines[first - 1 : last])
                    yield _Token(tokenize.STRING, text[begin : len(text) - len(lines[last - 1]) + end], first, begin)
            elif not formatted:
                yield _Token(token.type, token.string, *token.start)
    except tokenize.TokenError as error:
        raise SyntaxError(f"Python cannot read the source: {error}") from error
