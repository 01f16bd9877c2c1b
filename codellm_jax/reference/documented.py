"""Parameters of functions and dataclasses with their meanings, read from source text: nothing is imported."""

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

# What holds `codellm_jax` and `tasks`: a checkout, or an environment's site-packages.
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a function, or a field of a dataclass.

    Attributes:
      name: as a caller writes it.
      type: its annotation; "" if it has none.
      default: as the source has it; None where a value must be given.
      meaning: what the docstring says of it below "Attributes:" or "Args:"; "" if it says nothing.
    """

    name: str
    type: str
    default: str | None
    meaning: str


@functools.cache
def parameters(target: str) -> tuple[Parameter, ...]:
    """The parameters of a function or a dataclass, in their order.

    Args:
      target: "package.module:name", as in `configuration.CONFIGURABLES`.

    Raises:
      LookupError: the module does not define it.
    """
    node = _definition(target)
    meanings = described(ast.get_docstring(node) or "")
    return tuple(
        Parameter(name, "" if annotation is None else ast.unparse(annotation),
                  None if default is None else _default(default), meanings.get(name, ""))
        for name, annotation, default in (_fields(node) if isinstance(node, ast.ClassDef) else _arguments(node)))


def summary(target: str) -> str:
    """The first sentence of the docstring of a function or class; of "package.module" that of the module."""
    module, _, name = target.partition(":")
    node = _definition(target) if name else _parsed(module)
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)[0]


def described(docstring: str) -> Mapping[str, str]:
    """Name -> meaning of what stands below "Attributes:" or "Args:"; "a, b: text" tells of both."""
    section = re.search(r"^(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n(?=[ \t]))*)", docstring + "\n", flags=re.MULTILINE)
    found: dict[str, str] = {}
    for item in re.split(r"\n(?=  \S)", section[1].rstrip() if section else ""):
        names, colon, meaning = item.partition(": ")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(meaning.split()))
    return found


@functools.cache
def _parsed(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition(target: str) -> ast.FunctionDef | ast.ClassDef:
    module, _, name = target.partition(":")
    for node in _parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            return _definition(f"{node.module}:{name}")
    raise LookupError(f"{module} defines no {name}.")


def _fields(node: ast.ClassDef) -> list[tuple[str, ast.expr | None, ast.expr | None]]:
    return [(each.target.id, each.annotation, each.value) for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]


def _arguments(node: ast.FunctionDef) -> list[tuple[str, ast.expr | None, ast.expr | None]]:
    given = [*node.args.posonlyargs, *node.args.args]
    defaults: list[ast.expr | None] = [*[None] * (len(given) - len(node.args.defaults)), *node.args.defaults]
    pairs = [*zip(given, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return [(argument.arg, argument.annotation, default) for argument, default in pairs]


def _default(node: ast.expr) -> str:
    """A default as a person writes it; of `dataclasses.field(default_factory=dict)` the empty mapping."""
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "default_factory":
                return {"dict": "{}", "list": "[]", "tuple": "()"}.get(ast.unparse(keyword.value), "")
    return ast.unparse(node)
