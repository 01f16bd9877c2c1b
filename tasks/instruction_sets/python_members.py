"""The documented and defined members of the standard library, the material of `python_instructions`.

Each member has the split of its file, which is named as in `corpora.standard_library`.
"""

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tasks.corpora import standard_library

# Compiled modules whose members are documented under another module's name.
_KNOWN_AS = {"posix": "os", "nt": "os", "builtins": ""}
_LONGEST_SIGNATURE = 80
_TITLE = re.compile(r"^(\S.*)\n([*=~-])\2{2,}$", re.MULTILINE)

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """A docstring or a section of the language reference, with its subject."""

    file: str
    kind: str  # module, class, constructor, function, method, property, attribute or topic
    name: str  # Such as "json.dumps"; empty without a public name, and then it makes no question.
    signature: str  # Such as "(text, width=70)"; empty if unknown or long.
    text: str


class Defined(NamedTuple):
    """A function's source in two parts, both dedented."""

    file: str
    module: str
    owner: str  # A method's class, else empty.
    name: str
    docstring: str
    header: str  # Decorators, signature and docstring.
    body: str
    is_trivial: bool  # Whether the body is trivial, such as `pass`.


@functools.cache
def documented_members() -> tuple[Documented, ...]:
    """All documented members, including private ones, in the order of file names."""
    found = [*_of_sources()[0], *_of_compiled_modules(), *_of_topics()]
    return tuple(sorted(found, key=lambda member: member.file))


@functools.cache
def defined_functions() -> tuple[Defined, ...]:
    """Functions and methods with a docstring and a body on separate lines; in the order of file names."""
    return tuple(_of_sources()[1])


@functools.cache
def _of_sources() -> tuple[list[Documented], list[Defined]]:
    documented: list[Documented] = []
    defined: list[Defined] = []
    for file in standard_library.source_files():
        tree = standard_library.parse(file.source)
        module = _module_of(file.name)
        lines = re.sub("\r\n?", "\n", file.source).split("\n")
        if text := ast.get_docstring(tree):
            documented.append(Documented(file.name, "module", _public_name(module), "", text))
        for owner, node in _definitions(tree.body, ""):
            text = ast.get_docstring(node) or ""
            if not text.strip():
                continue
            if isinstance(node, ast.ClassDef):
                name = _public_name(module, owner, node.name)
                documented.append(Documented(file.name, "class", name, "", text))
                continue
            kind = _kind_of(node, owner)
            name = _public_name(module, owner, "" if kind == "constructor" else node.name)
            signature = _signature(node, is_method=bool(owner)) if kind != "property" else ""
            documented.append(Documented(file.name, kind, name, signature, text))
            if parts := _header_and_body(node, lines):
                defined.append(Defined(file.name, module, owner, node.name, text, *parts, _is_trivial(node.body[1:])))
    return documented, defined


def _definitions(body: Sequence[ast.stmt], owner: str) -> Iterator[tuple[str, ast.ClassDef | _Function]]:
    """Yields classes, functions and methods, each with its enclosing class; omits those defined within a function."""
    for node in body:
        if isinstance(node, _Function):
            yield owner, node
        elif isinstance(node, ast.ClassDef):
            yield owner, node
            yield from _definitions(node.body, f"{owner}.{node.name}" if owner else node.name)
        else:  # Under `if` and `try`.
            for field in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, field, ()), owner)
            for handler in getattr(node, "handlers", ()):
                yield from _definitions(handler.body, owner)


def _module_of(file: str) -> str:
    return re.sub(r"(/__init__)?\.py$", "", file).replace("/", ".")


def _public_name(module: str, *within: str) -> str:
    """A member's name as users write it; "" if a part of it is private."""
    if module.startswith("_"):  # `_pydecimal` maps to `decimal`; `_strptime` to nothing.
        module = re.sub("^_(py)?", "", module)
        if module not in sys.stdlib_module_names:
            return ""
    name = ".".join(filter(None, (module, *within)))
    return "" if any(part.startswith("_") for part in name.split(".")) else name


def _kind_of(node: _Function, owner: str) -> str:
    if not owner:
        return "function"
    if node.name == "__init__":
        return "constructor"
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return "property" if decorators & {"property", "cached_property", "setter", "deleter"} else "method"


def _signature(node: _Function, is_method: bool) -> str:
    signature = ast.unparse(node.args)
    if is_method:
        signature = re.sub(r"^(self|cls|mcs|metacls)\b(, )?(/, )?", "", signature)
    return f"({signature})" if len(signature) <= _LONGEST_SIGNATURE else ""


# ---- Code --------------------------------------------------------------------------------------


def _header_and_body(node: _Function, lines: Sequence[str]) -> tuple[str, str] | None:
    """The source of a function up to its docstring, and after it; None if they are not on separate lines."""
    if len(node.body) < 2:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring, following = node.body[0], node.body[1]
    border, last = docstring.end_lineno or 0, node.end_lineno or 0
    if docstring.lineno == node.lineno or following.lineno <= border:
        return None
    header = _dedented(lines[first - 1 : border], node.col_offset)
    body = _dedented(lines[border:last], following.col_offset)
    # Dedenting the lines of a string would change it.
    if header is None or body is None or '"""' in body or "'''" in body:
        return None
    return header, body


def _dedented(lines: Sequence[str], columns: int) -> str | None:
    """Lines without this many leading blanks, and without blank lines at both ends; None if a line has fewer."""
    if any(line[:columns].strip() for line in lines):
        return None
    return "\n".join(line[columns:].rstrip() for line in lines).strip("\n")


def _is_trivial(body: Sequence[ast.stmt]) -> bool:
    """Whether a body only passes, raises, or returns a constant or a name."""
    if len(body) != 1:
        return False
    match body[0]:
        case ast.Pass() | ast.Raise() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Return(value=None | ast.Constant() | ast.Name()):
            return True
    return False


# ---- Compiled modules and the language reference -----------------------------------------------


def _of_compiled_modules() -> Iterator[Documented]:
    sources = {_module_of(file.name): file.source for file in standard_library.source_files()}
    for module, members in standard_library.compiled_members().items():
        for member in members:
            known = _KNOWN_AS.get(module, module)
            if known.startswith("_"):
                # `_heapq.heappush` is `heapq.heappush` if heapq.py imports it.
                top = member.name.split(".")[0]
                source = sources.get(known[1:], "")
                takes_over = re.search(rf"from {module} import \*|\b{re.escape(top)}\b", source)
                known = known[1:] if top and takes_over else known
            private = known.startswith("_") or (not member.name and module in _KNOWN_AS)
            name = "" if private else _public_name(known, member.name)
            yield Documented(f"modules/{module}", member.kind, name, "", member.docstring)


def _of_topics() -> Iterator[Documented]:
    """Yields the sections of each topic, each named by its title."""
    for topic, text in standard_library.topics().items():
        titles = list(_TITLE.finditer(text))
        ends = [title.start() for title in titles[1:]] + [len(text)]
        for title, end in zip(titles, ends, strict=True):
            prose = inspect.cleandoc(text[title.end() : end]).strip()
            if prose:
                yield Documented(f"topics/{topic}", "topic", title[1].strip(), "", prose)
