"""Documents that accompany code, as text: notebooks, commits, and questions with answers.

A notebook (JSON of nbformat 4) becomes its cells in order, separated by blank lines, without outputs and raw cells.
Each cell begins with a marker line, as in Jupytext and editors, and everything but code becomes comments, so that a
Python notebook becomes a Python file:

  # %% [markdown]
  # Some *prose*.

  # %%
  x = 1
  # %matplotlib inline                          lines that only IPython reads, such as %magics, !commands and help?

A commit ({"before": text, "after": text, "message": text}; a created or removed file has "" or null) becomes

  Before:                                       left out, with its text, if the file is created
  x = 1

  Commit: Say what x is for

  After:                                        left out, with its text, if the file is removed
  width = 1

A thread ({"question": text, "answers": [text, or {"text": text, "score": 3}]}, optionally with a "title") becomes the
question and its answers, stably sorted by descending score; an answer without a score has 0:

  Question: How wide is it?

  Answer: One.

  Answer: Look at x.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from tasks.corpora.files import Lost
from tasks.corpora.records import BROKEN_JSON, NO_OBJECT, NOT_UTF8

_CODE, _PROSE = "# %%", "# %% [markdown]"
# Lines that would be mistaken for the start of a cell.
_LOOKS_LIKE_ONE = re.compile(r"^# (%%[^\S\n]*(\[markdown\])?[^\S\n]*)$", re.MULTILINE)
_OF_IPYTHON = re.compile(r"\s*([%!]|\?{1,2}[\w%]|[\w.%]+\?{1,2}\s*$)")


# ---- Notebooks ---------------------------------------------------------------------------------


def notebook(content: bytes) -> tuple[str, str | None] | Lost:
    """The text of a notebook and the language that it declares, or why there is no text."""
    try:
        found = json.loads(content.decode())
    except UnicodeDecodeError:
        return Lost(NOT_UTF8)
    except (ValueError, RecursionError):
        return Lost(BROKEN_JSON)
    if not isinstance(found, dict):
        return Lost(NO_OBJECT)
    if found.get("nbformat") != 4 or not isinstance(found.get("cells"), list):
        return Lost("not a notebook of nbformat 4")
    language = _language(found.get("metadata"))
    cells = []
    for cell in found["cells"]:
        source = cell.get("source") if isinstance(cell, dict) else None
        source = "".join(source) if isinstance(source, list) and all(isinstance(e, str) for e in source) else source
        if not isinstance(source, str):
            return Lost("with a cell that has no source")
        kind, text = cell.get("cell_type"), re.sub("\r\n?", "\n", source).strip("\n")
        if not text.strip() or kind not in ("markdown", "code"):
            continue
        if kind == "markdown":
            text = "\n".join(f"# {line}".rstrip() for line in text.split("\n"))
        elif language == "python":
            text = _without_magic(text)
        text = _LOOKS_LIKE_ONE.sub(r"#  \1", text)
        cells.append(f"{_PROSE if kind == 'markdown' else _CODE}\n{text}\n")
    return "\n".join(cells), language


def _language(metadata: Any) -> str:
    """The language in a notebook's metadata; Python by default."""
    for place, key in (("language_info", "name"), ("kernelspec", "language")):
        facts = metadata.get(place) if isinstance(metadata, dict) else None
        if isinstance(facts, dict) and isinstance(facts.get(key), str):
            return facts[key].lower()
    return "python"


def _without_magic(text: str) -> str:
    """A Python cell with IPython-only lines commented out; a cell of another language is commented out entirely."""
    if text.lstrip().startswith("%%"):
        return "\n".join(f"# {line}".rstrip() for line in text.split("\n"))
    return "\n".join(f"# {line}" if _OF_IPYTHON.match(line) else line for line in text.split("\n"))


def code_cells(text: str) -> str:
    """The code of a notebook in the form above; any other text unchanged."""
    return "\n\n".join(body for is_prose, body in _cells(text) if not is_prose) + "\n"


def prose_cells(text: str) -> str:
    """The prose of a notebook in the form above, without comment signs."""
    bodies = (body for is_prose, body in _cells(text) if is_prose)
    return "\n\n".join(re.sub("^# ?", "", body, flags=re.MULTILINE) for body in bodies) + "\n"


def _cells(text: str) -> list[tuple[bool, str]]:
    """For each cell, whether it is prose, and its content; code before the first marker is also a cell."""
    cells: list[tuple[bool, list[str]]] = [(False, [])]
    for line in text.split("\n"):
        if line.rstrip() in (_CODE, _PROSE):
            cells.append((line.rstrip() == _PROSE, []))
        else:
            cells[-1][1].append(line)
    found = ((is_prose, "\n".join(lines).strip("\n")) for is_prose, lines in cells)
    return [(is_prose, body) for is_prose, body in found if body.strip()]


# ---- Records -----------------------------------------------------------------------------------


def commit(record: Mapping[str, Any]) -> str | Lost:
    """The text of a commit, or why there is none."""
    texts = {"before": "", "after": ""}
    for field in ("before", "after", "message"):
        value = record.get(field, 0)
        if isinstance(value, str) or (value is None and field in texts):
            texts[field] = value or ""
        else:
            return Lost(f"without text in field {field!r}")
    before, after, message = texts["before"], texts["after"], texts["message"]
    if not message.strip():
        return Lost("without a message")
    if before == after:
        return Lost("without a change")
    parts = [f"Before:\n{before.rstrip()}"] * bool(before.strip())
    parts += [f"Commit: {message.strip()}"]
    parts += [f"After:\n{after.rstrip()}"] * bool(after.strip())
    return "\n\n".join(parts) + "\n"


def thread(record: Mapping[str, Any]) -> str | Lost:
    """The text of a question and its answers, or why there is none."""
    question, answers = record.get("question"), record.get("answers")
    if not isinstance(question, str) or not question.strip():
        return Lost("without text in field 'question'")
    if not isinstance(answers, list) or not answers:
        return Lost("without answers")
    scored = []
    for answer in answers:
        text, score = (answer.get("text"), answer.get("score", 0)) if isinstance(answer, dict) else (answer, 0)
        if not isinstance(text, str) or not text.strip():
            return Lost("with an answer without text")
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            return Lost("with a score that is not a number")
        scored.append((score, text.strip()))
    title = record.get("title")
    asked = [title.strip()] if isinstance(title, str) and title.strip() else []
    parts = ["Question: " + "\n\n".join([*asked, question.strip()])]
    parts += [f"Answer: {text}" for _, text in sorted(scored, key=lambda each: -each[0])]
    return "\n\n".join(parts) + "\n"
