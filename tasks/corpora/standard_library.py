"""The corpora in every Python installation: the standard library's source code, and its prose.

Code is each source file without its docstrings. Text is prose: the docstrings of each file and of
the compiled modules, the language reference of `help()`, and a few text files. Tests, installed
packages, generated tables and machine-specific files are left out.

About 5% of the documents are "validation" and 5% "test", by a hash of the file's name. Code and
docstrings of a file are in the same split, as are `heapq` and its compiled twin `_heapq`; a repeated
docstring or topic's paragraph is kept once. Thus no split contains another's text.
On one Python version and platform, documents and their order are always the same: compiled modules
are read in a separate Python process that sees no installed package, no environment variable and
no working directory.
"""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tokenize
import types
import warnings
from collections.abc import Iterator
from typing import NamedTuple

_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_FOREIGN_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|(site|user)customize\.py")
# The topics are text; Grammar.txt and the like are neither code nor prose.
_NOT_CODE = {"pydoc_data/topics.py"}
_NOT_PROSE = re.compile(r".*Grammar\.txt|.*requirements.*\.txt")
# About 100 encodings are generated files that differ only in numbers: near-duplicates across splits.
_GENERATED = re.compile(r"\bdecoding_(table|map)\b|\b_multibytecodec\b")
# These print when imported, open a windowing library, or serve Python's tests.
_UNSAFE_MODULES = re.compile(r"readline|_tkinter|_test.*|_?xx.*|_ctypes_test")


class Document(NamedTuple):
    """One document: its origin, such as "json/decoder.py", its split, and its text."""

    name: str
    split: str
    text: str


class SourceFile(NamedTuple):
    """A file of the standard library, split into code and docstrings."""

    name: str  # Path relative to the standard library, with forward slashes.
    code: str  # Without docstrings.
    docstrings: list[str]
    source: str


class Member(NamedTuple):
    """A compiled module, or a function, class, method or attribute in it, and its docstring."""

    kind: str
    name: str  # Within the module, such as "deque.append"; empty for the module itself.
    docstring: str


class _Docstring(NamedTuple):
    begin: tuple[int, int]  # Line, from 1, and column in bytes of UTF-8, from 0.
    end: tuple[int, int]
    alone: bool  # The only statement of its class or function.
    text: str


