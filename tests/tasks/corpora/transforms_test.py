"""Named transforms of Python: hand-made cases, odd sources, the standard library."""

import ast
import builtins
import collections
import contextlib
import io
import itertools
import keyword
import os
import pathlib
import subprocess
import sys
import textwrap
import tokenize
import warnings

import hypothesis
import pytest
from hypothesis import strategies as st

from tasks.corpora import sources, transforms
from tasks.corpora.files import Lost
from tests.transformed import AGAIN_THE_SAME, OF_PYTHON, apply, dedent

ROOT = pathlib.Path(__file__).resolve().parents[3]


def parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source.removeprefix("\ufeff"))


# ---- Python: comments --------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "code"), [
    ("x = 1  # one\n", "x = 1\n"),
    ("# top\nx = 1\n", "x = 1\n"),
    ("if x:\n    # why\n    y = 1\n\n# end", "if x:\n    y = 1\n"),
    ('x = "# no comment"\n', 'x = "# no comment"\n'),
    ('x = """\n# no comment\n"""  # one\n', 'x = """\n# no comment\n"""\n'),
    ("x = [  # list\n    1,  # one\n    # two\n]\n", "x = [\n    1,\n]\n"),
    ("x = 1 + \\\n    2  # three\n", "x = 1 + \\\n    2\n"),
    ("x = 1 \\\n# goes on\ny = 2\n", "x = 1 \\\n\ny = 2\n"),
    ("# not \\\n# going on\ny = 2\n", "y = 2\n"),
    ('def f():\n    "doc"  # note\n', "def f():\n    pass\n"),
    ('def f():\n    """Doc."""\n    # note\n    return 1\n', "def f():\n    return 1\n"),
    ('"one"\n"two"\nx = 1\n', "x = 1\n"),  # the second would be the docstring else
    ('class A:\n    x = 1\n    "of x"\n', 'class A:\n    x = 1\n    "of x"\n'),
    ("x = 1# a\r\ny = 2\r\n", "x = 1\ny = 2\n"),
    ("\f# page\n\fx = 1\n", "\fx = 1\n"),
    ("\ufeff# mark\nx = 1\n", "x = 1\n"),
    ("f'{x}#'  # a\n", "f'{x}#'\n"),
    ("if x:\n\tpass # tab\n", "if x:\n\tpass\n"),
])
def test_strip_comments(source: str, code: str) -> None:
    assert apply(source, "strip_comments") == code
    assert apply(code, "strip_comments") == code


@pytest.mark.parametrize(("source", "comments"), [
    ("x = 1  # one  \n", "# one\n"),
    ('"""Module.\n\n    Indented.\n"""\ndef f():  #why\n    """Of f."""\n    x = "# no"\n    # end\n',
     "# Module.\n#\n# Indented.\n#why\n# Of f.\n# end\n"),
    ('"a\\r\\x00b\\u2028c"\n', "# a\n# b\n# c\n"),
    ('class A:\n    "of A"; x = 1\n    "not a docstring"\n', "# of A\n"),
])
def test_comments_only(source: str, comments: str) -> None:
    assert apply(source, "comments_only") == comments
    assert apply(comments, "comments_only") == comments


def test_what_has_no_comments_is_lost() -> None:
    assert apply("x = 1\n", "comments_only") == Lost("left empty by comments_only")
    assert apply("# only\n", "strip_comments") == Lost("left empty by strip_comments")
    assert apply('"\\ud800"\n', "comments_only") == Lost("not parsed by comments_only as python")
    assert apply("x = (\n", "strip_comments", "comments_only") == Lost("not parsed by strip_comments as python")


