"""Verdicts of the sandbox against plain `exec` of a program and its tests, on pairs of our own, right and wrong."""

import json
import subprocess
import sys

import pytest

from tasks.programs import sandbox

pytestmark = pytest.mark.skipif(not all(sandbox.guarantees().values()), reason="this host lacks namespaces")

PLAIN_EXEC = """
import contextlib, io, json, sys
found = []
for source, test in json.load(sys.stdin):
    names = {"__name__": "program"}
    sys.setrecursionlimit(1000)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            exec(source, names)
            exec(test, names)
            found.append(True)
        except BaseException:
            found.append(False)
print(json.dumps(found))
"""
POINT = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\n    y: int = 0\n    def up(self): return Point(self.x, self.y + 1)\n"
COLOR = "import enum\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\n"
NUMBERS = "def f(n=None):\n    i = 0\n    while n is None or i < n:\n        yield i\n        i += 1\n"
IMPORTS = ("import collections, datetime, decimal, fractions, array, types, pathlib, uuid, ipaddress, math, itertools, "
           "functools, enum, asyncio, operator, copy")

# Programs, of which most return what is given; each expression returned, and asserts on it that hold and do not.
RETURNED = {
    "collections.Counter({'a': 1, 'b': 0})": [
        "f() == collections.Counter({'a': 1})", "f() == {'a': 1}", "f() == {'a': 1, 'b': 0}", "f() == collections.Counter(b=1)",
        "f()['z'] == 0", "[c for c in [f()] if c['z'] == 0] != []", "f() <= collections.Counter('aa')",
        "str(f()) == \"Counter({'a': 1, 'b': 0})\"", "repr([f()]) == \"[Counter({'a': 1, 'b': 0})]\"",
        "isinstance(f(), collections.Counter)", "type(f()) is dict", "f().most_common(1) == [('a', 1)]"],
    "[collections.Counter(a=1, b=0)]": ["f() == [collections.Counter(a=1)]", "f() == [{'a': 1}]"],
    "{'k': collections.Counter(a=0)}": ["f() == {'k': collections.Counter()}", "f() == {'k': {}}"],
    "collections.OrderedDict([('a', 1), ('b', 2)])": [
        "f() == collections.OrderedDict([('b', 2), ('a', 1)])", "f() == collections.OrderedDict([('a', 1), ('b', 2)])",
        "f() == {'b': 2, 'a': 1}", "[f()] == [collections.OrderedDict([('b', 2), ('a', 1)])]",
        "list(f().items()) == [('a', 1), ('b', 2)]", "f().keys() == {'a', 'b'}"],
    "collections.defaultdict(int, a=1)": [
        "f() == {'a': 1}", "(d := f()) and d['z'] == 0", "f() == collections.defaultdict(list, a=1)", "f() == {'a': 1, 'b': 0}",
        "str(f()) == \"defaultdict(<class 'int'>, {'a': 1})\""],
    "collections.deque([1, 2, 3], maxlen=2)": [
        "f() == collections.deque([2, 3])", "f() == [2, 3]", "list(f()) == [2, 3]", "[d.maxlen for d in [f()]] == [2]"],
    "collections.ChainMap({'a': 1}, {'b': 2})": ["f() == {'a': 1, 'b': 2}", "f() == {'a': 1}", "f().keys() == {'a', 'b'}",
                                                 "f() == collections.ChainMap({'b': 2}, {'a': 1})"],
    "collections.UserDict(a=1)": ["f() == {'a': 1}", "f() == {'a': 2}", "f() == collections.UserDict(a=1)",
                                  "isinstance(f(), dict)"],
    "collections.UserList([1, 2])": ["f() == [1, 2]", "[1, 2] == f()", "f() == (1, 2)", "len(f()) == 2"],
    "collections.UserString('ab')": ["f() == 'ab'", "f() == 'ac'", "'ab' == f()"],
    "collections.namedtuple('T', 'a b')(1, 2)": ["f() == (1, 2)", "f() == [1, 2]", "f().a == 1", "str(f()) == 'T(a=1, b=2)'",
                                                 "isinstance(f(), tuple)", "type(f()) is tuple", "f()[1] == 2"],
    "types.MappingProxyType({'a': 1})": ["f() == {'a': 1}", "f() == {'a': 2}", "isinstance(f(), dict)"],
    "types.SimpleNamespace(a=1)": ["f() == types.SimpleNamespace(a=1)", "f() == types.SimpleNamespace(a=2)", "f().a == 1"],
    "array.array('i', [1, 2])": ["f() == array.array('i', [1, 2])", "f() == array.array('f', [1, 2])", "f() == [1, 2]",
                                 "f().tolist() == [1, 2]", "f() == array.array('i', [2, 1])"],
    "memoryview(b'ab')": ["f() == b'ab'", "f() == bytearray(b'ab')", "f() == b'ac'", "bytes(f()) == b'ab'"],
    "bytearray(b'ab')": ["f() == b'ab'", "f() == 'ab'", "isinstance(f(), bytes)"],
    "datetime.date(2024, 2, 29)": ["f() == datetime.date(2024, 2, 29)", "f() == datetime.date(2024, 3, 1)",
                                   "f() < datetime.date(2025, 1, 1)", "f() == datetime.datetime(2024, 2, 29)",
                                   "str(f()) == '2024-02-29'", "f() == '2024-02-29'", "f().isoformat() == '2024-02-29'"],
    "datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)": [
        "f() == datetime.datetime(2024, 1, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))",
        "f() == datetime.datetime(2024, 1, 1)", "f() < datetime.datetime(2024, 1, 2)"],
    "datetime.timedelta(hours=25)": ["f() == datetime.timedelta(days=1, hours=1)", "f() > datetime.timedelta(days=2)",
                                     "f().total_seconds() == 90000"],
    "datetime.time(1, 2)": ["f() == datetime.time(1, 2)", "f() == datetime.time(1, 3)"],
    "decimal.Decimal('NaN')": ["f() == f()", "f() != decimal.Decimal('NaN')", "f().is_nan()"],
    "decimal.Decimal('1.10')": ["f() == decimal.Decimal('1.1')", "f() == 1.1", "str(f()) == '1.10'", "f() > 1"],
    "fractions.Fraction(2, 4)": ["f() == 0.5", "f() == fractions.Fraction(1, 2)", "str(f()) == '1/2'", "f() == 1"],
    "float('nan')": ["f() == f()", "f() != f()", "math.isnan(f())", "[f()] == [math.nan]", "f() is math.nan"],
    "[math.nan]": ["f() == [math.nan]", "f() == f()", "f() == [float('nan')]", "f()[0] == math.nan", "math.nan in f()"],
    "-0.0": ["f() == 0", "str(f()) == '0.0'", "math.copysign(1, f()) == -1"],
    "complex(1, -2)": ["f() == 1 - 2j", "f() == 1", "f().imag == -2", "abs(f()) > 2"],
    "1e400": ["f() == math.inf", "f() > 10 ** 400"],
    "True": ["f() == 1", "f() is True", "f() == 'True'", "isinstance(f(), int)", "type(f()) is int"],
    "10 ** 30": ["f() == 10 ** 30", "f() == 1e30", "f() > 1e29", "len(str(f())) == 31"],
    "None": ["f() is None", "f() == False", "not f()"],
    "...": ["f() is ...", "f() is None"],
    "NotImplemented": ["f() is NotImplemented"],
    "int": ["f() is int", "f() == int", "f()('3') == 3", "f() is float"],
    "ValueError('no')": ["isinstance(f(), ValueError)", "isinstance(f(), KeyError)", "str(f()) == 'no'", "f().args == ('no',)"],
    "slice(1, 2)": ["f() == slice(1, 2)", "[1, 2, 3][f()] == [2]", "f() == slice(1, 3)"],
    "range(0, 5, 2)": ["f() == range(0, 6, 2)", "f() == [0, 2, 4]", "list(f()) == [0, 2, 4]", "4 in f()", "3 in f()"],
    "{3: 4}.keys()": ["f() == {3}", "f() == [3]", "list(f()) == [3]", "f() & {3, 4} == {3}"],
    "{3: 4}.items()": ["f() == {(3, 4)}", "f() == [(3, 4)]", "dict(f()) == {3: 4}"],
    "{3: 4}.values()": ["f() == [4]", "list(f()) == [4]", "sum(f()) == 4", "f() == f()", "len(f()) == 1", "4 in f()"],
    "{3: [4]}": ["f() == {3.0: [4]}", "f() == {3: (4,)}", "f() is f()"],
    "{'b', 'a', 'c', 'z'}": ["list(f()) == sorted(f())", "f() == {'a', 'b', 'c', 'z'}", "f() == frozenset('abcz')", "f() > {'a'}"],
    "frozenset([1])": ["f() == {1}", "{f(): 2} == {frozenset([1]): 2}", "isinstance(f(), set)"],
    "(1, [2, (3,)])": ["f() == (1, [2, (3,)])", "f() == [1, [2, (3,)]]", "f() == (1, [2, [3]])", "f() < (1, [3])"],
    "pathlib.Path('a') / 'b'": ["f() == pathlib.Path('a/b')", "str(f()) == 'a/b'", "f() == 'a/b'", "f().name == 'b'"],
    "uuid.UUID(int=5)": ["f() == uuid.UUID(int=5)", "f() == 5", "f().int == 5"],
    "ipaddress.ip_address('10.0.0.1')": ["f() == ipaddress.ip_address('10.0.0.1')", "str(f()) == '10.0.0.1'", "f() == '10.0.0.1'"],
    "enum.IntEnum('E', 'A B').B": ["f() == 2", "f() == 1", "f() + 1 == 3", "f().name == 'B'"],
    "type('S', (str,), {})('a')": ["f() == 'a'", "f() == 'b'", "type(f()) is str", "isinstance(f(), str)", "f().upper() == 'A'"],
    "type('L', (list,), {})([1])": ["f() == [1]", "type(f()) == list", "f() == [2]"],
    "'a\\ud800'": ["f() == 'a\\ud800'", "f() == 'a'", "len(f()) == 2"],
    "iter([1, 2, 3])": ["next(f()) == 1", "list(f()) == [1, 2, 3]", "f() == [1, 2, 3]", "sum(f()) == 6", "2 in f()", "4 in f()",
                        "tuple(zip(f(), 'ab')) == ((1, 'a'), (2, 'b'))", "list(itertools.islice(f(), 2)) == [1, 2]"],
    "map(str, [1, 2])": ["list(f()) == ['1', '2']", "isinstance(f(), map)", "isinstance(f(), filter)"],
    "functools.reduce": ["f()(operator.add, [1, 2]) == 3", "callable(f())"],
    "lambda x: x * 2": ["f()(2) == 4", "list(map(f(), [1, 2])) == [2, 4]", "callable(f())", "sorted([1, -2], key=f()) == [-2, 1]",
                        "functools.reduce(lambda a, b: a + f()(b), [1, 2]) == 5", "isinstance(f(), types.FunctionType)"],
}
CASES = [(f"{IMPORTS}\ndef f(): return {value}", f"{IMPORTS}\nassert {test}")
         for value, tests in RETURNED.items() for test in tests]