def python_documents(kind: str, split: str) -> Iterator[str]:
    """Yields the texts of `python_corpus(kind)` in one split: "train", "validation" or "test"."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"The Python corpora have train, validation and test, found {split!r}.")
    return (document.text for document in python_corpus(kind) if document.split == split)


@functools.cache
def python_corpus(kind: str) -> tuple[Document, ...]:
    """All documents of the running Python, sorted by name; the first call takes some seconds.

    Args:
      kind: "code" or "text".

    Raises:
      ValueError: there is no such kind.
      FileNotFoundError: this Python has no readable standard library.
      RuntimeError: the compiled modules could not be read.
    """
    pieces: Iterator[tuple[str, list[str]]]
    if kind == "code":
        pieces = ((file.name, [file.code]) for file in source_files())
    elif kind == "text":
        pieces = _prose()
    else:
        raise ValueError(
            f"The kinds of Python's own corpora are 'text' and 'code', found {kind!r}."
        )
    seen: set[str] = set()
    corpus = []
    for name, texts in sorted(pieces):
        new = [text for text in dict.fromkeys(texts) if text not in seen and _is_document(text)]
        seen.update(new)
        if new:
            corpus.append(Document(name, split_of(name), "\n\n".join(new)))
    return tuple(corpus)


def split_of(name: str) -> str:
    """The split of a document by its name; private and compiled twins of a module share it."""
    stem = re.sub(r"(/__init__)?\.py$", "", re.sub("^modules/", "", name))
    key = stem if "/" in stem else re.sub("^_(py)?", "", stem)
    return {0: "validation", 1: "test"}.get(_hash(key) % 20, "train")


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _is_document(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Lone surrogates, from the escapes in a docstring.
        return False
    return bool(text.strip())


def _prose() -> Iterator[tuple[str, list[str]]]:
    """Yields names, each with the texts that belong to it."""
    for file in source_files():
        yield file.name, file.docstrings
    for path, name in _installed_files(".txt"):
        if not _NOT_PROSE.fullmatch(name):
            yield name, [path.read_text(encoding="utf-8", errors="ignore")]
    for topic, text in topics().items():
        yield f"topics/{topic}", [text]
    for module, members in compiled_members().items():
        yield f"modules/{module}", [member.docstring for member in members]


@functools.cache
def source_files() -> tuple[SourceFile, ...]:
    """The standard library's source files that this Python can parse, sorted by name."""
    found, unreadable = [], []
    for path, name in _installed_files(".py"):
        try:
            with tokenize.open(path) as stream:
                source = stream.read()
            if name in _NOT_CODE or (name.startswith("encodings/") and _GENERATED.search(source)):
                continue
            found.append(SourceFile(name, *split_docstrings(source), source))
        except (SyntaxError, UnicodeDecodeError):
            unreadable.append(name)
    if not found:
        raise FileNotFoundError(
            f"Python's standard library holds no source files at {_root()}; "
            "use a Python whose library is installed as files, or a corpus of your own."
        )
    if unreadable:
        logging.warning(
            "%d of %d files of Python's standard library cannot be parsed and are skipped: %s.",
            len(unreadable),
            len(unreadable) + len(found),
            ", ".join(unreadable),
        )
    return tuple(found)


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _installed_files(suffix: str) -> Iterator[tuple[pathlib.Path, str]]:
    """Yields files of the standard library with their names, sorted by name."""
    found: list[pathlib.Path] = []
    for folder, subfolders, names in os.walk(_root()):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _FOREIGN_FOLDERS | _TEST_FOLDERS and not name.startswith("config-")
        ]
        found += [
            pathlib.Path(folder, name)
            for name in names
            if name.endswith(suffix) and not _FOREIGN_FILES.fullmatch(name)
        ]
    named = {path.relative_to(_root()).as_posix(): path for path in found}
    for name in sorted(named):
        yield named[name], name


def topics() -> dict[str, str]:
    """The language reference of `help()`, by topic; empty if the installation has none.

    Some topics are parts of others: each paragraph is kept only in the longest topic, and a topic that
    loses half of its paragraphs is left out.
    """
    path = _root() / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    [topics] = [
        ast.literal_eval(statement.value)
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.Assign)
    ]
    kept, seen = {}, set()
    for topic, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = inspect.cleandoc(text).split("\n\n")
        new = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(new)
        if 2 * len(new) > len(paragraphs):
            kept[topic] = "\n\n".join(new)
    return kept