# ---- Python: names -----------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "code"), [
    # Parameters, locals, functions, and their calls; builtins, imports and strings stay.
    ("import os as system\nfrom a.b import c\ndef f(total, *rest, key=1, **more):\n    'total'\n"
     "    size = len(rest) + total + system.x + c\n    return size\nf(1, key=2)\n",
     "import os as system\nfrom a.b import c\ndef v0(v1, *v2, v3=1, **v4):\n    'total'\n"
     "    v5 = len(v2) + v1 + system.x + c\n    return v5\nv0(1, v3=2)\n"),
    # Attributes that a class defines itself, on whatever object.
    ("class Box:\n    width = 1\n    def grow(self, by):\n        self.high = by\n        return self.width\n"
     "Box().grow(2)\nprint(other.high, other.foreign)\n",
     "class v0:\n    v1 = 1\n    def v2(v3, v4):\n        v3.v5 = v4\n        return v3.v1\n"
     "v0().v2(2)\nprint(other.v5, other.foreign)\n"),
    # The same name is another's attribute: it stays everywhere.
    ("def f(count):\n    return xs.count(count)\n", "def v0(count):\n    return xs.count(count)\n"),
    ("def f(key):\n    return sorted(key, key=len)\n", "def v0(key):\n    return sorted(key, key=len)\n"),
    # What a foreign base may have.
    ("import a\nclass B(a.A):\n    def run(self):\n        self.x = 1\n        y = 2\n",
     "import a\nclass v0(a.A):\n    def run(v1):\n        v1.x = 1\n        v2 = 2\n"),
    ("class E(Exception):\n    def __init__(self, where):\n        self.where, self.args = where, ()\n",
     "class v0(Exception):\n    def __init__(v1, v2):\n        v1.v2, v1.args = v2, ()\n"),
    # A name that is another scope's global.
    ("def f(page):\n    return page\ndef g():\n    return page\n",
     "def v0(page):\n    return page\ndef v1():\n    return page\n"),
    # Formatted strings, to any depth; {x=} tells its name.
    ("a = b = 1\nf'{a!r:>{b}} a {{a}} {a + len(\"a\")} {f\"{b}\"}'\n",
     "v0 = v1 = 1\nf'{v0!r:>{v1}} a {{a}} {v0 + len(\"a\")} {f\"{v1}\"}'\n"),
    ("a = b = 1\nf'{a=}' rf'\\{b}' f'\\N{DIGIT ONE}{a==b}'\n",
     "a = v0 = 1\nf'{a=}' rf'\\{v0}' f'\\N{DIGIT ONE}{a==v0}'\n"),
    ("a = 1\nf'''{\n    a\n}'''\n", "v0 = 1\nf'''{\n    v0\n}'''\n"),
    # What strings tell where they are run.
    ("def f(x, y):\n    'x'\n    return eval('y + 1')\n", "def v0(v1, y):\n    'x'\n    return eval('y + 1')\n"),
    ("class A:\n    def f(self, x):\n        super().f(x=x)\n        a.f(x=x)\n",
     "class v0:\n    def v1(v2, x):\n        super().v1(x=x)\n        a.v1(x=x)\n"),
    # Soft keywords, walrus, patterns, comprehensions, private names, global.
    ("match = 1\nmatch (n := match):\n    case [first, *rest] | {'k': first, **rest}: pass\n    case _: pass\n",
     "match = 1\nmatch (v0 := match):\n    case [v1, *v2] | {'k': v1, **v2}: pass\n    case _: pass\n"),
    ("class A:\n    def f(self):\n        self.__x = [i for i in ()]\n        global g\n        g = self.__x\n",
     "class v0:\n    def v1(v2):\n        v2.__v3 = [v4 for v4 in ()]\n        global v5\n        v5 = v2.__v3\n"),
    ("class A:\n    __slots__ = ('x', 'y')\n    def f(self):\n        self.x = getattr(self, 'z')\nz = 1\n",
     "class v0:\n    __slots__ = ('x', 'y')\n    def v1(v2):\n        v2.x = getattr(v2, 'z')\nz = 1\n"),
    # New names that the file has already.
    ("import v0\ndef v1(v3): return v3\n", "import v0\ndef v1(v2): return v2\n"),
    ("@decorate\ndef f(x: int = 1, /) -> 'x': return lambda y: (x, y)\n",
     "@decorate\ndef v0(v1: int = 1, /) -> 'x': return lambda v2: (v1, v2)\n"),
    ("try: pass\nexcept E as e: print(e)\nwith open(p) as q, r as (s, t): q, s, t\n",
     "try: pass\nexcept E as v0: print(v0)\nwith open(p) as v1, r as (v2, v3): v1, v2, v3\n"),
])
def test_rename_identifiers(source: str, code: str) -> None:
    assert apply(source, "rename_identifiers") == code
    assert apply(code, "rename_identifiers") == code


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the grammar of Python 3.12")
def test_type_parameters_and_nested_quotes() -> None:
    assert apply("def f[T](x: T) -> T: return x\ntype A[T] = list[T]\n", "rename_identifiers") == (
        "def v0[v1](v2: v1) -> v1: return v2\ntype v3[v1] = list[v1]\n")
    assert apply("a = {}\nb = 1\nf'{a['a']} {b = }'\n", "rename_identifiers") == "v0 = {}\nb = 1\nf'{v0['a']} {b = }'\n"


