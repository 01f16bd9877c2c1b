"""Verdicts of the sandbox against plain `exec` of a program and its tests, on pairs of our own, right and wrong."""

import json
import pathlib
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
MODULES = ("array asyncio collections copy datetime decimal enum fractions functools ipaddress itertools math operator "
           "pathlib re types uuid").split()


def read_cases() -> list[tuple[str, str]]:
    """(program, test) pairs of verdicts.txt: each block a program, or what `f` returns behind "= ", and its tests.

    A test is a condition behind "? ", or statements, the first of them there and the others behind "| ". What modules
    a block names are imported.
    """
    found = []
    for block in pathlib.Path(__file__).with_name("verdicts.txt").read_text().split("\n\n"):
        source, *tests = block.strip("\n").split("\n? ")
        imports = "".join(f"import {name}; " for name in MODULES if f"{name}." in block) + "\n"
        if source.startswith("= "):
            source = f"{imports}def f(): return {source[2:]}"
        for test in tests:
            statements = test.replace("\n| ", "\n") if "\n" in test else f"assert {test}"
            found.append((source, imports + statements))
    return found


CASES = read_cases()


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], tuple[bool, sandbox.Outcome]]:
    """What plain `exec` says, and the sandbox; conditions that hold for one program are judged one after the other."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN_EXEC], input=json.dumps(CASES), text=True,
                          capture_output=True, check=True, env={"PYTHONHASHSEED": "0"})
    wanted = dict(zip(CASES, json.loads(done.stdout), strict=True))
    together: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (source, test), holds in wanted.items():
        alone = test.count("\n") > 1 or not holds
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
