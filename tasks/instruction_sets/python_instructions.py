"""Instructions from every Python installation: questions answered by its documentation, and functions to write.

Rules make them from the running Python's standard library. "text" asks about a module, class, function or topic of the
language; the answer is all or the first paragraphs of its documentation. "code" gives a function's signature and
docstring; the answer is its body.

An instruction is in the split of its file in pre-training (`standard_library.split_of`), so both hold out the same
files. Items that occur in files of several splits are left out, as are repeated questions or answers.
"""

import functools
import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

from tasks.corpora.standard_library import split_of
from tasks.instruction_sets.python_members import Defined, Documented, defined_functions, documented_members

LONGEST_TEXT = 1200
LONGEST_CODE = 2000
LONGEST_HEADER = 1500
FEWEST_WORDS = 5

_QUESTIONS = {
    "module": (
        "What is Python's module `{name}` for?",
        "Describe the module `{name}` of Python's standard library.",
        "Give an overview of the Python module `{name}`.",
        "I came across `import {name}` in a Python program. What does this module offer?",
    ),
    "class": (
        "What is the class `{name}` in Python?",
        "Describe Python's class `{name}`.",
        "What are objects of the Python class `{name}` for?",
        "Explain what the class `{name}` of Python's standard library does.",
    ),
    "constructor": (
        "What does the constructor `{name}{signature}` do in Python?",
        "What happens in Python when `{name}{signature}` is called to make an object?",
        "Describe how an object of the Python class `{name}` is made by `{name}{signature}`.",
    ),
    "function": (
        "What does the Python function `{name}{signature}` do?",
        "Explain `{name}{signature}` in Python.",
        "Describe what Python's `{name}{signature}` is for.",
        "How does the function `{name}{signature}` of Python's standard library behave?",
    ),
    "method": (
        "What does the Python method `{name}{signature}` do?",
        "Explain the method `{name}{signature}` in Python.",
        "Describe what calling `{name}{signature}` does in Python.",
        "What is the method `{name}{signature}` of Python's standard library for?",
    ),
    "property": (
        "What does the property `{name}` hold in Python?",
        "Describe the property `{name}` of Python's standard library.",
    ),
    "attribute": (
        "What is the attribute `{name}` in Python?",
        "Describe the attribute `{name}` of Python's standard library.",
    ),
    "topic": (
        "Explain this topic of the Python language: {name}.",
        "What does Python's language reference say on this subject? {name}",
        "I want to understand Python better. Tell me about this: {name}.",
        "Summarize this section of Python's language reference: {name}.",
    ),
}
_ORDERS = (
    "Write the body of this Python {what}.",
    "Complete this Python {what}: give the lines that follow its docstring.",
    "Implement this Python {what} as its docstring says. Give its body alone.",
    "Below are the signature and the docstring of a Python {what}. Write the code of its body.",
)

# A first paragraph such as "dup() -> socket object", which compiled functions have.
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*[-=]+>.*)?")
_CREDITS = re.compile(r"(Written|Contributed|Created|Originally) by|Copyright|\(c\)|Authors?:|Licensed")
_NO_ANSWER = re.compile(r">>>|XXX|TODO|FIXME|Not sure")


class Made(NamedTuple):
    """One instruction, its source file, and that file's split."""

    file: str
    split: str
    instruction: str
    given: str  # The instruction's input; may be empty.
    output: str


@functools.cache
def python_instructions(kind: str) -> tuple[Made, ...]:
    """All instructions of one kind, in the order of file names; the first call takes some seconds.

    Args:
      kind: "text" or "code".

    Raises:
      ValueError: there is no such kind.
      FileNotFoundError: this Python has no readable standard library.
      RuntimeError: the compiled modules could not be read.
    """
    if kind == "text":
        made = _answers()
    elif kind == "code":
        made = _programs()
    else:
        raise ValueError(f"The kinds of Python's own instructions are 'text' and 'code', found {kind!r}.")
    return tuple(_once(made))


def _answers() -> Iterator[Made]:
    members = documented_members()
    # Pre-training keeps a duplicate text in the split of the first file that holds it.
    shared = _in_several_splits((member.text, member.file) for member in members)
    for member in members:
        text = _shortened(member)
        if member.name and member.text not in shared and text:
            yield Made(member.file, split_of(member.file), _question(member), "", text)


def _question(member: Documented) -> str:
    phrasings = _QUESTIONS[member.kind]
    return _chosen(phrasings, f"{member.kind} {member.name}").format(name=member.name, signature=member.signature)


def _shortened(member: Documented) -> str:
    """The first paragraphs of a text, as many as fit; "" if they are too short, or not prose."""
    paragraphs = [paragraph.rstrip() for paragraph in re.split(r"\n\s*\n", member.text.strip())]
    if len(paragraphs) > 1 and (paragraphs[0] == member.name or _SIGNATURE.fullmatch(paragraphs[0])):
        del paragraphs[0]
    kept: list[str] = []
    for paragraph in paragraphs:
        length = sum(len(other) + 2 for other in kept) + len(paragraph)
        if length > LONGEST_TEXT or _CREDITS.match(paragraph):
            break
        kept.append(paragraph)
    while kept and kept[-1].endswith(":"):
        kept.pop()  # It introduces the part that is cut off, or is a separate section.
    shortened = "\n\n".join(kept)
    is_prose = not _NO_ANSWER.match(shortened) and len(re.findall(r"[^\W\d_]{2,}", shortened)) >= FEWEST_WORDS
    return shortened if is_prose and _is_valid(shortened) else ""


def _programs() -> Iterator[Made]:
    functions = defined_functions()
    bodies = _in_several_splits((function.body, function.file) for function in functions)
    docstrings = _in_several_splits((function.docstring, function.file) for function in functions)
    for function in functions:
        is_shared = function.body in bodies or function.docstring in docstrings
        is_sized = len(function.body) <= LONGEST_CODE and len(function.header) <= LONGEST_HEADER
        says_something = len(function.docstring.split()) >= 3 and not function.is_trivial
        if not is_shared and is_sized and says_something and _is_valid(function.header + function.body):
            yield Made(function.file, split_of(function.file), _order(function), function.header, function.body)


def _order(function: Defined) -> str:
    if function.owner:
        what = f"method of the class `{function.owner}` in the module `{function.module}`"
    else:
        what = f"function of the module `{function.module}`"
    return _chosen(_ORDERS, f"{function.module} {function.owner} {function.name}").format(what=what)


def _chosen(phrasings: tuple[str, ...], key: str) -> str:
    return phrasings[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(phrasings)]


def _is_valid(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Lone surrogates, from the escapes in a docstring.
        return False
    return True


def _in_several_splits(found: Iterable[tuple[Hashable, str]]) -> set[Hashable]:
    """Of pairs of an item and its file, the items whose files are not all in one split."""
    splits: dict[Hashable, str] = {}
    return {thing for thing, file in found if splits.setdefault(thing, split_of(file)) != split_of(file)}


def _once(made: Iterable[Made]) -> Iterator[Made]:
    """Yields those with a new question and a new answer, except where a shortened answer is also in another split."""
    everything = list(made)
    shared = _in_several_splits((one.output, one.file) for one in everything)
    questions: set[tuple[str, str]] = set()
    answers: set[str] = set()
    for one in everything:
        question = (one.instruction, one.given)
        if one.output not in shared and question not in questions and one.output not in answers:
            questions.add(question)
            answers.add(one.output)
            yield one