PROGRAM = dedent('''
    import collections, dataclasses, enum
    from functools import partial, reduce

    class Kind(enum.Enum):
        plain = 1
        coded = 2

    @dataclasses.dataclass
    class Point:
        x: int
        y: int = 2
        def moved(self, *, by: int = 1, **more) -> "Point":
            return dataclasses.replace(self, x=self.x + by)

    class Stack:
        limit = 3
        __slots__ = ("items",)
        def __init__(self, items=()):
            self.items = list(items)
        def append(self, item):
            if len(self.items) < self.limit:
                self.items.append(item)
            return self
        @property
        def top(self):
            return self.items[-1] if self.items else None
        def __iter__(self):
            yield from self.items

    class Fault(ValueError):
        def __init__(self, message, place):
            super().__init__(message)
            self.place = place

    Pair = collections.namedtuple("Pair", "left right")
    total = 0

    def count(words: list[str], start=0, key=None) -> dict:
        global total
        found = {}
        def note(word):
            nonlocal start
            start += 1
            found[word] = found.get(word, 0) + 1
        for word in sorted(words, key=key or (lambda word: word)):
            note(word=word)
            total += 1
        return {"found": found, "start": start}

    def walk(node):
        match node:
            case Point(x=0, y=height): return f"on the axis at {height}"
            case [first, *rest] if (size := len(rest)) > 1: return f"{first!r:>{size}}|{rest}"
            case {"name": name, **others}: return name, others
            case _: return None

    point = Point(x=1).moved(by=2)
    stack = Stack(items=[1])
    stack.append(2).append(3).append(4)
    numbers = []
    numbers.append(point.x)
    try:
        raise Fault("bad", place=3)
    except Fault as fault:
        print(fault, fault.place, fault.args)
    print(count("a b a".split(), key=str.lower), total, point.x, point.y, list(stack), stack.top)
    print(numbers, sum(item for item in stack))
    print(walk(Point(0, 5)), walk([1, 2, 3]), walk({"name": 1, "b": 2}), walk(7))
    print(Pair(left=1, right=2).left, Kind.coded.value, Kind["plain"].value, f"{total=}")
    print(reduce(lambda left, right: left + right, [1, 2]), partial(count, key=len)(["x"]))
    print(getattr(stack, "limit"), [i * j for i in (1, 2) for j in (3,)])
''')


