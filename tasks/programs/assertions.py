"""Splits tests into the parts that the program under test computes and those that its judge computes."""

import ast
import builtins
import warnings
from collections.abc import Collection, Sequence

ASK = "__ask__"  # a function of the judge: ASK(i, *values) has the program compute the i-th part

# ("import", source): for the judge and the program; ("run", source): for the program;
# ("judge", source of the assert, its condition with calls of ASK, the program's parts as sources of functions);
# ("check", source of a module that defines `check`, name of the program's function that is passed to `check`)
Step = tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, list[str]]

# Functions that the program may compute if all their arguments are its own: their results are data.
_COMPUTED = frozenset("""
    abs ascii bin bytes callable chr complex dict dir divmod float format frozenset getattr hash hex id int iter len
    list max min next oct ord pow repr reversed round set sorted str sum tuple type vars asyncio.run""".split())
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)


class Unjudged(ValueError):
    """Why tests cannot be judged; `reason` is a short phrase that follows a number of records."""

    def __init__(self, reason: str, source: str) -> None:
        super().__init__(f"a program cannot be judged by tests {reason}: {source!r:.300}")
        self.reason = reason


def steps(tests: Sequence[str], defined: Collection[str] = ()) -> list[Step]:
    """Converts the statements of tests to steps for a judge that does not trust the program.

    In `assert f(3) == {1, 2}` the program computes `f(3)`, and the judge the rest. A part is the program's if it starts
    from a name that is in `defined`, or neither a builtin nor imported by the tests. So are some functions, lists and
    sums of only such parts, such as `sorted(f(3))`, and questions about its objects that only the program can answer:
    whether two are identical, have an attribute, or are instances of its own class.

    Args:
      tests: Python statements: asserts, imports, and others that prepare for the following asserts.
      defined: names of builtins that the program must define itself, such as `sum`.

    Raises:
      Unjudged: a test is not Python, there is no assert, or one is inside another statement or cannot be judged.
    """
    trusted = set(dir(builtins)) - set(defined)
    found: list[Step] = []
    assigned: list[str] = []
    for test in tests:
        for statement in parse(test).body:
            source = ast.unparse(statement)
            if isinstance(statement, ast.Assert):
                assigned += [node.target.id for node in ast.walk(statement.test) if isinstance(node, ast.NamedExpr)]
                split = _Split(trusted, assigned, statement.test)
                found.append(("judge", source, split.judged, split.calls))
            elif isinstance(statement, ast.Import | ast.ImportFrom):
                names = {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
                if "*" in names:
                    raise Unjudged("that import unnamed names", source)
                trusted |= names
                found.append(("import", source))
            elif any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
                raise Unjudged("that have an assert within another statement", source)
            else:
                found.append(("run", source))
    if not any(step[0] == "judge" for step in found):
        raise Unjudged("that hold no assert, and thus pass anything", "\n".join(tests))
    return found


def check_steps(tests: Sequence[str], entry_point: str) -> list[Step]:
    """Converts tests in HumanEval's form to one step, which the judge runs alone.

    Args:
      tests: Python code that, joined, defines `check(candidate)` and everything that it uses, without the program.
      entry_point: the name of the program's function that becomes `candidate`.

    Raises:
      Unjudged: the tests are not Python, or define no `check` with an assert that uses its argument.
    """
    source = "\n\n".join(tests)
    checks = [node for node in parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if not checks or len(checks[-1].args.args) != 1:
        raise Unjudged("that define no function check(candidate)", source)
    inner = list(ast.walk(checks[-1]))
    candidate = checks[-1].args.args[0].arg
    if not any(isinstance(node, ast.Assert) for node in inner) or not any(
            isinstance(node, ast.Name) and node.id == candidate for node in inner):
        raise Unjudged("that assert nothing about the program, and thus pass anything", source)
    return [("check", source, entry_point)]


def parse(source: str) -> ast.Module:
    """Parses a test; Python can compile and `ast` can unparse each of its statements.

    Suppresses warnings about invalid escapes, which are common in such programs.

    Raises:
      Unjudged: it is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(source, "test", "exec", dont_inherit=True)
            tree = ast.parse(source)
            ast.unparse(tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two if code nests too deeply
            raise Unjudged("that are not Python", source) from None
    return tree


class _Split(ast.NodeTransformer):
    """Replaces the largest parts of a condition that start from an untrusted name with calls of ASK."""

    def __init__(self, trusted: Collection[str], assigned: Sequence[str], condition: ast.expr) -> None:
        self._trusted = trusted
        self._local = list(assigned)
        self.calls: list[str] = []
        self.judged = ast.unparse(ast.fix_missing_locations(self.visit(condition)))

    def visit(self, node: ast.AST) -> ast.AST:
        if self._is_of_program(node) and not any(isinstance(inner, ast.NamedExpr) for inner in ast.walk(node)):
            return self._asked(node)
        if not isinstance(node, _SCOPES):
            return self.generic_visit(node)
        before = len(self._local)
        self._local += [inner.id for inner in ast.walk(node)
                        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]
        self._local += [inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)]
        changed = self.generic_visit(node)
        del self._local[before:]
        return changed

    def _is_of_program(self, node: ast.AST) -> bool:
        start: ast.AST = node
        while isinstance(start, ast.Call | ast.Attribute | ast.Subscript):
            start = start.func if isinstance(start, ast.Call) else start.value
        if isinstance(start, ast.Name) and isinstance(start.ctx, ast.Load):
            if start.id not in self._trusted and start.id not in self._local:
                return True
        if isinstance(node, ast.Compare):
            return (all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops)
                    and all(map(self._is_of_program, (node.left, *node.comparators))))
        if isinstance(node, ast.BinOp):
            return self._is_of_program(node.left) and self._is_of_program(node.right)
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return bool(node.elts) and all(map(self._is_of_program, node.elts))
        if not isinstance(node, ast.Call) or not isinstance(start, ast.Name) or start.id in self._local:
            return False
        name, arguments = ast.unparse(node.func), node.args
        if not arguments or node.keywords:
            return False
        if name == "hasattr":
            return self._is_of_program(arguments[0])
        if name in ("isinstance", "issubclass"):
            return any(map(self._is_of_program, ast.walk(arguments[-1])))
        return name in _COMPUTED and all(map(self._is_of_program, arguments))

    def _asked(self, node: ast.AST) -> ast.AST:
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)}
        values = sorted(used & set(self._local))
        self.calls.append(f"lambda {', '.join(values)}: {ast.unparse(node)}")
        return ast.Call(ast.Name(ASK, ast.Load()), [ast.Constant(len(self.calls) - 1),
                                                    *(ast.Name(name, ast.Load()) for name in values)], [])
