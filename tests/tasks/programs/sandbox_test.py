"""Untrusted programs: what they try, what becomes of them, and that nothing else is touched."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import pytest

from tasks.programs import calls, sandbox
from tasks.programs.sandbox import Limits, Program, Verdict, run_programs

ROOT = pathlib.Path(__file__).resolve().parents[3]
SHORT = Limits(cpu_seconds=1, wall_seconds=2, memory_bytes=256 << 20)
TESTS = ("assert double(2) == 4", "assert double(-3) == -6")
GOOD = Program("def double(x):\n    return 2 * x\n", TESTS)
MARK = "codellm-attack"

pytestmark = pytest.mark.skipif(not all(sandbox.guarantees().values()), reason="this host lacks namespaces")

# Name, verdicts, program: it would satisfy TESTS if what it tries succeeded, for those that define no `double` get a
# right one appended. {secret} is a file outside, {port} listens on this host.
ATTACKS = [
    ("endless loop", "timed out", "while True: pass"),
    ("sleep", "timed out", "import time\ntime.sleep(1000)"),
    ("stopped", "timed out", "import os, time\nos.kill(0, 19)\ntime.sleep(1000)"),
    ("fork bomb", "failed timed out", "import os\nwhile True: os.fork()"),
    ("patient fork bomb", "timed out killed", """
        import os
        while True:
            try: os.fork()
            except OSError: pass"""),
    ("memory bomb", "out of memory", "kept = []\nwhile True: kept.append(bytearray(1 << 20))"),
    ("one huge object", "out of memory", "kept = bytearray(1 << 40)"),
    ("flood of stdout", "timed out", "while True: print('x' * 1000)"),
    ("flood of stderr", "timed out", "import os\nwhile True: os.write(2, b'x' * 1000)"),
    ("huge value", "output flood", "def double(x): return 'x' * 50_000_000"),
    ("huge file", "failed", "open('file', 'wb').write(bytes(1 << 25))"),
    ("many files", "failed", "for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))"),
    ("os._exit", "crashed", "import os\nos._exit(0)"),
    ("os._exit in a call", "crashed", "import os\ndef double(x): os._exit(0)"),
    ("sys.exit", "failed", "import sys\nsys.exit(0)"),
    ("SystemExit in a call", "failed", "def double(x): raise SystemExit(0)"),
    ("BaseException", "failed", "class Other(BaseException): pass\nraise Other"),
    ("KeyboardInterrupt", "failed", "raise KeyboardInterrupt"),
    ("exception that raises", "crashed", """
        class Other(BaseException):
            def __str__(self): raise self
        raise Other"""),
    ("syntax", "failed", "def double(x) return x"),
    ("null byte", "failed", "\0"),
    ("kills its parent", "failed", "import os, signal\nos.kill({pid}, 9)"),
    ("kills the group", "failed", "import os\nos.killpg(os.getpgid({pid}), 9)"),
    ("writes to the home", "failed", "open({home!r} + '/codellm-attack', 'w')"),
    ("writes to the library", "failed", "import os\nopen(os.path.dirname(os.__file__) + '/codellm-attack', 'w')"),
    ("writes to the system", "failed", "open('/codellm-attack', 'w')"),
    ("reads a secret", "failed", "print(open({secret!r}).read())"),
    ("overwrites a secret", "failed", "open({secret!r}, 'w')"),
    ("reads /proc", "failed", "open('/proc/1/environ', 'rb').read()"),
    ("mounts", "failed", """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        refused = [libc.umount2(b'/tmp', 2), libc.mount(None, b'/', None, 32, None), libc.unshare(0x10000000)]
        assert refused != [-1, -1, -1]
        """),
    ("ptrace", "failed", "import ctypes\nassert not ctypes.CDLL(None).ptrace(16, {pid}, None, None)"),
    ("network", "failed", "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"),
    ("abstract socket", "failed", "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + {abstract!r})"),
    ("starts a shell", "failed", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)"),
    ("shadows assert", "failed", """
        import builtins, operator
        builtins.AssertionError = AssertionError = SystemExit
        builtins.bool = operator.eq = lambda *arguments: True
        def double(x): return 5"""),
    ("shadows everything", "failed crashed", """
        import builtins
        for name in ('eval', 'exec', 'compile', 'bool', 'isinstance', 'map'):
            setattr(builtins, name, lambda *arguments: True)
        __builtins__ = None
        def double(x): return 5"""),
    ("always equal", "failed", """
        class Equal(int):
            def __eq__(self, other): return True
            __hash__ = None
        def double(x): return Equal(5)"""),
    ("always equal and no data", "failed", """
        class Equal:
            def __eq__(self, other): return True
        def double(x): return Equal()"""),
    ("always equal and says to be an int", "failed", """
        class Equal:
            __class__ = int
            def __eq__(self, other): return True
            __lt__ = __gt__ = __contains__ = __radd__ = __rsub__ = __eq__
            def __hash__(self): return hash(4)
        def double(x): return Equal()"""),
    ("always equal within data", "failed", """
        class Equal:
            def __eq__(self, other): return True
            def __hash__(self): return 4
        def double(x): return {{Equal(): Equal()}} if x == 2 else [Equal()]"""),
    ("an iterator of its own, endless", "failed", """
        import itertools
        def double(x): return itertools.repeat(4)"""),
    ("answers of objects that are none", "failed crashed", """
        import os
        for number in range(3, 64):
            try: os.write(number, b'\\0\\0\\0\\x26{{"value": ["object", 1e999, "int", true]}}' * 9)
            except OSError: pass"""),
    ("patches unittest", "failed", """
        import unittest, sys
        unittest.TestCase.assertEqual = lambda *arguments: None
        sys.modules['__main__'] = None
        def double(x): return 5"""),
    ("forged mark", "failed", """
        import os
        print('{{"verdict": "passed", "detail": "", "missing": null}}')
        for number in (1, 2): os.write(number, b'{{"verdict": "passed", "detail": "", "missing": null}}')
        def double(x): return 5"""),
    ("forged verdict", "output flood", """
        import os
        for number in range(3, 64):
            try: os.write(number, b'{{"verdict": "passed", "detail": "", "missing": null}}' * 9)
            except OSError: pass"""),
    ("forged answers", "crashed", """
        import os
        for number in range(3, 64):
            try: os.write(number, b'\\0\\0\\0\\x15{{"verdict": "passed"}}' * 9)
            except OSError: pass"""),
    ("answers of no known form", "crashed", """
        import os
        for number in range(3, 64):
            try: os.write(number, b'\\0\\0\\0\\x0b["nothing"]' * 9)
            except OSError: pass"""),
    ("forged values", "failed", """
        import os
        for number in range(3, 64):
            try: os.write(number, b'\\0\\0\\0\\x0c{{"value": 4}}' * 9)
            except OSError: pass"""),
    ("looks through frames", "failed", """
        import gc, sys
        def double(x):
            frame = sys._getframe()
            while frame:
                for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                    if 'double(2) == ' in repr(value)[:100_000]: return 2 * x
                frame = frame.f_back
            found = [o for o in gc.get_objects() if type(o) is dict and 'assert double' in repr(o.get('steps'))]
            return 2 * x if found else None"""),
    ("redefines the function", "failed", """
        import threading
        def double(x): return 2 * x
        def later():
            global double
            double = lambda x: 0
        later()"""),
    ("fork and return", "failed crashed", """
        import os, time
        def double(x):
            if os.fork() == 0: os._exit(0)
            time.sleep(0.05)
            return 0"""),
    ("child answers wrongly after the parent's end", "crashed failed", """
        import os
        if os.fork(): os._exit(0)
        def double(x): return 0"""),
    ("double fork", "failed", """
        import os, signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        raise RuntimeError"""),
    ("ignores signals", "timed out", """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass"""),
    ("deep recursion", "failed", "def double(x): return double(x)"),
    ("deeper recursion", "crashed out of memory timed out", """
        import sys
        sys.setrecursionlimit(10 ** 9)
        class Deep:
            def __repr__(self): return repr(self)
        repr(Deep())"""),
    ("value that holds itself", "failed", "def double(x):\n    x = []\n    x.append(x)\n    return x"),
    ("crash", "crashed", "import ctypes\nctypes.string_at(0)"),
    ("abort", "crashed killed", "import os\nos.abort()"),
    ("closes all descriptors", "crashed", "import os\nos.closerange(0, 1024)"),
    ("closes all and stays", "crashed", "import os, time\nos.closerange(0, 1024)\ntime.sleep(1000)"),
    ("asks for input", "failed", "input()"),
    ("terminal codes", "failed", "raise ValueError('\\x1b]0;title\\x07')"),
]
# Programs that try something and then really pass.
HARMLESS = [
    ("kills its parent, the groups and everything", """
        import os
        for call in (os.kill, os.killpg):
            for number in (os.getppid(), os.getpid(), os.getpgid(0), -1):
                try: call(number, 9)
                except OSError: pass
        def double(x): return 2 * x"""),
    ("replaces sys.stdout", "import sys\nsys.stdout = sys.stderr = sys.__stdout__ = None\ndef double(x): return 2 * x"),
    ("prints", "def double(x):\n    print('x' * 10_000)\n    return 2 * x"),
    ("thread left running", """
        import threading, time
        threading.Thread(target=time.sleep, args=(1000,)).start()
        def double(x): return 2 * x"""),
    ("endless __del__ and atexit", """
        import atexit
        class Endless:
            def __del__(self):
                while True: pass
        kept = Endless()
        @atexit.register
        def forever():
            while True: pass
        def double(x): return 2 * x"""),
    ("deletes its folder", "import os\nos.chdir('/')\ntry: os.rmdir('/tmp')\nexcept OSError: pass\n"
                           "def double(x): return 2 * x"),
    ("daemon left", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
                    "    os._exit(0)\ndef double(x): return 2 * x"),
    ("files and modules", """
        import dataclasses, decimal, tempfile, zoneinfo, sqlite3, os
        open(os.devnull, 'w').write('x')
        with tempfile.NamedTemporaryFile() as file: file.write(os.urandom(8))
        @dataclasses.dataclass
        class Number:
            value: "int"
        def double(x):
            assert dict(os.environ) == {} and __name__ == "program"
            return 2 * Number(x).value"""),
]


def left(pid: int) -> list[str]:
    """Command lines of the sandbox's processes that belong to a harness; retried, for ends take a moment."""
    for _ in range(100):
        lines = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines.append(path.read_bytes().decode())
            except OSError:
                continue
        found = [line for line in lines if f'"harness": {pid}' in line]
        if not found:
            return []
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes of all programs above by name, run together, a good program after each."""
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("kept")
    folder = tmp_path_factory.mktemp("temporary")
    abstract = f"codellm-{os.getpid()}"
    with (socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named,
          pytest.MonkeyPatch.context() as patch):
        named.bind(f"\0{abstract}")
        named.listen()
        patch.setattr(tempfile, "tempdir", str(folder))
        facts = {"secret": str(secret), "port": server.getsockname()[1], "pid": os.getpid(), "abstract": abstract,
                 "home": os.path.expanduser("~")}
        sources = {name: textwrap.dedent(source).format(**facts) for name, _, source in ATTACKS}
        sources = {name: source + ("" if "def double" in source else f"\n{GOOD.source}")
                   for name, source in sources.items()} | {name: textwrap.dedent(source) for name, source in HARMLESS}
        programs = [one for source in sources.values() for one in (Program(source, TESTS), GOOD)]
        found = run_programs(programs, workers=2, limits=SHORT)
    assert not left(os.getpid())
    assert not list(folder.iterdir())
    assert secret.read_text() == "kept"
    for place in (os.path.expanduser("~"), os.path.dirname(os.__file__), "/", "/tmp"):
        assert not os.path.exists(f"{place}/{MARK}")
    assert all(outcome.passed for outcome in found[1::2]), found[1::2]
    return dict(zip(sources, found[::2], strict=True))


@pytest.mark.parametrize(("name", "verdicts"), [(name, verdicts) for name, verdicts, _ in ATTACKS])
def test_attack_fails_and_nothing_else_does(outcomes, name, verdicts):
    outcome = outcomes[name]
    assert not outcome.passed
    assert outcome.verdict.value in verdicts, outcome
    assert outcome.detail and outcome.detail.isprintable()
    assert outcome.seconds < SHORT.wall_seconds + 3


@pytest.mark.parametrize("name", [name for name, _ in HARMLESS])
def test_what_really_passes_passes(outcomes, name):
    assert outcomes[name].passed, outcomes[name]
    assert not outcomes[name].detail


def test_details_tell_the_error(outcomes):
    assert outcomes["BaseException"].detail == "Other"
    assert outcomes["redefines the function"].detail == "AssertionError: assert double(2) == 4 (got 0)"
    assert outcomes["os._exit"].detail == "ended with exit status 0 before its tests did"
    assert "RecursionError" in outcomes["deep recursion"].detail
    assert outcomes["network"].detail.startswith("ConnectionRefusedError") or "Network" in outcomes["network"].detail
    assert "FileNotFoundError" in outcomes["reads a secret"].detail


def test_calls_are_those_of_the_kernels_own_tables():
    """Numbers of the list, against the headers that the kernel is compiled with."""
    for column, (path, pattern) in enumerate((
            ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
            ("/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"))):
        if not os.path.exists(path):
            pytest.skip("needs the headers of the kernel")
        numbers = {name: number for name, number in reversed(re.findall(pattern, pathlib.Path(path).read_text()))}
        numbers = {"newfstatat": numbers.get("fstatat", ""), **numbers}
        for entry in calls._ALLOWED.split(","):
            name, *listed = entry.split()
            if name != "fchmodat2":  # which is younger than many headers
                assert listed[column] == numbers.get(name, "-"), name


@pytest.mark.parametrize(("source", "test"), [
    ("def f(): return {3, 4}", "assert set(f()) == {4, 3} and len(f()) == 2"),
    ("def f(): yield from [1, 2]", "assert sorted(f()) == [1, 2] and f() != [1, 2]"),
    ("def f(): return 10 ** 5000", "assert f() == 10 ** 5000 and f() > 1.5"),
    ("def f(): return [1, 1.5, True, None, 'a\\ud800', b'b', 2j, (), {1: [2]}, frozenset({3}), range(3)]",
     "assert f() == [1, 1.5, True, None, 'a\\ud800', b'b', 2j, (), {1: [2]}, {3}, range(3)] and f()[0] == 1"),
    ("import collections\nT = collections.namedtuple('T', 'a b')\ndef f(): return T(1, 2)", "assert f() == (1, 2)"),
    ("import collections\ndef f(): return collections.Counter('aab')", "assert f() == {'a': 2, 'b': 1}"),
    ("import collections\ndef f(): return collections.OrderedDict(a=1)", "assert f() == {'a': 1}"),
    ("import enum\nclass E(enum.IntEnum):\n    A = 3\ndef f(): return E.A", "assert f() == 3"),
    ("import decimal, fractions\ndef f(): return [decimal.Decimal('0.5'), fractions.Fraction(1, 2)]",
     "assert f() == [0.5, 0.5]"),
    ("import re\ndef f(x): return re.match('a', x)", "assert f('a') and not f('b') and f('b') is None"),
    ("def f(): return {1: 2}.values()", "assert list(f()) == [2] and f() != [2]"),
    ("def f(): return {1: 2}.keys()", "assert f() == {1}"),
    ("def f(): return float('inf')", "assert f() == 1e999"),
    ("def f(x): return x + 1", "assert all(f(i) == i + 1 for i in range(5)) and [f(y) for y in (1,)] == [2]"),
    ("def f(x): return x + 1", "assert (lambda x: f(x))(2) == 3"),
    ("def f(x): return x + 1", "import math\nassert math.isclose(f(0.1), 1.1, rel_tol=0.001), 'no'"),
    ("def f(x): return x + 1", "from math import sqrt as root\nassert root(f(8)) == 3"),
    ("class A:\n    b = [lambda x: x]", "assert A.b[0](3) == 3 and A().b"),
    ("class Node:\n    def __init__(self, x): self.x = x\ndef f(n): return n.x", "node = Node(3)\nassert f(node) == 3"),
    ("def f(x): x.append(1)", "x = []\nf(x)\nassert x == [1] and f(x) is None"),
    ("def f(x): return x", "assert f(1) == 1 or f(undefined)"),
])
def test_values_come_across(source, test):
    [outcome] = run_programs([Program(source, (test,))])
    assert outcome.passed, outcome


@pytest.mark.parametrize(("source", "test", "detail"), [
    ("def f(): return f", "assert f() > 3", "TypeError: '>' not supported"),
    ("def f(): return 3", "assert f() == 3 and f", ""),
    ("def f(): return 3", "assert sum(f()) == 3", "TypeError: 'int' object is not iterable"),
    ("def f(): return 3", "import nowhere_at_all\nassert f() == 3", "ModuleNotFoundError: No module named"),
    ("def f(): return 3", "assert g() == 3", "NameError: name 'g' is not defined"),
    ("def f(): return 3.0000001", "assert f() == 3", "AssertionError: assert f() == 3 (got 3.0000001)"),
    ("import math\nmath.isclose = lambda *a, **k: True\ndef f(): return 3", "import math\nassert math.isclose(f(), 4)",
     "AssertionError"),
    ("sum = lambda x: 6\n", "assert sum([1, 2]) == 6", "AssertionError: assert sum([1, 2]) == 6 (got nothing)"),
])
def test_what_is_not_equal_fails(source, test, detail):
    [outcome] = run_programs([Program(source, (test,))])
    assert outcome.detail.startswith(detail)
    assert outcome.verdict is (Verdict.FAILED if detail else Verdict.PASSED)


def test_builtin_that_the_program_defines():
    program = Program("def sum(a, b): return a + b", ("assert sum(10, 15) == 25",), {"sum"})
    assert run_programs([program])[0].passed


@pytest.mark.parametrize(("tests", "message"), [
    ((), "pass anything"), (("x = 1",), "pass anything"), (("assert f(",), "not Python"),
    (("def check():\n    assert f()", "assert f()"), "another statement"),
    (("for i in (1, 2):\n    assert f(i)",), "another statement"), (("from math import *",), "unnamed"),
    (("return f()", "assert f()"), "not Python"), (("assert await f()",), "not Python"),
    (("assert f('\ud800') == '\ud800",), "not Python"), ((f"assert f() == {'(' * 500}1{')' * 500}",), "not Python"),
    ((f"assert f() == {'9' * 5000}",), "not Python"), ((f"assert f() == 0x{'9' * 5000}",), "not Python"),
    (("assert f() == '\0'",), "not Python"), (("assert " + "-" * 50_000 + "1",), "not Python"),
])
def test_tests_that_cannot_be_judged(tests, message):
    with pytest.raises(ValueError, match=message):
        run_programs([Program("", tests)])


def test_order_and_progress(capsys):
    programs = [Program(f"def f(): return {i}", ("assert f() % 2",)) for i in range(9)]
    found = run_programs(programs, workers=3, progress="Parity")
    assert [outcome.passed for outcome in found] == [bool(i % 2) for i in range(9)]
    assert capsys.readouterr().err == "Parity: 9 of 9 programs run, 4 passed\n"
    assert run_programs([]) == []
    with pytest.raises(ValueError, match="workers must be"):
        run_programs(programs, workers=0)
    with pytest.raises(ValueError, match="memory_bytes must be positive"):
        Limits(memory_bytes=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupt_leaves_nothing(tmp_path, number):
    script = ("from tasks.programs.sandbox import *\n"
              "sleep = Program('import os, time, signal\\nsignal.signal(15, signal.SIG_IGN)\\n"
              "if os.fork(): os.setsid\\ntime.sleep(1000)', ('assert f()',))\n"
              "guarantees()\nprint('ready', flush=True)\nrun_programs([sleep] * 4, workers=2)")
    running = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert running.stdout.readline() == "ready\n"
    time.sleep(0.5)
    assert list(tmp_path.iterdir())
    running.send_signal(number)
    _, errors = running.communicate(timeout=10)
    assert running.returncode
    assert not left(running.pid)
    if number == signal.SIGINT:
        assert errors.strip().endswith("KeyboardInterrupt")
        assert not list(tmp_path.iterdir())
    else:  # nobody is there to remove an empty folder
        assert not [path for folder in tmp_path.iterdir() for path in folder.iterdir()]


ON_A_POORER_HOST = """
from tasks.programs import calls, sandbox
program = sandbox.Program("def f(): return 1", ("assert f() == 1",))
loop = sandbox.Program("while True: pass", ("assert f() == 1",))
leave = sandbox.Program("import os; os._exit(0)", ("assert f() == 1",))
print(sorted(name for name, holds in sandbox.guarantees().items() if holds))
try: sandbox.run_programs([program])
except sandbox.SandboxError as error: print(error)
limits = sandbox.Limits(cpu_seconds=1, wall_seconds=2)
print(*[outcome.verdict for outcome in sandbox.run_programs([program, loop, leave], limits=limits, insist=True)])
"""


def poorer(*command: str, tmp_path: pathlib.Path) -> list[str]:
    if os.geteuid() or not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("needs root, and setpriv and unshare of util-linux")
    done = subprocess.run([*command, sys.executable, "-c", ON_A_POORER_HOST], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    return done.stdout.splitlines()


def test_without_namespaces_it_refuses_and_can_be_told_to_go_on(tmp_path):
    lines = poorer("unshare", "--map-root-user", "sh", "-c", "echo 0 > /proc/sys/user/max_user_namespaces; "
                   'exec setpriv --bounding-set=-sys_admin --inh-caps=-all "$@"', "sh", tmp_path=tmp_path)
    assert lines[0] == "['memory', 'network']"  # which take no namespaces
    assert "lacks the guarantees reading, writing, signals, processes ([Errno" in lines[1]
    assert lines[2] == "passed timed out crashed"


def test_through_a_user_namespace(tmp_path):
    """As anybody but root goes; root's own processes cannot be counted there, and that is told."""
    lines = poorer("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", tmp_path=tmp_path)
    assert lines[0] == "['memory', 'network', 'reading', 'signals', 'writing']"
    assert "lacks the guarantees processes (a limit does not hold)" in lines[1]
    assert lines[2] == "passed timed out crashed"


def test_imports_nothing_heavy():
    script = ("import sys, tasks.programs.programs; "
              "print({'jax', 'gin', 'tensorflow', 'seqio', 'numpy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