def test_a_renamed_program_does_what_it_did() -> None:
    def output(source: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as written:
            exec(compile(source, "program", "exec"), {"__name__": "__main__"})
        return written.getvalue()

    expected = output(PROGRAM)
    for names in (["rename_identifiers"], ["strip_comments", "rename_identifiers"]):
        code = apply(PROGRAM, *names)
        assert isinstance(code, str) and code != PROGRAM
        assert output(code) == expected
    for gone in ("words", "found", "note", "node", "height", "others", "moved", "Stack", "stack", "fault"):
        assert gone not in {token.string for token in _names(code)}


def _names(source: str) -> list[tokenize.TokenInfo]:
    return [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.NAME]


def test_random_names_are_each_their_own() -> None:
    source = "def f(a):\n    b = a + a\n    return f(b) + len(a)\n"
    code = apply(source, "rename_identifiers_randomly")
    new = [token.string for token in _names(code) if token.string.startswith("v")]
    assert sorted(new) == sorted(f"v{number}" for number in range(8)) and new != sorted(new)
    assert _shape(parsed(source)) == _shape(parsed(code))
    assert apply(source, "rename_identifiers_randomly") == code
    other = transforms.transformed(source, "python", [transforms.Step("rename_identifiers_randomly", seed=1)])
    assert other != code


# ---- Python: words, lines ----------------------------------------------------------------------


def test_pseudocode() -> None:
    source = dedent('''
        def mean(xs, *args):  # of numbers
            """Doc."""
            if not xs == []:

                return sum(xs) / -len(xs)
            x += [1,
                  2]
            f"{x:>{2}}"; y: int = x ** 2
    ''')
    assert apply(source, "pseudocode") == dedent('''
        define mean ( xs , * args ) : # of numbers
            """Doc."""
            if not xs is equal to [ ] :
                give back sum ( xs ) divided by minus len ( xs )
            x increased by [ 1 , 2 ]
            f"{x:>{2}}" ; y : int becomes x to the power of 2
    ''')


def test_lines() -> None:
    text = "".join(f"line {number}\n" for number in range(20))
    one, other = (transforms.shuffle_lines(text, seed) for seed in (0, 1))
    assert sorted(one.split("\n")) == sorted(text.split("\n")) and one.endswith("\n") and len({text, one, other}) == 3
    assert transforms.shuffle_lines(one, 0) == one
    orders = map("\n".join, itertools.permutations(["b\r", "", "a"]))
    assert transforms.shuffle_lines("b\r\n\na", 0).removesuffix("\n") in orders
    assert apply("if x:\n\t  y\n\f\vz\n\n  a b\n", "flatten_indentation", language=None) == "if x:\ny\nz\n\na b\n"


# ---- Any source --------------------------------------------------------------------------------


ODD = ["(" * 3000 + ")" * 3000, "-" * 20_000 + "1", "x = " + "1+" * 20_000 + "1", "a" + ".a" * 20_000, "\0", "x\0y",
       "x = '" + "a" * 1_000_000 + "'\n", "# " + "c" * 1_000_000, "if x:\n\ty\n        z\n", "if x:\n        y\n\tz\n",
       "\f\f\fx = 1\f\n\f# a\n", "x = 1\r\r\ny = 2\r", "f'{", "f'{x!r:{y}}{{}}'", "f'''{x\n+ 1:{y}}'''",
       "lambda: (yield)", "return", "nonlocal x", "x = \\", "\\\n\\\n", "\ufeff", "\ufeff\ufeffx", "x = \u2118\n",
       "def f(a, a): pass", "𝐱 = x = 1", "x·y = 1", "async def f():\n  async for x in y: await z\n",
       "def f[T: int](x: T): pass\n", "type X = int\n", "match x:\n  case a.b | {'k': c}: pass\n", "print 'two'\n",
       "x = 0x" + "f" * 5000 + "\n", "x = " + "9" * 5000 + "\n", "    x = 1\n",
       "if 1:\n" + "".join(" " * depth + "if 1:\n" for depth in range(1, 99)) + " " * 99 + "x = 1",
       "'\\N{DIGIT ONE}'", "b'\\xff'", "'\\ud800'", "for x in y: # c\n  pass\nelse: # d\n  pass", 
       "@a # b\ndef c(): # d\n  '''e''' # f\n",
       "x = [#\n]#", "x;#\n", ";", "#",
       "class A:\n  'a'; 'b'; 'c'\n", "def f():\n  'a' \\\n  'b'\n", "def f():\n  'a'; \\\n  x\n",
       "('a'\n # b\n 'c')\n", "if x: pass # a \\\n# b\ny\n", "d = {**a, 'b': 1}\n", "print(*a, **b)\n",
       "x: int\n", "(x := 1)\n", "del x, y[0]\n"]
PIECES = st.sampled_from([
    "x", "self", "f", "y", "(", ")", "[", "]", "{", "}", ":", ";", ",", "=", "==", ":=", "*", "**", "#c", "# d\\",
    "\n", "\n  ", "\n\t", "\r\n", "\r", "\f", "\\\n", " ", "'a'", '"""b\n# c"""', "f'{x}'", "f'{x=}{{'",
    'rf"{x!r:{y}}"', "def f(x):", "class A:", "return", "if x:", "match x:", "case y:", "lambda x:", "import x", "@",
    "->", "global x", "\0", "é", "1", "..."])


def _never_raises(source: str) -> None:
    for name in OF_PYTHON:
        result = apply(source, name)
        if isinstance(result, Lost):
            assert result.reason.endswith((f"by {name}", f"by {name} as python"))
        elif name in AGAIN_THE_SAME:
            assert apply(result, name) == result, name
        if isinstance(result, str) and name in ("strip_comments", "comments_only", "rename_identifiers",
                                                "rename_identifiers_randomly"):
            parsed(result)


@pytest.mark.parametrize("source", ODD, ids=range(len(ODD)))
def test_odd_sources(source: str) -> None:
    _never_raises(source)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.lists(PIECES, max_size=14).map("".join))
def test_made_up_sources(source: str) -> None:
    _never_raises(source)


