"""Decides which names of a Python file may be renamed without changing its meaning, as far as the file itself shows.

A name is renamed at all its occurrences in the file, or nowhere. It is renamed if the file binds it (parameters,
local and global variables, functions, classes, attributes that a class of the file defines in its body or on `self`)
unless

  it is a keyword, a builtin or has two underscores at both ends;
  an import names or binds it;
  it occurs as an attribute that no class of the file defines, or of an imported object; or builtin types also have an
    attribute of this name, and it is accessed on more than a method's own object;
  a call names it as a keyword argument, and no function or class of the file with the called name has such a parameter;
  a class whose base is not in this file defines it, since it may override the base's;
  a scope reads it as a global name that the module never binds;
  a string holds it: in __slots__, __match_args__, getattr and the like, or {name=} in a formatted string; in a file
    that calls eval, exec, globals, locals or vars, any string except docstrings counts.

Attributes that a class of the file defines are thus renamed on every object, and names that other files import from
this one change.
"""

import ast
import builtins
import io
import keyword
import re
import symtable
import tokenize
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_NEVER = {*dir(builtins), *keyword.kwlist, *keyword.softkwlist}
_BY_STRING = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller"}
_BY_ANY_STRING = {"eval", "exec", "globals", "locals", "vars"}
_OF_BUILTINS = {name for each in vars(builtins).values() if isinstance(each, type) for name in dir(each)}
_TOLD_BY = {"__slots__", "__match_args__"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Span(NamedTuple):
    """An identifier or keyword in a file; positions count characters."""

    begin: int
    end: int
    name: str  # as in the syntax tree
    is_told: bool  # by a formatted string, as {name=}


# ---- Positions of names ------------------------------------------------------------------------


def name_spans(code: str) -> list[Span]:
    """The names and keywords of a file, in order, including those in formatted strings; may raise SyntaxError."""
    starts = [0]
    for line in code.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: list[Span] = []
    opened: list[int] = []  # number of names before each open bracket
    last = ""  # operator
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            begin = starts[token.start[0] - 1] + token.start[1]
            if token.type == tokenize.NAME and last != "!":  # not a conversion
                name = unicodedata.normalize("NFKC", token.string)
                found.append(Span(begin, begin + len(token.string), name, False))
            elif token.type == tokenize.STRING:
                # Before Python 3.12 a formatted string is one token.
                found += [span._replace(begin=span.begin + begin, end=span.end + begin)
                          for span in _formatted_spans(token.string)]
            elif token.type == tokenize.OP:
                # Since then its fields are tokens; only in them does "=" end an expression.
                if last == "=" and token.string in ("}", ":", "!") and opened:
                    found[opened[-1] :] = [span._replace(is_told=True) for span in found[opened[-1] :]]
                if token.string in ("(", "[", "{"):
                    opened.append(len(found))
                elif token.string in (")", "]", "}") and opened:
                    opened.pop()
            last = token.string if token.type == tokenize.OP else ""
    except tokenize.TokenError as error:
        raise SyntaxError(f"Python cannot read the source: {error}") from error
    return found


def _formatted_spans(token: str) -> Iterator[Span]:
    """Yields the names in a string token; none if it is not a formatted string."""
    opening = re.match("([A-Za-z]*)(\"\"\"|'''|\"|')", token)
    if opening is None or "f" not in opening[1].lower():
        return
    fields = _fields(token, opening.end(), len(token) - len(opening[2]), "r" in opening[1].lower())
    for begin, end, is_told in fields:
        for span in name_spans(f"({token[begin:end]})"):
            yield Span(span.begin + begin - 1, span.end + begin - 1, span.name, span.is_told or is_told)


def _fields(text: str, position: int, end: int, is_raw: bool, in_format: bool = False) -> list[tuple[int, int, bool]]:
    """The start and end of each expression of a formatted string, and whether it ends in "=".

    For Python before 3.12, whose expressions have no backslashes, comments or quotes of the enclosing string.
    """
    found: list[tuple[int, int, bool]] = []
    while position < end:
        character = text[position]
        if character == "\\" and not is_raw and text[position : position + 3] == "\\N{":
            position = text.index("}", position) + 1
        elif character == "\\" and not is_raw and text[position + 1 : position + 2] != "{":
            position += 2
        elif character in "{}" and text[position + 1 : position + 2] == character and not in_format:
            position += 2
        elif character != "{":
            position += 1
        else:
            begin, position, is_told = position + 1, _end_of_expression(text, position + 1, end), False
            until = position
            if text[position : position + 1] == "=":
                is_told, position = True, position + 1
            found.append((begin, until, is_told))
            while position < end and text[position] not in ":}":  # a conversion
                position += 1
            closing = _closing(text, position, end)
            if position < end and text[position] == ":":
                found += _fields(text, position + 1, closing, is_raw, in_format=True)
            position = closing + 1
    return found


def _end_of_expression(text: str, position: int, end: int) -> int:
    depth = 0
    while position < end:
        character, pair = text[position], text[position : position + 2]
        if character in "\"'":
            quote = character * 3 if text.startswith(character * 3, position) else character
            closing = text.find(quote, position + len(quote))
            position = end if closing < 0 else closing + len(quote)
            continue
        if pair in ("==", "!=", "<=", ">="):
            position += 2
            continue
        if not depth and character in "}:!=":
            return position
        depth += (character in "([{") - (character in ")]}")
        position += 1
    return end


def _closing(text: str, position: int, end: int) -> int:
    """The position of the bracket that closes the field in whose format a position is."""
    depth = 0
    while position < end:
        if text[position] == "}" and not depth:
            return position
        depth += (text[position] == "{") - (text[position] == "}")
        position += 1
    return end


# ---- Which may be renamed ----------------------------------------------------------------------


class _Scope(NamedTuple):
    """The scope of a node, as far as attributes need it."""

    of_class: ast.ClassDef | None  # the class whose body or method holds the node
    in_body: bool = False  # directly in the body of that class
    own: str | None = None  # the method's name for its object, such as "self"


def renameable(tree: ast.Module, code: str, spans: Sequence[Span]) -> set[str]:
    """The names of a file that may be renamed, by the rules above; raises SyntaxError if scopes are inconsistent."""
    nodes = list(_scoped(tree))
    parameters, classes = _parameters(nodes), _classes(nodes)
    foreign = _foreign(classes)
    imported = {alias.asname or alias.name.partition(".")[0] for node, _ in nodes
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    bound, defined, used, kept = set[str](), set[str](), set[str](), set(_NEVER)
    for node, scope in nodes:
        new: str | None = None
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.ClassDef(name=name) | ast.FunctionDef(
                    name=name) | ast.AsyncFunctionDef(name=name):
                new = name
                bound.add(name)
            case ast.arg(arg=name):
                bound.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(
                    name=str(name)) | ast.MatchMapping(rest=str(name)):
                bound.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                for alias in aliases:
                    kept |= {*alias.name.split("."), alias.asname or ""}
                kept |= {*(getattr(node, "module", None) or "").split(".")}
            case ast.Attribute(value=ast.Name(id=owner), attr=name, ctx=ast.Store()) if owner == scope.own:
                used.add(name)
                (kept if scope.of_class in foreign else defined).add(name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == scope.own:
                used.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
                if name in _OF_BUILTINS or _root(node) in imported:
                    kept.add(name)
            case ast.MatchClass(kwd_attrs=names):
                used |= {*names}
            case ast.Call(func=function, keywords=keywords):
                called = _called(function, imported)
                known = parameters.get(called or "", set())
                kept |= {each.arg for each in keywords if each.arg and each.arg not in known}
                if called in _BY_STRING:
                    kept |= _words(node)
            case _ if type(node).__name__ in ("TypeVar", "ParamSpec", "TypeVarTuple"):  # of Python 3.12
                bound.add(node.name)  # type: ignore[attr-defined]
        if isinstance(node, ast.ClassDef):
            kept |= {each.arg for each in node.keywords if each.arg}
            kept |= {name for base in node.bases if isinstance(base, ast.Name)
                     for name in dir(getattr(builtins, base.id, None))}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in _TOLD_BY for target in targets):
                kept |= _words(node)
        if new and scope.in_body:
            (kept if scope.of_class in foreign else defined).add(new)
    kept |= used - defined
    kept |= {span.name for span in spans if span.is_told} | _unbound_globals(code)
    if any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_ANY_STRING
           for node, _ in nodes):
        kept |= _words(tree)
    return {name for name in (bound | defined) - kept if not (name.startswith("__") and name.endswith("__"))}


def _scoped(tree: ast.Module) -> Iterator[tuple[ast.AST, _Scope]]:
    """Yields all nodes of a tree with their scopes."""
    pending: list[tuple[ast.AST, _Scope]] = [(tree, _Scope(None))]
    while pending:
        node, scope = pending.pop()
        yield node, scope
        inner = scope
        if isinstance(node, ast.ClassDef):
            inner = _Scope(node, in_body=True)
        elif isinstance(node, _FUNCTIONS) and scope.in_body:
            first = [*node.args.posonlyargs, *node.args.args][:1]
            inner = _Scope(scope.of_class, own=first[0].arg if first else None)
        elif isinstance(node, (*_FUNCTIONS, ast.Lambda)):
            inner = scope._replace(in_body=False)
        # Everything before the body of a function or class belongs to the enclosing scope.
        body = {*map(id, getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ())}
        is_scope = isinstance(node, (*_FUNCTIONS, ast.ClassDef))
        pending += [(child, inner if not is_scope or id(child) in body else scope._replace(in_body=False))
                    for child in ast.iter_child_nodes(node)]


def _parameters(nodes: Iterable[tuple[ast.AST, _Scope]]) -> dict[str, set[str]]:
    """The keyword arguments of each function or class of the file, by its name."""
    found: dict[str, set[str]] = defaultdict(set)
    for node, scope in nodes:
        if isinstance(node, _FUNCTIONS):
            names = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
            found[node.name] |= names
            if scope.in_body and scope.of_class and node.name in ("__init__", "__new__"):
                found[scope.of_class.name] |= names
        elif isinstance(node, ast.AnnAssign) and scope.in_body and scope.of_class and isinstance(node.target, ast.Name):
            found[scope.of_class.name].add(node.target.id)  # for dataclasses and named tuples
    return found


def _classes(nodes: Iterable[tuple[ast.AST, _Scope]]) -> list[ast.ClassDef]:
    return [node for node, _ in nodes if isinstance(node, ast.ClassDef)]


def _foreign(classes: list[ast.ClassDef]) -> set[ast.ClassDef]:
    """The classes with a direct or indirect base that is neither in the file nor a builtin."""
    found: set[ast.ClassDef] = set()
    known = {*dir(builtins), *(each.name for each in classes)}
    while True:
        names = {each.name for each in found}
        more = {each for each in classes if each not in found and any(
            not isinstance(base, ast.Name) or base.id not in known or base.id in names for base in each.bases)}
        if not more:
            return found
        found |= more


def _called(function: ast.expr, imported: set[str]) -> str | None:
    """The name of the called function, class or method; None if it belongs to another object, or to the base class."""
    match function:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
            return None
        case ast.Name(id=name) | ast.Attribute(attr=name) if _root(function) not in imported:
            return name
    return None


def _root(node: ast.AST) -> str | None:
    """The name at the beginning of a chain of attributes."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _words(node: ast.AST) -> set[str]:
    """The words of all strings in a node, except those that are statements, such as docstrings."""
    statements = {id(each.value) for each in ast.walk(node) if isinstance(each, ast.Expr)}
    return {word for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
            and id(each) not in statements for word in re.findall(r"\w+", each.value)}


def _unbound_globals(code: str) -> set[str]:
    """Names that a scope reads as global but that are not bound globally."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = symtable.symtable(code, "document", "exec")
    bound, read = set[str](), set[str]()
    pending = [module]
    while pending:
        table = pending.pop()
        pending += table.get_children()
        for symbol in table.get_symbols():
            is_global = symbol.is_global() or table is module
            if is_global and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            elif is_global:
                read.add(symbol.get_name())
    return read - bound