@functools.cache
def compiled_members() -> dict[str, list[Member]]:
    """The documented members of the compiled modules, by module, read in an isolated Python."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", os.path.abspath(__file__)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[
            -1
        ]
        raise RuntimeError(
            f"{sys.executable} cannot list the compiled modules' docstrings: {last}."
        )
    return {module: [Member(*fields) for fields in members] for module, members in json.loads(done.stdout).items()}


def _compiled_modules() -> Iterator[types.ModuleType]:
    """Imports the built-in and extension modules of the standard library, sorted by name."""
    for name in sorted(sys.stdlib_module_names | set(sys.builtin_module_names)):
        if _UNSAFE_MODULES.fullmatch(name):
            continue
        try:
            specification = importlib.util.find_spec(name)
            loader = specification and specification.loader
            if loader is importlib.machinery.BuiltinImporter or isinstance(
                loader, importlib.machinery.ExtensionFileLoader
            ):
                yield importlib.import_module(name)
        except (ImportError, ValueError):
            continue  # Missing on this platform or installation.


def _members_of(module: types.ModuleType) -> list[Member]:
    """A compiled module, its functions and classes, and their members, if documented."""
    functions = (
        types.BuiltinFunctionType,
        types.MethodDescriptorType,
        types.ClassMethodDescriptorType,
        types.WrapperDescriptorType,
    )
    attributes = (types.GetSetDescriptorType, types.MemberDescriptorType)
    found: list[tuple[str, str, object]] = [("module", "", module)]
    for name, value in sorted(vars(module).items()):
        if isinstance(value, functions + attributes):
            found.append(("function" if isinstance(value, functions) else "attribute", name, value))
        elif isinstance(value, type):
            found.append(("class", name, value))
            found += [
                ("method" if isinstance(member, functions) else "attribute", f"{name}.{own}", member)
                for own, member in sorted(vars(value).items())
                if isinstance(member, functions + attributes)
            ]
    documented = [(kind, name, getattr(value, "__doc__", None)) for kind, name, value in found]
    return [
        Member(kind, name, inspect.cleandoc(text))
        for kind, name, text in documented
        if isinstance(text, str) and text.strip()
    ]


def split_docstrings(source: str) -> tuple[str, list[str]]:
    """Separates a source file's docstrings from its code.

    The docstrings of modules, classes and functions are cut out of the unchanged text: every
    comment, blank line and other string keeps its place, except for blank lines at the head of the
    file. A body that held nothing else gets `pass`.

    Args:
      source: text of a Python file.

    Returns:
      The code, and the docstrings in the file's order, dedented as `inspect.cleandoc` does, without
      the empty ones.

    Raises:
      SyntaxError: this Python cannot read the source, or the source without its docstrings.
    """
    source = re.sub("\r\n?", "\n", source)  # As in Python's own reader, which counts the lines.
    found = sorted(_docstrings(parse(source)), key=lambda docstring: docstring.begin)
    lines = [line.encode() for line in source.split("\n")]  # Columns count bytes of UTF-8.
    for docstring in reversed(found):
        _cut(lines, docstring)
    code = b"\n".join(lines).decode().lstrip("\n")
    if found:
        parse(code)
    texts = [inspect.cleandoc(docstring.text) for docstring in found]
    return code, [text for text in texts if text.strip()]


def parse(source: str) -> ast.Module:
    """Parses a Python file; every failure is a SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Warnings about invalid escapes in the files' strings.
        try:
            return ast.parse(source)
        except (ValueError, RecursionError, MemoryError) as error:
            raise SyntaxError(f"Python cannot parse the source: {error}.") from error


def docstrings_of(tree: ast.Module) -> list[tuple[int, int, str]]:
    """Line, column and text of each docstring."""
    return [(*docstring.begin, docstring.text) for docstring in _docstrings(tree)]


def _docstrings(tree: ast.Module) -> Iterator[_Docstring]:
    """Yields all docstrings, unordered; visits only statements, since expressions would be most of the work."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            pending += getattr(node, field, ())
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        match node.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str(text))) as statement]:
                end = (statement.end_lineno or 0, statement.end_col_offset or 0)
                alone = len(node.body) == 1 and not isinstance(node, ast.Module)
                yield _Docstring((statement.lineno, statement.col_offset), end, alone, text)


def _cut(lines: list[bytes], docstring: _Docstring) -> None:
    """Removes one docstring from `lines`, in place; the lines above it keep their numbers."""
    (first, begin), (last, end) = docstring.begin, docstring.end
    before, after = lines[first - 1][:begin], lines[last - 1][end:]
    if docstring.alone:
        before += b"pass"
    elif after.lstrip().startswith(b";"):
        after = after.lstrip()[1:].lstrip()
    line = (before + after).rstrip()
    lines[first - 1 : last] = [line] if line.strip() else []


if __name__ == "__main__":  # The program that `compiled_members` runs.
    print(
        json.dumps(
            {module.__name__: _members_of(module) for module in _compiled_modules()}
        )
    )