STATEMENTS = st.recursive(
    st.sampled_from(["x = y", "y: int = x  # c", "'text'", "'''two\n# lines'''", "# note\npass",
                     "x = (1,  # one\n  2)", "f'{x!r:>{y}}'", "self.a = x",
                     "print(x, end=y)", "f(x=1)",
                     "z = [x for x in y]", "x = 1 \\\n  + y"]),
    lambda inner: st.builds(
        lambda head, parts: head + "\n" + textwrap.indent("\n".join(parts), "    "),
        st.sampled_from(["class A:", "class B(A):  # b", "def f(x, self=1):", "async def g(y): # g", "if x:",
                         "for y in x:", "with x as y:", "while y: # w"]),
        st.lists(inner, min_size=1, max_size=3)), max_leaves=10)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.lists(STATEMENTS, min_size=1, max_size=3).map("\n".join))
def test_made_up_files(source: str) -> None:
    _check_file(source)


def _shape(tree: ast.AST) -> list[str]:
    return [type(node).__name__ for node in ast.walk(tree)]


def _identifiers(tree: ast.AST) -> list[str]:
    """All names of a tree, in order."""
    found: list[str] = []
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if field in ("id", "attr", "arg", "name", "asname", "rest", "module") and isinstance(value, str):
                found.append(value)
            elif field in ("names", "kwd_attrs") and isinstance(value, list):
                found += [each for each in value if isinstance(each, str)]
    return found


def _without_docstrings(tree: ast.Module) -> str:
    """What strip_comments should leave: bodies without the strings at their beginning."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            rest = list(itertools.dropwhile(lambda each: isinstance(each, ast.Expr) and isinstance(
                each.value, ast.Constant) and isinstance(each.value.value, str), node.body))
            node.body = rest or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


def _check_file(source: str) -> None:
    """The promises of all transforms of Python, told in another way than by their own code."""
    before = parsed(source)
    for name in OF_PYTHON:
        result = apply(source, name)
        if isinstance(result, Lost):
            assert result.reason == f"left empty by {name}"
            continue
        if name in AGAIN_THE_SAME:
            assert apply(result, name) == result
        if name == "strip_comments":
            assert ast.dump(parsed(result)) == _without_docstrings(parsed(source))
            assert not any(token.type == tokenize.COMMENT
                           for token in tokenize.generate_tokens(io.StringIO(result).readline))
        if name == "comments_only":
            assert all(line.startswith("#") for line in result.splitlines())
        if name.startswith("rename"):
            after = parsed(result)
            assert _shape(after) == _shape(before)
            old, new = _identifiers(before), _identifiers(after)
            constants = [[node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
                         for tree in (before, after)]
            assert constants[0] == constants[1]
            changed = {one for one, other in zip(old, new, strict=True) if one != other}
            assert not changed & {*dir(builtins), *keyword.kwlist}
            imports = (node for node in ast.walk(before) if isinstance(node, ast.Import | ast.ImportFrom))
            assert not changed & {alias.asname or alias.name for node in imports for alias in node.names}
        if name == "rename_identifiers":
            pairs = set(zip(old, new, strict=True))
            assert len(pairs) == len(set(old)) == len(set(new))
        if name == "rename_identifiers_randomly":
            seen = collections.Counter(other for one, other in zip(old, new, strict=True) if one != other)
            # A name in a list of `global x` stands in the tree once, too.
            assert all(count == 1 for count in seen.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_files_of_the_standard_library(part: int) -> None:
    library = pathlib.Path(os.__file__).parent
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    checked = 0
    for file in files[part :: max(1, len(files) // 250) * 4]:
        try:
            with tokenize.open(file) as stream:
                source = stream.read()
            compile(parsed(source), "file", "exec")
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        _check_file(source)
        checked += 1
    assert checked >= 50


def test_what_python_holds_is_transformed() -> None:
    transformed = sources.documents({"python": "code", "transform": ["strip_comments", "rename_identifiers"]}, "test")
    plain = sources.documents({"python": "code"}, "test")
    for code, before in itertools.islice(zip(transformed, plain, strict=True), 5):
        assert _shape(parsed(code)) == _shape(parsed(apply(before, "strip_comments")))
        assert "v0" in code and apply(code, "comments_only") == Lost("left empty by comments_only")


def test_import_is_light() -> None:
    program = "import sys, tasks; print({'tree_sitter', 'tensorflow', 'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