CASES += [(source, test if "assert" in test else f"import itertools, types\nassert {test}") for source, tests in {
    # Generators: as far as they are asked, and no further.
    NUMBERS: ["next(f()) == 0", "list(itertools.islice(f(), 5)) == [0, 1, 2, 3, 4]", "list(f(3)) == [0, 1, 2]", "f(3) == [0, 1, 2]",
              "g = f()\nassert next(g) == 0\nassert next(g) == 1\nassert next(g) == 3", "sum(f(2000)) == 1999000",
              "g = f()\nassert next(g) == 0 and next(g) == 1", "isinstance(f(), types.GeneratorType)", "list(zip(f(), 'ab')) == [(0, 'a'), (1, 'b')]",
              "[x for x in f(300)] == list(range(300))", "assert (g := f(2)) and [next(g), next(g), next(g, None)] == [0, 1, None]",
              "list(f(2)) == [0, 1, 2]", "any(x == 150 for x in f())", "len(list(f(2500))) == 2500", "f(1) is f(1)"],
    "def f():\n    yield 1\n    raise ValueError": ["next(f()) == 1", "list(f()) == [1]", "next(iter(f()), 3) == 1"],
    "def f():\n    yield from range(150)\n    raise ValueError": [
        "list(itertools.islice(f(), 150)) == list(range(150))", "list(f()) == list(range(150))", "sum(1 for _ in f()) == 150"],
    # Objects of the program's own.
    POINT: ["Point(1) == Point(1, 0)", "Point(1) == Point(2)", "Point(1).up() == Point(1, 1)", "[Point(1)] == [Point(1), Point(2)]",
            "[Point(1), None, 'a'] == [Point(1).up(), None, 'a']", "{'a': Point(1)} == {'a': Point(1)}", "str(Point(1)) == 'Point(x=1, y=0)'",
            "[p.x for p in [Point(1), Point(2)]] == [1, 2]", "Point(1) == (1, 0)", "isinstance(Point(1), Point)", "isinstance(3, Point)",
            "type(Point(1)) is Point", "type(Point(1)).__name__ == 'Point'", "Point(1) is Point(1)", "p = Point(3)\nassert p is p and p.x == 3",
            "hasattr(Point(1), 'x')", "hasattr(Point(1), 'z')", "isinstance(Point(1), (int, Point))", "Point(1) in [Point(2), Point(1)]",
            "f'{Point(1)}' == 'Point(x=1, y=0)'", "sorted([Point(2), Point(1)], key=lambda p: p.x)[0] == Point(1)",
            "max([Point(2), Point(1)], key=lambda p: p.x).x == 2", "Point(1) > Point(0)", "Point(1) == Point", "repr([Point(1)]) == '[Point(x=1, y=0)]'",
            "[p.up().y for p in (Point(1), Point(2))] == [1, 1]", "getattr(Point(1), 'z', 5) == 5", "Point(1) != Point(1)", "{Point(1)}"],
    COLOR: ["Color(1) == Color.RED", "Color(1) is Color.RED", "Color(2) is Color.RED", "Color.RED == 1", "Color.RED.value == 1", "list(Color) == [Color.RED, Color.BLUE]",
            "{Color.RED: 1} == {Color(1): 1}", "[c.name for c in Color] == ['RED', 'BLUE']", "{Color.RED, Color.BLUE} == set(Color)", "len(Color) == 2",
            "str(Color.RED) == 'Color.RED'", "Color.RED in [Color.BLUE]"],
    "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x); return self\n"
    "    def __len__(self): return len(self.items)\n    def __iter__(self): return iter(self.items)\n"
    "    def __contains__(self, x): return x in self.items\n    def __getitem__(self, i): return self.items[i]\n"
    "    def __lt__(self, other): return len(self) < len(other)\n    def __add__(self, other): return self.items + other.items\ndef f(): return Stack().push(3)": [
        "len(f()) == 1", "list(f()) == [3]", "3 in f()", "4 in f()", "f()[0] == 3", "bool(Stack())", "not Stack()", "s = Stack()\ns.push(1)\nassert len(s) == 1 and s[0] == 1",
        "f() + f() == [3, 3]", "f() < f()", "f() > Stack()", "[f() < s for s in [Stack()]] == [False]", "sorted([f(), Stack()])[0].items == []", "f() < 3", "min([Stack(), f()]).items == []", "[x for s in [f()] for x in s] == [3]", "f() == f()"],
    # The same object, or another.
    "kept = []\ndef f(x): return x\ndef g(x): return list(x)": [
        "assert f(kept) is kept", "assert g(kept) is kept", "assert g(kept) is not kept", "x = float('nan')\nassert f(x) is x and [x] == [f(x)]",
        "x = [2, 1]\ny = f(x)\ny.sort()\nassert x == [1, 2]", "x = [2, 1]\nassert g(x) == x and g(x) is not x", "assert f(None) is None"],
    "import functools\n@functools.lru_cache\ndef f(x): return object()": ["f(1) is f(1)", "f(1) is f(2)", "f(1) == f(1)", "f(1) == f(2)"],
    # Recursion up to Python's limit, and values that nest deeply.
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)": ["f(900) == 900", "f(985) == 985", "f(1100) == 1100"],
    "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)": ["f(3000) == 3000", "f(6000) == 6000"],
    "def f(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x\ndef depth(x):\n    n = 0\n    while x: x, n = x[0], n + 1\n    return n": ["depth(f(700)) == 700", "f(600) == f(600)", "f(300) == f(299)"],
    # What is printed and read.
    "def f():\n    print('x' * 3_000_000)\n    return 1": ["f() == 1", "f() == 2"],
    "import sys\nfor _ in range(50): sys.stdout.write('line\\n' * 50_000)\nsys.stderr.write('e' * 2_000_000)\nsys.stdout.flush()\ndef f(): return 1": ["f() == 1"],
    "import warnings\nwarnings.warn('old')\ndef f(): return '\\d'": ["f() == '\\\\d'"],
    "def f(): return __name__\nif __name__ == '__main__': raise SystemExit": ["f() == 'program'"],
    # Tests that prepare, change and import.
    "def f(x, seen={}):\n    seen[x] = len(seen)\n    return seen[x]": ["assert f(1) == 0\nassert f(2) == 1\nassert f(2) == 2", "assert f(1) == 0\nassert f(1) == 0"],
    "counter = 0\ndef f():\n    global counter\n    counter += 1\n    return counter": ["assert f() == 1 and f() == 2\nassert counter == 2", "counter = 5\nassert f() == 6", "assert f() + f() == 3"],
    "def f(x): return sorted(x, key=lambda p: p[0])": ["f([(1, 'b'), (0, 'c'), (1, 'a')]) == [(0, 'c'), (1, 'b'), (1, 'a')]", "f([(1, 'b'), (1, 'a')]) == [(1, 'a'), (1, 'b')]"],
    "async def f(x): return x + 1": ["import asyncio\nassert asyncio.run(f(1)) == 2", "import asyncio\nassert asyncio.run(f(1)) == 3", "assert f(1) == 2"],
    "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x": [
        "try:\n    f(-1)\nexcept ValueError:\n    caught = True\nassert caught", "caught = False\ntry:\n    f(1)\nexcept ValueError:\n    caught = True\nassert caught", "assert f(-1)"],
    "def f(x, y): return x // y": ["all(f(x, y) == x // y for x in range(3) for y in (1, 2))", "[f(4, y) for y in (1, 2)] == [4, 2]", "f(1, 0) == 1",
                                  "list(map(f, [4, 6], [2, 3])) == [2, 2]", "(lambda a: f(a, a))(3) == 1", "f(*[4, 2]) == 2", "f(**{'x': 4, 'y': 2}) == 2", "f(4, 2) is 2",
                                  "f(4, 2) == 2.0", "f(4, 2) == '2'", "f(4, 2) == 2 if f(1, 1) else False", "not f(0, 1)", "1 < f(4, 2) < 3", "f'{f(4, 2)}' == '2'"],
    "def f(): return [1, 2.5, 'a', None, {'k': (1,)}]": ["assert f() == [1, 2.5, 'a', None, {'k': (1,)}]", "assert f()[4]['k'] == [1]", "a, *b = f()\nassert a == 1 and b[0] == 2.5"],
    "def f(): return ": ["f()"], "x = 1": ["f() == 1"],
}.items() for test in tests]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], tuple[bool, sandbox.Outcome]]:
    """What plain `exec` says, and the sandbox; conditions that hold for one program are judged one after the other."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN_EXEC], input=json.dumps(CASES), text=True,
                          capture_output=True, check=True, env={"PYTHONHASHSEED": "0"})
    wanted = dict(zip(CASES, json.loads(done.stdout), strict=True))
    together: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (source, test), holds in wanted.items():
        alone = test.count("\n") > 1 or test.startswith("assert") or not holds
        together.setdefault((source, test if alone else ""), []).append((source, test))
    outcomes = sandbox.run_programs(
        [sandbox.Program(cases[0][0], tuple(test for _, test in cases)) for cases in together.values()])
    return {case: (wanted[case], outcome)
            for cases, outcome in zip(together.values(), outcomes, strict=True) for case in cases}


@pytest.mark.parametrize("case", CASES, ids=lambda case: " - ".join(text.splitlines()[-1] for text in case)[:100])
def test_verdict_is_that_of_plain_exec(verdicts, case):
    wanted, outcome = verdicts[case]
    assert outcome.passed == wanted, outcome


def test_there_are_right_and_wrong_ones(verdicts):
    passed = sum(wanted for wanted, _ in verdicts.values())
    assert 100 < passed < len(CASES) - 100
